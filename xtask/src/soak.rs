//! `cargo xtask soak`: for a long time, what `cargo xtask test` does for a short one. By `--minutes`, the agent while
//! everything around it fails (`tests/tests/docker_soak.rs`); otherwise restarts and flips under load
//! (`tests/tests/netns/load.rs`).

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::deps::docker::Engine;
use crate::deps::python::Venv;
use crate::{build, cmd, deps, test, ui, workspace};

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// How long everything around the agent fails: endpoint, Docker, netlink, bpf(2), clocks, links, the agent itself
    #[arg(long, value_name = "N", conflicts_with_all = ["restarts", "flips"])]
    minutes: Option<u64>,
    /// The same in seconds; both are added up. A round that has begun by then is ended
    #[arg(long, value_name = "N", conflicts_with_all = ["restarts", "flips"])]
    seconds: Option<u64>,
    /// The order of what happens, as an earlier run printed it [default: another one each time]
    #[arg(long, value_name = "SEED", conflicts_with_all = ["restarts", "flips"])]
    seed: Option<u64>,
    /// Print the outcome as JSON on standard output, and all else on standard error
    #[arg(long, conflicts_with_all = ["restarts", "flips"])]
    json: bool,
    /// Without --minutes: how often the agent is killed or stopped, and started again
    #[arg(long, value_name = "N", default_value_t = 100)]
    restarts: u32,
    /// Without --minutes: how often the rules flip under each agent
    #[arg(long, value_name = "N", default_value_t = 10)]
    flips: u32,
}

/// Builds, and runs the tests.
pub fn run(options: &Options) -> Result<ExitCode> {
    cmd::ensure_root("by the tests, for network namespaces and eBPF")?;
    deps::ensure_tools(&[deps::IP])?;
    deps::ensure_bpffs()?;
    match (options.minutes, options.seconds) {
        (None, None) if options.seed.is_none() && !options.json => under_load(options)?,
        (None, None) => bail!("--seed and --json need --minutes or --seconds"),
        (minutes, seconds) => with_faults(options, 60 * minutes.unwrap_or(0) + seconds.unwrap_or(0))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn under_load(options: &Options) -> Result<()> {
    let Options { restarts, flips, .. } = options;
    let agent = build::build(true)?;
    ui::step(&format!("{restarts} restarts with {flips} flips each, under load, and {restarts} upgrades"));
    let environment = [("SG_RESTARTS", restarts.to_string().into()), ("SG_FLIPS", flips.to_string().into())];
    for mut command in programs("netns", "load::", &agent, &environment)? {
        if !command.status()?.success() {
            bail!("the tests under load failed; what they said is above");
        }
    }
    Ok(())
}

fn with_faults(options: &Options, seconds: u64) -> Result<()> {
    deps::ensure_tools(&[deps::BUSYBOX, deps::DROPBEAR])?;
    let venv = Venv::ensure()?;
    let _engine = Engine::ensure()?;
    let agent = build::build(true)?;
    let report = workspace::run_dir()?.join("soak.json");
    let mut environment: Vec<(&str, OsString)> = vec![
        ("SG_MOTO_PYTHON", venv.python().into()),
        ("SG_AWS", venv.aws().into()),
        ("SG_SOAK_SECONDS", seconds.to_string().into()),
        ("SG_SOAK_REPORT", report.clone().into()),
    ];
    environment.extend(options.seed.map(|seed| ("SG_SOAK_SEED", seed.to_string().into())));
    environment.extend(std::env::var_os("DOCKER_HOST").map(|host| ("DOCKER_HOST", host)));
    ui::step(&format!("{seconds} s of faults"));
    // Nobody takes an earlier run's for this one's.
    let _ = std::fs::remove_file(&report);
    let mut failed = false;
    for mut command in programs("docker_soak", "the_kernel_enforces", &agent, &environment)? {
        if options.json {
            command.stdout(std::io::stderr());
        }
        failed |= !command.status()?.success();
    }
    if options.json && report.exists() {
        let report = std::fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
        println!("{report}");
    }
    if failed {
        bail!("the soak failed; what it said is above, and the same order of acts comes by --seed");
    }
    Ok(())
}

/// The command lines of a target's tests.
fn programs(target: &str, filter: &str, agent: &Path, environment: &[(&str, OsString)]) -> Result<Vec<Command>> {
    let directory = workspace::root().join("tests");
    let mut all = vec![
        ("SG_AGENT_BIN", agent.to_owned().into_os_string()),
        ("CARGO_MANIFEST_DIR", directory.clone().into_os_string()),
    ];
    all.extend(environment.iter().cloned());
    let programs = test::programs::build(&[target.to_owned()], &[])?;
    let commands = programs.into_iter().map(|program| {
        let mut command = cmd::as_root(program, all.clone());
        command.current_dir(&directory).args([filter, "--nocapture", "--test-threads", "1"]);
        command
    });
    Ok(commands.collect())
}
