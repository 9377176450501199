//! An agent that stands still, so that nothing is noticed while something is done behind its back.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Agent, wait_for};

/// Keeps the agent from looking while something is taken apart, however that goes.
#[derive(Debug)]
pub struct Paused(Pid);

impl Paused {
    /// Stops an agent, until this is dropped.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn agent(agent: &Agent) -> Self {
        let agent = Pid::from_raw(i32::try_from(agent.pid()).expect("a pid"));
        kill(agent, Signal::SIGSTOP).expect("the agent runs");
        let paused = Self(agent);
        // A thread that is in the kernel stops when it comes back.
        let tasks = format!("/proc/{agent}/task");
        wait_for("the agent stands still", || {
            let mut threads = fs::read_dir(&tasks).expect("the agent's threads").flatten();
            threads.all(|thread| is_stopped(&thread.path())).then_some(())
        });
        paused
    }
}

/// Whether a thread, by its directory in /proc, is (proc_pid_stat(5): its state comes after its name in brackets).
fn is_stopped(thread: &Path) -> bool {
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}
