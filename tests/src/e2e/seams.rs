//! Seams of a process that a test starts: system calls that fail, and a wall clock that jumps. Nothing of the process is
//! changed for it, and no kernel option is needed: a seccomp filter that is there before its first instruction has the
//! kernel ask this test about bpf(2) and about the wall clock (`SECCOMP_RET_USER_NOTIF`, seccomp_unotify(2)). The test
//! has the call go on, or fail with the error number that it likes, as the kernel could.
//!
//! The wall clock is usually read without a system call, from the vDSO. So the process is started stopped, and the
//! vDSO's address is taken out of what it finds on its stack (getauxval(3)): then libc asks the kernel, and so the test.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, socketpair,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Commands of bpf(2) (include/uapi/linux/bpf.h: `enum bpf_cmd`).
pub mod commands {
    /// `BPF_MAP_CREATE`
    pub const MAP_CREATE: u64 = 0;
    /// `BPF_MAP_LOOKUP_ELEM`
    pub const LOOKUP: u64 = 1;
    /// `BPF_MAP_UPDATE_ELEM`
    pub const UPDATE: u64 = 2;
    /// `BPF_MAP_DELETE_ELEM`
    pub const DELETE: u64 = 3;
    /// `BPF_PROG_LOAD`
    pub const PROG_LOAD: u64 = 5;
    /// `BPF_OBJ_PIN`
    pub const PIN: u64 = 6;
    /// `BPF_PROG_TEST_RUN`
    pub const TEST_RUN: u64 = 10;
    /// `BPF_PROG_QUERY`
    pub const QUERY: u64 = 16;
    /// `BPF_MAP_LOOKUP_BATCH`
    pub const BATCH: u64 = 24;
    /// `BPF_LINK_CREATE`
    pub const LINK_CREATE: u64 = 28;
    /// `BPF_LINK_UPDATE`
    pub const LINK_UPDATE: u64 = 29;
}

/// Which calls of bpf(2) fail.
#[derive(Clone, Debug)]
pub struct Failures {
    /// Of these commands.
    pub commands: &'static [u64],
    /// So many of them go through before.
    pub after: u64,
    /// Then so many fail.
    pub times: u64,
    /// With this.
    pub error: Errno,
}

/// The seams of one process after another.
#[derive(Clone, Debug, Default)]
pub struct Seams(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    failures: Option<Failures>,
    failed: u64,
    /// Seconds by which the wall clock is wrong.
    wrong_by: i64,
    clock_wrong: u64,
}

/// A process that is about to be started.
#[derive(Debug)]
pub struct Pending {
    told: Seams,
    socket: OwnedFd,
}

impl Seams {
    /// From now on, these calls fail.
    pub fn fail(&self, failures: Failures) {
        let mut told = self.told();
        (told.failures, told.failed) = (Some(failures), 0);
    }

    /// From now on, no call fails. How many did since they were to.
    pub fn heal(&self) -> u64 {
        let mut told = self.told();
        told.failures = None;
        told.failed
    }

    /// How many calls have failed since they were to.
    pub fn failed(&self) -> u64 {
        self.told().failed
    }

    /// From now on, the wall clock is so many seconds ahead, or behind.
    pub fn set_clock(&self, wrong_by: i64) {
        self.told().wrong_by = wrong_by;
    }

    /// How often a wrong time was told.
    pub fn clock_wrong(&self) -> u64 {
        self.told().clock_wrong
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the command's process start with the seams, and stopped; to be followed by [`Pending::started`] on the same
    /// thread.
    ///
    /// # Panics
    /// When there are too many open files.
    pub fn install(&self, command: &mut Command) -> Pending {
        let pair = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.expect("two more open files");
        let filter = filter();
        let prepare = move || {
            // SAFETY: the call takes integers only.
            if unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            send(theirs.as_raw_fd(), listen(&filter)?)
        };
        // SAFETY: `prepare` makes system calls only, and neither allocates nor takes a lock.
        unsafe { command.pre_exec(prepare) };
        Pending { told: self.clone(), socket: ours }
    }
}

impl Pending {
    /// Lets the process run, and answers its questions until it has ended.
    ///
    /// # Panics
    /// When this isn't the process.
    pub fn started(self, pid: u32) {
        let pid = Pid::from_raw(i32::try_from(pid).expect("a process id"));
        let status = waitpid(pid, None).expect("the process is this thread's to wait for");
        assert!(matches!(status, WaitStatus::Stopped(..)), "it stops before its first instruction: {status:?}");
        hide_vdso(pid).expect("a stopped process's stack can be written");
        // SAFETY: the call takes integers only, and the process is stopped and traced by this thread.
        let detached = unsafe { libc::ptrace(libc::PTRACE_DETACH, pid.as_raw(), 0, 0) };
        assert_eq!(detached, 0, "{}", io::Error::last_os_error());
        let listener = receive(self.socket.as_raw_fd());
        thread::spawn(move || answer(&listener, &self.told));
    }
}

/// Restarts the process in another time namespace (time_namespaces(7)): its monotonic and boot-time clocks are so many
/// seconds ahead, or behind. The kernel's programs know no time namespaces.
pub fn shift_monotonic(command: &mut Command, seconds: i64) {
    let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    let shift = move || {
        // SAFETY: the call takes integers only.
        if unsafe { libc::unshare(libc::CLONE_NEWTIME) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the path ends with zero, and the buffer is as long as is said.
        unsafe {
            let file = libc::open(c"/proc/self/timens_offsets".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            let written = libc::write(file, offsets.as_ptr().cast(), offsets.len());
            if file < 0 || written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        }
    };
    // SAFETY: `shift` makes system calls only, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(shift) };
}

/// Asks about bpf(2), and about clock_gettime(2) of the wall clock; lets all others through.
fn filter() -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    /// Offsets in `struct seccomp_data`: the call's number, and the low half of its first argument.
    const NUMBER: u32 = 0;
    const FIRST: u32 = 16;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    vec![
        step(LOAD, NUMBER, 0, 0),
        step(IF_EQUAL, libc::SYS_bpf as u32, 3, 0),
        step(IF_EQUAL, libc::SYS_clock_gettime as u32, 0, 3),
        step(LOAD, FIRST, 0, 0),
        step(IF_EQUAL, libc::CLOCK_REALTIME as u32, 0, 1),
        step(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]
}

/// Puts the filter in force; where its questions are to be read.
fn listen(filter: &[libc::sock_filter]) -> io::Result<RawFd> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program's pointer and length are the slice's, and the kernel only reads it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            std::ptr::from_ref(&program),
        )
    };
    if listener < 0 { Err(io::Error::last_os_error()) } else { Ok(listener as RawFd) }
}

