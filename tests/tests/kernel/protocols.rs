//! Every protocol number there is, over both families (SG-1.1, SG-1.4, SG-1.5).

use sg_agent::model::{Peer, Rule, Traffic};
use sg_common::verdict::{Drop, Verdict};
use tests::cast::{B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, icmp, icmpv6, other, tcp, udp};

use crate::forget_flows;

const NO_RULE: Verdict = Err(Drop::NoRule);

/// A packet of a protocol; none of what is a header between IPv6's and the protocol's own (RFC 8200, 4).
fn packet(is_v4: bool, protocol: u8) -> Option<Packet> {
    let packet = match (is_v4, protocol) {
        (_, 6) => tcp(X, B).syn(),
        (_, 17) => udp(X, B),
        (true, 1) => icmp(X, B, 8, 0),
        (false, 58) => return Some(icmpv6(X, B, 128, 0)),
        (false, 0 | 43 | 44 | 60) => return None,
        _ => other(X, B, protocol),
    };
    Some(packet.family(is_v4, X, B))
}

fn let_in(lab: &mut Lab, protocol: &str, ports: Option<i64>) {
    let traffic = Traffic::parse(Some(protocol), ports, ports).expect("a protocol of EC2's");
    let rule = |peer| Rule { id: "sgr-1".into(), traffic, peer };
    let everybody = ["0.0.0.0/0", "::/0"].map(|text| text.parse().expect("a network"));
    let peers = everybody.map(|network| match network {
        ipnet::IpNet::V4(network) => Peer::Ipv4(network),
        ipnet::IpNet::V6(network) => Peer::Ipv6(network),
    });
    lab.edit(|inventory| {
        inventory.groups.get_mut(&"sgB".into()).expect("sgB").ingress = peers.into_iter().map(rule).collect();
    });
    forget_flows(lab);
}

#[test]
pub fn minus_one_is_every_protocol_whatever_ports_come_along() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for is_v4 in [true, false] {
            for packet in (0..=255).filter_map(|protocol| packet(is_v4, protocol)) {
                assert_eq!(lab.to(B, &packet), NO_RULE, "SG-2.1: {packet:?}");
            }
        }
        for ports in [None, Some(80), Some(-1)] {
            let_in(&mut lab, "-1", ports);
            for is_v4 in [true, false] {
                for packet in (0..=255).filter_map(|protocol| packet(is_v4, protocol)) {
                    assert!(lab.to(B, &packet).is_ok(), "SG-1.4: with ports {ports:?}: {packet:?}");
                }
            }
        }
    });
}

#[test]
pub fn a_number_is_its_own_protocol_and_no_other() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for number in [0, 1, 2, 4, 5, 6, 7, 17, 41, 43, 47, 50, 51, 58, 59, 60, 89, 132, 254, 255_u8] {
            // TCP and UDP have ports, which is another test's subject (SG-1.2).
            let ports = if matches!(number, 6 | 17) { None } else { Some(80) };
            let (text, icmp_any) = (number.to_string(), matches!(number, 1 | 58).then_some(-1));
            match number {
                6 | 17 => lab.rules("sgB", if number == 6 { "in tcp" } else { "in udp" }),
                _ => let_in(&mut lab, &text, icmp_any.or(ports)),
            }
            forget_flows(&mut lab);
            for is_v4 in [true, false] {
                for protocol in 0..=255 {
                    let Some(packet) = packet(is_v4, protocol) else { continue };
                    // ICMP is IPv4's, ICMPv6 IPv6's (SG-1.5).
                    let is_of_family = match number {
                        1 => is_v4,
                        58 => !is_v4,
                        _ => true,
                    };
                    let allowed = protocol == number && is_of_family;
                    let verdict = lab.to(B, &packet);
                    assert_eq!(verdict.is_ok(), allowed, "SG-1.1: rule {number}, IPv4 {is_v4}, protocol {protocol}");
                    assert!(allowed || verdict == NO_RULE, "SG-1.1: {protocol}: {verdict:?}");
                }
            }
        }
    });
}
