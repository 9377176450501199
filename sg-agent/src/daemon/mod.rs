//! `sg-agent run`: one task owns the state and does everything in turn; others only tell it what happened.
//!
//! Whatever happens (a rule changed, a container came, somebody asks) ends in the same reconciliation: resolve, compile,
//! apply, publish. What fails leaves the last good policy in force, and says so.

mod bridges;
mod changes;
mod commits;
mod control;
mod launched;
mod lock;
mod look;
mod pace;
mod poll;
mod pollers;
mod publish;
mod report;
mod scrape;
mod state;
mod systemd;
mod verify;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use sg_common::abi::{CUT_ON_REVOKE, Config};
use sg_common::conntrack::State;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::bridges::Bridges;
pub use self::bridges::EnforcedBridge;
use self::commits::Commits;
pub use self::control::{NotRunning, Reply, Request, ask};
pub use self::lock::{LockError, take as lock};
use self::look::{Looked, Lookout, View};
use self::poll::{Polled, Poller};
use self::pollers::Pollers;
use self::state::Desk;
use self::systemd::NotifyState;
use self::verify::Repairs;
use crate::apply::{Applier, Snapshot};
use crate::datapath::{Datapath, Pins};
use crate::discovery::{self, Attachment};
use crate::early::EarlyDrop;
use crate::gateway::{self, Gateway};
use crate::launcher;
use crate::model::{Inventory, Scope, Warning};
use crate::proxy::{self, Freshness, Proxy};
use crate::resolve::{self, Resolver, Unknown, World};
use crate::source::{Ec2Options, Extent};

/// Where this agent's files are; every subcommand has these.
#[derive(Clone, Debug)]
pub struct Places {
    /// Control socket and lock.
    pub state_dir: PathBuf,
    /// Pins.
    pub bpffs: PathBuf,
}

impl Places {
    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.state_dir.join("control.sock")
    }
}

/// Where rules come from.
#[derive(Clone, Debug)]
pub enum Origins {
    /// An EC2-compatible endpoint.
    Endpoint(Ec2Options),
    /// `--rules FILE`.
    File(PathBuf),
}

/// What `sg-agent run` was told.
#[derive(Debug)]
pub struct Options {
    /// Where its files are.
    pub places: Places,
    /// Where rules come from.
    pub origins: Origins,
    /// What to look at for instances.
    pub discovery: discovery::Options,
    /// `--enforce-bridge`.
    pub enforce_bridges: Vec<EnforcedBridge>,
    /// `--publish`.
    pub publish: Vec<proxy::PublishSpec>,
    /// `--deny`.
    pub deny: proxy::Deny,
    /// `--early-drop`.
    pub early_drop: EarlyDrop,
    /// `--live=endpoint`.
    pub live: bool,
    /// `--trust-proxy`.
    pub trust_proxy: Vec<IpNet>,
    /// `--proxy-protocol`.
    pub tell_client: bool,
    /// The time between two polls of an endpoint that answers.
    pub poll_interval: Duration,
    /// The gateway to the endpoint, if there is to be one.
    pub gateway: Option<gateway::Options>,
    /// `--metrics`.
    pub metrics: Option<SocketAddr>,
    /// How long a connection to a published port waits for rules that are stale.
    pub fresh_timeout: Duration,
    /// How the silent parts of the norm are read.
    pub resolve: resolve::Settings,
    /// The data path's settings.
    pub config: Config,
    /// `--launch`.
    pub launch: Option<launcher::Options>,
    /// Whether every dropped packet is logged.
    pub log_drops: bool,
    /// Whether enforcement ends with the agent.
    pub detach_on_exit: bool,
}

/// What the other tasks tell the daemon.
enum Event {
    /// Links and containers were looked at.
    Looked(Box<Looked>),
    /// The launcher has news.
    Launched,
    /// An endpoint or file was read.
    Polled(Box<Polled>),
    /// Somebody asks.
    Asked(Request, oneshot::Sender<Reply>),
}

/// How long connections through the proxy may go on after the agent was told to end.
const GRACE: Duration = Duration::from_secs(2);

/// The longest that anybody may wait for what is desired.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);

/// Clients of published ports whom nobody has heard yet; who comes when there are more waits with the others.
const ASKS: usize = 4_096;

