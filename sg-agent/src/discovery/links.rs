//! From claims and flags to host-side links: the dedicated thread that visits the namespaces, and the pure part that
//! pairs the two ends of each veth.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::thread;

use tokio::sync::oneshot;

use super::attach_spec::AttachSpec;
use super::docker::{Claimed, Endpoint, subject};
use super::netlink::{LinkRow, Netlink};
use super::netns::{Netns, NetnsId, Snapshot, push_new};
use super::search::Search;
use super::{Attachment, Discovered, DiscoveryError, Link, OUT_OF_SIGHT, Origin, Port};
use crate::model::Warning;

/// The two ends of a veth are read one after the other; if they disagree, they are read again, so many times in all.
const ATTEMPTS: u32 = 3;

/// How it is known that a bridge's port is no instance's.
pub(super) enum Ports {
    /// Nobody wants to know.
    Unasked,
    /// Nobody but flags names instances.
    Named,
    /// Its other end is in one of these namespaces, those of containers that claim nothing.
    Others(Vec<Netns>),
}

/// Finds the links of `containers` and `specs`.
pub(super) async fn resolve(
    containers: Vec<Claimed>,
    ports: Ports,
    specs: Vec<AttachSpec>,
) -> Result<Discovered, DiscoveryError> {
    let (done, result) = oneshot::channel();
    let failed = |action| move |cause| DiscoveryError::Kernel { action, cause };
    thread::Builder::new()
        .name("sg-netns".to_owned())
        .spawn(move || {
            // Nobody waits any more if this fails.
            let _ = done.send(visit(&containers, &ports, &specs));
        })
        .map_err(failed("start the thread that visits network namespaces"))?;
    let ended = |_| DiscoveryError::Kernel {
        action: "visit network namespaces",
        cause: io::Error::other("the thread ended early"),
    };
    result.await.map_err(ended)?.map_err(failed("read links in network namespaces"))
}

/// Runs on a thread of its own, which ends in another namespace than it began in.
fn visit(containers: &[Claimed], ports: &Ports, specs: &[AttachSpec]) -> io::Result<Discovered> {
    let host = Netns::current()?;
    let mut netlink = Netlink::open()?;
    let mut groups: BTreeMap<NetnsId, Vec<&Claimed>> = BTreeMap::new();
    for container in containers {
        groups.entry(container.netns.id).or_default().push(container);
    }
    let mut attempt = 1;
    loop {
        let mut insides = Vec::new();
        for (id, members) in &groups {
            insides.push((members, if *id == host.id { None } else { Some(read_in(&members[0].netns)?) }));
        }
        let mut picture = Picture { host: Snapshot::read(&mut netlink)?, ..Picture::default() };
        let mut search = Search::new(&host, containers.iter().map(|container| &container.netns));
        for spec in specs {
            let peer = search.peer(&picture.host, &mut netlink, &spec.link)?;
            picture.add_spec(spec, peer);
        }
        for (members, inside) in insides {
            let id = netlink.netns_id(members[0].netns.as_fd())?;
            picture.add_namespace(members, inside.as_ref(), id);
        }
        if !picture.unsettled || attempt == ATTEMPTS {
            picture.found.containers = containers.iter().map(|container| container.id.clone()).collect();
            picture.found.links = picture.host.links.keys().copied().collect();
            picture.found.host_links = picture.host.host_links();
            let claimed: Vec<NetnsId> = groups.keys().copied().collect();
            picture.found.ports = picture.ports(ports, &claimed, &mut netlink)?;
            return Ok(picture.finish());
        }
        attempt += 1;
    }
}

/// Reads another namespace. The calling thread stays there.
pub(super) fn read_in(netns: &Netns) -> io::Result<Snapshot> {
    netns.enter()?;
    Snapshot::read(&mut Netlink::open()?)
}

