//! Compiled policies in the maps: written as a whole before anything refers to them, unwritten as a whole after.

use std::sync::Arc;

use aya::maps::MapError;
use aya::maps::lpm_trie::Key;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sg_common::abi::{self, Cidr4Key, Cidr6Key, Direction, Policy, PortKey, ReferenceKey};

use super::ApplyError;
use super::space::{Numbers, Words};
use crate::compile::{Compiled, PortPrefix, Table};
use crate::datapath::{DatapathError, Maps, absent_is_fine};

/// What policies take up, in entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// Compiled policies.
    pub policies: u32,
    /// IPv4 prefixes.
    pub prefixes4: u32,
    /// IPv6 prefixes.
    pub prefixes6: u32,
    /// Port prefixes.
    pub ports: u32,
    /// Group references.
    pub references: u32,
    /// Words of the matrix.
    pub matrix_words: u32,
}

impl Usage {
    /// What the maps hold at most.
    pub const CAPACITY: Self = Self {
        policies: abi::MAX_POLICIES - 1,
        prefixes4: abi::MAX_PREFIXES,
        prefixes6: abi::MAX_PREFIXES,
        ports: abi::MAX_PORTS,
        references: abi::MAX_REFERENCES,
        matrix_words: abi::MATRIX_WORDS,
    };

    /// What one policy takes up.
    pub fn of(compiled: &Compiled) -> Self {
        let mut usage = Self { policies: 1, ..Self::default() };
        for table in [&compiled.ingress, &compiled.egress] {
            let prefixes4 = table.networks.keys().filter(|network| matches!(network, IpNet::V4(_))).count();
            usage.prefixes4 += prefixes4 as u32;
            usage.prefixes6 += (table.networks.len() - prefixes4) as u32;
            usage.ports += table.ports.len() as u32;
            usage.references += table.references.len() as u32;
            usage.matrix_words += table.matrix.len() as u32;
        }
        usage
    }

    fn fields(&self) -> [(&'static str, u32); 6] {
        [
            ("policies", self.policies),
            ("IPv4 prefixes", self.prefixes4),
            ("IPv6 prefixes", self.prefixes6),
            ("port prefixes", self.ports),
            ("group references", self.references),
            ("matrix words", self.matrix_words),
        ]
    }

    fn combine(&self, other: &Self, with: impl Fn(u32, u32) -> u32) -> Self {
        Self {
            policies: with(self.policies, other.policies),
            prefixes4: with(self.prefixes4, other.prefixes4),
            prefixes6: with(self.prefixes6, other.prefixes6),
            ports: with(self.ports, other.ports),
            references: with(self.references, other.references),
            matrix_words: with(self.matrix_words, other.matrix_words),
        }
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        self.combine(other, u32::saturating_add)
    }

    /// This without the other.
    pub fn minus(&self, other: &Self) -> Self {
        self.combine(other, u32::saturating_sub)
    }

    /// Refuses what the maps can't hold.
    ///
    /// # Errors
    /// The first kind of entries of which there are too many.
    pub fn check(&self) -> Result<(), ApplyError> {
        let over = self.fields().into_iter().zip(Self::CAPACITY.fields()).find(|((_, used), (_, most))| used > most);
        match over {
            Some(((what, needed), (_, capacity))) => Err(ApplyError::Capacity { what, needed, capacity }),
            None => Ok(()),
        }
    }
}

/// A policy that is in the maps.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its number.
    pub number: u32,
    /// What it holds.
    pub compiled: Arc<Compiled>,
    /// Where its matrices start, by direction.
    matrices: [u32; 2],
}

/// The numbers and stretches that policies have.
#[derive(Debug)]
pub struct Store {
    numbers: Numbers,
    words: Words,
    usage: Usage,
}

impl Default for Store {
    fn default() -> Self {
        // Number 0 is the policy of those who have none: no table, no rule.
        Self {
            numbers: Numbers::new(1..abi::MAX_POLICIES),
            words: Words::new(abi::MATRIX_WORDS),
            usage: Usage::default(),
        }
    }
}

