//! `--launch`: instances of Moto's become containers, and follow what becomes of the instances. Each test has a region
//! of its own, as a launcher takes every instance of its region.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use tests::e2e::{
    Agent, Attempt, Container, Docker, IDLE, Image, Launched, Moto, Namespace, PATIENCE, Server, docker, element,
    free_port, output, run, said, ssh, unique, wait_for,
};

/// Below the ports of outgoing connections, one of which could have any of these for a while.
const LAUNCH_PORTS: &str = "31000-31767";

/// An agent that launches, of an image that is told.
struct Stage {
    agent: Agent,
    launched: Launched,
    image: Image,
    docker: Docker,
    moto: Moto,
}

impl Stage {
    /// `command` is what instances run.
    fn new(region: &str, command: &[&str]) -> Self {
        Self::at(Moto::shared().in_region(region), command)
    }

    fn at(moto: Moto, command: &[&str]) -> Self {
        let docker = Docker::new();
        let mut agent = Agent::new(None);
        moto.serve(&mut agent, &moto.url());
        let image = docker.image(&[&format!("CMD {}", serde_json::json!(command)), "EXPOSE 8080"]);
        agent.arguments(["--launch", "--launch-default-image", &image.name, "--launch-ports", LAUNCH_PORTS]);
        let launched = Launched { launcher: agent.directory().join("state").display().to_string() };
        Self { agent, launched, image, docker, moto }
    }

    /// A VPC with these subnets; their ids.
    fn vpc<const N: usize>(&self, cidr: &str, subnets: [&str; N]) -> [String; N] {
        let vpc = element(&self.moto.call("CreateVpc", &[("CidrBlock", cidr)]), "vpcId");
        subnets.map(|subnet| {
            let parameters = [("VpcId", &*vpc), ("CidrBlock", subnet)];
            element(&self.moto.call("CreateSubnet", &parameters), "subnetId")
        })
    }

    /// A group in a subnet's VPC.
    fn group(&self, subnet: &str) -> String {
        let vpc = element(&self.moto.call("DescribeSubnets", &[("SubnetId.1", subnet)]), "vpcId");
        let name = unique();
        let parameters = [("GroupName", &*name), ("GroupDescription", "x"), ("VpcId", &vpc)];
        element(&self.moto.call("CreateSecurityGroup", &parameters), "groupId")
    }

    fn run(&self, more: &[(&str, &str)]) -> Running {
        let ami = [("ImageId", "ami-12c6146b"), ("MinCount", "1"), ("MaxCount", "1")];
        let answer = self.moto.call("RunInstances", &[&ami[..], more].concat());
        let (id, address) = (element(&answer, "instanceId"), element(&answer, "privateIpAddress"));
        Running { own: format!("sg-agent-{id}"), id, address: address.parse().expect("Moto gives addresses") }
    }

    fn change(&self, action: &str, instance: &Running) {
        self.moto.call(action, &[("InstanceId.1", &instance.id)]);
    }
}

/// An instance that is launched.
struct Running {
    id: String,
    /// As Moto has it.
    address: IpAddr,
    /// The name of its own container.
    own: String,
}

impl Running {
    fn holder(&self) -> String {
        format!("{}-net", self.own)
    }

    /// What it was started as: another one after each start.
    fn started(&self) -> String {
        run(docker().args(["inspect", "--format", "{{.Id}} {{.State.StartedAt}} {{.State.Running}}", &self.own]))
    }

    fn namespace(&self) -> Namespace {
        let pid = run(docker().args(["inspect", "--format", "{{.State.Pid}}", &self.holder()]));
        Namespace::of_process(&self.own, pid.parse().expect("the holder runs"))
    }

    fn exec(&self, command: &[&str]) -> String {
        run(docker().args(["exec", &self.own]).args(command))
    }
}

const SSHD: &[&str] = &["/usr/sbin/dropbear", "-R", "-F", "-E"];

