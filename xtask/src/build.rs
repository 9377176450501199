//! `cargo xtask build`: the eBPF object, then the agent that carries it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::{cmd, ebpf, ui, workspace};

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// Build the agent without optimisation (target/debug/sg-agent)
    #[arg(long)]
    debug: bool,
    /// Build the agent that upgrades are tested with, too: its maps have another layout (target/another/sg-agent)
    #[arg(long)]
    another_layout: bool,
}

/// Builds, and says where the binary is.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.another_layout {
        println!("{}", another_layout(!options.debug)?.display());
    }
    let binary = build(!options.debug)?;
    println!("{}", binary.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object and the agent; returns the agent's path.
pub fn build(release: bool) -> Result<PathBuf> {
    ebpf::build()?;
    ui::step("building the agent");
    agent(release, &[], None)
}

/// Builds an agent whose maps have another layout, with the programs that go with it, and returns its path. Cargo puts it
/// where the agent itself belongs, so that one has to be built after it.
pub fn another_layout(release: bool) -> Result<PathBuf> {
    const FEATURE: [&str; 2] = ["--features", "another-layout"];
    let directory = workspace::target().join("another");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let object = ebpf::build_with(&FEATURE)?;
    // Each object has its own place: what is newer is built from.
    let kept = directory.join("sg-ebpf");
    replace(&object, &kept)?;
    ui::step("building the agent with another layout");
    let binary = agent(release, &FEATURE, Some(&kept))?;
    let kept = directory.join("sg-agent");
    replace(&binary, &kept)?;
    Ok(kept)
}

fn agent(release: bool, options: &[&str], object: Option<&Path>) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "sg-agent"]).args(options);
    if let Some(object) = object {
        cargo.env("SG_EBPF_OBJECT", object);
    }
    if release {
        cargo.arg("--release");
    }
    cmd::run(&mut cargo)?;
    let binary = workspace::agent(release);
    ensure!(binary.is_file(), "{} wasn't built", binary.display());
    Ok(binary)
}

/// Copies a file, unless the copy is the same already.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let wanted = read(from)?;
    if !to.is_file() || read(to)? != wanted {
        fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}
