//! `--log-drops`: the programs' own log lines, with the links' and the reasons' names.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use nix::net::if_::if_indextoname;
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

/// Writes names where the program wrote a link's index and a reason's number.
struct Names;

impl Log for Names {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        tracing::info!("{}", named(&record.args().to_string(), link));
    }

    fn flush(&self) {}
}

/// A link's name, while there is one; links of containers that were removed just now have none.
fn link(ifindex: u32) -> Option<String> {
    let name = if_indextoname(ifindex).ok()?;
    Some(name.to_string_lossy().escape_default().to_string())
}

/// A line that is none of ours, or has numbers without names, stays as it is.
fn named(line: &str, link: impl Fn(u32) -> Option<String>) -> String {
    let Some((head, reason)) = line.rsplit_once("reason ") else { return line.to_owned() };
    let name = reason.trim().parse().ok().and_then(Drop::from_number).map(Drop::name);
    let reason = name.map_or_else(|| format!("reason {reason}"), str::to_owned);
    let index = head.strip_prefix("link ").and_then(|rest| rest.split_once(' '));
    match index.and_then(|(index, rest)| Some((link(index.parse().ok()?)?, rest))) {
        Some((link, rest)) => format!("link {link} {rest}{reason}"),
        None => format!("{head}{reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_reasons_are_named() {
        let named = |line| named(line, |index| (index == 7).then(|| "veth7".to_owned()));
        assert_eq!(named("link 7 ingress dropped: reason 32"), "link veth7 ingress dropped: no_rule");
        assert_eq!(named("link 7 ingress dropped: reason 250"), "link veth7 ingress dropped: reason 250");
        assert_eq!(named("link 8 egress dropped: reason 32"), "link 8 egress dropped: no_rule", "it is gone");
        assert_eq!(named("something else"), "something else");
    }
}
