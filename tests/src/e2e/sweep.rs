//! Clearing away what runs that were killed left behind: a guard's `drop` doesn't run then. Only what carries this
//! suite's names and the number of a process that is no more.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Once;

/// Sweeps, the first time that it is called.
pub fn once() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        for name in left_in(Path::new("/run/netns")) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
        let temporary = std::env::temp_dir();
        for place in [Path::new("/sys/fs/bpf"), &temporary] {
            for name in left_in(place) {
                let _ = fs::remove_dir_all(place.join(name));
            }
        }
    });
}

fn left_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_orphan(name)).collect()
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
    fn only_what_a_dead_run_left_is_swept() {
        assert!(is_orphan("sgt-4194305-0"), "no process has a number beyond the kernel's limit");
        assert!(!is_orphan(&format!("sgt-{}-0-host", std::process::id())));
        for other in ["sgt-host-4194305-0", "sg-agent", "web", ""] {
            assert!(!is_orphan(other), "{other}");
        }
    }
}
