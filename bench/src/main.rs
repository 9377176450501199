//! sg-agent's measurements: one section a run, or several. Prints what it measured as JSON lines; `cargo xtask bench`
//! builds it, runs it as root and writes the report.

mod change;
mod early;
mod gateway;
mod gun;
mod load;
mod memory;
mod packet;
mod proxy;
mod record;
mod site;
mod traffic;
mod world;

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::{Parser, ValueEnum};
use nix::sched::{CloneFlags, unshare};

use record::Recorder;

#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// What to measure
    #[arg(value_enum, required = true)]
    sections: Vec<Section>,
    /// Fewer rounds and smaller sizes, for development
    #[arg(long)]
    quick: bool,
}

/// One part of what is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Section {
    /// One packet in the programs
    Packet,
    /// A change of rules or members, inside the agent
    Change,
    /// Bulk TCP between two containers
    Bulk,
    /// Connections between two containers
    Connections,
    /// Datagrams between two containers
    Small,
    /// The agent's memory and that of its maps
    Memory,
    /// Published ports
    Proxy,
    /// Denied clients of published ports
    Early,
    /// Changes through the gateway, and by polling
    Gateway,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match Recorder::new(options.quick).and_then(|recorder| run(&options, &recorder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, recorder: &Recorder) -> Result<()> {
    for section in &options.sections {
        match section {
            Section::Packet => packet::run(&recorder.section("packet"))?,
            Section::Change => change::run(&recorder.section("change"))?,
            Section::Bulk => traffic::bulk(&recorder.section("bulk"))?,
            Section::Connections => traffic::connections(&recorder.section("connections"))?,
            Section::Small => traffic::small(&recorder.section("small"))?,
            Section::Memory => memory::run(&recorder.section("memory"))?,
            Section::Proxy => proxy::run(&recorder.section("proxy"))?,
            Section::Early => early::run(&recorder.section("early"))?,
            Section::Gateway => gateway::run(&recorder.section("gateway"))?,
        }
        recorder.check()?;
    }
    Ok(())
}

/// Does something in a network namespace of its own, which goes with the thread.
fn isolated<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(anyhow!("a measurement panicked; its message is above")))
    })
}
