//! `explain`: would this packet pass, which rule lets it, and if none does, which one nearly did.
//!
//! The verdict is that of the kernel's own functions over the same tables (`decide`); the oracle only finds the rule's
//! name. Where the two disagree, that is said.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sg_common::abi::{Direction, HAS_RULES};
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use sg_common::policy::Tables as _;
use sg_common::verdict::Drop;

use crate::apply::{Enforced, Snapshot};
use crate::decide;
use crate::model::{GroupId, InstanceId, Peer, Traffic};
use crate::oracle::{self, Question};
use crate::resolve::{Allowance, PolicyKey, Spec};

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Query {
    /// The instance whose primary interface is looked at, or the id of one of its interfaces.
    pub instance: InstanceId,
    /// The other side.
    pub peer: Party,
    /// The upper-layer protocol's number.
    pub protocol: u8,
    /// The destination port, or ICMP type << 8 | code.
    pub port: u16,
    /// Whether the instance sends the packet.
    pub egress: bool,
    /// Whether the attached programs are asked as well.
    pub live: bool,
}

/// The other side of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Party {
    /// Somewhere.
    Address(IpAddr),
    /// Another instance: its own gate is asked too (SG-2.3).
    Instance(InstanceId),
}

/// The answer. Stable: fields are only added.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// Whether the packet passes every gate.
    pub allowed: bool,
    /// Each gate that it meets, in order.
    pub gates: Vec<Gate>,
    /// Whether the attached programs judged otherwise somewhere (`--live`): a defect, which should be reported.
    pub kernel_disagrees: bool,
}

/// One interface's verdict in one direction.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Gate {
    /// Whose interface.
    pub instance: InstanceId,
    /// Which one.
    pub eni: Option<String>,
    /// Its host-side link.
    pub link: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// The address on the other side.
    pub peer: IpAddr,
    /// Whether the packet passes here.
    pub allowed: bool,
    /// Why not: a code of AWS's Reachability Analyzer where one fits (SG-7.2), else the data path's reason.
    pub reason: Option<String>,
    /// The rule that lets it through.
    pub rule: Option<RuleText>,
    /// If nothing does: the rule that comes nearest, and what it lacks.
    pub nearest: Option<NearMiss>,
    /// What the attached programs said of such a packet (`--live`); none where they weren't asked.
    pub kernel: Option<bool>,
    /// In a sentence.
    pub text: String,
}

/// A rule, for people and scripts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RuleText {
    /// Its id.
    pub id: String,
    /// The group that has it.
    pub group: GroupId,
    /// `tcp 22`, `all traffic`, ...
    pub traffic: String,
    /// A network, group or prefix list.
    pub peer: String,
}

/// A rule that doesn't match, and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NearMiss {
    /// The rule.
    pub rule: RuleText,
    /// What doesn't fit: `peer` or `traffic`.
    pub mismatch: String,
}

/// A question that can't be answered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExplainError {
    /// Nothing is enforced for it.
    #[error("instance {0} is not attached here; 'sg-agent status' lists those that are")]
    NotAttached(InstanceId),
    /// Its interface has no address.
    #[error("instance {0} has no address yet; 'sg-agent status' shows those that are known")]
    NoAddress(InstanceId),
    /// Its interface has no address of the other side's family.
    #[error("instance {0} has no address to talk to {1} from; ask with an address of the other family")]
    NoAddressFor(InstanceId, IpAddr),
}

/// Answers `query` by what `snapshot` says is enforced.
///
/// # Errors
/// [`ExplainError`]
pub fn explain(snapshot: &Snapshot, query: &Query) -> Result<Explanation, ExplainError> {
    let own = interface_of(snapshot, &query.instance)?;
    let direction = if query.egress { Direction::Egress } else { Direction::Ingress };
    let gate = |at: (u32, &Enforced), direction, peer| gate(snapshot, at, direction, peer, query);
    let gates = match &query.peer {
        Party::Address(address) => vec![gate(own, direction, *address)],
        Party::Instance(other) => {
            let peer = interface_of(snapshot, other)?;
            let its = address_of(peer.1).ok_or_else(|| ExplainError::NoAddress(other.clone()))?;
            let ours =
                address_for(own.1, its).ok_or_else(|| ExplainError::NoAddressFor(query.instance.clone(), its))?;
            let own_gate = gate(own, direction, its);
            let peer_gate = gate(peer, direction.reverse(), ours);
            // In the packet's order: the sender's first.
            if query.egress { vec![own_gate, peer_gate] } else { vec![peer_gate, own_gate] }
        }
    };
    Ok(Explanation { allowed: gates.iter().all(|gate| gate.allowed), gates, kernel_disagrees: false })
}

