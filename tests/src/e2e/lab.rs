//! A world, an agent in it and its rules file, put together as most tests need them.

use std::net::IpAddr;

use super::{Agent, Attempt, Rules, Server, Stream, World};

/// Everything that a test without Docker needs.
#[derive(Debug)]
pub struct Lab {
    /// The agent. It goes before the links that it is attached to.
    pub agent: Agent,
    /// Its rules file.
    pub rules: Rules,
    /// The network.
    pub world: World,
    servers: Vec<((String, u16), Server)>,
}

/// A lab that isn't there yet.
#[derive(Debug)]
pub struct LabBuilder {
    world: World,
    agent: Agent,
    rules: Rules,
    attach: Vec<String>,
}

impl Lab {
    /// A world with these instances, each in a group `sg-NAME` that lets everything out and nothing in.
    pub fn with(names: &[&str]) -> LabBuilder {
        let world = World::new(names);
        let mut agent = Agent::new(Some(&world.host));
        let mut rules = Rules::new(agent.directory().join("rules.json"));
        agent.arguments(["--no-docker", "--rules"]).arguments([rules.path()]);
        for instance in &world.instances {
            let group = format!("sg-{}", instance.name);
            rules.ingress(&group, &[]).instance(&instance.id(), &[&group], &instance.addresses());
        }
        LabBuilder { world, agent, rules, attach: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    /// Changes the rules, and waits until they are enforced.
    #[track_caller]
    pub fn change(&mut self, change: impl FnOnce(&mut Rules) -> &mut Rules) {
        change(&mut self.rules);
        self.rules.write();
        self.agent.wait();
    }

    /// Starts echo servers.
    #[track_caller]
    pub fn serve(&mut self, name: &str, ports: &[u16]) {
        for &port in ports {
            let server = Server::start(self.world.namespace(name), port);
            self.servers.push(((name.to_owned(), port), server));
        }
    }

    /// The echo server there.
    ///
    /// # Panics
    /// When none was started.
    #[track_caller]
    pub fn server(&self, name: &str, port: u16) -> &Server {
        let found = self.servers.iter().find(|((its_name, its_port), _)| its_name == name && *its_port == port);
        &found.unwrap_or_else(|| panic!("{name} has no server at {port}")).1
    }

    /// Attempts by TCP, in IPv4 and IPv6.
    #[track_caller]
    pub fn tcp(&self, from: &str, to: &str, port: u16) -> [Attempt<'_>; 2] {
        self.addresses(to).map(|address| Attempt::tcp(self.world.namespace(from), address, port))
    }

    /// Attempts by UDP, in IPv4 and IPv6.
    #[track_caller]
    pub fn udp(&self, from: &str, to: &str, port: u16) -> [Attempt<'_>; 2] {
        self.addresses(to).map(|address| Attempt::udp(self.world.namespace(from), address, port))
    }

    /// Attempts by ICMP and ICMPv6.
    #[track_caller]
    pub fn ping(&self, from: &str, to: &str) -> [Attempt<'_>; 2] {
        self.addresses(to).map(|address| Attempt::ping(self.world.namespace(from), address))
    }

    /// A connection in IPv4 that goes on.
    #[track_caller]
    pub fn stream(&self, from: &str, to: &str, port: u16) -> Stream {
        let mut stream = Stream::open(self.world.namespace(from), self.addresses(to)[0], port);
        stream.goes_on();
        stream
    }

    /// Somebody's IPv4 and IPv6 addresses: an instance's, the host's on the bridge, or those outside.
    ///
    /// # Panics
    /// When there is nobody of that name.
    #[track_caller]
    pub fn addresses(&self, name: &str) -> [IpAddr; 2] {
        let literal = |v4: [u8; 4], v6: [u16; 8]| [v4.into(), v6.into()];
        match name {
            "host" => literal([10, 0, 1, 1], [0x2001, 0xdb8, 1, 0, 0, 0, 0, 1]),
            "outside" => literal([203, 0, 113, 9], [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 9]),
            _ => self.world.instance(name).addresses(),
        }
    }
}

impl LabBuilder {
    /// Changes the rules that it starts with.
    #[must_use]
    pub fn rules(mut self, change: impl FnOnce(&mut Rules) -> &mut Rules) -> Self {
        change(&mut self.rules);
        self
    }

    /// More arguments for `sg-agent run`.
    #[must_use]
    pub fn arguments(mut self, more: &[&str]) -> Self {
        self.agent.arguments(more);
        self
    }

    /// Names only these instances to the agent.
    #[must_use]
    pub fn attach(self, names: &[&str]) -> Self {
        Self { attach: names.iter().map(|name| (*name).to_owned()).collect(), ..self }
    }

    /// The host's namespace, before the agent runs in it.
    pub fn host(&self) -> &super::Namespace {
        &self.world.host
    }

    /// Takes an instance's link away, before the agent has seen it.
    pub fn unplug(&self, name: &str) {
        self.world.unplug(name);
    }

    /// Starts the agent, and waits until the rules are enforced.
    #[track_caller]
    pub fn start(mut self) -> Lab {
        for name in &self.attach {
            let instance = self.world.instance(name);
            self.agent.arguments(["--attach".to_owned(), format!("{}={}", instance.id(), instance.link)]);
        }
        self.rules.write();
        self.agent.start().wait();
        Lab { agent: self.agent, rules: self.rules, world: self.world, servers: Vec::new() }
    }
}
