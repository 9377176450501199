//! The maps, as the programs see them. `sg_common::abi` has their types and sizes; only the agent writes rules.

use core::arch::asm;
use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::{bpf_for_each_map_elem, bpf_ktime_get_coarse_ns, bpf_map_delete_elem};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, PerCpuHashMap};
use sg_common::abi::*;
use sg_common::addr::Address;
use sg_common::early::Ports;
use sg_common::judge::{Full, Memory};
use sg_common::packet::Packet;
use sg_common::policy::{Match, Query, Tables, find, is_secondary};
use sg_common::reset::LENGTH6;

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(MAX_INTERFACES, 0);
/// Counts what the agent wrote to `INTERFACES`.
#[map]
static EDITION: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static RECENT: PerCpuArray<Recent> = PerCpuArray::with_max_entries(RECENT_LINKS, 0);
#[map]
static BINDINGS: Array<Binding> = Array::with_max_entries(MAX_BINDINGS, BPF_F_MMAPABLE);
#[map]
static POLICIES: Array<Policy> = Array::with_max_entries(2 * MAX_POLICIES, 0);
#[map]
static RULES: Array<Line> = Array::with_max_entries(RULE_LINES, BPF_F_MMAPABLE);
#[map]
static REFERENCES: HashMap<ReferenceKey, u32> = HashMap::with_max_entries(MAX_REFERENCES, BPF_F_NO_PREALLOC);
#[map]
static MEMBERS: HashMap<MemberKey, Member> = HashMap::with_max_entries(MAX_MEMBERS, BPF_F_NO_PREALLOC);
#[map]
static SECONDARIES: HashMap<OwnKey, u32> = HashMap::with_max_entries(MAX_SECONDARIES, BPF_F_NO_PREALLOC);
#[map]
static EXEMPT: HashMap<ExemptKey, u32> = HashMap::with_max_entries(MAX_EXEMPT, BPF_F_NO_PREALLOC);
#[map]
static PUBLISHED: HashMap<PublishedKey, PublishedPort> = HashMap::with_max_entries(MAX_PUBLISHED, BPF_F_NO_PREALLOC);
/// Packets to published ports that were denied before the proxy heard of them, by the port's number.
#[map]
pub static DENIED: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_PUBLISHED_PORTS, 0);
/// Lines of the drop log that there was no room for.
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(MAX_FLOWS, 0);
#[map]
static FRAGMENTS: HashMap<FragmentSlot, Fragment> = HashMap::with_max_entries(MAX_FRAGMENTS, BPF_F_NO_PREALLOC);
/// How many entries of `FLOWS` each interface has, expired ones included, by its number. Whoever adds an entry or
/// removes one counts it, and an entry is added and removed only once, so it never drifts; where a number's next owner is
/// to begin at 0, the agent waits until nobody is about to count (`Applier::forget_departed`).
///
/// Who may race: two CPUs that both find the last place free. Worst: both take it, so an interface has as many flows too
/// many as there are CPUs. It heals as flows end: none is added before there is room.
#[map]
static TRACKED: Array<i64> = Array::with_max_entries(MAX_INTERFACES, 0);
/// The packet being judged on this CPU. Here and below: programs run with bottom halves off, so none interrupts another on
/// its CPU; the agent doesn't load them into a kernel where that isn't so (`is_preemptible` in its `datapath`).
#[map]
static PACKET: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);
/// The answer that is being written on this CPU.
#[map]
static ANSWER: PerCpuArray<[u8; LENGTH6]> = PerCpuArray::with_max_entries(1, 0);
/// What was last read of a socket buffer on this CPU.
#[map]
static SKB_FIELDS: PerCpuArray<[u8; SKB_WINDOW]> = PerCpuArray::with_max_entries(1, 0);
/// The verdicts that most packets meet, by `2 * eni + direction`.
#[map]
pub static USUAL: PerCpuArray<[Count; USUAL_KINDS]> = PerCpuArray::with_max_entries(2 * MAX_INTERFACES, 0);
/// All other verdicts.
#[map]
pub static REASONS: PerCpuHashMap<ReasonKey, Count> = PerCpuHashMap::with_max_entries(MAX_COUNTERS, BPF_F_NO_PREALLOC);

/// When a packet last swept the flows, by its clock.
#[map]
static SWEPT: Array<u64> = Array::with_max_entries(1, 0);

/// The least time between two sweeps by packets, in nanoseconds: one takes milliseconds.
const SWEEP_INTERVAL: u64 = 1_000_000_000;

