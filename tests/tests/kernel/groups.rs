//! Groups as peers, memberships, several interfaces, no group (SG-1.8 to SG-1.13, SG-2).

use std::collections::BTreeSet;
use std::sync::Arc;

use sg_agent::model::{Eni, GroupId, PrefixList, PrefixListId};
use sg_agent::resolve::Settings;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, Host, X};
use tests::lab::{Lab, attachment, eni};
use tests::netns::{isolated, link};
use tests::packets::{icmp, tcp, udp};

use crate::{arrives, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const NO_RULE: Verdict = Err(Drop::NoRule);

fn join(lab: &mut Lab, host: Host, groups: &[&str]) {
    let groups: BTreeSet<GroupId> = groups.iter().copied().map(GroupId::from).collect();
    lab.edit(|inventory| inventory.enis.get_mut(&host.eni()).expect("an interface of the cast").groups = groups);
}

#[test]
pub fn a_prefix_list_s_new_version_counts_at_once() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let list = |networks: &[&str]| PrefixList {
            id: PrefixListId::from("pl-1"),
            version: 1,
            entries: Arc::new(networks.iter().map(|text| text.parse().expect("a network")).collect()),
        };
        lab.rules("sgB", "in tcp22 pl-1");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NO_RULE), "SG-1.12: a list that isn't there");
        assert!(lab.warnings().iter().any(|warning| warning.problem.contains("pl-1")), "{:?}", lab.warnings());
        lab.edit(|inventory| {
            inventory.prefix_lists.insert("pl-1".into(), list(&["10.0.1.0/24"]));
        });
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NEW), "SG-1.8");
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", NO_RULE), "SG-1.8: before");
        lab.edit(|inventory| {
            inventory.prefix_lists.insert("pl-1".into(), list(&["10.0.1.0/24", "10.0.2.0/24"]));
        });
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", NEW), "SG-1.8: after");
        lab.edit(|inventory| {
            inventory.prefix_lists.insert("pl-1".into(), list(&["0.0.0.0/0"]));
        });
        assert_eq!(lab.send(X, B, &tcp(X, B).syn()), ("B", NEW), "SG-3.2: a list is no any-source rule");
    });
}

#[test]
pub fn a_reference_means_private_addresses() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 from sgA");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NEW), "SG-1.9");
        assert_eq!(lab.send(A, B, &tcp(A, B).v6(A, B).syn()), ("B", NEW), "SG-1.9: IPv6 included");
        assert_eq!(lab.send(A, B, &tcp(A, B).ports(1, 23).syn()), ("B", NO_RULE), "SG-1.9");
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", NO_RULE), "SG-1.9");
        run(
            &mut lab,
            "SG-1.9: never the public address",
            vec![
                arrives(tcp(X, B).from_address("198.51.100.10").syn(), NO_RULE),
                arrives(tcp(X, B).from_address("10.0.1.11").syn(), NO_RULE),
            ],
        );
        lab.edit(|inventory| {
            let addresses = &mut inventory.enis.get_mut(&A.eni()).expect("A's interface").addresses;
            addresses.push("10.0.1.11".parse().expect("an address"));
        });
        run(&mut lab, "SG-2.4: a new secondary address", vec![arrives(tcp(X, B).from_address("10.0.1.11").syn(), NEW)]);
        lab.rules("sgA", "in none, out udp");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("A", NO_RULE), "SG-1.9: its rules are its own");
    });
}

#[test]
pub fn a_middlebox_does_not_lend_its_membership() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgA");
        run(
            &mut lab,
            "SG-1.11",
            vec![
                arrives(tcp(A, B).syn(), Ok(Pass::New)),
                // Forwarded by A: its MAC address, somebody else's source.
                arrives(tcp(X, B).from_mac(A.mac).syn(), Err(Drop::NoRule)),
            ],
        );
    });
}

#[test]
pub fn who_leaves_a_group_is_out() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 from sgA, out none");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NEW), "SG-1.9");
        join(&mut lab, A, &["sgC"]);
        assert_eq!(lab.send(A, B, &tcp(A, B).ports(40001, 22).syn()), ("B", NO_RULE), "SG-2.4");
        assert_eq!(lab.send(A, B, &tcp(A, B).ack()), ("B", Ok(Pass::Established)), "SG-3.4: tracked flows stay");
        join(&mut lab, C, &["sgC", "sgA"]);
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", NEW), "SG-2.4: who joins is in");
        lab.edit(|inventory| {
            inventory.groups.remove(&"sgA".into());
        });
        assert_eq!(lab.send(C, B, &tcp(C, B).ports(40001, 22).syn()), ("B", NO_RULE), "SG-1.12: a deleted group");
    });
}

#[test]
pub fn no_trust_inside_a_group_without_a_self_rule() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        join(&mut lab, A, &["sgB"]);
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NO_RULE), "SG-1.10");
        lab.rules("sgB", "in all sgB");
        for packet in [tcp(A, B).syn(), udp(A, B), icmp(A, B, 8, 0), tcp(A, B).v6(A, B).syn()] {
            assert_eq!(lab.send(A, B, &packet), ("B", NEW), "SG-1.10, SG-1.13: with one");
        }
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", NO_RULE), "SG-1.10");
    });
}

#[test]
pub fn both_ends_have_their_say() {
    isolated(|| {
        let mut lab = Lab::new("in all");
        lab.rules("sgA", "in none, out none");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("A", NO_RULE), "SG-2.3");
        lab.rules("sgA", "in none, out tcp22 sgB");
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", Ok(Pass::Untracked)), "SG-2.3");
        assert_eq!(lab.send(B, A, &tcp(A, B).syn_ack().reply()), ("A", Ok(Pass::Established)), "SG-3.1");
        assert_eq!(lab.send(A, X, &tcp(A, X).syn()), ("A", NO_RULE), "SG-2.3");
    });
}

