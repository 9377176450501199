//! R4: from resolved rules to the tables that the kernel looks up. Pure: no I/O, no maps, no clock.
//!
//! The rules become a matrix. A *row* is a class of peers that the same rules name, a *column* a class of protocols and
//! ports that the same rules name; the cell where they meet says what those rules allow together. Addresses and ports
//! are cut into ranges on which the same rules apply, so that one search finds the class (`spaces`). A network ACL
//! compiles into the same tables; there the first entry that both classes share decides.

mod spaces;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use fixedbitset::FixedBitSet;
use sg_common::abi::{self, Direction, LINE_WORDS, Line, Policy, Tree};
use sg_common::packet::{TCP, UDP};
use sg_common::policy::Match;
use sg_common::ranges::{self, Key};

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

/// One direction of a policy, as the kernel looks it up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// Where its parts are in `lines`.
    pub header: Policy,
    /// Search trees and matrix, as they are written.
    pub lines: Vec<Line>,
    /// Referenced groups, by their numbers, and their rows.
    pub references: BTreeMap<u32, u32>,
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
    /// More than the rules of all policies have room for together.
    #[error("{lines} lines of rules are needed, {most} fit; use fewer distinct rules", most = abi::RULE_LINES)]
    TooManyLines {
        /// Lines of 64 bytes.
        lines: usize,
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
        table.header.flags |= abi::HAS_RULES | free_replies(rule);
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
    let ports = spaces::ports(rules.clone().map(|(traffic, _)| traffic), &mut columns);
    let peers4 = spaces::peers4(rules.clone().map(|(_, peers)| peers), &mut rows);
    let peers6 = spaces::peers6(rules.clone().map(|(_, peers)| peers), &mut rows);
    let references = references(rules, count, &mut rows);
    let mut lines = Vec::new();
    let size = size(&rows, &columns)?;
    let row_words = columns.sets.len().div_ceil(32);
    let header = Policy {
        ports: tree(&ports, &mut lines),
        peers4: tree(&peers4, &mut lines),
        peers6: tree(&peers6, &mut lines),
        cells: lines.len() as u32,
        row_words: row_words as u32,
        size,
        flags: if references.is_empty() { 0 } else { abi::REFERENCES },
    };
    // Before cells are computed, which takes minutes where there are far too many.
    let whole = lines.len() + (row_words * rows.sets.len()).div_ceil(LINE_WORDS);
    if whole > abi::RULE_LINES as usize {
        return Err(CompileError::TooManyLines { lines: whole });
    }
    lines.resize(whole, Line::default());
    let cells = lines[header.cells as usize..].as_flattened_mut();
    let columns = columns.by_rule(count);
    for (cells, peers) in cells.chunks_mut(row_words).zip(&rows.sets) {
        fill(cells, peers.ones(), &columns, order, &says);
    }
    Ok(Table { header, lines, references })
}

/// [`Policy::size`].
fn size(rows: &Classes, columns: &Classes) -> Result<u32, CompileError> {
    let (rows, columns) = (rows.sets.len(), columns.sets.len());
    match (u16::try_from(rows), u16::try_from(columns)) {
        (Ok(rows), Ok(columns)) => Ok(u32::from(rows) << 16 | u32::from(columns)),
        _ => Err(CompileError::TooManyClasses { rows, columns }),
    }
}

/// Lays a tree out behind what is there.
fn tree<K: Key>(ranges: &[(K, u32)], lines: &mut Vec<Line>) -> Tree {
    let start = lines.len();
    lines.resize(start + ranges::lines_of::<K>(ranges.len()), Line::default());
    ranges::lay_out(ranges, &mut lines[start..]);
    Tree { start: start as u32, last: ranges.len() as u32 - 1 }
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

    /// How many rules there are.
    fn rules(&self) -> usize {
        self.sets[0].len()
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
