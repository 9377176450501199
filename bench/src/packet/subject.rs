//! The instances that packets are sent to, each with rules of another size, and the packets themselves.

use std::net::IpAddr;
use std::sync::Arc;

use ::tests::cast::{Host, ROUTER, X};
use ::tests::packets::{tcp, udp};
use anyhow::{Context as _, Result};
use ipnet::IpNet;
use sg_agent::model::{Eni, EniId, GroupId, Inventory, Peer, PrefixList, PrefixListId, Traffic, VpcId};
use sg_common::verdict::{Drop, Pass};

use super::{
    BURST, DENIED, DENIED_PORT, FORWARD, Frames, NEW_FIRST, NEW_FULL, NEW_GROUP, NEW_LAST, NEW_SPREAD, NEW_UDP, REPLY,
    Shot, Table, UNTRACKED, shot,
};
use crate::gun::End;
use crate::world::{self, Agent, FIRST_PORT, Random, host_of};

/// What a subject's rules are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// So many rules for each family, about one TCP port each; their peers are so many networks, dealt out in turn.
    Spread(usize, usize),
    /// Everything, from everywhere.
    Open,
    /// So many rules that refer to a group of 1,000 members.
    Group(usize),
    /// One rule about UDP.
    Udp,
}

/// Every kind, one instance each.
pub const ALL: [Kind; 9] = [
    Kind::Spread(1, 1),
    Kind::Spread(60, 1),
    Kind::Spread(1_000, 1),
    Kind::Spread(60, 1_000),
    Kind::Spread(1_000, 60_000),
    Kind::Spread(1_000, 100_000),
    Kind::Open,
    Kind::Group(60),
    Kind::Udp,
];

/// The members of the group that rules refer to.
const MEMBERS: usize = 1_000;

/// Makes the sources that are measured; those of the flows that fill a table are others.
const SEED: u64 = 11;

/// An instance that packets are sent to.
pub struct Subject {
    kind: Kind,
    number: usize,
    /// Its link.
    pub ifindex: u32,
    /// Its interface's number.
    pub eni: u32,
}

/// An agent over so many instances: the subjects first, then others with policies of their own.
pub fn agent(instances: usize) -> Result<Agent> {
    let mut inventory = world::fleet(instances, instances.min(100).max(ALL.len()), 60);
    for (number, kind) in ALL.iter().enumerate() {
        join(&mut inventory, number, *kind);
    }
    let mut agent = Agent::new(inventory, world::attach(instances)?)?;
    agent.change(|_| {})?;
    Ok(agent)
}

/// Gives an instance a group of its own, with rules of this kind.
fn join(inventory: &mut Inventory, number: usize, kind: Kind) {
    let id = format!("sg-subject-{number}");
    let mut group = world::group(&id);
    match kind {
        Kind::Spread(rules, networks) => {
            for is_v4 in [true, false] {
                let networks = world::networks(is_v4, networks);
                for rule in 0..rules {
                    let port = FIRST_PORT + rule as u16;
                    let own = networks.iter().skip(rule % networks.len()).step_by(rules).copied().collect();
                    let list = PrefixListId::from(format!("pl-{number}-{rule}-{is_v4}").as_str());
                    let entries = PrefixList { id: list.clone(), version: 1, entries: Arc::new(own) };
                    inventory.prefix_lists.insert(list.clone(), entries);
                    group.ingress.push(world::rule(
                        rule,
                        Traffic::Tcp { from: port, to: port },
                        Peer::PrefixList(list),
                    ));
                }
            }
        }
        Kind::Open => {
            let all = [Peer::Ipv4(Default::default()), Peer::Ipv6(Default::default())];
            group.ingress = all.iter().map(|peer| world::rule(0, Traffic::All, peer.clone())).collect();
            group.egress.clone_from(&group.ingress);
        }
        Kind::Group(rules) => {
            for rule in 0..rules {
                let port = FIRST_PORT + rule as u16;
                let peer = Peer::Group(GroupId::from("sg-app"));
                group.ingress.push(world::rule(rule, Traffic::Tcp { from: port, to: port }, peer));
            }
            inventory.groups.insert(GroupId::from("sg-app"), world::group("sg-app"));
            for member in 0..MEMBERS {
                let eni = Eni {
                    id: EniId::from(format!("eni-member-{member}").as_str()),
                    instance: None,
                    device_index: 0,
                    groups: [GroupId::from("sg-app")].into(),
                    subnet: None,
                    vpc: Some(VpcId::from("vpc-1")),
                    addresses: member_addresses(member),
                    prefixes: Vec::new(),
                    source_dest_check: true,
                };
                inventory.enis.insert(eni.id.clone(), eni);
            }
        }
        Kind::Udp => {
            let traffic = Traffic::Udp { from: FIRST_PORT, to: FIRST_PORT };
            for is_v4 in [true, false] {
                let peer = match world::networks(is_v4, 1)[0] {
                    IpNet::V4(network) => Peer::Ipv4(network),
                    IpNet::V6(network) => Peer::Ipv6(network),
                };
                group.ingress.push(world::rule(0, traffic, peer));
            }
        }
    }
    if let Some(eni) = inventory.enis.get_mut(&EniId::from(format!("eni-{number}").as_str())) {
        eni.groups = [GroupId::from(id.as_str())].into();
    }
    inventory.groups.insert(group.id.clone(), group);
}

