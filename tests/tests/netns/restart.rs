//! Enforcement without the agent, through its restarts, and its end.

use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use aya::util::KernelVersion;
use tests::e2e::{Agent, Lab, Namespace, Rules, run, wait_for};

use crate::{pass, vanish};

fn lab() -> Lab {
    let lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["-1 - 2001:db8:1::10/128", "tcp 22 10.0.1.10/32"]));
    let mut lab = lab.rules(|rules| rules.ingress("sg-a", &[])).start();
    lab.serve("b", &[22, 23]);
    lab
}

#[test]
fn a_killed_agent_leaves_enforcement_and_the_next_one_adopts_it() {
    let mut lab = lab();
    let mut stream = lab.stream("a", "b", 22);
    lab.agent.kill();
    stream.goes_on();
    pass(lab.tcp("a", "b", 22));
    lab.tcp("a", "b", 23)[0].vanishes();
    lab.agent.start().wait();
    stream.goes_on();
    pass(lab.tcp("a", "b", 22));
    lab.tcp("a", "b", 23)[0].vanishes();
    // The flow was carried over: it outlives its rule as any tracked one does (SG-3.4).
    lab.change(|rules| rules.ingress("sg-b", &[]));
    stream.goes_on();
    vanish(lab.tcp("a", "b", 22));
}

#[test]
fn what_changed_while_no_agent_ran_is_enforced_by_the_next() {
    let mut lab = lab();
    assert!(lab.agent.stop().success());
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("a", "b", 23)[0].vanishes();
    lab.rules.ingress("sg-b", &["tcp 23 10.0.1.0/24"]).write();
    lab.agent.start().wait();
    lab.tcp("a", "b", 22)[0].vanishes();
    lab.tcp("a", "b", 23)[0].passes();
}

/// Thousands of datagrams, of an old flow and of new ones, while agents end and start: not one that is allowed may be
/// lost, and not one that isn't may get through.
#[test]
fn a_restart_has_no_gap() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["udp 5000 10.0.1.10/32"])).start();
    lab.serve("b", &[5000, 5001]);
    let [to, _] = lab.addresses("b");
    lab.udp("a", "b", 5000)[0].passes();
    let before = lab.server("b", 5000).datagrams();
    let (hammer, arrived) = (Hammer::default(), lab.server("b", 5000).counted());
    let stop = |agent: &mut Agent| {
        agent.stop();
    };
    thread::scope(|scope| {
        let a = lab.world.namespace("a");
        let hammer = &hammer;
        let _end = EndOf(hammer);
        scope.spawn(move || a.run(|| hammer.run(to, 5000, 5001, || arrived() - before)));
        for restart in [Agent::kill, stop, Agent::kill] {
            restart(&mut lab.agent);
            hammer.wait_for_more(100);
            lab.agent.start().wait();
            hammer.wait_for_more(100);
        }
    });
    let sent = hammer.sent.load(SeqCst);
    println!("{sent} datagrams of each kind");
    wait_for("everything that is allowed arrives", || {
        (lab.server("b", 5000).datagrams() == before + sent).then_some(())
    });
    assert_eq!(lab.server("b", 5001).datagrams(), 0);
}

#[test]
fn detach_takes_everything_away() {
    let mut lab = lab();
    let running = lab.agent.detach();
    let said = String::from_utf8_lossy(&running.stderr).into_owned();
    assert!(!running.status.success() && said.contains(&lab.agent.pid().to_string()), "{said}");
    lab.tcp("a", "b", 23)[0].vanishes();
    lab.agent.stop();
    assert!(lab.agent.bpffs().exists());
    lab.tcp("a", "b", 23)[0].vanishes();
    let detached = lab.agent.detach();
    let report: serde_json::Value = serde_json::from_slice(&detached.stdout).expect("a report");
    assert!(detached.status.success(), "{report:#}");
    assert_eq!(report["links"], 4, "two programs on each of two links: {report:#}");
    assert!(!lab.agent.bpffs().exists());
    pass(lab.tcp("a", "b", 23));
    pass(lab.ping("b", "a"));
    // There is nothing left to take away.
    assert!(lab.agent.detach().status.success());
}

#[test]
fn with_detach_on_exit_enforcement_ends_with_the_agent() {
    let mut lab = Lab::with(&["a", "b"]).arguments(&["--detach-on-exit"]).start();
    lab.serve("b", &[22]);
    vanish(lab.tcp("a", "b", 22));
    assert!(lab.agent.stop().success());
    pass(lab.tcp("a", "b", 22));
    assert!(!lab.agent.bpffs().exists());
}

