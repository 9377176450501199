//! What the properties are tried with: few addresses, ports and networks, chosen so that they nest, touch, overlap and
//! repeat.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};
use sg_agent::model::{AclEntry, Peer, PrefixList, Rule, RuleId, Traffic};
use sg_agent::oracle::Question;
use sg_common::abi::{CUT_ON_REVOKE, Direction, RELATED_ERRORS};
use tests::cast::{A, B, C, Host, X};
use tests::packets::{
    Packet, arp, icmp, icmpv6, neighbor_advertisement, neighbor_solicitation, other, redirect, router_advertisement,
    tcp, udp,
};

/// The source port of all probes.
pub const SOURCE_PORT: u16 = 8005;

const GROUPS: [&str; 3] = ["sgA", "sgB", "sgC"];
const PORTS: &[u16] = &[0, 1, 21, 22, 23, 24, 80, 1023, 1024, 8000, 8005, 8010, 32767, 32768, 65534, 65535];
const TYPES: &[u8] = &[0, 1, 3, 8, 13, 128, 129, 200, 255];
const CODES: &[u8] = &[0, 1, 4, 255];
/// Neither TCP, UDP nor ICMP, which have names, nor IPv6's extension headers.
const NUMBERS: &[u8] = &[2, 47, 50, 51, 59, 132, 255];
const PEERS: &[&str] = &[
    "10.0.1.10",
    "10.0.1.9",
    "10.0.1.11",
    "10.0.1.20",
    "10.0.1.127",
    "10.0.1.128",
    "10.0.2.30",
    "10.0.2.31",
    "10.0.3.0",
    "9.255.255.255",
    "11.0.0.0",
    "203.0.113.9",
    "203.0.113.8",
    "126.255.255.254",
    "128.0.0.0",
    "0.0.0.1",
    "223.255.255.255",
    "2001:db8:1::a",
    "2001:db8:1::b",
    "2001:db8:1::9",
    "2001:db8:2::c",
    "2001:db8:1:1::",
    "2001:db8:ff::9",
    "2001:db7:ffff::1",
    "::2",
    "8000::",
    "7fff::1",
    "fe80::ff:fe00:a",
];
const LENGTHS4: &[u8] = &[0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 30, 31, 32];
const LENGTHS6: &[u8] = &[0, 1, 31, 32, 33, 47, 48, 49, 63, 64, 65, 112, 126, 127, 128];

