//! Network ACLs.

use super::super::super::{answer::*, fixture};
use super::*;
use crate::model::Traffic;

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
