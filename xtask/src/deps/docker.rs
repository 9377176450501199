//! A Docker engine: the one that runs, or Debian's, started by systemd or by hand. Stops only what it started by hand.

use std::env;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use super::apt_install;
use crate::ui::{self, Progress};
use crate::{cmd, workspace};

/// How long an engine may take until it answers.
const START: Duration = Duration::from_secs(180);
/// How long dockerd may take to end; it stops its containers first.
const STOP: Duration = Duration::from_secs(20);

/// A Docker engine that answers.
pub struct Engine {
    /// Does the engine's socket ask for root?
    sudo: bool,
    /// The dockerd that was started by hand.
    own: Option<Dockerd>,
}

impl Engine {
    /// Finds an engine, or installs and starts one.
    pub fn ensure() -> Result<Self> {
        if let Some(sudo) = answers() {
            return Ok(Self { sudo, own: None });
        }
        if let Some(host) = env::var_os("DOCKER_HOST") {
            bail!("the Docker engine at DOCKER_HOST={} doesn't answer: start it, or unset DOCKER_HOST", host.display());
        }
        let missing: Vec<_> = [("docker.io", "dockerd"), ("docker.io", "docker"), ("iptables", "iptables")]
            .into_iter()
            .filter(|(_, program)| cmd::find(program).is_none())
            .map(|(package, _)| package)
            .collect();
        if !missing.is_empty() {
            let mut packages = missing;
            packages.dedup();
            ui::step(&format!("installing {}: instances are Docker containers", packages.join(" ")));
            apt_install(&packages)?;
        }
        cmd::ensure_root("to start the Docker engine")?;
        let own = if Path::new("/run/systemd/system").is_dir() {
            ui::step("starting the Docker engine (systemctl start docker)");
            cmd::run(cmd::as_root_plain("systemctl").args(["start", "docker"]))?;
            None
        } else {
            Some(Dockerd::start()?)
        };
        let mut engine = Self { sudo: false, own };
        engine.wait()?;
        Ok(engine)
    }

    /// The docker CLI for this engine.
    pub fn docker(&self) -> Command {
        docker(self.sudo)
    }

    /// Does one need root to talk to it?
    pub fn needs_root(&self) -> bool {
        self.sudo
    }

    fn wait(&mut self) -> Result<()> {
        let mut progress = Progress::start("waiting for the Docker engine");
        let end = Instant::now() + START;
        while Instant::now() < end {
            if let Some(sudo) = answers() {
                self.sudo = sudo;
                return Ok(());
            }
            if let Some(own) = &mut self.own {
                own.check()?;
            }
            progress.tick();
            cmd::sleep(Duration::from_millis(200))?;
        }
        let log = self.own.as_ref().map(|own| cmd::tail_of(&own.log)).unwrap_or_default();
        bail!("the Docker engine doesn't answer after {} s\n{log}", START.as_secs())
    }
}

/// A dockerd without a service manager; stopped when dropped.
struct Dockerd {
    child: Child,
    pid_file: PathBuf,
    log: PathBuf,
}

impl Dockerd {
    fn start() -> Result<Self> {
        let run = workspace::run_dir()?;
        let (log, pid_file) = (run.join("dockerd.log"), run.join("dockerd.pid"));
        let program = cmd::find("dockerd").context("dockerd isn't there: install docker.io")?;
        ui::step(
            "starting dockerd, as there is no systemd; its log and pid are in target/run, and it ends with this command",
        );
        let (out, err) = cmd::log_file(&log)?;
        let child = cmd::as_root_plain(program)
            .arg("--pidfile")
            .arg(&pid_file)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            // Ctrl-C is for the command in the foreground.
            .process_group(0)
            .spawn()
            .context("cannot start dockerd")?;
        Ok(Self { child, pid_file, log })
    }

    fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("dockerd ended at once: {status}\n{}", cmd::tail_of(&self.log));
        }
        Ok(())
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        ui::step("stopping the dockerd that was started");
        let _progress = Progress::start("stopping dockerd");
        let pid = std::fs::read_to_string(&self.pid_file).ok().and_then(|text| text.trim().parse().ok());
        // sudo doesn't pass on a signal that comes from its own child's group: dockerd is told itself.
        cmd::signal(pid.unwrap_or(self.child.id()), Signal::SIGTERM);
        let end = Instant::now() + STOP;
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        cmd::stop(&mut self.child, Duration::from_secs(1));
    }
}

/// Does an engine answer, and is root needed for it?
fn answers() -> Option<bool> {
    cmd::find("docker")?;
    let asked = |sudo| cmd::succeeds(docker(sudo).args(["version", "--format", "{{.Server.Version}}"]));
    if asked(false) {
        return Some(false);
    }
    let locked = !cmd::is_root() && Path::new("/var/run/docker.sock").exists();
    (locked && cmd::ensure_root("to talk to the Docker engine").is_ok() && asked(true)).then_some(true)
}

fn docker(sudo: bool) -> Command {
    let program = cmd::find("docker").unwrap_or_else(|| "docker".into());
    if sudo {
        let host = env::var_os("DOCKER_HOST");
        cmd::as_root(program, host.iter().map(|host| (OsStr::new("DOCKER_HOST"), host)))
    } else {
        Command::new(program)
    }
}
