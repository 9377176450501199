//! What the daemon may do, and gives up before it starts anything: capabilities, system calls, and new privileges by
//! executing a file. Knows nothing of what it does with the rest.
//!
//! Capabilities and filters are a thread's own and pass to the threads that it makes: so this is the first thing that
//! `run` does, before there are others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::libc;
use nix::unistd::{AccessFlags, faccessat};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};

/// What is kept, and for what.
const KEPT: [Capability; 7] = [
    // Loading programs, and maps by their ids.
    Capability::CAP_BPF,
    // Programs read the kernel's memory (where a checksum is to be written).
    Capability::CAP_PERFMON,
    // Attaching to links; the proxy's mark.
    Capability::CAP_NET_ADMIN,
    // Entering network namespaces (setns(2)), to read containers' addresses.
    Capability::CAP_SYS_ADMIN,
    // Opening /proc/PID/ns/net of a process with other capabilities or another user.
    Capability::CAP_SYS_PTRACE,
    // Hearing of address changes in other namespaces (NETLINK_LISTEN_ALL_NSID).
    Capability::CAP_NET_BROADCAST,
    // Published ports below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// Kept as well where a file that the agent was told to use is another user's own.
const FOR_OTHERS_FILES: Capability = Capability::CAP_DAC_OVERRIDE;

/// System calls that the agent never makes: each fails with EPERM, as do those of [`refuse`]. What a daemon that is taken over would need to get
/// further: into other processes, the kernel, mounts, the clock; and kernel interfaces with a long record of holes.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_unshare,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_personality,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
];

/// Refused as well where no profile asks for a command that gives credentials.
const EXECUTING: &[libc::c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// `clone(2)` with any of these makes a namespace, as unshare(2) does; threads and commands are made without.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// The lowest number of a system call of the x32 ABI (arch/x86/include/uapi/asm/unistd.h: `__X32_SYSCALL_BIT`), which has
/// the architecture of the others: all calls have a second number there. No architecture's own are as high.
const X32: u32 = 0x4000_0000;

/// What can't be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// System calls.
    #[error("cannot give up system calls: {0}; sg-agent needs a kernel with CONFIG_SECCOMP_FILTER")]
    Filter(Box<dyn std::error::Error + Send + Sync>),
}

/// Gives up, for this thread and those that it will make, what isn't needed for working with these files.
///
/// # Errors
/// [`PrivilegeError`]; some may have been given up then.
pub fn restrict(read: &[PathBuf], write: &[PathBuf], may_execute: bool) -> Result<(), PrivilegeError> {
    let had = caps::read(None, CapSet::Permitted)?;
    let mut kept: CapsHashSet = KEPT.into_iter().filter(|capability| had.contains(capability)).collect();
    caps::set(None, CapSet::Effective, &kept)?;
    let reads = read.iter().filter(|path| is_denied(path, AccessFlags::R_OK));
    let writes = write.iter().filter(|path| is_denied(existing(path), AccessFlags::W_OK));
    if let Some(path) = reads.chain(writes).next()
        && had.contains(&FOR_OTHERS_FILES)
    {
        tracing::warn!(path = %path.display().to_string().escape_default(), "is another user's own: CAP_DAC_OVERRIDE is kept for it");
        kept.insert(FOR_OTHERS_FILES);
    }
    // A command that is executed all the same gets none of what is kept, though it is root's. Both need CAP_SETPCAP,
    // which is about to go.
    caps::set(None, CapSet::Effective, &had)?;
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::all().difference(&kept) {
            // One that this kernel doesn't know.
            let _ = caps::drop(None, CapSet::Bounding, *capability);
        }
        never_by_user_id();
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    refuse(may_execute)
}

/// `SECBIT_NOROOT`, for good: executing a file as root gives no capabilities.
fn never_by_user_id() {
    const SECBIT_NOROOT: libc::c_ulong = 1;
    const SECBIT_NOROOT_LOCKED: libc::c_ulong = 2;
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED, 0, 0, 0) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "root's commands keep what the agent may do");
    }
}

