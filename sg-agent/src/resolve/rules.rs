//! Groups' rules and network ACLs as policies: each rule's peer becomes networks, or a group's number.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use super::members::Peerings;
use super::place::Placement;
use super::{AclRules, AclSpec, Allowance, Desired, GroupSpec, Peers, PolicyKey, Resolver, Spec, Unknown, World};
use crate::model::{
    AclEntry, GroupId, Inventory, Peer, Rule, RuleId, Scope, SecurityGroup, SubnetId, Traffic, Warning,
};

impl Resolver {
    /// The policy of an interface's groups, resolved if it isn't yet.
    pub(super) fn policy(
        &mut self,
        world: &World,
        peerings: &Peerings,
        placement: &Placement,
        desired: &mut Desired,
    ) -> (PolicyKey, BTreeSet<GroupId>) {
        let instance = &placement.attachment.instance;
        let Some(eni) = placement.eni else {
            return (without_group(self.settings.unknown == Unknown::Allow, desired), BTreeSet::new());
        };
        if eni.groups.is_empty() {
            let denied = self.settings.deny_without_group;
            desired.warnings.insert(Warning {
                subject: format!("{instance} ({})", eni.id),
                problem: if denied {
                    "has no security group: everything is denied (--no-group=deny)".into()
                } else {
                    "has no security group: everything is allowed; give it one, or run with --no-group=deny".into()
                },
            });
            return (without_group(!denied, desired), BTreeSet::new());
        }
        let key = PolicyKey::Groups(placement.scope.clone(), eni.groups.clone());
        if !desired.policies.contains_key(&key) {
            let spec = self.group_spec(world, peerings, &placement.scope, &eni.groups, desired);
            desired.policies.insert(key.clone(), Arc::new(Spec::Groups(spec)));
        }
        (key, eni.groups.clone())
    }

    fn group_spec(
        &mut self,
        world: &World,
        peerings: &Peerings,
        scope: &Scope,
        groups: &BTreeSet<GroupId>,
        desired: &mut Desired,
    ) -> GroupSpec {
        let mut spec = GroupSpec::default();
        let Some(inventory) = world.get(scope) else { return spec };
        for id in groups {
            let Some(group) = inventory.groups.get(id) else {
                desired.warnings.insert(Warning {
                    subject: id.to_string(),
                    problem: format!("is not in the answer of {scope} though an interface has it: it allows nothing"),
                });
                continue;
            };
            let mut resolve = |rules: &[Rule]| -> Vec<Allowance> {
                rules.iter().filter_map(|rule| self.allowance(world, peerings, scope, group, rule, desired)).collect()
            };
            spec.ingress.extend(resolve(&group.ingress));
            spec.egress.extend(resolve(&group.egress));
        }
        spec
    }

    /// A rule with its peer resolved; `None` where that is dangling, which matches nothing (SG-1.12).
    fn allowance(
        &mut self,
        world: &World,
        peerings: &Peerings,
        scope: &Scope,
        group: &SecurityGroup,
        rule: &Rule,
        desired: &mut Desired,
    ) -> Option<Allowance> {
        let one = |network: IpNet| Peers::Networks(Arc::new(BTreeSet::from([network])));
        let mut dangling = |what: String| {
            desired.warnings.insert(Warning {
                subject: format!("{} {}", group.id, rule.id),
                problem: format!("refers to {what}: it matches nothing"),
            });
        };
        let peers = match &rule.peer {
            Peer::Ipv4(network) => one(IpNet::V4(*network)),
            Peer::Ipv6(network) => one(IpNet::V6(*network)),
            Peer::PrefixList(id) => match world.get(scope).and_then(|inventory| inventory.prefix_lists.get(id)) {
                Some(list) => Peers::Networks(Arc::new(list.entries.clone())),
                None => {
                    dangling(format!("prefix list {id}, which does not exist"));
                    return None;
                }
            },
            Peer::Group(_) | Peer::ForeignGroup { .. } => match referenced(world, scope, &rule.peer) {
                Ok((owner, found)) => {
                    if let (Some(here), Some(there)) = (&group.vpc, &found.vpc)
                        && !peerings.connect(scope, here, &owner, there)
                    {
                        let id = &found.id;
                        dangling(format!(
                            "security group {id} in {there}, which no active peering connects with {here}"
                        ));
                    }
                    // Who is seen from where is the members' to tell: emulators put groups into any VPC.
                    Peers::Group(self.group_number(&owner, &found.id))
                }
                Err(problem) => {
                    dangling(problem);
                    return None;
                }
            },
        };
        Some(Allowance {
            id: rule.id.clone(),
            group: group.id.clone(),
            traffic: rule.traffic,
            peer: rule.peer.clone(),
            peers,
        })
    }

