//! Running other programs: with progress, with the output captured, as root. Knows nothing of what they are for.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal as _, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::ui::{self, Progress};

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(50);
/// How many lines of a failed command's output are shown.
const TAIL_LINES: usize = 30;

/// How often sudo's ticket is renewed; distributions let it last for 5 or 15 minutes.
const TICKET_RENEWAL: Duration = Duration::from_secs(120);

/// The signal that asked xtask to end, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// From now on signals don't end xtask at once: it sees them with [`interrupted`] and cleans up.
pub fn install_signal_handlers() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            SIGNAL.store(signal, Ordering::SeqCst);
        }
    });
    Ok(())
}

/// Has someone asked xtask to end, and how?
pub fn interrupted() -> Option<Signal> {
    match SIGNAL.load(Ordering::SeqCst) {
        0 => None,
        number => Signal::try_from(number).ok(),
    }
}

/// Fails when someone has asked xtask to end.
pub fn check_interrupted() -> Result<()> {
    match interrupted() {
        Some(signal) => bail!("interrupted by {signal}"),
        None => Ok(()),
    }
}

/// Waits, but not past a signal.
pub fn sleep(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        check_interrupted()?;
        thread::sleep(POLL.min(end.saturating_duration_since(Instant::now())));
    }
    check_interrupted()
}

/// The program's full path: `PATH` first, then the directories that users' `PATH`s often leave out.
pub fn find(program: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|dir| dir.join(program)).find(|candidate| is_executable(candidate))
}

fn search_path() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(sbin).collect()
}

/// Can this file be run?
pub fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Runs with the user's terminal; an exit code other than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    check_interrupted()?;
    let status = command.status().with_context(|| format!("cannot run {}", show(command)))?;
    check_interrupted()?;
    ensure!(status.success(), "{} failed: {status}", show(command));
    Ok(())
}

/// Runs, and returns what came out, whatever the exit code.
pub fn output(command: &mut Command) -> Result<Output> {
    check_interrupted()?;
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", show(command)))?;
    check_interrupted()?;
    Ok(output)
}

/// Runs, and returns standard output without the final newline; an exit code other than 0 is an error with
/// the command's own words.
pub fn stdout(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed: {}: {}", show(command), output.status, said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Does the command exit with 0? What it prints is dropped; a program that is missing is a no.
pub fn succeeds(command: &mut Command) -> bool {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs behind a spinner; the output is shown only if it fails.
pub fn with_progress(label: &str, command: &mut Command) -> Result<()> {
    check_interrupted()?;
    let mut log = tempfile::tempfile().context("cannot make a temporary file")?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let mut child = command.spawn().with_context(|| format!("cannot run {}", show(command)))?;
    let status = {
        let mut progress = Progress::start(label);
        wait(&mut child, || progress.tick())?
    };
    check_interrupted()?;
    if !status.success() {
        log.rewind()?;
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap_or_default();
        bail!("{} failed: {status}\n{}", show(command), tail(&text));
    }
    Ok(())
}

/// Waits for the child's end, calling `tick` meanwhile.
pub fn wait(child: &mut Child, mut tick: impl FnMut()) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child process")? {
            return Ok(status);
        }
        tick();
        thread::sleep(POLL);
    }
}

/// The last lines of a log, for an error message.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    lines.get(from..).unwrap_or_default().iter().map(|line| format!("   | {line}")).collect::<Vec<_>>().join("\n")
}

/// The last lines of a log file, for an error message.
pub fn tail_of(path: &Path) -> String {
    match std::fs::read_to_string(path) {
        Ok(text) => tail(&text),
        Err(error) => format!("   | {}: {error}", path.display()),
    }
}

/// A log file for a child's standard output and error.
pub fn log_file(path: &Path) -> Result<(Stdio, Stdio)> {
    let log = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let again = log.try_clone()?;
    Ok((log.into(), again.into()))
}

/// Is xtask root already?
pub fn is_root() -> bool {
    Uid::effective().is_root()
}

