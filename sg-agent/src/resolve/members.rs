//! Who is in which referenced group, by address, and from where that is seen: VPCs and their peerings.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::desired::Place;
use super::{EniKey, GroupKey, Membership, Round};
use crate::model::{Eni, Scope, VpcId};
use crate::sharing::Table;

/// What rules and network ACLs ask about, each with how many ask.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Groups.
    pub(super) groups: Counts,
    /// Subnets.
    pub(super) subnets: Counts,
}

/// How many ask about each number.
#[derive(Debug, Default)]
pub(super) struct Counts(BTreeMap<u32, usize>);

impl Counts {
    pub(super) fn contains(&self, number: u32) -> bool {
        self.0.contains_key(&number)
    }

    /// One more asks; whether it is the first.
    pub(super) fn add(&mut self, number: u32) -> bool {
        let count = self.0.entry(number).or_default();
        *count += 1;
        *count == 1
    }

    /// One less asks; whether it was the last.
    pub(super) fn take(&mut self, number: u32) -> bool {
        let Some(count) = self.0.get_mut(&number) else { return false };
        *count -= 1;
        let is_last = *count == 0;
        if is_last {
            self.0.remove(&number);
        }
        is_last
    }
}

/// What one interface contributes to memberships.
#[derive(PartialEq, Debug)]
pub(super) struct Contribution {
    membership: Membership,
    /// Its private addresses and prefixes.
    places: Vec<IpNet>,
    /// The VPCs from which they are seen.
    seers: Vec<u32>,
}

impl Contribution {
    fn seen(&self) -> impl Iterator<Item = Place> {
        self.seers.iter().flat_map(|&seer| self.places.iter().map(move |&place| (seer, place)))
    }
}

/// Every interface's contribution, and whose there are at each place.
#[derive(Debug, Default)]
pub(super) struct Members {
    contributions: BTreeMap<EniKey, Contribution>,
    at: BTreeMap<Place, BTreeSet<EniKey>>,
    of_group: BTreeMap<GroupKey, BTreeSet<EniKey>>,
}

impl Members {
    /// Takes note of the groups that an interface is in, whether or not anybody asks.
    pub(super) fn regroup(&mut self, key: &EniKey, before: Option<&Eni>, after: Option<&Eni>) {
        for group in before.into_iter().flat_map(|eni| &eni.groups) {
            let group = (key.0.clone(), group.clone());
            if let Some(enis) = self.of_group.get_mut(&group) {
                enis.remove(key);
                if enis.is_empty() {
                    self.of_group.remove(&group);
                }
            }
        }
        for group in after.into_iter().flat_map(|eni| &eni.groups) {
            self.of_group.entry((key.0.clone(), group.clone())).or_default().insert(key.clone());
        }
    }

    /// The interfaces in a group.
    pub(super) fn in_group(&self, group: &GroupKey) -> impl Iterator<Item = &EniKey> {
        self.of_group.get(group).into_iter().flatten()
    }

    /// Takes an interface's contribution; the places where that may make a difference.
    pub(super) fn put(&mut self, key: EniKey, contribution: Option<Contribution>, places: &mut BTreeSet<Place>) {
        if self.contributions.get(&key) == contribution.as_ref() {
            return;
        }
        if let Some(before) = self.contributions.remove(&key) {
            for place in before.seen() {
                if let Some(enis) = self.at.get_mut(&place) {
                    enis.remove(&key);
                    if enis.is_empty() {
                        self.at.remove(&place);
                    }
                }
                places.insert(place);
            }
        }
        if let Some(contribution) = contribution {
            for place in contribution.seen() {
                self.at.entry(place).or_default().insert(key.clone());
                places.insert(place);
            }
            self.contributions.insert(key, contribution);
        }
    }

    /// Brings the memberships at these places together.
    pub(super) fn bring(&self, places: &BTreeSet<Place>, members: &mut Table<Place, Membership>) {
        for place in places {
            let Some(enis) = self.at.get(place) else {
                members.remove(place);
                continue;
            };
            let mut membership = Membership::default();
            for its in enis.iter().filter_map(|key| self.contributions.get(key)) {
                membership.groups.extend(&its.membership.groups);
                membership.subnet = membership.subnet.or(its.membership.subnet);
            }
            if members.get(place) != Some(&membership) {
                members.insert(*place, membership);
            }
        }
    }
}

impl Round<'_> {
    /// The private addresses and prefixes of a member of a referenced group, or of a subnet with an ACL, and the VPCs
    /// that can see them (SG-1.9, SG-1.12).
    pub(super) fn contribution(&mut self, scope: &Scope, eni: &Eni, asked: &Asked) -> Option<Contribution> {
        let subnet = eni.subnet.as_ref().and_then(|id| self.numbers.subnets.known(&(scope.clone(), id.clone())));
        let subnet = subnet.filter(|&number| asked.subnets.contains(number));
        let numbers = eni.groups.iter().filter_map(|group| self.numbers.groups.known(&(scope.clone(), group.clone())));
        let groups: BTreeSet<u32> = numbers.filter(|&number| asked.groups.contains(number)).collect();
        if groups.is_empty() && subnet.is_none() {
            return None;
        }
        let key = (scope.clone(), eni.id.clone());
        let own = self.placing.of_eni.get(&key).map(Vec::as_slice).unwrap_or_default();
        let own = || own.iter().map(|&index| &self.placing.placements[index]);
        let network = (scope.clone(), eni.vpc.clone());
        let is_free = |address: &IpAddr| {
            let holder = self.placing.given.get(&(network.clone(), *address));
            holder.is_none_or(|holder| own().any(|placement| placement.attachment.link.ifindex == *holder))
        };
        // What the containers really have counts beside what the control plane shows.
        let real = own().flat_map(|placement| placement.addresses.iter().copied());
        let addresses = eni.private_addresses().filter(is_free).chain(real);
        let prefixes = self.placing.delegated.get(&key).into_iter().flatten().copied();
        let mut places: Vec<IpNet> = addresses.map(IpNet::from).chain(prefixes).collect();
        places.sort_unstable();
        places.dedup();
        let vpc = eni.vpc.clone().unwrap_or_else(|| VpcId::from(""));
        let seers = self.peerings.seers(&(scope.clone(), vpc));
        let seers = seers.iter().map(|seer| self.numbers.vpcs.of(seer)).collect();
        Some(Contribution { membership: Membership { groups, subnet }, places, seers })
    }
}