/// How often expired flows are taken out of the table. They count for nothing before that, but take up room.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Runs until a signal ends it.
///
/// # Errors
/// What keeps it from starting: another agent holds the state directory, the kernel refuses, options contradict the
/// machine. Once it runs, nothing that it hears ends it.
pub async fn run(options: Options) -> Result<()> {
    // First of all: one that comes while the agent starts must not be lost, nor end it halfway.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _lock = lock::take(&options.places.state_dir)?;
    let open_files = raise_open_files();
    let mark = proxy_mark();
    let config = Config { proxy_mark: mark, ..options.config };
    let (mut datapath, maps) = tokio::task::block_in_place(|| {
        Datapath::load(&config, Some(Pins::new(&options.places.bpffs)), options.log_drops)
    })
    .context("the data path cannot be set up")?;
    if options.log_drops {
        datapath.follow_drops().context("the programs' log cannot be read")?;
    }
    let applier = Applier::new(datapath, maps, config);

    let shutdown = CancellationToken::new();
    let (events, mut inbox) = mpsc::channel(64);
    control::serve(options.places.socket(), events.clone(), shutdown.clone())?;
    if let Some(address) = options.metrics {
        scrape::serve(address, events.clone(), shutdown.clone()).await?;
    }
    let (commits, mut committing) = mpsc::channel(64);
    let gateway = match &options.gateway {
        Some(wanted) => changes::open_gateway(wanted, &options.origins, commits, shutdown.clone()).await?,
        None => (None, None),
    };
    let lookout = Lookout::start(options.discovery.clone(), events.clone(), shutdown.clone());
    let (asks, mut asked) = mpsc::channel(ASKS);
    let freshness = watch::Sender::new(false);
    let fresh = if options.live {
        Freshness::always(asks)
    } else {
        Freshness::while_stale(freshness.subscribe(), asks, options.fresh_timeout)
    };
    let snapshots = watch::Sender::new(applier.snapshot());
    let on_revoke = if config.flags & CUT_ON_REVOKE != 0 { proxy::OnRevoke::Cut } else { proxy::OnRevoke::Aws };
    let proxy = Proxy::new(snapshots.subscribe(), mark)
        .on_revoke(on_revoke)
        .fresh(fresh)
        .idle(udp_idle(&config))
        .most_connections(proxy::MOST_CONNECTIONS.min(open_files.saturating_sub(OWN_FILES) / FILES_OF_CONNECTION))
        .trust(options.trust_proxy.clone())
        .tell_client(options.tell_client);
    let launcher = launched::start(&options, &snapshots, events.clone(), shutdown.clone())?;
    let pollers = Pollers::new(&options, events)?;
    let mut daemon = Daemon {
        resolver: Resolver::new(options.resolve.clone()),
        unknown: options.resolve.unknown,
        lookout,
        flags: options.publish,
        deny: options.deny,
        early_drop: if options.live { EarlyDrop::Off } else { options.early_drop },
        trusts_balancers: !options.trust_proxy.is_empty(),
        live: options.live,
        applier,
        proxy,
        snapshots,
        pollers,
        gateway: gateway.0,
        launcher,
        launched: None,
        view: View::default(),
        attachments: Arc::default(),
        world: World::new(),
        desk: Desk::default(),
        commits: Commits::default(),
        freshness,
        early_is_stale: false,
        apply_error: None,
        refused: 0,
        flows: 0,
        repairs: Repairs::default(),
        bridges: Bridges::new(options.enforce_bridges, Pins::new(&options.places.bpffs)),
        poller_warnings: Vec::new(),
        proxy_warnings: Vec::new(),
        gateway_warning: gateway.1,
        told: BTreeSet::new(),
    };
    tracing::info!(socket = %options.places.socket().display(), "sg-agent {} is up", env!("CARGO_PKG_VERSION"));
    systemd::tell(&NotifyState::Ready);

    let mut sweeps = tokio::time::interval(SWEEP_INTERVAL);
    sweeps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = tokio::time::interval(verify::INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut asking = Vec::new();
    loop {
        tokio::select! {
            event = inbox.recv() => match event {
                Some(event) => daemon.on(event).await,
                None => break,
            },
            Some(commit) = committing.recv() => daemon.commit(commit),
            1.. = asked.recv_many(&mut asking, ASKS) => daemon.renew(asking.drain(..)),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = sweeps.tick() => daemon.sweep(),
            _ = looks.tick() => {
                systemd::tell(&NotifyState::Watchdog);
                daemon.verify();
            }
            () = daemon.desk.next_deadline() => daemon.desk.expire(),
            () = daemon.commits.next_gone() => {}
        }
        daemon.settle().await;
    }
    systemd::tell(&NotifyState::Stopping);
    shutdown.cancel();
    // Nobody listens from here on, so there is nothing to judge.
    daemon.applier.watch(&[]);
    daemon.proxy.shutdown(GRACE).await;
    if options.detach_on_exit {
        let report = Pins::new(&options.places.bpffs).remove_all();
        for error in &report.errors {
            tracing::error!("{error}; 'sg-agent detach' tries again");
        }
        tracing::info!(links = report.links, "enforcement ends (--detach-on-exit)");
    } else {
        tracing::info!("enforcement stays on without the agent; 'sg-agent detach' ends it");
    }
    Ok(())
}

/// Files that the agent has open beside connections.
const OWN_FILES: usize = 512;

/// Two sockets, and two pipes while bytes move both ways.
const FILES_OF_CONNECTION: usize = 6;

/// How long flows of datagrams may be idle: as long as conntrack's.
fn udp_idle(config: &Config) -> proxy::IdleTimes {
    let of = |state: State| Duration::from_nanos(config.timeouts[state as usize]);
    proxy::IdleTimes { single: of(State::UdpExchange), stream: of(State::UdpStream) }
}

/// As many open files as the system lets this process have, and how many that are.
fn raise_open_files() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(most, _)| usize::try_from(most).unwrap_or(usize::MAX))
}