impl Store {
    /// What is in the maps now.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Writes a policy under a new number. Nothing refers to it yet.
    ///
    /// # Errors
    /// [`ApplyError`]; what was written before the error has been unwritten.
    pub fn write(&mut self, maps: &mut Maps, compiled: Arc<Compiled>) -> Result<Written, ApplyError> {
        let needs = Usage::of(&compiled);
        self.usage.plus(&needs).check()?;
        let full = |what| ApplyError::Capacity { what, needed: 1, capacity: 0 };
        let number = self.numbers.take().ok_or(full("policies"))?;
        let sizes = [compiled.ingress.matrix.len() as u32, compiled.egress.matrix.len() as u32];
        let Some(first) = self.words.take(sizes[0]) else {
            self.numbers.give(number);
            return Err(full("matrix words in a row"));
        };
        let Some(second) = self.words.take(sizes[1]) else {
            self.words.give(first, sizes[0]);
            self.numbers.give(number);
            return Err(full("matrix words in a row"));
        };
        self.usage = self.usage.plus(&needs);
        let written = Written { number, compiled, matrices: [first, second] };
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Err(error) = written.put(maps, direction) {
                self.unwrite(maps, &written);
                return Err(error.into());
            }
        }
        Ok(written)
    }

    /// Takes a policy out of the maps. No program may be reading it any more.
    pub fn unwrite(&mut self, maps: &mut Maps, written: &Written) {
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Err(error) = written.take_out(maps, direction) {
                // Its entries can't be reached, since no policy has its number; the number is not used again.
                tracing::warn!(policy = written.number, %error, "cannot remove an old policy; its room is lost");
                return;
            }
        }
        self.words.give(written.matrices[0], written.compiled.ingress.matrix.len() as u32);
        self.words.give(written.matrices[1], written.compiled.egress.matrix.len() as u32);
        self.numbers.give(written.number);
        self.usage = self.usage.minus(&Usage::of(&written.compiled));
    }
}

impl Written {
    /// Writes it again, where somebody else changed it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn restore(&self, maps: &mut Maps) -> Result<(), DatapathError> {
        self.put(maps, Direction::Ingress)?;
        self.put(maps, Direction::Egress)
    }

    /// Puts cells right; whether any were wrong.
    pub fn restore_cells(&self, maps: &Maps) -> bool {
        let mut found = false;
        for direction in [Direction::Ingress, Direction::Egress] {
            for (place, &word) in (self.matrices[direction as usize]..).zip(&self.compiled.table(direction).matrix) {
                if maps.matrix.load(place) != word {
                    maps.matrix.store(place, word);
                    found = true;
                }
            }
        }
        found
    }

    /// The header of one of its directions, 0 or 1.
    pub fn header(&self, side: u32) -> Policy {
        header(self.compiled.table(direction(side)), self.matrices[side as usize & 1])
    }

    fn put(&self, maps: &mut Maps, direction: Direction) -> Result<(), DatapathError> {
        let table = self.compiled.table(direction);
        let id = abi::table(self.number, direction);
        let start = self.matrices[direction as usize];
        maps.writes += entries(table);
        maps.reach_matrix(start..start + table.matrix.len() as u32)?;
        for (offset, &word) in (start..).zip(&table.matrix) {
            maps.matrix.store(offset, word);
        }
        for (network, row) in &table.networks {
            match cidr_key(id, network) {
                CidrKey::V4(key) => maps.cidrs4.insert(&key, row, 0).map_err(write("CIDRS4"))?,
                CidrKey::V6(key) => maps.cidrs6.insert(&key, row, 0).map_err(write("CIDRS6"))?,
            }
        }
        for (prefix, column) in &table.ports {
            maps.ports.insert(&port_key(id, prefix), column, 0).map_err(write("PORTS"))?;
        }
        for (&group, row) in &table.references {
            maps.references.insert(ReferenceKey { table: id, group }, row, 0).map_err(write("REFERENCES"))?;
        }
        maps.policies.set(id, header(table, start), 0).map_err(write("POLICIES"))
    }

    fn take_out(&self, maps: &mut Maps, direction: Direction) -> Result<(), DatapathError> {
        let table = self.compiled.table(direction);
        let id = abi::table(self.number, direction);
        maps.writes += entries(table);
        maps.policies.set(id, Policy::default(), 0).map_err(write("POLICIES"))?;
        for network in table.networks.keys() {
            match cidr_key(id, network) {
                CidrKey::V4(key) => absent_is_fine(maps.cidrs4.remove(&key)).map_err(write("CIDRS4"))?,
                CidrKey::V6(key) => absent_is_fine(maps.cidrs6.remove(&key)).map_err(write("CIDRS6"))?,
            }
        }
        for prefix in table.ports.keys() {
            absent_is_fine(maps.ports.remove(&port_key(id, prefix))).map_err(write("PORTS"))?;
        }
        for &group in table.references.keys() {
            let key = ReferenceKey { table: id, group };
            absent_is_fine(maps.references.remove(&key)).map_err(write("REFERENCES"))?;
        }
        Ok(())
    }
}

