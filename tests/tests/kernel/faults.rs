//! Writes that fail in the middle of a change: the old policy stands whole, and the change succeeds as soon as it can.
//! A map that somebody else has filled fails at the first entry that is new to it, be it before or after the policies
//! were put in force.

use sg_agent::datapath::Maps;
use sg_agent::model::Inventory;
use sg_common::abi::{ExemptKey, Interface, Member, MemberKey, OwnKey, ReferenceKey};
use sg_common::addr::Address;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::tcp;
use tests::text::rules;

use crate::{arrives, forget_flows, run};

const NEW: Verdict = Ok(Pass::New);
const NO_RULE: Verdict = Err(Drop::NoRule);

/// Strangers' entries in a map, by number; whether one more fits.
type Fill = fn(&mut Maps, u32) -> bool;
/// Takes it out again.
type Free = fn(&mut Maps, u32);

fn nobody(number: u32) -> Address {
    let [a, b, c, d] = number.to_be_bytes();
    Address::v4([240 | a, b, c, d])
}

fn exempt(number: u32) -> ExemptKey {
    ExemptKey { vpc: u32::MAX, address: nobody(number), port: 1, protocol: 17, pad: 0 }
}

const MAPS: &[(&str, Fill, Free)] = &[
    (
        "REFERENCES",
        |maps, n| maps.references.insert(ReferenceKey { table: u32::MAX, group: n }, 1, 0).is_ok(),
        |maps, n| drop(maps.references.remove(&ReferenceKey { table: u32::MAX, group: n })),
    ),
    (
        "MEMBERS",
        |maps, n| maps.members.insert(MemberKey { vpc: u32::MAX, address: nobody(n) }, Member::default(), 0).is_ok(),
        |maps, n| drop(maps.members.remove(&MemberKey { vpc: u32::MAX, address: nobody(n) })),
    ),
    (
        "SECONDARIES",
        |maps, n| maps.secondaries.insert(OwnKey { eni: u32::MAX, address: nobody(n) }, 1, 0).is_ok(),
        |maps, n| drop(maps.secondaries.remove(&OwnKey { eni: u32::MAX, address: nobody(n) })),
    ),
    ("EXEMPT", |maps, n| maps.exempt.insert(exempt(n), 1, 0).is_ok(), |maps, n| drop(maps.exempt.remove(&exempt(n)))),
    (
        "INTERFACES",
        |maps, n| maps.interfaces.insert(u32::MAX - n, Interface::default(), 0).is_ok(),
        |maps, n| drop(maps.interfaces.remove(&(u32::MAX - n))),
    ),
];

/// Other rules, by address, port and group, and another own address: something new for most maps.
fn change(inventory: &mut Inventory) {
    let group = inventory.groups.get_mut(&"sgB".into()).expect("a group of the cast");
    group.ingress = rules("in tcp80 C/32 + tcp25 C/128 + tcp81 sgC").ingress;
    let own = inventory.enis.get_mut(&B.eni()).expect("B's interface");
    own.addresses.push("10.0.1.99".parse().expect("an address"));
}

/// What B takes under the old rules, or the new ones.
fn judged(lab: &mut Lab, what: &str, is_new: bool) {
    let old = |verdict_if: bool| if verdict_if == is_new { NEW } else { NO_RULE };
    forget_flows(lab);
    run(
        lab,
        what,
        vec![
            arrives(tcp(A, B).syn(), old(false)),
            arrives(tcp(A, B).ports(40000, 82).syn(), old(false)),
            arrives(tcp(C, B).ports(40000, 80).syn(), old(true)),
            arrives(tcp(C, B).v6(C, B).ports(40000, 25).syn(), old(true)),
            arrives(tcp(C, B).ports(40000, 81).syn(), old(true)),
        ],
    );
}

#[test]
pub fn a_write_that_fails_leaves_the_old_policy_whole() {
    isolated(|| {
        for &(map, fill, free) in MAPS {
            let mut lab = Lab::new("in tcp22 A/32 + tcp82 sgA");
            judged(&mut lab, map, false);
            let (_, maps) = lab.applier().datapath();
            let strangers = (0..).take_while(|&number| fill(maps, number)).count() as u32;
            assert!(strangers > 1_000, "{map} was filled");
            let result = lab.try_edit(change);
            if matches!(map, "EXEMPT" | "INTERFACES") {
                // This change needs no new entry there: a full map is no hindrance.
                result.expect("a change that fits");
                judged(&mut lab, map, true);
                continue;
            }
            let error = result.expect_err(map).to_string();
            assert!(error.contains(map), "{error}");
            judged(&mut lab, &format!("{map} is full"), false);
            let (_, maps) = lab.applier().datapath();
            (0..strangers).for_each(|number| free(maps, number));
            lab.try_edit(|_| {}).expect("a change that fits now");
            judged(&mut lab, &format!("{map} has room again"), true);
            assert!(lab.applier().verify().0.is_empty(), "{map}: nothing was left behind");
        }
    });
}
