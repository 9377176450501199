//! What one packet costs in the programs, net of what running any program costs: tracked, untracked, new, denied, over
//! rules, prefixes, instances and flows.

mod subject;

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Result, ensure};
use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass};

use crate::gun::{End, Gun, Lookup};
use crate::isolated;
use crate::record::{Bound, Recorder, median, ratios};
use crate::world::Agent;
use subject::{Subject, agent};
use tests::programs;

/// New flows that are measured at once: few enough that as many fit beside a table that is nearly full.
const BURST: u32 = 16_384;
/// Packets of known flows that are measured at once.
const HITS: u32 = 65_536;
/// Flows in a table that is called full: seven eighths of what it holds, as many as fit with one burst beside.
const FULL: u32 = sg_common::abi::MAX_FLOWS / 8 * 7;
/// The published design's costs of aws-network-policy-agent in nanoseconds, measured the same way, and the part of them
/// that is aimed at.
const PEER: f64 = 0.6;

/// What is there before the packets that are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Table {
    /// Whatever was there.
    AsItIs,
    /// No flow.
    Fresh,
    /// [`FULL`] other flows.
    Full,
    /// The packets' own flows.
    Known,
}

/// One figure.
struct Shot {
    figure: &'static str,
    variant: String,
    at: Option<(&'static str, f64)>,
    direction: Direction,
    gun: Gun,
    /// What comes before: the flows that fill the table, or the handshakes of those that are to be known.
    before: Vec<(Direction, Gun)>,
    lookup: Option<Lookup>,
    flows: u32,
    burst: u32,
    table: Table,
    expected: u8,
    eni: u32,
    costs: Vec<f64>,
    lookups: Vec<f64>,
}

/// Measures everything.
///
/// # Errors
/// The kernel's; packets that met another fate than the one that is measured.
pub fn run(recorder: &Recorder) -> Result<()> {
    isolated(|| {
        let mut agent = agent(subject::ALL.len())?;
        let mut shots = Vec::new();
        for is_v4 in [true, false] {
            subject::shots(&agent, is_v4, recorder.quick, &mut shots)?;
        }
        measure(recorder, &mut agent, &mut shots)?;
        targets(recorder, &shots);
        Ok(())
    })?;
    let many = if recorder.quick { 100 } else { 1_000 };
    for instances in [subject::ALL.len(), many] {
        isolated(|| {
            let mut agent = agent(instances)?;
            let mut shots = Vec::new();
            for is_v4 in [true, false] {
                subject::few(&agent, is_v4, ("instances", instances as f64), &mut shots)?;
            }
            measure(recorder, &mut agent, &mut shots)
        })?;
    }
    Ok(())
}

fn measure(recorder: &Recorder, agent: &mut Agent, shots: &mut [Shot]) -> Result<()> {
    let null = programs::returning(programs::NEXT)?;
    for round in 0..recorder.rounds(16) {
        for shot in shots.iter_mut() {
            recorder.check()?;
            shot.round(agent, &null)?;
        }
        if round == 0 {
            // The first one warms caches, and makes entries that come with the first packet of a kind.
            shots.iter_mut().for_each(|shot| (shot.costs.clear(), shot.lookups.clear()).0);
        }
    }
    for shot in shots.iter() {
        match shot.at {
            Some(at) => recorder.point(shot.figure, &shot.variant, "ns", at, &shot.costs),
            None => recorder.sample(shot.figure, &shot.variant, "ns", &shot.costs),
        }
        if !shot.lookups.is_empty() {
            let name = format!("bare look-up, {}", shot.variant);
            recorder.point(shot.figure, &name, "ns", ("flows", f64::from(shot.flows)), &shot.lookups);
        }
    }
    Ok(())
}

impl Shot {
    fn round(&mut self, agent: &mut Agent, null: &OwnedFd) -> Result<()> {
        match self.table {
            Table::AsItIs => {}
            Table::Fresh => agent.forget_flows()?,
            Table::Known | Table::Full => {
                agent.forget_flows()?;
                let flows = if self.table == Table::Full { FULL } else { self.flows };
                for (direction, gun) in &self.before {
                    gun.rewind()?;
                    gun.fire(program(agent, *direction)?.as_fd(), flows)?;
                }
            }
        }
        self.gun.rewind()?;
        let nothing = self.gun.fire(null.as_fd(), self.burst)?;
        if let Some(lookup) = &self.lookup {
            self.lookups.push(self.gun.fire(lookup.program(), self.burst)? - nothing);
        }
        self.gun.rewind()?;
        let before = counted(agent, self.eni, self.direction, self.expected)?;
        let cost = self.gun.fire(program(agent, self.direction)?.as_fd(), self.burst)?;
        let moved = counted(agent, self.eni, self.direction, self.expected)? - before;
        ensure!(
            moved == u64::from(self.burst),
            "{}, {}: {moved} of {} packets met the fate that is measured (reason {})",
            self.figure,
            self.variant,
            self.burst,
            self.expected
        );
        self.costs.push(cost - nothing);
        Ok(())
    }
}

fn program(agent: &mut Agent, direction: Direction) -> Result<OwnedFd> {
    let (datapath, _) = agent.applier.datapath();
    Ok(datapath.program(direction)?.fd()?.as_fd().try_clone_to_owned()?)
}

/// How many packets of an interface had this fate.
fn counted(agent: &Agent, eni: u32, direction: Direction, reason: u8) -> Result<u64> {
    let counters = agent.applier.maps().counters(&[eni])?;
    Ok(counters.get(&(eni, direction as u8, reason)).map_or(0, |count| count.packets))
}

fn targets(recorder: &Recorder, shots: &[Shot]) {
    let find = |figure: &str, variant: &str, at: Option<(&str, f64)>| {
        let found = shots.iter().find(|shot| shot.figure == figure && shot.variant == variant && shot.at == at);
        found.map(|shot| shot.costs.clone()).unwrap_or_default()
    };
    for shot in shots.iter().filter(|shot| !shot.lookups.is_empty()) {
        let what = format!("{}, {}, {} flows / a bare look-up", shot.figure, shot.variant, shot.flows);
        recorder.target(&what, &ratios(&shot.costs, &shot.lookups), Bound::AtMost(2.5));
    }
    for variant in ["IPv4", "IPv6"] {
        let one = find(NEW_LAST, variant, Some(("rules", 1.0)));
        let many = find(NEW_SPREAD, variant, Some(("prefixes", 60_000.0)));
        let what = format!("new flow at 1,000 rules and 60,000 spread prefixes / at 1 rule, {variant}");
        recorder.target(&what, &ratios(&many, &one), Bound::AtMost(2.0));
        let (denied, allowed) = (find(DENIED, variant, None), find(NEW_SPREAD, variant, Some(("prefixes", 1_000.0))));
        let what = format!("denied / allowed new flow, {variant}");
        recorder.target(&what, &ratios(&denied, &allowed), Bound::AtMost(1.0));
    }
    let v4 = shots.iter().filter(|shot| shot.variant == "IPv4");
    for shot in v4 {
        let v6 = find(shot.figure, "IPv6", shot.at);
        let place = shot.at.map(|(axis, at)| format!(" at {at} {axis}")).unwrap_or_default();
        let what = format!("{}{place}, IPv6 / IPv4", shot.figure);
        recorder.target(&what, &ratios(&v6, &shot.costs), Bound::AtMost(1.4));
    }
    let peers = [
        ("established, forward", find(FORWARD, "IPv4", Some(("flows", 1.0))), 113.0),
        ("established, reply", find(REPLY, "IPv4", Some(("flows", 1.0))), 137.0),
        ("new flow", find(NEW_LAST, "IPv4", Some(("rules", 60.0))), 583.0),
        ("new flow, table full", find(NEW_FULL, "IPv4", None), 990.0),
        ("new flow at 60,000 spread prefixes", find(NEW_SPREAD, "IPv4", Some(("prefixes", 60_000.0))), 1_708.0),
        ("denied", find(DENIED, "IPv4", None), 170.0),
    ];
    for (what, costs, peer) in peers {
        let ratios: Vec<f64> = costs.iter().map(|cost| cost / peer).collect();
        recorder.target(&format!("{what} / aws-network-policy-agent's {peer} ns"), &ratios, Bound::AtMost(PEER));
        if !costs.is_empty() {
            recorder.sample("beside aws-network-policy-agent", what, "ns", &[median(&costs)]);
        }
    }
}

const FORWARD: &str = "established, forward";
const REPLY: &str = "established, reply";
const UNTRACKED: &str = "untracked";
const NEW_FIRST: &str = "new flow, first rule, one source";
const NEW_LAST: &str = "new flow, last rule, one source";
const NEW_SPREAD: &str = "new flow, spread sources";
const NEW_FULL: &str = "new flow, spread sources, table full";
const NEW_UDP: &str = "new flow, UDP";
const NEW_GROUP: &str = "new flow, group reference";
const DENIED: &str = "denied, spread sources";
const DENIED_PORT: &str = "denied, no rule for the port";

fn shot<'a>(subject: &'a Subject, figure: &'static str, is_v4: bool, expected: Result<Pass, Drop>) -> ShotBuilder<'a> {
    ShotBuilder { subject, figure, is_v4, expected, at: None, table: Table::AsItIs, direction: Direction::Ingress }
}

/// A figure that isn't ready yet.
#[derive(Clone, Copy)]
struct ShotBuilder<'a> {
    subject: &'a Subject,
    figure: &'static str,
    is_v4: bool,
    expected: Result<Pass, Drop>,
    at: Option<(&'static str, f64)>,
    table: Table,
    direction: Direction,
}

impl ShotBuilder<'_> {
    fn at(self, axis: &'static str, at: f64) -> Self {
        Self { at: Some((axis, at)), ..self }
    }

