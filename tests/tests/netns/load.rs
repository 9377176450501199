//! Enforcement under load, while agents are killed, stopped, started and replaced and rules flip: packet for packet,
//! counted where they arrive. `SG_RESTARTS` and `SG_FLIPS` (flips for each agent) make it long: `cargo xtask soak` does
//! 100 and 10.

use std::fs;
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tests::e2e::{Agent, Lab, PATIENCE, SILENCE, Stream, wait_for};

/// Long connections.
const STREAMS: usize = 4;
/// The most datagrams that are under way: as many as every buffer holds while nobody takes them out.
const UNDER_WAY: u64 = 64;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// What goes on all the time. Each counts what it has done, and fails by panicking.
#[derive(Default)]
pub struct Load {
    end: AtomicBool,
    /// Datagrams that must arrive, and as many that mustn't.
    datagrams: AtomicU64,
    /// Connections that were made, used and closed.
    connections: AtomicU64,
    /// Words that long connections brought back.
    words: AtomicU64,
    /// Whether who gets no answer speaks again.
    speaks_again: bool,
}

impl Load {
    /// One in which who gets no answer speaks again.
    pub fn that_speaks_again() -> Self {
        Self { speaks_again: true, ..Self::default() }
    }

    fn run(&self, count: &AtomicU64, mut once: impl FnMut()) {
        while !self.end.load(SeqCst) {
            once();
            count.fetch_add(1, SeqCst);
            // As fast as a tracked flow's end frees its entry; nothing waits for this.
            thread::sleep(Duration::from_millis(8));
        }
    }

    fn datagrams(&self, to: IpAddr, arrived: impl Fn() -> u64) {
        let socket = || UdpSocket::bind("0.0.0.0:0").expect("a socket");
        let old = socket();
        self.run(&self.datagrams, || {
            while 2 * self.datagrams.load(SeqCst) > arrived() + UNDER_WAY && !self.end.load(SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            let new = socket();
            for (socket, port) in [(&old, 5000), (&new, 5000), (&old, 5001), (&new, 5001)] {
                socket.send_to(b"x", (to, port)).expect("sending can't fail");
            }
        });
    }

    fn connections(&self, to: IpAddr) {
        self.run(&self.connections, || {
            let stream = TcpStream::connect_timeout(&(to, 22).into(), PATIENCE).expect("a connection");
            self.speak(&mut Stream::new(stream));
        });
    }

    fn speak(&self, stream: &mut Stream) {
        if self.speaks_again { stream.goes_on_when_spoken_to() } else { stream.goes_on() }
    }

    /// Goes on only when everything has: nobody is at rest while agents change.
    fn wait_for_more(&self) {
        let counts = || [&self.datagrams, &self.connections, &self.words].map(|count| count.load(SeqCst));
        let before = counts();
        wait_for("traffic goes on", || {
            (counts().iter().zip(&before).all(|(now, before)| *now > before + 5) || self.end.load(SeqCst)).then_some(())
        });
    }
}

/// Ends the load also where the test panics: the scope waits for its threads.
struct EndOf<'a>(&'a Load);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.end.store(true, SeqCst);
    }
}

pub fn lab() -> Lab {
    let mut lab = Lab::with(&["a", "b"]);
    lab = lab.rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.10/32", "udp 5000 10.0.1.10/32"]));
    let mut lab = lab.start();
    lab.serve("b", &[22, 5000, 5001]);
    lab
}

/// Rules that say the same of the traffic, by an address or by a group, and something else of ports that nobody uses.
fn flip(lab: &mut Lab, number: u64) {
    let ports = format!("tcp {} 0.0.0.0/0", 6000 + number % 1000);
    let rules: [&str; 3] = if number.is_multiple_of(2) {
        ["tcp 22 sg-a", "udp 5000 10.0.1.10/32", &ports]
    } else {
        ["tcp 22 10.0.1.10/32", "udp 5000 sg-a", &ports]
    };
    lab.change(|file| file.ingress("sg-b", &rules));
}

/// Packets that an interface dropped, by reason; but for what kernels say by multicast of their own accord.
fn drops(lab: &Lab, instance: &str, direction: &str) -> Vec<(String, u64)> {
    let interface = lab.agent.interface(instance);
    let Value::Object(reasons) = &interface["counters"][direction] else { return Vec::new() };
    let is_drop = |name: &str| sg_common::verdict::Drop::ALL.iter().any(|drop| drop.name() == name);
    let dropped = reasons.iter().filter(|(name, _)| is_drop(name) && *name != "multicast");
    dropped.map(|(name, count)| (name.clone(), count["packets"].as_u64().unwrap_or(0))).collect()
}

/// Runs the load while `change` does something to the agent, again and again: everything that is allowed arrives, and
/// nothing else. Returns what was sent.
pub fn under_load(lab: &mut Lab, load: Load, change: impl FnMut(&mut Lab, u64)) -> Load {
    let load = run(lab, load, number("SG_RESTARTS", 4), change);
    let sent = 2 * load.datagrams.load(SeqCst);
    wait_for("everything that is allowed arrives", || (lab.server("b", 5000).datagrams() == sent).then_some(()));
    assert_eq!(lab.server("b", 5001).datagrams(), 0, "nothing that is denied may get through");
    load
}

