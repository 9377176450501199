//! ARP and neighbour discovery: not filtered, but honest (SG-4.2, SG-4.3).

use std::net::{Ipv4Addr, Ipv6Addr};

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, GATEWAY, ROUTER, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{
    Transport, arp, icmpv6, neighbor_advertisement, neighbor_solicitation, redirect, router_advertisement, udp,
};

use crate::{arrives, leaves, run};

const NEIGHBOR: Verdict = Ok(Pass::Neighbor);
const FORGED: Verdict = Err(Drop::ForgedNeighbor);

#[test]
pub fn both_pass_without_any_rule() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        let out = Direction::Egress;
        for (what, direction, frame) in [
            ("a question", out, arp(B, 1, B.mac, B.v4, A.v4)),
            ("an answer", out, arp(B, 2, B.mac, B.v4, A.v4)),
            ("an announcement", out, arp(B, 2, B.mac, B.v4, B.v4)),
            ("a probe", out, arp(B, 1, B.mac, Ipv4Addr::UNSPECIFIED, B.v4)),
            ("a question", Direction::Ingress, arp(A, 1, A.mac, A.v4, B.v4)),
            ("an answer", Direction::Ingress, arp(A, 2, A.mac, A.v4, B.v4)),
        ] {
            assert_eq!(lab.run(B, direction, &frame), NEIGHBOR, "SG-4.2: {what}");
        }
        run(
            &mut lab,
            "SG-4.2",
            vec![
                leaves(neighbor_solicitation(B, A.v6), NEIGHBOR),
                leaves(neighbor_advertisement(B, A.v6, B.v6, B.mac), NEIGHBOR),
                leaves(neighbor_advertisement(B, "ff02::1".parse().expect("an address"), B.v6, B.mac), NEIGHBOR),
                leaves(neighbor_solicitation(B, A.v6).from_address(&B.link_local().to_string()), NEIGHBOR),
                leaves(neighbor_advertisement(B, A.v6, B.link_local(), B.mac), NEIGHBOR),
                arrives(neighbor_solicitation(A, B.v6), NEIGHBOR),
                arrives(neighbor_advertisement(A, B.v6, A.v6, A.mac), NEIGHBOR),
                arrives(router_advertisement(X.with_mac(ROUTER)), NEIGHBOR),
            ],
        );
    });
}

#[test]
pub fn forged_arp_is_not_sent() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let forged = Err(Drop::ForgedArp);
        for (what, frame, expected) in [
            ("for A", arp(B, 2, B.mac, A.v4, A.v4), forged),
            ("for the gateway", arp(B, 2, B.mac, GATEWAY, A.v4), forged),
            ("a question that teaches A's address", arp(B, 1, B.mac, A.v4, X.v4), forged),
            ("with A's MAC address inside", arp(B, 2, A.mac, B.v4, A.v4), forged),
            ("with A's MAC address outside", arp(B.with_mac(A.mac), 2, B.mac, B.v4, A.v4), Err(Drop::SourceMac)),
            ("a probe for another's address", arp(B, 1, B.mac, Ipv4Addr::UNSPECIFIED, A.v4), forged),
            ("a probe with another's MAC address", arp(B, 1, A.mac, Ipv4Addr::UNSPECIFIED, B.v4), forged),
        ] {
            assert_eq!(lab.run(B, Direction::Egress, &frame), expected, "SG-4.3: {what}");
        }
        let bent = |at: usize, value: u8| {
            let mut frame = arp(B, 1, B.mac, B.v4, A.v4);
            frame[at] = value;
            frame
        };
        for (what, frame) in [
            ("hardware", bent(15, 6)),
            ("protocol", bent(16, 0x86)),
            ("hardware address length", bent(18, 8)),
            ("protocol address length", bent(19, 16)),
        ] {
            assert_eq!(lab.run(B, Direction::Egress, &frame), Err(Drop::Malformed), "RFC 826: {what}");
        }
        lab.edit(|inventory| inventory.enis.get_mut(&B.eni()).expect("B's interface").source_dest_check = false);
        assert_eq!(lab.run(B, Direction::Egress, &arp(B, 2, B.mac, A.v4, A.v4)), NEIGHBOR, "SG-4.3: check off");
        assert_eq!(
            lab.run(B, Direction::Egress, &arp(B, 2, A.mac, B.v4, A.v4)),
            forged,
            "the MAC address stays its own"
        );
    });
}

