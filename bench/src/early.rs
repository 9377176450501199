//! Clients that a published port's rules deny, before any handshake: what their SYNs cost the host, beside the kernel's
//! other ways to drop them. Frames are sent into a link of the host's namespace; whoever drops them does so within the
//! sender's system call.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};

use ::tests::cast::{Host, ROUTER, X};
use ::tests::e2e::{Agent, FrameSocket, Namespace, Rules, World, fill_checksums};
use ::tests::packets::tcp;
use ::tests::programs::{self, Hook};
use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use crate::load::{self, Server, Service, processor_time};
use crate::record::{Bound, Recorder, ratios};
use crate::site::feed;
use crate::world::Random;

/// The published port, the instance's behind it, and where the outside reaches it.
const PORT: u16 = 32_022;
const BEHIND: u16 = 22;
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Rules of the port's policy; the last of them lets [`X`] in.
const RULES: usize = 60;
/// Denied clients, each with an address and a port of its own.
const CLIENTS: usize = 1_024;
/// Frames that are timed at once: a millisecond or two, mostly undisturbed.
const BURST: usize = 2_000;

/// Who drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dropper {
    /// Nobody: frames go to a link whose other end is down. What sending costs.
    Nobody,
    /// sg-agent's program at the published port.
    Ours,
    /// nftables where frames come in, with the allowed sources as a set.
    NetdevIngress,
    /// iptables-legacy's INPUT behind conntrack, with so many rules.
    Input(usize),
    /// A TCX program that drops everything.
    Bare,
}

impl Dropper {
    const ALL: [Self; 6] =
        [Self::Nobody, Self::Ours, Self::NetdevIngress, Self::Input(1), Self::Input(RULES), Self::Bare];

    fn name(self) -> String {
        match self {
            Self::Nobody => "sent to nobody".into(),
            Self::Ours => format!("sg-agent, {RULES} rules"),
            Self::NetdevIngress => format!("nft netdev ingress, a set of {RULES}"),
            Self::Input(rules) => format!("iptables-legacy INPUT with conntrack, {rules} rules"),
            Self::Bare => "bare TCX drop".into(),
        }
    }
}

/// A host with a port that is open to few.
struct Place {
    dropper: Dropper,
    frames: Vec<Vec<u8>>,
    socket: FrameSocket,
    _server: Server,
    /// They go before the links that they are attached to.
    _agent: Option<Agent>,
    _link: Option<OwnedFd>,
    world: World,
}

/// Measures everything.
///
/// # Errors
/// Frames that met another fate than the one that is measured.
pub fn run(recorder: &Recorder) -> Result<()> {
    let mut places = Vec::new();
    for dropper in Dropper::ALL {
        recorder.check()?;
        match Place::new(dropper) {
            Ok(place) => places.push(place),
            Err(error) if matches!(dropper, Dropper::Nobody | Dropper::Ours) => {
                return Err(error).with_context(|| dropper.name());
            }
            Err(error) => recorder.note(&format!("without {}: {error:#}", dropper.name())),
        }
    }
    let mut values = vec![Vec::new(); places.len()];
    for round in 0..=recorder.rounds(24) {
        for (place, values) in places.iter().zip(&mut values) {
            recorder.check()?;
            let value = place.round(recorder.quick).with_context(|| place.dropper.name())?;
            // The first round only warms up.
            if round > 0 {
                values.push(value);
            }
        }
    }
    report(recorder, &places, &values);
    Ok(())
}

fn report(recorder: &Recorder, places: &[Place], values: &[Vec<f64>]) {
    let of = |dropper: Dropper| {
        let place = places.iter().position(|place| place.dropper == dropper)?;
        let net = values[place].iter().zip(&values[0]).map(|(all, sending)| all - sending);
        Some(net.collect::<Vec<f64>>())
    };
    for (place, values) in places.iter().zip(values) {
        let name = place.dropper.name();
        recorder.sample("denied SYN, its sending included", &name, "ns", values);
        if let Some(net) = of(place.dropper).filter(|_| place.dropper != Dropper::Nobody) {
            recorder.sample("denied SYN", &name, "ns", &net);
        }
    }
    let Some(ours) = of(Dropper::Ours) else { return };
    for (other, most) in [(Dropper::NetdevIngress, 1.0), (Dropper::Input(RULES), 0.5)] {
        if let Some(others) = of(other) {
            let what = format!("denied SYN, sg-agent / {}", other.name());
            recorder.target(&what, &ratios(&ours, &others), Bound::AtMost(most));
        }
    }
}

