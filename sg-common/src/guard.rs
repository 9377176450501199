//! What an interface may send and receive at all, whatever the rules say: its own addresses, no multicast, honest ARP
//! and neighbour discovery (SG-4.2 to SG-4.4), and DHCP (SG-4.1).

use crate::abi::{Direction, Interface, SOURCE_DEST_CHECK};
use crate::addr::Address;
use crate::packet::{ETHERNET, Ethernet, Frame, ICMPV6, Packet, Part, UDP};
use crate::policy::Tables;
use crate::verdict::{Drop, Pass, Verdict};

/// The length that Ethernet pads shorter frames to (IEEE 802.3, 4.4.2), with a checksum that a driver may leave there.
const SHORTEST: u32 = 64;

const BROADCAST: Address = Address::v4([255; 4]);

/// Judges an ARP frame (RFC 826, for Ethernet and IPv4).
#[inline(always)]
pub fn arp<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    ethernet: &Ethernet,
    frame: &impl Frame,
) -> Verdict {
    let h: [u8; 28] = frame.load(ETHERNET).ok_or(Drop::Malformed)?;
    // Nothing filters it, so it has room for nothing else: no more than Ethernet's padding, requests and replies only.
    if [h[0], h[1], h[2], h[3], h[4], h[5]] != [0, 1, 0x08, 0x00, 6, 4]
        || h[6] != 0
        || !(h[7] == 1 || h[7] == 2)
        || frame.len() > SHORTEST
    {
        return Err(Drop::Malformed);
    }
    if direction == Direction::Egress {
        let sender_mac = [h[8], h[9], h[10], h[11], h[12], h[13]];
        let sender = Address::v4([h[14], h[15], h[16], h[17]]);
        if ethernet.source != interface.mac {
            return Err(Drop::SourceMac);
        }
        // A probe's sender address is zero (RFC 5227, 2.1.1). One for another's address would keep that one from it.
        let target = Address::v4([h[24], h[25], h[26], h[27]]);
        let is_probe = sender == Address::v4([0; 4]) && may_speak_for(tables, interface, &target);
        if sender_mac != interface.mac || !(is_probe || may_speak_for(tables, interface, &sender)) {
            return Err(Drop::ForgedArp);
        }
    }
    Ok(Pass::Neighbor)
}

/// Judges what needs no rule: `Ok(Some)` lets the packet go on at once, `Ok(None)` leaves it to flows and rules.
#[inline(always)]
pub fn check<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    ethernet: &Ethernet,
    packet: &Packet,
    frame: &impl Frame,
) -> Result<Option<Pass>, Drop> {
    match direction {
        Direction::Egress => sends(tables, interface, ethernet, packet, frame),
        Direction::Ingress => receives(tables, interface, ethernet, packet, frame),
    }
}

#[inline(always)]
fn sends<T: Tables>(
    tables: &T,
    interface: &Interface,
    ethernet: &Ethernet,
    packet: &Packet,
    frame: &impl Frame,
) -> Result<Option<Pass>, Drop> {
    if ethernet.source != interface.mac {
        return Err(Drop::SourceMac);
    }
    if is_neighbor_discovery(packet) {
        return neighbor_discovery(tables, interface, packet, frame).map(Some);
    }
    let is_group = is_group(ethernet, interface, &packet.destination);
    if is_group && is_dhcp_request(interface, packet) {
        return Ok(Some(Pass::Dhcp));
    }
    if !may_speak_for(tables, interface, &packet.source) {
        return Err(Drop::SourceAddress);
    }
    if is_group { Err(Drop::Multicast) } else { Ok(None) }
}

#[inline(always)]
fn receives<T: Tables>(
    tables: &T,
    interface: &Interface,
    ethernet: &Ethernet,
    packet: &Packet,
    frame: &impl Frame,
) -> Result<Option<Pass>, Drop> {
    if is_neighbor_discovery(packet) {
        return if is_plain(packet, frame) { Ok(Some(Pass::Neighbor)) } else { Err(Drop::ForgedNeighbor) };
    }
    if is_dhcp_reply(packet) && tables.is_exempt(interface.vpc, &packet.source, UDP, packet.source_port) {
        return Ok(Some(Pass::Dhcp));
    }
    if is_group(ethernet, interface, &packet.destination) {
        return Err(Drop::Multicast);
    }
    if may_speak_for(tables, interface, &packet.destination) { Ok(None) } else { Err(Drop::DestinationAddress) }
}

