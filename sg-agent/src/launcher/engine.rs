//! The launcher's Docker: its containers and images. Owns the calls; decides nothing, and touches nothing that hasn't
//! the launcher's marks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::{
    ContainerCreateBody, EndpointIpamConfig, EndpointSettings, HostConfig, NetworkConnectRequest,
    NetworkDisconnectRequest, NetworkingConfig,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, DownloadFromContainerOptionsBuilder,
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, RestartContainerOptionsBuilder,
    StopContainerOptionsBuilder, UploadToContainerOptionsBuilder,
};
use bollard::{body_full, models};
use futures_util::{StreamExt, TryStreamExt};

use super::marks::{HOLDER, Marks, OWN, name};
use super::plan::{Seen, Units};
use super::{LaunchError, files, holder};
use crate::discovery::conventions::ENI;
use crate::discovery::names;
use crate::model::InstanceId;
use crate::source::Launch;

/// A pull of which nothing is heard for so long is given up, and begun again later.
const STALL: Duration = Duration::from_secs(300);
/// No file that is read out of a container is that long; what is longer is cut. Its owner may be the instance.
const LONGEST_FILE: usize = 2 << 20;

/// Seconds that an instance has for its own end; then it is killed.
const STOP: i32 = 10;

/// Docker, and who asks it.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    pub(super) docker: Docker,
    pub(super) marks: Marks,
}

/// What a holder has in one network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wire {
    pub(super) network: String,
    pub(super) address: Ipv4Addr,
    pub(super) mac: [u8; 6],
}

/// User data that is ready to run.
pub(super) struct Script {
    container: String,
    /// When the container was started.
    start: Option<String>,
    /// The id of what is to run.
    exec: String,
}

/// Exit codes beyond are those of signals, as shells and Docker tell them: 128 and the signal's number.
const SIGNALLED: i64 = 128;

impl Engine {
    /// What there is; `deep` looks into namespaces too.
    pub(super) async fn look(&self, deep: bool) -> Result<Seen, Error> {
        let options = ListContainersOptionsBuilder::default().all(true).build();
        let mut seen = Seen::default();
        for container in self.docker.list_containers(Some(options)).await? {
            self.marks.take(container, &mut seen);
        }
        for units in seen.ours.values_mut().filter(|_| deep) {
            units.apart = self.is_apart(units).await?;
        }
        Ok(seen)
    }

    /// The containers of one instance.
    pub(super) async fn units(&self, instance: &InstanceId) -> Result<Units, Error> {
        Ok(self.look(false).await?.ours.remove(instance).unwrap_or_default())
    }

    /// Whether an instance's container runs in another namespace than its holder.
    pub(super) async fn is_apart(&self, units: &Units) -> Result<bool, Error> {
        let (Some(holder), Some(own)) = (&units.holder, &units.own) else { return Ok(false) };
        let (holder, own) = (self.namespace(&holder.id).await?, self.namespace(&own.id).await?);
        Ok(matches!((holder, own), (Some(holder), Some(own)) if holder != own))
    }

