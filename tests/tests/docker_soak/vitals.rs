//! What must stay flat: the agent's memory, threads and open files, entries of maps, pins. Owns the rules for that, and
//! the table; what happens meanwhile is the soak's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use aya::Pod;
use aya::maps::{Map, MapData, PerCpuHashMap};
use serde_json::{Value, json};
use sg_agent::datapath::Scan;
use sg_common::abi::{Count, ExemptKey, Flow, FlowKey, Interface, Member, MemberKey, OwnKey, ReasonKey, ReferenceKey};
use tests::bpf::maps_of;

/// What memory may come to beyond what it was: an allocator's slack, not a leak's.
const MEMORY_SLACK: u64 = 6 * 1024;
/// Threads that a runtime may have for a while: those for calls that block.
const THREAD_SLACK: u64 = 8;
/// Open files that may come and go: connections to the endpoint and to Docker, and those of who asks.
const FILE_SLACK: u64 = 24;
/// Samples of one agent that are needed to tell, after those of its warm-up.
const ENOUGH: usize = 12;
/// The first samples of an agent: pools fill, buffers find their size.
const WARM_UP: usize = 8;

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The agent's process.
    pub pid: u32,
    /// By name: what is judged by its trend.
    pub trends: BTreeMap<&'static str, u64>,
    /// By name: what is judged where the model's state is the same, and then exactly.
    pub exact: BTreeMap<&'static str, u64>,
}

impl Sample {
    /// Looks at an agent, its pins and its maps, which the program of this number uses; `usage` is the status's.
    pub fn take(pid: u32, pins: &Path, program: u32, usage: &Value) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(0)
        };
        let mut files: BTreeMap<&'static str, u64> = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default().display().to_string();
            let kind = match &*target {
                target if target.contains("bpf-map") => "BPF maps",
                target if target.contains("bpf-prog") => "BPF programs",
                target if target.contains("bpf_link") || target.contains("bpf-link") => "BPF links",
                target if target.starts_with("socket:") => "sockets",
                _ => "other files",
            };
            *files.entry(kind).or_default() += 1;
        }
        let open = |kind| files.get(kind).copied().unwrap_or(0);
        let trends = BTreeMap::from([
            ("memory, KiB", field("VmRSS:")),
            ("threads", field("Threads:")),
            ("open files", files.values().sum()),
            ("flows", entries::<FlowKey, Flow>(program, "FLOWS")),
            ("counters", counters(program)),
        ]);
        let exact = BTreeMap::from([
            ("BPF maps", open("BPF maps")),
            ("BPF programs", open("BPF programs")),
            ("BPF links", open("BPF links")),
            ("other files", open("other files")),
            ("sockets", open("sockets")),
            ("pins", count(pins)),
            ("policies", usage["policies"].as_u64().expect("usage.policies")),
            ("rules' lines", usage["lines"].as_u64().expect("usage.lines")),
            ("INTERFACES", entries::<u32, Interface>(program, "INTERFACES")),
            ("REFERENCES", entries::<ReferenceKey, u32>(program, "REFERENCES")),
            ("MEMBERS", entries::<MemberKey, Member>(program, "MEMBERS")),
            ("SECONDARIES", entries::<OwnKey, u32>(program, "SECONDARIES")),
            ("EXEMPT", entries::<ExemptKey, u32>(program, "EXEMPT")),
        ]);
        Self { pid, trends, exact }
    }
}

/// How many entries a map has.
fn entries<K: Pod, V: Pod>(program: u32, name: &str) -> u64 {
    let map = maps_of(&[program], name).into_iter().next();
    keys::<K, V>(&map.unwrap_or_else(|| panic!("the program has no map {name}")))
}

fn counters(program: u32) -> u64 {
    let map = maps_of(&[program], "REASONS").into_iter().next().expect("the program's map REASONS");
    let counters: PerCpuHashMap<MapData, ReasonKey, Count> =
        Map::PerCpuHashMap(map).try_into().expect("a hash map with a value a CPU");
    counters.keys().count() as u64
}

fn keys<K: Pod, V: Pod>(map: &MapData) -> u64 {
    let (mut scan, mut seen) = (Scan::default(), 0);
    loop {
        match scan.read::<K, V>(map.fd().as_fd(), 1 << 16) {
            Ok((entries, all)) => {
                seen += entries.len() as u64;
                if all.is_some() {
                    return seen;
                }
            }
            // Its keys changed meanwhile.
            Err(_) => return seen,
        }
    }
}

fn count(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
}

/// All looks.
#[derive(Debug, Default)]
pub struct Vitals {
    samples: Vec<Sample>,
    /// Those at the same state of the model.
    same: Vec<Sample>,
}

/// A line of the table.
#[derive(Debug)]
pub struct Line {
    name: &'static str,
    first: u64,
    last: u64,
    most: u64,
    rule: String,
    /// What is wrong, if anything is.
    pub problem: Option<String>,
}

