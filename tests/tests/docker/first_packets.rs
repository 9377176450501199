//! What a container sends from its first instruction on, before anybody can have looked at it.

use std::fs;
use std::time::Instant;

use tests::e2e::{Namespace, wait_for};

use crate::{Host, Stage};

/// Nobody knows this instance, so it may do nothing.
const UNKNOWN: &str = "i-0123456789abcdef0";

/// Echo requests that came to a namespace (proc_pid_net(5): names, then numbers).
fn echoes(namespace: &Namespace) -> u64 {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp").expect("the namespace's counters"));
    let mut rows = table.lines().filter_map(|line| line.strip_prefix("Icmp: ")).map(str::split_whitespace);
    let (names, numbers) = (rows.next().expect("names"), rows.next().expect("numbers"));
    let found = names.zip(numbers).find(|(name, _)| *name == "InEchos");
    found.expect("echoes are counted").1.parse().expect("a number")
}

/// An instance, a stranger, and then an instance that pings the stranger as soon as it runs.
fn pinged(arguments: &[&str]) -> (Stage, Namespace, u64) {
    let mut stage = Stage::new();
    let first = stage.instance("first", &[&stage.moto.group()]);
    let stranger = stage.docker.run("stranger", &["--network", &stage.network.name], tests::e2e::IDLE);
    stage.agent.arguments(arguments).start().wait();
    let ping = format!("while :; do /bin/busybox ping -c 1 -W 1 {}; done", stranger.v4(&stage.network));
    let label = format!("dev.sg-agent.instance-id={UNKNOWN}");
    let options = ["--network", &stage.network.name, "--label", &label];
    let began = Instant::now();
    let early = stage.docker.run("early", &options, &["/bin/sh", "-c", &ping]);
    let early: Host = stage.host(UNKNOWN.to_owned(), early);
    wait_for("its packets are judged", || {
        let status = stage.agent.status();
        let interfaces = status["interfaces"].as_array()?;
        let interface = interfaces.iter().find(|one| one["instance"] == UNKNOWN && one["attached"] == true)?;
        (interface["counters"]["egress"]["no_rule"]["packets"].as_u64()? > 1).then_some(())
    });
    let (namespace, took) = (stranger.namespace(), began.elapsed());
    let came = echoes(&namespace);
    println!("{came} echo requests came, {took:?} after 'docker run' at the latest");
    // Who is nobody's instance is let through.
    let other = stage.docker.run("other", &["--network", &stage.network.name], tests::e2e::IDLE);
    tests::e2e::Attempt::ping(&other.namespace(), stranger.v4(&stage.network)).passes();
    drop((first, early));
    (stage, namespace, came)
}

#[test]
fn an_enforced_bridge_lets_none_of_it_through() {
    let (_stage, _namespace, came) = pinged(&["--enforce-bridge", "auto"]);
    assert_eq!(came, 0);
}

/// Or the other test would show nothing.
#[test]
fn another_bridge_lets_some_of_it_through() {
    let (_stage, _namespace, came) = pinged(&[]);
    assert!(came > 0);
}
