//! R5: brings the kernel to the desired state. The only writer of rule maps.
//!
//! Everything that may fail for want of room is tried before anything changes: new policies are compiled, counted and
//! written beside the old ones, and only then do the words flip that put them in force. A change that doesn't fit is
//! refused whole, and what stood before goes on standing.

mod interfaces;
mod links;
mod members;
mod policies;
mod published;
mod space;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use sg_common::abi::{self, Binding, Config, ExemptKey};

use members::{Members, Referenced};
pub use policies::Usage;
use policies::{Store, Written};
use published::Published;
pub use published::{Judged, Sockets};
use space::Numbers;
pub use verify::Repair;

use crate::compile::{CompileError, compile};
use crate::datapath::{Datapath, DatapathError, Hook, Maps, absent_is_fine};
use crate::exempt::Service;
use crate::model::{InstanceId, Warning};
use crate::resolve::{Desired, Interface, PolicyKey, Spec};
use crate::tables::InMemory;

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

/// A policy in force.
#[derive(Debug)]
struct Bound {
    slot: u32,
    spec: Arc<Spec>,
    written: Written,
}

/// Policies that are written and not in force yet.
type Staged = Vec<(PolicyKey, Arc<Spec>, Written)>;

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
    /// What the rule maps hold, followed write by write: after an error in the middle of a change, too, the next one
    /// starts from what is there.
    tables: InMemory,
    /// What `INTERFACES` holds, the same way.
    entries: BTreeMap<u32, abi::Interface>,
    /// What `SECONDARIES` holds.
    secondaries: BTreeSet<(u32, IpAddr)>,
    retired: Vec<Written>,
    published: Published,
    /// What the maps are held against; none since they last changed.
    audit: Option<verify::Audit>,
    epoch: u32,
    snapshot: Arc<Snapshot>,
    /// What was last brought about; none while a change is under way, or after one that failed.
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
            tables: InMemory::default(),
            entries: BTreeMap::new(),
            secondaries: BTreeSet::new(),
            retired: Vec::new(),
            published: Published::default(),
            audit: None,
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
        // New links first, also where the change is going to be refused: until their entry is written, the programs on
        // them drop everything.
        let mut warnings = desired.warnings.clone();
        let (fresh, adopted): (Vec<_>, Vec<_>) =
            self.unhooked(desired).partition(|&(ifindex, _)| !self.is_adopted(ifindex));
        self.hook(&fresh, &mut warnings);
        let members = members::of(desired)?;
        check_counts(desired, &members)?;
        let staged = self.stage(desired)?;
        let prior = self.last.take();
        if let Err(error) = self.replace(desired, &members, staged) {
            if let Some(prior) = prior {
                self.unwind(prior);
            }
            return Err(error);
        }

        // Links that an earlier agent enforces change over when everything is in place.
        self.hook(&adopted, &mut warnings);
        self.unhook(desired, &mut warnings);
        if complete && !self.started {
            self.unhook_earlier(desired, &mut warnings);
            self.depart_earlier();
            if let Err(error) = self.datapath.keep_numbers(&self.maps) {
                let problem = format!("the next agent will not know the flows of this one: {error}");
                warnings.insert(Warning { subject: "bpffs".to_owned(), problem });
            }
            self.started = true;
        }
        self.last = Some(desired.clone());
        self.snapshot = Arc::new(Snapshot {
            generation: self.snapshot.generation + 1,
            interfaces: self.enforced(desired),
            policies: desired.policies.clone(),
            tables: InMemory { config: self.config, ..self.tables.clone() },
            warnings,
            usage: self.store.usage(),
        });
        Ok(self.snapshot())
    }

    /// Puts staged policies in force, with all that belongs to them.
    fn replace(&mut self, desired: &Desired, members: &Members, staged: Staged) -> Result<(), ApplyError> {
        self.audit = None;
        // Who leaves a group is out before rules change, who joins is in after: in between, nobody is allowed what
        // neither the old state nor the new one allows.
        let referenced = (self.referenced(), self.referenced_by(desired, &staged));
        if let Err(error) = self.withdraw(desired, members, (&referenced.0, &referenced.1)) {
            self.unstage(&staged);
            return Err(error);
        }
        self.bind(staged);
        self.write_members(members)?;
        self.write_interfaces(desired)?;
        self.unbind(desired);
        Ok(())
    }

    /// Brings back what stood before a change that failed in its middle. Links that it brought stay closed.
    fn unwind(&mut self, prior: Desired) {
        let members = members::of(&prior);
        let replaced = members.and_then(|members| {
            let staged = self.stage(&prior)?;
            self.replace(&prior, &members, staged)
        });
        if let Err(error) = replaced {
            tracing::error!(%error, "what stood before a change that failed can't be brought back whole; trying again");
            return;
        }
        self.snapshot = Arc::new(Snapshot {
            generation: self.snapshot.generation + 1,
            interfaces: self.enforced(&prior),
            tables: InMemory { config: self.config, ..self.tables.clone() },
            usage: self.store.usage(),
            ..Snapshot::clone(&self.snapshot)
        });
        self.last = Some(prior);
    }

    /// Takes away the memberships and services that the new state doesn't have.
    fn withdraw(
        &mut self,
        desired: &Desired,
        members: &Members,
        referenced: (&Referenced, &Referenced),
    ) -> Result<(), ApplyError> {
        if members::are_lost(&self.tables.members, members) {
            self.end_births()?;
        }
        let staying = members::between(&self.tables.members, members, referenced);
        self.write_members(&staying)?;
        self.write_exempt(desired)
    }

    /// The groups that the policies in force refer to.
    fn referenced(&self) -> Referenced {
        self.tables.policies.values().flat_map(|policy| policy.referenced()).collect()
    }

    /// Those that the policies will refer to.
    fn referenced_by(&self, desired: &Desired, staged: &Staged) -> Referenced {
        let staying = self.bound.iter().filter(|(key, bound)| desired.policies.get(key) == Some(&bound.spec));
        let staying = staying.map(|(_, bound)| &bound.written);
        let written = staying.chain(staged.iter().map(|(.., written)| written));
        written.flat_map(|written| written.compiled.referenced()).collect()
    }

    /// The desired interfaces as they are enforced now.
    fn enforced(&self, desired: &Desired) -> BTreeMap<u32, Enforced> {
        let enforced = desired.interfaces.iter().filter_map(|(ifindex, interface)| {
            let (interface, entry) = (interface.clone(), *self.entries.get(ifindex)?);
            Some((*ifindex, Enforced { interface, entry, attached: self.hooks.contains_key(ifindex) }))
        });
        enforced.collect()
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
    fn stage(&mut self, desired: &Desired) -> Result<Staged, ApplyError> {
        let changed: Vec<(&PolicyKey, &Arc<Spec>)> = desired
            .policies
            .iter()
            .filter(|(key, spec)| self.bound.get(key).is_none_or(|bound| bound.spec != **spec))
            .collect();
        let missing = changed.iter().filter(|(key, _)| !self.bound.contains_key(key)).count();
        check("group sets and network ACLs, those being replaced included", self.bound.len() + missing, MOST_BOUND)?;
        let mut compiled = Vec::new();
        for (key, spec) in changed {
            let policy = compile(spec).map_err(|error| ApplyError::Compile { policy: key.to_string(), error })?;
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
    fn bind(&mut self, staged: Staged) {
        for (key, spec, written) in staged {
            self.epoch = self.epoch.wrapping_add(1);
            let binding = Binding { policy: written.number, epoch: self.epoch };
            let slot = match self.bound.get(&key) {
                Some(bound) => bound.slot,
                None => self.slots.take().expect("as many slots as `stage` counted"),
            };
            self.maps.bindings.store(slot, u64::from(binding.policy) | u64::from(binding.epoch) << 32);
            self.tables.bindings.insert(slot, binding);
            self.tables.policies.insert(written.number, Arc::clone(&written.compiled));
            if let Some(old) = self.bound.insert(key, Bound { slot, spec, written }) {
                self.tables.policies.remove(&old.written.number);
                self.retired.push(old.written);
            }
        }
    }

    /// Retires policies that no interface has any more.
    fn unbind(&mut self, desired: &Desired) {
        let gone: Vec<PolicyKey> =
            self.bound.keys().filter(|key| !desired.policies.contains_key(key)).cloned().collect();
        for key in gone {
            let Some(bound) = self.bound.remove(&key) else { continue };
            self.maps.bindings.store(bound.slot, 0);
            self.tables.bindings.remove(&bound.slot);
            self.tables.policies.remove(&bound.written.number);
            self.slots.give(bound.slot);
            self.retired.push(bound.written);
        }
    }

    fn write_members(&mut self, members: &Members) -> Result<(), ApplyError> {
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
            absent_is_fine(self.maps.members.remove(&members::key(&place))).map_err(failed)?;
            self.tables.members.remove(&place);
        }
        for (place, member) in members {
            if self.tables.members.get(place) != Some(member) {
                self.maps.writes += 1;
                self.maps.members.insert(members::key(place), member, 0).map_err(failed)?;
                self.tables.members.insert(*place, *member);
            }
        }
        Ok(())
    }

    /// Tells programs that flows judged by members or own addresses are to be looked at again.
    fn announce(&mut self) -> Result<(), ApplyError> {
        self.set_config(|config| config.world = config.world.wrapping_add(1))
    }

    fn write_exempt(&mut self, desired: &Desired) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "EXEMPT", error };
        let gone: Vec<_> = self.tables.exempt.difference(&desired.exempt).cloned().collect();
        for place in gone {
            self.maps.writes += 1;
            absent_is_fine(self.maps.exempt.remove(&exempt_key(&place))).map_err(failed)?;
            self.tables.exempt.remove(&place);
        }
        let new: Vec<_> = desired.exempt.difference(&self.tables.exempt).cloned().collect();
        for place in new {
            self.maps.writes += 1;
            self.maps.exempt.insert(exempt_key(&place), 1, 0).map_err(failed)?;
            self.tables.exempt.insert(place);
        }
        Ok(())
    }
}

fn exempt_key((vpc, service): &(u32, Service)) -> ExemptKey {
    ExemptKey { vpc: *vpc, address: service.address.into(), port: service.port, protocol: service.protocol, pad: 0 }
}

/// Slots for policies in force: slot 0 is nobody's.
const MOST_BOUND: u32 = abi::MAX_BINDINGS - 1;

fn check_counts(desired: &Desired, members: &Members) -> Result<(), ApplyError> {
    let addresses =
        desired.interfaces.values().map(|interface| interface.addresses.len() + interface.prefixes.len()).sum();
    check("interfaces", desired.interfaces.len(), abi::MAX_INTERFACES)?;
    check("members' addresses", members.len(), abi::MAX_MEMBERS)?;
    check("own addresses", addresses, abi::MAX_SECONDARIES)?;
    check("exempt services", desired.exempt.len(), abi::MAX_EXEMPT)?;
    check("group sets and network ACLs", desired.policies.len(), MOST_BOUND)
}

fn check(what: &'static str, needed: usize, capacity: u32) -> Result<(), ApplyError> {
    let needed = u32::try_from(needed).unwrap_or(u32::MAX);
    if needed > capacity { Err(ApplyError::Capacity { what, needed, capacity }) } else { Ok(()) }
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