/// Removes expired flows, if no packet has done so within the last second. Two CPUs may both find it due: the second
/// then walks a table that the first has tidied.
#[inline(never)]
fn sweep_if_due(now: u64) {
    let Some(swept) = SWEPT.get_ptr_mut(0) else { return };
    // SAFETY: an aligned word of an array that is never freed while the program runs, read and written whole.
    unsafe {
        if now.wrapping_sub(swept.read_volatile()) < SWEEP_INTERVAL {
            return;
        }
        swept.write_volatile(now);
    }
    sweep(now);
}

/// What a sweep goes by, and finds.
struct Sweep {
    now: u64,
    live: u32,
}

/// Removes every flow that is expired at `now`. Returns how many live.
#[inline(always)]
pub fn sweep(now: u64) -> u32 {
    let mut sweep = Sweep { now, live: 0 };
    // SAFETY: the map is a hash of these types, and `visit` takes what the helper hands it.
    unsafe {
        bpf_for_each_map_elem(
            core::ptr::from_ref(&FLOWS).cast_mut().cast(),
            visit as *mut c_void,
            core::ptr::from_mut(&mut sweep).cast(),
            0,
        );
    }
    sweep.live
}

/// One flow of a sweep. Who may race: a packet of the flow on another CPU, which takes the entry over because it is expired,
/// or refreshes it at its last moment. Worst: a flow is removed that has just begun again. It heals with its next packet,
/// which the rules judge, or with the next one of the side that may begin it.
unsafe extern "C" fn visit(map: *mut c_void, key: *mut c_void, flow: *mut c_void, sweep: *mut c_void) -> i64 {
    // SAFETY: the helper passes the entry's key and value, and the pointer that `sweep` gave it. The key is read before
    // the entry is deleted: from then on another CPU may fill its place with another interface's flow.
    let (eni, flow, sweep) = unsafe {
        ((&raw const (*key.cast::<FlowKey>()).eni).read_volatile(), &*flow.cast::<Flow>(), &mut *sweep.cast::<Sweep>())
    };
    if CONFIG.get(0).is_some_and(|config| flow.is_expired(config, sweep.now)) {
        // SAFETY: deleting the entry that is being visited is allowed (kernel: `bpf_for_each_hash_elem`).
        let result = unsafe { bpf_map_delete_elem(map, key) };
        if result == 0 {
            count_tracked(eni.into(), -1);
        }
    } else {
        sweep.live += 1;
    }
    0
}

/// Takes note of an entry more or less of an interface's flows.
#[inline(always)]
fn count_tracked(eni: u32, more: i64) {
    if let Some(tracked) = TRACKED.get_ptr_mut(eni) {
        // SAFETY: an aligned word of an array that is never freed while the program runs. The target has no
        // compare-and-swap for Rust's atomics, but this instruction.
        unsafe { asm!("lock *(u64 *)({word} + 0) += {more}", word = in(reg) tracked, more = in(reg) more) };
    }
}

/// Whether an interface may have one more flow.
#[inline(always)]
fn has_allowance(eni: u32) -> bool {
    // SAFETY: as in `count_tracked`.
    let tracked = TRACKED.get_ptr(eni).map(|tracked| unsafe { tracked.read_volatile() });
    match (tracked, CONFIG.get(0)) {
        (Some(tracked), Some(config)) => tracked < i64::from(config.allowance),
        _ => false,
    }
}

/// Adds a flow's entry and counts it, if there is room. One that is there already stands, and was counted then.
#[inline(always)]
fn track(key: &FlowKey, flow: &Flow) -> bool {
    let is_added = has_allowance(key.eni.into()) && FLOWS.insert(key, flow, BPF_NOEXIST as u64).is_ok();
    if is_added {
        count_tracked(key.eni.into(), 1);
    }
    is_added
}

/// The interface whose host-side link has this index: as this CPU found it last, if the agent has written no entry since.
/// The agent counts an edition up after each write and before it relies on it, so a copy is never used for longer than
/// an entry that was looked up then would have been.
#[inline(always)]
pub fn interface(ifindex: u32) -> Option<&'static Interface> {
    if ifindex == 0 {
        return None;
    }
    let edition = EDITION.get_ptr_mut(0)?;
    let recent = RECENT.get_ptr_mut(ifindex % RECENT_LINKS)?;
    // SAFETY: an aligned word of an array that is never freed while the program runs, which the agent stores whole; and
    // this CPU's own entry of another one, which programs on one CPU don't interrupt each other at.
    unsafe {
        let is_current = (*recent).link == ifindex && (*recent).edition == edition.read_volatile();
        if is_current || look_up(ifindex, edition, recent) { Some(&(*recent).interface) } else { None }
    }
}

