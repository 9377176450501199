//! Frames, built by what they mean: `tcp(A, B).ports(40000, 22).syn()`. Lengths are right unless a test bends them;
//! checksums are zero, since nothing that is tested looks at them.

mod neighbors;

use std::net::IpAddr;

use sg_common::packet::{ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP};

use crate::cast::Host;

pub use neighbors::{arp, neighbor_advertisement, neighbor_solicitation, redirect, router_advertisement};

/// A packet under construction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The Ethernet source and destination.
    pub macs: ([u8; 6], [u8; 6]),
    /// Tags between the MAC addresses and the ethertype.
    pub tags: Vec<[u8; 4]>,
    /// The source and destination.
    pub addresses: (IpAddr, IpAddr),
    /// The upper-layer protocol.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// IPv6 extension headers: number, and everything behind the first byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// IPv4 options, in whole words.
    pub options: Vec<u8>,
    /// The transport header.
    pub transport: Transport,
    /// What follows it.
    pub payload: Vec<u8>,
    /// IPv4 flags and offset, or IPv6 fragment header; `None` for a whole packet.
    pub fragment: Option<Fragment>,
}

/// Where a fragment belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// The packet's identification.
    pub id: u16,
    /// In units of 8 bytes.
    pub offset: u16,
    /// Whether more follow.
    pub more: bool,
}

/// A transport header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source and destination.
        ports: (u16, u16),
        /// As on the wire.
        flags: u8,
        /// Sequence and acknowledgment number.
        numbers: (u32, u32),
    },
    /// UDP.
    Udp {
        /// Source and destination.
        ports: (u16, u16),
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The four bytes behind the checksum: identifier and sequence number of a query.
        rest: [u8; 4],
    },
    /// None: the payload begins at once.
    None,
}

fn packet(from: Host, to: Host, protocol: u8, transport: Transport) -> Packet {
    Packet {
        macs: (from.mac, to.mac),
        tags: Vec::new(),
        addresses: (from.v4.into(), to.v4.into()),
        protocol,
        hops: 64,
        extensions: Vec::new(),
        options: Vec::new(),
        transport,
        payload: Vec::new(),
        fragment: None,
    }
}

/// A TCP packet from port 40000 to 22 with ACK, in the middle of a connection.
pub fn tcp(from: Host, to: Host) -> Packet {
    packet(from, to, TCP, Transport::Tcp { ports: (40000, 22), flags: ACK, numbers: (1, 0) })
}

/// A UDP datagram from port 40000 to 53.
pub fn udp(from: Host, to: Host) -> Packet {
    packet(from, to, UDP, Transport::Udp { ports: (40000, 53) })
}

/// An ICMP message; identifier 1.
pub fn icmp(from: Host, to: Host, kind: u8, code: u8) -> Packet {
    packet(from, to, ICMP, Transport::Icmp { kind, code, rest: [0, 1, 0, 1] })
}

/// An ICMPv6 message; identifier 1.
pub fn icmpv6(from: Host, to: Host, kind: u8, code: u8) -> Packet {
    packet(from, to, ICMPV6, Transport::Icmp { kind, code, rest: [0, 1, 0, 1] }).v6(from, to)
}

/// A packet of another protocol, with 8 bytes of payload.
pub fn other(from: Host, to: Host, protocol: u8) -> Packet {
    packet(from, to, protocol, Transport::None).payload(8)
}

impl Packet {
    /// The same over IPv6.
    pub fn v6(mut self, from: Host, to: Host) -> Self {
        self.addresses = (from.v6.into(), to.v6.into());
        self
    }

    /// Over the family that `is_v4` says.
    pub fn family(self, is_v4: bool, from: Host, to: Host) -> Self {
        if is_v4 { self } else { self.v6(from, to) }
    }

    /// With these ports: source, destination.
    pub fn ports(mut self, source: u16, destination: u16) -> Self {
        match &mut self.transport {
            Transport::Tcp { ports, .. } | Transport::Udp { ports } => *ports = (source, destination),
            Transport::Icmp { .. } | Transport::None => panic!("protocol {} has no ports", self.protocol),
        }
        self
    }

    /// With this ICMP identifier.
    pub fn id(mut self, id: u16) -> Self {
        match &mut self.transport {
            Transport::Icmp { rest, .. } => rest[..2].copy_from_slice(&id.to_be_bytes()),
            other => panic!("{other:?} has no identifier"),
        }
        self
    }

