//! A packet's way to its verdict: parse, guard, fragment, track, decide. The programs' entry points call [`judge`].

use crate::abi::{self, ACL_EGRESS, ACL_INGRESS, Config, Direction, Flow, FlowKey, FragmentKey, Interface, UNFILTERED};
use crate::conntrack::{is_icmp_answer, is_icmp_error};
use crate::guard;
use crate::packet::{self, Frame, Packet, Part, RST, SYN, TCP};
use crate::policy::{self, Match, Query, Tables};
use crate::verdict::{Drop, Pass, Verdict};

/// The maps that packets write: flows and fragments. Time comes with them.
pub trait Memory {
    /// Nanoseconds of a monotonic clock.
    fn now(&self) -> u64;
    /// Shows a flow's entry to `see`, if there is one.
    fn with_flow<R>(&self, key: &FlowKey, see: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Adds a flow. An entry that another CPU added meanwhile stands.
    ///
    /// # Errors
    /// [`Full`] at the table's limit.
    fn add_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), Full>;
    /// Removes a flow.
    fn remove_flow(&self, key: &FlowKey);
    /// Remembers a first fragment that passed, and where its header ends.
    fn add_fragment(&self, key: &FragmentKey, header_end: u16);
    /// Where the header of the fragmented packet ends, if its first fragment passed.
    fn fragment(&self, key: &FragmentKey) -> Option<u16>;
}

/// The table of flows is at its limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// Judges one frame that crosses `interface` in `direction`. `mark` is the packet's `SO_MARK`.
#[inline(always)]
pub fn judge<M: Tables + Memory>(
    maps: &M,
    interface: &Interface,
    direction: Direction,
    frame: &impl Frame,
    mark: u32,
) -> Verdict {
    let ethernet = packet::ethernet(frame)?;
    if ethernet.ethertype == packet::ARP {
        return guard::arp(maps, interface, direction, &ethernet, frame);
    }
    let packet = packet::ip(frame, &ethernet)?;
    if let Some(pass) = guard::check(maps, interface, direction, &ethernet, &packet, frame)? {
        return Ok(pass);
    }
    match packet.part {
        Part::Whole => track(maps, interface, direction, &packet, frame, mark),
        Part::First => {
            let verdict = track(maps, interface, direction, &packet, frame, mark)?;
            maps.add_fragment(&fragment_key(interface, direction, &packet), packet.fragment_offset);
            Ok(verdict)
        }
        Part::Rest => match maps.fragment(&fragment_key(interface, direction, &packet)) {
            None => Err(Drop::FragmentOrphan),
            Some(header_end) if packet.fragment_offset < header_end => Err(Drop::FragmentOverlap),
            Some(_) => Ok(Pass::Fragment),
        },
    }
}

#[inline(always)]
fn fragment_key(interface: &Interface, direction: Direction, packet: &Packet) -> FragmentKey {
    FragmentKey {
        eni: interface.eni,
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: if packet.is_v4() { packet.protocol } else { 0 },
        direction: direction as u8,
        pad: [0; 2],
    }
}

/// Follows the packet's flow if there is one, else asks the rules and keeps what they say.
#[inline(always)]
fn track<M: Tables + Memory>(
    maps: &M,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    frame: &impl Frame,
    mark: u32,
) -> Verdict {
    let config = maps.config();
    let now = maps.now();
    let key = FlowKey::of(interface.eni, direction, packet);
    if let Some(key) = &key {
        // A SYN is always judged by the rules: it begins something new, whatever the table holds.
        if !packet.is_initial_syn() {
            match maps.with_flow(key, |flow| follow(maps, interface, direction, packet, flow, &config, now)) {
                Some(Followed::Judged(Err(Drop::Revoked))) => {
                    maps.remove_flow(key);
                    return Err(Drop::Revoked);
                }
                Some(Followed::Judged(verdict)) => return verdict,
                Some(Followed::Expired) | None => {}
            }
        }
    } else if config.flags & abi::RELATED_ERRORS != 0
        && is_icmp_error(packet)
        && is_related(maps, interface, direction, packet, frame, &config, now)
    {
        return Ok(Pass::Related);
    }
    let admission = admit(maps, interface, direction, packet, &config, mark)?;
    match (admission.keep, &key) {
        (Some(keep), Some(key)) => begin(maps, interface, direction, packet, key, keep, &config, now)
            .or_else(|drop| if admission.pass == Pass::Exempt { Ok(()) } else { Err(drop) })
            .map(|()| admission.pass),
        _ => Ok(admission.pass),
    }
}

enum Followed {
    Judged(Verdict),
    Expired,
}

