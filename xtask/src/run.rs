//! `cargo xtask run`: everything that the agent needs, then the agent in the foreground. What it tells the user to type
//! is `how_to`'s.

mod how_to;

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal as _;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;

use crate::deps::{self, docker::Engine, python::Venv};
use crate::moto::{self, Moto};
use crate::{build, cmd, image, launched, ui};
use how_to::{Commands, ControlPlane, HowTo};

/// How long the agent may take to end after a signal.
const STOP: Duration = Duration::from_secs(15);

/// What flock(1) is told to say of a lock that is held.
const HELD: i32 = 75;

/// The agent's own default.
const STATE_DIR: &str = "/run/sg-agent";

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// Use this EC2 API instead of starting Moto
    #[arg(long, value_name = "URL")]
    endpoint_url: Option<String>,
    /// Start no Moto: the agent's own arguments or AWS_ENDPOINT_URL tell where the rules come from
    #[arg(long)]
    no_moto: bool,
    /// Moto's port; a free one is taken if something else has it
    #[arg(long, value_name = "PORT", default_value_t = moto::PORT)]
    moto_port: u16,
    /// Arguments for `sg-agent run`
    #[arg(last = true, value_name = "AGENT ARGUMENTS")]
    agent: Vec<OsString>,
}

/// Sets up, builds, starts what is missing, and runs the agent until it ends or Ctrl-C.
pub fn run(options: &Options) -> Result<ExitCode> {
    let has = |option: &str| options.agent.iter().any(|argument| argument == option);
    if has("--help") || has("-h") {
        let agent = build::build(true)?;
        return foreground(Command::new(agent).arg("run").args(&options.agent), None);
    }
    cmd::ensure_root("to load eBPF programs")?;
    let state_dir = state_dir(&options.agent);
    check_lock(&state_dir)?;
    let agent = build::build(true)?;
    let engine = (!has("--no-docker")).then(Engine::ensure).transpose()?;
    deps::ensure_bpffs()?;
    let (mut moto, aws) = if options.no_moto || options.endpoint_url.is_some() {
        (None, None)
    } else {
        let venv = Venv::ensure()?;
        (Some(Moto::start(&venv, options.moto_port)?), Some(venv.aws().display().to_string()))
    };
    // Moto only keeps book; other emulators may start containers themselves, and then there is a flag for it.
    let launch = moto.is_some() && engine.is_some() && !has("--rules");
    if let Some(engine) = engine.as_ref().filter(|_| launch || has("--launch")) {
        image::ensure_instance(engine)?;
    }
    let sudo = if cmd::is_root() { "" } else { "sudo " };
    let docker = engine.as_ref().is_some_and(Engine::needs_root).then_some("sudo docker");
    let commands = Commands { aws, sg_agent: format!("{sudo}{}", agent.display()), docker };
    // In the order in which the agent looks.
    let named = || {
        let variables = ["AWS_ENDPOINT_URL_EC2", "AWS_ENDPOINT_URL"].into_iter().filter_map(|name| env::var(name).ok());
        value_of(&options.agent, "--endpoint-url").into_iter().chain(variables).find(|url| !url.is_empty())
    };
    let given = options.endpoint_url.clone().or_else(|| moto.as_ref().map(Moto::endpoint));
    let endpoint = given.clone().or_else(|| named().filter(|_| !has("--rules")));
    if endpoint.is_none() && value_of(&options.agent, "--rules").is_none() {
        ui::warn(
            "no endpoint is named by --endpoint-url or AWS_ENDPOINT_URL: the agent asks the profile's, or AWS itself",
        );
    }

    // sudo drops the environment: what the agent reads is named.
    let passed = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with("AWS_") || name.starts_with("SG_") || ["RUST_LOG", "DOCKER_HOST", "NO_COLOR"].contains(&&*name)
    };
    let mut environment: Vec<(OsString, OsString)> = env::vars_os().filter(|(name, _)| passed(name)).collect();
    if moto.is_some() {
        let own = moto::CREDENTIALS.into_iter().filter(|(name, _)| env::var_os(name).is_none());
        environment.extend(own.map(|(name, value)| (name.into(), value.into())));
    }
    let mut command = cmd::as_root(agent, environment);
    command.arg("run");
    if let Some(endpoint) = &endpoint {
        if given.is_some() {
            command.args(["--endpoint-url", endpoint]);
        }
        let control_plane = match &moto {
            Some(_) => ControlPlane::Moto,
            None => ControlPlane::Other,
        };
        let way = how_to::way(endpoint, &options.agent);
        print!("{}", HowTo { control_plane, way, commands: &commands, launch: launch || has("--launch") });
    }
    if launch && !has("--launch") {
        command.arg("--launch");
    }
    command.args(&options.agent);
    let code = foreground(&mut command, moto.as_mut())?;
    // Moto forgets its instances when it ends, so their containers are nobody's then.
    if let Some(engine) = engine.as_ref().filter(|_| launch) {
        launched::remove(engine, &state_dir);
    }
    drop(moto);
    drop(engine);
    Ok(code)
}

