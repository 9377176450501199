//! The layout of every BPF map, shared by the programs and the agent.
//!
//! All types are `repr(C)`, without implicit padding, Rust enums or `bool`. Integers are in host byte order unless
//! the field says otherwise. A change here changes [`LAYOUT`], which is checked before maps are adopted. Here is what the
//! agent writes; what packets write is `memory`'s, how much of all there can be `limits`'.

mod limits;
mod memory;

pub use limits::*;
pub use memory::*;

use crate::addr::Address;

/// The version of everything in this module and those below it. Bump it with every change of a type, a map or a number's
/// meaning.
pub const LAYOUT: u32 = if ANOTHER { 1_000 } else { 5 };
/// See the feature: some maps have other sizes then, and programs that use them other instructions.
const ANOTHER: bool = cfg!(feature = "another-layout");

/// As seen from the interface: what arrives, or what leaves.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Direction {
    /// To the instance.
    Ingress = 0,
    /// From the instance.
    Egress = 1,
}

impl Direction {
    /// The opposite one.
    #[inline(always)]
    pub const fn reverse(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }

    /// Its name, as users read it.
    #[inline(always)]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// An attached interface (an ENI), by the index of its host-side link. Map `INTERFACES`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Interface {
    /// This interface's number: part of every key that must not be shared with a neighbour.
    pub eni: u32,
    /// Where in `BINDINGS` the policy of its group set stands.
    pub groups: u32,
    /// Where in `BINDINGS` the policy of its subnet's network ACL stands; 0 where none restricts anything.
    pub acl: u32,
    /// The number of its VPC: addresses mean something within one only.
    pub vpc: u32,
    /// [`SOURCE_DEST_CHECK`].
    pub flags: u32,
    /// The epoch of the policy under which the flow table of this interface began: until it changes, a TCP packet
    /// in the middle of an unknown flow may be picked up (SG-3.9), after that it could be a revoked one (SG-3.4). 0,
    /// which is no epoch, once its groups were swapped or anybody left a group.
    pub born: u32,
    /// Its primary IPv4 address, or unspecified.
    pub ipv4: Address,
    /// Its primary IPv6 address, or unspecified.
    pub ipv6: Address,
    /// Its subnet's IPv4 network, or [`NOWHERE`].
    pub subnet4: Address,
    /// The mask of `subnet4`.
    pub mask4: Address,
    /// Its subnet's IPv6 network, or [`NOWHERE`].
    pub subnet6: Address,
    /// The mask of `subnet6`.
    pub mask6: Address,
    /// Its subnet's number, for peers whose real addresses are outside the subnet's network; 0 where no network ACL
    /// asks.
    pub subnet: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<Interface>() == 132);

/// With a full mask, a network that no packet's address is in.
pub const NOWHERE: Address = Address([u32::MAX; 4]);

/// Flag of [`Interface`]: source and destination addresses are checked (SG-4.3).
pub const SOURCE_DEST_CHECK: u32 = 1;

/// Which policy a group set or network ACL has now. Map `BINDINGS`, memory-mapped by the agent: replacing this one
/// aligned word is the moment in which a change of rules takes effect.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Binding {
    /// The number of the compiled policy; 0 denies everything.
    pub policy: u32,
    /// Counts the flips: a flow judged under another epoch is looked at again.
    pub epoch: u32,
}
const _: () = assert!(size_of::<Binding>() == 8);

/// One direction of a compiled policy: where its parts are in `RULES`. Map `POLICIES`, at `2 * policy + direction`.
/// Immutable once bound.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// From (protocol, port) to columns.
    pub ports: Tree,
    /// From IPv4 addresses to rows.
    pub peers4: Tree,
    /// From IPv6 addresses to rows.
    pub peers6: Tree,
    /// The first line of its matrix.
    pub cells: u32,
    /// Words in a row of its matrix.
    pub row_words: u32,
    /// Rows and columns, for bounds: `rows << 16 | columns`. 0 where there is no policy.
    pub size: u32,
    /// [`REFERENCES`], and [`free_replies`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Policy>() == 40);

