//! The whole pipeline in memory: the applier's own copy of the tables, flows and fragments in ordinary maps, and the
//! decisions that the kernel runs. Held against the kernel packet by packet, it shows what maps, programs or the
//! compiler for BPF get wrong.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, HashMap, HashSet};

use nix::time::{ClockId, clock_gettime};
use sg_agent::tables::InMemory;
use sg_common::abi::{
    Binding, Config, Direction, Flow, FlowKey, Fragment, FragmentKey, FragmentSlot, Interface, Line, MAX_FLOWS, Member,
    Policy,
};
use sg_common::addr::Address;
use sg_common::judge::{Full, Memory, judge};
use sg_common::packet::Packet;
use sg_common::policy::Tables;
use sg_common::verdict::{Drop, Verdict};

/// Everything that the kernel's maps hold.
#[derive(Debug)]
pub struct Reference {
    /// Settings, the injected time among them.
    pub config: Config,
    /// Rule maps.
    pub tables: InMemory,
    /// Interfaces by link.
    pub interfaces: BTreeMap<u32, Interface>,
    /// Own addresses beyond the primary ones, and delegated prefixes, as `SECONDARIES` has them.
    pub secondaries: HashSet<(u32, Address)>,
    /// Tracked flows.
    pub flows: RefCell<HashMap<FlowKey, Flow>>,
    /// Flows at most.
    pub capacity: Cell<usize>,
    fragments: RefCell<HashMap<FragmentSlot, Fragment>>,
}

impl Reference {
    /// Nothing but settings.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            tables: InMemory::default(),
            interfaces: BTreeMap::new(),
            secondaries: HashSet::new(),
            flows: RefCell::default(),
            capacity: Cell::new(MAX_FLOWS as usize),
            fragments: RefCell::default(),
        }
    }

    /// What becomes of a frame that crosses a link.
    pub fn run(&self, ifindex: u32, direction: Direction, frame: &[u8], mark: u32) -> Verdict {
        match self.interfaces.get(&ifindex) {
            Some(interface) => judge(self, interface, direction, &frame, mark),
            None => Err(Drop::UnknownInterface),
        }
    }

    /// Forgets what interfaces that are gone left behind.
    pub fn forget(&self) {
        let enis: HashSet<u32> = self.interfaces.values().map(|interface| interface.eni).collect();
        self.flows.borrow_mut().retain(|key, _| enis.contains(&key.eni.into()));
        self.fragments.borrow_mut().retain(|slot, _| enis.contains(&slot.eni));
    }
}

impl Tables for Reference {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn binding(&self, index: u32) -> Binding {
        self.tables.binding(index)
    }
    fn policy(&self, table: u32) -> Option<Policy> {
        // The kernel's is an array: a policy that isn't there reads as zeros.
        Some(self.tables.policy(table).unwrap_or_default())
    }
    fn line(&self, table: u32, line: u32) -> Option<&Line> {
        self.tables.line(table, line)
    }
    fn reference(&self, table: u32, group: u32) -> u32 {
        self.tables.reference(table, group)
    }
    fn membership(&self, vpc: u32, address: &Address) -> Option<&Member> {
        self.tables.membership(vpc, address)
    }
    fn has_own(&self, eni: u32, address: &Address) -> bool {
        self.secondaries.contains(&(eni, *address))
    }
    fn is_exempt(&self, vpc: u32, address: &Address, protocol: u8, port: u16) -> bool {
        self.tables.is_exempt(vpc, address, protocol, port)
    }
}

impl Memory for Reference {
    fn now(&self) -> u64 {
        clock() + self.config.clock_advance
    }

    fn hold<'a>(&'a self, packet: &'a Packet) -> Option<&'a Packet> {
        Some(packet)
    }

    type Entry<'a> = RefMut<'a, Flow>;

    fn flow(&self, key: &FlowKey) -> Option<RefMut<'_, Flow>> {
        RefMut::filter_map(self.flows.borrow_mut(), |flows| flows.get_mut(key)).ok()
    }

    fn add_flow(&self, key: &FlowKey, flow: &Flow) -> Result<Option<RefMut<'_, Flow>>, Full> {
        if let Some(old) = self.flow(key) {
            return Ok(Some(old));
        }
        let mut flows = self.flows.borrow_mut();
        let is_full = |flows: &HashMap<FlowKey, Flow>| {
            let its = flows.keys().filter(|flow| flow.eni == key.eni).count();
            flows.len() >= self.capacity.get() || its >= self.config.allowance as usize
        };
        if is_full(&flows) {
            flows.retain(|_, flow| !flow.is_expired(&self.config, self.now()));
            if is_full(&flows) {
                return Err(Full);
            }
        }
        flows.insert(*key, *flow);
        Ok(None)
    }

    fn remove_flow(&self, key: &FlowKey) {
        self.flows.borrow_mut().remove(key);
    }

    fn add_fragment(&self, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(fragment.key.slot(), *fragment);
    }

    fn remove_fragment(&self, key: &FragmentKey) {
        if self.fragment(key).is_some() {
            self.fragments.borrow_mut().remove(&key.slot());
        }
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(&key.slot()).copied().filter(|fragment| fragment.key == *key)
    }
}

/// The clock of `bpf_ktime_get_coarse_ns`, in nanoseconds.
pub(crate) fn clock() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("a clock that Linux always has");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
