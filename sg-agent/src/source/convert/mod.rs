//! From what the API prints to the model: the one conversion for endpoints and files. Owns what is left out and the
//! warning that says so; what a rule's fields mean is the model's.

mod acls;
mod interfaces;
mod rules;
#[cfg(test)]
mod tests;

pub(super) use interfaces::{groups, is_terminated};
pub(super) use rules::from_permissions;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net};

use super::quirks::Quirks;
use super::wire::{self, Number};
use crate::model::{
    GroupId, Inventory, PeeredVpc, Peering, PrefixList, Subnet, VpcId, Warning, parse_ipv4, parse_ipv6, parse_network,
};

/// The status of a peering connection that is up.
const ACTIVE: &str = "active";

/// Everything that one scope's control plane printed.
#[derive(Default)]
pub struct Facts {
    /// Security groups.
    pub groups: Vec<wire::SecurityGroup>,
    /// Groups that instances have and that were asked for in vain.
    pub unlisted: BTreeSet<String>,
    /// Their rules with ids; `None` takes the groups' own permissions.
    pub rules: Option<Vec<wire::GroupRule>>,
    /// Groups that were read for their existence only.
    pub bare: BTreeSet<String>,
    /// Instances; `None` where the source doesn't list them, and the interfaces' attachments have to do.
    pub reservations: Option<Vec<wire::Reservation>>,
    /// Interfaces beside those inside the instances.
    pub interfaces: Vec<wire::NetworkInterface>,
    /// Interfaces' own groups, where they were asked for.
    pub own_groups: BTreeMap<String, BTreeSet<GroupId>>,
    /// Prefix lists with their entries.
    pub prefix_lists: Vec<wire::PrefixList>,
    /// VPCs.
    pub vpcs: Vec<wire::Vpc>,
    /// Subnets.
    pub subnets: Vec<wire::Subnet>,
    /// Network ACLs.
    pub acls: Vec<wire::NetworkAcl>,
    /// Peering connections in any state.
    pub peerings: Vec<wire::Peering>,
}

impl Facts {
    /// What is listed twice with different contents, which no answer of AWS's has: one of the two is out of date, as
    /// where a page was read before a change and the next one after it. To take either could lose a rule or bring a
    /// revoked one back, both together could as well; so the answer isn't taken, and what was enforced stands. The same
    /// twice is once.
    pub fn contradiction(&self) -> Option<String> {
        let groups = twice(&self.groups, |group| &group.id, rules::are_same);
        let lists = twice(&self.prefix_lists, |list| &list.id, |one, other| one == other);
        let acls = twice(&self.acls, |acl| &acl.id, |one, other| one == other);
        let name = |kind: &str, id: Option<&str>| id.map(|id| format!("{kind} {id}"));
        name("security group", groups).or_else(|| name("prefix list", lists)).or_else(|| name("network ACL", acls))
    }

    /// The model of it all.
    pub fn inventory(self, quirks: Quirks) -> Inventory {
        let mut inventory = Inventory::default();
        let mut warnings = Warnings::default();
        inventory.prefix_lists = self.prefix_lists.iter().filter_map(|list| prefix_list(list, &mut warnings)).collect();
        let lists = inventory.prefix_lists.keys().cloned().collect();
        let groups = rules::groups(self.groups, self.rules, &self.bare, &lists, quirks, &mut warnings);
        inventory.groups = groups.into_iter().collect();
        inventory.terminated = self.reservations.iter().flatten().flat_map(interfaces::terminated).collect();
        let (instances, enis) =
            interfaces::instances(self.reservations, self.interfaces, &self.own_groups, &mut warnings);
        inventory.instances = instances.into_iter().collect();
        inventory.enis = enis.into_iter().collect();
        inventory.vpcs = self.vpcs.iter().filter_map(|wire| vpc(wire, &mut warnings)).collect();
        inventory.subnets = self.subnets.iter().filter_map(|wire| subnet(wire, &mut warnings)).collect();
        inventory.acls = self.acls.iter().filter_map(|wire| acls::acl(wire, quirks, &mut warnings)).collect();
        inventory.peerings = self.peerings.iter().filter_map(peering).collect();
        inventory.warnings = warnings.0.into_iter().collect();
        inventory
    }
}

/// The first id under which there are different items. Items without one are left out, and told, one by one.
fn twice<T>(items: &[T], id: impl Fn(&T) -> &String, are_same: impl Fn(&T, &T) -> bool) -> Option<&str> {
    let mut seen: BTreeMap<&str, &T> = BTreeMap::new();
    items.iter().filter(|item| !id(item).is_empty()).find_map(|item| {
        let first = seen.insert(id(item), item)?;
        (!are_same(first, item)).then(|| id(item).as_str())
    })
}

