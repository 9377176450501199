//! A user's session with the real AWS CLI and SSH, each outcome asserted.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};
use std::time::Duration;

use tests::e2e::{PATIENCE, free_port, run, said, ssh, unique, wait_for};

use crate::{Host, Stage};

/// How long a login may take that mustn't succeed.
const DENIED: Duration = Duration::from_secs(4);

/// Logs in as its user would, by localhost.
fn log_in(stage: &Stage, port: u16, patience: Duration) -> Output {
    ssh(&stage.agent.directory().join("key.pem"), port, patience)
}

#[track_caller]
fn gets_a_shell(stage: &Stage, port: u16) {
    let answer = log_in(stage, port, PATIENCE);
    assert!(answer.status.success() && said(&answer).contains("a shell on web"), "{}", said(&answer));
}

/// Refused or timed out; a login that fails is something else.
#[track_caller]
fn gets_nothing(stage: &Stage, port: u16) {
    let answer = log_in(stage, port, DENIED);
    let words = said(&answer).to_lowercase();
    let signs = ["refused", "timed out", "connection closed by", "connection reset", "reset by peer"];
    assert!(!answer.status.success() && signs.iter().any(|sign| words.contains(sign)), "{words}");
}

#[test]
fn ssh_works_exactly_while_a_rule_lets_it() {
    let mut stage = Stage::new();
    let port = free_port();
    let moto = stage.moto;
    let name = unique();
    let key = stage.agent.directory().join("key.pem");
    let material = moto.aws(&["create-key-pair", "--key-name", &name, "--query", "KeyMaterial", "--output", "text"]);
    fs::write(&key, format!("{}\n", material.trim())).expect("room for a key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("one's own file");
    let public = run(Command::new("ssh-keygen").arg("-y").arg("-f").arg(&key));

    let create = ["create-security-group", "--group-name", &name, "--description", "web"];
    let group = moto.aws(&[&create[..], &["--query", "GroupId", "--output", "text"]].concat());
    let ingress = |verb: &str, network: &str| {
        let action = format!("{verb}-security-group-ingress");
        let rule = ["--protocol", "tcp", "--port", "22", "--cidr", network];
        moto.aws(&[&[&*action, "--group-id", &group][..], &rule].concat());
    };
    ingress("authorize", "0.0.0.0/0");
    let start = ["run-instances", "--image-id", "ami-12c6146b", "--key-name", &name, "--security-group-ids", &group];
    let id = moto.aws(&[&start[..], &["--query", "Instances[0].InstanceId", "--output", "text"]].concat());
    let (label, publish) = (format!("dev.sg-agent.instance-id={id}"), format!("dev.sg-agent.publish={port}=22"));
    let options = ["--network", &stage.network.name, "--label", &label, "--label", &publish];
    let key = format!("KEY={public}");
    let options = [&options[..], &["--hostname", "web", "--env", &key]].concat();
    let _web = stage.docker.run("web", &options, &["/bin/ssh-server"]);

    stage.agent.start().wait();
    wait_for("ssh's server is up", || log_in(&stage, port, PATIENCE).status.success().then_some(()));
    gets_a_shell(&stage, port);
    ingress("revoke", "0.0.0.0/0");
    stage.agent.wait();
    gets_nothing(&stage, port);
    ingress("authorize", "0.0.0.0/0");
    stage.agent.wait();
    gets_a_shell(&stage, port);
    // 10.0.0.0/8 alone has no localhost in it.
    ingress("revoke", "0.0.0.0/0");
    ingress("authorize", "10.0.0.0/8");
    stage.agent.wait();
    gets_nothing(&stage, port);
    ingress("authorize", "127.0.0.0/8");
    stage.agent.wait();
    gets_a_shell(&stage, port);
    let (allowed, said) = stage.agent.explain(&["--to", &id, "--from", "127.0.0.1", "--port", "22"]);
    let rule = said["gates"][0]["rule"]["id"].as_str().unwrap_or_default();
    let rules = moto.aws(&["describe-security-group-rules", "--filters", &format!("Name=group-id,Values={group}")]);
    assert!(allowed && rule.starts_with("sgr-") && rules.contains(rule), "{said:#}\n{rules}");
}

#[test]
fn the_database_is_for_the_application_alone() {
    let mut stage = Stage::new();
    let moto = stage.moto;
    let group = |role: &str| {
        let name = format!("{}-{role}", unique());
        let create = ["create-security-group", "--group-name", &name, "--description", role];
        moto.aws(&[&create[..], &["--query", "GroupId", "--output", "text"]].concat())
    };
    let (app_group, db_group, web_group) = (group("app"), group("db"), group("web"));
    let rule = ["--protocol", "tcp", "--port", "3306", "--source-group", &app_group];
    moto.aws(&[&["authorize-security-group-ingress", "--group-id", &db_group][..], &rule].concat());
    let [app, web, db] = [("app", &app_group), ("web", &web_group), ("db", &db_group)]
        .map(|(name, group)| -> Host { stage.instance(name, &[group]) });
    stage.agent.start().wait();
    let server = db.serve(3306);
    app.tcp(&db, 3306).passes();
    web.tcp(&db, 3306).vanishes();
    app.tcp(&db, 3307).vanishes();
    assert_eq!(server.accepted(), 1);
    assert!(stage.agent.packets(&db.id, "ingress", "no_rule") > 0);
    // The instance changes its groups, and what it may do with them.
    moto.aws(&["modify-instance-attribute", "--instance-id", &web.id, "--groups", &app_group]);
    moto.aws(&["modify-instance-attribute", "--instance-id", &app.id, "--groups", &web_group]);
    stage.agent.wait();
    web.tcp(&db, 3306).passes();
    app.tcp(&db, 3306).vanishes();
}
