//! R4: from resolved rules to the tables that the kernel looks up. Pure: no I/O, no maps, no clock.
//!
//! The rules become a matrix. A *row* is a class of peers that the same rules name, a *column* a class of protocols and
//! ports that the same rules name; the cell where they meet says what those rules allow together. Longest-prefix match
//! yields one entry only, so every prefix carries the rules of all prefixes around it. A network ACL compiles into the
//! same tables; there the first entry that both classes share decides.

use std::collections::{BTreeMap, HashMap};

use fixedbitset::FixedBitSet;
use ipnet::IpNet;
use sg_common::abi::{self, Direction};
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use sg_common::policy::Match;

use crate::model::Traffic;
use crate::resolve::{AclSpec, Allowance, Peers, Spec};

/// Both directions of a policy, ready to be written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Compiled {
    /// What may come in.
    pub ingress: Table,
    /// What may go out.
    pub egress: Table,
}

impl Compiled {
    /// The table of one direction.
    pub fn table(&self, direction: Direction) -> &Table {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// The numbers of the groups that its rules refer to.
    pub fn referenced(&self) -> impl Iterator<Item = u32> + '_ {
        self.ingress.references.keys().chain(self.egress.references.keys()).copied()
    }
}

/// One direction of a policy. Row and column 0 stand for "no rule" and are never listed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// Peers' networks and their rows; a network's row includes the rules of the networks around it.
    pub networks: BTreeMap<IpNet, u32>,
    /// Protocols and ports, and their columns.
    pub ports: BTreeMap<PortPrefix, u32>,
    /// Referenced groups, by their numbers, and their rows.
    pub references: BTreeMap<u32, u32>,
    /// Rows, with row 0.
    pub rows: u32,
    /// Columns, with column 0.
    pub columns: u32,
    /// The cells, two bits each, row by row; a row starts with a new word.
    pub matrix: Vec<u64>,
    /// [`abi::REFERENCES`], [`abi::HAS_RULES`] and [`abi::free_replies`].
    pub flags: u32,
}

impl Table {
    /// Words in a row of the matrix.
    pub fn row_words(&self) -> u32 {
        self.columns.div_ceil(32)
    }
}

/// The data of a longest-prefix match on protocol and port: how many of the 32 bits count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortPrefix {
    /// The protocol; see [`sg_common::policy::protocol_key`].
    pub protocol: u16,
    /// The port, or ICMP type << 8 | code.
    pub port: u16,
    /// 0 = every protocol, 16 = every port of one, up to 32 = one port.
    pub bits: u8,
}

/// A policy that no table can hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CompileError {
    /// More classes of peers or ports than a cell's address can name.
    #[error("{rows} classes of peers and {columns} of ports exceed the limit of 65535 each; use fewer distinct rules")]
    TooManyClasses {
        /// Classes of peers.
        rows: usize,
        /// Classes of ports.
        columns: usize,
    },
    /// More cells than the matrices of all policies have together.
    #[error("{words} words of cells are needed, {most} fit; use fewer distinct rules", most = abi::MATRIX_WORDS)]
    TooManyCells {
        /// Words of 32 cells.
        words: usize,
    },
}

/// Compiles a policy.
///
/// # Errors
/// [`CompileError`] where the result wouldn't fit; nothing is ever left out of a policy to make it fit.
pub fn compile(spec: &Spec) -> Result<Compiled, CompileError> {
    match spec {
        Spec::Groups(groups) => {
            Ok(Compiled { ingress: compile_rules(&groups.ingress)?, egress: compile_rules(&groups.egress)? })
        }
        Spec::Acl(acl) => Ok(Compiled { ingress: compile_acl(&acl.ingress)?, egress: compile_acl(&acl.egress)? }),
    }
}

/// Groups: all rules together, only ever allowing (SG-2.1).
fn compile_rules(rules: &[Allowance]) -> Result<Table, CompileError> {
    let says = |rule: usize| if rules[rule].is_any_source() { Match::Any } else { Match::Narrow };
    let mut table = tabulate(rules.iter().map(|rule| (rule.traffic, &rule.peers)), Order::Together, says)?;
    for rule in rules {
        table.flags |= abi::HAS_RULES | free_replies(rule);
    }
    Ok(table)
}

