//! The systemd unit, under a systemd that is the first process of namespaces of its own: this machine's isn't touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use tests::e2e::{
    Attempt, Instance, PATIENCE, Rules, Server, Stream, World, binary, ends_with_this_thread, output, run, said,
    unique, wait_for,
};

use crate::privileges::KEPT;
use crate::{pass, vanish};

const UNIT: &str = include_str!("../../../deploy/sg-agent.service");
/// What keeps the test short: a hang is found after seconds. All else is as users have it.
const SHORT: &str = "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n";

/// A systemd, and what runs under it.
struct Machine {
    world: World,
    directory: PathBuf,
    cgroup: String,
    outer: Child,
    /// Its first process, as this machine knows it.
    init: u32,
}

impl Machine {
    fn boot(world: World, rules: &mut Rules, directory: PathBuf) -> Self {
        assert!(Path::new("/usr/lib/systemd/systemd").exists(), "needs systemd: apt-get install systemd");
        // From inside, nobody sees the processes at the links' other ends.
        let attach = |instance: &Instance| {
            let mac = instance.mac.map(|byte| format!("{byte:02x}")).join(":");
            format!("--attach {}={},mac={mac}", instance.id(), instance.link)
        };
        let attach: Vec<_> = world.instances.iter().map(attach).collect();
        let options = format!("SG_AGENT_OPTIONS=\"--no-docker --rules /etc/rules.json {}\"\n", attach.join(" "));
        rules.write();
        let root = directory.join("root");
        fs::create_dir(&root).expect("a new directory");
        fs::copy(binary(), directory.join("sg-agent")).expect("the agent's executable");
        let unit = UNIT.replace("/usr/local/bin/", "/opt/");
        assert_ne!(unit, UNIT, "it names the executable");
        for (name, text) in [
            ("options", &*options),
            ("sg-agent.service", &*unit),
            ("test.conf", SHORT),
            ("unit.sh", include_str!("unit.sh")),
        ] {
            fs::write(directory.join(name), text).expect("a new file");
        }
        let cgroup = unique();
        let mut boot = world.host.command("unshare");
        boot.args(["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "sh"])
            .arg(directory.join("unit.sh"));
        boot.arg(&root).arg(&directory).arg(&cgroup);
        let log = fs::File::create(directory.join("boot.log")).expect("a new file");
        boot.stderr(log);
        ends_with_this_thread(&mut boot);
        let outer = boot.spawn().expect("util-linux's unshare in the PATH");
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let init = wait_for("the first process of the new namespaces", || {
            fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok()
        });
        Self { world, directory, cgroup, outer, init }
    }

    /// A command in it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let target = self.init.to_string();
        command
            .args(["--target", &target, "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--root", "--wd"]);
        command.args(["env", "-i", "PATH=/usr/sbin:/usr/bin", "SYSTEMD_UNIT_PATH=/etc/systemd/system", program]);
        command
    }

    fn systemctl(&self, arguments: &[&str]) {
        run(self.command("systemctl").args(arguments).arg("sg-agent.service"));
    }

    fn property(&self, name: &str) -> String {
        run(self.command("systemctl").args(["show", "--value", "--property", name, "sg-agent.service"]))
    }

    /// Waits until the agent is up, and enforces.
    #[track_caller]
    fn wait(&self) {
        wait_for("the unit is active", || {
            let is_active = output(self.command("systemctl").args(["is-active", "sg-agent.service"])).status.success();
            is_active.then_some(())
        });
        let status = output(self.command("/opt/sg-agent").args(["status", "--wait", "20"]));
        assert!(status.status.success(), "{}\n{}", said(&status), self.journal());
    }

    fn journal(&self) -> String {
        let journal = output(self.command("journalctl").args(["--no-pager", "--unit", "sg-agent.service"]));
        let boot = fs::read_to_string(self.directory.join("boot.log")).unwrap_or_default();
        format!("{boot}{}{}", String::from_utf8_lossy(&journal.stdout), said(&journal))
    }

    /// The agent's process, as this machine knows it: the only child of systemd's with this name.
    fn agent(&self) -> u32 {
        let children =
            fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.init)).expect("systemd's children");
        let is_agent =
            |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sg-agent");
        children.split_whitespace().find(is_agent).and_then(|pid| pid.parse().ok()).expect("the agent's process")
    }

    /// What the rules say is what is so.
    #[track_caller]
    fn is_enforced(&self) {
        let attempt = |port| Attempt::tcp(self.world.namespace("a"), self.world.instance("b").addresses()[0], port);
        pass([attempt(22)]);
        vanish([attempt(23)]);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killing the first process takes the others and all mounts with it.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        let mount = self.directory.join("cgroup");
        let _ = fs::create_dir(&mount);
        let script = "mount -t cgroup2 cgroup \"$1\" && cd \"$1/$2\" && find . -depth -type d -exec rmdir {} +; cd /; rmdir \"$1/$2\"";
        let mut remove = Command::new("unshare");
        remove.args(["--mount", "sh", "-c", script, "sh"]).arg(&mount).arg(&self.cgroup);
        // The killed processes leave it in their own time.
        for _ in 0..20 {
            if output(&mut remove).status.success() {
                break;
            }
            std::thread::sleep(PATIENCE / 100);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn the_unit_enforces_and_what_it_enforces_outlives_it() {
    let world = World::new(&["a", "b"]);
    let directory = std::env::temp_dir().join(unique());
    fs::create_dir(&directory).expect("a new directory");
    let mut rules = Rules::new(directory.join("rules.json"));
    rules.ingress("sg-b", &["tcp 22 10.0.1.10/32"]).ingress("sg-a", &[]);
    for instance in &world.instances {
        rules.instance(&instance.id(), &[&format!("sg-{}", instance.name)], &instance.addresses());
    }
    let servers = [22, 23].map(|port| Server::start(world.namespace("b"), port));
    let machine = Machine::boot(world, &mut rules, directory);
    machine.wait();
    machine.is_enforced();
    assert!(machine.journal().contains("is up"), "{}", machine.journal());
    let status = fs::read_to_string(format!("/proc/{}/status", machine.agent())).expect("the agent's own");
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(set)).expect("a set of capabilities");
        assert_eq!(u64::from_str_radix(line.trim(), 16), Ok(KEPT), "{set} {status}");
    }

    // Without the agent, and with the next one, connections go on and others stay denied.
    let mut stream = Stream::open(machine.world.namespace("a"), machine.world.instance("b").addresses()[0], 22);
    machine.systemctl(&["stop"]);
    assert_eq!(machine.property("ActiveState"), "inactive", "{}", machine.journal());
    machine.is_enforced();
    stream.goes_on();
    machine.systemctl(&["start"]);
    machine.wait();
    machine.systemctl(&["restart"]);
    machine.wait();
    stream.goes_on();
    machine.is_enforced();

    // One that is killed is started again, and so is one that hangs.
    for (number, signal) in ["KILL", "STOP"].into_iter().enumerate() {
        let before = machine.agent();
        run(Command::new("kill").args([format!("-{signal}"), before.to_string()]));
        wait_for("systemd starts it again", || {
            (machine.property("NRestarts") == (number + 1).to_string()).then_some(())
        });
        machine.wait();
        assert_ne!(machine.agent(), before);
        stream.goes_on();
        machine.is_enforced();
    }
    drop(servers);

    // The unit says what systemd understands, and leaves little open.
    run(machine.command("systemd-analyze").args(["verify", "/etc/systemd/system/sg-agent.service"]));
    run(machine
        .command("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=37"])
        .arg("/etc/systemd/system/sg-agent.service"));
}
