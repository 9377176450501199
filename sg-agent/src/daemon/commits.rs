//! Those who wait until what they changed, or are to be judged by, was read anew and is enforced: the gateway's changes,
//! and the proxy's connections. Owns whose reads each of them waits for, and what nobody waits for any more though it
//! isn't read; the reads are the pollers'.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::task::Poll;
use std::time::Instant;

use tokio::sync::oneshot;

use super::poll::Poller;
use super::pollers::Hint;

/// What has changed, as far as the one who waits knows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// Rules alone.
    Rules,
    /// Anything.
    Anything,
    /// Nothing by the one who waits, who is to be judged by whatever is so now.
    Nothing,
}

/// Somebody waits for reads that began after `asked`.
struct Waiting {
    asked: Instant,
    subject: Subject,
    hints: BTreeSet<Hint>,
    reply: oneshot::Sender<Outcome>,
    known: Option<oneshot::Sender<()>>,
}

/// What those are told who need wait no more, or who do no more, when this is dropped: after everybody else knows of it, so
/// that nobody who has their answer meets rules that pass for fresh.
pub struct Answers(Vec<(Waiting, Option<Outcome>)>);

/// Whether what was waited for is read and enforced, or why not.
type Outcome = Result<(), String>;

impl Drop for Answers {
    fn drop(&mut self) {
        for (waiting, outcome) in self.0.drain(..) {
            if let Some(outcome) = outcome {
                // Who has gone needs no answer.
                let _ = waiting.reply.send(outcome);
            }
            drop(waiting.known);
        }
    }
}

/// How the reads that somebody waits for stand.
enum Standing {
    /// One of them is still to come.
    Unread,
    /// All have succeeded.
    Read,
    /// All are done, and one failed.
    Failed(String),
}

/// The waiting, and the changes that were answered before they were read.
#[derive(Default)]
pub struct Commits {
    waiting: Vec<Waiting>,
    /// By source and subject, when the last of them was made.
    overdue: BTreeMap<(Hint, Subject), Instant>,
}

impl Commits {
    /// Somebody waits for these sources to be read after `asked`.
    pub fn wait(
        &mut self,
        asked: Instant,
        subject: Subject,
        hints: BTreeSet<Hint>,
        reply: oneshot::Sender<Outcome>,
        known: Option<oneshot::Sender<()>>,
    ) {
        self.waiting.push(Waiting { asked, subject, hints, reply, known });
    }

    /// Answers those whose reads are done, and enforced unless `refused` says why not; lets those go who wait no more.
    pub fn serve(&mut self, pollers: &BTreeMap<Hint, Poller>, refused: Option<&String>) -> Answers {
        let mut answers = Vec::new();
        let has_unread_groups = pollers.values().any(|poller| !poller.unread_groups().is_empty());
        self.overdue.retain(|(hint, subject), asked| {
            pollers.get(hint).is_some_and(|poller| has_unread_groups || !is_read(poller, *subject, *asked))
        });
        for waiting in std::mem::take(&mut self.waiting) {
            let outcome = match standing(&waiting, pollers) {
                Standing::Unread if waiting.reply.is_closed() => {
                    self.miss(&waiting);
                    None
                }
                Standing::Unread => {
                    self.waiting.push(waiting);
                    continue;
                }
                Standing::Failed(reason) => {
                    self.miss(&waiting);
                    Some(Err(reason))
                }
                Standing::Read => Some(refused.map_or(Ok(()), |reason| Err(reason.clone()))),
            };
            answers.push((waiting, outcome));
        }
        Answers(answers)
    }

    /// A change is answered before it was read: until it is, the policy is stale.
    fn miss(&mut self, waiting: &Waiting) {
        if waiting.subject == Subject::Nothing {
            return;
        }
        for hint in &waiting.hints {
            let last = self.overdue.entry((hint.clone(), waiting.subject)).or_insert(waiting.asked);
            *last = waiting.asked.max(*last);
        }
    }

