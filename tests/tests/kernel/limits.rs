//! As much as the norm and the maps allow, and one more: what doesn't fit is refused whole (SG-1.14).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use sg_agent::apply::{Applier, ApplyError, Snapshot};
use sg_agent::datapath::Datapath;
use sg_agent::decide;
use sg_agent::exempt::Service;
use sg_agent::model::{GroupId, InstanceId, Peer, PrefixListId, RuleId, Scope, Traffic};
use sg_agent::resolve::{Allowance, Desired, GroupSpec, Interface, Membership, Peers, PolicyKey, Spec};
use sg_agent::sharing::Table;
use sg_common::abi::{self, Config, Direction};
use sg_common::packet::TCP;
use sg_common::policy::Match;
use tests::lab::scope;
use tests::netns::isolated;

/// Instances that the norm's users have at most.
const INSTANCES: u32 = 1_000;
/// Entries of one prefix list.
const ENTRIES: u32 = 1_000;
/// Distinct prefixes of one machine.
const PREFIXES: u32 = 100_000;
/// Links that are really there: each takes the kernel some milliseconds to make, and many more where it is emulated.
const LINKS: u32 = 100;

fn applier() -> Applier {
    let config = Config::default();
    let (datapath, maps) = Datapath::load(&config, None, false).expect("programs and maps that the kernel takes");
    Applier::new(datapath, maps, config)
}

/// The `n`th of distinct /28 networks, of which no two touch.
fn network(n: u32) -> IpNet {
    IpNet::V4(Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + (n << 5)), 28).expect("a prefix length"))
}

fn key(n: u32) -> PolicyKey {
    PolicyKey::Groups(scope(), BTreeSet::from([GroupId::from(format!("sg-{n}").as_str())]))
}

/// A rule with a prefix list: TCP port `port` from networks `first` to `first + entries`.
fn rule(port: u16, first: u32, entries: u32) -> Allowance {
    Allowance {
        id: RuleId::from(format!("sgr-{port}").as_str()),
        group: GroupId::from("sg"),
        traffic: Traffic::Tcp { from: port, to: port },
        peer: Peer::PrefixList(PrefixListId::from("pl")),
        peers: Peers::Networks(Arc::new((first..first + entries).map(network).collect())),
    }
}

/// An interface that isn't attached: there is no such link, which is a warning and not this test's subject.
fn interface(n: u32, policy: PolicyKey) -> Interface {
    let [_, a, b, c] = n.to_be_bytes();
    Interface {
        link: format!("none{n}"),
        instance: InstanceId::from(format!("i-{n}").as_str()),
        scope: Scope { ..scope() },
        eni: None,
        groups: BTreeSet::new(),
        policy,
        acl: None,
        vpc: 1,
        mac: [2, 0, 0, a, b, c],
        addresses: vec![IpAddr::from([198, 18, b, c])],
        prefixes: Vec::new(),
        subnet: Vec::new(),
        subnet_number: None,
        source_dest_check: true,
    }
}

fn desired(policies: Table<PolicyKey, Spec>) -> Desired {
    let keys: Vec<PolicyKey> = policies.keys().cloned().collect();
    let interfaces = (0..INSTANCES).map(|n| (1_000_000 + n, interface(n, keys[n as usize % keys.len()].clone())));
    Desired { interfaces: interfaces.collect(), policies, ..Desired::default() }
}

fn groups(ingress: Vec<Allowance>) -> Spec {
    Spec::Groups(GroupSpec { ingress, egress: Vec::new() })
}

/// A policy that takes up more than half of all lines: so many rules, about a port and a network each.
fn wide() -> Spec {
    groups((0..13_000).map(|n| rule(n as u16, n, 1)).collect())
}

/// What the first interface's policy says of TCP from the `n`th network.
fn ask(snapshot: &Snapshot, n: u32, port: u16) -> Match {
    let peer = network(n).addr();
    decide::admits(snapshot, 1_000_000, Direction::Ingress, peer, TCP, port).matched
}

