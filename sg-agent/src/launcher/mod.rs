//! `--launch`: an instance that the control plane has becomes a container, and follows what the control plane says of
//! it. Owns these containers, their networks and their published ports' numbers; enforces nothing, and opens no port.
//!
//! A task of its own looks at the endpoint and at Docker, and compares ([`plan`]); one worker an instance brings it to
//! its goal ([`work`]). Nothing is remembered but numbers of ports: what is to be done follows from what is seen, so
//! an agent that starts anew, a Docker that restarts and a container that somebody removed are all the same to it.
//!
//! An instance is two containers (see [`holder`]), and nothing of it runs before the agent says that its rules are in
//! force on its link.

mod engine;
mod files;
mod holder;
mod images;
mod network;
mod plan;
mod ports;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

pub use self::images::{ConfigError, DEFAULT_IMAGE, ImageSpec, Images, InvalidImage};
pub use self::ports::{DEFAULT_RANGE, parse_range};

use self::engine::{Engine, LAUNCHER, Marks};
use self::plan::{Goal, Seen};
use self::ports::Ports;
use self::work::{Context, Job, Step};
use crate::apply::Snapshot;
use crate::discovery::docker;
use crate::model::{EniId, InstanceId, VpcId, Warning};
use crate::proxy::PublishSpec;
use crate::source::{Ec2, Ec2Options, Launch, SourceError};

/// What `--launch` was told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which image stands for which machine image.
    pub images: Images,
    /// The host's ports to publish at.
    pub ports: RangeInclusive<u16>,
}

/// Where the launcher looks, and what it is part of.
#[derive(Clone, Debug)]
pub struct Place {
    /// The endpoint.
    pub ec2: Ec2Options,
    /// The time between two looks.
    pub interval: Duration,
    /// Docker's address, as discovery has it.
    pub docker_host: Option<String>,
    /// The agent's; it has the file of ports, and tells the launchers of one machine apart.
    pub state_dir: PathBuf,
}

/// Why an instance isn't as it should be, or why there is no launcher.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Its instances are AWS's to run.
    #[error("{0} is AWS itself, which runs its instances; --launch is for emulators, name one with --endpoint-url")]
    NotAnEmulator(String),
    /// Options that can't be used, or a question that has no answer.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Docker said no.
    #[error("docker: {0}")]
    Docker(#[from] bollard::errors::Error),
    /// There is no such image.
    #[error("its image {image} is not here and can't be pulled: {cause}; choose another with --launch-image or --launch-default-image{}",
        if image == DEFAULT_IMAGE { ", or make it by 'cargo xtask image --instance'" } else { "" })]
    Image {
        /// Its name.
        image: String,
        /// What Docker says.
        cause: bollard::errors::Error,
    },
    /// A network that can't be used.
    #[error("its network {name} can't be used: {problem}")]
    Network {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
    /// An id that the endpoint made up.
    #[error("{0}; such an instance is not launched")]
    Name(String),
    /// The endpoint shows none.
    #[error("the endpoint shows no network interface of it")]
    NoInterface,
    /// Somebody took it out of its networks.
    #[error("its network container is in other networks than it should be; remove it, and it is made anew")]
    NotWired,
    /// Docker's processes can't be looked into.
    #[error("its network can't be looked into: {0}; run the agent as root in the host's pid namespace (--pid host)")]
    Hidden(io::Error),
    /// An archive for Docker.
    #[error("cannot make an archive: {0}")]
    Archive(io::Error),
}

/// How things stand.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct State {
    /// The look that this is the outcome of began then; none if there was none that saw everything.
    pub read: Option<Instant>,
    /// The generation of the enforced state that the ports are by.
    pub generation: u64,
    /// What the proxy is to publish.
    pub ports: Vec<PublishSpec>,
    /// What isn't done yet, for people.
    pub underway: Vec<String>,
    /// Why the last look saw nothing.
    pub error: Option<String>,
    /// Instances that can't be launched, ports that can't be published.
    pub warnings: Vec<Warning>,
}

/// The launcher, as the daemon has it.
#[derive(Clone, Debug)]
pub struct Handle {
    state: watch::Receiver<Arc<State>>,
    hurry: Arc<Notify>,
    reboots: mpsc::UnboundedSender<InstanceId>,
}

