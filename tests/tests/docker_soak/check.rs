//! The invariant: what the kernel enforces is what the norm says of the last committed policy. Asked twice over: every
//! question goes through the programs that are on the links (BPF_PROG_TEST_RUN), and real datagrams go from everybody to
//! everybody and are counted where they arrive. What is asked and what is right is `model`'s.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData};
use nix::net::if_::if_nametoindex;
use sg_agent::datapath::sys;
use sg_agent::oracle::Question;
use sg_common::abi::{Direction, Flow, FlowKey};
use sg_common::conntrack::State as FlowState;
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};
use tests::bpf::{hash, maps_of};
use tests::cast::Host;
use tests::e2e::Namespace;
use tests::packets::{Packet, icmp, icmpv6, other, tcp, udp};
use tests::programs::{SHOT, program_by_id, run};

use crate::model::{COUNTED, GRE, HOSTS, INSTANCES, Kind, OUTSIDE, State, address, kinds};

/// How long a datagram that must arrive may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long after those that must arrive others may still be under way. They take microseconds.
const AFTER: Duration = Duration::from_millis(20);
/// `BPF_EXIST` (include/uapi/linux/bpf.h): an entry is replaced, none is made.
const EXISTING: u64 = 2;

/// Source ports of frames that are put through the programs, which no socket here is given.
const FRAMES: std::ops::Range<u16> = 61_000..65_000;
/// Source ports of datagrams; each is another flow for as long as a flow of datagrams can live.
const DATAGRAMS: std::ops::Range<u16> = 20_000..30_000;

/// Who can be asked, where.
#[derive(Debug, Default)]
pub struct Places {
    /// Each host's namespace: those of instances that aren't plugged in have none.
    pub namespaces: BTreeMap<usize, Namespace>,
    /// Each plugged instance's link on the host.
    pub links: BTreeMap<usize, String>,
    /// MAC addresses that Docker gave.
    pub macs: BTreeMap<usize, [u8; 6]>,
}

impl Places {
    fn host(&self, number: usize) -> Host {
        let host = HOSTS[number];
        host.with_mac(self.macs.get(&number).copied().unwrap_or(host.mac))
    }
}

/// Asks. Each question is a flow that nobody has had before, or rules would have no say.
#[derive(Debug)]
pub struct Checker {
    frames: u16,
    datagrams: u16,
    number: u64,
    receivers: BTreeMap<usize, Vec<UdpSocket>>,
    /// Datagrams that mustn't arrive, however late: what they are.
    forbidden: BTreeMap<u64, String>,
    /// Questions so far, to programs and by datagrams.
    pub asked: (u64, u64),
}

impl Checker {
    /// One that has asked nothing.
    pub fn new() -> Self {
        Self {
            frames: FRAMES.start,
            datagrams: DATAGRAMS.start,
            number: 0,
            receivers: BTreeMap::new(),
            forbidden: BTreeMap::new(),
            asked: (0, 0),
        }
    }