#[test]
pub fn forged_discovery_is_not_sent() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let a = A.v6.to_string();
        let router = ROUTER;
        run(
            &mut lab,
            "SG-4.3",
            vec![
                leaves(neighbor_advertisement(B, A.v6, A.v6, B.mac), FORGED),
                leaves(neighbor_advertisement(B, A.v6, A.link_local(), B.mac), FORGED),
                leaves(neighbor_advertisement(B, A.v6, B.v6, A.mac), FORGED),
                leaves(neighbor_advertisement(B, A.v6, B.v6, B.mac).from_address(&a), FORGED),
                leaves(neighbor_advertisement(B, A.v6, B.v6, B.mac).from_mac(A.mac), Err(Drop::SourceMac)),
                leaves(neighbor_solicitation(B, A.v6).from_address(&a), FORGED),
                leaves(neighbor_solicitation(B, A.v6).hops(254), FORGED),
                leaves(neighbor_solicitation(B, A.v6).hops(0), FORGED),
                leaves(router_advertisement(B), FORGED),
                leaves(router_advertisement(B).from_address(&B.link_local().to_string()), FORGED),
                leaves(redirect(B, A.v6, B.v6, X.v6), FORGED),
                leaves(neighbor_solicitation(B, A.v6).hop_by_hop().from_address(&a), FORGED),
                leaves(neighbor_advertisement(B, A.v6, A.v6, B.mac).destination_options(), FORGED),
                leaves(router_advertisement(B).as_fragment(1, 0, false), FORGED),
            ],
        );
        // A second link-layer option behind an honest one.
        let mut two = neighbor_solicitation(B, A.v6);
        two.payload.extend([1, 1]);
        two.payload.extend(router);
        // The option's length says more than its place.
        let mut long = neighbor_solicitation(B, A.v6);
        long.payload[17] = 2;
        let mut none = neighbor_solicitation(B, A.v6);
        none.payload.truncate(16);
        let mut nonce_first = neighbor_solicitation(B, A.v6);
        nonce_first.payload.truncate(16);
        nonce_first.payload.extend([14, 1, 1, 2, 3, 4, 5, 6]);
        // Duplicate address detection, for another's address and for its own.
        let theirs = nonce_first.clone().from_address("::");
        let mut alone = neighbor_solicitation(B, B.v6).from_address("::");
        alone.payload.truncate(16);
        alone.payload.extend([14, 1, 1, 2, 3, 4, 5, 6]);
        nonce_first.payload.extend([1, 1]);
        nonce_first.payload.extend(router);
        run(
            &mut lab,
            "SG-4.3",
            vec![
                leaves(two, FORGED),
                leaves(long, FORGED),
                leaves(none, NEIGHBOR),
                leaves(theirs, FORGED),
                leaves(alone, NEIGHBOR),
                leaves(nonce_first, FORGED),
            ],
        );
        run(
            &mut lab,
            "RFC 6980: fragmented discovery goes by the rules, and to a group not at all",
            vec![
                leaves(neighbor_advertisement(B, A.v6, A.v6, B.mac).as_fragment(1, 0, true), Ok(Pass::New)),
                leaves(router_advertisement(B).as_fragment(2, 0, true), Err(Drop::Multicast)),
            ],
        );
    });
}

