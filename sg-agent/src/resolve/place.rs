//! Which interface each attachment is, and which of its real addresses are taken to be its own. Owns what is done about
//! addresses that two claim; what follows from an address is not known here.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use ipnet::IpNet;

use super::{EniKey, Inputs, Unknown};
use crate::discovery::{Attachment, OUT_OF_SIGHT, Origin};
use crate::model::{Eni, EniId, InstanceId, Inventory, Scope, VpcId, Warning};

/// Within which addresses are one interface's alone.
pub(super) type Network = (Scope, Option<VpcId>);

/// Every attachment's place, and what there is to know of their addresses.
#[derive(Debug, Default)]
pub(super) struct Placing {
    pub(super) placements: Vec<Placement>,
    /// Which placements each interface of the control plane has.
    pub(super) of_eni: HashMap<EniKey, Vec<usize>>,
    /// The real addresses that Docker gave, and to whom: they go before the control plane's, which is a hint.
    pub(super) given: HashMap<(Network, IpAddr), u32>,
    /// The delegated prefixes that count, of those that are too large to be a list of addresses.
    pub(super) delegated: BTreeMap<EniKey, Vec<IpNet>>,
    pub(super) warnings: BTreeSet<Warning>,
    touching: Touching,
}

/// What a change must not be about for all places to stay.
#[derive(Debug, Default)]
struct Touching {
    /// Instances that are attached here.
    instances: HashSet<InstanceId>,
    /// Interfaces that an attachment could be.
    enis: HashSet<EniKey>,
    /// Every real address.
    addresses: HashSet<IpAddr>,
    /// Delegated prefixes that are too large to be a list of addresses.
    prefixes: HashSet<IpNet>,
    lengths: BTreeSet<u8>,
    /// Two attachments have one link.
    has_twins: bool,
}

/// An attachment and the interface that it is.
#[derive(Debug)]
pub(super) struct Placement {
    pub(super) attachment: At,
    pub(super) scope: Scope,
    pub(super) eni: Option<Arc<Eni>>,
    /// The real addresses that are taken to be its own.
    pub(super) addresses: Vec<IpAddr>,
    /// The same of its MAC address.
    pub(super) mac: [u8; 6],
}

/// One of the attachments.
#[derive(Debug)]
pub(super) struct At {
    all: Arc<[Attachment]>,
    index: usize,
}

impl Deref for At {
    type Target = Attachment;

    fn deref(&self) -> &Attachment {
        &self.all[self.index]
    }
}

impl Placement {
    pub(super) fn network(&self) -> Network {
        (self.scope.clone(), self.eni.as_ref().and_then(|eni| eni.vpc.clone()))
    }

    pub(super) fn eni_key(&self) -> Option<EniKey> {
        self.eni.as_ref().map(|eni| (self.scope.clone(), eni.id.clone()))
    }

    /// Whether its addresses are Docker's record, and not read from the guest.
    fn is_given(&self) -> bool {
        matches!(self.attachment.origin, Origin::Docker { .. })
    }

    fn is_assigned(&self, address: &IpAddr) -> bool {
        self.eni.as_ref().is_some_and(|eni| eni.private_addresses().any(|own| own == *address))
    }
}

impl Placing {
    /// Places every attachment.
    pub(super) fn of(inputs: &Inputs, unknown: Unknown, holders: &mut Holders) -> Self {
        let mut warnings = BTreeSet::new();
        let mut placements = place(inputs, unknown, &mut warnings);
        holders.keep_uncontested(inputs, &mut placements, &mut warnings);
        holders.note(&placements);
        let mut of_eni: HashMap<EniKey, Vec<usize>> = HashMap::new();
        for (index, placement) in placements.iter().enumerate() {
            placement.eni_key().into_iter().for_each(|key| of_eni.entry(key).or_default().push(index));
        }
        let delegated = delegated(inputs, &placements, &mut warnings);
        let touching = Touching::of(inputs, &placements);
        Self { of_eni, given: given(&placements), delegated, warnings, touching, placements }
    }

    /// Whether an instance's change moves nobody.
    pub(super) fn is_indifferent_to_instance(&self, instance: &InstanceId) -> bool {
        !self.touching.instances.contains(instance)
    }

