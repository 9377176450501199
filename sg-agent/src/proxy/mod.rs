//! Published ports: each connection's real client is judged by the latest snapshot, then connected through.
//!
//! A connection's way: `listener` (accept) -> `connection` (judge, connect, judge again on every change) -> `splice`
//! (bytes). Asks nobody but [`crate::decide`], and writes no map.

#![forbid(unsafe_code)]

mod connection;
mod counters;
mod freshness;
mod listener;
mod publish;
mod splice;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use counters::PortCounters;
pub use freshness::Freshness;
pub use publish::{DEFAULT_BIND, InvalidPublish, PublishSpec, Published, Transport};

use crate::apply::{Enforced, Snapshot};
use crate::model::Warning;
use connection::{Port, Service};

/// Connections of one published port at once. More wait in the accept queue, as they would at a busy server.
pub const MAX_CONNECTIONS: usize = 16_384;

/// How long an instance may take to answer a connect.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a denied client sees (SG-7.1).
///
/// The proxy gets to know a connection when its handshake is over, which is too late for silence: a connection that
/// is open and never answers is neither what AWS shows nor what a closed port does. So it is the programs of `early`
/// that keep the promise, before the handshake; whatever reaches the proxy nevertheless is reset, either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Deny {
    /// Nothing: the connect times out.
    #[default]
    Drop,
    /// A reset: the connection is refused. Datagrams have none, and vanish.
    Reject,
}

/// What a revoke does to live connections (SG-3.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnRevoke {
    /// Tracked ones go on. Untracked ones end, and so do those that the network ACL denies now.
    #[default]
    Aws,
    /// Whatever no longer passes ends.
    Cut,
}

/// How connections are treated.
#[derive(Clone, Copy, Debug)]
struct Settings {
    /// The `SO_MARK` of connections to instances; 0 for none.
    mark: u32,
    on_revoke: OnRevoke,
    max_connections: usize,
}

/// The listeners of all published ports.
#[derive(Debug)]
pub struct Proxy {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    settings: Settings,
    freshness: Freshness,
    pipes: Arc<splice::Pipes>,
    ports: BTreeMap<Published, Open>,
    connections: TaskTracker,
    /// Ends connections that outlive the grace time.
    reset: CancellationToken,
}

/// A published port and its sockets.
#[derive(Debug)]
struct Open {
    port: Arc<Port>,
    sockets: BTreeMap<SocketAddr, Listener>,
}

/// A socket that is listened on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listening {
    /// Its address.
    pub at: SocketAddr,
    /// Whether IPv4 clients come by it too.
    pub is_dual_stack: bool,
    /// For which port.
    pub published: Published,
}

/// A listening socket's task.
#[derive(Debug)]
struct Listener {
    is_dual_stack: bool,
    close: CancellationToken,
    task: JoinHandle<()>,
}

impl Listener {
    /// Returns when the socket is closed.
    async fn close(self) {
        self.close.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a listener of the proxy ended badly");
        }
    }
}

impl Proxy {
    /// A proxy without any port. `mark` is the `SO_MARK` by which the kernel's programs know the proxy's connections
    /// ([`sg_common::abi::Config::proxy_mark`]), so that they aren't judged a second time by the bridge's address; 0
    /// for none. Another mark than 0 needs CAP_NET_ADMIN.
    pub fn new(snapshots: watch::Receiver<Arc<Snapshot>>, mark: u32) -> Self {
        let settings = Settings { mark, on_revoke: OnRevoke::default(), max_connections: MAX_CONNECTIONS };
        Self {
            snapshots,
            settings,
            freshness: Freshness::default(),
            pipes: Arc::default(),
            ports: BTreeMap::new(),
            connections: TaskTracker::new(),
            reset: CancellationToken::new(),
        }
    }

    /// What a revoke does to live connections. For ports that are opened from now on.
    #[must_use]
    pub fn on_revoke(mut self, on_revoke: OnRevoke) -> Self {
        self.settings.on_revoke = on_revoke;
        self
    }

    /// Where connections have stale rules read anew. For ports that are opened from now on.
    #[must_use]
    pub fn fresh(mut self, freshness: Freshness) -> Self {
        self.freshness = freshness;
        self
    }

    /// How many connections a port has at once. For ports that are opened from now on.
    #[must_use]
    pub fn max_connections(mut self, most: usize) -> Self {
        self.settings.max_connections = most.min(Semaphore::MAX_PERMITS);
        self
    }

    /// Opens and closes listeners until they are those of `wanted`. Live connections of a port that is closed go on.
    ///
    /// What can't be listened on is a warning, and is tried again the next time.
    pub async fn reconcile(&mut self, wanted: Vec<Published>) -> Vec<Warning> {
        let wanted: BTreeSet<Published> = wanted.into_iter().collect();
        let gone: Vec<Published> = self.ports.keys().filter(|port| !wanted.contains(port)).cloned().collect();
        for published in gone {
            tracing::info!(port = %published, "no longer published");
            let Some(open) = self.ports.remove(&published) else { continue };
            for listening in open.sockets.into_values() {
                listening.close().await;
            }
        }
        let mut warnings = Vec::new();
        for published in &wanted {
            warnings.extend(self.open(published, &wanted));
        }
        warnings
    }

