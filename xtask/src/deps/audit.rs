//! cargo-deny, and how it is called. What it goes by is in `deny.toml`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{cmd, workspace};

/// Every workspace that has a lock file.
pub const MANIFESTS: [&str; 3] = ["Cargo.toml", "sg-ebpf/Cargo.toml", "fuzz/Cargo.toml"];

/// cargo-deny.
pub fn ensure() -> Result<PathBuf> {
    super::cargo::ensure("cargo-deny", None, "it checks dependencies (some minutes)")
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
