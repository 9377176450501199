//! One build of the measurements: this tree's, or another revision's in a work tree below `target/bench`. Runs a section
//! of it and hands over what that wrote.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::Section;
use super::report::Line;
use crate::{cmd, ebpf, ui, workspace};

/// How long measurements may take to clear away after a signal.
const STOP: Duration = Duration::from_secs(20);

/// What is run.
pub struct Build {
    /// `this tree`, or the revision.
    pub name: String,
    /// Whether it is this tree's, which knows every section.
    is_own: bool,
    bench: PathBuf,
    agent: PathBuf,
}

impl Build {
    /// The tree that xtask belongs to, as it is.
    pub fn here() -> Result<Self> {
        ebpf::build()?;
        Ok(Self { is_own: true, ..Self::compile("this tree", workspace::root(), &workspace::target())? })
    }

    /// A revision, in a work tree of its own. It keeps its `target` from one time to the next.
    pub fn of(revision: &str) -> Result<Self> {
        let git = |arguments: &[&str]| {
            let mut git = Command::new("git");
            git.current_dir(workspace::root()).args(arguments);
            git
        };
        let commit = cmd::stdout(&mut git(&["rev-parse", "--verify", &format!("{revision}^{{commit}}")]))
            .with_context(|| format!("'{revision}' is no revision of this repository"))?;
        let tree = workspace::target().join("bench/vs");
        if tree.join(".git").exists() {
            cmd::stdout(Command::new("git").current_dir(&tree).args(["checkout", "--quiet", "--detach", &commit]))?;
        } else {
            // A work tree whose directory somebody has deleted is still in git's books.
            cmd::stdout(&mut git(&["worktree", "prune"]))?;
            let place = tree.display().to_string();
            cmd::stdout(&mut git(&["worktree", "add", "--quiet", "--detach", &place, &commit]))?;
        }
        ensure!(
            tree.join("bench/Cargo.toml").is_file(),
            "{revision} has no measurements yet: name a revision with the directory bench"
        );
        ui::step(&format!("building {revision} in target/bench/vs, with its own xtask"));
        let target = tree.join("target");
        // The eBPF object, as that revision builds it.
        let mut build = workspace::cargo();
        build
            .current_dir(&tree)
            .env("CARGO_TARGET_DIR", &target)
            .args(["run", "--quiet", "-p", "xtask", "--", "build"]);
        cmd::run(build.stdout(Stdio::null()))?;
        Self::compile(revision, &tree, &target)
    }

    fn compile(name: &str, root: &Path, target: &Path) -> Result<Self> {
        ui::step(&format!("building the measurements and the agent of {name}"));
        let mut cargo = workspace::cargo();
        cargo.current_dir(root).env("CARGO_TARGET_DIR", target);
        cmd::run(cargo.args(["build", "--release", "-p", "bench", "-p", "sg-agent"]))?;
        let program = |program: &str| target.join("release").join(program);
        Ok(Self { name: name.to_owned(), is_own: false, bench: program("sg-bench"), agent: program("sg-agent") })
    }

    /// Runs one section; nothing where this build doesn't know it.
    pub fn measure(
        &self,
        section: Section,
        is_quick: bool,
        environment: &[(&'static str, PathBuf)],
    ) -> Result<Option<Vec<Line>>> {
        /// How a command line ends that isn't understood (clap).
        const USAGE: i32 = 2;
        let mut all: Vec<(&str, OsString)> = vec![("SG_AGENT_BIN", self.agent.clone().into())];
        all.extend(environment.iter().map(|(name, value)| (*name, value.clone().into_os_string())));
        let mut command = cmd::as_root(&self.bench, all);
        command.arg(section.name()).args(is_quick.then_some("--quick"));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", cmd::show(&command)))?;
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        let reader = std::thread::spawn(move || BufReader::new(stdout).lines().collect::<std::io::Result<Vec<_>>>());
        let mut is_stopping = false;
        let pid = child.id();
        let status = cmd::wait(&mut child, || {
            // Ctrl-C reaches it, too; a signal to xtask alone doesn't.
            if let (Some(signal), false) = (cmd::interrupted(), is_stopping) {
                is_stopping = true;
                cmd::signal(pid, signal);
            }
        });
        if cmd::interrupted().is_some() {
            cmd::stop(&mut child, STOP);
        }
        cmd::check_interrupted()?;
        let status = status?;
        let Ok(lines) = reader.join() else { bail!("reading what was measured panicked") };
        if status.code() == Some(USAGE) && !self.is_own {
            return Ok(None);
        }
        ensure!(status.success(), "{} failed: {status}", cmd::show(&command));
        let read = |line: &String| serde_json::from_str(line).with_context(|| format!("not a measurement: {line}"));
        lines?.iter().map(read).collect::<Result<_>>().map(Some)
    }
}
