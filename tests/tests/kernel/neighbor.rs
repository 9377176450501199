//! ARP and neighbour discovery: not filtered, but honest (SG-4.2, SG-4.3).

use std::net::Ipv4Addr;

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, GATEWAY, ROUTER, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{arp, icmpv6, neighbor_advertisement, neighbor_solicitation, redirect, router_advertisement, udp};

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
