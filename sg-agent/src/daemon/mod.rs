//! `sg-agent run`: one task owns the state and does everything in turn; others only tell it what happened.
//!
//! Whatever happens (a rule changed, a container came, somebody asks) ends in the same reconciliation: resolve, compile,
//! apply, publish. What fails leaves the last good policy in force, and says so.

mod control;
mod lock;
mod poll;
mod pollers;
mod state;
mod verify;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sg_common::abi::{CUT_ON_REVOKE, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use self::control::{NotRunning, Reply, Request, ask};
pub use self::lock::{LockError, take as lock};
use self::poll::{Polled, Poller};
use self::pollers::Pollers;
use self::state::Desk;
use self::verify::Repairs;
use crate::apply::{Applier, Snapshot};
use crate::datapath::{Datapath, Pins};
use crate::discovery::{self, Attachment, Discovered, DiscoveryError, Origin};
use crate::model::{InstanceId, Scope, Warning};
use crate::proxy::{self, Proxy};
use crate::resolve::{self, Resolver, World};
use crate::source::Ec2Options;
use crate::status::{Report, Status};
use crate::{explain, live};

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
    /// `--publish`.
    pub publish: Vec<proxy::PublishSpec>,
    /// The time between two polls of an endpoint that answers.
    pub poll_interval: Duration,
    /// How the silent parts of the norm are read.
    pub resolve: resolve::Settings,
    /// The data path's settings.
    pub config: Config,
    /// Whether every dropped packet is logged.
    pub log_drops: bool,
    /// Whether enforcement ends with the agent.
    pub detach_on_exit: bool,
}

/// What the other tasks tell the daemon.
enum Event {
    /// Links or containers may have changed.
    Look,
    /// An endpoint or file was read.
    Polled(Box<Polled>),
    /// Somebody asks.
    Asked(Request, oneshot::Sender<Reply>),
}

/// How long connections through the proxy may go on after the agent was told to end.
const GRACE: Duration = Duration::from_secs(2);

/// The longest that anybody may wait for what is desired.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);

/// How long to wait before links are listened to again, when that failed.
const DEAF: Duration = Duration::from_secs(2);

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
    raise_open_files();
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
    watch_links(&options.discovery, events.clone(), shutdown.clone());
    let snapshots = watch::Sender::new(applier.snapshot());
    let on_revoke = if config.flags & CUT_ON_REVOKE != 0 { proxy::OnRevoke::Cut } else { proxy::OnRevoke::Aws };
    let proxy = Proxy::new(snapshots.subscribe(), mark).on_revoke(on_revoke);
    let pollers = Pollers::new(&options, events)?;
    let mut daemon = Daemon {
        resolver: Resolver::new(options.resolve.clone()),
        discovery: options.discovery,
        flags: options.publish,
        applier,
        proxy,
        snapshots,
        pollers,
        discovered: Discovered::default(),
        looked: None,
        looked_error: None,
        world: World::new(),
        desk: Desk::default(),
        apply_error: None,
        refused: 0,
        flows: 0,
        repairs: Repairs::default(),
        poller_warnings: Vec::new(),
        proxy_warnings: Vec::new(),
        told: BTreeSet::new(),
    };
    tracing::info!(socket = %options.places.socket().display(), "sg-agent {} is up", env!("CARGO_PKG_VERSION"));
    daemon.look().await;
    daemon.reconcile().await;

    let mut sweeps = tokio::time::interval(SWEEP_INTERVAL);
    sweeps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = tokio::time::interval(verify::INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = inbox.recv() => match event {
                Some(event) => daemon.on(event).await,
                None => break,
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = sweeps.tick() => daemon.sweep(),
            _ = looks.tick() => daemon.verify(),
            () = daemon.desk.next_deadline() => daemon.desk.expire(),
        }
    }
    shutdown.cancel();
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

/// As many open files as the system lets this process have: a proxied connection takes two to six.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// A mark that nothing else on the machine is likely to use. Only what may set marks (CAP_NET_ADMIN in the host's
/// namespace) could guess it, and that may do anything here anyway.
fn proxy_mark() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new().hash_one(std::process::id()) as u32;
    if random == 0 { 1 } else { random }
}

