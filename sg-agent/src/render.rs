//! Answers as text for people. Names that come from elsewhere are escaped, so that none can steer a terminal.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};

use comfy_table::{ContentArrangement, Table, presets};
use sg_common::abi::Direction;

use crate::datapath::DetachReport;
use crate::explain::Explanation;
use crate::status::{Counter, InterfaceStatus, PublishedPort, Status};

/// `sg-agent status`.
pub fn status(status: &Status) -> String {
    let paint = Paint::of_stdout();
    let mut text = String::new();
    let state = if status.enforced { paint.good("enforced") } else { paint.bad("NOT enforced") };
    let _ =
        writeln!(text, "sg-agent {} (pid {}): {state}, generation {}", status.version, status.pid, status.generation);
    for problem in &status.problems {
        let _ = writeln!(text, "  {} {}", paint.bad("problem:"), clean(problem));
    }
    for source in &status.sources {
        let age = source.age_seconds.map_or("never read".into(), |age| format!("read {age:.1} s ago"));
        let _ = writeln!(
            text,
            "rules from {} ({}/{}), {age}",
            clean(&source.source),
            clean(&source.account),
            clean(&source.region)
        );
    }
    if let Some(gateway) = &status.gateway {
        let _ = writeln!(
            text,
            "gateway at http://{} to {}: {} requests, {} changes: {} enforced when answered, {} late, {} failed",
            gateway.address,
            clean(&gateway.endpoint),
            gateway.requests,
            gateway.changes,
            gateway.committed,
            gateway.late,
            gateway.failed
        );
    }
    text.push('\n');
    text += &interfaces(&status.interfaces);
    if !status.published.is_empty() {
        let mut table =
            table(&["HOST PORT", "INSTANCE", "PORT", "ACCEPTED", "REFUSED", "DENIED EARLY", "FAILED", "ACTIVE"]);
        for port in &status.published {
            table.add_row([
                port.host_port.to_string(),
                clean(&port.instance),
                if port.protocol == "udp" { format!("{}/udp", port.port) } else { port.port.to_string() },
                port.accepted.to_string(),
                port.refused.to_string(),
                port.denied_early.to_string(),
                port.failed.to_string(),
                port.active.to_string(),
            ]);
        }
        let _ = write!(text, "\n{table}\n");
    }
    for warning in &status.warnings {
        let _ = writeln!(text, "{} {}: {}", paint.warn("warning:"), clean(&warning.subject), clean(&warning.problem));
    }
    text.truncate(text.trim_end().len());
    text
}

/// `sg-agent ports`.
pub fn ports(ports: &[PublishedPort]) -> String {
    if ports.is_empty() {
        return "no port is published".into();
    }
    let mut table = table(&["INSTANCE", "PORT", "HOST PORT"]);
    for port in ports {
        table.add_row([clean(&port.instance), port.port.to_string(), port.host_port.to_string()]);
    }
    table.to_string()
}

fn interfaces(interfaces: &[InterfaceStatus]) -> String {
    if interfaces.is_empty() {
        return "no instance is attached: start a container with the label dev.sg-agent.instance-id=<id>, or use --attach\n"
            .into();
    }
    let mut table =
        table(&["INSTANCE", "LINK", "ADDRESS", "GROUPS", "RULES IN/OUT", "POLICY", "PASSED IN/OUT", "DROPPED IN/OUT"]);
    for interface in interfaces {
        let policy = match interface.policy.as_str() {
            "unknown" => "unknown: all denied".into(),
            "no_group" => "no group: all allowed".into(),
            _ => format!("{} (epoch {})", interface.policy_number, interface.epoch),
        };
        let link = if interface.attached {
            clean(&interface.link)
        } else {
            format!("{} (NOT attached)", clean(&interface.link))
        };
        let (passed_in, dropped_in) = totals(interface, Direction::Ingress);
        let (passed_out, dropped_out) = totals(interface, Direction::Egress);
        table.add_row([
            clean(&interface.instance),
            link,
            interface.addresses.first().cloned().unwrap_or_default(),
            interface.groups.iter().map(|group| clean(group)).collect::<Vec<_>>().join("\n"),
            format!("{}/{}", interface.ingress_rules, interface.egress_rules),
            policy,
            format!("{passed_in}/{passed_out}"),
            format!("{dropped_in}/{dropped_out}"),
        ]);
    }
    let mut text = format!("{table}\n");
    for interface in interfaces {
        for (direction, reasons) in &interface.counters {
            for (reason, Counter { packets, bytes }) in reasons {
                let instance = clean(&interface.instance);
                let _ = writeln!(text, "  {instance} {direction} {reason}: {packets} packets, {bytes} bytes");
            }
        }
    }
    text
}