/// Network ACLs: the first entry that matches decides, and what none matches is denied (SG-5.1).
fn compile_acl(entries: &[AclSpec]) -> Result<Table, CompileError> {
    let says = |entry: usize| if entries[entry].allow { Match::Narrow } else { Match::None };
    tabulate(entries.iter().map(|entry| (entry.traffic, &entry.peers)), Order::FirstDecides, says)
}

/// The replies that one rule lets through untracked: those of all ports, from or to everywhere (SG-3.2).
fn free_replies(rule: &Allowance) -> u32 {
    let Some(is_v4) = rule.any_source_family() else { return 0 };
    let all_ports = |protocol| match rule.traffic {
        Traffic::All => true,
        Traffic::Tcp { from: 0, to: u16::MAX } => protocol == TCP,
        Traffic::Udp { from: 0, to: u16::MAX } => protocol == UDP,
        _ => false,
    };
    [TCP, UDP].into_iter().filter(|&protocol| all_ports(protocol)).map(|p| abi::free_replies(is_v4, p)).sum()
}

/// What rules that cover the same packet mean together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As much as the one that says most.
    Together,
    /// What the first of them says.
    FirstDecides,
}

/// Builds rows, columns and cells, where `says` is what each rule says of what it covers.
fn tabulate<'a>(
    rules: impl ExactSizeIterator<Item = (Traffic, &'a Peers)> + Clone,
    order: Order,
    says: impl Fn(usize) -> Match,
) -> Result<Table, CompileError> {
    let count = rules.len();
    let mut rows = Classes::new(count);
    let mut columns = Classes::new(count);
    let mut table = Table {
        networks: networks(rules.clone(), count, &mut rows),
        references: references(rules.clone(), count, &mut rows),
        ports: ports(rules.map(|(traffic, _)| traffic), count, &mut columns),
        ..Table::default()
    };
    if rows.sets.len() > usize::from(u16::MAX) || columns.sets.len() > usize::from(u16::MAX) {
        return Err(CompileError::TooManyClasses { rows: rows.sets.len(), columns: columns.sets.len() });
    }
    table.rows = rows.sets.len() as u32;
    table.columns = columns.sets.len() as u32;
    if !table.references.is_empty() {
        table.flags |= abi::REFERENCES;
    }
    let row_words = table.row_words() as usize;
    let words = row_words * rows.sets.len();
    // Before they are computed, which takes minutes where there are far too many.
    if words > abi::MATRIX_WORDS as usize {
        return Err(CompileError::TooManyCells { words });
    }
    table.matrix = vec![0; words];
    let columns = columns.by_rule(count);
    for (row, peers) in rows.sets.iter().enumerate() {
        let cells = &mut table.matrix[row * row_words..(row + 1) * row_words];
        fill(cells, peers.ones(), &columns, order, &says);
    }
    Ok(table)
}

/// Fills a row's cells. A rule is looked at once for each row that it is in, with all of its columns at a time: there may
/// be tens of millions of cells, of which nearly all are empty.
fn fill(
    cells: &mut [u64],
    rules: impl Iterator<Item = usize>,
    columns: &[FixedBitSet],
    order: Order,
    says: impl Fn(usize) -> Match,
) {
    let width = columns.first().map_or(0, FixedBitSet::len);
    let [mut decided, mut something, mut any] = std::array::from_fn(|_| FixedBitSet::with_capacity(width));
    for rule in rules {
        let mut covered = columns[rule].clone();
        if order == Order::FirstDecides {
            covered.difference_with(&decided);
            decided.union_with(&covered);
        }
        match says(rule) {
            Match::None => {}
            Match::Narrow => something.union_with(&covered),
            Match::Any => any.union_with(&covered),
        }
    }
    something.difference_with(&any);
    for (set, cell) in [(something, Match::Narrow), (any, Match::Any)] {
        for column in set.ones() {
            cells[column / 32] |= (cell as u64) << (column % 32 * 2);
        }
    }
}

/// Distinct sets of rules, numbered. Number 0 is the empty one.
struct Classes {
    sets: Vec<FixedBitSet>,
    numbers: HashMap<FixedBitSet, u32>,
}

impl Classes {
    fn new(rules: usize) -> Self {
        let empty = FixedBitSet::with_capacity(rules);
        Self { sets: vec![empty.clone()], numbers: HashMap::from([(empty, 0)]) }
    }

    fn number(&mut self, set: &FixedBitSet) -> u32 {
        if let Some(&number) = self.numbers.get(set) {
            return number;
        }
        let number = self.sets.len() as u32;
        self.sets.push(set.clone());
        self.numbers.insert(set.clone(), number);
        number
    }