impl Place {
    fn new(dropper: Dropper) -> Result<Self> {
        let world = World::new(&["b"]);
        world.host.ip("link set veth-out address 02:00:00:00:00:01\nroute add 198.51.100.0/24 via 203.0.113.9");
        world.outside.ip("link add nowhere type veth peer name nobody\nlink set nowhere up");
        let instance = &world.instances[0];
        let server = match dropper {
            Dropper::Ours => Server::start(&instance.namespace, (instance.v4, BEHIND).into(), Service::Echo)?,
            _ => Server::start(&world.host, (HOST, PORT).into(), Service::Echo)?,
        };
        let link = if dropper == Dropper::Nobody { "nowhere" } else { "eth0" };
        let socket = FrameSocket::new(&world.outside, link)?;
        let (mut agent, mut hook) = (None, None);
        match dropper {
            Dropper::Nobody => {}
            Dropper::Ours => agent = Some(ours(&world)),
            Dropper::NetdevIngress => feed(&world.host, "nft", &["-f", "-"], &netdev())?,
            Dropper::Input(rules) => feed(&world.host, "iptables-legacy-restore", &[], &input(rules))?,
            Dropper::Bare => {
                let program = programs::returning(programs::SHOT)?;
                let attach = || programs::attach(program.as_fd(), if_nametoindex("veth-out")?, Hook::Ingress);
                hook = Some(world.host.run(attach).context("TCX needs Linux 6.6")?);
            }
        }
        let place = Self { dropper, frames: frames(), socket, _server: server, _agent: agent, _link: hook, world };
        if !matches!(dropper, Dropper::Nobody | Dropper::Bare) {
            let there = SocketAddr::from((HOST, PORT));
            load::latencies(&place.world.outside, there, 1).context("whom a rule lets in gets in")?;
        }
        Ok(place)
    }

    /// Nanoseconds of processor time a frame, of the least disturbed of several bursts. None may be answered: whoever
    /// isn't denied here meets a server, or a reset.
    fn round(&self, is_quick: bool) -> Result<f64> {
        let before = received(&self.world.outside)?;
        let is_nobody = self.dropper == Dropper::Nobody;
        let bursts = if is_quick { 5 } else { 20 };
        let mut best = f64::INFINITY;
        for _ in 0..bursts {
            let started = processor_time()?;
            for frame in self.frames.iter().cycle().take(BURST) {
                match self.socket.send(frame) {
                    // What isn't sent at all is said to have found no room.
                    Err(error) if is_nobody && error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
                    sent => sent?,
                }
            }
            best = best.min((processor_time()? - started) / BURST as f64);
        }
        let answered = received(&self.world.outside)? - before;
        // Neighbours may ask for each other meanwhile.
        ensure!(answered < BURST as u64 / 100, "{answered} of {} denied SYNs were answered", bursts * BURST);
        Ok(best)
    }
}

/// Packets that have come to the outside's link so far.
fn received(outside: &Namespace) -> Result<u64> {
    let table = outside.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = table.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no such link")?;
    // Bytes, then packets.
    Ok(line.split_whitespace().nth(1).context("a column of packets")?.parse()?)
}

fn frames() -> Vec<Vec<u8>> {
    let mut random = Random::new(29);
    let host = Host { name: "host", mac: ROUTER, v4: HOST, v6: X.v6 };
    let mut one = || {
        let client =
            Host { v4: Ipv4Addr::new(198, 51, 100, random.below(254) as u8 + 1), ..X.with_mac([2, 0, 0, 0, 0, 9]) };
        let mut frame = tcp(client, host).ports(1_024 + random.below(60_000) as u16, PORT).syn().frame();
        fill_checksums(&mut frame);
        frame
    };
    (0..CLIENTS).map(|_| one()).collect()
}

/// Those who may come: none of the clients that are denied, and [`X`].
fn allowed() -> impl Iterator<Item = IpAddr> {
    let others = (0..RULES as u8 - 1).map(|number| Ipv4Addr::new(203, 0, 113, 100 + number));
    others.chain([X.v4]).map(IpAddr::from)
}

fn ours(world: &World) -> Agent {
    let mut agent = Agent::new(Some(&world.host));
    let mut rules = Rules::new(agent.directory().join("rules.json"));
    let ingress: Vec<String> = allowed().map(|address| format!("tcp {BEHIND} {address}/32")).collect();
    let instance = &world.instances[0];
    rules.ingress("sg-b", &ingress.iter().map(String::as_str).collect::<Vec<_>>());
    rules.instance(&instance.id(), &["sg-b"], &instance.addresses());
    rules.write();
    agent.arguments(["--no-docker", "--rules"]).arguments([rules.path()]);
    agent.arguments(["--attach".to_owned(), format!("{}={}", instance.id(), instance.link)]);
    agent.arguments(["--publish".to_owned(), format!("{}:{HOST}:{PORT}={BEHIND}", instance.id())]);
    agent.start().wait();
    agent
}

fn netdev() -> String {
    let elements: Vec<String> = allowed().map(|address| address.to_string()).collect();
    format!(
        "table netdev f {{\n set s {{\n type ipv4_addr\n elements = {{ {} }}\n }}\n chain c {{\n \
         type filter hook ingress device \"veth-out\" priority 0; policy accept;\n \
         tcp dport {PORT} ip saddr @s accept\n tcp dport {PORT} drop\n }}\n}}\n",
        elements.join(", ")
    )
}

fn input(rules: usize) -> String {
    let mut text =
        String::from("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n");
    let few = allowed().skip(RULES - rules);
    text.extend(few.map(|address| format!("-A INPUT -s {address} -p tcp --dport {PORT} -j ACCEPT\n")));
    text + &format!("-A INPUT -p tcp --dport {PORT} -j DROP\nCOMMIT\n")
}
