//! What a published port counts.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::publish::Published;

/// One published port's counts. Those of what has happened only ever grow.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct PortCounters {
    /// Whose port.
    pub instance: String,
    /// The host's addresses at which it is published.
    pub addresses: Vec<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The instance's port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Packets that were denied before the proxy heard of them: a client that times out sends several.
    pub denied_early: u64,
    /// Connections that the rules let through.
    pub accepted: u64,
    /// Connections that they didn't, or whose instance isn't attached.
    pub refused: u64,
    /// Connections of trusted balancers that didn't say who their client is.
    pub unintroduced: u64,
    /// Connections that were let through but that the instance didn't take.
    pub failed: u64,
    /// Live connections that a change of the rules ended.
    pub cut: u64,
    /// Connections that are open now, or flows of datagrams.
    pub active: u64,
    /// How many there can be. Connections beyond that wait in the accept queue, datagrams of further clients are dropped.
    pub limit: u64,
    /// Bytes from clients to the instance.
    pub bytes_to_instance: u64,
    /// Bytes from the instance to clients.
    pub bytes_to_clients: u64,
    /// Connections let through in a second, over the last seconds.
    pub accepted_per_second: f64,
    /// The same of those that weren't.
    pub refused_per_second: f64,
    /// The same of bytes, both ways.
    pub bytes_per_second: f64,
}

/// How fast counts grow, from one look at them to the next.
#[derive(Debug)]
pub(super) struct Rates {
    looked: Instant,
    /// Accepted, refused, bytes.
    seen: [u64; 3],
    per_second: [f64; 3],
}

impl Default for Rates {
    fn default() -> Self {
        Self { looked: Instant::now(), seen: [0; 3], per_second: [0.0; 3] }
    }
}

impl Rates {
    /// Takes the counts at `now` for the end of one stretch of time and the beginning of the next.
    pub fn look(&mut self, counts: &Counts, now: Instant) {
        let bytes = counts.bytes_to_instance.load(Relaxed) + counts.bytes_to_clients.load(Relaxed);
        let seen = [counts.accepted.load(Relaxed), counts.refused.load(Relaxed), bytes];
        let seconds = now.duration_since(self.looked).as_secs_f64();
        if seconds > 0.0 {
            for ((rate, seen), last) in self.per_second.iter_mut().zip(seen).zip(self.seen) {
                *rate = seen.saturating_sub(last) as f64 / seconds;
            }
            (self.looked, self.seen) = (now, seen);
        }
    }

    /// Adds them to what was counted.
    pub fn add_to(&self, counters: PortCounters) -> PortCounters {
        let [accepted_per_second, refused_per_second, bytes_per_second] = self.per_second;
        PortCounters { accepted_per_second, refused_per_second, bytes_per_second, ..counters }
    }
}

/// The same while they are counted.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub unintroduced: AtomicU64,
    pub failed: AtomicU64,
    pub cut: AtomicU64,
    active: AtomicU64,
    pub bytes_to_instance: AtomicU64,
    pub bytes_to_clients: AtomicU64,
}

impl Counts {
    /// Counts a connection as active for as long as the guard lives.
    pub fn activate(&self) -> Active<'_> {
        self.active.fetch_add(1, Relaxed);
        Active(self)
    }

    /// The counts now.
    pub fn read(&self, published: &Published, limit: u64) -> PortCounters {
        PortCounters {
            instance: published.instance.to_string(),
            addresses: published.bind.clone(),
            host_port: published.host_port,
            port: published.port,
            protocol: published.transport.name().into(),
            denied_early: 0,
            accepted: self.accepted.load(Relaxed),
            refused: self.refused.load(Relaxed),
            unintroduced: self.unintroduced.load(Relaxed),
            failed: self.failed.load(Relaxed),
            cut: self.cut.load(Relaxed),
            active: self.active.load(Relaxed),
            limit,
            bytes_to_instance: self.bytes_to_instance.load(Relaxed),
            bytes_to_clients: self.bytes_to_clients.load(Relaxed),
            accepted_per_second: 0.0,
            refused_per_second: 0.0,
            bytes_per_second: 0.0,
        }
    }
}

/// An open connection.
pub(super) struct Active<'a>(&'a Counts);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (counts, mut rates) = (Counts::default(), Rates::default());
        let begin = rates.looked;
        counts.accepted.store(10, Relaxed);
        counts.bytes_to_clients.store(4_000, Relaxed);
        rates.look(&counts, begin + Duration::from_secs(4));
        assert_eq!(rates.per_second, [2.5, 0.0, 1_000.0]);
        counts.refused.store(3, Relaxed);
        rates.look(&counts, begin + Duration::from_secs(5));
        assert_eq!(rates.per_second, [0.0, 3.0, 0.0]);
    }
}
