//! The launcher's task: takes what was seen, sets workers to work, and says how things stand. Owns who works on what, who
//! failed and when it is tried again, and tags.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinError, JoinHandle, JoinSet};

use super::engine::Engine;
use super::look::Picture;
use super::plan::{self, Goal, Memory, Seen};
use super::ports::{self, Ports};
use super::work::{Context, Job, Step};
use super::{LaunchError, State};
use crate::apply::Snapshot;
use crate::model::{EniId, InstanceId, VpcId, Warning};
use crate::source::Launch;

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

type Outcome = Result<Done, LaunchError>;

/// How writing one instance's tags went.
type Tagged = (InstanceId, Result<(), String>);

/// The last start of an instance's own container.
struct Start {
    at: Instant,
    /// If it ends by itself, it is started again so long after that.
    pause: Duration,
}

/// A container that ran so long didn't fail to start.
const STEADY: Duration = Duration::from_secs(120);

pub(super) struct Launcher {
    context: Arc<Context>,
    ports: Ports,
    hurry: Arc<Notify>,
    /// Instances that were brought up, or looked into, by this agent, with the interfaces that they had then.
    looked_into: BTreeMap<InstanceId, Vec<EniId>>,
    /// A network may be nobody's any more.
    to_sweep: bool,
    reboot: BTreeSet<InstanceId>,
    memory: Memory,
    /// Instances that the control plane has forgotten; what there is of them stays.
    lost: BTreeSet<InstanceId>,
    workers: BTreeMap<InstanceId, Worker>,
    failed: BTreeMap<InstanceId, Failed>,
    starts: BTreeMap<InstanceId, Start>,
    /// Instances whose containers ended by themselves.
    ended: BTreeSet<InstanceId>,
    tasks: JoinSet<Outcome>,
    launches: Vec<Launch>,
    /// The tags that are being written.
    tagging: Option<JoinHandle<Vec<Tagged>>>,
    /// Instances whose tags could not be written, why, and when that was.
    untagged: BTreeMap<InstanceId, (String, Instant)>,
    state: State,
    tell: watch::Sender<Arc<State>>,
}

impl Launcher {
    /// Nothing is known yet.
    pub(super) fn new(context: Context, ports: Ports, hurry: Arc<Notify>, tell: watch::Sender<Arc<State>>) -> Self {
        Self {
            ports,
            context: Arc::new(context),
            hurry,
            looked_into: BTreeMap::new(),
            to_sweep: true,
            reboot: BTreeSet::new(),
            memory: Memory::default(),
            lost: BTreeSet::new(),
            workers: BTreeMap::new(),
            failed: BTreeMap::new(),
            starts: BTreeMap::new(),
            ended: BTreeSet::new(),
            tasks: JoinSet::new(),
            launches: Vec::new(),
            tagging: None,
            untagged: BTreeMap::new(),
            state: State::default(),
            tell,
        }
    }

    pub(super) async fn run(
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
                Some(done) = self.tasks.join_next_with_id() => self.note(done),
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
        self.state.others.clone_from(&seen.others);
        self.launches = launches;
        self.lost = self.memory.lost(&self.launches, &seen);
        let looked_into = &self.looked_into;
        let mut due = plan::due(&self.launches, &seen, &self.lost, |launch| {
            looked_into.get(&launch.instance).is_none_or(|then| !then.iter().eq(launch.enis()))
        });
        for launch in self.launches.iter().filter(|launch| launch.runs) {
            let is_up = seen.ours.contains_key(&launch.instance) && !due.contains_key(&launch.instance);
            if self.reboot.remove(&launch.instance) && is_up {
                due.insert(launch.instance.clone(), Goal::Reboot);
            }
        }
        self.reboot.clear();
        let listed: BTreeSet<&InstanceId> = self.launches.iter().map(|launch| &launch.instance).collect();
        // What changed its mind is begun anew.
        self.workers.retain(|instance, worker| {
            let stays = match (due.get(instance), worker.goal) {
                (Some(goal), at) => *goal == at || (*goal == Goal::Run && at == Goal::Reboot),
                // It is as it should be but for what a look doesn't show.
                (None, at) => at != Goal::Gone && listed.contains(instance),
            };
            if !stays {
                worker.task.abort();
                if worker.goal == Goal::Stop {
                    // If its container stands still by now, that is the worker's doing.
                    self.starts.remove(instance);
                }
            }
            stays
        });
        let ended = due.iter().filter(|(instance, goal)| {
            // What was seen before its last start says nothing of it.
            **goal == Goal::Run && !self.has_started_since(instance, picture.began) && self.has_ended(instance, &seen)
        });
        self.ended = ended.map(|(instance, _)| instance.clone()).collect();
        self.failed.retain(|instance, failed| due.get(instance) == Some(&failed.goal));
        let taken: Arc<BTreeSet<Ipv4Addr>> = Arc::new(self.addresses());
        for (instance, goal) in due {
            let is_soon = |start: &Start| start.at.elapsed() < start.pause;
            let waits = self.failed.get(&instance).is_some_and(|failed| failed.again > Instant::now())
                || (self.ended.contains(&instance) && self.starts.get(&instance).is_some_and(is_soon));
            let is_old = goal == Goal::Run && self.has_started_since(&instance, picture.began);
            if waits || is_old || self.workers.contains_key(&instance) {
                continue;
            }
            let launch = self.launches.iter().find(|launch| launch.instance == instance).cloned();
            let (step, taken) = (Step::default(), Arc::clone(&taken));
            let job = Job { instance: instance.clone(), goal, launch, taken, step: step.clone() };
            let (context, engine) = (Arc::clone(&self.context), engine.clone());
            let task = self.tasks.spawn(async move {
                let result = context.work(&engine, &job).await;
                let enis = job.launch.iter().flat_map(Launch::enis).cloned().collect();
                result.map(|started| Done { enis, started })
            });
            self.workers.insert(instance, Worker { goal, step, task });
        }
        self.forget(&seen);
        self.sweep(&engine).await;
        self.tag(&seen).await;
    }

