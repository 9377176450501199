//! Which of the ranges that a space is cut into has a key: the search trees of a compiled policy.
//!
//! A tree's ranges follow on each other from the space's first key to its last. Level 0 has the last key of each, its
//! *end*, in order, by nodes of one size. Each level above has the last end of every node of the level below, until one
//! node holds them all. The levels lie one after another, the root first: an end's place within its level is the
//! number of the node below it, so there are no pointers. What is left of a level's last node is filled with the
//! space's last key, which no key exceeds. After level 0 come the ranges' classes, 16 bits each.
//!
//! A search reads one node a level, and a node is a cache line or two. Which of its ends will be met can't be predicted,
//! so nothing branches on it: the ends below the key are counted.

use core::ops::{Add, Sub};

use crate::abi::{LINE_WORDS, Line, Tree};

/// Classes in a line.
pub const LINE_CLASSES: u32 = 32;

/// What a tree is searched for: a number of one size, and the nodes for such.
pub trait Key: Copy + Ord + From<u8> + Add<Output = Self> + Sub<Output = Self> {
    /// The last key of the space; the first is 0.
    const LAST: Self;
    /// How many ends a node has, as a power of two.
    const NODE_BITS: u32;
    /// How many lines a node has.
    const NODE_LINES: u32;
    /// Levels at most: enough for more ranges than all lines can hold.
    const LEVELS: u32;

    /// How many ends of the node that begins at this line are less than the key.
    fn ends_below<'a>(self, node: u32, line: &impl Fn(u32) -> Option<&'a Line>) -> Option<u32>;

    /// Writes a node's ends, all of them.
    fn write(node: &mut [Line], end: impl Fn(usize) -> Self);
}

/// IPv4 addresses, and protocols with ports: 16 ends in a line, by two a word, the first one in the lower half.
impl Key for u32 {
    const LAST: Self = Self::MAX;
    const NODE_BITS: u32 = 4;
    const NODE_LINES: u32 = 1;
    const LEVELS: u32 = 6;

    #[inline(always)]
    fn ends_below<'a>(self, node: u32, line: &impl Fn(u32) -> Option<&'a Line>) -> Option<u32> {
        // The compiler would make a branch of a comparison that it recognises, so it isn't to know that this is one.
        let key = plus(self as u64, 0);
        let is_below = |end: u64| end.wrapping_sub(key) >> 63;
        let mut below = 0;
        for pair in line(node)? {
            below = plus(below, is_below(pair & 0xffff_ffff) + is_below(pair >> 32));
        }
        Some(below as u32)
    }

    fn write(node: &mut [Line], end: impl Fn(usize) -> Self) {
        for (pair, word) in node[0].iter_mut().enumerate() {
            *word = end(2 * pair) as u64 | (end(2 * pair + 1) as u64) << 32;
        }
    }
}

/// IPv6 addresses: 8 ends in two lines, the upper halves in the first, which seldom leave the second anything to decide.
impl Key for u128 {
    const LAST: Self = Self::MAX;
    const NODE_BITS: u32 = 3;
    const NODE_LINES: u32 = 2;
    const LEVELS: u32 = 8;

    #[inline(always)]
    fn ends_below<'a>(self, node: u32, line: &impl Fn(u32) -> Option<&'a Line>) -> Option<u32> {
        let (upper, lower) = ((self >> 64) as u64, self as u64);
        let uppers = line(node)?;
        let mut below = 0;
        for &end in uppers {
            below = plus(below, borrow(end, upper, 0));
        }
        if uppers[below as usize % LINE_WORDS] == upper {
            let lowers = line(node + 1)?;
            below = 0;
            for end in 0..LINE_WORDS {
                below = plus(below, borrow(uppers[end], upper, borrow(lowers[end], lower, 0)));
            }
        }
        Some(below as u32)
    }

    fn write(node: &mut [Line], end: impl Fn(usize) -> Self) {
        let [uppers, lowers] = node else { return };
        for (place, (upper, lower)) in uppers.iter_mut().zip(lowers).enumerate() {
            let end = end(place);
            (*upper, *lower) = ((end >> 64) as u64, end as u64);
        }
    }
}

/// `a + b`, which the compiler for BPF can neither look into nor put off.
// VERIFIER: "combined stack size of 2 calls is 560. Too large" (6.18) where the compiler loads all of a node's ends before
// it looks at the first. `docs/kernels.md` says how much stack there is.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn plus(mut a: u64, b: u64) -> u64 {
    // SAFETY: the instruction touches these registers only.
    unsafe { core::arch::asm!("{a} += {b}", a = inout(reg) a, b = in(reg) b, options(nostack)) };
    a
}

#[cfg(not(target_arch = "bpf"))]
const fn plus(a: u64, b: u64) -> u64 {
    a + b
}

/// 1 where `a - b - borrowed` is less than 0.
#[inline(always)]
const fn borrow(a: u64, b: u64, borrowed: u64) -> u64 {
    ((!a & b) | (!(a ^ b) & a.wrapping_sub(b).wrapping_sub(borrowed))) >> 63
}

