//! A published port: sg-agent's proxy beside others and beside none. All of them stand in one namespace before the same
//! container, and take turns.

mod stand;

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::load::{self, Server};
use crate::record::{Bound, Recorder, median, ratios};
use stand::{Kind, Stand};

/// One figure of every stand, round by round.
struct Figure {
    name: String,
    unit: &'static str,
    values: Vec<Vec<f64>>,
}

/// Measures everything.
///
/// # Errors
/// A connection that fails through a proxy that stands.
pub fn run(recorder: &Recorder) -> Result<()> {
    let stand = Stand::new(recorder)?;
    let time = Duration::from_millis(if recorder.quick { 300 } else { 1_000 });
    let kinds = stand.kinds();
    let mut figures: Vec<Figure> = Vec::new();
    for round in 0..=recorder.rounds(6) {
        for &kind in &kinds {
            recorder.check()?;
            for (name, unit, value) in
                round_of(&stand, kind, time, recorder.quick).with_context(|| kind.name().to_owned())?
            {
                let place = figures.iter().position(|figure| figure.name == name).unwrap_or_else(|| {
                    figures.push(Figure { name, unit, values: vec![Vec::new(); Kind::ALL.len()] });
                    figures.len() - 1
                });
                // The first round only warms up.
                if round > 0 {
                    figures[place].values[kind as usize].push(value);
                }
            }
        }
    }
    for figure in &figures {
        for &kind in &kinds {
            let values = &figure.values[kind as usize];
            if !values.is_empty() {
                recorder.sample(&figure.name, kind.name(), figure.unit, values);
            }
        }
    }
    targets(recorder, &figures);
    Ok(())
}

/// One kind's turn: connections by 1 and 8 clients, latency, bulk by 1 and 4 streams, and processor time for each.
fn round_of(stand: &Stand, kind: Kind, time: Duration, is_quick: bool) -> Result<Vec<(String, &'static str, f64)>> {
    let mut figures = Vec::new();
    let (echo, sink) = (stand.echo(kind), stand.sink(kind));
    // One that takes 10 ms a connection is measured as well by few.
    let count = if kind == Kind::AsksMoto { 20 } else { if is_quick { 100 } else { 500 } };
    for clients in [1, 8] {
        let before = stand.processor_time(kind);
        let rate = load::connections(stand.client(), echo, clients, time)?;
        figures.push((format!("connections a second, {clients} clients"), "1/s", rate));
        if let (8, Some(before), Some(after)) = (clients, before, stand.processor_time(kind)) {
            let each = (after - before) * 1e6 / (rate * time.as_secs_f64());
            figures.push(("processor time a connection".into(), "us", each));
        }
    }
    let mut latencies = load::latencies(stand.client(), echo, count)?;
    latencies.sort_by(f64::total_cmp);
    figures.push(("connect and first byte, median".into(), "us", median(&latencies)));
    figures.push(("connect and first byte, p99".into(), "us", latencies[(count * 99).div_ceil(100) - 1]));
    if kind == Kind::AsksMoto {
        return Ok(figures);
    }
    for streams in [1, 4] {
        let before = stand.processor_time(kind);
        let rate = bulk(stand, sink, streams, time)?;
        figures.push((format!("bulk, {streams} streams"), "Gbit/s", rate * 8.0 / 1e9));
        if let (4, Some(before), Some(after)) = (streams, before, stand.processor_time(kind)) {
            figures.push((
                "processor time a gigabyte".into(),
                "s",
                (after - before) / (rate * time.as_secs_f64() / 1e9),
            ));
        }
    }
    Ok(figures)
}

fn bulk(stand: &Stand, to: std::net::SocketAddr, streams: usize, time: Duration) -> Result<f64> {
    let server: &Server = stand.sink_server();
    load::bulk(stand.client(), to, server, streams, time)
}

fn targets(recorder: &Recorder, figures: &[Figure]) {
    let find = |name: &str, kind: Kind| {
        let found = figures.iter().find(|figure| figure.name == name);
        found.map(|figure| figure.values[kind as usize].clone()).unwrap_or_default()
    };
    let against = |name: &str, other: Kind, bound: Bound| {
        let (ours, others) = (find(name, Kind::Ours), find(name, other));
        if !others.is_empty() {
            recorder.target(&format!("{name}, sg-agent / {}", other.name()), &ratios(&ours, &others), bound);
        }
    };
    for name in ["connections a second, 1 clients", "connections a second, 8 clients"] {
        against(name, Kind::Nginx, Bound::AtLeast(1.0));
        against(name, Kind::Direct, Bound::AtLeast(0.5));
        against(name, Kind::AsksMoto, Bound::AtLeast(100.0));
    }
    against("connect and first byte, median", Kind::HaProxy, Bound::AtMost(1.0));
    against("connect and first byte, p99", Kind::HaProxy, Bound::AtMost(1.0));
    for name in ["bulk, 1 streams", "bulk, 4 streams"] {
        against(name, Kind::DockerProxy, Bound::AtLeast(1.0));
    }
    against("processor time a gigabyte", Kind::DockerProxy, Bound::AtMost(1.0));
    against("processor time a connection", Kind::Nginx, Bound::AtMost(1.0));
}
