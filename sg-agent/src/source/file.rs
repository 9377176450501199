//! The rules file: what the AWS CLI's describe commands print, in one JSON object or an array of them. Owns its shape
//! and the errors that name a place in it; whoever runs it watches it for changes.

#[cfg(test)]
mod tests;

use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::SourceError;
use super::convert::Facts;
use super::quirks::Quirks;
use super::wire;
use crate::model::Inventory;

/// A file larger than this isn't one that somebody wrote.
const LIMIT: u64 = 64 << 20;

/// The source of `--rules FILE`.
#[derive(Clone, Copy, Debug)]
pub struct RulesFile;

/// One object of it. A key that isn't known is a misspelt one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase", expecting = "an object as the AWS CLI prints it")]
struct Document {
    security_groups: Option<Vec<wire::SecurityGroup>>,
    security_group_rules: Option<Vec<wire::GroupRule>>,
    reservations: Option<Vec<wire::Reservation>>,
    network_interfaces: Option<Vec<wire::NetworkInterface>>,
    prefix_lists: Option<Vec<wire::PrefixList>>,
    vpcs: Option<Vec<wire::Vpc>>,
    subnets: Option<Vec<wire::Subnet>>,
    network_acls: Option<Vec<wire::NetworkAcl>>,
    vpc_peering_connections: Option<Vec<wire::Peering>>,
    #[serde(rename = "NextToken")]
    _next_token: Option<serde::de::IgnoredAny>,
    #[serde(rename = "ResponseMetadata")]
    _response_metadata: Option<serde::de::IgnoredAny>,
}

const KEYS: &str = "SecurityGroups, SecurityGroupRules, Reservations, NetworkInterfaces, PrefixLists, Vpcs, Subnets, \
                    NetworkAcls, VpcPeeringConnections";

impl RulesFile {
    /// Reads the file. What it says is taken as it is: nothing is added that an emulator would have left out.
    pub fn load(path: impl AsRef<Path>) -> Result<Inventory, SourceError> {
        let path = path.as_ref();
        let unreadable = |reason| SourceError::File { path: path.to_owned(), reason };
        let mut text = Vec::new();
        std::fs::File::open(path).map_err(unreadable)?.take(LIMIT + 1).read_to_end(&mut text).map_err(unreadable)?;
        if text.len() as u64 > LIMIT {
            return Err(unreadable(std::io::Error::other("it is larger than 64 MiB")));
        }
        Self::parse(&text, path)
    }

    /// Reads what the file holds; `path` is its name in errors.
    pub fn parse(text: &[u8], path: &Path) -> Result<Inventory, SourceError> {
        let documents = parse(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            let problem = error.to_string();
            let place = format!(" at line {line} column {column}");
            let problem = problem.strip_suffix(&place).unwrap_or(&problem).to_owned();
            SourceError::Json { path: path.to_owned(), line, column, problem }
        })?;
        if !documents.iter().any(Document::says_something) {
            return Err(SourceError::EmptyFile { path: path.to_owned(), expected: KEYS });
        }
        let facts = facts(documents);
        match facts.contradiction() {
            Some(what) => Err(SourceError::Contradiction { source_name: path.display().to_string(), what }),
            None => Ok(facts.inventory(Quirks::default())),
        }
    }
}

fn parse(text: &[u8]) -> Result<Vec<Document>, serde_json::Error> {
    // Not an untagged enum: that would lose the place of an error.
    if text.trim_ascii_start().starts_with(b"[") {
        serde_json::from_slice(text)
    } else {
        serde_json::from_slice(text).map(|document| vec![document])
    }
}

fn facts(documents: Vec<Document>) -> Facts {
    let mut facts = Facts::default();
    for document in documents {
        facts.groups.extend(document.security_groups.into_iter().flatten());
        if let Some(rules) = document.security_group_rules {
            facts.rules.get_or_insert_default().extend(rules);
        }
        if let Some(reservations) = document.reservations {
            facts.reservations.get_or_insert_default().extend(reservations);
        }
        facts.interfaces.extend(document.network_interfaces.into_iter().flatten());
        facts.prefix_lists.extend(document.prefix_lists.into_iter().flatten());
        facts.vpcs.extend(document.vpcs.into_iter().flatten());
        facts.subnets.extend(document.subnets.into_iter().flatten());
        facts.acls.extend(document.network_acls.into_iter().flatten());
        facts.peerings.extend(document.vpc_peering_connections.into_iter().flatten());
    }
    facts
}

impl Document {
    fn says_something(&self) -> bool {
        self.security_groups.is_some()
            || self.security_group_rules.is_some()
            || self.reservations.is_some()
            || self.network_interfaces.is_some()
            || self.prefix_lists.is_some()
            || self.vpcs.is_some()
            || self.subnets.is_some()
            || self.network_acls.is_some()
            || self.vpc_peering_connections.is_some()
    }
}
