//! `cargo xtask bench`: builds the measurements and what they are held against, runs them as root, and writes the report.
//! What is measured, and how, is the crate `bench`'s.

mod peers;
mod plot;
mod report;
mod runner;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::deps::{self, python::Venv};
use crate::{cmd, ui, workspace};
use report::Report;
use runner::Build;

/// How often the two builds of `--vs` take turns in each section.
const TURNS: usize = 3;

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// A minute's worth: fewer rounds, smaller sizes
    #[arg(long)]
    quick: bool,
    /// Compare with this revision of the repository: both are built, and take turns
    #[arg(long, value_name = "REV")]
    vs: Option<String>,
    /// Measure this section only (may be repeated)
    #[arg(long, value_enum, value_name = "SECTION")]
    only: Vec<Section>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Put the figures of a whole run into docs/performance.md
    #[arg(long, conflicts_with_all = ["quick", "vs", "only"])]
    docs: bool,
}

/// A part of what is measured, as the binary of the crate `bench` names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Section {
    /// One packet in the programs (BPF_PROG_TEST_RUN)
    Packet,
    /// A change of rules or members, inside the agent
    Change,
    /// Bulk TCP between two containers, beside nft and iptables
    Bulk,
    /// Connections a second between two containers
    Connections,
    /// Datagrams between two containers, in processor time
    Small,
    /// The agent's memory and that of its maps
    Memory,
    /// Published ports, beside docker-proxy, HAProxy, nginx and a proxy that asks Moto
    Proxy,
    /// Denied clients of a published port, beside nft and iptables
    Early,
    /// Changes at a real Moto, through the gateway and by polling
    Gateway,
}

impl Section {
    /// Its name on command lines.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Sets up, builds, measures, writes.
pub fn run(options: &Options) -> Result<ExitCode> {
    let sections = if options.only.is_empty() { Section::value_variants() } else { &options.only };
    cmd::ensure_root("to load eBPF programs and to make network namespaces")?;
    let environment = set_up(sections)?;
    let mut builds = vec![Build::here()?];
    if let Some(revision) = &options.vs {
        builds.push(Build::of(revision)?);
    }
    let mut report = Report::new(&builds, options.quick)?;
    let started = Instant::now();
    let mut failed: Vec<String> = Vec::new();
    let turns = if builds.len() > 1 { TURNS } else { 1 };
    for section in sections {
        for turn in 0..turns {
            for (number, build) in builds.iter().enumerate() {
                let of = if builds.len() > 1 {
                    format!(" of {}, turn {} of {turns}", build.name, turn + 1)
                } else {
                    String::new()
                };
                ui::step(&format!("measuring {}{of}", section.name()));
                let lines = build.measure(*section, options.quick, &environment);
                cmd::check_interrupted()?;
                match lines {
                    Ok(Some(lines)) => report.add(number, lines),
                    Ok(None) => ui::warn(&format!("{} has no section {} yet", build.name, section.name())),
                    // What else is measured is worth having all the same.
                    Err(error) => {
                        ui::warn(&format!("section {} of {}: {error:#}", section.name(), build.name));
                        failed.push(section.name());
                    }
                }
            }
        }
    }
    report.took(started.elapsed());
    let directory = workspace::target().join("bench");
    report.write(&directory)?;
    if options.docs && failed.is_empty() {
        report.publish(&workspace::root().join("docs"))?;
    }
    if options.json {
        println!("{}", report.json()?);
    } else {
        println!("{}", report.summary());
    }
    ui::note(&format!("the report is in {}: report.md, report.json, plots.svg", directory.display()));
    ensure!(failed.is_empty(), "not all was measured; failed: {}", failed.join(", "));
    Ok(ExitCode::SUCCESS)
}

/// What sections need beside what is built; the environment for them.
fn set_up(sections: &[Section]) -> Result<Vec<(&'static str, PathBuf)>> {
    const WHY: &str = "sg-agent is measured beside it";
    let mut tools = vec![deps::IP];
    let is_traffic = |section: &Section| matches!(section, Section::Bulk | Section::Connections | Section::Small);
    if sections.iter().any(|section| is_traffic(section) || *section == Section::Early) {
        tools.extend([deps::tool("nft", "nftables", WHY), deps::tool("iptables-legacy", "iptables", WHY)]);
    }
    if sections.iter().any(is_traffic) {
        tools.push(deps::tool("ethtool", "ethtool", "containers are measured without segmentation offload, too"));
    }
    deps::ensure_tools(&tools)?;
    deps::ensure_bpffs()?;
    let mut environment = Vec::new();
    if sections.contains(&Section::Proxy) {
        environment.push(("SG_BENCH_PEERS", peers::ensure()?));
    }
    if sections.contains(&Section::Proxy) || sections.contains(&Section::Gateway) {
        environment.push(("SG_MOTO_PYTHON", Venv::ensure()?.python()));
    }
    Ok(environment)
}
