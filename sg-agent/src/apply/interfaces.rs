//! Interfaces in the maps: each one's entry, with its number, and its own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sg_common::abi::{self, DELEGATED, NOWHERE, OwnKey, SOURCE_DEST_CHECK};
use sg_common::addr::Address;
use sg_common::policy::Tables as _;

use super::change::Change;
use super::{Applier, ApplyError};
use crate::datapath::{DatapathError, absent_is_fine};
use crate::resolve::{Desired, Interface, PolicyKey};

/// The first address in the order of addresses, and the last one.
const FIRST: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const LAST: IpAddr = IpAddr::V6(Ipv6Addr::from_bits(u128::MAX));

type Entries = BTreeMap<u32, abi::Interface>;

impl Applier {
    /// Writes the changed interfaces' entries and own addresses, and removes those that are gone.
    pub(super) fn write_interfaces(&mut self, change: &Change) -> Result<(), ApplyError> {
        let mut entries = Entries::new();
        let written = self.number(change, &mut entries).and_then(|()| self.replace_interfaces(change, &entries));
        // Numbers of entries that couldn't be written are nobody's, but for those that an earlier agent gave.
        let earlier = self.datapath.earlier();
        let unused = entries.iter().filter(|&(ifindex, entry)| {
            let is_in_use = |known: Option<&abi::Interface>| known.is_some_and(|known| known.eni == entry.eni);
            !is_in_use(self.entries.get(ifindex))
                && !is_in_use(earlier.and_then(|earlier| earlier.interfaces.get(ifindex)))
        });
        self.departed.extend(unused.map(|(_, entry)| entry.eni));
        written
    }

    /// Gives up the numbers of an earlier agent's interfaces that are no more.
    pub(super) fn depart_earlier(&mut self) {
        let kept: BTreeSet<u32> = self.entries.values().map(|entry| entry.eni).collect();
        let earlier = self.datapath.earlier().into_iter().flat_map(|earlier| earlier.interfaces.values());
        let gone: Vec<u32> = earlier.map(|interface| interface.eni).filter(|eni| !kept.contains(eni)).collect();
        self.departed.extend(gone);
    }

    /// The entries that the changed interfaces are to have.
    fn number(&mut self, change: &Change, entries: &mut Entries) -> Result<(), ApplyError> {
        for &ifindex in &change.interfaces {
            if let Some(interface) = change.desired.interfaces.get(&ifindex) {
                entries.insert(ifindex, self.entry(ifindex, interface)?);
            }
        }
        Ok(())
    }

    /// New own addresses come before the entries and old ones go after them: one that becomes the primary one, or
    /// ceases to be, is an own address all the time.
    fn replace_interfaces(&mut self, change: &Change, entries: &Entries) -> Result<(), ApplyError> {
        let secondaries = secondaries(change.desired, entries);
        let gone: Vec<(u32, IpAddr)> = self.held(change).filter(|own| !secondaries.contains(own)).copied().collect();
        let changed = !gone.is_empty() || secondaries.iter().any(|own| !self.secondaries.contains(own));
        let written = self
            .add_secondaries(&secondaries)
            .and_then(|()| self.replace_entries(change, entries))
            .and_then(|()| self.remove_secondaries(&gone));
        // Those that were written before an error count as well.
        if changed {
            self.announce()?;
        }
        written
    }