    /// With these TCP flags and no others.
    pub fn flags(mut self, set: u8) -> Self {
        match &mut self.transport {
            Transport::Tcp { flags, .. } => *flags = set,
            other => panic!("{other:?} has no flags"),
        }
        self
    }

    /// With this TCP sequence number, and this acknowledgment number.
    pub fn numbers(mut self, sequence: u32, acknowledgment: u32) -> Self {
        match &mut self.transport {
            Transport::Tcp { numbers, .. } => *numbers = (sequence, acknowledgment),
            other => panic!("{other:?} has no sequence numbers"),
        }
        self
    }

    /// SYN.
    pub fn syn(self) -> Self {
        self.flags(SYN)
    }

    /// SYN and ACK.
    pub fn syn_ack(self) -> Self {
        self.flags(SYN | ACK)
    }

    /// ACK.
    pub fn ack(self) -> Self {
        self.flags(ACK)
    }

    /// FIN and ACK.
    pub fn fin(self) -> Self {
        self.flags(FIN | ACK)
    }

    /// RST.
    pub fn rst(self) -> Self {
        self.flags(RST)
    }

    /// With so many bytes of payload.
    pub fn payload(mut self, bytes: usize) -> Self {
        self.payload = vec![0x5a; bytes];
        self
    }

    /// With this payload.
    pub fn carrying(mut self, bytes: Vec<u8>) -> Self {
        self.payload = bytes;
        self
    }

    /// From another source address.
    pub fn from_address(mut self, address: &str) -> Self {
        self.addresses.0 = address.parse().expect("an address");
        self
    }

    /// To another destination address.
    pub fn to_address(mut self, address: &str) -> Self {
        self.addresses.1 = address.parse().expect("an address");
        self
    }

    /// From another MAC address.
    pub fn from_mac(mut self, mac: [u8; 6]) -> Self {
        self.macs.0 = mac;
        self
    }

    /// To another MAC address.
    pub fn to_mac(mut self, mac: [u8; 6]) -> Self {
        self.macs.1 = mac;
        self
    }

    /// With this TTL or hop limit.
    pub fn hops(mut self, hops: u8) -> Self {
        self.hops = hops;
        self
    }

    /// With one VLAN tag more, the outermost first.
    pub fn vlan(mut self, ethertype: u16, id: u16) -> Self {
        let ([a, b], [c, d]) = (ethertype.to_be_bytes(), id.to_be_bytes());
        self.tags.push([a, b, c, d]);
        self
    }

    /// With one IPv6 extension header more: its number, and its bytes behind "next header", length included.
    pub fn extension(mut self, number: u8, body: &[u8]) -> Self {
        self.extensions.push((number, body.to_vec()));
        self
    }

    /// Hop-by-hop options: padding.
    pub fn hop_by_hop(self) -> Self {
        self.extension(0, &[0, 1, 4, 0, 0, 0, 0])
    }