fn member_addresses(member: usize) -> Vec<IpAddr> {
    let number = member as u16;
    vec![IpAddr::from([10, 200, (number >> 8) as u8, number as u8]), IpAddr::from([0xfd00, 2, 0, 0, 0, 0, 0, number])]
}

fn subject(agent: &Agent, kind: Kind) -> Result<Subject> {
    let number = ALL.iter().position(|its| *its == kind).context("a subject of this kind")?;
    let snapshot = agent.applier.snapshot();
    let of_it =
        |(_, enforced): &(&u32, &sg_agent::apply::Enforced)| enforced.interface.instance == world::instance_id(number);
    let (&ifindex, enforced) = snapshot.interfaces.iter().find(of_it).context("the subject's interface")?;
    Ok(Subject { kind, number, ifindex, eni: enforced.entry.eni })
}

impl Subject {
    fn host(&self) -> Host {
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (world::addresses(self.number)[0], world::addresses(self.number)[1])
        else {
            panic!("an instance has an address of each family");
        };
        Host { name: "subject", mac: world::mac(self.number), v4, v6 }
    }

    /// Packets from one source to one rule's port.
    fn hot(&self, is_v4: bool, rule: usize, count: usize) -> Vec<End> {
        let Kind::Spread(_, networks) = self.kind else { panic!("a subject with networks") };
        let networks = world::networks(is_v4, networks);
        let address = host_of(&networks[rule % networks.len()], 5);
        (0..count).map(|port| End { address, port: 2_000 + port as u16, other: FIRST_PORT + rule as u16 }).collect()
    }

    /// Packets from everywhere in the rules' networks, each to its rule's port.
    fn spread(&self, is_v4: bool, count: usize, seed: u64) -> Vec<End> {
        let Kind::Spread(rules, networks) = self.kind else { panic!("a subject with networks") };
        let networks = world::networks(is_v4, networks);
        let mut random = Random::new(seed);
        let mut end = || {
            let place = random.below(networks.len() as u64) as usize;
            let address = host_of(&networks[place], random.next());
            End { address, port: 2_000 + random.below(60_000) as u16, other: FIRST_PORT + (place % rules) as u16 }
        };
        (0..count).map(|_| end()).collect()
    }

    /// The same to a port that another rule is about, which doesn't know the source.
    fn astray(&self, is_v4: bool, count: usize) -> Vec<End> {
        let Kind::Spread(rules, networks) = self.kind else { panic!("a subject with networks") };
        let networks = world::networks(is_v4, networks);
        let is_allowed = |end: &End| {
            let rule = usize::from(end.other - FIRST_PORT);
            networks.iter().skip(rule).step_by(rules).any(|network| network.contains(&end.address))
        };
        let mut ends = self.spread(is_v4, 2 * count, 17);
        for end in &mut ends {
            end.other = FIRST_PORT + (end.other - FIRST_PORT + 1) % rules as u16;
        }
        ends.retain(|end| !is_allowed(end));
        ends.truncate(count);
        ends
    }
}

fn tcp_frames(subject: &Subject, is_v4: bool) -> Frames {
    let packet = tcp(X, subject.host()).family(is_v4, X, subject.host()).from_mac(ROUTER);
    let back = packet.clone().reply();
    Frames {
        open: packet.clone().syn().frame(),
        answer: back.clone().syn_ack().frame(),
        forth: packet.frame(),
        back: back.frame(),
    }
}

fn syn_frames(subject: &Subject, is_v4: bool) -> Frames {
    let frames = tcp_frames(subject, is_v4);
    Frames { forth: frames.open.clone(), ..frames }
}

