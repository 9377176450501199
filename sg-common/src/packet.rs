//! From the bytes of a frame to what the decisions need. Owns every header length and limit; judges nothing.
//!
//! Whatever can't be read is a named [`Drop`], never a default. The parser is generic over [`Frame`], so that the
//! programs bring packet pointers (`sg-ebpf/src/packet.rs`) and tests and fuzzers a slice.

mod plain;

pub use plain::plain_headers;

use crate::addr::Address;
use crate::verdict::Drop;

/// ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// TCP (RFC 9293).
pub const TCP: u8 = 6;
/// UDP (RFC 768).
pub const UDP: u8 = 17;
/// ICMPv6 (RFC 4443).
pub const ICMPV6: u8 = 58;

/// The TCP flag FIN.
pub const FIN: u8 = 0x01;
/// The TCP flag SYN.
pub const SYN: u8 = 0x02;
/// The TCP flag RST.
pub const RST: u8 = 0x04;
/// The TCP flag ACK.
pub const ACK: u8 = 0x10;

/// Length of an Ethernet header in bytes; the network header follows.
pub const ETHERNET: u32 = 14;
/// Extension headers that one IPv6 packet may have. RFC 8200, 4.1 recommends each at most once, destination options
/// twice: seven. The verifier wants a bound.
const MAX_EXTENSIONS: usize = 8;
/// Bytes of the longest transport header that is judged (TCP's without options): no later fragment may start within
/// them (RFC 1858, RFC 3128).
const JUDGED: u32 = 20;

/// The bytes of a frame, from its Ethernet header on.
pub trait Frame {
    /// `N` bytes at `offset`, or `None` where the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// The frame's length in bytes. With segmentation offload it exceeds the MTU.
    fn len(&self) -> u32;
    /// [`ipv4_options`], which the kernel's frames call as a function, so that it is verified once.
    ///
    /// # Errors
    /// Its own.
    #[inline(always)]
    fn options(&self, at: u32, end: u32) -> Result<(), Drop>
    where
        Self: Sized,
    {
        ipv4_options(self, at, end)
    }
    /// Whether the frame has no byte at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Frame for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let offset = offset as usize;
        self.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }
    fn len(&self) -> u32 {
        <[u8]>::len(self) as u32
    }
}

/// The Ethernet header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ethernet {
    /// Destination MAC address.
    pub destination: [u8; 6],
    /// Source MAC address.
    pub source: [u8; 6],
    /// What follows.
    pub ethertype: u16,
}

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of ARP.
pub const ARP: u16 = 0x0806;
/// Ethertype of IPv6.
pub const IPV6: u16 = 0x86dd;

/// Reads the Ethernet header. Tagged frames and those that are neither IP nor ARP end here.
#[inline(always)]
pub fn ethernet(frame: &impl Frame) -> Result<Ethernet, Drop> {
    let h: [u8; ETHERNET as usize] = frame.load(0).ok_or(Drop::Malformed)?;
    let header = Ethernet {
        destination: [h[0], h[1], h[2], h[3], h[4], h[5]],
        source: [h[6], h[7], h[8], h[9], h[10], h[11]],
        ethertype: u16::from_be_bytes([h[12], h[13]]),
    };
    match header.ethertype {
        IPV4 | IPV6 | ARP => Ok(header),
        // 802.1Q, 802.1ad, and the number that QinQ had before it.
        0x8100 | 0x88a8 | 0x9100 => Err(Drop::Vlan),
        _ => Err(Drop::NotIp),
    }
}

/// Which part of a packet a frame carries.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// A later fragment.
    Rest,
}

/// An IP packet: what rules and flows are matched on. Aligned so that an address is stored in two words.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Where it comes from.
    pub source: Address,
    /// Where it goes.
    pub destination: Address,
    /// The upper-layer protocol, past IPv6 extension headers (SG-1.4).
    pub protocol: u8,
    /// TCP's flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// TCP and UDP: the source port. ICMP: the identifier. Otherwise 0. In host order.
    pub source_port: u16,
    /// TCP and UDP: the destination port. ICMP: type << 8 | code. Otherwise 0. In host order.
    pub destination_port: u16,
    /// Which part of the packet this is; without a transport header (`Rest`) the ports are 0.
    pub part: Part,
    /// The identification that its fragments share, in network order; 0 for a whole packet.
    pub fragment_id: u32,
    /// TCP: the sequence number. Otherwise 0. In host order.
    pub sequence: u32,
    /// TCP: the acknowledgment number, which counts with the flag ACK. Otherwise 0. In host order.
    pub acknowledgment: u32,
    /// In units of 8 bytes of the packet's fragmentable part. First fragment: where the header that is judged ends.
    /// Rest: where this fragment starts.
    pub fragment_offset: u16,
    /// Where the transport header starts in the frame.
    pub transport: u32,
    /// Bytes from the transport header to the packet's end.
    pub transport_length: u32,
    /// Bytes of a TCP header, options included; 0 for other protocols.
    pub transport_header: u32,
}

