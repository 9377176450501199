//! The demo's stage: Moto, agent, containers, and the commands that the play gives. Whatever it makes is taken away
//! when it is dropped, also when the play fails half-way. What is expected of a command is the play's.

use std::env;
use std::fs::{self, Permissions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use console::style;
use tempfile::TempDir;

use super::Attempt;
use crate::deps::{self, docker::Engine, python::Venv};
use crate::moto::{self, Moto};
use crate::{cmd, image, launched, ui, workspace};

/// An image that Moto knows from its start.
const AMI: &str = "ami-12c6146b";
/// How long an attempt to connect may take, in seconds: what is denied vanishes.
const CONNECT_TIMEOUT: &str = "4";
/// How long the agent may take until what is desired is enforced, in seconds.
const SETTLE: &str = "10";

/// How long a server in an instance may take to come up.
const START: Duration = Duration::from_secs(20);

/// An instance, and the container that it has become.
pub struct Instance {
    id: String,
    container: String,
    address: String,
}

/// Everything that the play needs.
pub struct Stage {
    agent: PathBuf,
    /// Where the agent's gateway will listen.
    gateway: String,
    /// The host's port that leads to the first instance's port 22.
    ssh_port: u16,
    /// The part of the names that is this run's own.
    name: String,
    running: Option<Child>,
    /// Key, state directory and log of this run.
    dir: TempDir,
    aws: PathBuf,
    // Dropped in this order, after `Drop::drop`.
    moto: Moto,
    engine: Engine,
}

impl Stage {
    /// Sets up and starts what the play needs.
    pub fn set_up(agent: PathBuf) -> Result<Self> {
        deps::ensure_tools(&[deps::SSH])?;
        let venv = Venv::ensure()?;
        let engine = Engine::ensure()?;
        image::ensure_instance(&engine)?;
        cmd::ensure_root("to load eBPF programs")?;
        deps::ensure_bpffs()?;
        let moto = Moto::start(&venv, 0)?;
        let dir = tempfile::Builder::new().prefix("sg-agent-demo-").tempdir()?;
        let name = format!("sg-agent-demo-{}", std::process::id());
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr());
        let gateway = free.context("no free port for the gateway")?.to_string();
        Ok(Self { agent, gateway, ssh_port: 0, name, running: None, dir, aws: venv.aws(), moto, engine })
    }

    /// Makes an SSH key with EC2.
    pub fn create_key(&self) -> Result<()> {
        let key = self.key();
        let arguments = ["create-key-pair", "--key-name", "demo", "--query", "KeyMaterial", "--output", "text"];
        let material = self.aws(&arguments)?;
        fs::write(&key, format!("{}\n", material.trim()))?;
        fs::set_permissions(&key, Permissions::from_mode(0o600))?;
        Ok(())
    }

    /// Makes a group without rules.
    pub fn create_group(&self, name: &str) -> Result<String> {
        let what = ["create-security-group", "--group-name", name, "--description", name];
        let id = self.aws(&[&what[..], &["--query", "GroupId", "--output", "text"]].concat())?;
        outcome(&id);
        Ok(id)
    }

    /// Adds a rule.
    pub fn authorize(&self, group: &str, rule: &[&str]) -> Result<()> {
        let what = ["authorize-security-group-ingress", "--group-id", group];
        let id = ["--query", "SecurityGroupRules[].SecurityGroupRuleId", "--output", "text"];
        outcome(&self.aws(&[&what[..], rule, &id].concat())?);
        Ok(())
    }

    /// Takes a rule away.
    pub fn revoke(&self, group: &str, rule: &[&str]) -> Result<()> {
        let what = ["revoke-security-group-ingress", "--group-id", group];
        outcome(&self.aws(&[&what[..], rule, &["--query", "Return", "--output", "text"]].concat())?);
        Ok(())
    }

    /// Runs an instance in a group, and waits until its container runs. `data` is what the instance runs.
    pub fn instance(&mut self, group: &str, data: Option<&str>) -> Result<Instance> {
        let subnet = self.aws(&["describe-subnets", "--query", "Subnets[0].SubnetId", "--output", "text"])?;
        let what = ["run-instances", "--image-id", AMI, "--key-name", "demo", "--security-group-ids", group];
        let data: Vec<&str> = data.iter().flat_map(|data| ["--user-data", data]).collect();
        let place = ["--subnet-id", &subnet, "--output", "text"];
        let query = ["--query", "Instances[0].[InstanceId,PrivateIpAddress]"];
        let said = self.aws(&[&what[..], &data, &place, &query].concat())?;
        let mut words = said.split_whitespace().map(str::to_owned);
        let (Some(id), Some(address)) = (words.next(), words.next()) else {
            bail!("run-instances told no instance and address: {said}");
        };
        outcome(&format!("{id} at {address}"));
        self.settle()?;
        Ok(Instance { container: format!("sg-agent-{id}"), id, address })
    }

    /// Waits until a server listens in an instance.
    pub fn serves(&self, instance: &Instance, port: u16) -> Result<()> {
        // Local addresses of the table of sockets (proc_net_tcp(5)); state 0A is LISTEN.
        let port = format!(":{port:04X}");
        let end = Instant::now() + START;
        loop {
            let mut docker = self.engine.docker();
            docker.args(["exec", &instance.container, "cat", "/proc/net/tcp", "/proc/net/tcp6"]);
            let table = cmd::stdout(&mut docker)?;
            let listens = |line: &str| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.get(1).is_some_and(|local| local.ends_with(&port)) && words.get(3) == Some(&"0A")
            };
            if table.lines().any(listens) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "nobody listens at port 0x{} of {}", &port[1..], instance.container);
            cmd::sleep(Duration::from_millis(100))?;
        }
    }

    /// Asks which ports are published, and notes the one for SSH.
    pub fn ports(&mut self) -> Result<()> {
        let mut command = self.agent(&["ports"]);
        prompt(&command, "sg-agent");
        let table = cmd::stdout(&mut command)?;
        println!("{table}");
        let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let port = rows.find(|words| words.get(1) == Some(&"22")).and_then(|words| words.get(2)?.parse().ok());
        self.ssh_port = port.context("port 22 isn't published")?;
        Ok(())
    }

    /// Terminates instances.
    pub fn terminate(&self, instances: &[&Instance]) -> Result<()> {
        let ids = instances.iter().map(|instance| &*instance.id);
        let query = ["--query", "TerminatingInstances[].CurrentState.Name", "--output", "text"];
        let what = ["terminate-instances", "--instance-ids"].into_iter().chain(ids).chain(query);
        outcome(&self.aws(&what.collect::<Vec<_>>())?);
        Ok(())
    }

    /// Starts the agent.
    pub fn start_agent(&mut self) -> Result<()> {
        let endpoint = self.moto.endpoint();
        let mut command = self.agent(&["run", "--launch", "--endpoint-url", &endpoint, "--gateway", &self.gateway]);
        prompt(&command, "sg-agent");
        let (out, err) = cmd::log_file(&self.log())?;
        let command = command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        self.running = Some(command.spawn().context("cannot start the agent")?);
        Ok(())
    }

    /// Waits until the agent says that what is desired is enforced.
    pub fn settle(&mut self) -> Result<()> {
        let mut command = self.agent(&["status", "--wait", SETTLE]);
        prompt(&command, "sg-agent");
        let output = cmd::output(&mut command)?;
        if let Some(running) = &mut self.running
            && let Some(status) = running.try_wait()?
        {
            bail!("the agent ended: {status}\n{}", cmd::tail_of(&self.log()));
        }
        let said = said(&output);
        ensure!(output.status.success(), "not enforced after {SETTLE} s: {said}\n{}", cmd::tail_of(&self.log()));
        Ok(())
    }

    /// Logs in through the published port.
    pub fn ssh(&self) -> Result<Attempt> {
        let config = self.dir.path().join("ssh_config");
        // The host's key is new each time, and the user's own configuration and agent stay out of it.
        let lines = [
            "StrictHostKeyChecking no",
            "UserKnownHostsFile /dev/null",
            "IdentitiesOnly yes",
            "BatchMode yes",
            "LogLevel ERROR",
            &format!("ConnectTimeout {CONNECT_TIMEOUT}"),
        ];
        fs::write(&config, lines.join("\n"))?;
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(config).arg("-i").arg(self.key());
        ssh.args(["-p", &self.ssh_port.to_string(), "root@127.0.0.1"]);
        ssh.arg("echo a shell on $(hostname)");
        prompt(&ssh, "ssh");
        Ok(attempt(&cmd::output(&mut ssh)?, "a shell on ip-"))
    }

    /// Connects from one instance to another's port, where a server greets.
    pub fn connect(&self, from: &Instance, to: &Instance, port: u16) -> Result<Attempt> {
        let mut docker = self.engine.docker();
        let port = port.to_string();
        docker.args(["exec", &from.container, "nc", "-w", CONNECT_TIMEOUT, &to.address, &port]);
        prompt(&docker, "docker");
        Ok(attempt(&cmd::output(&mut docker)?, "hello"))
    }

    fn aws(&self, arguments: &[&str]) -> Result<String> {
        let mut aws = Command::new(&self.aws);
        // The user's own account has nothing to do with it.
        for name in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_EC2"] {
            aws.env_remove(name);
        }
        aws.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null").env("AWS_PAGER", "");
        // Through the gateway as soon as there is one: what a call changes is then enforced when it returns.
        let endpoint =
            self.running.as_ref().map_or_else(|| self.moto.endpoint(), |_| format!("http://{}", self.gateway));
        aws.envs(moto::CREDENTIALS).env("AWS_ENDPOINT_URL", endpoint);
        aws.arg("ec2").args(arguments);
        prompt(&aws, "aws");
        cmd::stdout(&mut aws)
    }

    fn agent(&self, arguments: &[&str]) -> Command {
        let docker = env::var("DOCKER_HOST").ok();
        let docker = docker.as_deref().map(|host| ("DOCKER_HOST", host));
        let mut command = cmd::as_root(&self.agent, moto::CREDENTIALS.into_iter().chain(docker));
        command.arg("--state-dir").arg(self.dir.path().join("state")).arg("--bpffs").arg(self.bpffs());
        command.args(arguments);
        command
    }

    fn bpffs(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("demo.pem")
    }

    fn log(&self) -> PathBuf {
        workspace::target().join("run/demo-agent.log")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        ui::step("taking the demo away");
        if let Some(running) = &mut self.running {
            cmd::stop(running, Duration::from_secs(10));
            if !cmd::succeeds(&mut self.agent(&["detach"])) {
                ui::warn(&format!("`sg-agent detach` failed: see {}", self.log().display()));
            }
            // The agent's files are root's.
            cmd::succeeds(cmd::as_root_plain("rm").arg("-rf").arg(self.dir.path().join("state")));
            cmd::succeeds(cmd::as_root_plain("rm").arg("-rf").arg(self.bpffs()));
        }
        launched::remove(&self.engine, &self.dir.path().join("state").display().to_string());
    }
}