/// The same, whatever arrives.
fn run(lab: &mut Lab, load: Load, rounds: u64, mut change: impl FnMut(&mut Lab, u64)) -> Load {
    let [to, _] = lab.addresses("b");
    let mut streams: Vec<Stream> = (0..STREAMS).map(|_| lab.stream("a", "b", 22)).collect();
    let namespace = lab.world.namespace("a").handle();
    let arrived = lab.server("b", 5000).counted();
    thread::scope(|scope| {
        let (load, namespace) = (&load, &namespace);
        let enter = move || setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter the namespace");
        let _end = EndOf(load);
        scope.spawn(move || {
            let _end = EndOf(load);
            enter();
            load.datagrams(to, arrived);
        });
        scope.spawn(move || {
            let _end = EndOf(load);
            enter();
            load.connections(to);
        });
        scope.spawn(move || {
            let _end = EndOf(load);
            load.run(&load.words, || streams.iter_mut().for_each(|stream| load.speak(stream)));
        });
        for round in 0..rounds {
            load.wait_for_more();
            change(lab, round);
            load.wait_for_more();
        }
    });
    println!(
        "{} datagrams of each kind, {} connections, {} words by {STREAMS} streams",
        2 * load.datagrams.load(SeqCst),
        load.connections.load(SeqCst),
        STREAMS as u64 * load.words.load(SeqCst)
    );
    load
}

/// The control: rules that are wrong for a fifth of a second, and by no more than one port each, are seen in what is
/// counted where packets arrive.
#[test]
fn a_gap_and_a_leak_of_a_moment_are_seen_under_load() {
    let mut lab = lab();
    let load = run(&mut lab, Load::default(), 1, |lab, _| {
        lab.change(|file| file.ingress("sg-b", &["tcp 22 10.0.1.10/32", "udp 5001 10.0.1.10/32"]));
        thread::sleep(Duration::from_millis(200));
        lab.change(|file| file.ingress("sg-b", &["tcp 22 10.0.1.10/32", "udp 5000 10.0.1.10/32"]));
    });
    thread::sleep(SILENCE);
    let sent = 2 * load.datagrams.load(SeqCst);
    let (arrived, leaked) = (lab.server("b", 5000).datagrams(), lab.server("b", 5001).datagrams());
    assert!(arrived < sent, "{arrived} of {sent}: nothing was lost");
    assert!(leaked > 0, "nothing got through that was denied before and after");
}

/// Killed, stopped, and each time another agent with programs of its own that takes the links over; and rules that flip
/// meanwhile. The counters outlive all of them, so they tell of every single packet.
#[test]
fn restarts_and_flips_lose_nothing_and_let_nothing_through() {
    let mut lab = lab();
    let flips = number("SG_FLIPS", 5);
    let mut flipped = 0;
    let load = under_load(&mut lab, Load::default(), |lab, round| {
        if round.is_multiple_of(2) {
            lab.agent.kill();
        } else {
            lab.agent.stop();
        }
        lab.agent.start().wait();
        for _ in 0..flips {
            flip(lab, flipped);
            flipped += 1;
        }
    });
    println!("{flipped} flips");
    let denied = 2 * load.datagrams.load(SeqCst);
    let counted = || lab.agent.packets("i-b", "ingress", "no_rule") >= denied;
    wait_for("everything that is denied is counted", || counted().then_some(()));
    assert_eq!(drops(&lab, "i-b", "ingress"), [("no_rule".to_owned(), denied)], "and no other packet was dropped");
    assert_eq!(drops(&lab, "i-a", "egress"), [], "nor there");
}

/// As if the earlier agent's maps had another layout: the next one can't go on with them. Connections live on by what
/// rules say of packets in their middle (SG-3.9); a few of those packets are sent again. No rule lets the server's own
/// packets in at the client: an answer that comes after the change passes once the client has spoken again.
#[test]
fn an_upgrade_to_another_layout_cuts_no_connection() {
    let mut lab = lab();
    let load = Load::that_speaks_again();
    under_load(&mut lab, load, |lab, _| {
        lab.agent.kill();
        let pins = lab.agent.bpffs().to_owned();
        let current = format!("-v{}", sg_common::abi::LAYOUT);
        let mut renamed = 0;
        for pin in fs::read_dir(&pins).expect("pins") {
            let path = pin.expect("a pin").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if let Some(name) = name.strip_suffix(&current) {
                fs::rename(&path, pins.join(format!("{name}-v0"))).expect("a pin that can be renamed");
                renamed += 1;
            }
        }
        assert!(renamed >= 6, "{renamed} maps");
        let agent: &mut Agent = &mut lab.agent;
        agent.start().wait();
    });
}
