//! Attachments and inventories in, what is desired out.

use std::collections::BTreeSet;

use super::*;
use crate::sharing::{Set, Table};

mod rounds;
use crate::discovery::{Link, OUT_OF_SIGHT, Origin};
use crate::model::{Instance, InstanceId, NetworkAcl, Peer, PeeredVpc, Peering, Rule, SecurityGroup, Traffic, Warning};

fn scope() -> Scope {
    Scope { account: "123456789012".into(), region: "us-east-1".into() }
}

fn eni() -> Eni {
    Eni {
        id: "eni-1".into(),
        instance: Some("i-1".into()),
        device_index: 0,
        groups: BTreeSet::from(["sg-1".into()]),
        subnet: Some("subnet-1".into()),
        vpc: Some("vpc-1".into()),
        addresses: vec!["10.0.0.1".parse().expect("an address")],
        prefixes: Vec::new(),
        source_dest_check: true,
    }
}

fn attachment() -> Attachment {
    Attachment {
        instance: "i-1".into(),
        account: None,
        region: None,
        eni: None,
        device_index: 0,
        link: Link { ifindex: 7, name: "veth7".into() },
        mac: [2, 0, 0, 0, 0, 7],
        addresses: vec!["10.0.0.1".parse().expect("an address")],
        networks: Vec::new(),
        gateways: Vec::new(),
        origin: Origin::Flag,
        publish: Vec::new(),
    }
}

#[test]
fn what_a_guest_gives_itself_takes_nothing_from_who_had_it_first() {
    let mut thief = attachment();
    thief.link = Link { ifindex: 6, name: "veth6".into() };
    (thief.mac, thief.addresses) = ([2, 0, 0, 0, 0, 6], vec!["10.0.0.6".parse().expect("an address")]);
    let owner = attachment();
    let mut resolver = Resolver::default();
    let mut own = |attachments: &[Attachment]| {
        let desired = resolver.resolve(&World::new(), &scope(), &attachments.into());
        let of = |link: u32| (desired.interfaces[&link].mac, desired.interfaces[&link].addresses.clone());
        (of(6), of(7), desired.warnings)
    };
    let (honest, before, _) = own(&[thief.clone(), owner.clone()]);
    assert_eq!(before, (owner.mac, owner.addresses.clone()));
    thief.addresses.extend(&owner.addresses);
    thief.mac = owner.mac;
    let (stolen, after, warnings) = own(&[thief.clone(), owner.clone()]);
    assert_eq!(after, before, "the owner keeps what it had");
    assert_eq!(stolen, (OUT_OF_SIGHT, honest.1), "the thief gets nothing of it");
    assert!(warnings.iter().any(|warning| warning.problem.contains("10.0.0.1")), "{warnings:?}");
    // Nor does it become the holder while the owner's address is away for a moment.
    let mut away = owner.clone();
    away.addresses.clear();
    own(&[thief.clone(), away]);
    let (_, back, _) = own(&[thief, owner]);
    assert_eq!(back, before);
}

#[test]
fn an_acl_stands_where_the_source_lists_no_subnets() {
    let acl = NetworkAcl {
        id: "acl-1".into(),
        subnets: BTreeSet::from(["subnet-1".into()]),
        ingress: Vec::new(),
        egress: Vec::new(),
    };
    let instance = Instance { id: "i-1".into(), name: None, state: "running".into(), enis: vec!["eni-1".into()] };
    let inventory = Inventory {
        enis: Table::from([("eni-1".into(), eni())]),
        instances: Table::from([("i-1".into(), instance)]),
        acls: Table::from([("acl-1".into(), acl)]),
        ..Inventory::default()
    };
    let world = World::from([(scope(), inventory)]);
    let desired = Resolver::default().resolve(&world, &scope(), &[attachment()].into());
    let interface = &desired.interfaces[&7];
    assert_eq!(interface.acl, Some(PolicyKey::Acl(scope(), "acl-1".into())));
    assert!(interface.subnet.is_empty() && interface.subnet_number.is_some());
    let own = &desired.members[&(interface.vpc, interface.addresses[0].into())];
    assert_eq!(own.subnet, interface.subnet_number, "neighbours in the subnet are known by its number");
}

/// An inventory with one instance in one group, whose rules are given.
fn account(instance: &str, group: &str, vpc: &str, address: &str, peers: &[Peer]) -> Inventory {
    let (instance, group) = (InstanceId::from(instance), GroupId::from(group));
    let eni = Eni {
        id: format!("eni-{instance}").as_str().into(),
        instance: Some(instance.clone()),
        groups: BTreeSet::from([group.clone()]),
        vpc: Some(vpc.into()),
        addresses: vec![address.parse().expect("an address")],
        ..eni()
    };
    let rule = |peer: &Peer| Rule { id: "sgr-1".into(), traffic: Traffic::All, peer: peer.clone() };
    let group = SecurityGroup {
        id: group,
        name: "group".into(),
        vpc: Some(vpc.into()),
        owner: "".into(),
        ingress: peers.iter().map(rule).collect(),
        egress: Vec::new(),
    };
    let running = Instance { id: instance.clone(), name: None, state: "running".into(), enis: vec![eni.id.clone()] };
    Inventory {
        groups: Table::from([(group.id.clone(), group)]),
        enis: Table::from([(eni.id.clone(), eni)]),
        instances: Table::from([(instance, running)]),
        ..Inventory::default()
    }
}

