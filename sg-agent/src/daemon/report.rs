//! What the daemon tells: warnings in the log, problems, the status, and answers to those who wait. Changes nothing of
//! what is enforced.

use std::collections::BTreeSet;

use super::poll::Poller;
use super::{Daemon, Reply};
use crate::discovery::{Attachment, Origin};
use crate::model::{InstanceId, Warning};
use crate::render::clean;
use crate::status::{Report, Status};
use crate::{explain, live, proxy};

impl Daemon {
    pub(super) fn explain(&mut self, query: &explain::Query) -> Reply {
        let mut explanation = match explain::explain(&self.applier.snapshot(), query) {
            Ok(explanation) => explanation,
            Err(error) => return Reply::Error(error.to_string()),
        };
        if query.live {
            let verified = tokio::task::block_in_place(|| live::verify(&mut self.applier, query, &mut explanation));
            if let Err(error) = verified {
                return Reply::Error(format!("the kernel could not be asked: {error}"));
            }
        }
        Reply::Explanation(explanation)
    }

    /// Logs each warning once for as long as it stands.
    pub(super) fn tell(&mut self) {
        let now = self.warnings();
        for warning in now.difference(&self.told) {
            tracing::warn!("{}: {}", clean(&warning.subject), warning.problem);
        }
        for gone in self.told.difference(&now) {
            tracing::info!("{}: no longer: {}", clean(&gone.subject), gone.problem);
        }
        self.told = now;
    }

    fn warnings(&self) -> BTreeSet<Warning> {
        let snapshot = self.applier.snapshot();
        // An instance that no poll has asked for yet isn't unknown, only new.
        let is_told = |warning: &&Warning| !self.is_new(&warning.subject) && !self.is_leaving(&warning.subject);
        let mut warnings: BTreeSet<Warning> = snapshot.warnings.iter().filter(is_told).cloned().collect();
        warnings.extend(self.view.discovered.warnings.iter().chain(&self.poller_warnings).cloned());
        let by_proxy = self.proxy_warnings.iter().filter(|warning| !self.is_expected(&warning.subject));
        warnings.extend(by_proxy.chain(&self.gateway_warning).cloned());
        warnings.extend(self.bridges.warnings());
        warnings.extend(self.launched.iter().flat_map(|launched| launched.warnings.clone()));
        warnings
    }

    pub(super) fn is_new(&self, subject: &str) -> bool {
        let is_it = |attachment: &&Attachment| *attachment.instance.0 == *subject;
        self.view.discovered.attachments.iter().find(is_it).is_some_and(|found| self.is_unasked(&found.instance))
    }

    /// Whether no poll has asked for an instance yet.
    pub(super) fn is_unasked(&self, instance: &InstanceId) -> bool {
        self.pollers.running.values().all(|poller| !poller.has_asked_for(instance))
    }

    /// Whether it is a terminated instance whose containers the launcher removes: it tells if it can't.
    fn is_leaving(&self, subject: &str) -> bool {
        let is_it = |instance: &InstanceId| *instance.0 == *subject;
        let by_hand = |attachment: &Attachment| !matches!(attachment.origin, Origin::Docker { .. });
        self.launched.as_ref().is_some_and(|launched| !launched.others.iter().any(is_it))
            && !self.view.discovered.attachments.iter().any(|link| is_it(&link.instance) && by_hand(link))
            && self.world.values().any(|inventory| inventory.terminated.iter().any(is_it))
    }

    /// Whether it is an instance that a port is published of, and not everything was looked at yet.
    fn is_expected(&self, subject: &str) -> bool {
        let is_unread = |poller: &Poller| poller.last_attempt().is_none();
        (self.view.looked.is_none() || self.pollers.running.values().any(is_unread))
            && self.flags.iter().any(|port| *port.instance.0 == *subject)
    }

