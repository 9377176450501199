//! Which interface each attachment is, and which of its real addresses are taken to be its own. Owns what is done about
//! addresses that two claim; what follows from an address is not known here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Unknown, World};
use crate::discovery::{Attachment, OUT_OF_SIGHT, Origin};
use crate::model::{Eni, EniId, Inventory, Scope, VpcId, Warning};

/// An attachment and the interface that it is.
pub(super) struct Placement<'a> {
    pub(super) attachment: &'a Attachment,
    pub(super) scope: Scope,
    pub(super) eni: Option<&'a Eni>,
    /// The real addresses that are taken to be its own.
    pub(super) addresses: Vec<IpAddr>,
    /// The same of its MAC address.
    pub(super) mac: [u8; 6],
}

impl Placement<'_> {
    /// Within which addresses are one interface's alone.
    pub(super) fn network(&self) -> (&Scope, Option<&VpcId>) {
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

/// Which of its instance's interfaces each attachment is: the one that it names, the one with its address, or the one
/// with its place. A container with more interfaces than its instance has the primary one's groups on the others.
pub(super) fn place<'a>(
    world: &'a World,
    default: &Scope,
    attachments: &'a [Attachment],
    unknown: Unknown,
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
                        "is not known to the control plane: {} is {}",
                        attachment.link.name,
                        if unknown == Unknown::Allow {
                            "allowed everything (--unknown=allow)"
                        } else {
                            "denied everything"
                        }
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

/// The real addresses that Docker gave, and to whom: they go before the control plane's, which is a hint.
pub(super) type Given = HashMap<(Scope, Option<VpcId>, IpAddr), u32>;

pub(super) fn given(placements: &[Placement]) -> Given {
    let by_docker = placements.iter().filter(|placement| placement.is_given());
    by_docker
        .flat_map(|placement| {
            let (scope, vpc) = placement.network();
            let link = placement.attachment.link.ifindex;
            placement.addresses.iter().map(move |&address| ((scope.clone(), vpc.cloned(), address), link))
        })
        .collect()
}

/// Since when each link has had an address or a MAC address, for as long as that link is there: what a guest gives
/// itself later takes nothing from a neighbour.
#[derive(Debug, Default)]
pub(super) struct Holders {
    round: u64,
    addresses: HashMap<(u32, IpAddr), u64>,
    macs: HashMap<(u32, [u8; 6]), u64>,
}

impl Holders {
    /// Takes note of what is accepted to be each link's own.
    pub(super) fn note(&mut self, placements: &[Placement]) {
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
    pub(super) fn keep_uncontested(
        &self,
        world: &World,
        placements: &mut [Placement],
        warnings: &mut BTreeSet<Warning>,
    ) {
        let mut claims: HashMap<(Scope, Option<VpcId>, IpAddr), Claims> = HashMap::new();
        let mut macs: HashMap<[u8; 6], Claims> = HashMap::new();
        for placement in placements.iter() {
            let (scope, vpc) = placement.network();
            for &address in &placement.addresses {
                claims.entry((scope.clone(), vpc.cloned(), address)).or_default().add(placement);
            }
            macs.entry(placement.mac).or_default().add(placement);
        }
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
            let (scope, vpc) = placement.network();
            let (scope, vpc) = (scope.clone(), vpc.cloned());
            let others: Vec<&Eni> = neighbors(world, &scope, vpc.as_ref())
                .filter(|eni| placement.eni.is_none_or(|own| own.id != eni.id))
                .collect();
            let assigned: BTreeSet<IpAddr> = others.iter().flat_map(|eni| eni.private_addresses()).collect();
            let delegated: Vec<&IpNet> = others.iter().flat_map(|eni| eni.unlisted_prefixes()).collect();
            let addresses = std::mem::take(&mut placement.addresses);
            placement.addresses = addresses
                .into_iter()
                .filter(|address| {
                    let claims = &claims[&(scope.clone(), vpc.clone(), *address)];
                    let is_foreign = assigned.contains(address)
                        || delegated.iter().any(|prefix| prefix.contains(address))
                        || gateways.contains(address)
                        || !claims.are_won_by(link, *address, &self.addresses);
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

/// The interfaces of one VPC.
fn neighbors<'a>(world: &'a World, scope: &Scope, vpc: Option<&VpcId>) -> impl Iterator<Item = &'a Eni> {
    let enis = world.get(scope).into_iter().flat_map(|inventory| inventory.enis.values());
    let vpc = vpc.cloned();
    enis.filter(move |eni| eni.vpc == vpc)
}

/// The delegated prefixes that count, of those that are too large to be a list of addresses.
pub(super) type Delegated<'a> = BTreeMap<(&'a Scope, &'a EniId), Vec<IpNet>>;

/// Which delegated prefixes count: those of the length that EC2 delegates, with nobody else's address in them.
pub(super) fn delegated<'a>(
    world: &'a World,
    placements: &[Placement],
    warnings: &mut BTreeSet<Warning>,
) -> Delegated<'a> {
    let mut delegated = Delegated::new();
    for (scope, inventory) in world {
        for eni in inventory.enis.values() {
            for prefix in eni.unlisted_prefixes() {
                let problem = if !Eni::is_delegable(prefix) {
                    "EC2 delegates /28 and /80".to_owned()
                } else if let Some(other) = foreign_address(world, placements, scope, eni, prefix) {
                    format!("it has {other} in it, which is somebody else's")
                } else {
                    delegated.entry((scope, &eni.id)).or_default().push(*prefix);
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

fn foreign_address(
    world: &World,
    placements: &[Placement],
    scope: &Scope,
    eni: &Eni,
    prefix: &IpNet,
) -> Option<IpAddr> {
    let others = neighbors(world, scope, eni.vpc.as_ref()).filter(|other| other.id != eni.id);
    let assigned = others.flat_map(|other| other.addresses.iter().copied());
    let is_other = |placement: &&Placement| {
        placement.network() == (scope, eni.vpc.as_ref()) && placement.eni.is_none_or(|own| own.id != eni.id)
    };
    let real = placements.iter().filter(is_other).flat_map(|placement| placement.addresses.iter().copied());
    assigned.chain(real).find(|address| prefix.contains(address))
}
