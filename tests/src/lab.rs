//! The cast's instances with the agent's real programs and maps: rules in, packets through, verdicts and reasons out.
//! Frames run by BPF_PROG_TEST_RUN; each is run through [`Reference`] too, and the two must agree.

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sg_agent::apply::{Applier, ApplyError};
use sg_agent::compile::compile;
use sg_agent::datapath::Datapath;
use sg_agent::discovery::Attachment;
use sg_agent::explain::{Explanation, Query, explain};
use sg_agent::live;
use sg_agent::model::{Eni, Inventory, Warning};
use sg_agent::resolve::{Desired, Membership, Place, Resolver, Settings, World};
use sg_agent::tables::member;
use sg_common::abi::{Config, Count, DELEGATED, Direction, MAX_FLOWS, RELATED_ERRORS};
use sg_common::addr::Address;
use sg_common::conntrack::State;
use sg_common::verdict::{Drop, Pass, Verdict, number};

use crate::cast::{Host, INSTANCES, ROUTER};
use crate::netns::link;
use crate::packets::Packet;
use crate::reference::{Reference, clock};
use crate::text::rules;

pub use world::{ACL, SUBNET_1, SUBNET_2, acl_entry, attachment, eni, instance_id, inventory, put_acl, scope};

/// What `TC_ACT_UNSPEC` and `TC_ACT_SHOT` are to a test run.
const NEXT: u32 = u32::MAX;
const SHOT: u32 = 2;

/// Three instances on links of their own.
pub struct Lab {
    applier: Applier,
    resolver: Resolver,
    world: World,
    attachments: Vec<Attachment>,
    counters: BTreeMap<(u32, u8, u8), Count>,
    reference: Reference,
    config: Config,
    /// The programs' time. It stands still but for [`Lab::advance`], or how slow a machine is would decide about flows.
    now: u64,
    /// Marks the packets that follow.
    pub mark: u32,
}

impl Lab {
    /// The cast with these rules for `sgB`; `sgA` and `sgC` let everything out and nothing in.
    ///
    /// # Panics
    /// Where the kernel refuses anything, here and in all that follows.
    pub fn new(text: &str) -> Self {
        Self::with(text, Settings { exempt: world::exempt(), ..Settings::default() })
    }

    /// The same, resolved with these settings.
    pub fn with(text: &str, settings: Settings) -> Self {
        let config = Config {
            timeouts: State::DEFAULT_TIMEOUTS.map(|seconds| seconds * 1_000_000_000),
            flags: RELATED_ERRORS,
            allowance: MAX_FLOWS,
            ..Config::default()
        };
        let (datapath, maps) = Datapath::load(&config, None, false).expect("programs and maps that the kernel takes");
        let attachments = INSTANCES
            .iter()
            .map(|host| {
                let name = format!("sgt-{}", host.name.to_lowercase());
                world::attachment(host, link(&name), name)
            })
            .collect();
        let mut lab = Self {
            applier: Applier::new(datapath, maps, config),
            resolver: Resolver::new(settings),
            world: World::from([(scope(), world::inventory())]),
            attachments,
            counters: BTreeMap::new(),
            reference: Reference::new(config),
            config,
            // Ahead of the machine's clock for as long as any test takes.
            now: clock() + 86_400_000_000_000,
            mark: 0,
        };
        lab.rules("sgB", text);
        lab
    }

    /// Replaces a group's rules.
    pub fn rules(&mut self, group: &str, text: &str) {
        let rules = rules(text);
        self.edit(|inventory| {
            let group = inventory.groups.get_mut(&group.into()).expect("a group of the cast");
            group.ingress.clone_from(&rules.ingress);
            group.egress.clone_from(&rules.egress);
        });
    }

    /// Changes what the control plane says.
    pub fn edit(&mut self, change: impl FnOnce(&mut Inventory)) {
        self.try_edit(change).expect("a state that fits");
    }

    /// The same, where the change may be refused.
    ///
    /// # Errors
    /// The applier's.
    pub fn try_edit(&mut self, change: impl FnOnce(&mut Inventory)) -> Result<(), ApplyError> {
        change(self.world.get_mut(&scope()).expect("the only scope"));
        self.apply()
    }

    /// Changes what several control planes say.
    pub fn worlds(&mut self, change: impl FnOnce(&mut World)) {
        change(&mut self.world);
        self.apply().expect("a state that fits");
    }