    /// The classes that each of so many rules is in.
    fn by_rule(&self, rules: usize) -> Vec<FixedBitSet> {
        let mut classes = vec![FixedBitSet::with_capacity(self.sets.len()); rules];
        for (class, set) in self.sets.iter().enumerate() {
            set.ones().for_each(|rule| classes[rule].insert(class));
        }
        classes
    }
}

/// Every network that a rule names, with the rules of all networks around it. One that adds nothing to the next
/// broader one is left out.
fn networks<'a>(
    rules: impl Iterator<Item = (Traffic, &'a Peers)>,
    count: usize,
    rows: &mut Classes,
) -> BTreeMap<IpNet, u32> {
    let mut named: BTreeMap<IpNet, FixedBitSet> = BTreeMap::new();
    for (rule, (_, peers)) in rules.enumerate() {
        if let Peers::Networks(networks) = peers {
            for &network in networks.iter() {
                named.entry(network).or_insert_with(|| FixedBitSet::with_capacity(count)).insert(rule);
            }
        }
    }
    // In the order of IpNet (family, address, length) a network comes after all that contain it.
    let mut around: Vec<(IpNet, FixedBitSet)> = Vec::new();
    let mut numbered = BTreeMap::new();
    for (network, mut set) in named {
        while around.last().is_some_and(|(outer, _)| !contains(outer, &network)) {
            around.pop();
        }
        if let Some((_, outer)) = around.last() {
            if set.is_subset(outer) {
                continue;
            }
            set.union_with(outer);
        }
        numbered.insert(network, rows.number(&set));
        around.push((network, set));
    }
    numbered
}

fn contains(outer: &IpNet, inner: &IpNet) -> bool {
    match (outer, inner) {
        (IpNet::V4(outer), IpNet::V4(inner)) => outer.contains(inner),
        (IpNet::V6(outer), IpNet::V6(inner)) => outer.contains(inner),
        _ => false,
    }
}

fn references<'a>(
    rules: impl Iterator<Item = (Traffic, &'a Peers)>,
    count: usize,
    rows: &mut Classes,
) -> BTreeMap<u32, u32> {
    let mut named: BTreeMap<u32, FixedBitSet> = BTreeMap::new();
    for (rule, (_, peers)) in rules.enumerate() {
        if let Peers::Group(group) = peers {
            named.entry(*group).or_insert_with(|| FixedBitSet::with_capacity(count)).insert(rule);
        }
    }
    named.into_iter().map(|(group, set)| (group, rows.number(&set))).collect()
}

/// The protocol that a rule is about, and its ports; `None` is every protocol.
fn port_range(traffic: Traffic) -> Option<(u16, u16, u16)> {
    let icmp = |kind: Option<u8>, code: Option<u8>| match (kind, code) {
        (None, _) => (0, u16::MAX),
        (Some(kind), None) => (u16::from(kind) << 8, u16::from(kind) << 8 | 0xff),
        (Some(kind), Some(code)) => {
            let port = u16::from(kind) << 8 | u16::from(code);
            (port, port)
        }
    };
    let (protocol, (from, to)) = match traffic {
        Traffic::All => return None,
        Traffic::Tcp { from, to } => (TCP, (from, to)),
        Traffic::Udp { from, to } => (UDP, (from, to)),
        Traffic::Icmp { kind, code } => (ICMP, icmp(kind, code)),
        Traffic::Icmpv6 { kind, code } => (ICMPV6, icmp(kind, code)),
        Traffic::Other { number } => (number, (0, u16::MAX)),
    };
    Some((protocol.into(), from, to))
}