/// Tells the daemon when links and containers change. Where that can't be heard, it looks by itself now and then.
fn watch_links(options: &discovery::Options, events: mpsc::Sender<Event>, shutdown: CancellationToken) {
    let options = options.clone();
    let watch = async move {
        loop {
            let (tell, mut told) = mpsc::channel(1);
            let forward = async {
                while told.recv().await.is_some() {
                    if events.send(Event::Look).await.is_err() {
                        break;
                    }
                }
            };
            let (result, ()) = tokio::join!(discovery::watch(&options, tell), forward);
            if let Err(error) = result {
                tracing::warn!(%error, "changes of links are not heard at once; listening again in {DEAF:?}");
            }
            tokio::time::sleep(DEAF).await;
            if events.send(Event::Look).await.is_err() {
                return;
            }
        }
    };
    tokio::spawn(shutdown.run_until_cancelled_owned(watch));
}

/// Everything that the agent knows.
struct Daemon {
    discovery: discovery::Options,
    flags: Vec<proxy::PublishSpec>,
    resolver: Resolver,
    applier: Applier,
    proxy: Proxy,
    snapshots: watch::Sender<Arc<Snapshot>>,
    pollers: Pollers,
    discovered: Discovered,
    looked: Option<Instant>,
    looked_error: Option<String>,
    world: World,
    desk: Desk,
    apply_error: Option<String>,
    /// Changes that were refused whole.
    refused: u64,
    /// Flows that lived at the last sweep.
    flows: u32,
    repairs: Repairs,
    poller_warnings: Vec<Warning>,
    proxy_warnings: Vec<Warning>,
    /// Warnings that are in the log already.
    told: BTreeSet<Warning>,
}

impl Daemon {
    async fn on(&mut self, event: Event) {
        match event {
            Event::Look => {
                self.look().await;
                self.reconcile().await;
            }
            Event::Polled(polled) => {
                self.take(*polled);
                self.reconcile().await;
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
                self.look().await;
                self.reconcile().await;
                for poller in self.pollers.running.values() {
                    poller.hurry();
                }
            }
        }
        self.serve_waiting();
    }

    /// Looks at containers and links. What can't be seen now is taken to be as it was.
    async fn look(&mut self) {
        let began = Instant::now();
        match discovery::scan(&self.discovery).await {
            Ok(discovered) => {
                let last = std::mem::replace(&mut self.discovered, discovered);
                self.discovered.keep_hidden(last);
                self.looked_error = None;
            }
            Err(error) => {
                let text = error.to_string();
                if self.looked_error.as_ref() != Some(&text) {
                    tracing::warn!("{text}; what was attached stays enforced");
                }
                if let DiscoveryError::Docker { attached, .. } = error {
                    let by_docker = |attachment: &Attachment| matches!(attachment.origin, Origin::Docker { .. });
                    let known = std::mem::take(&mut self.discovered);
                    self.discovered = *attached;
                    let attachments = known.attachments.into_iter().filter(by_docker);
                    let fresh: BTreeSet<u32> = self.discovered.attachments.iter().map(|a| a.link.ifindex).collect();
                    self.discovered.attachments.extend(attachments.filter(|a| !fresh.contains(&a.link.ifindex)));
                }
                self.looked_error = Some(text);
            }
        }
        if let Origins::File(_) = self.pollers.origins {
            // One file is all accounts and regions.
            for attachment in &mut self.discovered.attachments {
                (attachment.account, attachment.region) = (None, None);
            }
        }
        self.looked = Some(began);
        self.want();
    }

    /// Asks the sources for what is attached.
    fn want(&mut self) {
        let mut warnings = Vec::new();
        self.pollers.want(&self.discovered.attachments, &mut warnings);
        self.poller_warnings = warnings;
    }

    /// Takes a source's answer in. One that failed changes nothing.
    fn take(&mut self, polled: Polled) {
        let Some(poller) = self.pollers.running.get_mut(&polled.hint) else { return };
        if let Some((scope, inventory)) = poller.note(polled) {
            self.world.insert(scope, inventory);
        }
        self.want();
        let live: BTreeSet<Scope> = self.pollers.running.values().map(Poller::scope).collect();
        self.world.retain(|scope, _| live.contains(scope));
    }

