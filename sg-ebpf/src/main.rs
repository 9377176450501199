//! The programs on an interface's host-side link, and the way of every packet through them; and those of published
//! ports, on the links by which clients come.
//!
//! A packet is read (`packet`), judged (`sg_common::judge`, over the maps of `maps`) and counted (`report`). What the
//! host sends to the link is the instance's ingress, what comes from it its egress. Published ports have a way of their
//! own (`sg_common::early`), and answers (`answer`).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod answer;
mod maps;
mod packet;
mod report;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use sg_common::abi::{Direction, REJECT};
use sg_common::early::{self, Denied};
use sg_common::judge::{Memory, judge};
use sg_common::packet::{TCP, UDP, checksum_offset};
use sg_common::verdict::{Drop, Pass, Verdict};

use crate::maps::Maps;
use crate::packet::{SkbFrame, XdpFrame};

/// TCX egress (or clsact egress) of the host-side link: what goes to the instance.
#[classifier]
pub fn to_instance(ctx: TcContext) -> i32 {
    filter(&ctx, Direction::Ingress)
}

/// TCX ingress (or clsact ingress) of the host-side link: what comes from the instance.
// VERIFIER: "combined stack size of 3 calls is 528. Too large" (6.18) as a function of its own.
#[classifier]
#[inline(always)]
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

/// TCX ingress (or clsact ingress) of a link by which clients of published ports come.
#[classifier]
pub fn published(ctx: TcContext) -> i32 {
    let frame = SkbFrame(&ctx);
    // A VLAN's own link has the packet next; what is for another host this one only overhears.
    if frame.has_vlan() || !frame.is_to_host() {
        return TC_ACT_UNSPEC;
    }
    frame.pull_short();
    let denied = early::judge(&Maps, &frame, |denied| {
        if denied.packet.protocol == UDP && answer::is_served(ctx.skb.skb.cast(), denied.packet) {
            return TC_ACT_UNSPEC;
        }
        report::count_early(denied.port.number);
        if is_reset(denied) { answer::reset_skb(&frame, denied) } else { TC_ACT_SHOT as i32 }
    });
    denied.unwrap_or(TC_ACT_UNSPEC)
}

/// The same in a network card's driver.
#[xdp(frags)]
pub fn published_xdp(ctx: XdpContext) -> u32 {
    let frame = XdpFrame(&ctx);
    let denied = early::judge(&Maps, &frame, |denied| {
        if denied.packet.protocol == UDP && answer::is_served(ctx.ctx.cast(), denied.packet) {
            return XDP_PASS;
        }
        report::count_early(denied.port.number);
        if is_reset(denied) { answer::reset_xdp(&frame, denied) } else { XDP_DROP }
    });
    denied.unwrap_or(XDP_PASS)
}

/// UDP has no reset: `--deny=reject` or not, a denied datagram vanishes.
#[inline(always)]
fn is_reset(denied: &Denied) -> bool {
    denied.port.flags & REJECT != 0 && denied.packet.protocol == TCP
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
