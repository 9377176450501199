//! Docker's part of a scan: the running containers that claim to be instances, each with its network namespace held
//! open. Reads no links.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{ContainerInspectResponse, ContainerSummary, EndpointSettings};
use futures_util::{StreamExt, stream};
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::conventions::{self, Claim};
use super::names::{self, quoted};
use super::netns::Netns;
use crate::model::Warning;

const DEFAULT_ENDPOINT: &str = "unix:///var/run/docker.sock";
/// A busy daemon takes seconds to answer; one that takes longer is as good as away.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Containers that are inspected at the same time.
const CONCURRENT: usize = 8;

/// A running container that claims to be an instance.
#[derive(Debug)]
pub(super) struct Claimed {
    /// The full id.
    pub(super) id: String,
    /// Without the slash.
    pub(super) name: String,
    pub(super) claim: Claim,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) netns: Netns,
}

/// An interface as Docker made it. The guest can change what its own side says, but not this.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Endpoint {
    pub(super) mac: [u8; 6],
    /// The IPv4 address first.
    pub(super) addresses: Vec<IpAddr>,
}

impl Endpoint {
    /// `None` where the container isn't connected to the network at this moment.
    fn read(settings: &EndpointSettings) -> Option<Self> {
        let address = |text: &Option<String>| text.as_ref()?.parse::<IpAddr>().ok();
        let addresses = [address(&settings.ip_address), address(&settings.global_ipv6_address)];
        let addresses: Vec<IpAddr> = addresses.into_iter().flatten().collect();
        let mac = names::mac(settings.mac_address.as_ref()?).ok()?;
        (!addresses.is_empty()).then_some(Self { mac, addresses })
    }
}

/// Docker couldn't be asked.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) endpoint: String,
    pub(crate) cause: Error,
}

/// Connects, and agrees on a version of the API; also tells the address that it found.
pub(crate) async fn connect(host: Option<&str>) -> Result<(Docker, String), Failure> {
    let configured = host.map(str::to_owned).or_else(|| std::env::var("DOCKER_HOST").ok());
    let endpoint = configured.filter(|host| !host.is_empty()).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
    let connected = async { Docker::connect_with_host(&endpoint)?.with_timeout(TIMEOUT).negotiate_version().await };
    match connected.await {
        Ok(docker) => Ok((docker, endpoint)),
        Err(cause) => Err(Failure { endpoint, cause }),
    }
}

/// The running containers.
#[derive(Default)]
pub(super) struct Running {
    /// Those that claim to be instances.
    pub(super) claimed: Vec<Claimed>,
    /// The namespaces of the others, if somebody asks for them.
    pub(super) others: Vec<Netns>,
    /// About claims that can't be taken.
    pub(super) warnings: Vec<Warning>,
}

/// Every running container that claims to be an instance; with `others` also where all others are.
pub(super) async fn running(host: Option<&str>, others: bool) -> Result<Running, Failure> {
    let (docker, endpoint) = connect(host).await?;
    let failure = |cause| Failure { endpoint: endpoint.clone(), cause };
    let mut warnings = Vec::new();
    let (mut candidates, mut strangers) = (Vec::new(), Vec::new());
    for container in docker.list_containers(None).await.map_err(failure)? {
        let id = container.id.clone();
        match candidate(container, &mut warnings) {
            Some(candidate) => candidates.push(candidate),
            None => strangers.extend(id.filter(|_| others)),
        }
    }
    let docker = &docker;
    let mut opened =
        stream::iter(strangers).map(|id| async move { netns_of(docker, &id).await }).buffer_unordered(CONCURRENT);
    let mut others = Vec::new();
    while let Some(netns) = opened.next().await {
        match netns {
            Ok(netns) => others.push(netns),
            Err(Unopened::Docker(cause)) => return Err(failure(cause)),
            // Nobody knows then whose its link is.
            Err(Unopened::Stopped | Unopened::Hidden(_)) => {}
        }
    }
    let mut opened = stream::iter(candidates)
        .map(|(id, name, claim, endpoints)| async move {
            let netns = netns_of(docker, &id).await;
            (id, name, claim, endpoints, netns)
        })
        .buffer_unordered(CONCURRENT);
    let mut claimed = Vec::new();
    while let Some((id, name, claim, endpoints, netns)) = opened.next().await {
        match netns {
            Ok(netns) => claimed.push(Claimed { id, name, claim, endpoints, netns }),
            Err(Unopened::Stopped) => {}
            Err(Unopened::Docker(cause)) => return Err(failure(cause)),
            Err(Unopened::Hidden(problem)) => {
                let problem = format!("instance {} isn't enforced: {problem}", claim.instance);
                warnings.push(Warning { subject: subject(&name), problem });
            }
        }
    }
    Ok(Running { claimed, others, warnings })
}

