//! Addresses that aren't the interface's own (SG-4.3), and links that are nobody's.

use std::net::IpAddr;

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, X};
use tests::lab::Lab;
use tests::netns::{isolated, link};
use tests::packets::{Packet, icmpv6, tcp, udp};

use crate::{arrives, leaves, run};

const SOURCE: Verdict = Err(Drop::SourceAddress);
const DESTINATION: Verdict = Err(Drop::DestinationAddress);

#[test]
pub fn the_check_is_on() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let from = |address: &str| tcp(B, X).from_address(address).syn();
        let from6 = |address: &str| tcp(B, X).v6(B, X).from_address(address).syn();
        run(
            &mut lab,
            "SG-4.3: what leaves",
            vec![
                leaves(from("10.0.1.20"), Ok(Pass::Untracked)),
                leaves(from("10.0.9.9"), SOURCE),
                leaves(from("10.0.1.10"), SOURCE),
                leaves(from("0.0.0.0"), SOURCE),
                leaves(from("255.255.255.255"), Err(Drop::Martian)),
                leaves(from("169.254.169.254"), SOURCE),
                leaves(from6("2001:db8:1::b"), Ok(Pass::Untracked)),
                leaves(from6("2001:db8:1::a"), SOURCE),
                leaves(from6("::"), SOURCE),
                leaves(from6("::10.0.1.20"), SOURCE),
                leaves(from6("fe80::1"), SOURCE),
                leaves(icmpv6(B, X, 128, 0).from_address("2001:db8:1::a"), SOURCE),
                leaves(tcp(B, X).syn().from_mac(A.mac), Err(Drop::SourceMac)),
                leaves(tcp(B, X).v6(B, X).syn().from_mac([0; 6]), Err(Drop::SourceMac)),
                // Also in fragments.
                leaves(udp(B, X).from_address("10.0.1.10").payload(64).as_fragment(1, 0, true), SOURCE),
                leaves(udp(B, X).from_address("10.0.1.10").payload(64).as_fragment(1, 9, false), SOURCE),
            ],
        );
        run(
            &mut lab,
            "SG-4.3: what arrives",
            vec![
                arrives(tcp(X, B).syn(), Ok(Pass::Untracked)),
                arrives(tcp(X, B).to_address("10.0.1.21").syn(), DESTINATION),
                arrives(tcp(X, B).to_address("10.0.1.10").syn(), DESTINATION),
                arrives(tcp(X, B).to_address("0.0.0.0").syn(), DESTINATION),
                arrives(tcp(X, B).v6(X, B).to_address("2001:db8:1::a").syn(), DESTINATION),
                arrives(tcp(X, B).v6(X, B).to_address("::").syn(), DESTINATION),
                arrives(udp(X, B).to_address("10.0.1.21").payload(64).as_fragment(1, 9, false), DESTINATION),
            ],
        );
    });
}

#[test]
pub fn the_check_is_off() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22, out tcp443");
        lab.edit(|inventory| inventory.enis.get_mut(&B.eni()).expect("B's interface").source_dest_check = false);
        run(
            &mut lab,
            "SG-4.3: evaluated by the rules",
            vec![
                leaves(tcp(B, X).from_address("10.0.9.9").ports(1, 443).syn(), Ok(Pass::New)),
                leaves(tcp(B, X).from_address("10.0.9.9").ports(1, 444).syn(), Err(Drop::NoRule)),
                arrives(tcp(X, B).to_address("10.0.9.9").syn(), Ok(Pass::New)),
                arrives(tcp(X, B).to_address("10.0.9.9").ports(1, 23).syn(), Err(Drop::NoRule)),
                leaves(tcp(B, X).from_address("10.0.9.9").ports(1, 443).syn().from_mac(A.mac), Err(Drop::SourceMac)),
                leaves(tcp(B, X).from_address("127.0.0.1").ports(1, 443).syn(), Err(Drop::Martian)),
            ],
        );
    });
}

#[test]
pub fn secondary_addresses_are_its_own_while_it_has_them() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let second = || tcp(B, X).from_address("10.0.1.99").syn();
        run(&mut lab, "SG-4.3", vec![leaves(second(), SOURCE), arrives(second().syn_ack().reply(), DESTINATION)]);
        lab.edit(|inventory| {
            let addresses = &mut inventory.enis.get_mut(&B.eni()).expect("B's interface").addresses;
            addresses
                .extend(["10.0.1.99", "2001:db8:1::99"].map(|text| text.parse::<std::net::IpAddr>().expect("one")));
        });
        run(
            &mut lab,
            "SG-4.3",
            vec![
                leaves(second(), Ok(Pass::Untracked)),
                arrives(second().syn_ack().reply(), Ok(Pass::Untracked)),
                leaves(tcp(B, X).v6(B, X).from_address("2001:db8:1::99").syn(), Ok(Pass::Untracked)),
            ],
        );
        assert_eq!(lab.from(A, &tcp(A, X).from_address("10.0.1.99").syn()), SOURCE, "B's, and nobody else's");
        lab.edit(|inventory| {
            inventory.enis.get_mut(&B.eni()).expect("B's interface").addresses.truncate(2);
        });
        run(&mut lab, "SG-2.4", vec![leaves(second(), SOURCE)]);
    });
}

#[test]
pub fn land_packets_open_nothing() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        run(
            &mut lab,
            "SG-4.5",
            vec![
                arrives(tcp(B, B).ports(22, 22).syn(), Err(Drop::NoRule)),
                leaves(tcp(B, B).ports(22, 22).syn(), Err(Drop::NoRule)),
            ],
        );
        assert_eq!(lab.from(C, &tcp(B, B).ports(22, 22).syn().from_mac(C.mac)), SOURCE, "SG-4.3: nobody sends it");
    });
}

