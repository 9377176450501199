//! Which VPCs see each other's private addresses, and what rules refer to in other accounts.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::World;
use crate::model::{GroupId, Peer, PeeredVpc, Scope, VpcId};

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
#[derive(PartialEq, Debug, Default)]
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
    pub(super) fn seers(&self, vpc: &Place) -> BTreeSet<Place> {
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
