//! Frames that aren't what they say: cut short, with lengths that lie, tagged, or with headers that mislead.

use sg_common::abi::Direction;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, arp, icmp, icmpv6, neighbor_advertisement, other, tcp, udp};

use crate::{arrives, forget_flows, run};

const MALFORMED: Verdict = Err(Drop::Malformed);
const NO_RULE: Verdict = Err(Drop::NoRule);

/// One of each kind, with nothing behind its header.
fn kinds() -> Vec<Packet> {
    let mut kinds = vec![
        tcp(X, B).syn(),
        tcp(X, B).syn().ipv4_options(40),
        udp(X, B),
        icmp(X, B, 8, 0),
        other(X, B, 50),
        tcp(X, B).v6(X, B).syn(),
        udp(X, B).v6(X, B),
        icmpv6(X, B, 128, 0),
        other(X, B, 50).v6(X, B),
        tcp(X, B).v6(X, B).syn().hop_by_hop().destination_options().routing(2, 0).destination_options(),
        udp(X, B).payload(40).as_fragment(1, 0, true),
        udp(X, B).v6(X, B).payload(40).hop_by_hop().as_fragment(1, 0, true),
    ];
    kinds.push(tcp(X, B).syn().error(X, B, 3, 4).to_address("10.0.1.20"));
    kinds
}

#[test]
pub fn a_frame_cut_short_passes_at_no_length() {
    isolated(|| {
        let mut lab = Lab::new("in all, out none");
        for packet in kinds() {
            let frame = packet.frame();
            for length in 0..frame.len() {
                let cut = &frame[..length];
                let verdict = lab.run(B, Direction::Ingress, cut);
                assert_eq!(verdict, MALFORMED, "{length} of {} bytes of {packet:?}", frame.len());
            }
            forget_flows(&mut lab);
            assert!(lab.run(B, Direction::Ingress, &frame).is_ok(), "whole: {packet:?}");
            let mut padded = frame.clone();
            padded.resize(frame.len() + 17, 0xee);
            forget_flows(&mut lab);
            assert!(lab.run(B, Direction::Ingress, &padded).is_ok(), "with a trailer: {packet:?}");
        }
    });
}

#[test]
pub fn a_packet_cut_short_that_says_so_needs_its_whole_header() {
    isolated(|| {
        let mut lab = Lab::new("in all, out none");
        for (packet, header) in [
            (tcp(X, B).syn(), 20),
            (udp(X, B), 8),
            (icmp(X, B, 8, 0), 8),
            (tcp(X, B).v6(X, B).syn(), 20),
            (udp(X, B).v6(X, B), 8),
            (icmpv6(X, B, 128, 0), 8),
        ] {
            let is_v4 = packet.addresses.0.is_ipv4();
            for length in 0..=header {
                let mut frame = packet.frame();
                let ip = if is_v4 { 20 } else { 40 };
                frame.truncate(14 + ip + length);
                let (at, total) = if is_v4 { (16, ip + length) } else { (18, length) };
                frame[at..at + 2].copy_from_slice(&(total as u16).to_be_bytes());
                let padded: Vec<u8> = frame.iter().copied().chain([0xff; 32]).collect();
                forget_flows(&mut lab);
                let verdict = lab.run(B, Direction::Ingress, &frame);
                assert_eq!(verdict.is_ok(), length == header, "{length} bytes: {packet:?}");
                forget_flows(&mut lab);
                let verdict = lab.run(B, Direction::Ingress, &padded);
                assert_eq!(verdict.is_ok(), length == header, "{length} bytes and a trailer: {packet:?}");
            }
        }
    });
}