/// What a warning about a container is filed under.
pub(super) fn subject(name: &str) -> String {
    format!("container {}", quoted(name))
}

fn candidate(
    container: ContainerSummary,
    warnings: &mut Vec<Warning>,
) -> Option<(String, String, Claim, Vec<Endpoint>)> {
    let id = container.id?;
    // A container that others link to has their aliases, with a slash inside, too.
    let names = container.names.unwrap_or_default();
    let name = names.iter().filter_map(|name| name.strip_prefix('/')).find(|name| !name.contains('/'));
    let name = name.unwrap_or(&id).to_owned();
    let mut problems = Vec::new();
    let claim = conventions::claim(&name, &container.labels.unwrap_or_default(), &mut problems);
    warnings.extend(problems.into_iter().map(|problem| Warning { subject: subject(&name), problem }));
    let networks = container.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    Some((id, name, claim?, networks.values().filter_map(Endpoint::read).collect()))
}

enum Unopened {
    /// It stopped since it was listed.
    Stopped,
    /// Docker went away.
    Docker(Error),
    /// It runs, but its namespace isn't to be had.
    Hidden(String),
}

/// Opens the namespace of a container's first process.
///
/// A process id can be another process's by the time that it is used. So the process's directory is opened first
/// (it stays that very process's), then Docker must still say that the container runs with this id, and only then is
/// the namespace opened, through the directory: that fails once the process is gone.
async fn netns_of(docker: &Docker, id: &str) -> Result<Netns, Unopened> {
    let pid = pid_of(docker, id).await?;
    let directory =
        open(format!("/proc/{pid}").as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    if pid_of(docker, id).await? != pid {
        return Err(Unopened::Stopped);
    }
    let netns = directory.map_err(io::Error::from).and_then(|directory| netns_in(&directory));
    match netns {
        Ok(netns) => Ok(netns),
        // Either it has just stopped, or this isn't the process's /proc.
        Err(error) => match pid_of(docker, id).await {
            Ok(again) if again == pid => Err(Unopened::Hidden(format!(
                "can't open the network namespace of process {pid}: {error}; run the agent as root in the host's \
                 pid namespace (--pid host)"
            ))),
            Ok(_) => Err(Unopened::Stopped),
            Err(unopened) => Err(unopened),
        },
    }
}

fn netns_in(process: &OwnedFd) -> io::Result<Netns> {
    let file = openat(process, "ns/net", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    Netns::new(File::from(file))
}

/// The id of the container's first process, if it runs.
async fn pid_of(docker: &Docker, id: &str) -> Result<i64, Unopened> {
    match docker.inspect_container(id, None).await {
        Ok(ContainerInspectResponse { state: Some(state), .. }) if state.running == Some(true) => {
            state.pid.filter(|pid| *pid > 0).ok_or(Unopened::Stopped)
        }
        Ok(_) | Err(Error::DockerResponseServerError { status_code: 404, .. }) => Err(Unopened::Stopped),
        Err(error) => Err(Unopened::Docker(error)),
    }
}