impl Policy {
    /// The same, where its parts lie so many lines further on.
    pub const fn moved(self, lines: u32) -> Self {
        Self {
            ports: self.ports.moved(lines),
            peers4: self.peers4.moved(lines),
            peers6: self.peers6.moved(lines),
            cells: self.cells + lines,
            ..self
        }
    }
}

/// A search tree; [`crate::ranges`] says how it is laid out.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    /// Its first line.
    pub start: u32,
    /// The number of its last range, counted from 0.
    pub last: u32,
}
const _: () = assert!(size_of::<Tree>() == 8);

impl Tree {
    const fn moved(self, lines: u32) -> Self {
        Self { start: self.start + lines, ..self }
    }
}

/// What the map `RULES` consists of, memory-mapped by the agent: a cache line. A policy's search trees and matrix lie in
/// it one after another.
pub type Line = [u64; LINE_WORDS];

/// Words of a [`Line`].
pub const LINE_WORDS: usize = 8;

/// Flag of [`Policy`]: some rule refers to a group, so the peer's memberships matter.
pub const REFERENCES: u32 = 1;
/// Flag of [`Policy`]: it has at least one rule, for telling `SG_HAS_NO_RULES` from a mismatch.
pub const HAS_RULES: u32 = 2;

/// The flag of [`Policy`] that says: an any-source rule lets *all* TCP (or UDP) of the family through, so replies to
/// the other direction's flows need no tracking (SG-3.2). 0 for every other protocol, which is always tracked.
#[inline(always)]
pub const fn free_replies(is_v4: bool, protocol: u8) -> u32 {
    match (is_v4, protocol) {
        (true, crate::packet::TCP) => 1 << 8,
        (true, crate::packet::UDP) => 1 << 9,
        (false, crate::packet::TCP) => 1 << 10,
        (false, crate::packet::UDP) => 1 << 11,
        _ => 0,
    }
}

/// One direction of one policy, as the keys of its look-ups carry it.
#[inline(always)]
pub const fn table(policy: u32, direction: Direction) -> u32 {
    policy << 1 | direction as u32
}

/// Key of the map `REFERENCES`, whose value is a row of the policy's matrix.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReferenceKey {
    /// [`table`].
    pub table: u32,
    /// The agent's number of the referenced group.
    pub group: u32,
}
const _: () = assert!(size_of::<ReferenceKey>() == 8);

/// The length of the IPv6 prefixes that EC2 delegates to interfaces.
pub const DELEGATED_LENGTH: u8 = 80;
/// In the number of a [`MemberKey`] or [`OwnKey`]: the entry is of a delegated IPv6 prefix, and the address its first
/// one. A hash holds both that way; no number comes near.
pub const DELEGATED: u32 = 1 << 31;

/// Key of the map `MEMBERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MemberKey {
    /// The VPC from which the address is seen; with [`DELEGATED`], a prefix.
    pub vpc: u32,
    /// A private address of a group's member.
    pub address: Address,
}
const _: () = assert!(size_of::<MemberKey>() == 20);

/// The groups that an address (or delegated prefix) is in, as far as any rule refers to them, and its subnet if that has
/// an ACL. One write changes a membership for every policy at once.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Member {
    /// How many of `groups` count.
    pub count: u32,
    /// The number of the address's subnet; 0 where no network ACL asks.
    pub subnet: u32,
    /// The agent's numbers of the groups.
    pub groups: [u32; GROUPS_PER_MEMBER],
}
const _: () = assert!(size_of::<Member>() == 8 + 4 * GROUPS_PER_MEMBER);

/// Key of the map `SECONDARIES`: an interface's own address that is not a primary one, or its delegated prefix. Its value
/// is 1.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OwnKey {
    /// The interface's number; with [`DELEGATED`], the address is a prefix.
    pub eni: u32,
    /// The address.
    pub address: Address,
}
const _: () = assert!(size_of::<OwnKey>() == 20);

