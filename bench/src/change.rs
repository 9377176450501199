//! What a change of rules or members costs the agent itself, from the inventories in memory to the kernel's maps, and
//! the first time that everything is brought there.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use anyhow::Result;
use ipnet::{IpNet, Ipv4Net};
use sg_agent::compile::compile;
use sg_agent::model::{Eni, EniId, GroupId, Inventory, Peer, PrefixList, PrefixListId, Traffic, VpcId};
use sg_agent::resolve::Resolver;

use crate::isolated;
use crate::record::{Bound, Recorder, median, ratios};
use crate::world::{self, Agent, Timing};

/// Rules of each group.
const RULES: usize = 60;
/// Entries of the long prefix list.
const ENTRIES: usize = 1_000;

/// Members that are no instances here, where there are any.
const OTHERS: usize = 10_000;
/// How many times as much a change may cost where much more doesn't change.
const FLAT: f64 = 2.0;

/// What changes, one after the other.
const CHANGES: [(&str, Change); 5] = [
    ("one rule", one_rule),
    ("one member more", one_member),
    ("an instance's groups", other_groups),
    ("a list of 1,000", long_list),
    ("nothing", |_, _| {}),
];

type Change = fn(&mut Inventory, usize);

/// Measures every change at several sizes.
///
/// # Errors
/// The kernel's.
pub fn run(recorder: &Recorder) -> Result<()> {
    let (one, _) = isolated(|| sized(recorder, 1))?;
    isolated(|| sized(recorder, 100))?;
    if recorder.quick {
        return Ok(());
    }
    let (many, more) = isolated(|| sized(recorder, 1_000))?;
    for (number, (what, _)) in CHANGES.iter().enumerate().filter(|(_, (what, _))| *what != "nothing") {
        let compare = |of: &Own, by: &Own, sizes: &str| {
            let ratios = ratios(&of[number], &by[number]);
            recorder.target(&format!("{what}, {sizes}"), &ratios, Bound::AtMost(FLAT));
        };
        compare(&many, &one, "1,000 instances against one");
        compare(&more, &many, "10,000 members more against none");
    }
    Ok(())
}

/// The agent's own time for each change, round by round.
type Own = Vec<Vec<f64>>;

/// What each change takes, and the same beside many members more that don't change.
fn sized(recorder: &Recorder, instances: usize) -> Result<(Own, Own)> {
    let groups = instances.min(100);
    let inventory = world::fleet(instances, groups, RULES);
    let mut larger = inventory.clone();
    larger.enis.extend((0..OTHERS).map(|number| {
        let eni = member(&GroupId::from("sg-0"), "other", number, 98);
        (eni.id.clone(), eni)
    }));
    compiling(recorder, &inventory, instances)?;
    let mut agent = Agent::new(inventory, world::attach(instances)?)?;
    let first = agent.change(|_| {})?;
    let at = ("instances", instances as f64);
    report(recorder, "first sync", at, &[first]);
    if instances == 1_000 {
        recorder.target(
            "first sync of 1,000 instances, s of the agent's own time",
            &[first.own() / 1e3],
            Bound::AtMost(1.0),
        );
        recorder.note("each attachment to a link waits for the kernel (synchronize_rcu under the lock of all links)");
    }
    let own = changes(recorder, &mut agent, Some(at))?;
    agent.change(|inventory| *inventory = larger)?;
    Ok((own, changes(recorder, &mut agent, None)?))
}

fn changes(recorder: &Recorder, agent: &mut Agent, at: Option<(&str, f64)>) -> Result<Own> {
    let mut all = Vec::new();
    for (what, change) in CHANGES {
        let mut timings: Vec<Timing> = Vec::new();
        for round in 0..recorder.rounds(40) {
            recorder.check()?;
            timings.push(agent.change(|inventory| change(inventory, round))?);
        }
        if let Some(at) = at {
            report(recorder, what, at, &timings);
        }
        all.push(timings.iter().map(Timing::own).collect());
    }
    Ok(all)
}

fn report(recorder: &Recorder, what: &str, at: (&str, f64), timings: &[Timing]) {
    let each = |part: fn(&Timing) -> f64| timings.iter().map(part).collect::<Vec<f64>>();
    recorder.point(what, "resolve", "ms", at, &each(|timing| timing.resolve));
    recorder.point(what, "compile and apply", "ms", at, &each(|timing| timing.apply));
    recorder.point(what, "both, waiting included", "ms", at, &each(|timing| timing.wall));
    if at.1 >= 1_000.0 && timings.len() > 1 && what != "nothing" {
        recorder.target(
            &format!("{what}, at 1,000 instances, ms of the agent's own time"),
            &each(Timing::own),
            Bound::AtMost(1.0),
        );
    }
}