/// What is found, as it comes together.
#[derive(Default)]
struct Picture {
    host: Snapshot,
    found: Discovered,
    taken: BTreeMap<u32, String>,
    /// Two ends disagreed, which a change between two reads explains.
    unsettled: bool,
}

impl Picture {
    /// The bridges' ports. What shares the namespace of a container that claims to be an instance is no stranger.
    fn ports(&self, known: &Ports, claimed: &[NetnsId], netlink: &mut Netlink) -> io::Result<Vec<Port>> {
        let strangers: Option<BTreeSet<i32>> = match known {
            Ports::Unasked => return Ok(Vec::new()),
            Ports::Named => None,
            Ports::Others(others) => {
                let mut ids = BTreeSet::new();
                for netns in others.iter().filter(|netns| !claimed.contains(&netns.id)) {
                    ids.extend(netlink.netns_id(netns.as_fd())?);
                }
                Some(ids)
            }
        };
        let mut ports = Vec::new();
        for link in self.host.links.values() {
            let bridge = link.master.and_then(|master| self.host.links.get(&master));
            let Some(bridge) = bridge.filter(|bridge| bridge.kind.as_deref() == Some("bridge")) else { continue };
            let is_stranger = !self.taken.contains_key(&link.index)
                && strangers.as_ref().is_none_or(|strangers| {
                    link.kind.as_deref() != Some("veth") || link.peer_netns.is_some_and(|id| strangers.contains(&id))
                });
            let link = Link { ifindex: link.index, name: link.name.clone() };
            ports.push(Port { link, bridge: bridge.name.clone(), is_stranger });
        }
        Ok(ports)
    }

    /// One `--attach`. `peer` is the other end, if it could be found.
    fn add_spec(&mut self, spec: &AttachSpec, peer: Option<(Snapshot, LinkRow)>) {
        let warn = |problem: String| Warning { subject: format!("--attach {}={}", spec.instance, spec.link), problem };
        let Some(link) = self.host.links.values().find(|link| link.name == spec.link).cloned() else {
            self.found.warnings.push(warn("there is no such link yet: it is attached when it appears".to_owned()));
            return;
        };
        if link.loopback || link.kind.as_deref() == Some("bridge") {
            let problem = "not attached: it isn't one instance's link; name the bridge's port (a veth, a tap)";
            self.found.warnings.push(warn(problem.to_owned()));
            return;
        }
        let read = peer.as_ref().and_then(|(_, row)| row.mac);
        // An instance that moves its end to where nobody sees it must not be rid of its rules by that.
        let hidden = (link.kind.as_deref() == Some("veth")).then_some(OUT_OF_SIGHT);
        let Some(mac) = spec.mac.or(read).or(hidden) else {
            let problem = "not attached: the guest's MAC address can't be read from this link; pass mac=MAC";
            self.found.warnings.push(warn(problem.to_owned()));
            return;
        };
        if let Some(other) = self.taken.get(&link.index) {
            self.found.warnings.push(warn(format!("left out: the link is already {other}'s")));
            return;
        }
        let mut addresses = spec.addresses.clone();
        let (mut networks, mut gateways) = (Vec::new(), Vec::new());
        if let Some((inside, row)) = &peer {
            inside.addresses_of(row.index).into_iter().for_each(|address| push_new(&mut addresses, address));
            networks = inside.networks_of(row.index);
            gateways = inside.gateways_of(row.index);
        }
        let owner = link.master.unwrap_or(link.index);
        for network in self.host.networks_of(owner) {
            if addresses.iter().any(|address| network.contains(address)) {
                push_new(&mut networks, network);
            }
        }
        self.add_bridge(&link, &mut gateways);
        if mac == OUT_OF_SIGHT {
            let problem =
                "the other end of this link can't be found: it is denied everything until it is; pass mac=MAC";
            self.found.warnings.push(warn(problem.to_owned()));
        } else if addresses.is_empty() {
            self.found.warnings.push(warn("no address of it is known; pass ip=ADDR if it has one".to_owned()));
        }
        let same = |other: &&Attachment| {
            (&other.instance, &other.account, &other.region) == (&spec.instance, &spec.account, &spec.region)
        };
        let device_index = self.found.attachments.iter().filter(same).count() as u32;
        self.taken.insert(link.index, spec.instance.to_string());
        self.found.attachments.push(Attachment {
            instance: spec.instance.clone(),
            account: spec.account.clone(),
            region: spec.region.clone(),
            eni: spec.eni.clone(),
            device_index,
            link: Link { ifindex: link.index, name: link.name },
            mac,
            addresses,
            networks,
            gateways,
            origin: Origin::Flag,
            publish: Vec::new(),
        });
    }

