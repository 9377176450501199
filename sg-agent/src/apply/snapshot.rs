//! What is enforced, as everybody else sees it. Making one is the commit's.

use std::sync::Arc;

use sg_common::abi;

use super::Usage;
use crate::model::{InstanceId, Warning};
use crate::resolve::{Interface, PolicyKey, Spec};
use crate::sharing::{Set, Table};
use crate::tables::InMemory;

/// One interface as it is enforced.
#[derive(Clone, PartialEq, Debug)]
pub struct Enforced {
    /// What it was to be.
    pub interface: Arc<Interface>,
    /// Its entry in the map.
    pub entry: abi::Interface,
    /// Whether the programs are on its link.
    pub attached: bool,
}

/// The state that the kernel enforces, as the proxy, `status` and `explain` see it. It shares with the one before
/// whatever is the same.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts the commits.
    pub generation: u64,
    /// Interfaces by link index.
    pub interfaces: Table<u32, Enforced>,
    /// The policies' rules.
    pub policies: Table<PolicyKey, Spec>,
    /// The tables that the kernel has.
    pub tables: InMemory,
    /// What is enforced otherwise than somebody might expect, and what could not be.
    pub warnings: Set<Warning>,
    /// What policies take up.
    pub usage: Usage,
}

impl Snapshot {
    /// An instance's interfaces by link index, the primary one first: those that the control plane knows go before the
    /// others, older links before younger ones.
    pub fn interfaces_of(&self, instance: &InstanceId) -> Vec<(u32, &Enforced)> {
        let own = self.interfaces.iter().filter(|(_, enforced)| enforced.interface.instance == *instance);
        let mut own: Vec<_> = own.map(|(&ifindex, enforced)| (ifindex, enforced)).collect();
        own.sort_by_key(|(ifindex, enforced)| (enforced.interface.eni.is_none(), *ifindex));
        own
    }
}
