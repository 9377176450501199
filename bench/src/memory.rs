//! What the agent takes up: its own memory, and that of its maps and programs, as the kernel accounts for them.

use std::collections::BTreeMap;
use std::fs;

use ::tests::e2e::{Agent, Namespace, Rules};
use anyhow::{Context as _, Result};

use crate::record::{Bound, Recorder};
use crate::world;

/// Policies that instances share, and rules of each.
const POLICIES: usize = 100;
const RULES: usize = 60;

/// Measures at several sizes.
///
/// # Errors
/// A process that can't be read.
pub fn run(recorder: &Recorder) -> Result<()> {
    for instances in [10, 100, 1_000] {
        recorder.check()?;
        let host = Namespace::new("host");
        host.run(|| world::attach(instances))?;
        let agent = agent(&host, instances);
        let (resident, maps, programs) =
            (resident(agent.pid())?, locked(agent.pid(), "map_id")?, locked(agent.pid(), "prog_id")?);
        let at = ("instances", instances as f64);
        recorder.point("memory", "agent, resident", "MB", at, &[resident]);
        recorder.point("memory", "maps, locked", "MB", at, &[maps]);
        recorder.point("memory", "programs, locked", "MB", at, &[programs]);
        if instances == 1_000 {
            recorder.target("agent at 1,000 instances, MB", &[resident], Bound::AtMost(64.0));
            recorder.target("maps at 1,000 instances, MB", &[maps], Bound::AtMost(128.0));
        }
    }
    recorder.note("the table of flows is allocated whole, so the maps take as much with 10,000 flows as with none");
    Ok(())
}

/// An agent that enforces on so many links in `host`.
fn agent(host: &Namespace, instances: usize) -> Agent {
    let mut agent = Agent::new(Some(host));
    let mut rules = Rules::new(agent.directory().join("rules.json"));
    let policies = POLICIES.min(instances);
    for policy in 0..policies {
        let all: Vec<String> =
            (0..RULES).map(|rule| format!("tcp {} 10.{policy}.{rule}.0/24", 1_000 + policy * 7 + rule)).collect();
        rules.ingress(&format!("sg-{policy}"), &all.iter().map(String::as_str).collect::<Vec<_>>());
    }
    for number in 0..instances {
        let id = world::instance_id(number).to_string();
        let group = format!("sg-{}", number % policies);
        rules.instance(&id, &[&group], &world::addresses(number));
        let [v4, v6] = [0, 1].map(|family| world::addresses(number)[family]);
        let mac = world::mac(number).map(|byte| format!("{byte:02x}")).join(":");
        agent.arguments(["--attach".to_owned(), format!("{id}=sgb-{number},ip={v4},ip={v6},mac={mac}")]);
    }
    rules.write();
    agent.arguments(["--no-docker", "--rules"]).arguments([rules.path()]);
    agent.start().wait();
    agent
}

fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in a process's status")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// What the kernel holds for a process's maps or programs (`memlock` of its descriptors), each counted once.
fn locked(pid: u32, id: &str) -> Result<f64> {
    let mut bytes: BTreeMap<String, f64> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let field = |name: &str| {
            text.lines()
                .find_map(|line| Some(line.split_once(':').filter(|(its, _)| *its == name)?.1.trim().to_owned()))
        };
        if let (Some(id), Some(memory)) = (field(id), field("memlock")) {
            bytes.insert(id, memory.parse()?);
        }
    }
    Ok(bytes.values().sum::<f64>() / 1e6)
}
