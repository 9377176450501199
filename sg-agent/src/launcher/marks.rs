//! What makes a container or a network this launcher's. Owns labels and names, and tells one's own from others'; asks
//! Docker nothing.

use std::collections::HashMap;

use bollard::models::{ContainerSummary, ContainerSummaryStateEnum};

use super::plan::{Seen, Unit};
use crate::discovery::conventions::{self, ACCOUNT, ENI, INSTANCE, PUBLISH, REGION};
use crate::discovery::names;
use crate::model::InstanceId;

/// Marks what a launcher made; the value says which one.
pub(super) const LAUNCHER: &str = "dev.sg-agent.launcher";
/// Which of an instance's two containers it is.
const ROLE: &str = "dev.sg-agent.role";
pub(super) const HOLDER: &str = "network";
pub(super) const OWN: &str = "instance";

/// What marks containers and networks as this launcher's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Marks {
    /// Its state directory, which tells the agents of one machine apart.
    pub(super) launcher: String,
    pub(super) region: String,
    /// If it was told.
    pub(super) account: Option<String>,
}

impl Marks {
    pub(super) fn labels(&self) -> HashMap<String, String> {
        let own = [(LAUNCHER, &self.launcher), (REGION, &self.region)];
        let account = self.account.iter().map(|account| (ACCOUNT, account));
        own.into_iter().chain(account).map(|(key, value)| (key.to_owned(), value.clone())).collect()
    }

    pub(super) fn are_on(&self, labels: &HashMap<String, String>) -> bool {
        self.labels().iter().all(|(key, value)| labels.get(key) == Some(value))
            && (self.account.is_some() || labels.get(ACCOUNT).is_none_or(String::is_empty))
    }

    /// The labels of one of an instance's containers.
    pub(super) fn of(&self, instance: &InstanceId, role: &str) -> HashMap<String, String> {
        let mut labels = self.labels();
        labels.extend([(INSTANCE.to_owned(), instance.to_string()), (ROLE.to_owned(), role.to_owned())]);
        // An empty one is none, and hides the image's: no image chooses an interface, or opens a port of the host.
        for key in [ACCOUNT, ENI, PUBLISH] {
            labels.entry(key.to_owned()).or_default();
        }
        labels
    }

    /// Adds a container to what is seen. Labels alone make nothing this launcher's: a container has those of its image, which may come from anywhere. So
    /// the name has to fit, and Docker gives a name to one container.
    pub(super) fn take(&self, container: ContainerSummary, seen: &mut Seen) {
        let (Some(id), labels) = (container.id, container.labels.unwrap_or_default()) else { return };
        let running = container.state == Some(ContainerSummaryStateEnum::RUNNING);
        let unit = Some(Unit { id, running });
        let names = container.names.unwrap_or_default();
        let has_name = |wanted: &str| names.iter().any(|name| name.strip_prefix('/') == Some(wanted));
        let instance = labels.get(INSTANCE).and_then(|instance| names::id(instance).ok()).map(InstanceId::from);
        match (instance, labels.get(ROLE).map(String::as_str)) {
            (Some(instance), Some(role @ (HOLDER | OWN)))
                if self.are_on(&labels) && has_name(&name(&instance, role)) =>
            {
                let units = seen.ours.entry(instance).or_default();
                match role {
                    HOLDER => units.holder = unit,
                    _ => units.own = unit,
                }
            }
            _ if running => {
                let name = names.first().map_or("", |name| name.trim_start_matches('/'));
                let claim = conventions::claim(name, &labels, &mut Vec::new());
                seen.others.extend(claim.map(|claim| claim.instance));
            }
            _ => {}
        }
    }
}

/// The name of one of an instance's containers.
pub(super) fn name(instance: &InstanceId, role: &str) -> String {
    match role {
        HOLDER => format!("sg-agent-{instance}-net"),
        _ => format!("sg-agent-{instance}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::plan::Units;
    use super::*;

    #[test]
    fn only_ones_own_marks_count() {
        let marks = Marks { launcher: "/run/sg-agent".into(), region: "us-east-1".into(), account: None };
        let with = |changes: &[(&str, &str)]| {
            let mut labels = marks.labels();
            labels.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
            labels
        };
        assert!(marks.are_on(&with(&[(INSTANCE, "i-1")])));
        assert!(!marks.are_on(&with(&[(LAUNCHER, "/run/other")])));
        assert!(!marks.are_on(&with(&[(REGION, "eu-west-1")])));
        assert!(!marks.are_on(&with(&[(ACCOUNT, "000000000000")])));
        assert!(marks.are_on(&with(&[(ACCOUNT, "")])));
        assert!(!marks.are_on(&HashMap::from([(INSTANCE.to_owned(), "i-1".to_owned())])));
    }

    #[test]
    fn a_container_by_another_name_is_somebody_elses_whatever_its_labels_say() {
        let marks = Marks { launcher: "/run/sg-agent".into(), region: "us-east-1".into(), account: None };
        let seen = |name: &str, instance: &str, role: &str| {
            let container = ContainerSummary {
                id: Some("x".to_owned()),
                names: Some(vec![format!("/{name}")]),
                labels: Some(marks.of(&instance.into(), role)),
                state: Some(ContainerSummaryStateEnum::RUNNING),
                ..ContainerSummary::default()
            };
            let mut seen = Seen::default();
            marks.take(container, &mut seen);
            seen
        };
        let unit = Some(Unit { id: "x".to_owned(), running: true });
        let of = |units| Seen { ours: BTreeMap::from([("i-1".into(), units)]), ..Seen::default() };
        assert_eq!(seen("sg-agent-i-1", "i-1", OWN), of(Units { own: unit.clone(), ..Units::default() }));
        assert_eq!(seen("sg-agent-i-1-net", "i-1", HOLDER), of(Units { holder: unit, ..Units::default() }));
        let foreign = Seen { others: BTreeSet::from(["i-1".into()]), ..Seen::default() };
        for (name, role) in [("db", OWN), ("sg-agent-i-1", HOLDER), ("sg-agent-i-1-net", OWN), ("sg-agent-i-1", "x")] {
            assert_eq!(seen(name, "i-1", role), foreign, "{name} {role}");
        }
        assert_eq!(seen("sg-agent-$(id)", "$(id)", OWN), Seen::default(), "that is no instance");
    }

    #[test]
    fn an_images_labels_choose_nothing() {
        let marks = Marks { launcher: "/run/sg-agent".into(), region: "us-east-1".into(), account: None };
        let own = marks.of(&"i-1".into(), OWN);
        // As Docker merges them: the container's go before its image's.
        let image = [ACCOUNT, REGION, ENI, PUBLISH, INSTANCE].map(|key| (key.to_owned(), "22".to_owned()));
        let mut labels = HashMap::from(image);
        labels.extend(own.clone());
        let claim = |labels| conventions::claim("sg-agent-i-1", labels, &mut Vec::new());
        assert!(claim(&own).is_some());
        assert_eq!(claim(&labels), claim(&own));
    }
}