#[test]
pub fn all_groups_of_an_interface_together() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 X/32, out none");
        lab.rules("sgC", "in tcp80 X/32, out none");
        join(&mut lab, B, &["sgB", "sgC"]);
        run(
            &mut lab,
            "SG-2.1",
            vec![
                arrives(tcp(X, B).ports(1, 22).syn(), NEW),
                arrives(tcp(X, B).ports(1, 80).syn(), NEW),
                arrives(tcp(X, B).ports(1, 443).syn(), NO_RULE),
            ],
        );
        join(&mut lab, B, &["sgC"]);
        run(
            &mut lab,
            "SG-2.4",
            vec![arrives(tcp(X, B).ports(2, 22).syn(), NO_RULE), arrives(tcp(X, B).ports(2, 80).syn(), NEW)],
        );
    });
}

#[test]
pub fn each_interface_by_its_own_groups() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 X/32, out none");
        lab.rules("sgC", "in tcp80 X/32, out none");
        let second = Host { name: "B2", mac: [2, 0, 0, 0, 0, 0xb2], ..B.at("10.0.1.21").at("2001:db8:1::b2") };
        lab.edit(|inventory| {
            let b = inventory.enis[&B.eni()].clone();
            let eni =
                Eni { device_index: 1, groups: BTreeSet::from(["sgC".into()]), instance: b.instance, ..eni(&second) };
            inventory.instances.get_mut(&"i-b".into()).expect("B").enis.push(eni.id.clone());
            inventory.enis.insert(eni.id.clone(), eni);
        });
        lab.attach(|attachments| {
            let mut attachment = attachment(&second, link("sgt-b2"), "sgt-b2".into());
            attachment.instance = "i-b".into();
            attachment.device_index = 1;
            attachments.push(attachment);
        });
        let ports = |to: Host| [22, 80].map(|port| tcp(X, to).ports(40000, port).syn());
        assert_eq!(ports(B).map(|packet| lab.to(B, &packet)), [NEW, NO_RULE], "SG-2.2");
        assert_eq!(ports(second).map(|packet| lab.to(second, &packet)), [NO_RULE, NEW], "SG-2.2");
        // A flow of one interface is none of the other's.
        assert_eq!(
            lab.from(second, &ports(B)[0].clone().syn_ack().reply().from_mac(second.mac)),
            Err(Drop::SourceAddress)
        );
        assert_eq!(lab.from(second, &tcp(X, second).syn_ack().reply()), NO_RULE, "SG-2.2");
    });
}

#[test]
pub fn without_a_group_everything_passes_and_is_warned_about() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        join(&mut lab, B, &[]);
        for packet in [tcp(X, B).syn(), tcp(X, B).v6(X, B).syn(), udp(X, B), icmp(X, B, 8, 0)] {
            assert!(lab.to(B, &packet).is_ok(), "SG-2.5: {packet:?}");
            assert!(lab.from(B, &packet.clone().reply()).is_ok(), "SG-2.5: {packet:?}");
        }
        let warned = |lab: &Lab| lab.warnings().iter().any(|warning| warning.problem.contains("no security group"));
        assert!(warned(&lab), "SG-2.5: {:?}", lab.warnings());
        let mut lab = Lab::with("in all", Settings { deny_without_group: true, ..Settings::default() });
        assert!(!warned(&lab), "{:?}", lab.warnings());
        join(&mut lab, B, &[]);
        run(
            &mut lab,
            "SG-2.5: --no-group=deny",
            vec![arrives(tcp(X, B).syn(), NO_RULE), leaves(tcp(B, X).syn(), NO_RULE)],
        );
        assert!(warned(&lab), "SG-2.5: {:?}", lab.warnings());
    });
}

#[test]
pub fn an_instance_that_nobody_knows_is_closed() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        lab.edit(|inventory| {
            inventory.instances.remove(&"i-b".into());
        });
        run(&mut lab, "SG-2.1: closed", vec![arrives(tcp(X, B).syn(), NO_RULE), leaves(tcp(B, X).syn(), NO_RULE)]);
        assert!(lab.warnings().iter().any(|warning| warning.subject == "i-b"), "{:?}", lab.warnings());
    });
}

#[test]
pub fn more_groups_than_fit_are_refused_whole() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 X/32, out none");
        let names: Vec<String> = (0..17).map(|number| format!("sgZ{number:02}")).collect();
        let refused = lab.try_edit(|inventory| {
            for name in &names {
                let mut group = inventory.groups[&"sgA".into()].clone();
                group.id = name.as_str().into();
                inventory.groups.insert(group.id.clone(), group);
            }
            let rules =
                format!("in {}", names.iter().map(|name| format!("tcp22 {name}")).collect::<Vec<_>>().join(" + "));
            inventory.groups.get_mut(&"sgB".into()).expect("sgB").ingress = tests::text::rules(&rules).ingress;
            inventory.enis.get_mut(&A.eni()).expect("A's interface").groups =
                names.iter().map(|name| GroupId::from(name.as_str())).collect();
        });
        let error = refused.expect_err("17 groups for one address").to_string();
        assert!(error.contains("10.0.1.10") && error.contains("17"), "SG-1.14: {error}");
        run(
            &mut lab,
            "SG-1.14: the old policy stands",
            vec![arrives(tcp(X, B).syn(), NEW), arrives(tcp(A, B).syn(), NO_RULE)],
        );
    });
}
