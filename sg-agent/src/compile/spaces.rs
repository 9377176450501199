//! Spaces cut into ranges on which the same rules apply: IPv4 addresses, IPv6 addresses, and protocols with their ports.

use fixedbitset::FixedBitSet;
use ipnet::IpNet;
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use sg_common::policy::port_key;
use sg_common::ranges::Key;

use super::Classes;
use crate::model::Traffic;
use crate::resolve::Peers;

/// Ranges that follow on each other from a space's first key to its last: where each ends, and its class.
pub(super) type Ranges<K> = Vec<(K, u32)>;

/// IPv4 addresses, by the rules that name a network around them.
pub(super) fn peers4<'a>(peers: impl Iterator<Item = &'a Peers>, classes: &mut Classes) -> Ranges<u32> {
    let stretches = named(peers).filter_map(|(rule, network)| match network {
        IpNet::V4(network) => Some((rule, network.network().to_bits(), network.broadcast().to_bits())),
        IpNet::V6(_) => None,
    });
    cut(stretches, classes)
}

/// IPv6 addresses.
pub(super) fn peers6<'a>(peers: impl Iterator<Item = &'a Peers>, classes: &mut Classes) -> Ranges<u128> {
    let stretches = named(peers).filter_map(|(rule, network)| match network {
        IpNet::V4(_) => None,
        IpNet::V6(network) => Some((rule, network.network().to_bits(), network.broadcast().to_bits())),
    });
    cut(stretches, classes)
}

/// Each rule's networks.
fn named<'a>(peers: impl Iterator<Item = &'a Peers>) -> impl Iterator<Item = (usize, &'a IpNet)> {
    peers.enumerate().flat_map(|(rule, peers)| {
        let networks = match peers {
            Peers::Networks(networks) => Some(networks.iter()),
            Peers::Group(_) => None,
        };
        networks.into_iter().flatten().map(move |network| (rule, network))
    })
}

/// Keys of protocol and port, by the rules that are about them.
pub(super) fn ports(traffic: impl Iterator<Item = Traffic>, classes: &mut Classes) -> Ranges<u32> {
    let stretches = traffic.enumerate().map(|(rule, traffic)| {
        let (first, last) = port_keys(traffic);
        (rule, first, last)
    });
    cut(stretches, classes)
}

/// The first and the last key of what a rule is about.
fn port_keys(traffic: Traffic) -> (u32, u32) {
    let icmp = |kind: Option<u8>, code: Option<u8>| match (kind, code) {
        (None, _) => (0, u16::MAX),
        (Some(kind), None) => (u16::from(kind) << 8, u16::from(kind) << 8 | 0xff),
        (Some(kind), Some(code)) => {
            let port = u16::from(kind) << 8 | u16::from(code);
            (port, port)
        }
    };
    let (protocol, (from, to)) = match traffic {
        Traffic::All => return (0, u32::MAX),
        Traffic::Tcp { from, to } => (TCP, (from, to)),
        Traffic::Udp { from, to } => (UDP, (from, to)),
        Traffic::Icmp { kind, code } => (ICMP, icmp(kind, code)),
        Traffic::Icmpv6 { kind, code } => (ICMPV6, icmp(kind, code)),
        Traffic::Other { number } => (number, (0, u16::MAX)),
    };
    // A protocol's own keys are those within its own family.
    let is_v4 = protocol != ICMPV6;
    (port_key(is_v4, protocol, from), port_key(is_v4, protocol, to))
}

/// Cuts a space where a rule begins to apply or ceases to. Rules are told by what they cover: number, first key and last
/// key. One rule may cover a key several times.
fn cut<K: Key>(stretches: impl Iterator<Item = (usize, K, K)>, classes: &mut Classes) -> Ranges<K> {
    let one = K::from(1);
    let mut edges: Vec<(K, bool, usize)> = Vec::new();
    for (rule, first, last) in stretches {
        edges.push((first, true, rule));
        if last < K::LAST {
            edges.push((last + one, false, rule));
        }
    }
    edges.sort_unstable();
    let mut covered = vec![0_u32; classes.rules()];
    let mut applying = FixedBitSet::with_capacity(classes.rules());
    let mut ranges = Vec::new();
    let mut class = 0;
    for here in edges.chunk_by(|(one, ..), (other, ..)| one == other) {
        for &(_, begins, rule) in here {
            covered[rule] = if begins { covered[rule] + 1 } else { covered[rule] - 1 };
            applying.set(rule, covered[rule] > 0);
        }
        let (next, first) = (classes.number(&applying), here[0].0);
        if next != class && first > K::from(0) {
            ranges.push((first - one, class));
        }
        class = next;
    }
    ranges.push((K::LAST, class));
    ranges
}