    /// Whether every attachment stays the interface that it is, with the addresses that it has, when one interface
    /// becomes another. It may say no where they would.
    pub(super) fn is_indifferent_to(&self, key: &EniKey, before: Option<&Eni>, after: Option<&Eni>) -> bool {
        let Touching { enis, addresses, prefixes, lengths, has_twins, .. } = &self.touching;
        if *has_twins {
            return false;
        }
        if let (Some(before), Some(after)) = (before, after)
            && (&before.addresses, &before.prefixes, &before.vpc) == (&after.addresses, &after.prefixes, &after.vpc)
            && (&before.instance, before.device_index) == (&after.instance, after.device_index)
        {
            return true;
        }
        let is_elsewhere = |address: IpAddr| {
            let around = |&length: &u8| IpNet::new(address, length).is_ok_and(|net| prefixes.contains(&net.trunc()));
            !addresses.contains(&address) && !lengths.iter().any(around)
        };
        !enis.contains(key)
            && before
                .into_iter()
                .chain(after)
                .all(|eni| eni.unlisted_prefixes().next().is_none() && eni.private_addresses().all(is_elsewhere))
    }
}

impl Touching {
    fn of(inputs: &Inputs, placements: &[Placement]) -> Self {
        let mut touching = Self::default();
        let mut links = HashSet::new();
        for placement in placements {
            let attachment = &placement.attachment;
            touching.has_twins |= !links.insert(attachment.link.ifindex);
            touching.instances.insert(attachment.instance.clone());
            touching.addresses.extend(&attachment.addresses);
            let instance = inputs.world.get(&placement.scope).and_then(|i| i.instances.get(&attachment.instance));
            let its = instance.into_iter().flat_map(|instance| &instance.enis).chain(&attachment.eni);
            touching.enis.extend(its.map(|eni| (placement.scope.clone(), eni.clone())));
        }
        for eni in inputs.world.values().flat_map(|inventory| inventory.enis.values()) {
            touching.prefixes.extend(eni.unlisted_prefixes().map(IpNet::trunc));
        }
        touching.lengths = touching.prefixes.iter().map(IpNet::prefix_len).collect();
        touching
    }
}

/// Which of its instance's interfaces each attachment is: the one that it names, the one with its address, or the one
/// with its place. A container with more interfaces than its instance has the primary one's groups on the others.
fn place(inputs: &Inputs, unknown: Unknown, warnings: &mut BTreeSet<Warning>) -> Vec<Placement> {
    let placed = |index| {
        let attachment = At { all: Arc::clone(&inputs.attachments), index };
        let (addresses, mac) = (attachment.addresses.clone(), attachment.mac);
        let Some((scope, inventory)) = home(inputs, &attachment) else {
            let what = match unknown {
                Unknown::Allow => "allowed everything (--unknown=allow)",
                Unknown::Deny | Unknown::Last => "denied everything",
            };
            warnings.insert(Warning {
                subject: attachment.instance.to_string(),
                problem: format!("is not known to the control plane: {} is {what}", attachment.link.name),
            });
            return Placement { attachment, scope: inputs.default.clone(), eni: None, addresses, mac };
        };
        let eni = find_eni(inventory, &attachment).cloned();
        if eni.is_none() {
            warnings.insert(Warning {
                subject: attachment.instance.to_string(),
                problem: format!("has no network interface: {} is denied everything", attachment.link.name),
            });
        }
        Placement { attachment, scope: scope.clone(), eni, addresses, mac }
    };
    (0..inputs.attachments.len()).map(placed).collect()
}

/// The account and region that an attachment's instance is in.
fn home<'a>(inputs: &'a Inputs, attachment: &Attachment) -> Option<(&'a Scope, &'a Inventory)> {
    let is_home = |(scope, inventory): &(&Scope, &Inventory)| {
        attachment.account.as_ref().is_none_or(|account| *account == scope.account)
            && attachment.region.as_ref().is_none_or(|region| *region == scope.region)
            && inventory.instances.contains_key(&attachment.instance)
    };
    let mut candidates = inputs.world.iter().filter(is_home);
    let first = candidates.next()?;
    Some(if *first.0 == inputs.default {
        first
    } else {
        candidates.find(|(scope, _)| **scope == inputs.default).unwrap_or(first)
    })
}

