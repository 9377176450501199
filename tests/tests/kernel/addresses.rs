//! What belongs to an interface: secondary addresses, delegated prefixes, several interfaces (SG-1.9, SG-2.2, SG-4.3).

use ipnet::IpNet;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, Host};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{tcp, udp};

const NEW: Verdict = Ok(Pass::New);
const NO_RULE: Verdict = Err(Drop::NoRule);

fn delegate(lab: &mut Lab, host: Host, prefixes: &[&str]) {
    let prefixes: Vec<IpNet> = prefixes.iter().map(|text| text.parse().expect("a network")).collect();
    lab.edit(|inventory| inventory.enis.get_mut(&host.eni()).expect("an interface of the cast").prefixes = prefixes);
}

const INSIDE: [&str; 4] = ["10.0.1.32", "10.0.1.47", "2001:db8:1:0:7::", "2001:db8:1:0:7:ffff:ffff:ffff"];
const OUTSIDE: [&str; 4] = ["10.0.1.31", "10.0.1.48", "2001:db8:1:0:6:ffff:ffff:ffff", "2001:db8:1:0:8::"];

#[test]
pub fn an_instance_sends_from_its_delegated_prefixes() {
    isolated(|| {
        let mut lab = Lab::new("in udp, out all");
        let from = |address: &str| udp(B.at(address), A).family(!address.contains(':'), B.at(address), A);
        let to = |address: &str| udp(A, B.at(address)).family(!address.contains(':'), A, B.at(address));
        for address in INSIDE {
            assert_eq!(lab.from(B, &from(address)), Err(Drop::SourceAddress), "SG-4.3: {address} isn't its own yet");
        }
        delegate(&mut lab, B, &["10.0.1.32/28", "2001:db8:1:0:7::/80"]);
        for address in INSIDE {
            assert!(lab.from(B, &from(address)).is_ok(), "SG-4.3: {address} is its own");
            assert!(lab.to(B, &to(address)).is_ok(), "SG-4.3: {address} is its own");
            assert_eq!(lab.from(A, &from(address).from_mac(A.mac)), Err(Drop::SourceAddress), "SG-4.3: and not A's");
        }
        for address in OUTSIDE {
            assert_eq!(lab.from(B, &from(address)), Err(Drop::SourceAddress), "SG-4.3: {address}");
            assert_eq!(lab.to(B, &to(address)), Err(Drop::DestinationAddress), "SG-4.3: {address}");
        }
        delegate(&mut lab, B, &[]);
        for address in INSIDE {
            assert_eq!(lab.from(B, &from(address)), Err(Drop::SourceAddress), "SG-2.4: {address} was taken back");
        }
    });
}

#[test]
pub fn a_reference_means_delegated_prefixes_too() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgA");
        let syn = |lab: &mut Lab, address: &str, port| {
            let from = A.at(address);
            lab.to(B, &tcp(from, B).family(!address.contains(':'), from, B).ports(port, 22).syn())
        };
        for address in INSIDE {
            assert_eq!(syn(&mut lab, address, 1), NO_RULE, "SG-1.9: {address} is nobody's yet");
        }
        delegate(&mut lab, A, &["10.0.1.32/28", "2001:db8:1:0:7::/80"]);
        assert!(lab.warnings().is_empty(), "{:?}", lab.warnings());
        for address in INSIDE {
            assert_eq!(syn(&mut lab, address, 2), NEW, "SG-1.9: {address}");
        }
        for address in OUTSIDE {
            assert_eq!(syn(&mut lab, address, 3), NO_RULE, "SG-1.9: {address}");
        }
        delegate(&mut lab, A, &["2001:db8:1::/64"]);
        assert_eq!(syn(&mut lab, INSIDE[2], 4), NO_RULE, "SG-1.9: nothing that EC2 delegates");
        assert!(
            lab.warnings().iter().any(|warning| warning.problem.contains("2001:db8:1::/64")),
            "{:?}",
            lab.warnings()
        );
    });
}
