//! Programs onto links, and off them.

use std::path::PathBuf;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, TcAttachType};
use sg_common::abi::Direction;

use super::filter::{Filter, has_tcx};
use super::pins::remove;
use super::{Datapath, DatapathError};

/// Where on a link a program sits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Point {
    /// An instance's host-side link.
    Instance(Direction),
    /// A link by which clients of published ports come.
    Published,
}

impl Point {
    pub(super) const ALL: [Self; 3] =
        [Self::Instance(Direction::Ingress), Self::Instance(Direction::Egress), Self::Published];

    /// What leaves the host by the link arrives at the instance.
    pub(super) fn hook(self) -> TcAttachType {
        match self {
            Self::Instance(Direction::Ingress) => TcAttachType::Egress,
            Self::Instance(Direction::Egress) | Self::Published => TcAttachType::Ingress,
        }
    }
}

/// Both programs on one host-side link.
#[derive(Debug)]
pub struct Hook {
    /// The link's index.
    pub ifindex: u32,
    /// By direction. Held so that what isn't pinned stays attached.
    pub(super) links: Vec<Attached>,
}

#[derive(Debug)]
pub(super) enum Attached {
    /// A TCX link. Where it isn't pinned, it goes with this value.
    Link {
        /// The link.
        link: FdLink,
        /// Its pin.
        pin: Option<PathBuf>,
    },
    /// Kernels before 6.6. Pinned or held.
    Filter(Filter),
}

impl Datapath {
    /// Attaches both programs to a link, before every other program there. Where an earlier agent's are attached,
    /// each is replaced atomically.
    ///
    /// # Errors
    /// [`DatapathError::Attach`], naming the link. What is pinned stays attached, for the next attempt to take over.
    pub fn attach(&mut self, ifindex: u32, name: &str) -> Result<Hook, DatapathError> {
        let mut links = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            links.push(self.attach_one(ifindex, name, direction)?);
        }
        Ok(Hook { ifindex, links })
    }

    pub(super) fn attach_one(
        &mut self,
        ifindex: u32,
        name: &str,
        direction: Direction,
    ) -> Result<Attached, DatapathError> {
        let point = Point::Instance(direction);
        let pin = self.pins.as_ref().map(|pins| pins.link(ifindex, point));
        let failed =
            |error: Box<dyn std::error::Error + Send + Sync>| DatapathError::Attach { link: name.into(), error };
        let program = self.program(direction)?;
        if !has_tcx() {
            return Filter::attach(program, ifindex, name, point, pin).map(Attached::Filter).map_err(failed);
        }
        let earlier = match &pin {
            Some(pin) => match PinnedLink::from_pin(pin) {
                Ok(link) => Some(link),
                Err(LinkError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => None,
                Err(error) => return Err(failed(error.into())),
            },
            None => None,
        };
        if let (Some(link), Some(pin)) = (earlier, &pin) {
            let link: SchedClassifierLink =
                FdLink::from(link).try_into().map_err(|error: LinkError| failed(error.into()))?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    // The pin is still there; only the descriptor is ours to drop.
                    program.take_link(id).map_err(|error| failed(error.into()))?;
                    let link = PinnedLink::from_pin(pin).map_err(|error| failed(error.into()))?;
                    return Ok(Attached::Link { link: link.into(), pin: Some(pin.clone()) });
                }
                // ENOLINK: the link's interface is gone, and its index was given to another. Should it be anything
                // else, the program behind the pin goes on until this one is attached.
                Err(error) => tracing::debug!(link = name, %error, "a pinned link is severed; attaching anew"),
            }
        }
        let id = program
            .attach_with_options(name, point.hook(), TcAttachOptions::TcxOrder(LinkOrder::first()))
            .map_err(|error| failed(error.into()))?;
        let link = program.take_link(id).map_err(|error| failed(error.into()))?;
        let link: FdLink = link.try_into().map_err(|error: LinkError| failed(error.into()))?;
        let link = match &pin {
            Some(pin) => {
                remove(pin).map_err(|error| failed(error.into()))?;
                link.pin(pin).map_err(|error| failed(error.into()))?.into()
            }
            None => link,
        };
        Ok(Attached::Link { link, pin })
    }
}

impl Hook {
    /// Takes both programs off the link, and their pins away.
    ///
    /// # Errors
    /// The first that was met; the others were tried all the same.
    pub fn detach(self) -> std::io::Result<()> {
        let mut result = Ok(());
        for link in self.links {
            let detached = match link {
                Attached::Link { pin: Some(pin), .. } => remove(&pin).map(drop),
                Attached::Link { pin: None, .. } => Ok(()),
                Attached::Filter(filter) => filter.detach(),
            };
            result = result.and(detached);
        }
        result
    }
}
