//! The agent on containers, with a real Docker engine, a real Moto and the real AWS CLI. Each test has its own network,
//! containers, groups and instances.

#[path = "docker/bad_input.rs"]
mod bad_input;
#[path = "docker/containers.rs"]
mod containers;
#[path = "docker/control_plane.rs"]
mod control_plane;
#[path = "docker/failures.rs"]
mod failures;
#[path = "docker/first_packets.rs"]
mod first_packets;
#[path = "docker/image.rs"]
mod image;
#[path = "docker/launcher.rs"]
mod launcher;
#[path = "docker/live.rs"]
mod live;
#[path = "docker/session.rs"]
mod session;

use std::net::IpAddr;

use tests::e2e::{Agent, Attempt, Container, Docker, IDLE, Moto, Namespace, Network, Server};

/// An agent that reads from Moto and looks at Docker.
struct Stage {
    agent: Agent,
    network: Network,
    docker: Docker,
    moto: &'static Moto,
}

impl Stage {
    /// Everything but containers. The network leads nowhere else.
    fn new() -> Self {
        let (moto, docker) = (Moto::shared(), Docker::new());
        let network = docker.network(&["--internal"]);
        let mut agent = Agent::new(None);
        moto.serve(&mut agent, &moto.url());
        Self { agent, network, docker, moto }
    }

    /// An instance of Moto's in these groups, and a container that stands for it and does nothing.
    #[track_caller]
    fn instance(&self, name: &str, groups: &[&str]) -> Host {
        let id = self.moto.instance(groups);
        let container = self.container(name, &id);
        self.host(id, container)
    }

    /// A container that says that it is this instance.
    #[track_caller]
    fn container(&self, name: &str, id: &str) -> Container {
        let label = format!("dev.sg-agent.instance-id={id}");
        self.docker.run(name, &["--network", &self.network.name, "--label", &label], IDLE)
    }

    #[track_caller]
    fn host(&self, id: String, container: Container) -> Host {
        let (namespace, v4) = (container.namespace(), container.v4(&self.network));
        Host { id, namespace, v4, container }
    }
}

/// An instance and its container.
struct Host {
    id: String,
    namespace: Namespace,
    v4: IpAddr,
    container: Container,
}

impl Host {
    fn serve(&self, port: u16) -> Server {
        Server::start(&self.namespace, port)
    }

    fn tcp(&self, to: &Host, port: u16) -> Attempt<'_> {
        Attempt::tcp(&self.namespace, to.v4, port)
    }
}
