//! `cargo xtask soak`: the tests under load, with as many restarts and flips as are wanted. What they check is in
//! `tests/tests/netns/load.rs`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::{build, cmd, deps, test, ui, workspace};

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// How often the agent is killed or stopped, and started again
    #[arg(long, value_name = "N", default_value_t = 100)]
    restarts: u32,
    /// How often the rules flip under each agent
    #[arg(long, value_name = "N", default_value_t = 10)]
    flips: u32,
}

/// Builds, and runs the tests.
pub fn run(options: &Options) -> Result<ExitCode> {
    cmd::ensure_root("by the tests, for network namespaces and eBPF")?;
    deps::ensure_tools(&[deps::IP])?;
    deps::ensure_bpffs()?;
    let agent = build::build(true)?;
    let directory = workspace::root().join("tests");
    let Options { restarts, flips } = options;
    ui::step(&format!("{restarts} restarts with {flips} flips each, under load, and {restarts} upgrades"));
    for program in test::programs::build(&["netns".to_owned()], &[])? {
        let environment = [
            ("SG_AGENT_BIN", agent.clone().into_os_string()),
            ("CARGO_MANIFEST_DIR", directory.clone().into_os_string()),
            ("SG_RESTARTS", restarts.to_string().into()),
            ("SG_FLIPS", flips.to_string().into()),
        ];
        let mut command = cmd::as_root(program, environment.to_vec());
        command.current_dir(&directory).args(["load::", "--nocapture", "--test-threads", "1"]);
        if !command.status()?.success() {
            bail!("the tests under load failed; what they said is above");
        }
    }
    Ok(ExitCode::SUCCESS)
}
