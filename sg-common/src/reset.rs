//! The TCP reset that answers a SYN (RFC 9293, 3.10.7.1), as bytes: what a closed port would say. Sends nothing.

use crate::addr::Address;
use crate::packet::{ACK, ETHERNET, Ethernet, FIN, Packet, RST, TCP};

/// Bytes of the frame over IPv4.
pub const LENGTH4: usize = ETHERNET as usize + 20 + 20;
/// Bytes of the frame over IPv6, and of the longest there is.
pub const LENGTH6: usize = ETHERNET as usize + 40 + 20;

/// Hops that the answer may make: the kernel's own default (`net.ipv4.ip_default_ttl`).
const HOPS: u8 = 64;
/// A TCP header without options, and its flags.
const TCP_WORD: u16 = 5 << 12 | (RST | ACK) as u16;

/// Who fills in the TCP checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// It is complete.
    Here,
    /// The buffer says that the sum of the pseudo header stands in the field, and the rest is added later
    /// (CHECKSUM_PARTIAL).
    Later,
}

/// Writes the reset that answers a SYN: no sequence number, and everything that the SYN carried is acknowledged. It takes
/// [`LENGTH4`] or [`LENGTH6`] bytes, by the SYN's family.
// VERIFIER: "combined stack size of 2 calls is 704" (6.18) where the headers are put together on the stack.
#[inline(always)]
pub fn write(ethernet: &Ethernet, syn: &Packet, checksum: Checksum, to: &mut [u8; LENGTH6]) {
    to[..6].copy_from_slice(&ethernet.source);
    to[6..12].copy_from_slice(&ethernet.destination);
    to[12..14].copy_from_slice(&ethernet.ethertype.to_be_bytes());
    let payload = syn.transport_length.wrapping_sub(syn.transport_header);
    let fin = if syn.tcp_flags & FIN == 0 { 0 } else { 1 };
    let acknowledged = syn.sequence.wrapping_add(payload).wrapping_add(1 + fin);
    let pseudo = sum(&syn.source) + sum(&syn.destination) + TCP as u32 + 20;
    let check = match checksum {
        Checksum::Later => fold(pseudo),
        Checksum::Here => {
            let ports = u32::from(syn.destination_port) + u32::from(syn.source_port);
            !fold(pseudo + ports + (acknowledged >> 16) + (acknowledged & 0xffff) + u32::from(TCP_WORD))
        }
    };
    if syn.is_v4() {
        ipv4(syn, to);
        tcp(syn, acknowledged, check, &mut to[34..54]);
    } else {
        ipv6(syn, to);
        tcp(syn, acknowledged, check, &mut to[54..74]);
    }
}

#[inline(always)]
fn ipv4(syn: &Packet, to: &mut [u8; LENGTH6]) {
    // Version and header length, total length; don't fragment; hops and protocol.
    let words = [0x4500, 40, 0, 0x4000, u16::from_be_bytes([HOPS, TCP])];
    let mut total = sum(&syn.source) + sum(&syn.destination);
    let mut at = 0;
    while at < words.len() {
        total += u32::from(words[at]);
        to[14 + 2 * at..16 + 2 * at].copy_from_slice(&words[at].to_be_bytes());
        at += 1;
    }
    to[24..26].copy_from_slice(&(!fold(total)).to_be_bytes());
    to[26..30].copy_from_slice(&syn.destination.low());
    to[30..34].copy_from_slice(&syn.source.low());
}

#[inline(always)]
fn ipv6(syn: &Packet, to: &mut [u8; LENGTH6]) {
    // Version; payload length, next header, hop limit.
    to[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
    to[18..22].copy_from_slice(&[0, 20, TCP, HOPS]);
    to[22..38].copy_from_slice(&syn.destination.octets());
    to[38..54].copy_from_slice(&syn.source.octets());
}

#[inline(always)]
fn tcp(syn: &Packet, acknowledged: u32, check: u16, to: &mut [u8]) {
    to[..2].copy_from_slice(&syn.destination_port.to_be_bytes());
    to[2..4].copy_from_slice(&syn.source_port.to_be_bytes());
    to[4..8].copy_from_slice(&[0; 4]);
    to[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    to[12..14].copy_from_slice(&TCP_WORD.to_be_bytes());
    to[14..16].copy_from_slice(&[0; 2]);
    to[16..18].copy_from_slice(&check.to_be_bytes());
    to[18..20].copy_from_slice(&[0; 2]);
}

/// The Internet checksum's sum (RFC 1071) of an address.
#[inline(always)]
fn sum(address: &Address) -> u32 {
    let halves = |word: u32| {
        let word = u32::from_be(word);
        (word >> 16) + (word & 0xffff)
    };
    let [a, b, c, d] = address.0;
    if address.is_v4() { halves(d) } else { halves(a) + halves(b) + halves(c) + halves(d) }
}

#[inline(always)]
fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}