fn find_eni<'a>(inventory: &'a Inventory, attachment: &Attachment) -> Option<&'a Arc<Eni>> {
    if let Some(id) = &attachment.eni {
        // A name that is wrong is not replaced by a guess.
        return inventory.enis.shared(id).filter(|eni| eni.instance.as_ref() == Some(&attachment.instance));
    }
    let instance = inventory.instances.get(&attachment.instance)?;
    let enis: Vec<&Arc<Eni>> = instance.enis.iter().filter_map(|id| inventory.enis.shared(id)).collect();
    enis.iter()
        .find(|eni| eni.addresses.iter().any(|address| attachment.addresses.contains(address)))
        .or_else(|| enis.iter().find(|eni| eni.device_index == attachment.device_index))
        .or_else(|| enis.first())
        .copied()
}

fn given(placements: &[Placement]) -> HashMap<(Network, IpAddr), u32> {
    let by_docker = placements.iter().filter(|placement| placement.is_given());
    by_docker
        .flat_map(|placement| {
            let (network, link) = (placement.network(), placement.attachment.link.ifindex);
            placement.addresses.iter().map(move |&address| ((network.clone(), address), link))
        })
        .collect()
}

/// Since when each link has had an address or a MAC address, for as long as that link is there: what a guest gives
/// itself later takes nothing from a neighbour.
#[derive(Clone, Debug, Default)]
pub(super) struct Holders {
    round: u64,
    addresses: HashMap<(u32, IpAddr), u64>,
    macs: HashMap<(u32, [u8; 6]), u64>,
}

impl Holders {
    /// Takes note of what is accepted to be each link's own.
    fn note(&mut self, placements: &[Placement]) {
        self.round += 1;
        let links: BTreeSet<u32> = placements.iter().map(|placement| placement.attachment.link.ifindex).collect();
        self.addresses.retain(|(link, _), _| links.contains(link));
        self.macs.retain(|(link, _), _| links.contains(link));
        for placement in placements {
            let link = placement.attachment.link.ifindex;
            for &address in &placement.addresses {
                self.addresses.entry((link, address)).or_insert(self.round);
            }
            if placement.mac != OUT_OF_SIGHT {
                self.macs.entry((link, placement.mac)).or_insert(self.round);
            }
        }
    }

