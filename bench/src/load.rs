//! Load between namespaces, and what it meets: connections, bytes, datagrams. Bounded in time, and every socket has a
//! time limit, so that nothing hangs where a packet is lost. Knows nothing of what is in between.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ::tests::e2e::Namespace;
use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::socket::{Shutdown as Both, shutdown};
use nix::time::{ClockId, clock_gettime};

/// Whatever takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that are written at once in bulk.
const CHUNK: usize = 256 * 1024;

/// What a server does with a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// Sends back one byte for each that comes.
    Echo,
    /// Takes everything.
    Sink,
}

/// A server; it ends when dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    listener: Arc<TcpListener>,
    stopping: Arc<AtomicBool>,
    taken: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// Connections that a server serves at once.
const THREADS: usize = 8;

impl Server {
    /// Starts one in a namespace.
    ///
    /// # Errors
    /// Those of listening.
    pub fn start(namespace: &Namespace, address: SocketAddr, service: Service) -> Result<Self> {
        let listener = namespace.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4_096)?;
            Ok::<TcpListener, std::io::Error>(socket.into())
        });
        let listener = Arc::new(listener.with_context(|| format!("cannot listen on {address}"))?);
        let (stopping, taken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..THREADS)
            .map(|_| {
                let (listener, stopping, taken) = (Arc::clone(&listener), Arc::clone(&stopping), Arc::clone(&taken));
                thread::spawn(move || {
                    while let Ok((stream, _)) = listener.accept() {
                        if stopping.load(Ordering::Relaxed) {
                            return;
                        }
                        // A client that goes away is its own affair.
                        let _ = serve(stream, service, &taken);
                    }
                })
            })
            .collect();
        Ok(Self { address, listener, stopping, taken, threads })
    }

    /// How many bytes it has taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        // This wakes who waits for clients, whatever filters are in the way by now.
        let _ = shutdown(self.listener.as_raw_fd(), Both::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, service: Service, taken: &AtomicU64) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    match service {
        Service::Echo => {
            stream.set_nodelay(true)?;
            let mut byte = [0];
            while stream.read(&mut byte)? > 0 {
                stream.write_all(&byte)?;
            }
        }
        Service::Sink => {
            let mut buffer = vec![0; CHUNK];
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    bytes => taken.fetch_add(bytes as u64, Ordering::Relaxed),
                };
            }
        }
    }
    Ok(())
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One connection with one byte forth and back, closed by both.
fn exchange(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    stream.shutdown(Shutdown::Write)
}

/// Connections a second, each with one byte forth and back, by so many clients.
///
/// # Errors
/// A connection that failed.
pub fn connections(from: &Namespace, to: SocketAddr, clients: usize, time: Duration) -> Result<f64> {
    let end = Instant::now() + time;
    let client = || -> std::io::Result<u64> {
        let mut made = 0;
        while Instant::now() < end {
            exchange(to)?;
            made += 1;
        }
        Ok(made)
    };
    let started = Instant::now();
    let made: Result<u64> = from.run(|| {
        thread::scope(|scope| {
            let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
            clients.into_iter().map(|one| Ok(one.join().map_err(|_| anyhow!("a client panicked"))??)).sum()
        })
    });
    let made = made.with_context(|| format!("a connection to {to} failed"))?;
    Ok(made as f64 / started.elapsed().as_secs_f64())
}

/// Microseconds from the beginning of a connection until its first byte is back, so many times.
///
/// # Errors
/// A connection that failed.
pub fn latencies(from: &Namespace, to: SocketAddr, count: usize) -> Result<Vec<f64>> {
    let one = |_| {
        let started = Instant::now();
        let mut stream = connect(to)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        let elapsed = started.elapsed();
        stream.shutdown(Shutdown::Write)?;
        Ok(elapsed.as_secs_f64() * 1e6)
    };
    let all: std::io::Result<Vec<f64>> = from.run(|| (0..count).map(one).collect());
    all.with_context(|| format!("a connection to {to} failed"))
}

/// Bytes a second from one namespace to a sink, by so many streams.
///
/// # Errors
/// A stream that broke.
pub fn bulk(from: &Namespace, to: SocketAddr, sink: &Server, streams: usize, time: Duration) -> Result<f64> {
    ensure!(streams <= THREADS, "a sink takes {THREADS} streams at most");
    let started = Instant::now();
    let end = started + time;
    let before = sink.taken();
    let stream = || -> std::io::Result<()> {
        let mut stream = connect(to)?;
        let chunk = vec![0x5a; CHUNK];
        while Instant::now() < end {
            stream.write_all(&chunk)?;
        }
        stream.shutdown(Shutdown::Write)?;
        // The other side's end: everything has arrived.
        stream.read(&mut [0]).map(drop)
    };
    let sent: Result<Vec<()>> = from.run(|| {
        thread::scope(|scope| {
            let streams: Vec<_> = (0..streams).map(|_| scope.spawn(stream)).collect();
            streams.into_iter().map(|one| Ok(one.join().map_err(|_| anyhow!("a stream panicked"))??)).collect()
        })
    });
    sent.with_context(|| format!("a stream to {to} broke"))?;
    Ok((sink.taken() - before) as f64 / started.elapsed().as_secs_f64())
}

/// Datagrams of an established exchange, or of one that is denied.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
    /// Nobody reads it: what doesn't fit is dropped behind everything that is measured.
    _receiver: UdpSocket,
}

impl Datagrams {
    /// From one namespace to a port in another; `is_answered` where an exchange comes first.
    ///
    /// # Errors
    /// The exchange doesn't come about.
    pub fn new(from: &Namespace, to: &Namespace, address: IpAddr, port: u16, is_answered: bool) -> Result<Self> {
        let receiver = to.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))?;
        let socket = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
        socket.connect((address, port))?;
        if is_answered {
            for socket in [&receiver, &socket] {
                socket.set_read_timeout(Some(PATIENCE))?;
            }
            // Twice: a flow of more than one exchange.
            for _ in 0..2 {
                socket.send(b"x")?;
                let (_, sender) = receiver.recv_from(&mut [0]).context("a datagram doesn't arrive")?;
                receiver.send_to(b"y", sender)?;
                socket.recv(&mut [0]).context("an answer doesn't arrive")?;
            }
        }
        Ok(Self { socket, _receiver: receiver })
    }

    /// Nanoseconds of this thread's processor time a datagram. All of its way is in that: the bridge, the filter and
    /// the receiver's queue run in the sender's system call.
    ///
    /// # Errors
    /// Those of sending.
    pub fn send(&self, count: u32) -> Result<f64> {
        let started = processor_time()?;
        for _ in 0..count {
            self.socket.send(b"x")?;
        }
        Ok((processor_time()? - started) / f64::from(count))
    }
}

/// Nanoseconds of processor time that this thread has taken, in the kernel and out of it.
///
/// # Errors
/// The kernel's.
pub fn processor_time() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64)
}
