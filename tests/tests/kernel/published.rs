//! The programs of published ports: what they deny, what they leave alone, and the reset that they answer with, to the
//! byte. What they say is held against `decide`, which the proxy asks.

use std::net::IpAddr;

use sg_agent::apply::{Judged, Sockets};
use sg_agent::decide;
use sg_agent::proxy::{Deny, PublishSpec, Published};
use sg_common::abi::{Direction, PublishedKey};
use sg_common::packet::{ACK, FIN, RST, SYN, TCP, UDP};
use tests::cast::{A, B, C, Host, X};
use tests::lab::{Lab, SUBNET_1, acl_entry, put_acl};
use tests::netns::isolated;
use tests::packets::{Packet, Transport, tcp, udp};

/// Loopback's index in every namespace: its MAC address is zero, so that test frames are for this host.
const LO: u32 = 1;
/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
const NEXT: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;
/// `XDP_DROP`, `XDP_PASS`, `XDP_TX`.
const XDP: [u32; 3] = [1, 2, 3];

const HOST_PORT: u16 = 32022;
const AT4: &str = "192.0.2.1";
const AT6: &str = "2001:db8:99::1";

/// Publishes B's port 22 at two addresses of the host, for TCP, and port 53 for UDP.
fn publish(lab: &mut Lab, deny: Deny) {
    let link = lab.ifindex(B);
    let mut sockets = Sockets::new();
    for (text, protocol) in [("i-b:32022=22", TCP), ("i-b:32022=53/udp", UDP)] {
        let published = Published::from(text.parse::<PublishSpec>().expect("a published port"));
        for at in [AT4, AT6] {
            let address = at.parse::<IpAddr>().expect("an address").into();
            let key = PublishedKey { address, port: HOST_PORT, protocol, pad: 0 };
            sockets.insert(key, (published.clone(), Judged { link, deny }));
        }
    }
    lab.applier().publish(&sockets).expect("maps with room");
}

/// A client's packet to the published port.
fn to_host(from: Host, is_v4: bool, packet: Packet) -> Packet {
    let packet = packet.family(is_v4, from, B).ports(40000, HOST_PORT).to_mac([0; 6]);
    packet.to_address(if is_v4 { AT4 } else { AT6 })
}

fn syn(from: Host, is_v4: bool) -> Packet {
    to_host(from, is_v4, tcp(from, B).syn())
}

/// What both programs do with a frame, which must be the same; and what the first one leaves of it.
#[track_caller]
fn run(lab: &mut Lab, frame: &[u8]) -> (u32, Vec<u8>) {
    let (datapath, _) = lab.applier().datapath();
    let (action, left) = datapath.run_published(LO, frame).expect("a frame that the kernel runs");
    let (in_driver, left_in_driver) = datapath.run_published_xdp(frame).expect("a frame that the kernel runs");
    let same = match action {
        SHOT => XDP[0],
        NEXT => XDP[1],
        REDIRECT => XDP[2],
        other => panic!("action {other}"),
    };
    assert_eq!(in_driver, same, "the two programs differ");
    assert_eq!(left, left_in_driver, "the two programs differ");
    (action, left)
}

#[track_caller]
fn check(lab: &mut Lab, packet: &Packet, expected: u32) {
    let frame = packet.frame();
    let (action, left) = run(lab, &frame);
    assert_eq!(action, expected, "{packet:?}");
    assert_eq!(left, frame, "a frame that isn't answered stays as it is");
}

