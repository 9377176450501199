//! R2: the control plane's answers as typed, validated values. Owns what a rule may say; knows no wire format, no
//! packets and no maps.
//!
//! Whatever can't be understood is a [`Warning`] that names it and is left out: an invalid rule never widens anything.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sg_common::abi::DELEGATED_LENGTH;

use crate::sharing::{self, Set, Table};

mod cidr;
mod lost;
mod peer;
mod traffic;

pub use cidr::{CidrError, parse_ipv4, parse_ipv6, parse_network};
pub use peer::{PeerError, PeerFields};
pub use traffic::{IcmpField, PortEnd, TrafficError};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Arc<str>);

        impl From<&str> for $name {
            fn from(id: &str) -> Self {
                Self(id.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

ids! {
    /// `sg-...`
    GroupId,
    /// `sgr-...`, or a description where the source gives no id.
    RuleId,
    /// `i-...`; emulators' ids need not be hexadecimal.
    InstanceId,
    /// `eni-...`
    EniId,
    /// `pl-...`
    PrefixListId,
    /// `subnet-...`
    SubnetId,
    /// `vpc-...`
    VpcId,
    /// `acl-...`
    AclId,
}

/// One account's resources in one region: ids mean something only within it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Scope {
    /// The twelve-digit account.
    pub account: Arc<str>,
    /// The region, as `us-east-1`.
    pub region: Arc<str>,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.account, self.region)
    }
}

/// Everything that one scope's control plane says and enforcement needs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inventory {
    /// Security groups.
    pub groups: Table<GroupId, SecurityGroup>,
    /// Network interfaces, those of terminated instances left out.
    pub enis: Table<EniId, Eni>,
    /// Instances that are not terminated.
    pub instances: Table<InstanceId, Instance>,
    /// Those that are.
    pub terminated: Set<InstanceId>,
    /// Managed prefix lists that rules refer to, at their latest version.
    pub prefix_lists: Table<PrefixListId, PrefixList>,
    /// VPCs and their primary IPv4 networks.
    pub vpcs: Table<VpcId, Ipv4Net>,
    /// Subnets.
    pub subnets: Table<SubnetId, Subnet>,
    /// Network ACLs.
    pub acls: Table<AclId, NetworkAcl>,
    /// Active peering connections.
    pub peerings: Set<Peering>,
    /// What was left out, and why.
    pub warnings: Set<Warning>,
}

impl Inventory {
    /// Shares with the last one that was read whatever is the same.
    pub fn share(&mut self, last: &Self) {
        self.groups.share(&last.groups);
        self.enis.share(&last.enis);
        self.instances.share(&last.instances);
        sharing::share(&mut self.terminated, &last.terminated);
        self.prefix_lists.share(&last.prefix_lists);
        self.vpcs.share(&last.vpcs);
        self.subnets.share(&last.subnets);
        self.acls.share(&last.acls);
        sharing::share(&mut self.peerings, &last.peerings);
        sharing::share(&mut self.warnings, &last.warnings);
    }
}

/// Something in the control plane's answer that can't be enforced as it stands.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{subject}: {problem}")]
pub struct Warning {
    /// What it is about: a rule's, group's or list's id.
    pub subject: String,
    /// What is wrong, and what is done about it.
    pub problem: String,
}

/// A security group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SecurityGroup {
    /// Its id.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its VPC.
    pub vpc: Option<VpcId>,
    /// The account that owns it.
    pub owner: Arc<str>,
    /// What may come in.
    pub ingress: Vec<Rule>,
    /// What may go out.
    pub egress: Vec<Rule>,
}

/// One allowance: one protocol and port range, one peer (SG-1.6).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct Rule {
    /// Its id.
    pub id: RuleId,
    /// What it allows.
    pub traffic: Traffic,
    /// From or to whom.
    pub peer: Peer,
}

/// A protocol, and its ports if it has any.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase", tag = "protocol")]
pub enum Traffic {
    /// Every protocol (`-1`).
    All,
    /// TCP to a port of the range, both ends included.
    Tcp {
        /// The first port.
        from: u16,
        /// The last port.
        to: u16,
    },
    /// UDP to a port of the range, both ends included.
    Udp {
        /// The first port.
        from: u16,
        /// The last port.
        to: u16,
    },
    /// ICMP over IPv4; `None` is any. A code without a type can't be (SG-1.3).
    Icmp {
        /// The type.
        kind: Option<u8>,
        /// The code.
        code: Option<u8>,
    },
    /// ICMPv6, the same way.
    Icmpv6 {
        /// The type.
        kind: Option<u8>,
        /// The code.
        code: Option<u8>,
    },
    /// Another protocol, by its number; it has no ports (SG-1.4).
    Other {
        /// The IANA number.
        number: u8,
    },
}

