//! An agent for a long time, while everything around it fails again and again: endpoint, Docker, netlink, bpf(2), clocks,
//! links, containers, and the agent itself. One invariant throughout: what the kernel enforces is what the norm says of
//! the last committed policy. And nothing grows. `SG_SOAK_SECONDS` makes it long: `cargo xtask soak --minutes N`;
//! `SG_SOAK_SEED` has the acts come in the same order as in an earlier run, which has printed its seed.
//!
//! Faults are real ones, or happen where the kernel meets the agent:
//! - The endpoint is a Moto behind a relay of the test's, which refuses, hangs, cuts, babbles, errs or is slow.
//! - The Docker engine is the test's own: it is killed and started again, and its socket is taken away, hangs, or loses
//!   events, while containers come and go.
//! - Netlink overruns: the agent is stopped while more happens than its socket holds, and the kernel's own count of what
//!   it dropped (/proc/net/netlink) has to rise.
//! - bpf(2) fails by a seccomp filter that asks the test (`tests::e2e::seams`): with any error, at any call. The kernel's
//!   own fault injection isn't in most kernels, and knows no process.
//! - Clocks: the agent reads the wall clock to sign calls, for its log and to ask Docker for events since; that one jumps
//!   while it runs, by the same filter. All else goes by the monotonic clock, which no clock setting moves (POSIX); it
//!   differs only between two agents, one of which may run in another time namespace, and does here. The programs
//!   read the kernel's own monotonic clock, which a suspended machine stops; `kernel::state` moves it.
//!
//! The check itself is held against a kernel that is wrong, in tests of its own.

#[path = "docker_soak/acts.rs"]
mod acts;
#[path = "docker_soak/check.rs"]
mod check;
#[path = "docker_soak/model.rs"]
mod model;
#[path = "docker_soak/stage.rs"]
mod stage;
#[path = "docker_soak/vitals.rs"]
mod vitals;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::net::if_::if_nametoindex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use sg_agent::datapath::sys;
use sg_common::abi::Direction;
use tests::bpf::sever;

use model::{Change, State};
use stage::Stage;
use vitals::{Sample, Vitals};

