//! What is done to the agent and around it, one act after another, each followed by the invariant. A round is all acts
//! in an order that the seed gives. What each of them must leave standing is said by which states it is held against:
//! one, where nothing may be under way, or all that a change leads through.

use std::fs;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::e2e::seams::{Failures, commands};
use tests::e2e::{Manner, wait_for};

use crate::model::{CONTAINERS, Change, INSTANCES, State, VETHS};
use crate::stage::Stage;

/// One kind of act.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// A change at the endpoint.
    Change,
    /// Many changes, and the invariant while they are under way.
    Burst,
    /// A change through the gateway: enforced when its call returns.
    Gateway,
    /// An instance's link goes, or comes back.
    Link,
    /// A container goes, or comes back.
    Container,
    /// The endpoint refuses connections.
    EndpointRefuses,
    /// It hangs up without an answer.
    EndpointHangsUp,
    /// It hangs up in the middle of each answer.
    EndpointCuts,
    /// It answers with an error of its own.
    EndpointErrs,
    /// It answers nonsense.
    EndpointBabbles,
    /// It takes every question, and answers none.
    EndpointHangs,
    /// It is slow.
    EndpointIsSlow,
    /// Docker's socket is gone.
    DockerIsGone,
    /// Docker takes every question, and answers none.
    DockerHangs,
    /// Docker's events are lost.
    DockerIsMute,
    /// dockerd is killed, or ended, and starts again.
    DockerRestarts,
    /// More happens to links than the kernel can tell the agent.
    NetlinkOverruns,
    /// Calls of bpf(2) fail in the middle of a change.
    BpfFails,
    /// None that writes succeeds for a while.
    BpfIsOut,
    /// The wall clock jumps.
    ClockJumps,
    /// The agent is killed, and another one starts.
    AgentIsKilled,
    /// It is ended, rules change, and another one starts whose monotonic clock is another.
    AgentIsStopped,
    /// It is killed in the middle of a change.
    AgentDiesInAChange,
    /// It can't start: calls of bpf(2) fail.
    AgentCannotStart,
    /// It starts where neither the endpoint nor Docker answers.
    AgentStartsAlone,
}

/// What a round consists of; those that change rules are several.
const ROUND: &[Act] = &[
    Act::Change,
    Act::Change,
    Act::Change,
    Act::Burst,
    Act::Burst,
    Act::Gateway,
    Act::Gateway,
    Act::Link,
    Act::Link,
    Act::Link,
    Act::Container,
    Act::Container,
    Act::EndpointRefuses,
    Act::EndpointHangsUp,
    Act::EndpointCuts,
    Act::EndpointErrs,
    Act::EndpointBabbles,
    Act::EndpointHangs,
    Act::EndpointIsSlow,
    Act::DockerIsGone,
    Act::DockerHangs,
    Act::DockerIsMute,
    Act::DockerRestarts,
    Act::NetlinkOverruns,
    Act::BpfFails,
    Act::BpfFails,
    Act::BpfIsOut,
    Act::ClockJumps,
];

/// What ends agents, in rounds with it.
const ENDS: &[Act] =
    &[Act::AgentIsKilled, Act::AgentIsStopped, Act::AgentDiesInAChange, Act::AgentCannotStart, Act::AgentStartsAlone];

/// A round's acts, in their order. Agents end in the first round and in those whose number is a power of two from 2 up:
/// so about half of a run, however long it is, is one agent's, whose memory can be told by.
pub fn round(number: u64, random: &mut fastrand::Rng) -> Vec<Act> {
    let ends = number == 0 || (number > 1 && number.is_power_of_two());
    let mut acts: Vec<Act> = ROUND.iter().chain(ENDS.iter().filter(|_| ends)).copied().collect();
    random.shuffle(&mut acts);
    acts
}

const DAY: i64 = 86_400;

