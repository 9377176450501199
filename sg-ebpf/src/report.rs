//! P4: what is told of a verdict: counters, and with `--log-drops` a line for each drop. It changes nothing.

use aya_ebpf::bindings::BPF_RB_AVAIL_DATA;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use aya_log_ebpf::macro_support::{AYA_LOGS, Level, level_enabled};
use sg_common::abi::{Count, Direction, ReasonKey};
use sg_common::verdict::{self, Verdict};

use crate::maps::{DENIED, LOST, REASONS, USUAL};

/// The interface's number where it isn't known.
pub const UNKNOWN: u32 = u32::MAX;

/// Counts a packet of `bytes` and its verdict.
#[inline(always)]
pub fn count(eni: u32, direction: Direction, verdict: &Verdict, bytes: u32) {
    if let Some(kind) = verdict::usual(verdict) {
        if let Some(counts) = USUAL.get_ptr_mut(2 * eni + direction as u32) {
            // SAFETY: within the entry, which has one for each kind.
            add(unsafe { counts.cast::<Count>().add(kind) }, bytes);
        }
        return;
    }
    let key = ReasonKey { eni, direction: direction as u8, reason: verdict::number(verdict), pad: 0 };
    match REASONS.get_ptr_mut(key) {
        Some(count) => add(count, bytes),
        // The first of its kind. Where the map is full the packet goes uncounted, not unjudged.
        None => {
            let _ = REASONS.insert(key, Count { packets: 1, bytes: bytes as u64 }, 0);
        }
    }
}

/// Counts a packet that was denied at a published port.
#[inline(always)]
pub fn count_early(number: u32) {
    if let Some(count) = DENIED.get_ptr_mut(number) {
        // SAFETY: see `add`.
        unsafe { *count += 1 };
    }
}

/// Beyond this the log (128 KiB, aya-log's size) has less room left than what some hundred CPUs write at once.
const ALMOST_FULL: u64 = (128 - 16) * 1024;

/// Logs a drop, or counts that there was no room for it. Costs nothing unless the agent loads the programs with this level
/// on: the verifier then removes it.
#[inline(always)]
pub fn trace(ctx: &TcContext, ifindex: u32, direction: Direction, verdict: &Verdict) {
    if let Err(drop) = verdict
        && level_enabled(Level::Debug)
    {
        if AYA_LOGS.query(BPF_RB_AVAIL_DATA as u64) > ALMOST_FULL {
            if let Some(lost) = LOST.get_ptr_mut(0) {
                // SAFETY: see `add`.
                unsafe { *lost += 1 };
            }
            return;
        }
        let direction = match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        debug!(ctx, "link {} {} dropped: reason {}", ifindex, direction, *drop as u8);
    }
}

#[inline(always)]
fn add(count: *mut Count, bytes: u32) {
    // SAFETY: this CPU's own copy of a map entry; TC programs on one CPU don't interrupt each other.
    let count = unsafe { &mut *count };
    count.packets += 1;
    count.bytes += bytes as u64;
}
