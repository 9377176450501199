//! R5: brings the kernel to the desired state. The only writer of rule maps.
//!
//! Everything that may fail for want of room is tried before anything changes: new policies are compiled, counted and
//! written beside the old ones, and only then do the words flip that put them in force. A change that doesn't fit is
//! refused whole, and what stood before goes on standing.
//!
//! What a change costs is what it changes: [`change::Change`] says which parts of the desired state may be other than the
//! last one's, and all that follows looks at those alone. After a failure that is everything, compared with what was
//! written, entry by entry.

mod bindings;
mod change;
mod interfaces;
mod links;
mod members;
mod policies;
mod published;
mod services;
mod snapshot;
mod space;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use sg_common::abi::{self, Config, Member};

use bindings::{Bound, MOST_BOUND, References, Staged};
use change::Change;
use members::Wanted;
pub use policies::Usage;
use policies::{Store, Written};
use published::Published;
pub use published::{Judged, Sockets};
pub use snapshot::{Enforced, Snapshot};
use space::Numbers;
pub use verify::Repair;

use crate::compile::CompileError;
use crate::datapath::{Datapath, DatapathError, Hook, Maps};
use crate::model::Warning;
use crate::resolve::{Desired, Place, PolicyKey};
use crate::sharing::Table;
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

impl ApplyError {
    /// The same once more, where the same change would meet it again.
    fn again(&self) -> Option<Self> {
        match self {
            &Self::Capacity { what, needed, capacity } => Some(Self::Capacity { what, needed, capacity }),
            &Self::Compile { ref policy, error } => Some(Self::Compile { policy: policy.clone(), error }),
            &Self::Member { address, groups } => Some(Self::Member { address, groups }),
            Self::Datapath(_) => None,
        }
    }
}

/// Writes the rule maps.
#[derive(Debug)]
pub struct Applier {
    datapath: Datapath,
    maps: Maps,
    config: Config,
    store: Store,
    bound: BTreeMap<PolicyKey, Bound>,
    /// The references of the policies in force.
    referenced: References,
    slots: Numbers,
    enis: Numbers,
    /// Numbers of interfaces that are gone; their flows go before another gets them.
    departed: BTreeSet<u32>,
    hooks: BTreeMap<u32, Hook>,
    /// What the rule maps hold, followed write by write: after an error in the middle of a change, too, the next one
    /// starts from what is there.
    tables: InMemory,
    /// What `INTERFACES` holds, the same way.
    entries: BTreeMap<u32, abi::Interface>,
    /// Those of them with flows that may be picked up ([`abi::Interface::born`]).
    born: BTreeSet<u32>,
    /// Those that were written since the last snapshot.
    rewritten: BTreeSet<u32>,
    /// What `SECONDARIES` holds.
    secondaries: BTreeSet<(u32, IpAddr)>,
    retired: Vec<Written>,
    /// Slots of policies that nobody has any more.
    vacated: Vec<u32>,
    /// Whether programs may be running that began before the last change.
    unsettled: bool,
    published: Published,
    /// What the maps are held against; none since they last changed.
    audit: Option<verify::Audit>,
    epoch: u32,
    snapshot: Arc<Snapshot>,
    /// What was last brought about; none while a change is under way, or after one that failed.
    last: Option<Last>,
    /// What was refused since then, and why: clients who have rules read anew would have it compiled each time.
    refused: Option<(Desired, ApplyError)>,
    /// Links of a change that failed may have programs.
    strays: bool,
    started: bool,
}

