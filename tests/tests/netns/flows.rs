//! Flows that go on, and flows that end, when rules change (SG-3); fragments (SG-3.8).

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use tests::e2e::{Lab, Namespace, PATIENCE, SILENCE};

use crate::{pass, vanish};

#[test]
fn a_change_of_the_rules_is_enforced_live() {
    let mut lab = Lab::with(&["a", "b"]).start();
    lab.serve("b", &[22]);
    vanish(lab.tcp("a", "b", 22));
    for _ in 0..3 {
        lab.change(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24", "tcp 22 2001:db8:1::/64"]));
        pass(lab.tcp("a", "b", 22));
        lab.change(|rules| rules.ingress("sg-b", &["tcp 23 10.0.1.0/24", "tcp 23 2001:db8:1::/64"]));
        vanish(lab.tcp("a", "b", 22));
    }
}

/// Case 34: a session needs no egress rule for its replies.
#[test]
fn replies_pass_whatever_the_other_direction_says() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["-1 - 10.0.1.10/32", "-1 - 2001:db8:1::10/128"]).egress("sg-b", &[]))
        .start();
    lab.serve("a", &[22]);
    lab.serve("b", &[22]);
    pass(lab.tcp("a", "b", 22));
    pass(lab.udp("a", "b", 22));
    pass(lab.ping("a", "b"));
    // And nothing else leaves.
    vanish(lab.tcp("b", "a", 22));
    vanish(lab.ping("b", "a"));
}

/// Case 35.
#[test]
fn a_tracked_flow_outlives_its_rule() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.10/32"])).start();
    lab.serve("b", &[22]);
    let mut stream = lab.stream("a", "b", 22);
    lab.change(|rules| rules.ingress("sg-b", &[]));
    lab.tcp("a", "b", 22)[0].vanishes();
    stream.goes_on();
    assert_eq!(lab.server("b", 22).accepted(), 1);
}

#[test]
fn with_cut_a_tracked_flow_ends_with_its_rule() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.10/32", "tcp 23 10.0.1.10/32"]))
        .arguments(&["--on-revoke=cut"])
        .start();
    lab.serve("b", &[22, 23]);
    let mut cut = lab.stream("a", "b", 22);
    let mut other = lab.stream("a", "b", 23);
    lab.change(|rules| rules.ingress("sg-b", &["tcp 23 10.0.1.10/32"]));
    cut.is_silent();
    other.goes_on();
    lab.tcp("a", "b", 22)[0].vanishes();
}

/// Case 37: nothing that the server sends brings the flow back.
#[test]
fn an_untracked_flow_stops_with_its_rule_and_stays_stopped() {
    let any = ["tcp 22 0.0.0.0/0"];
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &any)).start();
    lab.serve("b", &[22]);
    let mut stream = lab.stream("a", "b", 22);
    assert!(lab.agent.packets("i-b", "ingress", "untracked") > 0, "{:#}", lab.agent.interface("i-b"));
    lab.change(|rules| rules.ingress("sg-b", &[]));
    let heard = lab.server("b", 22).bytes();
    let mut server = lab.server("b", 22).last();
    for _ in 0..4 {
        server.write_all(b"all well").expect("the server may send: its group lets everything out");
        stream.is_silent();
    }
    assert_eq!(lab.server("b", 22).bytes(), heard, "nothing of the client's reaches the server any more");
    // It was the rule, and nothing else: with the rule it goes on.
    lab.change(|rules| rules.ingress("sg-b", &any));
    stream.goes_on();
}

#[test]
fn udp_flows_end_or_go_on_as_tcp_ones() {
    let mut lab = Lab::with(&["a", "b", "c"])
        .rules(|rules| rules.ingress("sg-b", &["udp 53 10.0.1.10/32", "udp 54 0.0.0.0/0"]))
        .start();
    lab.serve("b", &[53, 54]);
    let [to, _] = lab.addresses("b");
    let tracked = Conversation::new(lab.world.namespace("a"), to, 53);
    let untracked = Conversation::new(lab.world.namespace("a"), to, 54);
    lab.udp("c", "b", 53)[0].vanishes();
    assert!(tracked.hears(PATIENCE) && untracked.hears(PATIENCE));
    lab.change(|rules| rules.ingress("sg-b", &[]));
    assert!(tracked.hears(PATIENCE), "a tracked flow outlives its rule (SG-3.4)");
    assert!(!untracked.hears(SILENCE), "an untracked one doesn't");
    lab.udp("a", "b", 53)[0].vanishes();
}

/// Case 57, over a real stack that cuts 4 KB into pieces.
#[test]
fn every_fragment_goes_where_the_first_one_goes() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["udp 5000 0.0.0.0/0", "udp 5000 ::/0"]).egress("sg-b", &[]))
        .start();
    lab.serve("b", &[5000, 5001]);
    pass(lab.udp("a", "b", 5000).map(|attempt| attempt.of_size(4000)));
    let passed = lab.agent.packets("i-b", "ingress", "fragment");
    assert!(passed >= 4, "two fragments follow the first, in both families: {passed}");
    assert_eq!(lab.agent.packets("i-b", "ingress", "fragment_orphan"), 0);
    vanish(lab.udp("a", "b", 5001).map(|attempt| attempt.of_size(4000)));
    let dropped = lab.agent.packets("i-b", "ingress", "fragment_orphan");
    assert!(dropped >= 4, "those of a dropped first one: {dropped}");
    assert_eq!(lab.agent.packets("i-b", "ingress", "fragment"), passed, "and not one of them came through");
    assert_eq!(lab.server("b", 5001).datagrams(), 0);
}

/// Datagrams from one and the same socket.
struct Conversation(UdpSocket);

impl Conversation {
    fn new(from: &Namespace, to: IpAddr, port: u16) -> Self {
        let socket = from.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(SocketAddr::new(to, port)).map(|()| socket)
        });
        Self(socket.expect("a connected socket"))
    }

    /// Whether what is said now comes back.
    fn hears(&self, patience: Duration) -> bool {
        self.0.set_read_timeout(Some(patience)).expect("a timeout that isn't zero");
        self.0.send(b"hello?").expect("sending can't fail");
        self.0.recv(&mut [0; 16]).is_ok()
    }
}
