//! A login by SSH, as a user would make it: at a published port of localhost. What comes of it is the caller's to judge.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use super::output;

/// Logs in as root with a key, which may take so long to begin, and asks the machine for its name.
pub fn ssh(key: &Path, port: u16, patience: Duration) -> Output {
    let mut ssh = Command::new("ssh");
    ssh.args(["-F", "/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
    ssh.args(["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"]);
    ssh.arg("-o").arg(format!("ConnectTimeout={}", patience.as_secs()));
    output(ssh.arg("-i").arg(key).args(["-p", &port.to_string(), "root@127.0.0.1", "echo a shell on $(hostname)"]))
}
