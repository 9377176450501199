//! Groups' rules: which are kept, and what is told of the others.

use proptest::prelude::*;

use super::super::super::{answer::*, fixture};
use super::*;
use crate::model::{Peer, Rule, Traffic};

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
