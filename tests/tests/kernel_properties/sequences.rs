//! Packets of few flows in any order, with rules that change in between: what a flow table may and must do, as plain
//! invariants (SG-2.1, SG-3.1, SG-3.2, SG-3.4, SG-3.9).

use std::cell::RefCell;
use std::collections::HashSet;

use proptest::prelude::*;
use proptest::sample::select;
use sg_agent::oracle::{self, Question};
use sg_agent::resolve::Spec;
use sg_common::abi::Direction;
use sg_common::packet::{ACK, SYN, TCP, UDP};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, Host, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{tcp, udp};

use super::{bare, by_rules, runner, total};

const STEPS: usize = 400;

#[derive(Clone, Debug)]
enum Step {
    Packet { is_ingress: bool, is_a: bool, protocol: u8, flags: u8, server: u16, client: u16, is_from_client: bool },
    Rules(&'static str),
}

const RULES: &[&str] = &[
    "in none, out none",
    "in none",
    "in all",
    "in tcp22 any4",
    "in tcp22 A/32",
    "in tcp22 A/32, out none",
    "in tcp22 any4, out tcp443 any4",
    "in udp22 any4 + tcp22-443 10.0.0.0/8, out udp",
    "in all, out tcp22 any4",
    "in tcp40000 sgA + udp40000 sgA, out tcp22 sgA",
];

fn step() -> impl Strategy<Value = Step> {
    let packet = (
        any::<bool>(),
        any::<bool>(),
        select(vec![TCP, TCP, UDP]),
        select(vec![SYN, SYN | ACK, ACK, ACK, ACK]),
        select(vec![22_u16, 443]),
        select(vec![40000_u16, 40001]),
        any::<bool>(),
    );
    prop_oneof![
        25 => packet.prop_map(|(is_ingress, is_a, protocol, flags, server, client, is_from_client)| Step::Packet {
            is_ingress, is_a, protocol, flags, server, client, is_from_client
        }),
        1 => select(RULES).prop_map(Step::Rules),
    ]
}

/// A flow as B sees it: protocol, peer, B's port, the peer's port.
type Flow = (u8, &'static str, u16, u16);

#[test]
fn flows_live_by_their_first_packet_and_rules_by_the_norm() {
    isolated(|| {
        let lab = RefCell::new(bare());
        let seen = RefCell::new([0_usize; 5]);
        // A quarter as many packets as the other properties have: each is looked at longer.
        runner(4 * STEPS)
            .run(&prop::collection::vec(step(), STEPS), |steps| {
                let mut lab = lab.borrow_mut();
                lab.advance(500_000_000);
                // The table of this policy began long ago: nothing is picked up by one direction's rules alone.
                lab.rules("sgB", "in none, out none");
                lab.rules("sgB", "in none");
                let mut tracked = HashSet::new();
                for step in &steps {
                    run(&mut lab, step, &mut tracked, &mut seen.borrow_mut())?;
                }
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("{failure}"));
        let seen = seen.into_inner();
        println!("denied, new, established, untracked, mid-flow: {seen:?}");
        let total = total(&seen);
        assert!(seen.iter().all(|&count| count > total / 200), "one kind of verdict hardly comes: {seen:?}");
    });
}

fn run(lab: &mut Lab, step: &Step, tracked: &mut HashSet<Flow>, seen: &mut [usize; 5]) -> Result<(), TestCaseError> {
    let &Step::Packet { is_ingress, is_a, protocol, flags, server, client, is_from_client } = step else {
        let Step::Rules(text) = step else { unreachable!("a step is a packet or rules") };
        lab.rules("sgB", text);
        return Ok(());
    };
    let peer: Host = if is_a { A } else { X };
    let (from, to) = if is_ingress { (peer, B) } else { (B, peer) };
    let (source, destination) = if is_from_client { (client, server) } else { (server, client) };
    let (direction, local, remote) =
        if is_ingress { (Direction::Ingress, destination, source) } else { (Direction::Egress, source, destination) };
    let packet = if protocol == TCP { tcp(from, to).flags(flags) } else { udp(from, to) };
    let verdict = lab.run(B, direction, &packet.ports(source, destination).frame());

    let memberships = lab.memberships();
    let members = |address, group| memberships.contains(&(address, group));
    let snapshot = lab.applier().snapshot();
    let policy = &snapshot.interfaces[&lab.ifindex(B)].interface.policy;
    let Spec::Groups(groups) = &snapshot.policies[policy] else { panic!("an ACL for groups") };
    let (here, there) = if is_ingress { (&groups.ingress, &groups.egress) } else { (&groups.egress, &groups.ingress) };
    let question = Question { peer: peer.v4.into(), protocol, port: destination };
    let by_rules: Verdict = by_rules(here, there, &members, &question, source);
    let is_syn = protocol == TCP && flags == SYN;
    let flow = (protocol, peer.name, local, remote);

    if tracked.contains(&flow) && !is_syn {
        prop_assert_eq!(verdict, Ok(Pass::Established), "SG-3.1, SG-3.4: a tracked flow goes on, {:?}", step);
    } else if is_syn || protocol == UDP {
        prop_assert_eq!(verdict, by_rules, "SG-2.1, SG-3.2: it is judged by the rules, {:?}", step);
    } else {
        prop_assert_eq!(verdict.is_ok(), by_rules.is_ok(), "SG-3.9: it is judged by the rules, {:?}", step);
        if verdict == Ok(Pass::New) {
            // Or what an untracked, revoked flow's one side still sends would open the way for the other (SG-3.4).
            let reverse = Question { port: source, ..question };
            prop_assert!(oracle::allowing(there, &members, &reverse).is_some(), "SG-3.4: {:?} revives a flow", step);
        }
    }
    match verdict {
        Ok(Pass::New) => {
            tracked.insert(flow);
        }
        Ok(Pass::Untracked) => {
            tracked.remove(&flow);
        }
        _ => {}
    }
    seen[match verdict {
        Err(Drop::NoRule) => 0,
        Ok(Pass::New) => 1,
        Ok(Pass::Established) => 2,
        Ok(Pass::Untracked) => 3,
        Ok(Pass::MidFlow) => 4,
        other => return Err(TestCaseError::fail(format!("{other:?} for {step:?}"))),
    }] += 1;
    Ok(())
}
