//! What comes of resolving: the state that the data path is to be brought to, as values.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::exempt::Service;
use crate::model::{AclId, EniId, GroupId, InstanceId, Peer, RuleId, Scope, Traffic, Warning};
use crate::sharing::{Set, Table};

/// An address or delegated prefix, as seen from the VPC with this number.
pub type Place = (u32, IpNet);

/// The state that the data path is to be brought to. It shares with the last one whatever is the same.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Desired {
    /// Attached interfaces, by the index of the host-side link.
    pub interfaces: Table<u32, Interface>,
    /// The policies that they refer to.
    pub policies: Table<PolicyKey, Spec>,
    /// What rules and ACLs ask of addresses and delegated prefixes, as seen from each VPC.
    pub members: Table<Place, Membership>,
    /// Services that nothing filters (SG-4.1), in each VPC.
    pub exempt: Set<(u32, Service)>,
    /// What is enforced otherwise than somebody might expect.
    pub warnings: Set<Warning>,
}

/// Where an address, or every address of a delegated prefix, belongs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Membership {
    /// The referenced groups that it is in, by their numbers.
    pub groups: BTreeSet<u32>,
    /// Its subnet's number, if a network ACL asks.
    pub subnet: Option<u32>,
}

/// One interface to enforce.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// The link, as discovered.
    pub link: String,
    /// Whose it is.
    pub instance: InstanceId,
    /// In which account and region.
    pub scope: Scope,
    /// Which of its interfaces; `None` where the control plane doesn't know the instance.
    pub eni: Option<EniId>,
    /// The groups that apply.
    pub groups: BTreeSet<GroupId>,
    /// Its groups' policy.
    pub policy: PolicyKey,
    /// Its subnet's network ACL, where that restricts anything.
    pub acl: Option<PolicyKey>,
    /// Its VPC's number.
    pub vpc: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its own addresses, the primary ones of both families first.
    pub addresses: Vec<IpAddr>,
    /// Its delegated IPv6 prefixes, which are own addresses as well (SG-1.9).
    pub prefixes: Vec<IpNet>,
    /// The networks of its subnet (SG-5.2).
    pub subnet: Vec<IpNet>,
    /// Its subnet's number, where a network ACL asks.
    pub subnet_number: Option<u32>,
    /// SG-4.3.
    pub source_dest_check: bool,
}

/// What makes two interfaces share a policy.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PolicyKey {
    /// Exactly these groups.
    Groups(Scope, BTreeSet<GroupId>),
    /// This network ACL.
    Acl(Scope, AclId),
    /// No group at all (SG-2.5).
    NoGroup,
    /// An instance that the control plane doesn't know: nothing is allowed.
    Unknown,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Groups(scope, groups) => {
                let groups: Vec<&str> = groups.iter().map(|group| &*group.0).collect();
                write!(f, "{} ({scope})", groups.join(", "))
            }
            Self::Acl(scope, acl) => write!(f, "{acl} ({scope})"),
            Self::NoGroup => f.write_str("interfaces without a group"),
            Self::Unknown => f.write_str("unknown instances"),
        }
    }
}

/// A policy's rules, with everything that they refer to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Spec {
    /// Of a set of groups.
    Groups(GroupSpec),
    /// Of a network ACL.
    Acl(AclRules),
}

/// The rules of a set of groups.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupSpec {
    /// What may come in.
    pub ingress: Vec<Allowance>,
    /// What may go out.
    pub egress: Vec<Allowance>,
}

/// The entries of a network ACL, ascending.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AclRules {
    /// Inbound.
    pub ingress: Vec<AclSpec>,
    /// Outbound.
    pub egress: Vec<AclSpec>,
}

/// A group's rule, resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Allowance {
    /// The rule's id.
    pub id: RuleId,
    /// The group that has it.
    pub group: GroupId,
    /// What it allows.
    pub traffic: Traffic,
    /// From or to whom, as the rule says it.
    pub peer: Peer,
    /// The same as networks, or as a group's number.
    pub peers: Peers,
}

impl Allowance {
    /// Whether the rule's source is literally `0.0.0.0/0` (true) or `::/0` (false); a prefix list's isn't (SG-3.2).
    pub fn any_source_family(&self) -> Option<bool> {
        match &self.peer {
            Peer::Ipv4(network) if network.prefix_len() == 0 => Some(true),
            Peer::Ipv6(network) if network.prefix_len() == 0 => Some(false),
            _ => None,
        }
    }

    /// Whether it is one of the two.
    pub fn is_any_source(&self) -> bool {
        self.any_source_family().is_some()
    }
}

/// A network ACL's entry, resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AclSpec {
    /// Its number.
    pub number: u32,
    /// Whether it allows, or denies.
    pub allow: bool,
    /// What it is about.
    pub traffic: Traffic,
    /// From or to whom.
    pub peers: Peers,
}

/// Whom a rule names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peers {
    /// These networks.
    Networks(Arc<BTreeSet<IpNet>>),
    /// The members of the group with this number (SG-1.9).
    Group(u32),
}