/// A change of what the control plane says.
#[derive(Clone, Debug)]
pub enum Change {
    /// One direction of a group.
    Rules { group: &'static str, is_ingress: bool, rules: Vec<Rule> },
    /// An interface's groups.
    Groups { host: usize, groups: Vec<&'static str> },
    /// A prefix list.
    List(PrefixList),
    /// The ACL of B's subnet.
    Acl { ingress: Vec<AclEntry>, egress: Vec<AclEntry> },
}

/// A packet that begins a flow.
#[derive(Clone, Debug)]
pub struct Probe {
    is_ingress: bool,
    peer: IpAddr,
    traffic: ProbeTraffic,
}

#[derive(Clone, Debug)]
enum ProbeTraffic {
    Tcp(u16),
    Udp(u16),
    Icmp(u8, u8),
    Other(u8),
}

impl Probe {
    /// Where it goes, seen from B.
    pub fn direction(&self) -> Direction {
        if self.is_ingress { Direction::Ingress } else { Direction::Egress }
    }

    /// As rules see it.
    pub fn question(&self) -> Question {
        let is_v4 = self.peer.is_ipv4();
        let (protocol, port) = match self.traffic {
            ProbeTraffic::Tcp(port) => (6, port),
            ProbeTraffic::Udp(port) => (17, port),
            ProbeTraffic::Icmp(kind, code) => (if is_v4 { 1 } else { 58 }, u16::from_be_bytes([kind, code])),
            // The other family's ICMP has no type here.
            ProbeTraffic::Other(1) => (if is_v4 { 58 } else { 1 }, 0),
            ProbeTraffic::Other(number) => (number, 0),
        };
        Question { peer: self.peer, protocol, port }
    }

    /// As it is on the wire.
    pub fn packet(&self) -> Packet {
        let peer = X.at(&self.peer.to_string());
        let (from, to) = if self.is_ingress { (peer, B) } else { (B, peer) };
        let Question { protocol, port, .. } = self.question();
        let [kind, code] = port.to_be_bytes();
        let packet = match self.traffic {
            ProbeTraffic::Tcp(port) => tcp(from, to).ports(SOURCE_PORT, port).syn(),
            ProbeTraffic::Udp(port) => udp(from, to).ports(SOURCE_PORT, port),
            ProbeTraffic::Icmp(..) if self.peer.is_ipv4() => icmp(from, to, kind, code),
            ProbeTraffic::Icmp(..) => icmpv6(from, to, kind, code),
            ProbeTraffic::Other(_) => other(from, to, protocol),
        };
        packet.family(self.peer.is_ipv4(), from, to)
    }
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![9 => select(PORTS), 1 => any::<u16>()]
}

fn range() -> impl Strategy<Value = (u16, u16)> {
    prop_oneof![
        6 => (port(), port()).prop_map(|(one, other)| (one.min(other), one.max(other))),
        3 => port().prop_map(|port| (port, port)),
        1 => Just((0, u16::MAX)),
    ]
}

fn codes() -> impl Strategy<Value = (Option<u8>, Option<u8>)> {
    (prop::option::of(select(TYPES)), prop::option::of(select(CODES))).prop_map(|(kind, code)| (kind, kind.and(code)))
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        2 => Just(Traffic::All),
        6 => range().prop_map(|(from, to)| Traffic::Tcp { from, to }),
        4 => range().prop_map(|(from, to)| Traffic::Udp { from, to }),
        2 => codes().prop_map(|(kind, code)| Traffic::Icmp { kind, code }),
        2 => codes().prop_map(|(kind, code)| Traffic::Icmpv6 { kind, code }),
        2 => select(NUMBERS).prop_map(|number| Traffic::Other { number }),
    ]
}

fn peer_address() -> impl Strategy<Value = IpAddr> {
    select(PEERS).prop_map(|text| text.parse().expect("an address"))
}

/// A network around one of the peers.
fn network() -> impl Strategy<Value = IpNet> {
    (peer_address(), any::<Index>()).prop_map(|(address, index)| {
        let lengths = if address.is_ipv4() { LENGTHS4 } else { LENGTHS6 };
        IpNet::new(address, *index.get(lengths)).expect("a length of its family").trunc()
    })
}

fn peer() -> impl Strategy<Value = Peer> {
    prop_oneof![
        8 => network().prop_map(|network| match network {
            IpNet::V4(network) => Peer::Ipv4(network),
            IpNet::V6(network) => Peer::Ipv6(network),
        }),
        2 => select(vec!["0.0.0.0/0", "::/0"]).prop_map(|text| match text.parse().expect("a network") {
            IpNet::V4(network) => Peer::Ipv4(network),
            IpNet::V6(network) => Peer::Ipv6(network),
        }),
        // One that isn't there, too.
        3 => select(vec!["sgA", "sgB", "sgC", "sgGone"]).prop_map(|group| Peer::Group(group.into())),
        2 => select(vec!["pl-1", "pl-2", "pl-gone"]).prop_map(|list| Peer::PrefixList(list.into())),
    ]
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let rule = (traffic(), peer()).prop_map(|(traffic, peer)| Rule { id: RuleId::from("sgr-1"), traffic, peer });
    prop_oneof![1 => Just(Vec::new()), 8 => prop::collection::vec(rule, 1..30)]
}

fn entries() -> impl Strategy<Value = Vec<AclEntry>> {
    let entry = (any::<bool>(), traffic(), network());
    prop::collection::vec(entry, 0..12).prop_map(|entries| {
        let mut entries: Vec<AclEntry> = entries
            .into_iter()
            .zip(1..)
            .map(|((allow, traffic, network), number)| AclEntry { number, allow, traffic, network })
            .collect();
        // Most traffic gets past it, or rules would hardly be asked.
        for network in ["0.0.0.0/0", "::/0"] {
            let network = network.parse().expect("a network");
            entries.push(AclEntry { number: 100, allow: true, traffic: Traffic::All, network });
        }
        entries
    })
}

/// Any change.
pub fn change() -> impl Strategy<Value = Change> {
    let list =
        (select(vec!["pl-1", "pl-2"]), prop::collection::btree_set(network(), 0..8)).prop_map(|(id, entries)| {
            // A list holds one family (SG-1.8).
            let is_v4 = id == "pl-1";
            let entries = entries.into_iter().filter(|network| network.network().is_ipv4() == is_v4);
            PrefixList { id: id.into(), version: 1, entries: Arc::new(entries.collect()) }
        });
    prop_oneof![
        8 => (select(&GROUPS[..]), any::<bool>(), rules())
            .prop_map(|(group, is_ingress, rules)| Change::Rules { group, is_ingress, rules }),
        3 => (0..3_usize, subsequence(GROUPS.to_vec(), 0..=3))
            .prop_map(|(host, groups)| Change::Groups { host, groups }),
        2 => list.prop_map(Change::List),
        2 => (entries(), entries()).prop_map(|(ingress, egress)| Change::Acl { ingress, egress }),
    ]
}

/// Any packet that begins a flow.
pub fn probe() -> impl Strategy<Value = Probe> {
    // Neighbour discovery is no rule's matter.
    let icmp = (select(TYPES), select(CODES)).prop_map(|(kind, code)| ProbeTraffic::Icmp(kind, code));
    let traffic = prop_oneof![
        5 => port().prop_map(ProbeTraffic::Tcp),
        4 => port().prop_map(ProbeTraffic::Udp),
        2 => icmp,
        2 => prop_oneof![Just(1), select(NUMBERS)].prop_map(ProbeTraffic::Other),
    ];
    (any::<bool>(), peer_address(), traffic).prop_map(|(is_ingress, peer, traffic)| Probe { is_ingress, peer, traffic })
}

/// One thing that happens to the laboratory.
#[derive(Clone, Debug)]
pub enum Event {
    /// A frame crosses an instance's link.
    Frame { host: usize, direction: Direction, frame: Vec<u8> },
    /// Time passes.
    Wait { seconds: u64 },
    /// A group gets other rules.
    Rules { group: &'static str, text: &'static str },
    /// The settings' flags.
    Flags { flags: u32 },
    /// Anything else.
    Change(Change),
    /// The ACL goes.
    NoAcl,
}

const TEXTS: &[&str] = &[
    "in none",
    "in none, out none",
    "in all, out all",
    "in tcp22 any4, out all",
    "in tcp22 10.0.0.0/8 + udp53 any + icmp any4 + icmpv6 any6, out none",
    "in tcp22 sgA + 50 sgA, out tcp22 sgC + udp",
    "in all sgB, out udp53 X/32",
];

/// Any event; mostly frames.
pub fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        400 => (0..3_usize, any::<bool>(), frame()).prop_map(|(host, is_ingress, frame)| {
            let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
            Event::Frame { host, direction, frame }
        }),
        // No sum of these comes within a second of a timeout: no timeout is near a multiple of 7.
        12 => select(vec![7_u64, 14, 91]).prop_map(|seconds| Event::Wait { seconds }),
        3 => (select(&GROUPS[..]), select(TEXTS)).prop_map(|(group, text)| Event::Rules { group, text }),
        1 => (0..4_u32).prop_map(|flags| Event::Flags { flags: flags & (CUT_ON_REVOKE | RELATED_ERRORS) }),
        1 => change().prop_map(Event::Change),
        1 => Just(Event::NoAcl),
    ]
}

