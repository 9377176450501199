//! sg-agent's development commands: parses the command line and hands over to one module a command.

mod agent_image;
mod bench;
mod build;
mod cmd;
mod demo;
mod deps;
mod ebpf;
mod fuzz;
mod image;
mod kernel;
mod launched;
mod libtest;
mod moto;
mod run;
mod soak;
mod test;
mod ui;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the eBPF object and the agent (target/release/sg-agent)
    Build(build::Options),
    /// Set up, build, start Moto, and run the agent in the foreground
    Run(run::Options),
    /// Run the tests, all sets or some
    Test(test::Options),
    /// Build the agent's container image (sg-agent:VERSION), or that of launched instances (--instance)
    Image(agent_image::Options),
    /// Fuzz: the properties with millions of packets, and the libFuzzer targets
    Fuzz(fuzz::Options),
    /// Measure everything beside its peers, and write a report (target/bench)
    Bench(bench::Options),
    /// Test for as long as wanted: restarts and flips under load, or faults everywhere (--minutes; root)
    Soak(soak::Options),
    /// Play a session with the AWS CLI, Docker and SSH, and check every outcome
    Demo,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = cmd::install_signal_handlers().and_then(|()| match options.command {
        Command::Build(options) => build::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Image(options) => agent_image::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Demo => demo::run(),
    });
    match outcome {
        Ok(code) => code,
        Err(error) => {
            ui::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
