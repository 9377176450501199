//! Ends of connections that a stranger guesses (SG-3.4, SG-3.5; RFC 5961): they neither open nor cut anything.

use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, tcp};

use crate::{Step, arrives, leaves, run, scene};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const NO_RULE: Verdict = Err(Drop::NoRule);
const HOUR: u64 = 3_600_000;

/// Where A's and B's bytes begin.
const OF_A: u32 = 0xffff_ff00;
const OF_B: u32 = 5_000_000;

fn a(sent: u32, received: u32) -> Packet {
    tcp(A, B).numbers(OF_A.wrapping_add(sent), OF_B.wrapping_add(received))
}

fn b(sent: u32, received: u32) -> Packet {
    tcp(A, B).reply().numbers(OF_B.wrapping_add(sent), OF_A.wrapping_add(received))
}

fn handshake() -> Vec<Step> {
    vec![arrives(a(0, 0).syn(), NEW), leaves(b(0, 1).syn_ack(), ESTABLISHED), arrives(a(1, 1).ack(), ESTABLISHED)]
}

#[test]
pub fn a_forged_end_does_not_shorten_an_idle_connection() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        for (what, forged) in [
            ("RST far ahead", a(1 << 24, 1).rst()),
            ("RST from before", a(0, 1).numbers(OF_A - 4096, OF_B).rst()),
            ("RST at the other end of the space", a(1 << 31, 1).rst()),
            ("FIN far ahead", a(1 << 24, 1).fin()),
            ("FIN from before", a(0, 1).numbers(OF_A - 4096, OF_B).fin()),
            ("FIN with data", a(0, 1).numbers(OF_A - 4096, OF_B).fin().payload(1000)),
            ("all flags but SYN", a(1 << 24, 1).flags(0xfd)),
        ] {
            scene(&mut lab, what, "in tcp22 A/32, out none", handshake());
            run(&mut lab, what, vec![arrives(forged, ESTABLISHED)]);
            lab.advance(HOUR);
            run(
                &mut lab,
                &format!("SG-3.5: {what}: it is as established as before"),
                vec![leaves(b(1, 1).ack().payload(5), ESTABLISHED), arrives(a(1, 6).ack(), ESTABLISHED)],
            );
        }
    });
}

#[test]
pub fn the_genuine_end_is_known() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let cases: Vec<(&str, Vec<Step>, u64)> = vec![
            ("RST at what B acknowledged", vec![arrives(a(1, 1).rst(), ESTABLISHED)], 10),
            ("RST behind data that B hasn't acknowledged yet", vec![arrives(a(3_000_000, 1).rst(), ESTABLISHED)], 10),
            ("B's own RST, whatever its number", vec![leaves(b(1 << 30, 1).rst(), ESTABLISHED)], 10),
            ("FIN at what B acknowledged", vec![arrives(a(1, 1).fin(), ESTABLISHED)], 120),
            ("FIN behind the segment's data", vec![arrives(a(1, 1).fin().payload(700), ESTABLISHED)], 120),
            ("B's own FIN", vec![leaves(b(1 << 30, 1).fin(), ESTABLISHED)], 120),
            (
                "FIN after a long transfer that B acknowledged now and then",
                (1..200)
                    .map(|n| leaves(b(1, n * 1_000_000).ack(), ESTABLISHED))
                    .chain([arrives(a(199_100_000, 1).fin(), ESTABLISHED)])
                    .collect(),
                120,
            ),
        ];
        for (what, end, seconds) in cases {
            for (idle, expected) in [(seconds * 1000 - 1000, ESTABLISHED), (seconds * 1000 + 1000, NO_RULE)] {
                let end = end.iter().map(|step| Step { packet: step.packet.clone(), ..*step });
                scene(&mut lab, what, "in tcp22 A/32, out none", handshake().into_iter().chain(end).collect());
                lab.advance(idle);
                run(&mut lab, &format!("SG-3.5: {what}, idle for {idle} ms"), vec![leaves(b(1, 1).ack(), expected)]);
            }
        }
    });
}

#[test]
pub fn what_a_stranger_sends_moves_no_window() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(&mut lab, "SG-3.1", handshake());
        run(
            &mut lab,
            "RFC 5961: data at a guess, then an end that fits it",
            vec![
                arrives(a(1 << 29, 1).ack().payload(100), ESTABLISHED),
                arrives(a((1 << 29) + 100, 1).rst(), ESTABLISHED),
                arrives(a((1 << 29) + 100, 1).fin(), ESTABLISHED),
            ],
        );
        lab.advance(HOUR);
        run(&mut lab, "SG-3.5: nothing has ended", vec![leaves(b(1, 1).ack(), ESTABLISHED)]);
    });
}

#[test]
pub fn an_end_opens_nothing() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for flags in 0..=255 {
            let packet = tcp(X, B).ports(443, 40000).flags(flags);
            scene(
                &mut lab,
                "SG-2.1: no flags open what no rule allows",
                "in none, out none",
                vec![
                    arrives(packet.clone(), NO_RULE),
                    leaves(packet.clone().reply(), NO_RULE),
                    arrives(packet.clone(), NO_RULE),
                ],
            );
        }
        // Refused connections: nothing is acknowledged before, so the RST is believed, and ends the attempt.
        let syn = || tcp(B, X).ports(50000, 443).numbers(9, 0);
        scene(
            &mut lab,
            "SG-3.5: refused",
            "in none",
            vec![leaves(syn().syn(), NEW), arrives(syn().reply().numbers(0, 10).flags(0x14), ESTABLISHED)],
        );
        lab.advance(11_000);
        run(&mut lab, "SG-3.5: refused", vec![arrives(syn().reply().syn_ack(), NO_RULE)]);
    });
}
