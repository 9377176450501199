//! What a flow is, which packets belong to it, and how it ages. Pure: the table itself is the caller's.
//!
//! One entry serves both directions of one interface's flow; its key is written from the instance's side.
//!
//! Who may race: two CPUs that note packets of one flow, or one that notes and one that begins the flow anew with the same
//! ports, or removes it. Each field is written whole. Worst, of the first two: a state change or refresh is lost or an old one
//! comes back, and the flow's next packets put it right. Of the last: the kernel has given the entry's place to another flow
//! already, and the notes are that one's, for which two look-ups and a removal must fit between one program's look-up and
//! its note. That flow was allowed when it began; it lives by another timeout or, with the flag of a flow that nothing filters,
//! outlives one revoke under `--on-revoke=cut`. It heals with its next state change, or with its end.

use crate::abi::{
    ACKNOWLEDGED, ALIVE_ORIGIN, ALIVE_REPLY, Config, Direction, FIN_ORIGIN, FIN_REPLY, Flow, FlowKey, ORIGIN_EGRESS,
    UNFILTERED,
};
use crate::packet::{ACK, FIN, Packet, Part, RST, SYN, TCP, UDP};

/// Where a flow stands. The number indexes [`Config::timeouts`].
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// An ICMP query.
    Icmp = 0,
    /// TCP: the first SYN passed.
    SynSent = 1,
    /// TCP: SYN-ACK came back.
    SynReceived = 2,
    /// TCP: the handshake is done, or was before anybody looked (SG-3.9).
    Established = 3,
    /// TCP: one side has sent FIN.
    HalfClosed = 4,
    /// TCP: both have.
    TimeWait = 5,
    /// TCP: a RST passed.
    Reset = 6,
    /// UDP: nothing came back yet.
    UdpOneWay = 7,
    /// UDP: one exchange.
    UdpExchange = 8,
    /// UDP: the origin spoke again after it.
    UdpAgain = 9,
    /// UDP: more than one exchange.
    UdpStream = 10,
    /// Any other protocol.
    Other = 11,
}

impl State {
    /// Idle timeouts in seconds: AWS's defaults (SG-3.5, SG-3.3); where AWS gives none, those of Linux
    /// (`nf_conntrack_proto_tcp.c`: SYN sent 120, SYN received 60, FIN wait 120, time wait 120, close 10;
    /// `nf_conntrack_proto_icmp.c`: 30).
    pub const DEFAULT_TIMEOUTS: [u64; 12] = [30, 120, 60, 432_000, 120, 120, 10, 30, 30, 30, 180, 600];
}

/// The part of a flow's idle timeout (a 1,024th) below which it isn't written again: an established flow costs no
/// store. A flow may end so much too early: 30 ms of UDP's 30 s, 7 minutes of TCP's 5 days.
const REFRESH_SHIFT: u32 = 10;

/// How far an instance's acknowledgments go on before the flow takes note again, in bytes: not each of them is a store.
const NOTED_EVERY: u32 = 1 << 18;
/// How far beyond what the instance acknowledged the end of a connection is believed, in bytes: what was not noted yet,
/// and what may be on its way (Linux's largest receive buffer by default was 6 MiB for long, `tcp_rmem`). One guess in
/// 512 is in it.
const BELIEVED_WITHIN: u32 = 1 << 23;

impl FlowKey {
    /// The flow that a packet belongs to or would begin; `None` for ICMP messages that are not queries or their
    /// answers, and for packets without their transport header.
    #[inline(always)]
    pub fn of(eni: u32, direction: Direction, packet: &Packet) -> Option<Self> {
        if packet.part == Part::Rest {
            return None;
        }
        let (mut source_port, mut destination_port) = (packet.source_port, packet.destination_port);
        let mut asker = Direction::Ingress;
        if packet.is_icmp() {
            let (_, is_answer) = icmp_query(packet.is_v4(), packet.icmp_type())?;
            asker = if is_answer { direction.reverse() } else { direction };
            // Written so that the identifier becomes the local port in both directions. Another code is another
            // query, which its own rule has to allow.
            let (id, query) = (packet.source_port, icmp_request(packet));
            (source_port, destination_port) = match direction {
                Direction::Egress => (id, query),
                Direction::Ingress => (query, id),
            };
        }
        let (local, remote, local_port, remote_port) = match direction {
            Direction::Egress => (packet.source, packet.destination, source_port, destination_port),
            Direction::Ingress => (packet.destination, packet.source, destination_port, source_port),
        };
        Some(Self {
            // `MAX_INTERFACES` fit.
            eni: eni as u16,
            protocol: packet.protocol,
            asker: asker as u8,
            local_port,
            remote_port,
            local,
            remote,
        })
    }
}