/// A state that came about.
#[derive(Debug)]
struct Last {
    desired: Desired,
    /// Own addresses of all its interfaces.
    own: usize,
    /// Its interfaces without programs.
    unhooked: BTreeSet<u32>,
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
            referenced: References::default(),
            slots: Numbers::new(1..abi::MAX_BINDINGS),
            enis,
            departed: BTreeSet::new(),
            hooks: BTreeMap::new(),
            tables: InMemory::default(),
            entries: BTreeMap::new(),
            born: BTreeSet::new(),
            rewritten: BTreeSet::new(),
            secondaries: BTreeSet::new(),
            retired: Vec::new(),
            vacated: Vec::new(),
            unsettled: false,
            published: Published::default(),
            audit: None,
            epoch,
            snapshot: Arc::default(),
            last: None,
            refused: None,
            strays: false,
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
        let refused = self
            .refused
            .as_ref()
            .filter(|(refused, _)| self.last.is_some() && refused == desired && self.is_hooked(desired));
        if let Some(error) = refused.and_then(|(_, error)| error.again()) {
            return Err(error);
        }
        let applied = self.bring_about(desired, complete);
        let refusal = applied.as_ref().err().and_then(ApplyError::again).filter(|_| complete || self.started);
        self.refused = refusal.map(|error| (desired.clone(), error));
        applied
    }

    fn bring_about(&mut self, desired: &Desired, complete: bool) -> Result<Arc<Snapshot>, ApplyError> {
        if complete || self.started {
            return self.commit(desired, complete);
        }
        let mut fresh = desired.clone();
        for &ifindex in desired.interfaces.keys() {
            if self.is_adopted(ifindex) && !self.hooks.contains_key(&ifindex) {
                fresh.interfaces.remove(&ifindex);
            }
        }
        self.commit(&fresh, false)
    }

    /// Whether everything was brought about once: what an earlier agent left counts for nothing any more.
    pub(crate) fn is_started(&self) -> bool {
        self.started
    }

    /// Whether there is nothing to do.
    fn is_enforced(&self, desired: &Desired) -> bool {
        self.started
            && !self.strays
            && self.last.as_ref().is_some_and(|last| last.desired == *desired && last.unhooked.is_empty())
    }

    fn is_hooked(&self, desired: &Desired) -> bool {
        desired.interfaces.keys().all(|ifindex| self.hooks.contains_key(ifindex))
    }

    fn commit(&mut self, desired: &Desired, complete: bool) -> Result<Arc<Snapshot>, ApplyError> {
        let committed = self.try_commit(desired, complete);
        self.strays = committed.is_err();
        committed
    }

    fn try_commit(&mut self, desired: &Desired, complete: bool) -> Result<Arc<Snapshot>, ApplyError> {
        // New links first, also where the change is going to be refused: until their entry is written, the programs on
        // them drop everything.
        let mut warnings = desired.warnings.clone();
        let links = self.links(desired);
        let (fresh, adopted): (Vec<_>, Vec<_>) =
            self.unhooked(&links, desired).into_iter().partition(|&(ifindex, _)| !self.is_adopted(ifindex));
        self.hook(&fresh, &mut warnings);
        let change = self.change(desired)?;
        check_counts(&change)?;
        let staged = self.stage(&change)?;
        let prior = self.last.take();
        if let Err(error) = self.replace(&change, staged) {
            if let Some(prior) = prior {
                self.unwind(prior);
            }
            return Err(error);
        }

        // Links that an earlier agent enforces change over when everything is in place.
        self.hook(&adopted, &mut warnings);
        self.unhook(&links, desired, &mut warnings);
        if complete && !self.started {
            self.unhook_earlier(desired, &mut warnings);
            self.depart_earlier();
            if let Err(error) = self.datapath.keep_numbers(&self.maps) {
                let problem = format!("the next agent will not know the flows of this one: {error}");
                warnings.insert(Warning { subject: "bpffs".to_owned(), problem });
            }
            self.started = true;
        }
        self.snapshot = Arc::new(Snapshot {
            generation: self.snapshot.generation + 1,
            interfaces: self.enforced(&change, &links),
            policies: desired.policies.clone(),
            tables: InMemory { config: self.config, ..self.tables.clone() },
            warnings,
            usage: self.store.usage(),
        });
        let unhooked = self.unhooked(&links, desired).into_iter().map(|(ifindex, _)| ifindex).collect();
        self.last = Some(Last { desired: desired.clone(), own: change.own, unhooked });
        Ok(self.snapshot())
    }

    /// Puts staged policies in force, with all that belongs to them.
    fn replace(&mut self, change: &Change, staged: Staged) -> Result<(), ApplyError> {
        self.audit = None;
        self.unsettled = true;
        // Who leaves a group is out before rules change, who joins is in after, and after an address has left the
        // interface that had it: in between, nobody is allowed what neither the old state nor the new one allows.
        if let Err(error) = self.withdraw(change, &staged) {
            self.unstage(&staged);
            return Err(error);
        }
        self.bind(staged);
        self.write_interfaces(change)?;
        self.write_members(&change.members)?;
        self.unbind(change);
        Ok(())
    }

    /// Brings back what stood before a change that failed in its middle. Links that it brought stay closed.
    fn unwind(&mut self, prior: Last) {
        let replaced = self.change(&prior.desired).and_then(|change| {
            let staged = self.stage(&change)?;
            self.replace(&change, staged)?;
            Ok(self.enforced(&change, &BTreeSet::new()))
        });
        match replaced {
            Ok(interfaces) => {
                self.snapshot = Arc::new(Snapshot {
                    generation: self.snapshot.generation + 1,
                    interfaces,
                    tables: InMemory { config: self.config, ..self.tables.clone() },
                    usage: self.store.usage(),
                    ..Snapshot::clone(&self.snapshot)
                });
                self.last = Some(prior);
            }
            Err(error) => {
                tracing::error!(%error, "what stood before a change that failed can't be brought back whole; trying again");
            }
        }
    }

    /// Takes away the memberships and services that the new state doesn't have.
    fn withdraw(&mut self, change: &Change, staged: &Staged) -> Result<(), ApplyError> {
        let standing = &self.tables.members;
        let is_lost = |(place, new): &(Place, Option<Member>)| {
            standing.get(place).is_some_and(|old| members::is_lost(old, new.as_ref()))
        };
        let ends_births = change.members.iter().any(is_lost);
        let new = self.new_references(change, staged);
        let before = |group| self.referenced.of(group) > 0;
        let after = |group| self.referenced.of(group) + new.of(group) > 0;
        let stay = |(place, new): &(Place, Option<Member>)| {
            (*place, members::between(standing.get(place), new.as_ref(), before, after))
        };
        let staying: Wanted = change.members.iter().map(stay).collect();
        if ends_births {
            self.end_births()?;
        }
        self.write_members(&staying)?;
        self.write_exempt(change.desired)
    }

    /// The desired interfaces as they are enforced now.
    fn enforced(&mut self, change: &Change, links: &BTreeSet<u32>) -> Table<u32, Enforced> {
        let mut enforced = self.snapshot.interfaces.clone();
        let known: Vec<u32> = if change.is_whole { enforced.keys().copied().collect() } else { Vec::new() };
        let rewritten = std::mem::take(&mut self.rewritten);
        for ifindex in known.iter().chain(&rewritten).chain(&change.interfaces).chain(links) {
            let interface = change.desired.interfaces.shared(ifindex);
            match interface.zip(self.entries.get(ifindex)) {
                Some((interface, &entry)) => {
                    let (interface, attached) = (Arc::clone(interface), self.hooks.contains_key(ifindex));
                    enforced.insert(*ifindex, Enforced { interface, entry, attached });
                }
                None => drop(enforced.remove(ifindex)),
            }
        }
        enforced
    }

    /// Removes what no program can be reading any more: old policies, and the flows of interfaces that are gone.
    /// Takes some milliseconds, which no caller of `apply` waits for.
    pub fn collect(&mut self) {
        self.store.tidy(&mut self.maps);
        if !self.retired.is_empty() || !self.departed.is_empty() || !self.vacated.is_empty() || self.unsettled {
            self.collect_after_programs();
        }
        if self.snapshot.usage != self.store.usage() {
            Arc::make_mut(&mut self.snapshot).usage = self.store.usage();
        }
    }

    fn collect_after_programs(&mut self) {
        wait_for_programs();
        self.settle();
        for written in std::mem::take(&mut self.retired) {
            self.store.unwrite(&mut self.maps, &written);
        }
        for slot in std::mem::take(&mut self.vacated) {
            self.slots.give(slot);
        }
        self.forget_departed();
    }

    /// Announces the last change once more. Who may race: packets that began before the change, on either CPU, and those of
    /// the same flow after it. Worst: the former's notes (that the network ACL was asked) are taken for the latter's, and
    /// the flow misses the change. After this nobody is left who could be mistaken: all judge by the same.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.unsettled) {
            return;
        }
        self.rebind_acls();
        if let Err(error) = self.announce() {
            tracing::warn!(%error, "flows cannot be told to be looked at again; trying again");
            self.unsettled = true;
        }
    }

    /// Removes the flows of interfaces that are gone, and then their counts: a packet of another's that sweeps may have
    /// taken one of those flows out and be about to count it, for which the number's next owner would have a place too
    /// many for ever.
    fn forget_departed(&mut self) {
        if self.departed.is_empty() {
            return;
        }
        // What had no number left may have one now.
        self.refused = None;
        let forgotten = self.maps.forget_flows(&self.departed).and_then(|()| {
            wait_for_programs();
            self.maps.forget_counts(&self.departed)
        });
        match forgotten {
            Ok(()) => std::mem::take(&mut self.departed).into_iter().for_each(|eni| self.enis.give(eni)),
            Err(error) => tracing::warn!(%error, "cannot remove the flows of departed interfaces; trying again"),
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

    /// Tells programs that flows judged by members or own addresses are to be looked at again.
    fn announce(&mut self) -> Result<(), ApplyError> {
        self.set_config(|config| config.world = config.world.wrapping_add(1))
    }
}

fn check_counts(change: &Change) -> Result<(), ApplyError> {
    let desired = change.desired;
    check("interfaces", desired.interfaces.len(), abi::MAX_INTERFACES)?;
    check("members' addresses", desired.members.len(), abi::MAX_MEMBERS)?;
    check("own addresses", change.own, abi::MAX_SECONDARIES)?;
    check("exempt services", desired.exempt.len(), abi::MAX_EXEMPT)?;
    check("group sets and network ACLs", desired.policies.len(), MOST_BOUND)
}

fn check(what: &'static str, needed: usize, capacity: u32) -> Result<(), ApplyError> {
    let needed = u32::try_from(needed).unwrap_or(u32::MAX);
    if needed > capacity { Err(ApplyError::Capacity { what, needed, capacity }) } else { Ok(()) }
}

/// Returns when every program that was running has ended: programs run under RCU, and this system call waits for all
/// readers (`membarrier(2)`, `MEMBARRIER_CMD_GLOBAL`: "synchronize_rcu" in `kernel/sched/membarrier.c`).
///
/// Who may race: a program that still knows a number, slot or cell that is about to be given to another. After this there is
/// none; where the kernel has no such call, worst of all one packet is judged by another's policy, if its program takes
/// longer than the pause. It heals with the next packet.
fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: nix::libc::c_int = 1;
    // SAFETY: the call takes integers only.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Not with every kernel; a program runs for microseconds.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
