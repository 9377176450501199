//! Bytes between two sockets, both ways, without a visit to userspace: splice(2) into a pipe and out of it.
//!
//! What one side does the other sees, as if they were connected: a FIN closes one direction only, a reset both, and a
//! reader that doesn't read stops the writer. Idle connections hold no pipe.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::{SysconfVar, pipe2, sysconf};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

/// Bytes that a pipe is asked to hold: the kernel's own default for `fs.pipe-max-size`. It gives less where its limits
/// say so (pipe(7), pipe-user-pages-soft).
const PIPE_BYTES: usize = 1024 * 1024;
/// Empty pipes that are kept for the next connection that needs one.
const MOST_IDLE_PIPES: usize = 256;
/// Fills of a pipe that are saved of what a socket received before it was reset.
const MOST_FLUSHES: usize = 64;

/// Empty pipes.
#[derive(Debug, Default)]
pub struct Pipes(Mutex<Vec<Pipe>>);

impl Pipes {
    fn take(&self) -> io::Result<Pipe> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(Pipe::new, Ok)
    }

    /// Takes a pipe back; one with bytes in it is closed, since they are another connection's.
    fn give(&self, pipe: Pipe) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pipe.held == 0 && idle.len() < MOST_IDLE_PIPES {
            idle.push(pipe);
        }
    }
}

#[derive(Debug)]
struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    capacity: usize,
    /// How many pieces it holds, of one byte or of many: one for each page of its capacity (pipe(7)).
    slots: usize,
    held: usize,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let given = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES as i32))
            .or_else(|_| fcntl(&writer, FcntlArg::F_GETPIPE_SZ))?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(i64::MAX);
        Ok(Self { reader, writer, capacity: given as usize, slots: (i64::from(given) / page) as usize, held: 0 })
    }

    /// Moves what the socket has into the pipe, which must be empty: a full one would look like a socket that has nothing.
    fn fill(&mut self, from: &TcpStream) -> io::Result<Filled> {
        let mut without = Filled::NotAsked;
        let filled = from.try_io(Interest::READABLE, || match self.fill_now(from) {
            Ok(0) => Ok(Filled::End),
            // Each slot takes a byte at least: the pipe isn't full, so the socket is empty. To say so now saves asking.
            Ok(moved) if moved < self.slots => {
                without = Filled::Last;
                Err(io::ErrorKind::WouldBlock.into())
            }
            Ok(_) => Ok(Filled::Some),
            Err(error) => {
                without = Filled::Last;
                Err(error)
            }
        });
        match filled {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(without),
            filled => filled,
        }
    }

    /// The same, whether or not the socket is known to have anything; 0 is its end.
    fn fill_now(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0);
        let moved = splice(from, &self.writer, self.capacity)?;
        self.held = moved;
        Ok(moved)
    }

    /// Moves what the pipe holds into the socket, as much as that takes.
    fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let moved = to.try_io(Interest::WRITABLE, || splice(&self.reader, to, self.held))?;
        self.held -= moved;
        Ok(moved)
    }
}

/// What came of filling a pipe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filled {
    /// Bytes, and there may be more.
    Some,
    /// All that there was, which may be none.
    Last,
    /// Nothing has come since the last time.
    NotAsked,
    /// The source has closed.
    End,
}

fn splice(from: &impl AsFd, to: &impl AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        match nix::fcntl::splice(from, None, to, None, most, flags) {
            Err(nix::Error::EINTR) => {}
            moved => return Ok(moved?),
        }
    }
}

/// Moves bytes both ways until both directions are closed, and counts them: to `server`, to `client`.
///
/// # Errors
/// What ended the connection otherwise; both sides are then to be reset.
pub async fn both_ways(
    client: &TcpStream,
    server: &TcpStream,
    pipes: &Pipes,
    bytes: [&AtomicU64; 2],
) -> io::Result<()> {
    let mut there = Half { from: client, to: server, pipes, pipe: None, bytes: bytes[0] };
    let mut back = Half { from: server, to: client, pipes, pipe: None, bytes: bytes[1] };
    let ended = tokio::select! {
        closed = async { tokio::try_join!(there.run(), back.run()) } => closed.map(drop),
        // A half that waits for one side to read wouldn't notice that the other side is gone.
        error = failure(client) => Err(error),
        error = failure(server) => Err(error),
    };
    if ended.is_err() {
        // What was received before the reset is still good: a server that answers without having read everything
        // resets the connection right behind its answer.
        there.flush();
        back.flush();
    }
    ended
}