/// A packet of the cast, whole or bent: bytes changed, cut off or added.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let bend = (any::<Index>(), any::<u8>());
    // Headers are where it matters; the rest of a frame is payload.
    let bends = prop_oneof![4 => Just(Vec::new()), 3 => prop::collection::vec(bend, 1..4)];
    let length = prop_oneof![8 => Just(None), 1 => any::<Index>().prop_map(Some)];
    let trailer = prop_oneof![8 => Just(0), 1 => 1..64_usize];
    (honest(), bends, length, trailer).prop_map(|(mut frame, bends, length, trailer)| {
        for (at, value) in bends {
            let at = at.index(frame.len());
            frame[at] = value;
        }
        if let Some(length) = length {
            frame.truncate(length.index(frame.len()));
        }
        frame.resize(frame.len() + trailer, 0x11);
        frame
    })
}

fn honest() -> impl Strategy<Value = Vec<u8>> {
    let hosts = select(vec![(A, B), (B, A), (A, C), (C, A), (B, C), (C, B), (X, B), (B, X)]);
    let shape = (0..20_usize, 0..10_usize);
    (hosts, any::<bool>(), shape, select(&[22_u16, 53, 40000][..]), any::<u8>())
        .prop_map(|(hosts, is_v4, shape, port, flags)| build(hosts, is_v4, shape, port, flags))
}

