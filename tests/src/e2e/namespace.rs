//! A network namespace with a name, and doing things inside it. Knows nothing of what it is for.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::panic::resume_unwind;
use std::process::{Command, Stdio};
use std::thread;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::{run, unique};

/// One that was made goes when this is dropped, and its links with it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
    /// Whether it is the test's own, and not a container's.
    is_own: bool,
}

impl Namespace {
    /// Makes one whose name ends with `role`, with loopback up.
    ///
    /// # Panics
    /// Where the kernel refuses.
    pub fn new(role: &str) -> Self {
        let name = format!("{}-{role}", unique());
        run(Command::new("ip").args(["netns", "add", &name]));
        let handle = match File::open(format!("/run/netns/{name}")) {
            Ok(handle) => handle,
            Err(error) => panic!("cannot open the namespace {name}: {error}"),
        };
        let namespace = Self { name, handle, is_own: true };
        // Addresses can be used at once, and ping sockets by root.
        namespace.sysctl("net/ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0");
        namespace.sysctl("net/ipv6/conf/default/router_solicitations", "0");
        namespace.sysctl("net/ipv4/ping_group_range", "0 2147483647");
        namespace.ip("link set lo up");
        namespace
    }

    /// The same one again, for somebody else to keep.
    pub fn again(&self) -> Self {
        Self { name: self.name.clone(), handle: self.handle(), is_own: false }
    }

    /// The one that a process is in, which belongs to somebody else.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn of_process(name: &str, pid: u32) -> Self {
        match File::open(format!("/proc/{pid}/ns/net")) {
            Ok(handle) => Self { name: name.to_owned(), handle, is_own: false },
            Err(error) => panic!("the namespace of process {pid}: {error}"),
        }
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does something on a thread of its own in this namespace. Sockets that it makes stay there.
    ///
    /// # Panics
    /// Where `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.handle, CloneFlags::CLONE_NEWNET).expect("root may enter the namespace");
                work()
            });
            thread.join()
        });
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A program that will run in this namespace. Unlike `ip netns exec` it keeps the mounts, and so bpffs.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        command_in(&self.handle, program)
    }

    /// The open namespace, for [`command_in`].
    ///
    /// # Panics
    /// When there are too many open files.
    pub fn handle(&self) -> File {
        self.handle.try_clone().expect("one more open file")
    }

    /// Runs `ip` commands, one a line.
    ///
    /// # Panics
    /// When one fails.
    #[track_caller]
    pub fn ip(&self, lines: &str) {
        let mut ip = self.command("ip");
        ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = ip.spawn().expect("iproute2's 'ip' in the PATH");
        let mut stdin = child.stdin.take().expect("a pipe was asked for");
        stdin.write_all(lines.as_bytes()).and_then(|()| stdin.write_all(b"\n")).expect("ip reads its commands");
        drop(stdin);
        let output = child.wait_with_output().expect("ip ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip in {}: {said}\n{lines}", self.name);
    }

    /// Writes a setting of the kernel's that each namespace has for itself.
    ///
    /// # Panics
    /// When it can't be written.
    #[track_caller]
    pub fn sysctl(&self, path: &str, value: &str) {
        let result = self.run(|| fs::write(format!("/proc/sys/{path}"), value));
        assert!(result.is_ok(), "{path} = {value}: {result:?}");
    }
}

/// A program that will run in a namespace, which stays open until the program is started.
pub fn command_in(namespace: &File, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    let namespace = namespace.as_raw_fd();
    let enter = move || {
        // SAFETY: setns takes integers only and may be called between fork and exec. The descriptor is open: the
        // child has a copy of it, and a number that is no namespace's any more would be an error.
        let result = unsafe { libc::setns(namespace, libc::CLONE_NEWNET) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: `enter` makes one system call, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(enter) };
    command
}

/// Has a program killed when the thread that starts it ends, also where that is killed itself.
pub fn ends_with_this_thread(command: &mut Command) {
    let with_us = || set_pdeathsig(Signal::SIGKILL).map_err(Into::into);
    // SAFETY: it makes one system call, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(with_us) };
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !self.is_own {
            return;
        }
        // A test that fails may have left a process in it: the name goes all the same, the rest with the process.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
