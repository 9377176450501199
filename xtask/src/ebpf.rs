//! Builds and checks the eBPF object: `sg-ebpf` is a workspace of its own, for another target, with another compiler.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::deps::bpf::{Compiler, TARGET, ensure_linker};
use crate::{cmd, ui, workspace};

/// Builds the object, with the set-up that it needs, and returns its path. It is the optimised one always:
/// the verifier doesn't take what the compiler makes otherwise.
pub fn build() -> Result<PathBuf> {
    build_with(&[])
}

/// The same with more arguments for cargo.
pub fn build_with(arguments: &[&str]) -> Result<PathBuf> {
    let compiler = Compiler::ensure()?;
    let linker = ensure_linker()?;
    ui::step(&format!("building the eBPF object with {}", compiler.describe()));
    let mut cargo = cargo(&compiler, &linker, "build", "")?;
    cargo.args(arguments);
    cmd::run(&mut cargo).with_context(|| hint(&compiler, &linker))?;
    let object = workspace::target().join("bpf").join(TARGET).join("release/sg-ebpf");
    ensure!(object.is_file(), "{} wasn't built", object.display());
    Ok(object)
}

/// Checks the eBPF sources with warnings denied.
pub fn check() -> Result<()> {
    let compiler = Compiler::ensure()?;
    let linker = ensure_linker()?;
    cmd::run(&mut cargo(&compiler, &linker, "check", "\x1f-Dwarnings")?)
}

/// Checks the eBPF sources' formatting.
pub fn fmt_check() -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(["fmt", "--manifest-path", "sg-ebpf/Cargo.toml", "--", "--check"]);
    cargo
}

fn cargo(compiler: &Compiler, linker: &std::path::Path, subcommand: &str, flags: &str) -> Result<Command> {
    let mut rustflags = OsString::from("-Clinker=");
    rustflags.push(linker);
    // The agent and `bpftool` read types and line numbers from BTF.
    rustflags.push("\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf");
    rustflags.push(flags);
    let mut search = vec![compiler.llvm_dir()?];
    search.extend(env::var_os("LD_LIBRARY_PATH").iter().flat_map(env::split_paths));
    let mut cargo = compiler.cargo();
    cargo
        .current_dir(workspace::root().join("sg-ebpf"))
        .env("CARGO_TARGET_DIR", workspace::target().join("bpf"))
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags)
        .env("LD_LIBRARY_PATH", env::join_paths(search).context("the path of target/ has a colon")?)
        .args([subcommand, "--release"])
        .args(compiler.cargo_args());
    Ok(cargo)
}

fn hint(compiler: &Compiler, linker: &std::path::Path) -> String {
    let llvm = compiler.llvm_version().unwrap_or_else(|| "of the compiler's version".to_owned());
    format!(
        "the eBPF object can't be built (if the linker complains: {} must have LLVM {llvm} or newer)",
        linker.display()
    )
}