#[test]
fn an_instance_lives_as_its_control_plane_says() {
    let mut stage = Stage::new("eu-west-1", SSHD);
    let (moto, name) = (&stage.moto, unique());
    let [subnet] = stage.vpc("10.211.0.0/16", ["10.211.7.0/24"]);
    let group = stage.group(&subnet);
    let key = stage.agent.directory().join("key.pem");
    let material = moto.aws(&["create-key-pair", "--key-name", &name, "--query", "KeyMaterial", "--output", "text"]);
    fs::write(&key, format!("{}\n", material.trim())).expect("room for a key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("one's own file");
    moto.authorize(&group, 22, "0.0.0.0/0");
    moto.authorize(&group, 80, &group);
    let start = ["run-instances", "--image-id", "ami-12c6146b", "--key-name", &name, "--security-group-ids", &group];
    let data = "#!/bin/sh\necho \"user data of $(hostname)\"\necho once >> /root/ran";
    let more = ["--subnet-id", &subnet, "--user-data", data, "--query", "Instances[0].InstanceId", "--output", "text"];
    stage.agent.start().wait();
    let id = moto.aws(&[&start[..], &more].concat());
    let web = Running { own: format!("sg-agent-{id}"), id, address: "10.211.7.4".parse().expect("an address") };
    stage.agent.wait();

    let shown = moto.call("DescribeInstances", &[("InstanceId.1", &web.id)]);
    assert_eq!(element(&shown, "privateIpAddress"), web.address.to_string(), "Moto's first in a subnet");
    assert_eq!(stage.agent.interface(&web.id)["addresses"][0], web.address.to_string());
    let published = ports(&stage.agent, &[]);
    assert_eq!(published.keys().collect::<Vec<_>>(), [&(web.id.clone(), 22)], "and not what a group is let into");
    let port = published[&(web.id.clone(), 22)];
    let gets_a_shell = || ssh(&key, port, PATIENCE).status.success();
    let gets_none = || !ssh(&key, port, Duration::from_secs(4)).status.success();
    let answer =
        wait_for("ssh's server is up", || Some(ssh(&key, port, PATIENCE)).filter(|answer| answer.status.success()));
    assert_eq!(said(&answer), "a shell on ip-10-211-7-4");
    wait_for("user data has run", || {
        let said = output(docker().args(["exec", &web.own, "cat", "/var/log/cloud-init-output.log"]));
        String::from_utf8_lossy(&said.stdout).contains("user data of ip-10-211-7-4").then_some(())
    });
    let tag = format!("<key>dev.sg-agent.port.22</key><value>{port}</value>");
    wait_for("its tags tell the port", || {
        let shown = moto.call("DescribeInstances", &[("InstanceId.1", &web.id)]);
        shown.split_whitespace().collect::<String>().contains(&tag).then_some(())
    });

    // An agent that ends and comes back finds everything as it is, its ports too.
    let started = web.started();
    stage.agent.kill();
    stage.agent.start().wait();
    assert_eq!(web.started(), started);
    assert_eq!(ports(&stage.agent, &[&web.id]), published);
    assert!(gets_a_shell());

    // Rules that go close the port to clients, and it stays this instance's.
    stage.moto.revoke(&group, 22, "0.0.0.0/0");
    stage.agent.wait();
    assert!(gets_none());
    stage.moto.authorize(&group, 22, "127.0.0.0/8");
    stage.agent.wait();
    assert_eq!(ports(&stage.agent, &[]), published);
    assert!(gets_a_shell());

    stage.change("StopInstances", &web);
    stage.agent.wait();
    assert_eq!(stage.launched.running(), [web.holder()], "a stopped instance keeps its interface");
    assert!(gets_none());
    stage.change("StartInstances", &web);
    stage.agent.wait();
    wait_for("ssh's server is up again", || gets_a_shell().then_some(()));
    assert_eq!(web.exec(&["cat", "/root/ran"]), "once", "user data runs once, and the disk stays");

    // Whoever else has a container keeps it.
    let foreign = stage.docker.run("foreign", &["--label", "dev.sg-agent.instance-id=i-0123456789abcdef0"], IDLE);
    stage.change("TerminateInstances", &web);
    stage.agent.wait();
    wait_for("nothing of it is left", || {
        (stage.launched.running().is_empty() && stage.launched.networks().is_empty()).then_some(())
    });
    assert_eq!(ports(&stage.agent, &[]), BTreeMap::new());
    assert!(foreign.exec(&["/bin/echo", "lives"]).status.success());
}

/// What `sg-agent ports --json` tells, by instance and port.
fn ports(agent: &Agent, more: &[&str]) -> BTreeMap<(String, u16), u16> {
    let told = run(agent.command().args(["ports", "--json"]).args(more));
    let told: Vec<Value> = serde_json::from_str(&told).expect("a list");
    let number = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
    let instance = |port: &Value| port["instance"].as_str().expect("an id").to_owned();
    told.iter().map(|port| ((instance(port), number(&port["port"])), number(&port["host_port"]))).collect()
}

#[test]
fn instances_of_one_vpc_reach_each_other_by_the_addresses_that_moto_shows() {
    let mut stage = Stage::new("eu-west-2", IDLE);
    let [front, back] = stage.vpc("10.212.0.0/16", ["10.212.1.0/24", "10.212.2.0/24"]);
    let [elsewhere] = stage.vpc("10.212.0.0/16", ["10.212.1.0/24"]);
    let (web_group, db_group) = (stage.group(&front), stage.group(&front));
    stage.moto.authorize(&db_group, 3306, &web_group);
    let other_group = stage.group(&elsewhere);
    let of =
        |stage: &Stage, subnet: &str, group: &str| stage.run(&[("SubnetId", subnet), ("SecurityGroupId.1", group)]);
    let (web, db) = (of(&stage, &front, &web_group), of(&stage, &back, &db_group));
    stage.agent.start().wait();
    // Its VPC has the same addresses, which can be had once.
    let other = of(&stage, &elsewhere, &other_group);
    stage.agent.wait();
    let _server = Server::start(&db.namespace(), 3306);
    Attempt::tcp(&web.namespace(), db.address, 3306).passes();
    Attempt::tcp(&web.namespace(), db.address, 3307).vanishes();
    Attempt::tcp(&other.namespace(), db.address, 3306).vanishes();
    let own = stage.agent.interface(&other.id)["addresses"][0].as_str().expect("an address").to_owned();
    assert_ne!(own, other.address.to_string());
    let shown = stage.moto.call("DescribeInstances", &[("InstanceId.1", &other.id)]);
    assert!(shown.contains(&format!("<privateIpAddress>{own}<")), "it is written back: {own} {shown}");
    assert!(other.exec(&["hostname"]).ends_with(&own.replace('.', "-")));
    assert!(stage.agent.log().lines().any(|line| line.contains("WARN") && line.contains("can't be had here")));
}

#[test]
fn a_second_interface_is_one_in_the_container_too() {
    let mut stage = Stage::new("eu-west-3", IDLE);
    let [subnet] = stage.vpc("10.214.0.0/16", ["10.214.1.0/24"]);
    let [other] = stage.vpc("10.215.0.0/16", ["10.215.1.0/24"]);
    let (group, other_group) = (stage.group(&subnet), stage.group(&other));
    stage.moto.authorize(&other_group, 80, "10.215.0.0/16");
    let a = stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]);
    let b = stage.run(&[("SubnetId", &other), ("SecurityGroupId.1", &other_group)]);
    stage.agent.start().wait();
    let create = [("SubnetId", &*other), ("SecurityGroupId.1", &other_group)];
    let created = stage.moto.call("CreateNetworkInterface", &create);
    let (eni, address) = (element(&created, "networkInterfaceId"), element(&created, "privateIpAddress"));
    let attach = [("NetworkInterfaceId", &*eni), ("InstanceId", &a.id), ("DeviceIndex", "1")];
    let attached = element(&stage.moto.call("AttachNetworkInterface", &attach), "attachmentId");
    wait_for("it is joined", || {
        stage.agent.wait();
        let status = stage.agent.status();
        let mut interfaces = status["interfaces"].as_array()?.iter();
        interfaces.find(|interface| interface["eni"] == *eni).cloned()
    });
    let _server = Server::start(&b.namespace(), 80);
    Attempt::tcp(&a.namespace(), b.address, 80).from_address(address.parse().expect("an address")).passes();
    let detach = [("AttachmentId", &*attached), ("Force", "true")];
    stage.moto.call("DetachNetworkInterface", &detach);
    wait_for("it is taken away", || {
        let networks = run(docker().args(["inspect", "--format", "{{len .NetworkSettings.Networks}}", &a.holder()]));
        (networks == "1").then_some(())
    });
}

