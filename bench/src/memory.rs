//! What the agent takes up: its own memory, and that of its maps and programs, as the kernel accounts for them.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;

use ::tests::cast::{Host, X};
use ::tests::e2e::{Agent, FrameSocket, Namespace, Rules};
use ::tests::packets::tcp;
use anyhow::{Context as _, Result, ensure};

use crate::record::{Bound, Recorder};
use crate::world;

/// Policies that instances share, and rules of each.
const POLICIES: usize = 100;
const RULES: usize = 60;
/// Tracked flows.
const FLOWS: u16 = 10_000;

/// Megabytes of one agent.
#[derive(Clone, Copy, Debug)]
struct Taken {
    resident: f64,
    /// Of it, what is no file's: its heap and stacks.
    own: f64,
    maps: f64,
    programs: f64,
}

/// Measures at several sizes.
///
/// # Errors
/// A process that can't be read.
pub fn run(recorder: &Recorder) -> Result<()> {
    let sizes: &[usize] = if recorder.quick { &[10, 100] } else { &[10, 100, 1_000] };
    let mut all = Vec::new();
    for &instances in sizes {
        recorder.check()?;
        let host = Namespace::new("host");
        host.run(|| world::attach(instances))?;
        let agent = agent(&host, instances);
        let without = Taken::by(&agent)?;
        track(&host, &agent)?;
        let taken = Taken::by(&agent)?;
        let at = ("instances", instances as f64);
        let flows = format!("with {FLOWS} flows");
        for (figure, part) in Taken::PARTS {
            recorder.point(figure, "without flows", "MB", at, &[part(&without)]);
            recorder.point(figure, &flows, "MB", at, &[part(&taken)]);
        }
        if instances == 1_000 {
            let what =
                |of: &str| format!("{of} at 1,000 instances, {POLICIES} policies of {RULES} rules, {FLOWS} flows, MB");
            recorder.target(&what("agent, resident"), &[taken.resident], Bound::AtMost(64.0));
            recorder.target(&what("maps, locked"), &[taken.maps], Bound::AtMost(128.0));
        }
        all.push((instances as f64, taken));
    }
    if let [(few, first), .., (many, last)] = all[..] {
        for (figure, part) in Taken::PARTS {
            let each = (part(&last) - part(&first)) / (many - few) * 1e3;
            recorder.sample(
                &format!("{figure}, for one instance more"),
                &format!("from {few} to {many}"),
                "kB",
                &[each],
            );
        }
    }
    recorder.note("the table of flows is allocated whole, so the maps take as much with 10,000 flows as with none");
    Ok(())
}

/// One of the figures.
type Part = fn(&Taken) -> f64;

impl Taken {
    const PARTS: [(&'static str, Part); 4] = [
        ("agent, resident", |taken| taken.resident),
        ("agent, heap and stacks", |taken| taken.own),
        ("maps, locked", |taken| taken.maps),
        ("programs, locked", |taken| taken.programs),
    ];

    fn by(agent: &Agent) -> Result<Self> {
        let pid = agent.pid();
        Ok(Self {
            resident: resident(pid, "VmRSS:")?,
            own: resident(pid, "RssAnon:")?,
            maps: locked(pid, "map_id")?,
            programs: locked(pid, "prog_id")?,
        })
    }
}

/// Sends what begins [`FLOWS`] flows to the first instance.
fn track(host: &Namespace, agent: &Agent) -> Result<()> {
    host.ip("link set sgb-0 up\nlink set sgb-1 up");
    let socket = FrameSocket::new(host, "sgb-0")?;
    // Of a network that the second rule of the first policy names.
    let client = Host { v4: Ipv4Addr::new(10, 0, 1, 5), ..X };
    let v4 = Ipv4Addr::new(10, 0, 0, 10);
    ensure!(world::addresses(0).contains(&v4.into()), "the first instance's address is another one");
    let instance = Host { name: "instance", mac: world::mac(0), v4, ..X };
    for port in 0..FLOWS {
        socket.send(&tcp(client, instance).ports(20_000 + port, 1_001).syn().frame())?;
    }
    let tracked = agent.packets("i-0", "ingress", "new");
    ensure!(tracked == u64::from(FLOWS), "{tracked} of {FLOWS} flows are tracked");
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

fn resident(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let line = line.with_context(|| format!("no {field} in a process's status"))?;
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
