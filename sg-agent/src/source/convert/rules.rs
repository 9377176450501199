//! Groups and their rules. Owns which rules are left out, by name; a rule that isn't understood never widens anything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sg_common::abi::Direction;

use super::super::quirks::{self, Quirks};
use super::super::wire;
use super::{ACTIVE, NotANumber, Warnings, identified, number, text};
use crate::model::{
    GroupId, Peer, PeerError, PeerFields, PrefixListId, Rule, RuleId, SecurityGroup, Traffic, TrafficError, VpcId,
};

/// Why a rule is left out.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Traffic(#[from] TrafficError),
    #[error(transparent)]
    Number(#[from] NotANumber),
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("group {0} does not exist, so that nothing matches it")]
    NoGroup(GroupId),
    #[error("the peering connection to the VPC of group {group} is {status}, so that nothing matches it")]
    Peering { group: GroupId, status: String },
    #[error("prefix list {0} does not exist, so that nothing matches it")]
    NoPrefixList(PrefixListId),
}

/// What rules may refer to.
struct Known<'a> {
    /// Groups, with their owners' accounts.
    groups: BTreeMap<GroupId, String>,
    lists: &'a BTreeSet<PrefixListId>,
}

pub(super) fn groups(
    wire: Vec<wire::SecurityGroup>,
    rules: Option<Vec<wire::GroupRule>>,
    bare: &BTreeSet<String>,
    lists: &BTreeSet<PrefixListId>,
    quirks: Quirks,
    warnings: &mut Warnings,
) -> BTreeMap<GroupId, SecurityGroup> {
    let known =
        Known { groups: wire.iter().map(|group| (group.id.as_str().into(), group.owner.clone())).collect(), lists };
    let mut by_group = rules.map(sorted_by_group);
    let mut groups = BTreeMap::new();
    for group in wire {
        if groups.contains_key(&GroupId::from(group.id.as_str())) {
            // The same again (see `Facts::contradiction`); its rules are taken already.
            continue;
        }
        let Some(id) = identified(&group.id, "a security group", warnings) else { continue };
        let rules = match &mut by_group {
            _ if bare.contains(id) => Vec::new(),
            Some(by_group) => by_group.remove(id).unwrap_or_default(),
            None => from_permissions(&group),
        };
        let mut model = SecurityGroup {
            id: id.into(),
            name: group.name.clone(),
            vpc: (!group.vpc.is_empty()).then(|| VpcId::from(group.vpc.as_str())),
            owner: Arc::from(group.owner.as_str()),
            ingress: valid(&rules, Direction::Ingress, &group, &known, warnings),
            egress: valid(&rules, Direction::Egress, &group, &known, warnings),
        };
        let asked_for_none = !rules.iter().any(|rule| !rule.egress);
        if quirks.default_self_rule && !bare.contains(id) && asked_for_none {
            quirks::complete_default_group(&mut model);
        }
        groups.insert(model.id.clone(), model);
    }
    groups
}

/// By group, and there by id: the order of the answer isn't AWS's promise.
fn sorted_by_group(rules: Vec<wire::GroupRule>) -> BTreeMap<String, Vec<wire::GroupRule>> {
    let mut by_group: BTreeMap<String, Vec<wire::GroupRule>> = BTreeMap::new();
    for rule in rules {
        by_group.entry(rule.group.clone()).or_default().push(rule);
    }
    for (group, rules) in &mut by_group {
        for direction in [Direction::Ingress, Direction::Egress] {
            let without_id = rules.iter_mut().filter(|rule| is_of(direction, rule) && rule.id.is_empty());
            for (index, rule) in without_id.enumerate() {
                rule.id = format!("{group}/{}[{index}]", direction.name());
            }
        }
        rules.sort_by(|a, b| a.id.cmp(&b.id));
    }
    by_group
}

/// SG-1.6: a permission with n peers is n rules. One with none is kept, to be told about.
pub fn from_permissions(group: &wire::SecurityGroup) -> Vec<wire::GroupRule> {
    let mut rules = Vec::new();
    for (direction, permissions) in [(Direction::Ingress, &group.ingress), (Direction::Egress, &group.egress)] {
        let expanded = permissions.into_iter().flat_map(peers_of).enumerate().map(|(index, rule)| wire::GroupRule {
            id: format!("{}/{}[{index}]", group.id, direction.name()),
            group: group.id.clone(),
            egress: direction == Direction::Egress,
            ..rule
        });
        rules.extend(expanded);
    }
    rules
}