/// A packet of a tracked flow. While nothing changed since the flow was last judged, it just passes (SG-3.1).
#[inline(always)]
fn follow<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    flow: &mut Flow,
    config: &Config,
    now: u64,
) -> Followed {
    if flow.is_expired(config, now) {
        return Followed::Expired;
    }
    if flow.flags & UNFILTERED == 0
        && let Err(drop) = review(tables, interface, direction, packet, flow, config)
    {
        return Followed::Judged(Err(drop));
    }
    flow.observe(packet, direction, config, now);
    Followed::Judged(Ok(Pass::Established))
}

/// Judges a tracked flow again where its policy, its ACL or the members changed (SG-3.4). The network ACL is asked once
/// for each direction and epoch: its answer can't differ between a flow's packets.
#[inline(always)]
fn review<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    flow: &mut Flow,
    config: &Config,
) -> Result<(), Drop> {
    let groups = tables.binding(interface.groups);
    let acl = tables.binding(interface.acl);
    if (flow.groups, flow.world) != (groups.epoch, config.world) {
        if config.flags & abi::CUT_ON_REVOKE != 0 {
            let origin = flow.origin();
            let port = if origin as u8 == direction as u8 { packet.destination_port } else { packet.source_port };
            let port = if packet.is_icmp() { icmp_request_port(packet) } else { port };
            let query = Query { peer: peer(direction, packet), protocol: packet.protocol, port };
            let table = abi::table(groups.policy, origin);
            let policy = tables.policy(table).ok_or(Drop::Revoked)?;
            if policy::find(tables, table, &policy, interface.vpc, &query) == Match::None {
                return Err(Drop::Revoked);
            }
        }
        flow.groups = groups.epoch;
        flow.world = config.world;
    }
    if interface.acl == 0 {
        return Ok(());
    }
    let asked = if direction as u8 == Direction::Ingress as u8 { ACL_INGRESS } else { ACL_EGRESS };
    if flow.acl != acl.epoch {
        flow.acl = acl.epoch;
        flow.flags &= !(ACL_INGRESS | ACL_EGRESS);
    }
    if flow.flags & asked == 0 {
        let query = Query { peer: peer(direction, packet), protocol: packet.protocol, port: packet.destination_port };
        if !policy::acl_allows(tables, interface, direction, &query) {
            return Err(Drop::Acl);
        }
        flow.flags |= asked;
    }
    Ok(())
}

/// The type and code of the query that an ICMP flow began with, from either of its packets.
#[inline(always)]
const fn icmp_request_port(packet: &Packet) -> u16 {
    let kind = match (packet.is_v4(), packet.icmp_type()) {
        (true, 0) => 8,
        (false, 129) => 128,
        (true, kind @ (14 | 16 | 18)) => kind - 1,
        (_, kind) => kind,
    };
    (kind as u16) << 8
}

#[inline(always)]
const fn peer(direction: Direction, packet: &Packet) -> &crate::addr::Address {
    match direction {
        Direction::Ingress => &packet.source,
        Direction::Egress => &packet.destination,
    }
}

/// Whether an ICMP error quotes a tracked flow of this interface, and goes to (or comes from) the side that sent the
/// quoted packet (SG-3.7).
#[inline(always)]
fn is_related<M: Tables + Memory>(
    maps: &M,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    frame: &impl Frame,
    config: &Config,
    now: u64,
) -> bool {
    let Ok(quote) = packet::quoted(frame, packet) else { return false };
    if quote.source != packet.destination {
        return false;
    }
    let Some(key) = FlowKey::of(interface.eni, direction.reverse(), &quote) else { return false };
    maps.with_flow(&key, |flow| !flow.is_expired(config, now)).unwrap_or(false)
}

/// What the rules say of a packet without a flow.
struct Admission {
    pass: Pass,
    /// How to track it; `None` keeps nothing.
    keep: Option<Keep>,
}

struct Keep {
    origin: Direction,
    unfiltered: bool,
}

#[inline(always)]
fn admit<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    config: &Config,
    mark: u32,
) -> Result<Admission, Drop> {
    let unfiltered = |pass| Admission { pass, keep: Some(Keep { origin: direction, unfiltered: true }) };
    let is_ingress = direction as u8 == Direction::Ingress as u8;
    if is_ingress && config.proxy_mark != 0 && mark == config.proxy_mark {
        return Ok(unfiltered(Pass::Proxied));
    }
    let ruled = if is_ingress {
        by_acl(tables, interface, direction, packet).and_then(|()| by_rules(tables, interface, direction, packet))
    } else {
        by_rules(tables, interface, direction, packet)
            .and_then(|admission| by_acl(tables, interface, direction, packet).map(|()| admission))
    };
    match ruled {
        Err(_)
            if !is_ingress
                && tables.is_exempt(interface.vpc, &packet.destination, packet.protocol, packet.destination_port) =>
        {
            Ok(unfiltered(Pass::Exempt))
        }
        ruled => ruled,
    }
}

