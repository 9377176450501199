//! Instances and their interfaces. Owns which of them count, and which groups and addresses an interface has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::quirks;
use super::super::wire::{self, Number};
use super::{Warnings, identified, number, text};
use crate::model::{Eni, EniId, GroupId, Instance, InstanceId, parse_ipv4, parse_ipv6};

/// The code of `terminated`.
const TERMINATED: i64 = 48;

type Instances = BTreeMap<InstanceId, Instance>;
type Enis = BTreeMap<EniId, Eni>;

/// What an interface takes from the instance that it is attached to.
#[derive(Default)]
struct Host {
    groups: BTreeSet<GroupId>,
    source_dest_check: Option<bool>,
}

/// A reservation's instances that are over.
pub(super) fn terminated(reservation: &wire::Reservation) -> impl Iterator<Item = InstanceId> {
    let over =
        reservation.instances.iter().filter(|instance| is_terminated(&instance.state) && !instance.id.is_empty());
    over.map(|instance| InstanceId::from(instance.id.as_str()))
}

pub(super) fn instances(
    reservations: Option<Vec<wire::Reservation>>,
    interfaces: Vec<wire::NetworkInterface>,
    own_groups: &BTreeMap<String, BTreeSet<GroupId>>,
    warnings: &mut Warnings,
) -> (Instances, Enis) {
    let listed = reservations.is_some();
    let mut instances = Instances::new();
    let mut hosts: BTreeMap<InstanceId, Host> = BTreeMap::new();
    // By id, those listed by themselves first: they say more than those inside an instance.
    let mut wires: BTreeMap<String, wire::NetworkInterface> = BTreeMap::new();
    for wire in interfaces {
        if identified(&wire.id, "a network interface", warnings).is_some() {
            wires.insert(wire.id.clone(), wire);
        }
    }
    let mut synthetic = Vec::new();
    for wire in reservations.into_iter().flatten().flat_map(|reservation| reservation.instances) {
        let Some(id) = identified(&wire.id, "an instance", warnings) else { continue };
        // Moto's terminated instances keep their interfaces, addresses and groups.
        if is_terminated(&wire.state) {
            continue;
        }
        let id = InstanceId::from(id);
        hosts.insert(id.clone(), Host { groups: groups(&wire.groups), source_dest_check: wire.source_dest_check });
        instances.insert(id.clone(), instance(&id, &wire));
        synthetic.push((id, wire.clone()));
        for mut inside in wire.interfaces {
            // The printed instance is what it is attached to, and isn't repeated inside.
            inside.attachment.get_or_insert_default().instance = Some(wire.id.clone());
            if !inside.id.is_empty() {
                wires.entry(inside.id.clone()).or_insert(inside);
            }
        }
    }

    let mut enis = Enis::new();
    for wire in wires.values() {
        let attached = wire.attachment.as_ref().and_then(|attachment| text(&attachment.instance));
        let attached = attached.map(InstanceId::from);
        if let Some(id) = &attached
            && !instances.contains_key(id)
        {
            // Terminated, or gone since: no member of anything.
            if listed {
                continue;
            }
            instances.insert(id.clone(), Instance::attached(id));
        }
        let nobody = Host::default();
        let host = attached.as_ref().and_then(|id| hosts.get(id)).unwrap_or(&nobody);
        let eni = eni(wire, attached, host, own_groups.get(&wire.id), warnings);
        enis.insert(eni.id.clone(), eni);
    }
    add_synthetic(&mut enis, synthetic, warnings);
    let mut by_instance: BTreeMap<&InstanceId, Vec<&Eni>> = BTreeMap::new();
    for eni in enis.values() {
        eni.instance.iter().for_each(|instance| by_instance.entry(instance).or_default().push(eni));
    }
    for instance in instances.values_mut() {
        let mut own = by_instance.remove(&instance.id).unwrap_or_default();
        own.sort_by_key(|eni| (eni.device_index, &eni.id));
        instance.enis = own.into_iter().map(|eni| eni.id.clone()).collect();
    }
    (instances, enis)
}

fn instance(id: &InstanceId, wire: &wire::Instance) -> Instance {
    let name = wire.tags.iter().find(|tag| tag.key == "Name").map(|tag| tag.value.clone());
    let state = if wire.state.name.is_empty() { "running".to_owned() } else { wire.state.name.clone() };
    Instance { id: id.clone(), name, state, enis: Vec::new() }
}

impl Instance {
    /// One of which nothing but an interface is known.
    fn attached(id: &InstanceId) -> Self {
        Self { id: id.clone(), name: None, state: "running".to_owned(), enis: Vec::new() }
    }
}

