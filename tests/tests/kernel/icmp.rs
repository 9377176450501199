//! ICMP errors about tracked flows (SG-3.7).

use sg_common::abi::RELATED_ERRORS;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{icmp, icmpv6, tcp, udp};

use crate::{arrives, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const RELATED: Verdict = Ok(Pass::Related);
const NO_RULE: Verdict = Err(Drop::NoRule);

#[test]
pub fn related_errors_pass_and_strict_ones_need_a_rule() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let request = || tcp(B, X).ports(50000, 443).syn();
        let request6 = || tcp(B, X).v6(B, X).ports(50000, 443).syn();
        run(
            &mut lab,
            "SG-3.7",
            vec![
                leaves(request(), NEW),
                leaves(request6(), NEW),
                leaves(udp(B, X), NEW),
                leaves(icmp(B, X, 8, 0), NEW),
                arrives(request().error(X, B, 3, 4), RELATED),
                arrives(request().error(X, B, 3, 1), RELATED),
                arrives(request().error(X, B, 11, 0), RELATED),
                arrives(request().error(X, B, 12, 0), RELATED),
                // A router on the way sends them from its own address.
                arrives(request().error(X.at("198.51.100.77"), B, 11, 0), RELATED),
                arrives(udp(B, X).error(X, B, 3, 3), RELATED),
                arrives(icmp(B, X, 8, 0).error(X, B, 11, 0), RELATED),
                arrives(request6().error(X, B, 1, 4), RELATED),
                arrives(request6().error(X, B, 2, 0), RELATED),
                arrives(request6().error(X, B, 3, 0), RELATED),
                arrives(request6().error(X, B, 4, 0), RELATED),
                // A redirect asks for something.
                arrives(request().error(X, B, 5, 1), NO_RULE),
            ],
        );
        lab.configure(|config| config.flags &= !RELATED_ERRORS);
        run(
            &mut lab,
            "SG-3.7, strict",
            vec![arrives(request().error(X, B, 3, 4), NO_RULE), arrives(request6().error(X, B, 2, 0), NO_RULE)],
        );
        lab.rules("sgB", "in icmp 3/4 any4");
        run(
            &mut lab,
            "SG-3.7, strict",
            vec![arrives(request().error(X, B, 3, 4), NEW), arrives(request().error(X, B, 3, 1), NO_RULE)],
        );
    });
}

#[test]
pub fn errors_that_b_sends_about_what_it_received() {
    isolated(|| {
        let mut lab = Lab::new("in udp53 A/32, out none");
        run(
            &mut lab,
            "SG-3.7",
            vec![
                leaves(udp(A, B).error(B, A, 3, 3), NO_RULE),
                arrives(udp(A, B), NEW),
                leaves(udp(A, B).error(B, A, 3, 3), RELATED),
                // About what B itself sent: nobody sends B an error by way of B.
                leaves(udp(A, B).reply().error(B, A, 3, 3), Err(Drop::NoRule)),
            ],
        );
    });
}

#[test]
pub fn forged_errors_do_not() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let request = || tcp(B, X).ports(50000, 443).syn();
        let quoting = |mutate: fn(&mut Vec<u8>)| {
            let mut error = request().error(X, B, 3, 4);
            mutate(&mut error.payload);
            error
        };
        run(
            &mut lab,
            "SG-3.7",
            vec![
                leaves(request(), NEW),
                arrives(request().ports(50001, 443).error(X, B, 3, 4), NO_RULE),
                arrives(request().ports(50000, 444).error(X, B, 3, 4), NO_RULE),
                // About the other direction: B never sent that.
                arrives(request().reply().error(X, B, 3, 4).to_address("10.0.1.20"), NO_RULE),
                arrives(quoting(|quote| quote[9] = 17), NO_RULE),
                arrives(quoting(|quote| quote[0] = 0x65), NO_RULE),
                arrives(quoting(|quote| quote[0] = 0x44), NO_RULE),
                arrives(quoting(|quote| quote[0] = 0x4f), NO_RULE),
                arrives(quoting(|quote| quote[7] = 1), NO_RULE),
                arrives(quoting(|quote| quote[15] ^= 1), NO_RULE),
                arrives(quoting(|quote| quote[19] ^= 1), NO_RULE),
                arrives(quoting(|quote| quote.truncate(27)), NO_RULE),
                arrives(quoting(|quote| quote.truncate(20)), NO_RULE),
                arrives(quoting(|quote| quote.truncate(0)), NO_RULE),
                arrives(icmpv6(X, B, 1, 0).carrying(request().frame()[14..].to_vec()), NO_RULE),
                // An error about an error.
                arrives(request().error(X, B, 3, 4).error(X, B, 3, 4).to_address("10.0.1.20"), NO_RULE),
            ],
        );
        lab.advance(121_000);
        run(&mut lab, "SG-3.7: about a flow that is no more", vec![arrives(request().error(X, B, 3, 4), NO_RULE)]);
    });
}

#[test]
pub fn an_allowed_echo_lets_in_its_own_answer_only() {
    isolated(|| {
        let mut lab = Lab::new("in icmp 8/0 A/32 + icmpv6 128/0 A/128, out none");
        for is_v4 in [true, false] {
            let (ask, answer) = if is_v4 { (8, 0) } else { (128, 129) };
            let ping = |kind, code| if is_v4 { icmp(A, B, kind, code) } else { icmpv6(A, B, kind, code) };
            let back = |kind, code| if is_v4 { icmp(B, A, kind, code) } else { icmpv6(B, A, kind, code) };
            run(
                &mut lab,
                "SG-1.3, SG-3.2",
                vec![
                    leaves(back(answer, 0), NO_RULE),
                    arrives(ping(ask, 0), NEW),
                    // The rule is about code 0: the flow lends itself to no other.
                    arrives(ping(ask, 1), NO_RULE),
                    arrives(ping(ask, 255), NO_RULE),
                    leaves(back(answer, 1), NO_RULE),
                    leaves(back(answer, 0).id(2), NO_RULE),
                    leaves(back(ask, 0), NO_RULE),
                    arrives(ping(answer, 0), NO_RULE),
                    leaves(back(answer, 0), Ok(Pass::Established)),
                    arrives(ping(ask, 0), Ok(Pass::Established)),
                ],
            );
            for kind in (0..=255).filter(|&kind| kind != answer && !(133..=137).contains(&kind)) {
                assert!(lab.from(B, &back(kind, 0)).is_err(), "SG-3.2: type {kind} is no answer to an echo");
            }
        }
    });
}
