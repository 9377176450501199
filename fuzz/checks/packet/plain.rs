//! A second reading of a frame, written for plainness and apart from the data path's: what a verdict is held against.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The data path refuses more (RFC 8200, 4.1 names seven).
const EXTENSIONS: usize = 8;

/// What its fragments share: source, destination, identification and, in IPv4, protocol.
pub type FragmentId = (IpAddr, IpAddr, [u8; 4], u8);
/// A flow from the instance's side: its address, the peer's, protocol, ports, and whether it answers.
pub type Flow = (IpAddr, IpAddr, u8, u16, u16, bool);

/// An IP packet.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// The upper-layer protocol.
    pub protocol: u8,
    /// TCP and UDP: the source port. ICMP: the identifier.
    pub source_port: u16,
    /// TCP and UDP: the destination port. ICMP: type and code.
    pub port: u16,
    /// TTL or hop limit.
    pub hops: u8,
    /// For a first fragment, of which packet.
    pub first: Option<FragmentId>,
    /// For a later fragment, of which packet.
    pub rest: Option<FragmentId>,
}

/// Whether it is an ARP frame.
pub fn is_arp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6])
}

/// Where the packet ends within its frame, by its own lengths.
pub fn end(frame: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(usize::from(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?])));
    match word(12)? {
        0x0800 => Some(14 + word(16)?),
        0x86dd => Some(14 + 40 + word(18)?),
        0x0806 => Some(14 + 28),
        _ => None,
    }
}

/// Reads a frame with an IP packet.
pub fn read(frame: &[u8]) -> Option<Plain> {
    let packet = frame.get(14..end(frame)?)?;
    match frame.get(12..14)? {
        [0x08, 0x00] => read_ipv4(packet),
        [0x86, 0xdd] => read_ipv6(packet),
        _ => None,
    }
}

fn read_ipv4(packet: &[u8]) -> Option<Plain> {
    let ip: &[u8; 20] = packet.first_chunk()?;
    let address = |at: usize| IpAddr::from(Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]));
    let (source, destination, protocol) = (address(12), address(16), ip[9]);
    let id = (source, destination, [ip[4], ip[5], 0, 0], protocol);
    let field = u16::from_be_bytes([ip[6], ip[7]]);
    let is_rest = field & 0x1fff != 0;
    let mut plain = Plain {
        source,
        destination,
        protocol,
        source_port: 0,
        port: 0,
        hops: ip[8],
        first: (!is_rest && field & 0x2000 != 0).then_some(id),
        rest: is_rest.then_some(id),
    };
    plain.ports(packet.get(usize::from(ip[0] & 15) * 4..)?)?;
    Some(plain)
}

fn read_ipv6(packet: &[u8]) -> Option<Plain> {
    let address = |at: usize| Some(IpAddr::from(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?)));
    let (source, destination) = (address(8)?, address(24)?);
    let mut plain = Plain {
        source,
        destination,
        protocol: packet[6],
        source_port: 0,
        port: 0,
        hops: packet[7],
        first: None,
        rest: None,
    };
    let mut at = 40;
    for _ in 0..EXTENSIONS {
        match plain.protocol {
            0 | 43 | 60 => {
                let header = packet.get(at..at + 8)?;
                plain.protocol = header[0];
                at += 8 + 8 * usize::from(header[1]);
            }
            44 => {
                let header = packet.get(at..at + 8)?;
                plain.protocol = header[0];
                at += 8;
                let id = (source, destination, [header[4], header[5], header[6], header[7]], 0);
                let field = u16::from_be_bytes([header[2], header[3]]);
                plain.first = (field & 0xfff9 == 1).then_some(id);
                plain.rest = (field & 0xfff8 != 0).then_some(id);
                if plain.rest.is_some() {
                    return Some(plain);
                }
            }
            _ => break,
        }
    }
    plain.ports(packet.get(at..)?)?;
    Some(plain)
}

impl Plain {
    fn ports(&mut self, transport: &[u8]) -> Option<()> {
        if self.rest.is_some() {
            return Some(());
        }
        let word = |at: usize| Some(u16::from_be_bytes([*transport.get(at)?, *transport.get(at + 1)?]));
        match self.protocol {
            6 | 17 => (self.source_port, self.port) = (word(0)?, word(2)?),
            1 | 58 if self.is_icmp() => (self.source_port, self.port) = (word(4)?, word(0)?),
            _ => {}
        }
        Some(())
    }

    fn is_icmp(&self) -> bool {
        self.protocol == if self.source.is_ipv4() { 1 } else { 58 }
    }

    /// Whether it is an ICMP error.
    pub fn is_error(&self) -> bool {
        let kind = self.port >> 8;
        self.is_icmp() && if self.source.is_ipv4() { matches!(kind, 3 | 4 | 11 | 12) } else { matches!(kind, 1..=4) }
    }

    /// The flow that it is of, the same for both directions; none for ICMP messages that are neither query nor answer.
    /// A query's flow has its kind and code in the place of the peer's port, and who asked beside it.
    pub fn flow(&self, is_egress: bool) -> Option<Flow> {
        let (own, peer) = if is_egress { (self.source, self.destination) } else { (self.destination, self.source) };
        let (own_port, peer_port, asker) = match (self.is_icmp(), is_egress) {
            (true, _) => {
                let (kind, is_answer) = self.query()?;
                (self.source_port, kind << 8 | self.port & 0xff, is_answer != is_egress)
            }
            (false, true) => (self.source_port, self.port, false),
            (false, false) => (self.port, self.source_port, false),
        };
        Some((own, peer, self.protocol, own_port, peer_port, asker))
    }

    /// Whether it begins no flow, whatever allows it.
    pub fn is_answer(&self) -> bool {
        self.is_icmp() && self.query().is_some_and(|(_, is_answer)| is_answer)
    }

    fn query(&self) -> Option<(u16, bool)> {
        match (self.source.is_ipv4(), self.port >> 8) {
            (true, kind @ (8 | 13 | 15 | 17)) => Some((kind, false)),
            (true, 0) => Some((8, true)),
            (true, kind @ (14 | 16 | 18)) => Some((kind - 1, true)),
            (false, 128) => Some((128, false)),
            (false, 129) => Some((128, true)),
            _ => None,
        }
    }
}
