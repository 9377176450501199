//! Tools that cargo installs: finds them, or installs them below target/tools.

use std::env;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{cmd, ui, workspace};

/// A tool: the one on `PATH`, in cargo's bin directory or below target/tools; installed there if there is none. `why` says
/// what it does, for who waits.
pub fn ensure(tool: &str, version: Option<&str>, why: &str) -> Result<PathBuf> {
    let tools = workspace::target().join("tools");
    let cargo_home =
        env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let own = tools.join("bin").join(tool);
    let elsewhere = cargo_home.map(|home| home.join("bin").join(tool));
    let installed = || elsewhere.into_iter().chain([own.clone()]).find(|path| cmd::is_executable(path));
    if let Some(found) = cmd::find(tool).or_else(installed) {
        return Ok(found);
    }
    let name = version.map_or_else(|| tool.to_owned(), |version| format!("{tool} {version}"));
    ui::step(&format!("installing {name} below target/tools: {why}"));
    let mut install = workspace::cargo();
    install.args(["install", tool, "--locked", "--root"]).arg(&tools);
    install.args(version.iter().flat_map(|version| ["--version", version]));
    // `cargo install` builds in CARGO_TARGET_DIR, and what stays there is of no use.
    install.env_remove("CARGO_TARGET_DIR");
    cmd::run(&mut install)
        .with_context(|| format!("{tool} can't be installed: `cargo install {tool}` by hand may tell why"))?;
    Ok(own)
}
