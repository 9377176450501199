//! Flows: replies, revokes, timeouts, the limit (SG-3.1 to SG-3.6, SG-3.9).

use sg_common::abi::{Flow, FlowKey, MAX_FLOWS};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{icmp, icmpv6, other, tcp, udp};

use crate::{Step, arrives, forget_flows, leaves, run, scene};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const NO_RULE: Verdict = Err(Drop::NoRule);

fn handshake() -> Vec<Step> {
    vec![
        arrives(tcp(A, B).syn(), NEW),
        leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED),
        arrives(tcp(A, B).ack(), ESTABLISHED),
    ]
}

#[test]
pub fn a_session_needs_one_direction() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for is_v4 in [true, false] {
            let packet = || tcp(A, B).family(is_v4, A, B);
            scene(
                &mut lab,
                "SG-3.1",
                "in tcp22 A/32 + tcp22 A/128, out none",
                vec![
                    leaves(packet().syn_ack().reply(), NO_RULE),
                    arrives(packet().syn(), NEW),
                    leaves(packet().syn_ack().reply(), ESTABLISHED),
                    arrives(packet().ack().payload(100), ESTABLISHED),
                    leaves(packet().ack().payload(900).reply(), ESTABLISHED),
                    arrives(packet().fin(), ESTABLISHED),
                    leaves(packet().fin().reply(), ESTABLISHED),
                    arrives(packet().ack(), ESTABLISHED),
                    // Another port is another flow.
                    leaves(packet().ports(40001, 22).ack().reply(), NO_RULE),
                    leaves(packet().ports(40000, 23).ack().reply(), NO_RULE),
                    leaves(tcp(C, B).family(is_v4, C, B).ack().reply(), NO_RULE),
                ],
            );
        }
    });
}

#[test]
pub fn revoking_a_tracked_rule_spares_its_flows() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", handshake());
        lab.rules("sgB", "in none, out none");
        run(
            &mut lab,
            "SG-3.4",
            vec![
                arrives(tcp(A, B).ack().payload(10), ESTABLISHED),
                leaves(tcp(A, B).ack().payload(10).reply(), ESTABLISHED),
                arrives(tcp(A, B).ports(40001, 22).syn(), NO_RULE),
                // A new SYN of the same ports begins something new.
                arrives(tcp(A, B).syn(), NO_RULE),
                arrives(tcp(A, B).ack(), ESTABLISHED),
            ],
        );
    });
}

#[test]
pub fn replies_to_what_b_began() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let request = || tcp(B, X).ports(50000, 443);
        run(
            &mut lab,
            "SG-3.1",
            vec![
                arrives(request().syn_ack().reply(), NO_RULE),
                leaves(request().syn(), NEW),
                arrives(request().syn_ack().reply(), ESTABLISHED),
                leaves(request().ack(), ESTABLISHED),
                arrives(request().ack().reply().payload(1000), ESTABLISHED),
                arrives(tcp(X, B).ports(443, 50001).ack(), NO_RULE),
                arrives(tcp(X, B).ports(443, 50000).syn(), NO_RULE),
                arrives(tcp(A, B).ports(443, 50000).ack(), NO_RULE),
            ],
        );
    });
}

#[test]
pub fn simultaneous_syns_need_both_rules() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let ours = || tcp(B, X).ports(179, 179);
        scene(
            &mut lab,
            "RFC 9293, 3.5",
            "in none, out tcp179 X/32",
            vec![leaves(ours().syn(), NEW), arrives(ours().syn().reply(), NO_RULE)],
        );
        scene(
            &mut lab,
            "RFC 9293, 3.5",
            "in tcp179 X/32, out tcp179 X/32",
            vec![
                leaves(ours().syn(), NEW),
                arrives(ours().syn().reply(), NEW),
                leaves(ours().syn_ack(), ESTABLISHED),
                arrives(ours().syn_ack().reply(), ESTABLISHED),
                leaves(ours().ack(), ESTABLISHED),
            ],
        );
    });
}

