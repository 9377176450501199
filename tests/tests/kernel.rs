//! The kernel's programs, packet by packet: rules, packets, verdicts and reasons. Each test cites the statements of
//! the norm that it shows (`SG-3.2`); every packet is also held against the pipeline in memory (`tests::lab`).

#[path = "kernel/accounts.rs"]
mod accounts;
#[path = "kernel/acl.rs"]
mod acl;
#[path = "kernel/addresses.rs"]
mod addresses;
#[path = "kernel/cases.rs"]
mod cases;
#[path = "kernel/cut.rs"]
mod cut;
#[path = "kernel/ends.rs"]
mod ends;
#[path = "kernel/exempt.rs"]
mod exempt;
#[path = "kernel/exhaustion.rs"]
mod exhaustion;
#[path = "kernel/faults.rs"]
mod faults;
#[path = "kernel/fragments.rs"]
mod fragments;
#[path = "kernel/groups.rs"]
mod groups;
#[path = "kernel/icmp.rs"]
mod icmp;
#[path = "kernel/limits.rs"]
mod limits;
#[path = "kernel/live.rs"]
mod live;
#[path = "kernel/malformed.rs"]
mod malformed;
#[path = "kernel/neighbor.rs"]
mod neighbor;
#[path = "kernel/options.rs"]
mod options;
#[path = "kernel/protocols.rs"]
mod protocols;
#[path = "kernel/published.rs"]
mod published;
#[path = "kernel/races.rs"]
mod races;
#[path = "kernel/rules.rs"]
mod rules;
#[path = "kernel/spoofing.rs"]
mod spoofing;
#[path = "kernel/state.rs"]
mod state;
#[path = "kernel/tampering.rs"]
mod tampering;
#[path = "kernel/untracked.rs"]
mod untracked;

use sg_common::abi::Direction;
use sg_common::verdict::Verdict;
use tests::cast::B;
use tests::lab::Lab;
use tests::packets::Packet;

/// One packet at B's interface, and what must become of it.
struct Step {
    direction: Direction,
    packet: Packet,
    expected: Verdict,
}

/// A packet that arrives at B.
fn arrives(packet: Packet, expected: Verdict) -> Step {
    Step { direction: Direction::Ingress, packet, expected }
}

/// A packet that B sends.
fn leaves(packet: Packet, expected: Verdict) -> Step {
    Step { direction: Direction::Egress, packet, expected }
}

/// Runs packets under B's rules, without any flow of an earlier scene.
fn scene(lab: &mut Lab, norm: &str, rules: &str, steps: Vec<Step>) {
    forget_flows(lab);
    lab.rules("sgB", rules);
    run(lab, norm, steps);
}

/// Runs packets under whatever rules stand.
fn run(lab: &mut Lab, norm: &str, steps: Vec<Step>) {
    for (number, step) in steps.into_iter().enumerate() {
        let Step { direction, packet, expected } = step;
        let verdict = lab.run(B, direction, &packet.frame());
        assert_eq!(verdict, expected, "{norm}, packet {} ({direction:?}): {packet:?}", number + 1);
    }
}

/// Lets more time pass than any flow lives.
fn forget_flows(lab: &mut Lab) {
    lab.advance(500_000_000);
}
