//! New ports of enforced bridges (`--enforce-bridge`): nothing of them passes until it is known whose they are.

use std::fs;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use sg_agent::datapath::Pins;
use tests::e2e::{Lab, LabBuilder, Namespace, Paused, Server, wait_for};

use crate::{pass, vanish};

/// Frames that a new port sends before anything is looked at.
const FLOOD: u64 = 500;

/// A is an instance, C nobody's; B is an instance whose link doesn't exist yet.
fn lab(arguments: &[&str], change: impl FnOnce(LabBuilder) -> LabBuilder) -> Lab {
    let lab = Lab::with(&["a", "b", "c"]).attach(&["a", "b"]).arguments(arguments);
    lab.unplug("b");
    let mut lab = change(lab).start();
    lab.serve("c", &[22, 5000]);
    lab
}

/// Frames that crossed a namespace's `eth0`: received and sent.
fn frames(namespace: &Namespace) -> (u64, u64) {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev").expect("the namespace's links"));
    let row = table.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
    let numbers: Vec<u64> = row.unwrap_or_default().split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // proc_pid_net(5): bytes, packets and six more each way.
    numbers.get(1).copied().zip(numbers.get(9).copied()).unwrap_or_default()
}

/// Makes B's link while B sends to C without a pause, from before its link is up; does something then.
fn flooded_by_b<T>(lab: &Lab, then: impl FnOnce() -> T) -> T {
    let (b, c) = (lab.world.instance("b"), lab.world.instance("c"));
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let end = AtomicBool::new(false);
    struct EndOf<'a>(&'a AtomicBool);
    impl Drop for EndOf<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    thread::scope(|scope| {
        let _end = EndOf(&end);
        scope.spawn(|| {
            b.namespace.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
                while !end.load(SeqCst) {
                    // Until there is a way it fails.
                    let _ = socket.send_to(b"x", (c.v4, 5000));
                    thread::sleep(Duration::from_micros(100));
                }
            });
        });
        lab.world.host.ip(&format!(
            "link add {} type veth peer name eth0 address {} netns {}",
            b.link,
            mac(b.mac),
            b.namespace.name()
        ));
        // Nobody is asked for addresses: the first frame is one of the flood.
        b.namespace.ip(&format!(
            "addr add {}/24 dev eth0\n\
             link set eth0 up\n\
             neigh replace {} lladdr {} nud permanent dev eth0",
            b.v4,
            c.v4,
            mac(c.mac)
        ));
        // What the host's end says of itself passes no bridge.
        lab.world.host.sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", b.link), "1");
        lab.world.host.ip(&format!("link set {0} master br0\nlink set {0} up", b.link));
        then()
    })
}

fn flood(lab: &Lab) {
    let b = &lab.world.instance("b").namespace;
    wait_for("B has sent much", || (frames(b).1 > FLOOD).then_some(()));
}

fn arrived(lab: &Lab) -> &Server {
    lab.server("c", 5000)
}

#[test]
fn nothing_of_a_new_port_passes_before_it_is_known() {
    let lab = lab(&["--enforce-bridge", "br0"], |lab| lab);
    let paused = Paused::agent(&lab.agent);
    flooded_by_b(&lab, || {
        flood(&lab);
        assert_eq!(arrived(&lab).datagrams(), 0, "nobody knows yet whose link it is");
        // Others go on, and what they say to all doesn't get there.
        pass(lab.tcp("a", "c", 22));
        pass(lab.ping("host", "c"));
        let (received, _) = frames(&lab.world.instance("b").namespace);
        assert_eq!(received, 0);
        drop(paused);
        wait_for("B's datagrams arrive, as its rules allow them", || (arrived(&lab).datagrams() > 0).then_some(()));
        assert_eq!(lab.agent.interface("i-b")["attached"], true, "and not before");
    });
}

/// Or the other tests would show nothing.
#[test]
fn without_the_option_the_first_packets_pass() {
    let lab = lab(&[], |lab| lab);
    let _paused = Paused::agent(&lab.agent);
    flooded_by_b(&lab, || {
        flood(&lab);
        assert!(arrived(&lab).datagrams() > 0);
    });
}