/// Has the kernel refuse what is never called. No new privileges come with it. A call by another architecture's table
/// (32 bits), which has other numbers, ends the process: that is how seccompiler begins each filter.
fn refuse(may_execute: bool) -> Result<(), PrivilegeError> {
    let executing = if may_execute { &[][..] } else { EXECUTING };
    let mut rules: Rules = REFUSED.iter().chain(executing).map(|&call| (call, Vec::new())).collect();
    let makes = |flag: libc::c_int| argument(0, SeccompCmpOp::MaskedEq(flag as u64), flag as u64);
    rules.insert(libc::SYS_clone, NAMESPACES.into_iter().map(makes).collect::<Result<_, _>>().map_err(failed)?);
    // Network namespaces alone are entered.
    let elsewhere = argument(1, SeccompCmpOp::Ne, libc::CLONE_NEWNET as u64).map_err(failed)?;
    rules.insert(libc::SYS_setns, vec![elsewhere]);
    let mut filter = filter(rules, Errno::EPERM)?;
    filter.splice(0..0, no_x32());
    apply(&filter)?;
    // Its flags are in memory, where no filter sees them. Who is told that there is no such call takes clone(2).
    apply(&self::filter(Rules::from([(libc::SYS_clone3, Vec::new())]), Errno::ENOSYS)?)
}

/// By the call's number, when it is refused; always, if there are none.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn argument(number: u8, is: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    // The kernel takes these for `int`s.
    SeccompRule::new(vec![SeccompCondition::new(number, SeccompCmpArgLen::Dword, is, value)?])
}

fn filter(rules: Rules, error: Errno) -> Result<BpfProgram, PrivilegeError> {
    let arch = std::env::consts::ARCH.try_into().map_err(failed)?;
    let refuse = SeccompAction::Errno(error as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).map_err(failed)?;
    filter.try_into().map_err(failed)
}

/// What seccompiler has no word for: a call's number by comparison. Refused from [`X32`] on.
fn no_x32() -> [sock_filter; 3] {
    let instruction = |code: u32, skip: u8, k: u32| sock_filter { code: code as u16, jt: 0, jf: skip, k };
    [
        // `seccomp_data.nr` is the first field.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | Errno::EPERM as u32),
    ]
}

fn apply(filter: &BpfProgram) -> Result<(), PrivilegeError> {
    seccompiler::apply_filter(filter).map_err(|error| PrivilegeError::Filter(error.into()))
}

fn failed(error: seccompiler::BackendError) -> PrivilegeError {
    PrivilegeError::Filter(error.into())
}

fn is_denied(path: &Path, access: AccessFlags) -> bool {
    faccessat(nix::fcntl::AT_FDCWD, path, access, AtFlags::AT_EACCESS) == Err(Errno::EACCES)
}

