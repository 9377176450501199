//! The programs and maps in the kernel: loading them, attaching them to links, what stays pinned. Knows no rules; those
//! are `apply`'s.
//!
//! Every start loads a fresh set of programs and rule maps, fills it, and only then moves the links over to it, one
//! atomic replacement each; until then the old set goes on. What packets wrote (flows, fragments, counters) is pinned
//! and carried over, so an agent that dies or is replaced cuts nothing.

mod attach;
mod btf;
mod check;
mod drops;
mod filter;
mod gate;
mod interfaces;
mod mapped;
mod maps;
mod pins;
mod published;
mod scan;
pub mod sys;
mod trial;

pub use attach::Hook;
pub use check::Fault;
pub use gate::{Gate, Reach};
pub use interfaces::Interfaces;
pub use maps::{Maps, absent_is_fine};
pub use pins::{DetachReport, Pins};
pub use published::{Watch, Way};
pub use scan::Scan;
pub use trial::SkbContext;

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfError, EbpfLoader};
use nix::fcntl::Flock;
use nix::sys::utsname::uname;
use sg_common::abi::{self, Config, Direction};

/// The programs' object file, built by `cargo xtask build` and put into the executable.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sg-ebpf.o"));

/// What can go wrong between the agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// A program or map was refused.
    #[error(
        "cannot load the eBPF programs: {0}; run as root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON) on Linux 6.1 or later"
    )]
    Load(#[from] EbpfError),
    /// The kernel doesn't describe its types.
    #[error(
        "cannot tell where the kernel keeps a packet's checksum: {0}; sg-agent needs a kernel with CONFIG_DEBUG_INFO_BTF"
    )]
    Btf(std::io::Error),
    /// Programs would interrupt each other on a CPU, in the middle of a packet.
    #[error("this kernel is built with PREEMPT_RT, where programs interrupt each other; boot one without")]
    Preemptible,
    /// The verifier refused a program.
    #[error("cannot load the eBPF program '{program}': {error}")]
    Program {
        /// The program.
        program: &'static str,
        /// The kernel's answer; its `Debug` form has the verifier's log.
        error: Box<ProgramError>,
    },
    /// A map isn't in the object, or has another type.
    #[error("the eBPF object has no map '{0}' of the expected type: agent and programs are of different builds")]
    Map(&'static str),
    /// A map can't be read.
    #[error("cannot read map {map}: {error}")]
    Read {
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        error: aya::maps::MapError,
    },
    /// A map can't be written.
    #[error("cannot write map {map}: {error}")]
    Write {
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        error: aya::maps::MapError,
    },
    /// A link can't be attached to.
    #[error("cannot attach to link {link}: {error}")]
    Attach {
        /// The link's name.
        link: String,
        /// Why.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is attached can't be looked at.
    #[error("cannot ask the kernel what is attached: {0}")]
    Check(std::io::Error),
    /// bpffs can't be used.
    #[error("cannot use {path} on bpffs: {error}; mount it with 'mount -t bpf bpf /sys/fs/bpf', or pass --bpffs", path = path.display())]
    Pins {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Another agent has the directory.
    #[error("another sg-agent uses {path}; give each agent its own --bpffs (and --state-dir)", path = path.display())]
    PinsHeld {
        /// The directory.
        path: PathBuf,
    },
    /// A map can't be mapped into memory.
    #[error("cannot map {map} into memory: {error}")]
    Mmap {
        /// The map.
        map: &'static str,
        /// Why.
        error: std::io::Error,
    },
}

/// What an earlier agent left on bpffs, if its layout is this one's.
#[derive(Clone, Debug, Default)]
pub struct Earlier {
    /// Its interfaces, by link index: their flows are known by their numbers.
    pub interfaces: HashMap<u32, abi::Interface>,
    /// The last epoch that it gave.
    pub epoch: u32,
}

/// A loaded set of programs and maps.
#[derive(Debug)]
pub struct Datapath {
    ebpf: Ebpf,
    /// The programs' numbers in the kernel, by direction.
    ids: [u32; 2],
    pins: Option<Pins>,
    /// What an earlier agent left.
    earlier: Option<Earlier>,
    _lock: Option<Flock<File>>,
}

impl Datapath {
    /// Loads programs and maps. With `pins`, what packets wrote under an earlier agent is carried over if its layout
    /// is this one's. `log_drops` makes the programs tell of every packet that they drop; see [`Self::follow_drops`].
    ///
    /// # Errors
    /// Those of loading and of bpffs; nothing that is attached has been touched then.
    pub fn load(config: &Config, pins: Option<Pins>, log_drops: bool) -> Result<(Self, Maps), DatapathError> {
        if is_preemptible() {
            return Err(DatapathError::Preemptible);
        }
        let mut loader = EbpfLoader::new();
        let level = if log_drops { drops::LEVEL } else { 0 };
        loader.override_global(aya_log::LEVEL, &level, true);
        let skb = btf::skb_layout().map_err(DatapathError::Btf)?;
        loader.override_global("SKB", &skb, true);
        let (mut earlier, mut lock) = (None, None);
        if let Some(pins) = &pins {
            let has_flows;
            (lock, has_flows) = pins.prepare()?;
            if has_flows {
                earlier = pins.earlier().map(|(interfaces, epoch)| Earlier { interfaces, epoch });
            }
            let published = pins.remove_published();
            published.map_err(|error| DatapathError::Pins { path: pins.directory().to_owned(), error })?;
            for (name, path) in pins.shared_maps() {
                loader.map_pin_path(name, path);
            }
        }
        let mut ebpf = loader.load(OBJECT)?;
        let mut ids = [0; 2];
        for direction in [Direction::Ingress, Direction::Egress] {
            let name = program_name(direction);
            let program = classifier(&mut ebpf, direction)?;
            let loaded = program.load().and_then(|()| program.info());
            let info = loaded.map_err(|error| DatapathError::Program { program: name, error: Box::new(error) })?;
            ids[direction as usize] = info.id();
        }
        for name in [SWEEP, CLOSED] {
            let program: &mut SchedClassifier =
                ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(DatapathError::Map(name))?;
            program.load().map_err(|error| DatapathError::Program { program: name, error: Box::new(error) })?;
        }
        let mut maps = Maps::take(&mut ebpf)?;
        maps.set_config(&Config { layout: abi::LAYOUT, ..*config })?;
        Ok((Self { ebpf, ids, pins, earlier, _lock: lock }, maps))
    }

    /// The program for one direction, for running it on test packets.
    ///
    /// # Errors
    /// [`DatapathError::Map`] where the object isn't ours.
    pub fn program(&mut self, direction: Direction) -> Result<&mut SchedClassifier, DatapathError> {
        classifier(&mut self.ebpf, direction)
    }

    /// Takes expired flows out of the table, and returns how many live. Packets do so themselves when it is full.
    ///
    /// # Errors
    /// [`DatapathError::Program`]
    pub fn sweep(&mut self) -> Result<u32, DatapathError> {
        /// The shortest frame that BPF_PROG_TEST_RUN takes: an Ethernet header (kernel: `bpf_prog_test_run_skb`).
        const FRAME: [u8; 14] = [0; 14];
        let sweep: &SchedClassifier =
            self.ebpf.program(SWEEP).and_then(|program| program.try_into().ok()).ok_or(DatapathError::Map(SWEEP))?;
        let result = sweep
            .test_run(TestRunOptions { data_in: Some(&FRAME), ..TestRunOptions::default() })
            .map_err(|error| DatapathError::Program { program: SWEEP, error: Box::new(error) })?;
        Ok(result.return_value)
    }

    /// Passes on what the programs log.
    ///
    /// # Errors
    /// Those of the ring buffer.
    pub fn follow_drops(&mut self) -> anyhow::Result<()> {
        drops::follow(&mut self.ebpf)
    }

    /// What an earlier agent left.
    pub fn earlier(&self) -> Option<&Earlier> {
        self.earlier.as_ref()
    }

    /// Leaves the numbers of interfaces and policies to the next agent.
    ///
    /// # Errors
    /// [`DatapathError::Pins`].
    pub fn keep_numbers(&self, maps: &Maps) -> Result<(), DatapathError> {
        match &self.pins {
            Some(pins) => pins.keep_numbers(maps.interfaces.map(), &maps.bindings_map),
            None => Ok(()),
        }
    }

    /// Where links are pinned, if they are.
    pub fn pins(&self) -> Option<&Pins> {
        self.pins.as_ref()
    }
}

/// The program that takes expired flows out of the table.
const SWEEP: &str = "sweep";
/// The program that drops everything.
const CLOSED: &str = "closed";

/// The name in the object of the program for a direction.
fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "to_instance",
        Direction::Egress => "from_instance",
    }
}

/// Whether programs can interrupt each other on a CPU. They keep the packet that they judge, and what they answer, in a place
/// of their CPU's: with bottom halves off no other program runs there meanwhile, but where the kernel is built with
/// PREEMPT_RT (and without PREEMPT_RT_NEEDS_BH_LOCK; kernel commit 3253cb49cbad). Where it doesn't say, it may be.
fn is_preemptible() -> bool {
    uname().map_or(true, |kernel| kernel.version().to_string_lossy().contains("PREEMPT_RT"))
}

fn classifier(ebpf: &mut Ebpf, direction: Direction) -> Result<&mut SchedClassifier, DatapathError> {
    let name = program_name(direction);
    ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(DatapathError::Map(name))
}
