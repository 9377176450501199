//! What the test itself believes: the control plane's rules and memberships, who is plugged in, and what the norm
//! (`sg_agent::oracle`) says of that. Knows no agent and no kernel; of the agent's own resolving it uses nothing.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use sg_agent::model::{GroupId, Peer, RuleId, Traffic};
use sg_agent::oracle::{self, Question};
use sg_agent::resolve::{Allowance, Peers};
use sg_common::abi::Direction;
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use tests::cast::Host;

/// Instances that are namespaces behind veths of `World`'s, by their names there.
pub const VETHS: [&str; 4] = ["a", "b", "c", "d"];
/// Instances that are containers.
pub const CONTAINERS: [&str; 2] = ["k", "l"];
/// How many instances there are.
pub const INSTANCES: usize = VETHS.len() + CONTAINERS.len();
/// How many groups.
pub const GROUPS: usize = 6;
/// The most rules that a group has.
const MOST_RULES: usize = 10;

const fn host(name: &'static str, mac: [u8; 6], number: u8, v6: u16) -> Host {
    Host { name, mac, v4: Ipv4Addr::new(10, 0, 1, number), v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, v6) }
}

/// Stands for a MAC address that Docker gives.
const DOCKERS: [u8; 6] = [2, 0x42, 0, 0, 0, 0];

/// The instances, and last who isn't one: somebody outside.
pub const HOSTS: [Host; INSTANCES + 1] = [
    // As `World` numbers them.
    host("a", [2, 0, 0x5e, 0, 0x53, 10], 10, 0x10),
    host("b", [2, 0, 0x5e, 0, 0x53, 20], 20, 0x20),
    host("c", [2, 0, 0x5e, 0, 0x53, 30], 30, 0x30),
    host("d", [2, 0, 0x5e, 0, 0x53, 40], 40, 0x40),
    host("k", DOCKERS, 110, 0x110),
    host("l", DOCKERS, 120, 0x120),
    Host {
        name: "outside",
        mac: [2, 0, 0x5e, 0, 0x53, 1],
        v4: Ipv4Addr::new(203, 0, 113, 9),
        v6: Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 9),
    },
];
/// Who is outside.
pub const OUTSIDE: usize = INSTANCES;

/// A host's address.
pub fn address(host: usize, is_v4: bool) -> IpAddr {
    if is_v4 { HOSTS[host].v4.into() } else { HOSTS[host].v6.into() }
}

/// Ports where real datagrams are counted.
pub const COUNTED: [u16; 2] = [5000, 5001];

/// A packet, but for whose: protocol and destination port, or ICMP type << 8.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The protocol; that of ICMP goes with the family.
    pub protocol: u8,
    /// As in [`Question`].
    pub port: u16,
}

/// What is asked of each pair of hosts.
pub fn kinds(is_v4: bool) -> Vec<Kind> {
    let tcp = [22, 80, 443, 5000, 5001, 6000].map(|port| Kind { protocol: TCP, port });
    let udp = COUNTED.map(|port| Kind { protocol: UDP, port });
    let echo = if is_v4 { Kind { protocol: ICMP, port: 8 << 8 } } else { Kind { protocol: ICMPV6, port: 128 << 8 } };
    tcp.into_iter().chain(udp).chain([echo, Kind { protocol: GRE, port: 0 }]).collect()
}

/// A protocol that has no ports.
pub const GRE: u8 = 47;

/// Whom a rule names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Named {
    /// A network.
    Network(IpNet),
    /// A group, by its place.
    Group(usize),
}

/// A group's rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// Which way it is about.
    pub way: Direction,
    /// What it allows.
    pub traffic: Traffic,
    /// From or to whom.
    pub peer: Named,
}

/// All that decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// Each group's rules.
    pub rules: Vec<BTreeSet<Rule>>,
    /// Each instance's groups.
    pub groups: Vec<BTreeSet<usize>>,
    /// Which instances are plugged in.
    pub present: Vec<bool>,
}

