//! R3: what each interface must enforce. Follows references, prefix lists, memberships and addresses from the model and
//! the links that were discovered to one [`Desired`] state. Pure but for the numbers that it gives to groups and VPCs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::discovery::{Attachment, OUT_OF_SIGHT, Origin};
use crate::exempt::Service;
use crate::model::{
    AclEntry, AclId, Eni, EniId, GroupId, InstanceId, Inventory, Peer, Rule, RuleId, Scope, SubnetId, Traffic, VpcId,
    Warning,
};

/// The state that the data path is to be brought to.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Desired {
    /// Attached interfaces, by the index of the host-side link.
    pub interfaces: BTreeMap<u32, Interface>,
    /// The policies that they refer to.
    pub policies: BTreeMap<PolicyKey, Arc<Spec>>,
    /// What rules and ACLs ask of addresses, as seen from each VPC.
    pub members: BTreeMap<(u32, IpAddr), Membership>,
    /// Services that nothing filters (SG-4.1), in each VPC.
    pub exempt: BTreeSet<(u32, Service)>,
    /// What is enforced otherwise than somebody might expect.
    pub warnings: BTreeSet<Warning>,
}

/// Where an address belongs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Membership {
    /// The referenced groups that it is in, by their numbers.
    pub groups: BTreeSet<u32>,
    /// Its subnet's number, if a network ACL asks.
    pub subnet: Option<u32>,
}

/// One interface to enforce.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// The link, as discovered.
    pub link: String,
    /// Whose it is.
    pub instance: InstanceId,
    /// In which account and region.
    pub scope: Scope,
    /// Which of its interfaces; `None` where the control plane doesn't know the instance.
    pub eni: Option<EniId>,
    /// The groups that apply.
    pub groups: BTreeSet<GroupId>,
    /// Its groups' policy.
    pub policy: PolicyKey,
    /// Its subnet's network ACL, where that restricts anything.
    pub acl: Option<PolicyKey>,
    /// Its VPC's number.
    pub vpc: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its own addresses, the primary ones of both families first.
    pub addresses: Vec<IpAddr>,
    /// The networks of its subnet (SG-5.2).
    pub subnet: Vec<IpNet>,
    /// Its subnet's number, where a network ACL asks.
    pub subnet_number: Option<u32>,
    /// SG-4.3.
    pub source_dest_check: bool,
}

/// What makes two interfaces share a policy.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PolicyKey {
    /// Exactly these groups.
    Groups(Scope, BTreeSet<GroupId>),
    /// This network ACL.
    Acl(Scope, AclId),
    /// No group at all (SG-2.5).
    NoGroup,
    /// An instance that the control plane doesn't know: nothing is allowed.
    Unknown,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Groups(scope, groups) => {
                let groups: Vec<&str> = groups.iter().map(|group| &*group.0).collect();
                write!(f, "{} ({scope})", groups.join(", "))
            }
            Self::Acl(scope, acl) => write!(f, "{acl} ({scope})"),
            Self::NoGroup => f.write_str("interfaces without a group"),
            Self::Unknown => f.write_str("unknown instances"),
        }
    }
}

/// A policy's rules, with everything that they refer to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Spec {
    /// Of a set of groups.
    Groups(GroupSpec),
    /// Of a network ACL.
    Acl(AclRules),
}

/// The rules of a set of groups.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupSpec {
    /// What may come in.
    pub ingress: Vec<Allowance>,
    /// What may go out.
    pub egress: Vec<Allowance>,
}

/// The entries of a network ACL, ascending.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AclRules {
    /// Inbound.
    pub ingress: Vec<AclSpec>,
    /// Outbound.
    pub egress: Vec<AclSpec>,
}

/// A group's rule, resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowance {
    /// The rule's id.
    pub id: RuleId,
    /// The group that has it.
    pub group: GroupId,
    /// What it allows.
    pub traffic: Traffic,
    /// From or to whom, as the rule says it.
    pub peer: Peer,
    /// The same as networks, or as a group's number.
    pub peers: Peers,
}

impl Allowance {
    /// Whether the rule's source is literally `0.0.0.0/0` (true) or `::/0` (false); a prefix list's isn't (SG-3.2).
    pub fn any_source_family(&self) -> Option<bool> {
        match &self.peer {
            Peer::Ipv4(network) if network.prefix_len() == 0 => Some(true),
            Peer::Ipv6(network) if network.prefix_len() == 0 => Some(false),
            _ => None,
        }
    }

