//! `cargo xtask test`: runs the sets of tests and counts. What a set needs is set up first; a set that can't run
//! names what is missing, and that fails in CI. Building and running programs is `programs`', the table `report`'s.

pub mod programs;
mod report;

use std::cell::OnceCell;
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::deps::{self, audit, docker::Engine, python::Venv};
use crate::libtest::Counts;
use crate::{agent_image, build, cmd, ebpf, kernel, ui, vm, workspace};
use report::{Outcome, Row, done, strict};

/// The package of the packet-level and end-to-end tests; each of its files is in the set that it is named after.
const TESTS: &str = "tests";

/// Of the set 'kernel' what needs the sources and no kernel.
const NORM: &str = "kernel_norm";
/// Of the set 'netns' what is run there when nothing else is asked for: rules with real traffic, and what is done
/// differently without TCX.
const SLOW_NETNS: [&str; 5] =
    ["rules::", "restart::a_killed", "restart::a_fresh", "restart::detach", "tampering::a_qdisc"];
/// How many packets the property tests judge where every instruction is emulated.
const SLOW_VERDICTS: &str = "2000";
/// How long each race is run there, in seconds.
const SLOW_STRESS: &str = "4";

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// Run this set only (may be repeated)
    #[arg(long, value_enum, value_name = "SET")]
    only: Vec<Set>,
    /// Run the sets 'kernel' and 'netns' on this version of Debian's kernel, in QEMU: 6.1, 6.12 (may be repeated)
    #[arg(long, value_name = "VERSION", value_parser = version)]
    kernel: Vec<String>,
    /// List the sets and what they need
    #[arg(long)]
    list: bool,
    /// Arguments for the test programs: a part of the tests' names, or libtest's options
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<OsString>,
}

/// A set of tests that are run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Set {
    /// rustfmt changes nothing
    Fmt,
    /// clippy and the eBPF compiler have no warnings
    Clippy,
    /// cargo-deny has nothing against a dependency. Its advisories are those of `cargo audit`, of the same database
    Deps,
    /// The crates' own tests
    Unit,
    /// The eBPF programs by BPF_PROG_TEST_RUN
    Kernel,
    /// The agent in network namespaces
    Netns,
    /// The agent with Docker and Moto, end to end
    Docker,
}

impl Set {
    fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::Deps => "deps",
            Self::Unit => "unit",
            Self::Kernel => "kernel",
            Self::Netns => "netns",
            Self::Docker => "docker",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Fmt => "rustfmt changes nothing (rustfmt)",
            Self::Clippy => "clippy and the eBPF compiler have no warnings (clippy)",
            Self::Deps => "cargo-deny has nothing against a dependency: advisories, licences, sources",
            Self::Unit => "the crates' own tests (Python, for Moto)",
            Self::Kernel => "the eBPF programs by BPF_PROG_TEST_RUN (root)",
            Self::Netns => "the agent in network namespaces (root)",
            Self::Docker => "the agent with Docker and Moto, end to end (root, a Docker engine, Python)",
        }
    }
}

/// What is run and reported as one.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    /// A set, on this machine.
    Here(Set),
    /// What depends on the kernel, on another one.
    OnKernel(String),
}

impl Job {
    fn name(&self) -> String {
        match self {
            Self::Here(set) => set.name().to_owned(),
            Self::OnKernel(version) => format!("kernel-{version}"),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Here(set) => set.describe().to_owned(),
            Self::OnKernel(version) => format!("'kernel' and 'netns' on Linux {version} (QEMU)"),
        }
    }
}

