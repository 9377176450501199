//! Looking again and again whether the kernel still has what it was given, and counting what had to be put right. How
//! that is seen and repaired is `apply`'s.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Daemon;
use crate::apply::Repair;
use crate::model::Warning;

/// How often. Nothing tells of a program that is taken off by force, so there is nothing to wait for.
pub const INTERVAL: Duration = Duration::from_millis(500);

/// How long a repair is among the warnings.
const RECENT: Duration = Duration::from_secs(300);

/// What had to be put right since the start.
#[derive(Default)]
pub struct Repairs {
    counts: BTreeMap<String, u64>,
    recent: BTreeMap<Warning, Instant>,
    /// What can't be looked at or put right now.
    error: Option<String>,
}

impl Repairs {
    /// How many, by kind.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.counts.clone()
    }

    /// Those of the last minutes.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> + '_ {
        self.recent.iter().filter(|(_, at)| at.elapsed() < RECENT).map(|(warning, _)| warning.clone())
    }

    /// What stands in the way.
    pub fn error(&self) -> Option<String> {
        self.error.clone()
    }

    fn note(&mut self, repair: &Repair) {
        tracing::warn!("{}: {}; put right", repair.subject.escape_default(), repair.problem);
        *self.counts.entry(repair.kind.to_owned()).or_default() += 1;
        self.recent.retain(|_, at| at.elapsed() < RECENT);
        let problem = format!("{}; it was put right", repair.problem);
        self.recent.insert(Warning { subject: repair.subject.clone(), problem }, Instant::now());
    }
}

impl Daemon {
    /// Looks once.
    pub(super) fn verify(&mut self) {
        let (mut repairs, errors) = tokio::task::block_in_place(|| self.applier.verify());
        repairs.extend(tokio::task::block_in_place(|| self.bridges.verify()));
        for repair in &repairs {
            self.repairs.note(repair);
        }
        let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let error = (!all.is_empty()).then(|| all.join("; "));
        if let Some(error) = error.as_ref().filter(|error| self.repairs.error.as_ref() != Some(error)) {
            tracing::error!("{error}");
        }
        self.repairs.error = error;
    }
}
