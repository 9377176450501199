//! The stage: a network with instances that are namespaces and others that are containers, a Docker engine of its own, a
//! Moto of its own behind an endpoint that can fail, and one agent for all of that. Owns what is there and how it is
//! changed; what is done when is `acts`'s.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use serde_json::Value;
use sg_agent::datapath::sys;
use sg_agent::model::Traffic;
use sg_common::abi::Direction;
use tests::e2e::seams::Seams;
use tests::e2e::{
    Agent, Docker, DockerSocket, Endpoint, Engine, Image, Manner, Moto, Namespace, World, element, output, run, unique,
    wait_for,
};

use crate::check::{Checker, Places};
use crate::model::{CONTAINERS, Change, GROUPS, HOSTS, INSTANCES, Named, OUTSIDE, Rule, State, VETHS};

/// Where the gateway listens: the host's own address on the client's side.
const GATEWAY: &str = "203.0.113.1:4566";
/// What dockerd is told beside. Containers outlive it, and the bridge and its rules are the test's own.
const DOCKERD: &[&str] = &["--live-restore", "--iptables=false", "--ip6tables=false", "--bridge=none"];
/// The only network.
const NETWORK: &str = "soak";

/// Everything that there is. The agent goes first, the engine before the bridge that its containers are on.
#[derive(Debug)]
pub struct Stage {
    /// The agent.
    pub agent: Agent,
    /// Its system calls.
    pub seams: Seams,
    /// What stands between it and Moto; none refuses connections.
    pub endpoint: Option<Endpoint>,
    port: u16,
    /// Moto.
    pub moto: Moto,
    gateway: Moto,
    /// What stands between it and the engine; none is a socket that isn't there.
    pub socket: Option<DockerSocket>,
    socket_path: PathBuf,
    /// The engine.
    pub engine: Engine,
    image: Image,
    /// The network.
    pub world: World,
    /// The groups' ids.
    groups: Vec<String>,
    /// The instances' ids.
    ids: Vec<String>,
    /// Where everybody is now.
    pub places: Places,
    /// Who asks.
    pub checker: Checker,
    /// What the endpoint has acknowledged, and who is plugged in.
    pub state: State,
    _docker: Docker,
}

impl Stage {
    /// Everything at the base state, enforced.
    pub fn new() -> Self {
        let docker = Docker::new();
        let image = docker.image(&["CMD [\"/bin/sleep\", \"360000\"]"]);
        let world = World::new(&VETHS);
        // A bridge without an address of its own takes one of its ports', and another one when that port goes: whoever
        // knows it as the gateway would send to nobody for a while.
        world.host.ip("link set br0 address 02:00:5e:00:53:01");
        let engine = Engine::within(world.host.again(), DOCKERD, &image.name);
        let bridge = "com.docker.network.bridge.name=br0";
        run(engine.docker().args(["network", "create", "--driver", "bridge", "--opt", bridge]).args([
            "--subnet",
            "10.0.1.0/24",
            "--gateway",
            "10.0.1.1",
            "--ipv6",
            "--subnet",
            "2001:db8:1::/64",
            "--gateway",
            "2001:db8:1::1",
            NETWORK,
        ]));
        let moto = Moto::own();
        let endpoint = Endpoint::start(Some(&world.host));
        endpoint.forward(moto.address());
        let gateway: SocketAddr = GATEWAY.parse().expect("an address");
        let gateway = moto.through(gateway, &world.host);
        let groups: Vec<String> = (0..GROUPS).map(|_| new_group(&moto)).collect();
        // Without a block of IPv6, Moto acknowledges that an egress rule for IPv6 is revoked, and keeps it; with one, new groups have
        // such a rule, so these are made before.
        let vpc = element(&moto.call("DescribeVpcs", &[]), "vpcId");
        moto.call("AssociateVpcCidrBlock", &[("VpcId", &vpc), ("AmazonProvidedIpv6CidrBlock", "true")]);
        let ids: Vec<_> = (0..INSTANCES).map(|_| moto.instance(&[&groups[0]])).collect();

        let mut agent = Agent::new(Some(&world.host));
        let seams = agent.seams();
        Moto::reach(&mut agent, &endpoint.url());
        agent.arguments(["--poll-interval", "0.2", "--gateway", GATEWAY, "--commit-timeout", "60"]);
        for (name, id) in VETHS.iter().zip(&ids) {
            agent.arguments(["--attach".to_owned(), format!("{id}=veth-{name}")]);
        }
        let socket_path = agent.directory().join("docker.sock");
        let socket = DockerSocket::before(&engine.socket(), &socket_path, Manner::Open);
        agent.environment("DOCKER_HOST", socket.host());
        let base = State::base();
        let empty = State {
            rules: vec![BTreeSet::new(); GROUPS],
            groups: vec![BTreeSet::from([0]); INSTANCES],
            present: vec![true; VETHS.len()].into_iter().chain(vec![false; CONTAINERS.len()]).collect(),
        };
        let mut stage = Self {
            agent,
            seams,
            port: endpoint.port(),
            endpoint: Some(endpoint),
            moto,
            gateway,
            socket: Some(socket),
            socket_path,
            engine,
            image,
            world,
            groups,
            ids,
            places: Places::default(),
            checker: Checker::new(),
            state: empty.clone(),
            _docker: docker,
        };
        for change in Change::between(&empty, &base) {
            stage.change(&change);
        }
        for (instance, name) in VETHS.iter().enumerate() {
            let namespace = stage.world.namespace(name).again();
            stage.settle_in(instance, namespace, format!("veth-{name}"));
        }
        let outside = stage.world.outside.again();
        stage.checker.listen(OUTSIDE, &outside);
        stage.places.namespaces.insert(OUTSIDE, outside);
        for instance in VETHS.len()..INSTANCES {
            stage.plug(instance);
        }
        stage.agent.start().wait();
        stage
    }

