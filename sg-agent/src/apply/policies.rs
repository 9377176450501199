//! Compiled policies in the maps: written as a whole before anything refers to them, unwritten as a whole after.

use std::sync::Arc;

use aya::maps::MapError;
use sg_common::abi::{self, Direction, LINE_WORDS, Policy, ReferenceKey};

use super::ApplyError;
use super::space::{Lines, Numbers};
use crate::compile::{Compiled, Table};
use crate::datapath::{DatapathError, Maps, absent_is_fine};

/// What policies take up, in entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Compiled policies.
    pub policies: u32,
    /// Group references.
    pub references: u32,
    /// Lines of 64 bytes, for everything else.
    pub lines: u32,
}

impl Usage {
    /// What the maps hold at most.
    pub const CAPACITY: Self =
        Self { policies: abi::MAX_POLICIES - 1, references: abi::MAX_REFERENCES, lines: abi::RULE_LINES };

    /// What one policy takes up.
    pub fn of(compiled: &Compiled) -> Self {
        let tables = [&compiled.ingress, &compiled.egress];
        Self {
            policies: 1,
            references: tables.map(|table| table.references.len() as u32).iter().sum(),
            lines: tables.map(|table| table.lines.len() as u32).iter().sum(),
        }
    }

    fn fields(&self) -> [(&'static str, u32); 3] {
        [("policies", self.policies), ("group references", self.references), ("lines of rules", self.lines)]
    }

    fn combine(&self, other: &Self, with: impl Fn(u32, u32) -> u32) -> Self {
        Self {
            policies: with(self.policies, other.policies),
            references: with(self.references, other.references),
            lines: with(self.lines, other.lines),
        }
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        self.combine(other, u32::saturating_add)
    }

    /// This without the other.
    pub fn minus(&self, other: &Self) -> Self {
        self.combine(other, u32::saturating_sub)
    }

    /// Refuses what the maps can't hold.
    ///
    /// # Errors
    /// The first kind of entries of which there are too many.
    pub fn check(&self) -> Result<(), ApplyError> {
        let over = self.fields().into_iter().zip(Self::CAPACITY.fields()).find(|((_, used), (_, most))| used > most);
        match over {
            Some(((what, needed), (_, capacity))) => Err(ApplyError::Capacity { what, needed, capacity }),
            None => Ok(()),
        }
    }
}

/// A policy that is in the maps.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its number.
    pub number: u32,
    /// What it holds.
    pub compiled: Arc<Compiled>,
    /// Its first line. The ingress table's come first, the egress table's after them.
    start: u32,
}

/// The numbers and lines that policies have.
#[derive(Debug)]
pub struct Store {
    numbers: Numbers,
    lines: Lines,
    usage: Usage,
    /// What the kernel refused to have taken out.
    remains: Vec<Written>,
}

impl Default for Store {
    fn default() -> Self {
        // Number 0 is the policy of those who have none: no table, no rule.
        Self {
            numbers: Numbers::new(1..abi::MAX_POLICIES),
            lines: Lines::new(abi::RULE_LINES),
            usage: Usage::default(),
            remains: Vec::new(),
        }
    }
}

impl Store {
    /// What is in the maps now.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Writes a policy under a new number. Nothing refers to it yet.
    ///
    /// # Errors
    /// [`ApplyError`]; what was written before the error has been unwritten.
    pub fn write(&mut self, maps: &mut Maps, compiled: Arc<Compiled>) -> Result<Written, ApplyError> {
        let needs = Usage::of(&compiled);
        self.usage.plus(&needs).check()?;
        let full = |what, needed, capacity| ApplyError::Capacity { what, needed, capacity };
        let number = self.numbers.take().ok_or(full("policies", 1, 0))?;
        let Some(start) = self.lines.take(needs.lines) else {
            self.numbers.give(number);
            return Err(full("lines of rules in a row", needs.lines, self.lines.longest()));
        };
        self.usage = self.usage.plus(&needs);
        let written = Written { number, compiled, start };
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Err(error) = written.put(maps, direction) {
                self.unwrite(maps, &written);
                return Err(error.into());
            }
        }
        Ok(written)
    }

    /// Takes a policy out of the maps. No program may be reading it any more. Where the kernel refuses, that is tried again
    /// by [`Self::tidy`], and number and lines are nobody's until then.
    pub fn unwrite(&mut self, maps: &mut Maps, written: &Written) {
        if let Err(error) = self.remove(maps, written) {
            tracing::warn!(policy = written.number, %error, "cannot remove an old policy; trying again");
            self.remains.push(written.clone());
        }
    }

    /// Whether there is anything for [`Self::tidy`].
    pub fn is_untidy(&self) -> bool {
        !self.remains.is_empty()
    }

    /// Takes out what couldn't be taken out before.
    pub fn tidy(&mut self, maps: &mut Maps) {
        for written in std::mem::take(&mut self.remains) {
            if self.remove(maps, &written).is_err() {
                self.remains.push(written);
            }
        }
    }

    fn remove(&mut self, maps: &mut Maps, written: &Written) -> Result<(), DatapathError> {
        written.take_out(maps, Direction::Ingress)?;
        written.take_out(maps, Direction::Egress)?;
        let needs = Usage::of(&written.compiled);
        self.lines.give(written.start, needs.lines);
        self.numbers.give(written.number);
        self.usage = self.usage.minus(&needs);
        Ok(())
    }
}

