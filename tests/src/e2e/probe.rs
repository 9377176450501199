//! Attempts to reach somebody, and what came of them. Each is made by real sockets in the namespace of who tries.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::Namespace;

/// How long anything that must happen may take, on a busy machine. Only a failure waits for it.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long an answer may take before something is said again.
const AGAIN: Duration = Duration::from_millis(150);
/// How long it must be silent where nothing may pass. What passes takes less than a millisecond here, and each silence
/// is held against something that does pass.
pub const SILENCE: Duration = Duration::from_millis(500);

/// Somebody who tries to reach somebody.
#[derive(Clone, Debug)]
pub struct Attempt<'a> {
    from: &'a Namespace,
    to: SocketAddr,
    by: By,
    source: Option<IpAddr>,
    /// Whether `source` isn't one of theirs.
    spoofed: bool,
    size: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Tcp,
    Udp,
    Ping,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// It worked, there and back.
    Answered,
    /// Nothing came back.
    Silent,
    /// A reset or an ICMP error came back.
    Refused,
    /// Something else.
    Broken(String),
}

impl<'a> Attempt<'a> {
    /// To connect by TCP and get an echo.
    pub fn tcp(from: &'a Namespace, to: IpAddr, port: u16) -> Self {
        Self { from, to: (to, port).into(), by: By::Tcp, source: None, spoofed: false, size: 8 }
    }

    /// To get a datagram echoed.
    pub fn udp(from: &'a Namespace, to: IpAddr, port: u16) -> Self {
        Self { by: By::Udp, ..Self::tcp(from, to, port) }
    }

    /// To get an ICMP or ICMPv6 echo.
    pub fn ping(from: &'a Namespace, to: IpAddr) -> Self {
        Self { by: By::Ping, ..Self::tcp(from, to, 0) }
    }

    /// From this address of theirs.
    #[must_use]
    pub fn from_address(self, source: IpAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// From an address that isn't theirs.
    #[must_use]
    pub fn spoofed(self, source: IpAddr) -> Self {
        Self { source: Some(source), spoofed: true, ..self }
    }

    /// With so many bytes.
    #[must_use]
    pub fn of_size(self, size: usize) -> Self {
        Self { size, ..self }
    }

    /// It must work.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn passes(&self) {
        let outcome = self.outcome(PATIENCE);
        assert_eq!(outcome, Outcome::Answered, "{self}");
    }

    /// It must disappear without any answer (SG-7.1).
    ///
    /// # Panics
    /// When there is one.
    #[track_caller]
    pub fn vanishes(&self) {
        let outcome = self.outcome(SILENCE);
        assert_eq!(outcome, Outcome::Silent, "{self}");
    }

    /// Whether it disappears without any answer.
    pub fn try_vanish(&self) -> bool {
        self.outcome(SILENCE) == Outcome::Silent
    }

    /// It must be refused at once.
    ///
    /// # Panics
    /// When it isn't.
    #[track_caller]
    pub fn is_refused(&self) {
        let outcome = self.outcome(PATIENCE);
        assert_eq!(outcome, Outcome::Refused, "{self}");
    }

    /// It must pass or vanish.
    ///
    /// # Panics
    /// When it does the other, or is refused.
    #[track_caller]
    pub fn passes_if(&self, allowed: bool) {
        if allowed { self.passes() } else { self.vanishes() }
    }

    fn outcome(&self, patience: Duration) -> Outcome {
        let result = self.from.run(|| match self.by {
            By::Tcp => self.connect(patience),
            By::Udp | By::Ping => self.send(patience),
        });
        match result {
            Ok(()) => Outcome::Answered,
            Err(error) => match error.kind() {
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Silent,
                ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Outcome::Refused,
                _ => Outcome::Broken(error.to_string()),
            },
        }
    }

