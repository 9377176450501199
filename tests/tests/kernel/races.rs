//! Races between the agent's writes and packets on all CPUs. Each test names the race by where it is described, and looks
//! for its verdict that would be wrong: after a change, or in the middle of one what neither of the two states allows.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sg_agent::apply::{Judged, Sockets};
use sg_agent::model::{Eni, EniId, GroupId, Inventory, SecurityGroup, Traffic};
use sg_agent::proxy::{Deny, PublishSpec, Published};
use sg_agent::resolve::Desired;
use sg_common::abi::{CUT_ON_REVOKE, Direction, PublishedKey};
use sg_common::conntrack::State;
use sg_common::packet::TCP;
use tests::cast::{A, B, C, Host, X};
use tests::lab::{Lab, SUBNET_1, acl_entry, put_acl};
use tests::netns::isolated;
use tests::packets::{tcp, udp};
use tests::race::Stand::{Applied, Between, Settled};
use tests::race::{Stand, Tally, race, race_of};
use tests::text::rules;

const ALL: [Stand; 5] = [Between, Applied(0), Applied(1), Settled(0), Settled(1)];
/// Where nobody is told of [`Applied`].
const BOTH: [Stand; 3] = [Between, Settled(0), Settled(1)];

fn cutting(text: &str) -> Lab {
    let mut lab = Lab::new(text);
    lab.configure(|config| config.flags |= CUT_ON_REVOKE);
    lab
}

fn group<'a>(inventory: &'a mut Inventory, name: &str) -> &'a mut SecurityGroup {
    inventory.groups.get_mut(&name.into()).expect("a group of the cast")
}

fn eni(inventory: &mut Inventory, host: Host) -> &mut Eni {
    inventory.enis.get_mut(&host.eni()).expect("an interface of the cast")
}

/// Two states of the control plane.
fn states(lab: &mut Lab, change: impl Fn(usize, &mut Inventory)) -> [Desired; 2] {
    [0, 1].map(|number| lab.desired(|inventory, _| change(number, inventory)))
}

/// `judge`: rules flip while packets are judged and flows are kept.
#[test]
pub fn after_a_flip_nobody_is_judged_by_the_old_rules() {
    isolated(|| {
        let mut lab = cutting("in none");
        let states = states(&mut lab, |number, inventory| {
            group(inventory, "sgB").ingress = rules(["in tcp22 A/32 + tcp23 A/32", "in tcp23 A/32"][number]).ingress;
        });
        let shots = [0, 1].map(|_| {
            [
                lab.shot_to(B, &tcp(A, B).syn()),
                lab.shot_to(B, &tcp(A, B).ack()),
                lab.shot_to(B, &tcp(A, B).ports(40000, 23).syn()),
            ]
        });
        for [syn, ack, other] in race_of(&mut lab, shots, &states) {
            syn.always("what is allowed", &[Applied(0), Settled(0)]);
            syn.never("what is revoked", &[Applied(1), Settled(1)]);
            ack.never("a flow that was kept as its rule was revoked", &[Applied(1), Settled(1)]);
            other.always("what both states allow", &ALL);
        }
    });
}

/// `Applier::settle`: the network ACL flips, between two packets of a flow that are judged at the same time.
#[test]
pub fn a_flow_asks_each_network_acl_anew() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 X/32");
        let everybody = |allow| {
            vec![
                acl_entry(1, allow, Traffic::Tcp { from: 22, to: 22 }, "203.0.113.0/24"),
                acl_entry(2, true, Traffic::All, "0.0.0.0/0"),
            ]
        };
        let states =
            states(&mut lab, |number, inventory| put_acl(inventory, SUBNET_1, everybody(number == 0), everybody(true)));
        let shots = [0, 1].map(|_| [lab.shot_to(B, &tcp(X, B).ack()), lab.shot_from(B, &tcp(X, B).ack().reply())]);
        assert!(lab.flood(B, Direction::Ingress, [tcp(X, B).syn().frame()].into_iter()) == 1, "the flow is there");
        for [arrives, leaves] in race_of(&mut lab, shots, &states) {
            arrives.always("what the ACL allows", &[Settled(0)]);
            arrives.never("what the ACL denies", &[Settled(1)]);
            leaves.always("what both ACLs allow", &ALL);
        }
    });
}