/// Hears what instances send to their gateway, by who sent it.
struct Ear {
    port: u16,
    heard: Arc<Mutex<Vec<(IpAddr, String)>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ear {
    fn open() -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a free port");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout that isn't zero");
        let port = socket.local_addr().expect("it is bound").port();
        let (heard, end) = (Arc::<Mutex<Vec<(IpAddr, String)>>>::default(), Arc::<AtomicBool>::default());
        let (kept, told) = (Arc::clone(&heard), Arc::clone(&end));
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !told.load(Ordering::SeqCst) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push((from.ip(), text));
                }
            }
        });
        Self { port, heard, end, thread: Some(thread) }
    }

    /// How often an instance was heard to begin, and whether it was heard at all.
    fn heard(&self, from: &Running) -> (usize, usize) {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<&str> = heard.iter().filter(|(who, _)| *who == from.address).map(|(_, text)| &**text).collect();
        (all.iter().filter(|text| text.starts_with("1\n")).count(), all.len())
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A way to make an instance begin anew.
type Begin = fn(&Stage, &Running);

#[test]
fn rules_are_in_force_from_an_instances_first_packet_on() {
    let ear = Ear::open();
    // Counted datagrams, at once and as fast as the shell can, then slowly.
    let count = "i=0; while :; do i=$((i+1)); echo $i >&3; [ $i -lt 100 ] || sleep 0.1; done";
    let command = format!("exec 3<>/dev/udp/10.213.0.1/{}; {count}", ear.port);
    let mut stage = Stage::new("eu-central-1", &["/bin/bash", "-c", &command]);
    let [subnet] = stage.vpc("10.213.0.0/16", ["10.213.3.0/24"]);
    let (open_group, shut_group) = (stage.group(&subnet), stage.group(&subnet));
    let everything = [("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0")];
    stage.moto.call("RevokeSecurityGroupEgress", &[&[("GroupId", &*shut_group)][..], &everything].concat());
    let [open, shut] =
        [&open_group, &shut_group].map(|group| stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", group)]));
    stage.agent.start().wait();
    let again: [Begin; 5] = [
        |_, _| (),
        |stage, instance| {
            stage.change("StopInstances", instance);
            wait_for("it stands still", || (!stage.launched.running().contains(&instance.own)).then_some(()));
            stage.change("StartInstances", instance);
        },
        |_, instance| drop(run(docker().args(["restart", "--time", "0", &instance.own]))),
        |_, instance| drop(run(docker().args(["kill", &instance.holder()]))),
        |_, instance| drop(run(docker().args(["rm", "--force", &instance.own, &instance.holder()]))),
    ];
    // Of the link that it had: a new one counts from 0.
    let denied = |stage: &Stage| {
        let interface = stage.agent.interface(&shut.id);
        let packets = interface["counters"]["egress"]["no_rule"]["packets"].as_u64().unwrap_or(0);
        (interface["ifindex"].clone(), packets)
    };
    let mut before = (Value::Null, 0);
    for (round, begin) in again.iter().enumerate() {
        begin(&stage, &shut);
        begin(&stage, &open);
        wait_for("the first datagram of who may is heard", || (ear.heard(&open).0 > round).then_some(()));
        before = wait_for("who may not has sent as much", || {
            stage.agent.wait();
            let now = denied(&stage);
            let earlier = if now.0 == before.0 { before.1 } else { 0 };
            (now.1 > earlier + 50).then_some(now)
        });
        assert_eq!(ear.heard(&shut), (0, 0), "round {round}");
    }
}

#[test]
fn what_cannot_be_launched_is_told_and_tried_again() {
    let mut stage = Stage::new("ap-south-1", IDLE);
    let [subnet] = stage.vpc("10.216.0.0/16", ["10.216.1.0/24"]);
    let group = stage.group(&subnet);
    // Nobody listens there, so that it can't be pulled, and that is known at once.
    let name = format!("127.0.0.1:1/{}-later", unique());
    stage.agent.arguments(["--launch-image", &format!("Windows_Server-2008*={name}")]);
    let windows = stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]);
    stage.agent.start();
    let line = stage.agent.logged(&["WARN", &windows.id, &name]);
    assert!(line.contains("can't be pulled") && line.contains("--launch-image"), "{line}");
    wait_for("the status tells it", || stage.agent.status()["warnings"].to_string().contains(&name).then_some(()));
    assert_eq!(stage.launched.running(), [""; 0]);
    let _later = stage.image.again(&name);
    wait_for("it is tried again", || stage.launched.running().contains(&windows.own).then_some(()));
    stage.agent.wait();
    assert!(!stage.agent.status()["warnings"].to_string().contains("launched"));
}

