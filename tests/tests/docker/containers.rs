//! Containers that come, go, come back, and are wired in unusual ways.

use tests::e2e::{Attempt, Container, DockerSocket, IDLE, Server, wait_for};

use crate::Stage;

#[test]
fn a_container_that_restarts_is_enforced_again() {
    let mut stage = Stage::new();
    let (group_a, group_b) = (stage.moto.group(), stage.moto.group());
    stage.moto.authorize(&group_b, 22, &group_a);
    let a = stage.instance("a", &[&group_a]);
    let mut b = stage.instance("b", &[&group_b]);
    let other = stage.instance("other", &[&stage.moto.group()]);
    stage.agent.start().wait();
    for again in [false, true, true] {
        if again {
            b.container.docker(&["restart", "--time", "0"]);
            b = stage.host(b.id, b.container);
            stage.agent.wait();
        }
        let server = b.serve(22);
        a.tcp(&b, 22).passes();
        other.tcp(&b, 22).vanishes();
        assert_eq!(server.accepted(), 1);
    }
}

#[test]
fn a_container_that_is_made_anew_under_its_name_is_enforced_again() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    stage.agent.start().wait();
    let server = b.serve(22);
    a.tcp(&b, 22).passes();
    drop(server);
    let (id, name) = (b.id, b.container.name.clone());
    drop((b.container, b.namespace));
    let fresh = stage.container("b", &id);
    assert_eq!(fresh.name, name);
    let b = stage.host(id, fresh);
    stage.agent.wait();
    let (server, closed) = (b.serve(22), b.serve(23));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    assert_eq!((server.accepted(), closed.accepted()), (1, 0));
}

#[test]
fn a_container_that_dies_is_forgotten_and_the_others_go_on() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let [a, b, c] = ["a", "b", "c"].map(|name| stage.instance(name, &[&group]));
    stage.agent.start().wait();
    let _server = b.serve(22);
    let c_id = c.id.clone();
    c.container.docker(&["kill"]);
    drop(c);
    wait_for("the agent forgets it", || {
        let status = stage.agent.status();
        let interfaces = status["interfaces"].as_array()?;
        interfaces.iter().all(|interface| interface["instance"] != *c_id).then_some(())
    });
    stage.agent.wait();
    assert_eq!(stage.agent.status()["problems"], serde_json::json!([]));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
}

#[test]
fn each_network_of_a_container_is_enforced() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    // Dropped after the containers that are in it.
    let second = stage.docker.network(&["--internal"]);
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| b.serve(port));
    // It comes by `docker network connect`, while the agent runs.
    for host in [&a, &b] {
        tests::e2e::run(tests::e2e::docker().args(["network", "connect", &second.name, &host.container.name]));
    }
    stage.agent.wait();
    let status = stage.agent.status();
    let links =
        status["interfaces"].as_array().into_iter().flatten().filter(|interface| interface["instance"] == *b.id);
    assert_eq!(links.count(), 2, "{status:#}");
    for address in [b.v4, b.container.v4(&second)] {
        Attempt::tcp(&a.namespace, address, 22).passes();
        Attempt::tcp(&a.namespace, address, 23).vanishes();
    }
}

#[test]
fn containers_that_share_a_namespace_are_one_instance() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    let shared = format!("container:{}", b.container.name);
    let stranger = stage.moto.instance(&[&group]);
    let label = format!("dev.sg-agent.instance-id={stranger}");
    let side: Container = stage.docker.run("side", &["--network", &shared], IDLE);
    let _claims: Container = stage.docker.run("x-claims", &["--network", &shared, "--label", &label], IDLE);
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| Server::start(&side.namespace(), port));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    let status = stage.agent.status();
    let interfaces = status["interfaces"].as_array().into_iter().flatten();
    assert_eq!(interfaces.filter(|interface| interface["instance"] == *b.id).count(), 1, "{status:#}");
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains(&stranger) && warnings.contains("shares the network"), "{warnings}");
}

#[test]
fn an_instance_that_nobody_knows_is_denied_and_told() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    let id = "i-0123456789abcdef0".to_owned();
    let ghost = stage.host(id.clone(), stage.container("ghost", &id));
    stage.agent.start().wait();
    let _servers = [b.serve(22), ghost.serve(22)];
    a.tcp(&b, 22).passes();
    a.tcp(&ghost, 22).vanishes();
    ghost.tcp(&b, 22).vanishes();
    assert_eq!(stage.agent.interface(&id)["policy"], "unknown");
    let log = stage.agent.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("WARN") && line.contains(&id)).collect();
    assert_eq!(lines.len(), 1, "one line names it: {log}");
    assert!(lines[0].contains("denied everything"), "{log}");
}

#[test]
fn a_dual_stack_network_is_enforced_in_both_families() {
    let mut stage = Stage::new();
    stage.network = stage.docker.network(&["--internal", "--ipv6", "--subnet", "2001:db8:5e::/64"]);
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    stage.moto.authorize(&group, 23, "::/0");
    // A group of Moto's lets out IPv4 alone.
    let everywhere = [("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.Ipv6Ranges.1.CidrIpv6", "::/0")];
    stage.moto.call("AuthorizeSecurityGroupEgress", &[&[("GroupId", &*group)][..], &everywhere].concat());
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| b.serve(port));
    let v6 = b.container.v6(&stage.network);
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    Attempt::tcp(&a.namespace, v6, 23).passes();
    Attempt::tcp(&a.namespace, v6, 22).vanishes();
}

#[test]
fn without_docker_the_last_state_stands() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    let path = stage.agent.directory().join("docker.sock");
    let socket = DockerSocket::listen(&path);
    stage.agent.environment("DOCKER_HOST", socket.host());
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| b.serve(port));
    a.tcp(&b, 22).passes();
    drop(socket);
    stage.agent.logged(&["WARN", "docker"]);
    wait_for("the status says so", || {
        let status = stage.agent.status();
        (status["enforced"] == false && status["problems"].to_string().contains("docker.sock")).then_some(())
    });
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    // Rules still change.
    stage.moto.authorize(&group, 23, "0.0.0.0/0");
    stage.moto.revoke(&group, 22, "0.0.0.0/0");
    let is_allowed = |port| stage.agent.explain(&["--to", &b.id, "--from", "192.0.2.1", "--port", port]).0;
    // Both: a poll may come between the two calls.
    wait_for("the new rules are enforced", || (is_allowed("23") && !is_allowed("22")).then_some(()));
    a.tcp(&b, 23).passes();
    a.tcp(&b, 22).vanishes();
    let _back = DockerSocket::listen(&path);
    stage.agent.wait();
    assert_eq!(stage.agent.status()["enforced"], true);
    a.tcp(&b, 23).passes();
}