#[test]
pub fn a_thousand_instances_and_a_hundred_thousand_prefixes_fit_and_more_are_refused_whole() {
    isolated(|| {
        let mut applier = applier();
        let policies: Table<PolicyKey, Spec> =
            (0..PREFIXES / ENTRIES).map(|n| (key(n), groups(vec![rule(22, n * ENTRIES, ENTRIES)]))).collect();
        let state = desired(policies.clone());
        let snapshot = applier.apply(&state, true).expect("the norm's limits fit");
        assert_eq!(snapshot.interfaces.len(), INSTANCES as usize);
        assert!(snapshot.usage.lines > 2 * PREFIXES / 16, "no range is left out: {:?}", snapshot.usage);
        assert_eq!(ask(&snapshot, 0, 22), Match::Narrow);
        assert_eq!(ask(&snapshot, ENTRIES, 22), Match::None);
        look_often(&mut applier);

        // More than the map holds, beside all that stands: two policies that would fit one by one.
        let mut over = policies.clone();
        for n in [8_888, 9_999] {
            over.insert(key(n), wide());
        }
        let error = applier.apply(&desired(over), true).expect_err("more lines than the map holds");
        assert!(matches!(error, ApplyError::Capacity { what: "lines of rules", .. }), "{error}");
        assert!(error.to_string().contains("refused whole, the old policy stands"), "{error}");
        let after = applier.snapshot();
        assert_eq!((after.generation, after.usage), (snapshot.generation, snapshot.usage), "nothing has changed");
        assert_eq!(ask(&after, 0, 22), Match::Narrow);
        let changed = applier.apply(&desired([(key(9_999), wide())].into_iter().collect()), true);
        let changed = changed.expect("one of them alone fits: nothing was left behind");
        assert_eq!(ask(&changed, 0, 0), Match::Narrow);
    });
}

/// As the agent does twice a second: nothing is wrong, however large the maps. More looks than one reading of the
/// largest map takes.
fn look_often(applier: &mut Applier) {
    for _ in 0..10 {
        let (repairs, errors) = applier.verify();
        assert!(repairs.is_empty() && errors.is_empty(), "{repairs:?} {errors:?}");
    }
}

