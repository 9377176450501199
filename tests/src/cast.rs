//! The hosts that the tests are about, the same everywhere. Knows addresses only; groups and rules are `text`'s and
//! `lab`'s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A host, on either side of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Host {
    /// Its name in cases.
    pub name: &'static str,
    /// Its MAC address; the router's for hosts beyond it.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

const fn host(name: &'static str, mac: [u8; 6], v4: [u8; 4], subnet: u16, host: u16) -> Host {
    let [a, b, c, d] = v4;
    Host { name, mac, v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(0x2001, 0xdb8, subnet, 0, 0, 0, 0, host) }
}

/// An instance in `sgA`, in the subnet 10.0.1.0/24.
pub const A: Host = host("A", [2, 0, 0, 0, 0, 0xa], [10, 0, 1, 10], 1, 0xa);
/// The instance in `sgB`, in the same subnet: the one whose rules most cases set.
pub const B: Host = host("B", [2, 0, 0, 0, 0, 0xb], [10, 0, 1, 20], 1, 0xb);
/// An instance in `sgC`, in the subnet 10.0.2.0/24.
pub const C: Host = host("C", [2, 0, 0, 0, 0, 0xc], [10, 0, 2, 30], 2, 0xc);
/// A host outside, beyond the router.
pub const X: Host = host("X", ROUTER, [203, 0, 113, 9], 0xff, 9);
/// The VPC's router.
pub const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The router's address: the gateway, with its DNS and DHCP.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

/// The hosts that have an interface in the laboratory.
pub const INSTANCES: [Host; 3] = [A, B, C];

impl Host {
    /// A host with this name.
    ///
    /// # Panics
    /// Where there is none.
    pub fn named(name: &str) -> Self {
        let found = [A, B, C, X].into_iter().find(|host| host.name == name);
        found.unwrap_or_else(|| panic!("no host '{name}': A, B, C and X are"))
    }

    /// The same host at another address of either family.
    pub fn at(mut self, address: &str) -> Self {
        match address.parse().expect("an address") {
            IpAddr::V4(v4) => self.v4 = v4,
            IpAddr::V6(v6) => self.v6 = v6,
        }
        self
    }

    /// The same host with another MAC address.
    pub fn with_mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = mac;
        self
    }

    /// The link-local address that it makes of its MAC address.
    pub fn link_local(&self) -> Ipv6Addr {
        let m = self.mac;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]])
    }
}