    fn has_started_since(&self, instance: &InstanceId, look: Instant) -> bool {
        self.starts.get(instance).is_some_and(|start| start.at > look)
    }

    /// Whether an instance's container ended by itself: the launcher started it, and nobody has stopped it.
    fn has_ended(&self, instance: &InstanceId, seen: &Seen) -> bool {
        // Without its holder it was ended, by whatever ended that.
        let units = seen.ours.get(instance).filter(|units| units.holder.as_ref().is_some_and(|unit| unit.running));
        units.and_then(|units| units.own.as_ref()).is_some_and(|own| !own.running)
            && self.starts.contains_key(instance)
            // Whoever reboots it ends it first.
            && (self.ended.contains(instance) || !self.workers.contains_key(instance))
    }

    /// Whether it is an instance that was brought up and may have ports.
    fn is_up(&self, instance: &InstanceId) -> bool {
        let is_listed = || self.launches.iter().any(|launch| launch.instance == *instance);
        self.looked_into.contains_key(instance) && (self.lost.contains(instance) || is_listed())
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
        self.untagged.retain(|instance, _| live.contains(instance));
    }

    /// Once the last instance of a VPC is gone, so is its network. Nobody knows which VPC a lost one is in.
    async fn sweep(&mut self, engine: &Engine) {
        if !self.lost.is_empty() || !std::mem::take(&mut self.to_sweep) {
            return;
        }
        if let Err(error) = self.context.sweep(engine, &self.in_use()).await {
            tracing::debug!(%error, "networks are not swept");
        }
    }

    /// The VPCs that instances are in.
    fn in_use(&self) -> BTreeSet<VpcId> {
        let interfaces = self.launches.iter().flat_map(|launch| &launch.interfaces);
        interfaces.map(|interface| interface.vpc.clone()).collect()
    }

    /// Writes the tags that aren't what they should be, one instance after the other.
    async fn tag(&mut self, seen: &Seen) {
        if let Some(task) = self.tagging.take() {
            if !task.is_finished() {
                self.tagging = Some(task);
                return;
            }
            match task.await {
                Ok(all) => all.into_iter().for_each(|tagged| self.note_tags(tagged)),
                Err(error) => tracing::error!(%error, "the writer of tags ended badly"),
            }
        }
        let mut due = Vec::new();
        for launch in self.launches.iter().filter(|launch| seen.ours.contains_key(&launch.instance)) {
            let tags = self.ports.tags(&launch.instance);
            let missing: BTreeMap<String, String> =
                tags.into_iter().filter(|(key, value)| launch.tags.get(key) != Some(value)).collect();
            let waits = self.untagged.get(&launch.instance).is_some_and(|(_, at)| at.elapsed() < BACK_OFF.1);
            if missing.is_empty() {
                self.untagged.remove(&launch.instance);
            } else if !waits {
                due.push((launch.instance.clone(), missing));
            }
        }
        if due.is_empty() {
            return;
        }
        let context = Arc::clone(&self.context);
        self.tagging = Some(tokio::spawn(async move {
            let mut all = Vec::new();
            for (instance, missing) in due {
                let written = context.ec2.tag(&instance, &missing).await;
                all.push((instance, written.map_err(|error| error.to_string())));
            }
            all
        }));
    }

    fn note_tags(&mut self, (instance, written): Tagged) {
        match written {
            Ok(()) => self.untagged.remove(&instance),
            Err(error) => self.untagged.insert(instance, (error, Instant::now())),
        };
    }

