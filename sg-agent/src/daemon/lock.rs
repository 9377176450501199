//! One agent for one state directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
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
    check_owner(directory).map_err(failed)?;
    let file = OpenOptions::new()
        .custom_flags(nix::libc::O_NOFOLLOW)
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

/// Whoever may write the directory could serve another control socket there, or lead the lock elsewhere.
fn check_owner(directory: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(directory)?;
    let own = nix::unistd::geteuid().as_raw();
    let is_own = meta.is_dir() && (meta.uid() == own || meta.uid() == 0) && meta.mode() & 0o022 == 0;
    let problem = "it must be a directory of this user's or root's that nobody else can write to";
    if is_own { Ok(()) } else { Err(io::Error::new(io::ErrorKind::PermissionDenied, problem)) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

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

    #[test]
    fn a_directory_of_others_is_refused() {
        let directory = std::env::temp_dir().join(format!("sg-others-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        let error = take(&directory).unwrap_err().to_string();
        assert!(error.contains("nobody else can write"), "{error}");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        symlink("/dev/null", directory.join("lock")).unwrap();
        assert!(take(&directory).is_err(), "a lock that leads elsewhere");
        fs::remove_dir_all(&directory).unwrap();
    }
}
