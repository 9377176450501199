//! The gateway: clients talk to the endpoint through it, and a call that may change what is enforced is answered once
//! the change is. Owns the listener and what is counted; forwards every request as it came, signs none, and knows
//! nothing of how a change is read and committed: that is asked for by a [`Commit`].

mod classify;
mod forward;
mod headers;
mod held;
mod modified;
pub mod page;
mod rebooted;
mod upstream;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::forward::Forwarder;
use self::upstream::Upstream;
use crate::model::{InstanceId, Scope};
use crate::source::ModifiedRule;

/// LocalStack's port, which its users' settings name already.
pub const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4566);

/// Clients at the same time; more wait for one to hang up.
const CONNECTIONS: usize = 4_096;

/// The fields that a request may have. AWS's SDKs send about twenty, and S3 takes metadata in as many as fit.
const FIELDS: usize = 512;

/// How long a client may take to send a request's head, counted from the end of the one before: idle ones give way too.
const LONGEST_HEAD: Duration = Duration::from_secs(60);

/// How long a client may take to read something of an answer (`TCP_USER_TIMEOUT`, which is also about a window that stays
/// closed): what is held for it takes room.
const LONGEST_STALL: Duration = Duration::from_secs(60);

/// How long to wait after an accept that failed for want of something.
const PAUSE: Duration = Duration::from_millis(50);

/// What `--gateway` and its companions say.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen; `None` is [`DEFAULT_ADDRESS`], which may be taken.
    pub address: Option<SocketAddr>,
    /// How long a change's answer waits for its commit.
    pub commit_timeout: Duration,
}

/// Whose state a change is about.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Whom {
    /// One of these accounts; any, if there is none.
    pub accounts: Vec<Arc<str>>,
    /// The region; `None` is any.
    pub region: Option<Arc<str>>,
}

impl Whom {
    /// Whether a scope's region is meant.
    pub fn has_region(&self, scope: &Scope) -> bool {
        self.region.as_ref().is_none_or(|region| *region == scope.region)
    }

    /// Whether a scope's account is meant.
    pub fn has_account(&self, scope: &Scope) -> bool {
        self.accounts.is_empty() || self.accounts.contains(&scope.account)
    }
}

/// How much a change may be about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// Groups' rules alone.
    Rules,
    /// Anything.
    Everything,
    /// Anything, and the same ids may now be other things.
    Anew,
}

/// A request to read anew what a change was about, and to say when it is enforced.
#[derive(Debug)]
pub struct Commit {
    /// Whose state.
    pub whom: Whom,
    /// When the endpoint had answered: only what is read after this counts.
    pub asked: Instant,
    /// Rules that the call modified, as the call had it.
    pub modified: Vec<ModifiedRule>,
    /// How much of it.
    pub extent: Extent,
    /// Instances that the call rebooted.
    pub rebooted: Vec<InstanceId>,
    /// Why it isn't enforced, or that it is.
    pub reply: oneshot::Sender<Result<(), String>>,
    /// Dropped when whatever `reply` says is known to everybody, or that nobody waits for it.
    pub known: oneshot::Sender<()>,
}

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address can't be had.
    #[error(
        "the gateway cannot listen on {address}: {cause}; name another address by --gateway, or run with --no-gateway"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        cause: io::Error,
    },
    /// It would forward to itself.
    #[error(
        "the gateway's address {address} is the endpoint's own; name another address by --gateway, or the real endpoint by --endpoint-url"
    )]
    Itself {
        /// The address.
        address: SocketAddr,
    },
    /// The endpoint's URL can't be used, or TLS can't be set up.
    #[error("the gateway cannot forward to {endpoint}: {cause}")]
    Upstream {
        /// The endpoint.
        endpoint: String,
        /// Why.
        cause: String,
    },
}

