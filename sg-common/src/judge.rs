//! A packet's way to its verdict: parse, guard, fragment, track, decide. The programs' entry points call [`judge`].

use core::ops::DerefMut;

use crate::abi::{
    self, ACL_EGRESS, ACL_INGRESS, Binding, Config, Direction, EITHER_ORIGIN, FRAGMENT_LIFETIME, Flow, FlowKey,
    Fragment, FragmentKey, Interface, UNFILTERED,
};
use crate::addr::Address;
use crate::conntrack::{icmp_request, is_icmp_answer, is_icmp_error};
use crate::guard;
use crate::packet::{self, Frame, Packet, Part, RST, SYN, TCP};
use crate::policy::{self, Match, Query, Tables};
use crate::verdict::{Drop, Pass, Verdict};

/// The maps that packets write: flows and fragments. Time comes with them.
pub trait Memory {
    /// Nanoseconds of a monotonic clock.
    fn now(&self) -> u64;
    /// A place for `packet`. The kernel's is one where the verifier forgets what it knows of each field: otherwise
    /// everything that follows would be verified once for each way through the parser. `None` only where the maps are
    /// not the agent's.
    fn hold<'a>(&'a self, packet: &'a Packet) -> Option<&'a Packet>;
    /// A flow's entry in the table.
    type Entry<'a>: DerefMut<Target = Flow>
    where
        Self: 'a;
    /// The flow's entry, if there is one.
    fn flow(&self, key: &FlowKey) -> Option<Self::Entry<'_>>;
    /// Adds a flow, unless there is an entry already, which is what it returns then.
    ///
    /// # Errors
    /// [`Full`] at the table's limit.
    fn add_flow(&self, key: &FlowKey, flow: &Flow) -> Result<Option<Self::Entry<'_>>, Full>;
    /// Removes a flow.
    fn remove_flow(&self, key: &FlowKey);
    /// Remembers a first fragment that passed.
    fn add_fragment(&self, fragment: &Fragment);
    /// Forgets a fragmented packet.
    fn remove_fragment(&self, key: &FragmentKey);
    /// What is known of the fragmented packet, if its first fragment passed.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
}

/// The table of flows is at its limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// Judges one frame that crosses `interface` in `direction`. `mark` is the packet's `SO_MARK`.
///
/// # Errors
/// The reason to drop it.
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
    let packet = maps.hold(&packet).ok_or(Drop::Inconsistent)?;
    if let Some(pass) = guard::check(maps, interface, direction, &ethernet, packet, frame)? {
        return Ok(pass);
    }
    if packet.part == Part::Rest {
        return follow_fragment(maps, interface, direction, packet);
    }
    // Who may race: a change of rules or members, with this packet. Bindings and the members' count are read once,
    // before any table that they lead to or tell of. Worst: what is judged by the old ones passes after the change, and
    // its flow is made; it carries their epochs, so that its next packet finds it old, never one that missed the
    // change. A kernel that puts the reads in another order (arm64) may give it the new ones: that heals with
    // `Applier::collect`, which counts once more when no program is left that began before the change.
    let config = maps.config().ok_or(Drop::Inconsistent)?;
    let crossing = Crossing {
        interface,
        direction,
        packet,
        config,
        world: read_once(&config.world),
        groups: maps.binding(interface.groups),
        acl: if interface.acl == 0 { Binding::default() } else { maps.binding(interface.acl) },
        now: maps.now(),
    };
    let verdict = crossing.track(maps, frame, mark);
    if packet.part == Part::First {
        let key = fragment_key(interface, direction, packet);
        match verdict {
            Ok(_) => maps.add_fragment(&Fragment {
                key,
                header_end: packet.fragment_offset as u32,
                seen: crossing.now,
                groups: crossing.groups.epoch,
                world: crossing.world,
            }),
            // Identifications come again: the rest is not to follow an earlier packet's first one.
            Err(_) => maps.remove_fragment(&key),
        }
    }
    verdict
}

/// Reads a word that the agent may be writing: here, and once. The compiler would read it where it is used, and as often.
#[inline(always)]
fn read_once(word: &u32) -> u32 {
    // SAFETY: a reference can be read.
    unsafe { core::ptr::from_ref(word).read_volatile() }
}

