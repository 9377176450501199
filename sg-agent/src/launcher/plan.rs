//! What is to be done, from what the control plane says and what containers there are. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::InstanceId;
use crate::source::Launch;

/// What an instance is to come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Goal {
    /// It runs.
    Run,
    /// It runs, after it ended once more.
    Reboot,
    /// Its own container stands still. The holder goes on: a stopped instance keeps its address and interface.
    Stop,
    /// There is nothing of it.
    Gone,
}

/// A container of the launcher's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Unit {
    /// Its id.
    pub(super) id: String,
    /// Whether it runs.
    pub(super) running: bool,
}

/// The containers of one instance.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Units {
    /// Who holds the network namespace.
    pub(super) holder: Option<Unit>,
    /// The instance's own.
    pub(super) own: Option<Unit>,
    /// Whether the own one was seen to run in another namespace than the holder's: that was started anew.
    pub(super) apart: bool,
}

impl Units {
    fn has_reached(&self, goal: Goal) -> bool {
        let runs = |unit: &Option<Unit>| unit.as_ref().is_some_and(|unit| unit.running);
        match goal {
            Goal::Run => runs(&self.holder) && runs(&self.own) && !self.apart,
            Goal::Reboot => false,
            Goal::Stop => !runs(&self.own),
            Goal::Gone => self.holder.is_none() && self.own.is_none(),
        }
    }
}

/// What there is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen {
    /// The launcher's own containers.
    pub(super) ours: BTreeMap<InstanceId, Units>,
    /// Instances that somebody else's container stands for.
    pub(super) others: BTreeSet<InstanceId>,
}

/// The instances that are to be worked on, and their goals. `anew` are those whose containers may lack something that
/// a look from outside doesn't tell, as after the agent's start, or when an interface was attached.
pub(super) fn due(launches: &[Launch], seen: &Seen, anew: impl Fn(&Launch) -> bool) -> BTreeMap<InstanceId, Goal> {
    let mut due = BTreeMap::new();
    let nothing = Units::default();
    for launch in launches {
        let units = seen.ours.get(&launch.instance).unwrap_or(&nothing);
        if seen.others.contains(&launch.instance) && *units == nothing {
            continue;
        }
        let goal = if launch.runs { Goal::Run } else { Goal::Stop };
        if !units.has_reached(goal) || (goal == Goal::Run && anew(launch)) {
            due.insert(launch.instance.clone(), goal);
        }
    }
    let live: BTreeSet<&InstanceId> = launches.iter().map(|launch| &launch.instance).collect();
    for instance in seen.ours.keys().filter(|instance| !live.contains(instance)) {
        due.insert(instance.clone(), Goal::Gone);
    }
    due
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(id: &str, runs: bool) -> Launch {
        let (ami, tags) = ("ami-1".to_owned(), BTreeMap::new());
        Launch { instance: id.into(), runs, ami, key: None, interfaces: Vec::new(), tags }
    }

    fn units(holder: Option<bool>, own: Option<bool>, apart: bool) -> Units {
        let unit = |running| Unit { id: "x".to_owned(), running };
        Units { holder: holder.map(unit), own: own.map(unit), apart }
    }

    #[track_caller]
    fn check(runs: Option<bool>, has: Units, want: Option<Goal>) {
        let launches: Vec<Launch> = runs.map(|runs| launch("i-1", runs)).into_iter().collect();
        let seen = Seen { ours: BTreeMap::from([("i-1".into(), has)]), ..Seen::default() };
        assert_eq!(due(&launches, &seen, |_| false).get(&"i-1".into()).copied(), want);
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone() {
        check(Some(true), units(Some(true), Some(true), false), None);
        check(Some(false), units(Some(true), Some(false), false), None);
        check(Some(false), units(None, None, false), None);
    }

    #[test]
    fn what_the_control_plane_says_is_followed() {
        check(Some(true), units(None, None, false), Some(Goal::Run));
        check(Some(true), units(Some(true), Some(false), false), Some(Goal::Run));
        check(Some(true), units(Some(false), Some(true), false), Some(Goal::Run));
        check(Some(true), units(Some(true), Some(true), true), Some(Goal::Run));
        check(Some(false), units(Some(true), Some(true), false), Some(Goal::Stop));
        check(None, units(Some(true), Some(true), false), Some(Goal::Gone));
        check(None, units(Some(false), None, false), Some(Goal::Gone));
    }

    #[test]
    fn an_instance_that_has_a_container_gets_no_other() {
        let seen = Seen { others: BTreeSet::from(["i-1".into()]), ..Seen::default() };
        assert!(due(&[launch("i-1", true)], &seen, |_| true).is_empty());
        assert_eq!(due(&[launch("i-2", true)], &seen, |_| true).len(), 1);
        assert!(due(&[], &seen, |_| true).is_empty(), "nobody else's container is ever gone for");
    }

    #[test]
    fn after_a_start_every_running_instance_is_looked_into() {
        let seen =
            Seen { ours: BTreeMap::from([("i-1".into(), units(Some(true), Some(true), false))]), ..Seen::default() };
        assert_eq!(due(&[launch("i-1", true)], &seen, |_| true).len(), 1);
    }
}