    /// Listens for datagrams at a host; in another namespace than before, if it was there before.
    pub fn listen(&mut self, host: usize, namespace: &Namespace) {
        let sockets = namespace.run(|| COUNTED.map(|port| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))));
        let sockets = sockets.into_iter().map(|socket| {
            let socket = socket.expect("a port that nobody has");
            socket.set_nonblocking(true).expect("a socket's own flag");
            socket
        });
        self.receivers.insert(host, sockets.collect());
    }

    /// Lets go of a host's namespace: a socket keeps it, and its link.
    pub fn leave(&mut self, host: usize) {
        self.receivers.remove(&host);
    }

    /// What is otherwise than all of these states say. One state is the committed one; several are those that a change
    /// leads through, and each answer must be one of theirs.
    pub fn differences(&mut self, host: &Namespace, places: &Places, states: &[&State]) -> Vec<String> {
        let mut differences = host.run(|| self.by_programs(places, states));
        differences.extend(self.by_datagrams(places, states));
        differences
    }

    /// Every question to every program, as of the host's namespace.
    fn by_programs(&mut self, places: &Places, states: &[&State]) -> Vec<String> {
        // The two ways one after the other: what has no ports is one flow for both.
        let ways = [Direction::Ingress, Direction::Egress].into_iter();
        ways.flat_map(|way| self.by_programs_of(places, states, way)).collect()
    }

    fn by_programs_of(&mut self, places: &Places, states: &[&State], way: Direction) -> Vec<String> {
        let mut differences = Vec::new();
        let mut programs = Vec::new();
        for (&instance, link) in &places.links {
            let Ok(ifindex) = if_nametoindex(link.as_str()) else {
                differences.push(format!("{link}: there is no such link"));
                continue;
            };
            let first = sys::tcx_programs(ifindex, way).ok().and_then(|ids| ids.first().copied());
            let Some((id, program)) = first.and_then(|id| Some((id, program_by_id(id).ok()?))) else {
                differences.push(format!("{link}: no program, {}", way.name()));
                continue;
            };
            programs.push(id);
            let allowed: Vec<_> = states.iter().map(|state| state.rules_of(instance, way)).collect();
            for peer in (0..HOSTS.len()).filter(|peer| *peer != instance) {
                for is_v4 in [true, false] {
                    for kind in kinds(is_v4) {
                        let question =
                            Question { peer: address(peer, is_v4), protocol: kind.protocol, port: kind.port };
                        let (from, to) = if way == Direction::Ingress { (peer, instance) } else { (instance, peer) };
                        let frame = self.packet(places, from, to, kind, is_v4).frame();
                        let returned = run(&program, ifindex, &frame);
                        self.asked.0 += 1;
                        let passes = returned.as_ref().is_ok_and(|action| *action != SHOT);
                        if returned.is_err() || !allowed.iter().any(|allowed| allowed(&question) == passes) {
                            differences.push(format!(
                                "{} of {} with {}: protocol {} port {}: the program says {returned:?}, the norm {}",
                                way.name(),
                                HOSTS[instance].name,
                                question.peer,
                                kind.protocol,
                                kind.port,
                                if passes { "no" } else { "yes" }
                            ));
                        }
                    }
                }
            }
        }
        end_flows(&programs);
        differences
    }

    fn packet(&mut self, places: &Places, from: usize, to: usize, kind: Kind, is_v4: bool) -> Packet {
        self.frames = next(self.frames, &FRAMES);
        let (from, to) = (places.host(from), places.host(to));
        match kind.protocol {
            TCP => tcp(from, to).ports(self.frames, kind.port).syn().family(is_v4, from, to),
            UDP => udp(from, to).ports(self.frames, kind.port).family(is_v4, from, to),
            ICMP => icmp(from, to, (kind.port >> 8) as u8, 0).id(self.frames),
            ICMPV6 => icmpv6(from, to, (kind.port >> 8) as u8, 0).id(self.frames),
            protocol => other(from, to, protocol).family(is_v4, from, to),
        }
    }

    /// A datagram from everybody to everybody, of both families and to each port that is counted.
    fn by_datagrams(&mut self, places: &Places, states: &[&State]) -> Vec<String> {
        let (mut wanted, mut differences) = (BTreeMap::new(), Vec::new());
        let there = |host: usize| host == OUTSIDE || places.links.contains_key(&host);
        for (&from, namespace) in places.namespaces.iter().filter(|(host, _)| there(**host)) {
            let mut batch = Vec::new();
            for to in (0..HOSTS.len()).filter(|to| *to != from && there(*to) && self.receivers.contains_key(to)) {
                for (port, is_v4) in COUNTED.into_iter().flat_map(|port| [(port, true), (port, false)]) {
                    let passes = states.iter().map(|state| passes(state, from, to, port, is_v4));
                    let passes: Vec<bool> = passes.collect();
                    self.number += 1;
                    self.datagrams = next(self.datagrams, &DATAGRAMS);
                    let what = format!(
                        "a datagram from {} to {} {port}",
                        HOSTS[from].name,
                        SocketAddr::new(address(to, is_v4), port)
                    );
                    batch.push((self.number, self.datagrams, SocketAddr::new(address(to, is_v4), port)));
                    match (passes.contains(&true), passes.contains(&false)) {
                        (true, false) => drop(wanted.insert(self.number, what)),
                        (false, true) => drop(self.forbidden.insert(self.number, what)),
                        _ => {}
                    }
                }
            }
            self.asked.1 += batch.len() as u64;
            differences.extend(namespace.run(|| send(&batch)));
        }
        let end = Instant::now() + PATIENCE;
        while !wanted.is_empty() && Instant::now() < end {
            self.arrivals(&mut wanted, &mut differences);
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(AFTER);
        self.arrivals(&mut wanted, &mut differences);
        differences.extend(wanted.into_values().map(|what| format!("{what}: it is allowed, and didn't arrive")));
        differences
    }

    fn arrivals(&mut self, wanted: &mut BTreeMap<u64, String>, differences: &mut Vec<String>) {
        let mut word = [0; 8];
        for socket in self.receivers.values().flatten() {
            while let Ok((8, _)) = socket.recv_from(&mut word) {
                let number = u64::from_be_bytes(word);
                wanted.remove(&number);
                if let Some(what) = self.forbidden.remove(&number) {
                    differences.push(format!("{what}: it is denied, and arrived"));
                }
            }
        }
    }
}

fn next(port: u16, of: &std::ops::Range<u16>) -> u16 {
    if port + 1 < of.end { port + 1 } else { of.start }
}

/// Whether the norm lets a datagram out of where it comes from and into where it goes.
fn passes(state: &State, from: usize, to: usize, port: u16, is_v4: bool) -> bool {
    let asks = |host: usize, way, peer| {
        host >= INSTANCES || state.rules_of(host, way)(&Question { peer: address(peer, is_v4), protocol: UDP, port })
    };
    asks(from, Direction::Egress, to) && asks(to, Direction::Ingress, from)
}

/// Sends each number, in this thread's namespace; what couldn't be sent.
fn send(batch: &[(u64, u16, SocketAddr)]) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, source, to) in batch {
        let sent = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, *source)).and_then(|socket| {
            let to = match to {
                SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
                v6 => *v6,
            };
            socket.send_to(&number.to_be_bytes(), to)
        });
        if let Err(error) = sent {
            problems.push(format!("a datagram to {to} can't be sent: {error}"));
        }
    }
    problems
}

/// Has the flows of all questions be over, as `explain --live` does: the next sweep takes them out, and a flow without
/// ports begins anew with the next question.
fn end_flows(programs: &[u32]) {
    for map in maps_of(&programs[..programs.len().min(1)], "FLOWS") {
        let mut flows: HashMap<MapData, FlowKey, Flow> = hash(map).try_into().expect("a hash map");
        let is_ours = |port: u16| FRAMES.contains(&port) || DATAGRAMS.contains(&port);
        let keys: Vec<FlowKey> = flows.keys().filter_map(Result::ok).collect();
        for key in keys.iter().filter(|key| {
            is_ours(key.local_port) || is_ours(key.remote_port) || [ICMP, ICMPV6, GRE].contains(&key.protocol)
        }) {
            let over = Flow { state: FlowState::Reset as u8, ..Flow::default() };
            // The sweep may have taken it out meanwhile.
            let _ = flows.insert(key, over, EXISTING);
        }
    }
}