#[test]
pub fn many_links_are_looked_after() {
    isolated(|| {
        let batch: String = (0..LINKS).map(|n| format!("link add v{n} type veth peer name p{n}\n")).collect();
        let mut ip = std::process::Command::new("ip")
            .args(["-batch", "-"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("iproute2's 'ip' in the PATH");
        let mut input = ip.stdin.take().expect("a pipe");
        std::io::Write::write_all(&mut input, batch.as_bytes()).expect("a reader");
        drop(input);
        assert!(ip.wait().expect("a child can be waited for").success());
        let mut applier = applier();
        let policies = Table::from([(key(0), groups(vec![rule(22, 0, 1)]))]);
        let interfaces = (0..LINKS).map(|n| {
            let link = format!("v{n}");
            let ifindex = nix::net::if_::if_nametoindex(link.as_str()).expect("a link that was just made");
            (ifindex, Interface { link, ..interface(n, key(0)) })
        });
        let state = Desired { interfaces: interfaces.collect(), policies, ..Desired::default() };
        let snapshot = applier.apply(&state, true).expect("they fit");
        assert!(snapshot.interfaces.values().all(|enforced| enforced.attached), "{:?}", snapshot.warnings);
        look_often(&mut applier);
    });
}

#[test]
pub fn a_thousand_rules_on_an_interface_all_count() {
    isolated(|| {
        let mut applier = applier();
        let rules = (0..1_000).map(|n| rule(n as u16 + 1, n, 1)).collect();
        let snapshot = applier.apply(&desired(Table::from([(key(0), groups(rules))])), true).expect("they fit");
        for n in 0..1_000 {
            for (port, expected) in [(n as u16 + 1, Match::Narrow), (n as u16 + 2, Match::None)] {
                assert_eq!(ask(&snapshot, n, port), expected, "rule {n}, port {port}");
            }
        }
    });
}

#[test]
pub fn more_interfaces_than_fit_are_refused_whole() {
    isolated(|| {
        let mut applier = applier();
        let policies = Table::from([(key(0), groups(vec![rule(22, 0, 1)]))]);
        let mut state = desired(policies);
        let snapshot = applier.apply(&state, true).expect("a thousand fit");
        for n in INSTANCES..=abi::MAX_INTERFACES {
            state.interfaces.insert(1_000_000 + n, interface(n, key(0)));
        }
        let error = applier.apply(&state, true).expect_err("one interface too many");
        assert!(matches!(error, ApplyError::Capacity { what: "interfaces", .. }), "{error}");
        assert_eq!(applier.snapshot().generation, snapshot.generation);
    });
}

#[test]
pub fn more_policies_than_fit_are_refused_whole() {
    isolated(|| {
        let mut applier = applier();
        // One binding is nobody's.
        let most = abi::MAX_BINDINGS - 1;
        let policies = |count: u32, port: u16| -> Table<PolicyKey, Spec> {
            (0..count).map(|n| (key(n), groups(vec![rule(port, n, 1)]))).collect()
        };
        // A policy that changes is there twice for a moment: half of them may all do so at once.
        applier.apply(&desired(policies(most / 2, 22)), true).expect("half of what fits");
        let half = applier.apply(&desired(policies(most / 2, 23)), true).expect("each once more");
        assert_eq!((ask(&half, 0, 22), ask(&half, 0, 23)), (Match::None, Match::Narrow));
        applier.collect();
        assert_eq!(applier.snapshot().usage.policies, most / 2, "what was replaced counts no more");
        let snapshot = applier.apply(&desired(policies(most, 23)), true).expect("as many as fit");
        assert_eq!(ask(&snapshot, 0, 23), Match::Narrow);
        for (over, of) in [(policies(most + 1, 23), "group sets and network ACLs"), (policies(most, 24), "policies")] {
            let error = applier.apply(&desired(over), true).expect_err("more than fit");
            assert!(matches!(error, ApplyError::Capacity { what, .. } if what == of), "{error}");
            let after = applier.snapshot();
            assert_eq!((after.generation, after.usage), (snapshot.generation, snapshot.usage), "nothing has changed");
            assert_eq!((ask(&after, 0, 23), ask(&after, 0, 24)), (Match::Narrow, Match::None));
        }
    });
}

#[test]
pub fn more_own_addresses_and_services_than_fit_are_refused_whole() {
    isolated(|| {
        let mut applier = applier();
        let state = desired([(key(0), groups(vec![rule(22, 0, 1)]))].into_iter().collect());
        let snapshot = applier.apply(&state, true).expect("a thousand instances fit");
        let mut addresses = state.clone();
        let first = addresses.interfaces.get_mut(&1_000_000).expect("the first interface");
        first.addresses.extend((0..abi::MAX_SECONDARIES).map(|n| IpAddr::from((0x0b00_0000 + n).to_be_bytes())));
        let mut services = state.clone();
        services.exempt = (0..=abi::MAX_EXEMPT)
            .map(|n| (1, Service { address: IpAddr::from((0x0b00_0000 + n).to_be_bytes()), port: 53, protocol: TCP }))
            .collect();
        for (over, of) in [(addresses, "own addresses"), (services, "exempt services")] {
            let error = applier.apply(&over, true).expect_err(of);
            assert!(matches!(error, ApplyError::Capacity { what, .. } if what == of), "{error}");
            assert_eq!(applier.snapshot().generation, snapshot.generation);
            assert_eq!(applier.maps().secondaries.keys().count() + applier.maps().exempt.keys().count(), 0);
        }
    });
}

#[test]
pub fn a_group_is_in_as_many_rules_as_it_may_and_a_change_of_its_members_is_one_write() {
    isolated(|| {
        let mut applier = applier();
        // A hundred group sets, each with ten rules that refer to one group of a thousand members.
        let refer = |port: u16| Allowance {
            peer: Peer::Group(GroupId::from("sg-all")),
            peers: Peers::Group(1),
            ..rule(port, 0, 1)
        };
        let policies = (0..100).map(|n| (key(n), groups((1..=10).map(refer).collect()))).collect();
        let mut state = desired(policies);
        let place = |n: u32| (1, IpNet::from(network(n).addr()));
        let member = |groups: &[u32]| Membership { groups: groups.iter().copied().collect(), subnet: None };
        state.members = (0..1_000).map(|n| (place(n), member(&[1]))).collect();
        let writes = |applier: &mut Applier, state: &Desired| {
            let before = applier.maps().writes;
            applier.apply(state, true).expect("a state that fits");
            applier.collect();
            applier.maps().writes - before
        };
        assert!(writes(&mut applier, &state) > 2_000, "the count counts");
        assert_eq!(writes(&mut applier, &state), 0, "SG-2.4: nothing has changed");

        state.members.insert(place(2_000), member(&[1]));
        assert_eq!(writes(&mut applier, &state), 1, "SG-2.4: one joins");
        // The first who ever leaves ends the picking up of flows, once for each interface (SG-3.4).
        state.members.remove(&place(0));
        assert_eq!(writes(&mut applier, &state), 1 + u64::from(INSTANCES), "SG-2.4: the first one leaves");
        for n in 1..10 {
            state.members.remove(&place(n));
            assert_eq!(writes(&mut applier, &state), 1, "SG-2.4: another one leaves");
        }
        state.members.insert(place(1), member(&[1]));
        state.members.insert(place(20), member(&[1, 2]));
        state.members.remove(&place(30));
        assert_eq!(writes(&mut applier, &state), 3, "SG-2.4: three changes");
        let interface = state.interfaces.get_mut(&1_000_000).expect("the first interface");
        interface.addresses.push(IpAddr::from([198, 19, 0, 1]));
        assert_eq!(writes(&mut applier, &state), 1, "SG-2.4: one more address");

        // A rule is a change of its policy, and of no other.
        state.policies.insert(key(0), groups((1..=11).map(refer).collect()));
        assert!(writes(&mut applier, &state) < 100, "SG-2.4: the new policy, and the old one's end");
    });
}

#[test]
pub fn more_members_than_fit_are_refused_whole() {
    isolated(|| {
        let mut applier = applier();
        let mut state = desired(Table::from([(key(0), groups(vec![rule(22, 0, 1)]))]));
        let snapshot = applier.apply(&state, true).expect("a thousand fit");
        let member = Membership { groups: BTreeSet::from([1]), subnet: None };
        state.members = (0..=abi::MAX_MEMBERS).map(|n| ((1, IpNet::from(network(n).addr())), member.clone())).collect();
        let error = applier.apply(&state, true).expect_err("one address too many");
        assert!(matches!(error, ApplyError::Capacity { what: "members' addresses", .. }), "SG-1.14: {error}");
        assert_eq!(applier.snapshot().generation, snapshot.generation);
        assert_eq!(applier.maps().members.keys().count(), 0, "SG-1.14: nothing of it was written");
    });
}

#[test]
pub fn ten_thousand_rules_on_an_interface_all_count() {
    isolated(|| {
        let mut applier = applier();
        let rules = (0..10_000).map(|n| rule(n as u16 + 1, n, 1)).collect();
        let snapshot = applier.apply(&desired(Table::from([(key(0), groups(rules))])), true).expect("they fit");
        for n in (0..10_000).step_by(97) {
            for (port, expected) in [(n as u16 + 1, Match::Narrow), (n as u16 + 2, Match::None)] {
                assert_eq!(ask(&snapshot, n, port), expected, "SG-1.14: rule {n}, port {port}");
            }
        }
    });
}
