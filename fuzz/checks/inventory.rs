//! What holds for every inventory, whatever bytes it was read from: nothing in it is wider than a valid rule could be.

use std::collections::BTreeSet;

use ipnet::IpNet;
use sg_agent::model::{Inventory, Peer, Rule, Traffic};

/// Panics where an inventory holds what validation should have left out.
pub fn check(inventory: &Inventory) {
    for (id, group) in inventory.groups.iter() {
        assert!(*id == group.id && !id.0.is_empty(), "group {id:?} is kept as {:?}", group.id);
        rules(inventory, &group.ingress);
        rules(inventory, &group.egress);
    }
    for (id, list) in inventory.prefix_lists.iter() {
        assert_eq!(*id, list.id);
        assert!(list.entries.iter().all(is_canonical), "{id} holds a network with bits past its prefix");
        let v4 = list.entries.iter().filter(|entry| matches!(entry, IpNet::V4(_))).count();
        assert!(v4 == 0 || v4 == list.entries.len(), "{id} is of both families");
    }
    for (id, acl) in inventory.acls.iter() {
        assert_eq!(*id, acl.id);
        for entries in [&acl.ingress, &acl.egress] {
            assert!(entries.is_sorted_by_key(|entry| entry.number), "{id}'s entries are out of order");
            for entry in entries {
                traffic(entry.traffic);
                assert!(is_canonical(&entry.network), "{id}: {entry:?}");
            }
        }
    }
    for (id, eni) in inventory.enis.iter() {
        assert_eq!(*id, eni.id);
        let host = eni.instance.as_ref().map(|host| &inventory.instances[host]);
        assert!(host.is_none_or(|host| host.enis.contains(id)), "{id}'s instance doesn't know it");
        assert!(eni.prefixes.iter().all(is_canonical), "{id}: {:?}", eni.prefixes);
        assert!(eni.private_addresses().count() <= eni.addresses.len() + 256 * eni.prefixes.len());
    }
    for (id, instance) in inventory.instances.iter() {
        assert_eq!(*id, instance.id);
        assert_ne!(instance.state, "terminated");
        let is_own = |eni| inventory.enis.get(eni).is_some_and(|eni| eni.instance.as_ref() == Some(id));
        assert!(instance.enis.iter().all(is_own), "{id} has another's interface");
    }
    for peering in &inventory.peerings {
        assert!(peering.one <= peering.other && !peering.one.vpc.0.is_empty(), "{peering:?}");
    }
}

fn rules(inventory: &Inventory, rules: &[Rule]) {
    let mut seen = BTreeSet::new();
    for rule in rules {
        traffic(rule.traffic);
        let is_valid = match &rule.peer {
            Peer::Ipv4(network) => network.trunc() == *network,
            Peer::Ipv6(network) => network.trunc() == *network,
            Peer::Group(group) => inventory.groups.contains_key(group),
            Peer::ForeignGroup { account, group } => !account.is_empty() && !group.0.is_empty(),
            Peer::PrefixList(list) => inventory.prefix_lists.contains_key(list),
        };
        assert!(is_valid, "the peer of {rule:?}");
        assert!(seen.insert((rule.traffic, &rule.peer)), "{rule:?} comes twice");
    }
}

/// What is kept says the same when it is read again: there is one way to write it.
fn traffic(traffic: Traffic) {
    let field = |value: Option<u8>| Some(value.map_or(-1, i64::from));
    let again = match traffic {
        Traffic::All => Traffic::parse(Some("-1"), None, None),
        Traffic::Tcp { from, to } => Traffic::parse(Some("tcp"), Some(from.into()), Some(to.into())),
        Traffic::Udp { from, to } => Traffic::parse(Some("udp"), Some(from.into()), Some(to.into())),
        Traffic::Icmp { kind, code } => Traffic::parse(Some("icmp"), field(kind), field(code)),
        Traffic::Icmpv6 { kind, code } => Traffic::parse(Some("icmpv6"), field(kind), field(code)),
        Traffic::Other { number } => Traffic::parse(Some(&number.to_string()), None, None),
    };
    assert_eq!(again, Ok(traffic));
}

fn is_canonical(network: &IpNet) -> bool {
    network.trunc() == *network
}
