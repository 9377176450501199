//! Upgrades under load: an agent whose programs are others, or whose maps have another layout, takes over from an agent
//! that enforces, and gives back to it. Old and new are told apart by what the kernel says of them.

use std::fs;
use std::io::ErrorKind::NotFound;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use aya::programs::{ProgramError, SchedClassifier, loaded_links, tc::TcAttachType};
use sg_common::abi::LAYOUT;
use tests::e2e::{Lab, Namespace, another_layout, binary};

use crate::load::{Load, lab, under_load};

/// What is on one side of a link: the program's number, what it is made of, and the numbers of the links that hold it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Attached {
    program: u32,
    tag: u64,
    links: Vec<u32>,
}

/// The hooks of both instances.
const HOOKS: [(&str, TcAttachType); 4] = [
    ("veth-a", TcAttachType::Ingress),
    ("veth-a", TcAttachType::Egress),
    ("veth-b", TcAttachType::Ingress),
    ("veth-b", TcAttachType::Egress),
];

/// What is on each hook.
fn attached(host: &Namespace) -> Vec<Attached> {
    let found = host.run(|| {
        HOOKS.map(|(link, side)| {
            let (_, programs) = SchedClassifier::query_tcx(link, side).expect("a link that can be asked");
            let [program] = &programs[..] else { panic!("{} programs on {link}", programs.len()) };
            (program.id(), program.tag())
        })
    });
    let with_links = found.map(|(program, tag)| {
        let all = loaded_links().filter_map(Result::ok);
        let mut links: Vec<u32> = all.filter(|link| link.program_id() == program).map(|link| link.id()).collect();
        links.sort_unstable();
        assert_eq!(links.len(), 2, "each program is on both instances' links");
        Attached { program, tag, links }
    });
    with_links.to_vec()
}

/// Looks again and again, for as long as something else goes on, whether each hook has a program. How often it looked.
fn watched<T>(host: &Namespace, work: impl FnOnce() -> T) -> (T, u64) {
    let (end, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    struct EndOf<'a>(&'a AtomicBool);
    impl Drop for EndOf<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    let result = thread::scope(|scope| {
        let _end = EndOf(&end);
        scope.spawn(|| {
            host.run(|| {
                while !end.load(SeqCst) {
                    for (link, side) in HOOKS {
                        match SchedClassifier::query_tcx(link, side) {
                            Ok((_, programs)) => assert!(!programs.is_empty(), "{link} is without a program"),
                            // One that was there when the link was asked, and was replaced before it was asked itself.
                            Err(ProgramError::SyscallError(error)) if error.io_error.kind() == NotFound => {}
                            Err(error) => panic!("{link} can't be asked: {error}"),
                        }
                    }
                    looks.fetch_add(1, SeqCst);
                    // So that others have a processor, too.
                    thread::yield_now();
                }
            });
        });
        work()
    });
    (result, looks.load(SeqCst))
}

/// Agents take over from each other, each time with the other binary.
fn upgrade(load: Load, other: &Path, check: impl Fn(&Lab, bool)) {
    let mut lab = lab();
    check(&lab, false);
    let host = lab.world.host.again();
    let ((), looks) = watched(&host, || {
        under_load(&mut lab, load, |lab, round| {
            let before = attached(&lab.world.host);
            // Ended either way.
            if round % 4 < 2 {
                lab.agent.kill();
            } else {
                lab.agent.stop();
            }
            assert_eq!(attached(&lab.world.host), before, "without an agent");
            let is_other = round.is_multiple_of(2);
            lab.agent.replace_binary(if is_other { other } else { binary() }).start().wait();
            for (old, new) in before.iter().zip(attached(&lab.world.host)) {
                assert_ne!(old.program, new.program);
                assert_ne!(old.tag, new.tag, "it is made of other instructions");
                assert_eq!(old.links, new.links, "the links were updated, not made anew");
            }
            check(lab, is_other);
        });
    });
    println!("{looks} looks at {} hooks", HOOKS.len());
}

