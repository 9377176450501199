//! Looking at the endpoint and at Docker, again and again, and when something happened. Changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt;
use tokio::sync::{Notify, mpsc};

use super::engine::Engine;
use super::marks::{LAUNCHER, Marks};
use super::plan::Seen;
use crate::discovery::docker;
use crate::model::InstanceId;
use crate::source::{Ec2, Launch, SourceError};

/// What was seen at one moment.
pub(super) struct Picture {
    pub(super) began: Instant,
    pub(super) outcome: Result<(Vec<Launch>, Seen, Engine), String>,
}

/// Looks at the endpoint and at Docker.
pub(super) struct Observer {
    pub(super) ec2: Arc<Ec2>,
    pub(super) marks: Marks,
    pub(super) docker_host: Option<String>,
    pub(super) interval: Duration,
    pub(super) hurry: Arc<Notify>,
    /// Something happened to a container: its namespace may be another.
    pub(super) deep: Arc<AtomicBool>,
    pub(super) pictures: mpsc::Sender<Picture>,
}

/// The longest time between two looks at an endpoint that doesn't answer.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

impl Observer {
    pub(super) async fn run(self) {
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
        let mut seen = match engine.look(deep).await {
            Ok(seen) => seen,
            Err(error) => {
                self.deep.fetch_or(deep, Ordering::Relaxed);
                return Err(failed(&endpoint, &error));
            }
        };
        seen.over = match self.over(&launches, &seen).await {
            Ok(over) => over,
            Err(error) => {
                self.deep.fetch_or(deep, Ordering::Relaxed);
                return Err(error.to_string());
            }
        };
        Ok((launches, seen, engine))
    }

    /// Which of those with containers that aren't listed among the living are terminated.
    async fn over(&self, launches: &[Launch], seen: &Seen) -> Result<BTreeSet<InstanceId>, SourceError> {
        let live: BTreeSet<&InstanceId> = launches.iter().map(|launch| &launch.instance).collect();
        let rest = seen.ours.keys().filter(|instance| !live.contains(instance)).cloned();
        self.ec2.terminated(&rest.collect()).await
    }
}

/// Tells the observer of containers that start and end. While Docker doesn't answer, it looks by itself.
pub(super) async fn docker_events(host: Option<String>, launcher: String, deep: Arc<AtomicBool>, hurry: Arc<Notify>) {
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