    /// Notes how a worker fared. One that was begun anew has another worker by now, and counts no more.
    fn note(&mut self, done: Result<(Id, Outcome), JoinError>) {
        let (id, result) = match done {
            Ok(outcome) => outcome,
            Err(error) => (error.id(), Err(LaunchError::Fault(error))),
        };
        let at_work = self.workers.iter().find(|(_, worker)| worker.task.id() == id);
        let Some(instance) = at_work.map(|(instance, _)| instance.clone()) else { return };
        let Some(Worker { goal, .. }) = self.workers.remove(&instance) else { return };
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
                        if goal == Goal::Reboot {
                            self.starts.insert(instance.clone(), Start { at: Instant::now(), pause: BACK_OFF.0 });
                        }
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
        let launched = self.looked_into.keys().filter(|instance| self.is_up(instance));
        let wanted = launched.map(|instance| {
            let exposed = self.context.exposed(instance);
            (instance.clone(), ports::wanted(snapshot, instance, &exposed))
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
            format!("instance {}: {step}", instance.0.escape_default())
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
        let untagged = self.untagged.iter().map(|(instance, (error, _))| Warning {
            subject: instance.to_string(),
            problem: format!("its ports are not told by tags: {error}"),
        });
        let lost = self.lost.iter().map(|instance| Warning {
            subject: instance.to_string(),
            problem: format!(
                "the control plane does not list it, not even as terminated: its containers stay as they are; \
                 'docker rm --force --volumes sg-agent-{instance} sg-agent-{instance}-net' removes them, with their disk"
            ),
        });
        let strays = self.context.strays(&self.in_use());
        let told = failed.chain(ended).chain(untagged).chain(lost);
        self.state.warnings = told.chain(strays).chain(self.ports.warnings()).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::Images;
    use crate::launcher::plan::{Unit, Units};
    use crate::source::{Ec2, Ec2Options};

    /// One that has been told of nothing. Nobody listens at its endpoint.
    fn launcher(directory: &std::path::Path) -> Launcher {
        let endpoint = Some("http://127.0.0.1:1".to_owned());
        let ec2 = Arc::new(Ec2::new(&Ec2Options { endpoint, ..Ec2Options::default() }).unwrap());
        let images = Images::new(Vec::new(), None, None).unwrap();
        let context = Context::new(ec2, images, watch::channel(Arc::default()).1);
        let ports = Ports::load(directory, ports::DEFAULT_RANGE);
        Launcher::new(context, ports, Arc::default(), watch::channel(Arc::default()).0)
    }

    fn done() -> Outcome {
        Ok(Done { enis: Vec::new(), started: false })
    }

    impl Launcher {
        fn set_to_work(&mut self, work: impl Future<Output = Outcome> + Send + 'static) {
            self.set_to(Goal::Run, work);
        }

        fn set_to(&mut self, goal: Goal, work: impl Future<Output = Outcome> + Send + 'static) {
            let task = self.tasks.spawn(work);
            self.workers.insert("i-1".into(), Worker { goal, step: Step::default(), task });
        }

        async fn note_next(&mut self) {
            let done = self.tasks.join_next_with_id().await.expect("somebody is at work");
            self.note(done);
        }
    }

    #[tokio::test]
    async fn a_worker_that_panics_has_failed_and_is_tried_again() {
        let mut launcher = launcher(&std::env::temp_dir().join("sg-task-none"));
        launcher.set_to_work(async { panic!("a wall") });
        launcher.note_next().await;
        assert!(launcher.workers.is_empty());
        launcher.report(0);
        assert_eq!(launcher.state.underway, [""; 0]);
        let warnings = &launcher.state.warnings;
        assert!(warnings.len() == 1 && warnings[0].problem.contains("a wall"), "{warnings:?}");
        launcher.set_to_work(async { done() });
        launcher.note_next().await;
        assert!(launcher.failed.is_empty() && launcher.looked_into.contains_key(&"i-1".into()));
    }

    #[tokio::test]
    async fn who_is_rebooted_has_not_ended_by_itself() {
        let mut launcher = launcher(&std::env::temp_dir().join("sg-task-none"));
        let instance = InstanceId::from("i-1");
        let unit = |running| Some(Unit { id: "x".to_owned(), running });
        let units = Units { holder: unit(true), own: unit(false), apart: false };
        let seen = Seen { ours: BTreeMap::from([(instance.clone(), units)]), ..Seen::default() };
        let before = Instant::now();
        assert!(!launcher.has_ended(&instance, &seen), "this launcher never started it");
        launcher.set_to(Goal::Reboot, async { done() });
        launcher.note_next().await;
        assert!(launcher.has_ended(&instance, &seen));
        assert!(launcher.has_started_since(&instance, before), "a look from in between doesn't count");
        assert!(!launcher.has_started_since(&instance, Instant::now()));
        launcher.set_to(Goal::Reboot, std::future::pending());
        assert!(!launcher.has_ended(&instance, &seen), "it stands still because it is rebooted");
        launcher.ended.insert(instance.clone());
        assert!(launcher.has_ended(&instance, &seen), "it had ended before");
    }

    #[tokio::test]
    async fn who_was_begun_anew_speaks_for_nobody() {
        let mut launcher = launcher(&std::env::temp_dir().join("sg-task-none"));
        launcher.set_to_work(async { done() });
        // It is over before it is stopped: run, stop, run.
        tokio::task::yield_now().await;
        launcher.set_to_work(std::future::pending());
        launcher.note_next().await;
        assert!(launcher.workers.contains_key(&"i-1".into()), "the second one is at work");
        assert!(launcher.looked_into.is_empty());
    }
}
