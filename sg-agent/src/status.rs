//! What `sg-agent status --json` prints: a stable interface. Fields are only ever added.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sg_common::abi::{self, Count, Direction};
use sg_common::verdict::{Drop, Pass};

use crate::apply::{Snapshot, Usage};
use crate::datapath::Maps;
use crate::gateway::GatewayStatus;
use crate::model::Warning;
use crate::proxy::PortCounters;
use crate::resolve::{Interface, PolicyKey, Spec};

/// How things stand.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Counts the commits of this agent.
    pub generation: u64,
    /// Whether what is desired is enforced.
    pub enforced: bool,
    /// What stands in the way, if it isn't.
    pub problems: Vec<String>,
    /// Where rules come from.
    pub sources: Vec<SourceStatus>,
    /// What is attached.
    pub interfaces: Vec<InterfaceStatus>,
    /// Published ports.
    pub published: Vec<PortCounters>,
    /// The gateway to the endpoint, if there is one.
    #[serde(default)]
    pub gateway: Option<GatewayStatus>,
    /// Connections through all published ports, flows of datagrams included.
    pub published_connections: usize,
    /// How many there can be, by the limit of open files.
    pub published_connections_limit: usize,
    /// What the rule maps hold.
    pub usage: Usage,
    /// And could hold.
    pub capacity: Usage,
    /// Changes that were refused whole since the start, for want of room or by the kernel.
    pub refused_changes: u64,
    /// Flows that can still be tracked (ENA's name; SG-3.6), as of the last sweep, some seconds ago. How many were
    /// dropped for want of room is among the interfaces' counters: `conntrack_allowance_exceeded`.
    pub conntrack_allowance_available: u32,
    /// What somebody else had changed in the kernel and was put right, since the start, by kind: `program_detached`,
    /// `program_preceded`, `program_unpinned`, `map_altered`, `gate_removed`.
    pub repairs: BTreeMap<String, u64>,
    /// Lines of the drop log (`--log-drops`) that there was no room for; the packets are among the counters all the same.
    #[serde(default)]
    pub lost_log_lines: u64,
    /// What is enforced otherwise than somebody might expect.
    pub warnings: Vec<Warning>,
}

/// What the daemon knows beside what is enforced.
#[derive(Debug)]
pub struct Report {
    /// Where rules come from.
    pub sources: Vec<SourceStatus>,
    /// Published ports.
    pub published: Vec<PortCounters>,
    /// The gateway.
    pub gateway: Option<GatewayStatus>,
    /// Connections through them, and how many there can be.
    pub connections: (usize, usize),
    /// See [`Status::warnings`].
    pub warnings: BTreeSet<Warning>,
    /// See [`Status::problems`].
    pub problems: Vec<String>,
    /// See [`Status::refused_changes`].
    pub refused: u64,
    /// Flows that are tracked.
    pub flows: u32,
    /// See [`Status::repairs`].
    pub repairs: BTreeMap<String, u64>,
}

/// What `sg-agent ports --json` prints, a list of them: a stable interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Whose port.
    pub instance: String,
    /// The instance's port.
    pub port: u16,
    /// The host's.
    pub host_port: u16,
}

impl From<&PortCounters> for PublishedPort {
    fn from(counters: &PortCounters) -> Self {
        Self { instance: counters.instance.clone(), port: counters.port, host_port: counters.host_port }
    }
}

/// An endpoint or file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SourceStatus {
    /// Its URL or path.
    pub source: String,
    /// The account.
    pub account: String,
    /// The region.
    pub region: String,
    /// Seconds since the last successful read; none if there was none.
    pub age_seconds: Option<f64>,
    /// Why the last read failed, if it did.
    pub error: Option<String>,
}

/// One attached interface.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// The instance.
    pub instance: String,
    /// Its network interface, if the control plane knows it.
    pub eni: Option<String>,
    /// The account.
    pub account: String,
    /// The region.
    pub region: String,
    /// The host-side link.
    pub link: String,
    /// Its index.
    pub ifindex: u32,
    /// Whether the programs are on it.
    pub attached: bool,
    /// MAC address.
    pub mac: String,
    /// Own addresses, the primary one first; delegated IPv6 prefixes last.
    pub addresses: Vec<String>,
    /// Security groups.
    pub groups: Vec<String>,
    /// `groups`, `no_group` (everything is allowed) or `unknown` (everything is denied).
    pub policy: String,
    /// The number of the compiled policy.
    pub policy_number: u32,
    /// The policy's epoch: it changes with every change of the rules.
    pub epoch: u32,
    /// Its ingress rules.
    pub ingress_rules: usize,
    /// Its egress rules.
    pub egress_rules: usize,
    /// The network ACL, where one restricts anything.
    pub network_acl: Option<String>,
    /// Flows that it can still have tracked (ENA's name; SG-3.6). How many were dropped beyond is among its counters:
    /// `conntrack_allowance_exceeded`.
    pub conntrack_allowance_available: u32,
    /// Packets and bytes by direction (`ingress`, `egress`) and reason.
    pub counters: BTreeMap<String, BTreeMap<String, Counter>>,
}

