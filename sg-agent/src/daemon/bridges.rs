//! `--enforce-bridge`: which ports of which bridges are admitted, and when the gate is written. What it is made of is
//! `datapath`'s; whose a port is, discovery's.
//!
//! A port is admitted while it is known whose it is: an instance's while its programs are attached, a stranger's from when
//! discovery has told it from an instance's, for as long as it is that bridge's port.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::apply::{Repair, Snapshot};
use crate::datapath::{Gate, Pins, Reach};
use crate::discovery::{Discovered, Port};
use crate::model::Warning;

/// A bridge that new ports are denied at until it is known whose they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EnforcedBridge {
    /// Every bridge that has had an instance's link.
    Auto,
    /// By its name.
    Named(String),
}

/// How long nothing is said of a port that nobody knows: a container takes a moment to start.
const NEW: Duration = Duration::from_secs(5);

/// The gate, and what it goes by.
#[derive(Debug)]
pub struct Bridges {
    wanted: Vec<EnforcedBridge>,
    pins: Pins,
    /// Bridges that are closed.
    closed: BTreeSet<String>,
    /// Strangers' ports, and their bridges.
    strangers: BTreeMap<u32, String>,
    /// Ports that were not, since when.
    waiting: BTreeMap<String, Instant>,
    /// What was written, if anything was.
    written: Option<(Gate, Reach)>,
    /// Whether an earlier agent's was seen to.
    started: bool,
    error: Option<String>,
}

impl Bridges {
    /// Nothing is closed yet, unless an earlier agent has.
    pub fn new(wanted: Vec<EnforcedBridge>, pins: Pins) -> Self {
        let named = wanted.iter().filter_map(|bridge| match bridge {
            EnforcedBridge::Auto => None,
            EnforcedBridge::Named(name) => Some(name.clone()),
        });
        Self {
            closed: named.collect(),
            wanted,
            pins,
            strangers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            written: None,
            started: false,
            error: None,
        }
    }

    /// Brings the gate to what is there. Until that is `complete` for the first time, an earlier agent's stands as it is.
    pub fn settle(&mut self, discovered: &Discovered, snapshot: &Snapshot, complete: bool) {
        if !complete && !self.started {
            return;
        }
        let gate = self.gate(discovered, snapshot);
        let result = if self.wanted.is_empty() {
            if self.started { Ok(()) } else { self.pins.open_bridges().map(drop) }
        } else if self.written.as_ref().is_some_and(|(written, _)| *written == gate) {
            Ok(())
        } else {
            self.pins.close_bridges(&gate).map(|reach| self.written = Some((gate, reach)))
        };
        self.started |= result.is_ok();
        self.error = result.err().map(|error| {
            format!("bridges are NOT closed to new ports: {error}; it takes nf_tables with the family 'bridge'")
        });
    }

    /// Whether the gate still is where it was put; it is put back where it isn't.
    pub fn verify(&mut self) -> Option<Repair> {
        let (gate, _) = self.written.as_ref()?;
        let found = self.pins.has_gate().and_then(|is_there| match is_there {
            true => Ok(None),
            false => self.pins.close_bridges(gate).map(Some),
        });
        match found {
            Ok(None) => None,
            Ok(Some(_)) => Some(Repair {
                kind: "gate_removed",
                subject: "bridges".to_owned(),
                problem: "their nftables table, which keeps new ports out, had been removed",
            }),
            Err(error) => {
                self.error = Some(format!("it can't be seen whether bridges are closed to new ports: {error}"));
                None
            }
        }
    }

    /// Why bridges aren't closed.
    pub fn error(&self) -> Option<String> {
        self.error.clone()
    }

    /// What somebody may be waiting for.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> + '_ {
        let waiting = self.waiting.iter().filter(|(_, since)| since.elapsed() > NEW).map(|(name, _)| Warning {
            subject: name.clone(),
            problem: "is denied everything: it is a port of an enforced bridge, and no running container is behind it"
                .to_owned(),
        });
        let reach = self.written.as_ref().filter(|(_, reach)| *reach == Reach::All).map(|_| Warning {
            subject: "--enforce-bridge".to_owned(),
            problem: "every bridge here is closed to new ports for a moment, and while no agent runs: this kernel can't tell \
                      bridges apart (CONFIG_NFT_BRIDGE_META)"
                .to_owned(),
        });
        waiting.chain(reach)
    }

    fn gate(&mut self, discovered: &Discovered, snapshot: &Snapshot) -> Gate {
        if self.wanted.contains(&EnforcedBridge::Auto) {
            let is_enforced = |port: &&Port| snapshot.interfaces.contains_key(&port.link.ifindex);
            self.closed.extend(discovered.ports.iter().filter(is_enforced).map(|port| port.bridge.clone()));
        }
        let is_attached =
            |port: &Port| snapshot.interfaces.get(&port.link.ifindex).is_some_and(|enforced| enforced.attached);
        let (mut strangers, mut waiting, mut ports) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        for port in &discovered.ports {
            let Port { link, bridge, is_stranger } = port;
            let is_stranger = *is_stranger || self.strangers.get(&link.ifindex) == Some(bridge);
            if is_stranger {
                strangers.insert(link.ifindex, bridge.clone());
            }
            if is_stranger || is_attached(port) || !self.closed.contains(bridge) {
                ports.insert(link.ifindex);
            } else {
                waiting.insert(link.name.clone(), *self.waiting.get(&link.name).unwrap_or(&Instant::now()));
            }
        }
        (self.strangers, self.waiting) = (strangers, waiting);
        Gate { bridges: self.closed.clone(), ports }
    }
}