impl Packet {
    /// A whole packet from the first address to the second one, of which nothing else is known yet.
    #[inline(always)]
    const fn between((source, destination): (Address, Address), protocol: u8, transport: u32) -> Self {
        Self {
            source,
            destination,
            protocol,
            tcp_flags: 0,
            source_port: 0,
            destination_port: 0,
            part: Part::Whole,
            fragment_id: 0,
            sequence: 0,
            acknowledgment: 0,
            fragment_offset: 0,
            transport,
            transport_length: 0,
            transport_header: 0,
        }
    }

    /// Whether it is an IPv4 packet.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.source.is_v4()
    }

    /// Whether it is ICMP, or ICMPv6.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        if self.is_v4() { self.protocol == ICMP } else { self.protocol == ICMPV6 }
    }

    /// An ICMP message's type.
    #[inline(always)]
    pub const fn icmp_type(&self) -> u8 {
        (self.destination_port >> 8) as u8
    }

    /// Whether it asks for a new TCP connection.
    #[inline(always)]
    pub const fn is_initial_syn(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & (SYN | ACK) == SYN
    }
}

/// Reads the IP and transport headers of a frame whose Ethernet header is `ethernet`.
///
/// # Errors
/// The [`Drop`] that names what is wrong with it.
#[inline(always)]
pub fn ip(frame: &impl Frame, ethernet: &Ethernet) -> Result<Packet, Drop> {
    // Each family by itself: the compiler then leaves out what the other one is asked.
    let mut packet = if ethernet.ethertype == IPV4 {
        let packet = ipv4(frame, ETHERNET)?;
        if is_martian(&packet) || packet.source == Address::v4([255; 4]) {
            return Err(Drop::Martian);
        }
        packet
    } else {
        let packet = ipv6(frame, ETHERNET)?;
        if packet.source.is_v4() || packet.destination.is_v4() || is_martian(&packet) {
            return Err(Drop::Martian);
        }
        packet
    };
    if packet.part != Part::Rest {
        transport(frame, &mut packet)?;
    }
    Ok(packet)
}

#[inline(always)]
fn is_martian(packet: &Packet) -> bool {
    packet.source.is_loopback() || packet.destination.is_loopback() || packet.source.is_multicast()
}

/// The same of a packet that arrives at this host, where loopback addresses are none of our business: whole packets
/// only, and no mapped addresses, which would be taken for IPv4's.
///
/// # Errors
/// The [`Drop`] that names what is wrong with it.
#[inline(always)]
pub fn ip_to_host(frame: &impl Frame, ethernet: &Ethernet) -> Result<Packet, Drop> {
    let mut packet = if ethernet.ethertype == IPV4 { ipv4(frame, ETHERNET)? } else { ipv6(frame, ETHERNET)? };
    if ethernet.ethertype == IPV6 && (packet.source.is_v4() || packet.destination.is_v4()) {
        return Err(Drop::Martian);
    }
    if packet.part != Part::Whole {
        return Err(Drop::FragmentOrphan);
    }
    transport(frame, &mut packet)?;
    Ok(packet)
}

/// The IPv4 header at `start` (RFC 791).
#[inline(always)]
fn ipv4(frame: &impl Frame, start: u32) -> Result<Packet, Drop> {
    let h: [u8; 20] = frame.load(start).ok_or(Drop::Malformed)?;
    let header = (h[0] & 0x0f) as u32 * 4;
    let available = frame.len().wrapping_sub(start);
    let mut total = u16::from_be_bytes([h[2], h[3]]) as u32;
    if total == 0 && available > u16::MAX as u32 {
        // BIG TCP: an offloaded packet past 64 KiB (kernel commit b1a78b9b9886, "ipv4: BIG TCP").
        total = available;
    }
    if h[0] >> 4 != 4 || header < 20 || total < header || total > available {
        return Err(Drop::Malformed);
    }
    if header > 20 {
        frame.options(start + 20, start + header)?;
    }
    let fragment = u16::from_be_bytes([h[6], h[7]]);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    let part = part(offset, more);
    Ok(Packet {
        part,
        fragment_id: if matches!(part, Part::Whole) { 0 } else { u32::from_ne_bytes([h[4], h[5], 0, 0]) },
        fragment_offset: if matches!(part, Part::First) { JUDGED.div_ceil(8) as u16 } else { offset },
        transport_length: total - header,
        ..Packet::between(ipv4_addresses(&h), h[9], start + header)
    })
}