    /// Destination options: padding, in two units of 8 bytes.
    pub fn destination_options(self) -> Self {
        self.extension(60, &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// A routing header of this type with so many segments left.
    pub fn routing(self, kind: u8, left: u8) -> Self {
        self.extension(43, &[0, kind, left, 0, 0, 0, 0])
    }

    /// With IPv4 options; `bytes` is a multiple of 4.
    pub fn ipv4_options(mut self, bytes: usize) -> Self {
        assert!(bytes.is_multiple_of(4) && bytes <= 40, "options are whole words, ten at most");
        self.options = vec![1; bytes];
        self
    }

    /// With these IPv4 options, filled up with zeros to whole words.
    pub fn options(mut self, bytes: &[u8]) -> Self {
        self.options = bytes.to_vec();
        self.options.resize(bytes.len().next_multiple_of(4), 0);
        assert!(self.options.len() <= 40, "options are ten words at most");
        self
    }

    /// As a fragment, with all of its bytes: for packets that no honest stack makes.
    pub fn as_fragment(mut self, id: u16, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { id, offset, more });
        self
    }

    /// The answer to it: ends swapped, and for ICMP queries the answer's type. TCP's flags stay.
    pub fn reply(mut self) -> Self {
        self.macs = (self.macs.1, self.macs.0);
        self.addresses = (self.addresses.1, self.addresses.0);
        match &mut self.transport {
            Transport::Tcp { ports, .. } | Transport::Udp { ports } => *ports = (ports.1, ports.0),
            Transport::Icmp { kind, .. } => {
                *kind = match *kind {
                    8 => 0,
                    128 => 129,
                    other => other + 1,
                }
            }
            Transport::None => {}
        }
        self
    }

    /// An ICMP error of this type and code from `from` that quotes this packet to its sender.
    pub fn error(&self, from: Host, to: Host, kind: u8, code: u8) -> Self {
        let quote = self.ip_bytes();
        let error = if self.addresses.0.is_ipv4() { icmp(from, to, kind, code) } else { icmpv6(from, to, kind, code) };
        let header = if self.addresses.0.is_ipv4() { 20 } else { 40 };
        let mut error = error.carrying(quote[..(header + 8).min(quote.len())].to_vec());
        error.addresses.1 = self.addresses.0;
        error.id(0)
    }

    /// The packet cut into fragments of at most `most` bytes of payload each (a multiple of 8).
    pub fn fragments(&self, id: u16, most: usize) -> Vec<Vec<u8>> {
        assert!(most.is_multiple_of(8) && most > 0, "fragments but the last are multiples of 8 bytes");
        let bytes = [self.transport_bytes(), self.payload.clone()].concat();
        let pieces: Vec<&[u8]> = bytes.chunks(most).collect();
        (0..pieces.len())
            .map(|index| {
                let offset = (index * most / 8) as u16;
                let mut piece = self.clone().as_fragment(id, offset, index + 1 < pieces.len());
                piece.transport = Transport::None;
                piece.payload = pieces[index].to_vec();
                piece.frame()
            })
            .collect()
    }

    /// The frame, from its Ethernet header on.
    pub fn frame(&self) -> Vec<u8> {
        let mut frame = [self.macs.1, self.macs.0].concat();
        frame.extend(self.tags.iter().flatten());
        let ethertype: u16 = if self.addresses.0.is_ipv4() { 0x0800 } else { 0x86dd };
        frame.extend(ethertype.to_be_bytes());
        frame.extend(self.ip_bytes());
        frame
    }

    fn ip_bytes(&self) -> Vec<u8> {
        let body = [self.transport_bytes(), self.payload.clone()].concat();
        match self.addresses {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let words = (20 + self.options.len()) / 4;
                let length = (words * 4 + body.len()) as u16;
                let (id, field) = self.fragment.map_or((0, 0x4000), |fragment| {
                    (fragment.id, fragment.offset & 0x1fff | if fragment.more { 0x2000 } else { 0 })
                });
                let mut bytes = vec![0x40 | words as u8, 0];
                bytes.extend(length.to_be_bytes());
                bytes.extend(id.to_be_bytes());
                bytes.extend(field.to_be_bytes());
                bytes.extend([self.hops, self.protocol, 0, 0]);
                bytes.extend(from.octets());
                bytes.extend(to.octets());
                bytes.extend(&self.options);
                bytes.extend(body);
                bytes
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut headers = self.extensions.clone();
                if let Some(fragment) = self.fragment {
                    let field = fragment.offset << 3 | u16::from(fragment.more);
                    let [a, b] = field.to_be_bytes();
                    let [c, d] = fragment.id.to_be_bytes();
                    headers.push((44, vec![0, a, b, 0, 0, c, d]));
                }
                let mut next: Vec<u8> = headers.iter().map(|&(number, _)| number).collect();
                next.push(self.protocol);
                let extensions: Vec<u8> = headers
                    .iter()
                    .zip(&next[1..])
                    .flat_map(|((_, body), &next)| std::iter::once(next).chain(body.iter().copied()))
                    .collect();
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend(((extensions.len() + body.len()) as u16).to_be_bytes());
                bytes.extend([next[0], self.hops]);
                bytes.extend(from.octets());
                bytes.extend(to.octets());
                bytes.extend(extensions);
                bytes.extend(body);
                bytes
            }
            (from, to) => panic!("{from} and {to} are of two families"),
        }
    }

    fn transport_bytes(&self) -> Vec<u8> {
        match self.transport {
            Transport::Tcp { ports, flags, numbers } => {
                let mut bytes = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
                bytes.extend([numbers.0.to_be_bytes(), numbers.1.to_be_bytes()].as_flattened());
                bytes.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes
            }
            Transport::Udp { ports } => {
                let mut bytes = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes
            }
            Transport::Icmp { kind, code, rest } => [&[kind, code, 0, 0], rest.as_slice()].concat(),
            Transport::None => Vec::new(),
        }
    }
}