/// Whether an urgent byte waits to be read (POLLPRI in tcp(7)). The socket has it in line, or nobody would be woken by it
/// (kernel: `tcp_poll`).
fn is_urgent(socket: &TcpStream) -> bool {
    let mut asked = [PollFd::new(socket.as_fd(), PollFlags::POLLPRI)];
    poll(&mut asked, PollTimeout::ZERO).is_ok_and(|found| found > 0)
        && asked[0].revents().is_some_and(|events| events.contains(PollFlags::POLLPRI))
}

/// Sends bytes however long it takes; how many they were.
pub async fn send_all(to: &TcpStream, mut bytes: &[u8], send: impl Fn(&[u8]) -> io::Result<usize>) -> io::Result<u64> {
    let length = bytes.len() as u64;
    while !bytes.is_empty() {
        match to.try_io(Interest::WRITABLE, || send(bytes)) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// Waits until a socket has failed. The error stays with it, behind the bytes that came before.
async fn failure(socket: &TcpStream) -> io::Error {
    match socket.ready(Interest::ERROR).await {
        Ok(_) => io::ErrorKind::ConnectionReset.into(),
        Err(error) => error,
    }
}

/// One direction.
struct Half<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    pipes: &'a Pipes,
    pipe: Option<Pipe>,
    bytes: &'a AtomicU64,
}

impl Half<'_> {
    /// Runs until the source closes, and passes that on.
    async fn run(&mut self) -> io::Result<()> {
        let from = self.from;
        loop {
            // Ready sockets never wait, and others want to run too.
            consume_budget().await;
            let filled = self.pipe()?.fill(from)?;
            self.drain().await?;
            match filled {
                Filled::Some => {}
                // splice(2) stops before an urgent byte for ever (kernel: `tcp_read_sock`), be it that more comes, or
                // that the end does.
                Filled::Last | Filled::End if is_urgent(from) => self.pass_urgent().await?,
                Filled::End => return self.finish(),
                Filled::Last | Filled::NotAsked => {
                    self.release();
                    from.readable().await?;
                }
            }
        }
    }

    /// Passes on an urgent byte as one, and all that has come before and behind it: whatever is known of the socket's
    /// readiness, since nobody is woken a second time by what is there already.
    async fn pass_urgent(&mut self) -> io::Result<()> {
        let (from, to) = (self.from, self.to);
        loop {
            match self.pipe()?.fill_now(from) {
                Ok(1..) => {
                    self.drain().await?;
                    continue;
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ if !is_urgent(from) => return Ok(()),
                // It has nothing before the urgent byte, so that is next.
                _ => {}
            }
            let mut byte = [0];
            match recv(from.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
                Ok(1) => {
                    let sent = send_all(to, &byte, |byte| SockRef::from(to).send_out_of_band(byte)).await;
                    self.bytes.fetch_add(sent?, Relaxed);
                }
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => tokio::task::yield_now().await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn drain(&mut self) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        while pipe.held > 0 {
            match pipe.drain(self.to) {
                Ok(moved) => {
                    self.bytes.fetch_add(moved as u64, Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Moves what can be moved without waiting.
    fn flush(&mut self) {
        let (from, to) = (self.from, self.to);
        for _ in 0..MOST_FLUSHES {
            let Ok(pipe) = self.pipe() else { return };
            if pipe.held == 0 && !matches!(pipe.fill_now(from), Ok(1..)) {
                return;
            }
            let Ok(moved) = pipe.drain(to) else { return };
            self.bytes.fetch_add(moved as u64, Relaxed);
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.release();
        match SockRef::from(self.to).shutdown(std::net::Shutdown::Write) {
            // It is closed already.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        }
    }

    fn pipe(&mut self) -> io::Result<&mut Pipe> {
        match &mut self.pipe {
            Some(pipe) => Ok(pipe),
            empty => Ok(empty.insert(self.pipes.take()?)),
        }
    }

    fn release(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            self.pipes.give(pipe);
        }
    }
}

impl Drop for Half<'_> {
    fn drop(&mut self) {
        self.release();
    }
}
