//! Those who wait until what they changed, or what is stale, was read anew and is enforced: the gateway's changes, and
//! the proxy's connections. Owns whose reads each of them waits for; the reads are the pollers'.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tokio::sync::oneshot;

use super::poll::Poller;
use super::pollers::Hint;

/// Somebody waits for reads that began after `asked`.
struct Waiting {
    asked: Instant,
    /// Whether a read of rules will do.
    is_of_rules: bool,
    hints: BTreeSet<Hint>,
    reply: oneshot::Sender<Result<(), String>>,
}

/// How the reads that somebody waits for stand.
enum Standing {
    /// One of them is still to come.
    Unread,
    /// All are done.
    Read,
    /// One failed.
    Failed(String),
}

/// The waiting.
#[derive(Default)]
pub struct Commits {
    waiting: Vec<Waiting>,
}

impl Commits {
    /// Somebody waits for these sources to be read after `asked`, or for their rules.
    pub fn wait(
        &mut self,
        asked: Instant,
        is_of_rules: bool,
        hints: BTreeSet<Hint>,
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        self.waiting.push(Waiting { asked, is_of_rules, hints, reply });
    }

    /// Answers those whose reads are done, and enforced unless `refused` says why not.
    ///
    /// Who has gone without an answer is kept until what it waited for is read: until then the policy is stale.
    pub fn serve(&mut self, pollers: &BTreeMap<Hint, Poller>, refused: Option<&String>) {
        let standing = |waiting: &Waiting| standing(waiting, waiting.hints.iter().filter_map(|h| pollers.get(h)));
        let done = |waiting: &mut Waiting| match standing(waiting) {
            Standing::Unread => false,
            Standing::Read => true,
            // Nobody is told any more, and the change isn't read yet.
            Standing::Failed(_) => !waiting.reply.is_closed(),
        };
        let done: Vec<Waiting> = self.waiting.extract_if(.., done).collect();
        for waiting in done {
            let outcome = match (standing(&waiting), refused) {
                (Standing::Failed(reason), _) => Err(reason),
                (_, Some(reason)) => Err(reason.clone()),
                _ => Ok(()),
            };
            // Who has gone needs no answer.
            let _ = waiting.reply.send(outcome);
        }
    }

    /// The sources that somebody has waited for in vain.
    pub fn overdue(&self) -> impl Iterator<Item = &Hint> {
        self.waiting.iter().filter(|waiting| waiting.reply.is_closed()).flat_map(|waiting| &waiting.hints)
    }
}

/// A source that is no longer read, since nothing here is of it, needs no waiting for.
fn standing<'a>(waiting: &Waiting, pollers: impl Iterator<Item = &'a Poller>) -> Standing {
    let mut standing = Standing::Read;
    for poller in pollers {
        let read = if waiting.is_of_rules { poller.last_rules() } else { poller.last_success() };
        if read.is_some_and(|read| read >= waiting.asked) {
            continue;
        }
        match poller.error() {
            Some(error) if poller.last_attempt().is_some_and(|tried| tried >= waiting.asked) => {
                return Standing::Failed(error);
            }
            _ => standing = Standing::Unread,
        }
    }
    standing
}