/// The class of the range that `key` is in. `None` only where a line isn't there.
#[inline(always)]
pub fn class<'a, K: Key>(tree: &Tree, key: K, line: impl Fn(u32) -> Option<&'a Line>) -> Option<u32> {
    let (mut start, mut place) = (tree.start, 0);
    for level in (0..K::LEVELS).rev() {
        // The number of this level's last end.
        let last = tree.last >> (level * K::NODE_BITS);
        if last > 0 || level == 0 {
            place = (place << K::NODE_BITS) + key.ends_below(start + place * K::NODE_LINES, &line)?;
            start += nodes(last, K::NODE_BITS) * K::NODE_LINES;
        }
    }
    let word = line(start + place / LINE_CLASSES)?[(place / 4) as usize % LINE_WORDS];
    Some((word >> (place % 4 * 16)) as u32 & 0xffff)
}

/// How many nodes a level has whose last end has this number.
#[inline(always)]
const fn nodes(last: u32, node_bits: u32) -> u32 {
    (last >> node_bits) + 1
}

/// How many lines a tree of so many ranges takes up.
pub const fn lines_of<K: Key>(ranges: usize) -> usize {
    let mut last = ranges as u32 - 1;
    let mut lines = last / LINE_CLASSES + 1;
    loop {
        lines += nodes(last, K::NODE_BITS) * K::NODE_LINES;
        last >>= K::NODE_BITS;
        if last == 0 {
            return lines as usize;
        }
    }
}

/// Lays a tree out in as many lines as [`lines_of`] says, all zero. Ranges are told by end and class, of 16 bits; the last
/// one ends the space.
pub fn lay_out<K: Key>(ranges: &[(K, u32)], lines: &mut [Line]) {
    let last = ranges.len() - 1;
    let mut free = lines;
    for level in (0..K::LEVELS).rev().map(|level| level * K::NODE_BITS) {
        if last >> level == 0 && level > 0 {
            continue;
        }
        let (own, below) = free.split_at_mut((nodes((last >> level) as u32, K::NODE_BITS) * K::NODE_LINES) as usize);
        for (number, node) in own.chunks_mut(K::NODE_LINES as usize).enumerate() {
            // Each stands for as many ranges as are below it, and has the last one's end.
            let end = |place| (((number << K::NODE_BITS) + place + 1) << level) - 1;
            K::write(node, |place| ranges.get(end(place)).map_or(K::LAST, |&(end, _)| end));
        }
        free = below;
    }
    for (range, &(_, class)) in ranges.iter().enumerate() {
        free[range / LINE_CLASSES as usize][range / 4 % LINE_WORDS] |= (class as u64) << (range % 4 * 16);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    /// What stands at each end, before it and behind it, in trees of so many ranges.
    fn every_end_is_found<K: Key + std::fmt::Debug>(end: impl Fn(u32) -> K) {
        for count in [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 4_095, 4_096, 4_097, 70_000] {
            let mut ranges: Vec<(K, u32)> = (0..count).map(|n| (end(n), n * 7 % 65_536)).collect();
            ranges[count as usize - 1].0 = K::LAST;
            let mut lines = vec![[0; LINE_WORDS]; 3 + lines_of::<K>(ranges.len())];
            lay_out(&ranges, &mut lines[3..]);
            let tree = Tree { start: 3, last: count - 1 };
            let find = |key: K| class(&tree, key, |line| lines.get(line as usize));
            assert_eq!(find(K::from(0)), Some(0));
            for (number, &(end, class)) in ranges.iter().enumerate() {
                assert_eq!(find(end), Some(class), "{count} ranges, {end:?}");
                assert_eq!(find(end - K::from(1)), Some(class), "{count} ranges, before {end:?}");
                if let Some(&(_, next)) = ranges.get(number + 1) {
                    assert_eq!(find(end + K::from(1)), Some(next), "{count} ranges, behind {end:?}");
                }
            }
        }
    }

    #[test]
    fn every_end_is_found_among_any_number() {
        every_end_is_found::<u32>(|n| n * 40_503 + 1);
        every_end_is_found::<u128>(|n| u128::from(n * 40_503 + 1));
        every_end_is_found::<u128>(|n| u128::from(n * 40_503 + 1) << 64 | u128::from(u64::MAX));
        every_end_is_found::<u128>(|n| u128::from(n * 40_503 + 1) << 63);
    }

    #[test]
    fn a_line_that_is_not_there_is_no_class() {
        assert_eq!(class(&Tree { start: 5, last: 40 }, 7_u32, |_| None), None);
    }

    #[test]
    fn a_borrow_is_a_comparison() {
        let values = [0, 1, 2, u64::MAX / 2, u64::MAX / 2 + 1, u64::MAX - 1, u64::MAX];
        for a in values {
            for b in values {
                for borrowed in [0, 1] {
                    let is_less = u128::from(a) < u128::from(b) + u128::from(borrowed);
                    assert_eq!(borrow(a, b, borrowed), u64::from(is_less), "{a} {b} {borrowed}");
                }
            }
        }
    }
}