/// Whether the address is one of the interface's own, or need not be (SG-4.3).
#[inline(always)]
fn may_speak_for<T: Tables>(tables: &T, interface: &Interface, address: &Address) -> bool {
    interface.flags & SOURCE_DEST_CHECK == 0 || owns(tables, interface, address)
}

#[inline(always)]
fn owns<T: Tables>(tables: &T, interface: &Interface, address: &Address) -> bool {
    *address != Address::UNSPECIFIED
        && (*address == interface.ipv4 || *address == interface.ipv6 || tables.is_secondary(interface.eni, address))
}

/// Broadcast or multicast, by either layer's address (SG-4.4). An IPv4 subnet's own broadcast address counts.
#[inline(always)]
fn is_group(ethernet: &Ethernet, interface: &Interface, destination: &Address) -> bool {
    ethernet.destination[0] & 1 != 0
        || destination.is_multicast()
        || *destination == BROADCAST
        || is_subnet_broadcast(interface, destination)
}

#[inline(always)]
fn is_subnet_broadcast(interface: &Interface, destination: &Address) -> bool {
    let mask = u32::from_be_bytes(interface.mask4.low());
    let broadcast = u32::from_be_bytes(interface.subnet4.low()) | !mask;
    // A /31 has none (RFC 3021), nor has a single address.
    destination.is_v4() && mask < u32::MAX - 1 && u32::from_be_bytes(destination.low()) == broadcast
}

/// A DHCP client's broadcast (RFC 2131, 4.1), or a DHCPv6 one's multicast (RFC 9915, 7.1).
#[inline(always)]
fn is_dhcp_request(interface: &Interface, packet: &Packet) -> bool {
    const ALL_DHCP_AGENTS: Address = Address::v6([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2]);
    if packet.protocol != UDP || packet.part != Part::Whole {
        return false;
    }
    if packet.is_v4() {
        (packet.source_port, packet.destination_port) == (68, 67)
            && packet.destination == BROADCAST
            && (packet.source == Address::v4([0; 4]) || packet.source == interface.ipv4)
    } else {
        (packet.source_port, packet.destination_port) == (546, 547)
            && packet.destination == ALL_DHCP_AGENTS
            && packet.source.is_link_local_v6()
    }
}

#[inline(always)]
fn is_dhcp_reply(packet: &Packet) -> bool {
    packet.protocol == UDP
        && packet.part == Part::Whole
        && matches!((packet.is_v4(), packet.source_port, packet.destination_port), (true, 67, 68) | (false, 547, 546))
}

const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Options that a host sends: its link-layer address (RFC 4861, 4.6.1) and a nonce (RFC 3971, 5.3.2) have 8 bytes each.
const HOST_OPTIONS: u32 = 4 * 8;
/// What a router sends fits into the least MTU (RFC 4861, 4.6.3), 1,280 bytes (RFC 8200, 5).
const ROUTER_LENGTH: u32 = 1280 - 40;

/// RFC 4861's messages. It forbids nothing about fragments, RFC 6980 does: fragmented ones are left to the rules.
#[inline(always)]
fn is_neighbor_discovery(packet: &Packet) -> bool {
    packet.protocol == ICMPV6
        && !packet.is_v4()
        && packet.part == Part::Whole
        && packet.icmp_type() >= ROUTER_SOLICITATION
        && packet.icmp_type() <= REDIRECT
}

/// Judges a neighbour discovery message that the instance sends: only in its own name, only as a host.
#[inline(always)]
fn neighbor_discovery<T: Tables>(tables: &T, interface: &Interface, packet: &Packet, frame: &impl Frame) -> Verdict {
    if !is_plain(packet, frame) || !stays_on_link(packet, frame) {
        return Err(Drop::ForgedNeighbor);
    }
    if interface.flags & SOURCE_DEST_CHECK == 0 {
        return Ok(Pass::Neighbor);
    }
    let source = &packet.source;
    let is_honest = match packet.icmp_type() {
        ROUTER_SOLICITATION => {
            // 8 bytes, then options.
            source_is_own(tables, interface, source) && links_to_self(interface, packet, frame, 8)
        }
        NEIGHBOR_SOLICITATION => {
            let target: [u8; 16] = frame.load(packet.transport + 8).ok_or(Drop::Malformed)?;
            // Duplicate address detection for another's address would keep that one from it.
            let asks_for = if *source == Address::UNSPECIFIED { Address::v6(target) } else { *source };
            is_own_or_link_local(tables, interface, &asks_for) && links_to_self(interface, packet, frame, 24)
        }
        NEIGHBOR_ADVERTISEMENT => {
            let target: [u8; 16] = frame.load(packet.transport + 8).ok_or(Drop::Malformed)?;
            source_is_own(tables, interface, source)
                && is_own_or_link_local(tables, interface, &Address::v6(target))
                && links_to_self(interface, packet, frame, 24)
        }
        // Router advertisements and redirects: `stays_on_link` has refused them.
        _ => false,
    };
    if is_honest { Ok(Pass::Neighbor) } else { Err(Drop::ForgedNeighbor) }
}