impl Vitals {
    /// Notes a look at any state.
    pub fn note(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Notes a look at the state that all such looks are at.
    pub fn note_same(&mut self, sample: Sample) {
        self.samples.push(sample.clone());
        self.same.push(sample);
    }

    /// What is otherwise than it was when the model's state was the same.
    pub fn unlike_the_first(&self, sample: &Sample) -> Vec<String> {
        let Some(first) = self.same.first() else { return Vec::new() };
        let unlike = sample.exact.iter().filter(|(name, count)| first.exact.get(*name) != Some(count));
        unlike.map(|(name, count)| format!("{name}: {count}, at first {:?}", first.exact.get(name))).collect()
    }

    /// The table.
    pub fn lines(&self) -> Vec<Line> {
        let slacks = [
            ("memory, KiB", MEMORY_SLACK),
            ("threads", THREAD_SLACK),
            ("open files", FILE_SLACK),
            ("flows", 20_000),
            ("counters", 64),
        ];
        let trends = slacks.into_iter().map(|(name, slack)| {
            let all: Vec<u64> = self.samples.iter().map(|sample| sample.trends[name]).collect();
            let lives = self.samples.chunk_by(|one, next| one.pid == next.pid);
            let series = lives.map(|life| life.iter().map(|sample| sample.trends[name]).collect::<Vec<_>>());
            let judged: Vec<Option<Growth>> = series.map(|life| Growth::of(&life)).collect();
            let worst = judged.into_iter().flatten().max_by_key(|growth| growth.grown());
            let rule = match worst {
                Some(Growth { first, last, looks }) => {
                    format!("of {looks} looks at one agent: {first} at most at first, {last} at last; {slack} more is allowed")
                }
                None => "no agent lived long enough to tell".to_owned(),
            };
            let problem = match worst {
                Some(growth) => (growth.grown() > slack).then(|| format!("{name} grew: {growth:?}")),
                None => Some(rule.clone()),
            };
            line(name, &all, rule, problem)
        });
        let names = self.same.first().map(|sample| sample.exact.keys().copied().collect::<Vec<_>>());
        let exact = names.into_iter().flatten().map(|name| {
            let all: Vec<u64> = self.same.iter().map(|sample| sample.exact[name]).collect();
            let is_same = all.iter().all(|count| *count == all[0]);
            let problem = (!is_same).then(|| format!("{name} differs at the same state: {all:?}"));
            line(name, &all, format!("exactly the same, {} times", all.len()), problem)
        });
        trends.chain(exact).collect()
    }
}

fn line(name: &'static str, all: &[u64], rule: String, problem: Option<String>) -> Line {
    let most = all.iter().copied().max().unwrap_or(0);
    let (first, last) = (all.first().copied().unwrap_or(0), all.last().copied().unwrap_or(0));
    Line { name, first, last, most, rule, problem }
}

/// The most in the first and in the last third of an agent's life, its warm-up left out.
#[derive(Clone, Copy, Debug)]
struct Growth {
    first: u64,
    last: u64,
    looks: usize,
}

impl Growth {
    /// `None` where there is too little to tell.
    fn of(life: &[u64]) -> Option<Self> {
        let life = life.get(WARM_UP..).filter(|life| life.len() >= ENOUGH)?;
        let third = life.len() / 3;
        let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
        Some(Self { first: most(&life[..third]), last: most(&life[life.len() - third..]), looks: life.len() })
    }

    fn grown(&self) -> u64 {
        self.last.saturating_sub(self.first)
    }
}

/// As a table, and for scripts.
pub fn render(lines: &[Line]) -> (String, Value) {
    let mut table = format!("{:<14} {:>9} {:>9} {:>9}  rule\n", "", "first", "last", "most");
    for Line { name, first, last, most, rule, problem } in lines {
        let mark = if problem.is_some() { "  FAILED" } else { "" };
        let _ = writeln!(table, "{name:<14} {first:>9} {last:>9} {most:>9}  {rule}{mark}");
    }
    let lines = lines.iter().map(|line| {
        json!({ "name": line.name, "first": line.first, "last": line.last, "most": line.most, "rule": line.rule,
            "problem": line.problem })
    });
    (table, lines.collect())
}

#[test]
fn what_grows_is_seen_and_what_is_flat_is_not() {
    let judge = |memory: &dyn Fn(usize) -> u64, flows: u64| {
        let mut vitals = Vitals::default();
        for number in 0..60 {
            let trends = ["threads", "open files", "flows", "counters"].map(|name| (name, 7));
            let trends = trends.into_iter().chain([("memory, KiB", memory(number))]).collect();
            let sample = Sample { pid: 1, trends, exact: BTreeMap::from([("MEMBERS", flows * number as u64)]) };
            vitals.note_same(sample);
        }
        vitals.lines().into_iter().filter_map(|line| line.problem).collect::<Vec<_>>()
    };
    assert_eq!(judge(&|number| 20_000 + 500 * (number as u64 % 7), 0), Vec::<String>::new());
    assert_eq!(judge(&|number| 40_000 + 400 * number as u64, 0).len(), 1, "400 KiB more with each look");
    assert_eq!(judge(&|_| 20_000, 1).len(), 1, "an entry more with each look");
}
