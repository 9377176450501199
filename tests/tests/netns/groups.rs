//! Groups as peers, and several groups of one instance (SG-1.8 to SG-1.10, SG-2.1, SG-2.4, SG-2.5).

use tests::e2e::Lab;

use crate::{pass, vanish};

#[test]
fn a_reference_follows_its_members() {
    let mut lab = Lab::with(&["a", "b", "c"]).rules(|rules| rules.ingress("sg-b", &["tcp 3306 sg-a"])).start();
    lab.serve("b", &[3306]);
    pass(lab.tcp("a", "b", 3306));
    vanish(lab.tcp("c", "b", 3306));
    // c joins the group, a leaves it.
    lab.change(|rules| rules.member("i-c", &["sg-c", "sg-a"]).member("i-a", &["sg-c"]));
    pass(lab.tcp("c", "b", 3306));
    vanish(lab.tcp("a", "b", 3306));
    // A reference imports none of the group's rules (SG-1.9), and means none but its members.
    lab.change(|rules| rules.ingress("sg-a", &["-1 - 0.0.0.0/0", "-1 - ::/0"]));
    vanish(lab.tcp("a", "b", 3306));
    vanish(lab.tcp("outside", "b", 3306));
    pass(lab.tcp("c", "b", 3306));
}

#[test]
fn all_rules_of_all_groups_count_together() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-x", &["tcp 22 0.0.0.0/0", "tcp 22 ::/0"]))
        .rules(|rules| rules.ingress("sg-y", &["tcp 23 10.0.1.0/24", "tcp 23 2001:db8:1::/64"]))
        .rules(|rules| rules.member("i-b", &["sg-x", "sg-y"]))
        .start();
    lab.serve("b", &[22, 23, 24]);
    pass(lab.tcp("a", "b", 22));
    pass(lab.tcp("a", "b", 23));
    pass(lab.tcp("outside", "b", 22));
    vanish(lab.tcp("outside", "b", 23));
    vanish(lab.tcp("a", "b", 24));
    lab.change(|rules| rules.member("i-b", &["sg-y"]));
    vanish(lab.tcp("a", "b", 22));
    pass(lab.tcp("a", "b", 23));
}

#[test]
fn a_group_trusts_itself_only_by_a_rule() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-app", &[]).member("i-a", &["sg-app"]).member("i-b", &["sg-app"]))
        .start();
    lab.serve("b", &[22]);
    vanish(lab.tcp("a", "b", 22));
    lab.change(|rules| rules.ingress("sg-app", &["-1 - sg-app"]));
    pass(lab.tcp("a", "b", 22));
    pass(lab.udp("a", "b", 22));
    pass(lab.ping("a", "b"));
    vanish(lab.tcp("outside", "b", 22));
}

#[test]
fn a_prefix_list_is_its_latest_version() {
    let mut lab = Lab::with(&["a", "b", "c"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 pl-1"]).prefix_list("pl-1", &["10.0.1.10/32"]))
        .start();
    lab.serve("b", &[22]);
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("c", "b", 22)[0].vanishes();
    lab.change(|rules| rules.prefix_list("pl-1", &["203.0.113.0/24", "10.0.1.30/32"]));
    lab.tcp("c", "b", 22)[0].passes();
    lab.tcp("outside", "b", 22)[0].passes();
    lab.tcp("a", "b", 22)[0].vanishes();
}

#[test]
fn an_instance_without_a_group_may_do_everything_and_an_unknown_one_nothing() {
    let mut lab = Lab::with(&["a", "b", "c"]).rules(|rules| rules.member("i-b", &[]).forget("i-c")).start();
    lab.serve("b", &[22]);
    lab.serve("c", &[22]);
    lab.serve("a", &[22]);
    pass(lab.tcp("a", "b", 22));
    vanish(lab.tcp("a", "c", 22));
    lab.change(|rules| rules.ingress("sg-a", &["tcp 22 10.0.1.0/24", "tcp 22 2001:db8:1::/64"]));
    pass(lab.tcp("b", "a", 22));
    vanish(lab.tcp("c", "a", 22));
    assert_eq!(lab.agent.interface("i-b")["policy"], "no_group");
    assert_eq!(lab.agent.interface("i-c")["policy"], "unknown");
    let warnings = lab.agent.status()["warnings"].to_string();
    assert!(warnings.contains("i-c") && warnings.contains("i-b"), "{warnings}");
}
