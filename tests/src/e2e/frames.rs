//! Frames that no honest stack would send. Builds and sends them; what becomes of them is for others to see.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use nix::libc;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};

use super::Namespace;

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

/// Sends a frame as it is over a link of the namespace.
///
/// # Panics
/// When the kernel doesn't take it.
#[track_caller]
pub fn send_frame(namespace: &Namespace, link: &str, frame: &[u8]) {
    let sent = namespace.run(|| send(link, frame));
    assert!(sent.is_ok(), "over {link} of {}: {sent:?}", namespace.name());
}

fn send(link: &str, frame: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    let index = i32::try_from(if_nametoindex(link)?).map_err(io::Error::other)?;
    // SAFETY: all of it are integers and arrays of them, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: both pointers are to values that live until the call is over, with their own lengths.
    let sent = unsafe {
        let address = (&raw const address).cast();
        libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, address, length)
    };
    if sent == frame.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}
