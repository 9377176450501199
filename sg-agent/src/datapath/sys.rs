//! The bpf(2) commands that aya has no function for. Structures are parts of `union bpf_attr`
//! (include/uapi/linux/bpf.h); what they are called for is elsewhere.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::Pod;
use nix::libc;
use sg_common::abi::Direction;

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// Programs on one hook at most (`BPF_MPROG_MAX`).
const MOST_PROGRAMS: usize = 64;

/// A command with its part of `union bpf_attr`.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    let size = size_of::<T>() as libc::c_uint;
    // SAFETY: the kernel reads and writes `size` bytes of the structure, and what its pointers lead to: callers have
    // them point to memory of theirs that is as long as they say.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The ids of the TCX programs that packets in one direction of an interface meet, in their order.
///
/// # Errors
/// ENODEV where the link is gone.
pub fn tcx_programs(ifindex: u32, direction: Direction) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        pad: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let mut ids = vec![0_u32; MOST_PROGRAMS];
    let mut query = Query {
        target: ifindex,
        // As seen from the host's side of the link.
        attach_type: match direction {
            Direction::Ingress => BPF_TCX_EGRESS,
            Direction::Egress => BPF_TCX_INGRESS,
        },
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST_PROGRAMS as u32,
        pad: 0,
        program_flags: 0,
        links: 0,
        link_flags: 0,
        revision: 0,
    };
    match bpf(BPF_PROG_QUERY, &mut query) {
        Ok(_) => ids.truncate(query.count as usize),
        // Nothing was ever attached, or all of it is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => ids.clear(),
        Err(error) => return Err(error),
    }
    Ok(ids)
}

/// One more descriptor of a link.
///
/// # Errors
/// The system call's.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    let fd = bpf(BPF_LINK_GET_FD_BY_ID, &mut ById { id, next: 0, flags: 0 })?;
    // SAFETY: a descriptor that the kernel has just made, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes a link's program off, before this returns. The last descriptor's end does so a moment later only.
///
/// # Errors
/// The system call's.
pub fn detach(link: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Detach {
        link: u32,
    }
    bpf(BPF_LINK_DETACH, &mut Detach { link: link.as_fd().as_raw_fd() as u32 }).map(drop)
}

/// Pins a link.
///
/// # Errors
/// The system call's.
pub fn pin(link: impl AsFd, path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(BPF_OBJ_PIN, &mut Pin { path: path.as_ptr() as u64, fd: link.as_fd().as_raw_fd() as u32, flags: 0 }).map(drop)
}

/// Entries of a map.
pub type Entries<K, V> = Vec<(K, V)>;
/// Where a reading of a map goes on: a number of a bucket or a key, as the map's type has it.
pub type Cursor = [u8; 64];

/// Entries of a map, at most so many; and where to go on, unless that was the end.
///
/// # Errors
/// The system call's.
pub fn entries<K: Pod, V: Pod>(
    map: impl AsFd,
    from: Option<&Cursor>,
    most: usize,
) -> io::Result<(Entries<K, V>, Option<Cursor>)> {
    #[repr(C)]
    struct Batch {
        from: u64,
        to: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    const { assert!(size_of::<K>() <= size_of::<Cursor>()) };
    let (mut keys, mut values) = (Vec::<K>::with_capacity(most), Vec::<V>::with_capacity(most));
    let mut to: Cursor = [0; 64];
    let mut batch = Batch {
        from: from.map_or(0, |from| from.as_ptr() as u64),
        to: to.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: most as u32,
        map: map.as_fd().as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    let is_end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    let count = (batch.count as usize).min(most);
    // SAFETY: the kernel has written that many, and every bit pattern is a value (`Pod`).
    unsafe {
        keys.set_len(count);
        values.set_len(count);
    }
    Ok((keys.into_iter().zip(values).collect(), (!is_end).then_some(to)))
}