    /// Opens those sockets of a port that aren't open yet.
    fn open(&mut self, published: &Published, wanted: &BTreeSet<Published>) -> Vec<Warning> {
        let port = match self.ports.get(published) {
            Some(open) => Arc::clone(&open.port),
            None => {
                let service = Service {
                    settings: self.settings,
                    snapshots: self.snapshots.clone(),
                    freshness: self.freshness.clone(),
                    pipes: Arc::clone(&self.pipes),
                    connections: self.connections.clone(),
                    reset: self.reset.clone(),
                };
                Arc::new(Port::new(published.clone(), service))
            }
        };
        let mut warnings = Vec::new();
        let mut opened = Vec::new();
        for socket in published.sockets() {
            if self.ports.get(published).is_some_and(|open| open.sockets.contains_key(&socket)) {
                continue;
            }
            if let Some(other) = self.holder(socket) {
                let problem =
                    format!("cannot listen on {socket}: it is published for {other}; choose another host port");
                warnings.push(Warning { subject: published.to_string(), problem });
                continue;
            }
            let is_dual_stack = is_dual_stack(socket, wanted);
            match listener::bind(socket, is_dual_stack) {
                Ok(listener) => {
                    let close = CancellationToken::new();
                    let task = tokio::spawn(listener::run(listener, Arc::clone(&port), close.clone()));
                    opened.push((socket, Listener { is_dual_stack, close, task }));
                }
                Err(error) if listener::is_no_such_loopback(socket, &error) && published.bind.len() > 1 => {
                    tracing::debug!(port = %published, %socket, %error, "this host has no such loopback address");
                }
                Err(error) => warnings.push(Warning {
                    subject: published.to_string(),
                    problem: format!("cannot listen on {socket}: {error}; {}", listener::next_step(&error)),
                }),
            }
        }
        let open = self.ports.entry(published.clone()).or_insert_with(|| Open { port, sockets: BTreeMap::new() });
        for (socket, listening) in opened {
            tracing::info!(port = %published, %socket, "published");
            open.sockets.insert(socket, listening);
        }
        warnings
    }

    /// The published port that listens on a socket already.
    fn holder(&self, socket: SocketAddr) -> Option<&Published> {
        self.ports.iter().find(|(_, open)| open.sockets.contains_key(&socket)).map(|(published, _)| published)
    }

    /// The sockets that are listened on now.
    pub fn listening(&self) -> Vec<Listening> {
        let sockets = self.ports.iter().flat_map(|(published, open)| {
            open.sockets.iter().map(|(&at, listener)| Listening {
                at,
                is_dual_stack: listener.is_dual_stack,
                published: published.clone(),
            })
        });
        sockets.collect()
    }

    /// What every published port has seen since it was opened.
    pub fn counters(&self) -> Vec<(&Published, PortCounters)> {
        self.ports.iter().map(|(published, open)| (published, open.port.counters())).collect()
    }

    /// Closes all listeners, waits for connections to end by themselves, and resets those that haven't within `grace`.
    pub async fn shutdown(mut self, grace: Duration) {
        for open in std::mem::take(&mut self.ports).into_values() {
            for listening in open.sockets.into_values() {
                listening.close().await;
            }
        }
        self.connections.close();
        if tokio::time::timeout(grace, self.connections.wait()).await.is_err() {
            tracing::info!(connections = self.connections.len(), "resetting what is still open");
            self.reset.cancel();
            self.connections.wait().await;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for listening in self.ports.values().flat_map(|open| open.sockets.values()) {
            listening.close.cancel();
        }
        self.reset.cancel();
    }
}

/// `[::]` takes IPv4 clients too, but where the same port is wanted on `0.0.0.0` apart.
fn is_dual_stack(socket: SocketAddr, wanted: &BTreeSet<Published>) -> bool {
    let is_other = |other: SocketAddr| other.port() == socket.port() && other.is_ipv4() && other.ip().is_unspecified();
    socket.ip().is_unspecified() && !wanted.iter().flat_map(Published::sockets).any(is_other)
}

/// Where a snapshot has an instance: the link of its primary interface, and the address to connect to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The host-side link's index.
    pub ifindex: u32,
    /// The instance's address there.
    pub address: IpAddr,
}

impl Place {
    /// The first of [`Snapshot::interfaces_of`] that is attached and has an address: its first IPv4 address, or else its
    /// first IPv6 one, is where it is reached.
    pub fn of(snapshot: &Snapshot, published: &Published) -> Option<Self> {
        snapshot.interfaces_of(&published.instance).into_iter().filter(|(_, enforced)| enforced.attached).find_map(
            |(ifindex, Enforced { interface, .. })| {
                let own = |is_wanted: fn(&IpAddr) -> bool| interface.addresses.iter().copied().find(is_wanted);
                let address = own(IpAddr::is_ipv4).or_else(|| own(is_routed_v6))?;
                Some(Self { ifindex, address })
            },
        )
    }
}

fn is_routed_v6(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if !address.is_unicast_link_local())
}
