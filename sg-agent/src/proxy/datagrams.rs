//! UDP: a flow for each client, judged when its first datagram comes and whenever the rules change, forgotten when it has
//! been idle as long as conntrack allows.
//!
//! A flow has two sockets: one to the instance, and one at the published port that is connected to the client. The
//! kernel finds the latter before the listening one, so that a flow's datagrams come to its own task, answers leave from
//! the address that the client asked, and the programs of `early` know whom the proxy serves.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::cmsg_space;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use sg_common::verdict::Pass;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::coop::consume_budget;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Place;
use super::connection::{Permit, Port};

/// The longest datagram.
const LONGEST: usize = 65_535;
/// Datagrams that one look at a socket takes; then others have their turn.
const BATCH: usize = 64;

thread_local! {
    /// Where a datagram is while it is passed on: one for each worker, since there are thousands of flows.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; LONGEST]);
}

/// Idle times after which a flow is forgotten (SG-3.5).
#[derive(Clone, Copy, Debug)]
pub struct IdleTimes {
    /// Of a flow of one exchange at most.
    pub single: Duration,
    /// Of others.
    pub stream: Duration,
}

/// Binds a published port's socket.
pub fn bind(address: SocketAddr, is_dual_stack: bool) -> io::Result<UdpSocket> {
    let socket = socket(address, is_dual_stack)?;
    setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    UdpSocket::from_std(socket.into())
}

/// A socket at a published port. Flows' sockets share the port with it; nobody else may but this user's processes.
fn socket(address: SocketAddr, is_dual_stack: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!is_dual_stack)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Both ends of a flow.
#[derive(Debug)]
struct Flow {
    client: UdpSocket,
    instance: UdpSocket,
    /// Datagrams from the client, and to it.
    asked: AtomicU64,
    answered: AtomicU64,
}

/// Who talks to which of the port's addresses.
type Ends = (SocketAddr, IpAddr);

/// A datagram that has come to the port.
struct Datagram {
    from: SocketAddr,
    /// The address that it was sent to.
    to: IpAddr,
    bytes: Vec<u8>,
}

/// Takes clients' first datagrams until `close`.
pub async fn run(socket: UdpSocket, port: Arc<Port>, close: CancellationToken) {
    let mut flows = Flows { at: socket.local_addr().ok(), port, table: HashMap::new(), tidy_at: BATCH };
    let take_all = async {
        loop {
            consume_budget().await;
            match socket.try_io(Interest::READABLE, || receive_batch(&socket)) {
                Ok(datagrams) => flows.take(datagrams).await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Err(error) = socket.readable().await {
                        tracing::error!(%error, "a published UDP port has failed");
                        return;
                    }
                }
                // An ICMP error about an answer, which is nobody's now.
                Err(error) => tracing::trace!(%error, "a published UDP port"),
            }
        }
    };
    close.run_until_cancelled(take_all).await;
}

/// The datagrams that have come, but no more than others should wait for.
fn receive_batch(socket: &UdpSocket) -> io::Result<VecDeque<Datagram>> {
    let mut datagrams = VecDeque::from([receive(socket)?]);
    while datagrams.len() < BATCH
        && let Ok(datagram) = receive(socket)
    {
        datagrams.push_back(datagram);
    }
    Ok(datagrams)
}

/// One datagram, and where it was sent to.
fn receive(socket: &UdpSocket) -> io::Result<Datagram> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut control = cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
        let mut parts = [IoSliceMut::new(buffer)];
        let received =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        let from = received.address.as_ref().and_then(address).ok_or(io::ErrorKind::InvalidData)?;
        let to = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes())),
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(info.ipi6_addr.s6_addr).to_canonical()),
            _ => None,
        });
        let to = to.ok_or(io::ErrorKind::InvalidData)?;
        let length = received.bytes;
        Ok(Datagram { from, to, bytes: buffer[..length].to_vec() })
    })
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    let four = from.as_sockaddr_in().map(|address| SocketAddr::from((address.ip(), address.port())));
    let six = || {
        let address = from.as_sockaddr_in6()?;
        // A link-local address means something on its link only.
        let six = std::net::SocketAddrV6::new(address.ip(), address.port(), 0, address.scope_id());
        Some(match address.ip().to_ipv4_mapped() {
            Some(four) => SocketAddr::from((four, address.port())),
            None => six.into(),
        })
    };
    four.or_else(six)
}

/// The flows of one listening socket.
struct Flows {
    at: Option<SocketAddr>,
    port: Arc<Port>,
    table: HashMap<Ends, Weak<Flow>>,
    /// When so many are in the table, those that have ended are taken out.
    tidy_at: usize,
}

impl Flows {
    /// Passes datagrams on, by their flows or by new ones, and what new flows' sockets caught of others' with them.
    async fn take(&mut self, mut waiting: VecDeque<Datagram>) {
        let mut fresh = None;
        while let Some(datagram) = waiting.pop_front() {
            let ends = (datagram.from, datagram.to);
            if let Some(flow) = self.table.get(&ends).and_then(Weak::upgrade) {
                flow.pass(&datagram.bytes, &self.port);
                continue;
            }
            // One question for all that came together.
            let is_fresh = match fresh {
                Some(is_fresh) => is_fresh,
                None => *fresh.insert(self.port.service.freshness.renew().await),
            };
            let Some(permit) = self.port.try_flow() else {
                self.port.counts.refused.fetch_add(1, Relaxed);
                continue;
            };
            let Ok((place, pass)) = self.port.admit(datagram.from, is_fresh) else { continue };
            let known = waiting.len();
            let opened = self.open(ends, place, &mut waiting);
            if waiting.len() > known {
                // What was caught came after that question.
                fresh = None;
            }
            match opened {
                Ok(flow) => {
                    flow.pass(&datagram.bytes, &self.port);
                    self.tidy();
                    self.table.insert(ends, Arc::downgrade(&flow));
                    let port = Arc::clone(&self.port);
                    self.port.service.connections.spawn(serve(flow, port, datagram.from.ip(), pass, permit));
                }
                Err(error) => {
                    self.port.counts.failed.fetch_add(1, Relaxed);
                    tracing::debug!(port = %self.port.published, client = %datagram.from, %error, "no flow");
                }
            }
        }
    }

