//! A change of rules at the endpoint, a real Moto: what the gateway adds to a call, and when what was answered is
//! enforced, through the gateway and by polling. Enforced is what real packets say, from another namespace.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::e2e::{Agent, Moto, World};
use anyhow::{Result, ensure};

use crate::record::{Bound, Recorder, median};
use crate::world::{self, Random};

/// Where the gateway listens in the host's namespace.
const GATEWAY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 4_566);
/// The port whose rule comes and goes.
const PORT: u16 = 7_000;
/// How long a datagram that passes may take on a busy machine; otherwise it is there when it has been sent.
const ARRIVAL: Duration = Duration::from_millis(200);
/// From one datagram to the next.
const STEP: Duration = Duration::from_millis(1);
/// Whatever takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest pause before a change that is to be noticed by polling, in milliseconds: it comes at any moment of an
/// interval.
const PAUSE: u64 = 2_000;

/// Which way calls go.
const DIRECT: &str = "Moto itself";
const THROUGH: &str = "through the gateway";

/// Whether a rule comes or goes.
const CHANGES: [(&str, bool); 2] = [("AuthorizeSecurityGroupIngress", true), ("RevokeSecurityGroupIngress", false)];

/// An endpoint with instances, an agent beside it, and somebody who tries to reach the first of them.
struct Stand {
    agent: Agent,
    direct: Moto,
    through: Moto,
    group: String,
    /// Counts probes, so that none is taken for another.
    probes: u64,
    receiver: UdpSocket,
    world: World,
}

/// Measures at several numbers of instances.
///
/// # Errors
/// A call that fails, a change that isn't enforced at all.
pub fn run(recorder: &Recorder) -> Result<()> {
    let sizes: &[usize] = if recorder.quick { &[1] } else { &[1, 100, 1_000] };
    sizes.iter().try_for_each(|&instances| sized(recorder, instances))
}

fn sized(recorder: &Recorder, instances: usize) -> Result<()> {
    let mut stand = Stand::new(instances)?;
    let at = ("instances", instances as f64);
    // Nothing is noticed by polling here.
    stand.agent.arguments(["--poll-interval", "3600"]).start().wait();
    describe(recorder, &stand, at)?;
    by_gateway(recorder, &mut stand, at)?;
    stand.agent.stop();
    stand.agent.without("--poll-interval").without("3600");
    stand.agent.start().wait();
    by_polling(recorder, &mut stand, at)
}

fn describe(recorder: &Recorder, stand: &Stand, at: (&str, f64)) -> Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..recorder.rounds(100) {
        for (moto, times) in [&stand.direct, &stand.through].into_iter().zip(&mut times) {
            recorder.check()?;
            let started = Instant::now();
            moto.call("DescribeSecurityGroups", &[("GroupId.1", &stand.group)]);
            times.push(milliseconds(started.elapsed()));
        }
    }
    called(recorder, "DescribeSecurityGroups", &times, at);
    Ok(())
}

/// Changes at Moto and through the gateway by turns; behind each that came through the gateway, one packet.
fn by_gateway(recorder: &Recorder, stand: &mut Stand, at: (&str, f64)) -> Result<()> {
    let (mut wrong, mut enforced) = (0, Vec::new());
    let mut times = CHANGES.map(|_| [Vec::new(), Vec::new()]);
    for _ in 0..recorder.rounds(30) {
        for is_through in [false, true] {
            for ((action, is_allowed), times) in CHANGES.into_iter().zip(&mut times) {
                recorder.check()?;
                times[usize::from(is_through)].push(milliseconds(stand.change(action, is_through)));
                if is_through {
                    let answered = Instant::now();
                    let took = stand.enforced(answered, is_allowed)?;
                    wrong += u32::from(!took.is_zero());
                    enforced.push(milliseconds(took));
                }
            }
        }
    }
    for ((action, _), times) in CHANGES.into_iter().zip(&times) {
        called(recorder, action, times, at);
    }
    let figure = "from the answer to enforcement";
    recorder.point(figure, THROUGH, "ms", at, &enforced);
    let what = format!(
        "first packets behind the gateway's answers that met the old rules, of {}, at {} instances",
        enforced.len(),
        at.1
    );
    recorder.target(&what, &[f64::from(wrong)], Bound::AtMost(0.0));
    Ok(())
}

/// What others change at Moto, at any moment.
fn by_polling(recorder: &Recorder, stand: &mut Stand, at: (&str, f64)) -> Result<()> {
    let mut random = Random::new(31);
    let mut times = Vec::new();
    for _ in 0..recorder.rounds(12) {
        for (action, is_allowed) in CHANGES {
            recorder.check()?;
            thread::sleep(Duration::from_millis(random.below(PAUSE)));
            stand.change(action, false);
            times.push(milliseconds(stand.enforced(Instant::now(), is_allowed)?));
        }
    }
    recorder.point("from the answer to enforcement", "by polling", "ms", at, &times);
    Ok(())
}

