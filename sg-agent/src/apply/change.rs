//! What a change is about: the parts of the desired state that may be other than what stands. Everything after it looks
//! at these alone. Owns which they are; writes nothing.

use std::collections::BTreeSet;

use super::members::{self, Wanted};
use super::{Applier, ApplyError};
use crate::resolve::{Desired, Interface, Place, PolicyKey};

/// A desired state, and where it may differ from what stands.
pub(super) struct Change<'a> {
    pub(super) desired: &'a Desired,
    /// Nothing is known of what stands but what is written down of the maps: everything may differ.
    pub(super) is_whole: bool,
    pub(super) policies: Vec<PolicyKey>,
    pub(super) interfaces: BTreeSet<u32>,
    pub(super) members: Wanted,
    /// Own addresses of all interfaces.
    pub(super) own: usize,
}

impl Change<'_> {
    /// Policies that may be in force and are not to be.
    pub(super) fn gone(&self) -> impl Iterator<Item = &PolicyKey> {
        self.policies.iter().filter(|key| !self.desired.policies.contains_key(key))
    }
}

impl Applier {
    /// Where `desired` may differ from what stands. What stands is the last state, if that came about; else it is what
    /// was written, entry by entry.
    pub(super) fn change<'a>(&self, desired: &'a Desired) -> Result<Change<'a>, ApplyError> {
        let Some(last) = &self.last else { return self.whole(desired) };
        let interfaces: Vec<_> = last.desired.interfaces.changes(&desired.interfaces).collect();
        let count = |interface: Option<&std::sync::Arc<Interface>>| interface.map_or(0, |interface| own(interface));
        let (more, less): (usize, usize) = interfaces
            .iter()
            .map(|change| (count(change.after), count(change.before)))
            .fold((0, 0), |sum, (more, less)| (sum.0 + more, sum.1 + less));
        let interfaces: BTreeSet<u32> = interfaces.iter().map(|change| *change.key).collect();
        let places = last.desired.members.changes(&desired.members).map(|change| change.key);
        Ok(Change {
            desired,
            is_whole: false,
            policies: last.desired.policies.changes(&desired.policies).map(|change| change.key.clone()).collect(),
            interfaces,
            members: wanted(desired, places)?,
            own: last.own + more - less,
        })
    }

    fn whole<'a>(&self, desired: &'a Desired) -> Result<Change<'a>, ApplyError> {
        let policies: BTreeSet<&PolicyKey> = self.bound.keys().chain(desired.policies.keys()).collect();
        let places: BTreeSet<&Place> = self.tables.members.keys().chain(desired.members.keys()).collect();
        Ok(Change {
            desired,
            is_whole: true,
            policies: policies.into_iter().cloned().collect(),
            interfaces: self.entries.keys().chain(desired.interfaces.keys()).copied().collect(),
            members: wanted(desired, places)?,
            own: desired.interfaces.values().map(own).sum(),
        })
    }

    /// Links whose programs may be missing, or too many.
    pub(super) fn links(&self, desired: &Desired) -> BTreeSet<u32> {
        match &self.last {
            Some(last) if !self.strays => {
                let changed = last.desired.interfaces.changes(&desired.interfaces).map(|change| *change.key);
                changed.chain(last.unhooked.iter().copied()).collect()
            }
            _ => self.hooks.keys().chain(desired.interfaces.keys()).copied().collect(),
        }
    }
}

fn wanted<'a>(desired: &Desired, places: impl IntoIterator<Item = &'a Place>) -> Result<Wanted, ApplyError> {
    let of = |place: &Place| {
        let member = desired.members.get(place).map(|membership| members::of(place, membership));
        Ok((*place, member.transpose()?))
    };
    places.into_iter().map(of).collect()
}

/// How many addresses and prefixes are an interface's own.
fn own(interface: &Interface) -> usize {
    interface.addresses.len() + interface.prefixes.len()
}
