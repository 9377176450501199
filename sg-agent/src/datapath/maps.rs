//! The maps by their types. Writing rules through them is `apply`'s alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use aya::Ebpf;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use sg_common::abi::{
    self, Config, Count, Direction, ExemptKey, Flow, FlowKey, Fragment, FragmentSlot, LINE_WORDS, Member, MemberKey,
    OwnKey, Policy, PublishedKey, PublishedPort, ReasonKey, ReferenceKey, USUAL_KINDS,
};
use sg_common::verdict;

use super::interfaces::Interfaces;
use super::mapped::MappedWords;
use super::{DatapathError, sys};

/// Every map that the agent reads or writes.
pub struct Maps {
    /// Entries of rule maps that were written or removed so far.
    pub writes: u64,
    config: Array<MapData, Config>,
    /// Attached interfaces, by link index.
    pub interfaces: Interfaces,
    /// Policies in force; see [`abi::Binding`].
    pub bindings: MappedWords,
    /// The map behind `bindings`.
    pub(super) bindings_map: MapData,
    /// Policies' headers.
    pub policies: Array<MapData, Policy>,
    /// What the headers lead to: lines of [`abi::LINE_WORDS`] words; see [`Maps::reach_rules`].
    pub rules: MappedWords,
    /// The map behind `rules`: programs that are loaded later refer to it.
    _rules_map: MapData,
    /// Rows by group.
    pub references: HashMap<MapData, ReferenceKey, u32>,
    /// Groups by address.
    pub members: HashMap<MapData, MemberKey, Member>,
    /// Own addresses beyond the primary ones.
    pub secondaries: HashMap<MapData, OwnKey, u32>,
    /// Services that nothing filters.
    pub exempt: HashMap<MapData, ExemptKey, u32>,
    /// Published ports, by where clients reach them.
    pub published: HashMap<MapData, PublishedKey, PublishedPort>,
    denied: PerCpuArray<MapData, u64>,
    lost: PerCpuArray<MapData, u64>,
    /// Tracked flows.
    pub flows: HashMap<MapData, FlowKey, Flow>,
    fragments: HashMap<MapData, FragmentSlot, Fragment>,
    tracked: Array<MapData, i64>,
    usual: PerCpuArray<MapData, [Count; USUAL_KINDS]>,
    reasons: PerCpuHashMap<MapData, ReasonKey, Count>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // aya's array types have no `Debug`.
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DatapathError> {
        fn typed<T: TryFrom<Map>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, DatapathError> {
            ebpf.take_map(name).and_then(|map| map.try_into().ok()).ok_or(DatapathError::Map(name))
        }
        let bindings_map = array(ebpf, "BINDINGS")?;
        let rules_map = array(ebpf, "RULES")?;
        let edition_map = array(ebpf, "EDITION")?;
        let bindings = mapped(&bindings_map, "BINDINGS", abi::MAX_BINDINGS)?;
        reach(&bindings, "BINDINGS", 0..abi::MAX_BINDINGS)?;
        let edition = mapped(&edition_map, "EDITION", 1)?;
        reach(&edition, "EDITION", 0..1)?;
        Ok(Self {
            writes: 0,
            config: typed(ebpf, "CONFIG")?,
            interfaces: Interfaces::new(typed(ebpf, "INTERFACES")?, edition, edition_map),
            bindings,
            bindings_map,
            policies: typed(ebpf, "POLICIES")?,
            rules: mapped(&rules_map, "RULES", abi::RULE_LINES * LINE_WORDS as u32)?,
            _rules_map: rules_map,
            references: typed(ebpf, "REFERENCES")?,
            members: typed(ebpf, "MEMBERS")?,
            secondaries: typed(ebpf, "SECONDARIES")?,
            exempt: typed(ebpf, "EXEMPT")?,
            published: typed(ebpf, "PUBLISHED")?,
            denied: typed(ebpf, "DENIED")?,
            lost: typed(ebpf, "LOST")?,
            flows: typed(ebpf, "FLOWS")?,
            fragments: typed(ebpf, "FRAGMENTS")?,
            tracked: typed(ebpf, "TRACKED")?,
            usual: typed(ebpf, "USUAL")?,
            reasons: typed(ebpf, "REASONS")?,
        })
    }

    /// The settings in force.
    ///
    /// # Errors
    /// The kernel's.
    pub fn config(&self) -> Result<Config, DatapathError> {
        self.config.get(&0, 0).map_err(|error| DatapathError::Read { map: "CONFIG", error })
    }