impl Handle {
    /// How things stand; changes can be waited for.
    pub fn state(&self) -> &watch::Receiver<Arc<State>> {
        &self.state
    }

    /// Looks now.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Ends an instance's container and starts it again, if it runs. Whoever hears of RebootInstances has to say so:
    /// no answer of the endpoint shows it.
    pub fn reboot(&self, instance: InstanceId) {
        // It has ended with the agent.
        let _ = self.reboots.send(instance);
        self.hurry();
    }
}

/// Starts the launcher; it ends when `shutdown` is cancelled. What it started goes on.
///
/// # Errors
/// Options that can't be used.
pub fn start(
    options: Options,
    place: Place,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shutdown: CancellationToken,
) -> Result<Handle, LaunchError> {
    let ec2 = Arc::new(Ec2::new(&place.ec2)?);
    if !ec2.is_emulator() {
        return Err(LaunchError::NotAnEmulator(ec2.endpoint()));
    }
    let marks = Marks {
        launcher: place.state_dir.display().to_string(),
        region: ec2.scope().region.to_string(),
        account: ec2.told_account().map(str::to_owned),
    };
    let (tell, state) = watch::channel(Arc::default());
    let (reboots, rebooted) = mpsc::unbounded_channel();
    let hurry = Arc::new(Notify::new());
    let deep = Arc::new(AtomicBool::new(true));
    let (seen, pictures) = mpsc::channel(1);
    let observer = Observer {
        ec2: Arc::clone(&ec2),
        marks: marks.clone(),
        docker_host: place.docker_host.clone(),
        interval: place.interval,
        hurry: Arc::clone(&hurry),
        deep: Arc::clone(&deep),
        pictures: seen,
    };
    let launcher = Launcher {
        ports: Ports::load(&place.state_dir, options.ports),
        context: Arc::new(Context::new(ec2, options.images, snapshots.clone())),
        hurry: Arc::clone(&hurry),
        looked_into: BTreeMap::new(),
        to_sweep: true,
        reboot: BTreeSet::new(),
        workers: BTreeMap::new(),
        failed: BTreeMap::new(),
        starts: BTreeMap::new(),
        ended: BTreeSet::new(),
        tasks: JoinSet::new(),
        launches: Vec::new(),
        tagging: None,
        untagged: None,
        state: State::default(),
        tell,
    };
    let events = docker_events(place.docker_host, marks.launcher, deep, Arc::clone(&hurry));
    tracing::info!("instances become containers (--launch)");
    tokio::spawn(shutdown.run_until_cancelled_owned(async {
        tokio::join!(observer.run(), launcher.run(pictures, snapshots, rebooted), events);
    }));
    Ok(Handle { state, hurry, reboots })
}

/// What was seen at one moment.
struct Picture {
    began: Instant,
    outcome: Result<(Vec<Launch>, Seen, Engine), String>,
}

/// Looks at the endpoint and at Docker.
struct Observer {
    ec2: Arc<Ec2>,
    marks: Marks,
    docker_host: Option<String>,
    interval: Duration,
    hurry: Arc<Notify>,
    /// Something happened to a container: its namespace may be another.
    deep: Arc<AtomicBool>,
    pictures: mpsc::Sender<Picture>,
}

/// The longest time between two looks at an endpoint that doesn't answer.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

impl Observer {
    async fn run(self) {
        let mut pause = self.interval;
        loop {
            let began = Instant::now();
            let outcome = self.look().await;
            pause = if outcome.is_ok() { self.interval } else { (pause * 2).min(LONGEST_PAUSE) };
            if self.pictures.send(Picture { began, outcome }).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.hurry.notified() => {}
            }
        }
    }

    async fn look(&self) -> Result<(Vec<Launch>, Seen, Engine), String> {
        let launches = self.ec2.launches().await.map_err(|error| error.to_string())?;
        let failed = |endpoint: &str, error: &dyn std::fmt::Display| format!("docker at {endpoint:?}: {error}");
        let (docker, endpoint) = docker::connect(self.docker_host.as_deref())
            .await
            .map_err(|failure| failed(&failure.endpoint, &failure.cause))?;
        let engine = Engine { docker, marks: self.marks.clone() };
        let deep = self.deep.swap(false, Ordering::Relaxed);
        match engine.look(deep).await {
            Ok(seen) => Ok((launches, seen, engine)),
            Err(error) => {
                self.deep.fetch_or(deep, Ordering::Relaxed);
                Err(failed(&endpoint, &error))
            }
        }
    }
}

