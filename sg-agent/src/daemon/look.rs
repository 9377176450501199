//! Looking at containers and links, beside everything else: Docker may take seconds to answer, or hang, and a change of
//! rules mustn't wait for it. Owns when it is looked; what was seen is told to the daemon.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::Event;
use crate::discovery::{self, Attachment, Discovered, DiscoveryError, Origin};

/// How long to wait before links are listened to again, when that failed.
const DEAF: Duration = Duration::from_secs(2);

/// What was seen, and when the look began.
pub struct Looked {
    began: Instant,
    result: Result<Discovered, DiscoveryError>,
}

/// The task that looks.
pub struct Lookout {
    hurry: Arc<Notify>,
}

impl Lookout {
    /// Looks now, and whenever links or containers change, until `shutdown`.
    pub fn start(options: discovery::Options, events: mpsc::Sender<Event>, shutdown: CancellationToken) -> Self {
        let hurry = Arc::new(Notify::new());
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(watch(options.clone(), Arc::clone(&hurry))));
        let hurried = Arc::clone(&hurry);
        let look = async move {
            loop {
                let began = Instant::now();
                let result = discovery::scan(&options).await;
                if events.send(Event::Looked(Box::new(Looked { began, result }))).await.is_err() {
                    return;
                }
                hurried.notified().await;
            }
        };
        tokio::spawn(shutdown.run_until_cancelled_owned(look));
        Self { hurry }
    }

    /// Looks again.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }
}

/// Hears of changes. Where that can't be, it is looked now and then all the same.
async fn watch(options: discovery::Options, hurry: Arc<Notify>) {
    loop {
        let (tell, mut told) = mpsc::channel(1);
        let forward = async {
            while told.recv().await.is_some() {
                hurry.notify_one();
            }
        };
        let (result, ()) = tokio::join!(discovery::watch(&options, tell), forward);
        if let Err(error) = result {
            tracing::warn!(%error, "changes of links are not heard at once; listening again in {DEAF:?}");
        }
        tokio::time::sleep(DEAF).await;
        hurry.notify_one();
    }
}

/// The latest picture. What can't be seen now is taken to be as it was.
#[derive(Default)]
pub struct View {
    /// What is there.
    pub discovered: Discovered,
    /// When the last look began.
    pub looked: Option<Instant>,
    /// Why it didn't see everything.
    pub error: Option<String>,
}

impl View {
    /// Takes a look's outcome in.
    pub fn take(&mut self, looked: Looked) {
        match looked.result {
            Ok(discovered) => {
                let last = std::mem::replace(&mut self.discovered, discovered);
                self.discovered.keep_hidden(last);
                self.error = None;
            }
            Err(error) => {
                let text = error.to_string();
                if self.error.as_ref() != Some(&text) {
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
                self.error = Some(text);
            }
        }
        self.looked = Some(looked.began);
    }
}