#[test]
pub fn udp_ages_by_its_exchanges() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let ask = || udp(B, X);
        let answer = || udp(B, X).reply();
        for (idle, expected) in [(29_000, ESTABLISHED), (31_000, NO_RULE)] {
            scene(&mut lab, "SG-3.5: one way", "in none", vec![leaves(ask(), NEW)]);
            lab.advance(idle);
            run(&mut lab, "SG-3.5: one way", vec![arrives(answer(), expected)]);
        }
        for (idle, expected) in [(29_000, ESTABLISHED), (31_000, NO_RULE)] {
            scene(
                &mut lab,
                "SG-3.5: one exchange",
                "in none",
                vec![leaves(ask(), NEW), arrives(answer(), ESTABLISHED)],
            );
            lab.advance(idle);
            run(&mut lab, "SG-3.5: one exchange", vec![arrives(answer(), expected)]);
        }
        for (idle, expected) in [(179_000, ESTABLISHED), (181_000, NO_RULE)] {
            scene(
                &mut lab,
                "SG-3.5: more than one",
                "in none",
                vec![
                    leaves(ask(), NEW),
                    arrives(answer(), ESTABLISHED),
                    leaves(ask(), ESTABLISHED),
                    arrives(answer(), ESTABLISHED),
                ],
            );
            lab.advance(idle);
            run(&mut lab, "SG-3.5: more than one", vec![arrives(answer(), expected)]);
        }
    });
}

#[test]
pub fn idle_time_counts_from_the_last_packet() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for (gap, idle, expected) in
            [(150, 29_700, ESTABLISHED), (200, 29_600, ESTABLISHED), (900, 29_500, ESTABLISHED), (900, 30_500, NO_RULE)]
        {
            scene(&mut lab, "SG-3.5", "in none", vec![leaves(udp(B, X), NEW)]);
            lab.advance(gap);
            run(&mut lab, "SG-3.5", vec![leaves(udp(B, X), ESTABLISHED)]);
            lab.advance(idle);
            run(&mut lab, "SG-3.5: idle since the last packet", vec![arrives(udp(B, X).reply(), expected)]);
        }
        for (gap, idle, expected) in [(1_300, 179_000, ESTABLISHED), (1_000, 179_300, ESTABLISHED)] {
            scene(
                &mut lab,
                "SG-3.5",
                "in none",
                vec![
                    leaves(udp(B, X), NEW),
                    arrives(udp(B, X).reply(), ESTABLISHED),
                    leaves(udp(B, X), ESTABLISHED),
                    arrives(udp(B, X).reply(), ESTABLISHED),
                ],
            );
            lab.advance(gap);
            run(&mut lab, "SG-3.5", vec![arrives(udp(B, X).reply(), ESTABLISHED)]);
            lab.advance(idle);
            run(&mut lab, "SG-3.5: a stream", vec![arrives(udp(B, X).reply(), expected)]);
        }
    });
}

#[test]
pub fn tcp_ages_by_its_state() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let rules = "in tcp22 A/32, out none";
        let back = || tcp(A, B).ack().reply();
        let cases: Vec<(&str, Vec<Step>, u64)> = vec![
            ("SYN sent", vec![arrives(tcp(A, B).syn(), NEW)], 120),
            ("SYN received", vec![arrives(tcp(A, B).syn(), NEW), leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED)], 60),
            ("established", handshake(), 432_000),
        ];
        for (name, steps, seconds) in cases {
            let steps: Vec<(Step, u64)> = steps.into_iter().map(|step| (step, seconds)).collect();
            for (idle, expected) in [(seconds * 1000 - 1000, ESTABLISHED), (seconds * 1000 + 1000, NO_RULE)] {
                let steps = steps.iter().map(|(step, _)| Step { packet: step.packet.clone(), ..*step }).collect();
                scene(&mut lab, name, rules, steps);
                lab.advance(idle);
                run(&mut lab, &format!("SG-3.5: {name} and idle for {idle} ms"), vec![leaves(back(), expected)]);
            }
        }
        for (name, end, seconds) in [
            ("half closed", vec![arrives(tcp(A, B).fin(), ESTABLISHED)], 120),
            ("closed", vec![arrives(tcp(A, B).fin(), ESTABLISHED), leaves(tcp(A, B).fin().reply(), ESTABLISHED)], 120),
            ("reset", vec![arrives(tcp(A, B).rst(), ESTABLISHED)], 10),
        ] {
            for (idle, expected) in [(seconds * 1000 - 1000, ESTABLISHED), (seconds * 1000 + 1000, NO_RULE)] {
                let end = end.iter().map(|step| Step { packet: step.packet.clone(), ..*step });
                scene(&mut lab, name, rules, handshake().into_iter().chain(end).collect());
                lab.advance(idle);
                run(&mut lab, &format!("SG-3.5: {name} and idle for {idle} ms"), vec![leaves(back(), expected)]);
            }
        }
    });
}