    /// Makes a change at the endpoint itself.
    pub fn change(&mut self, change: &Change) {
        let (action, parameters) = self.call(change);
        self.moto.call(action, &borrowed(&parameters));
        change.make(&mut self.state);
    }

    /// Makes a change through the agent's gateway, which answers once it is enforced.
    pub fn change_by_gateway(&mut self, change: &Change) {
        let (action, parameters) = self.call(change);
        let answer = self.gateway.call(action, &borrowed(&parameters));
        assert!(!answer.contains("x-sg-agent-commit"), "{action} isn't enforced: {answer}");
        change.make(&mut self.state);
    }

    fn call(&self, change: &Change) -> (&'static str, Vec<(String, String)>) {
        match change {
            Change::Authorize(group, rule) if rule.way == Direction::Ingress => {
                ("AuthorizeSecurityGroupIngress", self.rule(*group, rule))
            }
            Change::Authorize(group, rule) => ("AuthorizeSecurityGroupEgress", self.rule(*group, rule)),
            Change::Revoke(group, rule) if rule.way == Direction::Ingress => {
                ("RevokeSecurityGroupIngress", self.rule(*group, rule))
            }
            Change::Revoke(group, rule) => ("RevokeSecurityGroupEgress", self.rule(*group, rule)),
            Change::Join(instance, groups) => {
                let mut parameters = vec![("InstanceId".to_owned(), self.ids[*instance].clone())];
                let numbered = (1..).zip(groups);
                parameters
                    .extend(numbered.map(|(number, group)| (format!("GroupId.{number}"), self.groups[*group].clone())));
                ("ModifyInstanceAttribute", parameters)
            }
        }
    }