#[test]
fn clients_are_judged_by_the_instances_own_tables() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32 + tcp22 sgC + udp53 X/32 + tcp22 any6");
        lab.edit(|inventory| {
            let deny = acl_entry(90, false, sg_agent::model::Traffic::All, "2001:db8:ffff::/48");
            let rest = |number, network| acl_entry(number, true, sg_agent::model::Traffic::All, network);
            let ingress = vec![deny, rest(100, "0.0.0.0/0"), rest(101, "::/0")];
            put_acl(inventory, SUBNET_1, ingress, vec![rest(100, "0.0.0.0/0"), rest(101, "::/0")]);
        });
        publish(&mut lab, Deny::Drop);
        let (mut passed, mut denied) = (0, 0);
        for from in [A, B, C, X] {
            for is_v4 in [true, false] {
                for (packet, protocol, port) in
                    [(syn(from, is_v4), TCP, 22), (to_host(from, is_v4, udp(from, B)), UDP, 53)]
                {
                    let client: IpAddr = if is_v4 { from.v4.into() } else { from.v6.into() };
                    let (link, snapshot) = (lab.ifindex(B), lab.applier().snapshot());
                    let decision = decide::admits(&snapshot, link, Direction::Ingress, client, protocol, port);
                    let is_allowed = decision.verdict.is_ok();
                    check(&mut lab, &packet, if is_allowed { NEXT } else { SHOT });
                    *(if is_allowed { &mut passed } else { &mut denied }) += 1;
                }
            }
        }
        assert!(passed >= 4 && denied >= 4, "{passed} passed, {denied} were denied");
    });
}

#[test]
fn a_change_of_rules_needs_no_other_write() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        publish(&mut lab, Deny::Drop);
        check(&mut lab, &syn(X, true), SHOT);
        lab.rules("sgB", "in tcp22 X/32");
        check(&mut lab, &syn(X, true), NEXT);
        lab.rules("sgB", "in none");
        check(&mut lab, &syn(X, true), SHOT);
        // The first two denials by one program and the other each, and the third.
        let port = Published::from("i-b:32022=22".parse::<PublishSpec>().expect("a published port"));
        assert_eq!(lab.applier().denied(&port), 4);
    });
}

#[test]
fn a_pause_leaves_all_to_the_proxy_and_counts_go_on() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let port = Published::from("i-b:32022=22".parse::<PublishSpec>().expect("a published port"));
        publish(&mut lab, Deny::Drop);
        check(&mut lab, &syn(X, true), SHOT);
        lab.applier().pause().expect("a map that can be written");
        check(&mut lab, &syn(X, true), NEXT);
        assert_eq!(lab.applier().denied(&port), 2, "by one program and the other");
        publish(&mut lab, Deny::Drop);
        check(&mut lab, &syn(X, true), SHOT);
        assert_eq!(lab.applier().denied(&port), 4);
    });
}

#[test]
fn only_what_begins_at_a_published_port_is_touched() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        publish(&mut lab, Deny::Reject);
        let vlan = |packet: Packet| packet.vlan(0x8100, 7);
        for is_v4 in [true, false] {
            let flags = |set| to_host(X, is_v4, tcp(X, B).flags(set));
            let mut packets = vec![
                flags(ACK),
                flags(SYN | ACK),
                flags(FIN | ACK),
                flags(RST),
                flags(RST | SYN),
                syn(X, is_v4).ports(HOST_PORT, 40000),
                syn(X, is_v4).ports(40000, HOST_PORT + 1),
                syn(X, is_v4).to_address(if is_v4 { "192.0.2.2" } else { "2001:db8:99::2" }),
                syn(X, is_v4).to_mac([0xff; 6]),
                syn(X, is_v4).to_mac([0x33, 0x33, 0, 0, 0, 1]),
                vlan(syn(X, is_v4)),
                syn(X, is_v4).as_fragment(7, 0, true),
                syn(X, is_v4).as_fragment(7, 64, false),
                to_host(X, is_v4, udp(X, B)).ports(40000, HOST_PORT + 1),
            ];
            if !is_v4 {
                packets.push(syn(X, false).routing(4, 1));
            }
            for packet in packets {
                check(&mut lab, &packet, NEXT);
            }
        }
        // Nothing is read that isn't there.
        let frame = syn(X, true).frame();
        for length in [34, 35, 47, 53] {
            let (action, left) = run(&mut lab, &frame[..length]);
            assert_eq!((action, &left[..]), (NEXT, &frame[..length]), "{length} bytes");
        }
        // A control: the same without any of it.
        assert_eq!(run(&mut lab, &frame).0, REDIRECT);
    });
}

