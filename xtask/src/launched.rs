//! Taking away what an agent's launcher made, when its control plane is no more. Nothing else: by the label that the
//! launcher puts on what it makes.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use crate::deps::docker::Engine;
use crate::ui;

/// Removes the containers and networks of the agent with this state directory.
pub fn remove(engine: &Engine, state_dir: &str) {
    let label = format!("label=dev.sg-agent.launcher={state_dir}");
    for (what, list, remove) in [
        ("containers", &["ps", "--all", "--quiet"][..], &["rm", "--force", "--volumes"][..]),
        ("networks", &["network", "ls", "--quiet"], &["network", "rm"]),
    ] {
        // Not by `cmd`, which does nothing more after Ctrl-C.
        let run = |mut docker: Command| docker.stdin(Stdio::null()).process_group(0).output();
        let docker = |arguments: &[&str]| {
            let mut docker = engine.docker();
            docker.args(arguments);
            docker
        };
        let listed = run(docker(&[list, &["--filter", &label]].concat())).map(|output| output.stdout);
        let listed = String::from_utf8(listed.unwrap_or_default()).unwrap_or_default();
        let ids: Vec<&str> = listed.lines().collect();
        if ids.is_empty() {
            continue;
        }
        ui::step(&format!("removing {what} of launched instances, which Moto has forgotten"));
        if !run(docker(&[remove, &ids].concat())).is_ok_and(|output| output.status.success()) {
            ui::warn(&format!("`docker {} {}` failed", remove.join(" "), ids.join(" ")));
        }
    }
}
