//! Memberships as `MEMBERS` holds them, and what two states of them have in common. Pure; writing them is `apply`'s.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use sg_common::abi::{DELEGATED, Member, MemberKey};

use super::ApplyError;
use crate::resolve::Desired;
use crate::tables;

/// Who is in which groups, by VPC and address or delegated prefix.
pub type Members = BTreeMap<(u32, IpNet), Member>;

/// The key of a membership.
pub fn key(&(vpc, place): &(u32, IpNet)) -> MemberKey {
    let is_address = place.prefix_len() == place.max_prefix_len();
    MemberKey { vpc: if is_address { vpc } else { vpc | DELEGATED }, address: place.network().into() }
}

/// The desired memberships.
///
/// # Errors
/// [`ApplyError::Member`] where an address is in more groups than an entry holds.
pub fn of(desired: &Desired) -> Result<Members, ApplyError> {
    let mut members = Members::new();
    for (&(vpc, address), membership) in &desired.members {
        let too_many = |groups| ApplyError::Member { address: address.addr(), groups };
        let member = tables::member(membership).map_err(too_many)?;
        members.insert((vpc, address), member);
    }
    Ok(members)
}

/// Those memberships of which the old state and the new one agree.
pub fn common(old: &Members, new: &Members) -> Members {
    let both = |old: &Member, new: &Member| {
        let subnet = if old.subnet == new.subnet { old.subnet } else { 0 };
        let mut member = Member { subnet, ..Member::default() };
        for group in groups(old).intersection(&groups(new)) {
            member.groups[member.count as usize] = *group;
            member.count += 1;
        }
        member
    };
    old.iter().filter_map(|(place, old)| Some((*place, both(old, new.get(place)?)))).collect()
}

/// Whether an address is in fewer groups than before.
pub fn are_lost(old: &Members, new: &Members) -> bool {
    old.iter().any(|(place, old)| new.get(place).is_none_or(|new| new != old && !groups(old).is_subset(&groups(new))))
}

fn groups(member: &Member) -> BTreeSet<u32> {
    member.groups.into_iter().take(member.count as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(entries: &[(&str, &[u32], u32)]) -> Members {
        let entry = |&(address, groups, subnet): &(&str, &[u32], u32)| {
            let mut member = Member { count: groups.len() as u32, subnet, ..Member::default() };
            member.groups[..groups.len()].copy_from_slice(groups);
            ((1, IpNet::from(address.parse::<std::net::IpAddr>().expect("an address"))), member)
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn in_between_nobody_is_in_what_either_state_denies() {
        let old = members(&[("10.0.0.1", &[1, 2], 7), ("10.0.0.2", &[1], 7)]);
        let new = members(&[("10.0.0.1", &[2, 3], 8), ("10.0.0.3", &[1], 7)]);
        assert_eq!(common(&old, &new), members(&[("10.0.0.1", &[2], 0)]));
        assert_eq!(common(&old, &old), old);
    }

    #[test]
    fn only_who_leaves_is_lost() {
        let old = members(&[("10.0.0.1", &[1, 2], 0)]);
        assert!(!are_lost(&old, &old));
        assert!(!are_lost(&old, &members(&[("10.0.0.1", &[1, 2, 3], 0), ("10.0.0.2", &[1], 0)])));
        assert!(are_lost(&old, &members(&[("10.0.0.1", &[2, 3], 0)])));
        assert!(are_lost(&old, &members(&[])));
    }
}
