//! The maps by their types. Writing rules through them is `apply`'s alone.

use std::collections::BTreeMap;
use std::ops::Range;

use aya::Ebpf;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use sg_common::abi::{
    self, Cidr4Key, Cidr6Key, Config, Count, Direction, ExemptKey, Flow, FlowKey, Fragment, FragmentSlot, Interface,
    Member, MemberKey, OwnKey, Policy, PortKey, PublishedKey, PublishedPort, ReasonKey, ReferenceKey,
};
use sg_common::verdict::Pass;

use super::DatapathError;
use super::mapped::MappedWords;

/// Every map that the agent reads or writes.
pub struct Maps {
    /// Entries of rule maps that were written or removed so far.
    pub writes: u64,
    config: Array<MapData, Config>,
    /// Attached interfaces, by link index.
    pub interfaces: HashMap<MapData, u32, Interface>,
    /// Policies in force; see [`abi::Binding`].
    pub bindings: MappedWords,
    /// The map behind `bindings`.
    pub(super) bindings_map: MapData,
    /// Policies' headers.
    pub policies: Array<MapData, Policy>,
    /// Rows by IPv4 prefix.
    pub cidrs4: LpmTrie<MapData, Cidr4Key, u32>,
    /// Rows by IPv6 prefix.
    pub cidrs6: LpmTrie<MapData, Cidr6Key, u32>,
    /// Columns by protocol and port prefix.
    pub ports: LpmTrie<MapData, PortKey, u32>,
    /// Cells; see [`Maps::reach_matrix`].
    pub matrix: MappedWords,
    /// The map behind `matrix`: programs that are loaded later refer to it.
    _matrix_map: MapData,
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
    /// Tracked flows.
    pub flows: HashMap<MapData, FlowKey, Flow>,
    fragments: HashMap<MapData, FragmentSlot, Fragment>,
    tracked: Array<MapData, i64>,
    established: PerCpuArray<MapData, Count>,
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
        let matrix_map = array(ebpf, "MATRIX")?;
        let bindings = mapped(&bindings_map, "BINDINGS", abi::MAX_BINDINGS)?;
        reach(&bindings, "BINDINGS", 0..abi::MAX_BINDINGS)?;
        Ok(Self {
            writes: 0,
            config: typed(ebpf, "CONFIG")?,
            interfaces: typed(ebpf, "INTERFACES")?,
            bindings,
            bindings_map,
            policies: typed(ebpf, "POLICIES")?,
            cidrs4: typed(ebpf, "CIDRS4")?,
            cidrs6: typed(ebpf, "CIDRS6")?,
            ports: typed(ebpf, "PORTS")?,
            matrix: mapped(&matrix_map, "MATRIX", abi::MATRIX_WORDS)?,
            _matrix_map: matrix_map,
            references: typed(ebpf, "REFERENCES")?,
            members: typed(ebpf, "MEMBERS")?,
            secondaries: typed(ebpf, "SECONDARIES")?,
            exempt: typed(ebpf, "EXEMPT")?,
            published: typed(ebpf, "PUBLISHED")?,
            denied: typed(ebpf, "DENIED")?,
            flows: typed(ebpf, "FLOWS")?,
            fragments: typed(ebpf, "FRAGMENTS")?,
            tracked: typed(ebpf, "TRACKED")?,
            established: typed(ebpf, "ESTABLISHED")?,
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

    /// Makes words of the matrix ready to be written.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reach_matrix(&self, words: Range<u32>) -> Result<(), DatapathError> {
        reach(&self.matrix, "MATRIX", words)
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
                counters.insert((key.eni, key.direction, key.reason), sum(&values));
            }
        }
        for &eni in enis {
            for direction in [Direction::Ingress, Direction::Egress] {
                let count = sum(&self.established.get(&(2 * eni + direction as u32), 0)?);
                if count.packets > 0 {
                    counters.insert((eni, direction as u8, Pass::Established as u8), count);
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

    /// How many flows the table holds of an interface, those included that have expired since the last sweep.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tracked(&self, eni: u32) -> Result<u32, MapError> {
        Ok(u32::try_from(self.tracked.get(&eni, 0)?.max(0)).unwrap_or(u32::MAX))
    }

    /// Removes every flow, fragment and count of an interface that is no more, before its number is given to another.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_interface(&mut self, eni: u32) -> Result<(), MapError> {
        let keys: Vec<FlowKey> = self
            .flows
            .keys()
            .filter(|key| key.as_ref().map_or(true, |key| key.eni == eni))
            .collect::<Result<_, _>>()?;
        for key in keys {
            absent_is_fine(self.flows.remove(&key))?;
        }
        for slot in 0..2 * abi::FRAGMENT_SLOTS {
            absent_is_fine(self.fragments.remove(&FragmentSlot { eni, slot }))?;
        }
        self.tracked.set(eni, 0, 0)?;
        let keys: Vec<ReasonKey> = self
            .reasons
            .keys()
            .filter(|key| key.as_ref().map_or(true, |key| key.eni == eni))
            .collect::<Result<_, _>>()?;
        for key in keys {
            absent_is_fine(self.reasons.remove(&key))?;
        }
        for direction in [Direction::Ingress, Direction::Egress] {
            let index = 2 * eni + direction as u32;
            let zeros = vec![Count::default(); self.established.get(&index, 0)?.len()];
            let zeros = PerCpuValues::try_from(zeros).map_err(MapError::IoError)?;
            self.established.set(index, zeros, 0)?;
        }
        Ok(())
    }
}

/// A removal's result, where it doesn't matter whether there was anything.
pub fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn sum(values: &[Count]) -> Count {
    values.iter().fold(Count::default(), |total, value| Count {
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
