//! Which local links belong to which EC2 instances: containers that Docker runs, and links that `--attach` names.
//! Owns finding them, and telling when to look again; attaches nothing, and knows no control plane.
//!
//! A scan is a full picture of this moment ([`scan`]); [`watch`] says when the last one may be out of date. A link
//! is only reported once both of its ends agree that they are each other's: the host-side veth's peer index and
//! peer namespace must be the container's.
//!
//! A container's MAC and IP addresses are those that Docker gave it: a guest with CAP_NET_ADMIN can change what its own
//! side says, which only tells which of Docker's endpoints an interface is. The other end of a link that a flag names is
//! read by netlink; whom an address belongs to is `resolve`'s to decide. Pass `ip=` and `mac=` where a guest isn't trusted.
//!
//! Containers that share one network namespace are one instance, attached once: the one that the first of them by name
//! claims. Those that claim another are warned about. A link that a flag names is the flag's, whatever its container
//! claims. Host networking, macvlan, ipvlan and devices that were moved in have no host-side link: a warning each.
//!
//! The agent must be in the network namespace that has the host-side links, and see the containers' processes: in a
//! container of its own it needs `--network host --pid host` and privileges.

mod attach_spec;
pub(crate) mod conventions;
pub(crate) mod docker;
mod links;
pub(crate) mod names;
mod netlink;
mod netns;
mod publish;
mod search;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

pub use self::attach_spec::{AttachError, AttachSpec};
use self::links::Ports;
pub use self::publish::{PublishError, PublishSpec};
pub use self::watch::watch;
use crate::model::{EniId, InstanceId, Warning};

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether to ask Docker (`--no-docker` turns it off).
    pub docker: bool,
    /// Docker's address, `unix://...`; none is `DOCKER_HOST`, or else `/var/run/docker.sock`. Only local sockets:
    /// another machine's containers have no links here.
    pub docker_host: Option<String>,
    /// Links that Docker doesn't know.
    pub attach: Vec<AttachSpec>,
    /// Whether somebody wants to know of the strangers among bridges' ports ([`Port::is_stranger`]).
    pub ports: bool,
    /// [`watch`] asks for a scan at least this often. It covers what no event tells (see there).
    pub rescan: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { docker: true, docker_host: None, attach: Vec::new(), ports: false, rescan: Duration::from_secs(10) }
    }
}

/// One attachment point: the host side of one interface of one instance.
///
/// Several may name one instance: its interfaces, or several containers that claim it; each is to be enforced.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Attachment {
    /// The instance.
    pub instance: InstanceId,
    /// Its account, if the container or flag says; else the agent's own.
    pub account: Option<Arc<str>>,
    /// Its region, the same way.
    pub region: Option<Arc<str>>,
    /// The network interface that it stands for, if the container or flag says.
    pub eni: Option<EniId>,
    /// The place among the container's interfaces that lead out of it, by name (`eth0`, `eth1`, ... `eth10`), whether
    /// or not they can be enforced; among `--attach` flags for one instance, their order. For matching to ENIs.
    pub device_index: u32,
    /// The host-side link, which programs are attached to.
    pub link: Link,
    /// The MAC address of the *container's* side; [`OUT_OF_SIGHT`] if that side can't be found any more.
    pub mac: [u8; 6],
    /// The real addresses: of a container those that Docker gave, IPv4 first; of a flag's link its `ip=` ones, then what
    /// is read from the other end (primary IPv4, secondary IPv4, IPv6, link-local IPv6).
    pub addresses: Vec<IpAddr>,
    /// The prefixes that are on-link there, fe80::/64 included.
    pub networks: Vec<IpNet>,
    /// The host's own addresses that the container's default routes over this interface lead to, then those of the
    /// bridge that the host-side link is a port of (or of that link itself, if it is no bridge's). Another next hop
    /// is none: an instance chooses its routes itself, and what is a gateway may serve what groups don't filter.
    pub gateways: Vec<IpAddr>,
    /// Who said that this is an instance.
    pub origin: Origin,
    /// Ports to publish: on the first attachment of a container, empty on its others.
    pub publish: Vec<PublishSpec>,
}

/// Stands for the MAC address of an end that can't be found: no frame has it as its source, so nothing is sent.
pub const OUT_OF_SIGHT: [u8; 6] = [0xff; 6];

/// A link in the agent's own network namespace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct Link {
    /// Its index, which stays until the link goes.
    pub ifindex: u32,
    /// Its name, for people.
    pub name: String,
}