/// The directory in which a path's first missing part would be made.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Filters are a thread's own: the other tests' threads keep all their calls.
    #[test]
    fn what_is_never_called_is_refused() {
        let test = || {
            let unshare = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES);
            let execute = || std::process::Command::new("/bin/true").status();
            assert_eq!(unshare(), Ok(()), "or the refusal would show nothing");
            assert!(execute().is_ok());
            refuse(true).expect("a filter that the kernel takes");
            assert_eq!(unshare(), Err(Errno::EPERM));
            assert!(execute().is_ok(), "a profile asks for it");
            refuse(false).expect("a second filter");
            assert_eq!(execute().map_err(|error| error.kind()).err(), Some(std::io::ErrorKind::PermissionDenied));
            assert!(std::fs::read("/proc/self/status").is_ok(), "the rest goes on");
        };
        std::thread::spawn(test).join().expect("a test that passes");
    }

    /// Each call fails at once without the filter too, but otherwise.
    #[test]
    fn namespaces_are_neither_made_nor_entered_by_another_call() {
        let failed = |call: libc::c_long, arguments: [libc::c_long; 2]| {
            // SAFETY: with these arguments the kernel refuses before it does anything or follows a pointer.
            let result = unsafe { libc::syscall(call, arguments[0], arguments[1], 0, 0, 0) };
            (result == -1).then(Errno::last)
        };
        // A thread that doesn't share its signals, and a namespace of no kind.
        let clone = move |flag: libc::c_int| failed(libc::SYS_clone, [(libc::CLONE_THREAD | flag).into(), 0]);
        let setns = move |kind: libc::c_int| failed(libc::SYS_setns, [-1, kind.into()]);
        let test = move || {
            for flag in NAMESPACES {
                assert_eq!((clone(flag), setns(flag)), (Some(Errno::EINVAL), Some(Errno::EBADF)));
            }
            assert_eq!(failed(libc::SYS_clone3, [0, 0]), Some(Errno::EINVAL));
            refuse(true).expect("a filter that the kernel takes");
            for flag in NAMESPACES {
                assert_eq!(clone(flag), Some(Errno::EPERM));
                let expected = if flag == libc::CLONE_NEWNET { Errno::EBADF } else { Errno::EPERM };
                assert_eq!(setns(flag), Some(expected));
            }
            assert_eq!((clone(0), setns(0)), (Some(Errno::EINVAL), Some(Errno::EPERM)), "0 is any kind");
            assert_eq!(failed(libc::SYS_clone3, [0, 0]), Some(Errno::ENOSYS));
            std::thread::spawn(|| {}).join().expect("threads are made as ever");
            assert!(std::process::Command::new("/bin/true").status().is_ok_and(|status| status.success()));
        };
        std::thread::spawn(test).join().expect("a test that passes");
    }

    #[test]
    fn calls_by_other_numbers_are_refused() {
        let test = || {
            let x32 = libc::c_long::from(X32) | libc::SYS_getppid;
            // SAFETY: the call takes no arguments.
            let call = move || unsafe { libc::syscall(x32) };
            assert!(call() != -1 || Errno::last() == Errno::ENOSYS, "most kernels have no x32");
            refuse(false).expect("a filter that the kernel takes");
            assert_eq!((call(), Errno::last()), (-1, Errno::EPERM));
        };
        std::thread::spawn(test).join().expect("a test that passes");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_call_by_the_32_bit_table_ends_the_process() {
        use nix::sys::signal::Signal;
        use nix::sys::wait::{WaitStatus, waitpid};
        let child = |restricted: bool| {
            // SAFETY: the child makes system calls and ends, but for the filter's vectors: no other thread of this process
            // can hold the allocator's lock for it, since glibc's fork takes that over.
            match unsafe { nix::unistd::fork() }.expect("a child") {
                nix::unistd::ForkResult::Child => {
                    let failed = restricted && refuse(false).is_err();
                    const GETPID: i32 = 20;
                    let mut result = GETPID;
                    if !failed {
                        // SAFETY: getpid(2) of the 32-bit table takes nothing and writes nothing but its result.
                        unsafe {
                            std::arch::asm!(
                                "int 0x80", inout("eax") result,
                                out("r8") _, out("r9") _, out("r10") _, out("r11") _
                            );
                        }
                    }
                    // SAFETY: ends this process without any of its parent's clean-up.
                    unsafe { libc::_exit(if !failed && result > 0 { 0 } else { 1 }) }
                }
                nix::unistd::ForkResult::Parent { child } => waitpid(child, None).expect("the child's end"),
            }
        };
        if !matches!(child(false), WaitStatus::Exited(_, 0)) {
            eprintln!("skipped: this kernel has no 32-bit system calls (CONFIG_IA32_EMULATION)");
            return;
        }
        let end = child(true);
        assert!(matches!(end, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{end:?}");
    }

    #[test]
    fn a_missing_path_is_made_in_what_is_there() {
        let there = std::env::temp_dir();
        assert_eq!(existing(&there.join("sg-none/at/all")), there);
        assert!(!is_denied(&there.join("sg-none"), AccessFlags::R_OK), "what isn't there is nobody's");
    }
}
