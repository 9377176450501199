//! The services that neither groups nor network ACLs filter (SG-4.1), and what stands for them on Docker.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use ipnet::Ipv4Net;
use sg_common::packet::{TCP, UDP};

/// An address, protocol and port that instances may always talk to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Service {
    /// The address.
    pub address: IpAddr,
    /// TCP or UDP, as its IANA number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// `ADDRESS:PORT/PROTOCOL` that can't be read.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a service; write it as 192.0.2.53:53/udp or [2001:db8::53]:53/tcp")]
pub struct InvalidService(String);

impl FromStr for Service {
    type Err = InvalidService;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidService(text.into());
        let (socket, protocol) = text.rsplit_once('/').ok_or_else(invalid)?;
        let socket: SocketAddr = socket.parse().map_err(|_| invalid())?;
        let protocol = match protocol {
            "tcp" => TCP,
            "udp" => UDP,
            _ => return Err(invalid()),
        };
        Ok(Self { address: socket.ip(), protocol, port: socket.port() })
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.protocol == TCP { "tcp" } else { "udp" };
        write!(f, "{}/{protocol}", SocketAddr::new(self.address, self.port))
    }
}

/// What AWS serves at fixed addresses: DNS, instance metadata, ECS task metadata, EKS Pod Identity, Windows
/// activation, time.
const AWS: &[&str] = &[
    "169.254.169.253:53/udp",
    "169.254.169.253:53/tcp",
    "[fd00:ec2::253]:53/udp",
    "[fd00:ec2::253]:53/tcp",
    "169.254.169.254:80/tcp",
    "[fd00:ec2::254]:80/tcp",
    "169.254.170.2:80/tcp",
    "169.254.170.23:80/tcp",
    "[fd00:ec2::23]:80/tcp",
    "169.254.169.250:1688/tcp",
    "169.254.169.251:1688/tcp",
    "169.254.169.123:123/udp",
    "[fd00:ec2::123]:123/udp",
];

impl Service {
    /// AWS's own, and the resolvers to which Docker's embedded DNS passes a container's questions on, from within the
    /// container's namespace: those of the host's `resolv.conf`.
    pub fn defaults(resolv_conf: &Path) -> Vec<Self> {
        let aws = AWS.iter().map(|service| service.parse().expect("a literal service"));
        let text = std::fs::read_to_string(resolv_conf).unwrap_or_default();
        let resolvers = text
            .lines()
            .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok())
            .filter(|address| !address.is_loopback())
            .flat_map(Self::dns);
        aws.chain(resolvers).collect()
    }

    /// Amazon's DNS at the base of a VPC's network plus two.
    pub fn of_vpc(network: &Ipv4Net) -> Vec<Self> {
        let base = u32::from(network.network());
        let dns = base.checked_add(2).map(Ipv4Addr::from).filter(|address| network.contains(address));
        dns.into_iter().flat_map(|address| Self::dns(address.into())).collect()
    }

    /// DNS and DHCP of a bridge's gateway, which stands for the VPC's router.
    pub fn of_gateway(address: IpAddr) -> impl Iterator<Item = Self> {
        let dhcp = Self { address, protocol: UDP, port: if address.is_ipv4() { 67 } else { 547 } };
        Self::dns(address).into_iter().chain([dhcp])
    }

    fn dns(address: IpAddr) -> [Self; 2] {
        [UDP, TCP].map(|protocol| Self { address, protocol, port: 53 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_read_back() {
        for text in AWS {
            assert_eq!(text.parse::<Service>().unwrap().to_string(), *text);
        }
    }

    #[test]
    fn a_vpc_s_dns_is_at_its_base_plus_two() {
        let of = |network: &str| {
            let services = Service::of_vpc(&network.parse().unwrap());
            services.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of("10.20.0.0/16"), ["10.20.0.2:53/udp", "10.20.0.2:53/tcp"]);
        assert!(of("10.20.0.0/31").is_empty());
    }

    #[test]
    fn what_is_no_service_is_named() {
        for text in ["", "192.0.2.53", "192.0.2.53:53", "192.0.2.53:53/icmp", "192.0.2.53:70000/tcp", "dns:53/udp"] {
            let error = text.parse::<Service>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")), "{error}");
        }
    }
}
