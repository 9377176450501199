//! One connection: judged by its real client when it comes and whenever the rules change, connected to the instance in
//! between. How its bytes move is `splice`'s.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use sg_common::abi::Direction;
use sg_common::packet::TCP;
use sg_common::verdict::{Drop, Pass};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::counters::{Counts, PortCounters};
use super::freshness::Freshness;
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
    pub reset: CancellationToken,
}

/// A published port, whichever of its sockets a client came by.
#[derive(Debug)]
pub struct Port {
    pub published: Published,
    pub service: Service,
    limit: Arc<Semaphore>,
    counts: Counts,
    /// Whether the last connection found no instance, so that only a change is logged.
    is_gone: AtomicBool,
}

/// Why a client doesn't get through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum Refusal {
    #[error("the instance is not attached")]
    Gone,
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
    pub async fn permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.limit).acquire_owned().await.expect("the semaphore is never closed")
    }

    pub fn counters(&self) -> PortCounters {
        self.counts.read(&self.published)
    }

    /// Serves one client from its first byte to its last.
    pub async fn serve(&self, stream: TcpStream, client: SocketAddr) {
        let mut snapshots = self.service.snapshots.clone();
        self.service.freshness.renew().await;
        let judged = self.check(&snapshots.borrow_and_update(), client.ip());
        self.note_presence(judged != Err(Refusal::Gone));
        let (place, pass) = match judged {
            Ok(passed) => passed,
            Err(refusal) => {
                self.counts.refused.fetch_add(1, Relaxed);
                tracing::debug!(port = %self.published, %client, reason = %refusal, "refused");
                return reset(stream);
            }
        };
        self.counts.accepted.fetch_add(1, Relaxed);
        let _active = self.counts.activate();
        let server = SocketAddr::new(place.address, self.published.port);
        let opened = tokio::select! {
            opened = connect(server, self.service.settings.mark) => opened,
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

    /// The one question, asked at accept and after every change of the rules: may this client talk to the instance,
    /// and where is that?
    fn check(&self, snapshot: &Snapshot, client: IpAddr) -> Result<(Place, Pass), Refusal> {
        let place = Place::of(snapshot, &self.published).ok_or(Refusal::Gone)?;
        let decision = admits(snapshot, place.ifindex, Direction::Ingress, client, TCP, self.published.port);
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
        let until_denied = async {
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
        };
        let bytes = [&self.counts.bytes_to_instance, &self.counts.bytes_to_clients];
        tokio::select! {
            over = splice::both_ways(client_side, upstream, &self.service.pipes, bytes) => End::Over(over),
            refusal = until_denied => End::Cut(refusal),
            () = self.service.reset.cancelled() => End::Reset,
        }
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
        (OnRevoke::Aws, Refusal::Gone | Refusal::Denied(_)) => false,
    }
}

/// Closes with RST: the other side sees it at once, and nothing stays in TIME_WAIT.
fn reset(stream: TcpStream) {
    if let Err(error) = SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a connection, closing it");
    }
}

/// Connects to the instance within [`CONNECT_TIMEOUT`].
async fn connect(server: SocketAddr, mark: u32) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if mark != 0 {
        // Before the SYN: it is the packet that the programs look at.
        socket.set_mark(mark)?;
    }
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(server);
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await?
}
