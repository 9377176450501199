//! ARP and neighbour discovery, honest unless a test bends them.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Packet, Transport, icmpv6};
use crate::cast::Host;

/// An ARP frame (operation 1 asks, 2 answers) in which `from` says that `sender` is at `mac`.
pub fn arp(from: Host, operation: u8, mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [[0xff; 6], from.mac].concat();
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, operation]);
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// A message with `fixed` bytes behind the ICMP header's first eight, and a link-layer address option.
fn message(from: Host, to: Ipv6Addr, kind: u8, fixed: &[u8], option: Option<(u8, [u8; 6])>) -> Packet {
    let mut body = fixed.to_vec();
    if let Some((number, mac)) = option {
        body.extend([number, 1]);
        body.extend(mac);
    }
    let mut packet = icmpv6(from, from, kind, 0).carrying(body).hops(255);
    packet.addresses = (from.v6.into(), to.into());
    packet.transport = Transport::Icmp { kind, code: 0, rest: [0; 4] };
    if to.is_multicast() {
        let [.., a, b, c, d] = to.octets();
        packet.macs.1 = [0x33, 0x33, a, b, c, d];
    }
    packet
}

/// Who has `target`? Asked of its solicited-node group.
pub fn neighbor_solicitation(from: Host, target: Ipv6Addr) -> Packet {
    let [.., a, b, c] = target.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    message(from, group, 135, &target.octets(), Some((1, from.mac)))
}

/// `target` is at `mac`, told to `to`: solicited, unless to a group.
pub fn neighbor_advertisement(from: Host, to: Ipv6Addr, target: Ipv6Addr, mac: [u8; 6]) -> Packet {
    let mut packet = message(from, to, 136, &target.octets(), Some((2, mac)));
    let flags = if to.is_multicast() { 0x20 } else { 0x60 };
    packet.transport = Transport::Icmp { kind: 136, code: 0, rest: [flags, 0, 0, 0] };
    packet
}

/// I am a router, told to everyone.
pub fn router_advertisement(from: Host) -> Packet {
    message(from, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 134, &[0; 8], Some((1, from.mac)))
}

/// For `destination` go to `target`.
pub fn redirect(from: Host, to: Ipv6Addr, target: Ipv6Addr, destination: Ipv6Addr) -> Packet {
    message(from, to, 137, &[target.octets(), destination.octets()].concat(), None)
}