    /// What would be desired after this change of what the control plane says and of what was discovered, which isn't
    /// made: for who applies it.
    pub fn desired(&mut self, change: impl FnOnce(&mut Inventory, &mut Vec<Attachment>)) -> Desired {
        let (mut world, mut attachments) = (self.world.clone(), self.attachments.clone());
        change(world.get_mut(&scope()).expect("the only scope"), &mut attachments);
        self.resolver.resolve(&world, &scope(), &attachments.into())
    }

    /// Changes what was discovered.
    pub fn attach(&mut self, change: impl FnOnce(&mut Vec<Attachment>)) {
        change(&mut self.attachments);
        self.apply().expect("a state that fits");
        // Those of an interface that went are gone.
        self.counters = self.count();
    }

    fn apply(&mut self) -> Result<(), ApplyError> {
        let desired = self.resolver.resolve(&self.world, &scope(), &self.attachments.clone().into());
        let applied = self.applier.apply(&desired, true).map(drop);
        self.applier.collect();
        // Where the change was refused, what stands now is what stood before.
        let snapshot = self.applier.snapshot();
        for enforced in snapshot.interfaces.values() {
            assert!(enforced.attached, "{}: {:?}", enforced.interface.link, snapshot.warnings);
        }
        // The applier counts this one; the rest is the laboratory's own, and newer than the snapshot where nothing changed.
        self.config.world = snapshot.tables.config.world;
        self.reference.config = self.config;
        self.reference.tables = snapshot.tables.clone();
        self.reference.interfaces =
            snapshot.interfaces.iter().map(|(&link, enforced)| (link, enforced.entry)).collect();
        self.reference.secondaries = snapshot
            .interfaces
            .values()
            .flat_map(|enforced| {
                let own = enforced.interface.addresses.iter().map(|&address| (enforced.entry.eni, address));
                let prefixes = enforced.interface.prefixes.iter();
                let delegated = prefixes.map(|prefix| (enforced.entry.eni | DELEGATED, prefix.network()));
                own.chain(delegated).map(|(eni, address)| (eni, Address::from(address))).collect::<Vec<_>>()
            })
            .collect();
        self.reference.forget();
        applied
    }

    /// Panics where what the last changes left isn't what a start from nothing writes: nothing is missing, nothing is
    /// left over, in memory and in the kernel.
    pub fn check_whole(&mut self) {
        let desired = self.resolver.resolve(&self.world, &scope(), &self.attachments.clone().into());
        let snapshot = self.applier.snapshot();
        let tables = &snapshot.tables;
        let members: BTreeMap<_, _> = tables.members.iter().map(|(place, member)| (*place, *member)).collect();
        let wanted = |(place, its): (&Place, &Membership)| (*place, member(its).expect("few groups"));
        assert_eq!(members, desired.members.iter().map(wanted).collect());
        assert_eq!((&tables.exempt, snapshot.interfaces.len()), (&desired.exempt, desired.interfaces.len()));
        assert_eq!((tables.bindings.len(), tables.policies.len()), (desired.policies.len(), desired.policies.len()));
        for (link, interface) in desired.interfaces.iter() {
            let enforced = &snapshot.interfaces[link];
            assert_eq!(*enforced.interface, *interface);
            let acl = interface.acl.iter().map(|key| (key, enforced.entry.acl));
            for (key, slot) in [(&interface.policy, enforced.entry.groups)].into_iter().chain(acl) {
                let policy = &tables.policies[&tables.bindings[&slot].policy];
                assert_eq!(**policy, compile(&desired.policies[key]).expect("a policy that is in force"), "{key}");
            }
        }
        let (repairs, errors) = self.applier.verify();
        assert!(repairs.is_empty() && errors.is_empty(), "{repairs:?} {errors:?}");
    }

    /// What the last change was warned about.
    pub fn warnings(&self) -> Vec<Warning> {
        self.applier.snapshot().warnings.iter().cloned().collect()
    }

    /// Replaces settings.
    pub fn configure(&mut self, change: impl Fn(&mut Config)) {
        self.applier.set_config(&change).expect("a map that can be written");
        change(&mut self.config);
        self.reference.config = self.config;
    }