/// Packets and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl From<Count> for Counter {
    fn from(count: Count) -> Self {
        Self { packets: count.packets, bytes: count.bytes }
    }
}

impl Status {
    /// Puts it together.
    pub fn new(snapshot: &Snapshot, maps: &Maps, report: Report) -> Self {
        let Report { sources, published, gateway, connections, warnings, mut problems, refused, flows, repairs } =
            report;
        let enis: Vec<u32> = snapshot.interfaces.values().map(|enforced| enforced.entry.eni).collect();
        let counters = maps.counters(&enis).unwrap_or_else(|error| {
            problems.push(format!("cannot read the counters: {error}"));
            Default::default()
        });
        for source in &sources {
            match (&source.error, source.age_seconds) {
                (Some(error), _) => problems.push(error.clone()),
                (None, None) => problems.push(format!("{} was not read yet", source.source)),
                (None, Some(_)) => {}
            }
        }
        let interfaces = snapshot.interfaces.iter().map(|(&ifindex, enforced)| {
            let (interface, entry) = (&enforced.interface, &enforced.entry);
            let binding = snapshot.tables.bindings.get(&entry.groups).copied().unwrap_or_default();
            let (ingress_rules, egress_rules) = match snapshot.policies.get(&interface.policy) {
                Some(Spec::Groups(groups)) => (groups.ingress.len(), groups.egress.len()),
                _ => (0, 0),
            };
            let mut by_direction: BTreeMap<String, BTreeMap<String, Counter>> = BTreeMap::new();
            for (&(_, direction, reason), &count) in counters.range((entry.eni, 0, 0)..=(entry.eni, u8::MAX, u8::MAX)) {
                let is_ingress = direction == Direction::Ingress as u8;
                let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
                let by_reason = by_direction.entry(direction.name().into()).or_default();
                by_reason.insert(reason_name(reason), count.into());
            }
            InterfaceStatus {
                instance: interface.instance.to_string(),
                eni: interface.eni.as_ref().map(ToString::to_string),
                account: interface.scope.account.to_string(),
                region: interface.scope.region.to_string(),
                link: interface.link.clone(),
                ifindex,
                attached: enforced.attached,
                mac: interface.mac.map(|byte| format!("{byte:02x}")).join(":"),
                addresses: own_addresses(interface),
                groups: interface.groups.iter().map(ToString::to_string).collect(),
                policy: match interface.policy {
                    PolicyKey::Unknown => "unknown",
                    PolicyKey::NoGroup => "no_group",
                    PolicyKey::Groups(..) | PolicyKey::Acl(..) => "groups",
                }
                .into(),
                policy_number: binding.policy,
                epoch: binding.epoch,
                ingress_rules,
                egress_rules,
                network_acl: interface.acl.as_ref().and_then(|key| match key {
                    PolicyKey::Acl(_, acl) => Some(acl.to_string()),
                    _ => None,
                }),
                conntrack_allowance_available: snapshot
                    .tables
                    .config
                    .allowance
                    .saturating_sub(maps.tracked(entry.eni).unwrap_or(0)),
                counters: by_direction,
            }
        });
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            generation: snapshot.generation,
            interfaces: interfaces.collect(),
            enforced: problems.is_empty(),
            problems,
            sources,
            published,
            gateway,
            published_connections: connections.0,
            published_connections_limit: connections.1,
            usage: snapshot.usage,
            capacity: Usage::CAPACITY,
            refused_changes: refused,
            conntrack_allowance_available: abi::MAX_FLOWS.saturating_sub(flows),
            repairs,
            lost_log_lines: maps.lost_lines().unwrap_or_default(),
            warnings: warnings.into_iter().collect(),
        }
    }
}

/// Its addresses, then its delegated prefixes.
fn own_addresses(interface: &Interface) -> Vec<String> {
    let addresses = interface.addresses.iter().map(ToString::to_string);
    addresses.chain(interface.prefixes.iter().map(ToString::to_string)).collect()
}

/// The name of a verdict's number; the number itself if programs are newer than this agent.
fn reason_name(number: u8) -> String {
    let pass = Pass::from_number(number).map(Pass::name);
    let drop = Drop::from_number(number).map(Drop::name);
    pass.or(drop).map_or_else(|| number.to_string(), ToString::to_string)
}
