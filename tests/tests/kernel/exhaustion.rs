//! Tables that one instance fills: it gets no further, and nobody else notices (SG-3.6, SG-3.8).

use sg_common::abi::{DEFAULT_ALLOWANCE, Direction, FRAGMENT_SLOTS, MAX_FLOWS};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, Host, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{tcp, udp};

use crate::{arrives, forget_flows, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const FULL: Verdict = Err(Drop::ConntrackFull);

/// How many flows the kernel counts for an instance's interface, and how many it has.
fn tracked(lab: &mut Lab, host: Host) -> (u32, u32) {
    let ifindex = lab.ifindex(host);
    let eni = lab.reference().interfaces[&ifindex].eni;
    let maps = lab.applier().maps();
    let there = maps.flows.keys().filter(|key| key.as_ref().is_ok_and(|key| u32::from(key.eni) == eni)).count();
    (maps.tracked(eni).expect("a counter"), u32::try_from(there).expect("as many as fit"))
}

/// SYNs from port after port of an instance, to address after address outside.
fn syns(from: Host, count: u32) -> impl Iterator<Item = Vec<u8>> {
    (0..count).map(move |number| {
        let [_, high, port @ ..] = number.to_be_bytes();
        let to = format!("198.51.100.{high}");
        tcp(from, X).ports(u16::from_be_bytes(port), 80).to_address(&to).syn().frame()
    })
}

#[test]
pub fn an_allowance_is_counted_exactly() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32");
        lab.configure(|config| config.allowance = 3);
        let out = |port| tcp(B, X).ports(port, 443).syn();
        run(
            &mut lab,
            "SG-3.6",
            vec![
                arrives(tcp(A, B).syn(), NEW),
                leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED),
                leaves(out(1), NEW),
                leaves(out(2), NEW),
                leaves(out(3), FULL),
                arrives(tcp(A, B).ports(40001, 22).syn(), FULL),
                // What has an entry goes on, and begins again.
                arrives(tcp(A, B).ack(), ESTABLISHED),
                leaves(out(2), NEW),
                leaves(udp(B, X).to_address("169.254.169.253"), Ok(Pass::Exempt)),
            ],
        );
        assert_eq!(tracked(&mut lab, B), (3, 3));
        assert_eq!(lab.from(A, &tcp(A, X).ports(1, 443).syn()), NEW, "another instance has its own");
        assert_eq!(tracked(&mut lab, A), (1, 1));
        forget_flows(&mut lab);
        run(&mut lab, "SG-3.6: expired flows make room", vec![leaves(out(3), NEW)]);
        assert_eq!(tracked(&mut lab, B), (1, 1));
        assert_eq!(tracked(&mut lab, A), (0, 0), "the sweep was everybody's");
    });
}

#[test]
pub fn what_is_cut_gives_its_place_back() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        lab.configure(|config| {
            config.allowance = 1;
            config.flags |= sg_common::abi::CUT_ON_REVOKE;
        });
        run(&mut lab, "SG-3.1", vec![arrives(tcp(A, B).syn(), NEW)]);
        lab.rules("sgB", "in tcp23 A/32, out none");
        run(
            &mut lab,
            "SG-3.4: --on-revoke=cut",
            vec![
                arrives(tcp(A, B).ports(40000, 23).syn(), FULL),
                leaves(tcp(A, B).syn_ack().reply(), Err(Drop::Revoked)),
                arrives(tcp(A, B).ports(40000, 23).syn(), NEW),
            ],
        );
        assert_eq!(tracked(&mut lab, B), (1, 1));
    });
}

#[test]
pub fn a_flood_neither_evicts_nor_starves_others() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32");
        lab.configure(|config| config.allowance = DEFAULT_ALLOWANCE);
        run(
            &mut lab,
            "SG-3.1",
            vec![
                arrives(tcp(A, B).syn(), NEW),
                leaves(tcp(A, B).syn_ack().reply(), ESTABLISHED),
                arrives(tcp(A, B).ack(), ESTABLISHED),
            ],
        );
        // A's SYN to B was B's flow only: it came in by B's interface without leaving by A's.
        assert_eq!(tracked(&mut lab, A), (0, 0));
        assert_eq!(lab.flood(A, Direction::Egress, syns(A, DEFAULT_ALLOWANCE + 1000)), DEFAULT_ALLOWANCE);
        assert_eq!(tracked(&mut lab, A), (DEFAULT_ALLOWANCE, DEFAULT_ALLOWANCE));
        const { assert!(DEFAULT_ALLOWANCE < MAX_FLOWS / 2, "or the table itself would have been the limit") };
        run(
            &mut lab,
            "SG-3.6: others go on and begin",
            vec![
                leaves(tcp(A, B).ack().payload(100).reply(), ESTABLISHED),
                arrives(tcp(A, B).ack(), ESTABLISHED),
                leaves(tcp(B, X).ports(1, 443).syn(), NEW),
                leaves(udp(B, X), NEW),
            ],
        );
        assert_eq!(tracked(&mut lab, B), (3, 3));
    });
}