#[test]
pub fn what_was_forwarded_is_not_believed() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        run(
            &mut lab,
            "RFC 4861, 7.1",
            vec![
                arrives(neighbor_advertisement(A, B.v6, A.v6, A.mac).hops(254), FORGED),
                arrives(redirect(A, B.v6, A.v6, X.v6).hops(64), FORGED),
                arrives(router_advertisement(A).hops(1), FORGED),
            ],
        );
    });
}

#[test]
pub fn other_multicast_stays_out() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let multicast = Err(Drop::Multicast);
        let group = || udp(B, X).to_address("224.0.0.251").to_mac([1, 0, 0x5e, 0, 0, 0xfb]);
        let group6 = || udp(B, X).v6(B, X).to_address("ff02::fb").to_mac([0x33, 0x33, 0, 0, 0, 0xfb]);
        run(
            &mut lab,
            "SG-4.4",
            vec![
                leaves(group(), multicast),
                leaves(group().to_mac(ROUTER), multicast),
                leaves(group6(), multicast),
                leaves(icmpv6(B, A, 143, 0).to_address("ff02::16").to_mac([0x33, 0x33, 0, 0, 0, 0x16]), multicast),
                leaves(udp(B, A).to_address("255.255.255.255").to_mac([0xff; 6]), multicast),
                leaves(udp(B, A).to_address("10.0.1.255"), multicast),
                leaves(udp(B, A).to_mac([0xff; 6]), multicast),
                leaves(udp(B, A).to_mac([1, 2, 3, 4, 5, 6]), multicast),
                arrives(udp(A, B).to_address("10.0.1.255").to_mac([0xff; 6]), multicast),
                arrives(udp(A, B).to_address("255.255.255.255").to_mac([0xff; 6]), multicast),
                arrives(udp(A, B).to_mac([0xff; 6]), multicast),
                arrives(udp(A, B).to_address("239.1.1.1").to_mac([1, 0, 0x5e, 1, 1, 1]), multicast),
                arrives(udp(A, B).v6(A, B).to_address("ff02::1").to_mac([0x33, 0x33, 0, 0, 0, 1]), multicast),
            ],
        );
    });
}

/// No rule is asked about them, so they carry nothing else.
#[test]
pub fn neither_is_a_way_around_the_rules() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        for direction in [Direction::Ingress, Direction::Egress] {
            let from = if direction == Direction::Egress { B } else { A };
            let to = if direction == Direction::Egress { A } else { B };
            let with = |operation: [u8; 2], length: usize| {
                let mut frame = arp(from, 1, from.mac, from.v4, to.v4);
                frame[20..22].copy_from_slice(&operation);
                frame.resize(length, 0);
                frame
            };
            for (frame, expected) in [
                (with([0, 1], 42), NEIGHBOR),
                (with([0, 1], 60), NEIGHBOR),
                (with([0, 1], 64), NEIGHBOR),
                (with([0, 1], 65), Err(Drop::Malformed)),
                (with([0, 2], 1514), Err(Drop::Malformed)),
                (with([0, 0], 42), Err(Drop::Malformed)),
                (with([0, 3], 42), Err(Drop::Malformed)),
                (with([0, 4], 42), Err(Drop::Malformed)),
                (with([1, 1], 42), Err(Drop::Malformed)),
            ] {
                assert_eq!(lab.run(B, direction, &frame), expected, "RFC 826, {direction:?}: {frame:02x?}");
            }

            let question = || neighbor_solicitation(from, to.v6);
            let answer = || neighbor_advertisement(from, to.v6, from.v6, from.mac);
            for honest in [question(), answer()] {
                let behind = |bytes: usize| {
                    let mut frame = honest.clone().frame();
                    frame.resize(frame.len() + bytes, 0x5a);
                    frame
                };
                let mut long = honest.clone();
                long.payload.resize(long.payload.len() + 1200, 1);
                let mut coded = honest.clone();
                let Transport::Icmp { code, .. } = &mut coded.transport else { panic!("ICMPv6") };
                *code = 1;
                for (what, frame, expected) in [
                    ("as it is", honest.frame(), NEIGHBOR),
                    ("a byte behind it", behind(1), FORGED),
                    ("a thousand bytes behind it", behind(1000), FORGED),
                    ("a thousand bytes of options", long.frame(), FORGED),
                    ("hop-by-hop options", honest.clone().hop_by_hop().frame(), FORGED),
                    ("destination options", honest.clone().destination_options().frame(), FORGED),
                    ("an atomic fragment", honest.clone().as_fragment(1, 0, false).frame(), FORGED),
                    ("a code", coded.frame(), FORGED),
                ] {
                    assert_eq!(lab.run(B, direction, &frame), expected, "RFC 4861, 4.3, 4.4, {direction:?}: {what}");
                }
            }
        }
        // What Linux puts into them: four options of 8 bytes at most, of which one is sent here.
        let options = |count: usize| {
            let mut packet = neighbor_solicitation(A, B.v6);
            packet.payload.truncate(16);
            packet.payload.extend([14, 1, 1, 2, 3, 4, 5, 6].repeat(count));
            packet
        };
        run(
            &mut lab,
            "RFC 4861, 4.3",
            vec![arrives(options(0), NEIGHBOR), arrives(options(4), NEIGHBOR), arrives(options(5), FORGED)],
        );
    });
}

