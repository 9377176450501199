//! The control socket: one JSON line asks, one answers. Only the agent's own user and root are heard.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::codec::{Framed, LinesCodec};
use tokio_util::sync::CancellationToken;

use super::Event;
use crate::explain::{Explanation, Query};
use crate::status::Status;

/// What can be asked.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What is enforced, and how things stand.
    Status,
    /// Read everything anew, and answer when it is enforced.
    Sync {
        /// How long to wait, in seconds.
        seconds: f64,
    },
    /// Would this packet pass?
    Explain(Query),
}

/// The answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Sync`].
    Synced,
    /// To [`Request::Explain`].
    Explanation(Explanation),
    /// What went wrong.
    Error(String),
}

/// Nobody listens at the control socket.
#[derive(Debug, thiserror::Error)]
#[error("no agent is running at {socket}; start one with 'sg-agent run', or pass its --state-dir", socket = socket.display())]
pub struct NotRunning {
    socket: PathBuf,
}

/// A line is a request; a longer one is nonsense.
const LONGEST_REQUEST: usize = 64 * 1024;
/// A status of a thousand instances has about half a MiB.
const LONGEST_REPLY: usize = 64 * 1024 * 1024;

/// Listens at `path` until shut down. A socket that a dead agent left is replaced: the lock says that it is dead.
pub(super) fn serve(path: PathBuf, events: mpsc::Sender<Event>, shutdown: CancellationToken) -> Result<()> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("cannot replace the control socket {}: {error}", path.display())
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(&path).with_context(|| format!("cannot listen at the control socket {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tokio::spawn(converse(stream, events.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the control socket does not accept");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                },
            }
        }
        let _ = std::fs::remove_file(&path);
    });
    Ok(())
}

async fn converse(stream: UnixStream, events: mpsc::Sender<Event>) {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw() => {}
        peer => {
            tracing::warn!(?peer, "refused at the control socket: neither root nor the agent's user");
            return;
        }
    }
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_REQUEST));
    while let Some(Ok(line)) = lines.next().await {
        let reply = match serde_json::from_str(&line) {
            Ok(request) => {
                let (tell, told) = oneshot::channel();
                if events.send(Event::Asked(request, tell)).await.is_err() {
                    return;
                }
                told.await.unwrap_or_else(|_| Reply::Error("the agent is shutting down".into()))
            }
            Err(error) => Reply::Error(format!("not a request: {error}; agent and client are of different versions")),
        };
        let Ok(text) = serde_json::to_string(&reply) else { return };
        if lines.send(text).await.is_err() {
            return;
        }
    }
}

/// Asks the agent at `socket`.
///
/// # Errors
/// [`NotRunning`], or the agent says that something is wrong.
pub async fn ask(socket: &Path, request: &Request) -> Result<Reply> {
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => NotRunning { socket: socket.to_owned() }.into(),
        io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("may not talk to the agent at {}; run this as root (sudo)", socket.display())
        }
        _ => anyhow::anyhow!("cannot talk to the agent at {}: {error}", socket.display()),
    })?;
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(LONGEST_REPLY));
    lines.send(serde_json::to_string(request)?).await?;
    let Some(line) = lines.next().await else { bail!("the agent at {} hung up", socket.display()) };
    match serde_json::from_str(&line?)? {
        Reply::Error(error) => bail!(error),
        reply => Ok(reply),
    }
}