#[test]
fn the_second_agent_of_a_directory_is_told_who_has_it() {
    let lab = lab();
    let second = tests::e2e::output(lab.agent.command().args(["run", "--no-docker", "--rules"]).arg(lab.rules.path()));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success());
    assert!(said.contains(&format!("pid {}", lab.agent.pid())) && said.contains("--state-dir"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("a", "b", 23)[0].vanishes();
}

#[test]
fn two_agents_share_a_machine() {
    let mut lab = Lab::with(&["a", "b", "c"]).attach(&["a", "b"]).start();
    lab.serve("b", &[22]);
    lab.serve("c", &[22]);
    let mut other = Agent::new(Some(&lab.world.host));
    let mut rules = Rules::new(other.directory().join("rules.json"));
    rules.ingress("sg-other", &["tcp 22 10.0.1.10/32"]).instance(
        "i-c",
        &["sg-other"],
        &lab.world.instance("c").addresses(),
    );
    rules.write();
    other.arguments(["--no-docker", "--attach", "i-c=veth-c", "--rules"]).arguments([rules.path()]);
    lab.tcp("b", "c", 22)[0].passes();
    other.start().wait();
    lab.tcp("a", "c", 22)[0].passes();
    lab.tcp("b", "c", 22)[0].vanishes();
    lab.tcp("a", "b", 22)[0].vanishes();
    // Neither ends with the other.
    other.stop();
    assert!(other.detach().status.success());
    lab.tcp("b", "c", 22)[0].passes();
    lab.tcp("a", "b", 22)[0].vanishes();
    assert!(lab.agent.bpffs().exists());
    other.start().wait();
    lab.agent.stop();
    assert!(lab.agent.detach().status.success());
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("b", "c", 22)[0].vanishes();
}

/// The programs of this machine are seen by who may: after a detach none of this agent's are on the links.
#[test]
fn a_fresh_look_finds_no_program_after_detach() {
    let mut lab = lab();
    assert_eq!(programs(&lab.world.host, "veth-b"), 2, "they are seen while they are there");
    lab.agent.stop();
    assert_eq!(programs(&lab.world.host, "veth-b"), 2);
    assert!(lab.agent.detach().status.success());
    // The kernel takes a link down after its last pin is gone, which on a busy machine is a moment later.
    wait_for("no program on the link", || (programs(&lab.world.host, "veth-b") == 0).then_some(()));
    assert!(!Path::new(lab.agent.bpffs()).exists());
}

/// How many programs are on a link: as TCX has them, or before Linux 6.6 as filters.
fn programs(host: &Namespace, link: &str) -> usize {
    use aya::programs::{SchedClassifier, tc::TcAttachType};
    if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 6, 0)) {
        let filters = |side| run(host.command("tc").args(["filter", "show", "dev", link, side]));
        return ["ingress", "egress"].into_iter().map(|side| filters(side).matches("direct-action").count()).sum();
    }
    host.run(|| {
        let count = |side| match SchedClassifier::query_tcx(link, side) {
            Ok((_, programs)) => programs.len(),
            Err(error) => panic!("{link}: {error}"),
        };
        count(TcAttachType::Ingress) + count(TcAttachType::Egress)
    })
}

/// The most datagrams that are under way.
const UNDER_WAY: u64 = 64;

/// Sends and sends, each time by a socket that is used to the end and by a new one.
#[derive(Default)]
struct Hammer {
    end: AtomicBool,
    sent: AtomicU64,
}

impl Hammer {
    fn run(&self, to: IpAddr, allowed: u16, denied: u16, arrived: impl Fn() -> u64) {
        let socket = || UdpSocket::bind("0.0.0.0:0").expect("a socket");
        let old = socket();
        while !self.end.load(SeqCst) {
            // No more than every buffer holds while nobody takes them out.
            while self.sent.load(SeqCst) > arrived() + UNDER_WAY && !self.end.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            let new = socket();
            for (socket, port) in [(&old, allowed), (&new, allowed), (&old, denied), (&new, denied)] {
                socket.send_to(b"x", (to, port)).expect("sending can't fail");
            }
            self.sent.fetch_add(2, SeqCst);
            // So that others have a processor, too; nothing waits for this.
            thread::sleep(Duration::from_micros(500));
        }
    }

    fn wait_for_more(&self, more: u64) {
        let goal = self.sent.load(SeqCst) + more;
        wait_for("the hammer goes on", || (self.sent.load(SeqCst) >= goal).then_some(()));
    }
}

/// Ends the hammer also where the test panics: the scope waits for its thread.
struct EndOf<'a>(&'a Hammer);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.end.store(true, SeqCst);
    }
}