    /// The containers of one namespace; `inside` is none if that is the host's own, `id` is the host's number for it.
    fn add_namespace(&mut self, members: &[&Claimed], inside: Option<&Snapshot>, id: Option<i32>) {
        let mut members = members.to_vec();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        let owner = members[0];
        let Some(inside) = inside else {
            for member in members {
                self.warn(member, "it uses the host's network, so its traffic is the host's own".to_owned());
            }
            return;
        };
        // Several containers in one namespace are one instance: the one that the first by name claims.
        let scope = |member: &Claimed| {
            (member.claim.instance.clone(), member.claim.account.clone(), member.claim.region.clone())
        };
        let (mut publish, mut enis) = (Vec::new(), owner.claim.enis.clone());
        for member in &members {
            if scope(member) == scope(owner) {
                member.claim.publish.iter().for_each(|spec| push_new(&mut publish, *spec));
                enis.extend_from_slice(member.claim.enis.get(enis.len()..).unwrap_or_default());
            } else {
                let taken = &owner.claim.instance;
                self.warn(member, format!("it shares the network of {}, which is {taken}", subject(&owner.name)));
            }
        }
        let exits = exits(inside);
        if exits.is_empty() {
            self.warn(owner, "it has no link out of its network namespace".to_owned());
        }
        let given: Vec<Endpoint> = members.iter().flat_map(|member| &member.endpoints).cloned().collect();
        let endpoints = assign(&exits, inside, given.clone());
        let origin =
            Origin::Docker { container: owner.id.clone(), name: owner.name.clone(), convention: owner.claim.system };
        for (device_index, (row, endpoint)) in exits.into_iter().zip(endpoints).enumerate() {
            let (link, _) = match other_end(row, &self.host, id) {
                Ok(ends) => ends,
                Err(NoEnd { problem, unsettled }) => {
                    self.unsettled |= unsettled;
                    self.warn(owner, problem);
                    continue;
                }
            };
            let link = link.clone();
            if let Some(other) = self.taken.get(&link.index) {
                if *other != owner.claim.instance.to_string() {
                    self.warn(owner, format!("its link {:?} is already {other}'s", link.name));
                }
                continue;
            }
            let Endpoint { mac, addresses } = endpoint.unwrap_or_else(|| {
                let problem = format!("its interface {:?} is none that docker made: nothing passes there", row.name);
                self.warn(owner, problem);
                Endpoint { mac: OUT_OF_SIGHT, addresses: Vec::new() }
            });
            let mut gateways = inside.gateways_of(row.index);
            self.add_bridge(&link, &mut gateways);
            self.taken.insert(link.index, owner.claim.instance.to_string());
            self.found.attachments.push(Attachment {
                instance: owner.claim.instance.clone(),
                account: owner.claim.account.clone(),
                region: owner.claim.region.clone(),
                eni: enis.get(device_index).cloned().flatten(),
                device_index: device_index as u32,
                link: Link { ifindex: link.index, name: link.name },
                mac,
                addresses,
                networks: inside.networks_of(row.index),
                gateways,
                origin: origin.clone(),
                publish: std::mem::take(&mut publish),
            });
        }
        let is_found = |endpoint: &&Endpoint| self.found.attachments.iter().any(|found| found.mac == endpoint.mac);
        let missing = given.iter().filter(|endpoint| !is_found(endpoint)).map(|endpoint| Attachment {
            instance: owner.claim.instance.clone(),
            account: owner.claim.account.clone(),
            region: owner.claim.region.clone(),
            eni: None,
            device_index: 0,
            link: Link { ifindex: 0, name: String::new() },
            mac: endpoint.mac,
            addresses: Vec::new(),
            networks: Vec::new(),
            gateways: Vec::new(),
            origin: origin.clone(),
            publish: Vec::new(),
        });
        let missing: Vec<Attachment> = missing.collect();
        self.found.missing.extend(missing);
    }