/// Tells the observer of containers that start and end. While Docker doesn't answer, it looks by itself.
async fn docker_events(host: Option<String>, launcher: String, deep: Arc<AtomicBool>, hurry: Arc<Notify>) {
    let label = format!("{LAUNCHER}={launcher}");
    let filters = [("type", vec!["container"]), ("event", vec!["start", "die", "destroy"]), ("label", vec![&*label])];
    let filters = filters.into_iter().collect();
    loop {
        if let Ok((docker, _)) = docker::connect(host.as_deref()).await {
            let request = EventsOptionsBuilder::new().filters(&filters).build();
            let mut events = std::pin::pin!(docker.events(Some(request)));
            // What happened until now.
            deep.store(true, Ordering::Relaxed);
            hurry.notify_one();
            while let Some(Ok(_)) = events.next().await {
                deep.store(true, Ordering::Relaxed);
                hurry.notify_one();
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// A worker at work.
struct Worker {
    goal: Goal,
    step: Step,
    task: AbortHandle,
}

/// An attempt that failed.
struct Failed {
    goal: Goal,
    error: String,
    pause: Duration,
    again: Instant,
}

/// The first and the longest pause before an instance is tried again.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What a worker has done.
struct Done {
    /// The interfaces that it saw to.
    enis: Vec<EniId>,
    /// Whether it started the instance's own container.
    started: bool,
}

type Outcome = (InstanceId, Goal, Result<Done, LaunchError>);

/// The last start of an instance's own container.
struct Start {
    at: Instant,
    /// If it ends by itself, it is started again so long after that.
    pause: Duration,
}

/// A container that ran so long didn't fail to start.
const STEADY: Duration = Duration::from_secs(120);

struct Launcher {
    context: Arc<Context>,
    ports: Ports,
    hurry: Arc<Notify>,
    /// Instances that were brought up, or looked into, by this agent, with the interfaces that they had then.
    looked_into: BTreeMap<InstanceId, Vec<EniId>>,
    /// A network may be nobody's any more.
    to_sweep: bool,
    reboot: BTreeSet<InstanceId>,
    workers: BTreeMap<InstanceId, Worker>,
    failed: BTreeMap<InstanceId, Failed>,
    starts: BTreeMap<InstanceId, Start>,
    /// Instances whose containers ended by themselves.
    ended: BTreeSet<InstanceId>,
    tasks: JoinSet<Outcome>,
    launches: Vec<Launch>,
    /// The tags that are being written.
    tagging: Option<tokio::task::JoinHandle<Result<(), SourceError>>>,
    untagged: Option<String>,
    state: State,
    tell: watch::Sender<Arc<State>>,
}

impl Launcher {
    async fn run(
        mut self,
        mut pictures: mpsc::Receiver<Picture>,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
        mut reboots: mpsc::UnboundedReceiver<InstanceId>,
    ) {
        loop {
            tokio::select! {
                picture = pictures.recv() => match picture {
                    Some(picture) => self.see(picture).await,
                    None => return,
                },
                Some(done) = self.tasks.join_next() => self.note(done),
                Some(instance) = reboots.recv() => {
                    self.reboot.insert(instance);
                }
                changed = snapshots.changed() => if changed.is_err() { return },
            }
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            self.publish(&snapshot);
            self.report(snapshot.generation);
        }
    }

    /// Takes a look's outcome, and sets to work.
    async fn see(&mut self, picture: Picture) {
        let (launches, seen, engine) = match picture.outcome {
            Ok(seen) => seen,
            Err(error) => {
                // The daemon's own questions are told in the log.
                self.state.error = Some(error);
                return;
            }
        };
        self.state.error = None;
        self.state.read = Some(picture.began);
        self.launches = launches;
        let looked_into = &self.looked_into;
        let mut due = plan::due(&self.launches, &seen, |launch| {
            looked_into.get(&launch.instance).is_none_or(|then| !then.iter().eq(launch.enis()))
        });
        for launch in self.launches.iter().filter(|launch| launch.runs) {
            let is_up = seen.ours.contains_key(&launch.instance) && !due.contains_key(&launch.instance);
            if self.reboot.remove(&launch.instance) && is_up {
                due.insert(launch.instance.clone(), Goal::Reboot);
            }
        }
        self.reboot.clear();
        // What changed its mind is begun anew.
        self.workers.retain(|instance, worker| {
            let stays = match (due.get(instance), worker.goal) {
                (Some(goal), at) => *goal == at || (*goal == Goal::Run && at == Goal::Reboot),
                // It is as it should be but for what a look doesn't show.
                (None, at) => at != Goal::Gone,
            };
            if !stays {
                worker.task.abort();
            }
            stays
        });
        let has_ended = |instance: &InstanceId| {
            // Without its holder it was ended, by whatever ended that.
            let units = seen.ours.get(instance).filter(|units| units.holder.as_ref().is_some_and(|unit| unit.running));
            units.and_then(|units| units.own.as_ref()).is_some_and(|own| !own.running)
                && self.starts.contains_key(instance)
        };
        let ended = due.iter().filter(|(instance, goal)| **goal == Goal::Run && has_ended(instance));
        self.ended = ended.map(|(instance, _)| instance.clone()).collect();
        self.failed.retain(|instance, failed| due.get(instance) == Some(&failed.goal));
        let taken: Arc<BTreeSet<Ipv4Addr>> = Arc::new(self.addresses());
        for (instance, goal) in due {
            let is_soon = |start: &Start| start.at.elapsed() < start.pause;
            let waits = self.failed.get(&instance).is_some_and(|failed| failed.again > Instant::now())
                || (self.ended.contains(&instance) && self.starts.get(&instance).is_some_and(is_soon));
            if waits || self.workers.contains_key(&instance) {
                continue;
            }
            let launch = self.launches.iter().find(|launch| launch.instance == instance).cloned();
            let (step, taken) = (Step::default(), Arc::clone(&taken));
            let job = Job { instance: instance.clone(), goal, launch, taken, step: step.clone() };
            let (context, engine) = (Arc::clone(&self.context), engine.clone());
            let task = self.tasks.spawn(async move {
                let result = context.work(&engine, &job).await;
                let enis = job.launch.iter().flat_map(Launch::enis).cloned().collect();
                (job.instance, job.goal, result.map(|started| Done { enis, started }))
            });
            self.workers.insert(instance, Worker { goal, step, task });
        }
        self.forget(&seen);
        self.sweep(&engine).await;
        self.tag(&seen).await;
    }

    fn addresses(&self) -> BTreeSet<Ipv4Addr> {
        let interfaces = self.launches.iter().flat_map(|launch| &launch.interfaces);
        interfaces.flat_map(|interface| interface.addresses.iter().copied()).collect()
    }

    /// Forgets instances that are gone, with all that they had.
    fn forget(&mut self, seen: &Seen) {
        let live: BTreeSet<&InstanceId> = self.launches.iter().map(|launch| &launch.instance).collect();
        let is_live = |instance: &InstanceId| live.contains(instance) || seen.ours.contains_key(instance);
        self.ports.keep(is_live);
        self.looked_into.retain(|instance, _| is_live(instance));
        self.starts.retain(|instance, _| is_live(instance));
    }

    /// Once the last instance of a VPC is gone, so is its network.
    async fn sweep(&mut self, engine: &Engine) {
        if !std::mem::take(&mut self.to_sweep) {
            return;
        }
        let interfaces = self.launches.iter().flat_map(|launch| &launch.interfaces);
        let in_use: BTreeSet<VpcId> = interfaces.map(|interface| interface.vpc.clone()).collect();
        if let Err(error) = self.context.sweep(engine, &in_use).await {
            tracing::debug!(%error, "networks are not swept");
        }
    }

    /// Writes the tags of one instance whose tags aren't what they should be; the next look is for the next one.
    async fn tag(&mut self, seen: &Seen) {
        if let Some(task) = self.tagging.take() {
            if !task.is_finished() {
                self.tagging = Some(task);
                return;
            }
            let result = task.await.map_err(|error| error.to_string()).and_then(|done| done.map_err(|e| e.to_string()));
            self.untagged = result.err();
        }
        for launch in self.launches.iter().filter(|launch| seen.ours.contains_key(&launch.instance)) {
            let tags = self.ports.tags(&launch.instance);
            let missing: BTreeMap<String, String> =
                tags.into_iter().filter(|(key, value)| launch.tags.get(key) != Some(value)).collect();
            if missing.is_empty() {
                continue;
            }
            let (context, instance) = (Arc::clone(&self.context), launch.instance.clone());
            self.tagging = Some(tokio::spawn(async move { context.ec2.tag(&instance, &missing).await }));
            return;
        }
    }

    /// Notes how a worker fared.
    fn note(&mut self, done: Result<Outcome, tokio::task::JoinError>) {
        let (instance, goal, result) = match done {
            Ok(outcome) => outcome,
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                tracing::error!(%error, "a worker of the launcher ended badly");
                return;
            }
        };
        // One that was begun anew has another worker by now.
        if self.workers.get(&instance).is_some_and(|worker| worker.goal == goal) {
            self.workers.remove(&instance);
        }
        match result {
            Ok(Done { enis, started }) => {
                self.failed.remove(&instance);
                if started {
                    let last = self.starts.get(&instance).filter(|last| last.at.elapsed() < STEADY);
                    let pause = last.map_or(BACK_OFF.0, |last| (last.pause * 2).min(BACK_OFF.1));
                    self.starts.insert(instance.clone(), Start { at: Instant::now(), pause });
                }
                match goal {
                    Goal::Gone => self.to_sweep = true,
                    Goal::Stop => {
                        self.starts.remove(&instance);
                    }
                    Goal::Run | Goal::Reboot => {
                        self.looked_into.insert(instance, enis);
                    }
                }
                self.hurry.notify_one();
            }
            Err(error) => {
                let error = error.to_string();
                let pause = self.failed.remove(&instance).map_or(BACK_OFF.0, |last| (last.pause * 2).min(BACK_OFF.1));
                let again = Instant::now() + pause;
                self.failed.insert(instance, Failed { goal, error, pause, again });
            }
        }
    }

    /// Settles which ports are to be published.
    fn publish(&mut self, snapshot: &Snapshot) {
        if self.state.read.is_none() {
            return;
        }
        let launched = self.launches.iter().filter(|launch| self.looked_into.contains_key(&launch.instance));
        let wanted = launched.map(|launch| {
            let exposed = self.context.exposed(&launch.instance);
            (launch.instance.clone(), ports::wanted(snapshot, &launch.instance, &exposed))
        });
        let wanted: BTreeMap<InstanceId, BTreeSet<u16>> = wanted.collect();
        self.ports.update(&wanted);
        self.state.ports = self.ports.published(|instance| wanted.contains_key(instance));
    }

    fn report(&mut self, generation: u64) {
        self.state.generation = generation;
        let underway = self.workers.iter().map(|(instance, worker)| {
            let step = worker.step.text();
            let step = if step.is_empty() { "it is being looked at".to_owned() } else { step };
            format!("instance {instance}: {step}")
        });
        self.state.underway = underway.collect();
        let failed = self.failed.iter().map(|(instance, failed)| Warning {
            subject: instance.to_string(),
            problem: match failed.goal {
                Goal::Run | Goal::Reboot => format!("can't be launched: {}", failed.error),
                Goal::Stop => format!("can't be stopped: {}", failed.error),
                Goal::Gone => format!("can't be removed: {}", failed.error),
            },
        });
        let ended = self.ended.iter().map(|instance| Warning {
            subject: instance.to_string(),
            problem: format!(
                "its container ended by itself, and is started again; 'docker logs sg-agent-{instance}' may tell why"
            ),
        });
        let untagged = self.untagged.iter().map(|error| Warning {
            subject: "tags".to_owned(),
            problem: format!("ports are not told by tags: {error}"),
        });
        self.state.warnings = failed.chain(ended).chain(untagged).chain(self.ports.warnings()).collect();
        self.state.warnings.sort();
        let state = &self.state;
        self.tell.send_if_modified(|told| {
            let is_news = **told != *state;
            if is_news {
                *told = Arc::new(state.clone());
            }
            is_news
        });
    }
}
