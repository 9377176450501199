//! What passes through the gateway besides EC2, by the AWS SDK: objects of S3, over plain HTTP and to an endpoint with TLS.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tests::e2e::{Agent, Moto, ends_with_this_thread, run, wait_for};

use crate::Stage;

fn python() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    std::env::var_os("SG_MOTO_PYTHON").map_or_else(own, PathBuf::from)
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker_gateway").join(name)
}

/// The most memory that the agent has had, in bytes.
fn peak_memory(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says so");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn objects_of_any_size_and_name_pass_unchanged() {
    let mut stage = Stage::new(Moto::shared());
    stage.agent.start().wait();
    let before = peak_memory(&stage.agent);
    let size = 64 << 20;
    let mut objects = stage.world.outside.command(python());
    objects.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    let said = run(objects.arg(script("objects.py")).args([&format!("http://{}", crate::GATEWAY), &size.to_string()]));
    assert_eq!(said, "all objects are what they were");
    let grown = peak_memory(&stage.agent) - before;
    assert!(grown < size / 4, "the agent held {grown} bytes of an object of {size}");
    assert_eq!(stage.agent.status()["gateway"]["changes"], 0, "no object changes what is enforced");
}

#[test]
fn an_endpoint_with_tls_is_read_and_forwarded_to() {
    let stage = Stage::new(Moto::shared());
    let directory = stage.agent.directory().to_owned();
    run(Command::new(python()).arg(script("certificate.py")).arg(&directory));
    // A real Moto, with TLS, where the agent is.
    let mut moto = stage.world.host.command(python());
    moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "5443", "-s", "-c", "cert.pem", "-k", "key.pem"]);
    moto.current_dir(&directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    ends_with_this_thread(&mut moto);
    let mut moto = Process(moto.spawn().expect("python runs"));
    let mut agent = Agent::new(Some(&stage.world.host));
    let url = "https://localhost:5443";
    Moto::reach(&mut agent, url);
    agent.environment("SSL_CERT_FILE", directory.join("cert.pem"));
    agent.arguments(["--no-docker", "--gateway", crate::GATEWAY, "--commit-timeout", crate::LONG]);
    agent.start();
    agent.logged(&["is up"]);
    wait_for("an answer by TLS", || agent.status()["sources"][0]["age_seconds"].is_number().then_some(()));
    let group = stage.gateway.group();
    assert!(group.starts_with("sg-"), "{group}");
    let gateway = &agent.status()["gateway"];
    assert_eq!((&gateway["committed"], &gateway["endpoint"]), (&1.into(), &format!("{url}/").into()), "{gateway:#}");
    let _ = moto.0.kill();
}

/// A child that ends with this.
struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
