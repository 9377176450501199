//! Published ports: each connection's real client is judged by the latest snapshot, then connected through.
//!
//! A connection's way: `listener` (accept) -> `header` (a balancer's client) -> `freshness` (rules read anew, where those
//! in force won't do) -> `connection` (judge, connect, judge again on every change) -> `splice` (bytes). UDP's is in
//! `datagrams`. Asks nobody but [`crate::decide`], and writes no map.

#![forbid(unsafe_code)]

mod connection;
mod counters;
mod datagrams;
mod freshness;
mod header;
mod listener;
mod publish;
mod splice;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use counters::PortCounters;
pub use datagrams::IdleTimes;
pub use freshness::{Ask, Freshness};
pub use publish::{DEFAULT_BIND, InvalidPublish, PublishSpec, Published, Transport};

use crate::apply::{Enforced, Snapshot};
use crate::model::Warning;
use connection::{Port, Service};
use counters::Rates;

/// Connections of one published port at once. More wait in the accept queue, as they would at a busy server.
pub const MAX_CONNECTIONS: usize = 16_384;

/// Connections of all ports at once, unless more files can't be open.
pub const MOST_CONNECTIONS: usize = 65_536;

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
#[derive(Clone, Debug)]
struct Settings {
    /// The `SO_MARK` of connections to instances; 0 for none.
    mark: u32,
    on_revoke: OnRevoke,
    max_connections: usize,
    /// Whose word for a client is taken.
    trusted: Arc<[IpNet]>,
    /// Whether instances are told of the client.
    tells_client: bool,
    idle: IdleTimes,
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
    most: usize,
    limit: Arc<Semaphore>,
    flows: Arc<Semaphore>,
    /// Ends connections that outlive the grace time.
    reset: CancellationToken,
}

/// A published port and its sockets.
#[derive(Debug)]
struct Open {
    port: Arc<Port>,
    rates: Rates,
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
        let idle = IdleTimes { single: Duration::from_secs(30), stream: Duration::from_secs(180) };
        let settings = Settings {
            mark,
            on_revoke: OnRevoke::default(),
            max_connections: MAX_CONNECTIONS,
            trusted: Arc::default(),
            tells_client: false,
            idle,
        };
        Self {
            snapshots,
            settings,
            freshness: Freshness::default(),
            pipes: Arc::default(),
            ports: BTreeMap::new(),
            connections: TaskTracker::new(),
            most: MOST_CONNECTIONS,
            limit: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
            flows: Arc::new(Semaphore::new(most_flows(MOST_CONNECTIONS))),
            reset: CancellationToken::new(),
        }
    }

    /// What a revoke does to live connections. For ports that are opened from now on.
    #[must_use]
    pub fn on_revoke(mut self, on_revoke: OnRevoke) -> Self {
        self.settings.on_revoke = on_revoke;
        self
    }

    /// Where connections have rules read anew, and which ones do. For ports that are opened from now on.
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

    /// How many connections all ports have at once, half of them flows of datagrams at most. For ports that are opened from
    /// now on.
    #[must_use]
    pub fn most_connections(mut self, most: usize) -> Self {
        self.most = most.min(Semaphore::MAX_PERMITS);
        self.limit = Arc::new(Semaphore::new(self.most));
        self.flows = Arc::new(Semaphore::new(most_flows(self.most)));
        self
    }

    /// From whom a PROXY header is taken, and then expected. For ports that are opened from now on.
    #[must_use]
    pub fn trust(mut self, networks: Vec<IpNet>) -> Self {
        self.settings.trusted = networks.into();
        self
    }

    /// Whether instances are told of the client by a PROXY header of version 2. For ports that are opened from now on.
    #[must_use]
    pub fn tell_client(mut self, tell: bool) -> Self {
        self.settings.tells_client = tell;
        self
    }

    /// When a flow of datagrams is forgotten. For ports that are opened from now on.
    #[must_use]
    pub fn idle(mut self, idle: IdleTimes) -> Self {
        self.settings.idle = idle;
        self
    }

    /// How many connections all ports have now, and can have.
    pub fn connections(&self) -> (usize, usize) {
        (self.most - self.limit.available_permits(), self.most)
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
                    settings: self.settings.clone(),
                    snapshots: self.snapshots.clone(),
                    freshness: self.freshness.clone(),
                    pipes: Arc::clone(&self.pipes),
                    connections: self.connections.clone(),
                    limit: Arc::clone(&self.limit),
                    flows: Arc::clone(&self.flows),
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
            if let Some(other) = self.holder(socket, published.transport) {
                let problem =
                    format!("cannot listen on {socket}: it is published for {other}; choose another host port");
                warnings.push(Warning { subject: published.to_string(), problem });
                continue;
            }
            let is_dual_stack = is_dual_stack(socket, published.transport, wanted);
            let close = CancellationToken::new();
            match listen(socket, is_dual_stack, &port, &close) {
                Ok(task) => {
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
        let open = self.ports.entry(published.clone()).or_insert_with(|| Open {
            port,
            rates: Rates::default(),
            sockets: BTreeMap::new(),
        });
        for (socket, listening) in opened {
            tracing::info!(port = %published, %socket, "published");
            open.sockets.insert(socket, listening);
        }
        warnings
    }

    /// The published port that listens on a socket already.
    fn holder(&self, socket: SocketAddr, transport: Transport) -> Option<&Published> {
        let mut ports = self.ports.iter().filter(|(published, _)| published.transport == transport);
        ports.find(|(_, open)| open.sockets.contains_key(&socket)).map(|(published, _)| published)
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
        self.ports.iter().map(|(published, open)| (published, open.rates.add_to(open.port.counters()))).collect()
    }

    /// Measures rates over the time since the last call.
    pub fn measure(&mut self) {
        let now = Instant::now();
        for open in self.ports.values_mut() {
            open.rates.look(&open.port.counts, now);
        }
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

/// How many of all connections may be flows of datagrams.
fn most_flows(most: usize) -> usize {
    most.div_ceil(2)
}

/// Binds a socket, and has a task listen there.
fn listen(
    socket: SocketAddr,
    is_dual_stack: bool,
    port: &Arc<Port>,
    close: &CancellationToken,
) -> std::io::Result<JoinHandle<()>> {
    let (its_port, close) = (Arc::clone(port), close.clone());
    Ok(match port.published.transport {
        Transport::Tcp => tokio::spawn(listener::run(listener::bind(socket, is_dual_stack)?, its_port, close)),
        Transport::Udp => tokio::spawn(datagrams::run(datagrams::bind(socket, is_dual_stack)?, its_port, close)),
    })
}

/// `[::]` takes IPv4 clients too, but where the same port is wanted on `0.0.0.0` apart.
fn is_dual_stack(socket: SocketAddr, transport: Transport, wanted: &BTreeSet<Published>) -> bool {
    let is_other = |other: SocketAddr| other.port() == socket.port() && other.is_ipv4() && other.ip().is_unspecified();
    let others = wanted.iter().filter(|published| published.transport == transport);
    socket.ip().is_unspecified() && !others.flat_map(Published::sockets).any(is_other)
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