#[test]
pub fn lengths_that_contradict_each_other() {
    isolated(|| {
        let mut lab = Lab::new("in all, out none");
        let bent = |packet: Packet, at: usize, value: u8| {
            let mut frame = packet.frame();
            frame[at] = value;
            frame
        };
        let v4 = || tcp(X, B).syn();
        let v6 = || tcp(X, B).v6(X, B).syn();
        for (what, frame) in [
            ("version 5", bent(v4(), 14, 0x55)),
            ("version 6 in IPv4", bent(v4(), 14, 0x65)),
            ("a header of 16 bytes", bent(v4(), 14, 0x44)),
            ("a header of none", bent(v4(), 14, 0x40)),
            ("a header longer than the packet", bent(v4(), 14, 0x4f)),
            ("longer than the frame", bent(v4(), 17, 41)),
            ("shorter than its header", bent(v4(), 17, 19)),
            ("a length of 0", bent(v4(), 17, 0)),
            ("version 4 in IPv6", bent(v6(), 14, 0x40)),
            ("longer than the frame", bent(v6(), 19, 21)),
            ("shorter than TCP's header", bent(v6(), 19, 19)),
            ("a length of 0", bent(v6(), 19, 0)),
            ("TCP's header of 16 bytes", bent(v4(), 46, 0x40)),
            ("TCP's header longer than the packet", bent(v4(), 46, 0x60)),
            ("a hop-by-hop header longer than the packet", bent(v6().hop_by_hop(), 55, 200)),
            ("one that ends where the packet does", bent(v6().hop_by_hop(), 55, 2)),
        ] {
            assert_eq!(lab.run(B, Direction::Ingress, &frame), MALFORMED, "{what}: {frame:02x?}");
        }
    });
}

#[test]
pub fn extension_headers_hide_nothing() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 any6, out none");
        let packet = |port| tcp(X, B).v6(X, B).ports(40000, port).syn();
        let orders: [fn(Packet) -> Packet; 6] = [
            |p| p.hop_by_hop(),
            |p| p.destination_options(),
            |p| p.hop_by_hop().destination_options().routing(2, 0).destination_options(),
            |p| p.destination_options().hop_by_hop(),
            |p| p.routing(4, 0).hop_by_hop(),
            |p| (0..7).fold(p, |p, _| p.destination_options()),
        ];
        for order in orders {
            forget_flows(&mut lab);
            run(
                &mut lab,
                "SG-1.4",
                vec![
                    arrives(order(packet(22)), Ok(Pass::New)),
                    arrives(order(packet(23)), NO_RULE),
                    arrives(order(other(X, B, 59).v6(X, B)), NO_RULE),
                ],
            );
        }
        let many = (0..8).fold(packet(22), |packet, _| packet.destination_options());
        run(
            &mut lab,
            "RFC 8200, 4.1",
            vec![
                arrives(many, Err(Drop::ExtensionHeaders)),
                arrives((0..40).fold(packet(22), |packet, _| packet.hop_by_hop()), Err(Drop::ExtensionHeaders)),
            ],
        );
        let rule = Err(Drop::RoutingHeader);
        run(
            &mut lab,
            "RFC 5095",
            vec![
                arrives(packet(22).routing(0, 0), rule),
                arrives(packet(22).routing(0, 1), rule),
                arrives(packet(22).routing(2, 1), rule),
                arrives(packet(22).routing(4, 255), rule),
                arrives(packet(22).hop_by_hop().routing(0, 1), rule),
            ],
        );
    });
}

#[test]
pub fn tags_and_strange_ethertypes() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        for direction in [Direction::Ingress, Direction::Egress] {
            let packet = || if direction == Direction::Ingress { tcp(X, B).syn() } else { tcp(B, X).syn() };
            for tagged in [
                packet().vlan(0x8100, 1),
                packet().vlan(0x8100, 0),
                packet().vlan(0x88a8, 5),
                packet().vlan(0x9100, 5),
                packet().vlan(0x88a8, 5).vlan(0x8100, 6),
                packet().vlan(0x8100, 5).vlan(0x8100, 6),
            ] {
                assert_eq!(lab.run(B, direction, &tagged.frame()), Err(Drop::Vlan), "{tagged:?}");
            }
            for ethertype in
                [0x0000_u16, 0x0026, 0x05ff, 0x8035, 0x8847, 0x8863, 0x888e, 0x88cc, 0x88e5, 0x9000, 0xffff]
            {
                let mut frame = packet().frame();
                frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
                assert_eq!(lab.run(B, direction, &frame), Err(Drop::NotIp), "{ethertype:#06x}");
            }
            assert!(lab.run(B, direction, &packet().frame()).is_ok());
        }
    });
}

