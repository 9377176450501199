//! The process that holds an instance's network namespace, and its image. Owns nothing of the network itself.
//!
//! A container's link exists from its start on, and its first process runs an instant later: too early for programs to
//! be on the link. So an instance is two containers. The holder has the network and does nothing; when its link is
//! enforced, the instance's own container starts in the holder's namespace. The namespace, with address and link,
//! outlives restarts of the instance.

/// The image's name; the tag changes with the program.
pub(super) const IMAGE: &str = "sg-agent/holder:1";
/// The program's path in it.
pub(super) const PROGRAM: &str = "/hold";

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// The sizes of an ELF64 header and program header (elf(5)).
const HEADERS: u64 = 64 + 56;

/// `pause()` again and again, x86_64: the architecture that the agent is for.
const CODE: [u8; 9] = [
    0xb8, 0x22, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the start
];

/// A static executable of one segment. No image has anything that small to offer, and not every image has `sleep`.
fn program() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
    let mut elf = Vec::with_capacity(size as usize);
    elf.extend(*b"\x7fELF\x02\x01\x01\x00");
    elf.extend([0; 8]);
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    half(&mut elf, 2); // ET_EXEC
    half(&mut elf, 62); // EM_X86_64
    word(&mut elf, 1); // EV_CURRENT
    long(&mut elf, BASE + HEADERS); // entry
    long(&mut elf, 64); // program headers
    long(&mut elf, 0); // section headers: none
    word(&mut elf, 0);
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut elf, value);
    }
    word(&mut elf, 1); // PT_LOAD
    word(&mut elf, 5); // readable and executable
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut elf, value);
    }
    elf.extend(CODE);
    elf
}

/// The image's file system as an archive.
///
/// # Errors
/// None in practice: it is written to memory.
pub(super) fn archive() -> std::io::Result<Vec<u8>> {
    let program = program();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    archive.append_data(&mut header, PROGRAM.trim_start_matches('/'), &*program)?;
    archive.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_program_runs_until_it_is_killed() {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = std::env::temp_dir().join(format!("sg-hold-{}", std::process::id()));
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o700).open(&path).unwrap();
        file.write_all(&program()).unwrap();
        drop(file);
        // Another test that forks at this moment has the file open for writing for an instant.
        let started = (0..100).find_map(|_| match std::process::Command::new(&path).spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(std::time::Duration::from_millis(10));
                None
            }
            started => Some(started),
        });
        let mut child = started.expect("the file is free").unwrap();
        // In the system call, and not ended by a fault.
        let state = || std::fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
        while !state().starts_with("34 ") {
            assert!(!state().is_empty(), "it has ended");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }
}
