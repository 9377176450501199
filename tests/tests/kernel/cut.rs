//! `--on-revoke=cut`: a revoke ends tracked flows, too (SG-3.4).

use std::collections::BTreeSet;

use sg_common::abi::CUT_ON_REVOKE;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{icmp, tcp, udp};

use crate::{arrives, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const NO_RULE: Verdict = Err(Drop::NoRule);
const REVOKED: Verdict = Err(Drop::Revoked);

fn cutting(rules: &str) -> Lab {
    let mut lab = Lab::new(rules);
    lab.configure(|config| config.flags |= CUT_ON_REVOKE);
    lab
}

#[test]
pub fn a_revoke_ends_its_flows_and_no_others() {
    isolated(|| {
        let mut lab = cutting("in tcp22 A/32 + tcp22 C/32 + icmp 8/-1 A/32, out udp53 X/32");
        run(
            &mut lab,
            "SG-3.1",
            vec![
                arrives(tcp(A, B).syn(), NEW),
                leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED),
                arrives(tcp(C, B).syn(), NEW),
                arrives(icmp(A, B, 8, 0), NEW),
                leaves(udp(B, X), NEW),
            ],
        );
        lab.rules("sgB", "in tcp22 C/32 + icmp 8/-1 A/32, out udp53 X/32");
        run(
            &mut lab,
            "SG-3.4",
            vec![
                arrives(tcp(A, B).ack(), REVOKED),
                arrives(tcp(A, B).ack(), NO_RULE),
                leaves(tcp(A, B).ack().reply(), NO_RULE),
                arrives(tcp(C, B).ack(), ESTABLISHED),
                leaves(tcp(C, B).ack().reply(), ESTABLISHED),
                leaves(icmp(A, B, 8, 0).reply(), ESTABLISHED),
                arrives(icmp(A, B, 8, 0), ESTABLISHED),
                arrives(udp(B, X).reply(), ESTABLISHED),
            ],
        );
        lab.rules("sgB", "in none, out none");
        run(
            &mut lab,
            "SG-3.4: whichever packet comes first",
            vec![
                leaves(tcp(C, B).ack().reply(), REVOKED),
                leaves(tcp(C, B).ack().reply(), NO_RULE),
                arrives(tcp(C, B).ack(), NO_RULE),
                leaves(icmp(A, B, 8, 0).reply(), REVOKED),
                arrives(udp(B, X).reply(), REVOKED),
                leaves(udp(B, X), NO_RULE),
            ],
        );
    });
}

#[test]
pub fn what_b_still_sends_does_not_bring_a_cut_flow_back() {
    isolated(|| {
        for packet_first_from_b in [false, true] {
            let mut lab = cutting("in tcp22 A/32");
            run(
                &mut lab,
                "SG-3.1",
                vec![arrives(tcp(A, B).syn(), NEW), leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED)],
            );
            lab.rules("sgB", "in none");
            if packet_first_from_b {
                run(&mut lab, "SG-3.4", vec![leaves(tcp(A, B).ack().reply(), REVOKED)]);
            } else {
                run(&mut lab, "SG-3.4", vec![arrives(tcp(A, B).ack(), REVOKED)]);
            }
            run(
                &mut lab,
                "SG-3.4: B may send all it wants, but opens nothing",
                vec![leaves(tcp(A, B).ack().reply(), Ok(Pass::MidFlow)), arrives(tcp(A, B).ack(), NO_RULE)],
            );
        }
    });
}

#[test]
pub fn leaving_a_group_ends_flows_by_reference() {
    isolated(|| {
        for packet_first_from_b in [false, true] {
            let mut lab = cutting("in tcp22 sgA");
            run(
                &mut lab,
                "SG-1.9",
                vec![arrives(tcp(A, B).syn(), NEW), leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED)],
            );
            lab.edit(|inventory| {
                inventory.enis.get_mut(&A.eni()).expect("A's interface").groups = BTreeSet::from(["sgC".into()]);
            });
            if packet_first_from_b {
                run(&mut lab, "SG-2.4, SG-3.4", vec![leaves(tcp(A, B).ack().reply(), REVOKED)]);
            } else {
                run(&mut lab, "SG-2.4, SG-3.4", vec![arrives(tcp(A, B).ack(), REVOKED)]);
            }
            run(
                &mut lab,
                "SG-3.4: what B still sends brings nothing back",
                vec![leaves(tcp(A, B).ack().reply(), Ok(Pass::MidFlow)), arrives(tcp(A, B).ack(), NO_RULE)],
            );
        }
    });
}

#[test]
pub fn swapping_groups_ends_flows() {
    isolated(|| {
        let mut lab = cutting("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", vec![arrives(tcp(A, B).syn(), NEW)]);
        lab.edit(|inventory| {
            inventory.enis.get_mut(&B.eni()).expect("B's interface").groups = BTreeSet::from(["sgC".into()]);
        });
        run(&mut lab, "SG-3.4", vec![arrives(tcp(A, B).ack(), REVOKED), arrives(tcp(A, B).ack(), NO_RULE)]);
    });
}
