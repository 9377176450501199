//! The Docker networks that stand for VPCs, and which address an interface gets in one. Owns both choices.
//!
//! A network stands for a whole VPC, not for one subnet: in EC2 the subnets of a VPC reach each other, while Docker
//! keeps its networks apart. Where subnets matter, for network ACLs, the programs know them by their addresses.
//! The next planes are for instances with several interfaces in one VPC: Docker joins a container to a network once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

use bollard::errors::Error;
use bollard::models::{Ipam, IpamConfig, Network, NetworkCreateRequest, NetworkInspect};
use bollard::query_parameters::{InspectNetworkOptions, ListNetworksOptionsBuilder};
use ipnet::Ipv4Net;

use super::LaunchError;
use super::engine::{Engine, is_absent};
use crate::discovery::names;
use crate::model::{VpcId, Warning};

/// Which VPC's network it is, and which plane: `VPC/NUMBER`.
const NETWORK: &str = "dev.sg-agent.network";

/// AWS keeps the first four addresses of a subnet and the last for itself.
const RESERVED: usize = 4;

/// A network that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Net {
    pub(super) name: String,
    pub(super) subnet: Ipv4Net,
    /// Why it was made with other addresses than its VPC's, if it was.
    pub(super) refused: Option<String>,
}

/// Networks that a VPC may have on this host: whoever can call CreateVpc would lead the host's own connections to any
/// other into a container (RFC 1918, 6598, 5737).
const PRIVATE: [Ipv4Net; 7] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24),
];

/// VPCs whose networks have other addresses than they have, and what is to be told of it.
#[derive(Debug, Default)]
pub(super) struct Strays(BTreeMap<VpcId, String>);

impl Strays {
    /// Notes which addresses a VPC's first network has.
    pub(super) fn note(&mut self, vpc: &VpcId, cidr: Ipv4Net, net: &Net) {
        if net.subnet.trunc() == cidr.trunc() {
            self.0.remove(vpc);
        } else if net.refused.is_some() || !self.0.contains_key(vpc) {
            let why = net.refused.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            let subnet = net.subnet;
            let problem =
                format!("its network can't be had here: its instances have addresses of {subnet}, not {cidr}{why}");
            self.0.insert(vpc.clone(), problem);
        }
    }

    /// A warning for each of them that an instance is in.
    pub(super) fn warnings(&self, in_use: &BTreeSet<VpcId>) -> Vec<Warning> {
        let strays = self.0.iter().filter(|(vpc, _)| in_use.contains(*vpc));
        strays.map(|(vpc, problem)| Warning { subject: vpc.to_string(), problem: problem.clone() }).collect()
    }
}

impl Engine {
    /// The network of a VPC; made if it isn't there. Callers take turns.
    pub(super) async fn network(&self, vpc: &VpcId, cidr: Option<Ipv4Net>, plane: usize) -> Result<Net, LaunchError> {
        let id = names::id(&vpc.0).map_err(LaunchError::Name)?;
        let key = format!("{id}/{plane}");
        let mut found = self.networks().await?.into_iter();
        if let Some(network) = found.find(|network| label(network) == Some(&key)) {
            return net(network.name, network.ipam);
        }
        let name = if plane == 0 { format!("sg-agent-{id}") } else { format!("sg-agent-{id}-{plane}") };
        let mut refused = None;
        if let Some(cidr) = cidr.filter(|_| plane == 0) {
            match self.add(&name, &key, cidr).await {
                Ok(()) => return Ok(Net { name, subnet: cidr, refused: None }),
                Err(problem) => refused = Some(problem),
            }
        }
        // Docker chooses, but gives out single addresses only in a network that somebody else chose.
        let trial = self.create_network(&name, None).await?;
        let chosen = self.docker.inspect_network(&trial, None::<InspectNetworkOptions>).await;
        self.docker.remove_network(&trial).await?;
        let subnet = net(Some(name.clone()), chosen?.ipam)?.subnet;
        self.add(&name, &key, subnet).await.map_err(|problem| LaunchError::Network { name: name.clone(), problem })?;
        Ok(Net { name, subnet, refused })
    }