/// How long the soak is where nobody says: the rounds that have begun by then are ended.
const SECONDS: u64 = 45;
/// The fewest rounds: in the second no agent ends, so that one lives long enough to be told by.
const ROUNDS: u64 = 2;
/// How long connections that are kept for later may take to go, until files are counted.
const QUIET: Duration = Duration::from_secs(100);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn the_kernel_enforces_the_last_policy_whatever_happens_and_nothing_grows() {
    let asked = number("SG_SOAK_SECONDS");
    let seconds = asked.unwrap_or(SECONDS);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Each soak that is asked for has an order of its own; every change is held against the same one.
    let seed = number("SG_SOAK_SEED").unwrap_or_else(|| asked.map_or(1, |_| now.subsec_nanos().into()));
    println!("soak of {seconds} s; again by: cargo xtask soak --seconds {seconds} --seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut stage = Stage::new();
    let (began, mut vitals, mut acts, mut round) = (Instant::now(), Vitals::default(), 0, 0);
    stage.holds("before anything happens");
    same(&stage, &mut vitals);
    loop {
        for act in acts::round(round, &mut random) {
            let started = Instant::now();
            let played = catch_unwind(AssertUnwindSafe(|| act.play(&mut stage, &mut random)));
            if let Err(panic) = played {
                eprintln!("act {acts} of round {round}, {act:?}, of seed {seed}");
                resume_unwind(panic);
            }
            vitals.note(sample(&stage));
            acts += 1;
            println!(
                "{:>6.1} s  {acts:>5} {act:?}, {:.1} s",
                began.elapsed().as_secs_f32(),
                started.elapsed().as_secs_f32()
            );
        }
        acts::restore(&mut stage);
        stage.holds("at the base state");
        same(&stage, &mut vitals);
        round += 1;
        if round >= ROUNDS && began.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
    }
    let lines = vitals.lines();
    let (table, json) = vitals::render(&lines);
    let asked = stage.checker.asked;
    println!(
        "{round} rounds, {acts} acts in {:.0} s; {} questions to programs, {} datagrams; seed {seed}\n{table}",
        began.elapsed().as_secs_f32(),
        asked.0,
        asked.1
    );
    let problems: Vec<&String> = lines.iter().filter_map(|line| line.problem.as_ref()).collect();
    let report = json!({ "seed": seed, "seconds": began.elapsed().as_secs(), "rounds": round, "acts": acts,
        "questions": asked.0, "datagrams": asked.1, "vitals": json, "problems": problems });
    if let Ok(path) = std::env::var("SG_SOAK_REPORT") {
        std::fs::write(&path, report.to_string()).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    assert!(problems.is_empty(), "not flat: {problems:#?}");
}

fn sample(stage: &Stage) -> Sample {
    let status = stage.agent.status();
    Sample::take(stage.agent.pid(), stage.agent.bpffs(), stage.program(), &status["usage"])
}

/// A look at the base state. Connections that are kept for the next question are open files for a while.
fn same(stage: &Stage, vitals: &mut Vitals) {
    let end = Instant::now() + QUIET;
    // Nobody is heard at some of these moments; what is open at all of them is what is kept.
    let look = || {
        let mut least = sample(stage);
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(50));
            for (name, count) in sample(stage).exact {
                least.exact.entry(name).and_modify(|least| *least = count.min(*least));
            }
        }
        least
    };
    let mut last = look();
    while !vitals.unlike_the_first(&last).is_empty() && Instant::now() < end {
        last = look();
    }
    for unlike in vitals.unlike_the_first(&last) {
        println!("at the same state, {unlike}");
    }
    vitals.note_same(last);
}

/// The check, where it has to fail.
#[test]
fn the_check_sees_a_kernel_that_is_wrong() {
    let mut stage = Stage::new();
    stage.holds("before anything is wrong");
    let differences =
        |stage: &mut Stage, state: &State| stage.checker.differences(&stage.world.host, &stage.places, &[state]);

    // One rule that the kernel doesn't know of, and one that it has and shouldn't.
    let base = stage.state.clone();
    let mut random = fastrand::Rng::with_seed(1);
    let mut other = base.clone();
    let rule = base.rules[0].iter().next().copied().expect("a rule");
    Change::Revoke(0, rule).make(&mut other);
    let found = differences(&mut stage, &other);
    assert!(found.iter().all(|one| one.contains("with")) && !found.is_empty(), "{found:?}");
    let mut seen = 0;
    for _ in 0..8 {
        let mut other = base.clone();
        Change::any(&base, &mut random).make(&mut other);
        seen += usize::from(!differences(&mut stage, &other).is_empty());
    }
    assert!(seen >= 3, "{seen} of 8 wrong beliefs were seen; the others make no difference to what is asked");

    // The programs are taken off a link, while the agent can't put them back: real datagrams get through.
    let agent = Pid::from_raw(i32::try_from(stage.agent.pid()).expect("a process id"));
    kill(agent, Signal::SIGSTOP).expect("the agent runs");
    let programs = stage.world.host.run(|| {
        let ifindex = if_nametoindex("veth-a").expect("A's link");
        [Direction::Ingress, Direction::Egress].map(|way| sys::tcx_programs(ifindex, way).expect("programs")[0])
    });
    sever(&programs);
    let found = differences(&mut stage, &base);
    kill(agent, Signal::SIGCONT).expect("the agent runs");
    assert!(found.iter().any(|one| one.contains("no program")), "{found:?}");
    assert!(found.iter().any(|one| one.contains("it is denied, and arrived")), "{found:?}");
    stage.settle();
    tests::e2e::wait_for("the agent has put them back", || differences(&mut stage, &base).is_empty().then_some(()));
}
