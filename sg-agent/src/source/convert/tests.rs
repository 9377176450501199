//! Moto's recorded answers, and ugly ones, as the model that they come to.

mod acls;
mod interfaces;
mod rules;

use super::super::answer::{self, Call};
use super::super::{answer::*, fixture};
use super::*;
use crate::sharing::Set;

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

fn told(inventory: &Inventory) -> Vec<String> {
    inventory.warnings.iter().map(ToString::to_string).collect()
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
    // What has no id contradicts nothing: it is left out, and that is told.
    let nameless = |name: &str| wire::SecurityGroup { id: String::new(), ..group("sg-1", name) };
    let facts = Facts { groups: vec![nameless("one"), nameless("other")], ..Facts::default() };
    assert_eq!(facts.contradiction(), None);
    let inventory = facts.inventory(EMULATOR);
    assert!(inventory.groups.is_empty() && !inventory.warnings.is_empty(), "{inventory:?}");
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
    assert_eq!(inventory.peerings, Set::unit(peering));
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
