//! A way to the Docker engine that can be cut, without touching the engine.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{Shutdown as Both, shutdown};

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
        let listener = match UnixListener::bind(path) {
            Ok(listener) => listener,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        let open = Arc::new(Mutex::new(Vec::new()));
        let (again, kept) = (listener.try_clone().expect("one more open file"), Arc::clone(&open));
        let thread = thread::spawn(move || {
            while let Ok((client, _)) = again.accept() {
                // A client that finds no engine sees the connection end.
                let _ = connect(client, &kept);
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

fn connect(client: UnixStream, open: &Mutex<Vec<UnixStream>>) -> io::Result<()> {
    let server = UnixStream::connect(engine())?;
    open.lock().unwrap_or_else(PoisonError::into_inner).extend([client.try_clone()?, server.try_clone()?]);
    let copies = [(client.try_clone()?, server.try_clone()?), (server, client)];
    for (mut from, mut to) in copies {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}