    /// Whether it is one of the two.
    pub fn is_any_source(&self) -> bool {
        self.any_source_family().is_some()
    }
}

/// A network ACL's entry, resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AclSpec {
    /// Its number.
    pub number: u32,
    /// Whether it allows, or denies.
    pub allow: bool,
    /// What it is about.
    pub traffic: Traffic,
    /// From or to whom.
    pub peers: Peers,
}

/// Whom a rule names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peers {
    /// These networks.
    Networks(Arc<BTreeSet<IpNet>>),
    /// The members of the group with this number (SG-1.9).
    Group(u32),
}

/// How the silent parts of the norm are read.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `--no-group=deny` (SG-2.5).
    pub deny_without_group: bool,
    /// Services that nothing filters (SG-4.1).
    pub exempt: Vec<Service>,
}

/// Resolves, and remembers the numbers that it gave.
#[derive(Debug, Default)]
pub struct Resolver {
    settings: Settings,
    groups: Numbers<(Scope, GroupId)>,
    subnets: Numbers<(Scope, SubnetId)>,
    vpcs: Numbers<(Scope, VpcId)>,
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
        let mut placements = place(world, default, attachments, &mut desired.warnings);
        keep_uncontested(world, &mut placements, &mut desired.warnings);
        let given = given(&placements);
        // Interfaces by the hundred share a VPC and a gateway: what those serve is listed once.
        let (mut networks, mut gateways) = (BTreeMap::new(), BTreeSet::new());
        for placement in &placements {
            let interface = self.interface(world, placement, &given, &mut desired);
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
        self.members(world, &placements, &given, &mut desired);
        desired
    }

    fn interface(&mut self, world: &World, placement: &Placement, given: &Given, desired: &mut Desired) -> Interface {
        let attachment = placement.attachment;
        let inventory = world.get(&placement.scope);
        let vpc_id = placement.eni.and_then(|eni| eni.vpc.clone()).unwrap_or_else(|| VpcId::from(""));
        let vpc = self.vpcs.of(&(placement.scope.clone(), vpc_id));
        let (policy, groups) = self.policy(world, placement, desired);
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
        for prefix in placement.eni.into_iter().flat_map(Eni::unlisted_prefixes) {
            desired.warnings.insert(Warning {
                subject: attachment.instance.to_string(),
                problem: format!(
                    "has the delegated prefix {prefix}, too large to be listed: it is not its own address"
                ),
            });
        }
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
            subnet: subnet
                .map(|subnet| subnet.ipv4.map(IpNet::V4).into_iter().chain(subnet.ipv6.map(IpNet::V6)).collect())
                .unwrap_or_default(),
            subnet_number,
            source_dest_check: placement.eni.is_none_or(|eni| eni.source_dest_check),
        }
    }

    /// The policy of an interface's groups, resolved if it isn't yet.
    fn policy(
        &mut self,
        world: &World,
        placement: &Placement,
        desired: &mut Desired,
    ) -> (PolicyKey, BTreeSet<GroupId>) {
        let instance = &placement.attachment.instance;
        let Some(eni) = placement.eni else {
            desired.policies.entry(PolicyKey::Unknown).or_insert_with(|| Arc::new(Spec::Groups(GroupSpec::default())));
            return (PolicyKey::Unknown, BTreeSet::new());
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
            if denied {
                desired
                    .policies
                    .entry(PolicyKey::Unknown)
                    .or_insert_with(|| Arc::new(Spec::Groups(GroupSpec::default())));
                return (PolicyKey::Unknown, BTreeSet::new());
            }
            desired.policies.entry(PolicyKey::NoGroup).or_insert_with(|| Arc::new(Spec::Groups(everything())));
            return (PolicyKey::NoGroup, BTreeSet::new());
        }
        let key = PolicyKey::Groups(placement.scope.clone(), eni.groups.clone());
        if !desired.policies.contains_key(&key) {
            let spec = self.group_spec(world, &placement.scope, &eni.groups, desired);
            desired.policies.insert(key.clone(), Arc::new(Spec::Groups(spec)));
        }
        (key, eni.groups.clone())
    }

    fn group_spec(
        &mut self,
        world: &World,
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
                rules.iter().filter_map(|rule| self.allowance(world, scope, id, rule, desired)).collect()
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
        scope: &Scope,
        group: &GroupId,
        rule: &Rule,
        desired: &mut Desired,
    ) -> Option<Allowance> {
        let one = |network: IpNet| Peers::Networks(Arc::new(BTreeSet::from([network])));
        let mut dangling = |what: String| {
            desired.warnings.insert(Warning {
                subject: format!("{group} {}", rule.id),
                problem: format!("refers to {what}, which does not exist: it matches nothing"),
            });
        };
        let peers = match &rule.peer {
            Peer::Ipv4(network) => one(IpNet::V4(*network)),
            Peer::Ipv6(network) => one(IpNet::V6(*network)),
            Peer::PrefixList(id) => match world.get(scope).and_then(|inventory| inventory.prefix_lists.get(id)) {
                Some(list) => Peers::Networks(Arc::new(list.entries.clone())),
                None => {
                    dangling(format!("prefix list {id}"));
                    return None;
                }
            },
            Peer::Group(id) => match owner_of(world, scope, id) {
                Some(owner) => Peers::Group(self.group_number(owner, id)),
                None => {
                    dangling(format!("security group {id}"));
                    return None;
                }
            },
        };
        Some(Allowance {
            id: rule.id.clone(),
            group: group.clone(),
            traffic: rule.traffic,
            peer: rule.peer.clone(),
            peers,
        })
    }

    /// The policy of the subnet's network ACL; `None` where it allows everything, as the default one does (SG-5.3).
    fn acl(
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

    /// The private addresses of every member of a referenced group, or of a subnet with an ACL, from each VPC that can
    /// see them (SG-1.9, SG-1.12).
    fn members(&mut self, world: &World, placements: &[Placement], given: &Given, desired: &mut Desired) {
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
                for (seer_scope, seer) in seers(world, scope, &vpc) {
                    let number = self.vpcs.of(&(seer_scope, seer));
                    let real = real.get(&(scope, &eni.id)).map(Vec::as_slice).unwrap_or_default();
                    let is_free = |address: &IpAddr| {
                        let holder = given.get(&(scope.clone(), eni.vpc.clone(), *address));
                        holder.is_none_or(|holder| links.get(&(scope, &eni.id)).is_some_and(|own| own.contains(holder)))
                    };
                    for address in eni.private_addresses().filter(is_free).chain(real.iter().copied()) {
                        let member = desired.members.entry((number, address)).or_default();
                        member.groups.extend(&groups);
                        member.subnet = member.subnet.or(subnet);
                    }
                }
            }
        }
    }
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

