//! Packets from threads on all CPUs while the caller changes what is enforced: each is counted with what stood while it was
//! judged. What must never have passed is the caller's to say.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sg_agent::resolve::Desired;
use sg_common::abi::Direction;

use crate::cast::Host;
use crate::lab::Lab;
use crate::packets::Packet;
use crate::programs;

/// How long each race is run: `SG_STRESS_SECONDS`, or long enough for some hundred changes.
pub fn duration() -> Duration {
    let given = std::env::var("SG_STRESS_SECONDS").ok();
    let seconds = given.map_or(1.5, |text| text.parse().expect("SG_STRESS_SECONDS is a number"));
    Duration::from_secs_f64(seconds)
}

/// One packet, sent again and again.
pub struct Shot {
    program: OwnedFd,
    ifindex: u32,
    frame: Vec<u8>,
}

impl Lab {
    /// A packet that arrives at an instance's interface.
    pub fn shot_to(&mut self, host: Host, packet: &Packet) -> Shot {
        self.shot(host, Direction::Ingress, packet)
    }

    /// A packet that an instance sends.
    pub fn shot_from(&mut self, host: Host, packet: &Packet) -> Shot {
        self.shot(host, Direction::Egress, packet)
    }

    fn shot(&mut self, host: Host, direction: Direction, packet: &Packet) -> Shot {
        let ifindex = self.ifindex(host);
        let (datapath, _) = self.applier().datapath();
        let program = datapath.program(direction).expect("the agent's program");
        let program = program.fd().expect("it is loaded").as_fd().try_clone_to_owned().expect("a descriptor");
        Shot { program, ifindex, frame: packet.frame() }
    }

    /// A packet that comes by a link of the host, to a published port.
    pub fn shot_at_host(&mut self, ifindex: u32, packet: &Packet) -> Shot {
        let (datapath, _) = self.applier().datapath();
        let program = datapath.published().expect("a program that the kernel takes");
        let program = program.fd().expect("it is loaded").as_fd().try_clone_to_owned().expect("a descriptor");
        Shot { program, ifindex, frame: packet.frame() }
    }
}

impl Shot {
    fn passes(&self) -> bool {
        programs::run(&self.program, self.ifindex, &self.frame).expect("a frame that the kernel runs") == programs::NEXT
    }
}

/// What stands, as its changer tells those who send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stand {
    /// One state or the other: a change is under way.
    Between,
    /// `apply` has returned.
    Applied(usize),
    /// `collect` has, too: what the agent does before it answers anybody.
    Settled(usize),
}

impl Stand {
    const ALL: [Self; 5] = [Self::Between, Self::Applied(0), Self::Applied(1), Self::Settled(0), Self::Settled(1)];

    fn index(self) -> usize {
        Self::ALL.iter().position(|stand| *stand == self).expect("one of two states")
    }
}

/// Tells it: the lower bits say what stands, the others count the changes.
struct Stage(AtomicU64);

impl Stage {
    fn tell(&self, stand: Stand) {
        let last = self.0.load(SeqCst);
        self.0.store((((last >> 3) + 1) << 3) | stand.index() as u64, SeqCst);
    }
}

/// What became of one shot's packets, by what stood from before each to after it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Tally([Count; 5]);

#[derive(Clone, Copy, Default, Debug)]
struct Count {
    passed: u64,
    dropped: u64,
}

/// Fewer packets than this in any state would show nothing.
const ENOUGH: u64 = 20;

impl Tally {
    /// What must not have passed a single time while this stood, and was tried.
    #[track_caller]
    pub fn never(&self, what: &str, stands: &[Stand]) {
        for stand in stands {
            let count = self.0[stand.index()];
            assert_eq!(count.passed, 0, "{what} passed while {stand:?} stood: {self:?}");
            assert!(count.dropped >= ENOUGH, "{what} was hardly tried while {stand:?} stood: {self:?}");
        }
    }

