//! `cargo xtask run`: everything that the agent needs, then the agent in the foreground.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal as _;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use nix::sys::signal::Signal;

use crate::deps::{self, docker::Engine, python::Venv};
use crate::moto::{self, Moto};
use crate::{build, cmd, image, launched, ui};

/// Where the agent's gateway listens by default.
const GATEWAY: &str = "127.0.0.1:4566";
/// How long the agent may take to end after a signal.
const STOP: Duration = Duration::from_secs(15);

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
    let agent = build::build(true)?;
    let has = |option: &str| options.agent.iter().any(|argument| argument == option);
    let needs_docker = !options.agent.iter().any(|argument| argument == "--no-docker");
    let engine = needs_docker.then(Engine::ensure).transpose()?;
    cmd::ensure_root("to load eBPF programs")?;
    deps::ensure_bpffs()?;
    let (moto, aws) = if options.no_moto || options.endpoint_url.is_some() {
        (None, "aws".to_owned())
    } else {
        let venv = Venv::ensure()?;
        (Some(Moto::start(&venv, options.moto_port)?), venv.aws().display().to_string())
    };
    // Moto only keeps book; other emulators may start containers themselves, and then there is a flag for it.
    let launch = moto.is_some() && engine.is_some() && !has("--rules");
    if let Some(engine) = engine.as_ref().filter(|_| launch || has("--launch")) {
        image::ensure_instance(engine)?;
    }
    let sudo = if cmd::is_root() { "" } else { "sudo " };
    let docker = engine.as_ref().is_some_and(Engine::needs_root).then_some("sudo docker");
    let commands = Commands { aws, sg_agent: format!("{sudo}{}", agent.display()), docker };
    let endpoint = options.endpoint_url.clone().or_else(|| moto.as_ref().map(Moto::endpoint));

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
        command.args(["--endpoint-url", endpoint]);
        if moto.is_some() {
            print!("{}", how_to(&client_endpoint(endpoint, &options.agent), &commands, launch));
        }
    }
    if launch && !has("--launch") {
        command.arg("--launch");
    }
    command.args(&options.agent);
    let code = foreground(&mut command)?;
    if let Some(engine) = engine.as_ref().filter(|_| launch) {
        remove_launched(engine, &options.agent);
    }
    drop(moto);
    drop(engine);
    Ok(code)
}

/// Moto forgets its instances when it ends, so their containers are nobody's then.
fn remove_launched(engine: &Engine, agent: &[OsString]) {
    let given = agent.iter().position(|argument| argument == "--state-dir").and_then(|at| agent.get(at + 1));
    let given = given.cloned().or_else(|| env::var_os("SG_STATE_DIR"));
    launched::remove(engine, &given.map_or_else(|| STATE_DIR.to_owned(), |directory| directory.display().to_string()));
}

/// Where clients go: to the agent's gateway, unless it has none.
fn client_endpoint(endpoint: &str, agent: &[OsString]) -> String {
    let arguments: Vec<_> = agent.iter().map(|argument| argument.to_string_lossy()).collect();
    let own = arguments.iter().enumerate().find_map(|(at, argument)| match argument.strip_prefix("--gateway") {
        Some("") => arguments.get(at + 1).map(ToString::to_string),
        Some(rest) => rest.strip_prefix('=').map(str::to_owned),
        None => None,
    });
    // As the agent does: by default it goes without, where something else has the port.
    let is_free = || std::net::TcpListener::bind(GATEWAY).is_ok();
    match own {
        _ if arguments.iter().any(|argument| argument == "--no-gateway" || argument == "--rules") => {
            endpoint.to_owned()
        }
        Some(address) => format!("http://{address}"),
        None if is_free() => format!("http://{GATEWAY}"),
        None => endpoint.to_owned(),
    }
}