fn eni(
    wire: &wire::NetworkInterface,
    instance: Option<InstanceId>,
    host: &Host,
    own_groups: Option<&BTreeSet<GroupId>>,
    warnings: &mut Warnings,
) -> Eni {
    let device_index = wire.attachment.as_ref().and_then(|attachment| match attachment.device_index {
        Some(Number::Int(index)) => u32::try_from(index).ok(),
        _ => None,
    });
    let device_index = device_index.unwrap_or(0);
    let primary = instance.is_some() && device_index == 0;
    let printed = groups(&wire.groups);
    if quirks::is_ambiguous(primary, &host.groups, &printed) {
        warnings.push(
            &wire.id,
            format!(
                "its groups read as {} and its instance's as {}, which an emulator leaves so after either is changed; \
                 the instance's are enforced",
                ids(&printed),
                ids(&host.groups)
            ),
        );
    }
    // Every interface has a group: one that none of its own lists has got others since it was printed.
    let printed = own_groups.filter(|own| !primary && !own.is_empty()).cloned().unwrap_or(printed);
    Eni {
        id: wire.id.as_str().into(),
        device_index,
        groups: quirks::groups(primary, &host.groups, printed),
        subnet: text(&wire.subnet).map(Into::into),
        vpc: text(&wire.vpc).map(Into::into),
        addresses: addresses(wire, warnings),
        prefixes: prefixes(wire, warnings),
        source_dest_check: quirks::source_dest_check(primary, host.source_dest_check, wire.source_dest_check),
        instance,
    }
}

/// Instances that come without any interface get one: a file may list instances alone, and a lean emulator too.
fn add_synthetic(enis: &mut Enis, instances: Vec<(InstanceId, wire::Instance)>, warnings: &mut Warnings) {
    let attached: BTreeSet<InstanceId> = enis.values().filter_map(|eni| eni.instance.clone()).collect();
    for (id, wire) in instances {
        if attached.contains(&id) {
            continue;
        }
        let interface = wire::NetworkInterface {
            id: format!("eni-{id}"),
            subnet: wire.subnet,
            vpc: wire.vpc,
            private_ip: wire.private_ip,
            ipv6s: wire::List(wire.ipv6.into_iter().map(|address| wire::Ipv6Address { address }).collect()),
            groups: wire.groups,
            source_dest_check: wire.source_dest_check,
            ..Default::default()
        };
        let eni = eni(&interface, Some(id), &Host::default(), None, warnings);
        enis.insert(eni.id.clone(), eni);
    }
}

/// The primary IPv4 address first, each once; public addresses never count (SG-1.9).
fn addresses(wire: &wire::NetworkInterface, warnings: &mut Warnings) -> Vec<IpAddr> {
    let primary = text(&wire.private_ip);
    let mut others: Vec<IpAddr> = Vec::new();
    let mut parse = |text: &str| match text.parse::<IpAddr>() {
        Ok(address) => Some(address),
        Err(_) => {
            warnings.push(&wire.id, format!("address {text:?} left out: it is none"));
            None
        }
    };
    let primary = primary.and_then(&mut parse);
    let private = wire.private_ips.iter().map(|ip| &ip.address);
    for address in private.chain(wire.ipv6s.iter().map(|ip| &ip.address)).filter(|text| !text.is_empty()) {
        others.extend(parse(address));
    }
    others.sort();
    others.dedup();
    primary.into_iter().chain(others.into_iter().filter(|address| Some(*address) != primary)).collect()
}

fn prefixes(wire: &wire::NetworkInterface, warnings: &mut Warnings) -> Vec<IpNet> {
    let ipv4 = wire.ipv4_prefixes.iter().map(|p| parse_ipv4(&p.prefix).map(IpNet::V4));
    let ipv6 = wire.ipv6_prefixes.iter().map(|p| parse_ipv6(&p.prefix).map(IpNet::V6));
    let mut prefixes = Vec::new();
    for prefix in ipv4.chain(ipv6) {
        match prefix {
            Ok(prefix) => prefixes.push(prefix),
            Err(error) => warnings.push(&wire.id, format!("delegated prefix left out: {error}")),
        }
    }
    prefixes.sort();
    prefixes.dedup();
    prefixes
}

pub(in super::super) fn is_terminated(state: &wire::InstanceState) -> bool {
    state.name == "terminated" || matches!(number(&state.code), Ok(Some(TERMINATED)))
}

/// One without an id is no group that there is, which isn't the same as none: that may allow everything (SG-2.5).
pub(in super::super) fn groups(list: &wire::List<wire::GroupRef>) -> BTreeSet<GroupId> {
    list.iter().map(|group| group.id.as_str().into()).collect()
}

fn ids(groups: &BTreeSet<GroupId>) -> String {
    let ids: Vec<&str> = groups.iter().map(|group| &*group.0).collect();
    ids.join(", ")
}
