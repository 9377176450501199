//! Memberships as `MEMBERS` holds them, and what two states of them have in common. When they are written is the
//! commit's.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use sg_common::abi::{DELEGATED, Member, MemberKey};

use super::{Applier, ApplyError};
use crate::datapath::{DatapathError, absent_is_fine};
use crate::resolve::Desired;
use crate::tables;

/// Who is in which groups, by VPC and address or delegated prefix.
pub type Members = BTreeMap<(u32, IpNet), Member>;

impl Applier {
    /// Brings `MEMBERS` to exactly these.
    pub(super) fn write_members(&mut self, members: &Members) -> Result<(), ApplyError> {
        let changed = self.tables.members != *members;
        let written = self.replace_members(members);
        // Those that were written before an error count as well.
        if changed {
            self.announce()?;
        }
        written
    }

    fn replace_members(&mut self, members: &Members) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "MEMBERS", error };
        let gone: Vec<_> = self.tables.members.keys().filter(|place| !members.contains_key(place)).copied().collect();
        for place in gone {
            self.maps.writes += 1;
            absent_is_fine(self.maps.members.remove(&key(&place))).map_err(failed)?;
            self.tables.members.remove(&place);
        }
        for (place, member) in members {
            if self.tables.members.get(place) != Some(member) {
                self.maps.writes += 1;
                self.maps.members.insert(key(place), member, 0).map_err(failed)?;
                self.tables.members.insert(*place, *member);
            }
        }
        Ok(())
    }
}

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

/// The groups that the rules of a state refer to.
pub type Referenced = BTreeSet<u32>;

/// Who may race: packets, with a change of rules and members, which is many writes. Worst: one that both states allow is
/// denied for the microseconds in between, and none is allowed that both deny. It heals with the last write.
///
/// The memberships that may stand while rules change: those of which both states agree, and those that are there, or
/// are not, only because the other state's rules don't refer to the group. Without the latter, what both states allow
/// by different rules would be denied in between.
pub fn between(old: &Members, new: &Members, (before, after): (&Referenced, &Referenced)) -> Members {
    let none = Member::default();
    let places: BTreeSet<&(u32, IpNet)> = old.keys().chain(new.keys()).collect();
    let stay = |place: &(u32, IpNet)| {
        let (old, new) = (old.get(place).unwrap_or(&none), new.get(place).unwrap_or(&none));
        let subnet = if old.subnet == new.subnet { old.subnet } else { 0 };
        let mut member = Member { subnet, ..Member::default() };
        let (was, is) = (groups(old), groups(new));
        let gone = was.difference(&is).filter(|group| !after.contains(group));
        let fresh = is.difference(&was).filter(|group| !before.contains(group));
        // Should they be too many, the first count: those that both states have.
        for (place, group) in member.groups.iter_mut().zip(was.intersection(&is).chain(gone).chain(fresh)) {
            *place = *group;
            member.count += 1;
        }
        member
    };
    let members = places.into_iter().map(|place| (*place, stay(place)));
    members.filter(|(_, member)| member.count > 0 || member.subnet != 0).collect()
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
    use sg_common::abi::GROUPS_PER_MEMBER;

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
        let all = Referenced::from([1, 2, 3]);
        assert_eq!(between(&old, &new, (&all, &all)), members(&[("10.0.0.1", &[2], 0)]));
        assert_eq!(between(&old, &old, (&all, &all)), old);
    }

    #[test]
    fn what_only_one_state_refers_to_stands_in_between() {
        let old = members(&[("10.0.0.1", &[1], 0), ("10.0.0.2", &[4], 0)]);
        let new = members(&[("10.0.0.1", &[2], 0), ("10.0.0.3", &[2, 4], 0)]);
        let (before, after) = (Referenced::from([1, 4]), Referenced::from([2, 4]));
        let expected = members(&[("10.0.0.1", &[1, 2], 0), ("10.0.0.3", &[2], 0)]);
        assert_eq!(between(&old, &new, (&before, &after)), expected, "in and out of 4, to which both refer, as ever");
    }

    #[test]
    fn too_many_in_between_leave_those_of_both() {
        let many = |first: u32| (first..first + GROUPS_PER_MEMBER as u32).collect::<Vec<_>>();
        let old = members(&[("10.0.0.1", &many(1), 0)]);
        let new = members(&[("10.0.0.1", &many(9), 0)]);
        let between = between(&old, &new, (&many(1).into_iter().collect(), &many(9).into_iter().collect()));
        let member = between.values().next().expect("a member");
        assert_eq!(member.count as usize, GROUPS_PER_MEMBER);
        assert!((9..17).all(|group| groups(member).contains(&group)));
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
