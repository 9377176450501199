//! References into other VPCs and other accounts (SG-1.12).

use sg_agent::model::{Inventory, Peer, PeeredVpc, Peering, Rule, Scope, Traffic};
use sg_agent::sharing::Set;
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C};
use tests::lab::{Lab, instance_id, scope};
use tests::netns::isolated;
use tests::packets::tcp;

const NEW: Verdict = Ok(Pass::New);
const NO_RULE: Verdict = Err(Drop::NoRule);

fn other_account() -> Scope {
    Scope { account: "000000000002".into(), ..scope() }
}

/// Moves C with its group into a VPC of its own, of another account, or of the same one.
fn move_c(lab: &mut Lab, to: &Scope) {
    lab.worlds(|world| {
        let here = world.get_mut(&scope()).expect("the first account");
        let mut moved = Inventory::default();
        let mut eni = here.enis.remove(&C.eni()).expect("C's interface");
        let mut group = here.groups.remove(&"sgC".into()).expect("C's group");
        let instance = here.instances.remove(&instance_id(&C)).expect("C");
        (eni.vpc, eni.subnet) = (Some("vpc-2".into()), None);
        (group.vpc, group.owner) = (Some("vpc-2".into()), to.account.clone());
        moved.enis.insert(eni.id.clone(), eni);
        moved.groups.insert(group.id.clone(), group);
        moved.instances.insert(instance.id.clone(), instance);
        let there = world.entry(to.clone()).or_default();
        there.enis.append(&mut moved.enis);
        there.groups.append(&mut moved.groups);
        there.instances.append(&mut moved.instances);
    });
}

fn peering(far: &Scope) -> Set<Peering> {
    let end = |vpc: &str, account: &Scope| PeeredVpc {
        vpc: vpc.into(),
        account: Some(account.account.clone()),
        region: Some(account.region.clone()),
    };
    Set::unit(Peering::between(end("vpc-1", &scope()), end("vpc-2", far)))
}

fn let_in(lab: &mut Lab, peer: Peer) {
    lab.edit(|inventory| {
        let rule = Rule { id: "sgr-far".into(), traffic: Traffic::Tcp { from: 22, to: 22 }, peer };
        inventory.groups.get_mut(&"sgB".into()).expect("sgB").ingress = vec![rule];
    });
}

fn warns(lab: &Lab, text: &str) -> bool {
    lab.warnings().iter().any(|warning| warning.subject == "sgB sgr-far" && warning.problem.contains(text))
}

#[test]
pub fn a_reference_into_another_account_needs_the_account_the_group_and_the_peering() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        let far = other_account();
        move_c(&mut lab, &far);
        let_in(&mut lab, Peer::ForeignGroup { account: far.account.clone(), group: "sgC".into() });
        let syn = |lab: &mut Lab, port| lab.to(B, &tcp(C, B).ports(port, 22).syn());
        assert_eq!(syn(&mut lab, 1), NO_RULE, "SG-1.12: no peering");
        assert!(warns(&lab, "no active peering connects with vpc-1"), "{:?}", lab.warnings());

        lab.edit(|inventory| inventory.peerings = peering(&far));
        assert_eq!(syn(&mut lab, 2), NEW, "SG-1.12: across accounts");
        assert_eq!(lab.send(C, B, &tcp(C, B).ports(3, 22).syn()), ("B", NEW), "SG-1.12: the whole way");
        assert_eq!(lab.to(B, &tcp(C, B).v6(C, B).ports(4, 22).syn()), NEW, "SG-1.9: IPv6 included");
        assert_eq!(lab.to(B, &tcp(C, B).ports(5, 23).syn()), NO_RULE, "SG-1.9: its ports only");
        assert_eq!(lab.to(B, &tcp(A, B).ports(6, 22).syn()), NO_RULE, "SG-1.9: its members only");
        assert!(!warns(&lab, ""), "{:?}", lab.warnings());

        lab.worlds(|world| world.get_mut(&far).expect("the account").enis.clear());
        assert_eq!(syn(&mut lab, 7), NO_RULE, "SG-2.4: a member of another account leaves");
        lab.worlds(|world| world.get_mut(&far).expect("the account").groups.clear());
        assert_eq!(syn(&mut lab, 8), NO_RULE, "SG-1.12: its group is deleted");
        assert!(warns(&lab, "which does not exist"), "{:?}", lab.warnings());
        lab.worlds(|world| drop(world.remove(&far)));
        assert_eq!(syn(&mut lab, 9), NO_RULE, "SG-1.12: its account isn't read");
        assert!(warns(&lab, "an account that no instance attached here is in"), "{:?}", lab.warnings());
    });
}

#[test]
pub fn a_reference_into_a_peered_vpc_of_the_same_account() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        move_c(&mut lab, &scope());
        let_in(&mut lab, Peer::Group("sgC".into()));
        assert_eq!(lab.to(B, &tcp(C, B).ports(1, 22).syn()), NO_RULE, "SG-1.12: no peering");
        assert!(warns(&lab, "no active peering"), "{:?}", lab.warnings());
        lab.edit(|inventory| inventory.peerings = peering(&scope()));
        assert_eq!(lab.to(B, &tcp(C, B).ports(2, 22).syn()), NEW, "SG-1.12: in the same account");
        lab.edit(|inventory| inventory.peerings.clear());
        assert_eq!(lab.to(B, &tcp(C, B).ports(3, 22).syn()), NO_RULE, "SG-1.12: the peering is gone");
    });
}

#[test]
pub fn a_group_of_the_same_id_in_another_account_is_another_group() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgC");
        let far = other_account();
        move_c(&mut lab, &far);
        lab.edit(|inventory| inventory.peerings = peering(&far));
        assert_eq!(lab.to(B, &tcp(C, B).syn()), NO_RULE, "SG-1.12: the rule is about its own account's sgC");
        assert!(lab.warnings().iter().any(|warning| warning.problem.contains("sgC")), "{:?}", lab.warnings());
    });
}
