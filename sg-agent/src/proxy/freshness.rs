//! Whether the rules in force are fresh enough to judge a client by: where they may not be, they are read anew first. Owns
//! the wait, and what holds when it was in vain; what is stale, and the read, are the daemon's.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

/// How long the endpoint may take before a client is refused (`--live=endpoint`). Moto answers in some tens of
/// milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Somebody who waits for rules that are read from now on: told once those are in force, or why they aren't.
pub type Ask = oneshot::Sender<Result<(), String>>;

/// Where to ask for fresh rules; without anybody to ask, the rules are taken as they are.
#[derive(Clone, Debug, Default)]
pub struct Freshness(Option<Asks>);

#[derive(Clone, Debug)]
struct Asks {
    need: Need,
    asks: mpsc::Sender<Ask>,
    patience: Duration,
}

/// Who has rules read anew.
#[derive(Clone, Debug)]
enum Need {
    /// Who comes while they may be older than the last change. If they can't be read, the last ones stand.
    WhileStale(watch::Receiver<bool>),
    /// Everybody. If they can't be read, nobody gets in.
    Always,
}

impl Freshness {
    /// While `is_stale`, rules are asked for, and waited for at most `patience`; then the last ones stand.
    pub fn while_stale(is_stale: watch::Receiver<bool>, asks: mpsc::Sender<Ask>, patience: Duration) -> Self {
        Self(Some(Asks { need: Need::WhileStale(is_stale), asks, patience }))
    }

    /// Rules are asked for whenever somebody comes, and without them nobody is let in (`--live=endpoint`).
    pub fn always(asks: mpsc::Sender<Ask>) -> Self {
        Self(Some(Asks { need: Need::Always, asks, patience: PATIENCE }))
    }

    /// The same with another patience.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self(self.0.map(|asks| Asks { patience, ..asks }))
    }

    /// Whether who comes now may be judged by the rules in force when this returns: at once if nobody has to ask, else
    /// once they have been read and enforced, or that failed, or it took too long.
    pub async fn renew(&self) -> bool {
        let Some(Asks { need, asks, patience }) = &self.0 else { return true };
        let stands = match need {
            Need::WhileStale(is_stale) if !*is_stale.borrow() => return true,
            Need::WhileStale(_) => true,
            Need::Always => false,
        };
        let (reply, told) = oneshot::channel();
        let renewed = async {
            // An agent that shuts down renews nothing.
            asks.send(reply).await.ok()?;
            told.await.ok()
        };
        let problem = match tokio::time::timeout(*patience, renewed).await {
            Ok(Some(Ok(()))) => return true,
            Ok(Some(Err(reason))) => reason,
            Ok(None) => "the agent shuts down".to_owned(),
            Err(_) => format!("no answer within {patience:?}"),
        };
        tracing::debug!(problem, "rules couldn't be read anew; the last ones stand: {stands}");
        stands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_stale_rules_are_waited_for() {
        let stale = watch::Sender::new(false);
        let (asks, mut asked) = mpsc::channel(1);
        let fresh = Freshness::while_stale(stale.subscribe(), asks, Duration::from_secs(60));
        assert!(fresh.renew().await);
        assert!(asked.try_recv().is_err(), "nobody was asked");
        stale.send_replace(true);
        let (order, mut ordered) = mpsc::unbounded_channel();
        let waits = async {
            assert!(fresh.renew().await);
            let _ = order.send("judged");
        };
        let renews = async {
            let reply: Ask = asked.recv().await.expect("it asks");
            let _ = order.send("renewed");
            let _ = reply.send(Ok(()));
        };
        tokio::join!(waits, renews);
        assert_eq!((ordered.recv().await, ordered.recv().await), (Some("renewed"), Some("judged")));
    }

    /// Whether somebody is judged who asks and hears this.
    async fn judged(fresh: &Freshness, asked: &mut mpsc::Receiver<Ask>, answer: Result<(), String>) -> bool {
        let answers = async { asked.recv().await.expect("it asks").send(answer).expect("it waits") };
        tokio::join!(fresh.renew(), answers).0
    }

    #[tokio::test]
    async fn without_an_answer_the_last_rules_stand_or_nobody_gets_in() {
        let stale = watch::Sender::new(true);
        let (asks, mut asked) = mpsc::channel(1);
        let while_stale = Freshness::while_stale(stale.subscribe(), asks.clone(), Duration::from_secs(60));
        let always = Freshness::always(asks).patience(Duration::from_secs(60));
        for (fresh, stands) in [(&while_stale, true), (&always, false)] {
            assert!(judged(fresh, &mut asked, Ok(())).await);
            assert_eq!(judged(fresh, &mut asked, Err("it is out".into())).await, stands);
            assert_eq!(fresh.clone().patience(Duration::from_millis(50)).renew().await, stands, "patience ends");
            assert!(asked.try_recv().is_ok_and(|reply| reply.is_closed()), "it was asked, and waits no more");
        }
        drop(asked);
        assert!(while_stale.renew().await && !always.renew().await, "nobody is there to be asked");
        assert!(Freshness::default().renew().await);
    }
}
