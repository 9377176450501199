//! An HTTP endpoint in front of another one, or of nothing: it can be told to answer something else, or not at all.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown as Both, shutdown};

use super::Namespace;

/// A server on 127.0.0.1 of a namespace; it ends when this is dropped.
#[derive(Debug)]
pub struct Endpoint {
    address: SocketAddr,
    listener: TcpListener,
    told: Arc<Told>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Told {
    mood: Mutex<Mood>,
    asked: AtomicUsize,
}

/// What it does with a request.
#[derive(Clone, Debug)]
enum Mood {
    /// Passes it on.
    Forward(SocketAddr),
    /// Answers this, whatever is asked.
    Answer(String),
    /// Takes the request, and says nothing.
    Hang,
    /// Passes it on after a while.
    Delay(SocketAddr, Duration),
    /// Passes on requests with these words in them; takes all others, and says nothing or hangs up.
    Only { words: String, upstream: SocketAddr, hangs: bool },
    /// Hangs up.
    HangUp,
    /// Ends.
    End,
}

impl Endpoint {
    /// Listens in `namespace`, or in the test's own.
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(namespace: Option<&Namespace>) -> Self {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let listener = namespace.map_or_else(bind, |namespace| namespace.run(bind));
        let address = listener.local_addr().expect("a listener has an address");
        let told = Arc::new(Told { mood: Mutex::new(Mood::HangUp), asked: AtomicUsize::new(0) });
        let (again, listens) = (listener.try_clone().expect("one more open file"), Arc::clone(&told));
        let thread = Some(thread::spawn(move || listen(&again, &listens)));
        Self { address, listener, told, thread }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, passes everything on. The connections are made from the test's own namespace.
    pub fn forward(&self, upstream: SocketAddr) {
        self.told.set(Mood::Forward(upstream));
    }

    /// From now on, answers this.
    pub fn answer(&self, status: &str, content_type: &str, body: &str) {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}");
        self.told.set(Mood::Answer(format!("{head}\r\nConnection: close\r\n\r\n{body}")));
    }

    /// From now on, takes requests and never answers.
    pub fn hang(&self) {
        self.told.set(Mood::Hang);
    }

    /// From now on, answers only requests with these words in them.
    pub fn hang_all_but(&self, words: &str, upstream: SocketAddr) {
        self.told.set(Mood::Only { words: words.to_owned(), upstream, hangs: true });
    }

    /// From now on, hangs up on all requests but those with these words in them.
    pub fn hang_up_on_all_but(&self, words: &str, upstream: SocketAddr) {
        self.told.set(Mood::Only { words: words.to_owned(), upstream, hangs: false });
    }

    /// From now on, passes everything on after a while.
    pub fn delay(&self, upstream: SocketAddr, by: Duration) {
        self.told.set(Mood::Delay(upstream, by));
    }

    /// From now on, hangs up without an answer.
    pub fn hang_up(&self) {
        self.told.set(Mood::HangUp);
    }

    /// How many connections came.
    pub fn asked(&self) -> usize {
        self.told.asked.load(SeqCst)
    }
}

impl Told {
    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }

    fn mood(&self) -> Mood {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.told.set(Mood::End);
        // This wakes the thread.
        let _ = shutdown(self.listener.as_raw_fd(), Both::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(listener: &TcpListener, told: &Told) {
    while let Ok((stream, _)) = listener.accept() {
        told.asked.fetch_add(1, SeqCst);
        match told.mood() {
            Mood::End => return,
            // Until the client gives up.
            Mood::Hang => drop(thread::spawn(move || std::io::copy(&mut &stream, &mut std::io::sink()))),
            Mood::Delay(upstream, by) => drop(thread::spawn(move || {
                thread::sleep(by);
                forward(stream, upstream)
            })),
            Mood::Only { words, upstream, hangs } => drop(thread::spawn(move || only(stream, &words, upstream, hangs))),
            Mood::HangUp => drop(thread::spawn(move || reply(stream, ""))),
            // A client that fails is the test's affair.
            Mood::Answer(answer) => drop(thread::spawn(move || reply(stream, &answer))),
            Mood::Forward(upstream) => drop(thread::spawn(move || forward(stream, upstream))),
        }
    }
}

/// Reads the request to its end before it answers: otherwise the answer may be lost in a reset.
fn reply(mut stream: TcpStream, answer: &str) -> std::io::Result<()> {
    read(&mut stream)?;
    stream.write_all(answer.as_bytes())
}

fn read(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !is_whole(&request) {
        match stream.read(&mut buffer)? {
            0 => break,
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(request)
}

/// Passes one request on, if it has these words.
fn only(mut client: TcpStream, words: &str, upstream: SocketAddr, hangs: bool) -> std::io::Result<()> {
    let request = read(&mut client)?;
    if String::from_utf8_lossy(&request).contains(words) {
        let mut server = TcpStream::connect(upstream)?;
        server.write_all(&request)?;
        std::io::copy(&mut server, &mut client)?;
    } else if hangs {
        client.set_read_timeout(None)?;
        std::io::copy(&mut client, &mut std::io::sink())?;
    }
    Ok(())
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    body.len() >= length.unwrap_or(0)
}

fn forward(client: TcpStream, upstream: SocketAddr) -> std::io::Result<()> {
    let server = TcpStream::connect(upstream)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let there = thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut from_server, mut to_client) = (server, client);
    let _ = std::io::copy(&mut from_server, &mut to_client);
    // Both, so that the other thread ends too.
    let _ = to_client.shutdown(Shutdown::Both);
    let _ = there.join();
    Ok(())
}
