//! Links that come and go under the agent.

use tests::e2e::{Lab, wait_for};

use crate::{pass, vanish};

#[test]
fn a_link_that_comes_back_under_its_name_is_enforced_again() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24", "tcp 22 2001:db8:1::/64"]))
        .start();
    lab.serve("b", &[22, 23]);
    pass(lab.tcp("a", "b", 22));
    let before = lab.agent.interface("i-b")["ifindex"].clone();
    lab.world.unplug("b");
    wait_for("the agent sees that the link is gone", || {
        let status = lab.agent.status();
        let gone = status["interfaces"].as_array().is_some_and(|interfaces| interfaces.len() == 1);
        (gone && status["warnings"].to_string().contains("veth-b")).then_some(())
    });
    lab.world.plug("b");
    lab.agent.wait();
    let interface = lab.agent.interface("i-b");
    assert_ne!(interface["ifindex"], before, "it is another link");
    assert_eq!(interface["attached"], true);
    pass(lab.tcp("a", "b", 22));
    vanish(lab.tcp("a", "b", 23));
}

#[test]
fn a_link_that_is_made_later_is_enforced_when_it_appears() {
    let mut lab = Lab::with(&["a", "b"]);
    lab = lab.rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24", "tcp 22 2001:db8:1::/64"]));
    lab.unplug("b");
    let mut lab = lab.start();
    lab.serve("b", &[22, 23]);
    lab.world.plug("b");
    // Nobody asks: the agent hears of it by itself.
    lab.agent.logged(&["no longer", "veth-b"]);
    wait_for("the link is enforced", || {
        let status = lab.agent.status();
        let interfaces = status["interfaces"].as_array()?;
        interfaces.iter().any(|interface| interface["instance"] == "i-b" && interface["attached"] == true).then_some(())
    });
    pass(lab.tcp("a", "b", 22));
    vanish(lab.tcp("a", "b", 23));
}