#[test]
fn an_instance_that_ends_by_itself_is_told_and_started_again() {
    let mut stage = Stage::new("ap-southeast-2", &["/bin/echo", "bye"]);
    let [subnet] = stage.vpc("10.219.0.0/16", ["10.219.1.0/24"]);
    let group = stage.group(&subnet);
    let short = stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]);
    stage.agent.start();
    stage.agent.logged(&["is up"]);
    let told = |stage: &Stage| stage.agent.status()["warnings"].to_string().contains("ended by itself");
    wait_for("the status tells it", || told(&stage).then_some(()));
    // Not whether it runs, which changes as well when it ends.
    let last_start = || short.started().split(' ').nth(1).map(str::to_owned);
    let first = last_start();
    wait_for("it is started again", || (last_start() != first).then_some(()));
    stage.change("StopInstances", &short);
    wait_for("it may stand still now", || {
        stage.agent.wait();
        (!told(&stage)).then_some(())
    });
}

#[test]
fn a_reboot_is_seen_by_the_gateway() {
    let mut stage = Stage::new("ca-central-1", SSHD);
    let [subnet] = stage.vpc("10.220.0.0/16", ["10.220.1.0/24"]);
    let group = stage.group(&subnet);
    let [other, web] = [(), ()].map(|()| stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]));
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    stage.agent.without("--no-gateway").arguments(["--gateway", &free.to_string()]);
    stage.agent.start().wait();
    let (before, stays) = (web.started(), other.started());
    web.exec(&["/bin/sh", "-c", "echo kept > /root/file"]);
    let host = Namespace::of_process("host", std::process::id());
    stage.moto.through(free, &host).call("RebootInstances", &[("InstanceId.1", &web.id)]);
    wait_for("it runs anew", || {
        let now = web.started();
        (now != before && now.ends_with("true")).then_some(())
    });
    assert_eq!(web.exec(&["cat", "/root/file"]), "kept");
    assert_eq!(other.started(), stays);
}

