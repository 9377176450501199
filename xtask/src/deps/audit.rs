//! cargo-deny: finds it or installs it, and how it is called. What it goes by is in `deny.toml`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{cmd, ui, workspace};

/// Every workspace that has a lock file.
pub const MANIFESTS: [&str; 3] = ["Cargo.toml", "sg-ebpf/Cargo.toml", "fuzz/Cargo.toml"];

/// cargo-deny: on `PATH`, or below target/tools, where it is installed if there is none.
pub fn ensure() -> Result<PathBuf> {
    let tools = workspace::target().join("tools");
    let own = tools.join("bin/cargo-deny");
    if let Some(found) = cmd::find("cargo-deny").or_else(|| cmd::is_executable(&own).then(|| own.clone())) {
        return Ok(found);
    }
    ui::step("installing cargo-deny below target/tools: it checks dependencies (some minutes)");
    let mut install = workspace::cargo();
    install.args(["install", "cargo-deny", "--locked", "--root"]).arg(&tools);
    // `cargo install` builds in CARGO_TARGET_DIR, and what stays there is of no use.
    install.env_remove("CARGO_TARGET_DIR");
    cmd::run(&mut install).context("`cargo install cargo-deny` by hand may tell why")?;
    Ok(own)
}

/// A check of one workspace, by what is on this machine.
pub fn command(deny: &Path, manifest: &str, what: &[&str]) -> Command {
    let mut command = Command::new(deny);
    command.arg("--manifest-path").arg(workspace::root().join(manifest)).arg("--offline");
    command.arg("--config").arg(workspace::root().join("deny.toml"));
    command.args(["check", "--hide-inclusion-graph"]).args(what);
    command.current_dir(workspace::root());
    command
}

/// Fetches the database of advisories.
pub fn fetch(deny: &Path) -> Result<()> {
    let mut command = Command::new(deny);
    command.args(["fetch", "db"]).current_dir(workspace::root());
    cmd::stdout(&mut command).map(drop)
}
