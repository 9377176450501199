//! How much each map holds. Who is refused, and what for, is told where it is written.

use super::{ANOTHER, Line};
use crate::ranges::{Key, lines_of};

/// Interfaces that one agent can hold (the norm's 1,000 instances, with room for second interfaces).
pub const MAX_INTERFACES: u32 = 2_048;
/// Interfaces' entries that each CPU keeps; a power of two. Links that are made one after the other have their own.
pub const RECENT_LINKS: u32 = 1_024;
/// Compiled policies that can exist at once, those being replaced included.
pub const MAX_POLICIES: u32 = 4_096;
/// Distinct group sets (and network ACLs) in use at once.
pub const MAX_BINDINGS: u32 = 4_096;
/// Group references of all policies together.
pub const MAX_REFERENCES: u32 = 131_072;
/// Lines of 64 bytes that all policies share, for their search trees and matrices (56 MiB).
pub const RULE_LINES: u32 = 917_504;
// Room, all at once, for matrices of 32 MiB, 262,144 scattered networks of either family and 524,288 scattered ports; and
// in each direction of each policy for what its three trees and its matrix don't fill.
const _: () = assert!(
    RULE_LINES as usize
        >= (32 << 20) / size_of::<Line>()
            + lines_of::<u32>(2 * 262_144 + 1)
            + lines_of::<u128>(2 * 262_144 + 1)
            + lines_of::<u32>(2 * 524_288 + 1)
            + 2 * MAX_POLICIES as usize * 6
);
// No tree of more ranges than its levels reach fits.
const _: () = assert!(lines_of::<u32>(1 << (u32::LEVELS * u32::NODE_BITS)) > RULE_LINES as usize);
const _: () = assert!(lines_of::<u128>(1 << (u128::LEVELS * u128::NODE_BITS)) > RULE_LINES as usize);
/// Addresses of group members, counted once for each VPC that can refer to them.
pub const MAX_MEMBERS: u32 = 65_536;
/// Own addresses of all interfaces beyond the primary ones.
pub const MAX_SECONDARIES: u32 = 65_536;
/// Exempt services, counted once for each VPC.
pub const MAX_EXEMPT: u32 = 16_384;
/// Tracked flows. At this limit new ones are dropped (SG-3.6).
pub const MAX_FLOWS: u32 = if ANOTHER { 131_072 } else { 262_144 };
/// Tracked flows of one interface, unless the agent is told otherwise ([`super::Config::allowance`]): an eighth of the
/// table, so that one instance that floods leaves seven eighths to the others. More than Linux has ephemeral ports
/// (28,232).
pub const DEFAULT_ALLOWANCE: u32 = MAX_FLOWS / 8;
/// Fragmented packets under way for each interface and direction; an older one with the same slot gives way, and its
/// rest is dropped (SG-3.8). No interface takes another's.
pub const FRAGMENT_SLOTS: u32 = if ANOTHER { 16 } else { 32 };
/// Fragmented packets under way.
pub const MAX_FRAGMENTS: u32 = MAX_INTERFACES * 2 * FRAGMENT_SLOTS;
/// (interface, direction, reason) triples that are counted.
pub const MAX_COUNTERS: u32 = 65_536;
/// Sockets of published ports: one for each address that a port is reached by.
pub const MAX_PUBLISHED: u32 = 16_384;
/// Published ports whose denied packets are counted.
pub const MAX_PUBLISHED_PORTS: u32 = 4_096;
/// Groups that one address can be in: AWS's highest quota (SG-1.14).
pub const GROUPS_PER_MEMBER: usize = 16;