/// A later fragment goes where the first one went (SG-3.8): for as long as a receiver waits for it, and under
/// `--on-revoke=cut` only while what the first one was judged by stands (SG-3.4).
#[inline(always)]
fn follow_fragment<M: Tables + Memory>(
    maps: &M,
    interface: &Interface,
    direction: Direction,
    packet: &Packet,
) -> Verdict {
    let config = maps.config().ok_or(Drop::Inconsistent)?;
    let first = maps.fragment(&fragment_key(interface, direction, packet)).ok_or(Drop::FragmentOrphan)?;
    let is_old = maps.now().saturating_sub(first.seen) > FRAGMENT_LIFETIME;
    let is_stale = first.groups != maps.binding(interface.groups).epoch || first.world != config.world;
    if is_old || (is_stale && config.flags & abi::CUT_ON_REVOKE != 0) {
        return Err(Drop::FragmentOrphan);
    }
    if (packet.fragment_offset as u32) < first.header_end {
        return Err(Drop::FragmentOverlap);
    }
    Ok(Pass::Fragment)
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

/// One packet at one interface, with the policies that stand at this moment.
struct Crossing<'a> {
    interface: &'a Interface,
    direction: Direction,
    packet: &'a Packet,
    config: &'a Config,
    /// [`Config::world`], as it was then.
    world: u32,
    groups: Binding,
    acl: Binding,
    now: u64,
}

/// What the rules say of a packet without a flow.
struct Admission {
    pass: Pass,
    keep: Keep,
}

/// How an admitted packet's flow is kept.
#[derive(Clone, Copy)]
enum Keep {
    /// Not at all.
    Nothing,
    /// As a flow that began in this direction.
    From(Direction),
    /// As one that began in this direction, or in the other.
    Perhaps(Direction),
    /// As a flow that neither groups nor ACLs are asked about again.
    Unfiltered,
}