    /// From what is known to what is enforced.
    async fn reconcile(&mut self) {
        let own = self.pollers.own_scope();
        let desired = self.resolver.resolve(&self.world, &own, &self.discovered.attachments);
        let complete = self.is_complete();
        let applied = tokio::task::block_in_place(|| {
            let applied = self.applier.apply(&desired, complete);
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
        let wanted = self.published();
        self.proxy_warnings = self.proxy.reconcile(wanted).await;
        self.proxy_warnings.extend(self.unattached());
        self.tell();
    }

    /// Whether every source and every link was read since the start.
    fn is_complete(&self) -> bool {
        self.looked_error.is_none()
            && self.pollers.running.values().all(|poller| poller.last_success().is_some())
            && self.discovered.attachments.iter().all(|attachment| !self.is_new(&attachment.instance.0))
    }

    fn explain(&mut self, query: &explain::Query) -> Reply {
        let mut explanation = match explain::explain(&self.applier.snapshot(), query) {
            Ok(explanation) => explanation,
            Err(error) => return Reply::Error(error.to_string()),
        };
        if query.live {
            let verified = tokio::task::block_in_place(|| live::verify(&mut self.applier, query, &mut explanation));
            if let Err(error) = verified {
                return Reply::Error(format!("the kernel could not be asked: {error}"));
            }
        }
        Reply::Explanation(explanation)
    }

    fn sweep(&mut self) {
        match tokio::task::block_in_place(|| self.applier.sweep()) {
            Ok(live) => self.flows = live,
            Err(error) => tracing::warn!(%error, "expired flows stay in the table"),
        }
    }

    /// Published ports of instances that aren't attached here: every client is refused.
    fn unattached(&self) -> Vec<Warning> {
        let attached = |instance: &InstanceId| self.discovered.attachments.iter().any(|a| a.instance == *instance);
        let missing = self.flags.iter().filter(|port| !attached(&port.instance));
        let warn = |port: &proxy::PublishSpec| Warning {
            subject: port.instance.to_string(),
            problem: format!("is not attached here: clients of host port {} are refused until it is", port.host_port),
        };
        missing.map(warn).collect()
    }

    /// The ports that flags and containers publish.
    fn published(&self) -> Vec<proxy::Published> {
        let by_label = self.discovered.attachments.iter().flat_map(|attachment| {
            attachment.publish.iter().map(|port| proxy::PublishSpec {
                instance: attachment.instance.clone(),
                bind: None,
                host_port: port.host_port,
                port: port.port,
            })
        });
        self.flags.iter().cloned().chain(by_label).map(proxy::Published::from).collect()
    }

    /// Logs each warning once for as long as it stands.
    fn tell(&mut self) {
        let now = self.warnings();
        for warning in now.difference(&self.told) {
            tracing::warn!(subject = %warning.subject.escape_default(), "{}", warning.problem);
        }
        for gone in self.told.difference(&now) {
            tracing::info!(subject = %gone.subject.escape_default(), "no longer: {}", gone.problem);
        }
        self.told = now;
    }

    fn warnings(&self) -> BTreeSet<Warning> {
        let snapshot = self.applier.snapshot();
        let mut warnings = snapshot.warnings.clone();
        // An instance that no poll has asked for yet isn't unknown, only new.
        warnings.retain(|warning| !self.is_new(&warning.subject));
        warnings.extend(self.discovered.warnings.iter().chain(&self.poller_warnings).cloned());
        warnings.extend(self.proxy_warnings.iter().cloned());
        warnings
    }

    fn is_new(&self, subject: &str) -> bool {
        self.discovered.attachments.iter().any(|attachment| {
            *attachment.instance.0 == *subject
                && self.pollers.running.values().all(|poller| !poller.has_asked_for(&attachment.instance))
        })
    }

    /// Answers those who wait for the desired state, once it is enforced.
    fn serve_waiting(&mut self) {
        let oldest = self.pollers.running.values().map(Poller::last_success).min().flatten();
        let since = oldest.map(|oldest| oldest.min(self.looked.unwrap_or(oldest)));
        let errors = self.pollers.running.values().filter_map(Poller::error);
        let problems: Vec<String> = self.problems().into_iter().chain(errors).collect();
        self.desk.serve(since, problems);
    }

    /// What keeps the desired state from being the enforced one.
    fn problems(&self) -> Vec<String> {
        let snapshot = self.applier.snapshot();
        let unattached = snapshot.interfaces.values().filter(|enforced| !enforced.attached);
        let unattached = unattached.map(|enforced| format!("link {} is not enforced", enforced.interface.link));
        let unasked = self.discovered.attachments.iter().filter(|attachment| self.is_new(&attachment.instance.0));
        let unasked = unasked.map(|attachment| format!("instance {} was not read yet", attachment.instance));
        let errors = self.apply_error.iter().chain(&self.looked_error).cloned().chain(self.repairs.error());
        unattached.chain(unasked).chain(errors).collect()
    }

    fn status(&self) -> Status {
        let report = Report {
            sources: self.pollers.running.values().map(Poller::status).collect(),
            published: self.proxy.counters(),
            warnings: self.warnings().into_iter().chain(self.repairs.warnings()).collect(),
            problems: self.problems(),
            refused: self.refused,
            flows: self.flows,
            repairs: self.repairs.counts(),
        };
        Status::new(&self.applier.snapshot(), self.applier.maps(), report)
    }
}
