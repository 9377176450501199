//! One connection: judged by its real client when it comes and whenever the rules change, connected to the instance in
//! between. How its bytes move is `splice`'s.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::counters::{Counts, PortCounters};
use super::freshness::Freshness;
use super::header::{self, Introduction};
use super::publish::Published;
use super::splice::{self, Pipes};
use super::{CONNECT_TIMEOUT, OnRevoke, Place, Settings};
use crate::apply::Snapshot;
use crate::decide::admits;

/// What all ports share.
#[derive(Debug)]
pub struct Service {
    pub settings: Settings,
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    pub freshness: Freshness,
    pub pipes: Arc<Pipes>,
    pub connections: TaskTracker,
    /// Room for connections of all ports.
    pub limit: Arc<Semaphore>,
    /// How much of it flows of datagrams may take.
    pub flows: Arc<Semaphore>,
    pub reset: CancellationToken,
}

/// Room for a connection, of its port and of all; given back when it ends.
#[derive(Debug)]
pub struct Permit {
    _of_port: OwnedSemaphorePermit,
    _of_flows: Option<OwnedSemaphorePermit>,
    _of_all: OwnedSemaphorePermit,
}

/// A published port, whichever of its sockets a client came by.
#[derive(Debug)]
pub struct Port {
    pub published: Published,
    pub service: Service,
    limit: Arc<Semaphore>,
    pub(super) counts: Counts,
    /// Whether the last connection found no instance, so that only a change is logged.
    is_gone: AtomicBool,
}

/// Why a client doesn't get through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the instance is not attached")]
    Gone,
    #[error("no rules are in force that were read since the client came (--live=endpoint)")]
    Unanswered,
    #[error("{}", .0.name())]
    Denied(Drop),
}

/// How a live connection ended.
enum End {
    /// Both sides closed, or one of them failed.
    Over(io::Result<()>),
    /// The rules no longer let the client through.
    Cut(Refusal),
    /// The proxy shuts down.
    Reset,
}

impl Port {
    pub fn new(published: Published, service: Service) -> Self {
        Self {
            limit: Arc::new(Semaphore::new(service.settings.max_connections)),
            published,
            service,
            counts: Counts::default(),
            is_gone: AtomicBool::new(false),
        }
    }

    /// Room for one more connection.
    pub async fn permit(&self) -> Permit {
        let take = async |limit: &Arc<Semaphore>| {
            Arc::clone(limit).acquire_owned().await.expect("the semaphore is never closed")
        };
        Permit { _of_port: take(&self.limit).await, _of_flows: None, _of_all: take(&self.service.limit).await }
    }

    /// Room for one more flow of datagrams, if there is any now. A flow takes no handshake: who sends by others' addresses
    /// makes as many as it likes, and they must not take all connections' room.
    pub fn try_flow(&self) -> Option<Permit> {
        let take = |limit: &Arc<Semaphore>| Arc::clone(limit).try_acquire_owned().ok();
        let (of_port, of_flows) = (take(&self.limit)?, take(&self.service.flows)?);
        Some(Permit { _of_port: of_port, _of_flows: Some(of_flows), _of_all: take(&self.service.limit)? })
    }

    pub fn counters(&self) -> PortCounters {
        self.counts.read(&self.published, self.service.settings.max_connections as u64)
    }

    /// Serves one client from its first byte to its last.
    pub async fn serve(&self, mut stream: TcpStream, peer: SocketAddr) {
        let Some(Introduction { client, rest }) = self.introduce(&mut stream, peer).await else {
            return reset(stream);
        };
        // Before it is judged. Who may race: a change of the rules, with this client. Worst: it is let in by the old ones,
        // for as long as it takes this task to run again: `relay` finds the snapshot changed and asks once more.
        let mut snapshots = self.service.snapshots.clone();
        snapshots.mark_unchanged();
        let Ok((place, pass)) = self.admit(client, self.service.freshness.renew().await) else {
            return reset(stream);
        };
        let _active = self.counts.activate();
        let server = SocketAddr::new(place.address, self.published.port);
        let opened = tokio::select! {
            opened = self.open(server, client, &stream, rest) => opened,
            () = self.service.reset.cancelled() => return reset(stream),
        };
        let upstream = match opened {
            Ok(upstream) => upstream,
            Err(error) => {
                self.counts.failed.fetch_add(1, Relaxed);
                tracing::debug!(port = %self.published, %client, %server, %error, "the instance did not take it");
                return reset(stream);
            }
        };
        match self.relay(&stream, &upstream, client.ip(), pass, snapshots).await {
            End::Over(Ok(())) => return,
            End::Over(Err(error)) => tracing::debug!(port = %self.published, %client, %error, "reset"),
            End::Cut(refusal) => {
                self.counts.cut.fetch_add(1, Relaxed);
                tracing::info!(port = %self.published, %client, reason = %refusal, "cut");
            }
            End::Reset => {}
        }
        reset(stream);
        reset(upstream);
    }

    /// Who the client is: the peer, or whom a trusted balancer names.
    async fn introduce(&self, stream: &mut TcpStream, peer: SocketAddr) -> Option<Introduction> {
        if !header::is_trusted(&self.service.settings.trusted, peer.ip()) {
            return Some(Introduction { client: peer, rest: Vec::new() });
        }
        let read = tokio::select! {
            read = header::read(stream, peer) => read,
            () = self.service.reset.cancelled() => return None,
        };
        read.inspect_err(|error| {
            self.counts.unintroduced.fetch_add(1, Relaxed);
            tracing::debug!(port = %self.published, %peer, %error, "closed");
        })
        .ok()
    }

