//! Network ACLs: stateless, in order, at the subnet's border only (SG-5).

use sg_agent::model::{AclEntry, Traffic};
use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, C, X};
use tests::lab::{Lab, SUBNET_1, SUBNET_2, acl_entry, put_acl};
use tests::netns::isolated;
use tests::packets::{icmp, other, tcp, udp};

use crate::{arrives, forget_flows, leaves, run};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const ACL: Verdict = Err(Drop::Acl);

fn all() -> Vec<AclEntry> {
    vec![acl_entry(100, true, Traffic::All, "0.0.0.0/0"), acl_entry(101, true, Traffic::All, "::/0")]
}

fn lab(rules: &str, ingress: Vec<AclEntry>, egress: Vec<AclEntry>) -> Lab {
    let mut lab = Lab::new(rules);
    lab.edit(|inventory| put_acl(inventory, SUBNET_1, ingress, egress));
    lab
}

const SSH: Traffic = Traffic::Tcp { from: 22, to: 22 };

#[test]
pub fn within_a_subnet_it_has_no_say() {
    isolated(|| {
        let mut lab = lab("in tcp22 A/32 + tcp22 C/32 + tcp22 A/128", Vec::new(), Vec::new());
        assert_eq!(lab.send(A, B, &tcp(A, B).syn()), ("B", NEW), "SG-5.2");
        assert_eq!(lab.send(B, A, &tcp(A, B).syn_ack().reply()), ("A", ESTABLISHED), "SG-5.2");
        assert_eq!(lab.send(A, B, &tcp(A, B).v6(A, B).syn()), ("B", NEW), "SG-5.2");
        assert_eq!(lab.send(C, B, &tcp(C, B).syn()), ("B", ACL), "SG-5.2");
        assert_eq!(lab.send(B, X, &tcp(B, X).syn()), ("B", ACL), "SG-5.2");
        assert_eq!(lab.send(X, B, &tcp(X, B).syn()), ("B", ACL), "the ACL comes first on the way in");
    });
}

#[test]
pub fn a_peer_that_leaves_the_subnet_meets_it() {
    isolated(|| {
        let mut lab = lab("in tcp22 C/32", Vec::new(), Vec::new());
        let place = |lab: &mut Lab, subnet: &str| {
            lab.edit(|inventory| {
                inventory.enis.get_mut(&C.eni()).expect("C's interface").subnet = Some(subnet.into());
            });
        };
        place(&mut lab, SUBNET_1);
        run(
            &mut lab,
            "SG-5.2: C is in B's subnet, whatever its address",
            vec![
                arrives(tcp(C, B).syn(), NEW),
                leaves(tcp(C, B).syn_ack().reply(), ESTABLISHED),
                arrives(tcp(C, B).ack(), ESTABLISHED),
            ],
        );
        place(&mut lab, SUBNET_2);
        run(
            &mut lab,
            "SG-5.2, SG-3.4: its flows are at the border now",
            vec![arrives(tcp(C, B).ack(), ACL), leaves(tcp(C, B).ack().reply(), ACL)],
        );
    });
}

#[test]
pub fn the_lowest_number_decides() {
    isolated(|| {
        // The other protocol's entry has no ports (SG-5.4); what no entry names is denied (SG-5.3).
        let deny_first = vec![
            acl_entry(100, false, SSH, "10.0.2.0/24"),
            acl_entry(110, true, SSH, "0.0.0.0/0"),
            acl_entry(120, true, Traffic::Icmp { kind: Some(8), code: None }, "0.0.0.0/0"),
            acl_entry(130, true, Traffic::Other { number: 47 }, "0.0.0.0/0"),
        ];
        let mut lab = lab("in all", deny_first, all());
        run(
            &mut lab,
            "SG-5.1",
            vec![
                arrives(tcp(C, B).syn(), ACL),
                arrives(tcp(X, B).syn(), Ok(Pass::Untracked)),
                arrives(tcp(X, B).ports(40000, 23).syn(), ACL),
                arrives(icmp(X, B, 8, 0), NEW),
                arrives(icmp(X, B, 13, 0), ACL),
                arrives(other(X, B, 47), NEW),
                arrives(other(X, B, 50), ACL),
                arrives(tcp(X, B).v6(X, B).syn(), ACL),
            ],
        );
        let allow_first = vec![acl_entry(90, true, SSH, "10.0.2.30/32"), acl_entry(100, false, SSH, "10.0.2.0/24")];
        lab.edit(|inventory| put_acl(inventory, SUBNET_1, allow_first, all()));
        run(
            &mut lab,
            "SG-5.1",
            vec![
                arrives(tcp(C, B).syn(), Ok(Pass::Untracked)),
                arrives(tcp(C, B).from_address("10.0.2.31").syn(), ACL),
                arrives(tcp(X, B).syn(), ACL),
            ],
        );
    });
}

