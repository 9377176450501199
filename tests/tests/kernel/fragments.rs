//! Fragments: the first decides, the rest follow it (SG-3.8).

use sg_common::abi::{CUT_ON_REVOKE, Direction};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, icmp, tcp, udp};

use crate::{arrives, forget_flows, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const NO_RULE: Verdict = Err(Drop::NoRule);
const ORPHAN: Verdict = Err(Drop::FragmentOrphan);
const FOLLOWS: Verdict = Ok(Pass::Fragment);

fn verdicts(lab: &mut Lab, frames: &[Vec<u8>]) -> Vec<Verdict> {
    frames.iter().map(|frame| lab.run(B, Direction::Ingress, frame)).collect()
}

#[test]
pub fn the_first_decides_and_the_rest_follow() {
    isolated(|| {
        let mut lab = Lab::new("in udp5000, out none");
        for (number, is_v4) in [true, false].into_iter().enumerate() {
            let id = 100 * number as u16;
            let datagram = |port| udp(X, B).family(is_v4, X, B).ports(40000, port).payload(4096);
            let allowed = datagram(5000).fragments(id + 1, 1400);
            assert_eq!(allowed.len(), 3, "SG-3.8");
            assert_eq!(verdicts(&mut lab, &allowed), [NEW, FOLLOWS, FOLLOWS], "SG-3.8");
            let denied = datagram(5001).fragments(id + 2, 1400);
            assert_eq!(verdicts(&mut lab, &denied), [NO_RULE, ORPHAN, ORPHAN], "SG-3.8");
            let denied = datagram(5001).fragments(id + 1, 1400);
            assert_eq!(verdicts(&mut lab, &denied), [NO_RULE, ORPHAN, ORPHAN], "SG-3.8: an identification used again");
            assert_eq!(verdicts(&mut lab, &allowed)[0], Ok(Pass::Established), "SG-3.8");
            // Another packet's id, another source, another protocol.
            let [_, middle, last] = datagram(5000).fragments(id + 3, 1400).try_into().expect("three fragments");
            assert_eq!(verdicts(&mut lab, &[middle, last]), [ORPHAN, ORPHAN], "SG-3.8: a rest without a first");
            let other = udp(A, B).family(is_v4, A, B).ports(40000, 5000).payload(4096).fragments(id + 1, 1400);
            assert_eq!(verdicts(&mut lab, &other[1..]), [ORPHAN, ORPHAN], "SG-3.8: another source");
            let mut reversed = datagram(5000).fragments(id + 4, 1400);
            reversed.reverse();
            assert_eq!(verdicts(&mut lab, &reversed), [ORPHAN, ORPHAN, Ok(Pass::Established)], "SG-3.8: last first");
            assert_eq!(verdicts(&mut lab, &allowed), [Ok(Pass::Established), FOLLOWS, FOLLOWS], "SG-3.8: sent again");
        }
        let ours = |port| udp(B, X).ports(40000, port).payload(2000).fragments(1, 1400);
        for frame in ours(5000) {
            let verdict = lab.run(B, Direction::Egress, &frame);
            assert!(verdict == NO_RULE || verdict == ORPHAN, "a first that came in opens nothing for what goes out");
        }
    });
}

#[test]
pub fn replies_in_fragments_follow_their_flow() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        run(&mut lab, "SG-3.1", vec![leaves(udp(B, X), NEW)]);
        let answer = udp(B, X).reply().payload(3000).fragments(9, 1400);
        assert_eq!(verdicts(&mut lab, &answer), [Ok(Pass::Established), FOLLOWS, FOLLOWS], "SG-3.8");
        run(&mut lab, "SG-3.1", vec![leaves(icmp(B, X, 8, 0), NEW)]);
        let echo = icmp(B, X, 8, 0).reply().payload(3000).fragments(10, 1400);
        assert_eq!(verdicts(&mut lab, &echo), [Ok(Pass::Established), FOLLOWS, FOLLOWS], "SG-3.8");
    });
}

#[test]
pub fn nothing_may_rewrite_what_was_judged() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 + udp53, out none");
        for is_v4 in [true, false] {
            forget_flows(&mut lab);
            let syn = || tcp(X, B).family(is_v4, X, B).syn();
            let piece = |packet: &dyn Fn() -> Packet, id: u16, offset: u16, bytes: usize| {
                let mut packet = packet().as_fragment(id, offset, true);
                packet.transport = tests::packets::Transport::None;
                packet.payload(bytes)
            };
            run(
                &mut lab,
                "RFC 3128: later fragments behind the header only",
                vec![
                    arrives(syn().payload(12).as_fragment(7, 0, true), NEW),
                    arrives(piece(&syn, 7, 1, 8), Err(Drop::FragmentOverlap)),
                    arrives(piece(&syn, 7, 2, 8), Err(Drop::FragmentOverlap)),
                    arrives(piece(&syn, 7, 3, 8), FOLLOWS),
                    arrives(piece(&syn, 7, 4, 8), FOLLOWS),
                    arrives(piece(&syn, 7, 8189, 8), FOLLOWS),
                ],
            );
            run(
                &mut lab,
                "RFC 1858: a first fragment without its whole header",
                vec![
                    arrives(piece(&syn, 8, 0, 8), Err(Drop::Malformed)),
                    arrives(piece(&syn, 8, 0, 16), Err(Drop::Malformed)),
                    arrives(piece(&syn, 8, 1, 16), ORPHAN),
                    arrives(piece(&|| udp(X, B).family(is_v4, X, B), 9, 0, 0), Err(Drop::Malformed)),
                ],
            );
        }
    });
}