impl Act {
    /// Does it, and holds the invariant against what it leaves.
    pub fn play(self, stage: &mut Stage, random: &mut fastrand::Rng) {
        match self {
            Self::Change => {
                let change = Change::any(&stage.state, random);
                stage.change(&change);
                stage.settle();
            }
            Self::Burst => burst(stage, random),
            Self::Gateway => {
                let change = Change::any(&stage.state, random);
                stage.change_by_gateway(&change);
                stage.holds("once the gateway has answered");
                stage.settle();
            }
            Self::Link => {
                toggle(stage, random.usize(..VETHS.len()));
                stage.settle();
            }
            Self::Container => {
                toggle(stage, VETHS.len() + random.usize(..CONTAINERS.len()));
                stage.settle();
            }
            Self::EndpointRefuses
            | Self::EndpointHangsUp
            | Self::EndpointCuts
            | Self::EndpointErrs
            | Self::EndpointBabbles
            | Self::EndpointHangs => self.endpoint_is_out(stage, random),
            Self::EndpointIsSlow => {
                let upstream = stage.moto.address();
                stage.endpoint.iter().for_each(|endpoint| endpoint.delay(upstream, Duration::from_millis(300)));
                let (before, change) = (stage.state.clone(), Change::any(&stage.state, random));
                stage.change(&change);
                let after = stage.state.clone();
                stage.holds_while("while a slow endpoint tells of a change", &[before, after]);
                stage.settle();
                stage.endpoint.iter().for_each(|endpoint| endpoint.forward(upstream));
            }
            Self::DockerIsGone => docker_is_out(stage, random, None),
            Self::DockerHangs => docker_is_out(stage, random, Some(Manner::Hangs)),
            Self::DockerIsMute => {
                stage.replace_socket(Some(Manner::NoEvents));
                toggle(stage, VETHS.len() + random.usize(..CONTAINERS.len()));
                stage.settle();
                stage.holds("though Docker's events are lost");
                stage.replace_socket(Some(Manner::Open));
                stage.settle();
            }
            Self::DockerRestarts => {
                stage.engine.stop(if random.bool() { Signal::SIGKILL } else { Signal::SIGTERM });
                stage.is_in_trouble();
                stage.holds("while dockerd is dead");
                stage.start_engine();
                stage.settle();
            }
            Self::NetlinkOverruns => netlink_overruns(stage, random),
            Self::BpfFails => bpf_fails(stage, random),
            Self::BpfIsOut => bpf_is_out(stage, random),
            Self::ClockJumps => {
                let days = [1, -1, 400, -400, 20_000][random.usize(..5)];
                let before = stage.seams.clock_wrong();
                stage.seams.set_clock(days * DAY);
                let change = Change::any(&stage.state, random);
                stage.change(&change);
                stage.settle();
                assert!(stage.seams.clock_wrong() > before, "the agent signs with the wall clock's time");
                stage.holds("after the clock has jumped");
                toggle(stage, VETHS.len() + random.usize(..CONTAINERS.len()));
                stage.seams.set_clock(0);
                stage.settle();
            }
            Self::AgentIsKilled => {
                stage.agent.kill();
                stage.holds("without an agent");
                stage.agent.start();
                stage.settle();
            }
            Self::AgentIsStopped => {
                let status = stage.agent.stop();
                assert!(status.success(), "{status}");
                let (before, change) = (stage.state.clone(), Change::any(&stage.state, random));
                stage.change(&change);
                stage.holds_of("without an agent to hear of a change", &[&before]);
                // Back by less than the machine is up, or the clock would be before its beginning.
                stage.agent.set_ahead([400 * DAY, -30, 0][random.usize(..3)]).start();
                stage.settle();
            }
            Self::AgentDiesInAChange => {
                let before = stage.state.clone();
                let mut states = vec![before];
                for _ in 0..3 {
                    let change = Change::any(&stage.state, random);
                    stage.change(&change);
                    states.push(stage.state.clone());
                }
                stage.agent.kill();
                stage.holds_while("after an agent died in a change", &states);
                stage.agent.start();
                stage.settle();
            }
            Self::AgentCannotStart => {
                stage.agent.kill();
                let failures = [
                    (commands::MAP_CREATE, Errno::ENOMEM),
                    (commands::PROG_LOAD, Errno::EPERM),
                    (commands::PIN, Errno::ENOSPC),
                ];
                let (command, error) = failures[random.usize(..failures.len())];
                let only: &'static [u64] = match command {
                    commands::MAP_CREATE => &[commands::MAP_CREATE],
                    commands::PROG_LOAD => &[commands::PROG_LOAD],
                    _ => &[commands::PIN],
                };
                stage.seams.fail(Failures { commands: only, after: 0, times: u64::MAX, error });
                stage.agent.start();
                wait_for("a call that fails", || (stage.seams.failed() > 0).then_some(()));
                stage.holds("while an agent can't start");
                stage.agent.kill();
                stage.seams.heal();
                stage.holds("without the agent that couldn't start");
                stage.agent.start();
                stage.settle();
            }
            Self::AgentStartsAlone => {
                stage.agent.kill();
                stage.refuse(true);
                stage.replace_socket(None);
                stage.agent.start();
                stage.is_in_trouble();
                stage.holds("with an agent that hears of nothing");
                stage.replace_socket(Some(Manner::Open));
                stage.refuse(false);
                stage.settle();
            }
        }
        stage.holds("once the agent has settled");
    }

    /// The last policy stands, whatever the endpoint would say; the next one follows when it says it.
    fn endpoint_is_out(self, stage: &mut Stage, random: &mut fastrand::Rng) {
        let upstream = stage.moto.address();
        match (self, &stage.endpoint) {
            (Self::EndpointRefuses, _) => stage.refuse(true),
            (Self::EndpointCuts, Some(endpoint)) => endpoint.cut(upstream),
            (Self::EndpointErrs, Some(endpoint)) => {
                endpoint.answer("503 Service Unavailable", "text/html", "<html>come back later</html>");
            }
            (Self::EndpointBabbles, Some(endpoint)) => {
                endpoint.answer("200 OK", "text/xml", "<{action}Response><nonsense/></{action}");
            }
            (Self::EndpointHangs, Some(endpoint)) => endpoint.hang(),
            (_, Some(endpoint)) => endpoint.hang_up(),
            (_, None) => {}
        }
        // It is out now: what changes from here on can't be heard of.
        let before = stage.state.clone();
        for _ in 0..random.usize(1..4) {
            let change = Change::any(&stage.state, random);
            stage.change(&change);
        }
        stage.holds_of("while the endpoint is out", &[&before]);
        stage.is_in_trouble();
        stage.holds_of("while the agent tells that the endpoint is out", &[&before]);
        match &stage.endpoint {
            Some(endpoint) => endpoint.forward(upstream),
            None => stage.refuse(false),
        }
        stage.settle();
    }
}

