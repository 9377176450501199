//! What somebody with root's powers can do behind the agent's back: programs before its own, links taken apart, maps
//! written by their ids. By the system call itself, as no tool has all of it.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use aya::maps::{Map, MapData, loaded_maps};
use aya::programs::{loaded_links, loaded_programs};
use nix::libc;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> libc::c_long {
    let size = size_of::<T>() as libc::c_uint;
    // SAFETY: the kernel reads `size` bytes of the structure, whose pointers lead to what the caller holds.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result
}

fn descriptor(result: libc::c_long) -> OwnedFd {
    // SAFETY: a descriptor that the kernel has just made.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(result).expect("a descriptor")) }
}

/// A program that lets everything pass, whatever those behind it say (TCX_PASS).
///
/// # Panics
/// When the kernel refuses it.
pub fn open_program() -> OwnedFd {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    // mov r0, 0; exit
    let instructions: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];
    let license = c"GPL";
    descriptor(bpf(
        BPF_PROG_LOAD,
        &mut Load {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            count: 2,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
        },
    ))
}

/// Puts a program before all others on one side of a link of this thread's namespace, for as long as the result lives.
///
/// # Panics
/// When the kernel refuses.
pub fn put_before(program: impl AsFd, ifindex: u32, is_ingress: bool) -> OwnedFd {
    #[repr(C)]
    struct Create {
        program: u32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
        relative: u32,
        pad: u32,
        revision: u64,
    }
    descriptor(bpf(
        BPF_LINK_CREATE,
        &mut Create {
            program: program.as_fd().as_raw_fd() as u32,
            ifindex,
            attach_type: if is_ingress { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS },
            flags: BPF_F_BEFORE,
            relative: 0,
            pad: 0,
            revision: 0,
        },
    ))
}

/// Severs every link that has a program of these ids, as `bpftool link detach` does. How many there were.
///
/// # Panics
/// When the kernel refuses.
pub fn sever(programs: &[u32]) -> usize {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Detach {
        link: u32,
    }
    let ids: Vec<u32> = loaded_links()
        .filter_map(Result::ok)
        .filter(|link| programs.contains(&link.program_id()))
        .map(|link| link.id())
        .collect();
    for &id in &ids {
        let link = descriptor(bpf(BPF_LINK_GET_FD_BY_ID, &mut ById { id, next: 0, flags: 0 }));
        bpf(BPF_LINK_DETACH, &mut Detach { link: link.as_raw_fd() as u32 });
    }
    ids.len()
}

/// The maps of this name that a program of these ids uses, to be written.
///
/// # Panics
/// When the kernel refuses.
pub fn maps_of(programs: &[u32], name: &str) -> Vec<MapData> {
    let used: Vec<u32> = loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| programs.contains(&program.id()))
        .flat_map(|program| program.map_ids().ok().flatten().unwrap_or_default())
        .collect();
    loaded_maps()
        .filter_map(Result::ok)
        .filter(|map| used.contains(&map.id()) && map.name_as_str() == Some(name))
        .map(|map| MapData::from_id(map.id()).expect("a map that is in use"))
        .collect()
}

/// A hash map's type, for maps that were found by name.
pub fn hash(map: MapData) -> Map {
    Map::HashMap(map)
}
