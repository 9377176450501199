//! Clearing away a directory with everything that was started in it, as a test's own Docker engine; and what runs that
//! were killed left behind: a guard's `drop` doesn't run then. Only what carries this suite's names and, but for the
//! former, the number of a process that is no more.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::PATIENCE;

/// Where control groups are: of version 2 themselves, of version 1 one level below for each hierarchy.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Sweeps, the first time that it is called.
pub fn once() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        let temporary = std::env::temp_dir();
        for name in left_in(&temporary) {
            clear(&temporary.join(name));
        }
        for name in left_in(Path::new("/run/netns")) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
        let bpffs = Path::new("/sys/fs/bpf");
        for name in left_in(bpffs) {
            let _ = fs::remove_dir_all(bpffs.join(name));
        }
    });
}

/// Removes a directory of a test's: first the processes that name it or are in the control group of its name, as an
/// engine and its containers, then the group and what is mounted below the directory, which an engine that was killed
/// leaves behind.
pub fn clear(directory: &Path) {
    let name = directory.file_name().unwrap_or_default();
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        // What this user may not end stays.
        let ended = processes_of(directory).into_iter().filter(|pid| kill(*pid, Signal::SIGKILL).is_ok()).count();
        if ended == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    for hierarchy in names_in(Path::new(CGROUPS)) {
        remove_group(&Path::new(CGROUPS).join(hierarchy).join(name));
    }
    remove_group(&Path::new(CGROUPS).join(name));
    // What was mounted last, perhaps over another one, goes first.
    for mount in mounts_below(directory).iter().rev() {
        if let Err(error) = umount2(mount, MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", mount.display());
        }
    }
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("{} is left behind: {error}", directory.display());
    }
}

/// Those with the directory in their command line, as an engine, its containerd and the shims have it, or with its name
/// in that of their control group, as its containers have it. None that has ended already.
fn processes_of(directory: &Path) -> Vec<Pid> {
    let below = [directory.as_os_str().as_bytes(), b"/"].concat();
    let group_of_name = [b"/", directory.file_name().unwrap_or_default().as_bytes(), b"/"].concat();
    let has = |text: &[u8], words: &[u8]| text.windows(words.len()).any(|window| window == words);
    let is_its_own = |pid: &i32| {
        // Empty for one that has ended and wasn't waited for.
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let (line, group) = (read("cmdline"), read("cgroup"));
        !line.is_empty() && (has(&line, &below) || has(&group, &group_of_name))
    };
    let own = i32::try_from(std::process::id()).ok();
    let all = names_in(Path::new("/proc")).filter_map(|name| name.parse().ok());
    all.filter(|pid| Some(*pid) != own && is_its_own(pid)).map(Pid::from_raw).collect()
}

/// Removes a control group with those below it, if it is there. One whose last process has just been killed is busy for
/// a moment.
fn remove_group(group: &Path) {
    let end = Instant::now() + PATIENCE;
    while group.is_dir() && Instant::now() < end {
        names_in(group)
            .map(|name| group.join(name))
            .filter(|below| below.is_dir())
            .for_each(|below| remove_group(&below));
        if fs::remove_dir(group).is_err() {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Mount points below a directory, in the order in which they were mounted (proc_pid_mountinfo(5)).
fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // No name of the suite's or of Docker's has a character that is escaped there.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(|point| point.starts_with(&directory)).collect()
}

fn left_in(directory: &Path) -> Vec<String> {
    names_in(directory).filter(|name| is_orphan(name)).collect()
}

fn names_in(directory: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Whether this is `sgt-PID-...` of a process that is no more.
pub fn is_orphan(name: &str) -> bool {
    let pid = name.strip_prefix("sgt-").and_then(|rest| rest.split('-').next()).and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_in_a_directory_goes_with_it() {
        let name = format!("sgt-{}-clear", std::process::id());
        let (directory, other) = (std::env::temp_dir().join(&name), std::env::temp_dir().join(name + "-other"));
        let mut tails = [&directory, &other].map(|directory| {
            fs::create_dir_all(directory).expect("a new directory");
            fs::write(directory.join("file"), "").expect("a new file");
            Command::new("tail").arg("-f").arg(directory.join("file")).spawn().expect("tail in the PATH")
        });
        clear(&directory);
        assert!(tails[0].try_wait().is_ok_and(|ended| ended.is_some()), "it has ended");
        assert!(!directory.exists() && other.exists());
        assert!(tails[1].try_wait().is_ok_and(|ended| ended.is_none()), "the other one goes on");
        clear(&other);
        assert!(tails[1].wait().is_ok_and(|ended| !ended.success()));
    }

    #[test]
    fn only_what_a_dead_run_left_is_swept() {
        assert!(is_orphan("sgt-4194305-0"), "no process has a number beyond the kernel's limit");
        assert!(!is_orphan(&format!("sgt-{}-0-host", std::process::id())));
        for other in ["sgt-host-4194305-0", "sg-agent", "web", ""] {
            assert!(!is_orphan(other), "{other}");
        }
    }
}