fn udp_frames(subject: &Subject, is_v4: bool) -> Frames {
    let packet = udp(X, subject.host()).family(is_v4, X, subject.host()).from_mac(ROUTER).payload(16);
    let (forth, back) = (packet.frame(), packet.reply().frame());
    Frames { open: forth.clone(), answer: back.clone(), forth, back }
}

/// Every figure for one family.
pub(super) fn shots(agent: &Agent, is_v4: bool, is_quick: bool, shots: &mut Vec<Shot>) -> Result<()> {
    let burst = BURST as usize;
    let typical = subject(agent, Kind::Spread(60, 1_000))?;
    for flows in if is_quick { vec![1, 1 << 16] } else { vec![1, 1 << 10, 1 << 14, 1 << 17] } {
        let ends = typical.spread(is_v4, flows, SEED);
        let known =
            |figure| shot(&typical, figure, is_v4, Ok(Pass::Established)).table(Table::Known).at("flows", flows as f64);
        shots.push(known(FORWARD).with(tcp_frames, &ends, &[])?);
        shots.push(known(REPLY).reply().with(tcp_frames, &ends, &[])?);
    }
    let open = subject(agent, Kind::Open)?;
    let anywhere = typical.spread(is_v4, burst, SEED);
    shots.push(shot(&open, UNTRACKED, is_v4, Ok(Pass::Untracked)).with(tcp_frames, &anywhere, &[])?);
    for (rules, networks) in [(1, 1), (60, 1), (1_000, 1)] {
        let subject = subject(agent, Kind::Spread(rules, networks))?;
        for (figure, rule) in [(NEW_FIRST, 0), (NEW_LAST, rules - 1)] {
            let new = shot(&subject, figure, is_v4, Ok(Pass::New)).table(Table::Fresh).at("rules", rules as f64);
            shots.push(new.with(syn_frames, &subject.hot(is_v4, rule, burst), &[])?);
        }
    }
    for (rules, networks) in [(60, 1_000), (1_000, 60_000), (1_000, 100_000)] {
        let subject = subject(agent, Kind::Spread(rules, networks))?;
        let new = shot(&subject, NEW_SPREAD, is_v4, Ok(Pass::New)).table(Table::Fresh).at("prefixes", networks as f64);
        shots.push(new.with(syn_frames, &subject.spread(is_v4, burst, SEED), &[])?);
    }
    let fill = typical.spread(is_v4, 1 << 18, 2 * SEED);
    let full = shot(&typical, NEW_FULL, is_v4, Ok(Pass::New)).table(Table::Full);
    shots.push(full.with(syn_frames, &anywhere, &fill)?);
    let grouped = subject(agent, Kind::Group(60))?;
    let members: Vec<End> = anywhere
        .iter()
        .enumerate()
        .map(|(number, end)| End {
            address: member_addresses(number % MEMBERS)[usize::from(!is_v4)],
            other: FIRST_PORT + 59,
            ..*end
        })
        .collect();
    shots.push(shot(&grouped, NEW_GROUP, is_v4, Ok(Pass::New)).table(Table::Fresh).with(syn_frames, &members, &[])?);
    let datagrams = subject(agent, Kind::Udp)?;
    let hot = subject(agent, Kind::Spread(1, 1))?.hot(is_v4, 0, burst);
    shots.push(shot(&datagrams, NEW_UDP, is_v4, Ok(Pass::New)).table(Table::Fresh).with(udp_frames, &hot, &[])?);
    let denied = typical.astray(is_v4, burst);
    shots.push(shot(&typical, DENIED, is_v4, Err(Drop::NoRule)).with(syn_frames, &denied, &[])?);
    let unknown: Vec<End> = denied.iter().map(|end| End { other: 9, ..*end }).collect();
    shots.push(shot(&typical, DENIED_PORT, is_v4, Err(Drop::NoRule)).with(syn_frames, &unknown, &[])?);
    Ok(())
}

/// The figures that are compared over another axis.
pub(super) fn few(agent: &Agent, is_v4: bool, at: (&'static str, f64), shots: &mut Vec<Shot>) -> Result<()> {
    let typical = subject(agent, Kind::Spread(60, 1_000))?;
    let known = shot(&typical, FORWARD, is_v4, Ok(Pass::Established)).table(Table::Known).at(at.0, at.1);
    shots.push(known.with(tcp_frames, &typical.spread(is_v4, 1 << 14, SEED), &[])?);
    let new = shot(&typical, NEW_SPREAD, is_v4, Ok(Pass::New)).table(Table::Fresh).at(at.0, at.1);
    shots.push(new.with(syn_frames, &typical.spread(is_v4, BURST as usize, SEED), &[])?);
    Ok(())
}
