//! What rules let in and out, in both families; groups, several of them, and references to them (SG-1, SG-2).

use tests::e2e::Lab;

use crate::{pass, vanish};

#[test]
fn nothing_comes_in_without_a_rule_and_replies_need_none() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-a", &["tcp 22 10.0.1.0/24"])).start();
    lab.serve("a", &[22]);
    lab.serve("b", &[22]);
    vanish(lab.tcp("a", "b", 22));
    vanish(lab.udp("a", "b", 22));
    vanish(lab.ping("a", "b"));
    assert_eq!((lab.server("b", 22).accepted(), lab.server("b", 22).datagrams()), (0, 0));
    assert!(lab.agent.packets("i-b", "ingress", "no_rule") >= 6, "{:#}", lab.agent.interface("i-b"));
    // What b begins itself is answered, though b's group has no ingress rule (SG-3.1).
    let [v4, _] = lab.tcp("b", "a", 22);
    v4.passes();
}

#[test]
fn rules_are_about_their_protocol_port_and_family() {
    let mut lab = Lab::with(&["a", "b", "c"]).start();
    lab.serve("b", &[22, 23, 53, 8000, 8010, 8011]);
    lab.change(|rules| {
        let sources = ["tcp 22 10.0.1.10/32", "tcp 23 2001:db8:1::10/128", "udp 53 0.0.0.0/0", "udp 53 ::/0"];
        let rest = ["tcp 8000-8010 10.0.1.0/24", "icmp 8/-1 10.0.1.10/32", "icmpv6 128/-1 2001:db8:1::20/128"];
        rules.ingress("sg-b", &[&sources[..], &rest[..]].concat())
    });
    let [v4, v6] = lab.tcp("a", "b", 22);
    v4.passes();
    v6.vanishes();
    vanish(lab.tcp("c", "b", 22));
    let [v4, v6] = lab.tcp("a", "b", 23);
    v6.passes();
    v4.vanishes();
    pass(lab.udp("c", "b", 53));
    vanish(lab.tcp("c", "b", 53));
    for (port, allowed) in [(8000, true), (8010, true), (8011, false)] {
        lab.tcp("c", "b", port)[0].passes_if(allowed);
    }
    let [v4, v6] = lab.ping("a", "b");
    v4.passes();
    v6.vanishes();
    lab.change(|rules| rules.ingress("sg-b", &["icmpv6 128/-1 2001:db8:1::10/128"]));
    let [v4, v6] = lab.ping("a", "b");
    v6.passes();
    v4.vanishes();
}

#[test]
fn what_leaves_needs_an_egress_rule() {
    let lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["-1 - 0.0.0.0/0", "-1 - ::/0"]));
    let mut lab = lab.start();
    lab.serve("b", &[22, 23]);
    pass(lab.tcp("a", "b", 22));
    lab.change(|rules| rules.egress("sg-a", &["tcp 22 10.0.1.20/32", "icmpv6 128/-1 ::/0", "udp 23 ::/0"]));
    let [v4, v6] = lab.tcp("a", "b", 22);
    v4.passes();
    v6.vanishes();
    vanish(lab.tcp("a", "b", 23));
    let [v4, v6] = lab.ping("a", "b");
    v6.passes();
    v4.vanishes();
    let [v4, v6] = lab.udp("a", "b", 23);
    v6.passes();
    v4.vanishes();
    // At a's own link, and not at b's.
    assert!(lab.agent.packets("i-a", "egress", "no_rule") > 0);
    assert_eq!(lab.agent.packets("i-b", "ingress", "no_rule"), 0);
}
