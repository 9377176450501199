//! Untracked flows: which ones are, and that they stop with their rule (SG-3.2, SG-3.4).

use std::collections::BTreeSet;

use sg_common::verdict::{Drop, Pass, Verdict};
use tests::cast::{A, B, X};
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{icmp, icmpv6, other, tcp, udp};

use crate::{arrives, leaves, run, scene};

const NEW: Verdict = Ok(Pass::New);
const ESTABLISHED: Verdict = Ok(Pass::Established);
const UNTRACKED: Verdict = Ok(Pass::Untracked);
const NO_RULE: Verdict = Err(Drop::NoRule);

#[test]
pub fn both_directions_must_be_open_to_all() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for is_v4 in [true, false] {
            let any = if is_v4 { "any4" } else { "any6" };
            let other_any = if is_v4 { "any6" } else { "any4" };
            let syn = || tcp(X, B).family(is_v4, X, B).syn();
            let datagram = || udp(X, B).family(is_v4, X, B);
            for (rules, tcp_verdict, udp_verdict) in [
                (format!("in tcp22 {any} + udp53 {any}, out all {any}"), UNTRACKED, UNTRACKED),
                (format!("in tcp22 {any} + udp53 {any}, out tcp {any}"), UNTRACKED, NEW),
                (format!("in tcp22 {any} + udp53 {any}, out udp {any}"), NEW, UNTRACKED),
                (format!("in tcp22 {any} + udp53 {any}, out tcp1-65535 {any} + udp0-65534 {any}"), NEW, NEW),
                (format!("in tcp22 {any} + udp53 {any}, out tcp0-1023 {any} + tcp1024-65535 {any}"), NEW, NEW),
                (format!("in tcp22 {any} + udp53 {any}, out all {other_any}"), NEW, NEW),
                (format!("in tcp22 {any} + udp53 {any}, out none"), NEW, NEW),
                (format!("in all {any}, out all {any}"), UNTRACKED, UNTRACKED),
            ] {
                scene(&mut lab, "SG-3.2", &rules, vec![arrives(syn(), tcp_verdict), arrives(datagram(), udp_verdict)]);
            }
        }
        scene(
            &mut lab,
            "SG-3.2: only a literal /0",
            "in tcp22 0.0.0.0/1 + tcp22 128.0.0.0/1, out all",
            vec![arrives(tcp(X, B).syn(), NEW)],
        );
        scene(
            &mut lab,
            "SG-3.2: a narrow and an any-source rule: untracked wins",
            "in tcp22 X/32 + tcp22 any4, out all",
            vec![arrives(tcp(X, B).syn(), UNTRACKED)],
        );
        scene(
            &mut lab,
            "SG-3.2: the same with directions swapped",
            "in all, out tcp443 any4",
            vec![
                leaves(tcp(B, X).ports(50000, 443).syn(), UNTRACKED),
                arrives(tcp(B, X).ports(50000, 443).syn_ack().reply(), UNTRACKED),
            ],
        );
        scene(
            &mut lab,
            "SG-3.2: the rest is always tracked",
            "in all, out all",
            vec![
                arrives(icmp(X, B, 8, 0), NEW),
                arrives(icmpv6(X, B, 128, 0), NEW),
                arrives(other(X, B, 50), NEW),
                arrives(other(X, B, 132).v6(X, B), NEW),
            ],
        );
    });
}

#[test]
pub fn a_revoke_stops_them_at_once() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 any4 + udp53 any4");
        run(
            &mut lab,
            "SG-3.2",
            vec![
                arrives(tcp(X, B).syn(), UNTRACKED),
                leaves(tcp(X, B).syn_ack().reply(), UNTRACKED),
                arrives(tcp(X, B).ack(), UNTRACKED),
                leaves(tcp(X, B).ack().reply(), UNTRACKED),
                arrives(udp(X, B), UNTRACKED),
                leaves(udp(X, B).reply(), UNTRACKED),
            ],
        );
        lab.rules("sgB", "in none");
        run(
            &mut lab,
            "SG-3.4: the next packet is dropped, and what B still sends opens nothing",
            vec![
                arrives(tcp(X, B).ack(), NO_RULE),
                leaves(tcp(X, B).ack().reply(), Ok(Pass::MidFlow)),
                arrives(tcp(X, B).ack(), NO_RULE),
                leaves(tcp(X, B).fin().reply(), Ok(Pass::MidFlow)),
                leaves(tcp(X, B).rst().reply(), Ok(Pass::MidFlow)),
                leaves(tcp(X, B).syn_ack().reply(), Ok(Pass::MidFlow)),
                arrives(tcp(X, B).ack(), NO_RULE),
                arrives(udp(X, B), NO_RULE),
            ],
        );
    });
}

#[test]
pub fn a_swap_of_groups_and_back_revives_nothing() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 any4");
        // A and B share a set of groups, which so stays in force while B leaves it.
        let join = |lab: &mut Lab, group: &str| {
            let groups = BTreeSet::from([group.into()]);
            lab.edit(|inventory| inventory.enis.get_mut(&B.eni()).expect("B's interface").groups = groups);
        };
        let mut b = None;
        lab.attach(|attachments| b = Some(attachments.remove(1)));
        join(&mut lab, "sgA");
        lab.attach(|attachments| attachments.extend(b));
        join(&mut lab, "sgB");
        run(
            &mut lab,
            "SG-3.2",
            vec![arrives(tcp(X, B).syn(), UNTRACKED), leaves(tcp(X, B).syn_ack().reply(), UNTRACKED)],
        );
        join(&mut lab, "sgA");
        run(
            &mut lab,
            "SG-3.4: groups are swapped",
            vec![
                arrives(tcp(X, B).ack(), NO_RULE),
                leaves(tcp(X, B).ack().reply(), Ok(Pass::MidFlow)),
                arrives(tcp(X, B).ack(), NO_RULE),
            ],
        );
    });
}

#[test]
pub fn without_the_reply_rule_they_are_tracked_and_stay() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 any4, out tcp443 any4");
        run(&mut lab, "SG-3.2", vec![arrives(tcp(X, B).syn(), NEW), leaves(tcp(X, B).syn_ack().reply(), ESTABLISHED)]);
        lab.rules("sgB", "in none, out tcp443 any4");
        run(&mut lab, "SG-3.4", vec![arrives(tcp(X, B).ack(), ESTABLISHED), arrives(tcp(X, B).syn(), NO_RULE)]);
    });
}

#[test]
pub fn a_flow_that_became_untracked_stops_with_its_rule() {
    isolated(|| {
        let mut lab = Lab::new("in tcp22 A/32");
        run(&mut lab, "SG-3.1", vec![arrives(tcp(A, B).syn(), NEW)]);
        lab.rules("sgB", "in tcp22 any4");
        run(&mut lab, "SG-3.2: a new connection of the same ports", vec![arrives(tcp(A, B).syn(), UNTRACKED)]);
        lab.rules("sgB", "in none");
        run(&mut lab, "SG-3.4", vec![arrives(tcp(A, B).ack(), NO_RULE)]);
    });
}