/// An instance's primary interface, or the one with this id.
fn interface_of<'a>(snapshot: &'a Snapshot, instance: &InstanceId) -> Result<(u32, &'a Enforced), ExplainError> {
    let primary = snapshot.interfaces_of(instance).first().copied();
    let found = primary.or_else(|| {
        let is_it = |enforced: &Enforced| enforced.interface.eni.as_ref().is_some_and(|eni| eni.0 == instance.0);
        let by_eni = snapshot.interfaces.iter().find(|(_, enforced)| is_it(enforced));
        by_eni.map(|(&ifindex, enforced)| (ifindex, enforced))
    });
    found.ok_or_else(|| ExplainError::NotAttached(instance.clone()))
}

fn address_of(enforced: &Enforced) -> Option<IpAddr> {
    enforced.interface.addresses.first().copied()
}

fn address_for(enforced: &Enforced, peer: IpAddr) -> Option<IpAddr> {
    enforced.interface.addresses.iter().find(|address| address.is_ipv4() == peer.is_ipv4()).copied()
}

fn gate(snapshot: &Snapshot, at: (u32, &Enforced), direction: Direction, peer: IpAddr, query: &Query) -> Gate {
    let (ifindex, enforced) = at;
    let interface = &enforced.interface;
    let verdict = decide::admits(snapshot, ifindex, direction, peer, query.protocol, query.port).verdict;
    let question = Question { peer, protocol: query.protocol, port: query.port };
    let rules = rules(snapshot, &interface.policy, direction);
    let vpc = interface.vpc;
    let is_member = |address: IpAddr, group: u32| {
        let member = snapshot.tables.member(vpc, &address.into());
        member.is_some_and(|member| member.groups.iter().take(member.count as usize).any(|&its| its == group))
    };
    let allowing = oracle::allowing(rules, &is_member, &question);
    let reason = verdict.err().map(|drop| reason(snapshot, enforced, direction, drop));
    let nearest = if allowing.is_none() { nearest(rules, &is_member, &question) } else { None };
    let mut gate = Gate {
        instance: interface.instance.clone(),
        eni: interface.eni.as_ref().map(ToString::to_string),
        link: interface.link.clone(),
        direction: direction.name().into(),
        peer,
        allowed: verdict.is_ok(),
        reason,
        rule: allowing.filter(|_| verdict.is_ok()).map(RuleText::of),
        nearest,
        kernel: None,
        text: String::new(),
    };
    gate.text = sentence(&gate, &question, interface.groups.is_empty(), allowing.is_some());
    gate
}

/// The rules of a policy in one direction; none where it isn't known.
fn rules<'a>(snapshot: &'a Snapshot, policy: &PolicyKey, direction: Direction) -> &'a [Allowance] {
    match snapshot.policies.get(policy) {
        Some(Spec::Groups(groups)) if direction == Direction::Ingress => &groups.ingress,
        Some(Spec::Groups(groups)) => &groups.egress,
        _ => &[],
    }
}

/// SG-7.2.
fn reason(snapshot: &Snapshot, enforced: &Enforced, direction: Direction, drop: Drop) -> String {
    use sg_common::policy::Tables;
    let code = match drop {
        Drop::NoRule => {
            let policy = snapshot.tables.binding(enforced.entry.groups).policy;
            let flags = snapshot.tables.policy(sg_common::abi::table(policy, direction)).map_or(0, |table| table.flags);
            if flags & HAS_RULES == 0 { "SG_HAS_NO_RULES" } else { "ENI_SG_RULES_MISMATCH" }
        }
        Drop::Acl => "SUBNET_ACL_RESTRICTION",
        Drop::SourceAddress | Drop::SourceMac | Drop::DestinationAddress => "ENI_SOURCE_DEST_CHECK_RESTRICTION",
        other => other.name(),
    };
    code.into()
}

/// The rule that lacks least: right traffic from the wrong peer, else the right peer with the nearest traffic.
fn nearest(rules: &[Allowance], members: &impl oracle::Memberships, question: &Question) -> Option<NearMiss> {
    let by_traffic = rules
        .iter()
        .find(|rule| oracle::covers_traffic(rule.traffic, question) && same_family(&rule.peer, question.peer));
    if let Some(rule) = by_traffic.or_else(|| rules.iter().find(|rule| oracle::covers_traffic(rule.traffic, question)))
    {
        return Some(NearMiss { rule: RuleText::of(rule), mismatch: "peer".into() });
    }
    rules
        .iter()
        .filter(|rule| oracle::covers_peer(&rule.peers, members, question.peer))
        .min_by_key(|rule| distance(rule.traffic, question))
        .map(|rule| NearMiss { rule: RuleText::of(rule), mismatch: "traffic".into() })
}