    async fn add(&self, name: &str, key: &str, subnet: Ipv4Net) -> Result<(), String> {
        if subnet.prefix_len() > 28 {
            return Err("it is smaller than /28".to_owned());
        }
        if !PRIVATE.iter().any(|network| network.contains(&subnet)) {
            return Err("it is not a private network: this host would lose what is really there".to_owned());
        }
        if let Some(route) = routes().into_iter().find(|route| overlap(*route, subnet)) {
            return Err(format!("this host has a route to {route}"));
        }
        self.create_network(name, Some((key, subnet))).await.map(drop).map_err(|error| error.to_string())
    }

    async fn create_network(&self, name: &str, of: Option<(&str, Ipv4Net)>) -> Result<String, Error> {
        let mut labels = self.marks.labels();
        labels.extend(of.map(|(key, _)| (NETWORK.to_owned(), key.to_owned())));
        let ipam = of.map(|(_, subnet)| {
            let gateway = subnet.hosts().next().map(|first| first.to_string());
            let config = IpamConfig { subnet: Some(subnet.to_string()), gateway, ..IpamConfig::default() };
            Ipam { config: Some(vec![config]), ..Ipam::default() }
        });
        let request = NetworkCreateRequest {
            name: name.to_owned(),
            driver: Some("bridge".to_owned()),
            labels: Some(labels),
            ipam,
            ..NetworkCreateRequest::default()
        };
        Ok(self.docker.create_network(request).await?.id)
    }

    /// This launcher's networks.
    async fn networks(&self) -> Result<Vec<Network>, Error> {
        let filter = HashMap::from([("label", vec![NETWORK])]);
        let options = ListNetworksOptionsBuilder::default().filters(&filter).build();
        let all = self.docker.list_networks(Some(options)).await?;
        let ours = |network: &Network| network.labels.as_ref().is_some_and(|labels| self.marks.are_on(labels));
        Ok(all.into_iter().filter(ours).collect())
    }