/// A mark that nothing else on the machine is likely to use. Only what may set marks (CAP_NET_ADMIN in the host's
/// namespace) could guess it, and that may do anything here anyway.
fn proxy_mark() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(std::process::id()) as u32;
    if random == 0 { 1 } else { random }
}

/// Everything that the agent knows.
struct Daemon {
    lookout: Lookout,
    gateway: Option<Gateway>,
    unknown: Unknown,
    flags: Vec<proxy::PublishSpec>,
    deny: proxy::Deny,
    early_drop: EarlyDrop,
    trusts_balancers: bool,
    /// Whether each connection has the endpoint read (`--live=endpoint`).
    live: bool,
    resolver: Resolver,
    applier: Applier,
    proxy: Proxy,
    snapshots: watch::Sender<Arc<Snapshot>>,
    pollers: Pollers,
    launcher: Option<launcher::Handle>,
    /// The launcher's outcome that was published last.
    launched: Option<Arc<launcher::State>>,
    view: View,
    /// What is attached, as the resolver knows it.
    attachments: Arc<[Attachment]>,
    world: World,
    desk: Desk,
    commits: Commits,
    /// Whether what is enforced may be older than the last change.
    freshness: watch::Sender<bool>,
    /// The same when early drops were last decided.
    early_is_stale: bool,
    apply_error: Option<String>,
    /// Changes that were refused whole.
    refused: u64,
    /// Flows that lived at the last sweep.
    flows: u32,
    repairs: Repairs,
    bridges: Bridges,
    poller_warnings: Vec<Warning>,
    proxy_warnings: Vec<Warning>,
    gateway_warning: Option<Warning>,
    /// Warnings that are in the log already.
    told: BTreeSet<Warning>,
}

impl Daemon {
    async fn on(&mut self, event: Event) {
        match event {
            Event::Looked(looked) => {
                self.look(*looked);
                self.reconcile().await;
            }
            Event::Launched => self.publish().await,
            Event::Polled(polled) => {
                if self.take(*polled) || self.has_failed() {
                    self.reconcile().await;
                }
            }
            Event::Asked(Request::Status, reply) => {
                let _ = reply.send(Reply::Status(Box::new(self.status())));
            }
            Event::Asked(Request::Explain(query), reply) => {
                let _ = reply.send(self.explain(&query));
            }
            Event::Asked(Request::Sync { seconds }, reply) => {
                let asked = Instant::now();
                let patience = Duration::try_from_secs_f64(seconds).unwrap_or_default().min(LONGEST_WAIT);
                self.desk.wait(asked, patience, reply);
                self.lookout.hurry();
                for poller in self.pollers.running.values() {
                    poller.hurry(Extent::Everything);
                }
                self.launcher.iter().for_each(launcher::Handle::hurry);
            }
        }
    }