    fn rule(&self, group: usize, rule: &Rule) -> Vec<(String, String)> {
        let (protocol, ports) = match rule.traffic {
            Traffic::All => ("-1".to_owned(), None),
            Traffic::Tcp { from, to } => ("tcp".to_owned(), Some((i32::from(from), i32::from(to)))),
            Traffic::Udp { from, to } => ("udp".to_owned(), Some((i32::from(from), i32::from(to)))),
            Traffic::Icmp { kind, code } => ("icmp".to_owned(), Some((field(kind), field(code)))),
            Traffic::Icmpv6 { kind, code } => ("icmpv6".to_owned(), Some((field(kind), field(code)))),
            // Moto wants them of every other protocol, as none.
            Traffic::Other { number } => (number.to_string(), Some((-1, -1))),
        };
        let peer = match rule.peer {
            Named::Group(group) => ("Groups.1.GroupId", self.groups[group].clone()),
            Named::Network(network @ ipnet::IpNet::V4(_)) => ("IpRanges.1.CidrIp", network.to_string()),
            Named::Network(network) => ("Ipv6Ranges.1.CidrIpv6", network.to_string()),
        };
        let mut fields = vec![("IpProtocol", protocol), peer];
        if let Some((from, to)) = ports {
            fields.extend([("FromPort", from.to_string()), ("ToPort", to.to_string())]);
        }
        let numbered = fields.into_iter().map(|(name, value)| (format!("IpPermissions.1.{name}"), value));
        std::iter::once(("GroupId".to_owned(), self.groups[group].clone())).chain(numbered).collect()
    }

    /// Has an instance appear.
    pub fn plug(&mut self, instance: usize) {
        let name = HOSTS[instance].name;
        if instance < VETHS.len() {
            self.world.plug(name);
            let namespace = self.world.namespace(name).again();
            self.settle_in(instance, namespace, format!("veth-{name}"));
        } else {
            let host = &HOSTS[instance];
            let label = format!("dev.sg-agent.instance-id={}", self.ids[instance]);
            run(self
                .engine
                .docker()
                .args(["run", "--detach", "--name", &container(name), "--label", &label, "--network", NETWORK])
                .args(["--ip", &host.v4.to_string(), "--ip6", &host.v6.to_string()])
                .args(["--sysctl", "net.ipv6.conf.all.accept_dad=0", "--sysctl", "net.ipv6.conf.default.accept_dad=0"])
                .arg(&self.image.name));
            let namespace = self.engine.inside(&container(name));
            let listed = run(namespace.command("ip").args(["-o", "link", "show", "dev", "eth0"]));
            self.places.macs.insert(instance, mac(&listed));
            let peer = listed.split_once("eth0@if").and_then(|(_, rest)| rest.split(':').next()).map(str::to_owned);
            let peer = peer.unwrap_or_else(|| panic!("no peer in {listed}"));
            let links = run(self.world.host.command("ip").args(["-o", "link", "show"]));
            let link = links.lines().find_map(|line| {
                let (index, rest) = line.split_once(": ")?;
                (index == peer).then(|| rest.split(['@', ':']).next().unwrap_or_default().to_owned())
            });
            wait_for("its addresses can be used", || {
                let addresses = run(namespace.command("ip").args(["-6", "addr", "show", "dev", "eth0"]));
                (!addresses.contains("tentative")).then_some(())
            });
            self.settle_in(instance, namespace, link.expect("a link of the host's"));
        }
        self.state.present[instance] = true;
    }

    fn settle_in(&mut self, instance: usize, namespace: Namespace, link: String) {
        self.checker.listen(instance, &namespace);
        self.places.namespaces.insert(instance, namespace);
        self.places.links.insert(instance, link);
    }

    /// Has an instance disappear.
    pub fn unplug(&mut self, instance: usize) {
        let name = HOSTS[instance].name;
        self.checker.leave(instance);
        self.places.namespaces.remove(&instance);
        self.places.links.remove(&instance);
        if instance < VETHS.len() {
            self.world.unplug(name);
        } else {
            run(self.engine.docker().args(["rm", "--force", &container(name)]));
        }
        self.state.present[instance] = false;
    }

    /// Which instances are plugged in, or aren't.
    pub fn that_are(&self, present: bool) -> Vec<usize> {
        (0..INSTANCES).filter(|instance| self.state.present[*instance] == present).collect()
    }

    /// Puts another kind of socket before the engine, or none.
    pub fn replace_socket(&mut self, manner: Option<Manner>) {
        self.socket = None;
        self.socket = manner.map(|manner| DockerSocket::before(&self.engine.socket(), &self.socket_path, manner));
    }

    /// Starts dockerd again.
    pub fn start_engine(&mut self) {
        self.engine.start(DOCKERD);
    }

