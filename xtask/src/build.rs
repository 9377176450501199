//! `cargo xtask build`: the eBPF object, then the agent that carries it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Args;

use crate::{cmd, ebpf, ui, workspace};

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// Build the agent without optimisation (target/debug/sg-agent)
    #[arg(long)]
    debug: bool,
}

/// Builds, and says where the binary is.
pub fn run(options: &Options) -> Result<ExitCode> {
    let binary = build(!options.debug)?;
    println!("{}", binary.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object and the agent; returns the agent's path.
pub fn build(release: bool) -> Result<PathBuf> {
    ebpf::build()?;
    ui::step("building the agent");
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "sg-agent"]);
    if release {
        cargo.arg("--release");
    }
    cmd::run(&mut cargo)?;
    let binary = workspace::agent(release);
    ensure!(binary.is_file(), "{} wasn't built", binary.display());
    Ok(binary)
}