    /// What must have passed each time while this stood.
    #[track_caller]
    pub fn always(&self, what: &str, stands: &[Stand]) {
        for stand in stands {
            let count = self.0[stand.index()];
            assert_eq!(count.dropped, 0, "{what} was dropped while {stand:?} stood: {self:?}");
            assert!(count.passed >= ENOUGH, "{what} was hardly tried while {stand:?} stood: {self:?}");
        }
    }

    /// What must have passed, but for packets that met a change of the entry that they were judged by.
    #[track_caller]
    pub fn mostly(&self, what: &str) {
        let (passed, dropped) = self.0.iter().fold((0, 0), |sum, count| (sum.0 + count.passed, sum.1 + count.dropped));
        assert!(passed >= ENOUGH && dropped * 100 <= passed, "{what}: {self:?}");
    }

    /// How many have passed at all.
    pub fn passed(&self) -> u64 {
        self.0.iter().map(|count| count.passed).sum()
    }

    fn add(&mut self, stand: usize, passed: bool) {
        let count = &mut self.0[stand];
        *if passed { &mut count.passed } else { &mut count.dropped } += 1;
    }
}

/// Sends each CPU's shots in turn, without end, while `change` runs on this thread. It is called with 0 and 1 by turns, brings
/// that state about and tells what stands. A tally for each shot, in the same order.
pub fn race<const SHOTS: usize>(
    lab: &mut Lab,
    shots: [[Shot; SHOTS]; 2],
    mut change: impl FnMut(&mut Lab, usize, &dyn Fn(Stand)),
) -> [[Tally; SHOTS]; 2] {
    let stage = Stage(AtomicU64::new(Stand::Between.index() as u64));
    let over = AtomicBool::new(false);
    let cpus = cpus();
    thread::scope(|scope| {
        let threads = [0, 1].map(|number| {
            let (shots, stage, over, cpu) = (&shots[number], &stage, &over, cpus[number % cpus.len()]);
            scope.spawn(move || {
                pin(cpu);
                let mut tallies = [Tally::default(); SHOTS];
                while !over.load(SeqCst) {
                    for (shot, tally) in shots.iter().zip(&mut tallies) {
                        let before = stage.0.load(SeqCst);
                        let passed = shot.passes();
                        let after = stage.0.load(SeqCst);
                        let stand = if before == after { (after & 7) as usize } else { 0 };
                        tally.add(stand, passed);
                    }
                }
                tallies
            })
        });
        // Also where the change panics, or the others would go on for ever.
        let _end = End(&over);
        let until = Instant::now() + duration();
        for number in 0.. {
            if Instant::now() >= until {
                break;
            }
            stage.tell(Stand::Between);
            change(lab, number % 2, &|stand| {
                stage.tell(stand);
                // So that the others see it, on as few CPUs as there are.
                thread::sleep(Duration::from_micros(300));
            });
        }
        stage.tell(Stand::Between);
        over.store(true, SeqCst);
        threads.map(|thread| thread.join().expect("packets that the kernel runs"))
    })
}

/// The same with two states that are applied by turns, as the daemon does it.
pub fn race_of<const SHOTS: usize>(
    lab: &mut Lab,
    shots: [[Shot; SHOTS]; 2],
    states: &[Desired; 2],
) -> [[Tally; SHOTS]; 2] {
    // What stood before is neither.
    lab.applier().apply(&states[0], true).expect("a state that fits");
    lab.applier().collect();
    race(lab, shots, |lab, number, tell| {
        lab.applier().apply(&states[number], true).expect("a state that fits");
        tell(Stand::Applied(number));
        lab.applier().collect();
        tell(Stand::Settled(number));
    })
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// The CPUs that this process may use.
fn cpus() -> Vec<usize> {
    let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0)).expect("this thread's CPUs");
    (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect()
}

fn pin(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu).expect("a CPU's number");
    sched_setaffinity(Pid::from_raw(0), &only).expect("a CPU of this process");
}