/// Can commands be run as root? Asks for sudo's password where there is a terminal. `why` ends the sentence
/// "root is needed ...".
pub fn ensure_root(why: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let Some(sudo) = find("sudo") else {
        bail!("root is needed {why}, and sudo isn't there: run this command as root, or install sudo");
    };
    if succeeds(Command::new(&sudo).args(["-n", "true"])) {
        keep_ticket();
        return Ok(());
    }
    ensure!(
        std::io::stdin().is_terminal(),
        "root is needed {why}, and sudo wants a password: run `sudo -v` first, or run this command as root"
    );
    ui::step(&format!("sudo: root is needed {why}"));
    run(Command::new(sudo).arg("-v"))?;
    keep_ticket();
    Ok(())
}

/// Renews sudo's ticket from now on: what was started as root must be stopped as root, hours later perhaps.
fn keep_ticket() {
    static KEEPER: Once = Once::new();
    KEEPER.call_once(|| {
        thread::spawn(|| {
            loop {
                thread::sleep(TICKET_RENEWAL);
                succeeds(Command::new("sudo").args(["-n", "-v"]));
            }
        });
    });
}

/// A command that runs as root, through sudo if need be ([`ensure_root`] comes first). sudo drops the
/// environment, so what must arrive is named; `PATH` arrives always, with the directories where root's
/// programs are (dockerd looks for iptables there).
pub fn as_root<K: AsRef<OsStr>, V: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    environment: impl IntoIterator<Item = (K, V)>,
) -> Command {
    // A directory with a colon in its name can't come from PATH, so joining doesn't fail.
    let path = env::join_paths(search_path()).unwrap_or_default();
    if is_root() {
        let mut command = Command::new(program);
        command.env("PATH", path).envs(environment);
        return command;
    }
    let mut command = Command::new("sudo");
    command.arg("-n").arg("env").arg(pair("PATH".as_ref(), &path));
    for (name, value) in environment {
        command.arg(pair(name.as_ref(), value.as_ref()));
    }
    command.arg(program);
    command
}

fn pair(name: &OsStr, value: &OsStr) -> OsString {
    let mut pair = name.to_owned();
    pair.push("=");
    pair.push(value);
    pair
}

/// [`as_root`] without any environment.
pub fn as_root_plain(program: impl AsRef<OsStr>) -> Command {
    as_root::<&str, &str>(program, [])
}

/// Sends a signal to a process that may be root's. A process that is gone already is no error.
pub fn signal(pid: u32, signal: Signal) {
    let Ok(raw) = i32::try_from(pid) else { return };
    if kill(Pid::from_raw(raw), signal) == Err(nix::errno::Errno::EPERM) {
        succeeds(as_root_plain("kill").args(["-s", signal.as_str().trim_start_matches("SIG"), &pid.to_string()]));
    }
}

/// Asks a child to end, waits for at most `patience`, then kills it.
pub fn stop(child: &mut Child, patience: Duration) {
    for (number, patience) in [(Signal::SIGTERM, patience), (Signal::SIGKILL, Duration::from_secs(2))] {
        signal(child.id(), number);
        let end = Instant::now() + patience;
        while Instant::now() < end {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(POLL);
        }
    }
    ui::warn(&format!("process {} can't be stopped", child.id()));
}

/// The command as one would type it.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// A word as a shell takes it.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+[]".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_typed() {
        let mut command = Command::new("ssh");
        command.args(["-p", "32022", "root@127.0.0.1", "echo it's $HOME", ""]);
        assert_eq!(show(&command), r"ssh -p 32022 root@127.0.0.1 'echo it'\''s $HOME' ''");
    }

    #[test]
    fn a_failing_command_tells_its_last_words() {
        let error = stdout(Command::new("sh").args(["-c", "echo out; echo why >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().ends_with("failed: exit status: 3: why"), "{error}");
    }

    #[test]
    fn a_log_is_cut_to_its_end() {
        let log: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let shown = tail(&log);
        assert_eq!(shown.lines().count(), TAIL_LINES);
        assert!(shown.starts_with("   | line 70\n") && shown.ends_with("   | line 99"), "{shown}");
    }

    #[test]
    fn programs_outside_a_users_path_are_found() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-here"), None);
    }
}