    /// The policy of the subnet's network ACL; `None` where it allows everything, as the default one does (SG-5.3).
    pub(super) fn acl(
        &mut self,
        inventory: &Inventory,
        scope: &Scope,
        subnet: &SubnetId,
        desired: &mut Desired,
    ) -> Option<PolicyKey> {
        let acl = inventory.acls.values().find(|acl| acl.subnets.contains(subnet))?;
        let resolve = |entries: &[AclEntry]| -> Vec<AclSpec> {
            entries
                .iter()
                .map(|entry| AclSpec {
                    number: entry.number,
                    allow: entry.allow,
                    traffic: entry.traffic,
                    peers: Peers::Networks(Arc::new(BTreeSet::from([entry.network]))),
                })
                .collect()
        };
        if allows_all(&acl.ingress) && allows_all(&acl.egress) {
            return None;
        }
        let key = PolicyKey::Acl(scope.clone(), acl.id.clone());
        desired.policies.entry(key.clone()).or_insert_with(|| {
            Arc::new(Spec::Acl(AclRules { ingress: resolve(&acl.ingress), egress: resolve(&acl.egress) }))
        });
        Some(key)
    }
}

/// The policy of an interface without a group: everything is allowed, or nothing.
fn without_group(is_allowed: bool, desired: &mut Desired) -> PolicyKey {
    let (key, rules) =
        if is_allowed { (PolicyKey::NoGroup, everything()) } else { (PolicyKey::Unknown, GroupSpec::default()) };
    desired.policies.entry(key.clone()).or_insert_with(|| Arc::new(Spec::Groups(rules)));
    key
}

/// The rules of an interface without a group (SG-2.5).
fn everything() -> GroupSpec {
    let allow = |network: &str| {
        let network: IpNet = network.parse().expect("a literal network");
        Allowance {
            id: RuleId::from("no-group"),
            group: GroupId::from("no-group"),
            traffic: Traffic::All,
            peer: match network {
                IpNet::V4(network) => Peer::Ipv4(network),
                IpNet::V6(network) => Peer::Ipv6(network),
            },
            peers: Peers::Networks(Arc::new(BTreeSet::from([network]))),
        }
    };
    let both = vec![allow("0.0.0.0/0"), allow("::/0")];
    GroupSpec { ingress: both.clone(), egress: both }
}

fn allows_all(entries: &[AclEntry]) -> bool {
    let first = |is_v4: bool| {
        entries
            .iter()
            .find(|entry| matches!(entry.network, IpNet::V4(_)) == is_v4)
            .is_some_and(|entry| entry.allow && entry.traffic == Traffic::All && entry.network.prefix_len() == 0)
    };
    first(true) && first(false)
}

/// The group that a rule refers to, and where it is: in the rule's own account, or in another one in the same region
/// (SG-1.12).
fn referenced<'a>(world: &'a World, own: &Scope, peer: &Peer) -> Result<(Scope, &'a SecurityGroup), String> {
    let (owner, id) = match peer {
        Peer::Group(id) => (own.clone(), id),
        Peer::ForeignGroup { account, group } => {
            (Scope { account: account.clone(), region: own.region.clone() }, group)
        }
        _ => return Err("no security group".into()),
    };
    let name = if owner == *own { id.to_string() } else { format!("{id} of account {}", owner.account) };
    match world.get(&owner) {
        None => Err(format!("security group {name}, an account that no instance attached here is in")),
        Some(inventory) => match inventory.groups.get(id) {
            None => Err(format!("security group {name}, which does not exist")),
            Some(found) => Ok((owner, found)),
        },
    }
}
