//! What rules match: protocols, ports, types, networks, and all of them together (SG-1, SG-2).

use sg_common::verdict::{Drop, Pass};
use tests::cast::{A, B, C, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{icmp, icmpv6, other, tcp, udp};

use crate::{arrives, leaves, scene};

const NEW: Result<Pass, Drop> = Ok(Pass::New);
const NO_RULE: Result<Pass, Drop> = Err(Drop::NoRule);

#[test]
fn ports_are_destination_ports_and_ranges_include_their_ends() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let to = |port| tcp(X, B).ports(40000, port).syn();
        let rules = "in tcp8000-8010 any4, out tcp443 X/32";
        scene(
            &mut lab,
            "SG-1.2",
            rules,
            vec![
                arrives(to(7999), NO_RULE),
                arrives(to(8000), NEW),
                arrives(to(8010), NEW),
                arrives(to(8011), NO_RULE),
                arrives(to(0), NO_RULE),
                arrives(to(65535), NO_RULE),
                arrives(tcp(X, B).ports(8005, 9).syn(), NO_RULE),
                arrives(udp(X, B).ports(1, 8005), NO_RULE),
                leaves(tcp(B, X).ports(1, 443).syn(), NEW),
                leaves(tcp(B, X).ports(443, 1).syn(), NO_RULE),
            ],
        );
        for (rule, inside, outside) in [
            ("tcp0", vec![0], vec![1, 65535]),
            ("tcp65535", vec![65535], vec![0, 65534]),
            ("tcp0-1023", vec![0, 22, 1023], vec![1024, 65535]),
            ("tcp1024-65535", vec![1024, 65535], vec![0, 1023]),
            ("tcp1-65534", vec![1, 32768, 65534], vec![0, 65535]),
            ("tcp32767-32768", vec![32767, 32768], vec![32766, 32769]),
        ] {
            let steps = inside.into_iter().map(|port| arrives(to(port), NEW));
            let steps = steps.chain(outside.into_iter().map(|port| arrives(to(port), NO_RULE)));
            scene(&mut lab, "SG-1.2", &format!("in {rule} any4, out none"), steps.collect());
        }
    });
}

#[test]
pub fn icmp_types_and_codes() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        scene(
            &mut lab,
            "SG-1.3: a type, any code",
            "in icmp 8/-1 any4",
            vec![
                arrives(icmp(A, B, 8, 0), NEW),
                arrives(icmp(A, B, 8, 7).id(2), NEW),
                arrives(icmp(A, B, 13, 0), NO_RULE),
                arrives(icmp(A, B, 0, 0), NO_RULE),
                arrives(icmpv6(A, B, 128, 0), NO_RULE),
            ],
        );
        scene(
            &mut lab,
            "SG-1.3: a type and a code",
            "in icmp 3/4 any4 + icmpv6 128/0 any6",
            vec![
                arrives(icmp(A, B, 3, 4), NEW),
                arrives(icmp(A, B, 3, 3), NO_RULE),
                arrives(icmpv6(A, B, 128, 0), NEW),
                arrives(icmpv6(A, B, 128, 1).id(2), NO_RULE),
            ],
        );
        scene(
            &mut lab,
            "SG-1.5: protocol 1 is IPv4's only, 58 IPv6's only",
            "in icmp -1/-1 any + icmpv6 any",
            vec![
                arrives(icmp(A, B, 200, 9), NEW),
                arrives(icmpv6(A, B, 200, 9), NEW),
                arrives(other(A, B, 1).v6(A, B), NO_RULE),
                arrives(other(A, B, 58), NO_RULE),
            ],
        );
    });
}

#[test]
fn protocols_by_number() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        scene(
            &mut lab,
            "SG-1.4",
            "in 50 A/32 + 132 A/128",
            vec![
                arrives(other(A, B, 50), NEW),
                arrives(other(A, B, 51), NO_RULE),
                arrives(other(A, B, 0), NO_RULE),
                arrives(other(A, B, 255), NO_RULE),
                arrives(other(A, B, 50).v6(A, B), NO_RULE),
                arrives(other(A, B, 132).v6(A, B), NEW),
                arrives(other(A, B, 132).v6(A, B).hop_by_hop().destination_options(), Ok(Pass::Established)),
            ],
        );
        scene(
            &mut lab,
            "SG-1.4: every protocol, ports that come with it ignored",
            "in -1 ports 80-80 any4, out none",
            vec![
                arrives(tcp(X, B).syn(), NEW),
                arrives(udp(X, B), NEW),
                arrives(other(X, B, 47), NEW),
                arrives(other(X, B, 0), NEW),
                arrives(other(X, B, 255), NEW),
                arrives(icmp(X, B, 8, 0), NEW),
                arrives(other(X, B, 58), NEW),
                arrives(tcp(X, B).v6(X, B).syn(), NO_RULE),
            ],
        );
        scene(
            &mut lab,
            "SG-1.4: number 0",
            "in 0 any4",
            vec![
                arrives(other(X, B, 0), NEW),
                arrives(other(X, B, 1), Err(Drop::NoRule)),
                arrives(tcp(X, B).syn(), NO_RULE),
            ],
        );
    });
}

