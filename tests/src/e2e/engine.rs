//! A Docker engine of a test's own, in a network namespace of its own: it may be killed and started anew. And a way from
//! there to a server of the test's.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Namespace, PATIENCE, docker, output, run, sweep, unique};

/// How long it may take to answer: after a crash it clears up first.
const START: Duration = Duration::from_secs(300);

/// An engine. Dropped, it goes with all that it has.
#[derive(Debug)]
pub struct Engine {
    /// Where it and its bridges are.
    pub namespace: Namespace,
    directory: PathBuf,
    dockerd: Option<Child>,
}

impl Engine {
    /// Starts one that has this image of the machine's own engine.
    ///
    /// # Panics
    /// When it doesn't start.
    #[track_caller]
    pub fn new(image: &str) -> Self {
        Self::within(Namespace::new("engine"), &[], image)
    }

    /// The same in this namespace, and with these arguments for dockerd.
    ///
    /// # Panics
    /// When it doesn't start.
    #[track_caller]
    pub fn within(namespace: Namespace, more: &[&str], image: &str) -> Self {
        let directory = std::env::temp_dir().join(unique());
        std::fs::create_dir_all(&directory).expect("a new directory");
        let mut engine = Self { namespace, directory, dockerd: None };
        engine.start(more);
        let mut save = docker();
        let mut save = save.args(["save", image]).stdout(Stdio::piped()).spawn().expect("docker in the PATH");
        let archive = save.stdout.take().expect("a pipe was asked for");
        run(engine.docker().arg("load").stdin(archive));
        assert!(save.wait().is_ok_and(|status| status.success()), "docker save failed");
        engine
    }

    /// Its address, for `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("docker.sock")
    }

    /// A `docker` command line for it.
    pub fn docker(&self) -> Command {
        let mut command = docker();
        command.args(["-H", &self.host()]);
        command
    }

    /// Starts dockerd with these arguments too, and waits until it answers.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn start(&mut self, more: &[&str]) {
        let log = std::fs::File::create(self.directory.join("log")).expect("a log file");
        let again = log.try_clone().expect("one more open file");
        // It ends with the test, however that ends.
        let mut dockerd = self.namespace.command("setpriv");
        dockerd.args(["--pdeathsig", "TERM", "dockerd", "--host", &self.host()]);
        for (option, name) in [("--data-root", "data"), ("--exec-root", "run"), ("--pidfile", "pid")] {
            dockerd.arg(option).arg(self.directory.join(name));
        }
        // Its containers are known by the group that they are in, whoever else has containers.
        let group = Path::new("/").join(self.directory.file_name().unwrap_or_default());
        dockerd.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent"]).arg(group);
        dockerd.args(more).stdin(Stdio::null()).stdout(log).stderr(again);
        self.dockerd = Some(dockerd.spawn().expect("setpriv and dockerd in the PATH"));
        let end = Instant::now() + START;
        while !output(self.docker().arg("version")).status.success() {
            if Instant::now() > end {
                let log = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
                panic!("the engine doesn't answer within {START:?}: {log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends dockerd. What becomes of its containers is its own affair.
    ///
    /// # Panics
    /// Never in practice: process ids are positive.
    pub fn stop(&mut self, signal: Signal) {
        let Some(mut dockerd) = self.dockerd.take() else { return };
        // It is started by another program in the same process.
        let _ = kill(Pid::from_raw(i32::try_from(dockerd.id()).expect("a process id")), signal);
        let end = Instant::now() + PATIENCE;
        while dockerd.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > end {
                eprintln!("dockerd goes on after {signal}: it is killed");
                let _ = dockerd.kill();
                let _ = dockerd.wait();
            }
            thread::sleep(Duration::from_millis(20));
        }
        // A killed one leaves these, and its containerd for a moment: the next one would take both for running ones.
        let containerd = self.directory.join("run/containerd/containerd.pid");
        let pid = std::fs::read_to_string(&containerd).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid {
            // It is gone already, but for who may not have been told yet.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = std::fs::remove_file(containerd);
        let _ = std::fs::remove_file(self.directory.join("pid"));
    }

    /// The namespace of a running container.
    ///
    /// # Panics
    /// When it doesn't run.
    #[track_caller]
    pub fn inside(&self, container: &str) -> Namespace {
        let pid = run(self.docker().args(["inspect", "--format", "{{.State.Pid}}", container]));
        Namespace::of_process(container, pid.parse().expect("a process id"))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.dockerd.is_some() {
            let listed = output(self.docker().args(["ps", "--all", "--quiet"]));
            for container in String::from_utf8_lossy(&listed.stdout).lines() {
                let _ = self.docker().args(["rm", "--force", container]).output();
            }
        }
        self.stop(Signal::SIGTERM);
        // Of an engine that was killed something may be left, whatever it did when it was started anew.
        sweep::clear(&self.directory);
    }
}

/// Listens in a namespace, and passes connections on to a server in the test's own; where it listens. It goes on until
/// the program ends.
///
/// # Panics
/// When no port can be had.
pub fn forward(namespace: &Namespace, to: SocketAddr) -> SocketAddr {
    let listener = namespace.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            // A client that finds no server sees the connection end.
            let _ = join(client, to);
        }
    });
    address
}

fn join(client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let server = TcpStream::connect(to)?;
    for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}
