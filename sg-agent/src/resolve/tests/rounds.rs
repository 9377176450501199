//! A round that follows from the last one comes to the same as one that begins from nothing.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use proptest::prelude::*;

use super::*;
use crate::model::{AclEntry, AclId, PrefixList, PrefixListId, Subnet, SubnetId};

/// Attachments and inventories that change step by step.
struct Stage {
    world: World,
    attachments: Vec<Attachment>,
    resolver: Resolver,
    /// Rounds that followed from the one before.
    followed: usize,
}

/// What changes, whose, and how, as numbers that shrink.
type Step = (u8, u8, u16, u16);

fn group_id(number: u16) -> GroupId {
    format!("sg-{}", number % 5).as_str().into()
}

fn vpc_id(number: u16) -> Option<VpcId> {
    [Some("vpc-1".into()), Some("vpc-2".into()), None][usize::from(number % 3)].clone()
}

fn address(number: u16) -> IpAddr {
    match number % 10 {
        8 => IpAddr::from([0x2001, 0xdb8, 1, 2, 3, 0, 0, number % 2]),
        9 => IpAddr::from([10, 1, 0, 16 + number as u8 % 4]),
        low => IpAddr::from([10, 0, 0, low as u8]),
    }
}

/// The numbers of the bits that are set.
fn bits(mask: u16) -> impl Iterator<Item = u16> {
    (0..16).filter(move |bit| mask >> bit & 1 == 1)
}

impl Stage {
    fn new() -> Self {
        let world = World::from([(scope(), Inventory::default()), (other_scope(), Inventory::default())]);
        let mut stage = Self { world, attachments: Vec::new(), resolver: Resolver::default(), followed: 0 };
        for number in 0..8_u8 {
            let other = u16::from(number);
            let first = [(0, 0x55, other), (6, other | 0x10, other * 3), (13, 1, 0), (14, other, other)];
            for (kind, a, b) in first {
                stage.change((kind, number * 2, a, b));
            }
        }
        stage
    }

