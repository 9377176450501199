//! R5: brings the kernel to the desired state. The only writer of rule maps.
//!
//! Everything that may fail for want of room is tried before anything changes: new policies are compiled, counted and
//! written beside the old ones, and only then do the words flip that put them in force. A change that doesn't fit is
//! refused whole, and what stood before goes on standing.

mod policies;
mod space;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use sg_common::abi::{self, Binding, Config, ExemptKey, MemberKey, NOWHERE, OwnKey, SOURCE_DEST_CHECK};
use sg_common::addr::Address;

pub use policies::Usage;
use policies::{Store, Written};
use space::Numbers;

use crate::compile::{CompileError, compile};
use crate::datapath::{Datapath, DatapathError, Hook, Maps, absent_is_fine};
use crate::exempt::Service;
use crate::model::Warning;
use crate::resolve::{Desired, Interface, PolicyKey, Spec};
use crate::tables::{self, InMemory};

/// Why a change was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// More than a map holds.
    #[error("{needed} {what} are needed, {capacity} fit: the change is refused whole, the old policy stands")]
    Capacity {
        /// Of what.
        what: &'static str,
        /// How many the new state needs.
        needed: u32,
        /// How many there can be.
        capacity: u32,
    },
    /// A policy that no table can hold.
    #[error("the policy of {policy}: {error}; the change is refused whole, the old policy stands")]
    Compile {
        /// Whose.
        policy: String,
        /// Why.
        error: CompileError,
    },
    /// One address in too many groups.
    #[error("{address} is in {groups} referenced groups, {most} fit: the change is refused whole, the old policy stands", most = abi::GROUPS_PER_MEMBER)]
    Member {
        /// The address.
        address: IpAddr,
        /// Its groups.
        groups: usize,
    },
    /// The kernel refused.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// One interface as it is enforced.
#[derive(Clone, PartialEq, Debug)]
pub struct Enforced {
    /// What it was to be.
    pub interface: Interface,
    /// Its entry in the map.
    pub entry: abi::Interface,
    /// Whether the programs are on its link.
    pub attached: bool,
}

/// The state that the kernel enforces, as the proxy, `status` and `explain` see it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts the commits.
    pub generation: u64,
    /// Interfaces by link index.
    pub interfaces: BTreeMap<u32, Enforced>,
    /// The policies' rules.
    pub policies: BTreeMap<PolicyKey, Arc<Spec>>,
    /// The tables that the kernel has.
    pub tables: InMemory,
    /// What is enforced otherwise than somebody might expect, and what could not be.
    pub warnings: BTreeSet<Warning>,
    /// What policies take up.
    pub usage: Usage,
}

/// A policy in force.
#[derive(Debug)]
struct Bound {
    slot: u32,
    spec: Arc<Spec>,
    written: Written,
}

/// Writes the rule maps.
#[derive(Debug)]
pub struct Applier {
    datapath: Datapath,
    maps: Maps,
    config: Config,
    store: Store,
    bound: BTreeMap<PolicyKey, Bound>,
    slots: Numbers,
    enis: Numbers,
    /// Numbers of interfaces that are gone; their flows go before another gets them.
    departed: Vec<u32>,
    hooks: BTreeMap<u32, Hook>,
    secondaries: BTreeSet<(u32, IpAddr)>,
    retired: Vec<Written>,
    epoch: u32,
    snapshot: Arc<Snapshot>,
    /// What was last brought about.
    last: Option<Desired>,
    started: bool,
}