/// The scope that has a referenced group: the rule's own, or another account's or region's (SG-1.12).
fn owner_of<'a>(world: &'a World, own: &'a Scope, group: &GroupId) -> Option<&'a Scope> {
    if world.get(own).is_some_and(|inventory| inventory.groups.contains_key(group)) {
        return Some(own);
    }
    world.iter().find(|(_, inventory)| inventory.groups.contains_key(group)).map(|(scope, _)| scope)
}

/// The VPCs from which another VPC's private addresses can be reached: itself and its peers.
fn seers(world: &World, scope: &Scope, vpc: &VpcId) -> BTreeSet<(Scope, VpcId)> {
    let mut seers = BTreeSet::from([(scope.clone(), vpc.clone())]);
    for inventory in world.values() {
        for (one, other) in &inventory.peerings {
            let peer = if one == vpc {
                other
            } else if other == vpc {
                one
            } else {
                continue;
            };
            let home = world
                .iter()
                .find(|(_, inventory)| {
                    inventory.enis.values().any(|eni| eni.vpc.as_ref() == Some(peer))
                        || inventory.subnets.values().any(|subnet| subnet.vpc == *peer)
                })
                .map_or(scope, |(scope, _)| scope);
            seers.insert((home.clone(), peer.clone()));
        }
    }
    seers
}

/// An attachment and the interface that it is.
struct Placement<'a> {
    attachment: &'a Attachment,
    scope: Scope,
    eni: Option<&'a Eni>,
    /// The real addresses that are taken to be its own.
    addresses: Vec<IpAddr>,
    /// The same of its MAC address.
    mac: [u8; 6],
}

impl Placement<'_> {
    /// Within which addresses are one interface's alone.
    fn network(&self) -> (&Scope, Option<&VpcId>) {
        (&self.scope, self.eni.and_then(|eni| eni.vpc.as_ref()))
    }

    /// Whether its addresses are Docker's record, and not read from the guest.
    fn is_given(&self) -> bool {
        matches!(self.attachment.origin, Origin::Docker { .. })
    }

    fn is_assigned(&self, address: &IpAddr) -> bool {
        self.eni.is_some_and(|eni| eni.private_addresses().any(|own| own == *address))
    }
}