#[test]
pub fn discovery_stays_on_its_link() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        for is_checked in [true, false] {
            lab.edit(|inventory| {
                inventory.enis.get_mut(&B.eni()).expect("B's interface").source_dest_check = is_checked
            });
            let (far, groups) = (X.v6, ["ff05::1", "ff0e::1:ff00:1"]);
            let address = |text: &str| text.parse::<Ipv6Addr>().expect("an address");
            let probe = |to: Ipv6Addr| neighbor_solicitation(B, to).to_address(&to.to_string()).to_mac(A.mac);
            let answer = |to| neighbor_advertisement(B, to, B.v6, B.mac);
            let mut unasked = answer(A.v6);
            unasked.transport = Transport::Icmp { kind: 136, code: 0, rest: [0x20, 0, 0, 0] };
            let mut reserved = answer(A.v6);
            reserved.transport = Transport::Icmp { kind: 136, code: 0, rest: [0x60, 1, 2, 3] };
            let routers = || {
                let mut packet = neighbor_solicitation(B, A.v6).to_address("ff02::2");
                packet.transport = Transport::Icmp { kind: 133, code: 0, rest: [0; 4] };
                packet.payload.drain(..16);
                packet
            };
            run(
                &mut lab,
                "RFC 4861, 7.1",
                vec![
                    leaves(probe(A.v6), NEIGHBOR),
                    leaves(probe(A.link_local()), NEIGHBOR),
                    leaves(neighbor_solicitation(B, A.v6).to_address(&A.link_local().to_string()), NEIGHBOR),
                    leaves(neighbor_solicitation(B, A.v6).to_address(&far.to_string()), FORGED),
                    leaves(neighbor_solicitation(B, A.v6).to_address(groups[0]), FORGED),
                    leaves(neighbor_solicitation(B, A.v6).to_address(groups[1]), FORGED),
                    leaves(answer(A.v6), NEIGHBOR),
                    leaves(answer(A.link_local()), NEIGHBOR),
                    leaves(answer(address("ff02::1")), NEIGHBOR),
                    leaves(answer(address(groups[0])), FORGED),
                    leaves(unasked, FORGED),
                    leaves(reserved, FORGED),
                    leaves(routers(), NEIGHBOR),
                    leaves(routers().to_address("fe80::1"), NEIGHBOR),
                    leaves(routers().to_address(&far.to_string()), FORGED),
                    leaves(router_advertisement(B), FORGED),
                    leaves(redirect(B, A.v6, B.v6, X.v6), FORGED),
                ],
            );
        }
    });
}
