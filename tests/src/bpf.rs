//! What somebody with root's powers can do behind the agent's back: programs before its own, links taken apart, maps
//! written by their ids. By the system call itself, as no tool has all of it.

use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{Map, MapData, loaded_maps};
use aya::programs::{loaded_links, loaded_programs};
use sg_agent::datapath::sys;

use crate::programs::{Hook, PASS, attach_first, returning};

/// A program that lets everything pass, whatever those behind it say.
///
/// # Panics
/// When the kernel refuses it.
pub fn open_program() -> OwnedFd {
    returning(PASS).expect("a program that only returns")
}

/// Puts a program before all others on one side of a link of this thread's namespace, for as long as the result lives.
///
/// # Panics
/// When the kernel refuses.
pub fn put_before(program: impl AsFd, ifindex: u32, is_ingress: bool) -> OwnedFd {
    let hook = if is_ingress { Hook::Ingress } else { Hook::Egress };
    attach_first(program.as_fd(), ifindex, hook).expect("a link that can be attached to")
}

/// Severs every link that has a program of these ids, as `bpftool link detach` does. How many there were.
///
/// # Panics
/// When the kernel refuses.
pub fn sever(programs: &[u32]) -> usize {
    let ids: Vec<u32> = loaded_links()
        .filter_map(Result::ok)
        .filter(|link| programs.contains(&link.program_id()))
        .map(|link| link.id())
        .collect();
    for &id in &ids {
        sys::link_by_id(id).and_then(sys::detach).expect("a link that was there just now");
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