/// The IPv4 options from `at` to `end`. They are stepped over, since they change nothing that rules see, but for a source
/// route: its next stop takes the place of the destination at the one before (RFC 791, 3.1), as with IPv6's routing
/// header. Those that can't be stepped over might hide one.
///
/// # Errors
/// [`Drop::SourceRoute`] and [`Drop::Malformed`].
#[inline(always)]
pub fn ipv4_options(frame: &impl Frame, mut at: u32, end: u32) -> Result<(), Drop> {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const LOOSE_ROUTE: u8 = 131;
    const STRICT_ROUTE: u8 = 137;
    for _ in 0..40 {
        if at >= end {
            return Ok(());
        }
        // VERIFIER: "R6 offset is outside of the packet" (6.18) for a single byte: it learns nothing from `start >= end`.
        let [_, kind] = frame.load(at - 1).ok_or(Drop::Malformed)?;
        match kind {
            END => return Ok(()),
            NOTHING => at += 1,
            LOOSE_ROUTE | STRICT_ROUTE => return Err(Drop::SourceRoute),
            _ => {
                let [_, length] = frame.load(at).ok_or(Drop::Malformed)?;
                at += length as u32;
                if length < 2 || at > end {
                    return Err(Drop::Malformed);
                }
            }
        }
    }
    Ok(())
}

/// The IPv6 header at `start` and its extension headers (RFC 8200).
#[inline(always)]
fn ipv6(frame: &impl Frame, start: u32) -> Result<Packet, Drop> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;

    let h: [u8; 40] = frame.load(start).ok_or(Drop::Malformed)?;
    let available = frame.len().wrapping_sub(start);
    let mut end = u16::from_be_bytes([h[4], h[5]]) as u32 + 40;
    if end == 40 && available > u16::MAX as u32 {
        // A jumbogram (RFC 2675), as BIG TCP makes them (kernel commit 09f3d1a3a52c).
        end = available;
    }
    if h[0] >> 4 != 6 || end > available {
        return Err(Drop::Malformed);
    }
    let mut packet = Packet::between(ipv6_addresses(&h), h[6], start + 40);
    let end = start + end;
    let mut fragmentable = 0;
    for _ in 0..MAX_EXTENSIONS {
        match packet.protocol {
            HOP_BY_HOP | DESTINATION | ROUTING => {
                let h: [u8; 4] = frame.load(packet.transport).ok_or(Drop::Malformed)?;
                if packet.protocol == ROUTING && (h[2] == 0 || h[3] != 0) {
                    return Err(Drop::RoutingHeader);
                }
                packet.protocol = h[0];
                packet.transport += (h[1] as u32 + 1) * 8;
            }
            // RFC 8200, 4.5 has one; a second would hide the first, whose own rest then follows another packet.
            FRAGMENT if fragmentable != 0 => return Err(Drop::Malformed),
            FRAGMENT => {
                let h: [u8; 8] = frame.load(packet.transport).ok_or(Drop::Malformed)?;
                let field = u16::from_be_bytes([h[2], h[3]]);
                let (offset, more) = (field >> 3, field & 1 != 0);
                packet.protocol = h[0];
                packet.part = part(offset, more);
                packet.transport += 8;
                fragmentable = packet.transport;
                if !matches!(packet.part, Part::Whole) {
                    packet.fragment_id = u32::from_ne_bytes([h[4], h[5], h[6], h[7]]);
                    packet.fragment_offset = offset;
                }
                if matches!(packet.part, Part::Rest) {
                    packet.transport_length = end.checked_sub(packet.transport).ok_or(Drop::Malformed)?;
                    return Ok(packet);
                }
            }
            // Everything else is an upper-layer protocol. AH and ESP are among them: groups name them (SG-1.4).
            _ => {
                packet.transport_length = end.checked_sub(packet.transport).ok_or(Drop::Malformed)?;
                if matches!(packet.part, Part::First) {
                    packet.fragment_offset = (packet.transport - fragmentable + JUDGED).div_ceil(8) as u16;
                }
                return Ok(packet);
            }
        }
    }
    Err(Drop::ExtensionHeaders)
}

/// An IPv4 header's source and destination.
#[inline(always)]
const fn ipv4_addresses(h: &[u8; 20]) -> (Address, Address) {
    (Address::v4([h[12], h[13], h[14], h[15]]), Address::v4([h[16], h[17], h[18], h[19]]))
}