/// Packets that passed, and that were dropped.
fn totals(interface: &InterfaceStatus, direction: Direction) -> (u64, u64) {
    let is_drop = |reason: &str| sg_common::verdict::Drop::ALL.iter().any(|drop| drop.name() == reason);
    let mut totals = (0, 0);
    for (reason, count) in interface.counters.get(direction.name()).into_iter().flatten() {
        if is_drop(reason) {
            totals.1 += count.packets;
        } else {
            totals.0 += count.packets;
        }
    }
    totals
}

/// `sg-agent explain`.
pub fn explanation(explanation: &Explanation) -> String {
    let paint = Paint::of_stdout();
    let mut text = if explanation.allowed { paint.good("ALLOWED") } else { paint.bad("DENIED") };
    for gate in &explanation.gates {
        let _ = write!(text, "\n  {}", clean(&gate.text));
        match gate.kernel {
            Some(true) => text += "; the kernel lets it pass",
            Some(false) => text += "; the kernel drops it",
            None => {}
        }
    }
    text
}

/// `sg-agent detach`.
pub fn detached(report: &DetachReport) -> String {
    let mut text = match (report.links, report.maps) {
        (0, 0) => "nothing was attached".to_owned(),
        (links, maps) => format!("detached: {links} programs taken off links, {maps} maps removed"),
    };
    if report.gate {
        text.push_str(", bridges opened to new ports");
    }
    for error in &report.errors {
        let _ = write!(text, "\nerror: {}", clean(error));
    }
    text
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(header);
    table
}

/// A value as JSON. What steers a terminal is escaped in it too, beyond what JSON asks for (all below U+0020).
///
/// # Errors
/// Those of the value's own `Serialize`.
pub fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string_pretty(value)?;
    let is_steering = |char: &char| char.is_control() && *char != '\n';
    Ok(text.chars().fold(String::with_capacity(text.len()), |mut safe, char| {
        match Some(char).filter(is_steering) {
            Some(char) => safe += &format!("\\u{:04x}", u32::from(char)),
            None => safe.push(char),
        }
        safe
    }))
}

/// A text without control characters.
pub fn clean(text: &str) -> String {
    text.chars().flat_map(|char| if char.is_control() { char.escape_default().collect() } else { vec![char] }).collect()
}

/// Standard error for the log: what is written at once is one line, whatever names are in it. Escape characters are the
/// log's own colours; those in messages it has made visible already.
pub fn one_line_each() -> impl io::Write {
    OneLine(io::stderr())
}

struct OneLine<W>(W);

impl<W: io::Write> io::Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let is_steering = |char: char| char.is_control() && char != '\u{1b}';
        let clean =
            line.chars().flat_map(|char| if is_steering(char) { char.escape_default().collect() } else { vec![char] });
        let end = if line.len() < text.len() { "\n" } else { "" };
        self.0.write_all(format!("{}{end}", clean.collect::<String>()).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Colours for terminals, unless NO_COLOR is set.
struct Paint(bool);

impl Paint {
    fn of_stdout() -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self(std::io::stdout().is_terminal() && !no_color)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn good(&self, text: &str) -> String {
        self.paint("32", text)
    }

    fn bad(&self, text: &str) -> String {
        self.paint("31;1", text)
    }

    fn warn(&self, text: &str) -> String {
        self.paint("33", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_a_terminal() {
        assert_eq!(clean("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }

    #[test]
    fn a_name_cannot_begin_a_line_of_the_log() {
        use std::io::Write as _;
        let mut log = OneLine(Vec::new());
        log.write_all(b"WARN \x1b[33msg-1\r\nINFO all is well\x1b[0m\n").unwrap();
        assert_eq!(log.0, b"WARN \x1b[33msg-1\\r\\nINFO all is well\x1b[0m\n");
    }
}
