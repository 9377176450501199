//! bpf(2) as measuring and tampering need it: programs of a few instructions, plain maps, BPF_PROG_TEST_RUN with repeats,
//! and links. The agent's own programs come from its library; nothing here knows rules.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::libc;
use sg_agent::datapath::SkbContext;

/// One instruction (include/uapi/linux/bpf.h: `struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Insn {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The size of an access, as instructions encode it.
#[derive(Clone, Copy, Debug)]
pub enum Size {
    /// 16 bits.
    Half = 0x08,
    /// 32 bits.
    Word = 0x00,
    /// 64 bits.
    Double = 0x18,
}

const fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: destination | source << 4, offset, immediate }
}

/// `destination = source`
pub const fn mov(destination: u8, source: u8) -> Insn {
    insn(0xbf, destination, source, 0, 0)
}

/// `destination = value`
pub const fn mov_value(destination: u8, value: i32) -> Insn {
    insn(0xb7, destination, 0, 0, value)
}

/// `destination += value`
pub const fn add(destination: u8, value: i32) -> Insn {
    insn(0x07, destination, 0, 0, value)
}

/// `destination &= value`
pub const fn and(destination: u8, value: i32) -> Insn {
    insn(0x57, destination, 0, 0, value)
}

/// `destination = *(source + offset)`
pub const fn load(size: Size, destination: u8, source: u8, offset: i16) -> Insn {
    insn(0x61 | size as u8, destination, source, offset, 0)
}

/// `*(destination + offset) = source`
pub const fn store(size: Size, destination: u8, offset: i16, source: u8) -> Insn {
    insn(0x63 | size as u8, destination, source, offset, 0)
}

/// `if left > right goto +offset`
pub const fn jump_if_greater(left: u8, right: u8, offset: i16) -> Insn {
    insn(0x2d, left, right, offset, 0)
}

/// `if register == 0 goto +offset`
pub const fn jump_if_zero(register: u8, offset: i16) -> Insn {
    insn(0x15, register, 0, offset, 0)
}

/// Calls a helper.
pub const fn call(helper: i32) -> Insn {
    insn(0x85, 0, 0, 0, helper)
}

/// Returns r0.
pub const fn exit() -> Insn {
    insn(0x95, 0, 0, 0, 0)
}

/// `destination = map`
pub fn map(destination: u8, map: &OwnedFd) -> [Insn; 2] {
    const BPF_PSEUDO_MAP_FD: u8 = 1;
    [insn(0x18, destination, BPF_PSEUDO_MAP_FD, 0, map.as_raw_fd()), insn(0, 0, 0, 0, 0)]
}

/// `destination = &array[0]`
pub fn map_value(destination: u8, array: &OwnedFd) -> [Insn; 2] {
    const BPF_PSEUDO_MAP_VALUE: u8 = 2;
    [insn(0x18, destination, BPF_PSEUDO_MAP_VALUE, 0, array.as_raw_fd()), insn(0, 0, 0, 0, 0)]
}

/// `bpf_map_lookup_elem`
pub const LOOKUP: i32 = 1;
/// `bpf_tail_call`
pub const TAIL_CALL: i32 = 12;

/// `BPF_MAP_TYPE_HASH`
pub const HASH: u32 = 1;
/// `BPF_MAP_TYPE_ARRAY`
pub const ARRAY: u32 = 2;
/// `BPF_MAP_TYPE_PROG_ARRAY`
pub const PROGRAMS: u32 = 3;

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: passes, unless programs behind it say otherwise.
pub const NEXT: i32 = -1;
/// `TCX_PASS` and `TC_ACT_OK`: passes, whatever programs behind it say.
pub const PASS: i32 = 0;
/// `TC_ACT_SHOT`: drops.
pub const SHOT: i32 = 2;

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` begins as the kernel's union does for this command, of the size that is passed; every
    // pointer in it is to memory that its caller holds until the call returns.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes).cast::<c_void>(), size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for nobody else.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Makes a map.
///
/// # Errors
/// The kernel's.
pub fn create_map(kind: u32, key_size: u32, value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
    }
    bpf(0, &mut Create { kind, key_size, value_size, entries }).map(owned)
}

/// Writes an entry. `key` and `value` have the map's sizes.
///
/// # Errors
/// The kernel's.
pub fn update(map: &OwnedFd, key: &[u8], value: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        map: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
    bpf(2, &mut Update { map: map.as_raw_fd() as u32, pad: 0, key, value, flags: 0 }).map(drop)
}

/// Loads a program of the kind that TCX takes.
///
/// # Errors
/// The kernel's, with the verifier's words.
pub fn load_program(instructions: &[Insn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    const SCHED_CLS: u32 = 3;
    let mut log = vec![0_u8; 65_536];
    let mut attributes = Load {
        kind: SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log: log.as_mut_ptr() as u64,
    };
    bpf(5, &mut attributes).map(owned).map_err(|error| {
        let said = String::from_utf8_lossy(&log);
        io::Error::new(error.kind(), format!("{error}: {}", said.trim_end_matches('\0').trim()))
    })
}

/// A program that is loaded already.
///
/// # Errors
/// The kernel's.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    bpf(13, &mut ById { id, next: 0, flags: 0 }).map(owned)
}

/// The part of `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct Test {
    program: u32,
    returned: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
}

/// Runs a frame `repeat` times, as if it crossed the link `ifindex` of this thread's namespace; nanoseconds a run.
///
/// # Errors
/// The kernel's.
pub fn test_run(program: &OwnedFd, ifindex: u32, frame: &[u8], repeat: u32) -> io::Result<f64> {
    test(program, ifindex, frame, repeat).map(|test| f64::from(test.duration))
}

/// Runs a frame once, the same way: the program's action.
///
/// # Errors
/// The kernel's.
pub fn run(program: &OwnedFd, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
    test(program, ifindex, frame, 1).map(|test| test.returned as i32)
}

fn test(program: &OwnedFd, ifindex: u32, frame: &[u8], repeat: u32) -> io::Result<Test> {
    let context = SkbContext::new(ifindex, 0);
    let mut attributes = Test {
        program: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat,
        context_size_in: context.bytes().len() as u32,
        context_in: context.bytes().as_ptr() as u64,
        ..Test::default()
    };
    bpf(10, &mut attributes)?;
    Ok(attributes)
}

/// Where on a link a program is attached by TCX.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// What comes from the link.
    Ingress = 46,
    /// What goes to the link.
    Egress = 47,
}

/// Attaches a program to a link of this thread's namespace, for as long as the result is held.
///
/// # Errors
/// The kernel's.
pub fn attach(program: BorrowedFd<'_>, ifindex: u32, hook: Hook) -> io::Result<OwnedFd> {
    create_link(program, ifindex, hook, 0)
}

/// The same before all programs that are attached already.
///
/// # Errors
/// The kernel's.
pub fn attach_first(program: BorrowedFd<'_>, ifindex: u32, hook: Hook) -> io::Result<OwnedFd> {
    const BPF_F_BEFORE: u32 = 1 << 3;
    create_link(program, ifindex, hook, BPF_F_BEFORE)
}

fn create_link(program: BorrowedFd<'_>, ifindex: u32, hook: Hook, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        program: u32,
        ifindex: u32,
        hook: u32,
        flags: u32,
    }
    bpf(28, &mut Create { program: program.as_raw_fd() as u32, ifindex, hook: hook as u32, flags }).map(owned)
}

/// A program that only returns.
///
/// # Errors
/// The kernel's.
pub fn returning(action: i32) -> io::Result<OwnedFd> {
    load_program(&[mov_value(0, action), exit()])
}