/// Who said that a link belongs to an instance.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "by")]
pub enum Origin {
    /// A container's labels or name.
    Docker {
        /// Its full id.
        container: String,
        /// Its name.
        name: String,
        /// Whose convention it follows: `sg-agent`, `LocalEmu`, ...
        convention: &'static str,
    },
    /// `--attach`.
    Flag,
}

/// What a scan found. An instance that isn't here has no link to enforce anything on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Discovered {
    /// By instance, device index and link; no link twice.
    pub attachments: Vec<Attachment>,
    /// What can't be enforced, or was left out, and why; sorted.
    pub warnings: Vec<Warning>,
    /// The containers that claim to be instances, by id, whether or not their links were found.
    pub containers: BTreeSet<String>,
    /// The indices of all links in the agent's own network namespace.
    pub links: BTreeSet<u32>,
    /// Those of them that have addresses, by which the host is reached.
    pub host_links: Vec<HostLink>,
    /// Those of them that are a bridge's ports, if [`Options::ports`] asks.
    pub ports: Vec<Port>,
    /// The interfaces that Docker gave to containers, and no link was found for: what each would be, without its link.
    #[serde(skip)]
    pub missing: Vec<Attachment>,
}

/// A bridge's port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Port {
    /// The link.
    pub link: Link,
    /// The bridge's name.
    pub bridge: String,
    /// Whether it is known to be no instance's: a running container's that claims none, a link that no container can be
    /// behind (a tap, hardware), or, where Docker isn't asked, one that no flag names. A veth whose other end is in no
    /// running container may be that of one which is just being started.
    pub is_stranger: bool,
}

/// A link by which this host is reached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct HostLink {
    /// The link.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether its frames have Ethernet headers; loopback's have.
    pub is_ethernet: bool,
    /// Whether it is a card with a driver, or what a VM has for one: nothing that the kernel makes up.
    pub is_hardware: bool,
}

impl Discovered {
    /// The same where there is no last picture, but `earlier` links, which an agent before this one enforced, with the MAC
    /// addresses that it knew: whose other end is gone while a container misses an interface stays that container's. Which
    /// of several it is matters little, as all are denied everything.
    pub fn find_hidden(&mut self, mut earlier: BTreeMap<Link, Option<[u8; 6]>>) {
        earlier.retain(|link, _| self.links.contains(&link.ifindex));
        earlier.retain(|link, _| self.attachments.iter().all(|attachment| attachment.link != *link));
        let mut hidden = Self { containers: self.containers.clone(), links: self.links.clone(), ..Self::default() };
        let mut missing = self.missing.clone();
        for is_it in [(|known, mac| known == Some(mac)) as fn(Option<[u8; 6]>, [u8; 6]) -> bool, |known, _| {
            known.is_none_or(|known| known == OUT_OF_SIGHT)
        }] {
            missing.retain_mut(|attachment| {
                let found = earlier.iter().find(|&(_, &known)| is_it(known, attachment.mac));
                let Some(link) = found.map(|(link, _)| link.clone()) else { return true };
                earlier.remove(&link);
                hidden.attachments.push(Attachment { link, ..attachment.clone() });
                false
            });
        }
        self.keep_hidden(hidden);
    }

    /// Keeps those links of the last picture whose container still runs, but whose other end isn't found in it any
    /// more: an instance that moves its end to where nobody sees it must not be rid of its rules by that.
    pub fn keep_hidden(&mut self, last: Self) {
        let found: BTreeSet<u32> = self.attachments.iter().map(|attachment| attachment.link.ifindex).collect();
        for mut attachment in last.attachments {
            let Origin::Docker { container, name, .. } = &attachment.origin else { continue };
            let is_there = self.containers.contains(container) && self.links.contains(&attachment.link.ifindex);
            if !is_there || found.contains(&attachment.link.ifindex) {
                continue;
            }
            let problem = format!(
                "the other end of its link {:?} can't be found: it is denied everything until it is",
                attachment.link.name
            );
            self.warnings.push(Warning { subject: docker::subject(name), problem });
            attachment.mac = OUT_OF_SIGHT;
            attachment.addresses.clear();
            self.attachments.push(attachment);
        }
        self.warnings.sort();
        self.attachments.sort_by_key(|a| (a.instance.clone(), a.device_index, a.link.ifindex));
    }
}