    /// Removes the networks of VPCs that no instance is in. Callers take turns with those of [`Engine::network`].
    pub(super) async fn sweep(&self, in_use: &BTreeSet<VpcId>) -> Result<(), Error> {
        for network in self.networks().await? {
            let vpc = label(&network).and_then(|key| key.split('/').next()).unwrap_or_default();
            if in_use.contains(&VpcId::from(vpc)) {
                continue;
            }
            let Some(id) = &network.id else { continue };
            match self.docker.remove_network(id).await {
                Ok(()) => tracing::info!("{}: its network is removed: no instance is in it", vpc.escape_default()),
                // Somebody else's container is in it.
                Err(Error::DockerResponseServerError { status_code: 403, .. }) => {}
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The addresses that an interface may get, the best first: those that the control plane shows, then free ones.
    pub(super) async fn candidates(
        &self,
        net: &Net,
        shown: &[Ipv4Addr],
        taken: &BTreeSet<Ipv4Addr>,
    ) -> Result<Vec<Ipv4Addr>, Error> {
        let inspected = self.docker.inspect_network(&net.name, None::<InspectNetworkOptions>).await?;
        Ok(candidates(net.subnet, shown, taken, &in_network(inspected)))
    }
}

/// The addresses of those who are in a network.
fn in_network(inspected: NetworkInspect) -> BTreeSet<Ipv4Addr> {
    let containers = inspected.containers.unwrap_or_default();
    let nets = containers.into_values().filter_map(|endpoint| endpoint.ipv4_address?.parse::<Ipv4Net>().ok());
    nets.map(|net| net.addr()).collect()
}

/// So many free ones are tried when others are faster.
const FREE: usize = 16;

fn candidates(
    subnet: Ipv4Net,
    shown: &[Ipv4Addr],
    taken: &BTreeSet<Ipv4Addr>,
    used: &BTreeSet<Ipv4Addr>,
) -> Vec<Ipv4Addr> {
    let gateway = subnet.hosts().next();
    let fits = |address: &Ipv4Addr| {
        subnet.contains(address)
            && *address != subnet.network()
            && *address != subnet.broadcast()
            && Some(*address) != gateway
    };
    let mut all: Vec<Ipv4Addr> = shown.iter().copied().filter(fits).collect();
    // From the end, where subnets are the last to be: emulators give out addresses from the beginning.
    let last = u32::from(subnet.broadcast());
    let first = u32::from(subnet.network()) + RESERVED as u32;
    let free = (first..last).rev().map(Ipv4Addr::from);
    let free = free.filter(|address| !taken.contains(address) && !used.contains(address) && !shown.contains(address));
    all.extend(free.take(FREE));
    all
}

fn label(network: &Network) -> Option<&String> {
    network.labels.as_ref()?.get(NETWORK)
}

fn net(name: Option<String>, ipam: Option<Ipam>) -> Result<Net, LaunchError> {
    let configs = ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    let subnet = configs.iter().find_map(|config| config.subnet.as_ref()?.parse().ok());
    let name = name.unwrap_or_default();
    match subnet {
        Some(subnet) => Ok(Net { name, subnet, refused: None }),
        None => Err(LaunchError::Network { name, problem: "it has no IPv4 network".to_owned() }),
    }
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// The networks that this host has routes to, but for the default one. A VPC's network that hides one of them would cut
/// the host off from it.
fn routes() -> Vec<Ipv4Net> {
    parse_routes(&std::fs::read_to_string("/proc/net/route").unwrap_or_default())
}

/// `/proc/net/route`: addresses and masks are hexadecimal, in the machine's byte order (net/ipv4/fib_trie.c).
fn parse_routes(table: &str) -> Vec<Ipv4Net> {
    let address = |text: &str| Some(Ipv4Addr::from(u32::from_str_radix(text, 16).ok()?.to_ne_bytes()));
    let route = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        Ipv4Net::with_netmask(address(words.get(1)?)?, address(words.get(7)?)?).ok()
    };
    table.lines().skip(1).filter_map(route).filter(|route| route.prefix_len() > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn routes_are_read_without_the_default_one() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        if cfg!(target_endian = "little") {
            assert_eq!(parse_routes(table), [net("172.17.0.0/16")]);
        }
        assert_eq!(parse_routes(""), []);
        assert!(overlap(net("172.16.0.0/12"), net("172.17.0.0/16")));
        assert!(overlap(net("172.17.3.0/24"), net("172.17.0.0/16")));
        assert!(!overlap(net("172.17.0.0/16"), net("172.18.0.0/16")));
    }

    #[test]
    fn a_vpc_without_its_own_addresses_is_told_of_until_it_has_them() {
        let vpc = VpcId::from("vpc-1");
        let (in_use, cidr) = (BTreeSet::from([vpc.clone()]), net("10.0.0.0/16"));
        let made = |subnet, refused: Option<&str>| Net {
            name: "sg-agent-vpc-1".to_owned(),
            subnet: net(subnet),
            refused: refused.map(str::to_owned),
        };
        let mut strays = Strays::default();
        strays.note(&vpc, cidr, &made("172.18.0.0/16", Some("it is taken")));
        // The next instance finds it made, and not why it is so.
        strays.note(&vpc, cidr, &made("172.18.0.0/16", None));
        let [warning] = &strays.warnings(&in_use)[..] else { panic!("one: {strays:?}") };
        assert_eq!(
            warning.to_string(),
            "vpc-1: its network can't be had here: its instances have addresses of 172.18.0.0/16, not 10.0.0.0/16 \
             (it is taken)"
        );
        assert_eq!(strays.warnings(&BTreeSet::new()), [], "nobody is in it");
        strays.note(&vpc, cidr, &made("10.0.0.0/16", None));
        assert_eq!(strays.warnings(&in_use), []);
    }

    #[test]
    fn shown_addresses_come_first_and_reserved_ones_never() {
        let address = |last| Ipv4Addr::new(10, 0, 0, last);
        let subnet = net("10.0.0.0/28");
        let shown = [Ipv4Addr::new(10, 94, 1, 2), address(1), address(5), address(0), address(15)];
        let found = candidates(subnet, &shown, &BTreeSet::from([address(14)]), &BTreeSet::from([address(13)]));
        assert_eq!(found[..3], [address(5), address(12), address(11)]);
        assert_eq!(found.last(), Some(&address(4)));
    }
}
