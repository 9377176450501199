//! The compiled tables in memory, looked up by the kernel's own functions: what the proxy and `explain` decide by.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use sg_common::abi::{
    Binding, Config, DELEGATED, DELEGATED_LENGTH, Direction, GROUPS_PER_MEMBER, Line, Member, Policy,
};
use sg_common::addr::Address;
use sg_common::policy::Tables;

use crate::compile::{Compiled, Table};
use crate::exempt::Service;
use crate::resolve::{Membership, Place};
use crate::sharing::Set;

/// A copy of what the rule maps hold. A [`crate::apply::Snapshot`] has the one of the moment in which it was made: a
/// copy costs nothing.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    /// Settings.
    pub config: Config,
    /// `BINDINGS`.
    pub bindings: OrdMap<u32, Binding>,
    /// The policies behind them, by number.
    pub policies: OrdMap<u32, Arc<Compiled>>,
    /// `MEMBERS`, by VPC and address or delegated prefix.
    pub members: OrdMap<Place, Member>,
    /// `EXEMPT`.
    pub exempt: Set<(u32, Service)>,
}

impl InMemory {
    fn table(&self, table: u32) -> Option<&Table> {
        let direction = if table & 1 == 0 { Direction::Ingress } else { Direction::Egress };
        Some(self.policies.get(&(table >> 1))?.table(direction))
    }
}

/// A membership as the map holds it, or how many groups it has if they are too many.
///
/// # Errors
/// The number of groups.
pub fn member(membership: &Membership) -> Result<Member, usize> {
    let groups = &membership.groups;
    if groups.len() > GROUPS_PER_MEMBER {
        return Err(groups.len());
    }
    let subnet = membership.subnet.unwrap_or(0);
    let mut member = Member { count: groups.len() as u32, subnet, ..Member::default() };
    for (place, group) in member.groups.iter_mut().zip(groups) {
        *place = *group;
    }
    Ok(member)
}

impl Tables for InMemory {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn binding(&self, index: u32) -> Binding {
        self.bindings.get(&index).copied().unwrap_or_default()
    }

    fn policy(&self, table: u32) -> Option<Policy> {
        Some(self.table(table)?.header)
    }

    fn line(&self, table: u32, line: u32) -> Option<&Line> {
        self.table(table)?.lines.get(line as usize)
    }

    fn reference(&self, table: u32, group: u32) -> u32 {
        self.table(table).and_then(|table| table.references.get(&group)).copied().unwrap_or(0)
    }

    fn membership(&self, vpc: u32, address: &Address) -> Option<&Member> {
        let mut place = IpNet::from(IpAddr::from(*address));
        if vpc & DELEGATED != 0 {
            place = IpNet::new(place.addr(), DELEGATED_LENGTH).ok()?;
        }
        self.members.get(&(vpc & !DELEGATED, place))
    }

    fn has_own(&self, _eni: u32, _address: &Address) -> bool {
        // Own addresses are the guard's, which nobody runs over these tables; to own too little is the closed side.
        false
    }

    fn is_exempt(&self, vpc: u32, address: &Address, protocol: u8, port: u16) -> bool {
        self.exempt.contains(&(vpc, Service { address: IpAddr::from(*address), protocol, port }))
    }
}
