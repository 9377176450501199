//! `explain --live`: the attached programs are asked the same question, and nothing is left of it.

use sg_agent::explain::{Explanation, Party, Query};
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use tests::cast::{A, B, C, Host, X};
use tests::lab::{Lab, SUBNET_1, acl_entry, instance_id, put_acl};
use tests::netns::isolated;

fn query(peer: Party, protocol: u8, port: u16, egress: bool) -> Query {
    Query { instance: instance_id(&B), peer, protocol, port, egress, live: true }
}

fn from(host: Host, protocol: u8, port: u16) -> Query {
    query(Party::Address(host.v4.into()), protocol, port, false)
}

/// What the kernel said at each gate.
fn kernel(explanation: &Explanation) -> Vec<Option<bool>> {
    explanation.gates.iter().map(|gate| gate.kernel).collect()
}

#[test]
fn the_kernel_says_what_the_model_says() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32 + udp53 any4 + icmp 8/-1 any4 + 47 C/32 + tcp443 any6");
        lab.edit(|inventory| {
            let deny = acl_entry(90, false, sg_agent::model::Traffic::Other { number: 47 }, "0.0.0.0/0");
            let rest = |number, network| acl_entry(number, true, sg_agent::model::Traffic::All, network);
            let ingress = vec![deny, rest(100, "0.0.0.0/0"), rest(101, "::/0")];
            put_acl(inventory, SUBNET_1, ingress, vec![rest(100, "0.0.0.0/0"), rest(101, "::/0")]);
        });
        let v6 = |host: Host, port| query(Party::Address(host.v6.into()), TCP, port, false);
        let table = [
            (from(A, TCP, 22), true, None),
            (from(C, TCP, 22), false, Some("ENI_SG_RULES_MISMATCH")),
            (from(X, UDP, 53), true, None),
            (from(X, UDP, 54), false, Some("ENI_SG_RULES_MISMATCH")),
            (from(X, ICMP, 8 << 8), true, None),
            (from(X, ICMP, 13 << 8), false, Some("ENI_SG_RULES_MISMATCH")),
            (from(C, 47, 0), false, Some("SUBNET_ACL_RESTRICTION")),
            (v6(X, 443), true, None),
            (v6(X, 444), false, Some("ENI_SG_RULES_MISMATCH")),
            (query(Party::Address(X.v6.into()), ICMPV6, 128 << 8, false), false, Some("ENI_SG_RULES_MISMATCH")),
            (query(Party::Address(X.v4.into()), TCP, 443, true), true, None),
        ];
        for (query, allowed, reason) in table {
            let explanation = lab.explain_live(&query);
            assert_eq!(explanation.allowed, allowed, "SG-7.2: {query:?}");
            assert_eq!(explanation.gates[0].reason.as_deref(), reason, "SG-7.2: {query:?}");
            assert_eq!(kernel(&explanation), [Some(allowed)], "{query:?}");
            assert!(!explanation.kernel_disagrees, "{query:?}");
        }
        let eni = lab.applier().snapshot().interfaces[&lab.ifindex(B)].entry.eni;
        lab.applier().sweep().unwrap();
        assert_eq!(lab.applier().maps().flows.keys().count(), 0, "no flow is left of it");
        assert_eq!(lab.applier().maps().tracked(eni).unwrap(), 0, "nor its place in the allowance");
    });
}

#[test]
fn both_gates_are_asked() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 sgA");
        let explanation = lab.explain_live(&query(Party::Instance(instance_id(&A)), TCP, 22, false));
        assert_eq!(kernel(&explanation), [Some(true), Some(true)], "SG-2.3");
        lab.rules("sgA", "in none, out none");
        let explanation = lab.explain_live(&query(Party::Instance(instance_id(&A)), TCP, 22, false));
        assert_eq!(kernel(&explanation), [Some(false), Some(true)], "SG-2.3");
        assert_eq!(explanation.gates[0].reason.as_deref(), Some("SG_HAS_NO_RULES"), "SG-7.2");
        assert!(!explanation.allowed && !explanation.kernel_disagrees);
    });
}

#[test]
fn a_kernel_that_disagrees_is_told() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32");
        lab.sabotage();
        let explanation = lab.explain_live(&from(A, TCP, 22));
        assert!(explanation.allowed && explanation.kernel_disagrees);
        assert_eq!(kernel(&explanation), [Some(false)]);
    });
}
