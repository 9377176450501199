//! What the agent may do, whom it listens to, and what of its input reaches a terminal.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use tests::e2e::{Lab, binary, output, run, said};

use crate::{pass, vanish};

/// CAP_NET_BIND_SERVICE, CAP_NET_BROADCAST, CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF.
pub const KEPT: u64 = 1 << 10 | 1 << 11 | 1 << 12 | 1 << 19 | 1 << 21 | 1 << 38 | 1 << 39;

#[test]
fn every_thread_has_what_it_needs_and_no_more() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.10/32"])).start();
    lab.serve("b", &[22, 23]);
    let tasks = format!("/proc/{}/task", lab.agent.pid());
    let mut threads = 0;
    for task in fs::read_dir(&tasks).expect("the agent's threads") {
        // One that has just ended has nothing any more.
        let Ok(status) = fs::read_to_string(task.expect("a thread").path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
            line.trim().to_owned()
        };
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(KEPT), "{set} {status}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{set} {status}");
        }
        assert_eq!(field("NoNewPrivs:"), "1", "{status}");
        assert_eq!(field("Seccomp:"), "2", "a filter: {status}");
        threads += 1;
    }
    assert!(threads >= 3, "{threads} threads of {tasks}");
    // It does its work all the same.
    pass([lab.tcp("a", "b", 22)[0].clone()]);
    vanish([lab.tcp("a", "b", 23)[0].clone()]);
}

#[test]
fn other_users_are_not_heard_at_the_control_socket() {
    let lab = Lab::with(&["a"]).start();
    let state = lab.agent.directory().join("state");
    // As if somebody had opened both up.
    for (path, mode) in
        [(lab.agent.directory().to_owned(), 0o755), (state.clone(), 0o755), (state.join("control.sock"), 0o666)]
    {
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("root's own file");
    }
    let program = lab.agent.directory().join("sg-agent");
    fs::copy(binary(), &program).expect("a copy that anybody may execute");
    let ask = |uid: u32| {
        let mut command = Command::new(&program);
        command.arg("--state-dir").arg(&state).arg("status").uid(uid).gid(uid);
        output(&mut command)
    };
    assert!(ask(0).status.success(), "root is heard");
    let refused = ask(65_534);
    assert!(!refused.status.success() && refused.stdout.is_empty(), "{}", said(&refused));
    lab.agent.logged(&["refused at the control socket"]);
}

/// Sockets that listen in the agent's namespace are its own: only it and the bridge are there.
#[test]
fn it_listens_on_loopback_only() {
    let lab = Lab::with(&["a"]).arguments(&["--publish", "i-a:8080=80"]).start();
    let mut ports = 0;
    for (file, loopback) in [("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")] {
        let table = run(lab.world.host.command("cat").arg(format!("/proc/net/{file}")));
        for line in table.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (Some(local), Some(&state)) = (words.get(1), words.get(3)) else { panic!("{line}") };
            // TCP_LISTEN
            if state == "0A" {
                assert_eq!(local.split(':').next(), Some(loopback), "{line}");
                ports += 1;
            }
        }
    }
    assert_eq!(ports, 2, "the published port, in both families");
}

#[test]
fn names_cannot_steer_a_terminal_or_the_log() {
    let evil = "sg-\u{1b}[2J\u{7}\r\nfake line\u{9b}31m";
    let mut lab = Lab::with(&["a"]).start();
    let addresses = lab.world.instance("a").addresses();
    lab.change(|rules| {
        rules.ingress(evil, &["tcp 22 sg-\u{1b}[31mnone"]).instance("i-a", &[evil, "sg-\u{1b}]0;x\u{7}"], &addresses)
    });
    let status = output(lab.agent.command().arg("status"));
    let explain = output(lab.agent.command().args(["explain", "--to", "i-a", "--from", "10.0.1.1", "--port", "22"]));
    let unknown =
        output(lab.agent.command().args(["explain", "--to", "i-\u{1b}[2J", "--from", "10.0.1.1", "--port", "22"]));
    let json = output(lab.agent.command().args(["status", "--json"]));
    let read: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON, whatever the names");
    assert!(read.to_string().contains("fake line\u{9b}31m"), "names are as they were: {read:#}");
    let texts = [&status, &explain, &unknown, &json]
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned() + &said(output));
    assert!(texts[0].contains("\\u{1b}[2J"), "the name is shown, escaped: {}", texts[0]);
    for text in texts.iter().chain([&lab.agent.log()]) {
        let steering = text.chars().find(|char| char.is_control() && *char != '\n');
        assert_eq!(steering, None, "{text:?}");
        assert!(!text.contains("\nfake line"), "{text:?}");
    }
}
