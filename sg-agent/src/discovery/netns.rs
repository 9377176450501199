//! Network namespaces: naming one by an open file, entering it, and one consistent-enough picture of what is in it.
//!
//! Entering changes the calling thread for good. Only the dedicated thread of a scan may do it, never a tokio worker.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};

use super::netlink::{AddressRow, GatewayRow, LinkRow, Netlink};
use super::{HostLink, Link};

/// What makes a namespace itself: device and inode of its file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct NetnsId(u64, u64);

/// A namespace, held open: it lives at least as long as this.
#[derive(Debug)]
pub(super) struct Netns {
    file: File,
    /// Its identity.
    pub(super) id: NetnsId,
}

impl Netns {
    /// Takes an open namespace file.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { id: NetnsId(metadata.dev(), metadata.ino()), file })
    }

    /// The calling thread's.
    pub(super) fn current() -> io::Result<Self> {
        Self::new(File::open("/proc/thread-self/ns/net")?)
    }

    /// Moves the calling thread there.
    pub(super) fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The links, addresses and default gateways of one namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) links: BTreeMap<u32, LinkRow>,
    pub(super) addresses: Vec<AddressRow>,
    pub(super) gateways: Vec<GatewayRow>,
}

impl Snapshot {
    /// Reads the namespace of the socket.
    pub(super) fn read(netlink: &mut Netlink) -> io::Result<Self> {
        Ok(Self {
            links: netlink.links()?.into_iter().map(|link| (link.index, link)).collect(),
            addresses: netlink.addresses()?,
            gateways: netlink.gateways()?,
        })
    }

    /// A link's addresses, once each: primary IPv4, secondary IPv4, IPv6, link-local IPv6.
    pub(super) fn addresses_of(&self, link: u32) -> Vec<IpAddr> {
        let mut rows: Vec<_> = self.addresses.iter().filter(|row| row.link == link).collect();
        rows.sort_by_key(|row| match row.address {
            IpAddr::V4(_) => u8::from(row.secondary),
            IpAddr::V6(v6) => 2 + u8::from(v6.is_unicast_link_local()),
        });
        let mut addresses = Vec::new();
        for row in rows {
            push_new(&mut addresses, row.address);
        }
        addresses
    }

    /// The links that have addresses. A bridge's port may have one, but what comes by it is the bridge's.
    pub(super) fn host_links(&self) -> Vec<HostLink> {
        let reached = self.links.values().filter(|row| row.master.is_none()).map(|row| HostLink {
            link: Link { ifindex: row.index, name: row.name.clone() },
            addresses: self.addresses_of(row.index),
            is_ethernet: row.loopback || row.mac.is_some(),
            is_hardware: row.kind.is_none() && !row.loopback && row.mac.is_some(),
        });
        reached.filter(|link| !link.addresses.is_empty()).collect()
    }

    /// The prefixes that a link's addresses make on-link; a single address is none.
    pub(super) fn networks_of(&self, link: u32) -> Vec<IpNet> {
        let mut networks = Vec::new();
        for row in self.addresses.iter().filter(|row| row.link == link) {
            if let Ok(network) = IpNet::new(row.prefix.0, row.prefix.1)
                && (network.prefix_len() < network.max_prefix_len() || row.prefix.0 != row.address)
            {
                push_new(&mut networks, network.trunc());
            }
        }
        networks
    }

    /// The next hops of the default routes over a link.
    pub(super) fn gateways_of(&self, link: u32) -> Vec<IpAddr> {
        let mut gateways = Vec::new();
        for row in self.gateways.iter().filter(|row| row.link == link) {
            push_new(&mut gateways, row.gateway);
        }
        gateways
    }
}

/// Appends what isn't there yet.
pub(super) fn push_new<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(address: &str, prefix: &str, secondary: bool) -> AddressRow {
        let net: IpNet = prefix.parse().expect("a prefix");
        let address = address.parse().expect("an address");
        AddressRow { link: 2, address, prefix: (net.addr(), net.prefix_len()), secondary }
    }

    #[test]
    fn addresses_come_primary_first_and_link_local_last() {
        let snapshot = Snapshot {
            addresses: vec![
                row("fe80::1", "fe80::1/64", false),
                row("203.0.113.9", "203.0.113.9/24", true),
                row("2001:db8::1", "2001:db8::1/64", false),
                row("203.0.113.8", "203.0.113.8/24", false),
                row("198.51.100.1", "198.51.100.2/32", false),
                row("198.51.100.7", "198.51.100.7/32", false),
            ],
            ..Snapshot::default()
        };
        let text = |list: Vec<IpAddr>| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            text(snapshot.addresses_of(2)),
            ["203.0.113.8", "198.51.100.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "fe80::1"]
        );
        assert_eq!(snapshot.addresses_of(3), Vec::<IpAddr>::new());
        let networks: Vec<_> = snapshot.networks_of(2).iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["fe80::/64", "203.0.113.0/24", "2001:db8::/64", "198.51.100.2/32"]);
    }
}
