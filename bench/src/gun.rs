//! Packets through a program, each with another source: BPF_PROG_TEST_RUN repeats one frame, and the second time a new
//! flow would be a known one. So what is run is a small program that writes the next address and ports into the frame
//! and then goes over into the one that is measured. What it costs itself is measured with a program that does nothing.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use tests::programs::{
    self, ARRAY, HASH, Insn, LOOKUP, PROGRAMS, Size, TAIL_CALL, add, and, call, exit, jump_if_greater, jump_if_zero,
    load, map, map_value, mov, mov_value, store,
};

/// The most ends that one gun can have, as a power of two: as many as there can be flows.
const MOST: usize = 1 << 18;
/// `struct __sk_buff`: `data` and `data_end`.
const DATA: (i16, i16) = (76, 80);
/// Bytes of a packet's end in the map: address, port, the other port.
const END: usize = 20;

/// The end of a packet that changes from one to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// The address.
    pub address: IpAddr,
    /// The port at that address.
    pub port: u16,
    /// The port at the other end.
    pub other: u16,
}

/// Where in a frame what changes is.
#[derive(Clone, Copy, Debug)]
struct Places {
    address: i16,
    words: i16,
    port: i16,
    other: i16,
    end: i32,
}

impl Places {
    /// Of a TCP or UDP frame without options; its source changes, or its destination.
    fn of(is_v4: bool, is_source: bool) -> Self {
        let (header, words) = if is_v4 { (20, 1) } else { (40, 4) };
        let transport = 14 + header;
        let addresses = transport - 2 * 4 * words;
        let (address, port, other) = if is_source {
            (addresses, transport, transport + 2)
        } else {
            (addresses + 4 * words, transport + 2, transport)
        };
        Self { address, words, port, other, end: i32::from(transport) + 4 }
    }
}

/// Fires packets of one shape at programs.
#[derive(Debug)]
pub struct Gun {
    program: OwnedFd,
    counter: OwnedFd,
    targets: OwnedFd,
    ifindex: u32,
    frame: Vec<u8>,
    _ends: OwnedFd,
}

impl Gun {
    /// A gun for `frame` at `ifindex`, whose source (or destination) runs through `ends`, again and again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(frame: Vec<u8>, ifindex: u32, is_source: bool, ends: &[End]) -> io::Result<Self> {
        let slots = ends.len().next_power_of_two().min(MOST);
        let counter = programs::create_map(ARRAY, 4, 8, 1)?;
        let targets = programs::create_map(PROGRAMS, 4, 4, 1)?;
        let table = programs::create_map(ARRAY, 4, END as u32, slots as u32)?;
        for (slot, end) in (0..slots as u32).zip(ends.iter().cycle()) {
            programs::update(&table, &slot.to_ne_bytes(), &encode(end))?;
        }
        let is_v4 = ends.first().is_none_or(|end| end.address.is_ipv4());
        let places = Places::of(is_v4, is_source);
        let program = programs::load_program(&program(places, slots, &counter, &table, &targets))?;
        Ok(Self { program, counter, targets, ifindex, frame, _ends: table })
    }

    /// The next packet is the first one again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rewind(&self) -> io::Result<()> {
        programs::update(&self.counter, &0_u32.to_ne_bytes(), &0_u64.to_ne_bytes())
    }

    /// Fires; nanoseconds a packet, the gun's own among them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fire(&self, target: BorrowedFd<'_>, packets: u32) -> io::Result<f64> {
        programs::update(&self.targets, &0_u32.to_ne_bytes(), &target.as_raw_fd().to_ne_bytes())?;
        programs::test_run(&self.program, self.ifindex, &self.frame, packets)
    }
}

fn encode(end: &End) -> [u8; END] {
    let mut bytes = [0; END];
    match end.address {
        IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => bytes[..16].copy_from_slice(&address.octets()),
    }
    bytes[16..18].copy_from_slice(&end.port.to_be_bytes());
    bytes[18..20].copy_from_slice(&end.other.to_be_bytes());
    bytes
}