/// An instance's link goes, or comes back.
fn toggle(stage: &mut Stage, instance: usize) {
    // Somebody has to be there, or there is nothing to ask.
    if !stage.state.present[instance] {
        stage.plug(instance);
    } else if stage.that_are(true).len() > 2 {
        stage.unplug(instance);
    }
}

fn burst(stage: &mut Stage, random: &mut fastrand::Rng) {
    let mut states = vec![stage.state.clone()];
    for _ in 0..random.usize(3..8) {
        let change = Change::any(&stage.state, random);
        stage.change(&change);
        states.push(stage.state.clone());
    }
    stage.holds_while("while changes are under way", &states);
    stage.settle();
}

/// Rules go on changing while nobody hears of containers.
fn docker_is_out(stage: &mut Stage, random: &mut fastrand::Rng, manner: Option<Manner>) {
    stage.replace_socket(manner);
    for _ in 0..2 {
        let change = Change::any(&stage.state, random);
        stage.change_by_gateway(&change);
        stage.holds("while docker is out");
    }
    stage.replace_socket(Some(Manner::Open));
    stage.settle();
}

/// A link comes while the agent doesn't run, and so many others change that the kernel has to drop what it would tell.
fn netlink_overruns(stage: &mut Stage, random: &mut fastrand::Rng) {
    let instance = random.usize(..VETHS.len());
    if stage.state.present[instance] {
        stage.unplug(instance);
        stage.settle();
    }
    let agent = Pid::from_raw(i32::try_from(stage.agent.pid()).expect("a process id"));
    let lost = || lost_events(stage.agent.pid());
    let before = lost();
    kill(agent, Signal::SIGSTOP).expect("the agent runs");
    let aliases: Vec<String> = (0..800).map(|number| format!("link set dev br0 alias n{number}")).collect();
    stage.world.host.ip(&aliases.join("\n"));
    let overrun = lost() - before;
    stage.plug(instance);
    kill(agent, Signal::SIGCONT).expect("the agent runs");
    assert!(overrun > 0, "events were lost, or this shows nothing");
    // Before the look that is made every ten seconds anyway.
    stage.is_attached_within(instance, Duration::from_secs(6));
    stage.settle();
}

