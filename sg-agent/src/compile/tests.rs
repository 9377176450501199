//! The compiled tables say what the rules say, at every place where that may change.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;
use sg_common::addr::Address;
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use sg_common::policy::{Query, Tables as _};

use super::*;
use crate::model::{GroupId, Peer, PrefixListId, RuleId};
use crate::oracle::{self, Question};
use crate::resolve::{AclRules, GroupSpec};
use crate::tables::InMemory;

/// Addresses that networks are made around, and asked about.
const PLACES: &[&str] = &[
    "0.0.0.0",
    "9.255.255.255",
    "10.0.0.0",
    "10.0.1.77",
    "127.255.255.255",
    "128.0.0.0",
    "255.255.255.255",
    "::",
    "::1",
    "2001:db8::",
    "2001:db8:0:1::",
    "2001:db8::ffff:ffff:ffff:ffff",
    "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "8000::",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
];
const PORTS: &[u16] = &[0, 1, 22, 23, 255, 256, 443, 0x0800, 0x08ff, 32_767, 32_768, 65_534, 65_535];
const PROTOCOLS: &[u8] = &[0, 1, 2, 5, 6, 7, 16, 17, 18, 57, 58, 59, 254, 255];

fn place() -> impl Strategy<Value = IpAddr> {
    select(PLACES).prop_map(|text| text.parse().expect("an address"))
}

fn network() -> impl Strategy<Value = IpNet> {
    (place(), 0..=32_u8, any::<bool>()).prop_map(|(address, bits, is_long)| {
        // Of IPv6 the shortest and the longest prefixes, and those on both sides of the middle.
        let length = match address {
            IpAddr::V4(_) => bits,
            IpAddr::V6(_) if is_long => 128 - bits,
            IpAddr::V6(_) => [bits, 48 + bits][usize::from(bits % 2)],
        };
        IpNet::new(address, length).expect("a prefix length").trunc()
    })
}

fn traffic() -> impl Strategy<Value = Traffic> {
    let range = (select(PORTS), select(PORTS)).prop_map(|(one, other)| (one.min(other), one.max(other)));
    let codes = (prop::option::of(select(&[0_u8, 8, 255][..])), prop::option::of(select(&[0_u8, 8, 255][..])))
        .prop_map(|(kind, code)| (kind, kind.and(code)));
    prop_oneof![
        1 => Just(Traffic::All),
        4 => range.clone().prop_map(|(from, to)| Traffic::Tcp { from, to }),
        2 => range.prop_map(|(from, to)| Traffic::Udp { from, to }),
        1 => codes.clone().prop_map(|(kind, code)| Traffic::Icmp { kind, code }),
        1 => codes.prop_map(|(kind, code)| Traffic::Icmpv6 { kind, code }),
        2 => select(&[0_u8, 2, 59, 255][..]).prop_map(|number| Traffic::Other { number }),
    ]
}

/// Rules, each with its networks, and whether it allows as an entry of an ACL.
fn rules() -> impl Strategy<Value = Vec<(Traffic, BTreeSet<IpNet>, bool)>> {
    prop::collection::vec((traffic(), prop::collection::btree_set(network(), 1..4), any::<bool>()), 0..24)
}

/// The addresses next to a network's ends, and the ends.
fn around(network: &IpNet) -> Vec<IpAddr> {
    match network {
        IpNet::V4(network) => {
            let (first, last) = (network.network().to_bits(), network.broadcast().to_bits());
            let all = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
            all.map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))).to_vec()
        }
        IpNet::V6(network) => {
            let (first, last) = (network.network().to_bits(), network.broadcast().to_bits());
            let all = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
            all.map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))).to_vec()
        }
    }
}

/// Every edge of the addresses with some ports, and every port with some addresses. A mapped address isn't on the wire.
fn questions(rules: &[(Traffic, BTreeSet<IpNet>, bool)]) -> Vec<Question> {
    let edges = rules.iter().flat_map(|(_, networks, _)| networks).flat_map(around);
    let places: BTreeSet<IpAddr> = PLACES.iter().map(|text| text.parse().expect("an address")).chain(edges).collect();
    let mut questions = Vec::new();
    for (number, &peer) in places.iter().filter(|peer| !Address::v6(octets(peer)).is_v4()).enumerate() {
        for &protocol in PROTOCOLS {
            for (place, &port) in PORTS.iter().enumerate() {
                let port = if matches!(protocol, TCP | UDP | ICMP | ICMPV6) { port } else { 0 };
                if place == number % PORTS.len() || number % 16 == 0 {
                    questions.push(Question { peer, protocol, port });
                }
            }
        }
    }
    questions
}

fn octets(peer: &IpAddr) -> [u8; 16] {
    match peer {
        IpAddr::V4(_) => [0; 16],
        IpAddr::V6(peer) => peer.octets(),
    }
}

/// What the tables of a policy say about what arrives.
fn ask(tables: &InMemory, question: &Question) -> Match {
    let Question { peer, protocol, port } = *question;
    tables.matches(abi::table(1, Direction::Ingress), 0, &Query { peer: &Address::from(peer), protocol, port })
}