/// The other side of a rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// An IPv4 network, canonical (SG-1.7).
    Ipv4(Ipv4Net),
    /// An IPv6 network, canonical.
    Ipv6(Ipv6Net),
    /// The members of a group of the same account (SG-1.9).
    Group(GroupId),
    /// The members of another account's group, across a peering connection (SG-1.12).
    ForeignGroup {
        /// The account that owns it.
        account: Arc<str>,
        /// The group.
        group: GroupId,
    },
    /// A managed prefix list (SG-1.8).
    PrefixList(PrefixListId),
}

/// Two VPCs with an active peering connection.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Peering {
    /// The smaller end.
    pub one: PeeredVpc,
    /// The other end.
    pub other: PeeredVpc,
}

impl Peering {
    /// The same whichever end is named first.
    pub fn between(one: PeeredVpc, other: PeeredVpc) -> Self {
        if one <= other { Self { one, other } } else { Self { one: other, other: one } }
    }
}

/// One end of a peering connection.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PeeredVpc {
    /// The VPC.
    pub vpc: VpcId,
    /// The account that owns it, if the source says.
    pub account: Option<Arc<str>>,
    /// Its region, if the source says.
    pub region: Option<Arc<str>>,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Eni {
    /// Its id.
    pub id: EniId,
    /// The instance that it is attached to.
    pub instance: Option<InstanceId>,
    /// Its place on that instance; 0 is the primary one.
    pub device_index: u32,
    /// The groups that apply to it, as AWS would have them (sorted, once each).
    pub groups: BTreeSet<GroupId>,
    /// Its subnet.
    pub subnet: Option<SubnetId>,
    /// Its VPC.
    pub vpc: Option<VpcId>,
    /// Its private addresses, the primary IPv4 one first; secondary and IPv6 ones included, public ones never
    /// (SG-1.9).
    pub addresses: Vec<IpAddr>,
    /// Prefixes delegated to it.
    pub prefixes: Vec<IpNet>,
    /// SG-4.3.
    pub source_dest_check: bool,
}

impl Eni {
    /// Every private address of it: its own, and those of its delegated IPv4 prefixes (/28 in AWS). A larger prefix, as
    /// IPv6's /80, has no list of addresses; see [`Eni::unlisted_prefixes`].
    pub fn private_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let listed = self.prefixes.iter().filter(|prefix| is_listed(prefix));
        let delegated = listed.flat_map(|prefix| prefix.subnets(prefix.max_prefix_len()).into_iter().flatten());
        self.addresses.iter().copied().chain(delegated.map(|address| address.network()))
    }

    /// Whether EC2 delegates prefixes such as this one and the tables can hold it: an IPv6 one of 80 bits.
    pub fn is_delegable(prefix: &IpNet) -> bool {
        matches!(prefix, IpNet::V6(prefix) if prefix.prefix_len() == DELEGATED_LENGTH)
    }

    /// Delegated prefixes whose addresses are too many to be listed.
    pub fn unlisted_prefixes(&self) -> impl Iterator<Item = &IpNet> {
        self.prefixes.iter().filter(|prefix| !is_listed(prefix))
    }
}

/// At most 256 addresses.
fn is_listed(prefix: &IpNet) -> bool {
    prefix.max_prefix_len() - prefix.prefix_len() <= 8
}

/// An instance.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Its name tag, if it has one.
    pub name: Option<String>,
    /// `pending`, `running`, `stopping`, `stopped`, `shutting-down`.
    pub state: String,
    /// Its interfaces, by device index.
    pub enis: Vec<EniId>,
}

/// A managed prefix list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrefixList {
    /// Its id.
    pub id: PrefixListId,
    /// Its version.
    pub version: i64,
    /// Its networks, all of one family, canonical.
    pub entries: Arc<BTreeSet<IpNet>>,
}

/// A subnet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subnet {
    /// Its id.
    pub id: SubnetId,
    /// Its VPC.
    pub vpc: VpcId,
    /// Its IPv4 network.
    pub ipv4: Option<Ipv4Net>,
    /// Its IPv6 network.
    pub ipv6: Option<Ipv6Net>,
}

/// A network ACL (SG-5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkAcl {
    /// Its id.
    pub id: AclId,
    /// The subnets that it is associated with.
    pub subnets: BTreeSet<SubnetId>,
    /// Inbound entries, ascending by number; what none of them matches is denied.
    pub ingress: Vec<AclEntry>,
    /// Outbound entries.
    pub egress: Vec<AclEntry>,
}

/// One entry of a network ACL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AclEntry {
    /// Its number; the lowest that matches decides (SG-5.1).
    pub number: u32,
    /// Whether it allows, or denies.
    pub allow: bool,
    /// What it is about.
    pub traffic: Traffic,
    /// From or to whom.
    pub network: IpNet,
}
