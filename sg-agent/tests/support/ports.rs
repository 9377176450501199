//! Ports for servers that are started by number.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port that nobody has at either loopback address, and that no outgoing connection is given: below those of
/// `ip_local_port_range`.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 100) as u16 * 100;
    let mut candidates = (0..10_000).map(|_| 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000);
    let is_taken = |port: &u16| {
        let bound = ["127.0.0.1", "::1"].map(|address| TcpListener::bind((address, *port)));
        bound.into_iter().filter_map(Result::err).any(|error| error.kind() == ErrorKind::AddrInUse)
    };
    candidates.find(|port| !is_taken(port)).expect("a port that nobody has")
}