/// r6: the context, r7: the frame.
fn program(places: Places, slots: usize, counter: &OwnedFd, ends: &OwnedFd, targets: &OwnedFd) -> Vec<Insn> {
    let mut copy = Vec::new();
    for word in 0..places.words {
        copy.extend([load(Size::Word, 1, 0, 4 * word), store(Size::Word, 7, places.address + 4 * word, 1)]);
    }
    copy.extend([load(Size::Half, 1, 0, 16), store(Size::Half, 7, places.port, 1)]);
    copy.extend([load(Size::Half, 1, 0, 18), store(Size::Half, 7, places.other, 1)]);
    let mut fire = vec![mov(1, 6)];
    fire.extend(map(2, targets));
    fire.extend([mov_value(3, 0), call(TAIL_CALL)]);
    let mut next = Vec::new();
    next.extend(map_value(1, counter));
    next.extend([load(Size::Double, 3, 1, 0), mov(4, 3), add(4, 1), store(Size::Double, 1, 0, 4)]);
    next.extend([and(3, slots as i32 - 1), store(Size::Word, 10, -4, 3)]);
    next.extend(map(1, ends));
    next.extend([mov(2, 10), add(2, -4), call(LOOKUP)]);
    let rest = copy.len() + fire.len();
    let mut all = vec![mov(6, 1), load(Size::Word, 7, 1, DATA.0), load(Size::Word, 2, 1, DATA.1)];
    all.extend([mov(3, 7), add(3, places.end), jump_if_greater(3, 2, (next.len() + 1 + rest) as i16)]);
    all.extend(next);
    all.push(jump_if_zero(0, rest as i16));
    all.extend(copy);
    all.extend(fire);
    all.extend([mov_value(0, programs::NEXT), exit()]);
    all
}

/// A bare look-up in a hash map of the flow table's size: the unit that the cost of a packet is told in.
#[derive(Debug)]
pub struct Lookup {
    program: OwnedFd,
    _map: OwnedFd,
}

/// Bytes of a key: those of `sg_common::abi::FlowKey`.
const KEY: usize = size_of::<sg_common::abi::FlowKey>();

impl Lookup {
    /// A map that has these ends, and the program that looks up a frame's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(is_source: bool, ends: &[End]) -> io::Result<Self> {
        let table = programs::create_map(
            HASH,
            KEY as u32,
            size_of::<sg_common::abi::Flow>() as u32,
            sg_common::abi::MAX_FLOWS,
        )?;
        for end in ends {
            let mut key = [0; KEY];
            key[..END].copy_from_slice(&encode(end));
            programs::update(&table, &key, &[0; size_of::<sg_common::abi::Flow>()])?;
        }
        let places = Places::of(ends.first().is_none_or(|end| end.address.is_ipv4()), is_source);
        let mut body = vec![mov_value(4, 0)];
        let base = -(KEY as i16) - 4;
        body.extend((0..KEY as i16 / 4).map(|word| store(Size::Word, 10, base + 4 * word, 4)));
        for word in 0..places.words {
            body.extend([load(Size::Word, 4, 7, places.address + 4 * word), store(Size::Word, 10, base + 4 * word, 4)]);
        }
        body.extend([load(Size::Half, 4, 7, places.port), store(Size::Half, 10, base + 16, 4)]);
        body.extend([load(Size::Half, 4, 7, places.other), store(Size::Half, 10, base + 18, 4)]);
        body.extend(map(1, &table));
        body.extend([mov(2, 10), add(2, i32::from(base)), call(LOOKUP)]);
        let mut all = vec![load(Size::Word, 7, 1, DATA.0), load(Size::Word, 2, 1, DATA.1)];
        all.extend([mov(3, 7), add(3, places.end), jump_if_greater(3, 2, body.len() as i16)]);
        all.extend(body);
        all.extend([mov_value(0, programs::NEXT), exit()]);
        Ok(Self { program: programs::load_program(&all)?, _map: table })
    }

    /// The program.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}
