//! Which ports are published where: what the user writes, and what is wanted of the proxy. Opens nothing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use sg_common::packet::{TCP, UDP};

use crate::model::InstanceId;

/// Where a port is published when nothing else is said: for this host's own clients only.
pub const DEFAULT_BIND: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// What a published port carries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, serde::Serialize)]
pub enum Transport {
    /// Connections.
    #[default]
    Tcp,
    /// Datagrams.
    Udp,
}

impl Transport {
    /// Its number in packets and rules.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// Takes `/tcp` or `/udp` off the end of a published port's text; without either it is TCP.
    ///
    /// # Errors
    /// What follows the slash.
    pub fn split(text: &str) -> Result<(&str, Self), &str> {
        match text.rsplit_once('/') {
            None => Ok((text, Self::Tcp)),
            Some((port, "tcp")) => Ok((port, Self::Tcp)),
            Some((port, "udp")) => Ok((port, Self::Udp)),
            Some((_, other)) => Err(other),
        }
    }

    /// What is written behind a port.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Udp => "/udp",
        }
    }
}

/// `INSTANCE_ID:[ADDR:]HOST_PORT=PORT[/udp]`, as `--publish` takes it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PublishSpec {
    /// Whose port.
    pub instance: InstanceId,
    /// The one address of the host to listen on; [`DEFAULT_BIND`] where none is given.
    pub bind: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The instance's port.
    pub port: u16,
    /// What it carries.
    pub transport: Transport,
}

/// A published port that can't be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "'{text}' does not publish a port: {problem}; write it as {form}, or with the host's address as {with_address}"
)]
pub struct InvalidPublish {
    text: String,
    problem: String,
    form: &'static str,
    with_address: &'static str,
}

impl PublishSpec {
    /// Reads `[ADDR:]HOST_PORT=PORT[/udp]`, as a container's label has it, whose instance is known.
    ///
    /// # Errors
    /// What is wrong with it, and how it is to be written.
    pub fn of(instance: InstanceId, text: &str) -> Result<Self, InvalidPublish> {
        let invalid = |problem| InvalidPublish {
            text: text.into(),
            problem,
            form: "32022=22",
            with_address: "192.0.2.1:32022=22 or [2001:db8::1]:32022=22",
        };
        Self::read(instance, text).map_err(invalid)
    }

    fn read(instance: InstanceId, text: &str) -> Result<Self, String> {
        let (host, inside) = text.split_once('=').ok_or("there is no '=' before the instance's port")?;
        let (address, host_port) = match host.rsplit_once(':') {
            Some((address, port)) => (Some(address), port),
            None => (None, host),
        };
        let bind = address.map(read_address).transpose()?;
        let host_port = read_port("host port", host_port)?;
        let split = Transport::split(inside);
        let (inside, transport) = split.map_err(|other| format!("'{other}' is neither tcp nor udp"))?;
        let port = read_port("instance's port", inside)?;
        Ok(Self { instance, bind, host_port, port, transport })
    }
}

fn read_address(text: &str) -> Result<IpAddr, String> {
    // Without brackets an IPv6 address and a port can't be told apart.
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(inner) => inner.parse().map(IpAddr::V6).map_err(|_| format!("'{inner}' is not an IPv6 address")),
        None => text.parse().map(IpAddr::V4).map_err(|_| format!("'{text}' is not an address of this host")),
    }
}

fn read_port(what: &str, text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("the {what} '{text}' is not a number from 1 to 65535")),
    }
}

impl FromStr for PublishSpec {
    type Err = InvalidPublish;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let read = || {
            let (instance, rest) = text.split_once(':').ok_or("there is no ':' after the instance's id")?;
            if instance.is_empty() {
                return Err("the instance's id is missing".into());
            }
            Self::read(InstanceId::from(instance), rest)
        };
        read().map_err(|problem: String| InvalidPublish {
            text: text.into(),
            problem,
            form: "i-0123456789abcdef0:32022=22",
            with_address: "i-0123456789abcdef0:192.0.2.1:32022=22 or i-0123456789abcdef0:[2001:db8::1]:32022=22",
        })
    }
}

/// One port of an instance that the proxy listens for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Published {
    /// Whose port.
    pub instance: InstanceId,
    /// The host's addresses to listen on.
    pub bind: Vec<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The instance's port.
    pub port: u16,
    /// What it carries.
    pub transport: Transport,
}

impl Published {
    /// The sockets to listen on.
    pub fn sockets(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.bind.iter().map(|&address| SocketAddr::new(address, self.host_port))
    }
}

impl From<PublishSpec> for Published {
    fn from(spec: PublishSpec) -> Self {
        let bind = spec.bind.map_or_else(|| DEFAULT_BIND.to_vec(), |address| vec![address]);
        Self { instance: spec.instance, bind, host_port: spec.host_port, port: spec.port, transport: spec.transport }
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}={}{}", self.instance, self.host_port, self.port, self.transport.suffix())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let read = |text: &str| Published::from(text.parse::<PublishSpec>().unwrap());
        let plain = read("i-1:32022=22");
        assert_eq!((plain.host_port, plain.port), (32022, 22));
        assert_eq!(plain.instance, InstanceId::from("i-1"));
        assert_eq!(plain.bind, DEFAULT_BIND);
        assert_eq!(plain.transport, Transport::Tcp);
        assert_eq!(read("i-1:32022=22/tcp"), plain);
        let udp = read("i-1:5353=53/udp");
        assert_eq!((udp.transport, udp.port, udp.to_string().as_str()), (Transport::Udp, 53, "i-1:5353=53/udp"));
        assert_eq!(read("i-1:0.0.0.0:80=8080").bind, [IpAddr::V4(Ipv4Addr::UNSPECIFIED)]);
        let six = read("i-1:[2001:db8::1]:80=8080");
        assert_eq!(six.sockets().map(|socket| socket.to_string()).collect::<Vec<_>>(), ["[2001:db8::1]:80"]);
        assert_eq!(PublishSpec::of(InstanceId::from("i-1"), "32022=22").unwrap(), "i-1:32022=22".parse().unwrap());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "no ':'"),
            ("i-1", "no ':'"),
            (":32022=22", "id is missing"),
            ("i-1:32022", "no '='"),
            ("i-1:32022=ssh", "'ssh'"),
            ("i-1:32022=", "instance's port ''"),
            ("i-1:32022=22/sctp", "'sctp' is neither tcp nor udp"),
            ("i-1:0=22", "host port '0'"),
            ("i-1:70000=22", "'70000'"),
            ("i-1:-1=22", "'-1'"),
            ("i-1:localhost:80=80", "'localhost' is not an address"),
            ("i-1:::1:80=80", "'::1' is not an address"),
            ("i-1:[192.0.2.1]:80=80", "'192.0.2.1' is not an IPv6 address"),
            ("i-1:80=80=80", "'80=80'"),
        ] {
            let error = text.parse::<PublishSpec>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains(named), "{text}: {error}");
            assert!(error.contains("i-0123456789abcdef0:32022=22"), "{error}");
        }
        let error = PublishSpec::of(InstanceId::from("i-1"), "22").unwrap_err().to_string();
        assert!(error.contains("write it as 32022=22"), "{error}");
    }
}
