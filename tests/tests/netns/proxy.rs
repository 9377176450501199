//! Published ports: whoever comes by the host's port is judged by the own address (SG-2.1), not by the bridge's.

use tests::e2e::{Attempt, Lab, Stream};

const LOCALHOST: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

#[test]
fn a_client_on_localhost_is_judged_as_such() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 0.0.0.0/0"]))
        .arguments(&["--publish", "i-b:32022=22", "--publish", "i-b:10.0.1.1:32023=22"])
        .start();
    lab.serve("b", &[22]);
    Attempt::tcp(&lab.world.host, LOCALHOST, 32022).passes();
    // 10.0.0.0/8 alone doesn't have 127.0.0.1, though what the host sends to the instance comes from 10.0.1.1.
    lab.change(|rules| rules.ingress("sg-b", &["tcp 22 10.0.0.0/8"]));
    Attempt::tcp(&lab.world.host, LOCALHOST, 32022).vanishes();
    // A client of that network gets through by the other port.
    Attempt::tcp(lab.world.namespace("a"), lab.addresses("host")[0], 32023).passes();
    lab.change(|rules| rules.ingress("sg-b", &["tcp 22 127.0.0.1/32"]));
    Attempt::tcp(&lab.world.host, LOCALHOST, 32022).passes();
    Attempt::tcp(lab.world.namespace("a"), lab.addresses("host")[0], 32023).vanishes();
    // The way past the proxy stays what the rules say of the bridge's address.
    lab.tcp("host", "b", 22)[0].vanishes();
    let published = lab.agent.status()["published"].clone();
    assert_eq!(published.as_array().map(Vec::len), Some(2), "{published:#}");
}

#[test]
fn a_revoke_ends_untracked_connections_through_the_proxy() {
    let mut lab = Lab::with(&["b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 0.0.0.0/0", "tcp 23 127.0.0.0/8"]))
        .arguments(&["--publish", "i-b:32022=22", "--publish", "i-b:32023=23"])
        .start();
    lab.serve("b", &[22, 23]);
    let mut untracked = Stream::open(&lab.world.host, LOCALHOST, 32022);
    let mut tracked = Stream::open(&lab.world.host, LOCALHOST, 32023);
    untracked.goes_on();
    tracked.goes_on();
    lab.change(|rules| rules.ingress("sg-b", &[]));
    untracked.is_over();
    tracked.goes_on();
    Attempt::tcp(&lab.world.host, LOCALHOST, 32023).vanishes();
}
