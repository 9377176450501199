//! Shows what discovery finds, as JSON: `discover [--watch] [--no-docker] [ATTACH_SPEC]...`. With `--watch`, again
//! whenever something may have changed.

use anyhow::Context;
use sg_agent::discovery::{Options, scan, watch};
use tokio::sync::mpsc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut options = Options::default();
    let mut again = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--watch" => again = true,
            "--no-docker" => options.docker = false,
            spec => options.attach.push(spec.parse()?),
        }
    }
    let show = async || -> anyhow::Result<()> {
        println!("{}", serde_json::to_string_pretty(&scan(&options).await?).context("can't print the result")?);
        Ok(())
    };
    if !again {
        return show().await;
    }
    let (tx, mut rx) = mpsc::channel(1);
    let watched = options.clone();
    let watcher = tokio::spawn(async move { watch(&watched, tx).await });
    while rx.recv().await.is_some() {
        let _ = show().await.inspect_err(|error| eprintln!("{error:#}"));
    }
    Ok(watcher.await??)
}