    fn change(&mut self, (kind, which, a, b): Step) {
        let scopes = [scope(), other_scope()];
        let own = &scopes[usize::from(which & 1)];
        let other = &scopes[usize::from(!which & 1)];
        let number = u16::from(which >> 1);
        let inventory = self.world.entry(own.clone()).or_default();
        let eni_id = EniId::from(format!("eni-{number}").as_str());
        let instance = |number: u16| InstanceId::from(format!("i-{}", number % 4).as_str());
        match kind {
            0 | 1 => {
                let peer = |bit: u16| match bit % 8 {
                    0 => Peer::Ipv4("198.51.100.0/24".parse().unwrap()),
                    1 => Peer::Ipv6("::/0".parse().unwrap()),
                    2 => Peer::PrefixList("pl-0".into()),
                    3 => Peer::PrefixList("pl-1".into()),
                    4 => Peer::Group(group_id(b)),
                    5 => Peer::Group(group_id(b >> 3)),
                    6 => Peer::ForeignGroup { account: other.account.clone(), group: group_id(b) },
                    _ => Peer::ForeignGroup { account: other.account.clone(), group: group_id(b >> 3) },
                };
                let rule =
                    |bit| Rule { id: format!("sgr-{bit}").as_str().into(), traffic: Traffic::All, peer: peer(bit) };
                let rules: Vec<Rule> = bits(a & 0xff).map(rule).collect();
                let id = group_id(number);
                if !inventory.groups.contains_key(&id) {
                    let (name, owner) = (id.to_string(), own.account.clone());
                    let (ingress, egress) = (vec![], vec![]);
                    let group = SecurityGroup { id: id.clone(), name, vpc: vpc_id(b), owner, ingress, egress };
                    inventory.groups.insert(id.clone(), group);
                }
                let group = inventory.groups.get_mut(&id).unwrap();
                *(if kind == 0 { &mut group.ingress } else { &mut group.egress }) = rules;
            }
            2 => drop(inventory.groups.remove(&group_id(number))),
            3 => inventory.groups.get_mut(&group_id(number)).into_iter().for_each(|group| group.vpc = vpc_id(a)),
            4 | 5 => {
                if let Some(eni) = inventory.enis.get_mut(&eni_id) {
                    eni.groups = bits(a & 0x1f).map(group_id).collect();
                }
            }
            6 => {
                let prefixes = match b >> 8 & 0xf {
                    0 => vec!["10.1.0.16/28".parse().unwrap()],
                    1 => vec!["2001:db8:1:2:3::/80".parse().unwrap()],
                    2 => vec!["2001:db8::/64".parse().unwrap()],
                    _ => vec![],
                };
                let eni = Eni {
                    id: eni_id.clone(),
                    instance: (a & 0x10 != 0).then(|| instance(a)),
                    device_index: 0,
                    groups: bits(a >> 8 & 0x1f).chain([a % 5]).map(group_id).collect(),
                    subnet: (a & 0x20 != 0).then(|| SubnetId::from(format!("subnet-{}", b & 1).as_str())),
                    vpc: vpc_id(a >> 5),
                    addresses: vec![address(b), address(b >> 4)],
                    prefixes,
                    source_dest_check: b & 0x80 == 0,
                };
                inventory.enis.insert(eni_id, eni);
            }
            7 => drop(inventory.enis.remove(&eni_id)),
            8 => {
                let id = PrefixListId::from(format!("pl-{}", number % 2).as_str());
                let entry = |bit: u16| IpNet::V4(Ipv4Net::new([192, 0, 2, bit as u8].into(), 32).unwrap());
                let entries: BTreeSet<IpNet> = bits(a).map(entry).collect();
                let list = PrefixList { id: id.clone(), version: i64::from(b), entries: entries.into() };
                inventory.prefix_lists.insert(id, list);
            }
            9 => drop(inventory.prefix_lists.remove(&format!("pl-{}", number % 2).as_str().into())),
            10 | 11 => {
                let id = AclId::from(format!("acl-{}", number % 2).as_str());
                let entry = |network: &str, number, allow| AclEntry {
                    number,
                    allow,
                    traffic: Traffic::All,
                    network: network.parse().unwrap(),
                };
                let open = vec![entry("0.0.0.0/0", 100, true), entry("::/0", 101, a & 3 != 0)];
                let mut ingress = open.clone();
                ingress.insert(0, entry("192.0.2.0/24", 1 + u32::from(a % 90), a & 4 == 0));
                let known = inventory.acls.get(&id).map(|acl| acl.subnets.clone()).filter(|_| kind == 11);
                let chosen = || bits(b & 3).map(|bit| format!("subnet-{bit}").as_str().into()).collect();
                let subnets = known.unwrap_or_else(chosen);
                inventory.acls.insert(id.clone(), NetworkAcl { id, subnets, ingress, egress: open });
            }
            12 => {
                let end = |vpc: Option<VpcId>, scope: &Scope, known: bool| PeeredVpc {
                    vpc: vpc.unwrap_or_else(|| "vpc-3".into()),
                    account: known.then(|| scope.account.clone()),
                    region: Some(scope.region.clone()),
                };
                let peering = Peering::between(end(vpc_id(a), own, b & 1 == 0), end(vpc_id(a >> 2), other, b & 2 == 0));
                if inventory.peerings.remove(&peering).is_none() {
                    inventory.peerings.insert(peering);
                }
            }
            13 => {
                let id = instance(number);
                let its = inventory.enis.values().filter(|eni| eni.instance.as_ref() == Some(&id));
                let enis = its.map(|eni| eni.id.clone()).collect();
                let it = Instance { id: id.clone(), name: None, state: "running".into(), enis };
                match a % 4 {
                    0 => drop(inventory.instances.remove(&id)),
                    _ => inventory.instances.insert(id, it),
                }
            }
            14 => {
                let link = 20 + u32::from(number);
                self.attachments.retain(|attachment| attachment.link.ifindex != link);
                if a & 0xc0 != 0xc0 {
                    let container = Origin::Docker { container: "c".into(), name: "c".into(), convention: "sg-agent" };
                    self.attachments.push(Attachment {
                        account: (a & 8 != 0).then(|| own.account.clone()),
                        eni: (a & 0x30 == 0x30).then(|| format!("eni-{}", b % 8).as_str().into()),
                        mac: [2, 0, 0, 0, 0, (b % 6) as u8],
                        addresses: vec![address(b), address(b >> 5)],
                        origin: if a & 0x100 != 0 { container } else { Origin::Flag },
                        ..at(&format!("i-{}", a % 4), link, "10.0.0.1")
                    });
                }
            }
            15 => {
                let id = SubnetId::from(format!("subnet-{}", number % 2).as_str());
                let ipv4 = (a & 1 == 0).then(|| Ipv4Net::new([10, 0, 0, 0].into(), 24).unwrap());
                inventory.subnets.insert(id.clone(), Subnet { id, vpc: "vpc-1".into(), ipv4, ipv6: None });
                inventory.vpcs.insert("vpc-1".into(), Ipv4Net::new([10, b as u8 & 1, 0, 0].into(), 16).unwrap());
            }
            _ => {
                let warning = Warning { subject: format!("sg-{}", a % 3), problem: "is strange".into() };
                if inventory.warnings.remove(&warning).is_none() {
                    inventory.warnings.insert(warning);
                }
            }
        }
    }