/// Room for one descriptor in a control message (cmsg(3)), aligned as that needs.
#[repr(C, align(8))]
struct Control([u8; 24]);

/// Sends a descriptor without allocating anything: other threads of the test's may have held malloc's lock at the fork.
fn send(socket: RawFd, descriptor: RawFd) -> io::Result<()> {
    let (mut byte, mut control) = ([0_u8], Control([0; 24]));
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: all of its fields may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.0.as_mut_ptr().cast(), size_of::<Control>() as _);
    // SAFETY: the buffer is aligned and large enough for one header and one descriptor, so there is a first header.
    let sent = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor);
        libc::sendmsg(socket, &raw const message, 0)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(socket: RawFd) -> OwnedFd {
    let (mut byte, mut control) = ([0], nix::cmsg_space!(RawFd));
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC);
    let message = message.expect("what was sent before the process ran");
    let mut sent = message.cmsgs().expect("a whole control message").filter_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    let descriptor = sent.next().expect("one descriptor");
    // SAFETY: the kernel has just made it for this process, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Takes the vDSO's address out of the auxiliary vector of a process that was just executed.
fn hide_vdso(pid: Pid) -> io::Result<()> {
    const WORD: usize = size_of::<usize>();
    let vector = fs::read(format!("/proc/{pid}/auxv"))?;
    let entries = vector.chunks_exact(2 * WORD);
    let word = |bytes: &[u8]| usize::from_ne_bytes(bytes[..WORD].try_into().expect("a word"));
    let Some(place) = entries.clone().position(|entry| word(entry) == libc::AT_SYSINFO_EHDR as usize) else {
        return Ok(());
    };
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).and_then(|line| line.split_whitespace().next());
    let range = stack
        .and_then(|range| range.split_once('-'))
        .and_then(|(from, to)| Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?)));
    let (from, to) = range.ok_or_else(|| io::Error::other("the process has no stack"))?;
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
    let mut stack = vec![0; (to - from) as usize];
    memory.read_exact_at(&mut stack, from)?;
    // What /proc shows may be longer than the vector, by zeros behind its end.
    let whole = entries.take_while(|entry| word(entry) != libc::AT_NULL as usize).count() * 2 * WORD;
    let found = stack.windows(whole).step_by(WORD).position(|bytes| bytes == &vector[..whole]);
    let found = found.ok_or_else(|| io::Error::other("the auxiliary vector isn't on the stack"))? * WORD;
    let entry = from + (found + place * 2 * WORD) as u64;
    memory.write_all_at(&(libc::AT_IGNORE as usize).to_ne_bytes(), entry)
}

/// Answers until nobody can ask any more.
fn answer(listener: &OwnedFd, told: &Seams) {
    loop {
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(listener), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        let events = ready[0].revents().unwrap_or(PollFlags::empty());
        if !events.contains(PollFlags::POLLIN) {
            if events.contains(PollFlags::POLLHUP) {
                return;
            }
            continue;
        }
        // SAFETY: all of its fields may be zero, and the kernel wants them so.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills in the structure that its number is for.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) } != 0 {
            // Whoever asked is gone.
            continue;
        }
        let mut answer = told.decide(&asked);
        // SAFETY: the kernel reads the structure that its number is for.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    }
}

impl Seams {
    fn decide(&self, asked: &libc::seccomp_notif) -> libc::seccomp_notif_resp {
        let go_on = libc::seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        let mut told = self.told();
        if i64::from(asked.data.nr) == libc::SYS_clock_gettime {
            let written = told.wrong_by != 0 && write_time(asked, told.wrong_by).is_ok();
            told.clock_wrong += u64::from(written);
            return if written { libc::seccomp_notif_resp { flags: 0, ..go_on } } else { go_on };
        }
        let Told { failures: Some(failures), failed, .. } = &mut *told else { return go_on };
        if !failures.commands.contains(&asked.data.args[0]) {
            return go_on;
        }
        if failures.after > 0 {
            failures.after -= 1;
            return go_on;
        }
        if *failed >= failures.times {
            return go_on;
        }
        *failed += 1;
        libc::seccomp_notif_resp { flags: 0, error: -(failures.error as i32), ..go_on }
    }
}

/// Writes the wrong time to where the process wants to have it.
fn write_time(asked: &libc::seccomp_notif, wrong_by: i64) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX).saturating_add(wrong_by);
    let time = [seconds.to_ne_bytes(), i64::from(now.subsec_nanos()).to_ne_bytes()].concat();
    let memory = File::options().write(true).open(format!("/proc/{}/mem", asked.pid))?;
    memory.write_all_at(&time, asked.data.args[1])
}
