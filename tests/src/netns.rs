//! A network namespace of a test's own. It belongs to one thread and goes with it, so nothing is left behind, also
//! where the test panics or is killed.

use std::panic::resume_unwind;
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::thread;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;

/// Tests with maps in the kernel at the same time: one set takes about 100 MiB.
const AT_ONCE: usize = 3;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// One of the [`AT_ONCE`] places; dropped on panic, too.
struct Place;

impl Place {
    fn take() -> Self {
        let mut running = RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while *running >= AT_ONCE {
            running = ENDED.wait(running).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        *running += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) -= 1;
        ENDED.notify_one();
    }
}

/// Runs `test` in a network namespace of its own, on a thread of its own.
///
/// # Panics
/// Where `test` does, and without root. With `SG_ALLOW_SKIP=1` a test without root is skipped and says so.
pub fn isolated(test: impl FnOnce() + Send) {
    if !Uid::effective().is_root() {
        assert!(
            std::env::var_os("SG_ALLOW_SKIP").is_some_and(|value| value == "1"),
            "needs root (CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN); run as root, or set SG_ALLOW_SKIP=1 to skip"
        );
        println!("skipped: needs root");
        return;
    }
    let _place = Place::take();
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of the test's own");
            test();
        });
        thread.join()
    });
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

/// A veth link in this thread's namespace, as an instance's host-side link is, made unless it is there; its index.
///
/// # Panics
/// Where the kernel refuses.
pub fn link(name: &str) -> u32 {
    if let Ok(index) = if_nametoindex(name) {
        return index;
    }
    // iproute2 inherits the calling thread's namespace.
    let output = Command::new("ip")
        .args(["link", "add", name, "type", "veth", "peer", "name", &format!("{name}-eth0")])
        .output()
        .expect("iproute2's 'ip' in the PATH");
    assert!(output.status.success(), "ip link add {name}: {}", String::from_utf8_lossy(&output.stderr));
    if_nametoindex(name).expect("the link that was just made")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_in_its_own_namespace_only() {
        isolated(|| {
            let index = link("sgt-own");
            assert_eq!(link("sgt-own"), index, "made once");
            thread::scope(|scope| {
                scope.spawn(|| isolated(|| assert!(if_nametoindex("sgt-own").is_err())));
            });
        });
        assert!(if_nametoindex("sgt-own").is_err(), "it went with its namespace, or never left it");
    }
}
