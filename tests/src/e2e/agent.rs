//! The agent as a process, with directories of its own, started and asked by its command line. What it was told, and
//! what is expected of it, is the caller's.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::namespace::{command_in, ends_with_this_thread};
use super::seams::{self, Seams};
use super::{Namespace, PATIENCE, output, unique, wait_for};

/// How long `status --wait` waits, in seconds.
const SETTLE: &str = "120";

/// One agent. Dropped, it is stopped and everything of it is taken away, whatever the test did.
#[derive(Debug)]
pub struct Agent {
    binary: PathBuf,
    directory: PathBuf,
    bpffs: PathBuf,
    namespace: Option<File>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    child: Option<Child>,
    /// How long the log was when it was last started.
    began: usize,
    seams: Option<Seams>,
    /// By how many seconds its monotonic clock is ahead.
    ahead: i64,
}

impl Agent {
    /// An agent that will run in `namespace`, or in the test's own.
    ///
    /// # Panics
    /// When it can't have its directories.
    pub fn new(namespace: Option<&Namespace>) -> Self {
        let name = unique();
        let directory = std::env::temp_dir().join(&name);
        if let Err(error) = fs::create_dir_all(&directory) {
            panic!("cannot make {}: {error}", directory.display());
        }
        let bpffs = Path::new("/sys/fs/bpf").join(name);
        let namespace = namespace.map(Namespace::handle);
        Self {
            binary: binary().to_owned(),
            directory,
            bpffs,
            namespace,
            arguments: Vec::new(),
            environment: Vec::new(),
            child: None,
            began: 0,
            seams: None,
            ahead: 0,
        }
    }