/// `Crossing::world`: an address leaves a group and comes back.
#[test]
pub fn who_has_left_a_group_gets_nowhere() {
    isolated(|| {
        let mut lab = cutting("in tcp22 sgA + tcp23 sgC");
        let states = states(&mut lab, |number, inventory| {
            eni(inventory, A).groups = [["sgA", "sgC"], ["sgC", "sgC"]][number].map(GroupId::from).into();
        });
        let shots = [0, 1].map(|_| {
            [
                lab.shot_to(B, &tcp(A, B).syn()),
                lab.shot_to(B, &tcp(A, B).ack()),
                lab.shot_from(B, &tcp(A, B).syn_ack().reply()),
                lab.shot_to(B, &tcp(A, B).ports(40000, 23).syn()),
            ]
        });
        for [syn, ack, _reply, other] in race_of(&mut lab, shots, &states) {
            syn.always("a member", &[Applied(0), Settled(0)]);
            syn.never("who is none", &[Applied(1), Settled(1)]);
            ack.never("a flow of who is none", &[Applied(1), Settled(1)]);
            other.always("a member of the other group in both states", &ALL);
        }
    });
}

/// `find` in `sg-common/src/policy.rs`: an entry of `MEMBERS` becomes another address's while it is read.
#[test]
pub fn nobody_is_taken_for_another_member() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgA + tcp23 sg0 + tcp23 sg1");
        lab.edit(|inventory| {
            for name in ["sg0", "sg1"] {
                let group = SecurityGroup { id: name.into(), name: name.into(), ..group(inventory, "sgA").clone() };
                inventory.groups.insert(group.id.clone(), group);
            }
        });
        // Those who are not in sgA are out for a moment at each change, the last one of them last: the kernel has the next
        // entry written in its place, and that is the first one's who is in sgA.
        const MEMBER: &str = "10.0.1.100";
        const NOBODY: &str = "10.0.1.131";
        let states = states(&mut lab, |number, inventory| {
            for last in 100..132 {
                let turn = GroupId::from(["sg0", "sg1"][number]);
                let groups = if last % 2 == 0 { [turn, "sgA".into()].into() } else { [turn].into() };
                let id = EniId::from(format!("eni-{last}").as_str());
                let addresses = vec![format!("10.0.1.{last}").parse().expect("an address")];
                let eni = Eni { id: id.clone(), instance: None, addresses, groups, ..eni(inventory, C).clone() };
                inventory.enis.insert(id, eni);
            }
        });
        let from = |address: &str| tcp(X, B).from_address(address).from_mac(A.mac);
        let shots = [0, 1].map(|_| [lab.shot_to(B, &from(NOBODY).syn()), lab.shot_to(B, &from(MEMBER).syn())]);
        let tallies = race(&mut lab, shots, |lab, number, tell| {
            lab.applier().apply(&states[number], true).expect("a state that fits");
            if number == 0 {
                lab.applier().collect();
            }
            tell(Settled(number));
        });
        for [nobody, member] in tallies {
            nobody.never("who was never in the group", &BOTH);
            member.always("who is in it in both states", &[Settled(0), Settled(1)]);
        }
    });
}

/// `look_up` in `sg-ebpf/src/maps.rs`: an entry of `INTERFACES` becomes another link's while it is read, and a slot of
/// `BINDINGS` another group set's (`Applier::unbind`).
#[test]
pub fn no_packet_is_judged_by_another_interface_s_rules() {
    isolated(|| {
        let mut lab = Lab::new("in tcp23 X/32");
        lab.edit(|inventory| {
            let open = rules("in tcp22 X/32").ingress;
            group(inventory, "sgC").ingress = open.clone();
            group(inventory, "sgA").ingress = open;
            for (name, like) in [("sgA2", "sgA"), ("sgB2", "sgB"), ("sgC2", "sgC")] {
                let group = SecurityGroup { id: name.into(), name: name.into(), ..group(inventory, like).clone() };
                inventory.groups.insert(group.id.clone(), group);
            }
            // The same addresses are everybody's: only the rules tell them apart.
            for host in [A, B, C] {
                eni(inventory, host).source_dest_check = false;
            }
        });
        let states = states(&mut lab, |number, inventory| {
            for host in [A, B, C] {
                let name = format!("sg{}", host.name);
                eni(inventory, host).groups = [[&*name, &*format!("{name}2")][number].into()].into();
            }
        });
        let shots = [0, 1].map(|_| {
            [
                lab.shot_to(B, &tcp(X, B).syn()),
                lab.shot_to(C, &tcp(X, C).syn()),
                lab.shot_to(B, &tcp(X, B).ports(40000, 23).syn()),
            ]
        });
        let tallies = race(&mut lab, shots, |lab, number, tell| {
            lab.applier().apply(&states[number], true).expect("a state that fits");
            if number == 0 {
                lab.applier().collect();
            }
            tell(Settled(number));
        });
        for [closed, open, own] in tallies {
            closed.never("what B's rules never allow", &BOTH);
            open.always("what C's rules allow", &[Settled(0), Settled(1)]);
            open.mostly("what C's rules allow");
            own.always("what B's rules allow", &[Settled(0), Settled(1)]);
            own.mostly("what B's rules allow");
        }
    });
}

