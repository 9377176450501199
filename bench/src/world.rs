//! Control planes of any size, and the agent's own way from them to the kernel's maps, timed. No sockets, no daemon.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use ::tests::lab::scope;
use anyhow::{Context as _, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::net::if_::if_nametoindex;
use sg_agent::apply::{Applier, Snapshot};
use sg_agent::datapath::Datapath;
use sg_agent::discovery::{Attachment, Link, Origin};
use sg_agent::exempt::Service;
use sg_agent::model::{
    Eni, EniId, GroupId, Instance, InstanceId, Inventory, Peer, PrefixList, PrefixListId, Rule, RuleId, Scope,
    SecurityGroup, Traffic, VpcId,
};
use sg_agent::resolve::{Resolver, Settings, World};
use sg_common::abi::{Config, MAX_FLOWS, RELATED_ERRORS};
use sg_common::conntrack::State;

use crate::load::processor_time;

/// The first port that rules are about.
pub const FIRST_PORT: u16 = 1_000;

/// The group of [`spread_rules`].
const SUBJECT: &str = "sg-subject";

/// How long a change took, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// From inventories to what each interface must enforce; the agent's own processor time.
    pub resolve: f64,
    /// From there to the kernel's maps, compiling included; the same.
    pub apply: f64,
    /// Both by the clock on the wall: waiting for the kernel is in it.
    pub wall: f64,
}

impl Timing {
    /// The agent's own time.
    pub fn own(&self) -> f64 {
        self.resolve + self.apply
    }
}

/// The agent's own pipeline over real maps, without the daemon around it.
#[derive(Debug)]
pub struct Agent {
    /// The writer of maps.
    pub applier: Applier,
    resolver: Resolver,
    world: World,
    attachments: Arc<[Attachment]>,
}

impl Agent {
    /// Over freshly loaded programs, with these instances on links of this thread's namespace. Nothing is applied yet.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(inventory: Inventory, attachments: Vec<Attachment>) -> Result<Self> {
        let config = Config {
            timeouts: State::DEFAULT_TIMEOUTS.map(|seconds| seconds * 1_000_000_000),
            flags: RELATED_ERRORS,
            allowance: MAX_FLOWS,
            ..Config::default()
        };
        let (datapath, maps) = Datapath::load(&config, None, false)?;
        let settings = Settings { exempt: Service::defaults("/nonexistent".as_ref()), ..Settings::default() };
        Ok(Self {
            applier: Applier::new(datapath, maps, config),
            resolver: Resolver::new(settings),
            world: World::from([(scope(), inventory)]),
            attachments: attachments.into(),
        })
    }

    /// Changes what the control plane says, and enforces it.
    ///
    /// # Errors
    /// The applier's.
    pub fn change(&mut self, change: impl FnOnce(&mut Inventory)) -> Result<Timing> {
        change(self.world.get_mut(&scope()).context("the only scope")?);
        let (started, begun) = (Instant::now(), processor_time()?);
        let desired = self.resolver.resolve(&self.world, &scope(), &self.attachments);
        let resolved = processor_time()?;
        let snapshot = self.applier.apply(&desired, true)?;
        let (resolve, apply) = ((resolved - begun) / 1e6, (processor_time()? - resolved) / 1e6);
        let timing = Timing { resolve, apply, wall: started.elapsed().as_secs_f64() * 1e3 };
        ensure!(is_whole(&snapshot), "not everything is enforced: {:?}", snapshot.warnings.get_min());
        self.applier.collect();
        Ok(timing)
    }

    /// Forgets all flows: time jumps beyond every timeout, and what is expired is taken out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forget_flows(&mut self) -> Result<()> {
        const LONGEST: u64 = 10 * 86_400 * 1_000_000_000;
        self.applier.set_config(|config| config.clock_advance += LONGEST)?;
        let live = self.applier.sweep()?;
        ensure!(live == 0, "{live} flows live after all timeouts");
        Ok(())
    }
}

fn is_whole(snapshot: &Snapshot) -> bool {
    snapshot.interfaces.values().all(|enforced| enforced.attached)
}

