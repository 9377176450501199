//! Numbers by which the data path knows groups, subnets and VPCs.

use std::collections::HashMap;
use std::hash::Hash;

use crate::model::{GroupId, Scope, SubnetId, VpcId};

/// Every number that was given.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Numbers {
    pub(super) groups: Numbering<(Scope, GroupId)>,
    pub(super) subnets: Numbering<(Scope, SubnetId)>,
    pub(super) vpcs: Numbering<(Scope, VpcId)>,
}

/// Numbers of one kind.
#[derive(Clone, Debug)]
pub(super) struct Numbering<K> {
    numbers: HashMap<K, u32>,
    keys: Vec<K>,
}

impl<K: PartialEq> PartialEq for Numbering<K> {
    fn eq(&self, other: &Self) -> bool {
        self.keys == other.keys
    }
}

impl<K> Default for Numbering<K> {
    fn default() -> Self {
        Self { numbers: HashMap::new(), keys: Vec::new() }
    }
}

impl<K: Clone + Eq + Hash> Numbering<K> {
    /// The key's number, from 1 up; never given to another.
    pub(super) fn of(&mut self, key: &K) -> u32 {
        if let Some(number) = self.known(key) {
            return number;
        }
        self.keys.push(key.clone());
        let number = self.keys.len() as u32;
        self.numbers.insert(key.clone(), number);
        number
    }

    /// Its number if it has one.
    pub(super) fn known(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// Whose number it is.
    pub(super) fn key(&self, number: u32) -> Option<&K> {
        self.keys.get(number.checked_sub(1)? as usize)
    }
}
