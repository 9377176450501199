//! The agent itself as a container, as a DaemonSet would run it. With what it needs of a privileged one's rights, as not
//! every machine that can run it has all of them to give.

use tests::e2e::{Agent, Attempt, Container, engine, said};

use crate::Stage;

/// The image that `cargo xtask image` makes of the agent that is tested.
fn image() -> String {
    std::env::var("SG_AGENT_IMAGE").unwrap_or_else(|_| panic!("set SG_AGENT_IMAGE to what 'cargo xtask image' made"))
}

#[test]
fn the_agent_runs_in_a_container() {
    let stage = Stage::new();
    let group = stage.moto.group();
    stage.moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    // It is never started: it takes away what the one in the container leaves on bpffs.
    let cleaner = Agent::new(None);
    let bpffs = cleaner.bpffs().display().to_string();
    let socket = format!("{}:/var/run/docker.sock", engine().display());
    let host = ["--network", "host", "--pid", "host", "--security-opt", "apparmor=unconfined"];
    let rights = ["--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE"];
    let mounts = ["-v", "/sys/fs/bpf:/sys/fs/bpf", "-v", "/run/netns:/run/netns", "-v", &socket];
    let credentials = ["-e", "AWS_ACCESS_KEY_ID=test", "-e", "AWS_SECRET_ACCESS_KEY=test"];
    let options = [&host[..], &rights, &mounts, &credentials].concat();
    let url = stage.moto.url();
    let command = ["--bpffs", &bpffs, "run", "--poll-interval", "0.2", "--endpoint-url", &url];
    let agent: Container = stage.docker.run_image(&image(), &options, &command);
    let settle = || {
        let waited = agent.exec(&["sg-agent", "status", "--wait", "120"]);
        assert!(waited.status.success(), "{}", said(&waited));
    };
    settle();
    let _servers = [22, 23].map(|port| b.serve(port));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    stage.moto.revoke(&group, 22, "0.0.0.0/0");
    stage.moto.authorize(&group, 23, "0.0.0.0/0");
    settle();
    a.tcp(&b, 23).passes();
    a.tcp(&b, 22).vanishes();
    // A new version of it takes over, as after an update.
    agent.docker(&["stop", "--time", "10"]);
    a.tcp(&b, 23).passes();
    a.tcp(&b, 22).vanishes();
    agent.docker(&["start"]);
    settle();
    a.tcp(&b, 23).passes();
    a.tcp(&b, 22).vanishes();
    let explained = agent.exec(&["sg-agent", "explain", "--to", &b.id, "--from", "192.0.2.1", "--port", "22"]);
    assert!(!explained.status.success() && said(&explained).contains("denied"), "{}", said(&explained));
    agent.docker(&["stop", "--time", "10"]);
    drop(agent);
    let detach: Container = stage.docker.run_image(&image(), &options, &["--bpffs", &bpffs, "detach"]);
    assert_eq!(detach.docker(&["wait"]), "0");
    Attempt::tcp(&a.namespace, b.v4, 22).passes();
    assert!(!cleaner.bpffs().exists());
}
