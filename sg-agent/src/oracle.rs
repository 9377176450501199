//! What the norm says, as one linear function over the resolved rules: the yardstick for the compiled tables and the
//! kernel, and the voice of `explain`. Slow on purpose; nothing in it is clever.

use std::net::IpAddr;

use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};

use crate::model::Traffic;
use crate::resolve::{AclSpec, Allowance, Peers};

/// A packet, as far as rules see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// The other end.
    pub peer: IpAddr,
    /// The upper-layer protocol.
    pub protocol: u8,
    /// The destination port, or ICMP type << 8 | code; 0 for other protocols.
    pub port: u16,
}

/// The groups that an address is in, by their numbers.
pub trait Memberships {
    /// Whether `address` belongs to a member of the group (SG-1.9).
    fn is_member(&self, address: IpAddr, group: u32) -> bool;
}

impl<F: Fn(IpAddr, u32) -> bool> Memberships for F {
    fn is_member(&self, address: IpAddr, group: u32) -> bool {
        self(address, group)
    }
}

/// The rule that lets the packet through, if one does (SG-2.1). A rule with any source goes before the others, since it
/// decides about tracking (SG-3.2).
pub fn allowing<'a>(rules: &'a [Allowance], members: &impl Memberships, question: &Question) -> Option<&'a Allowance> {
    let mut found = None;
    for rule in rules {
        if covers_traffic(rule.traffic, question) && covers_peer(&rule.peers, members, question.peer) {
            if rule.is_any_source() {
                return Some(rule);
            }
            found = found.or(Some(rule));
        }
    }
    found
}

/// The entry of a network ACL that decides, if any matches; what none matches is denied (SG-5.1).
pub fn deciding<'a>(entries: &'a [AclSpec], question: &Question) -> Option<&'a AclSpec> {
    let nobody = |_: IpAddr, _: u32| false;
    entries
        .iter()
        .find(|entry| covers_traffic(entry.traffic, question) && covers_peer(&entry.peers, &nobody, question.peer))
}

/// SG-1.2 to SG-1.5.
pub fn covers_traffic(traffic: Traffic, question: &Question) -> bool {
    let is_v4 = question.peer.is_ipv4();
    let is_icmp = |protocol, kind: Option<u8>, code: Option<u8>| {
        let [its_kind, its_code] = question.port.to_be_bytes();
        question.protocol == protocol
            && is_v4 == (protocol == ICMP)
            && kind.is_none_or(|kind| kind == its_kind && code.is_none_or(|code| code == its_code))
    };
    match traffic {
        Traffic::All => true,
        Traffic::Tcp { from, to } => question.protocol == TCP && (from..=to).contains(&question.port),
        Traffic::Udp { from, to } => question.protocol == UDP && (from..=to).contains(&question.port),
        Traffic::Icmp { kind, code } => is_icmp(ICMP, kind, code),
        Traffic::Icmpv6 { kind, code } => is_icmp(ICMPV6, kind, code),
        Traffic::Other { number } => question.protocol == number,
    }
}

/// SG-1.5, SG-1.8, SG-1.9.
pub fn covers_peer(peers: &Peers, members: &impl Memberships, peer: IpAddr) -> bool {
    match peers {
        Peers::Networks(networks) => networks.iter().any(|network| network.contains(&peer)),
        Peers::Group(group) => members.is_member(peer, *group),
    }
}

/// Whether an any-source rule lets all replies of the packet's family and protocol through (SG-3.2).
pub fn frees_replies(rules: &[Allowance], question: &Question) -> bool {
    rules.iter().any(|rule| {
        let all_ports = match rule.traffic {
            Traffic::All => matches!(question.protocol, TCP | UDP),
            Traffic::Tcp { from: 0, to: u16::MAX } => question.protocol == TCP,
            Traffic::Udp { from: 0, to: u16::MAX } => question.protocol == UDP,
            _ => false,
        };
        all_ports && rule.any_source_family() == Some(question.peer.is_ipv4())
    })
}
