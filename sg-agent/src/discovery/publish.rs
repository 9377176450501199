//! `HOST_PORT=PORT[/udp]`: a host port that stands for an instance's port. Owns the syntax; listens to nothing.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::names::quoted;
use crate::proxy::Transport;

/// One published port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct PublishSpec {
    /// The port that is listened on.
    pub host_port: u16,
    /// The instance's port, which its rules are about.
    pub port: u16,
    /// What it carries.
    pub transport: Transport,
}

/// Why a text is no [`PublishSpec`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct PublishError(String);

impl FromStr for PublishSpec {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let form = || PublishError(format!("{} is not HOST_PORT=PORT, as 32022=22 or 5353=53/udp", quoted(text)));
        let (host_port, port) = text.trim().split_once('=').ok_or_else(form)?;
        let (port, transport) = Transport::split(port).map_err(|_| form())?;
        let port_of = |text: &str| text.trim().parse().ok().filter(|port: &u16| *port != 0).ok_or_else(form);
        Ok(Self { host_port: port_of(host_port)?, port: port_of(port)?, transport })
    }
}

impl fmt::Display for PublishSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}/{}", self.host_port, self.port, self.transport.name())
    }
}

/// A comma-separated list, as the label holds it; no host port twice.
pub(super) fn parse_list(text: &str) -> Result<Vec<PublishSpec>, PublishError> {
    let mut specs: Vec<PublishSpec> = Vec::new();
    for item in text.split(',').filter(|item| !item.trim().is_empty()) {
        let spec: PublishSpec = item.parse()?;
        if specs.iter().any(|other| (other.host_port, other.transport) == (spec.host_port, spec.transport)) {
            return Err(PublishError(format!("host port {} is there twice", spec.host_port)));
        }
        specs.push(spec);
    }
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_parsed_whole_or_not_at_all() {
        let specs = parse_list("32022=22, 8080=80/tcp, 8080=53/udp,").expect("a good list");
        assert_eq!(
            specs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["32022=22/tcp", "8080=80/tcp", "8080=53/udp"]
        );
        assert_eq!(parse_list(""), Ok(Vec::new()));
        for bad in [
            "32022",
            "32022:22",
            "0=22",
            "1=0",
            "65536=1",
            "=22",
            "1=2=3",
            "1=2,1=3",
            "1=2/sctp",
            "1=2/udp,1=3/udp",
            "1=2,x",
        ] {
            assert!(parse_list(bad).is_err(), "{bad:?} was taken");
        }
    }
}