/// The agent's state directory, as it finds it.
fn state_dir(agent: &[OsString]) -> String {
    let given = value_of(agent, "--state-dir").or_else(|| env::var("SG_STATE_DIR").ok());
    given.unwrap_or_else(|| STATE_DIR.to_owned())
}

/// What the agent's arguments give for an option.
fn value_of(agent: &[OsString], option: &str) -> Option<String> {
    let arguments: Vec<_> = agent.iter().map(|argument| argument.to_string_lossy()).collect();
    arguments.iter().enumerate().find_map(|(at, argument)| match argument.strip_prefix(option)? {
        "" => arguments.get(at + 1).map(ToString::to_string),
        rest => rest.strip_prefix('=').map(str::to_owned),
    })
}

/// Fails where another agent has the state directory, before anything is started for one that can't run.
fn check_lock(state_dir: &str) -> Result<()> {
    let lock = format!("{state_dir}/lock");
    let Ok(holder) = cmd::stdout(cmd::as_root_plain("cat").arg(&lock)) else {
        // No agent was ever here.
        return Ok(());
    };
    let mut flock = cmd::as_root_plain("flock");
    flock.args(["--nonblock", "--conflict-exit-code", &HELD.to_string(), &lock, "true"]);
    // Whatever else fails is the agent's to tell.
    let held = cmd::output(&mut flock).is_ok_and(|output| output.status.code() == Some(HELD));
    ensure!(
        !held,
        "another sg-agent (pid {holder}) holds {state_dir}; stop it, or give this one its own directories: `cargo xtask run -- --state-dir DIR --bpffs DIR`"
    );
    Ok(())
}

/// Runs the agent until its end; a signal to xtask is the agent's. If Moto ends the agent goes on, and so does what it
/// enforces.
fn foreground(command: &mut Command, mut moto: Option<&mut Moto>) -> Result<ExitCode> {
    ui::step(&format!("{} (Ctrl-C ends it, and what was started for it)", cmd::show(command)));
    cmd::check_interrupted()?;
    let mut child = command.spawn().with_context(|| format!("cannot run {}", cmd::show(command)))?;
    let mut asked_at = None;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for the agent")? {
            break status;
        }
        match (cmd::interrupted(), asked_at) {
            (Some(signal), None) => {
                // The terminal has sent Ctrl-C to the agent as well.
                if signal != Signal::SIGINT || !std::io::stdin().is_terminal() {
                    cmd::signal(child.id(), signal);
                }
                asked_at = Some(Instant::now());
            }
            (Some(_), Some(at)) if at.elapsed() > STOP => {
                ui::warn(&format!("the agent doesn't end within {} s: killing it", STOP.as_secs()));
                cmd::stop(&mut child, Duration::from_secs(1));
            }
            _ => {}
        }
        if let Some(ended) = moto.as_deref_mut().and_then(Moto::ended) {
            ui::warn(&format!(
                "Moto has ended ({ended}), and has forgotten everything; its log is target/run/moto.log. The last rules stay enforced, and nothing changes any more: end this by Ctrl-C, and start it again"
            ));
            moto = None;
        }
        thread::sleep(Duration::from_millis(50));
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn arguments(of: &[&str]) -> Vec<OsString> {
        of.iter().map(OsString::from).collect()
    }

    #[test]
    fn an_option_has_its_value_after_it_or_behind_the_equals_sign() {
        let of = |agent: &[&str]| value_of(&arguments(agent), "--state-dir");
        assert_eq!(of(&["--launch", "--state-dir", "/run/a"]).as_deref(), Some("/run/a"));
        assert_eq!(of(&["--state-dir=/run/b", "--launch"]).as_deref(), Some("/run/b"));
        assert_eq!(of(&["--state-directory", "/run/c"]), None);
    }

    #[test]
    fn another_agent_is_met_before_anything_is_started() {
        if !cmd::is_root() {
            eprintln!("skipped: only root looks into the agent's directory");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display().to_string();
        check_lock(&path).unwrap();
        assert!(!directory.path().join("lock").exists(), "looking makes no lock");

        let lock = directory.path().join("lock");
        std::fs::write(&lock, "4711\n").unwrap();
        check_lock(&path).unwrap();

        // It says that it has the lock, and keeps it until its input ends.
        let mut holder = Command::new("flock");
        holder.arg(&lock).args(["sh", "-c", "echo held; cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = holder.spawn().unwrap();
        let mut said = [0; 5];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
        let error = check_lock(&path).map_err(|error| error.to_string());
        drop(holder.stdin.take());
        holder.wait().unwrap();
        assert!(error.as_ref().is_err_and(|error| error.contains("another sg-agent (pid 4711)")), "{error:?}");
        check_lock(&path).unwrap();
    }
}