#[test]
pub fn guessed_ends_do_not_cut_a_live_flow() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", handshake());
        run(
            &mut lab,
            "RFC 5961: a guessed RST, both sides go on",
            vec![
                arrives(tcp(A, B).rst(), ESTABLISHED),
                leaves(tcp(A, B).ack().payload(5).reply(), ESTABLISHED),
                arrives(tcp(A, B).ack().payload(5), ESTABLISHED),
            ],
        );
        lab.advance(3_600_000);
        run(&mut lab, "it is established again", vec![leaves(tcp(A, B).ack().reply(), ESTABLISHED)]);
        run(
            &mut lab,
            "a guessed FIN, its side goes on sending data",
            vec![arrives(tcp(A, B).fin(), ESTABLISHED), arrives(tcp(A, B).ack().payload(5), ESTABLISHED)],
        );
        lab.advance(3_600_000);
        run(&mut lab, "it is established again", vec![leaves(tcp(A, B).ack().reply(), ESTABLISHED)]);
        lab.rules("sgB", "in none, out none");
        run(
            &mut lab,
            "no flag combination opens what rules don't",
            vec![
                arrives(tcp(A, B).ports(40007, 22).flags(0), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).flags(0x29), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).flags(0xff), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).flags(0x03), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).syn_ack(), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).rst(), NO_RULE),
                arrives(tcp(A, B).ports(40007, 22).fin(), NO_RULE),
            ],
        );
    });
}

#[test]
pub fn a_closed_connection_s_ports_can_be_used_again() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", handshake());
        run(
            &mut lab,
            "closed",
            vec![
                arrives(tcp(A, B).fin(), ESTABLISHED),
                leaves(tcp(A, B).fin().reply(), ESTABLISHED),
                arrives(tcp(A, B).ack(), ESTABLISHED),
            ],
        );
        run(&mut lab, "again", handshake());
        lab.advance(3_600_000);
        run(&mut lab, "SG-3.5: the new connection lives by its own state", vec![arrives(tcp(A, B).ack(), ESTABLISHED)]);
    });
}

#[test]
pub fn mid_flow_packets_are_picked_up_while_their_rule_stands() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(
            &mut lab,
            "SG-3.9",
            vec![
                leaves(tcp(A, B).ack().reply(), NO_RULE),
                arrives(tcp(C, B).ack(), NO_RULE),
                arrives(tcp(A, B).ack(), NEW),
                leaves(tcp(A, B).ack().reply(), ESTABLISHED),
            ],
        );
        forget_flows(&mut lab);
        lab.rules("sgB", "in tcp22 A/32 + tcp23 A/32, out none");
        run(
            &mut lab,
            "SG-3.4: under another policy it may be a revoked flow's",
            vec![arrives(tcp(A, B).ack(), Ok(Pass::MidFlow)), leaves(tcp(A, B).ack().reply(), NO_RULE)],
        );
    });
}

#[test]
pub fn other_protocols_are_tracked_by_addresses() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let esp = || other(A, B, 50);
        for (idle, expected) in [(599_000, ESTABLISHED), (601_000, NO_RULE)] {
            scene(
                &mut lab,
                "SG-3.3",
                "in 50 A/32, out none",
                vec![
                    leaves(esp().reply(), NO_RULE),
                    arrives(esp(), NEW),
                    leaves(esp().reply(), ESTABLISHED),
                    leaves(other(B, C, 50), NO_RULE),
                    leaves(other(B, A, 47), NO_RULE),
                ],
            );
            lab.advance(idle);
            run(&mut lab, "SG-3.3", vec![leaves(esp().reply(), expected)]);
        }
    });
}