/// And how many do where the agent runs: what B's rules deny passes until its link is found.
#[test]
fn without_the_option_a_new_link_is_enforced_in_a_moment() {
    let lab = lab(&[], |lab| lab.rules(|rules| rules.egress("sg-b", &[])));
    flooded_by_b(&lab, || {
        let began = Instant::now();
        wait_for("B is attached", || {
            let status = lab.agent.status();
            let interfaces = status["interfaces"].as_array()?;
            interfaces.iter().any(|one| one["instance"] == "i-b" && one["attached"] == true).then_some(())
        });
        println!("known after {:?} at most, {} datagrams passed", began.elapsed(), arrived(&lab).datagrams());
        // What is under way when the programs come has passed them.
        thread::sleep(Duration::from_millis(50));
        let (before, (_, sent)) = (arrived(&lab).datagrams(), frames(&lab.world.instance("b").namespace));
        let b = &lab.world.instance("b").namespace;
        wait_for("B has sent more", || (frames(b).1 > sent + FLOOD).then_some(()));
        assert_eq!(arrived(&lab).datagrams(), before);
    });
}

#[test]
fn what_the_rules_deny_never_passes() {
    let lab = lab(&["--enforce-bridge", "auto"], |lab| lab.rules(|rules| rules.egress("sg-b", &[])));
    flooded_by_b(&lab, || {
        flood(&lab);
        wait_for("B is attached, and its packets are judged", || {
            let status = lab.agent.status();
            let interfaces = status["interfaces"].as_array()?;
            let b = interfaces.iter().find(|one| one["instance"] == "i-b")?;
            (b["counters"]["egress"]["no_rule"]["packets"].as_u64()? > FLOOD).then_some(())
        });
        assert_eq!(arrived(&lab).datagrams(), 0);
    });
}

#[test]
fn strangers_are_let_through_and_without_an_agent_only_those_that_were_there() {
    let mut lab = lab(&["--enforce-bridge", "br0"], |lab| lab);
    pass(lab.tcp("a", "c", 22));
    lab.world.unplug("c");
    lab.world.plug("c");
    pass(lab.tcp("a", "c", 22));
    lab.agent.kill();
    pass(lab.tcp("a", "c", 22));
    pass(lab.ping("host", "c"));
    lab.world.unplug("c");
    lab.world.plug("c");
    vanish(lab.tcp("a", "c", 22));
    vanish(lab.ping("c", "host"));
    lab.agent.start().wait();
    pass(lab.tcp("a", "c", 22));
    // An agent that isn't told to has it no more.
    lab.agent.stop();
    lab.agent.without("--enforce-bridge").without("br0").start().wait();
    lab.agent.kill();
    lab.world.unplug("c");
    lab.world.plug("c");
    pass(lab.ping("c", "host"));
}

#[test]
fn detach_opens_the_bridge() {
    let mut lab = lab(&["--enforce-bridge", "br0"], |lab| lab);
    lab.agent.stop();
    lab.world.unplug("c");
    lab.world.plug("c");
    vanish(lab.ping("c", "host"));
    let detached = lab.agent.detach();
    let report: serde_json::Value = serde_json::from_slice(&detached.stdout).expect("a report");
    assert_eq!(report["gate"], true, "{report:#}");
    assert!(detached.status.success() && !lab.agent.bpffs().exists());
    pass(lab.ping("c", "host"));
}

#[test]
fn a_gate_that_is_taken_down_is_put_up_again() {
    let lab = lab(&["--enforce-bridge", "br0"], |lab| lab);
    let paused = Paused::agent(&lab.agent);
    let pins = Pins::new(lab.agent.bpffs());
    assert!(lab.world.host.run(|| pins.open_bridges()).expect("a table that can be deleted"));
    drop(paused);
    crate::tampering::repaired(&lab, "gate_removed", 1);
    assert!(lab.world.host.run(|| pins.has_gate()).expect("a table that can be asked for"));
    pass(lab.tcp("a", "c", 22));
    let _paused = Paused::agent(&lab.agent);
    flooded_by_b(&lab, || {
        flood(&lab);
        assert_eq!(arrived(&lab).datagrams(), 0);
    });
}