/// Why there is no full picture. The last one stays valid: never take this for 'no containers'.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// Docker doesn't answer.
    #[error("can't ask docker at {endpoint:?}: {cause}; start it, set DOCKER_HOST, or leave it out with --no-docker")]
    Docker {
        /// Where it was looked for.
        endpoint: String,
        /// What happened.
        cause: Box<bollard::errors::Error>,
        /// What `--attach` names, which is complete without Docker. To be merged with the last picture's
        /// [`Origin::Docker`] attachments.
        attached: Box<Discovered>,
    },
    /// The kernel doesn't tell.
    #[error("can't {action}: {cause}; it needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN)")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// What happened.
        cause: io::Error,
    },
}

/// Looks once.
///
/// # Errors
/// See [`DiscoveryError`]. A container that stops meanwhile is none: it just isn't in the result.
pub async fn scan(options: &Options) -> Result<Discovered, DiscoveryError> {
    let (mut running, mut failure) = (docker::Running::default(), None);
    if options.docker {
        match docker::running(options.docker_host.as_deref(), options.ports).await {
            Ok(seen) => running = seen,
            Err(failed) => failure = Some(failed),
        }
    }
    let docker::Running { claimed, others, mut warnings } = running;
    let ports = match (options.ports, options.docker) {
        (false, _) => Ports::Unasked,
        (true, true) => Ports::Others(others),
        (true, false) => Ports::Named,
    };
    let mut discovered = links::resolve(claimed, ports, options.attach.clone()).await?;
    discovered.warnings.append(&mut warnings);
    discovered.warnings.sort();
    discovered.warnings.dedup();
    match failure {
        None => Ok(discovered),
        Some(docker::Failure { endpoint, cause }) => {
            Err(DiscoveryError::Docker { endpoint, cause: Box::new(cause), attached: Box::new(discovered) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn attachment(container: &str, mac: [u8; 6], link: Link) -> Attachment {
        Attachment {
            instance: InstanceId::from("i-1"),
            account: None,
            region: None,
            eni: None,
            device_index: 0,
            link,
            mac,
            addresses: vec![IpAddr::from([10, 0, 0, 1])],
            networks: Vec::new(),
            gateways: Vec::new(),
            origin: Origin::Docker { container: container.into(), name: container.into(), convention: "sg-agent" },
            publish: Vec::new(),
        }
    }

    fn link(ifindex: u32) -> Link {
        Link { ifindex, name: format!("veth{ifindex}") }
    }

    /// Containers `a` and `b` run, `missing` have no link, and the links 1 to 5 are there.
    fn found_hidden(missing: &[(&str, [u8; 6])], earlier: &[(u32, Option<[u8; 6]>)]) -> Vec<(u32, [u8; 6])> {
        let none = || Link { ifindex: 0, name: String::new() };
        let mut discovered = Discovered {
            containers: ["a", "b"].map(str::to_owned).into(),
            links: (1..=5).collect(),
            attachments: vec![attachment("b", [9; 6], link(5))],
            missing: missing.iter().map(|&(container, mac)| attachment(container, mac, none())).collect(),
            ..Discovered::default()
        };
        discovered.find_hidden(earlier.iter().map(|&(index, mac)| (link(index), mac)).collect());
        let hidden = discovered.attachments.iter().filter(|attachment| attachment.link.ifindex != 5);
        assert_eq!(hidden.clone().count(), discovered.warnings.len(), "each is told");
        assert!(hidden.clone().all(|attachment| attachment.addresses.is_empty()));
        hidden.map(|attachment| (attachment.link.ifindex, attachment.mac)).collect()
    }

    #[test]
    fn what_an_earlier_agent_enforced_and_is_out_of_sight_is_denied_everything() {
        let a = [("a", MAC)];
        assert_eq!(found_hidden(&a, &[(1, Some([7; 6])), (2, Some(MAC))]), [(2, OUT_OF_SIGHT)], "by its address");
        assert_eq!(
            found_hidden(&a, &[(1, Some([7; 6])), (2, Some(OUT_OF_SIGHT))]),
            [(2, OUT_OF_SIGHT)],
            "hidden before"
        );
        assert_eq!(found_hidden(&a, &[(3, None)]), [(3, OUT_OF_SIGHT)], "of another layout");
        assert_eq!(
            found_hidden(&[], &[(1, Some(MAC)), (2, None)]),
            [],
            "no container misses anything: a flag that is gone"
        );
        assert_eq!(found_hidden(&a, &[(1, Some([7; 6]))]), [], "another's");
        assert_eq!(found_hidden(&a, &[(5, Some(MAC)), (6, Some(MAC))]), [], "attached, and gone");
        let both = found_hidden(&[("a", MAC), ("b", [8; 6])], &[(1, None), (2, Some(MAC))]);
        assert_eq!(both, [(1, OUT_OF_SIGHT), (2, OUT_OF_SIGHT)]);
    }
}