    /// Leaves out real addresses that are somebody else's, where they were read from the guest, which can give itself
    /// any: the control plane's assignment goes first, the router's address is nobody's, and one that two interfaces
    /// of a VPC have is Docker's to give, or the one's that had it first, or else neither's. MAC addresses the same way.
    fn keep_uncontested(&self, inputs: &Inputs, placements: &mut [Placement], warnings: &mut BTreeSet<Warning>) {
        let mut claims: HashMap<(Network, IpAddr), Claims> = HashMap::new();
        let mut macs: HashMap<[u8; 6], Claims> = HashMap::new();
        for placement in placements.iter() {
            let network = placement.network();
            for &address in &placement.addresses {
                claims.entry((network.clone(), address)).or_default().add(placement);
            }
            macs.entry(placement.mac).or_default().add(placement);
        }
        let assigned = Assigned::of(inputs, &claims);
        let gateways: BTreeSet<IpAddr> =
            placements.iter().flat_map(|placement| placement.attachment.gateways.iter().copied()).collect();
        for placement in placements.iter_mut().filter(|placement| !placement.is_given()) {
            let link = placement.attachment.link.ifindex;
            if placement.mac != OUT_OF_SIGHT && !macs[&placement.mac].are_won_by(link, placement.mac, &self.macs) {
                placement.mac = OUT_OF_SIGHT;
                warnings.insert(Warning {
                    subject: placement.attachment.instance.to_string(),
                    problem: "has another interface's MAC address: it can send nothing until it has its own".into(),
                });
            }
            let network = placement.network();
            let addresses = std::mem::take(&mut placement.addresses);
            placement.addresses = addresses
                .into_iter()
                .filter(|&address| {
                    let is_foreign = assigned.to_other(&network, address, placement.eni.as_deref())
                        || gateways.contains(&address)
                        || !claims[&(network.clone(), address)].are_won_by(link, address, &self.addresses);
                    if is_foreign && !placement.is_assigned(&address) {
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
}

/// Whom the control plane assigns the addresses that somebody claims, and large prefixes.
struct Assigned<'a> {
    addresses: HashMap<(Network, IpAddr), Vec<&'a EniId>>,
    prefixes: HashMap<Network, Vec<(IpNet, &'a EniId)>>,
}

impl<'a> Assigned<'a> {
    fn of(inputs: &'a Inputs, claims: &HashMap<(Network, IpAddr), Claims>) -> Self {
        let mut assigned = Self { addresses: HashMap::new(), prefixes: HashMap::new() };
        for (scope, inventory) in &inputs.world {
            for eni in inventory.enis.values() {
                let network = (scope.clone(), eni.vpc.clone());
                for prefix in eni.unlisted_prefixes() {
                    assigned.prefixes.entry(network.clone()).or_default().push((*prefix, &eni.id));
                }
                for place in eni.private_addresses().map(|address| (network.clone(), address)) {
                    if claims.contains_key(&place) {
                        assigned.addresses.entry(place).or_default().push(&eni.id);
                    }
                }
            }
        }
        assigned
    }

    /// Whether an address is another interface's.
    fn to_other(&self, network: &Network, address: IpAddr, own: Option<&Eni>) -> bool {
        let is_other = |id: &EniId| own.is_none_or(|own| own.id != *id);
        let enis = self.addresses.get(&(network.clone(), address));
        let prefixes = self.prefixes.get(network);
        enis.into_iter().flatten().any(|id| is_other(id))
            || prefixes.into_iter().flatten().any(|(prefix, id)| prefix.contains(&address) && is_other(id))
    }
}

/// The links that claim one address.
#[derive(Default)]
struct Claims {
    links: Vec<u32>,
    is_given: bool,
}

impl Claims {
    fn add(&mut self, placement: &Placement) {
        self.links.push(placement.attachment.link.ifindex);
        self.is_given |= placement.is_given();
    }

    /// Whether a link that wasn't given the address has it nevertheless: nobody else claims it, or everybody else did
    /// so later.
    fn are_won_by<K: Copy + Eq + Hash>(&self, link: u32, what: K, since: &HashMap<(u32, K), u64>) -> bool {
        let began = |link: u32| since.get(&(link, what)).copied().unwrap_or(u64::MAX);
        let others = || self.links.iter().filter(|&&other| other != link);
        others().count() == 0 || (!self.is_given && others().all(|&other| began(link) < began(other)))
    }
}

/// Which delegated prefixes count: those of the length that EC2 delegates, with nobody else's address in them.
fn delegated(
    inputs: &Inputs,
    placements: &[Placement],
    warnings: &mut BTreeSet<Warning>,
) -> BTreeMap<EniKey, Vec<IpNet>> {
    let mut delegated: BTreeMap<EniKey, Vec<IpNet>> = BTreeMap::new();
    let mut held = None;
    for (scope, inventory) in &inputs.world {
        for eni in inventory.enis.values() {
            for prefix in eni.unlisted_prefixes() {
                let held = held.get_or_insert_with(|| Held::of(inputs, placements));
                let problem = if !Eni::is_delegable(prefix) {
                    "EC2 delegates /28 and /80".to_owned()
                } else if let Some(other) = held.by_other(&(scope.clone(), eni.vpc.clone()), eni, prefix) {
                    format!("it has {other} in it, which is somebody else's")
                } else {
                    delegated.entry((scope.clone(), eni.id.clone())).or_default().push(*prefix);
                    continue;
                };
                warnings.insert(Warning {
                    subject: eni.id.to_string(),
                    problem: format!("has the delegated prefix {prefix}, which is left out: {problem}"),
                });
            }
        }
    }
    delegated
}

/// Who has which addresses, assigned or real; `None` is an attachment that the control plane doesn't know.
struct Held(HashMap<Network, BTreeSet<(IpAddr, Option<EniId>)>>);

impl Held {
    fn of(inputs: &Inputs, placements: &[Placement]) -> Self {
        let mut held: HashMap<Network, BTreeSet<(IpAddr, Option<EniId>)>> = HashMap::new();
        for (scope, inventory) in &inputs.world {
            for eni in inventory.enis.values() {
                let its = held.entry((scope.clone(), eni.vpc.clone())).or_default();
                its.extend(eni.addresses.iter().map(|&address| (address, Some(eni.id.clone()))));
            }
        }
        for placement in placements {
            let eni = placement.eni.as_ref().map(|eni| eni.id.clone());
            let its = held.entry(placement.network()).or_default();
            its.extend(placement.addresses.iter().map(|&address| (address, eni.clone())));
        }
        Self(held)
    }

    fn by_other(&self, network: &Network, eni: &Eni, prefix: &IpNet) -> Option<IpAddr> {
        let within = self.0.get(network)?.range((prefix.network(), None)..);
        let mut within = within.take_while(|(address, _)| prefix.contains(address));
        within.find(|(_, holder)| holder.as_ref() != Some(&eni.id)).map(|&(address, _)| address)
    }
}