fn at(instance: &str, link: u32, address: &str) -> Attachment {
    Attachment {
        instance: instance.into(),
        link: Link { ifindex: link, name: format!("veth{link}") },
        mac: [2, 0, 0, 0, 0, link as u8],
        addresses: vec![address.parse().expect("an address")],
        ..attachment()
    }
}

fn other_scope() -> Scope {
    Scope { account: "000000000002".into(), ..scope() }
}

fn peering(far: &Scope) -> Peering {
    let end = |vpc: &str, scope: &Scope| PeeredVpc {
        vpc: vpc.into(),
        account: Some(scope.account.clone()),
        region: Some(scope.region.clone()),
    };
    Peering::between(end("vpc-1", &scope()), end("vpc-2", far))
}

fn foreign() -> Peer {
    Peer::ForeignGroup { account: other_scope().account, group: "sg-2".into() }
}

/// Who the rules of the instance at link 7 let in by reference, and what is warned about.
fn let_in(world: &World) -> (Vec<String>, Vec<String>) {
    let attachments = [at("i-1", 7, "10.0.0.1"), at("i-2", 8, "10.1.0.2")].into();
    let desired = Resolver::default().resolve(world, &scope(), &attachments);
    let interface = &desired.interfaces[&7];
    let Spec::Groups(rules) = &desired.policies[&interface.policy] else { panic!("an ACL for groups") };
    let referred: BTreeSet<u32> = rules
        .ingress
        .iter()
        .filter_map(|rule| if let Peers::Group(number) = rule.peers { Some(number) } else { None })
        .collect();
    let seen = desired.members.iter().filter(|((vpc, _), _)| *vpc == interface.vpc);
    let members = seen.filter(|(_, member)| !member.groups.is_disjoint(&referred));
    (members.map(|((_, place), _)| place.to_string()).collect(), told(&desired.warnings))
}

