//! `--log-drops`: the programs' own log lines, with the reasons' names.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use sg_common::verdict::Drop;
use tokio::io::unix::AsyncFd;

/// The level at which the programs log drops; below it the verifier removes the code.
pub const LEVEL: u8 = aya_log::Level::Debug as u8;

/// Passes the programs' lines on to the agent's log until the runtime ends.
pub fn follow(ebpf: &mut Ebpf) -> anyhow::Result<()> {
    let logger = EbpfLogger::init_with_logger(ebpf, Names)?;
    // SAFETY: the logger owns its ring buffer's descriptor for as long as it lives, and always gives the same one.
    let mut logger = unsafe { AsyncFd::register(logger) }?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}

/// Writes a reason's name where the program wrote its number.
struct Names;

impl Log for Names {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        tracing::info!("{}", named(&record.args().to_string()));
    }

    fn flush(&self) {}
}

fn named(line: &str) -> String {
    let parts = line.rsplit_once("reason ");
    let name = parts.and_then(|(_, number)| Drop::from_number(number.trim().parse().ok()?)).map(Drop::name);
    match (parts, name) {
        (Some((head, _)), Some(name)) => format!("{head}{name}"),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named() {
        assert_eq!(named("link 7 ingress dropped: reason 32"), "link 7 ingress dropped: no_rule");
        assert_eq!(named("link 7 ingress dropped: reason 250"), "link 7 ingress dropped: reason 250");
    }
}