fn same_family(peer: &Peer, address: IpAddr) -> bool {
    match peer {
        Peer::Ipv4(_) => address.is_ipv4(),
        Peer::Ipv6(_) => address.is_ipv6(),
        Peer::Group(_) | Peer::ForeignGroup { .. } | Peer::PrefixList(_) => true,
    }
}

/// How far the question's port is from a rule's range; another protocol is further than any port.
fn distance(traffic: Traffic, question: &Question) -> u32 {
    let (Traffic::Tcp { from, to } | Traffic::Udp { from, to }) = traffic else { return u32::MAX };
    let is_same = matches!((traffic, question.protocol), (Traffic::Tcp { .. }, TCP) | (Traffic::Udp { .. }, UDP));
    let nearest = question.port.clamp(from, to);
    u32::from(nearest.abs_diff(question.port)) + if is_same { 0 } else { 1 << 16 }
}

impl RuleText {
    fn of(rule: &Allowance) -> Self {
        Self {
            id: rule.id.to_string(),
            group: rule.group.clone(),
            traffic: traffic_text(rule.traffic),
            peer: match &rule.peer {
                Peer::Ipv4(network) => network.to_string(),
                Peer::Ipv6(network) => network.to_string(),
                Peer::Group(group) => group.to_string(),
                Peer::ForeignGroup { account, group } => format!("{account}/{group}"),
                Peer::PrefixList(list) => list.to_string(),
            },
        }
    }
}

fn traffic_text(traffic: Traffic) -> String {
    let range = |name: &str, from: u16, to: u16| match (from, to) {
        (0, u16::MAX) => format!("{name} all ports"),
        _ if from == to => format!("{name} {from}"),
        _ => format!("{name} {from}-{to}"),
    };
    let icmp = |name: &str, kind: Option<u8>, code: Option<u8>| match (kind, code) {
        (None, _) => format!("{name} all types"),
        (Some(kind), None) => format!("{name} type {kind}"),
        (Some(kind), Some(code)) => format!("{name} type {kind} code {code}"),
    };
    match traffic {
        Traffic::All => "all traffic".into(),
        Traffic::Tcp { from, to } => range("tcp", from, to),
        Traffic::Udp { from, to } => range("udp", from, to),
        Traffic::Icmp { kind, code } => icmp("icmp", kind, code),
        Traffic::Icmpv6 { kind, code } => icmp("icmpv6", kind, code),
        Traffic::Other { number } => format!("protocol {number}"),
    }
}

/// A packet's protocol and port, for people.
pub fn question_text(protocol: u8, port: u16) -> String {
    let [kind, code] = port.to_be_bytes();
    match protocol {
        TCP => format!("tcp {port}"),
        UDP => format!("udp {port}"),
        ICMP => format!("icmp type {kind} code {code}"),
        ICMPV6 => format!("icmpv6 type {kind} code {code}"),
        other => format!("protocol {other}"),
    }
}

fn sentence(gate: &Gate, question: &Question, has_no_group: bool, rules_allow: bool) -> String {
    let way = if gate.direction == Direction::Ingress.name() { "from" } else { "to" };
    let what = format!("{} {} {way} {}", gate.direction, question_text(question.protocol, question.port), gate.peer);
    if gate.allowed {
        return match &gate.rule {
            Some(_) if has_no_group => {
                format!("{what} is allowed at {}: the interface has no security group", gate.instance)
            }
            Some(rule) => {
                let (id, group) = (&rule.id, &rule.group);
                format!("{what} is allowed at {} by {id} of {group} ({}, {})", gate.instance, rule.traffic, rule.peer)
            }
            None => format!("{what} is allowed at {}: security groups do not filter this service", gate.instance),
        };
    }
    let why = gate.reason.as_deref().unwrap_or_default();
    let mut text = format!("{what} is denied at {}: {why}", gate.instance);
    match &gate.nearest {
        Some(NearMiss { rule, mismatch }) => {
            let lack = if mismatch == "peer" {
                format!("{} is not in it", gate.peer)
            } else {
                format!("this is {}", question_text(question.protocol, question.port))
            };
            text +=
                &format!("; nearest is {} of {} ({}, {}), but {lack}", rule.id, rule.group, rule.traffic, rule.peer);
        }
        None if rules_allow => text += "; the groups' rules would allow it",
        None => {}
    }
    text
}
