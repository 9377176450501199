//! Maps that somebody else wrote to: each kind of entry, changed, taken away and added, is as it was after one look.

use std::net::Ipv4Addr;

use aya::maps::lpm_trie::Key;
use sg_agent::apply::Applier;
use sg_agent::datapath::Maps;
use sg_common::abi::{Cidr4Key, Member, MemberKey, OwnKey, Policy, PortKey, ReferenceKey};
use sg_common::addr::Address;
use sg_common::verdict::{Drop, Pass};
use tests::cast::{A, B, C};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::tcp;

use crate::{arrives, forget_flows, run};

const RULES: &str = "in tcp22 A/32 + tcp25 A/128 + tcp80 sgC, out none";

/// What somebody does.
type Tamper = fn(&mut Maps);

/// Looks; the kinds and subjects of what was put right.
fn look(applier: &mut Applier) -> Vec<String> {
    let (repairs, errors) = applier.verify();
    assert!(errors.is_empty(), "{errors:?}");
    repairs.into_iter().map(|repair| format!("{} {}", repair.kind, repair.subject)).collect()
}

#[test]
pub fn every_map_is_as_it_was_after_one_look() {
    isolated(|| {
        let mut lab = Lab::new(RULES);
        assert_eq!(look(lab.applier()), [""; 0], "nothing is wrong");
        let tampering: &[(&str, Tamper)] = &[
            ("CONFIG", |maps| {
                let mut config = maps.config().expect("settings");
                config.proxy_mark = 7;
                maps.set_config(&config).expect("a map that can be written");
            }),
            ("BINDINGS", |maps| (1..8).for_each(|slot| maps.bindings.store(slot, 0))),
            ("MATRIX", |maps| (0..8).for_each(|word| maps.matrix.store(word, u64::MAX))),
            ("INTERFACES", |maps| {
                let keys: Vec<u32> = maps.interfaces.keys().filter_map(Result::ok).collect();
                assert_eq!(keys.len(), 3);
                maps.interfaces.remove(&keys[0]).expect("an entry");
            }),
            ("CIDRS4", |maps| {
                let keys: Vec<Key<Cidr4Key>> = maps.cidrs4.keys().filter_map(Result::ok).collect();
                assert!(!keys.is_empty());
                for key in &keys {
                    maps.cidrs4.remove(key).expect("an entry");
                }
            }),
            ("CIDRS4", |maps| {
                // Everybody in every row that there is.
                for table in 0..16_u32 {
                    let data = Cidr4Key { table: table.to_be_bytes(), address: Ipv4Addr::UNSPECIFIED.octets() };
                    maps.cidrs4.insert(&Key::new(32, data), 1, 0).expect("a map that can be written");
                }
            }),
            ("CIDRS6", |maps| {
                let keys: Vec<_> = maps.cidrs6.keys().filter_map(Result::ok).collect();
                for key in &keys {
                    maps.cidrs6.insert(key, 0, 0).expect("a map that can be written");
                }
            }),
            ("PORTS", |maps| {
                let keys: Vec<Key<PortKey>> = maps.ports.keys().filter_map(Result::ok).collect();
                for key in &keys {
                    maps.ports.remove(key).expect("an entry");
                }
            }),
            ("REFERENCES", |maps| {
                let key = ReferenceKey { table: 4, group: 4_711 };
                maps.references.insert(key, 1, 0).expect("a map that can be written");
            }),
            ("MEMBERS", |maps| {
                let key = MemberKey { vpc: 1, address: Address::from(std::net::IpAddr::V4(A.v4)) };
                let member = Member { count: 1, ..Member::default() };
                maps.members.insert(key, member, 0).expect("a map that can be written");
            }),
            ("SECONDARIES", |maps| {
                let key = OwnKey { eni: 1, address: Address::v4([203, 0, 113, 77]) };
                maps.secondaries.insert(key, 1, 0).expect("a map that can be written");
            }),
            ("EXEMPT", |maps| {
                let keys: Vec<_> = maps.exempt.keys().filter_map(Result::ok).collect();
                maps.exempt.remove(&keys[0]).expect("an entry");
            }),
            ("POLICIES", |maps| {
                for id in 2..8 {
                    maps.policies.set(id, Policy::default(), 0).expect("a map that can be written");
                }
            }),
        ];
        for (map, tamper) in tampering {
            let (_, maps) = lab.applier().datapath();
            tamper(maps);
            assert_eq!(look(lab.applier()), [format!("map_altered map {map}")], "{map}");
            assert_eq!(look(lab.applier()), [""; 0], "{map} is right again");
            // What the kernel decides is what the tables in memory say, or `run` fails.
            forget_flows(&mut lab);
            run(
                &mut lab,
                map,
                vec![
                    arrives(tcp(A, B).syn(), Ok(Pass::New)),
                    arrives(tcp(A, B).ports(40000, 25).v6(A, B).syn(), Ok(Pass::New)),
                    arrives(tcp(C, B).ports(40000, 80).syn(), Ok(Pass::New)),
                    arrives(tcp(A, B).ports(40000, 23).syn(), Err(Drop::NoRule)),
                    arrives(tcp(A, B).ports(40000, 80).syn(), Err(Drop::NoRule)),
                ],
            );
        }
    });
}
