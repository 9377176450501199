//! P1: the frame as the kernel hands it over. The only place with packet pointers.

use aya_ebpf::Global;
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::bpf_probe_read_kernel_buf;
use aya_ebpf::programs::{TcContext, XdpContext};
use sg_common::abi::{SKB_WINDOW, SkbLayout};
use sg_common::packet::{Frame, ipv4_options, plain_headers};
use sg_common::verdict::Drop;

use crate::maps;

/// Set by the agent; see [`SkbLayout`].
#[unsafe(no_mangle)]
static SKB: Global<SkbLayout> =
    Global::new(SkbLayout { window: 0, ip_summed: 0, ip_summed_shift: 0, csum_start: 0, mac_header: 0 });

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
    /// may leave them in pages. TCP of the kernel's own has its headers there and its data in pages; to pull at those
    /// would copy the head of each packet, which the sender's queue shares (kernel: `skb_ensure_writable`).
    #[inline(always)]
    pub fn pull(&self) {
        let linear = (self.0.data_end() - self.0.data()) as u32;
        let wanted = if self.len() < HEADERS { self.len() } else { HEADERS };
        if linear < wanted && plain_headers(self).is_none_or(|end| linear < end) {
            // On failure the parser finds the bytes missing, and the packet is dropped.
            let _ = self.0.pull_data(wanted);
        }
    }

    /// Where in the frame a checksum is still to be written (CHECKSUM_PARTIAL), by the host's stack or a network card,
    /// if it is.
    ///
    /// # Errors
    /// [`Drop::Malformed`] where that is before the frame, or can't be read.
    #[inline(always)]
    pub fn pending_checksum(&self) -> Result<Option<u32>, Drop> {
        const CHECKSUM_PARTIAL: u8 = 3;
        let layout = SKB.load();
        let window = self.0.skb.skb.cast::<u8>().wrapping_byte_add(layout.window as usize);
        // VERIFIER: "combined stack size of 2 calls is 656" (6.18) with the bytes on the stack.
        let bytes = maps::skb_fields().ok_or(Drop::Malformed)?;
        // SAFETY: the helper reads any address, and fails where there is nothing.
        unsafe { bpf_probe_read_kernel_buf(window, bytes) }.map_err(|_| Drop::Malformed)?;
        let byte = |at: u16| bytes[at as usize % SKB_WINDOW];
        let word = |at: u16| u16::from_ne_bytes([byte(at), byte(at + 1)]) as u32;
        if byte(layout.ip_summed) >> layout.ip_summed_shift & 3 != CHECKSUM_PARTIAL {
            return Ok(None);
        }
        let (start, offset, frame) = (word(layout.csum_start), word(layout.csum_start + 2), word(layout.mac_header));
        if start < frame {
            return Err(Drop::Malformed);
        }
        Ok(Some(start - frame + offset))
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

    #[inline(always)]
    fn options(&self, at: u32, end: u32) -> Result<(), Drop> {
        walked(walk_options(self.0.skb.skb, at, end))
    }
}

/// [`ipv4_options`] as a function that the verifier knows as global: it is verified once, whatever its caller knows.
/// Returns the reason's number, or 0.
// VERIFIER: "BPF program is too large. Processed 1000001 insn" (6.18) with the loop in its place.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_options(skb: *mut __sk_buff, at: u32, end: u32) -> u32 {
    walk(&SkbFrame(&TcContext::new(skb)), at, end)
}

/// The same for a driver's frames.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_options_xdp(xdp: *mut xdp_md, at: u32, end: u32) -> u32 {
    walk(&XdpFrame(&XdpContext::new(xdp)), at, end)
}

#[inline(always)]
fn walk(frame: &impl Frame, at: u32, end: u32) -> u32 {
    match ipv4_options(frame, at, end) {
        Ok(()) => 0,
        Err(drop) => drop as u32,
    }
}

/// What [`walk`] found.
#[inline(always)]
fn walked(reason: u32) -> Result<(), Drop> {
    match reason {
        0 => Ok(()),
        reason => Err(if reason == Drop::SourceRoute as u32 { Drop::SourceRoute } else { Drop::Malformed }),
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

    #[inline(always)]
    fn options(&self, at: u32, end: u32) -> Result<(), Drop> {
        walked(walk_options_xdp(self.0.ctx, at, end))
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
    // SAFETY: the N bytes from `start` lie before `end`, as was just checked.
    Some(unsafe { read(start) })
}

/// The `N` bytes from `start`, in as few loads as can be: the compiler, which takes the target for one that can't load from
/// any address, would make one of each byte.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn read<const N: usize>(start: usize) -> [u8; N] {
    const { assert!(N <= 40) };
    let mut bytes = [0; N];
    /// One load, if the words before it have left so many bytes (`$of` at a time).
    macro_rules! word {
        ($size:literal, $type:ty, $of:expr, $($at:literal)+) => {
            $(if $at + size_of::<$type>() <= N && N - $at < $of {
                let word: u64;
                // SAFETY: the caller's.
                unsafe {
                    core::arch::asm!(
                        concat!("{word} = *(", $size, " *)({start} + {at})"),
                        word = out(reg) word,
                        start = in(reg) start,
                        at = const $at,
                        options(pure, readonly, nostack)
                    );
                }
                bytes[$at..$at + size_of::<$type>()].copy_from_slice(&(word as $type).to_ne_bytes());
            })+
        };
    }
    word!("u64", u64, usize::MAX, 0 8 16 24 32);
    word!("u32", u32, 8, 0 8 16 24 32);
    word!("u16", u16, 4, 0 4 8 12 16 20 24 28 32 36);
    word!("u8", u8, 2, 0 2 4 6 8 10 12 14 16 18 20 22 24 26 28 30 32 34 36 38);
    bytes
}

/// The same value, about which the compiler knows nothing.
#[inline(always)]
fn opaque(mut value: u64) -> u64 {
    // SAFETY: a register that is moved to itself. (No instruction at all would give two source lines one offset, which
    // the kernel refuses: "Invalid line_info".)
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack)) };
    value
}
