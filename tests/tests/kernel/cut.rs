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

#[test]
pub fn a_flow_that_was_picked_up_needs_both_its_rules() {
    isolated(|| {
        // Whatever the ports say about who began it.
        for (own, peer) in [(22, 40000), (40000, 22)] {
            let rules = [format!("in tcp{own} A/32, out tcp{peer} A/32"), format!("in tcp{own} A/32, out none")];
            let other = format!("in none, out tcp{peer} A/32");
            for (left, is_first_from_b) in [(&rules[1], true), (&rules[1], false), (&other, true), (&other, false)] {
                let mut lab = cutting(&rules[0]);
                let from_a = || tcp(A, B).ports(peer, own);
                run(
                    &mut lab,
                    "SG-3.1",
                    vec![
                        arrives(from_a().syn(), NEW),
                        leaves(from_a().syn_ack().reply(), ESTABLISHED),
                        arrives(from_a().ack(), ESTABLISHED),
                        arrives(from_a().rst(), ESTABLISHED),
                    ],
                );
                lab.advance(11_000);
                let first =
                    if is_first_from_b { leaves(from_a().ack().reply(), NEW) } else { arrives(from_a().ack(), NEW) };
                run(&mut lab, "SG-3.9: picked up again", vec![first]);
                lab.rules("sgB", left);
                let next = |verdict| {
                    if is_first_from_b {
                        arrives(from_a().ack(), verdict)
                    } else {
                        leaves(from_a().ack().reply(), verdict)
                    }
                };
                run(&mut lab, &format!("SG-3.4: {own} {peer}, left is {left}"), vec![next(REVOKED)]);
            }
        }
    });
}

#[test]
pub fn a_flow_whose_start_was_seen_needs_the_rule_that_let_it_in() {
    isolated(|| {
        let mut lab = cutting("in tcp22 A/32, out tcp40000 A/32");
        run(&mut lab, "SG-3.1", vec![arrives(tcp(A, B).syn(), NEW), leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED)]);
        lab.rules("sgB", "in tcp22 A/32, out none");
        run(
            &mut lab,
            "SG-3.4: the other direction's rule is none of its business",
            vec![arrives(tcp(A, B).ack(), ESTABLISHED), leaves(tcp(A, B).ack().reply(), ESTABLISHED)],
        );
    });
}

#[test]
pub fn errors_about_a_revoked_flow_end_with_it() {
    isolated(|| {
        for is_v4 in [true, false] {
            let request = || tcp(B, X).family(is_v4, B, X).ports(50000, 443);
            let error = || if is_v4 { request().error(X, B, 3, 4) } else { request().error(X, B, 2, 0) };
            let mut lab = cutting("in none, out tcp443 X/32 + tcp443 X/128");
            run(&mut lab, "SG-3.7", vec![leaves(request().syn(), NEW), arrives(error(), Ok(Pass::Related))]);
            lab.rules("sgB", "in none, out tcp443 X/32 + tcp443 X/128 + udp");
            run(&mut lab, "SG-3.7: another rule", vec![arrives(error(), Ok(Pass::Related))]);
            lab.rules("sgB", "in none, out none");
            run(
                &mut lab,
                "SG-3.4, SG-3.7: before any packet of the flow itself",
                vec![arrives(error(), NO_RULE), arrives(request().ack().reply(), REVOKED), arrives(error(), NO_RULE)],
            );
            // As AWS does it, tracked flows go on, and so do their errors.
            let mut lab = Lab::new("in none, out tcp443 X/32 + tcp443 X/128");
            run(&mut lab, "SG-3.7", vec![leaves(request().syn(), NEW)]);
            lab.rules("sgB", "in none, out none");
            run(&mut lab, "SG-3.4, SG-3.7", vec![arrives(error(), Ok(Pass::Related))]);
        }
    });
}