/// Peers' networks that are spread over the address space, of several lengths; the same ones every time.
pub fn networks(is_v4: bool, count: usize) -> Vec<IpNet> {
    let mut networks = BTreeSet::new();
    let mut random = Random::new(7);
    while networks.len() < count {
        networks.insert(network(is_v4, random.next()));
    }
    // Not in the order of addresses: neighbouring rules don't have neighbouring networks.
    let mut networks: Vec<IpNet> = networks.into_iter().collect();
    for place in (1..networks.len()).rev() {
        networks.swap(place, random.below(place as u64 + 1) as usize);
    }
    networks
}

fn network(is_v4: bool, random: u64) -> IpNet {
    if is_v4 {
        let length = [20, 24, 24, 28, 32][(random >> 40) as usize % 5];
        // 64.0.0.0/3: nothing in it is a martian.
        let address = Ipv4Addr::from(0x4000_0000 | random as u32 & 0x1fff_ffff);
        IpNet::V4(Ipv4Net::new_assert(address, length).trunc())
    } else {
        let length = [48, 56, 64, 64, 128][(random >> 40) as usize % 5];
        let address = 0x2001_0db8_u128 << 96 | u128::from(random & 0xffff_ffff) << 64 | u128::from(random >> 48);
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(address), length).trunc())
    }
}

/// An address of a network that is not its first one, where there are others.
pub fn host_of(network: &IpNet, number: u64) -> IpAddr {
    match network {
        IpNet::V4(network) => {
            let hosts = u32::from(network.hostmask());
            IpAddr::V4((u32::from(network.network()) | number as u32 & hosts).into())
        }
        IpNet::V6(network) => {
            let hosts = u128::from(network.hostmask());
            IpAddr::V6((u128::from(network.network()) | u128::from(number) & hosts).into())
        }
    }
}

/// Gives the first instance a group of its own, whose rule `i` is about port `1000 + i`, and its peers are every
/// `rules`th of the networks, in a prefix list of its own where they are several.
pub fn spread_rules(inventory: &mut Inventory, rules: usize, networks: &[IpNet]) {
    inventory.prefix_lists.clear();
    let mut ingress = Vec::new();
    for number in 0..rules {
        let entries: BTreeSet<IpNet> = if networks.len() >= rules {
            networks.iter().skip(number).step_by(rules).copied().collect()
        } else {
            BTreeSet::from([networks[number % networks.len()]])
        };
        let port = FIRST_PORT + number as u16;
        let peer = match (entries.len(), entries.first()) {
            (1, Some(IpNet::V4(network))) => Peer::Ipv4(*network),
            (1, Some(IpNet::V6(network))) => Peer::Ipv6(*network),
            _ => {
                let id = PrefixListId::from(format!("pl-{number}").as_str());
                inventory
                    .prefix_lists
                    .insert(id.clone(), PrefixList { id: id.clone(), version: 1, entries: entries.into() });
                Peer::PrefixList(id)
            }
        };
        ingress.push(rule(number, Traffic::Tcp { from: port, to: port }, peer));
    }
    let mut subject = group(SUBJECT);
    subject.ingress = ingress;
    if let Some(eni) = inventory.enis.get_mut(&EniId::from("eni-0")) {
        eni.groups = BTreeSet::from([subject.id.clone()]);
    }
    inventory.groups.insert(subject.id.clone(), subject);
}

/// A rule, named after its number.
pub fn rule(number: usize, traffic: Traffic, peer: Peer) -> Rule {
    Rule { id: RuleId::from(format!("sgr-{number}").as_str()), traffic, peer }
}

/// A group without rules.
pub fn group(id: &str) -> SecurityGroup {
    let Scope { account, .. } = scope();
    SecurityGroup {
        id: GroupId::from(id),
        name: id.into(),
        vpc: Some(VpcId::from("vpc-1")),
        owner: account,
        ingress: Vec::new(),
        egress: Vec::new(),
    }
}