/// An IPv6 header's source and destination.
#[inline(always)]
fn ipv6_addresses(h: &[u8; 40]) -> (Address, Address) {
    let mut source = [0; 16];
    let mut destination = [0; 16];
    source.copy_from_slice(&h[8..24]);
    destination.copy_from_slice(&h[24..40]);
    (Address::v6(source), Address::v6(destination))
}

#[inline(always)]
fn part(offset: u16, more: bool) -> Part {
    match (offset, more) {
        (0, false) => Part::Whole,
        (0, true) => Part::First,
        _ => Part::Rest,
    }
}

/// The ports, or what stands for them. The whole header must be in this frame (RFC 1858; RFC 7112).
#[inline(always)]
fn transport(frame: &impl Frame, packet: &mut Packet) -> Result<(), Drop> {
    let (at, length) = (packet.transport, packet.transport_length);
    match packet.protocol {
        TCP => {
            let h: [u8; 14] = frame.load(at).ok_or(Drop::Malformed)?;
            let header = (h[12] >> 4) as u32 * 4;
            if header < 20 || length < header {
                return Err(Drop::Malformed);
            }
            packet.source_port = u16::from_be_bytes([h[0], h[1]]);
            packet.destination_port = u16::from_be_bytes([h[2], h[3]]);
            packet.sequence = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
            packet.acknowledgment = u32::from_be_bytes([h[8], h[9], h[10], h[11]]);
            packet.tcp_flags = h[13];
            packet.transport_header = header;
        }
        UDP => {
            let h: [u8; 8] = frame.load(at).ok_or(Drop::Malformed)?;
            if length < 8 {
                return Err(Drop::Malformed);
            }
            packet.source_port = u16::from_be_bytes([h[0], h[1]]);
            packet.destination_port = u16::from_be_bytes([h[2], h[3]]);
        }
        ICMP | ICMPV6 if packet.is_icmp() => {
            let h: [u8; 8] = frame.load(at).ok_or(Drop::Malformed)?;
            if length < 8 {
                return Err(Drop::Malformed);
            }
            packet.destination_port = u16::from_be_bytes([h[0], h[1]]);
            packet.source_port = u16::from_be_bytes([h[4], h[5]]);
        }
        _ => {}
    }
    Ok(())
}

/// Where the checksum is in a packet's transport header. Everything that is judged lies before it, but for a TCP
/// header's options and an ICMP query's identifier.
#[inline(always)]
pub const fn checksum_offset(packet: &Packet) -> u32 {
    match packet.protocol {
        TCP => 16,
        UDP => 6,
        // ICMP's and GRE's are at 2 and 4, SCTP's at 8; nobody else's is offloaded.
        _ => 2,
    }
}

/// The packet that an ICMP error quotes, as far as RFC 792 promises it: the IP header and 8 bytes.
///
/// # Errors
/// [`Drop::Malformed`] where the quote is shorter, or not a packet; a quoted fragment without ports is one, too.
#[inline(always)]
pub fn quoted(frame: &impl Frame, error: &Packet) -> Result<Packet, Drop> {
    let start = error.transport + 8;
    let is_v4 = error.is_v4();
    let head: [u8; 20] = frame.load(start).ok_or(Drop::Malformed)?;
    let (addresses, protocol, at) = if is_v4 {
        // Not `ipv4`: the quote is cut short, so its total length says nothing.
        let header = (head[0] & 0x0f) as u32 * 4;
        let fragment = u16::from_be_bytes([head[6], head[7]]);
        if head[0] >> 4 != 4 || header < 20 || fragment & 0x1fff != 0 {
            return Err(Drop::Malformed);
        }
        (ipv4_addresses(&head), head[9], start + header)
    } else {
        let h: [u8; 40] = frame.load(start).ok_or(Drop::Malformed)?;
        if h[0] >> 4 != 6 {
            return Err(Drop::Malformed);
        }
        (ipv6_addresses(&h), h[6], start + 40)
    };
    let mut quote = Packet { transport_length: 8, ..Packet::between(addresses, protocol, at) };
    if at + 8 > error.transport + error.transport_length {
        return Err(Drop::Malformed);
    }
    let h: [u8; 8] = frame.load(at).ok_or(Drop::Malformed)?;
    if protocol == TCP || protocol == UDP {
        quote.source_port = u16::from_be_bytes([h[0], h[1]]);
        quote.destination_port = u16::from_be_bytes([h[2], h[3]]);
    } else if quote.is_icmp() {
        quote.destination_port = u16::from_be_bytes([h[0], h[1]]);
        quote.source_port = u16::from_be_bytes([h[4], h[5]]);
    }
    Ok(quote)
}