/// The real addresses that Docker gave, and to whom: they go before the control plane's, which is a hint.
type Given = HashMap<(Scope, Option<VpcId>, IpAddr), u32>;

fn given(placements: &[Placement]) -> Given {
    let by_docker = placements.iter().filter(|placement| placement.is_given());
    by_docker
        .flat_map(|placement| {
            let (scope, vpc) = placement.network();
            let link = placement.attachment.link.ifindex;
            placement.addresses.iter().map(move |&address| ((scope.clone(), vpc.cloned(), address), link))
        })
        .collect()
}

/// To which interfaces the control planes assign each private address.
type Assigned<'a> = HashMap<(&'a Scope, Option<&'a VpcId>, IpAddr), Vec<&'a EniId>>;

fn assigned(world: &World) -> Assigned<'_> {
    let mut assigned = Assigned::new();
    for (scope, inventory) in world {
        for eni in inventory.enis.values() {
            for address in eni.private_addresses() {
                assigned.entry((scope, eni.vpc.as_ref(), address)).or_default().push(&eni.id);
            }
        }
    }
    assigned
}

/// Leaves out real addresses that are somebody else's, where they were read from the guest, which can give itself any:
/// the control plane's assignment goes first, the router's address is nobody's, and one that two interfaces of a VPC
/// have is neither's.
fn keep_uncontested(world: &World, placements: &mut [Placement], warnings: &mut BTreeSet<Warning>) {
    if placements.iter().all(Placement::is_given) {
        return;
    }
    let mut claims: HashMap<(Scope, Option<VpcId>, IpAddr), usize> = HashMap::new();
    for placement in placements.iter() {
        let (scope, vpc) = placement.network();
        for &address in &placement.addresses {
            *claims.entry((scope.clone(), vpc.cloned(), address)).or_default() += 1;
        }
    }
    let mut macs: HashMap<[u8; 6], usize> = HashMap::new();
    placements.iter().for_each(|placement| *macs.entry(placement.mac).or_default() += 1);
    let gateways: BTreeSet<IpAddr> =
        placements.iter().flat_map(|placement| placement.attachment.gateways.iter().copied()).collect();
    let assigned = assigned(world);
    for placement in placements.iter_mut().filter(|placement| !placement.is_given()) {
        if placement.mac != OUT_OF_SIGHT && macs[&placement.mac] > 1 {
            placement.mac = OUT_OF_SIGHT;
            warnings.insert(Warning {
                subject: placement.attachment.instance.to_string(),
                problem: "has another interface's MAC address: it can send nothing until it has its own".into(),
            });
        }
        let (scope, vpc) = placement.network();
        let (scope, vpc) = (scope.clone(), vpc.cloned());
        let own = placement.eni.map(|eni| &eni.id);
        let is_others = |address: &IpAddr| {
            let holders = assigned.get(&(&scope, vpc.as_ref(), *address));
            holders.is_some_and(|holders| holders.iter().any(|&holder| Some(holder) != own))
        };
        let addresses = std::mem::take(&mut placement.addresses);
        placement.addresses = addresses
            .into_iter()
            .filter(|address| {
                let is_shared = claims.get(&(scope.clone(), vpc.clone(), *address)).is_some_and(|&claims| claims > 1);
                let is_foreign = is_others(address) || gateways.contains(address) || is_shared;
                if is_foreign && !placement.is_assigned(address) {
                    warnings.insert(Warning {
                        subject: placement.attachment.instance.to_string(),
                        problem: format!("has the address {address}, which is somebody else's: it is not its own"),
                    });
                    return false;
                }
                true
            })
            .collect();
    }
}

