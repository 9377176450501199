//! The daemon's side of the launcher: starting it, and what it last told.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Daemon, Event, Options, Origins};
use crate::apply::Snapshot;
use crate::launcher;

/// Starts the launcher, if there is to be one, and tells the daemon of its news.
pub(super) fn start(
    options: &Options,
    snapshots: &watch::Sender<Arc<Snapshot>>,
    events: mpsc::Sender<Event>,
    shutdown: CancellationToken,
) -> Result<Option<launcher::Handle>> {
    let (Some(launch), Origins::Endpoint(ec2)) = (&options.launch, &options.origins) else { return Ok(None) };
    let place = launcher::Place {
        ec2: ec2.clone(),
        interval: options.poll_interval,
        docker_host: options.discovery.docker_host.clone(),
        state_dir: options.places.state_dir.clone(),
    };
    let launcher = launcher::start(launch.clone(), place, snapshots.subscribe(), shutdown.clone())?;
    let mut news = launcher.state().clone();
    tokio::spawn(shutdown.run_until_cancelled_owned(async move {
        while news.changed().await.is_ok() && events.send(Event::Launched).await.is_ok() {}
    }));
    Ok(Some(launcher))
}

impl Daemon {
    /// Takes the launcher's latest outcome in, whose ports are to be published next. Whoever waits goes by the one that
    /// was published, or they would find ports still closed.
    pub(super) fn take_launched(&mut self) {
        self.launched = self.launcher.as_ref().map(|launcher| Arc::clone(&launcher.state().borrow()));
    }
}