/// Events that the kernel couldn't queue for a process's netlink sockets (proc_net(5): the sockets of its namespace).
fn lost_events(pid: u32) -> u64 {
    let sockets = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let sockets = sockets.filter_map(|entry| fs::read_link(entry.path()).ok());
    let sockets: Vec<String> = sockets.map(|target| target.display().to_string()).collect();
    let listed = fs::read_to_string(format!("/proc/{pid}/net/netlink")).unwrap_or_default();
    let rows = listed.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (drops, inode) = (fields.get(8)?.parse::<u64>().ok()?, fields.get(9)?);
        sockets.contains(&format!("socket:[{inode}]")).then_some(drops)
    });
    rows.sum()
}

/// Some calls of one kind fail, from somewhere in a change on. What was before stands, or what is to come.
fn bpf_fails(stage: &mut Stage, random: &mut fastrand::Rng) {
    const CHOICE: [(&[u64], Errno); 6] = [
        (&[commands::UPDATE], Errno::ENOMEM),
        (&[commands::UPDATE], Errno::EBUSY),
        (&[commands::DELETE], Errno::EAGAIN),
        (&[commands::UPDATE, commands::DELETE], Errno::EPERM),
        (&[commands::LOOKUP, commands::BATCH, commands::QUERY], Errno::EIO),
        (&[commands::TEST_RUN], Errno::ENOMEM),
    ];
    let (commands, error) = CHOICE[random.usize(..CHOICE.len())];
    let mut states = vec![stage.state.clone()];
    stage.seams.fail(Failures { commands, after: random.u64(..12), times: random.u64(1..4), error });
    for _ in 0..random.usize(1..5) {
        let change = Change::any(&stage.state, random);
        stage.change(&change);
        states.push(stage.state.clone());
    }
    stage.holds_while("while calls of bpf(2) fail", &states);
    stage.seams.heal();
    stage.settle();
}

/// Nothing can be written: the change is refused, and the policy before it stands whole.
fn bpf_is_out(stage: &mut Stage, random: &mut fastrand::Rng) {
    let before = stage.state.clone();
    let commands = &[commands::UPDATE, commands::LINK_CREATE, commands::LINK_UPDATE, commands::DELETE];
    stage.seams.fail(Failures { commands, after: 0, times: u64::MAX, error: Errno::ENOMEM });
    let change = stage.state.toggled(random);
    stage.change(&change);
    wait_for("a call of bpf(2) that fails", || (stage.seams.failed() > 0).then_some(()));
    stage.is_in_trouble();
    stage.holds_of("while nothing can be written", &[&before]);
    stage.seams.heal();
    stage.settle();
}

/// Back to the base state.
pub fn restore(stage: &mut Stage) {
    let base = State::base();
    for instance in stage.that_are(false) {
        stage.plug(instance);
    }
    for change in Change::between(&stage.state.clone(), &base) {
        stage.change(&change);
    }
    assert_eq!(stage.state, base);
    assert_eq!(stage.that_are(true).len(), INSTANCES);
    stage.settle();
}
