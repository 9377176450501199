//! Published ports before the handshake: what a denied client sees, and what is left of it on the host.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::Value;
use tests::e2e::{Attempt, Lab, Namespace, Server, Stream, wait_for};

const LOCAL4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCAL6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// Published on all addresses, for port 22 of `b`.
const PORT: u16 = 32022;

/// `b`'s port 22 on all of the host's addresses, open to nobody.
fn lab(arguments: &[&str]) -> Lab {
    let mut lab = Lab::with(&["a", "b"]).arguments(&["--publish", "i-b:[::]:32022=22"]).arguments(arguments).start();
    lab.serve("b", &[22]);
    lab
}

/// Attempts from everywhere, each by another link: loopback, the bridge, the outside.
fn attempts(lab: &Lab) -> Vec<Attempt<'_>> {
    let world = &lab.world;
    let inside = lab.addresses("host").map(|host| Attempt::tcp(world.namespace("a"), host, PORT));
    let outside = ["203.0.113.1", "2001:db8:ffff::1"].map(|address| address.parse().expect("an address"));
    let outside = outside.map(|host| Attempt::tcp(&world.outside, host, PORT));
    let local = [LOCAL4, LOCAL6].map(|host| Attempt::tcp(&world.host, host, PORT));
    [local, inside, outside].concat()
}

/// States of the sockets at the host's published port, but for those that listen; as numbers (include/net/tcp_states.h).
fn sockets(host: &Namespace) -> Vec<String> {
    let tables = host.run(|| ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}"))));
    let own = format!(":{PORT:04X}");
    let lines = tables.map(|table| table.expect("a table of sockets")).concat();
    let fields = lines.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = fields.filter(|fields| fields.get(1).is_some_and(|local| local.ends_with(&own)) && fields[3] != "0A");
    found.map(|fields| fields[3].to_owned()).collect()
}

fn published(lab: &Lab) -> Value {
    lab.agent.status()["published"][0].clone()
}

const EVERYBODY: &[&str] = &["tcp 22 0.0.0.0/0", "tcp 22 ::/0"];

#[test]
fn denied_clients_time_out_and_leave_nothing_behind() {
    let mut lab = lab(&[]);
    super::vanish(attempts(&lab));
    assert_eq!(sockets(&lab.world.host), Vec::<String>::new());
    let counted = published(&lab);
    assert!(counted["denied_early"].as_u64() >= Some(6), "{counted:#}");
    assert_eq!((&counted["accepted"], &counted["refused"]), (&0.into(), &0.into()), "{counted:#}");
    lab.change(|rules| rules.ingress("sg-b", EVERYBODY));
    super::pass(attempts(&lab));
    // Connections that are open are the proxy's: a tracked one outlives its rule.
    let mut stream = Stream::open(&lab.world.host, LOCAL4, PORT);
    stream.goes_on();
    assert!(sockets(&lab.world.host).contains(&"01".to_owned()), "an established one is seen");
    lab.change(|rules| rules.ingress("sg-b", &["tcp 22 10.0.0.0/8"]));
    stream.goes_on();
    Attempt::tcp(&lab.world.host, LOCAL4, PORT).vanishes();
    Attempt::tcp(lab.world.namespace("a"), lab.addresses("host")[0], PORT).passes();
}

#[test]
fn rejected_clients_are_refused_before_the_handshake() {
    let mut lab = lab(&["--deny", "reject"]);
    for attempt in attempts(&lab) {
        attempt.is_refused();
    }
    assert_eq!(sockets(&lab.world.host), Vec::<String>::new());
    let counted = published(&lab);
    assert!(counted["denied_early"].as_u64() >= Some(6), "{counted:#}");
    assert_eq!((&counted["accepted"], &counted["refused"]), (&0.into(), &0.into()), "{counted:#}");
    lab.change(|rules| rules.ingress("sg-b", EVERYBODY));
    super::pass(attempts(&lab));
}

#[test]
fn without_it_the_proxy_refuses_them() {
    let lab = lab(&["--early-drop", "off"]);
    for attempt in attempts(&lab) {
        attempt.is_refused();
    }
    let counted = published(&lab);
    assert_eq!((&counted["denied_early"], &counted["refused"]), (&0.into(), &6.into()), "{counted:#}");
}

#[test]
fn only_the_named_links_are_watched() {
    let lab = lab(&["--early-drop", "br0"]);
    Attempt::tcp(lab.world.namespace("a"), lab.addresses("host")[0], PORT).vanishes();
    Attempt::tcp(&lab.world.host, LOCAL4, PORT).is_refused();
}

#[test]
fn what_is_forwarded_is_not_touched() {
    let mut lab = lab(&[]);
    // The same port, at somebody else's address: by the bridge's link, and by the outside's.
    let _server = Server::start(&lab.world.outside, PORT);
    lab.serve("a", &[PORT]);
    lab.change(|rules| rules.ingress("sg-a", &["tcp 32022 0.0.0.0/0"]));
    Attempt::tcp(lab.world.namespace("a"), lab.addresses("outside")[0], PORT).passes();
    Attempt::tcp(&lab.world.outside, lab.addresses("a")[0], PORT).passes();
    Attempt::tcp(&lab.world.outside, "203.0.113.1".parse().expect("an address"), PORT).vanishes();
}

#[test]
fn addresses_that_come_later_are_watched_too() {
    let lab = lab(&[]);
    lab.world.host.ip("addr add 10.0.1.77/24 dev br0");
    let at = "10.0.1.77".parse().expect("an address");
    wait_for("denied early at the new address", || {
        Attempt::tcp(lab.world.namespace("a"), at, PORT).try_vanish().then_some(())
    });
}

#[test]
fn a_port_that_somebody_else_has_is_not_touched() {
    let lab = Lab::with(&["b"]);
    let server = Server::start(lab.host(), PORT);
    let lab = lab.arguments(&["--publish", "i-b:32022=22"]).start();
    Attempt::tcp(&lab.world.host, LOCAL4, PORT).passes();
    assert_eq!(server.accepted(), 1);
}

#[test]
fn it_ends_with_the_agent() {
    for kill in [false, true] {
        let mut lab = lab(&[]);
        Attempt::tcp(&lab.world.host, LOCAL4, PORT).vanishes();
        if kill {
            lab.agent.kill();
        } else {
            assert!(lab.agent.stop().success());
        }
        // Before Linux 6.6 what a killed agent left is taken away here.
        if kill {
            assert!(lab.agent.detach().status.success());
        }
        let server = Server::start(&lab.world.host, PORT);
        Attempt::tcp(&lab.world.host, LOCAL4, PORT).passes();
        drop(server);
    }
}