/// What the gateway counts, as `status` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// Where it listens.
    pub address: String,
    /// What it forwards to.
    pub endpoint: String,
    /// Requests that were forwarded.
    pub requests: u64,
    /// Those of them that may have changed what is enforced.
    pub changes: u64,
    /// Changes that were enforced when their answer went out.
    pub committed: u64,
    /// Changes whose commit had failed by then.
    pub failed: u64,
    /// Changes whose commit took longer than `--commit-timeout`.
    pub late: u64,
    /// Requests that the endpoint didn't answer, and answers that weren't passed on: the client got 502, or 507.
    pub unanswered: u64,
}

/// The same while they are counted.
#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    changes: AtomicU64,
    committed: AtomicU64,
    failed: AtomicU64,
    late: AtomicU64,
    unanswered: AtomicU64,
}

/// A gateway that listens.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    forwarder: Arc<Forwarder>,
}

impl Gateway {
    /// Listens, and forwards until `shutdown`.
    ///
    /// # Errors
    /// See [`GatewayError`].
    pub async fn start(
        options: &Options,
        endpoint: &str,
        commits: mpsc::Sender<Commit>,
        shutdown: CancellationToken,
    ) -> Result<Self, GatewayError> {
        let wanted = options.address.unwrap_or(DEFAULT_ADDRESS);
        let upstream = Upstream::new(endpoint)?;
        if upstream.is_at(wanted) {
            return Err(GatewayError::Itself { address: wanted });
        }
        let failed = |cause| GatewayError::Listen { address: wanted, cause };
        let listener = TcpListener::bind(wanted).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let forwarder = Arc::new(Forwarder::new(upstream, commits, options.commit_timeout));
        tokio::spawn(accept(listener, Arc::clone(&forwarder), shutdown));
        Ok(Self { address, forwarder })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its counts.
    pub fn status(&self) -> GatewayStatus {
        let counts = self.forwarder.counts();
        GatewayStatus {
            address: self.address.to_string(),
            endpoint: self.forwarder.endpoint().to_owned(),
            requests: counts.requests.load(Relaxed),
            changes: counts.changes.load(Relaxed),
            committed: counts.committed.load(Relaxed),
            failed: counts.failed.load(Relaxed),
            late: counts.late.load(Relaxed),
            unanswered: counts.unanswered.load(Relaxed),
        }
    }
}

/// Accepts clients until `shutdown`; those that are served then get their answer and are closed.
async fn accept(listener: TcpListener, forwarder: Arc<Forwarder>, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let accept_all = async {
        loop {
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    let serving = serve(stream, Arc::clone(&forwarder), shutdown.clone());
                    tokio::spawn(async move {
                        serving.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "the gateway cannot accept a client");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    };
    shutdown.run_until_cancelled(accept_all).await;
}

async fn serve(stream: TcpStream, forwarder: Arc<Forwarder>, shutdown: CancellationToken) {
    let _ = stream.set_nodelay(true);
    // Who doesn't read on leaves the room that its answer takes to others.
    let _ = SockRef::from(&stream).set_tcp_user_timeout(Some(LONGEST_STALL));
    let service = service_fn(move |request| {
        let forwarder = Arc::clone(&forwarder);
        async move { Ok::<_, std::convert::Infallible>(forwarder.answer(request).await) }
    });
    let connection = protocol(LONGEST_HEAD).serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a client of the gateway is gone");
    }
}

/// HTTP as it is spoken with clients.
fn protocol(longest_head: Duration) -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol.timer(TokioTimer::new()).header_read_timeout(longest_head);
    protocol.preserve_header_case(true).auto_date_header(false).max_headers(FIELDS);
    protocol
}

#[cfg(test)]
mod tests {
    use http_body_util::Empty;
    use hyper::body::Bytes;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn who_never_ends_a_head_is_hung_up_on() {
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
        let service =
            service_fn(|_| async { Ok::<_, std::convert::Infallible>(http::Response::new(Empty::<Bytes>::new())) });
        let served = protocol(Duration::from_millis(10)).serve_connection(TokioIo::new(server), service).await;
        assert!(served.as_ref().is_err_and(hyper::Error::is_timeout), "{served:?}");
    }
}
