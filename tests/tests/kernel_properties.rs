//! Properties over generated policies and packets: the norm as one function (`oracle`), the compiled tables in memory
//! and the kernel's programs say the same, verdict and reason; and on arbitrary bytes the kernel does what its rules
//! do in memory. `SG_FUZZ_VERDICTS` sets how many packets are judged.

#[path = "kernel_properties/generate.rs"]
mod generate;
#[path = "kernel_properties/sequences.rs"]
mod sequences;

use std::cell::RefCell;
use std::net::IpAddr;

use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use sg_agent::oracle::{self, Question};
use sg_agent::resolve::{Allowance, Settings, Spec};
use sg_common::abi::Direction;
use sg_common::packet::{TCP, UDP};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{B, INSTANCES};
use tests::lab::{Lab, SUBNET_1, put_acl};
use tests::netns::isolated;

use generate::{Change, Event, Probe};

/// Packets that a run judges by default, for each property.
const VERDICTS: u32 = 100_000;
/// Packets between two changes of rules.
const PROBES: usize = 250;
/// Packets, changes and waits in one sequence of arbitrary bytes.
const EVENTS: usize = 500;

fn runner(verdicts_in_a_case: usize) -> TestRunner {
    let verdicts = match std::env::var("SG_FUZZ_VERDICTS") {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("SG_FUZZ_VERDICTS={text}: {error}")),
        Err(_) => VERDICTS,
    };
    TestRunner::new(Config {
        cases: verdicts.div_ceil(verdicts_in_a_case as u32),
        max_shrink_iters: 500,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        source_file: Some(file!()),
        ..Config::default()
    })
}

/// Says how many packets a property judged, for `cargo xtask fuzz` to add up.
fn total(judged: &[usize]) -> usize {
    let total = judged.iter().sum();
    println!("packets judged: {total}");
    total
}

/// A laboratory without services of its own: what is exempt is no rule's matter.
fn bare() -> Lab {
    let mut lab = Lab::with("in none", Settings::default());
    lab.attach(|attachments| attachments.iter_mut().for_each(|attachment| attachment.gateways.clear()));
    lab
}