#[test]
pub fn extension_headers_around_fragments() {
    isolated(|| {
        let mut lab = Lab::new("in udp5000, out none");
        let datagram = |port| udp(X, B).v6(X, B).ports(40000, port).payload(100);
        run(
            &mut lab,
            "RFC 6946: an atomic fragment is a whole packet",
            vec![
                arrives(datagram(5000).as_fragment(1, 0, false), NEW),
                arrives(datagram(5001).as_fragment(1, 0, false), NO_RULE),
            ],
        );
        let headed = |port, id| datagram(port).payload(3000).hop_by_hop().fragments(id, 1400);
        assert_eq!(verdicts(&mut lab, &headed(5000, 2)), [Ok(Pass::Established), FOLLOWS, FOLLOWS], "SG-3.8");
        assert_eq!(verdicts(&mut lab, &headed(5001, 3)), [NO_RULE, ORPHAN, ORPHAN], "SG-3.8");
        // A second fragment header would hide the first, whose rest could then follow another packet.
        let inner = |outer_more: u8, port| {
            datagram(port).extension(44, &[0, 0, outer_more, 0, 0, 0, 4]).as_fragment(5, 0, false)
        };
        run(
            &mut lab,
            "RFC 8200, 4.5",
            vec![
                arrives(inner(1, 5001), Err(Drop::Malformed)),
                arrives(inner(1, 5000), Err(Drop::Malformed)),
                arrives(datagram(5000).extension(44, &[0, 0, 8, 0, 0, 0, 6]), ORPHAN),
            ],
        );
    });
}

#[test]
pub fn the_rest_comes_within_the_time_that_receivers_wait() {
    isolated(|| {
        let mut lab = Lab::new("in udp5000, out udp5000");
        for (id, is_v4) in [(1, true), (2, false)] {
            for direction in [Direction::Ingress, Direction::Egress] {
                let (from, to) = if direction == Direction::Ingress { (X, B) } else { (B, X) };
                let datagram = udp(from, to).family(is_v4, from, to).ports(5000, 5000).payload(4096);
                let [first, middle, last] = datagram.fragments(id, 1400).try_into().expect("three fragments");
                lab.run(B, direction, &first).expect("what a rule allows");
                // A grain of the clock less.
                lab.advance(29_900);
                assert_eq!(lab.run(B, direction, &middle), FOLLOWS, "SG-3.8, RFC 791, RFC 8200, 4.5");
                lab.advance(200);
                // What follows doesn't keep it open.
                assert_eq!(lab.run(B, direction, &last), ORPHAN, "SG-3.8, RFC 791, RFC 8200, 4.5");
                assert_eq!(lab.run(B, direction, &middle), ORPHAN, "SG-3.8");
                lab.run(B, direction, &first).expect("sent again");
                assert_eq!(lab.run(B, direction, &last), FOLLOWS, "SG-3.8: a new packet with the same identification");
            }
        }
    });
}

#[test]
pub fn a_revoke_ends_fragmented_packets_too() {
    isolated(|| {
        for is_cut in [true, false] {
            let mut lab = Lab::new("in udp5000, out none");
            lab.configure(|config| config.flags |= if is_cut { CUT_ON_REVOKE } else { 0 });
            let [first, middle, last] =
                udp(X, B).ports(40000, 5000).payload(4096).fragments(1, 1400).try_into().expect("three fragments");
            assert_eq!(lab.run(B, Direction::Ingress, &first), NEW, "SG-3.8");
            assert_eq!(lab.run(B, Direction::Ingress, &middle), FOLLOWS, "SG-3.8");
            lab.rules("sgB", "in none, out none");
            // Without the cut it is the rest of a packet that was allowed.
            let expected = if is_cut { ORPHAN } else { FOLLOWS };
            assert_eq!(lab.run(B, Direction::Ingress, &last), expected, "SG-3.4");
            lab.advance(30_100);
            assert_eq!(lab.run(B, Direction::Ingress, &last), ORPHAN, "SG-3.4, SG-3.8");
        }
    });
}

#[test]
pub fn an_interface_s_packets_go_with_it() {
    isolated(|| {
        let mut lab = Lab::new("in udp5000, out none");
        let [first, middle, last] =
            udp(X, B).ports(40000, 5000).payload(4096).fragments(1, 1400).try_into().expect("three fragments");
        assert_eq!(lab.run(B, Direction::Ingress, &first), NEW, "SG-3.8");
        assert_eq!(lab.run(B, Direction::Ingress, &middle), FOLLOWS, "SG-3.8");
        let number = |lab: &Lab| lab.reference().interfaces[&lab.ifindex(B)].eni;
        let before = number(&lab);
        let mut b = None;
        lab.attach(|attachments| {
            let at = attachments.iter().position(|attachment| attachment.link.name == "sgt-b").expect("B's link");
            b = Some(attachments.remove(at));
        });
        lab.attach(|attachments| attachments.extend(b.take()));
        assert_eq!(number(&lab), before, "the number that was free is given again");
        assert_eq!(lab.run(B, Direction::Ingress, &last), ORPHAN, "SG-3.8: another interface's packet");
    });
}
