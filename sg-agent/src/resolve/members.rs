//! Who is in which referenced group, by address, and from where that is seen: VPCs and their peerings.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::place::{Delegated, Given, Placement};
use super::{Desired, Peers, Resolver, Spec, World};
use crate::model::{EniId, GroupId, Peer, PeeredVpc, Scope, VpcId};

impl Resolver {
    /// The private addresses and prefixes of every member of a referenced group, or of a subnet with an ACL, from each VPC
    /// that can see them (SG-1.9, SG-1.12).
    pub(super) fn members(
        &mut self,
        world: &World,
        peerings: &Peerings,
        placements: &[Placement],
        given: &Given,
        delegated: &Delegated,
        desired: &mut Desired,
    ) {
        let referenced: BTreeSet<u32> = desired
            .policies
            .values()
            .filter_map(|spec| match &**spec {
                Spec::Groups(groups) => Some(groups.ingress.iter().chain(&groups.egress)),
                Spec::Acl(_) => None,
            })
            .flatten()
            .filter_map(|rule| match rule.peers {
                Peers::Group(number) => Some(number),
                Peers::Networks(_) => None,
            })
            .collect();
        let asked: BTreeSet<u32> =
            desired.interfaces.values().filter_map(|interface| interface.subnet_number).collect();
        if referenced.is_empty() && asked.is_empty() {
            return;
        }
        // What the containers really have counts beside what the control plane shows.
        let mut real: BTreeMap<(&Scope, &EniId), Vec<IpAddr>> = BTreeMap::new();
        let mut links: BTreeMap<(&Scope, &EniId), Vec<u32>> = BTreeMap::new();
        for placement in placements {
            if let Some(eni) = placement.eni {
                real.entry((&placement.scope, &eni.id)).or_default().extend(&placement.addresses);
                links.entry((&placement.scope, &eni.id)).or_default().push(placement.attachment.link.ifindex);
            }
        }
        for (scope, inventory) in world {
            for eni in inventory.enis.values() {
                let subnet = eni.subnet.as_ref().and_then(|id| self.subnets.0.get(&(scope.clone(), id.clone())));
                let subnet = subnet.copied().filter(|number| asked.contains(number));
                let groups: BTreeSet<u32> = eni
                    .groups
                    .iter()
                    .filter_map(|group| self.groups.0.get(&(scope.clone(), group.clone())).copied())
                    .filter(|number| referenced.contains(number))
                    .collect();
                if groups.is_empty() && subnet.is_none() {
                    continue;
                }
                let vpc = eni.vpc.clone().unwrap_or_else(|| VpcId::from(""));
                let real = real.get(&(scope, &eni.id)).map(Vec::as_slice).unwrap_or_default();
                let is_free = |address: &IpAddr| {
                    let holder = given.get(&(scope.clone(), eni.vpc.clone(), *address));
                    holder.is_none_or(|holder| links.get(&(scope, &eni.id)).is_some_and(|own| own.contains(holder)))
                };
                let addresses = eni.private_addresses().filter(is_free).chain(real.iter().copied());
                let prefixes = delegated.get(&(scope, &eni.id)).into_iter().flatten().copied();
                let places: Vec<IpNet> = addresses.map(IpNet::from).chain(prefixes).collect();
                for seer in peerings.seers(&(scope.clone(), vpc)) {
                    let number = self.vpcs.of(&seer);
                    for &place in &places {
                        let member = desired.members.entry((number, place)).or_default();
                        member.groups.extend(&groups);
                        member.subnet = member.subnet.or(subnet);
                    }
                }
            }
        }
    }
}

/// What other accounts' rules refer to, by the scope that it is in (SG-1.12).
pub fn foreign_references(world: &World) -> BTreeMap<Scope, BTreeSet<GroupId>> {
    let mut references: BTreeMap<Scope, BTreeSet<GroupId>> = BTreeMap::new();
    for (scope, inventory) in world {
        let rules = inventory.groups.values().flat_map(|group| group.ingress.iter().chain(&group.egress));
        for rule in rules {
            if let Peer::ForeignGroup { account, group } = &rule.peer {
                let owner = Scope { account: account.clone(), region: scope.region.clone() };
                references.entry(owner).or_default().insert(group.clone());
            }
        }
    }
    references
}

/// Which VPCs see each other's private addresses: those with an active peering connection, in one region. Groups can't
/// be referred to across regions.
#[derive(Debug, Default)]
pub(super) struct Peerings(BTreeMap<Place, BTreeSet<Place>>);

/// A VPC and where it is.
type Place = (Scope, VpcId);

impl Peerings {
    pub(super) fn of(world: &World) -> Self {
        let mut peers: BTreeMap<Place, BTreeSet<Place>> = BTreeMap::new();
        if world.values().all(|inventory| inventory.peerings.is_empty()) {
            return Self(peers);
        }
        let homes = homes(world);
        for (scope, inventory) in world {
            for peering in &inventory.peerings {
                let [one, other] = [&peering.one, &peering.other].map(|end| home(world, &homes, scope, end));
                if let (Some(one), Some(other)) = (one, other) {
                    peers.entry(one.clone()).or_default().insert(other.clone());
                    peers.entry(other).or_default().insert(one);
                }
            }
        }
        Self(peers)
    }

    /// Whether the one sees the other.
    pub(super) fn connect(&self, here: &Scope, one: &VpcId, there: &Scope, other: &VpcId) -> bool {
        let (one, other) = ((here.clone(), one.clone()), (there.clone(), other.clone()));
        one == other || self.0.get(&one).is_some_and(|peers| peers.contains(&other))
    }

    /// From where the addresses of a VPC are seen: itself and its peers.
    fn seers(&self, vpc: &Place) -> BTreeSet<Place> {
        self.0.get(vpc).into_iter().flatten().chain([vpc]).cloned().collect()
    }
}

/// Where each VPC is that anything was read of.
fn homes(world: &World) -> HashMap<&VpcId, BTreeSet<&Scope>> {
    let mut homes: HashMap<&VpcId, BTreeSet<&Scope>> = HashMap::new();
    for (scope, inventory) in world {
        let of_enis = inventory.enis.values().filter_map(|eni| eni.vpc.as_ref());
        let of_groups = inventory.groups.values().filter_map(|group| group.vpc.as_ref());
        let of_subnets = inventory.subnets.values().map(|subnet| &subnet.vpc);
        for vpc in inventory.vpcs.keys().chain(of_enis).chain(of_groups).chain(of_subnets) {
            homes.entry(vpc).or_default().insert(scope);
        }
    }
    homes
}

/// Where one end of a peering is: in its owner's account, if that is read; else where anything was read of it, and best
/// where the peering was. `None` is another region.
fn home(world: &World, homes: &HashMap<&VpcId, BTreeSet<&Scope>>, told: &Scope, end: &PeeredVpc) -> Option<Place> {
    if end.region.as_ref().is_some_and(|region| *region != told.region) {
        return None;
    }
    let owner = end.account.clone().map(|account| Scope { account, region: told.region.clone() });
    let owner = owner.filter(|owner| world.contains_key(owner));
    let known = homes.get(&end.vpc).into_iter().flatten().filter(|scope| scope.region == told.region);
    let scope = owner.unwrap_or_else(|| {
        let mut known = known.copied();
        let first = known.next().unwrap_or(told);
        if known.any(|scope| scope == told) { told.clone() } else { first.clone() }
    });
    Some((scope, end.vpc.clone()))
}
