//! Denied clients of published ports: whether one is already served, and the answer that goes out by the link from which
//! the client came. What the answer says is `sg_common::reset`'s.

use core::ffi::c_void;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_TX};
use aya_ebpf::bindings::{BPF_F_CURRENT_NETNS, TC_ACT_SHOT, bpf_sock_tuple};
use aya_ebpf::helpers::{
    bpf_redirect, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_change_tail, bpf_skb_store_bytes, bpf_xdp_adjust_tail,
};
use sg_common::early::Denied;
use sg_common::packet::{ETHERNET, Frame as _, Packet, checksum_offset};
use sg_common::reset::{self, Checksum, LENGTH4, LENGTH6};

use crate::maps;
use crate::packet::{SkbFrame, XdpFrame};

/// Whether the proxy has a flow with the sender of a datagram: then it has a socket that is connected to it, which
/// decides (SG-3.4).
// VERIFIER: the stack of 512 bytes doesn't hold all of it at once.
#[inline(never)]
pub fn is_served(context: *mut c_void, packet: &Packet) -> bool {
    // SAFETY: all of its fields are integers.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let ports = (packet.source_port.to_be(), packet.destination_port.to_be());
    let length = if packet.is_v4() {
        tuple.__bindgen_anon_1.ipv4.saddr = packet.source.0[3];
        tuple.__bindgen_anon_1.ipv4.daddr = packet.destination.0[3];
        tuple.__bindgen_anon_1.ipv4.sport = ports.0;
        tuple.__bindgen_anon_1.ipv4.dport = ports.1;
        12
    } else {
        tuple.__bindgen_anon_1.ipv6.saddr = packet.source.0;
        tuple.__bindgen_anon_1.ipv6.daddr = packet.destination.0;
        tuple.__bindgen_anon_1.ipv6.sport = ports.0;
        tuple.__bindgen_anon_1.ipv6.dport = ports.1;
        36
    };
    // SAFETY: the context is the kernel's and the tuple is as long as is said; the socket is released on every way.
    unsafe {
        let socket = bpf_sk_lookup_udp(context, &mut tuple, length, BPF_F_CURRENT_NETNS as i64 as u64, 0);
        if socket.is_null() {
            return false;
        }
        let is_connected = (*socket).dst_port != 0;
        bpf_sk_release(socket.cast());
        is_connected
    }
}

/// Makes the frame the reset that answers it, and sends it back.
// VERIFIER: the stack of 512 bytes doesn't hold all of it at once.
#[inline(never)]
pub fn reset_skb(frame: &SkbFrame, denied: &Denied) -> i32 {
    let packet = denied.packet;
    let checksum = match frame.pending_checksum() {
        Ok(None) => Checksum::Here,
        // It will be filled in where the SYN's was.
        Ok(Some(place)) if place == transport(packet.is_v4()) + checksum_offset(packet) => Checksum::Later,
        _ => return TC_ACT_SHOT as i32,
    };
    let Some(bytes) = maps::answer() else { return TC_ACT_SHOT as i32 };
    reset::write(&denied.ethernet, packet, checksum, bytes);
    let replaced = if packet.is_v4() { replace_skb(frame, bytes, LENGTH4) } else { replace_skb(frame, bytes, LENGTH6) };
    // SAFETY: the helper takes integers.
    if replaced { unsafe { bpf_redirect(frame.ifindex(), 0) as i32 } } else { TC_ACT_SHOT as i32 }
}

/// Where the transport header is behind an IP header without options.
#[inline(always)]
const fn transport(is_v4: bool) -> u32 {
    if is_v4 { ETHERNET + 20 } else { ETHERNET + 40 }
}

#[inline(always)]
fn replace_skb(frame: &SkbFrame, bytes: &[u8; LENGTH6], length: usize) -> bool {
    let skb = frame.0.skb.skb;
    // SAFETY: the context is the kernel's; the helper reads `length` of the bytes. Nothing reads the old frame after
    // this.
    unsafe {
        bpf_skb_change_tail(skb, length as u32, 0) == 0
            && bpf_skb_store_bytes(skb.cast(), 0, bytes.as_ptr().cast(), length as u32, 0) == 0
    }
}

/// The same in a driver, which sends it out of the card that it came by.
// VERIFIER: as above.
#[inline(never)]
pub fn reset_xdp(frame: &XdpFrame, denied: &Denied) -> u32 {
    let Some(bytes) = maps::answer() else { return XDP_DROP };
    reset::write(&denied.ethernet, denied.packet, Checksum::Here, bytes);
    let replaced =
        if denied.packet.is_v4() { replace_xdp::<LENGTH4>(frame, bytes) } else { replace_xdp::<LENGTH6>(frame, bytes) };
    if replaced { XDP_TX } else { XDP_DROP }
}

#[inline(always)]
fn replace_xdp<const N: usize>(frame: &XdpFrame, bytes: &[u8; LENGTH6]) -> bool {
    let surplus = frame.len() as i32 - N as i32;
    // SAFETY: the context is the kernel's. Nothing reads the old frame after this.
    if unsafe { bpf_xdp_adjust_tail(frame.0.ctx, -surplus) } != 0 {
        return false;
    }
    let start = frame.0.data();
    if start + N > frame.0.data_end() {
        return false;
    }
    // SAFETY: the N bytes from `start` lie before `data_end`, as was just checked, and N is `LENGTH6` at most.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), start as *mut u8, N) };
    true
}
