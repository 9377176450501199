//! Whether the programs still are where they were put, and putting them back. Whoever may load programs may also take
//! these off, so nothing prevents it; it is noticed and put right.

use std::fs;
use std::io;

use aya::programs::links::LinkError;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier};
use nix::errno::Errno;
use sg_common::abi::Direction;

use super::attach::{Attached, Hook, Point};
use super::filter::has_tcx;
use super::{CLOSED, Datapath, DatapathError, classifier, sys};

/// What was found wrong with a program on a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It isn't on the link any more: taken off, or another one in its place.
    Detached,
    /// Another program decides before it.
    Preceded,
    /// Its pin is gone, so that it would go with the agent.
    Unpinned,
}

impl Datapath {
    /// The first thing that is wrong with a link's programs. A link that is gone has nothing wrong: it will be heard of.
    ///
    /// # Errors
    /// The kernel's.
    pub fn check(&self, on: &Hook) -> Result<Option<(Direction, Fault)>, DatapathError> {
        for (attached, direction) in on.links.iter().zip([Direction::Ingress, Direction::Egress]) {
            let Attached::Link { pin, .. } = attached else { continue };
            let ours = self.ids[direction as usize];
            let ids = match sys::tcx_programs(on.ifindex, direction) {
                Ok(ids) => ids,
                Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => return Ok(None),
                Err(error) => return Err(DatapathError::Check(error)),
            };
            let fault = match ids.iter().position(|&id| id == ours) {
                None => Some(Fault::Detached),
                Some(0) if pin.as_ref().is_some_and(|pin| !pin.exists()) => Some(Fault::Unpinned),
                Some(0) => None,
                Some(_) => Some(Fault::Preceded),
            };
            if let Some(fault) = fault {
                return Ok(Some((direction, fault)));
            }
        }
        Ok(None)
    }

    /// Puts one thing right that [`Self::check`] found.
    ///
    /// # Errors
    /// [`DatapathError::Attach`]
    pub fn repair(
        &mut self,
        on: &mut Hook,
        name: &str,
        direction: Direction,
        fault: Fault,
    ) -> Result<(), DatapathError> {
        let failed = |error: io::Error| DatapathError::Attach { link: name.into(), error: error.into() };
        let place = direction as usize;
        if fault == Fault::Unpinned
            && let Attached::Link { link, pin: Some(pin) } = &on.links[place]
        {
            if let Some(directory) = pin.parent() {
                fs::create_dir_all(directory).map_err(failed)?;
            }
            let id = link.info().map_err(|error| failed(io::Error::other(error)))?.id();
            return sys::link_by_id(id).and_then(|link| sys::pin(link, pin)).map_err(failed);
        }
        if fault == Fault::Preceded {
            return self.put_first(on, name, direction);
        }
        on.links[place] = self.attach_one(on.ifindex, name, direction)?;
        Ok(())
    }

    /// The kernel has a program once only on each hook, and doesn't move it: so it is taken off and put on again,
    /// behind one that lets nothing through meanwhile.
    fn put_first(&mut self, on: &mut Hook, name: &str, direction: Direction) -> Result<(), DatapathError> {
        let failed =
            |error: Box<dyn std::error::Error + Send + Sync>| DatapathError::Attach { link: name.into(), error };
        let closed: &mut SchedClassifier = self
            .ebpf
            .program_mut(CLOSED)
            .and_then(|program| program.try_into().ok())
            .ok_or(DatapathError::Map(CLOSED))?;
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = closed
            .attach_with_options(name, Point::Instance(direction).hook(), first)
            .map_err(|error| failed(error.into()))?;
        let block = closed.take_link(id).map_err(|error| failed(error.into()))?;
        if let Attached::Link { link, .. } = &on.links[direction as usize] {
            let id = link.info().map_err(|error| failed(error.into()))?.id();
            sys::link_by_id(id).and_then(sys::detach).map_err(|error| failed(error.into()))?;
        }
        // The pinned link is severed, so this makes a new one.
        let attached = self.attach_one(on.ifindex, name, direction);
        match attached {
            Ok(attached) => {
                on.links[direction as usize] = attached;
                Ok(())
            }
            // The one that lets nothing through stays until the next check finds ours missing.
            Err(error) => {
                let link = block.try_into().map_err(|error: LinkError| failed(error.into()))?;
                on.links[direction as usize] = Attached::Link { link, pin: None };
                Err(error)
            }
        }
    }

    /// Before 6.6 there is no cheap way to ask for one filter: the filters of a link are replaced by themselves, which
    /// finds those that are gone. Whether any were.
    ///
    /// # Errors
    /// [`DatapathError::Attach`]
    pub fn renew_filters(&mut self, on: &mut Hook, name: &str) -> Result<bool, DatapathError> {
        if has_tcx() || nix::net::if_::if_indextoname(on.ifindex).is_err() {
            return Ok(false);
        }
        let mut was_missing = false;
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Attached::Filter(filter) = &on.links[direction as usize] {
                was_missing |= filter
                    .renew(classifier(&mut self.ebpf, direction)?, name)
                    .map_err(|error| DatapathError::Attach { link: name.into(), error })?;
            }
        }
        Ok(was_missing)
    }
}