/// So many instances, in turn in so many groups of so many rules each.
pub fn fleet(instances: usize, groups: usize, rules: usize) -> Inventory {
    let mut inventory = Inventory::default();
    for number in 0..groups {
        let mut group = group(&format!("sg-{number}"));
        group.ingress = (0..rules)
            .map(|index| {
                // Every group differs, and a fifth of the rules refers to the next group.
                let port = FIRST_PORT + (number * 7 + index) as u16;
                let peer = if index % 5 == 4 {
                    Peer::Group(GroupId::from(format!("sg-{}", (number + 1) % groups).as_str()))
                } else {
                    let address = Ipv4Addr::from(0x4000_0000 | ((number * rules + index) as u32) << 8);
                    Peer::Ipv4(Ipv4Net::new_assert(address, 24))
                };
                rule(number * rules + index, Traffic::Tcp { from: port, to: port }, peer)
            })
            .collect();
        group.egress = vec![rule(usize::MAX, Traffic::All, Peer::Ipv4(Ipv4Net::default()))];
        inventory.groups.insert(group.id.clone(), group);
    }
    for number in 0..instances {
        let group = format!("sg-{}", number % groups);
        let eni = Eni {
            id: EniId::from(format!("eni-{number}").as_str()),
            instance: Some(instance_id(number)),
            device_index: 0,
            groups: BTreeSet::from([GroupId::from(group.as_str())]),
            subnet: None,
            vpc: Some(VpcId::from("vpc-1")),
            addresses: addresses(number),
            prefixes: Vec::new(),
            source_dest_check: true,
        };
        let id = instance_id(number);
        let instance = Instance { id: id.clone(), name: None, state: "running".into(), enis: vec![eni.id.clone()] };
        inventory.instances.insert(id, instance);
        inventory.enis.insert(eni.id.clone(), eni);
    }
    inventory
}

/// The id of the instance with this number.
pub fn instance_id(number: usize) -> InstanceId {
    InstanceId::from(format!("i-{number}").as_str())
}

/// Its addresses, in both families.
pub fn addresses(number: usize) -> Vec<IpAddr> {
    let v4 = Ipv4Addr::from(0x0a00_0000 | (number as u32 + 10));
    let v6 = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number as u16 + 10);
    vec![v4.into(), v6.into()]
}

/// Its MAC address.
pub fn mac(number: usize) -> [u8; 6] {
    let [a, b] = (number as u16).to_be_bytes();
    [2, 0, 1, 0, a, b]
}

/// Links for so many instances in this thread's namespace, and the instances at them.
///
/// # Errors
/// iproute2's.
pub fn attach(instances: usize) -> Result<Vec<Attachment>> {
    let mut lines = String::new();
    // Both ends of a veth are links, and nothing crosses them.
    for number in (0..instances).step_by(2) {
        writeln!(lines, "link add {} type veth peer name {}", link(number), link(number + 1))?;
    }
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("iproute2's 'ip' isn't there")?;
    let mut stdin = ip.stdin.take().context("a pipe was asked for")?;
    stdin.write_all(lines.as_bytes())?;
    drop(stdin);
    ensure!(ip.wait()?.success(), "links can't be made");
    let mut indices = Vec::new();
    for number in 0..instances {
        indices.push(if_nametoindex(link(number).as_str())?);
    }
    Ok(attachments(instances, |number| indices[number]))
}

fn link(number: usize) -> String {
    format!("sgb-{number}")
}

/// So many instances at links of these indices.
pub fn attachments(instances: usize, index: impl Fn(usize) -> u32) -> Vec<Attachment> {
    let attachment = |number| Attachment {
        instance: instance_id(number),
        account: None,
        region: None,
        eni: None,
        device_index: 0,
        link: Link { ifindex: index(number), name: link(number) },
        mac: mac(number),
        addresses: addresses(number),
        networks: Vec::new(),
        gateways: vec![IpAddr::from([10, 0, 0, 1])],
        origin: Origin::Flag,
        publish: Vec::new(),
    };
    (0..instances).map(attachment).collect()
}

/// Numbers without an order, the same ones every time (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below a limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_distinct_and_hold_their_hosts() {
        for is_v4 in [true, false] {
            let networks = networks(is_v4, 5_000);
            assert_eq!(networks.iter().collect::<BTreeSet<_>>().len(), 5_000);
            for (number, network) in (0..).zip(&networks) {
                assert!(network.contains(&host_of(network, number)), "{network} {number}");
                assert_eq!(network.trunc(), *network);
            }
        }
    }
}
