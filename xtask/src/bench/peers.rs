//! The proxies that sg-agent's is measured beside: Debian's packages, unpacked below `target/bench/peers`. They aren't
//! installed, since some would start a service on the machine.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::deps::{self, apt_has};
use crate::{cmd, ui, workspace};

/// The programs, and the libraries that a small system lacks.
const PACKAGES: [&str; 6] =
    ["nginx", "libnginx-mod-stream", "haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"];
/// Where docker-proxy is: with Docker's engine, if that is installed.
const DOCKER_PROXY: (&str, &str) = ("docker-proxy", "docker.io");

/// The directory with all that apt has of them. What is missing is left out of the measurements, which say so.
pub fn ensure() -> Result<PathBuf> {
    let directory = workspace::target().join("bench/peers");
    // Written last: a directory that was left half filled is filled again.
    let complete = directory.join(".complete");
    if complete.is_file() {
        return Ok(directory);
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    if cmd::find("apt-get").is_none() || cmd::find("dpkg-deb").is_none() {
        ui::warn("there is no apt-get: proxies are measured beside those that are installed");
        return Ok(directory);
    }
    let mut packages = PACKAGES.to_vec();
    if cmd::find(DOCKER_PROXY.0).is_none() {
        packages.push(DOCKER_PROXY.1);
    }
    if !packages.iter().all(|package| apt_has(package)) {
        deps::apt_update()?;
    }
    packages.retain(|package| apt_has(package));
    ui::step(&format!(
        "fetching {} into target/bench/peers: sg-agent's proxy is measured beside them",
        packages.join(" ")
    ));
    let download = tempfile::tempdir_in(&directory)?;
    let mut fetch = Command::new("apt-get");
    fetch.args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(&packages).current_dir(download.path());
    cmd::with_progress("apt-get download", &mut fetch)?;
    for archive in fs::read_dir(download.path())? {
        cmd::with_progress("dpkg-deb", Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(&directory))?;
    }
    fs::write(&complete, packages.join("\n"))?;
    Ok(directory)
}
