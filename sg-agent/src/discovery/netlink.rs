//! A blocking route-netlink client for one network namespace: the three dumps and the one query that discovery needs.
//! Doesn't interpret what it reads.
//!
//! Framing and attributes are netlink-packet-core's. The messages are read here, and only the attributes that matter,
//! because one attribute of a foreign link that a full parser doesn't know must not hide all the others.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, NlaBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A dump that the kernel marks as inconsistent is asked for again, so many times.
const ATTEMPTS: u32 = 8;

// linux/net_namespace.h; the libc crate hasn't got them.
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// One link, as RTM_GETLINK tells.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct LinkRow {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) loopback: bool,
    /// None if it isn't Ethernet's.
    pub(super) mac: Option<[u8; 6]>,
    /// `veth`, `bridge`, ...; hardware has none.
    pub(super) kind: Option<String>,
    /// IFLA_LINK: a veth's peer, a macvlan's parent.
    pub(super) peer: Option<u32>,
    /// IFLA_LINK_NETNSID: in which other namespace that is; none if in this one.
    pub(super) peer_netns: Option<i32>,
    /// The bridge that it is a port of.
    pub(super) master: Option<u32>,
}

/// One address, as RTM_GETADDR tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct AddressRow {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    /// The on-link prefix: the peer's on a point-to-point link.
    pub(super) prefix: (IpAddr, u8),
    pub(super) secondary: bool,
}

/// The next hop of one default route.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct GatewayRow {
    pub(super) link: u32,
    pub(super) gateway: IpAddr,
}

/// A route-netlink socket. It stays in the namespace in which it was opened.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All links.
    pub(super) fn links(&mut self) -> io::Result<Vec<LinkRow>> {
        Ok(self.dump(libc::RTM_GETLINK, &[0; 16])?.iter().filter_map(|payload| link(payload)).collect())
    }

    /// All addresses that are in use, of both families.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<AddressRow>> {
        Ok(self.dump(libc::RTM_GETADDR, &[0; 8])?.iter().filter_map(|payload| address(payload)).collect())
    }

    /// The next hops of the default routes, of both families and all tables.
    pub(super) fn gateways(&mut self) -> io::Result<Vec<GatewayRow>> {
        Ok(self.dump(libc::RTM_GETROUTE, &[0; 12])?.iter().flat_map(|payload| gateways(payload)).collect())
    }

    /// The number by which this namespace knows another one; none if it never needed one, so no link leads there.
    pub(super) fn netns_id(&mut self, netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let mut body = vec![0; 4];
        body.extend(8u16.to_ne_bytes());
        body.extend(NETNSA_FD.to_ne_bytes());
        body.extend(netns.as_raw_fd().to_ne_bytes());
        self.send(libc::RTM_GETNSID, NLM_F_REQUEST, &body)?;
        let (answers, _) = self.receive(false)?;
        let id = answers
            .first()
            .and_then(|payload| attribute(payload.get(4..)?, NETNSA_NSID, |v| number(v).map(i32::from_ne_bytes)));
        Ok(id.filter(|id| *id >= 0))
    }

    fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..ATTEMPTS {
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
            let (answers, interrupted) = self.receive(true)?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "links changed under each of several dumps; scan again"))
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message =
            NetlinkMessage::new(header, NetlinkPayload::InnerMessage(Body { kind, payload: body.to_vec() }));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// The answers to the last request, and whether the kernel saw a change while it was dumping.
    fn receive(&mut self, dump: bool) -> io::Result<(Vec<Vec<u8>>, bool)> {
        let (mut answers, mut interrupted) = (Vec::new(), false);
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<Body>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                let length = (message.header.length as usize).next_multiple_of(4).min(rest.len());
                rest = &rest[length..];
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(body) => answers.push(body.payload),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok((answers, interrupted)),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
            }
            if !dump && !answers.is_empty() {
                return Ok((answers, interrupted));
            }
        }
    }
}

/// A message past its netlink header, unread.
struct Body {
    kind: u16,
    payload: Vec<u8>,
}

impl NetlinkSerializable for Body {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.payload.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.payload);
    }
}

impl NetlinkDeserializable for Body {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, payload: payload.to_vec() })
    }
}

/// `struct ifinfomsg`: family 1, pad 1, type 2, index 4, flags 4, change 4.
fn link(message: &[u8]) -> Option<LinkRow> {
    let index = u32::from_ne_bytes(number(message.get(4..8)?)?);
    let flags = u32::from_ne_bytes(number(message.get(8..12)?)?);
    let ethernet = u16::from_ne_bytes(number(message.get(2..4)?)?) == libc::ARPHRD_ETHER;
    let mut row = LinkRow { index, loopback: flags & libc::IFF_LOOPBACK as u32 != 0, ..LinkRow::default() };
    for (kind, value) in attributes(message.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => row.name = text(value),
            libc::IFLA_ADDRESS if ethernet => row.mac = number(value),
            libc::IFLA_LINK => row.peer = number(value).map(u32::from_ne_bytes).filter(|index| *index != 0),
            libc::IFLA_LINK_NETNSID => row.peer_netns = number(value).map(i32::from_ne_bytes).filter(|id| *id >= 0),
            libc::IFLA_MASTER => row.master = number(value).map(u32::from_ne_bytes),
            libc::IFLA_LINKINFO => row.kind = attribute(value, libc::IFLA_INFO_KIND, |kind| Some(text(kind))),
            _ => {}
        }
    }
    Some(row)
}