/// Which of its instance's interfaces each attachment is: the one that it names, the one with its address, or the one
/// with its place. A container with more interfaces than its instance has the primary one's groups on the others.
fn place<'a>(
    world: &'a World,
    default: &Scope,
    attachments: &'a [Attachment],
    warnings: &mut BTreeSet<Warning>,
) -> Vec<Placement<'a>> {
    let mut placements = Vec::new();
    for attachment in attachments {
        let wanted = |scope: &Scope| {
            attachment.account.as_ref().is_none_or(|account| *account == scope.account)
                && attachment.region.as_ref().is_none_or(|region| *region == scope.region)
        };
        let is_there = |inventory: &Inventory| inventory.instances.contains_key(&attachment.instance);
        let candidates: Vec<_> = world.iter().filter(|(scope, i)| wanted(scope) && is_there(i)).collect();
        let (scope, inventory) = match candidates.as_slice() {
            [] => {
                warnings.insert(Warning {
                    subject: attachment.instance.to_string(),
                    problem: format!(
                        "is not known to the control plane: {} is denied everything",
                        attachment.link.name
                    ),
                });
                placements.push(Placement {
                    attachment,
                    scope: default.clone(),
                    eni: None,
                    addresses: attachment.addresses.clone(),
                    mac: attachment.mac,
                });
                continue;
            }
            [one] => *one,
            several => *several.iter().find(|(scope, _)| *scope == default).unwrap_or(&several[0]),
        };
        let eni = find_eni(inventory, attachment);
        if eni.is_none() {
            warnings.insert(Warning {
                subject: attachment.instance.to_string(),
                problem: format!("has no network interface: {} is denied everything", attachment.link.name),
            });
        }
        placements.push(Placement {
            attachment,
            scope: scope.clone(),
            eni,
            addresses: attachment.addresses.clone(),
            mac: attachment.mac,
        });
    }
    placements
}

fn find_eni<'a>(inventory: &'a Inventory, attachment: &Attachment) -> Option<&'a Eni> {
    if let Some(id) = &attachment.eni {
        // A name that is wrong is not replaced by a guess.
        return inventory.enis.get(id).filter(|eni| eni.instance.as_ref() == Some(&attachment.instance));
    }
    let instance = inventory.instances.get(&attachment.instance)?;
    let enis: Vec<&Eni> = instance.enis.iter().filter_map(|id| inventory.enis.get(id)).collect();
    enis.iter()
        .find(|eni| eni.addresses.iter().any(|address| attachment.addresses.contains(address)))
        .or_else(|| enis.iter().find(|eni| eni.device_index == attachment.device_index))
        .or_else(|| enis.first())
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Link, Origin};
    use crate::model::{Instance, NetworkAcl};

    fn scope() -> Scope {
        Scope { account: "123456789012".into(), region: "us-east-1".into() }
    }

    fn eni() -> Eni {
        Eni {
            id: "eni-1".into(),
            instance: Some("i-1".into()),
            device_index: 0,
            groups: BTreeSet::from(["sg-1".into()]),
            subnet: Some("subnet-1".into()),
            vpc: Some("vpc-1".into()),
            addresses: vec!["10.0.0.1".parse().expect("an address")],
            prefixes: Vec::new(),
            source_dest_check: true,
        }
    }

    fn attachment() -> Attachment {
        Attachment {
            instance: "i-1".into(),
            account: None,
            region: None,
            eni: None,
            device_index: 0,
            link: Link { ifindex: 7, name: "veth7".into() },
            mac: [2, 0, 0, 0, 0, 7],
            addresses: vec!["10.0.0.1".parse().expect("an address")],
            networks: Vec::new(),
            gateways: Vec::new(),
            origin: Origin::Flag,
            publish: Vec::new(),
        }
    }

    #[test]
    fn an_acl_stands_where_the_source_lists_no_subnets() {
        let acl = NetworkAcl {
            id: "acl-1".into(),
            subnets: BTreeSet::from(["subnet-1".into()]),
            ingress: Vec::new(),
            egress: Vec::new(),
        };
        let instance = Instance { id: "i-1".into(), name: None, state: "running".into(), enis: vec!["eni-1".into()] };
        let inventory = Inventory {
            enis: BTreeMap::from([("eni-1".into(), eni())]),
            instances: BTreeMap::from([("i-1".into(), instance)]),
            acls: BTreeMap::from([("acl-1".into(), acl)]),
            ..Inventory::default()
        };
        let world = World::from([(scope(), inventory)]);
        let desired = Resolver::default().resolve(&world, &scope(), &[attachment()]);
        let interface = &desired.interfaces[&7];
        assert_eq!(interface.acl, Some(PolicyKey::Acl(scope(), "acl-1".into())));
        assert!(interface.subnet.is_empty() && interface.subnet_number.is_some());
        let own = &desired.members[&(interface.vpc, interface.addresses[0])];
        assert_eq!(own.subnet, interface.subnet_number, "neighbours in the subnet are known by its number");
    }
}
