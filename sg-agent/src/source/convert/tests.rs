//! Moto's recorded answers, and ugly ones, as the model that they come to.

use proptest::prelude::*;

use super::super::answer::{self, Call};
use super::super::{answer::*, fixture};
use super::*;
use crate::model::{Eni, Peer, Rule, Traffic};

const EMULATOR: Quirks = Quirks { default_self_rule: true, default_acl_ipv6: true };

fn items<C: Call>(body: &[u8]) -> Vec<C::Item> {
    answer::read::<C>(200, body).unwrap().0
}

fn prefix_list(id: &str, cidrs: &[&str]) -> wire::PrefixList {
    let entries = cidrs.iter().map(|cidr| wire::PrefixListEntry { cidr: (*cidr).to_owned() }).collect();
    wire::PrefixList { id: id.to_owned(), entries: Some(wire::List(entries)), ..Default::default() }
}

fn group(id: &str, name: &str) -> wire::SecurityGroup {
    wire::SecurityGroup {
        id: id.to_owned(),
        name: name.to_owned(),
        owner: "123456789012".to_owned(),
        ..Default::default()
    }
}

fn instances(body: &[u8]) -> Inventory {
    let reservations = Some(items::<DescribeInstances>(body));
    Facts { reservations, ..Facts::default() }.inventory(EMULATOR)
}

fn told(inventory: &Inventory) -> Vec<String> {
    inventory.warnings.iter().map(ToString::to_string).collect()
}

fn ids(groups: &[&str]) -> BTreeSet<GroupId> {
    groups.iter().map(|id| GroupId::from(*id)).collect()
}

