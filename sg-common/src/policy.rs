//! Do the rules allow it? The look-ups in a compiled policy, the same for the kernel, the proxy and `explain`.
//!
//! A policy is a matrix: rows are classes of peers, columns classes of (protocol, port), and a cell says what the
//! rules that cover both allow. Two searches among ranges find row and column, however many rules there are.
//! Network ACLs are policies too; their order was settled when they were compiled.

use crate::abi::{self, Binding, Config, Direction, Interface, LINE_WORDS, Line, Member, Policy};
use crate::addr::Address;
use crate::packet::{ICMP, ICMPV6};
use crate::ranges;
use crate::verdict::{Drop, Pass, Verdict};

/// The maps that the agent writes and decisions read. The kernel's are BPF maps, userspace's are in memory.
///
/// Rows, columns and the like that aren't there read as 0, which allows nothing.
pub trait Tables {
    /// The agent's settings; `None` only where the maps are not the agent's.
    fn config(&self) -> Option<&Config>;
    /// `BINDINGS`.
    fn binding(&self, index: u32) -> Binding;
    /// `POLICIES`.
    fn policy(&self, table: u32) -> Option<Policy>;
    /// `RULES`: a line that the table's policy leads to.
    fn line(&self, table: u32, line: u32) -> Option<&Line>;
    /// `REFERENCES`: the row of a referenced group.
    fn reference(&self, table: u32, group: u32) -> u32;
    /// The entry of `MEMBERS` with this key.
    fn membership(&self, vpc: u32, address: &Address) -> Option<&Member>;
    /// Whether `SECONDARIES` has this key.
    fn has_own(&self, eni: u32, address: &Address) -> bool;
    /// `EXEMPT`.
    fn is_exempt(&self, vpc: u32, address: &Address, protocol: u8, port: u16) -> bool;

    /// The row of a peer's address.
    #[inline(always)]
    fn row(&self, table: u32, policy: &Policy, peer: &Address) -> u32 {
        let line = |line| self.line(table, line);
        let row = if peer.is_v4() {
            ranges::class(&policy.peers4, u32::from_be_bytes(peer.low()), line)
        } else {
            ranges::class(&policy.peers6, peer.number(), line)
        };
        row.unwrap_or(0)
    }

    /// The column of a [`port_key`].
    #[inline(always)]
    fn column(&self, table: u32, policy: &Policy, key: u32) -> u32 {
        ranges::class(&policy.ports, key, |line| self.line(table, line)).unwrap_or(0)
    }

    /// 32 cells of two bits, the `word`th of the policy's.
    #[inline(always)]
    fn cells(&self, table: u32, policy: &Policy, word: u32) -> u64 {
        let line = self.line(table, policy.cells + word / LINE_WORDS as u32);
        line.map_or(0, |line| line[word as usize % LINE_WORDS])
    }

    /// The groups that an address is in, by itself or by its delegated prefix (SG-1.9).
    #[inline(always)]
    fn member(&self, vpc: u32, peer: &Address) -> Option<&Member> {
        let by_itself = self.membership(vpc, peer);
        if by_itself.is_some() || peer.is_v4() {
            return by_itself;
        }
        self.membership(vpc | abi::DELEGATED, &peer.delegated())
    }

    /// [`is_secondary`], as a function call in the kernel.
    #[inline(always)]
    fn is_secondary(&self, eni: u32, address: &Address) -> bool
    where
        Self: Sized,
    {
        is_secondary(self, eni, address)
    }

    /// What a table says, by [`find`]: the kernel's way there is a function call, so that it is verified once.
    #[inline(always)]
    fn matches(&self, table: u32, vpc: u32, query: &Query) -> Match
    where
        Self: Sized,
    {
        match self.policy(table) {
            Some(policy) => find(self, table, &policy, vpc, query),
            None => Match::None,
        }
    }
}

/// What a policy says about one packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Match {
    /// No rule covers it.
    None = 0,
    /// A rule allows it, and none of those that do has any source (SG-3.2).
    Narrow = 1,
    /// A rule with `0.0.0.0/0` or `::/0` allows it.
    Any = 2,
}

/// What is looked up: the other end, and where the packet goes.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// The address on the other side of the interface.
    pub peer: &'a Address,
    /// The upper-layer protocol.
    pub protocol: u8,
    /// The destination port, or an ICMP message's type << 8 | code; 0 for other protocols.
    pub port: u16,
}

/// Protocol and port as columns are searched by: one number, in which a protocol's ports follow on each other. ICMP
/// within IPv6 and ICMPv6 within IPv4 have keys that only a rule for every protocol covers (SG-1.5).
#[inline(always)]
pub const fn port_key(is_v4: bool, protocol: u8, port: u16) -> u32 {
    let is_stray = matches!((is_v4, protocol), (false, ICMP) | (true, ICMPV6));
    (is_stray as u32) << 24 | (protocol as u32) << 16 | port as u32
}