    /// Leaves of the next hops the host's own, and adds the host's addresses on the link's segment.
    fn add_bridge(&self, link: &LinkRow, gateways: &mut Vec<IpAddr>) {
        gateways.retain(|gateway| self.host.addresses.iter().any(|row| row.address == *gateway));
        let owner = link.master.unwrap_or(link.index);
        self.host.addresses_of(owner).into_iter().for_each(|address| push_new(gateways, address));
    }

    fn warn(&mut self, container: &Claimed, reason: String) {
        let problem = format!("instance {} isn't enforced on it: {reason}", container.claim.instance);
        self.found.warnings.push(Warning { subject: subject(&container.name), problem });
    }

    fn finish(mut self) -> Discovered {
        let key = |a: &Attachment| (a.instance.clone(), a.device_index, a.link.ifindex);
        self.found.attachments.sort_by_key(key);
        self.found
    }
}

/// The links that lead out of a namespace, in the order in which their other ends were made. Not by their names: the
/// guest can change those, and with them which of its interfaces is which.
///
/// Hardware does, and whatever has its peer or parent in another namespace. Loopback, bridges, tunnels and the like
/// made inside do not: what they carry leaves by one of the others.
fn exits(inside: &Snapshot) -> Vec<&LinkRow> {
    let leads_out = |link: &&LinkRow| !link.loopback && (link.kind.is_none() || link.peer_netns.is_some());
    let mut exits: Vec<_> = inside.links.values().filter(leads_out).collect();
    exits.sort_by_key(|link| (link.peer.unwrap_or(u32::MAX), link.index));
    exits
}

/// Which of Docker's endpoints each of a container's interfaces is. The guest can change its own MAC and IP addresses,
/// so they only tell which endpoint is meant; what counts is Docker's. Where they tell nothing and just one endpoint is
/// left for just one interface, it is that.
fn assign(exits: &[&LinkRow], inside: &Snapshot, mut endpoints: Vec<Endpoint>) -> Vec<Option<Endpoint>> {
    let mut take = |fits: &dyn Fn(&Endpoint) -> bool| {
        let place = endpoints.iter().position(fits)?;
        Some(endpoints.remove(place))
    };
    let mut assigned: Vec<Option<Endpoint>> =
        exits.iter().map(|row| take(&|endpoint| row.mac == Some(endpoint.mac))).collect();
    for (row, endpoint) in exits.iter().zip(&mut assigned).filter(|(_, endpoint)| endpoint.is_none()) {
        let addresses = inside.addresses_of(row.index);
        *endpoint = take(&|endpoint| endpoint.addresses.iter().any(|address| addresses.contains(address)));
    }
    let mut open: Vec<_> = assigned.iter_mut().filter(|endpoint| endpoint.is_none()).collect();
    if let ([place], 1) = (open.as_mut_slice(), endpoints.len()) {
        **place = endpoints.pop();
    }
    assigned
}

/// Why a way out can't be enforced.
#[derive(PartialEq, Eq, Debug)]
struct NoEnd {
    problem: String,
    /// It may be just changing.
    unsettled: bool,
}