/// An ICMP query's type, and whether this is the answer to it (RFC 792, RFC 950, RFC 4443).
#[inline(always)]
const fn icmp_query(is_v4: bool, kind: u8) -> Option<(u8, bool)> {
    match (is_v4, kind) {
        (true, 8) | (true, 13) | (true, 15) | (true, 17) => Some((kind, false)),
        (true, 0) => Some((8, true)),
        (true, 14) | (true, 16) | (true, 18) => Some((kind - 1, true)),
        (false, 128) => Some((128, false)),
        (false, 129) => Some((128, true)),
        _ => None,
    }
}

/// Whether a packet answers an ICMP query. Only a flow lets replies through; without one, a rule for their type may,
/// but it makes no flow, or it would let queries through the other way.
#[inline(always)]
pub fn is_icmp_answer(packet: &Packet) -> bool {
    packet.is_icmp() && matches!(icmp_query(packet.is_v4(), packet.icmp_type()), Some((_, true)))
}

/// The type and code of the query that a packet's ICMP flow began with, as rules are asked for them. An answer has its
/// query's code: 0 in every query that there is, and Linux copies any other (`icmp_echo` in `net/ipv4/icmp.c`).
#[inline(always)]
pub fn icmp_request(packet: &Packet) -> u16 {
    match icmp_query(packet.is_v4(), packet.icmp_type()) {
        Some((kind, true)) => (kind as u16) << 8 | packet.destination_port & 0xff,
        _ => packet.destination_port,
    }
}

/// Whether a packet is an ICMP error that quotes another packet (SG-3.7). A redirect isn't: it asks for something.
#[inline(always)]
pub const fn is_icmp_error(packet: &Packet) -> bool {
    packet.is_icmp()
        && if packet.is_v4() {
            matches!(packet.icmp_type(), 3 | 4 | 11 | 12)
        } else {
            matches!(packet.icmp_type(), 1..=4)
        }
}

impl Flow {
    /// A flow that `packet` begins, or is the first one seen of, with `origin` as the direction of its beginning.
    #[inline(always)]
    pub fn begin(packet: &Packet, origin: Direction, now: u64) -> Self {
        let state = match packet.protocol {
            TCP if packet.is_initial_syn() => State::SynSent,
            TCP if packet.tcp_flags & FIN != 0 => State::HalfClosed,
            TCP => State::Established,
            UDP => State::UdpOneWay,
            _ if packet.is_icmp() => State::Icmp,
            _ => State::Other,
        };
        let flags = match origin {
            Direction::Egress => ORIGIN_EGRESS,
            Direction::Ingress => 0,
        };
        Self { seen: now, state: state as u8, flags, ..Self::default() }
    }

    /// Takes note of what the instance acknowledges: that, and nothing that a stranger could send, says where the other
    /// side's connection can end.
    #[inline(always)]
    pub fn acknowledge(&mut self, packet: &Packet, direction: Direction) {
        let is_acknowledging = direction as u8 == Direction::Egress as u8 && packet.tcp_flags & ACK != 0;
        if is_acknowledging
            && (self.flags & ACKNOWLEDGED == 0 || packet.acknowledgment.wrapping_sub(self.acknowledged) >= NOTED_EVERY)
        {
            self.acknowledged = packet.acknowledgment;
            self.flags |= ACKNOWLEDGED;
        }
    }

    /// Whether a FIN or RST can be what it says. What the instance sends is its own to end. What arrives must be near
    /// what the instance has acknowledged, where it has: the receiver believes no other either (RFC 5961, 3.2), and a
    /// stranger who doesn't see the connection can only guess it.
    #[inline(always)]
    fn is_believed(&self, packet: &Packet, direction: Direction) -> bool {
        let payload = packet.transport_length.wrapping_sub(packet.transport_header);
        let end = if packet.tcp_flags & RST != 0 { packet.sequence } else { packet.sequence.wrapping_add(payload) };
        direction as u8 == Direction::Egress as u8
            || self.flags & ACKNOWLEDGED == 0
            || end.wrapping_sub(self.acknowledged) < BELIEVED_WITHIN
    }

    /// The direction in which it began.
    #[inline(always)]
    pub const fn origin(&self) -> Direction {
        if self.flags & ORIGIN_EGRESS != 0 { Direction::Egress } else { Direction::Ingress }
    }

    /// Whether it has been idle for longer than its state allows (SG-3.5).
    #[inline(always)]
    pub fn is_expired(&self, config: &Config, now: u64) -> bool {
        now.saturating_sub(self.seen) > timeout(config, self.state)
    }