    /// Lets time pass.
    pub fn advance(&mut self, milliseconds: u64) {
        self.now += milliseconds * 1_000_000;
        self.set_clock();
    }

    /// What has passed by the machine's clock since the last call is taken away again.
    fn set_clock(&mut self) {
        let advance = self.now - clock();
        self.configure(|config| config.clock_advance = advance);
    }

    /// What happens to a packet that arrives at an instance's interface.
    pub fn to(&mut self, host: Host, packet: &Packet) -> Verdict {
        self.run(host, Direction::Ingress, &packet.frame())
    }

    /// What happens to a packet that an instance sends.
    pub fn from(&mut self, host: Host, packet: &Packet) -> Verdict {
        self.run(host, Direction::Egress, &packet.frame())
    }

    /// A packet's whole way: out of its sender's interface, if it has one here, and into its receiver's. The verdict
    /// of the first that drops it, with that host's name, or that of the last that lets it pass.
    pub fn send(&mut self, from: Host, to: Host, packet: &Packet) -> (&'static str, Verdict) {
        let mut last = ("", Err(Drop::UnknownInterface));
        if INSTANCES.iter().any(|host| host.name == from.name) {
            last = (from.name, self.from(from, packet));
            if last.1.is_err() {
                return last;
            }
        }
        if INSTANCES.iter().any(|host| host.name == to.name) {
            let packet = packet.clone().from_mac(if from.name == "X" { ROUTER } else { packet.macs.0 });
            last = (to.name, self.to(to, &packet));
        }
        last
    }

    /// Runs one frame through the program of one direction of an instance's link. The verdict is the kernel's, read
    /// from the one counter that moved, by one packet of the frame's length.
    pub fn run(&mut self, host: Host, direction: Direction, frame: &[u8]) -> Verdict {
        self.run_on(self.ifindex(host), direction, frame)
    }

    /// The same by the link's index, which need not be an instance's.
    pub fn run_on(&mut self, ifindex: u32, direction: Direction, frame: &[u8]) -> Verdict {
        self.set_clock();
        let expected = self.reference.run(ifindex, direction, frame, self.mark);
        if !is_taken(frame) {
            return expected;
        }
        let returned = self.returned(ifindex, direction, frame);
        let (eni, its_direction, reason) = self.moved(frame.len() as u64);
        let verdict = verdict(reason);
        assert_eq!(returned, if verdict.is_ok() { NEXT } else { SHOT }, "{verdict:?} but action {returned}");
        assert_eq!(its_direction, direction as u8, "counted for the other direction");
        if let Some(interface) = self.reference.interfaces.get(&ifindex) {
            assert_eq!(eni, interface.eni, "counted for another interface");
        }
        assert_eq!(verdict, expected, "the kernel (left) and its rules in memory differ about {frame:02x?}");
        verdict
    }

    /// Runs frames through the program alone, as fast as it goes; how many pass. The pipeline in memory doesn't learn
    /// of them.
    pub fn flood(&mut self, host: Host, direction: Direction, frames: impl Iterator<Item = Vec<u8>>) -> u32 {
        self.set_clock();
        let ifindex = self.ifindex(host);
        let mut passed = 0;
        for frame in frames {
            passed += u32::from(self.returned(ifindex, direction, &frame) == NEXT);
        }
        self.counters = self.count();
        passed
    }

    /// Runs one frame through the program alone: the kernel's verdict.
    pub fn execute(&mut self, host: Host, direction: Direction, frame: &[u8]) -> Verdict {
        self.set_clock();
        self.returned(self.ifindex(host), direction, frame);
        let (.., reason) = self.moved(frame.len() as u64);
        verdict(reason)
    }

    /// Runs one frame; what the program returned.
    fn returned(&mut self, ifindex: u32, direction: Direction, frame: &[u8]) -> u32 {
        let (datapath, _) = self.applier.datapath();
        datapath.run(direction, ifindex, self.mark, frame).expect("a frame that the kernel runs")
    }

    fn count(&self) -> BTreeMap<(u32, u8, u8), Count> {
        let mut enis: Vec<u32> = self.reference.interfaces.values().map(|interface| interface.eni).collect();
        enis.sort_unstable();
        enis.dedup();
        self.applier.maps().counters(&enis).expect("counters that can be read")
    }