fn build((from, to): (Host, Host), is_v4: bool, shape: (usize, usize), port: u16, flags: u8) -> Vec<u8> {
    let tcp = || tcp(from, to).ports(40000, port);
    let back = || tcp().reply();
    let udp = || udp(from, to).ports(40000, port);
    let ping = || if is_v4 { icmp(from, to, 8, 0) } else { icmpv6(from, to, 128, 0) };
    let packet = match shape.0 {
        0..=2 => tcp().syn(),
        3 => tcp().ports(port, 40000).syn_ack(),
        4 => tcp().ack().payload(7),
        5 => tcp().ports(port, 40000).ack(),
        6 => tcp().fin(),
        7 => tcp().rst(),
        8 => tcp().flags(flags),
        9 | 10 => udp(),
        11 => udp().ports(port, 40000),
        12 => ping(),
        13 => {
            if is_v4 {
                icmp(from, to, 0, 0)
            } else {
                icmpv6(from, to, 129, 0)
            }
        }
        14 => other(from, to, 50),
        15 => {
            let quoted = back().family(is_v4, to, from);
            return if is_v4 { quoted.error(from, to, 3, 4) } else { quoted.error(from, to, 2, 0) }.frame();
        }
        16 => return arp(from, 1 + flags % 2, from.mac, from.v4, to.v4),
        17 => {
            return match flags % 4 {
                0 => neighbor_solicitation(from, to.v6),
                1 => neighbor_advertisement(from, to.v6, from.v6, from.mac),
                2 => router_advertisement(from),
                _ => redirect(from, to.v6, from.v6, X.v6),
            }
            .frame();
        }
        18 => udp().ports(68, 67).to_address("255.255.255.255").to_mac([0xff; 6]),
        _ => udp().to_address("169.254.169.253"),
    };
    let is_fixed = shape.0 >= 18;
    let packet =
        if is_fixed || !matches!(packet.protocol, 6 | 17 | 50) { packet } else { packet.family(is_v4, from, to) };
    let is_v4 = packet.addresses.0.is_ipv4();
    match (shape.1, is_v4) {
        (0, true) => packet.ipv4_options(8),
        (0, false) => packet.hop_by_hop(),
        (1, false) => packet.destination_options().routing(2, flags % 2),
        (2, _) => packet.payload(64).as_fragment(u16::from(flags % 4), 0, true),
        (3, _) => packet.payload(64).as_fragment(u16::from(flags % 4), u16::from(flags % 8), flags & 16 != 0),
        (4, _) => packet.vlan(0x8100, 1),
        _ => packet,
    }
    .frame()
}