#[test]
fn oracle_tables_and_kernel_agree_about_new_flows() {
    isolated(|| {
        let lab = RefCell::new(bare());
        let judged = RefCell::new([0_usize; 5]);
        let changes = 3;
        let case = (
            prop::collection::vec(generate::change(), 12),
            prop::collection::vec(generate::change(), changes - 1),
            prop::collection::vec(generate::probe(), PROBES),
        );
        runner(changes * PROBES)
            .run(&case, |(beginning, changes, probes)| {
                let mut lab = lab.borrow_mut();
                lab.edit(|inventory| {
                    *inventory = tests::lab::inventory();
                    beginning.iter().for_each(|change| change.make(inventory));
                });
                agree(&mut lab, &probes, &mut judged.borrow_mut())?;
                for change in &changes {
                    lab.edit(|inventory| change.make(inventory));
                    agree(&mut lab, &probes, &mut judged.borrow_mut())?;
                }
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("{failure}"));
        let judged = judged.into_inner();
        println!("denied by rules, by the ACL, new, untracked, other: {judged:?}");
        let total = total(&judged);
        let hardly_comes = |&count: &usize| count <= total / 100;
        // A run that was made short says nothing about it.
        if total >= VERDICTS as usize {
            assert!(!judged[..4].iter().any(hardly_comes), "one kind of verdict hardly comes: {judged:?}");
        }
    });
}

fn agree(lab: &mut Lab, probes: &[Probe], judged: &mut [usize; 5]) -> Result<(), TestCaseError> {
    let snapshot = lab.applier().snapshot();
    let interface = &snapshot.interfaces[&lab.ifindex(B)].interface;
    let Spec::Groups(groups) = &snapshot.policies[&interface.policy] else { panic!("an ACL for groups") };
    let acl = interface.acl.as_ref().map(|key| match &snapshot.policies[key] {
        Spec::Acl(acl) => acl,
        Spec::Groups(_) => panic!("groups for an ACL"),
    });
    let memberships = lab.memberships();
    // Beyond the subnet's networks there are its hosts' link-local addresses.
    let neighbors = lab.neighbors(SUBNET_1);
    let members = |address: IpAddr, group: u32| memberships.contains(&(address, group));
    for probe in probes {
        // Every flow that one packet began has ended by now (SG-3.3 has the longest timeout: 600 s).
        lab.advance(700_000);
        let question = probe.question();
        let (here, there) = match probe.direction() {
            Direction::Ingress => (&groups.ingress, &groups.egress),
            Direction::Egress => (&groups.egress, &groups.ingress),
        };
        let rules = by_rules(here, there, &members, &question, generate::SOURCE_PORT);
        let is_denied = acl.is_some_and(|acl| {
            let entries = if probe.direction() == Direction::Ingress { &acl.ingress } else { &acl.egress };
            let is_within = interface.subnet.iter().any(|network| network.contains(&question.peer))
                || neighbors.contains(&question.peer);
            !is_within && !oracle::deciding(entries, &question).is_some_and(|entry| entry.allow)
        });
        // On the way in the ACL comes first, on the way out last (SG-5.2).
        let expected = match (probe.direction(), is_denied, rules) {
            (Direction::Ingress, true, _) | (Direction::Egress, true, Ok(_)) => Err(Drop::Acl),
            (_, _, rules) => rules,
        };
        // `run` holds the kernel against the tables in memory.
        let verdict = lab.run(B, probe.direction(), &probe.packet().frame());
        prop_assert_eq!(verdict, expected, "the kernel (left) and the oracle differ about {:?}", probe);
        judged[match verdict {
            Err(Drop::NoRule) => 0,
            Err(Drop::Acl) => 1,
            Ok(Pass::New) => 2,
            Ok(Pass::Untracked) => 3,
            _ => 4,
        }] += 1;
    }
    Ok(())
}

/// SG-2.1 and SG-3.2 for the first packet of a flow.
fn by_rules(
    here: &[Allowance],
    there: &[Allowance],
    members: &impl oracle::Memberships,
    question: &Question,
    source_port: u16,
) -> Verdict {
    let Some(rule) = oracle::allowing(here, members, question) else { return Err(Drop::NoRule) };
    let has_replies = matches!(question.protocol, TCP | UDP);
    if has_replies && rule.is_any_source() && oracle::frees_replies(there, question) {
        return Ok(Pass::Untracked);
    }
    // A datagram may as well be the reply of an untracked flow from the other side.
    let reply = Question { port: source_port, ..*question };
    if question.protocol == UDP
        && oracle::allowing(there, members, &reply).is_some_and(Allowance::is_any_source)
        && oracle::frees_replies(here, question)
    {
        return Ok(Pass::Untracked);
    }
    Ok(Pass::New)
}

#[test]
fn kernel_and_memory_agree_on_arbitrary_bytes() {
    isolated(|| {
        let lab = RefCell::new(Lab::new("in none"));
        let passed = RefCell::new([0_usize; 2]);
        runner(EVENTS)
            .run(&prop::collection::vec(generate::event(), EVENTS), |events| {
                let mut lab = lab.borrow_mut();
                // No flow of an earlier sequence lives on; its entry may, for a SYN to take over.
                lab.advance(500_000_000);
                lab.edit(|inventory| *inventory = tests::lab::inventory());
                for event in events {
                    match event {
                        // `run` asserts that both say the same.
                        Event::Frame { host, direction, frame } => {
                            let verdict = lab.run(INSTANCES[host], direction, &frame);
                            passed.borrow_mut()[usize::from(verdict.is_ok())] += 1;
                        }
                        Event::Wait { seconds } => lab.advance(seconds * 1000),
                        Event::Rules { group, text } => lab.rules(group, text),
                        Event::Flags { flags } => lab.configure(|config| config.flags = flags),
                        Event::Change(change) => {
                            lab.edit(|inventory| change.make(inventory));
                            lab.check_whole();
                        }
                        Event::NoAcl => lab.edit(|inventory| inventory.acls.clear()),
                    }
                }
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("{failure}"));
        let passed = passed.into_inner();
        println!("dropped, passed: {passed:?}");
        let total = total(&passed);
        assert!(passed.iter().all(|&count| count > total / 100), "one kind of verdict hardly comes: {passed:?}");
    });
}

impl Change {
    /// Changes what the control plane says.
    fn make(&self, inventory: &mut sg_agent::model::Inventory) {
        match self {
            Self::Rules { group, is_ingress, rules } => {
                let group = inventory.groups.get_mut(&(*group).into()).expect("a group of the cast");
                *(if *is_ingress { &mut group.ingress } else { &mut group.egress }) = rules.clone();
            }
            Self::Groups { host, groups } => {
                let eni = inventory.enis.get_mut(&INSTANCES[*host].eni()).expect("an interface of the cast");
                eni.groups = groups.iter().map(|&group| group.into()).collect();
            }
            Self::List(list) => {
                inventory.prefix_lists.insert(list.id.clone(), list.clone());
            }
            Self::Acl { ingress, egress } => put_acl(inventory, SUBNET_1, ingress.clone(), egress.clone()),
        }
    }
}