    /// Answers those who wait for the desired state, once it is enforced.
    pub(super) fn serve_waiting(&mut self) {
        let answers = self.commits.serve(&self.pollers.running, self.apply_error.as_ref());
        let is_stale = !self.stale().is_empty();
        self.freshness.send_if_modified(|stale| std::mem::replace(stale, is_stale) != is_stale);
        drop(answers);
        let oldest = self.pollers.running.values().map(Poller::last_success).min().flatten();
        let mut since = oldest.zip(self.view.looked).map(|(read, looked)| read.min(looked));
        let mut underway = Vec::new();
        if let Some(launched) = &self.launched {
            since = since.min(launched.read);
            underway.clone_from(&launched.underway);
            underway.extend(launched.error.clone());
            if launched.generation != self.applier.snapshot().generation {
                underway.push("published ports are not settled yet".to_owned());
            }
        }
        let errors = self.pollers.running.values().filter_map(Poller::error);
        let problems = self.problems().into_iter().chain(errors).chain(underway).collect();
        self.desk.serve(since, distinct(problems));
    }

    /// What keeps the desired state from being the enforced one.
    fn problems(&self) -> Vec<String> {
        let snapshot = self.applier.snapshot();
        let unlooked = self.view.looked.is_none().then(|| "containers and links were not looked at yet".to_owned());
        let unattached = snapshot.interfaces.values().filter(|enforced| !enforced.attached);
        let unattached = unattached.map(|enforced| format!("link {} is not enforced", enforced.interface.link));
        let unasked =
            self.view.discovered.attachments.iter().filter(|attachment| self.is_unasked(&attachment.instance));
        let unasked = unasked.map(|attachment| format!("instance {} was not read yet", attachment.instance));
        let unread = self.pollers.running.values().flat_map(Poller::unread_groups);
        let unread = unread.map(|group| format!("security group {group} was not read yet"));
        let errors = self.apply_error.iter().chain(&self.view.error).cloned();
        let errors = errors.chain(self.repairs.error()).chain(self.bridges.error());
        unlooked.into_iter().chain(unattached).chain(unasked).chain(unread).chain(errors).collect()
    }

    fn published_counters(&self) -> Vec<proxy::PortCounters> {
        let ports = self.proxy.counters().into_iter();
        ports
            .map(|(published, counters)| {
                let denied_early = self.applier.denied(published);
                proxy::PortCounters { denied_early, ..counters }
            })
            .collect()
    }

    pub(super) fn status(&self) -> Status {
        let report = Report {
            sources: self.pollers.running.values().map(Poller::status).collect(),
            published: self.published_counters(),
            connections: self.proxy.connections(),
            gateway: self.gateway.as_ref().map(crate::gateway::Gateway::status),
            warnings: self.warnings().into_iter().chain(self.repairs.warnings()).collect(),
            problems: self.problems(),
            refused: self.refused,
            flows: self.flows,
            repairs: self.repairs.counts(),
        };
        Status::new(&self.applier.snapshot(), self.applier.maps(), report)
    }
}

/// Each problem once: the daemon and the launcher ask one endpoint, and one of them may know more of why it failed.
fn distinct(problems: Vec<String>) -> Vec<String> {
    let mut distinct: Vec<String> = Vec::new();
    for problem in problems {
        if !distinct.iter().any(|told| told.starts_with(&problem)) {
            distinct.retain(|told| !problem.starts_with(told.as_str()));
            distinct.push(problem);
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_once_and_as_fully_as_it_is_known() {
        let told = |problems: &[&str]| distinct(problems.iter().map(ToString::to_string).collect());
        let (brief, full) = ("http://e can't be reached", "http://e can't be reached: refused");
        assert_eq!(told(&[brief, brief]), [brief]);
        assert_eq!(told(&[full, "link a is not enforced", brief]), [full, "link a is not enforced"]);
        assert_eq!(told(&[brief, "link a is not enforced", full]), ["link a is not enforced", full]);
    }
}
