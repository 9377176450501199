//! Policies into force and out of it: staged beside the old ones, bound by one word each, retired once nobody has them.
//! Their entries are `policies`'.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use sg_common::abi::{self, Binding};

use super::change::Change;
use super::policies::{Store, Usage, Written};
use super::{Applier, ApplyError, check, wait_for_programs};
use crate::compile::{Compiled, compile};
use crate::resolve::{PolicyKey, Spec};

/// Slots for policies in force: slot 0 is nobody's.
pub(super) const MOST_BOUND: u32 = abi::MAX_BINDINGS - 1;

/// A policy in force.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) slot: u32,
    pub(super) spec: Arc<Spec>,
    pub(super) written: Written,
}

/// Policies that are written and not in force yet.
pub(super) type Staged = Vec<(PolicyKey, Arc<Spec>, Written)>;

impl Applier {
    /// Compiles and writes every policy that is new or has changed. Nothing refers to them yet.
    pub(super) fn stage(&mut self, change: &Change) -> Result<Staged, ApplyError> {
        let wanted = change.policies.iter().filter_map(|key| Some((key, change.desired.policies.shared(key)?)));
        let changed: Vec<(&PolicyKey, &Arc<Spec>)> =
            wanted.filter(|(key, spec)| self.bound.get(key).is_none_or(|bound| bound.spec != **spec)).collect();
        let missing = changed.iter().filter(|(key, _)| !self.bound.contains_key(key)).count();
        check("group sets and network ACLs, those being replaced included", self.bound.len() + missing, MOST_BOUND)?;
        let mut compiled = Vec::new();
        for (key, spec) in changed {
            let policy = compile(spec).map_err(|error| ApplyError::Compile { policy: key.to_string(), error })?;
            compiled.push((key, spec, Arc::new(policy)));
        }
        // Each takes lines in a row: what is small finds room between what is large, and not the other way round.
        compiled.sort_by_key(|(.., policy)| std::cmp::Reverse(Usage::of(policy).lines));
        let total =
            |store: &Store| compiled.iter().fold(store.usage(), |usage, (.., policy)| usage.plus(&Usage::of(policy)));
        if total(&self.store).check().is_err() {
            // Old policies may be what is in the way.
            self.collect();
            total(&self.store).check()?;
        }
        let mut staged = Vec::new();
        for (key, spec, policy) in compiled {
            match self.store.write(&mut self.maps, policy) {
                Ok(written) => staged.push((key.clone(), Arc::clone(spec), written)),
                Err(error) => {
                    self.unstage(&staged);
                    return Err(error);
                }
            }
        }
        Ok(staged)
    }

    pub(super) fn unstage(&mut self, staged: &[(PolicyKey, Arc<Spec>, Written)]) {
        for (.., written) in staged {
            self.store.unwrite(&mut self.maps, written);
        }
    }

    /// Puts staged policies in force, one word each.
    pub(super) fn bind(&mut self, staged: Staged) {
        for (key, spec, written) in staged {
            self.epoch = self.epoch.wrapping_add(1);
            let binding = Binding { policy: written.number, epoch: self.epoch };
            let slot = match self.bound.get(&key) {
                Some(bound) => bound.slot,
                None => self.vacant_slot(),
            };
            self.maps.bindings.store(slot, word(binding));
            self.tables.bindings.insert(slot, binding);
            self.tables.policies.insert(written.number, Arc::clone(&written.compiled));
            self.referenced.add(&written.compiled);
            if let Some(old) = self.bound.insert(key, Bound { slot, spec, written }) {
                self.retire(old.written);
            }
        }
    }

    /// A slot that no program reads. Some may have been vacated a moment ago.
    fn vacant_slot(&mut self) -> u32 {
        let slot = self.slots.take().or_else(|| {
            wait_for_programs();
            std::mem::take(&mut self.vacated).into_iter().for_each(|slot| self.slots.give(slot));
            self.slots.take()
        });
        slot.expect("as many slots as `stage` counted")
    }

    /// Gives the network ACLs in force new epochs: each flow asks them again. (Groups' epochs stay: a flow that has the
    /// wrong one is looked at again anyway, and `Interface::born` is one of them.)
    pub(super) fn rebind_acls(&mut self) {
        let slots = self.entries.values().map(|entry| entry.acl).filter(|&slot| slot != 0);
        for slot in slots.collect::<BTreeSet<u32>>() {
            let Some(&binding) = self.tables.bindings.get(&slot) else { continue };
            self.epoch = self.epoch.wrapping_add(1);
            let binding = Binding { epoch: self.epoch, ..binding };
            self.maps.bindings.store(slot, word(binding));
            self.tables.bindings.insert(slot, binding);
        }
    }

    /// Retires policies that no interface has any more. Their slots go to others when no program can have come by an
    /// interface's old entry any more: it would judge that one's packet by another's policy.
    pub(super) fn unbind(&mut self, change: &Change) {
        for key in change.gone() {
            let Some(bound) = self.bound.remove(key) else { continue };
            self.maps.bindings.store(bound.slot, 0);
            self.tables.bindings.remove(&bound.slot);
            self.vacated.push(bound.slot);
            self.retire(bound.written);
        }
    }

    fn retire(&mut self, written: Written) {
        self.tables.policies.remove(&written.number);
        self.referenced.take(&written.compiled);
        self.retired.push(written);
    }

    /// Which references the policies will have more or less.
    pub(super) fn new_references(&self, change: &Change, staged: &Staged) -> References {
        let mut references = References::default();
        let replaced = staged.iter().map(|(key, ..)| key).chain(change.gone());
        for bound in replaced.filter_map(|key| self.bound.get(key)) {
            references.take(&bound.written.compiled);
        }
        staged.iter().for_each(|(.., written)| references.add(&written.compiled));
        references
    }
}

/// How many tables refer to each group.
#[derive(Debug, Default)]
pub(super) struct References(HashMap<u32, i64>);

impl References {
    pub(super) fn of(&self, group: u32) -> i64 {
        self.0.get(&group).copied().unwrap_or(0)
    }

    fn add(&mut self, policy: &Compiled) {
        self.count(policy, 1);
    }

    fn take(&mut self, policy: &Compiled) {
        self.count(policy, -1);
    }

    fn count(&mut self, policy: &Compiled, by: i64) {
        for group in policy.referenced() {
            let count = self.0.entry(group).or_default();
            *count += by;
            if *count == 0 {
                self.0.remove(&group);
            }
        }
    }
}

/// A binding as the one word that it is in the map.
pub(super) fn word(binding: Binding) -> u64 {
    u64::from(binding.policy) | u64::from(binding.epoch) << 32
}
