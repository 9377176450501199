//! Attaching where there is no TCX: filters of a clsact qdisc. A filter outlives whoever made it and has no file of its
//! own, so its program's pin stands for it, at the place where a TCX link's would be.

use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{Link as _, ProgramError, SchedClassifier, tc};
use aya::util::KernelVersion;
use nix::errno::Errno;
use nix::net::if_::if_indextoname;

use super::attach::Point;

/// The first to decide.
const PRIORITY: u16 = 1;
/// A filter on one direction of a link.
#[derive(Debug)]
pub struct Filter {
    ifindex: u32,
    point: Point,
    /// Where its program is pinned; without, it goes with this value.
    pin: Option<PathBuf>,
}

/// Whether links have TCX, which came with 6.6 (kernel commit e420bed02507).
pub fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

impl Filter {
    /// Puts the program on a link. Where an earlier agent's filter is, the program in it is replaced: no packet passes
    /// between the two (kernel: `cls_bpf_change`).
    pub fn attach(
        program: &mut SchedClassifier,
        ifindex: u32,
        name: &str,
        point: Point,
        pin: Option<PathBuf>,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        match tc::qdisc_add_clsact(name) {
            Ok(()) | Err(TcError::AlreadyAttached) => {}
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(pin) = &pin {
            pin_in_place(program, pin)?;
        }
        let id = match program.attach_to_link(link(name, point)?) {
            Err(error) if is_absent(&error) => {
                let options = NlOptions { priority: PRIORITY, handle: handle(point), classid: None };
                program.attach_with_options(name, point.hook(), TcAttachOptions::Netlink(options))?
            }
            replaced => replaced?,
        };
        // aya's value would take the filter off when dropped. It is only numbers, so nothing leaks.
        mem::forget(program.take_link(id)?);
        Ok(Self { ifindex, point, pin })
    }

    /// Replaces the program by itself, or puts it back where it is gone. Whether it was.
    pub fn renew(
        &self,
        program: &mut SchedClassifier,
        name: &str,
    ) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        match program.attach_to_link(link(name, self.point)?) {
            Ok(id) => {
                // As in `attach`.
                mem::forget(program.take_link(id)?);
                Ok(false)
            }
            Err(error) if is_absent(&error) => {
                let fresh = Self::attach(program, self.ifindex, name, self.point, self.pin.clone())?;
                mem::forget(fresh);
                Ok(true)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes it off, and its pin away.
    pub fn detach(mut self) -> io::Result<()> {
        match self.pin.take() {
            // `drop` does it.
            None => Ok(()),
            Some(pin) => {
                let removed = remove(self.ifindex, self.point);
                super::pins::remove(&pin)?;
                removed
            }
        }
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        if self.pin.is_none()
            && let Err(error) = remove(self.ifindex, self.point)
        {
            tracing::warn!(link = self.ifindex, %error, "cannot take a filter off");
        }
    }
}

/// Removes the filter on one direction of a link, if both are still there.
pub fn remove(ifindex: u32, point: Point) -> io::Result<()> {
    let Ok(name) = if_indextoname(ifindex) else { return Ok(()) };
    match link(&name.to_string_lossy(), point)?.detach() {
        Err(error) if !is_absent(&error) => Err(io::Error::other(error.to_string())),
        _ => Ok(()),
    }
}

fn link(name: &str, point: Point) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(name, point.hook(), PRIORITY, handle(point), None)
}

/// The filter's number within its priority; others that come first, too, start counting at 1. ("SG", "SH": a routed
/// instance's link may have one of each.)
fn handle(point: Point) -> TcHandle {
    match point {
        Point::Instance(_) => TcHandle::new(0, 0x5347),
        Point::Published => TcHandle::new(0, 0x5348),
    }
}

/// ENOENT: no such filter; EINVAL: no qdisc that it could be in; ENODEV: no such link.
fn is_absent(error: &ProgramError) -> bool {
    let (ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error))) = error else {
        return false;
    };
    let absent = [Errno::ENOENT, Errno::EINVAL, Errno::ENODEV].map(|errno| Some(errno as i32));
    absent.contains(&error.raw_os_error())
}

/// Pins the program in the place of an earlier one. The old pin gives way in one step, so that a filter never is
/// without.
fn pin_in_place(program: &mut SchedClassifier, pin: &Path) -> io::Result<()> {
    let fresh = pin.with_file_name("fresh");
    super::pins::remove(&fresh)?;
    program.pin(&fresh).map_err(io::Error::other)?;
    fs::rename(&fresh, pin)
}