    /// What makes a running container's network namespace itself. One that went since it was listed has none.
    async fn namespace(&self, container: &str) -> Result<Option<u64>, Error> {
        use std::os::unix::fs::MetadataExt as _;
        let state = match self.docker.inspect_container(container, None).await {
            Ok(inspected) => inspected.state,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let pid = state.and_then(|state| state.pid).filter(|pid| *pid > 0);
        Ok(pid.and_then(|pid| Some(std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())))
    }

    /// Makes a holder in its first network, and starts it; its id.
    pub(super) async fn hold(&self, launch: &Launch, network: &str, address: Ipv4Addr) -> Result<String, Error> {
        let enis: Vec<&str> = launch.interfaces.iter().map(|interface| &*interface.eni.0).collect();
        let mut labels = self.marks.of(&launch.instance, HOLDER);
        if enis.iter().all(|eni| names::id(eni).is_ok()) {
            labels.insert(ENI.to_owned(), enis.join(","));
        }
        let body = ContainerCreateBody {
            image: Some(holder::IMAGE.to_owned()),
            cmd: Some(vec![holder::PROGRAM.to_owned()]),
            hostname: Some(hostname(address)),
            labels: Some(labels),
            // It does nothing that it had to end.
            stop_signal: Some("SIGKILL".to_owned()),
            host_config: Some(HostConfig {
                network_mode: Some(network.to_owned()),
                cap_drop: Some(vec!["ALL".to_owned()]),
                readonly_rootfs: Some(true),
                ..HostConfig::default()
            }),
            networking_config: Some(NetworkingConfig {
                endpoints_config: Some(HashMap::from([(network.to_owned(), at(address))])),
            }),
            ..ContainerCreateBody::default()
        };
        let id = self.create(&name(&launch.instance, HOLDER), body).await?;
        match self.docker.start_container(&id, None).await {
            Ok(()) => Ok(id),
            Err(error) => {
                // One that never ran reserves nothing, but has the name.
                let _ = self.remove(&id).await;
                Err(error)
            }
        }
    }

    /// Makes an instance's own container in a holder's namespace; its id. It isn't started.
    pub(super) async fn make(&self, launch: &Launch, image: &str, holder: &str) -> Result<String, Error> {
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            labels: Some(self.marks.of(&launch.instance, OWN)),
            host_config: Some(HostConfig {
                network_mode: Some(format!("container:{holder}")),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        self.create(&name(&launch.instance, OWN), body).await
    }

    async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String, Error> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        Ok(self.docker.create_container(Some(options), body).await?.id)
    }

    pub(super) async fn start(&self, container: &str) -> Result<(), Error> {
        self.docker.start_container(container, None).await
    }

    pub(super) async fn stop(&self, container: &str) -> Result<(), Error> {
        let options = StopContainerOptionsBuilder::default().t(STOP).build();
        absent_is_fine(self.docker.stop_container(container, Some(options)).await)
    }

    pub(super) async fn restart(&self, container: &str) -> Result<(), Error> {
        let options = RestartContainerOptionsBuilder::default().t(STOP).build();
        self.docker.restart_container(container, Some(options)).await
    }

    pub(super) async fn remove(&self, container: &str) -> Result<(), Error> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        absent_is_fine(self.docker.remove_container(container, Some(options)).await)
    }

    /// Joins a holder to one more network.
    pub(super) async fn connect(&self, network: &str, container: &str, address: Ipv4Addr) -> Result<(), Error> {
        let endpoint_config = Some(at(address));
        let request = NetworkConnectRequest { container: container.to_owned(), endpoint_config };
        self.docker.connect_network(network, request).await
    }

    pub(super) async fn disconnect(&self, network: &str, container: &str) -> Result<(), Error> {
        let request = NetworkDisconnectRequest { container: container.to_owned(), force: Some(true) };
        absent_is_fine(self.docker.disconnect_network(network, request).await)
    }

    /// The networks that a holder is joined to, by name; of a running one with what it has there.
    pub(super) async fn wires(&self, holder: &str) -> Result<BTreeMap<String, Option<Wire>>, Error> {
        let inspected = self.docker.inspect_container(holder, None).await?;
        let networks = inspected.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let wire = |network: &String, settings: EndpointSettings| {
            let address = settings.ip_address?.parse().ok()?;
            let mac = names::mac(&settings.mac_address?).ok()?;
            Some(Wire { network: network.clone(), address, mac })
        };
        Ok(networks.into_iter().map(|(name, settings)| (name.clone(), wire(&name, settings))).collect())
    }

    /// The host-side links of a holder's interfaces.
    pub(super) async fn links(&self, holder: &str, wires: &[Wire]) -> Result<Vec<u32>, LaunchError> {
        let state = self.docker.inspect_container(holder, None).await?.state;
        let pid = state.and_then(|state| state.pid).filter(|pid| *pid > 0).ok_or(LaunchError::NotWired)?;
        // The holder's own view: it alone is in the namespace, and it changes nothing there.
        let links = peers(&PathBuf::from(format!("/proc/{pid}/root/sys/class/net"))).map_err(LaunchError::Hidden)?;
        let of = |wire: &Wire| links.get(&wire.mac).copied().ok_or(LaunchError::NotWired);
        wires.iter().map(of).collect()
    }

    /// Whether a container was never started.
    pub(super) async fn is_fresh(&self, container: &str) -> Result<bool, Error> {
        let state = self.docker.inspect_container(container, None).await?.state;
        Ok(state.is_some_and(|state| state.status == Some(models::ContainerStateStatusEnum::CREATED)))
    }

    /// Whether a file is there.
    pub(super) async fn has(&self, container: &str, path: &str) -> Result<bool, Error> {
        Ok(self.download(container, path, 0).await?.is_some())
    }

    /// A file as an archive, if it is there.
    pub(super) async fn read(&self, container: &str, path: &str) -> Result<Option<Vec<u8>>, Error> {
        self.download(container, path, LONGEST_FILE).await
    }

    /// No more of it is asked for once there are more bytes than these.
    async fn download(&self, container: &str, path: &str, longest: usize) -> Result<Option<Vec<u8>>, Error> {
        let options = DownloadFromContainerOptionsBuilder::default().path(&format!("/{path}")).build();
        let mut chunks = std::pin::pin!(self.docker.download_from_container(container, Some(options)));
        let mut archive = Vec::new();
        while archive.len() <= longest {
            match chunks.next().await {
                Some(Ok(chunk)) => archive.extend_from_slice(&chunk),
                Some(Err(error)) if is_absent(&error) => return Ok(None),
                Some(Err(error)) => return Err(error),
                None => break,
            }
        }
        Ok(Some(archive))
    }

    /// Unpacks an archive in a container.
    pub(super) async fn upload(&self, container: &str, archive: Vec<u8>) -> Result<(), Error> {
        let options = UploadToContainerOptionsBuilder::default().path("/").build();
        self.docker.upload_to_container(container, Some(options), body_full(archive.into())).await
    }

    /// Readies the start of the script that was put there, of which nothing runs yet.
    pub(super) async fn ready_script(&self, container: &str) -> Result<Script, Error> {
        let start = self.last_start(container).await?;
        let command = CreateExecOptions {
            cmd: Some(files::RUN.to_vec()),
            user: Some("0"),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..CreateExecOptions::default()
        };
        let exec = self.docker.create_exec(container, command).await?.id;
        Ok(Script { container: container.to_owned(), start, exec })
    }

    /// Starts it; what comes of it is logged.
    pub(super) async fn start_script(&self, script: Script, instance: &InstanceId) -> Result<(), Error> {
        let Script { container, start, exec } = script;
        let StartExecResults::Attached { mut output, .. } = self.docker.start_exec(&exec, None).await? else {
            return Ok(());
        };
        let (engine, instance) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            // The script's own output goes to a file; this is what kept it from starting.
            let mut said = String::new();
            while let Some(Ok(part)) = output.next().await {
                if let LogOutput::StdOut { message } | LogOutput::StdErr { message } = part {
                    said.push_str(&String::from_utf8_lossy(&message[..message.len().min(200)]));
                    said.truncate(said.char_indices().nth(200).map_or(said.len(), |(end, _)| end));
                }
            }
            let code = engine.docker.inspect_exec(&exec).await.ok().and_then(|exec| exec.exit_code);
            if code == Some(0) {
                tracing::info!("{instance}: its user data has run");
            } else if code.is_none_or(|code| code > SIGNALLED) && engine.has_ended(&container, start.as_ref()).await {
                tracing::info!("{instance}: its user data ended with its container");
            } else {
                let code = code.map(|code| format!(" with exit code {code}")).unwrap_or_default();
                let said = if said.is_empty() { said } else { format!(": {}", said.trim_end().escape_default()) };
                tracing::warn!(
                    "{instance}: its user data failed{code}{said}; its output is in the instance's /{}",
                    files::OUTPUT
                );
            }
        });
        Ok(())
    }

    /// When a container was started that runs; nothing of one that doesn't.
    async fn last_start(&self, container: &str) -> Result<Option<String>, Error> {
        let state = match self.docker.inspect_container(container, None).await {
            Ok(inspected) => inspected.state,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let running = state.filter(|state| state.running == Some(true));
        Ok(running.map(|state| state.started_at.unwrap_or_default()))
    }

    /// Whether a container has ended since that start. Docker may tell the end of what ran in it before its own.
    async fn has_ended(&self, container: &str, start: Option<&String>) -> bool {
        for _ in 0..10 {
            if self.last_start(container).await.is_ok_and(|now| now.as_ref() != start) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        false
    }

    /// Makes the holders' image.
    pub(super) async fn make_holder(&self) -> Result<(), LaunchError> {
        let archive = holder::archive().map_err(LaunchError::Archive)?;
        let (name, tag) = holder::IMAGE.split_once(':').unwrap_or((holder::IMAGE, "latest"));
        let options = CreateImageOptionsBuilder::default().from_src("-").repo(name).tag(tag).build();
        let made = self.docker.create_image(Some(options), Some(body_full(archive.into())), None);
        Ok(made.try_for_each(|_| async { Ok(()) }).await?)
    }

    /// Pulls an image.
    pub(super) async fn pull(&self, image: &str, tell: impl Fn(String)) -> Result<(), LaunchError> {
        tracing::info!("image {image} is not here: pulling it");
        // Without a tag Docker would pull all of them.
        let name = image.rsplit('/').next().unwrap_or(image);
        let whole = if name.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") };
        let options = CreateImageOptionsBuilder::default().from_image(&whole).build();
        let mut pulling = std::pin::pin!(self.docker.create_image(Some(options), None, None));
        let mut layers: HashMap<String, (i64, i64)> = HashMap::new();
        let stalled = |_| LaunchError::Stalled(image.to_owned());
        while let Some(step) = tokio::time::timeout(STALL, pulling.next()).await.map_err(stalled)? {
            let step = step.map_err(|cause| LaunchError::Image { image: image.to_owned(), cause })?;
            if let (Some(layer), Some(progress)) = (step.id, step.progress_detail)
                && let (Some(done), Some(all)) = (progress.current, progress.total)
            {
                layers.insert(layer, (done, all));
                let (done, all) = layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
                tell(format!("pulling {image}: {} of {} MB", done / 1_000_000, all / 1_000_000));
            }
        }
        tracing::info!("image {image} is here now");
        Ok(())
    }

    pub(super) async fn has_image(&self, image: &str) -> Result<bool, Error> {
        match self.docker.inspect_image(image).await {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The TCP ports that an image says it serves.
    pub(super) async fn exposed(&self, image: &str) -> Result<BTreeSet<u16>, Error> {
        let config = self.docker.inspect_image(image).await?.config;
        let ports = config.and_then(|config| config.exposed_ports).unwrap_or_default();
        Ok(ports.iter().filter_map(|port| port.strip_suffix("/tcp")?.parse().ok()).collect())
    }
}

/// By their MAC addresses, the indices of the other ends of a namespace's links.
fn peers(class: &Path) -> io::Result<BTreeMap<[u8; 6], u32>> {
    let mut peers = BTreeMap::new();
    for entry in fs::read_dir(class)? {
        let link = entry?.path();
        let read = |name: &str| Ok::<_, io::Error>(fs::read_to_string(link.join(name))?.trim().to_owned());
        if let (Ok(mac), Ok(peer)) = (names::mac(&read("address")?), read("iflink")?.parse()) {
            peers.insert(mac, peer);
        }
    }
    Ok(peers)
}

/// As EC2 names an instance in its own network.
fn hostname(address: Ipv4Addr) -> String {
    format!("ip-{}", address.to_string().replace('.', "-"))
}

fn at(address: Ipv4Addr) -> EndpointSettings {
    let ipam = EndpointIpamConfig { ipv4_address: Some(address.to_string()), ..EndpointIpamConfig::default() };
    EndpointSettings { ipam_config: Some(ipam), ..EndpointSettings::default() }
}

pub(super) fn is_absent(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

fn absent_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    // 304: it is so already.
    let is_fine =
        |error: &Error| is_absent(error) || matches!(error, Error::DockerResponseServerError { status_code: 304, .. });
    match result {
        Err(error) if !is_fine(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Whether somebody else has the address.
pub(super) fn is_taken(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { message, .. } if message.contains("ddress already in use"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostname_is_as_ec2_gives_it() {
        assert_eq!(hostname(Ipv4Addr::new(10, 0, 1, 5)), "ip-10-0-1-5");
    }
}