/// Runs the agent until its end; a signal to xtask is the agent's.
fn foreground(command: &mut Command) -> Result<ExitCode> {
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
        thread::sleep(Duration::from_millis(50));
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What the how-to names: the commands as they are to be typed.
struct Commands {
    aws: String,
    sg_agent: String,
    /// Only where it isn't just `docker`.
    docker: Option<&'static str>,
}

fn how_to(endpoint: &str, commands: &Commands, launch: bool) -> String {
    let exports: Vec<_> = moto::CREDENTIALS.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let exports = exports.join(" ");
    let mut aliases = format!("alias aws={} sg-agent={}", cmd::quote(&commands.aws), cmd::quote(&commands.sg_agent));
    if let Some(docker) = commands.docker {
        aliases += &format!(" docker={}", cmd::quote(docker));
    }
    let steps = if launch { LAUNCHED } else { BY_HAND };
    format!(
        "
Moto is the control plane, the agent's gateway the way to it: a change is enforced when its call returns. In another terminal:

  export AWS_ENDPOINT_URL={endpoint} {exports}
  {aliases}

{steps}
Moto forgets everything when it ends; what is enforced stays until `sg-agent detach`.
`cargo xtask demo` plays such a session by itself.

"
    )
}

/// What to type where instances become containers by themselves.
const LAUNCHED: &str = "\
1. a key, a group, and a rule in it:
  aws ec2 create-key-pair --key-name me --query KeyMaterial --output text > me.pem; chmod 600 me.pem
  SG=$(aws ec2 create-security-group --group-name web --description web --query GroupId --output text)
  aws ec2 authorize-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
2. an instance in the group: it becomes a container, and its port 22 the host's 32022:
  ID=$(aws ec2 run-instances --image-id ami-12c6146b --key-name me --security-group-ids $SG --query 'Instances[0].InstanceId' --output text)
3. what is enforced, which ports are published, by which rule one gets in, and getting in:
  sg-agent status --wait 20
  sg-agent ports
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
  ssh -i me.pem -p 32022 root@127.0.0.1
4. the rule goes, and nobody gets in:
  aws ec2 revoke-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
  ssh -i me.pem -o ConnectTimeout=3 -p 32022 root@127.0.0.1
5. the instance goes, and its container with it:
  aws ec2 terminate-instances --instance-ids $ID
";

/// And where somebody has to start them.
const BY_HAND: &str = "\
1. a group, and a rule in it:
  SG=$(aws ec2 create-security-group --group-name web --description web --query GroupId --output text)
  aws ec2 authorize-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
2. an instance in the group:
  ID=$(aws ec2 run-instances --image-id ami-12c6146b --security-group-ids $SG --query 'Instances[0].InstanceId' --output text)
3. what is enforced, once a link stands for the instance (--attach $ID=LINK):
  sg-agent status --wait 10
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
4. the rule goes, and nobody gets in:
  aws ec2 revoke-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_go_to_the_gateway_where_there_is_one() {
        let of = |agent: &[&str]| {
            client_endpoint("http://127.0.0.1:5000", &agent.iter().map(OsString::from).collect::<Vec<_>>())
        };
        assert_eq!(of(&["--no-gateway"]), "http://127.0.0.1:5000");
        assert_eq!(of(&["--gateway", "127.0.0.1:9000"]), "http://127.0.0.1:9000");
        assert_eq!(of(&["--log-drops", "--gateway=127.0.0.1:9001"]), "http://127.0.0.1:9001");
    }

    #[test]
    fn the_how_to_names_the_endpoint_credentials_and_commands() {
        let mut commands = Commands {
            aws: "/w/target/venv/bin/aws".to_owned(),
            sg_agent: "sudo /w/target/release/sg-agent".to_owned(),
            docker: None,
        };
        let text = how_to("http://127.0.0.1:5001", &commands, true);
        assert!(text.contains("AWS_ENDPOINT_URL=http://127.0.0.1:5001 AWS_ACCESS_KEY_ID=test "), "{text}");
        let aliases = "alias aws=/w/target/venv/bin/aws sg-agent='sudo /w/target/release/sg-agent'";
        assert!(text.contains(&format!("{aliases}\n")), "{text}");
        commands.docker = Some("sudo docker");
        let text = how_to("http://127.0.0.1:5001", &commands, true);
        assert!(text.contains(&format!("{aliases} docker='sudo docker'\n")), "{text}");
    }
}