    /// Judges a client who comes, by rules that are `fresh` enough, and counts what comes of it.
    pub(super) fn admit(&self, client: SocketAddr, fresh: bool) -> Result<(Place, Pass), Refusal> {
        let judged =
            if fresh { self.check(&self.service.snapshots.borrow(), client.ip()) } else { Err(Refusal::Unanswered) };
        self.note_presence(judged != Err(Refusal::Gone));
        match judged {
            Ok(_) => self.counts.accepted.fetch_add(1, Relaxed),
            Err(refusal) => {
                tracing::debug!(port = %self.published, %client, reason = %refusal, "refused");
                self.counts.refused.fetch_add(1, Relaxed)
            }
        };
        judged
    }

    /// Connects to the instance, and says there what comes before the client's further bytes.
    async fn open(
        &self,
        server: SocketAddr,
        client: SocketAddr,
        stream: &TcpStream,
        rest: Vec<u8>,
    ) -> io::Result<TcpStream> {
        let upstream = connect(server, self.service.settings.mark).await?;
        if self.service.settings.tells_client {
            let header = header::write(client, stream.local_addr()?);
            splice::send_all(&upstream, &header, |bytes| SockRef::from(&upstream).send(bytes)).await?;
        }
        let sent = splice::send_all(&upstream, &rest, |bytes| SockRef::from(&upstream).send(bytes)).await?;
        self.counts.bytes_to_instance.fetch_add(sent, Relaxed);
        Ok(upstream)
    }

    /// The one question, asked at accept and after every change of the rules: may this client talk to the instance,
    /// and where is that?
    pub(super) fn check(&self, snapshot: &Snapshot, client: IpAddr) -> Result<(Place, Pass), Refusal> {
        let place = Place::of(snapshot, &self.published).ok_or(Refusal::Gone)?;
        let decision = admits(
            snapshot,
            place.ifindex,
            Direction::Ingress,
            client,
            self.published.transport.number(),
            self.published.port,
        );
        decision.verdict.map(|pass| (place, pass)).map_err(Refusal::Denied)
    }

    /// Moves bytes for as long as both sides and the rules let it.
    async fn relay(
        &self,
        client_side: &TcpStream,
        upstream: &TcpStream,
        client: IpAddr,
        pass: Pass,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> End {
        let until_denied = self.until_denied(client, pass, &mut snapshots);
        let bytes = [&self.counts.bytes_to_instance, &self.counts.bytes_to_clients];
        tokio::select! {
            over = splice::both_ways(client_side, upstream, &self.service.pipes, bytes) => End::Over(over),
            refusal = until_denied => End::Cut(refusal),
            () = self.service.reset.cancelled() => End::Reset,
        }
    }

    /// Ends when a change of the rules ends what came in by `pass`.
    pub(super) async fn until_denied(
        &self,
        client: IpAddr,
        pass: Pass,
        snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    ) -> Refusal {
        while snapshots.changed().await.is_ok() {
            let judged = self.check(&snapshots.borrow_and_update(), client);
            if let Err(refusal) = judged
                && ends(self.service.settings.on_revoke, pass, refusal)
            {
                return refusal;
            }
        }
        // The applier is gone, and the last rules stand.
        std::future::pending().await
    }

    /// Logs an instance that comes or goes, as connections find it, once.
    fn note_presence(&self, is_there: bool) {
        if self.is_gone.swap(!is_there, Relaxed) == is_there {
            let (port, instance) = (&self.published, &self.published.instance);
            if is_there {
                tracing::info!(%port, "{instance} is attached again: clients are judged");
            } else {
                tracing::warn!(%port, "{instance} is not attached: every client is refused; start it, or see sg-agent status");
            }
        }
    }
}

/// Whether a connection that came in by `pass` ends when it would now be refused (SG-3.4).
fn ends(on_revoke: OnRevoke, pass: Pass, refusal: Refusal) -> bool {
    match (on_revoke, refusal) {
        (OnRevoke::Cut, _) => true,
        (OnRevoke::Aws, Refusal::Denied(Drop::NoRule)) => pass == Pass::Untracked,
        // Stateless: it is about every packet.
        (OnRevoke::Aws, Refusal::Denied(Drop::Acl)) => true,
        // What is left of it ends with the instance's own sockets.
        (OnRevoke::Aws, Refusal::Gone | Refusal::Unanswered | Refusal::Denied(_)) => false,
    }
}

/// Closes with RST: the other side sees it at once, and nothing stays in TIME_WAIT.
fn reset(stream: TcpStream) {
    if let Err(error) = SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a connection, closing it");
    }
}

/// What both sockets of a connection have, and accepted ones inherit from their listener: small writes go at once, urgent
/// bytes keep their place, and a peer that vanished without a word is found out some day.
pub(super) fn behave(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    socket.set_keepalive(true)
}

/// Connects to the instance within [`CONNECT_TIMEOUT`].
async fn connect(server: SocketAddr, mark: u32) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    behave(&socket)?;
    if mark != 0 {
        // Before the SYN: it is the packet that the programs look at.
        socket.set_mark(mark)?;
    }
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(server);
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await?
}