#[test]
fn families_are_apart() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let v6 = || tcp(X, B).v6(X, B).syn();
        scene(
            &mut lab,
            "SG-1.5",
            "in tcp22 any4, out none",
            vec![arrives(tcp(X, B).syn(), NEW), arrives(v6(), NO_RULE)],
        );
        scene(
            &mut lab,
            "SG-1.5",
            "in tcp22 any6, out none",
            vec![arrives(tcp(X, B).syn(), NO_RULE), arrives(v6(), NEW)],
        );
        scene(
            &mut lab,
            "SG-1.5: a network of mapped addresses covers no IPv4",
            "in tcp22 ::ffff:0:0/96",
            vec![arrives(tcp(X, B).syn(), NO_RULE), arrives(v6(), NO_RULE)],
        );
    });
}

#[test]
fn networks_nest_and_touch() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let from = |address: &str, port| tcp(X, B).from_address(address).ports(40000, port).syn();
        scene(
            &mut lab,
            "SG-2.1: all rules together, narrow ones hide none of the broad ones",
            "in tcp22 10.0.0.0/8 + tcp80 10.0.2.0/24 + tcp443 10.0.2.30/32 + udp53 10.0.2.0/25 + tcp22 10.0.2.0/24",
            vec![
                arrives(from("10.0.2.30", 22), NEW),
                arrives(from("10.0.2.30", 80), NEW),
                arrives(from("10.0.2.30", 443), NEW),
                arrives(from("10.0.2.31", 443), NO_RULE),
                arrives(from("10.0.2.31", 80), NEW),
                arrives(from("10.0.3.0", 80), NO_RULE),
                arrives(from("10.0.1.255", 80), NO_RULE),
                arrives(from("10.255.255.255", 22), NEW),
                arrives(from("11.0.0.0", 22), NO_RULE),
                arrives(from("9.255.255.255", 22), NO_RULE),
            ],
        );
        scene(
            &mut lab,
            "SG-2.1: halves that touch",
            "in tcp22 0.0.0.0/1 + tcp22 128.0.0.0/1",
            vec![
                arrives(from("126.255.255.255", 22), NEW),
                arrives(from("128.0.0.0", 22), NEW),
                arrives(from("203.0.113.9", 22), NEW),
            ],
        );
    });
}

#[test]
fn any_and_narrow_together() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        scene(
            &mut lab,
            "SG-2.1",
            "in tcp22 A/32 + tcp22 any4, out none",
            vec![
                arrives(tcp(X, B).syn(), NEW),
                arrives(tcp(A, B).syn(), NEW),
                arrives(tcp(X, B).ports(1, 23).syn(), NO_RULE),
            ],
        );
        scene(
            &mut lab,
            "SG-2.1: order and repetition mean nothing",
            "in tcp22 C/32 + tcp22 C/32 + tcp20-30 C/32",
            vec![
                arrives(tcp(C, B).syn(), NEW),
                arrives(tcp(C, B).ports(1, 30).syn(), NEW),
                arrives(tcp(C, B).ports(1, 31).syn(), NO_RULE),
            ],
        );
    });
}

#[test]
fn many_rules_all_count() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        // More classes than one word of cells, in both rows and columns.
        let rules: Vec<String> = (0..200).map(|n| format!("tcp{} 198.51.100.{n}/32", 1000 + n * 2)).collect();
        let mut steps = Vec::new();
        for n in 0..200_u16 {
            let from = |port| tcp(X, B).from_address(&format!("198.51.100.{n}")).ports(40000, port).syn();
            steps.push(arrives(from(1000 + n * 2), NEW));
            steps.push(arrives(from(1001 + n * 2), NO_RULE));
            steps.push(arrives(from(1000 + (n + 1) % 200 * 2), NO_RULE));
        }
        scene(&mut lab, "SG-1.14", &format!("in {}", rules.join(" + ")), steps);
    });
}