/// `Applier::replace`: an address moves from one interface to another, whose groups are others.
#[test]
pub fn an_address_that_moves_is_never_in_two_places() {
    isolated(|| {
        const MOVING: &str = "10.0.1.77";
        let mut lab = Lab::new("in tcp22 sgA");
        let states = states(&mut lab, |number, inventory| {
            eni(inventory, [A, C][number]).addresses.push(MOVING.parse().expect("an address"));
        });
        let sent = |from: Host| tcp(from, B).from_address(MOVING).syn();
        let shots = [0, 1].map(|_| [lab.shot_from(A, &sent(A)), lab.shot_from(C, &sent(C)), lab.shot_to(B, &sent(A))]);
        for [from_a, from_c, to_b] in race_of(&mut lab, shots, &states) {
            from_a.always("who has the address", &[Applied(0), Settled(0)]);
            from_a.never("who has it no more", &[Applied(1), Settled(1)]);
            from_c.always("who has it now", &[Applied(1), Settled(1)]);
            from_c.never("who hasn't it yet", &[Applied(0), Settled(0)]);
            to_b.always("a member's address", &[Applied(0), Settled(0)]);
            to_b.never("an address of no member", &[Applied(1), Settled(1)]);
        }
    });
}

/// How many flows the kernel counts for each interface's number, and how many it has.
fn tracked(lab: &mut Lab) -> BTreeMap<u32, (u32, u32)> {
    let maps = lab.applier().maps();
    let mut found: BTreeMap<u32, (u32, u32)> =
        (0..16).map(|eni| (eni, (maps.tracked(eni).expect("a counter"), 0))).collect();
    for key in maps.flows.keys() {
        found.get_mut(&u32::from(key.expect("a key").eni)).expect("one of few numbers").1 += 1;
    }
    found
}

/// `TRACKED` in `sg-ebpf/src/maps.rs`: flows begin, expire, are cut and swept on both CPUs, and interfaces come and go.
#[test]
pub fn the_allowance_is_counted_exactly_in_any_turmoil() {
    isolated(|| {
        const ALLOWANCE: u32 = 20;
        let mut lab = cutting("in none");
        lab.configure(|config| config.allowance = ALLOWANCE);
        let allowed = [rules("in udp53 A/32"), rules("in udp54 A/32")];
        let b = lab.ifindex(B);
        // Another rule cuts the flows; every other change takes the interface away, or brings it back by a new number.
        let states = [0, 1, 2, 3].map(|number| {
            lab.desired(|inventory, attachments| {
                group(inventory, "sgB").ingress = allowed[number / 2].ingress.clone();
                if number % 2 == 1 {
                    attachments.retain(|attachment| attachment.link.ifindex != b);
                }
            })
        });
        // One more flow than the CPUs may have too many.
        let shots = [53, 54].map(|port| {
            let packet = |number: u16| udp(A, B).ports(40_000 + number, port);
            std::array::from_fn::<_, 24, _>(|number| lab.shot_to(B, &packet(number as u16)))
        });
        let (mut turn, mut most) = (0, 0);
        let tallies = race(&mut lab, shots, |lab, number, tell| {
            turn += 1;
            // Longer than these flows live, every third time.
            if turn % 3 == 0 {
                lab.advance(200_000);
            }
            lab.applier().apply(&states[turn % 4], true).expect("a state that fits");
            most = most.max(tracked(lab).values().map(|&(_, there)| there).max().unwrap_or(0));
            tell(Settled(number));
            lab.applier().sweep().expect("a program that runs");
            lab.applier().collect();
        });
        let passed: u64 = tallies.iter().flatten().map(Tally::passed).sum();
        assert!(passed > 1_000, "{passed} packets made flows or went by them");
        assert!((1..=ALLOWANCE + 2).contains(&most), "{most} flows of one interface");
        lab.applier().collect();
        let found = tracked(&mut lab);
        assert!(found.values().all(|(counted, there)| counted == there), "counted, and there: {found:?}");
    });
}

/// `add_fragment` in `sg-ebpf/src/maps.rs`: two CPUs at one place.
#[test]
pub fn fragments_follow_no_other_packet_s_first_one() {
    isolated(|| {
        let mut lab = Lab::new("in udp53 A/32");
        let fragments = |port, id| udp(A, B).ports(40_000, port).payload(2_000).as_fragment(id, 0, true);
        let rest = |id| udp(A, B).payload(100).as_fragment(id, 100, false);
        // Every 64th number has the same place.
        let [allowed, denied] = [1_u16, 65];
        let shots = [0, 1].map(|_| {
            [
                lab.shot_to(B, &fragments(53, allowed)),
                lab.shot_to(B, &rest(allowed)),
                lab.shot_to(B, &fragments(54, denied)),
                lab.shot_to(B, &rest(denied)),
            ]
        });
        for [first, second, other, its] in race(&mut lab, shots, |_, number, tell| tell(Settled(number))) {
            first.always("an allowed packet's first fragment", &[Settled(0), Settled(1)]);
            assert!(second.passed() > 0, "its rest, where no other came between: {second:?}");
            other.never("a denied packet's first fragment", &[Settled(0), Settled(1)]);
            its.never("its rest", &[Settled(0), Settled(1)]);
        }
    });
}

