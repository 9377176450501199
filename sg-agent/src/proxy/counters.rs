//! What a published port counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::publish::Published;

/// One published port's counts. All but `active` only ever grow.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PortCounters {
    /// Whose port.
    pub instance: String,
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
    /// Connections that were let through but that the instance didn't take.
    pub failed: u64,
    /// Live connections that a change of the rules ended.
    pub cut: u64,
    /// Connections that are open now.
    pub active: u64,
    /// Bytes from clients to the instance.
    pub bytes_to_instance: u64,
    /// Bytes from the instance to clients.
    pub bytes_to_clients: u64,
}

/// The same while they are counted.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
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
    pub fn read(&self, published: &Published) -> PortCounters {
        PortCounters {
            instance: published.instance.to_string(),
            host_port: published.host_port,
            port: published.port,
            protocol: published.transport.name().into(),
            denied_early: 0,
            accepted: self.accepted.load(Relaxed),
            refused: self.refused.load(Relaxed),
            failed: self.failed.load(Relaxed),
            cut: self.cut.load(Relaxed),
            active: self.active.load(Relaxed),
            bytes_to_instance: self.bytes_to_instance.load(Relaxed),
            bytes_to_clients: self.bytes_to_clients.load(Relaxed),
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
