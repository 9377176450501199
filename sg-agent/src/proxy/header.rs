//! The PROXY protocol: who the client is behind a balancer that is trusted, and telling the instance. Knows whom to trust
//! by address only.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use proxy_header::{Error, ParseConfig, ProxiedAddress, ProxyHeader};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

/// How long a balancer may take to say who its client is. It sends that first of all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a header with everything that a balancer adds to it.
const LONGEST: usize = 4_096;

/// What a balancer said.
#[derive(Debug)]
pub struct Introduction {
    /// Its client; the balancer itself where it speaks for nobody (a health check).
    pub client: SocketAddr,
    /// What came behind the header, which is the instance's.
    pub rest: Vec<u8>,
}

/// Why there is no client to judge.
#[derive(Debug, thiserror::Error)]
pub enum Unintroduced {
    /// It isn't the PROXY protocol.
    #[error("a trusted balancer sends no PROXY header; leave it out of --trust-proxy, or have it send one")]
    Garbage,
    /// There is no end of it.
    #[error("a PROXY header of more than {LONGEST} bytes")]
    TooLong,
    /// Nothing more came.
    #[error("the PROXY header did not come within {PATIENCE:?}")]
    Late,
    /// The connection failed, or ended in the middle.
    #[error("the connection ended before the PROXY header did")]
    Broken(#[from] io::Error),
}

/// Whether a peer may say who its client is.
pub fn is_trusted(trusted: &[IpNet], peer: IpAddr) -> bool {
    let peer = peer.to_canonical();
    trusted.iter().any(|network| network.contains(&peer))
}

/// Reads a trusted balancer's header, of version 1 or 2.
pub async fn read(stream: &mut TcpStream, balancer: SocketAddr) -> Result<Introduction, Unintroduced> {
    let reading = async {
        let mut bytes = Vec::with_capacity(256);
        loop {
            if stream.read_buf(&mut bytes).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
            match ProxyHeader::parse(&bytes, config) {
                Ok((header, length)) => {
                    let client = header.proxied_address().map_or(balancer, |proxied| proxied.source);
                    return Ok(Introduction { client, rest: bytes.split_off(length) });
                }
                Err(Error::BufferTooShort) if bytes.len() >= LONGEST => return Err(Unintroduced::TooLong),
                Err(Error::BufferTooShort) => {}
                Err(_) => return Err(Unintroduced::Garbage),
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.unwrap_or(Err(Unintroduced::Late))
}

/// The header of version 2 that tells the instance of a client, and where it connected to.
pub fn write(client: SocketAddr, at: SocketAddr) -> Vec<u8> {
    let (client, at) = (canonical(client), canonical(at));
    let header = if client.is_ipv4() == at.is_ipv4() {
        ProxyHeader::with_address(ProxiedAddress::stream(client, at))
    } else {
        // A balancer that took an IPv6 client in by IPv4, or the other way round: one header has one family.
        ProxyHeader::with_address(ProxiedAddress::stream(mapped(client), mapped(at)))
    };
    let mut bytes = Vec::with_capacity(64);
    // Only a header with more additions than 64 KiB can't be written.
    let _ = header.encode_v2(&mut bytes);
    bytes
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn mapped(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    SocketAddr::new(ip.into(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for (client, at) in [
            ("203.0.113.9:40000", "192.0.2.1:80"),
            ("[2001:db8::9]:40000", "[2001:db8::1]:80"),
            ("[2001:db8::9]:40000", "192.0.2.1:80"),
            ("[::ffff:203.0.113.9]:40000", "[::ffff:192.0.2.1]:80"),
        ] {
            let (client, at): (SocketAddr, SocketAddr) = (client.parse().unwrap(), at.parse().unwrap());
            let bytes = write(client, at);
            let (header, length) = ProxyHeader::parse(&bytes, ParseConfig::default()).unwrap();
            assert_eq!(length, bytes.len());
            let proxied = header.proxied_address().expect("a client");
            assert_eq!(canonical(proxied.source), canonical(client));
            assert_eq!(canonical(proxied.destination), canonical(at));
        }
    }

    #[test]
    fn trust_is_by_network() {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        assert!(is_trusted(&trusted, "10.1.2.3".parse().unwrap()));
        assert!(is_trusted(&trusted, "::ffff:10.1.2.3".parse().unwrap()));
        assert!(is_trusted(&trusted, "2001:db8::7".parse().unwrap()));
        assert!(!is_trusted(&trusted, "11.1.2.3".parse().unwrap()));
        assert!(!is_trusted(&[], "10.1.2.3".parse().unwrap()));
    }
}