/// How many entries a table has: its header, and all else that isn't in the mapped matrix.
fn entries(table: &Table) -> u64 {
    (1 + table.networks.len() + table.ports.len() + table.references.len()) as u64
}

fn write(map: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |error| DatapathError::Write { map, error }
}

fn header(table: &Table, matrix: u32) -> Policy {
    Policy { matrix, row_words: table.row_words(), size: table.rows << 16 | table.columns, flags: table.flags }
}

/// The direction that a table's number stands for.
pub fn direction(id: u32) -> Direction {
    if id & 1 == Direction::Ingress as u32 { Direction::Ingress } else { Direction::Egress }
}

/// A key's table and network; none for a key that isn't one of ours.
pub fn network4(key: &Key<Cidr4Key>) -> Option<(u32, IpNet)> {
    let Cidr4Key { table, address } = key.data();
    let length = key.prefix_len().checked_sub(TABLE_BITS)?;
    let network = Ipv4Net::new(address.into(), u8::try_from(length).ok()?).ok()?;
    Some((u32::from_be_bytes(table), network.into()))
}

/// The same for IPv6.
pub fn network6(key: &Key<Cidr6Key>) -> Option<(u32, IpNet)> {
    let Cidr6Key { table, address } = key.data();
    let length = key.prefix_len().checked_sub(TABLE_BITS)?;
    let network = Ipv6Net::new(address.into(), u8::try_from(length).ok()?).ok()?;
    Some((u32::from_be_bytes(table), network.into()))
}

/// A key's table and port prefix.
pub fn port_prefix(key: &Key<PortKey>) -> Option<(u32, PortPrefix)> {
    let PortKey { table, protocol, port } = key.data();
    let bits = u8::try_from(key.prefix_len().checked_sub(TABLE_BITS)?).ok()?;
    let (protocol, port) = (u16::from_be_bytes(protocol), u16::from_be_bytes(port));
    Some((u32::from_be_bytes(table), PortPrefix { protocol, port, bits }))
}

/// Bits of a key before the address: the table's number.
const TABLE_BITS: u32 = 32;

enum CidrKey {
    V4(Key<Cidr4Key>),
    V6(Key<Cidr6Key>),
}

fn cidr_key(id: u32, network: &IpNet) -> CidrKey {
    let table = id.to_be_bytes();
    let bits = TABLE_BITS + u32::from(network.prefix_len());
    match network {
        IpNet::V4(network) => CidrKey::V4(Key::new(bits, Cidr4Key { table, address: network.network().octets() })),
        IpNet::V6(network) => CidrKey::V6(Key::new(bits, Cidr6Key { table, address: network.network().octets() })),
    }
}

fn port_key(id: u32, prefix: &PortPrefix) -> Key<PortKey> {
    let key =
        PortKey { table: id.to_be_bytes(), protocol: prefix.protocol.to_be_bytes(), port: prefix.port.to_be_bytes() };
    Key::new(TABLE_BITS + u32::from(prefix.bits), key)
}