/// What was left out; sorted, so that an unchanged answer gives an equal inventory.
#[derive(Default)]
struct Warnings(BTreeSet<Warning>);

impl Warnings {
    fn push(&mut self, subject: impl Into<String>, problem: impl Into<String>) {
        self.0.insert(Warning { subject: subject.into(), problem: problem.into() });
    }
}

fn prefix_list<K: for<'a> From<&'a str>>(list: &wire::PrefixList, warnings: &mut Warnings) -> Option<(K, PrefixList)> {
    let id = identified(&list.id, "a prefix list", warnings)?;
    let mut entries: BTreeSet<IpNet> = BTreeSet::new();
    for entry in list.entries.iter().flatten() {
        match (list.family.as_deref(), parse_network(&entry.cidr)) {
            (Some("IPv4"), Ok(IpNet::V6(net))) => {
                warnings.push(id, format!("entry {net} left out: the list is of IPv4"));
            }
            (Some("IPv6"), Ok(IpNet::V4(net))) => {
                warnings.push(id, format!("entry {net} left out: the list is of IPv6"));
            }
            (_, Ok(net)) => {
                entries.insert(net);
            }
            (_, Err(error)) => warnings.push(id, format!("entry left out: {error}")),
        }
    }
    if entries.iter().any(|net| matches!(net, IpNet::V4(_))) && entries.iter().any(|net| matches!(net, IpNet::V6(_))) {
        // SG-1.8: a list is of one family; which one this was meant to be can't be told.
        warnings.push(id, "all entries left out: they are of both families, and a list holds one");
        entries.clear();
    }
    let version = match list.version {
        Some(Number::Int(version)) => version,
        _ => 0,
    };
    Some((id.into(), PrefixList { id: id.into(), version, entries: entries.into() }))
}

fn vpc(wire: &wire::Vpc, warnings: &mut Warnings) -> Option<(VpcId, Ipv4Net)> {
    let id = identified(&wire.id, "a VPC", warnings)?;
    match parse_ipv4(text(&wire.ipv4)?) {
        Ok(network) => Some((id.into(), network)),
        Err(error) => {
            warnings.push(id, format!("its network is left out: {error}"));
            None
        }
    }
}

fn subnet<K: for<'a> From<&'a str>>(wire: &wire::Subnet, warnings: &mut Warnings) -> Option<(K, Subnet)> {
    let id = identified(&wire.id, "a subnet", warnings)?;
    let ipv4 = text(&wire.ipv4).and_then(|cidr| {
        parse_ipv4(cidr).map_err(|error| warnings.push(id, format!("its network is left out: {error}"))).ok()
    });
    let associated = |block: &&wire::Ipv6Block| {
        !block.cidr.is_empty() && block.state.as_ref().is_none_or(|state| state.state == "associated")
    };
    let ipv6 = wire.ipv6.iter().find(associated).and_then(|block| {
        parse_ipv6(&block.cidr).map_err(|error| warnings.push(id, format!("its network is left out: {error}"))).ok()
    });
    Some((id.into(), Subnet { id: id.into(), vpc: wire.vpc.as_str().into(), ipv4, ipv6 }))
}

fn peering(wire: &wire::Peering) -> Option<Peering> {
    let end = |wire: &wire::PeeringVpc| PeeredVpc {
        vpc: VpcId::from(wire.id.as_str()),
        account: text(&wire.owner).map(Into::into),
        region: text(&wire.region).map(Into::into),
    };
    let active = wire.status.code == ACTIVE && !wire.accepter.id.is_empty() && !wire.requester.id.is_empty();
    active.then(|| Peering::between(end(&wire.accepter), end(&wire.requester)))
}

/// The id, or a warning that there is none.
fn identified<'a>(id: &'a str, what: &str, warnings: &mut Warnings) -> Option<&'a str> {
    if id.is_empty() {
        warnings.push(what, "left out: it has no id");
    }
    (!id.is_empty()).then_some(id)
}

/// An element that is there but empty says as little as one that is missing.
fn text(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

/// A field that isn't an integer.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a number")]
struct NotANumber(String);

fn number(field: &Option<Number>) -> Result<Option<i64>, NotANumber> {
    match field {
        None => Ok(None),
        Some(Number::Int(value)) => Ok(Some(*value)),
        Some(Number::Bad(text)) => Err(NotANumber(text.clone())),
    }
}