impl Applier {
    /// An applier over freshly loaded programs and maps.
    pub fn new(datapath: Datapath, maps: Maps, config: Config) -> Self {
        let mut enis = Numbers::new(0..abi::MAX_INTERFACES);
        let epoch = match datapath.earlier() {
            // Their flows are still there, under these numbers.
            Some(earlier) => {
                for interface in earlier.interfaces.values() {
                    enis.take_this(interface.eni);
                }
                earlier.epoch
            }
            None => 0,
        };
        Self {
            datapath,
            maps,
            config: Config { layout: abi::LAYOUT, ..config },
            store: Store::default(),
            bound: BTreeMap::new(),
            slots: Numbers::new(1..abi::MAX_BINDINGS),
            enis,
            departed: Vec::new(),
            hooks: BTreeMap::new(),
            secondaries: BTreeSet::new(),
            retired: Vec::new(),
            epoch,
            snapshot: Arc::default(),
            last: None,
            started: false,
        }
    }

    /// What is enforced now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot)
    }

    /// The maps, for reading counters and flows.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The programs and the maps, for running packets through them.
    pub fn datapath(&mut self) -> (&mut Datapath, &mut Maps) {
        (&mut self.datapath, &mut self.maps)
    }

    /// Brings the kernel to `desired`. Until that is `complete` for the first time (every source was read, every link
    /// seen), what an earlier agent enforces is left to its programs.
    ///
    /// # Errors
    /// [`ApplyError`]; what was enforced before still is. Links that can't be attached to are no error but a warning
    /// in the snapshot: the others are enforced all the same.
    pub fn apply(&mut self, desired: &Desired, complete: bool) -> Result<Arc<Snapshot>, ApplyError> {
        if self.is_enforced(desired) {
            return Ok(self.snapshot());
        }
        if complete || self.started {
            return self.commit(desired, complete);
        }
        let mut fresh = desired.clone();
        fresh.interfaces.retain(|&ifindex, _| !self.is_adopted(ifindex) || self.hooks.contains_key(&ifindex));
        self.commit(&fresh, false)
    }

    /// Whether there is nothing to do.
    fn is_enforced(&self, desired: &Desired) -> bool {
        self.started
            && self.last.as_ref() == Some(desired)
            && desired.interfaces.keys().all(|ifindex| self.hooks.contains_key(ifindex))
    }

    fn commit(&mut self, desired: &Desired, complete: bool) -> Result<Arc<Snapshot>, ApplyError> {
        let members = members(desired)?;
        check_counts(desired, &members)?;
        let staged = self.stage(desired)?;
        let mut warnings = desired.warnings.clone();

        // New links first: until their entry is written, the programs on them drop everything.
        let (fresh, adopted): (Vec<_>, Vec<_>) =
            self.unhooked(desired).partition(|&(ifindex, _)| !self.is_adopted(ifindex));
        self.hook(&fresh, &mut warnings);

        if loses_members(&self.snapshot.tables.members, &members)
            && let Err(error) = self.end_births()
        {
            self.unstage(&staged);
            return Err(error);
        }
        let mut tables = self.snapshot.tables.clone();
        // Who leaves a group is out before rules change, who joins is in after: in between, nobody is allowed what
        // neither the old state nor the new one allows.
        let staying = common(&tables.members, &members);
        let written = self.write_members(&staying, &mut tables).and_then(|()| self.write_exempt(desired, &mut tables));
        if let Err(error) = written {
            self.unstage(&staged);
            return Err(error);
        }
        self.bind(desired, staged, &mut tables)?;
        self.write_members(&members, &mut tables)?;
        let mut interfaces = self.write_interfaces(desired)?;
        self.unbind(desired, &mut tables);

        // Links that an earlier agent enforces change over when everything is in place.
        self.hook(&adopted, &mut warnings);
        self.unhook(desired, &mut warnings);
        for (ifindex, interface) in &mut interfaces {
            interface.attached = self.hooks.contains_key(ifindex);
        }
        if complete && !self.started {
            self.unhook_earlier(desired, &mut warnings);
            self.datapath.keep_numbers(&self.maps)?;
            self.started = true;
        }
        tables.config = self.config;
        self.last = Some(desired.clone());
        self.snapshot = Arc::new(Snapshot {
            generation: self.snapshot.generation + 1,
            interfaces,
            policies: desired.policies.clone(),
            tables,
            warnings,
            usage: self.store.usage(),
        });
        Ok(self.snapshot())
    }

    /// Removes what no program can be reading any more: old policies, and the flows of interfaces that are gone.
    /// Takes some milliseconds, which no caller of `apply` waits for.
    pub fn collect(&mut self) {
        if self.retired.is_empty() && self.departed.is_empty() {
            return;
        }
        wait_for_programs();
        for written in std::mem::take(&mut self.retired) {
            self.store.unwrite(&mut self.maps, &written);
        }
        for eni in std::mem::take(&mut self.departed) {
            match self.maps.forget_interface(eni) {
                Ok(()) => self.enis.give(eni),
                Err(error) => {
                    tracing::warn!(eni, %error, "cannot remove the flows of a departed interface; trying again");
                    self.departed.push(eni);
                }
            }
        }
    }

    /// Takes expired flows out of the table, and returns how many live.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sweep(&mut self) -> Result<u32, DatapathError> {
        self.datapath.sweep()
    }

    /// Replaces the settings that programs read.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_config(&mut self, change: impl FnOnce(&mut Config)) -> Result<(), ApplyError> {
        change(&mut self.config);
        self.maps.set_config(&self.config)?;
        Ok(())
    }

    /// Compiles and writes every policy that is new or has changed. Nothing refers to them yet.
    fn stage(&mut self, desired: &Desired) -> Result<Vec<(PolicyKey, Arc<Spec>, Written)>, ApplyError> {
        let changed: Vec<(&PolicyKey, &Arc<Spec>)> = desired
            .policies
            .iter()
            .filter(|(key, spec)| self.bound.get(key).is_none_or(|bound| bound.spec != **spec))
            .collect();
        let mut compiled = Vec::new();
        for (key, spec) in changed {
            let policy = compile(spec).map_err(|error| ApplyError::Compile { policy: format!("{key:?}"), error })?;
            compiled.push((key, spec, Arc::new(policy)));
        }
        let total =
            |store: &Store| compiled.iter().fold(store.usage(), |usage, (.., policy)| usage.plus(&Usage::of(policy)));
        if total(&self.store).check().is_err() {
            // Old policies may be what is in the way.
            self.collect();
            total(&self.store).check()?;
        }
        let mut staged = Vec::new();
        for (key, spec, policy) in compiled {
            match self.store.write(&mut self.maps, policy) {
                Ok(written) => staged.push((key.clone(), Arc::clone(spec), written)),
                Err(error) => {
                    self.unstage(&staged);
                    return Err(error);
                }
            }
        }
        Ok(staged)
    }

    fn unstage(&mut self, staged: &[(PolicyKey, Arc<Spec>, Written)]) {
        for (.., written) in staged {
            self.store.unwrite(&mut self.maps, written);
        }
    }

    /// Puts staged policies in force, one word each.
    fn bind(
        &mut self,
        desired: &Desired,
        staged: Vec<(PolicyKey, Arc<Spec>, Written)>,
        tables: &mut InMemory,
    ) -> Result<(), ApplyError> {
        let missing = staged.iter().filter(|(key, ..)| !self.bound.contains_key(key)).count();
        if missing + self.bound.len() >= abi::MAX_BINDINGS as usize {
            self.unstage(&staged);
            let needed = desired.policies.len() as u32;
            return Err(ApplyError::Capacity { what: "group sets", needed, capacity: abi::MAX_BINDINGS - 1 });
        }
        for (key, spec, written) in staged {
            self.epoch = self.epoch.wrapping_add(1);
            let binding = Binding { policy: written.number, epoch: self.epoch };
            let slot = match self.bound.get(&key) {
                Some(bound) => bound.slot,
                None => self.slots.take().expect("as many slots as were just counted"),
            };
            self.maps.bindings.store(slot, u64::from(binding.policy) | u64::from(binding.epoch) << 32);
            tables.bindings.insert(slot, binding);
            tables.policies.insert(written.number, Arc::clone(&written.compiled));
            if let Some(old) = self.bound.insert(key, Bound { slot, spec, written }) {
                tables.policies.remove(&old.written.number);
                self.retired.push(old.written);
            }
        }
        Ok(())
    }

    /// Retires policies that no interface has any more.
    fn unbind(&mut self, desired: &Desired, tables: &mut InMemory) {
        let gone: Vec<PolicyKey> =
            self.bound.keys().filter(|key| !desired.policies.contains_key(key)).cloned().collect();
        for key in gone {
            let Some(bound) = self.bound.remove(&key) else { continue };
            self.maps.bindings.store(bound.slot, 0);
            tables.bindings.remove(&bound.slot);
            tables.policies.remove(&bound.written.number);
            self.slots.give(bound.slot);
            self.retired.push(bound.written);
        }
    }

    fn write_members(
        &mut self,
        members: &BTreeMap<(u32, IpAddr), abi::Member>,
        tables: &mut InMemory,
    ) -> Result<(), ApplyError> {
        let key = |&(vpc, address): &(u32, IpAddr)| MemberKey { vpc, address: address.into() };
        let failed = |error| DatapathError::Write { map: "MEMBERS", error };
        let mut changed = false;
        for (place, member) in members {
            if tables.members.get(place) != Some(member) {
                self.maps.members.insert(key(place), member, 0).map_err(failed)?;
                changed = true;
            }
        }
        for place in tables.members.keys().filter(|place| !members.contains_key(place)) {
            absent_is_fine(self.maps.members.remove(&key(place))).map_err(failed)?;
            changed = true;
        }
        tables.members.clone_from(members);
        if changed {
            self.announce()?;
        }
        Ok(())
    }

    /// From here on a flow in the middle may be one that leaving a group revoked, so none is picked up
    /// ([`abi::Interface::born`]). Before the members change, or one could slip in between.
    fn end_births(&mut self) -> Result<(), ApplyError> {
        let snapshot = Arc::make_mut(&mut self.snapshot);
        for (ifindex, interface) in &mut snapshot.interfaces {
            if interface.entry.born != 0 {
                let entry = abi::Interface { born: 0, ..interface.entry };
                let failed = |error| DatapathError::Write { map: "INTERFACES", error };
                self.maps.interfaces.insert(ifindex, entry, 0).map_err(failed)?;
                interface.entry = entry;
            }
        }
        Ok(())
    }

    /// Tells programs that flows judged by members or own addresses are to be looked at again.
    fn announce(&mut self) -> Result<(), ApplyError> {
        self.set_config(|config| config.world = config.world.wrapping_add(1))
    }

    fn write_exempt(&mut self, desired: &Desired, tables: &mut InMemory) -> Result<(), ApplyError> {
        let key = |(vpc, service): &(u32, Service)| ExemptKey {
            vpc: *vpc,
            address: service.address.into(),
            port: service.port,
            protocol: service.protocol,
            pad: 0,
        };
        let failed = |error| DatapathError::Write { map: "EXEMPT", error };
        for place in desired.exempt.difference(&tables.exempt) {
            self.maps.exempt.insert(key(place), 1, 0).map_err(failed)?;
        }
        for place in tables.exempt.difference(&desired.exempt) {
            absent_is_fine(self.maps.exempt.remove(&key(place))).map_err(failed)?;
        }
        tables.exempt.clone_from(&desired.exempt);
        Ok(())
    }

    /// Writes every interface's own addresses, then its entry, and removes those that are gone.
    fn write_interfaces(&mut self, desired: &Desired) -> Result<BTreeMap<u32, Enforced>, ApplyError> {
        let mut enforced = BTreeMap::new();
        let mut secondaries = BTreeSet::new();
        for (&ifindex, interface) in &desired.interfaces {
            let entry = self.entry(ifindex, interface)?;
            let primary = [entry.ipv4, entry.ipv6];
            secondaries.extend(
                interface
                    .addresses
                    .iter()
                    .filter(|&&address| !primary.contains(&address.into()))
                    .map(|&address| (entry.eni, address)),
            );
            enforced.insert(ifindex, Enforced { interface: interface.clone(), entry, attached: false });
        }
        let key = |&(eni, address): &(u32, IpAddr)| OwnKey { eni, address: address.into() };
        let failed = |error| DatapathError::Write { map: "SECONDARIES", error };
        for own in secondaries.difference(&self.secondaries) {
            self.maps.secondaries.insert(key(own), 1, 0).map_err(failed)?;
        }
        for (ifindex, interface) in &enforced {
            if self.snapshot.interfaces.get(ifindex).is_none_or(|old| old.entry != interface.entry) {
                let failed = |error| DatapathError::Write { map: "INTERFACES", error };
                self.maps.interfaces.insert(ifindex, interface.entry, 0).map_err(failed)?;
            }
        }
        for (ifindex, old) in &self.snapshot.interfaces {
            if enforced.get(ifindex).is_none_or(|new| new.entry.eni != old.entry.eni) {
                if !enforced.contains_key(ifindex) {
                    let failed = |error| DatapathError::Write { map: "INTERFACES", error };
                    absent_is_fine(self.maps.interfaces.remove(ifindex)).map_err(failed)?;
                }
                self.departed.push(old.entry.eni);
            }
        }
        for own in self.secondaries.difference(&secondaries) {
            absent_is_fine(self.maps.secondaries.remove(&key(own))).map_err(failed)?;
        }
        if self.secondaries != secondaries {
            self.secondaries = secondaries;
            self.announce()?;
        }
        Ok(enforced)
    }

    /// An interface's entry. Its number stays the same as long as link and MAC address do.
    fn entry(&mut self, ifindex: u32, interface: &Interface) -> Result<abi::Interface, ApplyError> {
        let slot = |key: &PolicyKey| self.bound.get(key).map_or(0, |bound| bound.slot);
        let groups = slot(&interface.policy);
        let acl = interface.acl.as_ref().map_or(0, slot);
        let known = self.snapshot.interfaces.get(&ifindex).map(|known| known.entry);
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
                let epoch = (self.maps.bindings.load(groups) >> 32) as u32;
                (eni, epoch)
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

    fn is_adopted(&self, ifindex: u32) -> bool {
        self.datapath.pins().is_some_and(|pins| pins.has_link(ifindex))
    }

    /// Interfaces that are to be enforced and have no program of ours yet.
    fn unhooked<'a>(&'a self, desired: &'a Desired) -> impl Iterator<Item = (u32, String)> + 'a {
        desired
            .interfaces
            .iter()
            .filter(|(ifindex, _)| !self.hooks.contains_key(ifindex))
            .map(|(&ifindex, interface)| (ifindex, interface.link.clone()))
    }

    fn hook(&mut self, links: &[(u32, String)], warnings: &mut BTreeSet<Warning>) {
        for (ifindex, name) in links {
            match self.datapath.attach(*ifindex, name) {
                Ok(hook) => {
                    self.hooks.insert(*ifindex, hook);
                }
                Err(error) => {
                    let problem = format!("is NOT enforced: {error}");
                    warnings.insert(Warning { subject: name.clone(), problem });
                }
            }
        }
    }

    /// Takes programs off links that are no instance's any more.
    fn unhook(&mut self, desired: &Desired, warnings: &mut BTreeSet<Warning>) {
        let gone: Vec<u32> =
            self.hooks.keys().filter(|ifindex| !desired.interfaces.contains_key(ifindex)).copied().collect();
        for ifindex in gone {
            if let Some(hook) = self.hooks.remove(&ifindex)
                && let Err(error) = hook.detach()
            {
                warnings.insert(cannot_detach(ifindex, &error));
            }
        }
    }

    /// The same for what an earlier agent left.
    fn unhook_earlier(&self, desired: &Desired, warnings: &mut BTreeSet<Warning>) {
        let Some(pins) = self.datapath.pins() else { return };
        let left = pins.attached().unwrap_or_default();
        for ifindex in left.into_iter().filter(|ifindex| !desired.interfaces.contains_key(ifindex)) {
            if let Err(error) = pins.remove_link(ifindex) {
                warnings.insert(cannot_detach(ifindex, &error));
            }
        }
    }
}

