//! A control plane that has begun anew: what it knew of instances that still run here. Owns when that is so, and what of
//! the last inventory goes on; whether it is wanted is `--unknown`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Eni, InstanceId, Inventory, PeeredVpc, Warning};
use crate::sharing::Table;

impl Inventory {
    /// Completes this inventory by the last one, where an instance of `here` was in it and is nowhere now. No control
    /// plane forgets an instance that it doesn't list as terminated first: it has lost its memory, and with the instance
    /// went its groups, and what they refer to. Members are those that run here. What is known now wins, id by id.
    pub fn keep_lost<'a>(&mut self, last: &Self, here: impl IntoIterator<Item = &'a InstanceId>) {
        let is_lost = |id: &&InstanceId| {
            last.instances.contains_key(*id) && !self.instances.contains_key(*id) && !self.terminated.contains(*id)
        };
        let lost: BTreeSet<&InstanceId> = here.into_iter().filter(is_lost).collect();
        if lost.is_empty() {
            return;
        }
        let enis: Vec<&Eni> =
            last.enis.values().filter(|eni| eni.instance.as_ref().is_some_and(|id| lost.contains(id))).collect();
        // What is gone that is nobody's here stays gone: else who leaves would be let in for as long as one is lost.
        let is_theirs = |end: &PeeredVpc| {
            !self.vpcs.contains_key(&end.vpc) && enis.iter().any(|eni| eni.vpc.as_ref() == Some(&end.vpc))
        };
        let peerings = last.peerings.iter().filter(|peering| is_theirs(&peering.one) || is_theirs(&peering.other));
        self.peerings.extend(peerings.cloned());
        for id in &lost {
            last.instances
                .shared(id)
                .into_iter()
                .for_each(|it| self.instances.insert_shared((*id).clone(), it.clone()));
        }
        for eni in enis {
            complete_by(&mut self.enis, &last.enis, &eni.id);
        }
        complete(&mut self.groups, &last.groups);
        complete(&mut self.prefix_lists, &last.prefix_lists);
        complete(&mut self.vpcs, &last.vpcs);
        complete(&mut self.subnets, &last.subnets);
        complete(&mut self.acls, &last.acls);
        let lost: Vec<Warning> = lost.into_iter().map(warning).collect();
        self.warnings.extend(lost);
    }
}

fn warning(id: &InstanceId) -> Warning {
    Warning {
        subject: id.to_string(),
        problem: "is no longer known to the control plane, which has begun anew: its last policy stands; remove its \
                  container, or run with --unknown=deny"
            .into(),
    }
}

fn complete<K: Ord + Clone, V: Clone>(now: &mut Table<K, V>, last: &Table<K, V>) {
    for key in last.keys() {
        complete_by(now, last, key);
    }
}

fn complete_by<K: Ord + Clone, V: Clone>(now: &mut Table<K, V>, last: &Table<K, V>, key: &K) {
    if let Some(value) = last.shared(key).filter(|_| !now.contains_key(key)) {
        now.insert_shared(key.clone(), Arc::clone(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EniId, GroupId, Instance, SecurityGroup};

    fn inventory(instances: &[&str], groups: &[&str]) -> Inventory {
        let ids = instances.iter().map(|id| InstanceId::from(*id));
        let group = |id: &&str| {
            let (id, name) = (GroupId::from(*id), (*id).to_owned());
            let group =
                SecurityGroup { id: id.clone(), name, vpc: None, owner: "1".into(), ingress: vec![], egress: vec![] };
            (id, group)
        };
        Inventory {
            instances: ids
                .map(|id| (id.clone(), Instance { id, name: None, state: "running".into(), enis: vec![] }))
                .collect(),
            groups: groups.iter().map(group).collect(),
            ..Inventory::default()
        }
    }

    fn kept(now: &Inventory, last: &Inventory, here: &[&str]) -> Inventory {
        let here: Vec<InstanceId> = here.iter().map(|id| InstanceId::from(*id)).collect();
        let mut now = now.clone();
        now.keep_lost(last, &here);
        now
    }

    #[test]
    fn what_a_lost_instance_needs_goes_on() {
        let last = inventory(&["i-1", "i-2"], &["sg-1", "sg-2"]);
        let merged = kept(&inventory(&[], &[]), &last, &["i-1"]);
        assert_eq!((merged.instances.len(), merged.groups.len()), (1, 2), "the other one's end is its end");
        assert_eq!(merged.warnings.len(), 1, "{:?}", merged.warnings);
        assert_eq!(kept(&inventory(&[], &[]), &merged, &["i-1"]), merged, "and so at the next read");
        // Back again, with the same ids: what is said now is all that counts.
        let back = inventory(&["i-1"], &["sg-1"]);
        assert_eq!(kept(&back, &merged, &["i-1"]), back);
    }

    #[test]
    fn a_terminated_instance_leaves_no_interface_behind() {
        let eni = |id: &str, instance: Option<&str>| Eni {
            id: id.into(),
            instance: instance.map(Into::into),
            device_index: 0,
            groups: ["sg-1".into()].into(),
            subnet: None,
            vpc: None,
            addresses: vec!["10.0.0.9".parse().unwrap()],
            prefixes: Vec::new(),
            source_dest_check: true,
        };
        let mut last = inventory(&["i-1", "i-2"], &["sg-1"]);
        let enis = [eni("eni-1", Some("i-1")), eni("eni-2", Some("i-2")), eni("eni-3", None)];
        last.enis = enis.into_iter().map(|eni| (eni.id.clone(), eni)).collect();
        let mut now = inventory(&[], &[]);
        now.terminated.insert("i-2".into());
        let merged = kept(&now, &last, &["i-1"]);
        assert_eq!(merged.instances.keys().collect::<Vec<_>>(), [&InstanceId::from("i-1")]);
        let left: Vec<EniId> = merged.enis.keys().cloned().collect();
        assert_eq!(left, [EniId::from("eni-1")], "their addresses are nobody's");
    }

    #[test]
    fn what_is_over_or_was_never_here_is_not_kept() {
        let last = inventory(&["i-1"], &["sg-1"]);
        let mut over = inventory(&[], &[]);
        over.terminated.insert("i-1".into());
        assert_eq!(kept(&over, &last, &["i-1"]), over);
        // An hour later it isn't listed any more.
        let forgotten = inventory(&[], &[]);
        assert_eq!(kept(&forgotten, &over, &["i-1"]), forgotten);
        assert_eq!(kept(&forgotten, &last, &["i-2"]), forgotten);
        assert_eq!(kept(&forgotten, &last, &[]), forgotten);
    }
}
