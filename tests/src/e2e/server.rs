//! A server that echoes what it gets by TCP and UDP, on one port of both families, and counts. For who calls `probe`.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown as Both, shutdown};

use super::Namespace;

/// How often the UDP side looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// A server in a namespace; it ends when this is dropped, and its connections with it.
#[derive(Debug)]
pub struct Server {
    seen: Arc<Seen>,
    listener: TcpListener,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    end: AtomicBool,
    bytes: AtomicU64,
    datagrams: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
}

impl Server {
    /// Starts one.
    ///
    /// # Panics
    /// When the port can't be had.
    pub fn start(namespace: &Namespace, port: u16) -> Self {
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let (listener, socket) = namespace.run(|| {
            let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("tcp {port}: {error}"));
            let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("udp {port}: {error}"));
            (listener, socket)
        });
        socket.set_read_timeout(Some(LOOK)).expect("a timeout that isn't zero");
        let seen = Arc::new(Seen::default());
        let again = listener.try_clone().expect("one more open file");
        let (tcp, udp) = (Arc::clone(&seen), Arc::clone(&seen));
        let threads = vec![thread::spawn(move || accept(&again, &tcp)), thread::spawn(move || answer(&socket, &udp))];
        Self { seen, listener, threads }
    }

    /// How many connections were made to it.
    pub fn accepted(&self) -> usize {
        self.seen.connections().len()
    }

    /// The server's side of the last connection, to write to.
    ///
    /// # Panics
    /// When none was made.
    pub fn last(&self) -> TcpStream {
        let connections = self.seen.connections();
        connections.last().expect("a connection was made").try_clone().expect("one more open file")
    }

    /// How many bytes came by TCP.
    pub fn bytes(&self) -> u64 {
        self.seen.bytes.load(SeqCst)
    }

    /// How many datagrams came.
    pub fn datagrams(&self) -> u64 {
        self.seen.datagrams.load(SeqCst)
    }

    /// The same for who isn't to know the server.
    pub fn counted(&self) -> impl Fn() -> u64 + Send + use<> {
        let seen = Arc::clone(&self.seen);
        move || seen.datagrams.load(SeqCst)
    }
}

impl Seen {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.seen.end.store(true, SeqCst);
        // This wakes the thread that accepts.
        let _ = shutdown(self.listener.as_raw_fd(), Both::Both);
        for connection in self.seen.connections().iter() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, seen: &Arc<Seen>) {
    while let Ok((stream, _)) = listener.accept() {
        if seen.end.load(SeqCst) {
            return;
        }
        let Ok(kept) = stream.try_clone() else { return };
        seen.connections().push(kept);
        let seen = Arc::clone(seen);
        // Ends when the connection is shut down, by the client or by `drop`.
        thread::spawn(move || echo(stream, &seen));
    }
}

fn echo(mut stream: TcpStream, seen: &Seen) {
    let mut buffer = [0; 4096];
    while let Ok(length) = stream.read(&mut buffer) {
        seen.bytes.fetch_add(length as u64, SeqCst);
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn answer(socket: &UdpSocket, seen: &Seen) {
    let mut buffer = vec![0; 1 << 16];
    while !seen.end.load(SeqCst) {
        // An error is the timeout, or an ICMP error about an earlier answer.
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            seen.datagrams.fetch_add(1, SeqCst);
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}
