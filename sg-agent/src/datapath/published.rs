//! The programs of published ports onto the links by which clients come, and off them.
//!
//! They end with the agent: without it nobody listens at those ports, so nothing is left to protect. Where there is no
//! TCX a filter outlives a killed agent, so there it is pinned, for the next one and `detach` to find.

use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, Xdp, XdpMode};

use super::attach::Point;
use super::filter::{Filter, has_tcx};
use super::{Datapath, DatapathError};

/// The program for TC.
pub(super) const TC: &str = "published";
/// The same for a network card's driver.
pub(super) const XDP: &str = "published_xdp";

/// How a program hangs on a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// In the driver, before the kernel has made a packet of what came.
    Driver,
    /// TCX ingress, or clsact before 6.6.
    Tc,
}

/// A program on a link. It goes with this value.
#[derive(Debug)]
pub struct Watch {
    attached: Attached,
}

#[derive(Debug)]
enum Attached {
    Link(#[expect(dead_code, reason = "dropping it detaches")] FdLink),
    Filter(Option<Filter>),
}

impl Datapath {
    /// Attaches the program of published ports to a link. It comes behind the instances' and everybody else's.
    ///
    /// # Errors
    /// The kernel or the driver refuses it; nothing is attached then.
    pub fn watch(&mut self, ifindex: u32, name: &str, way: Way) -> Result<Watch, DatapathError> {
        let attached = match way {
            Way::Driver => self.watch_in_driver(ifindex, name)?,
            Way::Tc => self.watch_by_tc(ifindex, name)?,
        };
        Ok(Watch { attached })
    }

    fn watch_in_driver(&mut self, ifindex: u32, name: &str) -> Result<Attached, DatapathError> {
        let failed = failed(name);
        let program = self.published_xdp()?;
        let mut attach = || {
            let id = program.attach_to_if_index(ifindex, XdpMode::Driver)?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(program.take_link(id)?.try_into()?)
        };
        attach().map(Attached::Link).map_err(failed)
    }

    fn watch_by_tc(&mut self, ifindex: u32, name: &str) -> Result<Attached, DatapathError> {
        let failed = failed(name);
        let pin = self.pins.as_ref().map(|pins| pins.link(ifindex, Point::Published));
        let program = self.published()?;
        if !has_tcx() {
            let filter = Filter::attach(program, ifindex, name, Point::Published, pin);
            return filter.map(|filter| Attached::Filter(Some(filter))).map_err(failed);
        }
        let mut attach = || {
            let options = TcAttachOptions::TcxOrder(LinkOrder::last());
            let id = program.attach_with_options(name, Point::Published.hook(), options)?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(program.take_link(id)?.try_into()?)
        };
        attach().map(Attached::Link).map_err(failed)
    }

    /// The program for TC, loaded when it is first wanted: most agents publish nothing.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn published(&mut self) -> Result<&mut SchedClassifier, DatapathError> {
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(TC).and_then(|program| program.try_into().ok()).ok_or(DatapathError::Map(TC))?;
        if program.fd().is_err() {
            program.load().map_err(|error| DatapathError::Program { program: TC, error: Box::new(error) })?;
        }
        Ok(program)
    }

    /// The program for drivers.
    pub(super) fn published_xdp(&mut self) -> Result<&mut Xdp, DatapathError> {
        let program: &mut Xdp =
            self.ebpf.program_mut(XDP).and_then(|program| program.try_into().ok()).ok_or(DatapathError::Map(XDP))?;
        if program.fd().is_err() {
            program.load().map_err(|error| DatapathError::Program { program: XDP, error: Box::new(error) })?;
        }
        Ok(program)
    }

    /// How many instructions the verifier looked at for the two programs of published ports.
    ///
    /// # Errors
    /// The kernel takes one not.
    pub fn verified_published(&mut self) -> Result<[Option<u32>; 2], DatapathError> {
        let info = |name| move |error| DatapathError::Program { program: name, error: Box::new(error) };
        let tc = self.published()?.info().map_err(info(TC))?.verified_instruction_count();
        let xdp = self.published_xdp()?.info().map_err(info(XDP))?.verified_instruction_count();
        Ok([tc, xdp])
    }
}

fn failed(link: &str) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> DatapathError {
    let link = link.to_owned();
    move |error| DatapathError::Attach { link, error }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Attached::Filter(filter) = &mut self.attached
            && let Some(filter) = filter.take()
            && let Err(error) = filter.detach()
        {
            tracing::warn!(%error, "cannot take the program of published ports off; 'sg-agent detach' tries again");
        }
    }
}
