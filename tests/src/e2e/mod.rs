//! End to end: the agent as its users start it, on namespaces or containers, judged by what gets through. Owns the
//! machinery, all of which goes away when its guards are dropped; the tests are elsewhere.

mod agent;
mod docker;
mod endpoint;
mod engine;
mod frames;
mod lab;
mod moto;
mod namespace;
mod paused;
mod probe;
mod rules;
pub mod seams;
mod server;
mod socket;
mod ssh;
mod sweep;
mod world;

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub use agent::{Agent, another_layout, binary, said};
pub use docker::{Container, Docker, IDLE, Image, Launched, Network, docker, import};
pub use endpoint::Endpoint;
pub use engine::{Engine, forward};
pub use frames::{FrameSocket, arp_reply, fill_checksums, offloaded_datagram, send_frame, send_offloaded};
pub use lab::{Lab, LabBuilder};
pub use moto::{Moto, element};
pub use namespace::{Namespace, ends_with_this_thread};
pub use paused::Paused;
pub use probe::{Attempt, PATIENCE, SILENCE, Stream};
pub use rules::Rules;
pub use server::Server;
pub use socket::{DockerSocket, Manner, engine};
pub use ssh::ssh;
pub use world::{Instance, World};

/// Looks again and again until `seen` gives something.
///
/// # Panics
/// With `what`, when that takes longer than [`PATIENCE`].
#[track_caller]
pub fn wait_for<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = seen() {
            return found;
        }
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command that has to succeed; its standard output.
///
/// # Panics
/// With what it said, when it fails.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Runs a command to its end.
///
/// # Panics
/// When it can't be run at all.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// Whether the tests may run: only root may make namespaces. Without root they fail, as a test that can't run mustn't
/// pass for one that did.
///
/// # Panics
/// Without root.
#[track_caller]
pub fn need_root() {
    assert!(nix::unistd::Uid::effective().is_root(), "needs root for network namespaces and eBPF; run it as root");
}

/// A port of this machine's that nobody has, and that nobody is given: from below those of outgoing connections (32768
/// to 60999, `ip_local_port_range`), one of which could have it by the time that its user comes.
///
/// # Panics
/// When all are taken.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u16> = 20_000..30_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut candidates = (0..PORTS.len()).map(|_| {
        // Programs that run at the same time begin at different ones.
        let number = std::process::id() * 100 + NEXT.fetch_add(1, Ordering::Relaxed);
        PORTS.start + (number % PORTS.len() as u32) as u16
    });
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    candidates.find(is_free).expect("a port that nobody has")
}

/// A name that no other test has, at this time or later: `sgt-PID-NUMBER`. `sweep` finds what a killed run left by it.
pub fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    sweep::once();
    format!("sgt-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