fn addresses(eni: &Eni) -> Vec<String> {
    eni.addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn every_kind_of_rule_is_read() {
    let mut groups = items::<DescribeSecurityGroups>(fixture!("DescribeSecurityGroups_full"));
    groups.push(group("sg-e1a80b67912e13b58", "db"));
    let facts = Facts {
        groups,
        rules: Some(items::<DescribeSecurityGroupRules>(fixture!("DescribeSecurityGroupRules"))),
        prefix_lists: vec![prefix_list("pl-b952479453cafcd39", &["192.0.2.0/24"])],
        ..Facts::default()
    };
    let inventory = facts.inventory(EMULATOR);
    assert_eq!(told(&inventory), [""; 0]);
    let group = &inventory.groups[&"sg-c4fac25716521a0ec".into()];
    assert_eq!((group.name.as_str(), &*group.owner), ("web", "123456789012"));
    assert_eq!(group.vpc, Some("vpc-fd143bcf446c0baf6".into()));
    let http = Traffic::Tcp { from: 80, to: 90 };
    let ipv4 = |net: &str| Peer::Ipv4(net.parse().unwrap());
    let ipv6 = |net: &str| Peer::Ipv6(net.parse().unwrap());
    let rule = |id: &str, traffic, peer| Rule { id: id.into(), traffic, peer };
    assert_eq!(
        group.ingress,
        [
            rule("sgr-18658cbeb6b4c0aab", Traffic::Icmp { kind: Some(8), code: Some(0) }, ipv4("0.0.0.0/0")),
            rule("sgr-1d88bc3195fda5685", http, Peer::PrefixList("pl-b952479453cafcd39".into())),
            rule("sgr-470e6db4defadd107", http, Peer::Group("sg-e1a80b67912e13b58".into())),
            rule("sgr-48b63e5e98c622b08", Traffic::Icmpv6 { kind: None, code: None }, ipv6("2001:db8::/32")),
            rule("sgr-73d8a03dd3c6f57ce", Traffic::Icmpv6 { kind: Some(128), code: Some(0) }, ipv6("2001:db8::/32")),
            rule("sgr-849bb0c6b5ab24521", http, ipv4("0.0.0.0/0")),
            rule("sgr-98fb35acb5a1f72ef", Traffic::Other { number: 47 }, ipv4("10.1.0.0/16")),
            rule("sgr-a28964e52bcdd373f", Traffic::All, ipv4("203.0.113.7/32")),
            rule("sgr-a6006b519e8f295c8", Traffic::Udp { from: 53, to: 53 }, ipv4("10.0.0.0/8")),
            rule("sgr-cc531ba5ee9589865", http, Peer::Group("sg-c4fac25716521a0ec".into())),
            rule("sgr-e45fa22ad237344f4", http, ipv4("10.0.0.0/8")),
            rule("sgr-f14ce61332808cba8", http, ipv6("::/0")),
        ]
    );
    assert_eq!(
        group.egress,
        [
            rule("sgr-2a04aa40687708431", Traffic::All, ipv6("::/0")),
            rule("sgr-322d3bb6d14a162de", Traffic::All, ipv4("0.0.0.0/0")),
        ]
    );
}

#[test]
fn what_is_invalid_is_left_out_and_told_once() {
    let groups = items::<DescribeSecurityGroups>(fixture!("DescribeSecurityGroups_weird_rules"));
    let inventory = Facts { groups, ..Facts::default() }.inventory(EMULATOR);
    let group = &inventory.groups[&"sg-eb0bf14dd1f151e25".into()];
    let left: Vec<(&str, Traffic)> = group.ingress.iter().map(|rule| (&*rule.id.0, rule.traffic)).collect();
    assert_eq!(
        left,
        [
            ("sg-eb0bf14dd1f151e25/ingress[5]", Traffic::All),
            ("sg-eb0bf14dd1f151e25/ingress[6]", Traffic::Icmpv6 { kind: None, code: None }),
        ]
    );
    assert_eq!(group.ingress[1].peer, Peer::Ipv6("2001:db8::/32".parse().unwrap()));
    let problems = [
        (0, "\"zzz\" is not an IPv4 network such as 10.0.0.0/8"),
        (1, "first port -1 is not between 0 and 65535"),
        (2, "first port 70000 is not between 0 and 65535"),
        (3, "\"bogus\" is no protocol; EC2 knows tcp, udp, icmp, icmpv6, -1 and the numbers 0 to 255"),
        (4, "it has no protocol; -1 would mean every one"),
        (7, "prefix list pl-00000000 does not exist, so that nothing matches it"),
    ];
    let expected = problems.map(|(place, problem)| {
        let id = "sg-eb0bf14dd1f151e25";
        format!("{id}/ingress[{place}]: ingress rule of {id} (weird) left out: {problem}")
    });
    assert_eq!(told(&inventory), expected);
}

#[test]
fn a_rule_with_two_peers_none_or_one_that_is_gone_matches_nothing() {
    let base = wire::GroupRule {
        group: "sg-1".into(),
        protocol: Some("tcp".into()),
        from: Some(Number::Int(1)),
        to: Some(Number::Int(2)),
        ..Default::default()
    };
    let to = |id: &str, owner: &str, status: &str| {
        let peering = (!status.is_empty()).then(|| status.to_owned());
        Some(wire::GroupRef { id: id.into(), owner: owner.into(), peering })
    };
    let rule = |id: &str, rule| wire::GroupRule { id: id.into(), ..rule };
    let rules = vec![
        rule(
            "sgr-1",
            wire::GroupRule { ipv4: Some("10.0.0.0/8".into()), referenced: to("sg-1", "", ""), ..base.clone() },
        ),
        rule("sgr-2", wire::GroupRule { ipv4: Some(String::new()), ..base.clone() }),
        rule("sgr-3", wire::GroupRule { referenced: to("sg-gone", "123456789012", ""), ..base.clone() }),
        rule("sgr-4", wire::GroupRule { referenced: to("sg-far", "000000000001", "deleted"), ..base.clone() }),
        rule("sgr-5", wire::GroupRule { ipv4: Some("::/0".into()), ..base.clone() }),
        rule("sgr-6", wire::GroupRule { from: Some(Number::Bad("x".into())), ipv6: Some("::/0".into()), ..base }),
    ];
    let groups = vec![group("sg-1", "one")];
    let inventory = Facts { groups, rules: Some(rules), ..Facts::default() }.inventory(EMULATOR);
    assert!(inventory.groups[&"sg-1".into()].ingress.is_empty());
    let problems = [
        "it names more than one peer (10.0.0.0/8, sg-1); a rule has exactly one",
        "it names no peer; a rule needs a CIDR, a prefix list or a group",
        "group sg-gone does not exist, so that nothing matches it",
        "the peering connection to the VPC of group sg-far is deleted, so that nothing matches it",
        "\"::/0\" is not an IPv4 network such as 10.0.0.0/8",
        "\"x\" is not a number",
    ];
    let expected = problems.iter().zip(1..).map(|(p, n)| format!("sgr-{n}: ingress rule of sg-1 (one) left out: {p}"));
    assert_eq!(told(&inventory), expected.collect::<Vec<String>>());
}

#[test]
fn a_reference_names_its_account() {
    // SG-1.12
    let refer = |id: &str, owner: &str, peering: Option<&str>| {
        let referenced = wire::GroupRef { id: id.into(), owner: owner.into(), peering: peering.map(str::to_owned) };
        let rule = wire::GroupRule {
            id: "sgr-1".into(),
            group: "sg-1".into(),
            protocol: Some("-1".into()),
            referenced: Some(referenced),
            ..Default::default()
        };
        let groups = vec![group("sg-1", "one"), wire::SecurityGroup { owner: String::new(), ..group("sg-2", "two") }];
        let inventory = Facts { groups, rules: Some(vec![rule]), ..Facts::default() }.inventory(EMULATOR);
        inventory.groups[&"sg-1".into()].ingress.first().map(|rule| rule.peer.clone())
    };
    let foreign = |group: &str| Some(Peer::ForeignGroup { account: "000000000001".into(), group: group.into() });
    assert_eq!(refer("sg-far", "000000000001", Some("active")), foreign("sg-far"));
    assert_eq!(refer("sg-far", "000000000001", None), foreign("sg-far"));
    assert_eq!(refer("sg-far", "000000000001", Some("deleted")), None, "SG-1.12: the peering is gone");
    assert_eq!(refer("sg-far", "123456789012", None), None, "SG-1.12: a group of the own account that isn't there");
    assert_eq!(refer("sg-far", "", None), None);
    assert_eq!(refer("sg-1", "000000000001", None), foreign("sg-1"), "the other account's group of the same id");
    assert_eq!(refer("sg-1", "123456789012", None), Some(Peer::Group("sg-1".into())));
    assert_eq!(refer("sg-2", "000000000001", None), Some(Peer::Group("sg-2".into())), "nobody prints its owner");
    assert_eq!(refer("sg-1", "", None), Some(Peer::Group("sg-1".into())));
}

#[test]
fn the_same_group_twice_is_once_and_two_contents_are_refused() {
    let range = |cidr: &str| wire::Ipv4Range { cidr: cidr.to_owned() };
    let with = |cidrs: &[&str]| {
        let permission = wire::Permission {
            protocol: Some("-1".into()),
            ipv4: wire::List(cidrs.iter().copied().map(range).collect()),
            ..Default::default()
        };
        wire::SecurityGroup { ingress: wire::List(vec![permission]), ..group("sg-1", "one") }
    };
    let rule = |id: &str, cidr: &str| wire::GroupRule {
        id: id.into(),
        group: "sg-1".into(),
        protocol: Some("-1".into()),
        ipv4: Some(cidr.into()),
        ..Default::default()
    };
    let twice = vec![with(&["10.0.0.0/8", "192.0.2.0/24"]), with(&["192.0.2.0/24", "10.0.0.0/8"])];
    for rules in [None, Some(vec![rule("sgr-1", "10.0.0.0/8"), rule("sgr-2", "192.0.2.0/24")])] {
        let facts = Facts { groups: twice.clone(), rules, ..Facts::default() };
        assert_eq!(facts.contradiction(), None);
        assert_eq!(facts.inventory(EMULATOR).groups[&"sg-1".into()].ingress.len(), 2, "no rule is lost");
    }
    let facts = Facts { groups: vec![with(&["10.0.0.0/8"]), with(&["0.0.0.0/0"])], ..Facts::default() };
    assert_eq!(facts.contradiction().as_deref(), Some("security group sg-1"));
    let lists = vec![prefix_list("pl-1", &["10.0.0.0/8"]), prefix_list("pl-1", &["0.0.0.0/0"])];
    let facts = Facts { prefix_lists: lists, ..Facts::default() };
    assert_eq!(facts.contradiction().as_deref(), Some("prefix list pl-1"));
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

#[test]
fn only_an_untouched_default_group_gets_its_self_rule() {
    let groups = items::<DescribeSecurityGroups>(fixture!("DescribeSecurityGroups_default_defaultvpc"));
    let id = GroupId::from(groups[0].id.as_str());
    let facts = || Facts { groups: groups.clone(), ..Facts::default() };
    let rule = Rule { id: "sgr-default-self".into(), traffic: Traffic::All, peer: Peer::Group(id.clone()) };
    assert_eq!(facts().inventory(EMULATOR).groups[&id].ingress, [rule]);
    assert!(facts().inventory(Quirks::default()).groups[&id].ingress.is_empty());
    let invalid = wire::GroupRule { id: "sgr-1".into(), group: id.to_string(), ..Default::default() };
    let with_a_bad_rule = Facts { rules: Some(vec![invalid]), ..facts() };
    assert!(with_a_bad_rule.inventory(EMULATOR).groups[&id].ingress.is_empty(), "a bad rule is a rule");
    let bare = Facts { bare: [id.to_string()].into(), ..facts() };
    assert!(bare.inventory(EMULATOR).groups[&id].ingress.is_empty());
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
    let over = Inventory { terminated: BTreeSet::from(["i-92edc54166ec3a1be".into()]), ..Inventory::default() };
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
fn acl_entries_are_sorted_and_ports_read() {
    let acls = items::<DescribeNetworkAcls>(fixture!("DescribeNetworkAcls"));
    let inventory = Facts { acls, ..Facts::default() }.inventory(EMULATOR);
    let acl = &inventory.acls[&"acl-7ee0f735d57455ffc".into()];
    assert_eq!(acl.subnets, ["subnet-6dacacb505271e59e".into()].into());
    let short = |entries: &[crate::model::AclEntry]| {
        let entries = entries.iter().map(|e| (e.number, e.allow, e.traffic, e.network.to_string()));
        entries.collect::<Vec<_>>()
    };
    assert_eq!(
        short(&acl.ingress),
        [
            (100, true, Traffic::Udp { from: 53, to: 53 }, "10.0.0.0/8".into()),
            (110, false, Traffic::Icmp { kind: None, code: None }, "10.0.0.0/8".into()),
        ]
    );
    assert_eq!(short(&acl.egress), [(120, true, Traffic::All, "::/0".into())]);
    assert!(inventory.warnings.is_empty());
}

#[test]
fn a_default_acl_of_an_emulator_gets_its_ipv6_entries() {
    // SG-5.3
    let acls = items::<DescribeNetworkAcls>(fixture!("DescribeNetworkAcls_default"));
    let numbers = |quirks| {
        let inventory = Facts { acls: acls.clone(), ..Facts::default() }.inventory(quirks);
        let acl = inventory.acls[&"acl-d1356d78afea16172".into()].clone();
        [acl.ingress, acl.egress].map(|entries| entries.iter().map(|entry| entry.number).collect::<Vec<_>>())
    };
    assert_eq!(numbers(EMULATOR), [[100, 101, 32767], [100, 101, 32767]]);
    assert_eq!(numbers(Quirks::default()), [[100, 32767], [100, 32767]]);
}

#[test]
fn an_acl_entry_that_is_not_understood_never_lets_more_through() {
    let entry = |number, action: &str, protocol: &str, network: &str| wire::AclEntry {
        number: Some(Number::Int(number)),
        action: action.into(),
        protocol: Some(protocol.into()),
        ipv4: Some(network.into()),
        ..Default::default()
    };
    let entries = wire::List(vec![
        entry(1, "allow", "6", "10.0.0.0/8"),
        entry(2, "deny", "6", "10.0.0.0/8"),
        entry(3, "deny", "-1", "zzz"),
        entry(4, "perhaps", "-1", "10.1.0.0/16"),
        entry(5, "allow", "-1", "10.2.0.0/16"),
    ]);
    let acl = wire::NetworkAcl { id: "acl-1".into(), entries, ..Default::default() };
    let inventory = Facts { acls: vec![acl], ..Facts::default() }.inventory(EMULATOR);
    let entries = &inventory.acls[&"acl-1".into()].ingress;
    let short: Vec<_> = entries.iter().map(|e| (e.number, e.allow, e.traffic, e.network.to_string())).collect();
    assert_eq!(
        short,
        [
            (2, false, Traffic::All, "10.0.0.0/8".into()),
            (3, false, Traffic::All, "0.0.0.0/0".into()),
            (3, false, Traffic::All, "::/0".into()),
            (4, false, Traffic::All, "10.1.0.0/16".into()),
            (5, true, Traffic::All, "10.2.0.0/16".into()),
        ]
    );
    assert_eq!(
        told(&inventory),
        [
            "acl-1: ingress entry 1 left out: tcp has no first port",
            "acl-1: ingress entry 2 denies all of 10.0.0.0/8 instead: tcp has no first port",
            "acl-1: ingress entry 3 denies all of 0.0.0.0/0 and ::/0 instead: \"zzz\" is not an IPv4 network such as \
             10.0.0.0/8",
            "acl-1: ingress entry 4 denies all of 10.1.0.0/16 instead: \"perhaps\" is neither allow nor deny",
        ]
    );
}

#[test]
fn subnets_and_active_peerings_are_read() {
    let subnets = items::<DescribeSubnets>(fixture!("DescribeSubnets"));
    let mut peerings = items::<DescribeVpcPeeringConnections>(fixture!("DescribeVpcPeeringConnections"));
    let mut deleted = peerings[0].clone();
    (deleted.status.code, deleted.accepter.id) = ("deleted".into(), "vpc-other".into());
    peerings.push(deleted);
    let vpcs = items::<DescribeVpcs>(fixture!("DescribeVpcs"));
    let inventory = Facts { vpcs, subnets, peerings, ..Facts::default() }.inventory(EMULATOR);
    assert_eq!(inventory.vpcs[&"vpc-fd143bcf446c0baf6".into()], "10.20.0.0/16".parse().unwrap());
    let subnet = &inventory.subnets[&"subnet-6dacacb505271e59e".into()];
    assert_eq!(subnet.ipv4, Some("10.20.1.0/24".parse().unwrap()));
    assert_eq!((subnet.ipv6, &subnet.vpc), (None, &"vpc-fd143bcf446c0baf6".into()));
    let end = |vpc: &str| crate::model::PeeredVpc {
        vpc: vpc.into(),
        account: Some("123456789012".into()),
        region: Some("us-east-1".into()),
    };
    let peering = Peering { one: end("vpc-a8ae13aaae0cefec4"), other: end("vpc-fd143bcf446c0baf6") };
    assert_eq!(inventory.peerings, [peering].into());
}

#[test]
fn a_prefix_list_of_both_families_is_left_empty() {
    let list = prefix_list("pl-1", &["10.0.0.5/8", "2001:db8::/32", "zzz"]);
    let inventory = Facts { prefix_lists: vec![list], ..Facts::default() }.inventory(EMULATOR);
    assert!(inventory.prefix_lists[&"pl-1".into()].entries.is_empty());
    assert_eq!(inventory.warnings.len(), 2);
}

#[test]
fn nothing_without_an_id_is_kept() {
    let facts = Facts {
        groups: vec![group("", "nameless")],
        interfaces: vec![wire::NetworkInterface::default()],
        reservations: Some(vec![wire::Reservation {
            instances: wire::List(vec![wire::Instance::default()]),
            ..Default::default()
        }]),
        ..Facts::default()
    };
    let inventory = facts.inventory(EMULATOR);
    assert!(inventory.groups.is_empty() && inventory.enis.is_empty() && inventory.instances.is_empty());
    let subjects: Vec<&str> = inventory.warnings.iter().map(|warning| warning.subject.as_str()).collect();
    assert_eq!(subjects, ["a network interface", "a security group", "an instance"]);
}

fn wire_rule() -> impl Strategy<Value = wire::GroupRule> {
    let text = |values: &'static [&'static str]| {
        proptest::option::of(proptest::sample::select(values).prop_map(str::to_owned))
    };
    let port = || {
        let ints = prop_oneof![Just(-1i64), 0..10i64, 65534..65538i64].prop_map(Number::Int);
        proptest::option::of(prop_oneof![9 => ints, 1 => Just(Number::Bad("x".into()))])
    };
    (
        text(&["tcp", "udp", "icmp", "icmpv6", "-1", "6", "47", "300", "bogus", ""]),
        port(),
        port(),
        text(&["10.0.0.5/8", "10.0.0.0/8", "0.0.0.0/0", "zzz", "::/0", ""]),
        text(&["2001:DB8::1/32", "::/0", "10.0.0.0/8", ""]),
        text(&["pl-1", "pl-gone"]),
        text(&["sg-1", "sg-gone", ""]),
        any::<bool>(),
    )
        .prop_map(|(protocol, from, to, ipv4, ipv6, prefix_list, group, egress)| wire::GroupRule {
            referenced: group.map(|id| wire::GroupRef { id, ..Default::default() }),
            group: "sg-1".into(),
            protocol,
            from,
            to,
            ipv4,
            ipv6,
            prefix_list,
            egress,
            ..Default::default()
        })
}

proptest! {
    /// Each rule that is kept is one that was given, each that was given is kept, told about, or the same as one kept.
    #[test]
    fn no_rule_is_lost_or_made_up(mut rules in proptest::collection::vec(wire_rule(), 0..12)) {
        for (n, rule) in rules.iter_mut().enumerate() {
            rule.id = format!("sgr-{n:02}");
        }
        let facts = Facts {
            groups: vec![group("sg-1", "one")],
            rules: Some(rules.clone()),
            prefix_lists: vec![prefix_list("pl-1", &[])],
            ..Facts::default()
        };
        let inventory = facts.inventory(EMULATOR);
        let group = &inventory.groups[&"sg-1".into()];
        for given in &rules {
            let kept = if given.egress { &group.egress } else { &group.ingress };
            let other = if given.egress { &group.ingress } else { &group.egress };
            prop_assert!(!other.iter().any(|rule| *rule.id.0 == *given.id));
            let told = inventory.warnings.iter().filter(|warning| warning.subject == given.id).count();
            let peers = [&given.ipv4, &given.ipv6, &given.prefix_list, &given.referenced.as_ref().map(|g| g.id.clone())];
            let peers: Vec<&str> = peers.into_iter().flatten().map(String::as_str).filter(|p| !p.is_empty()).collect();
            match kept.iter().find(|rule| *rule.id.0 == *given.id) {
                Some(rule) => {
                    prop_assert_eq!(told, 0);
                    prop_assert_eq!(peers.len(), 1);
                    let same = match &rule.peer {
                        Peer::Ipv4(net) => parse_ipv4(peers[0]) == Ok(*net) && given.ipv4.is_some(),
                        Peer::Ipv6(net) => parse_ipv6(peers[0]) == Ok(*net) && given.ipv6.is_some(),
                        Peer::Group(id) => peers[0] == "sg-1" && *id.0 == *"sg-1",
                        Peer::ForeignGroup { .. } => false,
                        Peer::PrefixList(id) => peers[0] == "pl-1" && *id.0 == *"pl-1",
                    };
                    prop_assert!(same, "{:?} from {:?}", rule, given);
                }
                None if told == 0 => {
                    let same_as_one_kept = rules.iter().any(|first| first.id < given.id
                        && first.egress == given.egress
                        && kept.iter().any(|rule| *rule.id.0 == *first.id));
                    prop_assert!(same_as_one_kept, "{:?} was lost", given);
                }
                None => prop_assert_eq!(told, 1),
            }
        }
        prop_assert!(group.ingress.len() + group.egress.len() <= rules.len());
    }
}
