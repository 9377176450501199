//! `--launch`: an instance that the control plane has becomes a container, and follows what the control plane says of
//! it. Owns these containers, their networks and their published ports' numbers; enforces nothing, and opens no port.
//!
//! A task of its own looks at the endpoint and at Docker, and compares ([`plan`]); one worker an instance brings it to
//! its goal ([`work`]). Nothing is remembered but numbers of ports: what is to be done follows from what is seen, so
//! an agent that starts anew, a Docker that restarts and a container that somebody removed are all the same to it.
//!
//! An instance is two containers (see [`holder`]), and nothing of it runs before the agent says that its rules are in
//! force on its link.

mod engine;
mod files;
mod holder;
mod images;
mod look;
mod marks;
mod network;
mod plan;
mod ports;
mod task;
mod work;

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use self::images::{ConfigError, DEFAULT_IMAGE, ImageSpec, Images, InvalidImage, parse_image};
pub use self::ports::{DEFAULT_RANGE, parse_range};

use self::look::{Observer, docker_events};
use self::marks::Marks;
use self::ports::Ports;
use self::task::Launcher;
use self::work::Context;
use crate::apply::Snapshot;
use crate::model::{InstanceId, Warning};
use crate::proxy::PublishSpec;
use crate::source::{Ec2, Ec2Options, SourceError};

/// What `--launch` was told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which image stands for which machine image.
    pub images: Images,
    /// The host's ports to publish at.
    pub ports: RangeInclusive<u16>,
}

/// Where the launcher looks, and what it is part of.
#[derive(Clone, Debug)]
pub struct Place {
    /// The endpoint.
    pub ec2: Ec2Options,
    /// The time between two looks.
    pub interval: Duration,
    /// Docker's address, as discovery has it.
    pub docker_host: Option<String>,
    /// The agent's; it has the file of ports, and tells the launchers of one machine apart.
    pub state_dir: PathBuf,
}

/// Why an instance isn't as it should be, or why there is no launcher.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Its instances are AWS's to run.
    #[error("{0} is AWS itself, which runs its instances; --launch is for emulators, name one with --endpoint-url")]
    NotAnEmulator(String),
    /// Options that can't be used, or a question that has no answer.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Docker said no.
    #[error("docker: {0}")]
    Docker(#[from] bollard::errors::Error),
    /// There is no such image.
    #[error("its image {image} is not here and can't be pulled: {cause}; choose another with --launch-image or --launch-default-image{}",
        if image == DEFAULT_IMAGE { ", or make it by 'cargo xtask image --instance'" } else { "" })]
    Image {
        /// Its name.
        image: String,
        /// What Docker says.
        cause: bollard::errors::Error,
    },
    /// Nothing comes of its pull.
    #[error(
        "its image {0} is being pulled, but nothing is heard of it for minutes; it is tried again: is the registry reachable?"
    )]
    Stalled(String),
    /// Its worker panicked.
    #[error("the agent's own fault: {0}; it is tried again, please report it")]
    Fault(tokio::task::JoinError),
    /// A network that can't be used.
    #[error("its network {name} can't be used: {problem}")]
    Network {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
    /// An id that the endpoint made up.
    #[error("{0}; such an instance is not launched")]
    Name(String),
    /// The endpoint shows none.
    #[error("the endpoint shows no network interface of it")]
    NoInterface,
    /// Somebody took it out of its networks.
    #[error("its network container is in other networks than it should be; remove it, and it is made anew")]
    NotWired,
    /// Docker's processes can't be looked into.
    #[error("its network can't be looked into: {0}; run the agent as root in the host's pid namespace (--pid host)")]
    Hidden(io::Error),
    /// An archive for Docker.
    #[error("cannot make an archive: {0}")]
    Archive(io::Error),
}

/// How things stand.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct State {
    /// The look that this is the outcome of began then; none if there was none that saw everything.
    pub read: Option<Instant>,
    /// The generation of the enforced state that the ports are by.
    pub generation: u64,
    /// What the proxy is to publish.
    pub ports: Vec<PublishSpec>,
    /// What isn't done yet, for people.
    pub underway: Vec<String>,
    /// Instances that somebody else's containers stand for.
    pub others: BTreeSet<InstanceId>,
    /// Why the last look saw nothing.
    pub error: Option<String>,
    /// Instances that can't be launched, ports that can't be published.
    pub warnings: Vec<Warning>,
}

/// The launcher, as the daemon has it.
#[derive(Clone, Debug)]
pub struct Handle {
    ec2: Arc<Ec2>,
    state: watch::Receiver<Arc<State>>,
    hurry: Arc<Notify>,
    reboots: mpsc::UnboundedSender<InstanceId>,
}

impl Handle {
    /// How things stand; changes can be waited for.
    pub fn state(&self) -> &watch::Receiver<Arc<State>> {
        &self.state
    }

    /// Looks now.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// The endpoint has begun anew, with the same ids for other things.
    pub fn forget(&self) {
        self.ec2.forget();
    }

    /// Ends an instance's container and starts it again, if it runs. Whoever hears of RebootInstances has to say so:
    /// no answer of the endpoint shows it.
    pub fn reboot(&self, instance: InstanceId) {
        // It has ended with the agent.
        let _ = self.reboots.send(instance);
        self.hurry();
    }
}

/// Starts the launcher; it ends when `shutdown` is cancelled. What it started goes on.
///
/// # Errors
/// Options that can't be used.
pub fn start(
    options: Options,
    place: Place,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shutdown: CancellationToken,
) -> Result<Handle, LaunchError> {
    let ec2 = Arc::new(Ec2::new(&place.ec2)?);
    if !ec2.is_emulator() {
        return Err(LaunchError::NotAnEmulator(ec2.endpoint()));
    }
    let marks = Marks {
        launcher: place.state_dir.display().to_string(),
        region: ec2.scope().region.to_string(),
        account: ec2.told_account().map(str::to_owned),
    };
    let (tell, state) = watch::channel(Arc::default());
    let (reboots, rebooted) = mpsc::unbounded_channel();
    let hurry = Arc::new(Notify::new());
    let deep = Arc::new(AtomicBool::new(true));
    let (seen, pictures) = mpsc::channel(1);
    let observer = Observer {
        ec2: Arc::clone(&ec2),
        marks: marks.clone(),
        docker_host: place.docker_host.clone(),
        interval: place.interval,
        hurry: Arc::clone(&hurry),
        deep: Arc::clone(&deep),
        pictures: seen,
    };
    let context = Context::new(Arc::clone(&ec2), options.images, snapshots.clone());
    let launcher = Launcher::new(context, Ports::load(&place.state_dir, options.ports), Arc::clone(&hurry), tell);
    let events = docker_events(place.docker_host, marks.launcher, deep, Arc::clone(&hurry));
    tracing::info!("instances become containers (--launch)");
    tokio::spawn(shutdown.run_until_cancelled_owned(async {
        tokio::join!(observer.run(), launcher.run(pictures, snapshots, rebooted), events);
    }));
    Ok(Handle { ec2, state, hurry, reboots })
}