    /// Replaces the settings.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_config(&mut self, config: &Config) -> Result<(), DatapathError> {
        self.config.set(0, config, 0).map_err(|error| DatapathError::Write { map: "CONFIG", error })
    }

    /// Makes lines of rules ready to be written.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reach_rules(&self, lines: Range<u32>) -> Result<(), DatapathError> {
        reach(&self.rules, "RULES", lines.start * LINE_WORDS as u32..lines.end * LINE_WORDS as u32)
    }

    /// All counters, summed over the CPUs: (interface's number, direction, reason's number).
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self, enis: &[u32]) -> Result<BTreeMap<(u32, u8, u8), Count>, MapError> {
        let mut counters = BTreeMap::new();
        for key in self.reasons.keys() {
            let key = key?;
            // An entry that went meanwhile counts nothing.
            if let Ok(values) = self.reasons.get(&key, 0) {
                counters.insert((key.eni, key.direction, key.reason), sum(values.iter().copied()));
            }
        }
        for &eni in enis {
            for direction in [Direction::Ingress, Direction::Egress] {
                let values = self.usual.get(&(2 * eni + direction as u32), 0)?;
                for (kind, verdict) in verdict::USUAL.iter().enumerate() {
                    let count = sum(values.iter().map(|counts| counts[kind]));
                    if count.packets > 0 {
                        counters.insert((eni, direction as u8, verdict::number(verdict)), count);
                    }
                }
            }
        }
        Ok(counters)
    }

    /// Packets to the published port of this number that the programs have denied.
    ///
    /// # Errors
    /// The kernel's.
    pub fn denied(&self, number: u32) -> Result<u64, MapError> {
        Ok(self.denied.get(&number, 0)?.iter().sum())
    }

    /// Starts a published port's count anew.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_denied(&mut self, number: u32) -> Result<(), MapError> {
        let zeros = vec![0; self.denied.get(&number, 0)?.len()];
        self.denied.set(number, PerCpuValues::try_from(zeros).map_err(MapError::IoError)?, 0)
    }

    /// Lines of the drop log (`--log-drops`) that were lost, because the agent couldn't read as fast as packets dropped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn lost_lines(&self) -> Result<u64, MapError> {
        Ok(self.lost.get(&0, 0)?.iter().sum())
    }

    /// How many flows the table holds of an interface, those included that have expired since the last sweep.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tracked(&self, eni: u32) -> Result<u32, MapError> {
        Ok(u32::try_from(self.tracked.get(&eni, 0)?.max(0)).unwrap_or(u32::MAX))
    }

    /// Removes every flow and fragment of interfaces that are no more, before their numbers are given to others. One
    /// walk for however many there are: the tables are everybody's, and large.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_flows(&mut self, enis: &BTreeSet<u32>) -> Result<(), MapError> {
        let mut from = None;
        loop {
            let (flows, next) = sys::entries::<FlowKey, Flow>(self.flows.map().fd(), from.as_ref(), FLOWS_AT_ONCE)?;
            for (key, _) in flows.iter().filter(|(key, _)| enis.contains(&key.eni.into())) {
                absent_is_fine(self.flows.remove(key))?;
            }
            match next {
                Some(next) => from = Some(next),
                None => break,
            }
        }
        for (&eni, slot) in enis.iter().flat_map(|eni| (0..2 * abi::FRAGMENT_SLOTS).map(move |slot| (eni, slot))) {
            absent_is_fine(self.fragments.remove(&FragmentSlot { eni, slot }))?;
        }
        Ok(())
    }

    /// Starts their counts anew. Nobody may be about to count any of their flows.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_counts(&mut self, enis: &BTreeSet<u32>) -> Result<(), MapError> {
        let keys: Vec<ReasonKey> = self
            .reasons
            .keys()
            .filter(|key| key.as_ref().map_or(true, |key| enis.contains(&key.eni)))
            .collect::<Result<_, _>>()?;
        for key in keys {
            absent_is_fine(self.reasons.remove(&key))?;
        }
        for &eni in enis {
            self.tracked.set(eni, 0, 0)?;
            for direction in [Direction::Ingress, Direction::Egress] {
                let index = 2 * eni + direction as u32;
                let zeros = vec![Default::default(); self.usual.get(&index, 0)?.len()];
                let zeros = PerCpuValues::try_from(zeros).map_err(MapError::IoError)?;
                self.usual.set(index, zeros, 0)?;
            }
        }
        Ok(())
    }
}

/// Flows that one system call reads: some megabytes.
const FLOWS_AT_ONCE: usize = 16_384;

/// A removal's result, where it doesn't matter whether there was anything.
pub fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn sum(values: impl IntoIterator<Item = Count>) -> Count {
    values.into_iter().fold(Count::default(), |total, value| Count {
        packets: total.packets + value.packets,
        bytes: total.bytes + value.bytes,
    })
}

fn array(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, DatapathError> {
    match ebpf.take_map(name) {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(DatapathError::Map(name)),
    }
}

fn mapped(data: &MapData, name: &'static str, words: u32) -> Result<MappedWords, DatapathError> {
    MappedWords::new(data.fd(), words as usize).map_err(|error| DatapathError::Mmap { map: name, error })
}

fn reach(words: &MappedWords, name: &'static str, range: Range<u32>) -> Result<(), DatapathError> {
    words.reach(range).map_err(|error| DatapathError::Mmap { map: name, error })
}
