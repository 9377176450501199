//! Listening sockets: bound, accepted from within the port's limit, backed off from when the system runs short. Judges
//! no client.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::connection::{Port, behave};

/// Connections whose handshake is over and that nobody has accepted yet. The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4_096;

/// After an accept that failed for want of something, wait this long, and twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Binds a socket and listens on it.
pub fn bind(address: SocketAddr, is_dual_stack: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // Connections of an earlier agent that linger in TIME_WAIT don't keep the port.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!is_dual_stack)?;
    }
    behave(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Whether the error says that this host has no `::1`: it runs without IPv6.
pub fn is_no_such_loopback(socket: SocketAddr, error: &io::Error) -> bool {
    let is_absent = matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT));
    is_absent && socket.is_ipv6() && socket.ip().is_loopback()
}

/// What to do about a socket that can't be listened on.
pub fn next_step(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "stop what listens there (ss -ltnp names it) or choose another host port; trying again at the next change"
        }
        io::ErrorKind::AddrNotAvailable => "name an address that this host has; trying again at the next change",
        io::ErrorKind::PermissionDenied => "choose a host port from 1024 up, or run with CAP_NET_BIND_SERVICE",
        _ => "trying again at the next change",
    }
}

/// Accepts connections until `close`, each one served by a task of its own.
pub async fn run(listener: TcpListener, port: Arc<Port>, close: CancellationToken) {
    let accept_all = async {
        loop {
            let (stream, client) = accept(&listener, &port).await;
            // In this order, since a socket that waits for clients mustn't keep room from the port's other ones.
            let permit = port.permit().await;
            let serving = Arc::clone(&port);
            port.service.connections.spawn(async move {
                serving.serve(stream, client).await;
                drop(permit);
            });
        }
    };
    close.run_until_cancelled(accept_all).await;
}

/// The next connection, however long it takes.
async fn accept(listener: &TcpListener, port: &Port) -> (TcpStream, SocketAddr) {
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => error,
        };
        if is_about_the_connection(&error) {
            continue;
        }
        if pause == FIRST_PAUSE {
            tracing::warn!(port = %port.published, %error, "cannot accept connections, clients wait; {}", relief(&error));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Errors that are one connection's own: it ended before it was accepted (accept(2), "Error handling").
fn is_about_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, HostUnreachable, Interrupted, NetworkDown};
    use io::ErrorKind::{NetworkUnreachable, TimedOut};
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | TimedOut
    ) || error.raw_os_error() == Some(libc::EPROTO)
}

fn relief(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "raise the agent's limit of open files (ulimit -n, LimitNOFILE=)",
        Some(libc::ENFILE) => "raise fs.file-max",
        _ => "trying again",
    }
}
