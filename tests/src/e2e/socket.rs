//! A way to the Docker engine that can be cut, without touching the engine.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{Shutdown as Both, shutdown};

/// What a socket does with who comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Lets everything through.
    Open,
    /// Lets everything through but the question for events, which is never answered.
    NoEvents,
    /// Takes every question, and never answers.
    Hangs,
}

/// A socket in front of the engine's. Once dropped, whoever comes by it finds nobody.
#[derive(Debug)]
pub struct DockerSocket {
    path: PathBuf,
    listener: UnixListener,
    open: Arc<Mutex<Vec<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl DockerSocket {
    /// Listens at `path`.
    ///
    /// # Panics
    /// When that can't be done.
    pub fn listen(path: &Path) -> Self {
        Self::before(&engine(), path, Manner::Open)
    }

    /// Listens at `path`, and lets everything through but the question for events, which is never answered.
    ///
    /// # Panics
    /// When that can't be done.
    pub fn without_events(path: &Path) -> Self {
        Self::before(&engine(), path, Manner::NoEvents)
    }

    /// Listens at `path` before the engine whose socket is `engine`.
    ///
    /// # Panics
    /// When that can't be done.
    pub fn before(engine: &Path, path: &Path, manner: Manner) -> Self {
        let listener = match UnixListener::bind(path) {
            Ok(listener) => listener,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        let open = Arc::new(Mutex::new(Vec::new()));
        let (again, kept) = (listener.try_clone().expect("one more open file"), Arc::clone(&open));
        let engine = engine.to_owned();
        let thread = thread::spawn(move || {
            while let Ok((client, _)) = again.accept() {
                // A client that finds no engine sees the connection end.
                let _ = connect(client, &engine, &kept, manner);
            }
        });
        Self { path: path.to_owned(), listener, open, thread: Some(thread) }
    }

    /// Its address, for `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.path.display())
    }
}

impl Drop for DockerSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        // This wakes the thread that accepts.
        let _ = shutdown(self.listener.as_raw_fd(), Both::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// The engine's own socket.
///
/// # Panics
/// When `DOCKER_HOST` isn't a socket of this machine.
pub fn engine() -> PathBuf {
    let host = std::env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty());
    let host = host.unwrap_or_else(|| "unix:///var/run/docker.sock".to_owned());
    host.strip_prefix("unix://").unwrap_or_else(|| panic!("DOCKER_HOST={host} is not a local socket")).into()
}

/// A request's head comes in one piece from a client that writes it in one.
fn copy_all_but_events(from: &mut UnixStream, to: &mut UnixStream) -> io::Result<u64> {
    let mut buffer = [0; 16 * 1024];
    let mut copied = 0;
    loop {
        let length = from.read(&mut buffer)?;
        let line = buffer[..length].split(|byte| *byte == b'\r').next().unwrap_or_default();
        if length == 0 {
            return Ok(copied);
        }
        if !String::from_utf8_lossy(line).contains("/events") {
            to.write_all(&buffer[..length])?;
            copied += length as u64;
        }
    }
}

fn connect(client: UnixStream, engine: &Path, open: &Mutex<Vec<UnixStream>>, manner: Manner) -> io::Result<()> {
    if manner == Manner::Hangs {
        open.lock().unwrap_or_else(PoisonError::into_inner).push(client);
        return Ok(());
    }
    let server = UnixStream::connect(engine)?;
    open.lock().unwrap_or_else(PoisonError::into_inner).extend([client.try_clone()?, server.try_clone()?]);
    let (mut asked, mut asks) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = match manner {
            Manner::NoEvents => copy_all_but_events(&mut asked, &mut asks),
            _ => io::copy(&mut asked, &mut asks),
        };
        let _ = asks.shutdown(Shutdown::Write);
    });
    let (mut answers, mut answered) = (server, client);
    thread::spawn(move || {
        let _ = io::copy(&mut answers, &mut answered);
        let _ = answered.shutdown(Shutdown::Write);
    });
    Ok(())
}
