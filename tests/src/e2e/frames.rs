//! Frames that no honest stack would send. Builds and sends them; what becomes of them is for others to see.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use nix::libc;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::{Instance, Namespace};

/// An ARP answer that says that `sender` has `sender_mac`.
pub fn arp_reply(sender_mac: [u8; 6], sender: Ipv4Addr, target_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(target_mac);
    frame.extend(sender_mac);
    frame.extend([0x08, 0x06]);
    // Ethernet, IPv4, their addresses' lengths, and that it is an answer.
    frame.extend([0, 1, 0x08, 0x00, 6, 4, 0, 2]);
    frame.extend(sender_mac);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame
}

/// A UDP datagram as a stack hands it to a network card that fills in checksums: in the checksum's place is the sum of
/// what stands for the addresses (RFC 768's pseudo header).
pub fn offloaded_datagram(from: &Instance, to: &Instance, is_v4: bool, port: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut frame = [to.mac, from.mac].concat();
    let mut pseudo = Vec::new();
    if is_v4 {
        let mut header = vec![0x45, 0];
        header.extend((20 + length).to_be_bytes());
        header.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        pseudo.extend([from.v4.octets(), to.v4.octets()].as_flattened());
        header.extend(&pseudo);
        let sum = (!ones_sum(&header)).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        frame.extend([0x08, 0x00]);
        frame.extend(header);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([17, 64]);
        pseudo.extend([from.v6.octets(), to.v6.octets()].as_flattened());
        frame.extend(&pseudo);
    }
    pseudo.extend([0, 17]);
    pseudo.extend(length.to_be_bytes());
    for word in [40000, port, length, ones_sum(&pseudo)] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend(payload);
    frame
}

/// Fills in the checksums of a TCP segment over IPv4 without options, for a stack that looks at them.
pub fn fill_checksums(frame: &mut [u8]) {
    const IP: usize = 14;
    const TCP: usize = IP + 20;
    frame[IP + 10..IP + 12].fill(0);
    let sum = !ones_sum(&frame[IP..TCP]);
    frame[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
    frame[TCP + 16..TCP + 18].fill(0);
    let length = (frame.len() - TCP) as u16;
    let mut summed = frame[IP + 12..].to_vec();
    summed.extend([0, 6]);
    summed.extend(length.to_be_bytes());
    let sum = !ones_sum(&summed);
    frame[TCP + 16..TCP + 18].copy_from_slice(&sum.to_be_bytes());
}

/// The sum of 16-bit words with its carries (RFC 1071).
fn ones_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A socket that sends frames as they are over one link.
#[derive(Debug)]
pub struct FrameSocket(Socket);

impl FrameSocket {
    /// Over this link of the namespace.
    ///
    /// # Errors
    /// The kernel's; there is no such link.
    pub fn new(namespace: &Namespace, link: &str) -> io::Result<Self> {
        namespace.run(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
            socket.bind(&address(link)?)?;
            Ok(Self(socket))
        })
    }

    /// Sends one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let sent = self.0.send(frame)?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// Where a packet socket is bound to a link.
fn address(link: &str) -> io::Result<SockAddr> {
    let index = i32::try_from(if_nametoindex(link)?).map_err(io::Error::other)?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage is large enough for every kind of address, this one among them, and all zeros are a value of it.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index;
    // SAFETY: what was written is an address of this kind and of this length.
    Ok(unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) })
}

/// Sends a frame as it is over a link of the namespace.
///
/// # Panics
/// When the kernel doesn't take it.
#[track_caller]
pub fn send_frame(namespace: &Namespace, link: &str, frame: &[u8]) {
    let sent = FrameSocket::new(namespace, link).and_then(|socket| socket.send(frame));
    assert!(sent.is_ok(), "over {link} of {}: {sent:?}", namespace.name());
}

/// The same, with the demand that a checksum of everything from `start` be written `offset` bytes behind it
/// (PACKET_VNET_HDR, CHECKSUM_PARTIAL).
///
/// # Panics
/// When the kernel doesn't take it.
#[track_caller]
pub fn send_offloaded(namespace: &Namespace, link: &str, frame: &[u8], start: u16, offset: u16) {
    const NEEDS_CHECKSUM: u8 = 1;
    // `struct virtio_net_hdr`: flags, no segmentation, then four words in the machine's order.
    let mut bytes = vec![NEEDS_CHECKSUM, 0];
    bytes.extend([0, 0, start, offset].map(u16::to_ne_bytes).as_flattened());
    bytes.extend(frame);
    let sent = FrameSocket::new(namespace, link).and_then(|socket| {
        let on: libc::c_int = 1;
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the pointer is to an integer of that size, which lives until the call is over.
        let set = unsafe {
            let value = (&raw const on).cast();
            libc::setsockopt(socket.0.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, value, size)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        socket.send(&bytes)
    });
    assert!(sent.is_ok(), "over {link} of {}: {sent:?}", namespace.name());
}