#[inline(always)]
fn by_acl<T: Tables>(tables: &T, interface: &Interface, direction: Direction, packet: &Packet) -> Result<(), Drop> {
    let query = Query { peer: peer(direction, packet), protocol: packet.protocol, port: packet.destination_port };
    if policy::acl_allows(tables, interface, direction, &query) { Ok(()) } else { Err(Drop::Acl) }
}

/// The groups' rules: allowed or not, and if allowed, tracked or not (SG-2.1, SG-3.2).
#[inline(always)]
fn by_rules<T: Tables>(
    tables: &T,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
) -> Result<Admission, Drop> {
    let binding = tables.binding(interface.groups);
    let peer = peer(direction, packet);
    let (here, there) = (abi::table(binding.policy, direction), abi::table(binding.policy, direction.reverse()));
    let forth = tables.policy(here).ok_or(Drop::Inconsistent)?;
    let back = tables.policy(there).ok_or(Drop::Inconsistent)?;
    let query = Query { peer, protocol: packet.protocol, port: packet.destination_port };
    let matched = policy::find(tables, here, &forth, interface.vpc, &query);
    if matched == Match::None {
        return Err(Drop::NoRule);
    }
    let free = abi::free_replies(packet.is_v4(), packet.protocol);
    if matched == Match::Any && back.flags & free != 0 {
        return Ok(Admission { pass: Pass::Untracked, keep: None });
    }
    let track = |origin| Admission { pass: Pass::New, keep: Some(Keep { origin, unfiltered: false }) };
    if is_icmp_answer(packet) {
        return Ok(Admission { pass: Pass::New, keep: None });
    }
    if packet.is_initial_syn() || free == 0 {
        return Ok(track(direction));
    }
    // TCP or UDP that may as well belong to a flow from the other side: ask what the rules say of that one.
    let reverse = Query { peer, protocol: packet.protocol, port: packet.source_port };
    let reversed = policy::find(tables, there, &back, interface.vpc, &reverse);
    if reversed == Match::Any && forth.flags & free != 0 {
        return Ok(Admission { pass: Pass::Untracked, keep: None });
    }
    if packet.protocol != TCP {
        return Ok(track(direction));
    }
    Ok(pick_up(interface, direction, packet, binding.epoch, reversed, track))
}

/// A TCP packet in the middle of a flow that the table doesn't know (SG-3.9).
///
/// Where the rules allow the flow in both directions, the lower port is taken for the server's; that decides only
/// which rule a later revoke has to be about. Where they allow it in this packet's direction alone, it is either a
/// flow that began before there was a table, or the answer to an untracked flow whose rule was revoked (SG-3.4): only
/// while the policy is still the one under which the table began can it not be the latter. After that the packet
/// passes, as its rule says, but opens nothing for the other side.
#[inline(always)]
fn pick_up(
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    epoch: u32,
    reversed: Match,
    track: impl Fn(Direction) -> Admission,
) -> Admission {
    let is_answer = packet.tcp_flags & SYN != 0;
    if packet.tcp_flags & RST != 0 {
        return Admission { pass: Pass::MidFlow, keep: None };
    }
    if reversed != Match::None {
        let is_from_server = is_answer || packet.source_port < packet.destination_port;
        return track(if is_from_server { direction.reverse() } else { direction });
    }
    if is_answer || epoch != interface.born {
        return Admission { pass: Pass::MidFlow, keep: None };
    }
    track(direction)
}

/// Makes the flow's entry, or takes over the one of an earlier connection with the same ports.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined into one program; a struct would cost it stack")]
fn begin<M: Tables + Memory>(
    maps: &M,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
    key: &FlowKey,
    keep: Keep,
    config: &Config,
    now: u64,
) -> Result<(), Drop> {
    let mut flow = Flow::begin(packet, keep.origin, now);
    flow.groups = maps.binding(interface.groups).epoch;
    flow.acl = maps.binding(interface.acl).epoch;
    flow.world = config.world;
    if keep.unfiltered {
        flow.flags |= UNFILTERED;
    } else {
        // The ACL was just asked about this direction.
        flow.flags |= if direction as u8 == Direction::Ingress as u8 { ACL_INGRESS } else { ACL_EGRESS };
    }
    let is_there = maps.with_flow(key, |old| {
        if old.is_expired(config, now) || old.is_closing() {
            *old = flow;
        }
    });
    match is_there {
        Some(()) => Ok(()),
        None => maps.add_flow(key, &flow).map_err(|Full| Drop::ConntrackFull),
    }
}