impl Written {
    /// Writes it again, where somebody else changed it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn restore(&self, maps: &mut Maps) -> Result<(), DatapathError> {
        self.put(maps, Direction::Ingress)?;
        self.put(maps, Direction::Egress)
    }

    /// Puts lines right; whether any were wrong.
    pub fn restore_lines(&self, maps: &Maps) -> bool {
        let mut found = false;
        for direction in [Direction::Ingress, Direction::Egress] {
            for (place, word) in self.words(direction) {
                if maps.rules.load(place) != word {
                    maps.rules.store(place, word);
                    found = true;
                }
            }
        }
        found
    }

    /// The header of one direction, which says where its lines are.
    pub fn header(&self, direction: Direction) -> Policy {
        self.compiled.table(direction).header.moved(self.start_of(direction))
    }

    fn start_of(&self, direction: Direction) -> u32 {
        match direction {
            Direction::Ingress => self.start,
            Direction::Egress => self.start + self.compiled.ingress.lines.len() as u32,
        }
    }

    /// The words of its lines, and where in the map they are.
    fn words(&self, direction: Direction) -> impl Iterator<Item = (u32, u64)> {
        let words = self.compiled.table(direction).lines.as_flattened();
        (self.start_of(direction) * LINE_WORDS as u32..).zip(words.iter().copied())
    }

    /// Lines first, then the header that leads to them. Nobody can race: a program comes here by a binding only, which
    /// is stored after all of this (`Applier::bind`), and by then no other program can be reading what these lines held
    /// before (`wait_for_programs`).
    fn put(&self, maps: &mut Maps, direction: Direction) -> Result<(), DatapathError> {
        let table = self.compiled.table(direction);
        let id = abi::table(self.number, direction);
        maps.writes += entries(table);
        let start = self.start_of(direction);
        maps.reach_rules(start..start + table.lines.len() as u32)?;
        for (place, word) in self.words(direction) {
            maps.rules.store(place, word);
        }
        for (&group, row) in &table.references {
            maps.references.insert(ReferenceKey { table: id, group }, row, 0).map_err(write("REFERENCES"))?;
        }
        maps.policies.set(id, self.header(direction), 0).map_err(write("POLICIES"))
    }

    fn take_out(&self, maps: &mut Maps, direction: Direction) -> Result<(), DatapathError> {
        let table = self.compiled.table(direction);
        let id = abi::table(self.number, direction);
        maps.writes += entries(table);
        maps.policies.set(id, Policy::default(), 0).map_err(write("POLICIES"))?;
        for &group in table.references.keys() {
            let key = ReferenceKey { table: id, group };
            absent_is_fine(maps.references.remove(&key)).map_err(write("REFERENCES"))?;
        }
        Ok(())
    }
}

/// How many entries a table has: its header and its references. Its lines are memory.
fn entries(table: &Table) -> u64 {
    (1 + table.references.len()) as u64
}

fn write(map: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |error| DatapathError::Write { map, error }
}

/// The direction that a table's number stands for.
pub fn direction(id: u32) -> Direction {
    if id & 1 == Direction::Ingress as u32 { Direction::Ingress } else { Direction::Egress }
}
