//! d
use clap::Args;
/// o
#[derive(Args)]
pub struct Options {}
pub fn run(_: &Options) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("x")
}
