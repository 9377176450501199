//! The interfaces' entries. Programs keep those that they found last, on each CPU, for as long as nothing is written
//! here; see `interface` in `sg-ebpf/src/maps.rs`. So whoever writes also says that something was written.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::hash_map::HashMap;
use aya::maps::{IterableMap as _, MapData, MapError};
use sg_common::abi::Interface;

use super::mapped::MappedWords;

/// `INTERFACES` by link index, with `EDITION`.
pub struct Interfaces {
    entries: HashMap<MapData, u32, Interface>,
    edition: MappedWords,
    /// The edition that was stored last. What is in the map isn't believed.
    current: AtomicU64,
    /// The map behind `edition`: programs that are loaded later refer to it.
    _edition_map: MapData,
}

impl Interfaces {
    pub(super) fn new(entries: HashMap<MapData, u32, Interface>, edition: MappedWords, edition_map: MapData) -> Self {
        Self { entries, edition, current: AtomicU64::new(0), _edition_map: edition_map }
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// The kernel's.
    pub fn insert(
        &mut self,
        ifindex: impl Borrow<u32>,
        entry: impl Borrow<Interface>,
        flags: u64,
    ) -> Result<(), MapError> {
        let result = self.entries.insert(ifindex, entry, flags);
        let _ = self.renew();
        result
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// The kernel's, also where there is none.
    pub fn remove(&mut self, ifindex: &u32) -> Result<(), MapError> {
        let result = self.entries.remove(ifindex);
        let _ = self.renew();
        result
    }

    /// The links that have an entry.
    pub fn keys(&self) -> impl Iterator<Item = Result<u32, MapError>> {
        self.entries.keys()
    }

    /// From here on every packet meets the entries as they stand now. Returns whether somebody else had changed the
    /// edition.
    pub fn renew(&self) -> bool {
        let before = self.current.fetch_add(1, Ordering::Relaxed);
        let is_altered = self.edition.load(0) != before;
        self.edition.store(0, before.wrapping_add(1));
        is_altered
    }

    /// The map itself.
    pub fn map(&self) -> &MapData {
        self.entries.map()
    }
}
