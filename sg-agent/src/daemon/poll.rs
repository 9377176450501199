//! Reading a source again and again: at an interval, when somebody is in a hurry, more slowly while it fails.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Release},
};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

use super::Event;
use super::pace::Pace;
use super::pollers::Hint;
use crate::model::{GroupId, InstanceId, Inventory, Scope};
use crate::source::{Ec2, Ec2Options, Extent, ModifiedRule, RulesFile, SourceError, Wanted};
use crate::status::SourceStatus;

/// How often a rules file is looked at: reading its metadata costs microseconds.
const FILE_INTERVAL: Duration = Duration::from_millis(200);

/// The pause after a read that failed, whoever hurries: clients of published ports would have a dead endpoint asked
/// without end.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// One read of a source.
pub struct Polled {
    /// Which source.
    pub hint: Hint,
    /// When it began: what it says was so at that moment or later.
    began: Instant,
    asked_for: Wanted,
    extent: Extent,
    result: Result<(Scope, Inventory), SourceError>,
}

/// A task that reads a source, and what came of it.
pub struct Poller {
    task: JoinHandle<()>,
    wanted: watch::Sender<Wanted>,
    hurry: Arc<Notify>,
    /// What the next read is for, as bits; none is a poll.
    asked: Arc<AtomicU8>,
    /// The endpoint, if it is one.
    ec2: Option<Arc<Ec2>>,
    name: String,
    scope: Scope,
    asked_for: Wanted,
    attempt: Option<Instant>,
    /// When the last read of at least the rules began that succeeded.
    rules: Option<Instant>,
    success: Option<Instant>,
    error: Option<String>,
    /// The outage that the log last told of ([`SourceError::outage`]).
    told: Option<String>,
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Poller {
    /// Polls an EC2-compatible endpoint.
    ///
    /// # Errors
    /// Options that can't be used.
    pub(super) fn of_endpoint(
        options: &Ec2Options,
        hint: Hint,
        interval: Duration,
        events: mpsc::Sender<Event>,
    ) -> Result<Self, SourceError> {
        let ec2 = Arc::new(Ec2::new(options)?);
        let (scope, name) = (ec2.scope().clone(), ec2.endpoint());
        tracing::info!(endpoint = %name, region = %scope.region, "security groups are read from here");
        let (wanted, mut wishes) = watch::channel(nobody());
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        let kept = Arc::clone(&ec2);
        let asked = Arc::new(AtomicU8::new(0));
        let asking = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            let mut pace = Pace::new(interval);
            let mut last = Inventory::default();
            loop {
                let began = Instant::now();
                let asked_for = wishes.borrow_and_update().clone();
                let asked = asking.swap(0, Acquire);
                // Whoever hurries: a poll that is due isn't put off by reads of less, however many come.
                let is_poll = asked == 0 || began >= pace.due();
                let extent = extent(asked, is_poll);
                let wanted = Wanted { extent, ..asked_for.clone() };
                let read = ec2.inventory(&wanted).await;
                let result = read.map(|inventory| (ec2.scope().clone(), shared(inventory, &mut last)));
                pace.note(began, began.elapsed(), is_poll, result.is_ok());
                let has_failed = result.is_err();
                let is_complete = asked != 0 || result.is_err() || !ec2.lacks_ids();
                let polled = Box::new(Polled { hint: hint.clone(), began, asked_for, extent, result });
                if events.send(Event::Polled(polled)).await.is_err() {
                    return;
                }
                if !is_complete {
                    // What has changed is enforced; what only people look at comes after.
                    asking.fetch_or(bit(Extent::Everything), Release);
                    continue;
                }
                if has_failed {
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
                tokio::select! {
                    () = tokio::time::sleep_until(pace.due().into()) => {}
                    () = hurried.notified() => {}
                    changed = wishes.changed() => if changed.is_err() { return },
                }
            }
        });
        let mut poller = Self::new(task, wanted, hurry, Some(kept), name, scope);
        poller.asked = asked;
        Ok(poller)
    }

    /// Reads a rules file when it has changed.
    pub(super) fn of_file(path: PathBuf, hint: Hint, events: mpsc::Sender<Event>) -> Self {
        let scope = Scope { account: "123456789012".into(), region: "us-east-1".into() };
        let (wanted, mut wishes) = watch::channel(nobody());
        let hurry = Arc::new(Notify::new());
        let hurried = Arc::clone(&hurry);
        let (name, its_scope) = (path.display().to_string(), scope.clone());
        let task = tokio::spawn(async move {
            let mut seen = None;
            let mut last = Inventory::default();
            loop {
                let began = Instant::now();
                // Before the read: a change in the middle of it is seen the next time.
                let stamp = stamp(&path).await;
                let asked_for = wishes.borrow_and_update().clone();
                let loaded = tokio::task::block_in_place(|| RulesFile::load(&path));
                let result = loaded.map(|inventory| (its_scope.clone(), shared(inventory, &mut last)));
                let polled =
                    Box::new(Polled { hint: hint.clone(), began, asked_for, extent: Extent::Everything, result });
                if events.send(Event::Polled(polled)).await.is_err() {
                    return;
                }
                seen = stamp.or(seen);
                loop {
                    tokio::select! {
                        () = tokio::time::sleep(FILE_INTERVAL) => if self::stamp(&path).await != seen { break },
                        () = hurried.notified() => break,
                        changed = wishes.changed() => if changed.is_err() { return } else { break },
                    }
                }
            }
        });
        Self::new(task, wanted, hurry, None, name, scope)
    }

