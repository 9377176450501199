//! Maps that copies share: a copy costs nothing, and comparing one with what it was copied from costs only what differs
//! since. Owns how; knows no inventories. Everything from the inventories to the snapshots is made of them, so that the
//! cost of a change doesn't grow with what did not change.

use std::collections::btree_map;
use std::fmt;
use std::ops::Index;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

/// The same for sets.
pub type Set<T> = imbl::OrdSet<T>;

/// An ordered map whose copies share nodes, and values as well: replacing one value touches no other.
pub struct Table<K, V>(OrdMap<K, Arc<V>>);

/// What became of one key: its value before and after.
pub struct Change<'a, K, V> {
    /// The key.
    pub key: &'a K,
    /// Its value before, if it had one.
    pub before: Option<&'a Arc<V>>,
    /// Its value after, if it has one.
    pub after: Option<&'a Arc<V>>,
}

impl<K: Ord + Clone, V: Clone> Table<K, V> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A key's value.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key).map(|value| &**value)
    }

    /// The same, to be kept.
    pub fn shared(&self, key: &K) -> Option<&Arc<V>> {
        self.0.get(key)
    }

    /// A key's value, to be changed. What other copies have stays as it is.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key).map(Arc::make_mut)
    }

    /// Whether it has a value.
    pub fn contains_key(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    /// Gives a key a value.
    pub fn insert(&mut self, key: K, value: V) {
        self.insert_shared(key, Arc::new(value));
    }

    /// The same with one that others have as well.
    pub fn insert_shared(&mut self, key: K, value: Arc<V>) {
        self.0.insert(key, value);
    }

    /// Takes a key's value away.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.0.remove(key).map(Arc::unwrap_or_clone)
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Moves everything of the other one here.
    pub fn append(&mut self, other: &mut Self) {
        self.0.extend(std::mem::take(&mut other.0));
    }

    /// Changes every value.
    pub fn update_all(&mut self, mut change: impl FnMut(&mut V)) {
        let keys: Vec<K> = self.keys().cloned().collect();
        for key in keys {
            self.get_mut(&key).into_iter().for_each(&mut change);
        }
    }

    /// Keys and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().map(|(key, value)| (key, &**value))
    }

    /// Keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.0.keys()
    }

    /// Values in the order of keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.values().map(|value| &**value)
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> Table<K, V> {
    /// What is other in a later one.
    pub fn changes<'a>(&'a self, later: &'a Self) -> impl Iterator<Item = Change<'a, K, V>> {
        self.0.diff(&later.0).map(|item| match item {
            DiffItem::Add(key, after) => Change { key, before: None, after: Some(after) },
            DiffItem::Update { old: (key, before), new: (_, after) } => {
                Change { key, before: Some(before), after: Some(after) }
            }
            DiffItem::Remove(key, before) => Change { key, before: Some(before), after: None },
        })
    }

    /// Shares with an earlier one whatever both have. It holds the same as before; what comes after sees only what
    /// differs.
    pub fn share(&mut self, earlier: &Self) {
        let mut shared = earlier.clone();
        for change in earlier.changes(self) {
            match change.after {
                Some(value) => shared.insert_shared(change.key.clone(), Arc::clone(value)),
                None => drop(shared.remove(change.key)),
            }
        }
        *self = shared;
    }
}

/// The same for sets.
pub fn share<T: Ord + Clone>(set: &mut Set<T>, earlier: &Set<T>) {
    if set == earlier {
        *set = earlier.clone();
    }
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(OrdMap::new())
    }
}

impl<K: Ord, V: PartialEq> PartialEq for Table<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<K: Ord, V: Eq> Eq for Table<K, V> {}

impl<K: Ord + fmt::Debug, V: fmt::Debug> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for Table<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        entries.into_iter().for_each(|(key, value)| self.insert(key, value));
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for Table<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut table = Self::default();
        table.extend(entries);
        table
    }
}

impl<K: Ord + Clone, V: Clone, const N: usize> From<[(K, V); N]> for Table<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Ord + Clone, V: Clone> IntoIterator for Table<K, V> {
    type Item = (K, V);
    type IntoIter = btree_map::IntoIter<K, V>;

    fn into_iter(self) -> Self::IntoIter {
        let entries: btree_map::BTreeMap<K, V> =
            self.0.into_iter().map(|(key, value)| (key, Arc::unwrap_or_clone(value))).collect();
        entries.into_iter()
    }
}

impl<K: Ord + Clone, V: Clone> Index<&K> for Table<K, V> {
    type Output = V;

    fn index(&self, key: &K) -> &V {
        &self.0[key]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(u32, &str)]) -> Table<u32, String> {
        entries.iter().map(|&(key, value)| (key, value.to_owned())).collect()
    }

    fn changed(before: &Table<u32, String>, after: &Table<u32, String>) -> Vec<u32> {
        before.changes(after).map(|change| *change.key).collect()
    }

    #[test]
    fn a_copy_changes_alone() {
        let before = table(&[(1, "one"), (2, "two"), (3, "three")]);
        let mut after = before.clone();
        after.get_mut(&2).unwrap().push('!');
        after.insert(4, "four".into());
        after.remove(&1);
        assert_eq!(before, table(&[(1, "one"), (2, "two"), (3, "three")]));
        assert_eq!(after, table(&[(2, "two!"), (3, "three"), (4, "four")]));
        assert_eq!(changed(&before, &after), [1, 2, 4]);
        assert_eq!(changed(&after, &after), [0; 0]);
    }

    #[test]
    fn what_is_read_anew_shares_what_is_the_same() {
        let many = |other: &str| -> Table<u32, String> {
            (0..1_000).map(|n| (n, if n == 500 { other.to_owned() } else { n.to_string() })).collect()
        };
        let (before, mut after) = (many("one"), many("another"));
        after.remove(&7);
        let read = after.clone();
        after.share(&before);
        assert_eq!(after, read);
        let shared =
            after.0.iter().filter(|(key, value)| before.0.get(*key).is_some_and(|its| Arc::ptr_eq(its, value)));
        assert_eq!(shared.count(), 998);
        assert_eq!(changed(&before, &after), [7, 500]);
    }
}
