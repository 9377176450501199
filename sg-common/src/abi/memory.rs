//! What packets write: tracked flows, fragmented packets under way, counters.

use super::{FRAGMENT_SLOTS, Interface, MAX_INTERFACES};
use crate::addr::Address;

/// An interface's entry as one CPU looked it up last. Per-CPU array `RECENT`, at the link's index modulo [`RECENT_LINKS`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recent {
    /// The word in `EDITION` from before the look-up: the entry counts while it is the same.
    pub edition: u64,
    /// The link's index; 0, which no link has, where nothing was looked up yet.
    pub link: u32,
    /// The entry.
    pub interface: Interface,
}
const _: () = assert!(size_of::<Recent>() == 144);

/// Key of the map `FLOWS`: one flow of one interface, the same for both directions.
///
/// Whole words of 64 bits: the kernel compares the last bytes of other keys one by one.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    /// The interface's number: what a neighbour sends can't touch another's flows.
    pub eni: u16,
    /// The protocol.
    pub protocol: u8,
    /// For ICMP queries who asked, as a [`super::Direction`]; 0 for the rest. A ping and a ping back are two flows.
    pub asker: u8,
    /// The instance's port, or an ICMP query's identifier.
    pub local_port: u16,
    /// The peer's port, or an ICMP query's kind.
    pub remote_port: u16,
    /// The address on the instance's side.
    pub local: Address,
    /// The peer's address.
    pub remote: Address,
}
const _: () = assert!(size_of::<FlowKey>() == 40 && MAX_INTERFACES <= 1 << 16);

/// A tracked flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow {
    /// When it was last refreshed, in nanoseconds of the programs' clock.
    pub seen: u64,
    /// The group policy's epoch under which it was last judged.
    pub groups: u32,
    /// The network ACL's epoch under which it was last judged.
    pub acl: u32,
    /// [`super::Config::world`] when it was last judged.
    pub world: u32,
    /// TCP, with [`ACKNOWLEDGED`]: how far the instance has acknowledged what it received, roughly.
    pub acknowledged: u32,
    /// [`ORIGIN_EGRESS`] and the other flags of a flow.
    pub flags: u16,
    /// A [`crate::conntrack::State`].
    pub state: u8,
    /// Zero.
    pub pad: [u8; 5],
}
const _: () = assert!(size_of::<Flow>() == 32);

/// Flag of [`Flow`]: the instance began it.
pub const ORIGIN_EGRESS: u16 = 1;
/// Flag of [`Flow`]: the ACL was asked about its ingress in this epoch, and allows it.
pub const ACL_INGRESS: u16 = 2;
/// Flag of [`Flow`]: the ACL was asked about its egress in this epoch, and allows it.
pub const ACL_EGRESS: u16 = 4;
/// Flag of [`Flow`]: neither groups nor ACLs apply (an exempt service, or the agent's proxy).
pub const UNFILTERED: u16 = 8;
/// Flag of [`Flow`]: TCP, a FIN came from its origin's side.
pub const FIN_ORIGIN: u16 = 16;
/// Flag of [`Flow`]: TCP, a FIN came from the other side.
pub const FIN_REPLY: u16 = 32;
/// Flag of [`Flow`]: TCP, after a RST its origin's side went on as if nothing had happened.
pub const ALIVE_ORIGIN: u16 = 64;
/// Flag of [`Flow`]: TCP, after a RST the other side went on.
pub const ALIVE_REPLY: u16 = 128;
/// Flag of [`Flow`]: it was picked up in the middle, and may as well have begun in the other direction (SG-3.9).
pub const EITHER_ORIGIN: u16 = 256;
/// Flag of [`Flow`]: TCP, the instance has acknowledged something.
pub const ACKNOWLEDGED: u16 = 512;

/// A fragmented packet of which the first fragment passed.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    /// The interface's number.
    pub eni: u32,
    /// The packet's source.
    pub source: Address,
    /// The packet's destination.
    pub destination: Address,
    /// Its identification (16 bits for IPv4, 32 for IPv6), in network order.
    pub id: u32,
    /// Its protocol (IPv4 only; RFC 8200 leaves it out of the key).
    pub protocol: u8,
    /// A [`super::Direction`].
    pub direction: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<FragmentKey>() == 44);

impl FragmentKey {
    /// Where it stands in `FRAGMENTS`. A sender counts its packets, so those that it sends together have slots of their
    /// own.
    #[inline(always)]
    pub const fn slot(&self) -> FragmentSlot {
        let mut mixed = self.id ^ self.source.0[3] ^ self.destination.0[3] ^ self.protocol as u32;
        mixed ^= mixed >> 16;
        mixed ^= mixed >> 8;
        FragmentSlot { eni: self.eni, slot: self.direction as u32 * FRAGMENT_SLOTS + mixed % FRAGMENT_SLOTS }
    }
}

/// Key of the map `FRAGMENTS`: a place for one fragmented packet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentSlot {
    /// The interface's number.
    pub eni: u32,
    /// Which of the interface's places.
    pub slot: u32,
}
const _: () = assert!(size_of::<FragmentSlot>() == 8);

/// The packet that has the place.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// Which packet.
    pub key: FragmentKey,
    /// Where its transport header ends, in units of 8 bytes of the packet's fragmentable part.
    pub header_end: u32,
    /// When the first fragment passed, in nanoseconds of the programs' clock.
    pub seen: u64,
    /// The group policy's epoch under which it did.
    pub groups: u32,
    /// [`super::Config::world`] when it did.
    pub world: u32,
}
const _: () = assert!(size_of::<Fragment>() == 64);

/// How long after the first fragment the rest may come, in nanoseconds: as long as Linux waits for it
/// (`IP_FRAG_TIME`). RFC 791 gives it 15 s at first, RFC 8200 60 s; a receiver that waits longer gets no more of it.
pub const FRAGMENT_LIFETIME: u64 = 30_000_000_000;

/// Key of the per-CPU map `REASONS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReasonKey {
    /// The interface's number; [`u32::MAX`] where it is unknown.
    pub eni: u32,
    /// A [`super::Direction`].
    pub direction: u8,
    /// [`crate::verdict::number`].
    pub reason: u8,
    /// Zero.
    pub pad: u16,
}
const _: () = assert!(size_of::<ReasonKey>() == 8);

/// Packets and their bytes (of the whole frame).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Count>() == 16);

/// How many kinds of verdict the per-CPU array `USUAL` counts for each interface and direction, at `2 * eni + direction`.
/// Which ones and in which order is [`crate::verdict::USUAL`]'s.
pub const USUAL_KINDS: usize = 4;
