//! Where things are in the workspace, and cargo as it must be called from inside `cargo run`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

/// The workspace's root.
pub fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// `target/`: always the workspace's own, so that the binary is where the documentation says.
pub fn target() -> PathBuf {
    root().join("target")
}

/// The agent's binary.
pub fn agent(release: bool) -> PathBuf {
    target().join(if release { "release" } else { "debug" }).join("sg-agent")
}

/// Logs and pid files of what xtask starts; made if need be.
pub fn run_dir() -> Result<PathBuf> {
    let dir = target().join("run");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The cargo that started xtask, or the one on `PATH`.
pub fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// cargo in the workspace's root, writing to the workspace's `target/`.
pub fn cargo() -> Command {
    let mut command = Command::new(cargo_program());
    command.current_dir(root()).env("CARGO_TARGET_DIR", target());
    clean_environment(&mut command);
    command
}

/// Takes away what `cargo run` set for xtask: build scripts that watch those variables would run again
/// each time that the workspace is built from xtask and from the shell in turn, and `LD_LIBRARY_PATH`
/// would offer one toolchain's libraries to another's compiler.
pub fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "LD_LIBRARY_PATH" {
            command.env_remove(name);
        }
    }
}
