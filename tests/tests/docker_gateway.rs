//! The gateway and the endpoint behind it, with a real Moto: what is enforced when a call returns, and while the endpoint
//! is away, slow, out of its mind or without its memory. Instances are network namespaces; no Docker engine is needed.

#[path = "docker_gateway/failure.rs"]
mod failure;
#[path = "docker_gateway/http.rs"]
mod http;
#[path = "docker_gateway/writes.rs"]
mod writes;

use std::net::SocketAddr;

use tests::e2e::{Agent, Attempt, Endpoint, Moto, Server, World};

/// Where the gateway listens: the host's own address on the client's side.
const GATEWAY: &str = "203.0.113.1:4566";

/// Seconds that a commit may take, where none may be late.
const LONG: &str = "60";

/// An instance of Moto's, called a, and an agent that reads by way of an endpoint that can be made to fail.
struct Stage<'a> {
    agent: Agent,
    endpoint: Endpoint,
    world: World,
    /// Moto itself.
    moto: &'a Moto,
    /// Moto through the gateway.
    gateway: Moto,
    group: String,
    id: String,
}

impl<'a> Stage<'a> {
    /// The instance's group allows nothing in. The agent isn't started.
    #[track_caller]
    fn new(moto: &'a Moto) -> Self {
        Self::with(moto, "0.2", LONG)
    }

    /// The same, with so many seconds between two polls.
    #[track_caller]
    fn polling(moto: &'a Moto, interval: &str) -> Self {
        Self::with(moto, interval, LONG)
    }

    /// The same, with so many seconds for a commit, too.
    #[track_caller]
    fn with(moto: &'a Moto, interval: &str, commit_timeout: &str) -> Self {
        let world = World::new(&["a"]);
        let endpoint = Endpoint::start(Some(&world.host));
        endpoint.forward(moto.address());
        let mut agent = Agent::new(Some(&world.host));
        Moto::reach(&mut agent, &endpoint.url());
        agent.arguments(["--poll-interval", interval, "--commit-timeout", commit_timeout]);
        let group = moto.group();
        let id = moto.instance(&[&group]);
        agent.arguments(["--no-docker", "--gateway", GATEWAY, "--attach", &format!("{id}=veth-a")]);
        let gateway: SocketAddr = GATEWAY.parse().expect("an address");
        let gateway = moto.through(gateway, &world.host);
        Self { agent, endpoint, world, moto, gateway, group, id }
    }

    fn serve(&self, port: u16) -> Server {
        Server::start(self.world.namespace("a"), port)
    }

    /// A client far away connects to the instance.
    fn tcp(&self, port: u16) -> Attempt<'_> {
        Attempt::tcp(&self.world.outside, self.world.instance("a").v4.into(), port)
    }
}
