//! A virtual machine from its start to its end: QEMU's command line, what is read from its serial ports, its timeout.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::Job;
use crate::cmd;
use crate::libtest::{self, Counts};
use crate::ui::Progress;

/// Begins the line that says that user land runs; the kernel's release follows.
pub const BOOTED: &str = "sg-vm: booted ";
/// Begins the line that says how a program ended: its number and exit code follow.
pub const ENDED: &str = "sg-vm: ended ";

/// One set of maps takes about 100 MiB, and three are there at a time at most.
const MEMORY: &str = "3072";
/// When a machine that is still running is given up: several times what it needs.
const TIMEOUT: Duration = Duration::from_secs(900);
/// How often a silent machine is looked at.
const TICK: Duration = Duration::from_millis(200);

/// QEMU; killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It is gone already where all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots `image` with `archive`, shows what the programs print, and adds their counts. The kernel's own words go to
/// `console`.
pub fn run(image: &Path, archive: &Path, console: &Path, job: &Job, counts: &mut Counts) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64");
    // KVM needs rights that not everybody has, and a host that isn't a virtual machine itself.
    qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY]);
    qemu.args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"]);
    qemu.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    qemu.arg("-kernel").arg(image).arg("-initrd").arg(archive);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
    let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut machine = Machine(child.with_context(|| format!("cannot run {}", cmd::show(&qemu)))?);
    let stdout = machine.0.stdout.take().context("QEMU has no standard output")?;
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if tell.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });

    let started = Instant::now();
    let mut progress = Progress::start(&format!("Linux {}", job.version));
    let mut ended = Vec::new();
    loop {
        cmd::check_interrupted()?;
        ensure!(started.elapsed() < TIMEOUT, "Linux {} didn't end within {} s", job.version, TIMEOUT.as_secs());
        let line = match told.recv_timeout(TICK) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                progress.tick();
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if let Some(release) = line.strip_prefix(BOOTED) {
            ensure!(release.starts_with(job.version), "Linux {release} was booted instead of {}", job.version);
            println!("Linux {release}, booted in {:.1} s", started.elapsed().as_secs_f64());
        } else if let Some(code) = line.strip_prefix(ENDED) {
            ended.push(code.to_owned());
        } else {
            println!("{line}");
            if let Some(more) = libtest::summary(&line) {
                *counts += more;
            }
        }
    }
    drop(progress);
    check(&ended, job, console)
}

/// Every program must have ended, and well.
fn check(ended: &[String], job: &Job, console: &Path) -> Result<()> {
    let mut failures = Vec::new();
    for (place, program) in job.programs.iter().enumerate() {
        let name = program.path.file_name().unwrap_or_default().to_string_lossy();
        let code = ended.iter().find_map(|line| line.strip_prefix(&format!("{place} ")));
        match code {
            Some("0") => {}
            Some(code) => failures.push(format!("{name} ended with {code}")),
            None => bail!("Linux {} ended before {name} did; it said:\n{}", job.version, cmd::tail_of(console)),
        }
    }
    ensure!(failures.is_empty(), "on Linux {}: {}", job.version, failures.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Program;

    fn checked(ended: &[&str]) -> String {
        let program = |path: &str| Program { path: path.into(), arguments: Vec::new() };
        let programs = [program("target/kernel-1"), program("target/netns-2")];
        let job = Job { version: "6.1", agent: Path::new("agent"), programs: &programs, environment: &[] };
        let ended: Vec<_> = ended.iter().map(|line| (*line).to_owned()).collect();
        match check(&ended, &job, Path::new("/nowhere")) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_program_that_failed_or_never_ended_is_a_failure() {
        assert_eq!(checked(&["0 0", "1 0"]), "");
        assert_eq!(checked(&["0 101", "1 0"]), "on Linux 6.1: kernel-1 ended with 101");
        assert!(checked(&["0 0"]).starts_with("Linux 6.1 ended before netns-2 did"));
        assert!(checked(&[]).starts_with("Linux 6.1 ended before kernel-1 did"));
    }
}