fn network(text: &str) -> Named {
    Named::Network(text.parse().expect("a network"))
}

impl State {
    /// Where each round begins and ends.
    pub fn base() -> Self {
        let rules = |group| {
            let rule = |way, traffic, peer| Rule { way, traffic, peer };
            BTreeSet::from([
                rule(Direction::Ingress, Traffic::Tcp { from: 22, to: 22 }, Named::Group((group + 1) % GROUPS)),
                rule(Direction::Ingress, Traffic::Udp { from: 5000, to: 5000 }, network("10.0.1.0/24")),
                rule(Direction::Ingress, Traffic::Udp { from: 5001, to: 5001 }, network("2001:db8:1::/64")),
                rule(Direction::Egress, Traffic::All, network("0.0.0.0/0")),
                rule(Direction::Egress, Traffic::All, network("::/0")),
            ])
        };
        Self {
            rules: (0..GROUPS).map(rules).collect(),
            groups: (0..INSTANCES).map(|instance| BTreeSet::from([instance % GROUPS])).collect(),
            present: vec![true; INSTANCES],
        }
    }

    /// Every state that a reader may find who reads these one after the other: the endpoint is asked for interfaces and
    /// for groups by different calls, and may have changed in between.
    pub fn mixed(states: &[Self]) -> Vec<Self> {
        let mut mixed: Vec<Self> = states.to_vec();
        for (groups, rules) in states.iter().flat_map(|one| states.iter().map(move |other| (one, other))) {
            let mix = Self { rules: rules.rules.clone(), ..groups.clone() };
            if !mixed.contains(&mix) {
                mixed.push(mix);
            }
        }
        mixed
    }

    /// A change that certainly makes a difference: one rule comes, or goes if it is there.
    pub fn toggled(&self, random: &mut fastrand::Rng) -> Change {
        let present: Vec<usize> = (0..INSTANCES).filter(|instance| self.present[*instance]).collect();
        let groups = &self.groups[present[random.usize(..present.len())]];
        let group = *groups.iter().next().expect("every instance is in a group");
        let traffic = Traffic::Tcp { from: 6000, to: 6000 };
        let rule = Rule { way: Direction::Ingress, traffic, peer: network("10.0.0.0/16") };
        if self.rules[group].contains(&rule) { Change::Revoke(group, rule) } else { Change::Authorize(group, rule) }
    }

    /// The packets of a way that rules let an instance have, as a question to be asked many times.
    pub fn rules_of(&self, instance: usize, way: Direction) -> impl Fn(&Question) -> bool {
        let rules = self.groups[instance].iter().flat_map(|&group| &self.rules[group]);
        let allowances: Vec<Allowance> = rules.filter(|rule| rule.way == way).map(allowance).collect();
        let is_member = |address: IpAddr, group: u32| {
            (0..INSTANCES).any(|other| {
                let own = [IpAddr::from(HOSTS[other].v4), HOSTS[other].v6.into()];
                // An address is an instance's for as long as that is plugged in: the control plane knows others of it.
                self.present[other] && self.groups[other].contains(&(group as usize)) && own.contains(&address)
            })
        };
        move |question| oracle::allowing(&allowances, &is_member, question).is_some()
    }
}

fn allowance(rule: &Rule) -> Allowance {
    let (peer, peers) = match rule.peer {
        Named::Network(network) => {
            let peer = match network {
                IpNet::V4(network) => Peer::Ipv4(network),
                IpNet::V6(network) => Peer::Ipv6(network),
            };
            (peer, Peers::Networks(Arc::new(BTreeSet::from([network]))))
        }
        Named::Group(group) => {
            let number = u32::try_from(group).expect("a few groups");
            (Peer::Group(GroupId::from(number.to_string().as_str())), Peers::Group(number))
        }
    };
    Allowance { id: RuleId::from("sgr"), group: GroupId::from("sg"), traffic: rule.traffic, peer, peers }
}

