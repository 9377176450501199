//! R3: what each interface must enforce. Follows references, prefix lists, memberships and addresses from the model and
//! the links that were discovered to one [`Desired`] state. Pure but for what it remembers: the numbers that it gives to
//! groups and VPCs, and who had an address first.

mod desired;
mod members;
mod place;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

pub use self::desired::{
    AclRules, AclSpec, Allowance, Desired, GroupSpec, Interface, Membership, Peers, PolicyKey, Spec,
};
use self::members::Peerings;
pub use self::members::foreign_references;
use self::place::{Delegated, Given, Holders, Placement};
use crate::discovery::Attachment;
use crate::exempt::Service;
use crate::model::{Eni, GroupId, Inventory, Scope, SubnetId, VpcId};

/// How the silent parts of the norm are read.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `--no-group=deny` (SG-2.5).
    pub deny_without_group: bool,
    /// What an instance may do that the control plane doesn't know.
    pub unknown: Unknown,
    /// Services that nothing filters (SG-4.1).
    pub exempt: Vec<Service>,
}

/// `--unknown`: what holds for an instance that the control plane doesn't know, or no longer, or can't be asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Unknown {
    /// It is denied everything, whatever was known of it.
    Deny,
    /// The last that was known; nothing where that is nothing.
    #[default]
    Last,
    /// The last that was known; everything where that is nothing.
    Allow,
}

/// Resolves, and remembers the numbers that it gave.
#[derive(Debug, Default)]
pub struct Resolver {
    settings: Settings,
    groups: Numbers<(Scope, GroupId)>,
    subnets: Numbers<(Scope, SubnetId)>,
    vpcs: Numbers<(Scope, VpcId)>,
    holders: Holders,
}

#[derive(Debug)]
struct Numbers<K>(HashMap<K, u32>);

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Clone + Eq + std::hash::Hash> Numbers<K> {
    /// The key's number, from 1 up; never given to another.
    fn of(&mut self, key: &K) -> u32 {
        let next = self.0.len() as u32 + 1;
        *self.0.entry(key.clone()).or_insert(next)
    }
}

/// All scopes' inventories.
pub type World = BTreeMap<Scope, Inventory>;

impl Resolver {
    /// A resolver with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// The number that rules and members know a group by.
    pub fn group_number(&mut self, scope: &Scope, group: &GroupId) -> u32 {
        self.groups.of(&(scope.clone(), group.clone()))
    }

    /// What `attachments` must enforce, given the control planes' state. `default` is the scope of attachments that
    /// don't name theirs.
    pub fn resolve(&mut self, world: &World, default: &Scope, attachments: &[Attachment]) -> Desired {
        let mut desired = Desired::default();
        for inventory in world.values() {
            desired.warnings.extend(inventory.warnings.iter().cloned());
        }
        let peerings = Peerings::of(world);
        let mut placements = place::place(world, default, attachments, self.settings.unknown, &mut desired.warnings);
        self.holders.keep_uncontested(world, &mut placements, &mut desired.warnings);
        self.holders.note(&placements);
        let given = place::given(&placements);
        let delegated = place::delegated(world, &placements, &mut desired.warnings);
        // Interfaces by the hundred share a VPC and a gateway: what those serve is listed once.
        let (mut networks, mut gateways) = (BTreeMap::new(), BTreeSet::new());
        for placement in &placements {
            let interface = self.interface(world, &peerings, placement, &given, &delegated, &mut desired);
            let vpcs = world.get(&placement.scope).map(|inventory| &inventory.vpcs);
            networks.entry(interface.vpc).or_insert_with(|| vpcs?.get(placement.eni?.vpc.as_ref()?));
            gateways.extend(placement.attachment.gateways.iter().map(|&address| (interface.vpc, address)));
            desired.interfaces.insert(placement.attachment.link.ifindex, interface);
        }
        for (vpc, network) in networks {
            desired.exempt.extend(self.settings.exempt.iter().map(|service| (vpc, service.clone())));
            desired.exempt.extend(network.into_iter().flat_map(Service::of_vpc).map(|service| (vpc, service)));
        }
        for (vpc, address) in gateways {
            desired.exempt.extend(Service::of_gateway(address).map(|service| (vpc, service)));
        }
        self.members(world, &peerings, &placements, &given, &delegated, &mut desired);
        desired
    }

    fn interface(
        &mut self,
        world: &World,
        peerings: &Peerings,
        placement: &Placement,
        given: &Given,
        delegated: &Delegated,
        desired: &mut Desired,
    ) -> Interface {
        let attachment = placement.attachment;
        let inventory = world.get(&placement.scope);
        let vpc_id = placement.eni.and_then(|eni| eni.vpc.clone()).unwrap_or_else(|| VpcId::from(""));
        let vpc = self.vpcs.of(&(placement.scope.clone(), vpc_id));
        let (policy, groups) = self.policy(world, peerings, placement, desired);
        let subnet_id = placement.eni.and_then(|eni| eni.subnet.as_ref());
        let subnet = subnet_id.and_then(|id| inventory?.subnets.get(id));
        // By its id: an ACL stands whether or not the source lists the subnet itself.
        let acl = subnet_id.and_then(|id| self.acl(inventory?, &placement.scope, id, desired));
        let subnet_number =
            subnet_id.filter(|_| acl.is_some()).map(|id| self.subnets.of(&(placement.scope.clone(), id.clone())));
        let (scope, network) = placement.network();
        let is_free = |address: &IpAddr| {
            let holder = given.get(&(scope.clone(), network.cloned(), *address));
            holder.is_none_or(|&holder| holder == attachment.link.ifindex)
        };
        let known = placement.eni.into_iter().flat_map(Eni::private_addresses).filter(is_free);
        let mut addresses = placement.addresses.clone();
        addresses.extend(known.filter(|address| !placement.addresses.contains(address)));
        let prefixes = placement.eni.and_then(|eni| delegated.get(&(&placement.scope, &eni.id)));
        Interface {
            link: attachment.link.name.clone(),
            instance: attachment.instance.clone(),
            scope: placement.scope.clone(),
            eni: placement.eni.map(|eni| eni.id.clone()),
            groups,
            policy,
            acl,
            vpc,
            mac: placement.mac,
            addresses,
            prefixes: prefixes.cloned().unwrap_or_default(),
            subnet: subnet
                .map(|subnet| subnet.ipv4.map(IpNet::V4).into_iter().chain(subnet.ipv6.map(IpNet::V6)).collect())
                .unwrap_or_default(),
            subnet_number,
            source_dest_check: placement.eni.is_none_or(|eni| eni.source_dest_check),
        }
    }
}