    fn open(&self, (client, own): Ends, place: Place, caught: &mut VecDeque<Datagram>) -> io::Result<Arc<Flow>> {
        let port = self.at.map_or(self.port.published.host_port, |at| at.port());
        let at = match (own, client) {
            // On the link that the client is on.
            (IpAddr::V6(six), SocketAddr::V6(client)) if six.is_unicast_link_local() => {
                std::net::SocketAddrV6::new(six, port, 0, client.scope_id()).into()
            }
            _ => SocketAddr::new(own, port),
        };
        let to_client = socket(at, false)?;
        // Up to here it is one more listening socket, and may have caught anybody's.
        to_client.connect(&client.into())?;
        let to_client = std::net::UdpSocket::from(to_client);
        let server = SocketAddr::new(place.address, self.port.published.port);
        let to_instance = Socket::new(Domain::for_address(server), Type::DGRAM, Some(Protocol::UDP))?;
        to_instance.set_nonblocking(true)?;
        if self.port.service.settings.mark != 0 {
            to_instance.set_mark(self.port.service.settings.mark)?;
        }
        to_instance.connect(&server.into())?;
        BUFFER.with_borrow_mut(|buffer| {
            while let Ok((length, from)) = to_client.recv_from(buffer) {
                caught.push_back(Datagram { from, to: own, bytes: buffer[..length].to_vec() });
            }
        });
        Ok(Arc::new(Flow {
            client: UdpSocket::from_std(to_client)?,
            instance: UdpSocket::from_std(to_instance.into())?,
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }))
    }

    /// Takes out those that have ended, when there may be as many of them as of others.
    fn tidy(&mut self) {
        if self.table.len() >= self.tidy_at {
            self.table.retain(|_, flow| flow.strong_count() > 0);
            self.tidy_at = (2 * self.table.len()).max(BATCH);
        }
    }
}

impl Flow {
    /// Passes one datagram of the client's on. What the instance's socket has no room for is lost, as on any way.
    fn pass(&self, bytes: &[u8], port: &Port) {
        self.asked.fetch_add(1, Relaxed);
        if let Ok(sent) = send(&self.instance, bytes) {
            port.counts.bytes_to_instance.fetch_add(sent as u64, Relaxed);
        }
    }

    /// How long it may be idle.
    fn patience(&self, idle: IdleTimes) -> Duration {
        let is_stream = self.answered.load(Relaxed) > 0 && self.asked.load(Relaxed) > 1;
        if is_stream { idle.stream } else { idle.single }
    }
}

/// Sends without asking whether there is room: of a new socket that isn't known yet, and nobody waits for it.
fn send(to: &UdpSocket, bytes: &[u8]) -> io::Result<usize> {
    socket2::SockRef::from(to).send(bytes)
}

/// Passes what waits at one socket on to the other.
fn pump(from: &UdpSocket, to: &UdpSocket, datagrams: &AtomicU64, bytes: &AtomicU64) {
    BUFFER.with_borrow_mut(|buffer| {
        for _ in 0..BATCH {
            match from.try_recv(buffer) {
                Ok(length) => {
                    datagrams.fetch_add(1, Relaxed);
                    if let Ok(sent) = send(to, &buffer[..length]) {
                        bytes.fetch_add(sent as u64, Relaxed);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An ICMP error: the other side doesn't take it, and may take the next.
                Err(_) => {}
            }
        }
    });
}

/// Serves one flow until it is idle, or no longer allowed.
async fn serve(flow: Arc<Flow>, port: Arc<Port>, client: IpAddr, pass: Pass, permit: Permit) {
    let _active = port.counts.activate();
    let mut snapshots = port.service.snapshots.clone();
    let denied = port.until_denied(client, pass, &mut snapshots);
    tokio::pin!(denied);
    let idle = port.service.settings.idle;
    let mut until = Instant::now() + flow.patience(idle);
    loop {
        consume_budget().await;
        tokio::select! {
            readable = flow.client.readable() => match readable {
                Ok(()) => pump(&flow.client, &flow.instance, &flow.asked, &port.counts.bytes_to_instance),
                Err(_) => break,
            },
            readable = flow.instance.readable() => match readable {
                Ok(()) => pump(&flow.instance, &flow.client, &flow.answered, &port.counts.bytes_to_clients),
                Err(_) => break,
            },
            refusal = &mut denied => {
                port.counts.cut.fetch_add(1, Relaxed);
                tracing::info!(port = %port.published, %client, reason = %refusal, "cut");
                break;
            }
            () = tokio::time::sleep_until(until) => break,
            () = port.service.reset.cancelled() => break,
        }
        until = Instant::now() + flow.patience(idle);
    }
    drop(permit);
}