/// The same programs in other instructions: `w = value` where there was `r = value`, which is the same for what isn't
/// negative (both clear the upper half). So nothing but the binary itself is needed, and nothing else differs.
fn rewritten(binary: &Path, to: PathBuf) -> PathBuf {
    let mut bytes = fs::read(binary).expect("the agent's binary");
    let start = object(&bytes).expect("an eBPF object in the binary");
    let mut changed = 0;
    for (offset, length) in programs(&bytes[start..]) {
        let code = &mut bytes[start + offset..start + offset + length];
        let mut instructions = code.chunks_exact_mut(8);
        while let Some(instruction) = instructions.next() {
            const LOAD_64: u8 = 0x18;
            const MOVE_64: u8 = 0xb7;
            const MOVE_32: u8 = 0xb4;
            match instruction[0] {
                // Two places long.
                LOAD_64 => drop(instructions.next()),
                MOVE_64 if instruction[7] & 0x80 == 0 => {
                    instruction[0] = MOVE_32;
                    changed += 1;
                }
                _ => {}
            }
        }
    }
    assert!(changed > 100, "{changed} instructions");
    fs::write(&to, bytes).expect("room for another binary");
    fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).expect("its owner's");
    to
}

/// Where an ELF object for BPF begins within a file (elf(5): the magic, 64 bits, little-endian; `e_machine`).
fn object(bytes: &[u8]) -> Option<usize> {
    const MAGIC: &[u8] = b"\x7fELF\x02\x01\x01";
    const EM_BPF: [u8; 2] = 247_u16.to_le_bytes();
    let mut from = 0;
    while let Some(found) = bytes[from..].windows(MAGIC.len()).position(|window| window == MAGIC) {
        let start = from + found;
        if bytes.get(start + 18..start + 20) == Some(&EM_BPF[..]) {
            return Some(start);
        }
        from = start + 1;
    }
    None
}

/// The sections of an object that hold instructions: where, and how long.
fn programs(object: &[u8]) -> Vec<(usize, usize)> {
    const SHF_EXECINSTR: u64 = 4;
    let number = |at: usize, length: usize| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(&object[at..at + length]);
        u64::from_le_bytes(bytes)
    };
    let place = |at: usize| usize::try_from(number(at, 8)).expect("an offset");
    let (table, size, count) = (place(0x28), number(0x3a, 2) as usize, number(0x3c, 2) as usize);
    let headers = (0..count).map(|index| table + index * size);
    headers
        .filter(|&header| number(header + 8, 8) & SHF_EXECINSTR != 0)
        .map(|header| (place(header + 0x18), place(header + 0x20)))
        .collect()
}

/// A directory's files on bpffs whose names end with a layout's number.
fn of_layout(lab: &Lab, layout: u32) -> usize {
    let ending = format!("-v{layout}");
    let files = fs::read_dir(lab.agent.bpffs()).expect("pins").flatten();
    files.filter(|file| file.file_name().to_string_lossy().ends_with(&ending)).count()
}

/// The flows are carried over: who waits for an answer when the agent changes gets it, though no rule lets it in.
#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn other_programs_replace_each_by_one_update_and_every_flow_goes_on() {
    let to = std::env::temp_dir().join(format!("sg-agent-{}-rewritten", std::process::id()));
    let other = Remove(rewritten(binary(), to));
    upgrade(Load::default(), &other.0, |lab, _| assert!(of_layout(lab, LAYOUT) >= 6));
}

/// A file that goes when the test ends.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The flows can't be carried over: connections live on by what rules say of packets in their middle (SG-3.9).
#[test]
#[ignore = "needs TCX (Linux 6.6 or later): links and their programs are asked for by it"]
fn another_layout_takes_over_atomically_and_cuts_no_connection() {
    let load = Load::that_speaks_again();
    upgrade(load, &another_layout(), |lab, is_other| {
        let (own, others) = if is_other { (1_000, LAYOUT) } else { (LAYOUT, 1_000) };
        assert!(of_layout(lab, own) >= 6);
        assert_eq!(of_layout(lab, others), 0, "what can't be gone on with is gone");
    });
}

/// A file that has the right name, and isn't what it says: nothing is gone on with, and nothing opens.
#[test]
fn a_map_that_does_not_fit_is_not_adopted() {
    let mut lab = lab();
    let mut stream = lab.stream("a", "b", 22);
    lab.agent.stop();
    let pin = |name: &str| lab.agent.bpffs().join(format!("{name}-v{LAYOUT}"));
    fs::rename(pin("tracked"), pin("flows")).expect("a pin that can be renamed");
    lab.agent.start().wait();
    lab.agent.logged(&["flows-v", "no map of this layout"]);
    stream.goes_on_when_spoken_to();
    lab.udp("a", "b", 5000)[0].passes();
    lab.udp("a", "b", 5001)[0].vanishes();
}
