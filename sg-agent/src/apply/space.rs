//! Who has which number, and which stretch of lines. Plain bookkeeping, without the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Numbers of a range, the lowest free one first.
#[derive(Clone, Debug)]
pub struct Numbers {
    next: u32,
    end: u32,
    free: BTreeSet<u32>,
}

impl Numbers {
    /// The numbers of `range`, all free.
    pub fn new(range: Range<u32>) -> Self {
        Self { next: range.start, end: range.end, free: BTreeSet::new() }
    }

    /// A free number, if there is one.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(number) = self.free.pop_first() {
            return Some(number);
        }
        let number = self.next;
        (number < self.end).then(|| {
            self.next += 1;
            number
        })
    }

    /// Takes one certain number; whether it was free.
    pub fn take_this(&mut self, number: u32) -> bool {
        if number >= self.end {
            return false;
        }
        while self.next <= number {
            self.free.insert(self.next);
            self.next += 1;
        }
        self.free.remove(&number)
    }

    /// Gives a number back.
    pub fn give(&mut self, number: u32) {
        self.free.insert(number);
    }
}

/// Stretches of lines; the first one that fits is taken.
#[derive(Clone, Debug)]
pub struct Lines {
    /// Free stretches: start and length. Neighbours are always joined.
    free: BTreeMap<u32, u32>,
}

impl Lines {
    /// `lines` lines, all free.
    pub fn new(lines: u32) -> Self {
        Self { free: BTreeMap::from([(0, lines)]) }
    }

    /// The most free lines in a row.
    pub fn longest(&self) -> u32 {
        self.free.values().copied().max().unwrap_or(0)
    }

    /// The start of `length` free lines, if there are as many in a row: of the shortest such row, so that long ones stay
    /// long. None are asked for at no cost.
    pub fn take(&mut self, length: u32) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        let fitting = self.free.iter().filter(|&(_, &available)| available >= length);
        let (&start, &available) = fitting.min_by_key(|&(_, &available)| available)?;
        self.free.remove(&start);
        if available > length {
            self.free.insert(start + length, available - length);
        }
        Some(start)
    }

    /// Gives a stretch back.
    pub fn give(&mut self, mut start: u32, mut length: u32) {
        if length == 0 {
            return;
        }
        if let Some((&before, &its)) = self.free.range(..start).next_back()
            && before + its == start
        {
            self.free.remove(&before);
            (start, length) = (before, its + length);
        }
        if let Some(after) = self.free.remove(&(start + length)) {
            length += after;
        }
        self.free.insert(start, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        let mut numbers = Numbers::new(1..4);
        assert_eq!([numbers.take(), numbers.take(), numbers.take(), numbers.take()], [Some(1), Some(2), Some(3), None]);
        numbers.give(2);
        assert_eq!([numbers.take(), numbers.take()], [Some(2), None]);
    }

    #[test]
    fn a_certain_number_leaves_the_others_free() {
        let mut numbers = Numbers::new(0..4);
        assert!(numbers.take_this(2));
        assert!(!numbers.take_this(2));
        assert!(!numbers.take_this(4));
        assert_eq!([numbers.take(), numbers.take(), numbers.take(), numbers.take()], [Some(0), Some(1), Some(3), None]);
    }

    #[test]
    fn lines_are_joined_again() {
        let mut lines = Lines::new(10);
        let parts = [lines.take(3), lines.take(3), lines.take(4)];
        assert_eq!(parts, [Some(0), Some(3), Some(6)]);
        assert_eq!(lines.take(1), None);
        lines.give(0, 3);
        lines.give(6, 4);
        assert_eq!((lines.take(5), lines.longest()), (None, 4), "seven lines are free, but not five in a row");
        lines.give(3, 3);
        assert_eq!(lines.take(10), Some(0));
    }

    #[test]
    fn the_shortest_row_that_does_is_taken() {
        let mut lines = Lines::new(10);
        assert_eq!([lines.take(6), lines.take(1), lines.take(2)], [Some(0), Some(6), Some(7)]);
        lines.give(0, 6);
        lines.give(7, 2);
        assert_eq!(lines.take(2), Some(7), "the last three lines are free, too");
    }
}
