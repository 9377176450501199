//! Groups' rules and network ACLs as policies: each rule's peer becomes networks, or a group's number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::place::Placement;
use super::{AclRules, AclSpec, Allowance, GroupSpec, Peers, PolicyKey, Round, Spec, Unknown, World};
use crate::model::{
    AclEntry, AclId, GroupId, Inventory, NetworkAcl, Peer, PrefixListId, Rule, RuleId, Scope, SecurityGroup, SubnetId,
    Traffic, Warning,
};

/// What a policy is made of: where one of these changes, it is resolved again.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Source {
    /// A group's rules.
    Group(Scope, GroupId),
    /// Whether there is such a group, and in which VPC: what a rule that refers to it needs to know.
    Reference(Scope, GroupId),
    List(Scope, PrefixListId),
    Acl(Scope, AclId),
}

/// A policy, and what came up on the way to it.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) spec: Arc<Spec>,
    pub(super) findings: Findings,
}

#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) sources: BTreeSet<Source>,
    pub(super) warnings: BTreeSet<Warning>,
    /// The groups that rules refer to.
    pub(super) referenced: BTreeSet<u32>,
}

/// The policies of all interfaces, each with how many have it, and which are made of what.
#[derive(Debug, Default)]
pub(super) struct Policies {
    resolved: BTreeMap<PolicyKey, (Resolved, usize)>,
    made_of: BTreeMap<Source, BTreeSet<PolicyKey>>,
}

impl Policies {
    /// One interface more has it; false if it is the first, for whom it is yet to be resolved.
    pub(super) fn retain(&mut self, key: &PolicyKey) -> bool {
        let Some((_, users)) = self.resolved.get_mut(key) else { return false };
        *users += 1;
        true
    }

    /// One interface less has it; what it was, if that was the last.
    pub(super) fn release(&mut self, key: &PolicyKey) -> Option<Resolved> {
        let (_, users) = self.resolved.get_mut(key)?;
        *users -= 1;
        if *users > 0 {
            return None;
        }
        let (resolved, _) = self.resolved.remove(key)?;
        self.unlink(key, &resolved);
        Some(resolved)
    }

    /// Takes one that its first interface has, or that is resolved anew; what it was before.
    pub(super) fn put(&mut self, key: &PolicyKey, resolved: Resolved) -> Option<Resolved> {
        let before = self.resolved.remove(key);
        if let Some((before, _)) = &before {
            self.unlink(key, before);
        }
        for source in &resolved.findings.sources {
            self.made_of.entry(source.clone()).or_default().insert(key.clone());
        }
        let users = before.as_ref().map_or(1, |(_, users)| *users);
        self.resolved.insert(key.clone(), (resolved, users));
        before.map(|(before, _)| before)
    }

    /// The policies that are made of it.
    pub(super) fn made_of(&self, source: &Source) -> impl Iterator<Item = &PolicyKey> {
        self.made_of.get(source).into_iter().flatten()
    }

    fn unlink(&mut self, key: &PolicyKey, resolved: &Resolved) {
        for source in &resolved.findings.sources {
            if let Some(policies) = self.made_of.get_mut(source) {
                policies.remove(key);
                if policies.is_empty() {
                    self.made_of.remove(source);
                }
            }
        }
    }
}