    fn new(
        task: JoinHandle<()>,
        wanted: watch::Sender<Wanted>,
        hurry: Arc<Notify>,
        ec2: Option<Arc<Ec2>>,
        name: String,
        scope: Scope,
    ) -> Self {
        let asked_for = nobody();
        Self {
            task,
            wanted,
            hurry,
            asked: Arc::default(),
            ec2,
            name,
            scope,
            asked_for,
            attempt: None,
            rules: None,
            success: None,
            error: None,
            told: None,
        }
    }

    /// From now on, these instances are asked for, and these groups; at once, if they are others than before.
    pub(super) fn want(&self, instances: BTreeSet<InstanceId>, groups: BTreeSet<GroupId>) {
        let now = Wanted { instances: Some(instances), groups, ..Wanted::default() };
        self.wanted.send_if_modified(|wanted| {
            let is_new = *wanted != now;
            *wanted = now;
            is_new
        });
    }

    /// Reads so much now.
    pub(super) fn hurry(&self, extent: Extent) {
        // In this order: the read that begins by this finds what it is for.
        self.asked.fetch_or(bit(extent), Release);
        self.hurry.notify_one();
    }

    /// Rules were modified so, whatever the endpoint will show.
    pub(super) fn note_modified(&self, rules: Vec<ModifiedRule>) {
        if let Some(ec2) = &self.ec2 {
            ec2.note_modified(rules);
        }
    }

    /// The endpoint begins anew.
    pub(super) fn forget(&self) {
        if let Some(ec2) = &self.ec2 {
            ec2.forget();
        }
    }

    /// Everything that decides about more than the inventory.
    pub(super) fn standing(&self) -> (bool, bool, Scope, Wanted) {
        (self.success.is_some(), self.error.is_some(), self.scope.clone(), self.asked_for.clone())
    }

    /// Notes how a read went; what it found, if it found anything.
    pub(super) fn note(&mut self, polled: Polled) -> Option<(Scope, Inventory)> {
        self.attempt = Some(polled.began);
        match polled.result {
            Ok((scope, inventory)) => {
                self.told = None;
                if self.error.take().is_some() {
                    tracing::info!("{}: answers again", self.name);
                }
                self.scope = scope.clone();
                self.rules = Some(polled.began);
                if polled.extent > Extent::Rules {
                    self.success = Some(polled.began);
                }
                self.asked_for = polled.asked_for;
                Some((scope, inventory))
            }
            Err(error) => {
                let text = chain(&error);
                let outage = error.outage();
                if self.told.as_ref() != Some(&outage) {
                    let meanwhile = match self.success {
                        Some(_) => "the last good policy stands",
                        None => "until it answers, instances are denied everything",
                    };
                    tracing::warn!(source = %self.name, "{text}; {meanwhile}");
                    self.told = Some(outage);
                }
                self.error = Some(text);
                // Whoever isn't there may be another by the time that it is.
                if let Some(ec2) = &self.ec2 {
                    ec2.doubt();
                }
                None
            }
        }
    }

    /// Why the last read failed, if it did.
    pub(super) fn error(&self) -> Option<String> {
        self.error.clone()
    }

    /// The account and region that it reads.
    pub(super) fn scope(&self) -> Scope {
        self.scope.clone()
    }

    /// The same for a read that may have been of rules alone.
    pub(super) fn last_rules(&self) -> Option<Instant> {
        self.rules
    }

    /// When the last read of everything began that succeeded; `None` if none did.
    pub(super) fn last_success(&self) -> Option<Instant> {
        self.success
    }

    /// When the last read began that is over, however it went.
    pub(super) fn last_attempt(&self) -> Option<Instant> {
        self.attempt
    }

    /// Whether a read that succeeded was about this instance.
    pub(super) fn has_asked_for(&self, instance: &InstanceId) -> bool {
        self.asked_for.instances.as_ref().is_none_or(|instances| instances.contains(instance))
    }

    /// Groups that other accounts' rules refer to, and that no read that succeeded was about.
    pub(super) fn unread_groups(&self) -> Vec<GroupId> {
        self.wanted.borrow().groups.difference(&self.asked_for.groups).cloned().collect()
    }

    pub(super) fn status(&self) -> SourceStatus {
        SourceStatus {
            source: self.name.clone(),
            account: self.scope.account.to_string(),
            region: self.scope.region.to_string(),
            age_seconds: self.success.map(|at| at.elapsed().as_secs_f64()),
            error: self.error.clone(),
        }
    }
}

