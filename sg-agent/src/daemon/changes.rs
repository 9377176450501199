//! Reads that somebody waits for: of changes that pass the gateway, and of rules that the proxy is about to rely on. Owns
//! whose state is read anew; when that is done, `commits` tells.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Result;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::commits::Subject;
use super::pollers::Hint;
use super::{Daemon, Origins};
use crate::gateway::{self, Commit, Gateway, GatewayError};
use crate::model::Warning;
use crate::proxy;
use crate::source::{Ec2, Extent};

/// The gateway, or a warning where it would have been by default and can't be.
///
/// # Errors
/// It can't be where it was asked for.
pub(super) async fn open_gateway(
    wanted: &gateway::Options,
    origins: &Origins,
    commits: mpsc::Sender<Commit>,
    shutdown: CancellationToken,
) -> Result<(Option<Gateway>, Option<Warning>)> {
    let Origins::Endpoint(endpoint) = origins else { return Ok((None, None)) };
    let ec2 = Ec2::new(endpoint)?;
    if wanted.address.is_none() && !ec2.is_emulator() {
        // Its signatures are about the host that they are made for.
        return Ok((None, None));
    }
    match Gateway::start(wanted, &ec2.endpoint(), commits, shutdown).await {
        Ok(gateway) => {
            let address = gateway.address();
            tracing::info!("clients that use http://{address} are answered once their changes are enforced");
            Ok((Some(gateway), None))
        }
        Err(error @ (GatewayError::Listen { .. } | GatewayError::Itself { .. })) if wanted.address.is_none() => {
            let problem = format!("{error}; changes are noticed by polling alone");
            Ok((None, Some(Warning { subject: "gateway".into(), problem })))
        }
        Err(error) => Err(error.into()),
    }
}

impl Daemon {
    /// Somebody has changed something: it is read anew.
    pub(super) fn commit(&mut self, commit: Commit) {
        let Commit { whom, asked, modified, rebooted, extent, reply, known } = commit;
        let (subject, least) = match extent {
            gateway::Extent::Rules => (Subject::Rules, Extent::Rules),
            gateway::Extent::Everything | gateway::Extent::Anew => (Subject::Anything, Extent::Enforced),
        };
        let hints = self.pollers.of(&whom);
        for poller in hints.iter().filter_map(|hint| self.pollers.running.get(hint)) {
            if extent == gateway::Extent::Anew {
                poller.forget();
            }
            poller.note_modified(modified.clone());
            poller.hurry(least);
        }
        let own = self.pollers.own_scope();
        if let Some(launcher) = self.launcher.as_ref().filter(|_| whom.has_region(&own) && whom.has_account(&own)) {
            if extent == gateway::Extent::Anew {
                launcher.forget();
            }
            rebooted.into_iter().for_each(|instance| launcher.reboot(instance));
            launcher.hurry();
        }
        self.commits.wait(asked, subject, hints, reply, Some(known));
    }

    /// Clients of published ports wait for rules that are read from now on: of every source, if each client is to have
    /// them (`--live=endpoint`), else of those that are stale. Who asks while one read is under way shares the next.
    pub(super) fn renew(&mut self, asks: impl Iterator<Item = proxy::Ask>) {
        // Before anybody hurries: a read that begins at once counts.
        let asked = Instant::now();
        let hints = if self.live { self.pollers.running.keys().cloned().collect() } else { self.stale() };
        for poller in hints.iter().filter_map(|hint| self.pollers.running.get(hint)) {
            poller.hurry(Extent::Enforced);
        }
        for ask in asks {
            self.commits.wait(asked, Subject::Nothing, hints.clone(), ask, None);
        }
    }

    /// After whatever happened: answers those who wait, and has clients judged by what is stale now.
    pub(super) async fn settle(&mut self) {
        self.serve_waiting();
        if *self.freshness.borrow() != self.early_is_stale {
            self.publish().await;
        }
    }

    /// The sources that what is enforced may be behind.
    pub(super) fn stale(&self) -> BTreeSet<Hint> {
        self.commits.stale(&self.pollers.running, self.apply_error.as_ref())
    }
}