/// Keeps an interface's entry on this CPU, if there is one.
///
/// Who may race: the agent, which replaces an entry while it is copied. The kernel has the next entry that is written take
/// its place at once, so worst of all the copy is another interface's: it counts if the entry is this link's still, else that
/// packet is dropped as `unknown_interface`. Parts of two entries of
/// one interface may be mixed; the agent counts an edition after each write, so the next packet finds the entry anew.
///
/// # Safety
/// The pointers are those of `interface`.
#[inline(never)]
unsafe fn look_up(ifindex: u32, edition: *mut u64, recent: *mut Recent) -> bool {
    // Nothing is read before it: on weakly ordered processors this instruction is a barrier.
    let mut current = 0_u64;
    // SAFETY: the caller's. Adding nothing leaves the word as the agent stored it.
    unsafe {
        asm!("{current} = atomic_fetch_add((u64 *)({word} + 0), {current})", word = in(reg) edition, current = inout(reg) current);
    }
    // SAFETY: entries stay mapped for as long as the map is there, and every bit pattern is one.
    let Some(entry) = (unsafe { INTERFACES.get(ifindex) }) else { return false };
    // SAFETY: the caller's; and as above.
    unsafe {
        core::ptr::copy_nonoverlapping(entry, &raw mut (*recent).interface, 1);
        // An instruction that the compiler moves no access to memory over.
        asm!("{0} = {0}", inout(reg) current, options(nostack));
        (*recent).edition = current;
        let is_its_own = INTERFACES.get(ifindex).is_some_and(|now| core::ptr::eq(now, entry));
        // No link has the index 0.
        (*recent).link = if is_its_own { ifindex } else { 0 };
        is_its_own
    }
}

/// The packet that was judged last on this CPU, if it was one.
#[inline(always)]
pub fn judged() -> Option<&'static Packet> {
    PACKET.get(0)
}

/// A place for an answer.
#[inline(always)]
pub fn answer() -> Option<&'static mut [u8; LENGTH6]> {
    // SAFETY: this CPU's own entry; programs on one CPU don't interrupt each other, and each takes it once.
    ANSWER.get_ptr_mut(0).map(|place| unsafe { &mut *place })
}

/// A place for the fields of a socket buffer.
#[inline(always)]
pub fn skb_fields() -> Option<&'static mut [u8; SKB_WINDOW]> {
    // SAFETY: as above; nobody keeps it.
    SKB_FIELDS.get_ptr_mut(0).map(|place| unsafe { &mut *place })
}

/// The BPF maps behind the decisions.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn binding(&self, index: u32) -> Binding {
        match BINDINGS.get_ptr(index) {
            // SAFETY: an aligned 8-byte entry of an array that is never freed while the program runs. The agent
            // stores it whole through its mapping, so it is loaded whole.
            Some(binding) => unsafe {
                let word = core::ptr::read_volatile(binding.cast::<u64>());
                Binding { policy: word as u32, epoch: (word >> 32) as u32 }
            },
            None => Binding::default(),
        }
    }

    #[inline(always)]
    fn policy(&self, table: u32) -> Option<Policy> {
        POLICIES.get(table).copied()
    }

    #[inline(always)]
    fn line(&self, _table: u32, line: u32) -> Option<&Line> {
        RULES.get(line)
    }

    #[inline(always)]
    fn reference(&self, table: u32, group: u32) -> u32 {
        // SAFETY: as for `interface`.
        unsafe { REFERENCES.get(ReferenceKey { table, group }) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn membership(&self, vpc: u32, address: &Address) -> Option<&Member> {
        // SAFETY: as for `interface`.
        unsafe { MEMBERS.get(MemberKey { vpc, address: *address }) }
    }

    #[inline(always)]
    fn has_own(&self, eni: u32, address: &Address) -> bool {
        // SAFETY: as for `interface`.
        unsafe { SECONDARIES.get(OwnKey { eni, address: *address }) }.is_some()
    }

    #[inline(always)]
    fn is_secondary(&self, eni: u32, address: &Address) -> bool {
        find_own(eni, address) != 0
    }

    #[inline(always)]
    fn is_exempt(&self, vpc: u32, address: &Address, protocol: u8, port: u16) -> bool {
        // SAFETY: as for `interface`.
        unsafe { EXEMPT.get(ExemptKey { vpc, address: *address, port, protocol, pad: 0 }) }.is_some()
    }

    #[inline(always)]
    fn matches(&self, table: u32, vpc: u32, query: &Query) -> Match {
        match find_rule(table, vpc, query.peer, (query.protocol as u32) << 16 | query.port as u32) {
            1 => Match::Narrow,
            2 => Match::Any,
            _ => Match::None,
        }
    }
}

/// [`find`] as a function that the verifier knows as global: it is verified once, whatever its callers know.
// VERIFIER: "BPF program is too large. Processed 1000001 insn" (6.12) where it is inlined in each of its places.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_rule(table: u32, vpc: u32, peer: *const Address, protocol_port: u32) -> u32 {
    // SAFETY: `matches` passes a reference. The verifier has its caller pass that many bytes or null.
    let Some(peer) = (unsafe { peer.as_ref() }) else { return Match::None as u32 };
    let Some(policy) = POLICIES.get(table) else { return Match::None as u32 };
    let query = Query { peer, protocol: (protocol_port >> 16) as u8, port: protocol_port as u16 };
    find(&Maps, table, policy, vpc, &query) as u32
}