#[test]
pub fn it_is_stateless_also_for_tracked_flows() {
    isolated(|| {
        let egress = vec![acl_entry(100, true, SSH, "0.0.0.0/0")];
        let ephemeral = Traffic::Tcp { from: 32768, to: 65535 };
        let mut lab = lab("in none", Vec::new(), egress.clone());
        run(
            &mut lab,
            "SG-5.1: what comes back needs its own entry",
            vec![leaves(tcp(B, X).syn(), NEW), arrives(tcp(B, X).syn_ack().reply(), ACL)],
        );
        lab.edit(|inventory| {
            put_acl(inventory, SUBNET_1, vec![acl_entry(100, true, ephemeral, "0.0.0.0/0")], egress);
        });
        run(
            &mut lab,
            "SG-5.1",
            vec![arrives(tcp(B, X).syn_ack().reply(), ESTABLISHED), leaves(tcp(B, X).ack(), ESTABLISHED)],
        );
    });
}

#[test]
pub fn a_deny_cuts_tracked_flows() {
    isolated(|| {
        let mut lab = lab("in tcp22 C/32", all(), all());
        let established = || vec![arrives(tcp(C, B).ack(), ESTABLISHED), leaves(tcp(C, B).ack().reply(), ESTABLISHED)];
        run(&mut lab, "SG-3.1", vec![arrives(tcp(C, B).syn(), NEW)]);
        run(&mut lab, "SG-3.1", established());
        let deny = || {
            let mut entries = vec![acl_entry(50, false, SSH, "10.0.2.0/24")];
            entries.extend(all());
            entries
        };
        lab.edit(|inventory| put_acl(inventory, SUBNET_1, deny(), all()));
        run(
            &mut lab,
            "SG-3.4: a deny cuts, in its direction",
            vec![
                arrives(tcp(C, B).ack(), ACL),
                arrives(tcp(C, B).ack(), ACL),
                leaves(tcp(C, B).ack().reply(), ESTABLISHED),
                arrives(tcp(C, B).ack(), ACL),
            ],
        );
        lab.edit(|inventory| put_acl(inventory, SUBNET_1, all(), all()));
        run(&mut lab, "SG-3.4: and no longer than it stands", established());
    });
}

#[test]
pub fn icmp_errors_about_tracked_flows_need_its_leave() {
    isolated(|| {
        let tcp_only = vec![acl_entry(100, true, Traffic::Tcp { from: 0, to: u16::MAX }, "0.0.0.0/0")];
        let mut lab = lab("in none", tcp_only.clone(), tcp_only.clone());
        let error = || tcp(B, X).syn().error(X, B, 3, 4);
        run(
            &mut lab,
            "SG-5.1: a group's state is nothing to an ACL",
            vec![leaves(tcp(B, X).syn(), NEW), arrives(error(), ACL)],
        );
        let mut with_icmp = tcp_only.clone();
        with_icmp.push(acl_entry(110, true, Traffic::Icmp { kind: Some(3), code: Some(4) }, "0.0.0.0/0"));
        lab.edit(|inventory| put_acl(inventory, SUBNET_1, with_icmp, tcp_only));
        run(&mut lab, "SG-3.7", vec![arrives(error(), Ok(Pass::Related))]);
    });
}

#[test]
pub fn exempt_services_pass_it_both_ways() {
    isolated(|| {
        for rules in ["in none, out none", "in none", "in all, out all"] {
            let mut lab = lab(rules, Vec::new(), Vec::new());
            let ask = || udp(B, X).to_address("169.254.169.253");
            run(
                &mut lab,
                &format!("SG-4.1: neither groups nor ACLs filter it ({rules})"),
                vec![leaves(ask(), Ok(Pass::Exempt)), arrives(ask().reply(), ESTABLISHED)],
            );
            // An ACL that lets the question out, but not the answer in.
            let egress = all();
            lab.edit(|inventory| put_acl(inventory, SUBNET_1, Vec::new(), egress));
            forget_flows(&mut lab);
            run(
                &mut lab,
                &format!("SG-4.1: the answer needs no entry ({rules})"),
                vec![leaves(ask(), Ok(Pass::Exempt)), arrives(ask().reply(), ESTABLISHED)],
            );
        }
    });
}
