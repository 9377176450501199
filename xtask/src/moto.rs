//! A Moto server of one's own, from start to stop. What is asked of it is the caller's.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::deps::python::Venv;
use crate::ui::{self, Progress};
use crate::{cmd, workspace};

/// Moto's own default port, which its users know.
pub const PORT: u16 = 5000;
/// How long Moto may take until it answers; importing it takes seconds on a slow disk.
const START: Duration = Duration::from_secs(90);

/// What makes the AWS CLI and the agent talk to Moto: any key will do, but there must be one.
pub const CREDENTIALS: [(&str, &str); 4] = [
    ("AWS_ACCESS_KEY_ID", "test"),
    ("AWS_SECRET_ACCESS_KEY", "test"),
    ("AWS_REGION", "us-east-1"),
    // The first version of the AWS CLI, which PyPI has, reads only this one.
    ("AWS_DEFAULT_REGION", "us-east-1"),
];

/// A Moto that answers; stopped when dropped.
pub struct Moto {
    child: Child,
    port: u16,
}

impl Moto {
    /// Starts Moto on this port, or on a free one if something else has it.
    pub fn start(venv: &Venv, port: u16) -> Result<Self> {
        let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|socket| socket.local_addr());
        let port = match free(port) {
            Ok(address) => address.port(),
            Err(error) => {
                let other = free(0).context("no free port for Moto")?.port();
                ui::note(&format!("port {port} isn't free ({error}): Moto gets {other}"));
                other
            }
        };
        let log = workspace::run_dir()?.join("moto.log");
        ui::step(&format!("starting Moto on port {port}; its log is target/run/moto.log"));
        let (out, err) = cmd::log_file(&log)?;
        // setpriv: Moto must not outlive an xtask that was killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM"])
            .arg(venv.bin().join("moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .context("cannot start moto_server through setpriv")?;
        let mut moto = Self { child, port };
        let mut progress = Progress::start("waiting for Moto");
        let end = Instant::now() + START;
        while Instant::now() < end {
            if moto.answers() {
                return Ok(moto);
            }
            if let Some(status) = moto.child.try_wait()? {
                bail!("moto_server ended at once: {status}\n{}", cmd::tail_of(&log));
            }
            progress.tick();
            cmd::sleep(Duration::from_millis(100))?;
        }
        bail!("Moto doesn't answer after {} s\n{}", START.as_secs(), cmd::tail_of(&log))
    }

    /// Moto's address, for `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    fn answers(&self) -> bool {
        let timeout = Duration::from_secs(2);
        let ask = || -> std::io::Result<bool> {
            let mut socket = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)), timeout)?;
            socket.set_read_timeout(Some(timeout))?;
            socket.write_all(b"HEAD /moto-api/ HTTP/1.0\r\n\r\n")?;
            let mut status = [0; 12];
            socket.read_exact(&mut status)?;
            Ok(status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // One that has ended is waited for: its number may be another process's.
        if self.ended().is_none() {
            cmd::stop(&mut self.child, Duration::from_secs(5));
        }
    }
}