fn cannot_detach(ifindex: u32, error: &std::io::Error) -> Warning {
    Warning { subject: format!("link {ifindex}"), problem: format!("cannot take the programs off: {error}") }
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn members(desired: &Desired) -> Result<BTreeMap<(u32, IpAddr), abi::Member>, ApplyError> {
    let mut members = BTreeMap::new();
    for (&(vpc, address), membership) in &desired.members {
        let member = tables::member(membership).map_err(|groups| ApplyError::Member { address, groups })?;
        members.insert((vpc, address), member);
    }
    Ok(members)
}

/// Those memberships of which the old state and the new one agree.
fn common(
    old: &BTreeMap<(u32, IpAddr), abi::Member>,
    new: &BTreeMap<(u32, IpAddr), abi::Member>,
) -> BTreeMap<(u32, IpAddr), abi::Member> {
    let both = |old: &abi::Member, new: &abi::Member| {
        let mut member =
            abi::Member { subnet: if old.subnet == new.subnet { old.subnet } else { 0 }, ..Default::default() };
        let of = |member: &abi::Member| member.groups.into_iter().take(member.count as usize).collect::<BTreeSet<_>>();
        for group in of(old).intersection(&of(new)) {
            member.groups[member.count as usize] = *group;
            member.count += 1;
        }
        member
    };
    old.iter().filter_map(|(place, old)| Some((*place, both(old, new.get(place)?)))).collect()
}

/// Whether an address is in fewer groups than before.
fn loses_members(old: &BTreeMap<(u32, IpAddr), abi::Member>, new: &BTreeMap<(u32, IpAddr), abi::Member>) -> bool {
    let groups = |member: &abi::Member| member.groups.into_iter().take(member.count as usize).collect::<BTreeSet<_>>();
    old.iter().any(|(place, old)| new.get(place).is_none_or(|new| new != old && !groups(old).is_subset(&groups(new))))
}

fn check_counts(desired: &Desired, members: &BTreeMap<(u32, IpAddr), abi::Member>) -> Result<(), ApplyError> {
    let secondaries: usize = desired.interfaces.values().map(|interface| interface.addresses.len()).sum();
    let counts: HashMap<&'static str, (usize, u32)> = HashMap::from([
        ("interfaces", (desired.interfaces.len(), abi::MAX_INTERFACES)),
        ("members' addresses", (members.len(), abi::MAX_MEMBERS)),
        ("own addresses", (secondaries, abi::MAX_SECONDARIES)),
        ("exempt services", (desired.exempt.len(), abi::MAX_EXEMPT)),
        ("group sets and network ACLs", (desired.policies.len(), abi::MAX_BINDINGS - 1)),
    ]);
    for (what, (needed, capacity)) in counts {
        if needed > capacity as usize {
            return Err(ApplyError::Capacity { what, needed: needed as u32, capacity });
        }
    }
    Ok(())
}

/// Returns when every program that was running has ended: programs run under RCU, and this system call waits for all
/// readers (`membarrier(2)`, `MEMBARRIER_CMD_GLOBAL`: "synchronize_rcu" in `kernel/sched/membarrier.c`).
fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: nix::libc::c_int = 1;
    // SAFETY: the call takes integers only.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Not with every kernel; a program runs for microseconds.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
