//! Services that neither groups nor ACLs filter (SG-4.1).

use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, ROUTER, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, icmp, tcp, udp};

use crate::{Step, arrives, leaves, run};

const EXEMPT: Verdict = Ok(Pass::Exempt);
const NO_RULE: Verdict = Err(Drop::NoRule);

fn both_ways(ask: &Packet) -> [Step; 3] {
    [
        arrives(ask.clone().reply(), NO_RULE),
        leaves(ask.clone(), EXEMPT),
        arrives(ask.clone().reply(), Ok(Pass::Established)),
    ]
}

#[test]
pub fn aws_services_need_no_rule() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        let tcp_to = |address: &str, port| tcp(B, X).to_address(address).ports(40000, port).ack();
        let udp_to = |address: &str, port| udp(B, X).to_address(address).ports(40000, port);
        let udp6_to = |address: &str, port| udp(B, X).v6(B, X).to_address(address).ports(40000, port);
        for ask in [
            tcp_to("169.254.169.254", 80),
            udp_to("169.254.169.253", 53),
            tcp_to("169.254.169.253", 53),
            udp_to("10.0.0.2", 53),
            tcp_to("10.0.0.2", 53),
            udp_to("10.0.1.1", 53),
            udp_to("169.254.169.123", 123),
            tcp_to("169.254.169.250", 1688),
            tcp_to("169.254.169.251", 1688),
            tcp_to("169.254.170.2", 80),
            tcp_to("169.254.170.23", 80),
            udp6_to("fd00:ec2::253", 53),
            udp6_to("fd00:ec2::123", 123),
        ] {
            run(&mut lab, "SG-4.1", both_ways(&ask).into());
        }
        run(
            &mut lab,
            "SG-4.1: the service, not the host",
            vec![
                leaves(tcp_to("169.254.169.254", 443), NO_RULE),
                leaves(udp_to("169.254.169.254", 80), NO_RULE),
                leaves(udp_to("169.254.169.252", 53), NO_RULE),
                leaves(icmp(B, X, 8, 0).to_address("169.254.169.254"), NO_RULE),
                leaves(udp_to("203.0.113.9", 53), NO_RULE),
                // An exempt service may answer, not ask.
                arrives(udp(X, B).from_address("169.254.169.253").ports(53, 53), NO_RULE),
                arrives(tcp(X, B).from_address("169.254.169.254").ports(80, 22).syn(), NO_RULE),
                leaves(udp_to("169.254.169.253", 53).from_address("10.0.1.10"), Err(Drop::SourceAddress)),
            ],
        );
    });
}

#[test]
pub fn dhcp_needs_no_rule() {
    isolated(|| {
        let mut lab = Lab::new("in none, out none");
        let broadcast = || udp(B, X).ports(68, 67).to_address("255.255.255.255").to_mac([0xff; 6]);
        let offer = || udp(X, B).from_mac(ROUTER).from_address("10.0.1.1").ports(67, 68);
        let solicit = || udp(B, X).v6(B, X).ports(546, 547).to_address("ff02::1:2").to_mac([0x33, 0x33, 0, 1, 0, 2]);
        let link_local = B.link_local().to_string();
        let dhcp = Ok(Pass::Dhcp);
        run(
            &mut lab,
            "SG-4.1",
            vec![
                leaves(broadcast().from_address("0.0.0.0"), dhcp),
                leaves(broadcast(), dhcp),
                arrives(offer(), dhcp),
                arrives(offer().to_address("255.255.255.255").to_mac([0xff; 6]), dhcp),
                leaves(udp(B, X).ports(68, 67).to_address("10.0.1.1"), EXEMPT),
                leaves(solicit().from_address(&link_local), dhcp),
            ],
        );
        run(
            &mut lab,
            "SG-4.3, SG-4.4: DHCP is no way around",
            vec![
                leaves(broadcast().from_address("10.0.1.10"), Err(Drop::SourceAddress)),
                leaves(broadcast().from_mac(A.mac), Err(Drop::SourceMac)),
                leaves(broadcast().ports(67, 68), Err(Drop::Multicast)),
                leaves(broadcast().ports(68, 69), Err(Drop::Multicast)),
                leaves(broadcast().payload(100).as_fragment(1, 0, true), Err(Drop::Multicast)),
                leaves(broadcast().from_address("0.0.0.0").to_address("10.0.1.10"), Err(Drop::SourceAddress)),
                leaves(solicit(), Err(Drop::Multicast)),
                leaves(solicit().from_address("fe80::1").ports(546, 548), Err(Drop::SourceAddress)),
                // Another instance is no DHCP server.
                arrives(offer().from_address("10.0.1.10"), NO_RULE),
                arrives(offer().from_address("10.0.1.10").to_address("255.255.255.255"), Err(Drop::Multicast)),
                arrives(offer().ports(67, 69), NO_RULE),
                leaves(udp(B, A).ports(67, 68), NO_RULE),
            ],
        );
    });
}