    /// Own addresses that the changed interfaces have now, by the numbers that they have now.
    fn held<'a>(&'a self, change: &'a Change) -> Box<dyn Iterator<Item = &'a (u32, IpAddr)> + 'a> {
        if change.is_whole {
            return Box::new(self.secondaries.iter());
        }
        let known = change.interfaces.iter().filter_map(|ifindex| self.entries.get(ifindex));
        let numbers = known.flat_map(|entry| [entry.eni, entry.eni | DELEGATED]);
        Box::new(numbers.flat_map(|number| self.secondaries.range((number, FIRST)..=(number, LAST))))
    }

    fn replace_entries(&mut self, change: &Change, entries: &Entries) -> Result<(), ApplyError> {
        for (&ifindex, entry) in entries {
            if self.entries.get(&ifindex) != Some(entry) {
                let old = self.write_entry(ifindex, *entry)?;
                self.departed.extend(old.map(|old| old.eni).filter(|&eni| eni != entry.eni));
            }
        }
        let failed = |error| DatapathError::Write { map: "INTERFACES", error };
        for ifindex in change.interfaces.iter().filter(|ifindex| !entries.contains_key(ifindex)) {
            if self.entries.contains_key(ifindex) {
                self.maps.writes += 1;
                absent_is_fine(self.maps.interfaces.remove(ifindex)).map_err(failed)?;
                self.born.remove(ifindex);
                self.departed.extend(self.entries.remove(ifindex).map(|old| old.eni));
            }
        }
        Ok(())
    }

    fn write_entry(&mut self, ifindex: u32, entry: abi::Interface) -> Result<Option<abi::Interface>, ApplyError> {
        self.maps.writes += 1;
        let written = self.maps.interfaces.insert(ifindex, entry, 0);
        written.map_err(|error| DatapathError::Write { map: "INTERFACES", error })?;
        if entry.born == 0 {
            self.born.remove(&ifindex)
        } else {
            self.born.insert(ifindex)
        };
        self.rewritten.insert(ifindex);
        Ok(self.entries.insert(ifindex, entry))
    }

    pub(super) fn add_secondaries(&mut self, secondaries: &BTreeSet<(u32, IpAddr)>) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "SECONDARIES", error };
        for own in secondaries {
            if !self.secondaries.contains(own) {
                self.maps.writes += 1;
                self.maps.secondaries.insert(own_key(own), 1, 0).map_err(failed)?;
                self.secondaries.insert(*own);
            }
        }
        Ok(())
    }

    fn remove_secondaries(&mut self, gone: &[(u32, IpAddr)]) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "SECONDARIES", error };
        for own in gone {
            self.maps.writes += 1;
            absent_is_fine(self.maps.secondaries.remove(&own_key(own))).map_err(failed)?;
            self.secondaries.remove(own);
        }
        Ok(())
    }

    /// From here on a flow in the middle may be one that leaving a group revoked, so none is picked up
    /// ([`abi::Interface::born`]). Before the members change. Who may race: a packet in the middle of a flow, that was begun
    /// before this. Worst: its flow is picked up by the old members; it carries their count ([`abi::Config::world`]), so that under
    /// `--on-revoke=cut` its next packet ends it.
    pub(super) fn end_births(&mut self) -> Result<(), ApplyError> {
        for ifindex in self.born.clone() {
            if let Some(&entry) = self.entries.get(&ifindex) {
                self.write_entry(ifindex, abi::Interface { born: 0, ..entry })?;
            }
        }
        Ok(())
    }

    /// An interface's entry. Its number stays the same as long as link and MAC address do.
    fn entry(&mut self, ifindex: u32, interface: &Interface) -> Result<abi::Interface, ApplyError> {
        // Every policy was bound just now. A slot that doesn't exist denies; 0 would be "no network ACL".
        let slot = |key: &PolicyKey| self.bound.get(key).map_or(abi::MAX_BINDINGS, |bound| bound.slot);
        let groups = slot(&interface.policy);
        let acl = interface.acl.as_ref().map_or(0, slot);
        let known = self.entries.get(&ifindex).copied();
        let earlier = self.datapath.earlier().and_then(|earlier| earlier.interfaces.get(&ifindex).copied());
        let (eni, born) = match known.or(earlier.filter(|_| !self.started)) {
            Some(entry) if entry.mac == interface.mac => {
                // Flows that an earlier agent tracked had policies that this one can't know, and a swap of groups may
                // lead back to the same policy: nothing is picked up.
                let is_same = known.is_some() && entry.groups == groups;
                (entry.eni, if is_same { entry.born } else { 0 })
            }
            _ => {
                let number = self.enis.take();
                let capacity = abi::MAX_INTERFACES;
                let eni = number.ok_or(ApplyError::Capacity { what: "interfaces", needed: capacity + 1, capacity })?;
                (eni, self.tables.binding(groups).epoch)
            }
        };
        let first = |is_v4: bool| {
            let own = interface.addresses.iter().find(|address| address.is_ipv4() == is_v4 && !is_link_local(address));
            own.map_or(Address::UNSPECIFIED, |&address| address.into())
        };
        let subnet = |is_v4: bool| {
            let subnet = interface.subnet.iter().find(|network| network.network().is_ipv4() == is_v4);
            subnet.map_or((NOWHERE, NOWHERE), |network| {
                let length = network.prefix_len() + if is_v4 { 96 } else { 0 };
                (network.network().into(), Address::mask(length))
            })
        };
        let ((subnet4, mask4), (subnet6, mask6)) = (subnet(true), subnet(false));
        Ok(abi::Interface {
            eni,
            groups,
            acl,
            vpc: interface.vpc,
            flags: if interface.source_dest_check { SOURCE_DEST_CHECK } else { 0 },
            born,
            ipv4: first(true),
            ipv6: first(false),
            subnet4,
            mask4,
            subnet6,
            mask6,
            subnet: interface.subnet_number.unwrap_or(0),
            mac: interface.mac,
            pad: [0; 2],
        })
    }
}

/// Own addresses beyond those that stand in the entries, and delegated prefixes, by number as `SECONDARIES` has them.
fn secondaries(desired: &Desired, entries: &Entries) -> BTreeSet<(u32, IpAddr)> {
    let mut secondaries = BTreeSet::new();
    for (ifindex, entry) in entries {
        let Some(interface) = desired.interfaces.get(ifindex) else { continue };
        let primary = [entry.ipv4, entry.ipv6];
        let others = interface.addresses.iter().filter(|&&address| !primary.contains(&address.into()));
        secondaries.extend(others.map(|&address| (entry.eni, address)));
        secondaries.extend(interface.prefixes.iter().map(|prefix| (entry.eni | DELEGATED, prefix.network())));
    }
    secondaries
}

fn own_key(&(eni, address): &(u32, IpAddr)) -> OwnKey {
    OwnKey { eni, address: address.into() }
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
