//! Programs onto the links of interfaces, and off those of interfaces that are gone. What can't be attached to is a
//! warning: the others are enforced all the same.

use std::collections::{BTreeMap, BTreeSet};

use nix::net::if_::if_indextoname;

use super::Applier;
use crate::discovery::Link;
use crate::model::Warning;
use crate::resolve::Desired;
use crate::sharing::Set;

impl Applier {
    pub(super) fn is_adopted(&self, ifindex: u32) -> bool {
        self.datapath.pins().is_some_and(|pins| pins.has_link(ifindex))
    }

    /// The links that an earlier agent's programs are on, as long as this one hasn't taken over, and the MAC addresses that
    /// it knew; none where its maps had another layout.
    pub fn earlier_links(&self) -> BTreeMap<Link, Option<[u8; 6]>> {
        let pins = self.datapath.pins().filter(|_| !self.started);
        let attached = pins.and_then(|pins| pins.attached().ok()).unwrap_or_default();
        let named = attached.into_iter().filter_map(|ifindex| {
            let name = if_indextoname(ifindex).ok()?.to_string_lossy().into_owned();
            let known = self.datapath.earlier().and_then(|earlier| earlier.interfaces.get(&ifindex));
            Some((Link { ifindex, name }, known.map(|known| known.mac)))
        });
        named.collect()
    }

    /// Interfaces at these links that are to be enforced and have no program of ours yet.
    pub(super) fn unhooked(&self, links: &BTreeSet<u32>, desired: &Desired) -> Vec<(u32, String)> {
        let unhooked = links.iter().filter(|ifindex| !self.hooks.contains_key(ifindex));
        unhooked.filter_map(|&ifindex| Some((ifindex, desired.interfaces.get(&ifindex)?.link.clone()))).collect()
    }

    pub(super) fn hook(&mut self, links: &[(u32, String)], warnings: &mut Set<Warning>) {
        for (ifindex, name) in links {
            match self.datapath.attach(*ifindex, name) {
                Ok(hook) => {
                    self.hooks.insert(*ifindex, hook);
                }
                Err(error) => {
                    let problem = format!("is NOT enforced: {error}");
                    warnings.insert(Warning { subject: name.clone(), problem });
                }
            }
        }
    }

    /// Takes programs off links that are no instance's any more.
    pub(super) fn unhook(&mut self, links: &BTreeSet<u32>, desired: &Desired, warnings: &mut Set<Warning>) {
        let gone = links.iter().copied().filter(|ifindex| !desired.interfaces.contains_key(ifindex));
        for ifindex in gone {
            if let Some(hook) = self.hooks.remove(&ifindex)
                && let Err(error) = hook.detach()
            {
                warnings.insert(cannot_detach(ifindex, &error));
            }
        }
    }

    /// The same for what an earlier agent left.
    pub(super) fn unhook_earlier(&self, desired: &Desired, warnings: &mut Set<Warning>) {
        let Some(pins) = self.datapath.pins() else { return };
        let left = pins.attached().unwrap_or_default();
        for ifindex in left.into_iter().filter(|ifindex| !desired.interfaces.contains_key(ifindex)) {
            if let Err(error) = pins.remove_link(ifindex) {
                warnings.insert(cannot_detach(ifindex, &error));
            }
        }
    }
}

fn cannot_detach(ifindex: u32, error: &std::io::Error) -> Warning {
    Warning { subject: format!("link {ifindex}"), problem: format!("cannot take the programs off: {error}") }
}