/// Whether two prints of a group say the same, in whatever order.
pub(super) fn are_same(one: &wire::SecurityGroup, other: &wire::SecurityGroup) -> bool {
    let is_in = |rules: &[wire::GroupRule], rule: &wire::GroupRule| {
        rules.iter().any(|other| wire::GroupRule { id: rule.id.clone(), ..other.clone() } == *rule)
    };
    let (ones, others) = (from_permissions(one), from_permissions(other));
    (&one.name, &one.vpc, &one.owner) == (&other.name, &other.vpc, &other.owner)
        && ones.iter().all(|rule| is_in(&others, rule))
        && others.iter().all(|rule| is_in(&ones, rule))
}

fn peers_of(permission: &wire::Permission) -> Vec<wire::GroupRule> {
    let base = wire::GroupRule {
        protocol: permission.protocol.clone(),
        from: permission.from.clone(),
        to: permission.to.clone(),
        ..Default::default()
    };
    let ipv4 = permission.ipv4.iter().map(|p| wire::GroupRule { ipv4: Some(p.cidr.clone()), ..base.clone() });
    let ipv6 = permission.ipv6.iter().map(|p| wire::GroupRule { ipv6: Some(p.cidr.clone()), ..base.clone() });
    let groups = permission.groups.iter().map(|p| wire::GroupRule { referenced: Some(p.clone()), ..base.clone() });
    let lists =
        permission.prefix_lists.iter().map(|p| wire::GroupRule { prefix_list: Some(p.id.clone()), ..base.clone() });
    let rules: Vec<_> = ipv4.chain(ipv6).chain(groups).chain(lists).collect();
    if rules.is_empty() { vec![base] } else { rules }
}

fn valid(
    rules: &[wire::GroupRule],
    direction: Direction,
    group: &wire::SecurityGroup,
    known: &Known<'_>,
    warnings: &mut Warnings,
) -> Vec<Rule> {
    let mut valid: Vec<Rule> = Vec::new();
    let mut seen = BTreeSet::new();
    for wire in rules.iter().filter(|rule| is_of(direction, rule)) {
        match rule(wire, group, known) {
            // SG-1.7: the same network again, written otherwise, is the same rule.
            Ok(rule) => {
                if seen.insert((rule.traffic, rule.peer.clone())) {
                    valid.push(rule);
                }
            }
            Err(problem) => {
                let (direction, id, name) = (direction.name(), &group.id, &group.name);
                warnings.push(&wire.id, format!("{direction} rule of {id} ({name}) left out: {problem}"));
            }
        }
    }
    valid
}

fn rule(wire: &wire::GroupRule, group: &wire::SecurityGroup, known: &Known<'_>) -> Result<Rule, Problem> {
    let traffic = Traffic::parse(text(&wire.protocol), number(&wire.from)?, number(&wire.to)?)?;
    let referenced = wire.referenced.as_ref().filter(|group| !group.id.is_empty());
    let peer = Peer::parse(PeerFields {
        ipv4: text(&wire.ipv4),
        ipv6: text(&wire.ipv6),
        group: referenced.map(|group| group.id.as_str()),
        prefix_list: text(&wire.prefix_list),
    })?;
    let peer = match (peer, referenced) {
        (Peer::Group(id), Some(reference)) => referred(id, reference, group, known)?,
        (Peer::PrefixList(id), _) if !known.lists.contains(&id) => return Err(Problem::NoPrefixList(id)),
        (peer, _) => peer,
    };
    Ok(Rule { id: RuleId::from(wire.id.as_str()), traffic, peer })
}

/// A group as a rule of `group` refers to it (SG-1.12). Ids mean something within an account only; where owners aren't
/// printed, as in a file that was written by hand, all is one account's.
fn referred(
    id: GroupId,
    reference: &wire::GroupRef,
    group: &wire::SecurityGroup,
    known: &Known<'_>,
) -> Result<Peer, Problem> {
    if let Some(status) = text(&reference.peering).filter(|status| *status != ACTIVE) {
        return Err(Problem::Peering { group: id, status: status.to_owned() });
    }
    let is_same = |owner: &str| reference.owner.is_empty() || owner.is_empty() || *owner == reference.owner;
    match known.groups.get(&id) {
        Some(owner) if is_same(owner) => Ok(Peer::Group(id)),
        _ if is_same(&group.owner) => Err(Problem::NoGroup(id)),
        _ => Ok(Peer::ForeignGroup { account: reference.owner.as_str().into(), group: id }),
    }
}

fn is_of(direction: Direction, rule: &wire::GroupRule) -> bool {
    rule.egress == (direction == Direction::Egress)
}