/// Key of the map `EXEMPT`: a service that groups and ACLs do not filter (SG-4.1). Its value is 1.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExemptKey {
    /// The VPC in which the address serves.
    pub vpc: u32,
    /// The service's address.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// Its protocol (TCP or UDP).
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
const _: () = assert!(size_of::<ExemptKey>() == 24);

/// Key of the map `PUBLISHED`: where clients reach a published port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PublishedKey {
    /// An address of this host, never an unspecified one: what is only forwarded here is nobody's published port.
    pub address: Address,
    /// The host's port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
const _: () = assert!(size_of::<PublishedKey>() == 20);

/// A published port. Map `PUBLISHED`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PublishedPort {
    /// The link of the instance's interface, by which `INTERFACES` knows it; 0 while it has none.
    pub link: u32,
    /// Where its denied packets are counted in `DENIED`; however many addresses a port has, it has one number.
    pub number: u32,
    /// The instance's port, which its rules are about.
    pub port: u16,
    /// [`REJECT`].
    pub flags: u16,
}
const _: () = assert!(size_of::<PublishedPort>() == 12);

/// Flag of [`PublishedPort`]: denied TCP clients are reset; otherwise their packets vanish (SG-7.1).
pub const REJECT: u16 = 1;

/// Settings of one agent. Map `CONFIG`, one entry.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Added to the kernel's clock, in nanoseconds; 0 but in tests, which inject time by it.
    pub clock_advance: u64,
    /// Idle timeouts in nanoseconds, by [`crate::conntrack::State`] (SG-3.5).
    pub timeouts: [u64; 12],
    /// [`CUT_ON_REVOKE`], [`RELATED_ERRORS`].
    pub flags: u32,
    /// Counts changes of memberships and own addresses, after which tracked flows are looked at again.
    pub world: u32,
    /// The `SO_MARK` of the agent's proxy; 0 for none. Marks do not cross network namespaces, so no instance can
    /// forge it (kernel: `skb_scrub_packet`).
    pub proxy_mark: u32,
    /// [`LAYOUT`].
    pub layout: u32,
    /// Tracked flows that one interface may have, as an instance of ENA's has (SG-3.6).
    pub allowance: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Config>() == 128);

/// Flag of [`Config`]: a revoke ends tracked flows too (SG-3.4, `--on-revoke=cut`).
pub const CUT_ON_REVOKE: u32 = 1;
/// Flag of [`Config`]: ICMP errors about tracked flows pass without a rule (SG-3.7, `--icmp-errors=related`).
pub const RELATED_ERRORS: u32 = 2;

/// Where the running kernel keeps what `__sk_buff` doesn't tell of a socket buffer: within [`SKB_WINDOW`] bytes of its
/// `struct sk_buff`, which are read in one go. Global `SKB` of the programs, set when they are loaded.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SkbLayout {
    /// Where those bytes begin, from the start of the structure. The others count from here.
    pub window: u16,
    /// The byte with the two bits of the checksum's state.
    pub ip_summed: u16,
    /// How far up in that byte they are.
    pub ip_summed_shift: u16,
    /// Where the checksum begins: 16 bits, from the buffer's head. Behind them are 16 bits that say where it is to be
    /// written, from where it begins.
    pub csum_start: u16,
    /// Where the frame begins: 16 bits, from the buffer's head.
    pub mac_header: u16,
}

/// See [`SkbLayout`]; a power of two. The fields are 58 bytes apart in Linux 6.18.
pub const SKB_WINDOW: usize = 64;

#[cfg(feature = "user")]
mod user {
    use super::*;

    macro_rules! pod {
        ($($type:ty),+ $(,)?) => {
            // SAFETY: `repr(C)` integers and arrays without padding, so every bit pattern is a value and may be copied.
            $(unsafe impl aya::Pod for $type {})+
        };
    }
    pod!(
        Interface,
        Binding,
        Policy,
        ReferenceKey,
        MemberKey,
        Member,
        OwnKey,
        ExemptKey,
        PublishedKey,
        PublishedPort,
        FlowKey,
        Flow,
        FragmentKey,
        FragmentSlot,
        Fragment,
        Config,
        ReasonKey,
        Count,
        SkbLayout,
        Address,
    );
}