/// Runs the sets, then prints the table and the closing line.
pub fn run(options: &Options) -> Result<ExitCode> {
    let jobs = jobs(&options.only, &options.kernel);
    if options.list {
        for job in jobs {
            println!("{:<11} {}", job.name(), job.describe());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut runner = Runner { filter: options.filter.clone(), ..Runner::default() };
    let mut rows = Vec::new();
    for job in jobs {
        ui::step(&format!("test set {}: {}", job.name(), job.describe()));
        let started = Instant::now();
        let mut counts = Counts::default();
        let outcome = match runner.job(&job, &mut counts) {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        // A signal that ends a test program isn't the test's failure.
        cmd::check_interrupted()?;
        let row = Row { name: job.name(), outcome: strict(outcome), counts, time: started.elapsed() };
        if let Outcome::Failed(reason) = &row.outcome {
            ui::error(&format!("{}: {reason}", row.name));
        }
        rows.push(row);
    }
    drop(runner);
    Ok(report::show(&rows))
}

/// Everything, and the oldest kernel with it, unless something is named.
fn jobs(only: &[Set], kernels: &[String]) -> Vec<Job> {
    let (sets, kernels) = if only.is_empty() && kernels.is_empty() {
        (Set::value_variants().to_vec(), vec![vm::OLDEST.to_owned()])
    } else {
        let is_named = |set: &Set| only.contains(set);
        (Set::value_variants().iter().copied().filter(is_named).collect(), kernels.to_vec())
    };
    sets.into_iter().map(Job::Here).chain(kernels.into_iter().map(Job::OnKernel)).collect()
}

fn version(text: &str) -> Result<String, String> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    match text.split_once('.') {
        Some((major, minor)) if is_number(major) && is_number(minor) => Ok(text.to_owned()),
        _ => Err(format!("'{text}' is no kernel version like 6.1")),
    }
}

/// What the sets share, made when the first of them needs it. Stops the dockerd that it started when dropped.
#[derive(Default)]
struct Runner {
    filter: Vec<OsString>,
    object: OnceCell<()>,
    agent: OnceCell<PathBuf>,
    engine: OnceCell<Engine>,
}

impl Runner {
    fn job(&mut self, job: &Job, counts: &mut Counts) -> Result<Outcome> {
        match job {
            Job::Here(set) => self.set(*set, counts),
            Job::OnKernel(version) => self.on_kernel(version, counts),
        }
    }

    fn set(&mut self, set: Set, counts: &mut Counts) -> Result<Outcome> {
        match set {
            Set::Fmt => {
                if let Err(missing) = component("fmt", "rustfmt") {
                    return Ok(Outcome::Skipped(missing));
                }
                cmd::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;
                cmd::run(&mut ebpf::fmt_check())?;
                Ok(Outcome::Passed)
            }
            Set::Clippy => {
                if let Err(missing) = component("clippy", "clippy") {
                    return Ok(Outcome::Skipped(missing));
                }
                self.object()?;
                let mut clippy = workspace::cargo();
                clippy.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
                cmd::run(&mut clippy)?;
                ebpf::check()?;
                Ok(Outcome::Passed)
            }
            Set::Deps => self.deps(),
            Set::Unit => {
                self.object()?;
                let venv = Venv::ensure();
                let mut test = workspace::cargo();
                test.args(["test", "-p", "sg-common", "-p", "sg-agent", "-p", "xtask", "--no-fail-fast"]);
                test.arg("--").args(&self.filter);
                if let Ok(venv) = &venv {
                    test.env("SG_MOTO_PYTHON", venv.python());
                }
                let crates = programs::run(&mut test, counts);
                let mut test = workspace::cargo();
                test.args(["test", "-p", TESTS, "--lib", "--"]).args(&self.filter);
                programs::run(&mut test, counts).and(crates)?;
                let partly = |error| Outcome::Partly(format!("no Moto, so its tests were NOT run: {error:#}"));
                Ok(venv.map_or_else(partly, |_| done(counts)))
            }
            Set::Kernel => self.rooted(set, &[deps::IP], &[], counts),
            Set::Netns => {
                let another = self.another_layout()?;
                self.rooted(set, &[deps::IP, deps::SYSTEMD], &[("SG_AGENT_ANOTHER", another.into())], counts)
            }
            Set::Docker => self.docker(counts),
        }
    }

    /// Licences and sources are told by the lock files alone; the advisories are a database that has to be fetched.
    fn deps(&self) -> Result<Outcome> {
        let deny = match audit::ensure() {
            Ok(deny) => deny,
            Err(error) => return Ok(Outcome::Skipped(format!("no cargo-deny: {error:#}"))),
        };
        for manifest in audit::MANIFESTS {
            cmd::run(&mut audit::command(&deny, manifest, &["licenses", "bans", "sources"]))?;
        }
        if let Err(error) = audit::fetch(&deny) {
            ui::warn(&format!("the database of advisories can't be fetched: {error:#}"));
            return Ok(Outcome::Partly("licences, bans and sources; the advisories were NOT looked at".to_owned()));
        }
        for manifest in audit::MANIFESTS {
            cmd::run(&mut audit::command(&deny, manifest, &["advisories"]))?;
        }
        Ok(Outcome::Passed)
    }

    fn docker(&mut self, counts: &mut Counts) -> Result<Outcome> {
        if self.engine.get().is_none() {
            match Engine::ensure() {
                Ok(engine) => drop(self.engine.set(engine)),
                Err(error) => return Ok(Outcome::Skipped(format!("no Docker engine: {error:#}"))),
            }
        }
        let venv = match Venv::ensure() {
            Ok(venv) => venv,
            Err(error) => return Ok(Outcome::Skipped(format!("no Moto: {error:#}"))),
        };
        let agent = self.agent()?;
        let Some(engine) = self.engine.get() else { bail!("the Docker engine was set up above") };
        let image = format!("sg-agent-test:{}", std::process::id());
        agent_image::import(engine, &agent, &image)?;
        let environment = [
            ("SG_MOTO_PYTHON", venv.python().into()),
            ("SG_AWS", venv.aws().into()),
            ("SG_AGENT_IMAGE", image.clone().into()),
            ("RUST_TEST_THREADS", "1".into()),
        ];
        let tools = [deps::IP, deps::BUSYBOX, deps::DROPBEAR, deps::SSH];
        let outcome = self.rooted(Set::Docker, &tools, &environment, counts);
        if let Some(engine) = self.engine.get() {
            cmd::succeeds(engine.docker().args(["rmi", "--force", &image]));
        }
        outcome
    }

    /// Builds the set's test programs as the user, and runs them as root.
    fn rooted(
        &mut self,
        set: Set,
        tools: &[deps::Tool],
        environment: &[(&str, OsString)],
        counts: &mut Counts,
    ) -> Result<Outcome> {
        let targets = programs::targets(set)?;
        if targets.is_empty() {
            return Ok(Outcome::Skipped(format!("tests/tests/{}.rs isn't there", set.name())));
        }
        if let Err(error) = cmd::ensure_root(&format!("by the {} tests", set.name())) {
            return Ok(Outcome::Skipped(format!("{error:#}")));
        }
        if let Err(error) = deps::ensure_tools(tools).and_then(|()| deps::ensure_bpffs()) {
            return Ok(Outcome::Skipped(format!("{error:#}")));
        }
        let agent = self.agent()?;
        let directory = workspace::root().join(TESTS);
        let mut failures = Vec::new();
        for program in programs::build(&targets, &[])? {
            let mut all = vec![
                ("SG_AGENT_BIN", agent.clone().into_os_string()),
                ("CARGO_MANIFEST_DIR", directory.clone().into_os_string()),
            ];
            // The user's own choice of these comes last, and so wins.
            all.extend(environment.iter().cloned());
            let passed = ["DOCKER_HOST", "CI", "RUST_BACKTRACE", "RUST_LOG", "RUST_TEST_THREADS"];
            all.extend(passed.iter().filter_map(|name| Some((*name, env::var_os(name)?))));
            let mut test = cmd::as_root(program, all);
            test.current_dir(&directory).args(kernel::options_here()).args(&self.filter);
            if let Err(error) = programs::run(&mut test, counts) {
                failures.push(format!("{error:#}"));
            }
            cmd::check_interrupted()?;
        }
        ensure!(failures.is_empty(), "{}", failures.join("; "));
        Ok(done(counts))
    }

    /// Runs what depends on the kernel on another one. No root is needed.
    fn on_kernel(&mut self, version: &str, counts: &mut Counts) -> Result<Outcome> {
        let mut targets = programs::targets(Set::Kernel)?;
        targets.extend(programs::targets(Set::Netns)?);
        targets.retain(|target| target != NORM);
        ensure!(!targets.is_empty(), "there are no tests in tests/tests/kernel.rs and tests/tests/netns.rs");
        if let Err(error) = vm::ensure_tools() {
            return Ok(Outcome::Skipped(format!("{error:#}")));
        }
        let agent = self.agent()?;
        let mut environment = vec![
            ("SG_AGENT_BIN", "/bin/sg-agent".into()),
            ("RUST_TEST_THREADS", "2".into()),
            ("SG_FUZZ_VERDICTS", SLOW_VERDICTS.into()),
            ("SG_STRESS_SECONDS", SLOW_STRESS.into()),
        ];
        let passed = ["CI", "RUST_BACKTRACE", "RUST_LOG", "RUST_TEST_THREADS", "SG_FUZZ_VERDICTS", "SG_STRESS_SECONDS"];
        environment.extend(passed.iter().filter_map(|name| Some((*name, env::var_os(name)?))));
        let mut all = Vec::new();
        for target in targets {
            let mut arguments = if self.filter.is_empty() && programs::set_of(&target) == Some(Set::Netns) {
                SLOW_NETNS.map(OsString::from).to_vec()
            } else {
                self.filter.clone()
            };
            arguments.extend(kernel::options_of_machine(version));
            all.extend(
                programs::build(&[target], &[])?
                    .into_iter()
                    .map(|path| vm::Program { path, arguments: arguments.clone() }),
            );
        }
        vm::run(&vm::Job { version, agent: &agent, programs: &all, environment: &environment }, counts)?;
        Ok(done(counts))
    }

    fn object(&self) -> Result<()> {
        if self.object.get().is_none() {
            ebpf::build()?;
            self.object.set(()).ok();
        }
        Ok(())
    }

    /// What upgrades are tested with. The agent itself is built again after it.
    fn another_layout(&mut self) -> Result<PathBuf> {
        let another = build::another_layout(true)?;
        self.agent.take();
        Ok(another)
    }

    fn agent(&self) -> Result<PathBuf> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent.clone());
        }
        let agent = build::build(true)?;
        self.agent.set(agent.clone()).ok();
        Ok(agent)
    }
}