#[test]
pub fn pings_are_tracked_by_who_asked() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for is_v4 in [true, false] {
            let ping = |from, to| if is_v4 { icmp(from, to, 8, 0) } else { icmpv6(from, to, 128, 0) };
            scene(
                &mut lab,
                "SG-3.2: ICMP is always tracked",
                "in none",
                vec![
                    arrives(ping(B, X).reply(), NO_RULE),
                    leaves(ping(B, X), NEW),
                    arrives(ping(B, X).reply(), ESTABLISHED),
                    arrives(ping(X, B), NO_RULE),
                    arrives(ping(B, X).id(2).reply(), NO_RULE),
                    arrives(ping(B, C).reply(), NO_RULE),
                ],
            );
            lab.advance(29_000);
            run(&mut lab, "SG-3.5", vec![arrives(ping(B, X).reply(), ESTABLISHED)]);
            lab.advance(31_000);
            run(&mut lab, "SG-3.5", vec![arrives(ping(B, X).reply(), NO_RULE)]);
            scene(
                &mut lab,
                "a ping and a ping back are two flows",
                "in all, out all",
                vec![
                    arrives(ping(X, B), NEW),
                    leaves(ping(X, B).reply(), ESTABLISHED),
                    leaves(ping(B, X), NEW),
                    arrives(ping(B, X).reply(), ESTABLISHED),
                ],
            );
            scene(
                &mut lab,
                "an answer that a rule allows makes no flow for questions",
                "in icmp 0/-1 + icmpv6 129/-1, out none",
                vec![
                    arrives(ping(B, X).reply(), NEW),
                    leaves(ping(B, X), NO_RULE),
                    leaves(ping(X, B).reply(), NO_RULE),
                ],
            );
        }
    });
}

#[test]
pub fn a_neighbour_s_packets_touch_nobody_else_s_flows() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", handshake());
        lab.rules("sgC", "in all, out all");
        // C spoofs A towards B: its own interface stops it, and makes no flow of it.
        let forged = tcp(A, B).from_mac(C.mac).rst();
        assert_eq!(lab.from(C, &forged), Err(Drop::SourceAddress));
        // Even a flow of C's interface with the same addresses would be another one.
        lab.edit(|inventory| {
            inventory.enis.get_mut(&C.eni()).expect("C's interface").source_dest_check = false;
        });
        for _ in 0..2 {
            assert!(lab.from(C, &tcp(B, A).ports(22, 40001).syn().from_mac(C.mac)).is_ok());
        }
        run(
            &mut lab,
            "SG-3.1: B's table knows nothing of it",
            vec![
                leaves(tcp(A, B).ports(40001, 22).ack().reply(), NO_RULE),
                leaves(tcp(A, B).ack().reply(), ESTABLISHED),
            ],
        );
    });
}

#[test]
pub fn a_full_table_drops_new_flows_only() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32 + tcp80 any4, out tcp443 X/32 + tcp any4");
        run(&mut lab, "SG-3.1", handshake());
        let flow = Flow { seen: u64::MAX / 2, ..Flow::default() };
        let stranger = |number: u32| {
            let mut key = filler();
            key.remote.0[3] = number;
            key
        };
        let (_, maps) = lab.applier().datapath();
        let mut added = 0;
        while maps.flows.insert(stranger(added), flow, 0).is_ok() {
            added += 1;
        }
        assert_eq!(added, MAX_FLOWS - 1, "one flow was there before");
        lab.reference().capacity.set(1);
        run(
            &mut lab,
            "SG-3.6",
            vec![
                arrives(tcp(A, B).ports(40001, 22).syn(), Err(Drop::ConntrackFull)),
                arrives(tcp(A, B).ack(), ESTABLISHED),
                leaves(tcp(A, B).ack().reply(), ESTABLISHED),
                arrives(tcp(X, B).ports(40000, 80).syn(), Ok(Pass::Untracked)),
                leaves(tcp(X, B).ports(40000, 80).syn_ack().reply(), Ok(Pass::Untracked)),
                leaves(udp(B, X).to_address("169.254.169.253"), Ok(Pass::Exempt)),
            ],
        );
        let (_, maps) = lab.applier().datapath();
        maps.flows.remove(&stranger(0)).expect("a flow that was just added");
        lab.reference().capacity.set(2);
        run(
            &mut lab,
            "SG-3.6: as soon as there is room",
            vec![
                arrives(tcp(A, B).ports(40001, 22).syn(), NEW),
                arrives(tcp(A, B).ports(40002, 22).syn(), Err(Drop::ConntrackFull)),
            ],
        );
    });
}

/// A flow of an interface that isn't there.
fn filler() -> FlowKey {
    let nobody = sg_common::addr::Address::v4([192, 0, 2, 1]);
    FlowKey { eni: 77, protocol: 17, asker: 0, local_port: 1, remote_port: 1, local: nobody, remote: nobody }
}