/// The table itself, which one instance can fill only where it is given all of it.
#[test]
pub fn a_full_table_evicts_nobody_and_drops_what_is_new() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32 + tcp80 0.0.0.0/0, out all");
        lab.configure(|config| config.allowance = MAX_FLOWS);
        let syn = || tcp(A, B).syn();
        run(&mut lab, "SG-3.1", vec![leaves(tcp(B, X).ports(1, 443).syn(), NEW)]);
        assert_eq!(lab.flood(A, Direction::Egress, syns(A, MAX_FLOWS)), MAX_FLOWS - 1, "SG-3.6: B has one");
        assert_eq!(tracked(&mut lab, A), (MAX_FLOWS - 1, MAX_FLOWS - 1));
        for (packet, expected, what) in [
            (tcp(B, X).ports(1, 443).syn_ack().reply(), ESTABLISHED, "what lives goes on"),
            (syn(), FULL, "what is new is dropped"),
            (tcp(X, B).ports(40_000, 80).syn(), Ok(Pass::Untracked), "what needs no entry passes"),
        ] {
            assert_eq!(lab.execute(B, Direction::Ingress, &packet.frame()), expected, "SG-3.6: {what}");
        }
        assert_eq!(tracked(&mut lab, B), (1, 1), "SG-3.6: nothing was evicted");
        // Room comes when flows end, and not before.
        forget_flows(&mut lab);
        assert_eq!(lab.execute(B, Direction::Ingress, &syn().frame()), NEW);
    });
}

#[test]
pub fn an_interface_s_number_comes_back_with_nothing_on_it() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        lab.configure(|config| config.allowance = 2);
        run(
            &mut lab,
            "SG-3.6",
            vec![leaves(tcp(B, X).ports(1, 443).syn(), NEW), leaves(tcp(B, X).ports(2, 443).syn(), NEW)],
        );
        let mut gone = None;
        lab.attach(|attachments| {
            let place = attachments.iter().position(|attachment| attachment.link.name == "sgt-b").expect("B's link");
            gone = Some(attachments.remove(place));
        });
        lab.attach(|attachments| attachments.extend(gone.take()));
        assert_eq!(tracked(&mut lab, B), (0, 0));
        run(&mut lab, "SG-3.6", vec![leaves(tcp(B, X).ports(3, 443).syn(), NEW)]);
    });
}

#[test]
pub fn fragments_of_one_instance_leave_those_of_others() {
    isolated(|| {
        let mut lab = Lab::new("in udp5000 X/32");
        let datagram = |from, to, id| udp(from, to).ports(40000, 5000).payload(2000).fragments(id, 1400);
        let arriving = datagram(X, B, 1);
        assert_eq!(lab.run(B, Direction::Ingress, &arriving[0]), NEW);
        let leaving = datagram(A, X, 1);
        assert_eq!(lab.run(A, Direction::Egress, &leaving[0]), NEW);
        // First fragments only, each of another packet; more of them than there are places for everybody.
        let flood = (0..50_000).map(|number: u32| {
            let [.., high, low] = (number / 60_000).to_be_bytes();
            let id = u16::try_from(2 + number % 60_000).expect("within 16 bits");
            udp(A, X)
                .ports(40000, 5000)
                .to_address(&format!("198.51.{high}.{low}"))
                .payload(2000)
                .as_fragment(id, 0, true)
                .frame()
        });
        assert_eq!(lab.flood(A, Direction::Egress, flood), 50_000, "they are allowed");
        assert_eq!(lab.run(B, Direction::Ingress, &arriving[1]), Ok(Pass::Fragment), "SG-3.8: another's is there");
        // And A's own gave way, by its own doing.
        let found = lab.execute(A, Direction::Egress, &leaving[1]);
        assert_eq!(found, Err(Drop::FragmentOrphan));
        // Packets that are under way together don't take each other's place.
        let together: Vec<Vec<Vec<u8>>> =
            (0..FRAGMENT_SLOTS).map(|number| datagram(X, B, 1000 + u16::try_from(number).expect("few"))).collect();
        for packet in &together {
            assert_eq!(lab.run(B, Direction::Ingress, &packet[0]), ESTABLISHED);
        }
        for packet in &together {
            assert_eq!(lab.run(B, Direction::Ingress, &packet[1]), Ok(Pass::Fragment), "SG-3.8");
        }
    });
}
