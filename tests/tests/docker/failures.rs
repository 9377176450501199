//! Docker that restarts, that loses events, and links that change under the agent: what is enforced stays enforced.

use std::net::IpAddr;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;
use tests::e2e::{Agent, Attempt, Docker, DockerSocket, Engine, Moto, Server, element, forward, run, wait_for};

use crate::{Host, Stage};

/// Two instances in one group that lets in port 22, in the form that `--rules` reads.
fn rules() -> String {
    let open = json!([{ "IpProtocol": "-1", "IpRanges": [{ "CidrIp": "0.0.0.0/0" }] }]);
    let ssh = json!([{ "IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{ "CidrIp": "0.0.0.0/0" }] }]);
    let group = json!({ "GroupId": "sg-1", "GroupName": "one", "VpcId": "vpc-1", "IpPermissions": ssh,
        "IpPermissionsEgress": open });
    let instance = |id: &str| {
        json!({ "InstanceId": id, "VpcId": "vpc-1", "State": { "Name": "running" },
            "SecurityGroups": [{ "GroupId": "sg-1" }] })
    };
    let instances = ["i-a", "i-b"].map(instance);
    json!({ "SecurityGroups": [group], "Reservations": [{ "Instances": instances }] }).to_string()
}

fn address(engine: &Engine, container: &str) -> IpAddr {
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    run(engine.docker().args(["inspect", "--format", format, container])).parse().expect("an address")
}

/// Port 22 of `b` is open to `a`, and 23 isn't.
#[track_caller]
fn is_enforced(engine: &Engine) {
    let (a, b) = (engine.inside("test-a"), engine.inside("test-b"));
    let _servers = [22, 23].map(|port| Server::start(&b, port));
    let to = address(engine, "test-b");
    Attempt::tcp(&a, to, 22).passes();
    Attempt::tcp(&a, to, 23).vanishes();
}

#[test]
fn docker_may_be_killed_and_restart() {
    let docker = Docker::new();
    let image = docker.image(&["CMD [\"/bin/sleep\", \"3600\"]"]);
    let mut engine = Engine::new(&image.name);
    let mut agent = Agent::new(Some(&engine.namespace));
    let file = agent.directory().join("rules.json");
    std::fs::write(&file, rules()).expect("a new file");
    agent.arguments(["--rules", &file.display().to_string()]).environment("DOCKER_HOST", engine.host());
    engine.stop(Signal::SIGTERM);
    // Containers of an engine with this option outlive it.
    engine.start(&["--live-restore"]);
    for name in ["a", "b"] {
        let (full, label) = (format!("test-{name}"), format!("dev.sg-agent.instance-id=i-{name}"));
        run(engine.docker().args(["run", "-d", "--name", &full, "--label", &label, &image.name]));
    }
    agent.start().wait();
    is_enforced(&engine);
    let (a, b, to) = (engine.inside("test-a"), engine.inside("test-b"), address(&engine, "test-b"));
    let servers = [22, 23].map(|port| Server::start(&b, port));

    engine.stop(Signal::SIGKILL);
    wait_for("the status tells that docker is away", || {
        let status = agent.status();
        (status["enforced"] == false && status["problems"].to_string().contains("docker")).then_some(())
    });
    agent.logged(&["WARN", "docker", "stays enforced"]);
    Attempt::tcp(&a, to, 22).passes();
    Attempt::tcp(&a, to, 23).vanishes();
    // An agent that starts now leaves in force what the last one enforced.
    agent.kill();
    agent.start();
    agent.logged(&["can't ask docker"]);
    Attempt::tcp(&a, to, 22).passes();
    Attempt::tcp(&a, to, 23).vanishes();
    // What holds a namespace open keeps its link on the bridge.
    drop((servers, a, b));

    // Without the option the engine ends what is left of them, and they are started anew.
    engine.start(&[]);
    run(engine.docker().args(["start", "test-a", "test-b"]));
    agent.wait();
    assert_eq!(agent.status()["enforced"], true);
    is_enforced(&engine);
}

#[test]
fn launched_instances_come_back_with_docker() {
    let docker = Docker::new();
    let image = docker.image(&["CMD [\"/bin/sleep\", \"3600\"]"]);
    let moto = Moto::shared().in_region("sa-east-1");
    let mut engine = Engine::new(&image.name);
    let mut agent = Agent::new(Some(&engine.namespace));
    let endpoint = forward(&engine.namespace, moto.address());
    moto.serve(&mut agent, &format!("http://{endpoint}"));
    agent.arguments(["--launch", "--launch-default-image", &image.name]).environment("DOCKER_HOST", engine.host());
    let vpc = element(&moto.call("CreateVpc", &[("CidrBlock", "10.218.0.0/16")]), "vpcId");
    let create = [("VpcId", &*vpc), ("CidrBlock", "10.218.1.0/24")];
    let subnet = element(&moto.call("CreateSubnet", &create), "subnetId");
    let name = tests::e2e::unique();
    let create = [("GroupName", &*name), ("GroupDescription", "x"), ("VpcId", &vpc)];
    let group = element(&moto.call("CreateSecurityGroup", &create), "groupId");
    moto.authorize(&group, 22, "10.218.0.0/16");
    let [a, b] = [(), ()].map(|()| {
        let ami = [("ImageId", "ami-12c6146b"), ("MinCount", "1"), ("MaxCount", "1")];
        let place = [("SubnetId", &*subnet), ("SecurityGroupId.1", &group)];
        element(&moto.call("RunInstances", &[&ami[..], &place].concat()), "instanceId")
    });
    let running = |engine: &Engine| run(engine.docker().args(["ps", "--format", "{{.Names}}"])).lines().count();
    let check = |engine: &Engine| {
        let (from, to) = (engine.inside(&format!("sg-agent-{a}-net")), format!("sg-agent-{b}-net"));
        let inside = engine.inside(&to);
        let _servers = [22, 23].map(|port| Server::start(&inside, port));
        assert_eq!(address(engine, &to).to_string(), "10.218.1.5", "Moto's second in a subnet");
        Attempt::tcp(&from, address(engine, &to), 22).passes();
        Attempt::tcp(&from, address(engine, &to), 23).vanishes();
    };
    agent.start().wait();
    assert_eq!(running(&engine), 4);
    check(&engine);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        engine.stop(signal);
        wait_for("the status tells that docker is away", || (agent.status()["enforced"] == false).then_some(()));
        engine.start(&[]);
        wait_for("all containers are back", || (running(&engine) == 4).then_some(()));
        agent.wait();
        check(&engine);
    }
}

#[test]
fn a_container_is_found_though_dockers_events_are_lost() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let a = stage.instance("a", &[&group]);
    let path = stage.agent.directory().join("docker.sock");
    let socket = DockerSocket::without_events(&path);
    stage.agent.environment("DOCKER_HOST", socket.host());
    stage.agent.start().wait();
    let b: Host = stage.instance("b", &[&group]);
    // Nobody asks the agent to look: it does so by itself.
    wait_for("it is enforced", || {
        let status = stage.agent.status();
        let mut interfaces = status["interfaces"].as_array()?.iter();
        interfaces
            .any(|interface| {
                interface["instance"] == *b.id && interface["policy"] == "groups" && interface["attached"] == true
            })
            .then_some(())
    });
    let servers = [22, 23].map(|port| b.serve(port));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    drop(servers);
    let id = b.id.clone();
    b.container.docker(&["kill"]);
    wait_for("its end is noticed", || {
        let status = stage.agent.status();
        status["interfaces"].as_array()?.iter().all(|interface| interface["instance"] != *id).then_some(())
    });
}

#[test]
fn a_link_that_is_renamed_stays_enforced() {
    let mut stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| b.serve(port));
    a.tcp(&b, 22).passes();
    let link = stage.agent.interface(&b.id)["link"].as_str().expect("a name").to_owned();
    let name = format!("sgt{}", std::process::id());
    for words in [&["down"][..], &["name", &name]] {
        run(Command::new("ip").args(["link", "set", "dev", &link]).args(words));
    }
    run(Command::new("ip").args(["link", "set", "dev", &name, "up"]));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    stage.agent.wait();
    assert_eq!(stage.agent.interface(&b.id)["link"], *name);
    stage.moto.authorize(&group, 23, "0.0.0.0/0");
    stage.agent.wait();
    a.tcp(&b, 23).passes();
}
