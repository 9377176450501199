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
    /// Of the launcher's own, those that the control plane lists as terminated.
    pub(super) over: BTreeSet<InstanceId>,
}

/// What the control plane was seen to know. One that has begun anew lists nothing of it, and has terminated nothing.
#[derive(Debug, Default)]
pub(super) struct Memory {
    known: BTreeSet<InstanceId>,
}

impl Memory {
    /// Takes a look, and tells whose containers stay though they aren't listed. An instance is over if it is listed as
    /// terminated, or if it was listed and isn't any more while another that was listed with it still is.
    pub(super) fn lost(&mut self, launches: &[Launch], seen: &Seen) -> BTreeSet<InstanceId> {
        let mut listed: BTreeSet<InstanceId> = launches.iter().map(|launch| launch.instance.clone()).collect();
        listed.extend(seen.over.iter().cloned());
        if self.known.is_disjoint(&listed) {
            self.known.clear();
        }
        // Those that are over stay known until nothing of them is left.
        self.known.retain(|instance| seen.ours.contains_key(instance));
        self.known.extend(listed);
        seen.ours.keys().filter(|instance| !self.known.contains(*instance)).cloned().collect()
    }
}

/// The instances that are to be worked on, and their goals. `anew` are those whose containers may lack something that
/// a look from outside doesn't tell, as after the agent's start, or when an interface was attached. The `lost` stay as
/// they are.
pub(super) fn due(
    launches: &[Launch],
    seen: &Seen,
    lost: &BTreeSet<InstanceId>,
    anew: impl Fn(&Launch) -> bool,
) -> BTreeMap<InstanceId, Goal> {
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
    for instance in seen.ours.keys().filter(|instance| !live.contains(instance) && !lost.contains(*instance)) {
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
        assert_eq!(due(&launches, &seen, &BTreeSet::new(), |_| false).get(&"i-1".into()).copied(), want);
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
        let due = |launches: &[Launch]| due(launches, &seen, &BTreeSet::new(), |_| true);
        assert!(due(&[launch("i-1", true)]).is_empty());
        assert_eq!(due(&[launch("i-2", true)]).len(), 1);
        assert!(due(&[]).is_empty(), "nobody else's container is ever gone for");
    }

    #[test]
    fn after_a_start_every_running_instance_is_looked_into() {
        let seen =
            Seen { ours: BTreeMap::from([("i-1".into(), units(Some(true), Some(true), false))]), ..Seen::default() };
        assert_eq!(due(&[launch("i-1", true)], &seen, &BTreeSet::new(), |_| true).len(), 1);
    }

    fn ids(ids: &[&str]) -> BTreeSet<InstanceId> {
        ids.iter().map(|id| InstanceId::from(*id)).collect()
    }

    /// One look after the other at instances that are listed, have containers, and are listed as terminated: who is
    /// lost, and who is gone.
    #[track_caller]
    fn looks(looks: &[[&[&str]; 5]]) {
        let mut memory = Memory::default();
        for (at, [live, ours, over, want_lost, want_gone]) in looks.iter().enumerate() {
            let launches: Vec<Launch> = live.iter().map(|id| launch(id, true)).collect();
            let up = |id| (id, units(Some(true), Some(true), false));
            let seen = Seen { ours: ids(ours).into_iter().map(up).collect(), over: ids(over), ..Seen::default() };
            let lost = memory.lost(&launches, &seen);
            let mut due = due(&launches, &seen, &lost, |_| false);
            due.retain(|_, goal| *goal == Goal::Gone);
            assert_eq!((lost, due.into_keys().collect()), (ids(want_lost), ids(want_gone)), "look {at}");
        }
    }

    #[test]
    fn what_is_listed_as_terminated_is_gone() {
        looks(&[
            [&["i-1"], &["i-1"], &[], &[], &[]],
            [&[], &["i-1"], &["i-1"], &[], &["i-1"]],
            [&[], &[], &[], &[], &[]],
        ]);
        looks(&[[&[], &["i-1", "i-2"], &["i-1"], &["i-2"], &["i-1"]]]);
    }

    #[test]
    fn a_control_plane_that_forgot_everything_has_terminated_nothing() {
        let both: &[&str] = &["i-1", "i-2"];
        let all: &[&str] = &["i-1", "i-2", "i-3"];
        looks(&[
            [both, both, &[], &[], &[]],
            [&[], both, &[], both, &[]],
            [&[], both, &[], both, &[]],
            // What is made then doesn't make the others gone, nor does its end.
            [&["i-3"], both, &[], both, &[]],
            [&["i-3"], all, &[], both, &[]],
            [&[], all, &["i-3"], both, &["i-3"]],
            // It has found them again.
            [both, both, &[], &[], &[]],
        ]);
        looks(&[[both, both, &[], &[], &[]], [&["i-3"], both, &[], both, &[]], [&["i-3"], all, &[], both, &[]]]);
        // Nor does an agent that comes later take them for gone.
        looks(&[[&["i-3"], all, &[], both, &[]], [&["i-3"], all, &[], both, &[]]]);
    }

    #[test]
    fn one_that_is_not_listed_any_more_while_others_are_is_gone() {
        let both: &[&str] = &["i-1", "i-2"];
        looks(&[
            [both, both, &[], &[], &[]],
            [&["i-2"], both, &[], &[], &["i-1"]],
            // Its removal takes more than a look.
            [&["i-2"], both, &[], &[], &["i-1"]],
            [&["i-2"], &["i-2"], &[], &[], &[]],
            [&[], &["i-2"], &[], &["i-2"], &[]],
        ]);
    }
}