    /// Refuses connections at the endpoint, or takes them again.
    pub fn refuse(&mut self, refuses: bool) {
        self.endpoint = None;
        if !refuses {
            let endpoint = Endpoint::start_at(Some(&self.world.host), self.port);
            endpoint.forward(self.moto.address());
            self.endpoint = Some(endpoint);
        }
    }

    /// The invariant on the state that everybody has acknowledged.
    #[track_caller]
    pub fn holds(&mut self, when: &str) {
        let state = self.state.clone();
        self.holds_of(when, &[&state]);
    }

    /// The invariant on these states: one, or all that a change leads through.
    #[track_caller]
    pub fn holds_of(&mut self, when: &str, states: &[&State]) {
        let differences = self.checker.differences(&self.world.host, &self.places, states);
        assert!(
            differences.is_empty(),
            "{when}: what is enforced isn't what the norm says of the last policy, {} times:\n{}",
            differences.len(),
            differences.iter().take(20).cloned().collect::<Vec<_>>().join("\n")
        );
    }

    /// The same while the agent reads its way from the first of these states to the last.
    #[track_caller]
    pub fn holds_while(&mut self, when: &str, states: &[State]) {
        let mixed = State::mixed(states);
        self.holds_of(when, &mixed.iter().collect::<Vec<_>>());
    }

    /// Waits until the agent says that it is settled.
    #[track_caller]
    pub fn settle(&mut self) {
        self.agent.wait();
    }

    /// Waits until the agent tells of a problem; nothing is settled for as long.
    #[track_caller]
    pub fn is_in_trouble(&mut self) {
        wait_for("the agent tells of a problem", || {
            // One that starts doesn't answer yet.
            let told = output(self.agent.command().args(["status", "--json"]));
            let status: Value = serde_json::from_slice(&told.stdout).ok()?;
            (status["enforced"] == false).then_some(())
        });
    }

    /// Waits until a link is enforced, though nobody asks the agent to look, within so long.
    #[track_caller]
    pub fn is_attached_within(&self, instance: usize, patience: Duration) {
        let end = Instant::now() + patience;
        loop {
            let status = self.agent.status();
            let mut interfaces = status["interfaces"].as_array().expect("a list of interfaces").iter();
            if interfaces.any(|one| {
                one["instance"] == *self.ids[instance] && one["policy"] == "groups" && one["attached"] == true
            }) {
                return;
            }
            assert!(Instant::now() < end, "{} isn't enforced within {patience:?}: {status:#}", HOSTS[instance].name);
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// One of the agent's programs, by its number: its maps are known by it.
    pub fn program(&self) -> u32 {
        let links: Vec<&String> = self.places.links.values().collect();
        let found = self.world.host.run(|| {
            links.iter().find_map(|link| {
                let ifindex = if_nametoindex(link.as_str()).ok()?;
                sys::tcx_programs(ifindex, Direction::Ingress).ok()?.first().copied()
            })
        });
        found.expect("a link with a program")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Whatever keeps a container's namespace keeps its link.
        (self.checker, self.places) = (Checker::new(), Places::default());
        for name in CONTAINERS {
            let _ = output(self.engine.docker().args(["rm", "--force", &container(name)]));
        }
    }
}

/// What an instance's container is called.
fn container(name: &str) -> String {
    format!("soak-{name}")
}

/// The MAC address of a link, as `ip -o link` prints it.
fn mac(listed: &str) -> [u8; 6] {
    let text = listed.split_once("link/ether ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or_default();
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().unwrap_or_else(|_| panic!("no MAC address in {listed}"))
}

fn field(value: Option<u8>) -> i32 {
    value.map_or(-1, i32::from)
}

fn borrowed(parameters: &[(String, String)]) -> Vec<(&str, &str)> {
    parameters.iter().map(|(name, value)| (&**name, &**value)).collect()
}

/// A group without any rule.
fn new_group(moto: &Moto) -> String {
    let name = unique();
    let created = moto.call("CreateSecurityGroup", &[("GroupName", &name), ("GroupDescription", &name)]);
    let group = element(&created, "groupId");
    let all = [
        ("GroupId", &*group),
        ("IpPermissions.1.IpProtocol", "-1"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    moto.call("RevokeSecurityGroupEgress", &all);
    group
}