/// Makes sure that a cargo subcommand is there; an error names what is missing.
fn component(subcommand: &str, component: &str) -> Result<(), String> {
    let there = || cmd::succeeds(workspace::cargo().args([subcommand, "--version"]));
    if !there() && cmd::find("rustup").is_some() {
        ui::step(&format!("adding rustup's {component}: `cargo {subcommand}` needs it"));
        if let Err(error) = cmd::run(Command::new("rustup").args(["component", "add", component])) {
            ui::warn(&format!("{error:#}"));
        }
    }
    if there() {
        Ok(())
    } else {
        Err(format!("cargo {subcommand} isn't there: run `rustup component add {component}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_kernel_is_among_everything() {
        let everything = jobs(&[], &[]);
        assert_eq!(everything.first(), Some(&Job::Here(Set::Fmt)));
        assert_eq!(everything.last(), Some(&Job::OnKernel("6.1".to_owned())));
        assert_eq!(jobs(&[Set::Unit], &[]), [Job::Here(Set::Unit)]);
        let both = ["6.1".to_owned(), "6.12".to_owned()];
        assert_eq!(jobs(&[], &both).iter().map(Job::name).collect::<Vec<_>>(), ["kernel-6.1", "kernel-6.12"]);
    }

    #[test]
    fn a_kernel_is_named_by_two_numbers() {
        assert_eq!(version("6.12"), Ok("6.12".to_owned()));
        for text in ["6", "6.", "6.1.2", "../6.1", "6.x", ""] {
            assert!(version(text).is_err(), "{text}");
        }
    }
}
