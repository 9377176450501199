//! Real traffic between two containers on a bridge, beside the kernel's other filters: bulk, connections, datagrams.
//! Every round goes through all of them in turn, so what drifts in the machine cancels in their ratios.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::load::{self, Datagrams, Server, Service};
use crate::record::{Bound, Recorder, ratios};
use crate::site::{DENIED, Filter, PORT, Site};

/// Rules of a large policy.
const MANY: usize = 1_000;
/// Datagrams that are timed at once: a millisecond or two, mostly undisturbed.
const BURST: u32 = 2_000;

/// The sites that can be had here; for the others a note says why not.
fn sites(recorder: &Recorder, filters: &[Filter]) -> Result<Vec<Site>> {
    let mut sites = Vec::new();
    for &filter in filters {
        recorder.check()?;
        match Site::new(filter) {
            Ok(site) => sites.push(site),
            Err(error) if matches!(filter, Filter::None | Filter::Ours(_)) => {
                return Err(error).with_context(|| filter.name());
            }
            Err(error) => recorder.note(&format!("without {}: {error:#}", filter.name())),
        }
    }
    Ok(sites)
}

/// Runs `measure` in every site, round by round; the values of each, and those of the filter with which they are
/// compared.
fn alternate(
    recorder: &Recorder,
    (figure, unit): (&str, &str),
    sites: &[Site],
    mut measure: impl FnMut(usize, &Site) -> Result<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut values = vec![Vec::new(); sites.len()];
    for round in 0..=recorder.rounds(8) {
        for (number, site) in sites.iter().enumerate() {
            recorder.check()?;
            let value = measure(number, site).with_context(|| format!("{figure}, {}", site.filter.name()))?;
            // The first round only warms up.
            if round > 0 {
                values[number].push(value);
            }
        }
    }
    for (site, values) in sites.iter().zip(&values) {
        recorder.sample(figure, &site.filter.name(), unit, values);
    }
    Ok(values)
}

fn of<'a>(sites: &[Site], values: &'a [Vec<f64>], filter: Filter) -> Option<&'a [f64]> {
    sites.iter().position(|site| site.filter == filter).map(|place| values[place].as_slice())
}

/// One TCP stream from container to container, in bulk.
///
/// # Errors
/// A stream that breaks.
pub fn bulk(recorder: &Recorder) -> Result<()> {
    let time = Duration::from_millis(if recorder.quick { 300 } else { 1_000 });
    for (figure, is_offloaded, least) in [("with offload", true, 0.95), ("without offload", false, 0.90)] {
        let filters = [Filter::None, Filter::Ours(60), Filter::Null, Filter::Nft(60), Filter::Iptables(60)];
        let sites = sites(recorder, &filters)?;
        let mut servers = Vec::new();
        for site in &sites {
            if !is_offloaded {
                site.segment_by_hand()?;
            }
            servers.push(Server::start(site.server(), site.allowed(), Service::Sink)?);
        }
        let values = alternate(recorder, (figure, "Gbit/s"), &sites, |number, site| {
            Ok(load::bulk(site.client(), site.allowed(), &servers[number], 1, time)? * 8.0 / 1e9)
        })?;
        against_none(recorder, &sites, &values, figure, Filter::Ours(60), least);
    }
    Ok(())
}

fn against_none(recorder: &Recorder, sites: &[Site], values: &[Vec<f64>], figure: &str, ours: Filter, least: f64) {
    let Some(none) = of(sites, values, Filter::None) else { return };
    for (site, values) in sites.iter().zip(values) {
        if site.filter != Filter::None {
            recorder.sample(&format!("{figure}, beside no filter"), &site.filter.name(), "x", &ratios(values, none));
        }
    }
    if let Some(ours) = of(sites, values, ours) {
        recorder.target(&format!("{figure}, sg-agent / no filter"), &ratios(ours, none), Bound::AtLeast(least));
    }
}

