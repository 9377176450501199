//! Memberships as `MEMBERS` holds them, and what two states of them have in common. When they are written is the
//! commit's.

use std::collections::BTreeSet;

use sg_common::abi::{DELEGATED, Member, MemberKey};

use super::{Applier, ApplyError};
use crate::datapath::{DatapathError, absent_is_fine};
use crate::resolve::{Membership, Place};
use crate::tables;

/// Places, and what is to be there.
pub type Wanted = Vec<(Place, Option<Member>)>;

impl Applier {
    /// Brings `MEMBERS` to this at these places.
    pub(super) fn write_members(&mut self, wanted: &Wanted) -> Result<(), ApplyError> {
        let changed = wanted.iter().any(|(place, member)| self.tables.members.get(place) != member.as_ref());
        let written = self.replace_members(wanted);
        // Those that were written before an error count as well.
        if changed {
            self.announce()?;
        }
        written
    }

    fn replace_members(&mut self, wanted: &Wanted) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "MEMBERS", error };
        let gone = wanted.iter().filter(|(_, member)| member.is_none());
        for (place, _) in gone {
            if self.tables.members.contains_key(place) {
                self.maps.writes += 1;
                absent_is_fine(self.maps.members.remove(&key(place))).map_err(failed)?;
                self.tables.members.remove(place);
            }
        }
        for (place, member) in wanted {
            let Some(member) = member else { continue };
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
pub fn key(&(vpc, place): &Place) -> MemberKey {
    let is_address = place.prefix_len() == place.max_prefix_len();
    MemberKey { vpc: if is_address { vpc } else { vpc | DELEGATED }, address: place.network().into() }
}

/// A desired membership as the map holds it.
///
/// # Errors
/// [`ApplyError::Member`] where an address is in more groups than an entry holds.
pub fn of((_, address): &Place, membership: &Membership) -> Result<Member, ApplyError> {
    tables::member(membership).map_err(|groups| ApplyError::Member { address: address.addr(), groups })
}

/// Who may race: packets, with a change of rules and members, which is many writes. Worst: one that both states allow is
/// denied for the microseconds in between, and none is allowed that both deny. It heals with the last write.
///
/// The membership that may stand at a place while rules change: that of which both states agree, and what is there, or
/// is not, only because the other state's rules don't refer to the group. Without the latter, what both states allow
/// by different rules would be denied in between.
pub fn between(
    old: Option<&Member>,
    new: Option<&Member>,
    is_referenced_before: impl Fn(u32) -> bool,
    is_referenced_after: impl Fn(u32) -> bool,
) -> Option<Member> {
    let none = Member::default();
    let (old, new) = (old.unwrap_or(&none), new.unwrap_or(&none));
    let subnet = if old.subnet == new.subnet { old.subnet } else { 0 };
    let mut member = Member { subnet, ..Member::default() };
    let (was, is) = (groups(old), groups(new));
    let gone = was.difference(&is).filter(|group| !is_referenced_after(**group));
    let fresh = is.difference(&was).filter(|group| !is_referenced_before(**group));
    // Should they be too many, the first count: those that both states have.
    for (place, group) in member.groups.iter_mut().zip(was.intersection(&is).chain(gone).chain(fresh)) {
        *place = *group;
        member.count += 1;
    }
    (member.count > 0 || member.subnet != 0).then_some(member)
}

/// Whether an address is in fewer groups than before.
pub fn is_lost(old: &Member, new: Option<&Member>) -> bool {
    new.is_none_or(|new| new != old && !groups(old).is_subset(&groups(new)))
}

fn groups(member: &Member) -> BTreeSet<u32> {
    member.groups.into_iter().take(member.count as usize).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ipnet::IpNet;
    use sg_common::abi::GROUPS_PER_MEMBER;

    use super::*;

    type Members = BTreeMap<Place, Member>;

    fn members(entries: &[(&str, &[u32], u32)]) -> Members {
        let entry = |&(address, groups, subnet): &(&str, &[u32], u32)| {
            let mut member = Member { count: groups.len() as u32, subnet, ..Member::default() };
            member.groups[..groups.len()].copy_from_slice(groups);
            ((1, IpNet::from(address.parse::<std::net::IpAddr>().expect("an address"))), member)
        };
        entries.iter().map(entry).collect()
    }

    fn between(old: &Members, new: &Members, before: &[u32], after: &[u32]) -> Members {
        let places: BTreeSet<&Place> = old.keys().chain(new.keys()).collect();
        let stay = |place: &Place| {
            let (before, after) = (|group| before.contains(&group), |group| after.contains(&group));
            Some((*place, super::between(old.get(place), new.get(place), before, after)?))
        };
        places.into_iter().filter_map(stay).collect()
    }

    #[test]
    fn in_between_nobody_is_in_what_either_state_denies() {
        let old = members(&[("10.0.0.1", &[1, 2], 7), ("10.0.0.2", &[1], 7)]);
        let new = members(&[("10.0.0.1", &[2, 3], 8), ("10.0.0.3", &[1], 7)]);
        let all = [1, 2, 3];
        assert_eq!(between(&old, &new, &all, &all), members(&[("10.0.0.1", &[2], 0)]));
        assert_eq!(between(&old, &old, &all, &all), old);
    }

    #[test]
    fn what_only_one_state_refers_to_stands_in_between() {
        let old = members(&[("10.0.0.1", &[1], 0), ("10.0.0.2", &[4], 0)]);
        let new = members(&[("10.0.0.1", &[2], 0), ("10.0.0.3", &[2, 4], 0)]);
        let expected = members(&[("10.0.0.1", &[1, 2], 0), ("10.0.0.3", &[2], 0)]);
        assert_eq!(between(&old, &new, &[1, 4], &[2, 4]), expected, "in and out of 4, to which both refer, as ever");
    }

    #[test]
    fn too_many_in_between_leave_those_of_both() {
        let many = |first: u32| (first..first + GROUPS_PER_MEMBER as u32).collect::<Vec<_>>();
        let old = members(&[("10.0.0.1", &many(1), 0)]);
        let new = members(&[("10.0.0.1", &many(9), 0)]);
        let between = between(&old, &new, &many(1), &many(9));
        let member = between.values().next().expect("a member");
        assert_eq!(member.count as usize, GROUPS_PER_MEMBER);
        assert!((9..17).all(|group| groups(member).contains(&group)));
    }

    #[test]
    fn only_who_leaves_is_lost() {
        let one = |groups: &[u32]| *members(&[("10.0.0.1", groups, 0)]).values().next().expect("a member");
        let old = one(&[1, 2]);
        assert!(!is_lost(&old, Some(&old)));
        assert!(!is_lost(&old, Some(&one(&[1, 2, 3]))));
        assert!(is_lost(&old, Some(&one(&[2, 3]))));
        assert!(is_lost(&old, None));
    }
}