    fn look(&mut self, looked: Looked) {
        self.view.take(looked);
        self.view.discovered.find_hidden(self.applier.earlier_links());
        if let Origins::File(_) = self.pollers.origins {
            // One file is all accounts and regions.
            for attachment in &mut self.view.discovered.attachments {
                (attachment.account, attachment.region) = (None, None);
            }
        }
        if *self.attachments != *self.view.discovered.attachments {
            self.attachments = self.view.discovered.attachments.clone().into();
        }
        self.want();
    }

    /// Asks the sources for what is attached.
    fn want(&mut self) {
        let mut warnings = Vec::new();
        let references = resolve::foreign_references(&self.world);
        self.pollers.want(&self.view.discovered.attachments, references, &mut warnings);
        self.poller_warnings = warnings;
    }

    /// Takes a source's answer in; whether anything is other than before. One that failed changes nothing, unless what
    /// can't be read is to be denied (`--unknown=deny`).
    fn take(&mut self, polled: Polled) -> bool {
        let Some(poller) = self.pollers.running.get_mut(&polled.hint) else { return false };
        let before = poller.standing();
        let read = poller.note(polled);
        let mut is_other = poller.standing() != before;
        match read {
            Some((scope, mut inventory)) => {
                let last = self.world.get(&scope).cloned().unwrap_or_default();
                if self.unknown != Unknown::Deny && matches!(self.pollers.origins, Origins::Endpoint(_)) {
                    let here = self.view.discovered.attachments.iter().map(|attachment| &attachment.instance);
                    inventory.keep_lost(&last, here);
                }
                is_other |= inventory != last;
                self.world.insert(scope, inventory);
            }
            None if self.unknown == Unknown::Deny => {
                let scope = poller.scope();
                is_other |=
                    self.world.insert(scope, Inventory::default()).is_some_and(|last| last != Inventory::default());
            }
            None => {}
        }
        self.want();
        let live: BTreeSet<Scope> = self.pollers.running.values().map(Poller::scope).collect();
        let scopes = self.world.len();
        self.world.retain(|scope, _| live.contains(scope));
        is_other || self.world.len() != scopes
    }

    /// Whether something that was to be done wasn't, and is to be tried again.
    fn has_failed(&self) -> bool {
        let snapshot = self.applier.snapshot();
        self.apply_error.is_some()
            || !self.proxy_warnings.is_empty()
            || snapshot.interfaces.values().any(|enforced| !enforced.attached)
    }

    /// From what is known to what is enforced.
    async fn reconcile(&mut self) {
        let own = self.pollers.own_scope();
        let desired = self.resolver.resolve(&self.world, &own, &self.attachments);
        // Once it was complete, nobody asks again.
        let complete = self.applier.is_started() || self.is_complete();
        let applied = tokio::task::block_in_place(|| {
            let applied = self.applier.apply(&desired, complete);
            // A port of an enforced bridge is admitted when its programs are there, and waits for nothing else.
            self.bridges.settle(&self.view.discovered, &self.applier.snapshot(), complete);
            self.applier.collect();
            applied
        });
        match applied {
            Ok(snapshot) => {
                self.apply_error = None;
                self.snapshots.send_replace(snapshot);
            }
            Err(error) => {
                let text = error.to_string();
                if self.apply_error.as_ref() != Some(&text) {
                    tracing::error!("{text}");
                    self.refused += 1;
                }
                self.apply_error = Some(text);
            }
        }
        self.publish().await;
    }

    /// Whether every source and every link was read since the start.
    fn is_complete(&self) -> bool {
        self.view.looked.is_some()
            && self.view.error.is_none()
            && self.pollers.running.values().all(|poller| poller.last_success().is_some())
            && self.pollers.running.values().all(|poller| poller.unread_groups().is_empty())
            && self.view.discovered.attachments.iter().all(|attachment| !self.is_unasked(&attachment.instance))
    }

    fn sweep(&mut self) {
        self.proxy.measure();
        match tokio::task::block_in_place(|| self.applier.sweep()) {
            Ok(live) => self.flows = live,
            Err(error) => tracing::warn!(%error, "expired flows stay in the table"),
        }
    }
}