    /// Both ways; what differs.
    fn rounds(&mut self) -> (Desired, Desired) {
        let attachments: Arc<[Attachment]> = self.attachments.clone().into();
        let inputs = Inputs { world: self.world.clone(), default: scope(), attachments: Arc::clone(&attachments) };
        let changes = Changes::between(&self.resolver.memory.world, &self.world);
        self.followed += usize::from(self.resolver.memory.can_follow(&inputs, &changes));
        let mut fresh = self.resolver.afresh();
        let followed = self.resolver.resolve(&self.world, &scope(), &attachments);
        fresh.numbers = self.resolver.numbers.clone();
        let begun = fresh.resolve(&self.world, &scope(), &attachments);
        assert_eq!(fresh.numbers, self.resolver.numbers, "it has a number that only the other way gives");
        (followed, begun)
    }
}

#[test]
fn following_comes_to_the_same_as_beginning() {
    let cases = ProptestConfig::default();
    let (mut followed, mut rounds) = (0, 0);
    let steps = proptest::collection::vec((0..17_u8, 0..16_u8, any::<u16>(), any::<u16>()), 1..30);
    let mut runner = proptest::test_runner::TestRunner::new(cases);
    let counts = std::cell::RefCell::new((&mut followed, &mut rounds));
    let outcome = runner.run(&steps, |steps| {
        let mut stage = Stage::new();
        stage.rounds();
        stage.followed = 0;
        for step in &steps {
            stage.change(*step);
            let (followed, begun) = stage.rounds();
            prop_assert_eq!(followed, begun, "after {:?}", step);
        }
        let mut counts = counts.borrow_mut();
        *counts.0 += stage.followed;
        *counts.1 += steps.len();
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    assert!(followed * 4 > rounds, "{followed} of {rounds} rounds followed from the one before: too few to tell");
}

#[test]
fn what_does_not_change_is_not_made_again() {
    let mut stage = Stage::new();
    let (before, _) = stage.rounds();
    let key = before.interfaces.values().find_map(|interface| match &interface.policy {
        PolicyKey::Groups(owner, groups) if *owner == scope() => groups.first().cloned(),
        _ => None,
    });
    let changed = key.expect("an interface with a group");
    stage.world.get_mut(&scope()).unwrap().groups.get_mut(&changed).unwrap().egress.push(Rule {
        id: "sgr-new".into(),
        traffic: Traffic::Tcp { from: 22, to: 22 },
        peer: Peer::Ipv4(Ipv4Net::default()),
    });
    let (after, _) = stage.rounds();
    assert_eq!(stage.followed, 1);
    let policies: Vec<&PolicyKey> = before.policies.changes(&after.policies).map(|change| change.key).collect();
    let is_with = |key: &&PolicyKey| matches!(key, PolicyKey::Groups(_, groups) if groups.contains(&changed));
    assert!(!policies.is_empty() && policies.iter().all(is_with), "{policies:?}");
    for (link, interface) in before.interfaces.iter() {
        assert!(std::ptr::eq(interface, after.interfaces.get(link).unwrap()), "{link} was made again");
    }
    assert!(before.members.changes(&after.members).next().is_none());
}