/// Shows a command as a user would type it: the program by its name.
fn prompt(command: &Command, program: &str) {
    let shown = cmd::show(command);
    let end = format!("/{program} ");
    let typed = shown.split_once(&end).map_or(shown.as_str(), |(_, arguments)| arguments);
    let typed = typed.strip_prefix(&format!("{program} ")).unwrap_or(typed);
    println!("{} {program} {typed}", style("$").cyan());
}

fn outcome(text: &str) {
    println!("{} {text}", style("✓").green());
}

/// What came of a command that connects, and lets the other side say `greeting`.
fn attempt(output: &Output, greeting: &str) -> Attempt {
    let words = said(output);
    if output.status.success() && words.contains(greeting) {
        Attempt::Answered(words)
    } else if !output.status.success() && never_connected(&words) {
        Attempt::Denied(words)
    } else {
        Attempt::Broken(format!("{}: {words}", output.status))
    }
}

/// Everything that a command said.
fn said(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{}", out.trim(), err.trim()).trim().to_owned()
}

/// Do these words tell of a connection that wasn't made, or was cut before the server said anything?
fn never_connected(words: &str) -> bool {
    let words = words.to_lowercase();
    ["refused", "timed out", "timeout", "connection closed by", "connection reset", "reset by peer"]
        .iter()
        .any(|sign| words.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denied_connection_is_told_from_a_denied_login() {
        for words in [
            "ssh: connect to host 127.0.0.1 port 32022: Connection refused",
            "kex_exchange_identification: Connection closed by remote host",
            "kex_exchange_identification: read: Connection reset by peer",
            "Connection timed out during banner exchange",
            "nc: timed out",
        ] {
            assert!(never_connected(words), "{words}");
        }
        for words in ["root@127.0.0.1: Permission denied (publickey).", ""] {
            assert!(!never_connected(words), "{words}");
        }
    }
}