/// What compiling one group's policy takes by itself.
fn compiling(recorder: &Recorder, inventory: &Inventory, instances: usize) -> Result<()> {
    if instances > 1 {
        return Ok(());
    }
    for rules in [1, 60, 1_000] {
        let mut inventory = inventory.clone();
        let networks = world::networks(true, 1_000);
        world::spread_rules(&mut inventory, rules, &networks);
        let world = [(tests::lab::scope(), inventory)].into();
        let attachments = world::attachments(1, |_| 1).into();
        let desired = Resolver::default().resolve(&world, &tests::lab::scope(), &attachments);
        let Some(spec) = desired.policies.values().next() else { continue };
        let mut times = Vec::new();
        for _ in 0..recorder.rounds(20) {
            let started = Instant::now();
            compile(spec)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        recorder.point("compile one policy of 1,000 prefixes", "compile", "ms", ("rules", rules as f64), &times);
        if rules == 60 && median(&times) > 1.0 {
            recorder.note("compiling one policy of 60 rules takes more than a millisecond");
        }
    }
    Ok(())
}

/// The group that changes: the last instance's, to which others' rules refer.
fn changing(inventory: &Inventory) -> GroupId {
    let last = EniId::from(format!("eni-{}", inventory.instances.len() - 1).as_str());
    let group = inventory.enis.get(&last).and_then(|eni| eni.groups.first());
    group.expect("an instance in a group").clone()
}

fn one_rule(inventory: &mut Inventory, round: usize) {
    let id = changing(inventory);
    if let Some(group) = inventory.groups.get_mut(&id) {
        let port = 40_000 + round as u16;
        let peer = Peer::Ipv4(Ipv4Net::default());
        group.ingress.push(world::rule(900_000 + round, Traffic::Tcp { from: port, to: port }, peer));
        if group.ingress.len() > RULES + 1 {
            group.ingress.remove(RULES);
        }
    }
}

fn one_member(inventory: &mut Inventory, round: usize) {
    let eni = member(&changing(inventory), "more", round, 99);
    inventory.enis.insert(eni.id.clone(), eni);
}

/// A member of a group that is no instance here.
fn member(group: &GroupId, kind: &str, number: usize, network: u8) -> Eni {
    let [high, low] = (number as u16).to_be_bytes();
    Eni {
        id: EniId::from(format!("eni-{kind}-{number}").as_str()),
        instance: None,
        device_index: 0,
        groups: [group.clone()].into(),
        subnet: None,
        vpc: Some(VpcId::from("vpc-1")),
        addresses: vec![IpAddr::from([10, network, high, low])],
        prefixes: Vec::new(),
        source_dest_check: true,
    }
}

/// The first instance has one group more, or less.
fn other_groups(inventory: &mut Inventory, round: usize) {
    let more = world::group("sg-more");
    if let Some(eni) = inventory.enis.get_mut(&EniId::from("eni-0"))
        && (round.is_multiple_of(2) || !eni.groups.remove(&more.id))
    {
        eni.groups.insert(more.id.clone());
    }
    if !inventory.groups.contains_key(&more.id) {
        inventory.groups.insert(more.id.clone(), more);
    }
}

fn long_list(inventory: &mut Inventory, round: usize) {
    let id = PrefixListId::from("pl-long");
    let mut entries: std::collections::BTreeSet<IpNet> = world::networks(true, ENTRIES).into_iter().collect();
    // One entry differs from round to round.
    let other = Ipv4Net::new_assert(Ipv4Addr::from(0xc000_0000 + ((round as u32) << 8)), 24);
    entries.insert(IpNet::V4(other));
    inventory
        .prefix_lists
        .insert(id.clone(), PrefixList { id: id.clone(), version: round as i64, entries: entries.into() });
    let group = changing(inventory);
    if let Some(group) = inventory.groups.get_mut(&group) {
        group.ingress.retain(|rule| rule.peer != Peer::PrefixList(id.clone()));
        group.ingress.push(world::rule(800_000, Traffic::Tcp { from: 443, to: 443 }, Peer::PrefixList(id)));
    }
}