/// [`is_secondary`] as such a function.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_own(eni: u32, address: *const Address) -> u32 {
    // SAFETY: see `find_rule`.
    let Some(address) = (unsafe { address.as_ref() }) else { return 0 };
    is_secondary(&Maps, eni, address) as u32
}

impl Ports for Maps {
    #[inline(always)]
    fn published(&self, key: &PublishedKey) -> Option<&PublishedPort> {
        // SAFETY: as for `interface`.
        unsafe { PUBLISHED.get(key) }
    }

    #[inline(always)]
    fn interface(&self, link: u32) -> Option<&Interface> {
        interface(link)
    }
}

impl Memory for Maps {
    /// The coarse clock (kernel 5.11) is behind by a tick at most, which is enough for idle timeouts, and takes a
    /// few nanoseconds where the exact one takes thirty.
    #[inline(always)]
    fn now(&self) -> u64 {
        let advance = CONFIG.get(0).map_or(0, |config| config.clock_advance);
        // SAFETY: the helper takes no arguments and touches no memory of ours.
        unsafe { bpf_ktime_get_coarse_ns() }.wrapping_add(advance)
    }

    // VERIFIER: "BPF program is too large. Processed 1000001 insn" (6.18) with the packet on the stack.
    #[inline(always)]
    fn hold<'a>(&'a self, packet: &'a Packet) -> Option<&'a Packet> {
        PACKET.get_ptr_mut(0).map(|place| {
            // SAFETY: this CPU's own entry; TC programs on one CPU don't interrupt each other. Only this line writes
            // it, so it is a valid packet. The black box keeps the compiler from reading it out of registers.
            unsafe {
                place.write(*packet);
                &*core::hint::black_box(place)
            }
        })
    }

    type Entry<'a> = &'a mut Flow;

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<&mut Flow> {
        // SAFETY: preallocated entries stay mapped; `sg_common::conntrack` says what two CPUs at one entry can do.
        FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
    }

    /// The entry is looked for only where adding it fails: most often it is new.
    #[inline(always)]
    fn add_flow(&self, key: &FlowKey, flow: &Flow) -> Result<Option<&mut Flow>, Full> {
        if track(key, flow) {
            return Ok(None);
        }
        if let Some(old) = self.flow(key) {
            return Ok(Some(old));
        }
        // With an agent that sweeps this finds nothing; without one, the packets help themselves. An entry that went
        // between the two lines above leaves its room.
        sweep_if_due(flow.seen);
        if track(key, flow) { Ok(None) } else { Err(Full) }
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) {
        // Who may race: another CPU, which removes it too, or adds it anew by rules that allow it again. Worst: that one's
        // flow goes, and its next packet is judged by the rules, as its SYN is when it is sent again.
        if FLOWS.remove(key).is_ok() {
            count_tracked(key.eni.into(), -1);
        }
    }

    #[inline(always)]
    fn add_fragment(&self, fragment: &Fragment) {
        // Without room the rest of the packet is dropped as orphans: the closed side.
        let _ = FRAGMENTS.insert(fragment.key.slot(), fragment, 0);
    }

    #[inline(always)]
    fn remove_fragment(&self, key: &FragmentKey) {
        // Most often there is none.
        if self.fragment(key).is_some() {
            let _ = FRAGMENTS.remove(key.slot());
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // Who may race: another CPU, whose packet takes the place, or gets the memory for another one. Worst: the rest of a
        // packet is dropped, and its sender sends it again. It is read before its key is, so that a key that is right
        // says that the rest was: a copy begins with the key.
        // SAFETY: as for `interface`.
        let place = unsafe { FRAGMENTS.get(key.slot()) }?;
        // SAFETY: a reference can be read.
        let fragment = unsafe { core::ptr::from_ref(place).read_volatile() };
        if place.key == *key { Some(fragment) } else { None }
    }
}