/// One change of the control plane's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A rule comes.
    Authorize(usize, Rule),
    /// A rule goes.
    Revoke(usize, Rule),
    /// An instance's groups.
    Join(usize, BTreeSet<usize>),
}

impl Change {
    /// One that is possible now.
    pub fn any(state: &State, random: &mut fastrand::Rng) -> Self {
        if random.u8(..4) == 0 {
            return Self::join(state, random);
        }
        let group = random.usize(..GROUPS);
        let rules = &state.rules[group];
        if rules.len() >= MOST_RULES || (!rules.is_empty() && random.bool()) {
            let rule = rules.iter().nth(random.usize(..rules.len())).expect("one of them");
            return Self::Revoke(group, *rule);
        }
        loop {
            let rule = rule(random);
            if !rules.contains(&rule) {
                return Self::Authorize(group, rule);
            }
        }
    }

    /// Other groups for an instance.
    pub fn join(state: &State, random: &mut fastrand::Rng) -> Self {
        let instance = random.usize(..INSTANCES);
        loop {
            let groups = (0..random.usize(1..4)).map(|_| random.usize(..GROUPS)).collect();
            if groups != state.groups[instance] {
                return Self::Join(instance, groups);
            }
        }
    }

    /// All that leads from one state to another.
    pub fn between(from: &State, to: &State) -> Vec<Self> {
        let mut changes = Vec::new();
        for (group, (old, new)) in from.rules.iter().zip(&to.rules).enumerate() {
            changes.extend(old.difference(new).map(|rule| Self::Revoke(group, *rule)));
            changes.extend(new.difference(old).map(|rule| Self::Authorize(group, *rule)));
        }
        let joined = from.groups.iter().zip(&to.groups).enumerate().filter(|(_, (old, new))| old != new);
        changes.extend(joined.map(|(instance, (_, new))| Self::Join(instance, new.clone())));
        changes
    }

    /// The state with it.
    pub fn make(&self, state: &mut State) {
        match self {
            Self::Authorize(group, rule) => drop(state.rules[*group].insert(*rule)),
            Self::Revoke(group, rule) => drop(state.rules[*group].remove(rule)),
            Self::Join(instance, groups) => state.groups[*instance].clone_from(groups),
        }
    }
}

/// Any rule; of those that make a difference to what is asked.
fn rule(random: &mut fastrand::Rng) -> Rule {
    let traffics = [
        Traffic::Tcp { from: 22, to: 22 },
        Traffic::Tcp { from: 80, to: 443 },
        Traffic::Tcp { from: 0, to: 65535 },
        Traffic::Tcp { from: 5000, to: 6000 },
        Traffic::Udp { from: 5000, to: 5000 },
        Traffic::Udp { from: 5001, to: 5001 },
        Traffic::Udp { from: 1024, to: 65535 },
        Traffic::Icmp { kind: None, code: None },
        Traffic::Icmp { kind: Some(8), code: None },
        Traffic::Icmpv6 { kind: None, code: None },
        Traffic::All,
        Traffic::Other { number: GRE },
    ];
    let networks = [
        "10.0.1.10/32",
        "10.0.1.16/28",
        "10.0.1.0/24",
        "10.0.1.110/32",
        "203.0.113.0/24",
        "0.0.0.0/0",
        "2001:db8:1::10/128",
        "2001:db8:1::/64",
        "2001:db8:ffff::9/128",
        "::/0",
    ];
    let way = if random.u8(..4) == 0 { Direction::Egress } else { Direction::Ingress };
    let peer = if random.u8(..3) == 0 {
        Named::Group(random.usize(..GROUPS))
    } else {
        network(networks[random.usize(..networks.len())])
    };
    Rule { way, traffic: traffics[random.usize(..traffics.len())], peer }
}
