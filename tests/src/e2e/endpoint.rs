//! An HTTP endpoint in front of another one, or of nothing: it can be told to answer something else, or not at all. What
//! it was asked before it is told is answered before that counts: nobody hears of what happens after by an old question.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown as Both, shutdown};

use super::{Namespace, PATIENCE};

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
    /// Questions that will be answered.
    under_way: AtomicUsize,
}

/// What it does with a request.
#[derive(Clone, Debug)]
enum Mood {
    /// Passes it on.
    Forward(SocketAddr),
    /// Answers with this head and body, whatever is asked.
    Answer(String, String),
    /// Takes the request, and says nothing.
    Hang,
    /// Passes it on after a while.
    Delay(SocketAddr, Duration),
    /// Passes on requests with these words in them; takes all others, and says nothing or hangs up.
    Only { words: String, upstream: SocketAddr, hangs: bool },
    /// Passes it on, and hangs up in the middle of the answer.
    Cut(SocketAddr),
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
        Self::start_at(namespace, 0)
    }

    /// Listens at this port, which an earlier one may have had.
    ///
    /// # Panics
    /// When somebody has it.
    pub fn start_at(namespace: Option<&Namespace>, port: u16) -> Self {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port");
        let listener = namespace.map_or_else(bind, |namespace| namespace.run(bind));
        let address = listener.local_addr().expect("a listener has an address");
        let told = Arc::new(Told {
            mood: Mutex::new(Mood::HangUp),
            asked: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
        });
        let (again, listens) = (listener.try_clone().expect("one more open file"), Arc::clone(&told));
        let thread = Some(thread::spawn(move || listen(&again, &listens)));
        Self { address, listener, told, thread }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, passes everything on. The connections are made from the test's own namespace.
    pub fn forward(&self, upstream: SocketAddr) {
        self.told.set(Mood::Forward(upstream));
    }

    /// From now on, answers this; `{action}` in it is the call's.
    pub fn answer(&self, status: &str, content_type: &str, body: &str) {
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nConnection: close");
        self.told.set(Mood::Answer(head, body.to_owned()));
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

    /// From now on, passes everything on, and hangs up in the middle of each answer.
    pub fn cut(&self, upstream: SocketAddr) {
        self.told.set(Mood::Cut(upstream));
    }

    /// From now on, hangs up without an answer.
    pub fn hang_up(&self) {
        self.told.set(Mood::HangUp);
    }

    /// How many requests came.
    pub fn asked(&self) -> usize {
        self.told.asked.load(SeqCst)
    }
}

impl Told {
    /// Nobody is let in until what is under way is over.
    fn set(&self, mood: Mood) {
        let mut current = self.current();
        let end = Instant::now() + PATIENCE;
        while self.under_way.load(SeqCst) > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        *current = mood;
    }

    /// Somebody asks something: what is done with it, and that it is under way.
    fn ask(self: &Arc<Self>) -> (Mood, UnderWay) {
        let mood = self.current();
        self.asked.fetch_add(1, SeqCst);
        self.under_way.fetch_add(1, SeqCst);
        (mood.clone(), UnderWay(Arc::clone(self)))
    }

    fn current(&self) -> MutexGuard<'_, Mood> {
        self.mood.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that will be answered, until it has been.
struct UnderWay(Arc<Told>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, SeqCst);
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

fn listen(listener: &TcpListener, told: &Arc<Told>) {
    while let Ok((stream, _)) = listener.accept() {
        let told = Arc::clone(told);
        // A client that fails is the test's affair.
        thread::spawn(move || serve(stream, &told));
    }
}

fn serve(stream: TcpStream, told: &Arc<Told>) -> std::io::Result<()> {
    // A connection that is kept for later asks nothing yet.
    if stream.peek(&mut [0])? == 0 {
        return Ok(());
    }
    let (mood, under_way) = told.ask();
    match mood {
        Mood::End => Ok(()),
        Mood::Forward(upstream) => forward(stream, upstream),
        Mood::Delay(upstream, by) => {
            thread::sleep(by);
            forward(stream, upstream)
        }
        Mood::Cut(upstream) => cut(stream, upstream),
        Mood::HangUp => reply(stream, |_| String::new()),
        Mood::Answer(head, body) => reply(stream, |request| {
            let body = body.replace("{action}", action(request));
            format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }),
        Mood::Only { words, upstream, hangs } => match only(stream, &words, upstream)? {
            Some(client) if hangs => hang(&client, under_way),
            _ => Ok(()),
        },
        Mood::Hang => hang(&stream, under_way),
    }
}

/// Until the client gives up. Nobody waits for that.
fn hang(mut stream: &TcpStream, under_way: UnderWay) -> std::io::Result<()> {
    drop(under_way);
    stream.set_read_timeout(None)?;
    std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
}

/// The call that a request is, as EC2's Query API names it.
fn action(request: &str) -> &str {
    let action = request.split(['&', '\n']).find_map(|field| field.strip_prefix("Action="));
    action.unwrap_or_default()
}

/// Reads the request to its end before it answers: otherwise the answer may be lost in a reset.
fn reply(mut stream: TcpStream, answer: impl FnOnce(&str) -> String) -> std::io::Result<()> {
    let request = read(&mut stream)?;
    stream.write_all(answer(&String::from_utf8_lossy(&request)).as_bytes())
}

fn read(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !is_whole(&request) {
        match stream.read(&mut buffer)? {
            0 => break,
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(request)
}

/// Passes one request on, if it has these words; gives the client back if it hasn't.
fn only(mut client: TcpStream, words: &str, upstream: SocketAddr) -> std::io::Result<Option<TcpStream>> {
    let request = read(&mut client)?;
    if !String::from_utf8_lossy(&request).contains(words) {
        return Ok(Some(client));
    }
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(&request)?;
    std::io::copy(&mut server, &mut client)?;
    Ok(None)
}

fn cut(mut client: TcpStream, upstream: SocketAddr) -> std::io::Result<()> {
    let request = read(&mut client)?;
    let (mut server, mut answer) = (TcpStream::connect(upstream)?, Vec::new());
    server.write_all(&request)?;
    server.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 4096];
    while !is_whole(&answer) {
        match server.read(&mut buffer)? {
            0 => break,
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    client.write_all(&answer[..answer.len() / 2])
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
