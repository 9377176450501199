//! One agent for one state directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Why this agent can't have the directory.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another one has it.
    #[error("another sg-agent (pid {holder}) holds {path}; stop it, or give this one its own --state-dir and --bpffs", path = path.display())]
    Held {
        /// The directory.
        path: PathBuf,
        /// Its holder's process id.
        holder: String,
    },
    /// It can't be used.
    #[error("cannot use the state directory {path}: {error}; pass --state-dir", path = path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Makes the directory and takes its lock, which is given back when the value is dropped or the process ends.
pub fn take(directory: &Path) -> Result<Flock<File>, LockError> {
    let failed = |error| LockError::Io { path: directory.to_owned(), error };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(directory.join("lock"))
        .map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(failed)?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            Err(LockError::Held { path: directory.to_owned(), holder: holder.trim().to_owned() })
        }
        Err((_, error)) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it() {
        let directory = std::env::temp_dir().join(format!("sg-lock-{}", std::process::id()));
        let first = take(&directory).unwrap();
        let error = take(&directory).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        assert!(take(&directory).is_ok());
        fs::remove_dir_all(&directory).unwrap();
    }
}