impl Crossing<'_> {
    /// Follows the packet's flow if there is one, else asks the rules and keeps what they say.
    #[inline(always)]
    fn track<M: Tables + Memory>(&self, maps: &M, frame: &impl Frame, mark: u32) -> Verdict {
        let key = FlowKey::of(self.interface.eni, self.direction, self.packet);
        match &key {
            // A SYN is always judged by the rules: it begins something new, whatever the table holds.
            Some(key) if !self.packet.is_initial_syn() => {
                if let Some(mut flow) = maps.flow(key)
                    && !flow.is_expired(self.config, self.now)
                {
                    let verdict = self.follow(maps, &mut flow);
                    drop(flow);
                    if verdict == Err(Drop::Revoked) {
                        maps.remove_flow(key);
                    }
                    return verdict;
                }
            }
            Some(_) => {}
            None => {
                if let Some(is_unfiltered) = self.related(maps, frame) {
                    // Groups have states, network ACLs haven't (SG-5.1).
                    if !is_unfiltered {
                        self.by_acl(maps)?;
                    }
                    return Ok(Pass::Related);
                }
            }
        }
        let admission = self.admit(maps, mark)?;
        match &key {
            Some(key) => self.keep(maps, key, &admission),
            None => Ok(admission.pass),
        }
    }

    /// A packet of a tracked flow. While nothing changed since the flow was last judged, it just passes (SG-3.1).
    #[inline(always)]
    fn follow<T: Tables>(&self, tables: &T, flow: &mut Flow) -> Verdict {
        if flow.flags & UNFILTERED == 0 {
            self.review(tables, flow)?;
        }
        flow.observe(self.packet, self.direction, self.config, self.now);
        Ok(Pass::Established)
    }

    /// Judges a tracked flow again where its policy, its ACL or the members changed (SG-3.4). The network ACL is asked
    /// once for each direction and epoch: its answer can't differ between a flow's packets.
    #[inline(always)]
    fn review<T: Tables>(&self, tables: &T, flow: &mut Flow) -> Result<(), Drop> {
        let is_other_world = flow.world != self.world;
        if is_other_world || flow.groups != self.groups.epoch {
            if self.is_cut(tables, flow, self.packet, self.direction) {
                return Err(Drop::Revoked);
            }
            flow.groups = self.groups.epoch;
            flow.world = self.world;
        }
        if self.interface.acl == 0 {
            return Ok(());
        }
        // Which addresses are in the subnet, and so beyond the ACL (SG-5.2), is the members' to tell.
        if is_other_world || flow.acl != self.acl.epoch {
            flow.acl = self.acl.epoch;
            flow.flags &= !(ACL_INGRESS | ACL_EGRESS);
        }
        if flow.flags & self.acl_asked() == 0 {
            self.by_acl(tables)?;
            flow.flags |= self.acl_asked();
        }
        Ok(())
    }

    /// Under `--on-revoke=cut`, whether the rules wouldn't let `packet`'s flow begin any more: in the direction in which
    /// it did, or if that isn't known, in either.
    #[inline(always)]
    fn is_cut<T: Tables>(&self, tables: &T, flow: &Flow, packet: &Packet, direction: Direction) -> bool {
        if self.config.flags & abi::CUT_ON_REVOKE == 0 {
            return false;
        }
        let origin = flow.origin();
        !self.may_begin(tables, packet, direction, origin)
            || (flow.flags & EITHER_ORIGIN != 0 && !self.may_begin(tables, packet, direction, origin.reverse()))
    }

    /// Whether the rules let the flow begin in direction `origin` of which `packet` crosses in `direction`.
    #[inline(always)]
    fn may_begin<T: Tables>(&self, tables: &T, packet: &Packet, direction: Direction, origin: Direction) -> bool {
        let port = if packet.is_icmp() {
            icmp_request(packet)
        } else if origin as u8 == direction as u8 {
            packet.destination_port
        } else {
            packet.source_port
        };
        let query = Query { peer: peer(packet, direction), protocol: packet.protocol, port };
        tables.matches(abi::table(self.groups.policy, origin), self.interface.vpc, &query) != Match::None
    }

    /// Where an ICMP error quotes a tracked flow of this interface, and goes to the side that sent the quoted packet
    /// (SG-3.7): whether nothing filters that flow.
    #[inline(always)]
    fn related<M: Tables + Memory>(&self, maps: &M, frame: &impl Frame) -> Option<bool> {
        if self.config.flags & abi::RELATED_ERRORS == 0 || !is_icmp_error(self.packet) {
            return None;
        }
        let quote = packet::quoted(frame, self.packet).ok()?;
        if quote.source != self.packet.destination {
            return None;
        }
        let direction = self.direction.reverse();
        let key = FlowKey::of(self.interface.eni, direction, &quote)?;
        let flow = maps.flow(&key)?;
        if flow.is_expired(self.config, self.now) {
            return None;
        }
        if flow.flags & UNFILTERED != 0 {
            return Some(true);
        }
        // A flow that its next packet will find revoked has no errors either (SG-3.4).
        let is_stale = flow.world != self.world || flow.groups != self.groups.epoch;
        if is_stale && self.is_cut(maps, &flow, &quote, direction) { None } else { Some(false) }
    }

    /// A packet without a flow: what neither groups nor ACLs filter, and what both allow. On the way in the ACL comes
    /// first, on the way out last (SG-5.2).
    #[inline(always)]
    fn admit<T: Tables>(&self, tables: &T, mark: u32) -> Result<Admission, Drop> {
        match self.direction {
            Direction::Ingress => {
                if mark != 0 && mark == self.config.proxy_mark {
                    return Ok(Admission { pass: Pass::Proxied, keep: Keep::Unfiltered });
                }
                self.by_acl(tables)?;
                self.by_rules(tables)
            }
            Direction::Egress => {
                let admission = self.by_rules(tables).and_then(|allowed| self.by_acl(tables).map(|()| allowed));
                match admission {
                    // Its answer is judged by the same rules and by no ACL, so it need not be known as exempt.
                    Ok(Admission { keep: Keep::Nothing, .. }) if self.interface.acl == 0 => admission,
                    _ => self.exempt_or(tables, admission),
                }
            }
        }
    }

    /// Services that nothing filters (SG-4.1) are reached from the instance; their answers belong to that flow. What
    /// rules allow is exempt all the same: the answer has the ACL before it, and the flow a revoke or a full table.
    #[inline(always)]
    fn exempt_or<T: Tables>(&self, tables: &T, admission: Result<Admission, Drop>) -> Result<Admission, Drop> {
        let packet = self.packet;
        let is_exempt =
            tables.is_exempt(self.interface.vpc, &packet.destination, packet.protocol, packet.destination_port);
        if is_exempt { Ok(Admission { pass: Pass::Exempt, keep: Keep::Unfiltered }) } else { admission }
    }

    #[inline(always)]
    fn by_acl<T: Tables>(&self, tables: &T) -> Result<(), Drop> {
        let is_allowed = self.interface.acl == 0
            || policy::acl_allows(tables, self.interface, self.acl, self.direction, &self.query());
        if is_allowed { Ok(()) } else { Err(Drop::Acl) }
    }

    /// The groups' rules: allowed or not, and if allowed, how its flow is kept.
    #[inline(always)]
    fn by_rules<T: Tables>(&self, tables: &T) -> Result<Admission, Drop> {
        let packet = self.packet;
        let untracked = Admission { pass: Pass::Untracked, keep: Keep::Nothing };
        let (_, verdict) = policy::begins_by_rules(tables, self.interface, self.groups, self.direction, &self.query());
        if verdict? == Pass::Untracked {
            return Ok(untracked);
        }
        let free = abi::free_replies(packet.is_v4(), packet.protocol);
        if is_icmp_answer(packet) {
            return Ok(Admission { pass: Pass::New, keep: Keep::Nothing });
        }
        if packet.is_initial_syn() || free == 0 {
            return Ok(Admission { pass: Pass::New, keep: Keep::From(self.direction) });
        }
        // TCP or UDP that may as well belong to a flow from the other side: what do the rules say of that one?
        let there = abi::table(self.groups.policy, self.direction.reverse());
        let forth = tables.policy(abi::table(self.groups.policy, self.direction)).ok_or(Drop::Inconsistent)?;
        let reverse = Query { peer: self.peer(), protocol: packet.protocol, port: packet.source_port };
        let reversed = tables.matches(there, self.interface.vpc, &reverse);
        if reversed == Match::Any && forth.flags & free != 0 {
            return Ok(untracked);
        }
        if packet.protocol == TCP {
            return Ok(self.pick_up(reversed));
        }
        Ok(Admission { pass: Pass::New, keep: Keep::From(self.direction) })
    }

    /// A TCP packet in the middle of a flow that the table doesn't know (SG-3.9).
    ///
    /// Where the rules allow the flow in both directions, the lower port is taken for the server's, which is a guess: a
    /// later revoke of either rule cuts it. Where they allow it in this packet's direction alone, it is either a
    /// flow that began before there was a table, or the answer to an untracked flow whose rule was revoked (SG-3.4):
    /// only while the policy is still the one under which the table began can it not be the latter. After that the
    /// packet passes, as its rule says, but opens nothing for the other side.
    #[inline(always)]
    fn pick_up(&self, reversed: Match) -> Admission {
        let packet = self.packet;
        let is_answer = packet.tcp_flags & SYN != 0;
        let keep = if packet.tcp_flags & RST != 0 {
            Keep::Nothing
        } else if reversed != Match::None {
            let is_from_server = is_answer || packet.source_port < packet.destination_port;
            Keep::Perhaps(if is_from_server { self.direction.reverse() } else { self.direction })
        } else if is_answer || self.groups.epoch != self.interface.born {
            Keep::Nothing
        } else {
            Keep::From(self.direction)
        };
        let pass = if matches!(keep, Keep::Nothing) { Pass::MidFlow } else { Pass::New };
        Admission { pass, keep }
    }

    /// Makes the flow's entry, or takes over the one of an earlier connection with the same ports.
    #[inline(always)]
    fn keep<M: Tables + Memory>(&self, maps: &M, key: &FlowKey, admission: &Admission) -> Verdict {
        let (origin, flags) = match admission.keep {
            Keep::Nothing => {
                // Tracked packets go by their flow: an earlier connection's would outlive this one's rule (SG-3.4).
                if admission.pass == Pass::Untracked && self.packet.is_initial_syn() {
                    maps.remove_flow(key);
                }
                return Ok(admission.pass);
            }
            Keep::From(origin) => (origin, self.acl_asked()),
            Keep::Perhaps(origin) => (origin, self.acl_asked() | EITHER_ORIGIN),
            Keep::Unfiltered => (self.direction, UNFILTERED),
        };
        let mut flow = Flow::begin(self.packet, origin, self.now);
        flow.flags |= flags;
        flow.acknowledge(self.packet, self.direction);
        flow.groups = self.groups.epoch;
        flow.acl = self.acl.epoch;
        flow.world = self.world;
        match maps.add_flow(key, &flow) {
            Ok(None) => Ok(admission.pass),
            Ok(Some(mut old)) => {
                if old.is_expired(self.config, self.now) || old.is_closing() {
                    *old = flow;
                }
                Ok(admission.pass)
            }
            // What nothing filters isn't filtered by a full table either; it only isn't remembered.
            Err(Full) if admission.pass == Pass::Exempt => Ok(Pass::Exempt),
            Err(Full) => Err(Drop::ConntrackFull),
        }
    }

    #[inline(always)]
    fn peer(&self) -> &Address {
        peer(self.packet, self.direction)
    }

    #[inline(always)]
    fn query(&self) -> Query<'_> {
        Query { peer: self.peer(), protocol: self.packet.protocol, port: self.packet.destination_port }
    }

    /// The flag of a flow that says that the ACL was asked about this direction.
    #[inline(always)]
    fn acl_asked(&self) -> u16 {
        match self.direction {
            Direction::Ingress => ACL_INGRESS,
            Direction::Egress => ACL_EGRESS,
        }
    }
}

/// The address on the other side of the interface that a packet crosses in `direction`.
#[inline(always)]
fn peer(packet: &Packet, direction: Direction) -> &Address {
    match direction {
        Direction::Ingress => &packet.source,
        Direction::Egress => &packet.destination,
    }
}