/// What a call took, and what the gateway added to it.
fn called(recorder: &Recorder, action: &str, times: &[Vec<f64>; 2], at: (&str, f64)) {
    for (way, times) in [DIRECT, THROUGH].into_iter().zip(times) {
        recorder.point(action, way, "ms", at, times);
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        let p99 = sorted[(sorted.len() * 99).div_ceil(100) - 1];
        recorder.point(&format!("{action}, p99"), way, "ms", at, &[p99]);
    }
    let added = median(&times[1]) - median(&times[0]);
    recorder.point(&format!("{action}, added at the median"), THROUGH, "ms", at, &[added]);
}

impl Stand {
    /// The first instance is a namespace; nobody is behind the others' links. The agent isn't started.
    fn new(instances: usize) -> Result<Self> {
        let world = World::new(&["a"]);
        world.host.run(|| world::attach(instances - 1))?;
        let direct = Moto::inside(&world.host);
        let group = direct.group();
        let ids = direct.instances(instances, &group);
        ensure!(ids.len() == instances, "Moto runs {} of {instances} instances", ids.len());
        let mut agent = Agent::new(Some(&world.host));
        Moto::reach(&mut agent, &direct.url());
        let gateway = SocketAddr::from(GATEWAY);
        agent.arguments(["--no-docker".to_owned(), "--gateway".to_owned(), gateway.to_string()]);
        agent.arguments(["--attach".to_owned(), format!("{}=veth-a", ids[0])]);
        for (number, id) in ids[1..].iter().enumerate() {
            // Not within the bridge's network.
            let address = world::addresses(number + 1_000)[0];
            let mac = world::mac(number + 1_000).map(|byte| format!("{byte:02x}")).join(":");
            agent.arguments(["--attach".to_owned(), format!("{id}=sgb-{number},ip={address},mac={mac}")]);
        }
        let instance = &world.instances[0];
        let receiver = instance.namespace.run(|| UdpSocket::bind((instance.v4, PORT)))?;
        receiver.set_nonblocking(true)?;
        let through = direct.through(gateway, &world.host);
        Ok(Self { agent, direct, through, group, probes: 0, receiver, world })
    }

    /// Allows everybody to reach the port, or nobody; how long the call took.
    fn change(&self, action: &str, is_through: bool) -> Duration {
        let moto = if is_through { &self.through } else { &self.direct };
        let port = PORT.to_string();
        let rule = [
            ("GroupId", self.group.as_str()),
            ("IpPermissions.1.IpProtocol", "udp"),
            ("IpPermissions.1.FromPort", &port),
            ("IpPermissions.1.ToPort", &port),
            ("IpPermissions.1.IpRanges.1.CidrIp", "203.0.113.0/24"),
        ];
        let started = Instant::now();
        moto.call(action, &rule);
        started.elapsed()
    }

    /// How long after this moment packets meet the new rules: a datagram from outside every [`STEP`], each of a new flow, and
    /// the time at which the first one was sent that met its due. None if that is the first of all.
    fn enforced(&mut self, answered: Instant, is_allowed: bool) -> Result<Duration> {
        let first = self.probes;
        let mut sent: Vec<Duration> = Vec::new();
        // The first probe that arrived, and the one behind the last.
        let (mut arrived, mut behind) = (None, 0);
        let to = (self.world.instances[0].v4, PORT);
        loop {
            sent.push(answered.elapsed());
            let number = self.probes.to_ne_bytes();
            // The port comes again when its flow is long forgotten.
            let own = 1_024 + (self.probes % 64_000) as u16;
            self.probes += 1;
            self.world.outside.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, own))?.send_to(&number, to))?;
            let mut came = [0; 8];
            while self.receiver.recv(&mut came).is_ok() {
                // An earlier change's may be late.
                if let Some(place) = u64::from_ne_bytes(came).checked_sub(first) {
                    arrived.get_or_insert(place as usize);
                    behind = place as usize + 1;
                }
            }
            let place = if is_allowed { arrived } else { Some(behind) };
            let is_settled =
                |place: &usize| is_allowed || sent.get(*place).is_some_and(|at| answered.elapsed() > *at + ARRIVAL);
            match place.filter(is_settled) {
                Some(0) => return Ok(Duration::ZERO),
                Some(place) => return Ok(sent[place]),
                None => ensure!(
                    answered.elapsed() < PATIENCE,
                    "a change isn't enforced after {} s\n{}",
                    PATIENCE.as_secs(),
                    self.agent.log()
                ),
            }
            thread::sleep(STEP);
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