/// What the stack drops is not answered: the answer would go to a group, to this host itself, or to nobody.
#[test]
fn sources_that_the_stack_drops_are_left_to_it() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        publish(&mut lab, Deny::Reject);
        let cards = |packet: Packet| packet.from_mac(X.mac).to_mac([2, 0, 0, 0, 0, 9]);
        for (is_v4, source) in [
            (true, "224.0.0.1"),
            (true, "255.255.255.255"),
            (true, "0.0.0.0"),
            (true, "0.1.2.3"),
            (true, "127.0.0.1"),
            (false, "ff02::1"),
            (false, "::"),
            (false, "::1"),
        ] {
            check(&mut lab, &cards(syn(X, is_v4).from_address(source)), NEXT);
            check(&mut lab, &cards(to_host(X, is_v4, udp(X, B)).from_address(source)), NEXT);
        }
        for is_v4 in [true, false] {
            check(&mut lab, &syn(X, is_v4).from_mac([0xff; 6]), NEXT);
            check(&mut lab, &syn(X, is_v4).from_mac([3, 0, 0, 0, 0, 1]), NEXT);
            // On `lo` no frame has MAC addresses, and loopback addresses are at home.
            let local = syn(X, is_v4).from_address(if is_v4 { "127.0.0.1" } else { "::1" });
            assert_eq!(run(&mut lab, &local.clone().from_mac([0; 6]).frame()).0, REDIRECT);
            check(&mut lab, &local, NEXT);
        }
    });
}

#[test]
fn datagrams_vanish_either_way() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for deny in [Deny::Drop, Deny::Reject] {
            publish(&mut lab, deny);
            check(&mut lab, &to_host(X, true, udp(X, B)), SHOT);
            check(&mut lab, &to_host(X, false, udp(X, B)).payload(900), SHOT);
        }
    });
}

#[test]
fn a_port_without_an_instance_is_denied() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 any4");
        publish(&mut lab, Deny::Drop);
        check(&mut lab, &syn(X, true), NEXT);
        lab.attach(|attachments| attachments.retain(|attachment| &*attachment.instance.0 != "i-b"));
        check(&mut lab, &syn(X, true), SHOT);
    });
}

/// The Internet checksum's sum over bytes, which is all ones where the checksum is right.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[test]
fn a_reset_is_one_to_the_byte() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        publish(&mut lab, Deny::Reject);
        for is_v4 in [true, false] {
            let plain = syn(X, is_v4);
            let with_options = if is_v4 { plain.clone().ipv4_options(8) } else { plain.clone().destination_options() };
            // The builder's SYNs have the sequence number 1.
            let table = [
                (plain.clone(), 2),
                (plain.clone().payload(5), 7),
                (plain.clone().payload(1400), 1402),
                (plain.clone().flags(SYN | FIN).payload(3), 6),
                (with_options, 2),
            ];
            for (packet, acknowledged) in table {
                let (action, left) = run(&mut lab, &packet.frame());
                assert_eq!(action, REDIRECT, "{packet:?}");
                let mut expected = plain.clone().reply().flags(RST | ACK);
                expected.addresses = (plain.addresses.1, plain.addresses.0);
                let mut frame = expected.frame();
                let at = if is_v4 { 34 } else { 54 };
                frame[at + 4..at + 8].copy_from_slice(&[0; 4]);
                frame[at + 8..at + 12].copy_from_slice(&u32::to_be_bytes(acknowledged));
                // No window.
                frame[at + 14..at + 16].copy_from_slice(&[0; 2]);
                let pseudo = if is_v4 { &left[26..34] } else { &left[22..54] };
                let tcp = [pseudo, &[0, TCP, 0, 20], &left[at..]].concat();
                assert_eq!(sum(&tcp), 0xffff, "TCP's checksum: {left:02x?}");
                if is_v4 {
                    assert_eq!(sum(&left[14..34]), 0xffff, "IP's checksum: {left:02x?}");
                    frame[24..26].copy_from_slice(&left[24..26]);
                }
                frame[at + 16..at + 18].copy_from_slice(&left[at + 16..at + 18]);
                assert_eq!(left, frame, "{packet:?}");
                let Transport::Tcp { ports, .. } = expected.transport else { panic!("TCP") };
                assert_eq!(ports, (HOST_PORT, 40000));
            }
        }
    });
}
