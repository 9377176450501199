//! Published ports in the maps, and their programs on the links by which clients come. What is to be there is `early`'s.

use std::collections::{BTreeMap, BTreeSet};

use sg_common::abi::{self, PublishedKey, PublishedPort};

use super::space::Numbers;
use super::{Applier, ApplyError, check};
use crate::datapath::{DatapathError, Watch, Way, absent_is_fine};
use crate::discovery::{HostLink, Link};
use crate::model::Warning;
use crate::proxy;

/// A published port as programs are to judge it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judged {
    /// The link of the instance's interface; 0 while it has none.
    pub link: u32,
    /// What denied clients see.
    pub deny: proxy::Deny,
}

/// Where clients reach which published port, and how it is judged.
pub type Sockets = BTreeMap<PublishedKey, (proxy::Published, Judged)>;

/// What is in the maps and on links.
#[derive(Debug)]
pub(super) struct Published {
    written: BTreeMap<PublishedKey, PublishedPort>,
    numbers: BTreeMap<proxy::Published, u32>,
    free: Numbers,
    watches: BTreeMap<Link, Watch>,
}

impl Default for Published {
    fn default() -> Self {
        Self {
            written: BTreeMap::new(),
            numbers: BTreeMap::new(),
            free: Numbers::new(0..abi::MAX_PUBLISHED_PORTS),
            watches: BTreeMap::new(),
        }
    }
}

impl Applier {
    /// Writes where clients reach published ports, and removes what is no more.
    ///
    /// # Errors
    /// There are more than the map holds, or the kernel refuses: what isn't there is left to the proxy.
    pub fn publish(&mut self, sockets: &Sockets) -> Result<(), ApplyError> {
        check("addresses of published ports", sockets.len(), abi::MAX_PUBLISHED)?;
        let ports: BTreeSet<&proxy::Published> = sockets.values().map(|(port, _)| port).collect();
        check("published ports", ports.len(), abi::MAX_PUBLISHED_PORTS)?;
        let failed = |map| move |error| DatapathError::Write { map, error };
        self.unpublish(|key| !sockets.contains_key(key))?;
        let gone: Vec<_> = self.published.numbers.keys().filter(|port| !ports.contains(port)).cloned().collect();
        for port in gone {
            self.published.free.give(self.published.numbers.remove(&port).expect("a key of this map"));
        }
        for (key, (port, judged)) in sockets {
            let number = match self.published.numbers.get(port) {
                Some(&number) => number,
                None => {
                    let number = self.published.free.take().expect("as many numbers as were counted");
                    if let Err(error) = self.maps.forget_denied(number) {
                        self.published.free.give(number);
                        return Err(failed("DENIED")(error).into());
                    }
                    self.published.numbers.insert(port.clone(), number);
                    number
                }
            };
            let flags = if judged.deny == proxy::Deny::Reject { abi::REJECT } else { 0 };
            let entry = PublishedPort { link: judged.link, number, port: port.port, flags };
            if self.published.written.get(key) != Some(&entry) {
                self.maps.published.insert(key, entry, 0).map_err(failed("PUBLISHED"))?;
                self.published.written.insert(*key, entry);
            }
        }
        Ok(())
    }

    /// Leaves every client to the proxy, until [`Self::publish`]. Programs and counts stay: a network card may stop for a
    /// moment when it gets another program.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pause(&mut self) -> Result<(), ApplyError> {
        self.unpublish(|_| true)
    }

    fn unpublish(&mut self, is_gone: impl Fn(&PublishedKey) -> bool) -> Result<(), ApplyError> {
        let gone: Vec<_> = self.published.written.keys().filter(|key| is_gone(key)).copied().collect();
        for key in gone {
            let removed = absent_is_fine(self.maps.published.remove(&key));
            removed.map_err(|error| DatapathError::Write { map: "PUBLISHED", error })?;
            self.published.written.remove(&key);
        }
        Ok(())
    }

    /// Brings the programs of published ports to exactly these links. Where one can't be attached, the proxy alone
    /// judges who comes by it.
    pub fn watch(&mut self, links: &[HostLink]) -> Vec<Warning> {
        let wanted: BTreeSet<&Link> = links.iter().map(|host| &host.link).collect();
        self.published.watches.retain(|link, _| wanted.contains(link));
        let mut warnings = Vec::new();
        for host in links {
            if self.published.watches.contains_key(&host.link) {
                continue;
            }
            match self.watch_one(host) {
                Ok(watch) => {
                    self.published.watches.insert(host.link.clone(), watch);
                }
                Err(error) => {
                    let problem = format!("denied clients who come by it are reset after their handshake: {error}");
                    warnings.push(Warning { subject: host.link.name.clone(), problem });
                }
            }
        }
        warnings
    }

    fn watch_one(&mut self, host: &HostLink) -> Result<Watch, DatapathError> {
        let Link { ifindex, name } = &host.link;
        if host.is_hardware {
            match self.datapath.watch(*ifindex, name, Way::Driver) {
                Ok(watch) => {
                    tracing::debug!(link = %name, "published ports are watched in the driver");
                    return Ok(watch);
                }
                // Its driver can't, or another program is there.
                Err(error) => tracing::debug!(link = %name, %error, "no program in the driver; attaching by TC"),
            }
        }
        self.datapath.watch(*ifindex, name, Way::Tc)
    }

    /// Packets to a published port that programs have denied since it was published.
    pub fn denied(&self, port: &proxy::Published) -> u64 {
        let number = self.published.numbers.get(port);
        number.and_then(|&number| self.maps.denied(number).ok()).unwrap_or(0)
    }
}