    /// The one counter that moved since the last packet.
    fn moved(&mut self, bytes: u64) -> (u32, u8, u8) {
        let counters = self.count();
        let moved: Vec<_> = counters
            .iter()
            .filter(|&(key, count)| self.counters.get(key) != Some(count))
            .map(|(&key, count)| (key, *count))
            .collect();
        let [(key, count)] = moved.as_slice() else { panic!("not one counter moved, but {moved:?}") };
        let before = self.counters.get(key).copied().unwrap_or_default();
        assert_eq!(
            (count.packets - before.packets, count.bytes - before.bytes),
            (1, bytes),
            "one packet is one packet"
        );
        let key = *key;
        self.counters = counters;
        key
    }

    /// Asks `explain` about a packet, and the attached programs too (`--live`).
    pub fn explain_live(&mut self, query: &Query) -> Explanation {
        let mut explanation = explain(&self.applier.snapshot(), query).expect("an instance of the cast");
        live::verify(&mut self.applier, query, &mut explanation).expect("packets that the kernel runs");
        self.counters = self.count();
        explanation
    }

    /// Takes every policy out of force behind the agent's back.
    pub fn sabotage(&mut self) {
        let slots: Vec<u32> = self.applier.snapshot().tables.bindings.keys().copied().collect();
        let (_, maps) = self.applier.datapath();
        for slot in slots {
            maps.bindings.store(slot, 0);
        }
    }

    /// The link of an instance.
    pub fn ifindex(&self, host: Host) -> u32 {
        let name = format!("sgt-{}", host.name.to_lowercase());
        let found = self.attachments.iter().find(|attachment| attachment.link.name == name);
        found.unwrap_or_else(|| panic!("{} has no link here", host.name)).link.ifindex
    }

    /// Who is in which group, by the groups' numbers, as the control plane and the discovery have it.
    pub fn memberships(&mut self) -> BTreeSet<(IpAddr, u32)> {
        let inventory = &self.world[&scope()];
        let mut memberships = BTreeSet::new();
        for eni in inventory.enis.values() {
            let attached =
                self.attachments.iter().filter(|attachment| Some(&attachment.instance) == eni.instance.as_ref());
            let addresses = eni.addresses.iter().chain(attached.flat_map(|attachment| &attachment.addresses));
            for (&address, group) in addresses.flat_map(|address| eni.groups.iter().map(move |group| (address, group)))
            {
                memberships.insert((address, self.resolver.group_number(&scope(), group)));
            }
        }
        memberships
    }

    /// The addresses that hosts of a subnet really have, as the control plane and the discovery have them.
    pub fn neighbors(&self, subnet: &str) -> BTreeSet<IpAddr> {
        let enis =
            self.world[&scope()].enis.values().filter(|eni| eni.subnet.as_ref().is_some_and(|id| *id.0 == *subnet));
        let attached = |eni: &Eni| {
            let found = self.attachments.iter().find(|attachment| Some(&attachment.instance) == eni.instance.as_ref());
            found.map(|attachment| attachment.addresses.clone()).unwrap_or_default()
        };
        enis.flat_map(|eni| eni.addresses.iter().copied().chain(attached(eni))).collect()
    }

    /// The applier, for what packets don't show.
    pub fn applier(&mut self) -> &mut Applier {
        &mut self.applier
    }

    /// The pipeline in memory, for what packets don't show.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }
}

/// Whether the kernel runs a program on such a frame: it refuses those without a whole IP header where the ethertype
/// promises one, and those with nothing behind the Ethernet header (bpf_prog_test_run_skb). In memory all of them run.
fn is_taken(frame: &[u8]) -> bool {
    match frame {
        [_, _, _, _, _, _, _, _, _, _, _, _, 0x08, 0x00, ip @ ..] => ip.len() >= 20,
        [_, _, _, _, _, _, _, _, _, _, _, _, 0x86, 0xdd, ip @ ..] => ip.len() >= 40,
        frame => frame.len() > 14,
    }
}

fn verdict(reason: u8) -> Verdict {
    let verdict = match (Pass::from_number(reason), Drop::from_number(reason)) {
        (Some(pass), _) => Ok(pass),
        (_, Some(drop)) => Err(drop),
        _ => panic!("{reason} is no reason's number"),
    };
    assert_eq!(number(&verdict), reason);
    verdict
}