fn told(warnings: &Set<Warning>) -> Vec<String> {
    warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_reference_reaches_into_another_account_across_a_peering() {
    // SG-1.12
    let mut here = account("i-1", "sg-1", "vpc-1", "10.0.0.1", &[foreign()]);
    let there = account("i-2", "sg-2", "vpc-2", "10.1.0.2", &[]);
    here.peerings.insert(peering(&other_scope()));
    let mut world = World::from([(scope(), here), (other_scope(), there)]);
    assert_eq!(foreign_references(&world), BTreeMap::from([(other_scope(), BTreeSet::from(["sg-2".into()]))]));
    assert_eq!(let_in(&world), (vec!["10.1.0.2/32".to_owned()], vec![]), "SG-1.12: across accounts");

    // The other side may be the one that says so.
    let told = std::mem::take(&mut world.get_mut(&scope()).expect("here").peerings);
    world.get_mut(&other_scope()).expect("there").peerings = told;
    assert_eq!(let_in(&world).0, ["10.1.0.2/32"], "SG-1.12: whoever prints the peering");

    world.get_mut(&other_scope()).expect("there").peerings.clear();
    let (members, warnings) = let_in(&world);
    assert_eq!(members, [""; 0], "SG-1.12: the peering is gone");
    assert_eq!(
        warnings,
        ["sg-1 sgr-1: refers to security group sg-2 in vpc-2, which no active peering \
          connects with vpc-1: it matches nothing"]
    );
}

#[test]
fn a_reference_into_what_is_not_read_matches_nothing() {
    // SG-1.12
    let mut here = account("i-1", "sg-1", "vpc-1", "10.0.0.1", &[foreign()]);
    here.peerings.insert(peering(&other_scope()));
    let mut world = World::from([(scope(), here)]);
    let (members, warnings) = let_in(&world);
    assert_eq!(members, [""; 0]);
    assert!(warnings[1].contains("sg-2 of account 000000000002, an account that no instance"), "{warnings:?}");

    world.insert(other_scope(), Inventory::default());
    let (members, warnings) = let_in(&world);
    assert_eq!(members, [""; 0]);
    assert!(warnings[1].contains("sg-2 of account 000000000002, which does not exist"), "{warnings:?}");

    // The same id in the own account, or in another region, is another group.
    let mut own = account("i-2", "sg-2", "vpc-1", "10.1.0.2", &[]);
    world.get_mut(&scope()).expect("here").groups.append(&mut own.groups.clone());
    world.get_mut(&scope()).expect("here").enis.append(&mut own.enis.clone());
    world.get_mut(&scope()).expect("here").instances.append(&mut own.instances);
    world.insert(Scope { region: "eu-west-1".into(), ..other_scope() }, own);
    assert_eq!(let_in(&world).0, [""; 0], "SG-1.12: ids mean something within one account and region");
}

#[test]
fn a_peered_vpc_of_the_same_account_is_seen() {
    // SG-1.12
    let mut inventory = account("i-1", "sg-1", "vpc-1", "10.0.0.1", &[Peer::Group("sg-2".into())]);
    let mut there = account("i-2", "sg-2", "vpc-2", "10.1.0.2", &[]);
    inventory.groups.append(&mut there.groups);
    inventory.enis.append(&mut there.enis);
    inventory.instances.append(&mut there.instances);
    let mut world = World::from([(scope(), inventory)]);
    let (members, warnings) = let_in(&world);
    assert_eq!(members, [""; 0], "SG-1.12: without a peering");
    assert!(warnings[0].contains("sg-2 in vpc-2, which no active peering connects with vpc-1"), "{warnings:?}");
    world.get_mut(&scope()).expect("here").peerings.insert(peering(&scope()));
    assert_eq!(let_in(&world), (vec!["10.1.0.2/32".to_owned()], vec![]), "SG-1.12: same account");
    let far = Scope { region: "eu-west-1".into(), ..scope() };
    world.get_mut(&scope()).expect("here").peerings = Set::unit(peering(&far));
    assert_eq!(let_in(&world).0, [""; 0], "SG-1.12: no reference goes to another region");
}

#[test]
fn who_is_in_a_vpc_is_its_interfaces_to_tell() {
    // An emulator takes a group of another VPC for an interface, which AWS refuses.
    let mut inventory = account("i-1", "sg-1", "vpc-1", "10.0.0.1", &[Peer::Group("sg-2".into())]);
    let mut there = account("i-2", "sg-2", "vpc-2", "10.1.0.2", &[]);
    there.enis.update_all(|eni| eni.vpc = Some("vpc-1".into()));
    inventory.groups.append(&mut there.groups);
    inventory.enis.append(&mut there.enis);
    inventory.instances.append(&mut there.instances);
    let (members, warnings) = let_in(&World::from([(scope(), inventory)]));
    assert_eq!(members, ["10.1.0.2/32"], "SG-1.9: the private addresses of the interfaces in that group");
    assert!(warnings[0].contains("no active peering"), "{warnings:?}");
}

#[test]
fn delegated_prefixes_are_own_addresses_and_members() {
    // SG-1.9
    let prefix = |text: &str| text.parse::<IpNet>().expect("a network");
    let mut inventory = account("i-1", "sg-1", "vpc-1", "10.0.0.1", &[Peer::Group("sg-2".into())]);
    let mut there = account("i-2", "sg-2", "vpc-1", "10.1.0.2", &[]);
    there.enis.update_all(|eni| {
        eni.prefixes = ["10.1.0.16/28", "2001:db8:1:2:3::/80"].map(prefix).to_vec();
    });
    inventory.groups.append(&mut there.groups);
    inventory.enis.append(&mut there.enis);
    inventory.instances.append(&mut there.instances);
    let mut world = World::from([(scope(), inventory)]);
    let attachments = [at("i-1", 7, "10.0.0.1"), at("i-2", 8, "10.1.0.2")].into();
    let desired = Resolver::default().resolve(&world, &scope(), &attachments);
    let own = &desired.interfaces[&8];
    assert_eq!(own.addresses.len(), 17, "SG-1.9: the /28 is 16 addresses");
    assert_eq!(own.prefixes, [prefix("2001:db8:1:2:3::/80")]);
    let (members, warnings) = let_in(&world);
    assert_eq!((members.len(), warnings.len()), (18, 0), "SG-1.9: members: {members:?} {warnings:?}");
    assert!(members.contains(&"2001:db8:1:2:3::/80".to_owned()) && members.contains(&"10.1.0.31/32".to_owned()));

    // What a guest gives itself within a neighbour's prefix is the neighbour's.
    let thief = Attachment { addresses: vec!["2001:db8:1:2:3::5".parse().expect("an address")], ..at("i-1", 7, "::1") };
    let desired = Resolver::default().resolve(&world, &scope(), &[thief, at("i-2", 8, "10.1.0.2")].into());
    assert!(!desired.interfaces[&7].addresses.contains(&"2001:db8:1:2:3::5".parse().expect("an address")));
    assert_eq!(desired.interfaces[&8].prefixes.len(), 1);

    // Neither another length nor one with somebody else's address in it counts.
    let enis = &mut world.get_mut(&scope()).expect("here").enis;
    enis.get_mut(&"eni-i-2".into()).expect("i-2's").prefixes = vec![prefix("2001:db8::/64")];
    assert!(let_in(&world).1[0].contains("2001:db8::/64, which is left out: EC2 delegates /28 and /80"));
    let enis = &mut world.get_mut(&scope()).expect("here").enis;
    enis.get_mut(&"eni-i-2".into()).expect("i-2's").prefixes = vec![prefix("2001:db8:1:2:3::/80")];
    enis.get_mut(&"eni-i-1".into()).expect("i-1's").addresses.push("2001:db8:1:2:3::5".parse().expect("an address"));
    let (members, warnings) = let_in(&world);
    assert_eq!(members, ["10.1.0.2/32"]);
    assert!(warnings[0].contains("has 2001:db8:1:2:3::5 in it, which is somebody else's"), "{warnings:?}");
}
