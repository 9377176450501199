//! Set-up: what a clean machine lacks is installed, each with a line that says what and why. Looking comes first,
//! so that the second time costs nothing. One module a part; this one owns the Debian packages.

pub mod audit;
pub mod bpf;
pub mod cargo;
pub mod docker;
pub mod python;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};

use crate::cmd;
use crate::ui;

/// How long apt-get waits for another package manager to finish, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// Package lists are fetched once at most.
static UPDATED: AtomicBool = AtomicBool::new(false);

/// A program that xtask calls, and where it comes from.
#[derive(Clone, Copy)]
pub struct Tool {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

/// `ip`, for network namespaces and veths.
pub const IP: Tool = Tool { program: "ip", package: "iproute2", why: "tests make network namespaces with it" };
/// Only as files: nothing of this machine is started by it.
pub const SYSTEMD: Tool = Tool {
    program: "systemd-analyze",
    package: "systemd",
    why: "the agent's unit is tried under a systemd of its own",
};
/// BusyBox without shared libraries, the user land of the instances' image.
pub const BUSYBOX: Tool =
    Tool { program: "busybox", package: "busybox-static", why: "the instances' containers run it" };
/// A small SSH server for the instances' image.
pub const DROPBEAR: Tool =
    Tool { program: "dropbear", package: "dropbear-bin", why: "it is the SSH server in the instances' containers" };
/// The SSH client.
pub const SSH: Tool = Tool { program: "ssh", package: "openssh-client", why: "the session logs in with it" };

/// A tool that only one module needs.
pub const fn tool(program: &'static str, package: &'static str, why: &'static str) -> Tool {
    Tool { program, package, why }
}

/// Where a tool is that [`ensure_tools`] made sure of.
pub fn find(tool: &Tool) -> Result<PathBuf> {
    cmd::find(tool.program)
        .with_context(|| format!("{} isn't there after {} was installed", tool.program, tool.package))
}

/// Makes sure that the tools are there.
pub fn ensure_tools(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| cmd::find(tool.program).is_none()).collect();
    for tool in &missing {
        ui::step(&format!("installing {}: {}", tool.package, tool.why));
    }
    apt_install(&missing.iter().map(|tool| tool.package).collect::<Vec<_>>())
}

/// Installs Debian packages. The caller has said why.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    ensure!(
        cmd::find("apt-get").is_some(),
        "{list}: missing, and there is no apt-get: install the same with your package manager"
    );
    cmd::ensure_root(&format!("to install {list}"))?;
    apt_update()?;
    let mut install = apt_get();
    install.args(["install", "-y", "--no-install-recommends", "-o", LOCK_TIMEOUT]).args(packages);
    cmd::with_progress(&format!("apt-get install {list}"), &mut install)
}

/// Does apt know the package, by the lists that are there now?
pub fn apt_has(package: &str) -> bool {
    cmd::output(Command::new("apt-cache").args(["show", "--no-all-versions", package]))
        .is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

/// Fetches the package lists, once.
pub fn apt_update() -> Result<()> {
    if UPDATED.load(Ordering::Relaxed) {
        return Ok(());
    }
    cmd::ensure_root("to fetch the package lists")?;
    cmd::with_progress("apt-get update", apt_get().args(["update", "-o", LOCK_TIMEOUT]))?;
    UPDATED.store(true, Ordering::Relaxed);
    Ok(())
}

fn apt_get() -> Command {
    cmd::as_root("apt-get", [("DEBIAN_FRONTEND", "noninteractive")])
}

/// Mounts the BPF file system, where the agent pins its programs and maps.
pub fn ensure_bpffs() -> Result<()> {
    const BPFFS: &str = "/sys/fs/bpf";
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let mounted = mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq([BPFFS, "bpf"]));
    if mounted {
        return Ok(());
    }
    ui::step(&format!("mounting {BPFFS}: programs and maps are pinned there"));
    cmd::ensure_root(&format!("to mount {BPFFS}"))?;
    cmd::run(cmd::as_root_plain("mount").args(["-t", "bpf", "bpf", BPFFS]))
}