#[test]
fn a_container_of_ones_own_is_not_doubled() {
    let mut stage = Stage::new("ap-southeast-1", IDLE);
    let [subnet] = stage.vpc("10.217.0.0/16", ["10.217.1.0/24"]);
    let group = stage.group(&subnet);
    let (mine, launched) = (
        stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]),
        stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)]),
    );
    let label = format!("dev.sg-agent.instance-id={}", mine.id);
    let container: Container = stage.docker.run("mine", &["--label", &label], IDLE);
    stage.agent.start().wait();
    assert_eq!(stage.launched.running(), [launched.own.clone(), launched.holder()]);
    stage.change("TerminateInstances", &mine);
    stage.agent.wait();
    assert!(container.exec(&["/bin/echo", "lives"]).status.success());
    let names: BTreeSet<String> = stage.launched.running().into_iter().collect();
    assert!(!names.contains(&mine.own), "{names:?}");
}

#[test]
fn a_control_plane_that_forgot_everything_takes_no_container_with_it() {
    let moto = Moto::own();
    let mut stage = Stage::at(moto.in_region("us-west-1"), IDLE);
    let place = |stage: &Stage, cidr: &str, subnet: &str| {
        let [subnet] = stage.vpc(cidr, [subnet]);
        let group = stage.group(&subnet);
        stage.run(&[("SubnetId", &subnet), ("SecurityGroupId.1", &group)])
    };
    let old = place(&stage, "10.221.0.0/16", "10.221.1.0/24");
    stage.agent.start().wait();
    let started = old.started();
    moto.restart();
    let told = stage.agent.logged(&["WARN", &old.id, "docker rm"]);
    assert!(told.contains(&format!("{} {}", old.own, old.holder())), "{told}");
    // What is made then doesn't make it gone, nor does an agent that comes later take it for gone.
    let new = place(&stage, "10.222.0.0/16", "10.222.1.0/24");
    stage.agent.wait();
    wait_for("the new one runs", || stage.launched.running().contains(&new.own).then_some(()));
    stage.agent.kill();
    stage.agent.start().wait();
    wait_for("it is told again", || stage.agent.status()["warnings"].to_string().contains("docker rm").then_some(()));
    assert_eq!(old.started(), started);
    stage.change("TerminateInstances", &new);
    wait_for("only what is terminated goes", || {
        let running = stage.launched.running();
        (!running.contains(&new.own) && !running.contains(&new.holder())).then_some(())
    });
    assert_eq!(old.started(), started);
}