    /// More arguments for `sg-agent run`.
    pub fn arguments<S: AsRef<OsStr>>(&mut self, more: impl IntoIterator<Item = S>) -> &mut Self {
        self.arguments.extend(more.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Takes an argument back.
    pub fn without(&mut self, argument: &str) -> &mut Self {
        self.arguments.retain(|other| other != argument);
        self
    }

    /// A variable of its environment.
    pub fn environment(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// From its next start on, the test decides what becomes of its system calls. How is told by what is returned.
    pub fn seams(&mut self) -> Seams {
        self.seams.get_or_insert_default().clone()
    }

    /// From its next start on, its monotonic clock is so many seconds ahead of the machine's.
    pub fn set_ahead(&mut self, seconds: i64) -> &mut Self {
        self.ahead = seconds;
        self
    }

    /// Goes on with another binary, from its next start on: an upgrade.
    pub fn replace_binary(&mut self, binary: &Path) -> &mut Self {
        binary.clone_into(&mut self.binary);
        self
    }

    /// A directory that goes with the agent.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its pins are.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// A command line of this agent's, without the subcommand.
    pub fn command(&self) -> Command {
        let mut command = match &self.namespace {
            Some(namespace) => command_in(namespace, &self.binary),
            None => Command::new(&self.binary),
        };
        // The user's own account and settings stay out of it.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("AWS_") || name.starts_with("SG_")) {
                command.env_remove(name);
            }
        }
        command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
        command.env("NO_COLOR", "1").envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.arg("--state-dir").arg(self.directory.join("state")).arg("--bpffs").arg(&self.bpffs);
        command.stdin(Stdio::null());
        command
    }

    /// Starts it; the log goes on where that of an earlier start ended. It is killed with the thread that starts it,
    /// however that ends.
    ///
    /// # Panics
    /// When it can't be started, or runs already.
    pub fn start(&mut self) -> &mut Self {
        assert!(self.child.is_none(), "the agent runs already");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("a log file");
        let again = log.try_clone().expect("one more open file");
        self.began = self.log().len();
        let mut command = self.command();
        command.arg("run").args(&self.arguments).stdout(log).stderr(again);
        ends_with_this_thread(&mut command);
        if self.ahead != 0 {
            seams::shift_monotonic(&mut command, self.ahead);
        }
        let pending = self.seams.as_ref().map(|seams| seams.install(&mut command));
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.binary.display()));
        let pid = child.id();
        self.child = Some(child);
        if let Some(pending) = pending {
            pending.started(pid);
        }
        self
    }

    /// Waits until what is desired is enforced.
    ///
    /// # Panics
    /// With the agent's log, when it isn't in time.
    #[track_caller]
    pub fn wait(&mut self) -> &mut Self {
        let mut status = self.command();
        let mut waiting = status
            .args(["status", "--wait", SETTLE])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", self.binary.display()));
        while waiting.try_wait().expect("a child can be waited for").is_none() {
            // Nothing can come any more from one that has ended.
            if self.child.as_mut().is_none_or(|child| child.try_wait().is_ok_and(|ended| ended.is_some())) {
                let _ = waiting.kill();
                let _ = waiting.wait();
                panic!("the agent has ended\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(5));
        }
        let waited = waiting.wait_with_output().expect("a child can be waited for");
        assert!(waited.status.success(), "not enforced: {}\n{}", said(&waited), self.log());
        self
    }

    /// `status --json`, whether or not all is well.
    ///
    /// # Panics
    /// When no agent answers.
    #[track_caller]
    pub fn status(&self) -> Value {
        let status = output(self.command().args(["status", "--json"]));
        let value: Value = match serde_json::from_slice(&status.stdout) {
            Ok(value) => value,
            Err(error) => panic!("no status: {error}: {}\n{}", said(&status), self.log()),
        };
        let enforced = value["enforced"].as_bool().expect("status says whether all is enforced");
        assert_eq!(status.status.success(), enforced, "the exit code says the same: {value:#}");
        value
    }

    /// What the status says of an instance's first interface.
    ///
    /// # Panics
    /// When it isn't there.
    #[track_caller]
    pub fn interface(&self, instance: &str) -> Value {
        let status = self.status();
        let interfaces = status["interfaces"].as_array().expect("a list of interfaces");
        let found = interfaces.iter().find(|interface| interface["instance"] == instance);
        found.unwrap_or_else(|| panic!("{instance} is not in {status:#}")).clone()
    }

    /// How many packets of an instance had this fate.
    ///
    /// # Panics
    /// When the instance isn't there.
    #[track_caller]
    pub fn packets(&self, instance: &str, direction: &str, reason: &str) -> u64 {
        self.interface(instance)["counters"][direction][reason]["packets"].as_u64().unwrap_or(0)
    }

    /// `explain --json`: whether the packet passes, and the explanation.
    ///
    /// # Panics
    /// When there is no explanation, or the exit code says something else than it.
    #[track_caller]
    pub fn explain(&self, arguments: &[&str]) -> (bool, Value) {
        let explained = output(self.command().args(["explain", "--json"]).args(arguments));
        let value: Value = match serde_json::from_slice(&explained.stdout) {
            Ok(value) => value,
            Err(error) => panic!("no explanation: {error}: {}", said(&explained)),
        };
        let allowed = value["allowed"].as_bool().expect("an explanation says whether the packet passes");
        assert_eq!(explained.status.success(), allowed, "the exit code says the same: {value:#}");
        (allowed, value)
    }

    /// Its process.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// Asks it to end, and waits for that.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended()
    }

    /// Ends it as a crash would.
    ///
    /// # Panics
    /// When it doesn't end.
    #[track_caller]
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.ended();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it goes on.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the agent runs");
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            if Instant::now() > end {
                self.child = Some(child);
                panic!("the agent goes on\n{}", self.log());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// `detach`: what it printed.
    #[track_caller]
    pub fn detach(&self) -> Output {
        output(self.command().args(["detach", "--json"]))
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Waits for a line in the log since the last start that has all these words; returns it.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn logged(&self, words: &[&str]) -> String {
        wait_for(&format!("a line with {words:?} in the log"), || {
            let log = self.log();
            let found = log[self.began..].lines().find(|line| words.iter().all(|word| line.contains(word)));
            found.map(str::to_owned)
        })
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("process ids are positive");
        // One that has ended already is found by who waits for it.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            if self.child.is_some() {
                // One that a test has stopped answers nobody.
                self.signal(Signal::SIGCONT);
            }
            let counted = self.command().args(["status", "--json"]).output();
            let counted = counted.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            eprintln!("--- the agent's log ---\n{}--- its status ---\n{}---", self.log(), counted.unwrap_or_default());
        }
        if let Some(mut child) = self.child.take() {
            // Not gently: whatever is left is taken away below.
            let _ = child.kill();
            let _ = child.wait();
        }
        let detached = self.detach();
        if !detached.status.success() {
            eprintln!("sg-agent detach failed: {}", said(&detached));
        }
        let _ = fs::remove_dir_all(&self.bpffs);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The agent's binary: `SG_AGENT_BIN`, or the newest one that cargo has built.
///
/// # Panics
/// When there is none.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("SG_AGENT_BIN") {
            return path.into();
        }
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let built = ["debug", "release"].map(|profile| target.join(profile).join("sg-agent"));
        let newest = built.into_iter().filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path))).max();
        newest.expect("set SG_AGENT_BIN, or build the agent with 'cargo xtask build'").1
    })
}

/// An agent with programs and maps of another layout (the feature `another-layout`): `SG_AGENT_ANOTHER`, or where
/// `cargo xtask build --another-layout` leaves it.
///
/// # Panics
/// When there is none.
pub fn another_layout() -> PathBuf {
    let path = match std::env::var_os("SG_AGENT_ANOTHER") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/another/sg-agent"),
    };
    assert!(path.is_file(), "no {}: build it with 'cargo xtask build --another-layout'", path.display());
    path
}

/// Everything that a command said.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)).trim().to_owned()
}