impl Round<'_> {
    /// Which policy the groups of an interface have.
    pub(super) fn policy_of(&self, placement: &Placement, warnings: &mut Vec<Warning>) -> PolicyKey {
        let Some(eni) = &placement.eni else {
            return if self.settings.unknown == Unknown::Allow { PolicyKey::NoGroup } else { PolicyKey::Unknown };
        };
        if !eni.groups.is_empty() {
            return PolicyKey::Groups(placement.scope.clone(), eni.groups.clone());
        }
        let denied = self.settings.deny_without_group;
        warnings.push(Warning {
            subject: format!("{} ({})", placement.attachment.instance, eni.id),
            problem: if denied {
                "has no security group: everything is denied (--no-group=deny)".into()
            } else {
                "has no security group: everything is allowed; give it one, or run with --no-group=deny".into()
            },
        });
        if denied { PolicyKey::Unknown } else { PolicyKey::NoGroup }
    }

    /// A policy's rules, with everything that they refer to.
    pub(super) fn policy(&mut self, key: &PolicyKey) -> Resolved {
        let mut findings = Findings::default();
        let spec = match key {
            PolicyKey::Groups(scope, groups) => Spec::Groups(self.group_spec(scope, groups, &mut findings)),
            PolicyKey::Acl(scope, id) => {
                findings.sources.insert(Source::Acl(scope.clone(), id.clone()));
                let acl = self.world.get(scope).and_then(|inventory| inventory.acls.get(id));
                Spec::Acl(acl.map(acl_rules).unwrap_or_default())
            }
            PolicyKey::NoGroup => Spec::Groups(everything()),
            PolicyKey::Unknown => Spec::Groups(GroupSpec::default()),
        };
        Resolved { spec: Arc::new(spec), findings }
    }

    fn group_spec(&mut self, scope: &Scope, groups: &BTreeSet<GroupId>, findings: &mut Findings) -> GroupSpec {
        let mut spec = GroupSpec::default();
        let Some(inventory) = self.world.get(scope) else { return spec };
        for id in groups {
            findings.sources.insert(Source::Group(scope.clone(), id.clone()));
            let Some(group) = inventory.groups.get(id) else {
                findings.warnings.insert(Warning {
                    subject: id.to_string(),
                    problem: format!("is not in the answer of {scope} though an interface has it: it allows nothing"),
                });
                continue;
            };
            let mut resolve = |rules: &[Rule]| -> Vec<Allowance> {
                rules.iter().filter_map(|rule| self.allowance(scope, group, rule, findings)).collect()
            };
            spec.ingress.extend(resolve(&group.ingress));
            spec.egress.extend(resolve(&group.egress));
        }
        spec
    }

    /// A rule with its peer resolved; `None` where that is dangling, which matches nothing (SG-1.12).
    fn allowance(
        &mut self,
        scope: &Scope,
        group: &SecurityGroup,
        rule: &Rule,
        findings: &mut Findings,
    ) -> Option<Allowance> {
        let one = |network: IpNet| Peers::Networks(Arc::new(BTreeSet::from([network])));
        let mut dangling = |what: String| {
            findings.warnings.insert(Warning {
                subject: format!("{} {}", group.id, rule.id),
                problem: format!("refers to {what}: it matches nothing"),
            });
        };
        let peers = match &rule.peer {
            Peer::Ipv4(network) => one(IpNet::V4(*network)),
            Peer::Ipv6(network) => one(IpNet::V6(*network)),
            Peer::PrefixList(id) => {
                findings.sources.insert(Source::List(scope.clone(), id.clone()));
                match self.world.get(scope).and_then(|inventory| inventory.prefix_lists.get(id)) {
                    Some(list) => Peers::Networks(Arc::clone(&list.entries)),
                    None => {
                        dangling(format!("prefix list {id}, which does not exist"));
                        return None;
                    }
                }
            }
            Peer::Group(_) | Peer::ForeignGroup { .. } => {
                let (owner, id) = owner(scope, &rule.peer)?;
                findings.sources.insert(Source::Reference(owner.clone(), id.clone()));
                match referenced(self.world, scope, &owner, id) {
                    Ok(found) => {
                        if let (Some(here), Some(there)) = (&group.vpc, &found.vpc)
                            && !self.peerings.connect(scope, here, &owner, there)
                        {
                            let id = &found.id;
                            dangling(format!(
                                "security group {id} in {there}, which no active peering connects with {here}"
                            ));
                        }
                        // Who is seen from where is the members' to tell: emulators put groups into any VPC.
                        let number = self.numbers.groups.of(&(owner, found.id.clone()));
                        findings.referenced.insert(number);
                        Peers::Group(number)
                    }
                    Err(problem) => {
                        dangling(problem);
                        return None;
                    }
                }
            }
        };
        Some(Allowance {
            id: rule.id.clone(),
            group: group.id.clone(),
            traffic: rule.traffic,
            peer: rule.peer.clone(),
            peers,
        })
    }
}

/// The subnet's network ACL; `None` where it allows everything, as the default one does (SG-5.3).
pub(super) fn acl<'a>(inventory: &'a Inventory, subnet: &SubnetId) -> Option<&'a NetworkAcl> {
    inventory.acls.values().find(|acl| acl.subnets.contains(subnet)).filter(|acl| restricts(acl))
}

/// Whether a network ACL denies anything.
pub(super) fn restricts(acl: &NetworkAcl) -> bool {
    !(allows_all(&acl.ingress) && allows_all(&acl.egress))
}

fn acl_rules(acl: &NetworkAcl) -> AclRules {
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
    AclRules { ingress: resolve(&acl.ingress), egress: resolve(&acl.egress) }
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
fn owner<'a>(own: &Scope, peer: &'a Peer) -> Option<(Scope, &'a GroupId)> {
    match peer {
        Peer::Group(id) => Some((own.clone(), id)),
        Peer::ForeignGroup { account, group } => {
            Some((Scope { account: account.clone(), region: own.region.clone() }, group))
        }
        Peer::Ipv4(_) | Peer::Ipv6(_) | Peer::PrefixList(_) => None,
    }
}

fn referenced<'a>(world: &'a World, own: &Scope, owner: &Scope, id: &GroupId) -> Result<&'a SecurityGroup, String> {
    let name = || if owner == own { id.to_string() } else { format!("{id} of account {}", owner.account) };
    match world.get(owner) {
        None => Err(format!("security group {}, an account that no instance attached here is in", name())),
        Some(inventory) => match inventory.groups.get(id) {
            None => Err(format!("security group {}, which does not exist", name())),
            Some(found) => Ok(found),
        },
    }
}