#[test]
pub fn a_link_without_an_entry_is_closed() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let nobody = link("sgt-nobody");
        for direction in [Direction::Ingress, Direction::Egress] {
            let verdict = lab.run_on(nobody, direction, &tcp(A, B).syn().frame());
            assert_eq!(verdict, Err(Drop::UnknownInterface), "{direction:?}");
        }
    });
}

#[test]
pub fn the_agent_s_proxy_is_known_by_its_mark() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        lab.configure(|config| config.proxy_mark = 0x5157);
        run(&mut lab, "no mark", vec![arrives(tcp(X, B).syn(), Err(Drop::NoRule))]);
        lab.mark = 0x5158;
        run(&mut lab, "another mark", vec![arrives(tcp(X, B).syn(), Err(Drop::NoRule))]);
        lab.mark = 0x5157;
        run(&mut lab, "the mark means nothing on the way out", vec![leaves(tcp(B, X).syn(), Err(Drop::NoRule))]);
        run(&mut lab, "the mark", vec![arrives(tcp(X, B).syn(), Ok(Pass::Proxied))]);
        lab.mark = 0;
        run(
            &mut lab,
            "answers belong to the flow",
            vec![
                leaves(tcp(X, B).syn_ack().reply(), Ok(Pass::Established)),
                leaves(tcp(X, B).ports(40001, 22).syn_ack().reply(), Err(Drop::NoRule)),
            ],
        );
        lab.configure(|config| config.proxy_mark = 0);
        run(&mut lab, "no proxy: mark 0 is nobody's", vec![arrives(tcp(X, B).ports(7, 22).syn(), Err(Drop::NoRule))]);
    });
}

/// Nothing filters the proxy's flows, so an instance can't hold one open that the proxy has left.
#[test]
pub fn only_the_proxy_keeps_its_flows_alive() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        lab.configure(|config| config.proxy_mark = 0x5157);
        let established = Ok(Pass::Established);
        let arrive = |lab: &mut Lab, packet: &Packet, expected| {
            lab.mark = 0x5157;
            assert_eq!(lab.to(B, packet), expected, "SG-3.5: {packet:?}");
            lab.mark = 0;
        };
        let datagram = || udp(X, B);
        arrive(&mut lab, &datagram(), Ok(Pass::Proxied));
        for _ in 0..4 {
            run(&mut lab, "SG-3.5: an answer", vec![leaves(datagram().reply(), established)]);
            lab.advance(20_000);
            arrive(&mut lab, &datagram(), established);
        }
        // 180 seconds for a stream.
        for _ in 0..17 {
            lab.advance(10_000);
            run(&mut lab, "SG-3.5", vec![leaves(datagram().reply(), established)]);
        }
        lab.advance(11_000);
        run(&mut lab, "SG-3.5: however often it answers", vec![leaves(datagram().reply(), Err(Drop::NoRule))]);

        let client = || tcp(X, B).ports(40002, 22);
        arrive(&mut lab, &client().syn(), Ok(Pass::Proxied));
        run(&mut lab, "SG-3.5", vec![leaves(client().syn_ack().reply(), established)]);
        arrive(&mut lab, &client().ack(), established);
        arrive(&mut lab, &client().fin(), established);
        // Half closed: 120 seconds. An end that is taken back would be a new state each time.
        for _ in 0..11 {
            lab.advance(10_000);
            run(
                &mut lab,
                "SG-3.5",
                vec![
                    leaves(client().fin().reply(), established),
                    leaves(client().ack().reply().payload(8), established),
                ],
            );
        }
        lab.advance(11_000);
        run(&mut lab, "SG-3.5", vec![leaves(client().ack().reply().payload(8), Err(Drop::NoRule))]);
    });
}

/// A guest gives itself addresses that the control plane doesn't: what is read from it is believed only where nobody
/// else has them.
#[test]
pub fn an_address_that_is_taken_over_stays_its_owner_s() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgA, out none");
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", Err(Drop::NoRule)), "SG-1.9: C isn't in sgA");
        let unclaimed = "10.0.1.200";
        lab.attach(|attachments| {
            let a = attachments.iter_mut().find(|attachment| attachment.link.name == "sgt-a").expect("A's link");
            let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
            a.addresses.extend([C.v4.into(), C.v6.into(), ip("10.0.1.1"), ip(unclaimed)]);
        });
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", Err(Drop::NoRule)), "SG-1.9: nor does A put it there");
        for address in [C.v4.to_string(), "10.0.1.1".into()] {
            assert_eq!(lab.from(A, &tcp(A, B).from_address(&address).syn()), SOURCE, "SG-4.3: {address}");
            assert!(lab.warnings().iter().any(|warning| warning.problem.contains(&address)), "{:?}", lab.warnings());
        }
        assert_eq!(lab.from(A, &tcp(A, B).v6(A, B).from_address(&C.v6.to_string()).syn()), SOURCE, "SG-4.3");
        // The real address of a link that no engine gave its address to is the only one that is known.
        assert_eq!(lab.from(A, &tcp(A, B).from_address(unclaimed).syn()), Ok(Pass::New));
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", Ok(Pass::New)), "A itself is what it was");
        assert_eq!(lab.from(C, &tcp(C, X).syn()), Ok(Pass::New), "so is C");
    });
}