    /// Ends when somebody has gone unanswered: `serve` is to look again.
    pub async fn next_gone(&mut self) {
        poll_fn(|context| {
            let is_gone = |waiting: &mut Waiting| waiting.reply.poll_closed(context).is_ready();
            if self.waiting.iter_mut().any(is_gone) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// The sources that what is enforced may be behind: whose last read failed, or that a change was answered without. All
    /// of them while `refused` says why what was read isn't enforced, whoever's part of it that was.
    pub fn stale(&self, pollers: &BTreeMap<Hint, Poller>, refused: Option<&String>) -> BTreeSet<Hint> {
        let is_stale = |hint: &Hint, poller: &Poller| {
            refused.is_some() || poller.error().is_some() || self.overdue().any(|overdue| overdue == hint)
        };
        let stale = pollers.iter().filter(|(hint, poller)| is_stale(hint, poller));
        stale.map(|(hint, _)| hint.clone()).collect()
    }

    /// The sources that somebody has waited for in vain.
    fn overdue(&self) -> impl Iterator<Item = &Hint> {
        self.overdue.keys().map(|(hint, _)| hint)
    }
}

/// A source that is no longer read, since nothing here is of it, needs no waiting for. Groups that are still to be read,
/// whoever's they are, may be what a changed rule refers to.
fn standing(waiting: &Waiting, pollers: &BTreeMap<Hint, Poller>) -> Standing {
    let (mut is_unread, mut failed) = (false, None);
    for (hint, poller) in pollers {
        let is_read = !waiting.hints.contains(hint) || is_read(poller, waiting.subject, waiting.asked);
        if is_read && poller.unread_groups().is_empty() {
            continue;
        }
        match poller.error() {
            Some(error) if poller.last_attempt().is_some_and(|tried| tried >= waiting.asked) => failed = Some(error),
            _ => is_unread = true,
        }
    }
    match failed {
        // A source that fails doesn't make up for another: what that says may be what somebody is judged by.
        _ if is_unread => Standing::Unread,
        Some(reason) => Standing::Failed(reason),
        None => Standing::Read,
    }
}

fn is_read(poller: &Poller, subject: Subject, asked: Instant) -> bool {
    let read = if subject == Subject::Rules { poller.last_rules() } else { poller.last_success() };
    read.is_some_and(|read| read >= asked)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::source::Extent;

    type Told = oneshot::Receiver<Result<(), String>>;

    fn hint(account: &str) -> Hint {
        (Some(account.into()), None)
    }

    /// Two accounts that nobody has read.
    fn pollers() -> BTreeMap<Hint, Poller> {
        ["1", "2"].map(|account| (hint(account), Poller::idle())).into()
    }

    fn waits(commits: &mut Commits, asked: Instant, subject: Subject) -> Told {
        let (reply, told) = oneshot::channel();
        commits.wait(asked, subject, [hint("1")].into(), reply, None);
        told
    }

    #[tokio::test]
    async fn who_goes_is_noticed_at_once_and_leaves_its_source_stale() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let later = asked + Duration::from_millis(1);
        let told: Vec<Told> = (0..3).map(|_| waits(&mut commits, asked, Subject::Anything)).collect();
        let last = waits(&mut commits, later, Subject::Anything);
        let stays = waits(&mut commits, asked, Subject::Anything);
        drop(commits.serve(&pollers, None));
        assert_eq!((commits.waiting.len(), commits.overdue().count()), (5, 0));
        drop((told, last));
        commits.next_gone().await;
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.waiting.len(), 1, "nobody waits twice");
        assert_eq!(commits.overdue().collect::<Vec<_>>(), [&hint("1")]);
        // The first ones' read isn't the last one's.
        let read = |pollers: &mut BTreeMap<Hint, Poller>, began, extent| {
            pollers.get_mut(&hint("1")).unwrap().has_read(began, extent);
        };
        read(&mut pollers, asked, Extent::Enforced);
        drop(commits.serve(&pollers, None));
        assert_eq!((commits.waiting.len(), commits.overdue().count()), (0, 1));
        assert_eq!(stays.await, Ok(Ok(())));
        read(&mut pollers, later, Extent::Rules);
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.overdue().count(), 1, "more than rules has changed");
        read(&mut pollers, later, Extent::Enforced);
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.overdue().count(), 0);
    }

    #[tokio::test]
    async fn answers_wait_until_everybody_else_knows() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let ((reply, late), (known, mut is_known)) = (oneshot::channel(), oneshot::channel());
        commits.wait(asked, Subject::Rules, [hint("1")].into(), reply, Some(known));
        let mut read = waits(&mut commits, asked, Subject::Anything);
        drop(late);
        let answers = commits.serve(&pollers, None);
        assert_eq!(commits.stale(&pollers, None), [hint("1")].into());
        assert_eq!(is_known.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(answers);
        assert_eq!(is_known.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        pollers.get_mut(&hint("1")).unwrap().has_read(asked, Extent::Enforced);
        let answers = commits.serve(&pollers, None);
        assert_eq!(read.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(answers);
        assert_eq!(read.try_recv(), Ok(Ok(())));
    }

    #[tokio::test]
    async fn who_has_changed_nothing_leaves_nothing_behind() {
        let mut commits = Commits::default();
        drop(waits(&mut commits, Instant::now(), Subject::Nothing));
        drop(commits.serve(&pollers(), None));
        assert_eq!((commits.waiting.len(), commits.overdue().count()), (0, 0));
    }

    #[tokio::test]
    async fn one_read_is_for_all_who_asked_before_it_began_and_for_nobody_else() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let (began, later) = (asked + Duration::from_millis(1), asked + Duration::from_millis(2));
        let before: Vec<Told> = (0..3).map(|_| waits(&mut commits, asked, Subject::Nothing)).collect();
        let mut after = waits(&mut commits, later, Subject::Nothing);
        pollers.get_mut(&hint("1")).unwrap().has_read(began, Extent::Enforced);
        drop(commits.serve(&pollers, None));
        for told in before {
            assert_eq!(told.await, Ok(Ok(())));
        }
        assert!(after.try_recv().is_err(), "that read was under way already");
        pollers.get_mut(&hint("1")).unwrap().has_read(later, Extent::Enforced);
        drop(commits.serve(&pollers, Some(&"no room".to_owned())));
        assert_eq!(after.await, Ok(Err("no room".to_owned())), "read, and not enforced");
    }

    #[tokio::test]
    async fn a_source_that_fails_ends_nobody_s_wait_for_another() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let (reply, mut told) = oneshot::channel();
        commits.wait(asked, Subject::Nothing, [hint("1"), hint("2")].into(), reply, None);
        pollers.get_mut(&hint("1")).unwrap().has_failed(asked);
        drop(commits.serve(&pollers, None));
        assert!(told.try_recv().is_err(), "the other is still to come");
        pollers.get_mut(&hint("2")).unwrap().has_read(asked, Extent::Enforced);
        drop(commits.serve(&pollers, None));
        assert!(matches!(told.await, Ok(Err(reason)) if reason.contains("it is out")));
    }

    #[tokio::test]
    async fn a_change_whose_read_failed_is_stale_until_it_is_read() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let told = waits(&mut commits, asked, Subject::Anything);
        let source = hint("1");
        pollers.get_mut(&source).unwrap().has_failed(asked);
        drop(commits.serve(&pollers, None));
        assert!(matches!(told.await, Ok(Err(reason)) if reason.contains("it is out")));
        // Another's change of rules is read: the source answers again, but what was changed before isn't read yet.
        pollers.get_mut(&source).unwrap().has_read(asked, Extent::Rules);
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.overdue().collect::<Vec<_>>(), [&source]);
    }

    #[tokio::test]
    async fn stale_is_what_failed_and_all_while_nothing_is_enforced() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        assert_eq!(commits.stale(&pollers, None), BTreeSet::new());
        let all = BTreeSet::from([hint("1"), hint("2")]);
        assert_eq!(commits.stale(&pollers, Some(&"no room".to_owned())), all);
        pollers.get_mut(&hint("2")).unwrap().has_failed(asked);
        assert_eq!(commits.stale(&pollers, None), [hint("2")].into());
        drop(waits(&mut commits, asked, Subject::Rules));
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.stale(&pollers, None), all, "a change was answered without the other's read");
        pollers.values_mut().for_each(|poller| poller.has_read(asked, Extent::Enforced));
        drop(commits.serve(&pollers, None));
        assert_eq!(commits.stale(&pollers, None), BTreeSet::new());
    }

    #[tokio::test]
    async fn another_accounts_group_is_waited_for() {
        let (mut commits, mut pollers) = (Commits::default(), pollers());
        let asked = Instant::now();
        let mut told = waits(&mut commits, asked, Subject::Rules);
        pollers[&hint("2")].want(BTreeSet::new(), ["sg-2".into()].into());
        pollers.get_mut(&hint("1")).unwrap().has_read(asked, Extent::Rules);
        drop(commits.serve(&pollers, None));
        assert!(told.try_recv().is_err(), "nobody knows the group's members");
        pollers.get_mut(&hint("2")).unwrap().has_read(asked, Extent::Enforced);
        drop(commits.serve(&pollers, None));
        assert_eq!(told.await, Ok(Ok(())));
    }
}
