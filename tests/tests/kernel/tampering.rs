//! Maps that somebody else wrote to: each kind of entry, changed, taken away and added, is as it was after one look.

use sg_agent::apply::Applier;
use sg_agent::datapath::Maps;
use sg_common::abi::{Member, MemberKey, OwnKey, Policy, ReferenceKey};
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
            // Every range ends with the space, and has a class that there isn't; then no range ends, and all is allowed.
            ("RULES", |maps| (0..64).for_each(|word| maps.rules.store(word, u64::MAX))),
            ("RULES", |maps| (8..80).for_each(|word| maps.rules.store(word, 0x5555_5555_5555_5555))),
            ("INTERFACES", |maps| {
                let keys: Vec<u32> = maps.interfaces.keys().filter_map(Result::ok).collect();
                assert_eq!(keys.len(), 3);
                maps.interfaces.remove(&keys[0]).expect("an entry");
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
