//! `--live=endpoint`: what the endpoint says now, at each connection.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;

use tests::e2e::{Attempt, Namespace, free_port};

use crate::Stage;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[test]
fn every_connection_meets_the_rules_of_its_moment() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    let b = stage.instance("b", &[&group]);
    let port = free_port();
    let publish = format!("{}:{port}=22", b.id);
    stage.agent.arguments(["--live", "endpoint", "--publish", &publish]).start().wait();
    let _server = b.serve(22);
    let host = Namespace::of_process("host", std::process::id());
    let attempt = Attempt::tcp(&host, LOCALHOST, port);
    // Without a pause, which polling would need.
    for _ in 0..15 {
        stage.moto.authorize(&group, 22, "127.0.0.1/32");
        attempt.passes();
        stage.moto.revoke(&group, 22, "127.0.0.1/32");
        attempt.is_refused();
    }
    // A burst shares its questions, and everybody gets an answer.
    stage.moto.authorize(&group, 22, "127.0.0.1/32");
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| attempt.passes());
        }
    });
    let published = stage.agent.status()["published"][0].clone();
    assert_eq!((&published["accepted"], &published["refused"]), (&35.into(), &15.into()), "{published:#}");
}
