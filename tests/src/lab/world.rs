//! The control plane's answer and the discovery's, for the cast.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sg_agent::discovery::{Attachment, Link, Origin};
use sg_agent::exempt::Service;
use sg_agent::model::{
    AclEntry, AclId, Eni, EniId, GroupId, Instance, InstanceId, Inventory, Scope, SecurityGroup, Subnet, SubnetId,
    Traffic, VpcId,
};
use sg_agent::sharing::Table;

use crate::cast::{GATEWAY, Host, INSTANCES};
use crate::text::rules;

/// The subnet of A and B.
pub const SUBNET_1: &str = "subnet-1";
/// The subnet of C.
pub const SUBNET_2: &str = "subnet-2";
/// The network ACL that tests put on subnets.
pub const ACL: &str = "acl-1";

/// The only account and region.
pub fn scope() -> Scope {
    Scope { account: "123456789012".into(), region: "us-east-1".into() }
}

/// An entry of a network ACL: number, whether it allows, traffic, network.
pub fn acl_entry(number: u32, allow: bool, traffic: Traffic, network: &str) -> AclEntry {
    AclEntry { number, allow, traffic, network: network.parse().expect("a network") }
}

/// AWS's services, and the VPC's resolver at its base + 2 (SG-4.1), which is a setting.
pub(super) fn exempt() -> Vec<Service> {
    let mut services = Service::defaults("/nonexistent".as_ref());
    services.extend(["10.0.0.2:53/udp", "10.0.0.2:53/tcp"].map(|text| text.parse().expect("a service")));
    services
}

/// What the control plane says at first: `sgA`, `sgB` and `sgC` let everything out and nothing in.
pub fn inventory() -> Inventory {
    let mut inventory = Inventory::default();
    for name in ["sgA", "sgB", "sgC"] {
        let rules = rules("in none");
        let group = SecurityGroup {
            id: GroupId::from(name),
            name: name.into(),
            vpc: Some(VpcId::from("vpc-1")),
            owner: scope().account,
            ingress: rules.ingress,
            egress: rules.egress,
        };
        inventory.groups.insert(group.id.clone(), group);
    }
    for (id, ipv4, ipv6) in [(SUBNET_1, "10.0.1.0/24", "2001:db8:1::/64"), (SUBNET_2, "10.0.2.0/24", "2001:db8:2::/64")]
    {
        let subnet = Subnet {
            id: SubnetId::from(id),
            vpc: VpcId::from("vpc-1"),
            ipv4: Some(ipv4.parse().expect("a network")),
            ipv6: Some(ipv6.parse().expect("a network")),
        };
        inventory.subnets.insert(subnet.id.clone(), subnet);
    }
    for host in &INSTANCES {
        let eni = eni(host);
        let instance = Instance {
            id: instance_id(host),
            name: Some(host.name.into()),
            state: "running".into(),
            enis: vec![eni.id.clone()],
        };
        inventory.instances.insert(instance.id.clone(), instance);
        inventory.enis.insert(eni.id.clone(), eni);
    }
    inventory
}

/// The instance that a host is.
pub fn instance_id(host: &Host) -> InstanceId {
    InstanceId::from(format!("i-{}", host.name.to_lowercase()).as_str())
}

impl Host {
    /// The id of its interface.
    pub fn eni(&self) -> EniId {
        EniId::from(format!("eni-{}", self.name.to_lowercase()).as_str())
    }
}

/// Its interface, as the control plane shows it.
pub fn eni(host: &Host) -> Eni {
    Eni {
        id: host.eni(),
        instance: Some(instance_id(host)),
        device_index: 0,
        groups: BTreeSet::from([GroupId::from(format!("sg{}", host.name).as_str())]),
        subnet: Some(SubnetId::from(if host.name == "C" { SUBNET_2 } else { SUBNET_1 })),
        vpc: Some(VpcId::from("vpc-1")),
        addresses: vec![host.v4.into(), host.v6.into()],
        prefixes: Vec::new(),
        source_dest_check: true,
    }
}

/// Its link, as it is discovered.
pub fn attachment(host: &Host, ifindex: u32, name: String) -> Attachment {
    Attachment {
        instance: instance_id(host),
        account: None,
        region: None,
        eni: None,
        device_index: 0,
        link: Link { ifindex, name },
        mac: host.mac,
        addresses: vec![IpAddr::from(host.v4), host.v6.into(), host.link_local().into()],
        networks: Vec::new(),
        gateways: vec![GATEWAY.into()],
        origin: Origin::Flag,
        publish: Vec::new(),
    }
}

/// Puts the test's network ACL, with these entries, on a subnet.
pub fn put_acl(inventory: &mut Inventory, subnet: &str, ingress: Vec<AclEntry>, egress: Vec<AclEntry>) {
    let id = AclId::from(ACL);
    let acl = sg_agent::model::NetworkAcl {
        id: id.clone(),
        subnets: BTreeSet::from([SubnetId::from(subnet)]),
        ingress,
        egress,
    };
    inventory.acls = Table::from([(id, acl)]);
}