/// Looks `query` up in one direction of a policy.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, table: u32, policy: &Policy, vpc: u32, query: &Query) -> Match {
    let column = tables.column(table, policy, port_key(query.peer.is_v4(), query.protocol, query.port));
    if column == 0 {
        return Match::None;
    }
    let by_address = cell(tables, table, policy, tables.row(table, policy, query.peer), column);
    if by_address != Match::None || policy.flags & abi::REFERENCES == 0 {
        return by_address;
    }
    // Who may race: a membership that is written while it is read. The kernel gives an entry's place to the next one that is
    // written, at once, so worst of all this would be another's groups: what neither state allows. So they count if the
    // entry is this peer's still; else they are read again. A change writes an entry twice at most.
    let mut read: Option<(&Member, Match)> = None;
    for _ in 0..4 {
        let Some(member) = tables.member(vpc, query.peer) else { break };
        match read {
            Some((before, matched)) if core::ptr::eq(before, member) => return matched,
            _ => read = Some((member, by_groups(tables, table, policy, member, column))),
        }
    }
    Match::None
}

/// What the rules that refer to one of the peer's groups allow in this column.
#[inline(always)]
fn by_groups<T: Tables>(tables: &T, table: u32, policy: &Policy, member: &Member, column: u32) -> Match {
    for (index, &group) in member.groups.iter().enumerate() {
        if index as u32 >= member.count {
            break;
        }
        if cell(tables, table, policy, tables.reference(table, group), column) != Match::None {
            return Match::Narrow;
        }
    }
    Match::None
}

/// Whether an address is an interface's own beyond the primary ones, by itself or by its delegated prefix.
#[inline(always)]
pub fn is_secondary<T: Tables>(tables: &T, eni: u32, address: &Address) -> bool {
    tables.has_own(eni, address) || (!address.is_v4() && tables.has_own(eni | abi::DELEGATED, &address.delegated()))
}

/// One cell of a policy's matrix. Row and column 0 are those of no rule.
#[inline(always)]
fn cell<T: Tables>(tables: &T, table: u32, policy: &Policy, row: u32, column: u32) -> Match {
    if row == 0 || row >= policy.size >> 16 || column >= policy.size & 0xffff {
        return Match::None;
    }
    let word = tables.cells(table, policy, row * policy.row_words + (column >> 5));
    match word >> ((column & 31) * 2) & 3 {
        1 => Match::Narrow,
        2 => Match::Any,
        _ => Match::None,
    }
}

/// Whether the subnet's network ACL lets a packet through (SG-5.1). Within the subnet it has no say (SG-5.2).
#[inline(always)]
pub fn acl_allows<T: Tables>(
    tables: &T,
    interface: &Interface,
    acl: Binding,
    direction: Direction,
    query: &Query,
) -> bool {
    if query.peer.within(&interface.subnet4, &interface.mask4)
        || query.peer.within(&interface.subnet6, &interface.mask6)
    {
        return true;
    }
    if interface.subnet != 0
        && tables.member(interface.vpc, query.peer).is_some_and(|member| member.subnet == interface.subnet)
    {
        return true;
    }
    tables.matches(abi::table(acl.policy, direction), interface.vpc, query) != Match::None
}

/// What becomes of the first packet of a flow at an interface that nothing else is known of: how the groups' rules match
/// it, and the verdict of rules and network ACL together. For who has no packet, or not yet one of the instance's.
///
/// On the way in the ACL comes first, on the way out last (SG-5.2); the reason is that of the first to deny.
#[inline(always)]
pub fn begins<T: Tables>(tables: &T, interface: &Interface, direction: Direction, query: &Query) -> (Match, Verdict) {
    let (matched, by_rules) = begins_by_rules(tables, interface, tables.binding(interface.groups), direction, query);
    let by_acl =
        || interface.acl == 0 || acl_allows(tables, interface, tables.binding(interface.acl), direction, query);
    let verdict = match direction {
        Direction::Ingress if !by_acl() => Err(Drop::Acl),
        Direction::Ingress => by_rules,
        Direction::Egress => by_rules.and_then(|pass| if by_acl() { Ok(pass) } else { Err(Drop::Acl) }),
    };
    (matched, verdict)
}

/// The groups' rules: allowed or not, and if allowed, tracked or not (SG-2.1, SG-3.2).
#[inline(always)]
pub fn begins_by_rules<T: Tables>(
    tables: &T,
    interface: &Interface,
    groups: Binding,
    direction: Direction,
    query: &Query,
) -> (Match, Verdict) {
    let here = abi::table(groups.policy, direction);
    let Some(back) = tables.policy(abi::table(groups.policy, direction.reverse())) else {
        // Policy 0 is that of those who have none; the kernel's is there, and empty.
        return (Match::None, Err(if groups.policy == 0 { Drop::NoRule } else { Drop::Inconsistent }));
    };
    let matched = tables.matches(here, interface.vpc, query);
    let free = abi::free_replies(query.peer.is_v4(), query.protocol);
    let verdict = match matched {
        Match::None => Err(Drop::NoRule),
        Match::Any if back.flags & free != 0 => Ok(Pass::Untracked),
        Match::Any | Match::Narrow => Ok(Pass::New),
    };
    (matched, verdict)
}
