//! The other end of a veth that only its host-side name is known of: which namespace it is in, and what is there.
//! Only for `--attach`; Docker tells its containers' namespaces.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use super::links::read_in;
use super::netlink::{LinkRow, Netlink};
use super::netns::{Netns, NetnsId, Snapshot};

/// Where namespaces have names: iproute2's, Docker's.
const NAMED: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// The namespaces of this machine, found when first asked for.
pub(super) struct Search<'a> {
    host: &'a Netns,
    known: Vec<&'a Netns>,
    found: Option<Vec<Netns>>,
}

impl<'a> Search<'a> {
    /// Starts with those that are open already.
    pub(super) fn new(host: &'a Netns, known: impl Iterator<Item = &'a Netns>) -> Self {
        Self { host, known: known.collect(), found: None }
    }

    /// The other end of the veth of that name, and the namespace that it is in. None if it is no veth, or its other
    /// end is in a namespace that no process, name or container leads to.
    pub(super) fn peer(
        &mut self,
        host: &Snapshot,
        netlink: &mut Netlink,
        name: &str,
    ) -> io::Result<Option<(Snapshot, LinkRow)>> {
        let link = host.links.values().find(|link| link.name == name && link.kind.as_deref() == Some("veth"));
        let Some((link, peer)) = link.and_then(|link| Some((link, link.peer?))) else { return Ok(None) };
        let Some(id) = link.peer_netns else {
            return Ok(host.links.get(&peer).map(|row| (host.clone(), row.clone())));
        };
        let found = self.found.get_or_insert_with(|| namespaces(self.host.id));
        for netns in self.known.iter().copied().chain(found.iter()) {
            // An error is no answer: the file of a name that is just being made isn't a namespace yet.
            if netlink.netns_id(netns.as_fd()).is_ok_and(|found| found == Some(id)) {
                let inside = read_in(netns)?;
                let row = inside.links.get(&peer).filter(|row| row.peer == Some(link.index)).cloned();
                return Ok(row.map(|row| (inside, row)));
            }
        }
        Ok(None)
    }
}

/// Every namespace but `host` that has a name or a process, once each. What can't be opened is passed over: it is
/// going away, or is nothing of ours.
fn namespaces(host: NetnsId) -> Vec<Netns> {
    let entries = |directory: &str| fs::read_dir(directory).into_iter().flatten().flatten();
    let named = NAMED.into_iter().flat_map(entries).map(|entry| entry.path());
    let process = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()));
    let processes =
        entries("/proc").filter(|entry| process(&entry.file_name())).map(|entry| entry.path().join("ns/net"));
    let mut seen = BTreeSet::from([host]);
    let open = |path: PathBuf| File::open(path).and_then(Netns::new).ok();
    named.chain(processes).filter_map(open).filter(|netns| seen.insert(netns.id)).collect()
}
