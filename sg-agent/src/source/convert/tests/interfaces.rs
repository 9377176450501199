//! Instances and their interfaces: who is there, with which groups and addresses.

use super::super::super::{answer::*, fixture};
use super::*;
use crate::model::Eni;

fn instances(body: &[u8]) -> Inventory {
    let reservations = Some(items::<DescribeInstances>(body));
    Facts { reservations, ..Facts::default() }.inventory(EMULATOR)
}

fn ids(groups: &[&str]) -> BTreeSet<GroupId> {
    groups.iter().map(|id| GroupId::from(*id)).collect()
}

fn addresses(eni: &Eni) -> Vec<String> {
    eni.addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn an_instance_is_read_with_its_interfaces() {
    let inventory = instances(fixture!("DescribeInstances"));
    let instance = &inventory.instances[&"i-ff1051133a966d34b".into()];
    assert_eq!((instance.name.as_deref(), instance.state.as_str()), (Some("i1"), "running"));
    assert_eq!(instance.enis, ["eni-38ac45494320a4606".into()]);
    let eni = &inventory.enis[&instance.enis[0]];
    assert_eq!(eni.groups, ids(&["sg-2f7fd6a8e02fd119b", "sg-fb78ed0fa73d326f3"]));
    assert_eq!(addresses(eni), ["10.20.1.4"]);
    assert_eq!(eni.subnet, Some("subnet-6dacacb505271e59e".into()));
    assert_eq!((eni.device_index, eni.source_dest_check), (0, true));
}

#[test]
fn secondary_and_ipv6_addresses_count_and_public_ones_do_not() {
    let inventory = instances(fixture!("DescribeInstances_multi_eni_eip"));
    let instance = &inventory.instances[&"i-ff1051133a966d34b".into()];
    assert_eq!(instance.enis, ["eni-38ac45494320a4606".into(), "eni-b4c5d16d02619e525".into()]);
    let [first, second] = [&inventory.enis[&instance.enis[0]], &inventory.enis[&instance.enis[1]]];
    assert_eq!(addresses(first), ["10.20.1.4"], "not 127.19.125.6");
    // The instance's own set is empty: what the interfaces print is theirs.
    assert_eq!(first.groups, ids(&["sg-2f7fd6a8e02fd119b", "sg-fb78ed0fa73d326f3"]));
    assert_eq!(addresses(second), ["10.20.1.50", "10.20.1.25", "10.20.1.51", "10.20.1.77", "2001:db8::5"]);
    assert_eq!((second.device_index, &second.groups), (1, &ids(&["sg-fb78ed0fa73d326f3"])));
}

#[test]
fn a_terminated_instance_is_no_member() {
    let body = fixture!("DescribeInstances_terminated");
    let over = Inventory { terminated: Set::unit("i-92edc54166ec3a1be".into()), ..Inventory::default() };
    assert_eq!(instances(body), over);
    let terminated = items::<DescribeInstances>(body);
    let interface = wire::NetworkInterface {
        id: "eni-dee879ff89387cd0a".into(),
        attachment: Some(wire::Attachment { instance: Some("i-92edc54166ec3a1be".into()), device_index: None }),
        ..Default::default()
    };
    let facts = Facts { reservations: Some(terminated), interfaces: vec![interface], ..Facts::default() };
    assert!(facts.inventory(EMULATOR).enis.is_empty());
}

#[test]
fn a_changed_primary_interface_has_its_instances_groups() {
    let interfaces = items::<DescribeNetworkInterfaces>(fixture!("DescribeNetworkInterfaces_union_quirk"));
    let groups = wire::List(vec![wire::GroupRef { id: "sg-f5d850e25236e35e0".into(), ..Default::default() }]);
    let instance = wire::Instance { id: "i-ee73fe22365eb521d".into(), groups, ..Default::default() };
    let reservation = wire::Reservation { instances: wire::List(vec![instance]), ..Default::default() };
    let facts = Facts { reservations: Some(vec![reservation]), interfaces, ..Facts::default() };
    let inventory = facts.inventory(EMULATOR);
    let eni = &inventory.enis[&"eni-5d24c4905c04c59f4".into()];
    assert_eq!(eni.groups, ids(&["sg-f5d850e25236e35e0"]));
    let [warning] = &told(&inventory)[..] else { panic!("{:?}", inventory.warnings) };
    assert!(warning.starts_with("eni-5d24c4905c04c59f4: its groups read as sg-3267ff5f182c91c2b, sg-f5d"), "{warning}");
}

#[test]
fn a_secondary_interface_has_its_own_groups_where_they_were_asked_for() {
    let groups = |ids: &[&str]| {
        wire::List(ids.iter().map(|id| wire::GroupRef { id: (*id).into(), ..Default::default() }).collect())
    };
    let second = wire::NetworkInterface {
        id: "eni-2".into(),
        attachment: Some(wire::Attachment { instance: None, device_index: Some(Number::Int(1)) }),
        groups: groups(&["sg-a", "sg-b"]),
        ..Default::default()
    };
    let interfaces = wire::List(vec![second]);
    let instance = wire::Instance { id: "i-1".into(), groups: groups(&["sg-a"]), interfaces, ..Default::default() };
    let reservation = wire::Reservation { instances: wire::List(vec![instance]), ..Default::default() };
    let facts = |own_groups| Facts { reservations: Some(vec![reservation.clone()]), own_groups, ..Facts::default() };
    let eni = |own| facts(own).inventory(EMULATOR).enis[&"eni-2".into()].groups.clone();
    assert_eq!(eni(BTreeMap::new()), ids(&["sg-a", "sg-b"]));
    assert_eq!(eni([("eni-2".to_owned(), ids(&["sg-b"]))].into()), ids(&["sg-b"]));
    // It was moved to other groups between the two answers: never to none, which may allow everything.
    assert_eq!(eni([("eni-2".to_owned(), ids(&[]))].into()), ids(&["sg-a", "sg-b"]));
}

#[test]
fn a_group_without_an_id_is_not_no_group() {
    let body = b"<DescribeInstancesResponse><reservationSet><item><instancesSet><item><instanceId>i-1</instanceId>\
        <groupSet><item><groupName>web</groupName></item></groupSet></item></instancesSet></item></reservationSet>\
        </DescribeInstancesResponse>";
    let inventory = instances(body);
    assert_eq!(
        inventory.enis[&"eni-i-1".into()].groups,
        ids(&[""]),
        "it allows nothing, as any group that isn't there"
    );
}

#[test]
fn bad_addresses_are_left_out_alone() {
    let interface = wire::NetworkInterface {
        id: "eni-1".into(),
        private_ip: Some("10.0.0.4".into()),
        ipv6s: wire::List(vec![wire::Ipv6Address { address: "zzz".into() }]),
        ipv4_prefixes: wire::List(vec![wire::Ipv4Prefix { prefix: "10.0.0.0".into() }]),
        ..Default::default()
    };
    let inventory = Facts { interfaces: vec![interface], ..Facts::default() }.inventory(EMULATOR);
    assert_eq!(addresses(&inventory.enis[&"eni-1".into()]), ["10.0.0.4"]);
    assert_eq!(
        told(&inventory),
        [
            "eni-1: address \"zzz\" left out: it is none",
            "eni-1: delegated prefix left out: \"10.0.0.0\" is not an IPv4 network such as 10.0.0.0/8",
        ]
    );
}

#[test]
fn delegated_prefixes_are_read_as_ec2_prints_them() {
    // SG-1.9; the shapes are those of the API model's NetworkInterface and InstanceNetworkInterface.
    let xml =
        b"<DescribeNetworkInterfacesResponse><networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId>\
                <ipv4PrefixSet><item><ipv4Prefix>10.0.1.16/28</ipv4Prefix></item></ipv4PrefixSet>\
                <ipv6PrefixSet><item><ipv6Prefix>2001:db8:1:2:3::/80</ipv6Prefix></item></ipv6PrefixSet>\
                </item></networkInterfaceSet></DescribeNetworkInterfacesResponse>";
    let interfaces = items::<DescribeNetworkInterfaces>(xml);
    let inventory = Facts { interfaces, ..Facts::default() }.inventory(EMULATOR);
    let eni = &inventory.enis[&"eni-1".into()];
    assert_eq!(
        eni.prefixes.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.1.16/28", "2001:db8:1:2:3::/80"]
    );
    assert_eq!(eni.private_addresses().count(), 16);
}