fn tables(spec: &Spec) -> InMemory {
    let mut tables = InMemory::default();
    tables.policies.insert(1, Arc::new(compile(spec).expect("few rules")));
    tables
}

fn allowance((traffic, networks, _): &(Traffic, BTreeSet<IpNet>, bool)) -> Allowance {
    let peer = match networks.first() {
        Some(IpNet::V4(network)) if networks.len() == 1 => Peer::Ipv4(*network),
        Some(IpNet::V6(network)) if networks.len() == 1 => Peer::Ipv6(*network),
        _ => Peer::PrefixList(PrefixListId::from("pl-1")),
    };
    let peers = Peers::Networks(Arc::new(networks.clone()));
    Allowance { id: RuleId::from("sgr-1"), group: GroupId::from("sg-1"), traffic: *traffic, peer, peers }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_tables_of_groups_say_what_all_their_rules_say(rules in rules()) {
        let ingress: Vec<Allowance> = rules.iter().map(allowance).collect();
        let tables = tables(&Spec::Groups(GroupSpec { ingress: ingress.clone(), egress: Vec::new() }));
        for question in questions(&rules) {
            let expected = match oracle::allowing(&ingress, &|_, _| false, &question) {
                Some(rule) if rule.is_any_source() => Match::Any,
                Some(_) => Match::Narrow,
                None => Match::None,
            };
            prop_assert_eq!(ask(&tables, &question), expected, "{:?}", question);
        }
    }

    #[test]
    fn the_tables_of_an_acl_say_what_its_first_entry_says(rules in rules()) {
        let entry = |(number, (traffic, networks, allow)): (u32, &(Traffic, BTreeSet<IpNet>, bool))| {
            AclSpec { number, allow: *allow, traffic: *traffic, peers: Peers::Networks(Arc::new(networks.clone())) }
        };
        let ingress: Vec<AclSpec> = (1..).zip(&rules).map(entry).collect();
        let tables = tables(&Spec::Acl(AclRules { ingress: ingress.clone(), egress: Vec::new() }));
        for question in questions(&rules) {
            let allowed = oracle::deciding(&ingress, &question).is_some_and(|entry| entry.allow);
            let expected = if allowed { Match::Narrow } else { Match::None };
            prop_assert_eq!(ask(&tables, &question), expected, "{:?}", question);
        }
    }
}

/// Sixty thousand scattered networks: a tree of all its levels, asked about all ends.
#[test]
fn many_networks_are_all_told_apart() {
    let network = |n: u32, is_v4: bool| -> IpNet {
        let bits = n.wrapping_mul(0x9e37_79b1);
        let address = if is_v4 {
            IpAddr::V4(Ipv4Addr::from_bits(bits))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(u128::from(bits) << 96 | u128::from(n)))
        };
        IpNet::new(address, if is_v4 { 32 } else { 128 }).expect("a prefix length")
    };
    let rule = |port: u16| {
        let networks =
            (0..60_000).filter(|n| n % 20 == u32::from(port)).flat_map(|n| [network(n, true), network(n, false)]);
        allowance(&(Traffic::Tcp { from: port, to: port }, networks.collect(), true))
    };
    let tables = tables(&Spec::Groups(GroupSpec { ingress: (0..20).map(rule).collect(), egress: Vec::new() }));
    for n in 0..60_000 {
        let port = (n % 20) as u16;
        for is_v4 in [true, false] {
            let [before, peer, _, behind] = around(&network(n, is_v4)).try_into().expect("four addresses");
            let says = |peer, port| ask(&tables, &Question { peer, protocol: TCP, port });
            assert_eq!(says(peer, port), Match::Narrow, "{peer}");
            assert_eq!(says(peer, port + 1), Match::None, "{peer}");
            assert_eq!([says(before, port), says(behind, port)], [Match::None; 2], "beside {peer}");
        }
    }
}

#[test]
fn ranges_that_touch_and_mean_the_same_are_one() {
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a network")).collect();
    let rule = |texts: &[&str]| allowance(&(Traffic::All, networks(texts), true));
    let ranges = |texts: &[&str]| compile_rules(&[rule(texts)]).expect("a rule").header.peers4.last + 1;
    assert_eq!(ranges(&["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16"]), 3, "before, within and behind 10.0.0.0/8");
    assert_eq!(ranges(&["0.0.0.0/1", "128.0.0.0/1"]), 1);
    assert_eq!(ranges(&["10.0.0.0/8", "12.0.0.0/8"]), 5);
}

#[test]
fn what_no_map_could_hold_is_refused_before_it_is_computed() {
    let rule = |n: u32| {
        let network = IpNet::new(IpAddr::V4(Ipv4Addr::from_bits(n << 8)), 32).expect("a prefix length");
        allowance(&(Traffic::Tcp { from: n as u16, to: n as u16 }, BTreeSet::from([network]), true))
    };
    let refused = compile_rules(&(0..16_000).map(rule).collect::<Vec<_>>());
    assert!(matches!(refused, Err(CompileError::TooManyLines { .. })), "{refused:?}");
}
