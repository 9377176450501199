//! P1: the frame as the kernel hands it over. The only place with packet pointers.

use aya_ebpf::bindings::{BPF_CSUM_LEVEL_DEC, BPF_CSUM_LEVEL_INC, BPF_CSUM_LEVEL_QUERY};
use aya_ebpf::helpers::{bpf_csum_level, bpf_skb_change_tail};
use aya_ebpf::programs::{TcContext, XdpContext};
use sg_common::packet::Frame;

/// A frame behind a socket buffer. Headers that are not in its linear part read as missing; see [`SkbFrame::pull`].
pub struct SkbFrame<'a>(pub &'a TcContext);

/// Bytes of headers that are made linear at most: Ethernet, IPv6 and the extension headers of any sane packet, an
/// ICMP error's quote behind them.
const HEADERS: u32 = 256;
/// No header starts further in than this.
const MAX_OFFSET: u64 = 0x3fff;

impl SkbFrame<'_> {
    /// The index of the link that it crosses.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context is the kernel's, and the verifier turns this into a load of that field.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    /// The `SO_MARK` of the socket that sent it, within this network namespace.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).mark }
    }

    /// Whether a VLAN tag was taken out of its bytes.
    #[inline(always)]
    pub fn has_vlan(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }

    /// Whether it is for this host by its MAC address (PACKET_HOST).
    #[inline(always)]
    pub fn is_to_host(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).pkt_type == 0 }
    }

    /// The same as [`Self::pull`] for a packet that is short enough to begin a flow. The others are left as they are:
    /// on `lo` every packet of the host comes by, and all of them that are long have their headers in the linear part.
    #[inline(always)]
    pub fn pull_short(&self) {
        if self.len() <= HEADERS {
            self.pull();
        }
    }

    /// Makes sure that the headers are in the linear part, if they aren't yet: drivers, and senders without copies,
    /// may leave them in pages.
    #[inline(always)]
    pub fn pull(&self) {
        let wanted = if self.len() < HEADERS { self.len() } else { HEADERS };
        if self.0.data_end() - self.0.data() < wanted as usize {
            // On failure the parser finds the bytes missing, and the packet is dropped.
            let _ = self.0.pull_data(wanted);
        }
    }

    /// Whether its checksum is still to be filled in (CHECKSUM_PARTIAL). No helper tells; but only what has no
    /// checksum state at all can be raised to a verified one (kernel: `__skb_incr_checksum_unnecessary`), which is
    /// taken back at once.
    #[inline(always)]
    pub fn awaits_checksum(&self) -> bool {
        let skb = self.0.skb.skb;
        // SAFETY: the context is the kernel's, and these helpers touch its checksum state only.
        unsafe {
            if bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY as u64) >= 0 {
                return false;
            }
            bpf_csum_level(skb, BPF_CSUM_LEVEL_INC as u64);
            if bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY as u64) < 0 {
                return true;
            }
            bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC as u64);
            false
        }
    }

    /// Whether the checksum that it awaits is to be written at `offset` or behind it. The kernel refuses to cut a
    /// packet off before the end of its checksum field (`__bpf_skb_min_len`); where it doesn't refuse, the frame is
    /// cut, and must be dropped.
    #[inline(always)]
    pub fn checksum_is_at_or_after(&self, offset: u32) -> bool {
        const EINVAL: i64 = -22;
        // SAFETY: the context is the kernel's; nothing reads the frame's bytes after this.
        unsafe { bpf_skb_change_tail(self.0.skb.skb, offset + 1, 0) == EINVAL }
    }
}

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        load(self.0.data(), self.0.data_end(), offset)
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }
}

/// A frame in a network card's buffer. Headers that are not in its first part read as missing.
pub struct XdpFrame<'a>(pub &'a XdpContext);

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        load(self.0.data(), self.0.data_end(), offset)
    }

    /// Of the first part: a packet that goes on behind it is longer than any that begins a flow, and reads as malformed.
    #[inline(always)]
    fn len(&self) -> u32 {
        (self.0.data_end() - self.0.data()) as u32
    }
}

/// `N` bytes at `offset` of what lies between `data` and `end`.
#[inline(always)]
fn load<const N: usize>(data: usize, end: usize, offset: u32) -> Option<[u8; N]> {
    // VERIFIER: "R3 offset is outside of the packet" (6.18) where the compiler compares 32 bits of it, signed.
    let offset = opaque(offset as u64);
    if offset > MAX_OFFSET {
        return None;
    }
    let start = data + offset as usize;
    if start + N > end {
        return None;
    }
    // SAFETY: the N bytes from `start` lie before `end`, as was just checked; any bytes make an array of u8.
    Some(unsafe { core::ptr::read_unaligned(start as *const [u8; N]) })
}

/// The same value, about which the compiler knows nothing.
#[inline(always)]
fn opaque(mut value: u64) -> u64 {
    // SAFETY: a register that is moved to itself. (No instruction at all would give two source lines one offset, which
    // the kernel refuses: "Invalid line_info".)
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack)) };
    value
}