/// Every protocol's ports, cut where some rule's range begins or ends. A range is at most 30 prefixes, whatever its
/// length.
fn ports(rules: impl Iterator<Item = Traffic>, count: usize, columns: &mut Classes) -> BTreeMap<PortPrefix, u32> {
    let mut every_protocol = FixedBitSet::with_capacity(count);
    let mut by_protocol: BTreeMap<u16, Vec<(usize, u16, u16)>> = BTreeMap::new();
    for (rule, traffic) in rules.enumerate() {
        match port_range(traffic) {
            None => every_protocol.insert(rule),
            Some((protocol, from, to)) => by_protocol.entry(protocol).or_default().push((rule, from, to)),
        }
    }
    let mut prefixes = BTreeMap::new();
    if !every_protocol.is_clear() {
        prefixes.insert(PortPrefix { protocol: 0, port: 0, bits: 0 }, columns.number(&every_protocol));
    }
    for (protocol, ranges) in by_protocol {
        let mut every_port = every_protocol.clone();
        every_port.extend(ranges.iter().filter(|&&(_, from, to)| (from, to) == (0, u16::MAX)).map(|&(rule, ..)| rule));
        prefixes.insert(PortPrefix { protocol, port: 0, bits: 16 }, columns.number(&every_port));
        for (from, to, set) in intervals(&ranges, &every_port) {
            let column = columns.number(&set);
            for (port, bits) in prefixes_of(from, to) {
                prefixes.insert(PortPrefix { protocol, port, bits: 16 + bits }, column);
            }
        }
    }
    prefixes
}

/// The stretches of ports on which the same rules apply, those left out on which only `every_port` do.
fn intervals(ranges: &[(usize, u16, u16)], every_port: &FixedBitSet) -> Vec<(u16, u16, FixedBitSet)> {
    // Where rules begin and end, in order; between two such places the same ones apply.
    let mut cuts: BTreeMap<u32, Vec<(usize, bool)>> = BTreeMap::new();
    for &(rule, from, to) in ranges.iter().filter(|&&(_, from, to)| (from, to) != (0, u16::MAX)) {
        cuts.entry(from.into()).or_default().push((rule, true));
        cuts.entry(u32::from(to) + 1).or_default().push((rule, false));
    }
    let mut stretches = Vec::new();
    let mut applying = every_port.clone();
    let mut cuts = cuts.into_iter().peekable();
    while let Some((from, changes)) = cuts.next() {
        changes.into_iter().for_each(|(rule, begins)| applying.set(rule, begins));
        if let Some(&(next, _)) = cuts.peek()
            && applying != *every_port
        {
            stretches.push((from as u16, (next - 1) as u16, applying.clone()));
        }
    }
    stretches
}

/// A range as prefixes: (first port, bits that count).
fn prefixes_of(from: u16, to: u16) -> Vec<(u16, u8)> {
    let (mut next, end) = (u32::from(from), u32::from(to) + 1);
    let mut prefixes = Vec::new();
    while next < end {
        // The largest block that starts here: as aligned as `next` is, as long as what is left.
        let aligned = next.trailing_zeros().min(16);
        let fitting = (end - next).ilog2();
        let size = aligned.min(fitting);
        prefixes.push((next as u16, 16 - size as u8));
        next += 1 << size;
    }
    prefixes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_few_prefixes() {
        assert_eq!(prefixes_of(22, 22), [(22, 16)]);
        assert_eq!(prefixes_of(0, u16::MAX), [(0, 0)]);
        assert_eq!(prefixes_of(8000, 8010), [(8000, 13), (8008, 15), (8010, 16)]);
        assert_eq!(prefixes_of(1, 65534).len(), 30);
        assert_eq!(prefixes_of(u16::MAX, u16::MAX), [(u16::MAX, 16)]);
        for (from, to) in [(0, 0), (1, 1023), (1024, 65535), (3, 40000), (32767, 32768)] {
            let mut covered: Vec<u32> = Vec::new();
            for (port, bits) in prefixes_of(from, to) {
                covered.extend(u32::from(port)..u32::from(port) + (1 << (16 - bits)));
            }
            assert_eq!(covered, (u32::from(from)..=u32::from(to)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn stretches_of_ports_have_the_rules_that_apply() {
        let set = |rules: &[usize]| {
            let mut set = FixedBitSet::with_capacity(6);
            rules.iter().for_each(|&rule| set.insert(rule));
            set
        };
        let ranges = [(0, 22, 22), (1, 10, 30), (2, 22, 22), (3, 0, u16::MAX), (4, 23, u16::MAX), (5, 50, 60)];
        let every_port = set(&[3]);
        let expected = [
            (10, 21, set(&[1, 3])),
            (22, 22, set(&[0, 1, 2, 3])),
            (23, 30, set(&[1, 3, 4])),
            (31, 49, set(&[3, 4])),
            (50, 60, set(&[3, 4, 5])),
            (61, u16::MAX, set(&[3, 4])),
        ];
        assert_eq!(intervals(&ranges, &every_port), expected);
        assert!(intervals(&[(3, 0, u16::MAX)], &every_port).is_empty());
    }
}
