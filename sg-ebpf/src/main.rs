//! The programs on an interface's host-side link, and the way of every packet through them.
//!
//! A packet is read (`packet`), judged (`sg_common::judge`, over the maps of `maps`) and counted (`report`). What the
//! host sends to the link is the instance's ingress, what comes from it its egress.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod maps;
mod packet;
mod report;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use sg_common::abi::Direction;
use sg_common::judge::{Memory, judge};
use sg_common::packet::checksum_offset;
use sg_common::verdict::{Drop, Pass, Verdict};

use crate::maps::Maps;
use crate::packet::SkbFrame;

/// TCX egress (or clsact egress) of the host-side link: what goes to the instance.
#[classifier]
pub fn to_instance(ctx: TcContext) -> i32 {
    filter(&ctx, Direction::Ingress)
}

/// TCX ingress (or clsact ingress) of the host-side link: what comes from the instance.
#[classifier]
pub fn from_instance(ctx: TcContext) -> i32 {
    filter(&ctx, Direction::Egress)
}

/// Takes expired flows out of the table. The agent runs it (BPF_PROG_TEST_RUN); it is attached nowhere.
#[classifier]
pub fn sweep(_ctx: TcContext) -> i32 {
    maps::sweep(Maps.now()) as i32
}

/// Drops everything. It stands in for a moment where programs have to change places.
#[classifier]
pub fn closed(_ctx: TcContext) -> i32 {
    TC_ACT_SHOT as i32
}

#[inline(always)]
fn filter(ctx: &TcContext, direction: Direction) -> i32 {
    let frame = SkbFrame(ctx);
    let (eni, verdict) = match maps::interface(frame.ifindex()) {
        None => (report::UNKNOWN, Err(Drop::UnknownInterface)),
        // A tag that offloading moved out of the frame's bytes.
        Some(interface) if frame.has_vlan() => (interface.eni, Err(Drop::Vlan)),
        Some(interface) => {
            frame.pull();
            let verdict = judge(&Maps, interface, direction, &frame, frame.mark());
            let is_settled = verdict.is_err() || direction == Direction::Ingress || is_settled(&frame, verdict);
            (interface.eni, if is_settled { verdict } else { Err(Drop::Malformed) })
        }
    };
    report::count(eni, direction, &verdict, ctx.len());
    report::trace(ctx, frame.ifindex(), direction, &verdict);
    action(verdict)
}

/// Whether what was judged stays as it is. A raw socket (PACKET_VNET_HDR) and a VM's driver say themselves where the
/// checksum is to be filled in: later, by the host's stack or its network card, and over a port or an address if the
/// instance says so.
#[inline(always)]
fn is_settled(frame: &SkbFrame, verdict: Verdict) -> bool {
    match (frame.pending_checksum(), verdict, maps::judged()) {
        (Ok(None), ..) => true,
        // ARP and neighbour discovery are judged to the last byte, and nobody offloads their checksums.
        (Err(_), ..) | (_, Ok(Pass::Neighbor), _) | (.., None) => false,
        (Ok(Some(place)), _, Some(packet)) => place >= packet.transport + checksum_offset(packet),
    }
}

/// The one place where a verdict becomes a number of the kernel's. Passing is "next" (the same number for TCX and
/// clsact): other programs on the link, and the stack behind them, still have their say.
#[inline(always)]
fn action(verdict: Verdict) -> i32 {
    match verdict {
        Ok(_) => TC_ACT_UNSPEC,
        Err(_) => TC_ACT_SHOT as i32,
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The helpers that the programs call are open to GPL-compatible ones only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