    fn connect(&self, patience: Duration) -> std::io::Result<()> {
        let socket = Socket::new(Domain::for_address(self.to), Type::STREAM, Some(Protocol::TCP))?;
        self.bind(&socket)?;
        socket.connect_timeout(&self.to.into(), patience)?;
        let mut stream = Stream::new(socket.into());
        // A connection that is open and says nothing is neither an answer nor silence.
        stream.exchange(patience).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => std::io::Error::other("connected, then nothing came"),
            ErrorKind::UnexpectedEof => ErrorKind::ConnectionReset.into(),
            _ => error,
        })
    }

    fn bind(&self, socket: &Socket) -> std::io::Result<()> {
        let Some(source) = self.source else { return Ok(()) };
        if self.spoofed && source.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else if self.spoofed {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&SocketAddr::new(source, 0).into())
    }

    /// Sends again and again, as whoever uses UDP has to. Where more than one was sent, the answers to the others are
    /// waited for as well: nothing is under way when somebody counts.
    fn send(&self, patience: Duration) -> std::io::Result<()> {
        let end = Instant::now() + patience;
        let mut number = 0_u16;
        let protocol = match (self.by, self.to.is_ipv4()) {
            (By::Ping, true) => Protocol::ICMPV4,
            (By::Ping, false) => Protocol::ICMPV6,
            _ => Protocol::UDP,
        };
        let socket = Socket::new(Domain::for_address(self.to), Type::DGRAM, Some(protocol))?;
        self.bind(&socket)?;
        let socket = UdpSocket::from(socket);
        socket.connect(self.to)?;
        socket.set_read_timeout(Some(AGAIN))?;
        let mut buffer = vec![0; 1 << 16];
        while Instant::now() < end {
            number += 1;
            socket.send(&self.message(number))?;
            match socket.recv(&mut buffer) {
                Ok(length) if self.is_answer(&buffer[..length]) => {
                    while number > 1 && socket.recv(&mut buffer).is_ok() {
                        number -= 1;
                    }
                    return Ok(());
                }
                Ok(length) => return Err(std::io::Error::other(format!("{length} bytes came that are no answer"))),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ErrorKind::TimedOut.into())
    }

    fn message(&self, number: u16) -> Vec<u8> {
        let [high, low] = number.to_be_bytes();
        let mut message = match (self.by, self.to.is_ipv4()) {
            // Type and code; checksum and identifier are the kernel's; the sequence number.
            (By::Ping, true) => vec![8, 0, 0, 0, 0, 0, high, low],
            (By::Ping, false) => vec![128, 0, 0, 0, 0, 0, high, low],
            _ => vec![],
        };
        message.resize(message.len().max(self.size), b'.');
        message
    }

    fn is_answer(&self, came: &[u8]) -> bool {
        match self.by {
            By::Ping => came.first() == Some(if self.to.is_ipv4() { &0 } else { &129 }),
            _ => came == self.message(0),
        }
    }
}

impl std::fmt::Display for Attempt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} from {} to {}", self.by, self.from.name(), self.to)?;
        self.source.map_or(Ok(()), |source| write!(f, ", source {source}"))
    }
}

/// A connection to an echo server that goes on for a while.
#[derive(Debug)]
pub struct Stream {
    inner: TcpStream,
    sent: u64,
}

impl Stream {
    /// Connects.
    ///
    /// # Panics
    /// When nobody answers.
    #[track_caller]
    pub fn open(from: &Namespace, to: IpAddr, port: u16) -> Self {
        let to = SocketAddr::new(to, port);
        let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        match stream {
            Ok(stream) => Self::new(stream),
            Err(error) => panic!("from {} to {to}: {error}", from.name()),
        }
    }

    /// One that is open already.
    pub fn new(inner: TcpStream) -> Self {
        Self { inner, sent: 0 }
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        &self.inner
    }

    /// What is said must come back.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn goes_on(&mut self) {
        let result = self.exchange(PATIENCE);
        assert!(result.is_ok(), "the connection should go on: {result:?}");
    }

    /// What is said must come back, if need be after more was said.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn goes_on_when_spoken_to(&mut self) {
        let (end, mut patience) = (Instant::now() + PATIENCE, AGAIN);
        loop {
            match self.exchange(patience) {
                Ok(()) => return,
                Err(error) if is_silence(&error) && Instant::now() < end => patience *= 2,
                Err(error) => panic!("the connection should go on: {error:?}"),
            }
        }
    }

    /// Nothing may come back.
    ///
    /// # Panics
    /// When something does, be it the end of the connection.
    #[track_caller]
    pub fn is_silent(&mut self) {
        let result = self.exchange(SILENCE);
        assert!(result.as_ref().is_err_and(is_silence), "it should be silent: {result:?}");
    }

    /// It must have been ended by the other side, or end now.
    ///
    /// # Panics
    /// When it goes on, or is only silent.
    #[track_caller]
    pub fn is_over(&mut self) {
        let result = self.exchange(PATIENCE);
        let kind = result.as_ref().err().map(std::io::Error::kind);
        let ends = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::UnexpectedEof];
        assert!(kind.is_some_and(|kind| ends.contains(&kind)), "it should be over: {result:?}");
    }

    /// Says something new, and reads until it has come back.
    fn exchange(&mut self, patience: Duration) -> std::io::Result<()> {
        let end = Instant::now() + patience;
        self.sent += 1;
        self.inner.write_all(&self.sent.to_be_bytes())?;
        let mut message = [0; 8];
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.inner.set_read_timeout(Some(left))?;
            self.inner.read_exact(&mut message)?;
            // Answers to what was said before may come first.
            if message == self.sent.to_be_bytes() {
                return Ok(());
            }
        }
    }
}

fn is_silence(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
