//! The test programs: which ones a set has, how cargo builds them, and running one. Which sets there are, and what they
//! need, is the command's.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Set, TESTS};
use crate::libtest::{self, Counts};
use crate::{cmd, workspace};

/// The test targets of a set: `kernel` and `kernel_*`, files or directories.
pub(super) fn targets(set: Set) -> Result<Vec<String>> {
    let directory = workspace::root().join(TESTS).join("tests");
    let mut names = Vec::new();
    if !directory.is_dir() {
        return Ok(names);
    }
    for entry in directory.read_dir().with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        let target = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).filter(|_| target) else {
            continue;
        };
        match set_of(name) {
            Some(owner) if owner == set => names.push(name.to_owned()),
            Some(_) => {}
            None => bail!("{}: no set has these tests: name the file kernel_*, netns_* or docker_*", path.display()),
        }
    }
    names.sort();
    Ok(names)
}

/// The set that a test target is named after.
pub(super) fn set_of(target: &str) -> Option<Set> {
    [Set::Kernel, Set::Netns, Set::Docker]
        .into_iter()
        .find(|set| target.strip_prefix(set.name()).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')))
}

/// Builds the test programs with these options of cargo's, and returns their paths.
pub fn build(targets: &[String], options: &[&str]) -> Result<Vec<PathBuf>> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--no-run", "--message-format=json-render-diagnostics", "-p", TESTS]).args(options);
    for target in targets {
        cargo.args(["--test", target]);
    }
    cargo.stdin(Stdio::null()).stdout(Stdio::piped());
    let output = cargo.spawn().and_then(std::process::Child::wait_with_output);
    let output = output.with_context(|| format!("cannot run {}", cmd::show(&cargo)))?;
    ensure!(output.status.success(), "{} failed: {}", cmd::show(&cargo), output.status);
    let mut programs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        let name = message["target"]["name"].as_str();
        if name.is_some_and(|name| targets.iter().any(|target| target == name))
            && let Some(executable) = message["executable"].as_str()
        {
            programs.push(PathBuf::from(executable));
        }
    }
    ensure!(programs.len() == targets.len(), "cargo made {} test programs of {}", programs.len(), targets.join(" "));
    Ok(programs)
}

/// Runs a test program, shows what it prints, and adds its counts.
pub fn run(command: &mut Command, counts: &mut Counts) -> Result<()> {
    cmd::check_interrupted()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", cmd::show(command)))?;
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            if let Some(more) = libtest::summary(text.trim_end()) {
                *counts += more;
            }
            line.clear();
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{} failed: {status}", cmd::show(command));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_in_the_set_that_it_is_named_after() {
        for (target, set) in [
            ("kernel", Some(Set::Kernel)),
            ("netns_proxy", Some(Set::Netns)),
            ("docker", Some(Set::Docker)),
            ("kernel_properties", Some(Set::Kernel)),
            ("kernels", None),
            ("unit", None),
        ] {
            assert_eq!(set_of(target), set, "{target}");
        }
    }
}