/// Connections from container to container.
///
/// # Errors
/// A connection that fails.
pub fn connections(recorder: &Recorder) -> Result<()> {
    let time = Duration::from_millis(if recorder.quick { 300 } else { 1_000 });
    let filters = [
        Filter::None,
        Filter::Ours(1),
        Filter::Ours(MANY),
        Filter::Null,
        Filter::Nft(MANY),
        Filter::NftSet(MANY),
        Filter::Iptables(MANY),
    ];
    let sites = sites(recorder, &filters)?;
    let mut servers = Vec::new();
    for site in &sites {
        servers.push(Server::start(site.server(), site.allowed(), Service::Echo)?);
    }
    let figure = "connections a second";
    let values = alternate(recorder, (figure, "1/s"), &sites, |_, site| {
        load::connections(site.client(), site.allowed(), 4, time)
    })?;
    drop(servers);
    against_none(recorder, &sites, &values, figure, Filter::Ours(MANY), 0.90);
    if let (Some(many), Some(one)) = (of(&sites, &values, Filter::Ours(MANY)), of(&sites, &values, Filter::Ours(1))) {
        let what = format!("{figure}, sg-agent at {MANY} rules / at 1 rule");
        recorder.target(&what, &ratios(many, one), Bound::AtLeast(0.95));
    }
    Ok(())
}

/// Datagrams from container to container, in processor time.
///
/// # Errors
/// Datagrams that don't arrive.
pub fn small(recorder: &Recorder) -> Result<()> {
    established(recorder)?;
    denied(recorder)
}

fn established(recorder: &Recorder) -> Result<()> {
    let filters = [Filter::None, Filter::Ours(60), Filter::Null, Filter::Nft(60), Filter::Iptables(60)];
    let sites = sites(recorder, &filters)?;
    let mut senders = Vec::new();
    for site in &sites {
        senders.push(Datagrams::new(site.client(), site.server(), site.address(), PORT, true)?);
    }
    let values =
        alternate(recorder, ("established datagram", "ns"), &sites, |number, _| best_of(recorder, &senders[number]))?;
    let Some(none) = of(&sites, &values, Filter::None) else { return Ok(()) };
    let added = |filter| -> Option<Vec<f64>> {
        Some(of(&sites, &values, filter)?.iter().zip(none).map(|(with, without)| with - without).collect())
    };
    for filter in filters {
        if let Some(added) = added(filter).filter(|_| filter != Filter::None) {
            recorder.sample("added to an established datagram", &filter.name(), "ns", &added);
        }
    }
    for other in [Filter::Nft(60), Filter::Iptables(60)] {
        if let (Some(ours), Some(others)) = (added(Filter::Ours(60)), added(other)) {
            let what = format!("added to an established datagram, sg-agent / {}", other.name());
            recorder.target(&what, &ratios(&ours, &others), Bound::AtMost(0.2));
        }
    }
    Ok(())
}

fn denied(recorder: &Recorder) -> Result<()> {
    let sites = sites(recorder, &[Filter::Ours(60), Filter::TcxDrop, Filter::IptablesDrop])?;
    let mut senders = Vec::new();
    for site in &sites {
        senders.push(Datagrams::new(site.client(), site.server(), site.address(), DENIED, false)?);
    }
    let values =
        alternate(recorder, ("denied datagram", "ns"), &sites, |number, _| best_of(recorder, &senders[number]))?;
    for (other, most) in [(Filter::TcxDrop, 1.1), (Filter::IptablesDrop, 0.8)] {
        if let (Some(ours), Some(others)) = (of(&sites, &values, Filter::Ours(60)), of(&sites, &values, other)) {
            let what = format!("denied datagram, sg-agent / {}", other.name());
            recorder.target(&what, &ratios(ours, others), Bound::AtMost(most));
        }
    }
    Ok(())
}

/// The least of several bursts: what else runs on the machine only ever adds.
fn best_of(recorder: &Recorder, sender: &Datagrams) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..if recorder.quick { 5 } else { 20 } {
        best = best.min(sender.send(BURST)?);
    }
    Ok(best)
}
