//! Rules that may be older than the last change: a connection has them read anew before it is judged, and waits for that
//! only so long. Owns the wait; what is stale, and the read, are the daemon's.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

/// Where to ask for fresh rules; without anybody to ask, the rules are taken as they are.
#[derive(Clone, Debug, Default)]
pub struct Freshness(Option<Asks>);

#[derive(Clone, Debug)]
struct Asks {
    is_stale: watch::Receiver<bool>,
    renew: mpsc::Sender<oneshot::Sender<Result<(), String>>>,
    patience: Duration,
}

impl Freshness {
    /// While `is_stale`, `renew` is asked, and waited for at most `patience`.
    pub fn new(
        is_stale: watch::Receiver<bool>,
        renew: mpsc::Sender<oneshot::Sender<Result<(), String>>>,
        patience: Duration,
    ) -> Self {
        Self(Some(Asks { is_stale, renew, patience }))
    }

    /// Returns at once if the rules aren't stale; else once they have been read and enforced, or that failed, or it took
    /// too long. Then the last ones stand.
    pub async fn renew(&self) {
        let Some(asks) = self.0.as_ref().filter(|asks| *asks.is_stale.borrow()) else { return };
        let (reply, told) = oneshot::channel();
        let renewed = async {
            // An agent that shuts down renews nothing.
            asks.renew.send(reply).await.ok()?;
            told.await.ok()
        };
        match tokio::time::timeout(asks.patience, renewed).await {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(reason))) => tracing::debug!(reason, "judged by the last rules: they couldn't be read anew"),
            Ok(None) => {}
            Err(_) => tracing::debug!("judged by the last rules: reading them anew takes longer than --fresh-timeout"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_stale_rules_are_waited_for() {
        let stale = watch::Sender::new(false);
        let (renew, mut renewals) = mpsc::channel(1);
        let fresh = Freshness::new(stale.subscribe(), renew, Duration::from_secs(60));
        fresh.renew().await;
        assert!(renewals.try_recv().is_err(), "nobody was asked");
        stale.send_replace(true);
        let (order, mut ordered) = mpsc::unbounded_channel();
        let waits = async {
            fresh.renew().await;
            let _ = order.send("judged");
        };
        let renews = async {
            let reply = renewals.recv().await.expect("it asks");
            let _ = order.send("renewed");
            let _ = reply.send(Ok(()));
        };
        tokio::join!(waits, renews);
        assert_eq!((ordered.recv().await, ordered.recv().await), (Some("renewed"), Some("judged")));
    }

    #[tokio::test]
    async fn patience_ends() {
        let stale = watch::Sender::new(true);
        let (renew, mut renewals) = mpsc::channel(1);
        Freshness::new(stale.subscribe(), renew, Duration::from_millis(50)).renew().await;
        assert!(renewals.try_recv().is_ok_and(|reply| reply.is_closed()), "it was asked, and waits no more");
        Freshness::default().renew().await;
    }
}
