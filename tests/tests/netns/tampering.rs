//! Somebody with root's powers takes enforcement apart behind the agent's back: it notices, puts it right and says so.

use std::fs;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{SchedClassifier, tc::TcAttachType};
use aya::util::KernelVersion;
use nix::net::if_::if_nametoindex;
use serde_json::Value;
use sg_common::abi::{Binding, Interface};
use tests::bpf::{hash, maps_of, open_program, put_before, sever};
use tests::e2e::{Lab, Paused, run, wait_for};

use crate::{pass, vanish};

fn lab() -> Lab {
    let lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.10/32", "tcp 22 2001:db8:1::10/128"]));
    let mut lab = lab.start();
    lab.serve("b", &[22, 23]);
    enforced(&lab);
    lab
}

#[track_caller]
fn enforced(lab: &Lab) {
    pass(lab.tcp("a", "b", 22));
    vanish(lab.tcp("a", "b", 23));
}

/// The programs on one side of a link, the first to decide first.
fn programs(lab: &Lab, link: &str, side: TcAttachType) -> Vec<u32> {
    lab.world.host.run(|| {
        let (_, programs) = SchedClassifier::query_tcx(link, side).expect("a link that can be asked");
        programs.iter().map(|program| program.id()).collect()
    })
}

/// The agent's own, in both directions.
fn ours(lab: &Lab, link: &str) -> [u32; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress].map(|side| programs(lab, link, side)[0])
}

/// How many repairs of a kind the agent tells of.
fn repairs(status: &Value, kind: &str) -> u64 {
    status["repairs"][kind].as_u64().unwrap_or(0)
}

/// Waits until the agent has put something of this kind right, and says so as a warning, too.
#[track_caller]
pub fn repaired(lab: &Lab, kind: &str, least: u64) {
    let status = wait_for(&format!("{least} {kind}"), || {
        let status = lab.agent.status();
        (repairs(&status, kind) >= least).then_some(status)
    });
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("put right"), "{warnings}");
}

#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn severed_links_come_back() {
    let lab = lab();
    let paused = Paused::agent(&lab.agent);
    assert_eq!(sever(&ours(&lab, "veth-b")), 4, "two programs on each of two links");
    drop(paused);
    repaired(&lab, "program_detached", 4);
    enforced(&lab);
    // Those that came back are pinned: they stay without the agent.
    let mut lab = lab;
    lab.agent.kill();
    enforced(&lab);
    lab.agent.start().wait();
}

#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn a_program_that_decides_first_is_put_behind() {
    let lab = lab();
    let [ingress, egress] = ours(&lab, "veth-b");
    let paused = Paused::agent(&lab.agent);
    let links = lab.world.host.run(|| {
        let ifindex = if_nametoindex("veth-b").expect("B's link");
        [true, false].map(|is_ingress| put_before(open_program(), ifindex, is_ingress))
    });
    // Or what follows would show nothing.
    pass(lab.tcp("a", "b", 23));
    drop(paused);
    repaired(&lab, "program_preceded", 2);
    vanish(lab.tcp("a", "b", 23));
    assert_eq!(programs(&lab, "veth-b", TcAttachType::Ingress)[0], ingress);
    assert_eq!(programs(&lab, "veth-b", TcAttachType::Egress)[0], egress);
    enforced(&lab);
    drop(links);
}

#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn pins_that_are_removed_are_made_again() {
    let mut lab = lab();
    let paused = Paused::agent(&lab.agent);
    fs::remove_dir_all(lab.agent.bpffs().join("links")).expect("pins that can be removed");
    drop(paused);
    repaired(&lab, "program_unpinned", 4);
    enforced(&lab);
    lab.agent.kill();
    enforced(&lab);
    lab.agent.start().wait();
}

#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn maps_that_are_written_to_are_put_right() {
    let lab = lab();
    let programs = ours(&lab, "veth-b");
    let [map] = maps_of(&programs, "BINDINGS").try_into().unwrap_or_else(|maps: Vec<_>| panic!("{} maps", maps.len()));
    let mut bindings: Array<MapData, Binding> = aya::maps::Map::Array(map).try_into().expect("an array");
    // All of it is seen by one look, or the next wait would be over before its own alterations are.
    let alter = |change: &mut dyn FnMut()| {
        let (before, paused) = (repairs(&lab.agent.status(), "map_altered"), Paused::agent(&lab.agent));
        change();
        drop(paused);
        repaired(&lab, "map_altered", before + 1);
    };
    alter(&mut || {
        for slot in 0..8 {
            bindings.set(slot, Binding { policy: 0, epoch: 0 }, 0).expect("a map that can be written");
        }
    });
    enforced(&lab);

    let [map] =
        maps_of(&programs, "INTERFACES").try_into().unwrap_or_else(|maps: Vec<_>| panic!("{} maps", maps.len()));
    let mut interfaces: HashMap<MapData, u32, Interface> = hash(map).try_into().expect("a hash map");
    let all: Vec<(u32, Interface)> = interfaces.iter().filter_map(Result::ok).collect();
    assert_eq!(all.len(), 2);
    alter(&mut || {
        for (ifindex, entry) in &all {
            let altered = Interface { flags: 0, groups: 0, ..*entry };
            interfaces.insert(ifindex, altered, 0).expect("a map that can be written");
        }
    });
    enforced(&lab);
    alter(&mut || {
        for (ifindex, _) in &all {
            interfaces.remove(ifindex).expect("a map that can be written");
        }
    });
    enforced(&lab);
}

/// Before TCX the programs are filters of the qdisc, and go with it. With TCX nothing happens.
#[test]
fn a_qdisc_that_is_replaced_takes_nothing_along() {
    let lab = lab();
    let tc = |arguments: &[&str]| tests::e2e::output(lab.world.host.command("tc").args(arguments));
    if KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0)) {
        run(lab.world.host.command("tc").args(["qdisc", "add", "dev", "veth-b", "clsact"]));
    }
    assert!(tc(&["qdisc", "del", "dev", "veth-b", "clsact"]).status.success());
    if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 6, 0)) {
        repaired(&lab, "program_detached", 1);
    }
    enforced(&lab);
}

#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn it_is_put_right_within_a_second() {
    let lab = lab();
    let ours = ours(&lab, "veth-b");
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(sever(&ours), 4);
            let hooks = ["veth-a", "veth-b"]
                .into_iter()
                .flat_map(|link| [TcAttachType::Ingress, TcAttachType::Egress].map(|side| (link, side)));
            let is_there = |(link, side)| programs(&lab, link, side).first().is_some_and(|id| ours.contains(id));
            wait_for("all four are back", || hooks.clone().all(is_there).then_some(()));
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("{times:?}");
    // The machine may be busy with something else now and then.
    assert!(times[2] < Duration::from_secs(1), "{times:?}");
    repaired(&lab, "program_detached", 20);
}