/// Whether the packet is a message of neighbour discovery and nothing else. No rule is asked about it, so it has no room
/// for what rules would filter: no extension headers, no bytes behind the message, and no more options than honest
/// senders have.
#[inline(always)]
fn is_plain(packet: &Packet, frame: &impl Frame) -> bool {
    let longest = match packet.icmp_type() {
        ROUTER_SOLICITATION => 8 + HOST_OPTIONS,
        NEIGHBOR_SOLICITATION | NEIGHBOR_ADVERTISEMENT => 24 + HOST_OPTIONS,
        _ => ROUTER_LENGTH,
    };
    // RFC 4861, 6.1 and 7.1: with anything but 255 it was forwarded, which a genuine message never is; no code but 0.
    hop_limit(frame) == Some(255)
        && packet.destination_port & 0xff == 0
        && packet.transport == ETHERNET + 40
        && packet.transport_length <= longest
        && frame.len() == packet.transport + packet.transport_length
}

/// Whether a message that the instance sends is for its own link, as far as that can be told: receivers check that it
/// wasn't forwarded, but nothing keeps a router from forwarding it. Which global addresses are on the link nobody knows
/// here (a Docker network has all of a VPC's subnets), so a question goes to its own target only (RFC 4861, 7.3.1); an
/// answer goes to whoever asked (7.2.4). What advertises routes is a router, which no instance is to its neighbours.
#[inline(always)]
fn stays_on_link(packet: &Packet, frame: &impl Frame) -> bool {
    let destination = &packet.destination;
    let is_local = destination.is_link_local_v6() || is_link_local_group(destination);
    match packet.icmp_type() {
        ROUTER_SOLICITATION => is_local,
        NEIGHBOR_SOLICITATION => {
            is_local || frame.load(packet.transport + 8).is_some_and(|target| Address::v6(target) == *destination)
        }
        // Flags: router, solicited, override. Nobody asked for what isn't solicited.
        NEIGHBOR_ADVERTISEMENT => {
            is_local
                || !destination.is_multicast()
                    && frame
                        .load::<4>(packet.transport + 4)
                        .is_some_and(|[flags, a, b, c]| flags & 0x5f == 0x40 && [a, b, c] == [0; 3])
        }
        _ => false,
    }
}

/// A multicast group of one link: RFC 4291, 2.7.
#[inline(always)]
fn is_link_local_group(address: &Address) -> bool {
    let [first, second, ..] = address.octets();
    !address.is_v4() && first == 0xff && second & 0x0f == 2
}

/// Duplicate address detection sends from `::` (RFC 4862, 5.4.2).
#[inline(always)]
fn source_is_own<T: Tables>(tables: &T, interface: &Interface, source: &Address) -> bool {
    *source == Address::UNSPECIFIED || is_own_or_link_local(tables, interface, source)
}

#[inline(always)]
fn is_own_or_link_local<T: Tables>(tables: &T, interface: &Interface, address: &Address) -> bool {
    let m = interface.mac;
    // The address that a host makes of its MAC (RFC 4291, appendix A).
    let eui64 = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]];
    *address == Address::v6(eui64) || owns(tables, interface, address)
}

/// Whether the link-layer address option after `fixed` bytes of the message, if there is one, is the interface's.
/// Hosts put it first; a message with anything else there is refused, since a later one would go unseen.
#[inline(always)]
fn links_to_self(interface: &Interface, packet: &Packet, frame: &impl Frame, fixed: u32) -> bool {
    const NONCE: u8 = 14;
    if packet.transport_length == fixed {
        return true;
    }
    let Some(option) = frame.load::<8>(packet.transport + fixed) else { return false };
    let is_alone = packet.transport_length == fixed + 8;
    match option[0] {
        // Source or target link-layer address (RFC 4861, 4.6.1).
        1 | 2 => is_alone && option[1] == 1 && option[2..8] == interface.mac,
        // Duplicate address detection's nonce (RFC 7527); it names nobody.
        NONCE => is_alone && option[1] == 1,
        _ => false,
    }
}

#[inline(always)]
fn hop_limit(frame: &impl Frame) -> Option<u8> {
    frame.load::<1>(ETHERNET + 7).map(|byte| byte[0])
}
