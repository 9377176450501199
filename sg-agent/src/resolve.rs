//! R3: what each interface must enforce. Follows references, prefix lists, memberships and addresses from the model and
//! the links that were discovered to one [`Desired`] state. Pure but for what it remembers: the numbers that it gives to
//! groups and VPCs, who had an address first, and the last round.
//!
//! A round resolves again only what is made of something that differs from the last round: policies by the groups,
//! prefix lists and network ACLs that they are made of, interfaces by their placement, memberships by the interfaces of
//! the control plane. Each has one function, which knows nothing of rounds: [`Round::policy`], [`Round::interface`],
//! [`Round::contribution`]. What may move attachments or VPCs ([`Memory::can_follow`]) begins from nothing, where
//! everything differs: the same way, only longer.

mod desired;
mod members;
mod memory;
mod numbers;
mod peerings;
mod place;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use self::desired::{
    AclRules, AclSpec, Allowance, Desired, GroupSpec, Interface, Membership, Peers, Place, PolicyKey, Spec,
};
use self::memory::{Changes, Memory};
use self::numbers::Numbers;
use self::peerings::Peerings;
pub use self::peerings::foreign_references;
use self::place::{Holders, Placement, Placing};
use crate::discovery::Attachment;
use crate::exempt::Service;
use crate::model::{Eni, EniId, GroupId, Inventory, Scope, VpcId, Warning};

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

/// Resolves, and remembers the last round.
#[derive(Debug, Default)]
pub struct Resolver {
    settings: Settings,
    numbers: Numbers,
    holders: Holders,
    memory: Memory,
}

/// All scopes' inventories.
pub type World = BTreeMap<Scope, Inventory>;

/// A group and where it is.
type GroupKey = (Scope, GroupId);

/// The same of an interface.
type EniKey = (Scope, EniId);

/// What is known when a round begins.
#[derive(Clone, Debug)]
struct Inputs {
    world: World,
    /// The scope of attachments that don't name theirs.
    default: Scope,
    attachments: Arc<[Attachment]>,
}

/// What every part of a round goes by.
struct Round<'a> {
    settings: &'a Settings,
    world: &'a World,
    peerings: &'a Peerings,
    placing: &'a Placing,
    numbers: &'a mut Numbers,
}

impl Resolver {
    /// A resolver with these settings.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// The number that rules and members know a group by.
    pub fn group_number(&mut self, scope: &Scope, group: &GroupId) -> u32 {
        self.numbers.groups.of(&(scope.clone(), group.clone()))
    }

    /// What `attachments` must enforce, given the control planes' state. `default` is the scope of attachments that
    /// don't name theirs.
    pub fn resolve(&mut self, world: &World, default: &Scope, attachments: &Arc<[Attachment]>) -> Desired {
        let inputs = Inputs { world: world.clone(), default: default.clone(), attachments: Arc::clone(attachments) };
        let mut changes = Changes::between(&self.memory.world, &inputs.world);
        if !self.memory.can_follow(&inputs, &changes) {
            let placing = Placing::of(&inputs, self.settings.unknown, &mut self.holders);
            self.memory = Memory::begin(&inputs, placing);
            changes = Changes::between(&World::new(), &inputs.world);
        }
        self.memory.follow(inputs, &changes, &self.settings, &mut self.numbers);
        self.memory.desired.clone()
    }

    /// One that has the same numbers, and remembers nothing else of the last round.
    #[cfg(test)]
    fn afresh(&self) -> Self {
        Self {
            settings: self.settings.clone(),
            numbers: self.numbers.clone(),
            holders: self.holders.clone(),
            memory: Memory::default(),
        }
    }
}

impl Round<'_> {
    /// What a placement's interface is to enforce.
    fn interface(&mut self, placement: &Placement, warnings: &mut Vec<Warning>) -> Interface {
        let attachment = &*placement.attachment;
        let inventory = self.world.get(&placement.scope);
        let eni = placement.eni.as_deref();
        let vpc_id = eni.and_then(|eni| eni.vpc.clone()).unwrap_or_else(|| VpcId::from(""));
        let vpc = self.numbers.vpcs.of(&(placement.scope.clone(), vpc_id));
        let subnet_id = eni.and_then(|eni| eni.subnet.as_ref());
        let subnet = subnet_id.and_then(|id| inventory?.subnets.get(id));
        // By its id: an ACL stands whether or not the source lists the subnet itself.
        let acl = subnet_id.and_then(|id| rules::acl(inventory?, id));
        let asked = subnet_id.filter(|_| acl.is_some());
        let subnet_number = asked.map(|id| self.numbers.subnets.of(&(placement.scope.clone(), id.clone())));
        let network = placement.network();
        let is_free = |address: &IpAddr| {
            let holder = self.placing.given.get(&(network.clone(), *address));
            holder.is_none_or(|&holder| holder == attachment.link.ifindex)
        };
        let known = eni.into_iter().flat_map(Eni::private_addresses).filter(is_free);
        let mut addresses = placement.addresses.clone();
        addresses.extend(known.filter(|address| !placement.addresses.contains(address)));
        let prefixes = placement.eni_key().and_then(|key| self.placing.delegated.get(&key));
        Interface {
            link: attachment.link.name.clone(),
            instance: attachment.instance.clone(),
            scope: placement.scope.clone(),
            eni: eni.map(|eni| eni.id.clone()),
            groups: eni.map(|eni| eni.groups.clone()).unwrap_or_default(),
            policy: self.policy_of(placement, warnings),
            acl: acl.map(|acl| PolicyKey::Acl(placement.scope.clone(), acl.id.clone())),
            vpc,
            mac: placement.mac,
            addresses,
            prefixes: prefixes.cloned().unwrap_or_default(),
            subnet: subnet
                .map(|subnet| subnet.ipv4.map(IpNet::V4).into_iter().chain(subnet.ipv6.map(IpNet::V6)).collect())
                .unwrap_or_default(),
            subnet_number,
            source_dest_check: eni.is_none_or(|eni| eni.source_dest_check),
        }
    }

    /// What nothing filters, as seen from the VPCs of all interfaces. They share VPCs and gateways by the hundred: what
    /// those serve is listed once.
    fn exempt(&self, interfaces: &[Arc<Interface>]) -> BTreeSet<(u32, Service)> {
        let (mut networks, mut gateways) = (BTreeMap::new(), BTreeSet::new());
        for (placement, interface) in self.placing.placements.iter().zip(interfaces) {
            let vpcs = self.world.get(&placement.scope).map(|inventory| &inventory.vpcs);
            let vpc = placement.eni.as_ref().and_then(|eni| eni.vpc.as_ref());
            networks.entry(interface.vpc).or_insert_with(|| vpcs?.get(vpc?));
            gateways.extend(placement.attachment.gateways.iter().map(|&address| (interface.vpc, address)));
        }
        let mut exempt = BTreeSet::new();
        for (vpc, network) in networks {
            exempt.extend(self.settings.exempt.iter().map(|service| (vpc, service.clone())));
            exempt.extend(network.into_iter().flat_map(Service::of_vpc).map(|service| (vpc, service)));
        }
        for (vpc, address) in gateways {
            exempt.extend(Service::of_gateway(address).map(|service| (vpc, service)));
        }
        exempt
    }
}
