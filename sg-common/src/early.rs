//! Published ports before the handshake: does this packet begin a flow that the rules deny? Asks the same question as
//! the proxy does of each client that reaches it, so whatever is left to the proxy here is judged there.
//!
//! Who may race: the agent, which writes ports, interfaces and rules, or opens and closes the proxy's listeners. Worst: a
//! client's packet is denied, or answered with a reset, by what stood a moment ago, or by another port's entry that took
//! this one's place while it was read. It heals when the client tries again; what passes here wrongly, the proxy
//! denies, whose answer alone counts.

use crate::abi::{Direction, Interface, PublishedKey, PublishedPort};
use crate::addr::Address;
use crate::judge::Memory;
use crate::packet::{self, ARP, Ethernet, Frame, Packet, RST, UDP};
use crate::policy::{self, Query, Tables};
use crate::verdict::Drop;

/// Where published ports are looked up, and the interfaces behind them.
pub trait Ports {
    /// `PUBLISHED`.
    fn published(&self, key: &PublishedKey) -> Option<&PublishedPort>;
    /// `INTERFACES`.
    fn interface(&self, link: u32) -> Option<&Interface>;
}

/// A packet that its instance's rules deny.
#[derive(Clone, Copy, Debug)]
pub struct Denied<'a> {
    /// The port that it is for.
    pub port: &'a PublishedPort,
    /// Its Ethernet header.
    pub ethernet: Ethernet,
    /// The packet.
    pub packet: &'a Packet,
    /// Why.
    pub reason: Drop,
}

/// Judges a frame that arrives at a link of the host; what is denied goes to `deny`. `None` goes on: what isn't for a
/// published port, what doesn't begin a flow, what may begin one, and whatever can't be read, which is the stack's and
/// then the proxy's to judge.
///
/// A datagram may belong to a flow that the proxy has: `deny` looks for that.
#[inline(always)]
pub fn judge<M: Tables + Memory + Ports, R>(
    maps: &M,
    frame: &impl Frame,
    deny: impl FnOnce(&Denied) -> R,
) -> Option<R> {
    let ethernet = packet::ethernet(frame).ok()?;
    // Nobody's own MAC address has the group bit; all-ones, a broadcast, has it too.
    if ethernet.ethertype == ARP || ethernet.destination[0] & 1 != 0 {
        return None;
    }
    let packet = packet::ip_to_host(frame, &ethernet).ok()?;
    if is_martian(&ethernet, &packet.source) {
        return None;
    }
    let begins = packet.protocol == UDP || packet.is_initial_syn() && packet.tcp_flags & RST == 0;
    if !begins {
        return None;
    }
    let packet = maps.hold(&packet)?;
    let key =
        PublishedKey { address: packet.destination, port: packet.destination_port, protocol: packet.protocol, pad: 0 };
    let port = maps.published(&key)?;
    let query = Query { peer: &packet.source, protocol: packet.protocol, port: port.port };
    let verdict = match maps.interface(port.link) {
        Some(interface) => policy::begins(maps, interface, Direction::Ingress, &query).1,
        None => Err(Drop::UnknownInterface),
    };
    let reason = verdict.err()?;
    Some(deny(&Denied { port, ethernet, packet, reason }))
}

/// Whether the stack drops what comes from there, whatever rules say: an answer would reach many, or this host itself.
/// Linux does so in `ip_route_input_slow` and `ip6_rcv_core`.
#[inline(always)]
fn is_martian(ethernet: &Ethernet, source: &Address) -> bool {
    // Only on `lo` have both sides no MAC address; there, loopback addresses are at home.
    let is_lo = ethernet.source == [0; 6] && ethernet.destination == [0; 6];
    // "This network" is all of 0.0.0.0/8 (RFC 791, 3.2).
    let is_nobody = *source == Address::UNSPECIFIED || source.is_v4() && source.low()[0] == 0;
    ethernet.source[0] & 1 != 0
        || source.is_multicast()
        || *source == Address::v4([255; 4])
        || is_nobody
        || source.is_loopback() && !is_lo
}