/// `publish` in `sg-agent/src/apply/published.rs`: a published port moves from one instance to another, and rules flip.
#[test]
pub fn a_client_of_a_published_port_is_judged_by_its_instance() {
    isolated(|| {
        const LO: u32 = 1;
        const HOST: &str = "192.0.2.1";
        let mut lab = Lab::new("in tcp22 X/32");
        let states = states(&mut lab, |number, inventory| {
            group(inventory, "sgB").ingress = rules(["in tcp22 X/32", "in tcp22 X/32 + tcp22 C/32"][number]).ingress;
        });
        let links = [B, C].map(|host| lab.ifindex(host));
        let at = |port| PublishedKey {
            address: HOST.parse::<IpAddr>().expect("an address").into(),
            port,
            protocol: TCP,
            pad: 0,
        };
        let publish = |lab: &mut Lab, moving: u32| {
            let mut sockets = Sockets::new();
            for (text, port, link) in
                [("i-b:1001=22", 1001, links[0]), ("i-b:1002=22", 1002, moving), ("i-b:1003=22", 1003, links[1])]
            {
                let published = Published::from(text.parse::<PublishSpec>().expect("a published port"));
                sockets.insert(at(port), (published, Judged { link, deny: Deny::Drop }));
            }
            lab.applier().publish(&sockets).expect("maps with room");
        };
        publish(&mut lab, links[0]);
        let syn = |from: Host, port| tcp(from, B).ports(40_000, port).to_mac([0; 6]).to_address(HOST).syn();
        let shots = [0, 1].map(|_| [1001, 1002, 1003].map(|port| lab.shot_at_host(LO, &syn(X, port))));
        let tallies = race(&mut lab, shots, |lab, number, tell| {
            publish(lab, links[number]);
            lab.applier().apply(&states[number], true).expect("a state that fits");
            lab.applier().collect();
            tell(Settled(number));
        });
        for [open, moving, closed] in tallies {
            open.always("a client whom B's rules allow", &BOTH);
            moving.always("the port while it is B's", &[Settled(0)]);
            moving.never("the port while it is C's", &[Settled(1)]);
            closed.never("a client whom C's rules deny", &BOTH);
        }
    });
}

/// `sg-common/src/conntrack.rs`: both directions of a connection on two CPUs.
#[test]
pub fn a_flow_on_two_cpus_comes_to_the_state_that_its_packets_say() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32, out none");
        let b = lab.ifindex(B);
        let states = |lab: &mut Lab| {
            let eni = lab.reference().interfaces[&b].eni;
            let flows: Vec<_> = lab.applier().maps().flows.iter().map(|entry| entry.expect("an entry")).collect();
            let its: Vec<u8> =
                flows.iter().filter(|(key, _)| u32::from(key.eni) == eni).map(|(_, flow)| flow.state).collect();
            its
        };
        let shots = [
            [lab.shot_to(B, &tcp(A, B).syn()), lab.shot_to(B, &tcp(A, B).ack()), lab.shot_to(B, &tcp(A, B).ack())],
            [
                lab.shot_from(B, &tcp(A, B).syn_ack().reply()),
                lab.shot_from(B, &tcp(A, B).ack().payload(10).reply()),
                lab.shot_from(B, &tcp(A, B).ack().reply()),
            ],
        ];
        assert_eq!(lab.flood(B, Direction::Ingress, [tcp(A, B).syn().frame()].into_iter()), 1);
        let tallies = race(&mut lab, shots, |_, number, tell| tell(Settled(number)));
        for tally in tallies.iter().flatten() {
            tally.always("a connection's packet", &[Settled(0), Settled(1)]);
        }
        // What was lost is repeated by the next packets.
        let end = [
            (Direction::Ingress, tcp(A, B).ack()),
            (Direction::Egress, tcp(A, B).ack().reply()),
            (Direction::Ingress, tcp(A, B).ack()),
        ];
        for (direction, packet) in end {
            assert_eq!(lab.flood(B, direction, [packet.frame()].into_iter()), 1);
        }
        assert_eq!(states(&mut lab), [State::Established as u8]);
    });
}