/// The host-side end of a container's link, and the container side's MAC address.
fn other_end<'a>(row: &LinkRow, host: &'a Snapshot, id: Option<i32>) -> Result<(&'a LinkRow, [u8; 6]), NoEnd> {
    let no = |unsettled, reason: &str| NoEnd { problem: format!("its link {:?} {reason}", row.name), unsettled };
    match row.kind.as_deref() {
        Some("veth") => {}
        Some(kind) => {
            return Err(no(false, &format!("is a {kind}, which has no end on the host; use a bridge network")));
        }
        None => return Err(no(false, "is a device of the host's that was moved in; use a bridge network")),
    }
    let end = row.peer.and_then(|peer| host.links.get(&peer));
    let end = end.filter(|end| {
        end.kind.as_deref() == Some("veth") && end.peer == Some(row.index) && end.peer_netns == id && id.is_some()
    });
    let end = end.ok_or_else(|| no(true, "has its other end in neither this nor the agent's network namespace"))?;
    Ok((end, row.mac.ok_or_else(|| no(false, "has no MAC address"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(index: u32, name: &str, kind: Option<&str>, peer: Option<u32>, peer_netns: Option<i32>) -> LinkRow {
        let mac = Some([2, 0, 0, 0, 0, index as u8]);
        LinkRow {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            peer,
            peer_netns,
            mac,
            ..LinkRow::default()
        }
    }

    fn snapshot(rows: impl IntoIterator<Item = LinkRow>) -> Snapshot {
        Snapshot { links: rows.into_iter().map(|row| (row.index, row)).collect(), ..Snapshot::default() }
    }

    #[test]
    fn ways_out_are_in_an_order_that_the_guest_cannot_change() {
        let inside = snapshot([
            LinkRow { loopback: true, ..row(1, "lo", None, None, None) },
            row(2, "eth10", Some("veth"), Some(20), Some(0)),
            row(3, "eth2", Some("veth"), Some(21), Some(0)),
            row(4, "inner0", Some("veth"), Some(5), None),
            row(5, "inner1", Some("veth"), Some(4), None),
            row(6, "sit0", Some("sit"), None, None),
            row(7, "docker0", Some("bridge"), None, None),
            row(8, "eth0", Some("macvlan"), Some(2), Some(0)),
            row(9, "wlan0", None, None, None),
        ]);
        let names: Vec<_> = exits(&inside).iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["eth0", "eth10", "eth2", "wlan0"]);
    }

    #[test]
    fn a_veth_counts_only_if_both_ends_agree() {
        let inside = row(2, "eth0", Some("veth"), Some(20), Some(0));
        let host = |end| snapshot([end]);
        let good = host(row(20, "veth1", Some("veth"), Some(2), Some(7)));
        assert_eq!(other_end(&inside, &good, Some(7)), Ok((&good.links[&20], [2, 0, 0, 0, 0, 2])));
        for (bad, id) in [
            (host(row(20, "veth1", Some("veth"), Some(2), Some(7))), Some(8)),
            (host(row(20, "veth1", Some("veth"), Some(2), None)), None),
            (host(row(20, "veth1", Some("veth"), Some(3), Some(7))), Some(7)),
            (host(row(20, "veth1", Some("macvlan"), Some(2), Some(7))), Some(7)),
            (host(row(21, "veth1", Some("veth"), Some(2), Some(7))), Some(7)),
        ] {
            let problem = other_end(&inside, &bad, id).expect_err("the ends disagree");
            assert!(problem.unsettled && problem.problem.contains("\"eth0\""), "{problem:?}");
        }
    }

    #[test]
    fn what_has_no_host_side_end_is_told() {
        for (kind, word) in [(Some("macvlan"), "macvlan"), (Some("ipvlan"), "ipvlan"), (None, "moved in")] {
            let (inside, host) = (row(2, "eth0", kind, Some(20), Some(0)), Snapshot::default());
            let problem = other_end(&inside, &host, Some(0)).expect_err("no veth");
            assert!(!problem.unsettled && problem.problem.contains(word), "{problem:?}");
        }
    }
}