    /// Whether a new SYN may take the entry over: the connection that it held is closing or was reset.
    #[inline(always)]
    pub const fn is_closing(&self) -> bool {
        self.state >= State::HalfClosed as u8 && self.state <= State::Reset as u8
    }

    /// Takes note of one of its packets.
    #[inline(always)]
    pub fn observe(&mut self, packet: &Packet, direction: Direction, config: &Config, now: u64) {
        let is_origin = direction as u8 == self.origin() as u8;
        let (state, flags) = match packet.protocol {
            TCP => {
                self.acknowledge(packet, direction);
                self.tcp(packet, is_origin, self.is_believed(packet, direction))
            }
            UDP => (self.udp(is_origin), self.flags),
            _ => (self.state, self.flags),
        };
        let is_new_state = state != self.state;
        if is_new_state {
            self.state = state;
        }
        if flags != self.flags {
            self.flags = flags;
        }
        // The proxy's flow is kept alive by the proxy, whose acknowledgments and datagrams come in: the instance alone
        // could go on for ever with nobody asked. A state of its making doesn't count as life either, or it would take
        // turns between two.
        let is_egress = direction as u8 == Direction::Egress as u8;
        if self.flags & (UNFILTERED | ORIGIN_EGRESS) == UNFILTERED && is_egress {
            return;
        }
        let is_running_out = !is_new_state && matches_either(state, State::TimeWait, State::Reset);
        let age = now.saturating_sub(self.seen);
        if is_new_state || (!is_running_out && age > timeout(config, state) >> REFRESH_SHIFT) {
            self.seen = now;
        }
    }

    /// TCP. An end that isn't believed changes nothing; one that is may still have been guessed, so data after a FIN from
    /// the same side, or both sides going on after a RST, put the flow back. A SYN never gets here (it is judged by
    /// the rules), so no forged close can open anything.
    #[inline(always)]
    fn tcp(&self, packet: &Packet, is_origin: bool, is_believed: bool) -> (u8, u16) {
        let tcp = packet.tcp_flags;
        let (fin, alive) = if is_origin { (FIN_ORIGIN, ALIVE_ORIGIN) } else { (FIN_REPLY, ALIVE_REPLY) };
        let mut flags = self.flags;
        if tcp & RST != 0 && !is_believed {
            return (self.state, self.flags);
        }
        if tcp & RST != 0 {
            return (State::Reset as u8, flags & !(ALIVE_ORIGIN | ALIVE_REPLY));
        }
        if self.state == State::Reset as u8 {
            flags |= alive;
            if flags & (ALIVE_ORIGIN | ALIVE_REPLY) != ALIVE_ORIGIN | ALIVE_REPLY {
                return (self.state, flags);
            }
            flags &= !(ALIVE_ORIGIN | ALIVE_REPLY | FIN_ORIGIN | FIN_REPLY);
            return (State::Established as u8, flags);
        }
        if tcp & FIN != 0 {
            if is_believed {
                flags |= fin;
            }
        } else if flags & fin != 0 && packet.transport_length > packet.transport_header {
            flags &= !fin;
        }
        let state = match flags & (FIN_ORIGIN | FIN_REPLY) {
            0 if self.state == State::SynSent as u8 => {
                if !is_origin && tcp & (SYN | ACK) == SYN | ACK {
                    State::SynReceived as u8
                } else {
                    self.state
                }
            }
            0 if self.state == State::SynReceived as u8 => {
                if is_origin && tcp & ACK != 0 {
                    State::Established as u8
                } else {
                    self.state
                }
            }
            0 => State::Established as u8,
            both if both == FIN_ORIGIN | FIN_REPLY => State::TimeWait as u8,
            _ => State::HalfClosed as u8,
        };
        (state, flags)
    }

    /// UDP: "one-way or one exchange" against "more than one exchange" (SG-3.5).
    #[inline(always)]
    const fn udp(&self, is_origin: bool) -> u8 {
        const ONE_WAY: u8 = State::UdpOneWay as u8;
        const EXCHANGE: u8 = State::UdpExchange as u8;
        const AGAIN: u8 = State::UdpAgain as u8;
        match (self.state, is_origin) {
            (ONE_WAY, false) => EXCHANGE,
            (EXCHANGE, true) => AGAIN,
            (AGAIN, false) => State::UdpStream as u8,
            (state, _) => state,
        }
    }
}

#[inline(always)]
const fn matches_either(state: u8, one: State, other: State) -> bool {
    state == one as u8 || state == other as u8
}

#[inline(always)]
fn timeout(config: &Config, state: u8) -> u64 {
    // VERIFIER: masked, so that the index is bounded where the state came from a map.
    let index = (state & 15) as usize;
    if index < config.timeouts.len() { config.timeouts[index] } else { 0 }
}