/// What was read, sharing with what was read last whatever is the same. It costs as much as the answer is long, so it
/// is done here: the daemon's task sees only what differs.
fn shared(mut read: Inventory, last: &mut Inventory) -> Inventory {
    read.share(last);
    last.clone_from(&read);
    read
}

/// What is asked for before anything is attached.
fn nobody() -> Wanted {
    Wanted { instances: Some(BTreeSet::new()), ..Wanted::default() }
}

fn bit(extent: Extent) -> u8 {
    1 << extent as u8
}

/// The least that everybody who asked can do with; a poll, whoever else asked, is about what is enforced.
fn extent(asked: u8, is_poll: bool) -> Extent {
    let asked = if is_poll { asked | bit(Extent::Enforced) } else { asked };
    let by_most = [Extent::Everything, Extent::Enforced, Extent::Rules];
    by_most.into_iter().find(|extent| asked & bit(*extent) != 0).unwrap_or(Extent::Enforced)
}

/// What changes when a file does, also by renaming another over it.
async fn stamp(path: &std::path::Path) -> Option<(u64, u64, std::time::SystemTime)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some((metadata.ino(), metadata.len(), metadata.modified().ok()?))
}

fn chain(error: &SourceError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text += &format!(": {inner_text}");
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
impl Poller {
    /// One that reads nothing by itself.
    pub(super) fn idle() -> Self {
        let task = tokio::spawn(std::future::pending());
        Self::new(
            task,
            watch::channel(nobody()).0,
            Arc::default(),
            None,
            "idle".into(),
            Scope { account: "1".into(), region: "us-east-1".into() },
        )
    }

    /// A read of what is wanted now began then, and succeeded.
    pub(super) fn has_read(&mut self, began: Instant, extent: Extent) {
        self.over(began, extent, Ok((self.scope.clone(), Inventory::default())));
    }

    /// A read began then, and failed.
    pub(super) fn has_failed(&mut self, began: Instant) {
        let error = SourceError::Contradiction { source_name: "idle".into(), what: "it is out".into() };
        self.over(began, Extent::Enforced, Err(error));
    }

    fn over(&mut self, began: Instant, extent: Extent, result: Result<(Scope, Inventory), SourceError>) {
        let asked_for = self.wanted.borrow().clone();
        self.note(Polled { hint: (None, None), began, asked_for, extent, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::fake::{Fake, Reply};

    #[tokio::test]
    async fn what_was_modified_outlives_a_read_that_fails() {
        let options = Ec2Options {
            endpoint: Some("http://127.0.0.1:9".into()),
            region: Some("us-east-1".into()),
            ..Ec2Options::default()
        };
        let ec2 = Arc::new(Ec2::new(&options).unwrap());
        let mut poller = Poller::idle();
        poller.ec2 = Some(Arc::clone(&ec2));
        poller.note_modified(vec![ModifiedRule { id: "sgr-1".into(), ..ModifiedRule::default() }]);
        poller.has_failed(Instant::now());
        assert!(ec2.has_corrections(), "the endpoint shows the rule as it was before");
        poller.forget();
        assert!(!ec2.has_corrections(), "after a reset it is another rule");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn all_who_hurry_while_a_read_is_under_way_share_the_next() {
        let (open, gate) = std::sync::mpsc::channel();
        let gate = std::sync::Mutex::new(gate);
        let fake = Fake::start(move |_, _| {
            tokio::task::block_in_place(|| gate.lock().unwrap().recv().expect("the test lets it answer"));
            Reply::ok("<DescribeInstancesResponse><reservationSet/></DescribeInstancesResponse>")
        })
        .await;
        let options =
            Ec2Options { endpoint: Some(fake.url.clone()), region: Some("us-east-1".into()), ..Ec2Options::default() };
        let (events, mut read) = mpsc::channel(8);
        let day = Duration::from_secs(86_400);
        let poller = Poller::of_endpoint(&options, (None, None), day, events).unwrap();
        while fake.requests().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let asked = Instant::now();
        (0..20).for_each(|_| poller.hurry(Extent::Enforced));
        let mut next = async || {
            open.send(()).unwrap();
            match read.recv().await {
                Some(Event::Polled(polled)) => polled.began,
                _ => panic!("it reads, and nothing else"),
            }
        };
        assert!(next().await < asked, "the one that was under way");
        assert!(next().await >= asked, "the one for all of them");
        poller.hurry(Extent::Enforced);
        next().await;
        assert_eq!(fake.requests().len(), 3, "nobody had one alone");
    }

    #[test]
    fn the_most_that_is_asked_for_is_read() {
        let rules = bit(Extent::Rules);
        assert_eq!(extent(0, true), Extent::Enforced);
        assert_eq!(extent(rules, false), Extent::Rules);
        assert_eq!(extent(rules, true), Extent::Enforced, "a poll that is due is made by the way");
        assert_eq!(extent(rules | bit(Extent::Enforced), false), Extent::Enforced);
        for is_poll in [false, true] {
            assert_eq!(extent(rules | bit(Extent::Everything), is_poll), Extent::Everything);
        }
    }
}