#[test]
pub fn addresses_that_no_wire_carries() {
    isolated(|| {
        let mut lab = Lab::new("in all, out all");
        let martian = Err(Drop::Martian);
        for source in ["127.0.0.1", "127.255.255.255", "224.0.0.1", "239.1.2.3"] {
            assert_eq!(lab.to(B, &tcp(X, B).from_address(source).syn()), martian, "from {source}");
            assert_eq!(lab.from(B, &tcp(B, X).from_address(source).syn()), martian, "from {source}");
        }
        for source in ["::1", "ff02::1", "::ffff:10.0.1.10", "::ffff:0.0.0.0"] {
            assert_eq!(lab.to(B, &tcp(X, B).v6(X, B).from_address(source).syn()), martian, "from {source}");
            assert_eq!(lab.from(B, &tcp(B, X).v6(B, X).from_address(source).syn()), martian, "from {source}");
        }
        for destination in ["::1", "::ffff:10.0.1.20", "::ffff:127.0.0.1"] {
            assert_eq!(lab.to(B, &tcp(X, B).v6(X, B).to_address(destination).syn()), martian, "to {destination}");
            assert_eq!(lab.from(B, &tcp(B, X).v6(B, X).to_address(destination).syn()), martian, "to {destination}");
        }
        assert_eq!(lab.to(B, &tcp(X, B).to_address("127.0.0.1").syn()), martian);
        assert_eq!(lab.from(B, &tcp(B, X).to_address("127.0.0.1").syn()), martian);
    });
}

#[test]
pub fn neighbours_cut_short() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        let whole = arp(B, 1, B.mac, B.v4, A.v4);
        for length in 0..whole.len() {
            for direction in [Direction::Ingress, Direction::Egress] {
                assert_eq!(lab.run(B, direction, &whole[..length]), MALFORMED, "{length} bytes of ARP");
            }
        }
        let frame = neighbor_advertisement(B, A.v6, B.v6, B.mac).frame();
        for length in 0..frame.len() {
            assert_eq!(
                lab.run(B, Direction::Egress, &frame[..length]),
                MALFORMED,
                "{length} bytes of an advertisement"
            );
        }
        // Cut short, and honest about it: the target isn't there.
        for body in 8..24_u16 {
            let mut cut = frame[..14 + 40 + usize::from(body)].to_vec();
            cut[18..20].copy_from_slice(&body.to_be_bytes());
            assert!(lab.run(B, Direction::Egress, &cut).is_err(), "{body} bytes of an advertisement");
        }
    });
}

#[test]
pub fn offloaded_packets_past_64_kib() {
    isolated(|| {
        let lab = Lab::new("in tcp22, out none");
        let index = lab.ifindex(B);
        for (packet, at) in [(tcp(X, B), 16), (tcp(X, B).v6(X, B), 18)] {
            let big = |port| {
                let mut frame = packet.clone().ports(40000, port).syn().frame();
                frame[at..at + 2].fill(0);
                frame.resize(100_000, 0);
                frame
            };
            // Longer than any test run's frame.
            let reference = lab.reference();
            assert_eq!(reference.run(index, Direction::Ingress, &big(22), 0), Ok(Pass::New), "BIG TCP: {packet:?}");
            assert_eq!(reference.run(index, Direction::Ingress, &big(23), 0), NO_RULE, "BIG TCP: {packet:?}");
            assert_eq!(reference.run(index, Direction::Ingress, &big(22)[..60_000], 0), MALFORMED, "{packet:?}");
        }
    });
}
