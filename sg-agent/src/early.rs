//! Early drop: which links and which sockets the programs of published ports watch (`--early-drop`). Attaches and writes
//! nothing; that is `apply`'s.
//!
//! What isn't watched is left to the proxy, which judges every connection anyway. So this never decides who gets
//! through, only when a denied client hears of it.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use sg_common::abi::PublishedKey;

use crate::apply::{Judged, Snapshot, Sockets};
use crate::discovery::HostLink;
use crate::model::Warning;
use crate::proxy::{Deny, Listening, Place};

/// `--early-drop`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum EarlyDrop {
    /// The links by which published ports are reached.
    #[default]
    Auto,
    /// None.
    Off,
    /// These.
    Links(Vec<String>),
}

impl FromStr for EarlyDrop {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Self::Auto,
            "off" => Self::Off,
            names => Self::Links(names.split(',').map(|name| name.trim().to_owned()).collect()),
        })
    }
}

impl EarlyDrop {
    /// The links to watch, of those that the host is reached by, while these sockets are listened on.
    ///
    /// The host answers for each of its addresses on each of its links, so that a socket on any other address than
    /// loopback's is reached by all of them; from the host itself it is reached by loopback.
    pub fn links(&self, host: &[HostLink], sockets: &[Listening]) -> (Vec<HostLink>, Vec<Warning>) {
        if sockets.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let is_local = sockets.iter().all(|socket| socket.at.ip().is_loopback());
        let is_loopback = |link: &&HostLink| link.addresses.iter().any(IpAddr::is_loopback);
        match self {
            Self::Off => (Vec::new(), Vec::new()),
            Self::Auto => {
                let reached = host.iter().filter(|link| link.is_ethernet && (!is_local || is_loopback(link)));
                (reached.cloned().collect(), Vec::new())
            }
            Self::Links(names) => named(names, host),
        }
    }
}

fn named(names: &[String], host: &[HostLink]) -> (Vec<HostLink>, Vec<Warning>) {
    let (mut links, mut warnings) = (Vec::new(), Vec::new());
    for name in names {
        let problem = match host.iter().find(|host| host.link.name == *name) {
            Some(found) if found.is_ethernet => {
                links.push(found.clone());
                continue;
            }
            Some(_) => {
                "its frames have no Ethernet headers: denied clients who come by it are reset after their handshake"
            }
            None => "there is no such link with an address yet",
        };
        warnings.push(Warning { subject: format!("--early-drop {name}"), problem: problem.to_owned() });
    }
    (links, warnings)
}

/// Every address at which a listening socket is reached, and how it is judged there. A socket on all addresses is
/// reached by those of the host alone: what is forwarded to others is none of its.
pub fn sockets(listening: &[Listening], host: &[HostLink], snapshot: &Snapshot, deny: Deny) -> Sockets {
    let mut sockets = Sockets::new();
    for Listening { at, is_dual_stack, published } in listening {
        let link = Place::of(snapshot, published).map_or(0, |place| place.ifindex);
        for address in addresses(*at, *is_dual_stack, host) {
            let protocol = published.transport.number();
            let key = PublishedKey { address: address.into(), port: at.port(), protocol, pad: 0 };
            // A socket on one address is more than one on all.
            if !at.ip().is_unspecified() || !sockets.contains_key(&key) {
                sockets.insert(key, (published.clone(), Judged { link, deny }));
            }
        }
    }
    sockets
}

fn addresses(at: SocketAddr, is_dual_stack: bool, host: &[HostLink]) -> Vec<IpAddr> {
    if !at.ip().is_unspecified() {
        return vec![at.ip()];
    }
    let own = host.iter().flat_map(|link| &link.addresses).copied();
    own.filter(|address| is_dual_stack || address.is_ipv4() == at.is_ipv4()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Link;

    fn link(ifindex: u32, name: &str, addresses: &[&str]) -> HostLink {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let link = Link { ifindex, name: name.into() };
        HostLink { link, addresses, is_ethernet: name != "tun0", is_hardware: name == "eth0" }
    }

    fn host() -> Vec<HostLink> {
        vec![
            link(1, "lo", &["127.0.0.1", "::1"]),
            link(2, "eth0", &["192.0.2.1", "2001:db8::1"]),
            link(3, "br0", &["10.0.1.1"]),
            link(4, "tun0", &["10.9.0.1"]),
        ]
    }

    fn listening(at: &str, is_dual_stack: bool) -> Listening {
        let published = "i-1:80=8080".parse::<crate::proxy::PublishSpec>().unwrap().into();
        Listening { at: at.parse().unwrap(), is_dual_stack, published }
    }

    fn names(choice: &str, sockets: &[&str]) -> Vec<String> {
        let sockets: Vec<_> = sockets.iter().map(|at| listening(at, false)).collect();
        let choice: EarlyDrop = choice.parse().unwrap();
        choice.links(&host(), &sockets).0.into_iter().map(|host| host.link.name).collect()
    }

    #[test]
    fn links_are_those_by_which_the_sockets_are_reached() {
        assert_eq!(names("auto", &["127.0.0.1:80", "[::1]:80"]), ["lo"]);
        assert_eq!(names("auto", &["127.0.0.1:80", "10.0.1.1:80"]), ["lo", "eth0", "br0"]);
        assert_eq!(names("auto", &["0.0.0.0:80"]), ["lo", "eth0", "br0"]);
        assert_eq!(names("auto", &[]), Vec::<String>::new());
        assert_eq!(names("off", &["0.0.0.0:80"]), Vec::<String>::new());
        assert_eq!(names("br0, eth0", &["127.0.0.1:80"]), ["br0", "eth0"]);
    }

    #[test]
    fn links_that_cannot_be_watched_are_told() {
        let (links, warnings) =
            EarlyDrop::Links(vec!["tun0".into(), "eth7".into()]).links(&host(), &[listening("0.0.0.0:80", false)]);
        assert_eq!(links, []);
        let text: Vec<_> = warnings.iter().map(ToString::to_string).collect();
        assert!(text[0].contains("tun0") && text[0].contains("no Ethernet"), "{text:?}");
        assert!(text[1].contains("eth7") && text[1].contains("no such link"), "{text:?}");
    }

    #[test]
    fn a_socket_on_all_addresses_is_reached_by_the_hosts_own() {
        let reached = |at, is_dual_stack| {
            let sockets = sockets(&[listening(at, is_dual_stack)], &host(), &Snapshot::default(), Deny::Drop);
            sockets.keys().map(|key| IpAddr::from(key.address).to_string()).collect::<Vec<_>>()
        };
        let mut all = reached("[::]:80", true);
        all.sort();
        assert_eq!(all, ["10.0.1.1", "10.9.0.1", "127.0.0.1", "192.0.2.1", "2001:db8::1", "::1"]);
        let mut six = reached("[::]:80", false);
        six.sort();
        assert_eq!(six, ["2001:db8::1", "::1"]);
        assert_eq!(reached("192.0.2.1:80", false), ["192.0.2.1"]);
    }
}
