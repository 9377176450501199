//! `--live=endpoint`: rules that were read after the connection came, for every connection. Who reads them is the
//! daemon's.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

/// How long the endpoint may take before a client is refused. Moto answers in some tens of milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks that nobody has taken yet; who comes when there are more waits with the others.
const WAITING: usize = 4_096;

/// Somebody who waits for rules that are read from now on. Told when those are in force.
pub type Ask = oneshot::Sender<()>;

/// Asks for rules to be read.
#[derive(Clone, Debug)]
pub struct Live {
    asks: mpsc::Sender<Ask>,
    patience: Duration,
}

impl Live {
    /// The asking end and the one that answers.
    pub fn new() -> (Self, mpsc::Receiver<Ask>) {
        let (asks, taken) = mpsc::channel(WAITING);
        (Self { asks, patience: PATIENCE }, taken)
    }

    /// The same with another patience.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Whether the rules in force were read after this call. All who ask while one read is under way share the next.
    pub async fn refresh(&self) -> bool {
        let (tell, told) = oneshot::channel();
        let answered = async { self.asks.send(tell).await.is_ok() && told.await.is_ok() };
        tokio::time::timeout(self.patience, answered).await.unwrap_or(false)
    }
}