/// `struct ifaddrmsg`: family 1, prefix length 1, flags 1, scope 1, index 4.
fn address(message: &[u8]) -> Option<AddressRow> {
    let [_, length, short_flags, _] = number(message.get(..4)?)?;
    let link = u32::from_ne_bytes(number(message.get(4..8)?)?);
    let body = message.get(8..)?;
    let flags = attribute(body, libc::IFA_FLAGS, |v| number(v).map(u32::from_ne_bytes)).unwrap_or(short_flags.into());
    if flags & libc::IFA_F_DADFAILED != 0 {
        return None;
    }
    let prefix = attribute(body, libc::IFA_ADDRESS, ip);
    let address = attribute(body, libc::IFA_LOCAL, ip).or(prefix)?;
    let secondary = address.is_ipv4() && flags & libc::IFA_F_SECONDARY != 0;
    Some(AddressRow { link, address, prefix: (prefix.unwrap_or(address), length), secondary })
}

/// `struct rtmsg`: family 1, destination length 1, source length 1, tos 1, table 1, protocol 1, scope 1, type 1, flags 4.
fn gateways(message: &[u8]) -> Vec<GatewayRow> {
    let Some(body) = message.get(12..) else { return Vec::new() };
    let cloned = u32::from_ne_bytes(number(&message[8..12]).unwrap_or_default()) & libc::RTM_F_CLONED != 0;
    if message[1] != 0 || message[7] != libc::RTN_UNICAST || cloned {
        return Vec::new();
    }
    let mut hops: Vec<_> = attribute(body, libc::RTA_OIF, |v| number(v).map(u32::from_ne_bytes))
        .zip(next_hop(body))
        .map(|(link, gateway)| GatewayRow { link, gateway })
        .into_iter()
        .collect();
    // `struct rtnexthop`: length 2, flags 1, hops 1, index 4, then attributes.
    let mut rest = attribute(body, libc::RTA_MULTIPATH, Some).unwrap_or_default();
    while let Some(length) = rest.get(..2).and_then(number).map(u16::from_ne_bytes) {
        let Some(hop) = rest.get(..usize::from(length)).filter(|hop| hop.len() >= 8) else { break };
        let link = number(&hop[4..8]).map(u32::from_ne_bytes);
        hops.extend(link.zip(next_hop(&hop[8..])).map(|(link, gateway)| GatewayRow { link, gateway }));
        rest = rest.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// RTA_GATEWAY, or RTA_VIA (an IPv4 route's next hop may be an IPv6 address).
fn next_hop(body: &[u8]) -> Option<IpAddr> {
    attribute(body, libc::RTA_GATEWAY, ip).or_else(|| attribute(body, libc::RTA_VIA, |via| ip(via.get(2..)?)))
}

/// The attributes up to the first malformed one.
fn attributes(body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(body).map_while(Result::ok).map(|nla: NlaBuffer<&[u8]>| {
        let value = nla.into_inner().get(4..usize::from(nla.length())).unwrap_or_default();
        (nla.kind(), value)
    })
}

fn attribute<'a, T>(body: &'a [u8], kind: u16, read: impl FnOnce(&'a [u8]) -> Option<T>) -> Option<T> {
    attributes(body).find(|(found, _)| *found == kind).and_then(|(_, value)| read(value))
}

fn number<const N: usize>(value: &[u8]) -> Option<[u8; N]> {
    value.try_into().ok()
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    number::<4>(value)
        .map(|v4| Ipv4Addr::from(v4).into())
        .or_else(|| number::<16>(value).map(|v6| Ipv6Addr::from(v6).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn route(destination_length: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut message = vec![2, destination_length, 0, 0, 254, 3, 0, libc::RTN_UNICAST, 0, 0, 0, 0];
        message.extend(attributes.concat());
        message
    }

    #[test]
    fn a_links_unknown_and_cut_attributes_hide_nothing_before_them() {
        let mut message = vec![0, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend(nla(999, b"?"));
        message.extend(nla(libc::IFLA_IFNAME, b"eth0\0"));
        message.extend(nla(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]));
        message.extend(nla(libc::IFLA_LINKINFO, &nla(libc::IFLA_INFO_KIND, b"veth")));
        message.extend([200, 0, 5, 0, 1]);
        let row = link(&message).expect("a header and a name");
        assert_eq!((row.index, row.name.as_str(), row.kind.as_deref()), (9, "eth0", Some("veth")));
        assert_eq!((row.mac, row.peer), (Some([2, 0, 0, 0, 0, 1]), None));
        assert_eq!(link(&message[..15]), None);
    }

    #[test]
    fn default_routes_next_hops_are_found_in_every_form() {
        let hop = |link, gateway: &str| GatewayRow { link, gateway: gateway.parse().expect("an address") };
        let oif = nla(libc::RTA_OIF, &7u32.to_ne_bytes());
        assert_eq!(gateways(&route(0, &[oif.clone(), nla(libc::RTA_GATEWAY, &[10, 0, 0, 1])])), [hop(7, "10.0.0.1")]);
        assert_eq!(gateways(&route(8, &[oif.clone(), nla(libc::RTA_GATEWAY, &[10, 0, 0, 1])])), []);
        let via = [&[10, 0][..], &Ipv6Addr::LOCALHOST.octets()].concat();
        assert_eq!(gateways(&route(0, &[oif, nla(libc::RTA_VIA, &via)])), [hop(7, "::1")]);
        let hops: Vec<u8> = [(3u8, 1u8), (4, 2)]
            .iter()
            .flat_map(|(link, last)| {
                [vec![16, 0, 0, 0, *link, 0, 0, 0], nla(libc::RTA_GATEWAY, &[10, 0, 0, *last])].concat()
            })
            .collect();
        let multipath = route(0, &[nla(libc::RTA_MULTIPATH, &hops)]);
        assert_eq!(gateways(&multipath), [hop(3, "10.0.0.1"), hop(4, "10.0.0.2")]);
    }
}