    fn table(self, table: Table) -> Self {
        Self { table, ..self }
    }

    fn reply(self) -> Self {
        Self { direction: Direction::Egress, ..self }
    }

    /// With packets that have these ends; `fill` are those of the flows in a full table.
    fn with(self, packet: fn(&Subject, bool) -> Frames, ends: &[End], fill: &[End]) -> Result<Shot> {
        let subject = self.subject;
        let frames = packet(subject, self.is_v4);
        let is_reply = self.direction == Direction::Egress;
        let gun = |frame: &[u8], is_source, ends| Gun::new(frame.to_vec(), subject.ifindex, is_source, ends);
        let before = match self.table {
            Table::AsItIs | Table::Fresh => Vec::new(),
            Table::Full => vec![(Direction::Ingress, gun(&frames.open, true, fill)?)],
            Table::Known => vec![
                (Direction::Ingress, gun(&frames.open, true, ends)?),
                (Direction::Egress, gun(&frames.answer, false, ends)?),
                (Direction::Ingress, gun(&frames.forth, true, ends)?),
            ],
        };
        let lookup = (self.table == Table::Known).then(|| Lookup::new(!is_reply, ends)).transpose()?;
        Ok(Shot {
            figure: self.figure,
            variant: if self.is_v4 { "IPv4" } else { "IPv6" }.to_owned(),
            at: self.at,
            direction: self.direction,
            gun: gun(if is_reply { &frames.back } else { &frames.forth }, !is_reply, ends)?,
            before,
            lookup,
            flows: ends.len() as u32,
            burst: if self.table == Table::Known { HITS.max(ends.len() as u32) } else { BURST },
            table: self.table,
            expected: sg_common::verdict::number(&self.expected),
            eni: subject.eni,
            costs: Vec::new(),
            lookups: Vec::new(),
        })
    }
}

/// The packets of one kind of flow.
struct Frames {
    /// Begins it.
    open: Vec<u8>,
    /// Answers that.
    answer: Vec<u8>,
    /// Goes on with it.
    forth: Vec<u8>,
    /// The same from the other side.
    back: Vec<u8>,
}
