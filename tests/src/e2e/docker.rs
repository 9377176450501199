//! Containers and networks of a real Docker engine, which go when they are dropped. The image is made of this machine's
//! own BusyBox, Bash and Dropbear, as nothing can be pulled everywhere.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

use serde_json::Value;

use super::{Namespace, output, run, unique};

/// What runs in a container that has nothing to do.
pub const IDLE: &[&str] = &["/bin/sleep", "3600"];

/// An image of this test's own, and everything that is made of it.
#[derive(Debug)]
pub struct Docker {
    name: String,
}

/// An image of another name or command. It goes when this is dropped, which is to be when nothing uses it any more.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
}

/// A network.
#[derive(Debug)]
pub struct Network {
    /// Its name.
    pub name: String,
}

/// A container that was started.
#[derive(Debug)]
pub struct Container {
    /// Its name.
    pub name: String,
}

/// A `docker` command line.
pub fn docker() -> Command {
    let mut command = Command::new("docker");
    command.stdin(Stdio::null());
    command
}

impl Docker {
    /// Makes the image.
    ///
    /// # Panics
    /// When no engine answers, or BusyBox or Dropbear isn't there.
    pub fn new() -> Self {
        super::need_root();
        sweep();
        let docker = Self { name: unique() };
        let root = std::env::temp_dir().join(format!("{}-image", docker.name));
        fill(&root);
        import(&root, &docker.name, &[]);
        let _ = fs::remove_dir_all(&root);
        docker
    }

    /// Makes a network, by `docker network create ARGUMENTS`.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn network(&self, arguments: &[&str]) -> Network {
        let network = Network { name: unique() };
        run(docker().args(["network", "create"]).args(arguments).arg(&network.name));
        network
    }

    /// Starts a container that is called `name` with the test's own part before it.
    ///
    /// # Panics
    /// When it doesn't start.
    #[track_caller]
    pub fn run(&self, name: &str, options: &[&str], command: &[&str]) -> Container {
        let container = Container { name: format!("{}-{name}", self.name) };
        let mut docker = docker();
        docker.args(["run", "-d", "--name", &container.name]);
        run(docker.args(options).arg(&self.name).args(command));
        container
    }

    /// Starts a container of another image.
    ///
    /// # Panics
    /// When it doesn't start.
    #[track_caller]
    pub fn run_image(&self, image: &str, options: &[&str], command: &[&str]) -> Container {
        let container = Container { name: unique() };
        run(docker().args(["run", "-d", "--name", &container.name]).args(options).arg(image).args(command));
        container
    }

    /// The image with another command, and what else a Dockerfile's lines say.
    ///
    /// # Panics
    /// When it can't be made.
    #[track_caller]
    pub fn image(&self, lines: &[&str]) -> Image {
        let (base, image) = (Container { name: unique() }, Image { name: unique() });
        run(docker().args(["create", "--name", &base.name, &self.name, "/bin/sh"]));
        let changes = lines.iter().flat_map(|line| ["--change", line]);
        run(docker().arg("commit").args(changes).args([&base.name, &image.name]));
        image
    }
}

impl Image {
    /// The same image by another name, too.
    ///
    /// # Panics
    /// When it can't be given that.
    #[track_caller]
    pub fn again(&self, name: &str) -> Self {
        run(docker().args(["tag", &self.name, name]));
        Self { name: name.to_owned() }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = docker().args(["rmi", "--force", &self.name]).output();
    }
}

/// Everything that a launcher has made on the engine. Dropped, it goes; the agent has to be gone by then.
#[derive(Debug)]
pub struct Launched {
    /// What the launcher marks things with: its state directory.
    pub launcher: String,
}

impl Launched {
    /// The running containers' names, sorted.
    pub fn running(&self) -> Vec<String> {
        let label = format!("label=dev.sg-agent.launcher={}", self.launcher);
        let listed = run(docker().args(["ps", "--filter", &label, "--format", "{{.Names}}"]));
        let mut names: Vec<String> = listed.lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// The names of its networks.
    pub fn networks(&self) -> Vec<String> {
        let label = format!("label=dev.sg-agent.launcher={}", self.launcher);
        let listed = run(docker().args(["network", "ls", "--filter", &label, "--format", "{{.Name}}"]));
        listed.lines().map(str::to_owned).collect()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        remove_launched(&self.launcher);
    }
}

fn remove_launched(launcher: &str) {
    let label = format!("label=dev.sg-agent.launcher={launcher}");
    for (list, remove) in
        [(&["ps", "-aq"][..], &["rm", "--force", "--volumes"][..]), (&["network", "ls", "-q"], &["network", "rm"])]
    {
        let listed = output(docker().args(list).args(["--filter", &label]));
        for id in String::from_utf8_lossy(&listed.stdout).lines() {
            let _ = docker().args(remove).arg(id).output();
        }
    }
}

impl Default for Docker {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = docker().args(["rmi", "--force", &self.name]).output();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = docker().args(["network", "rm", &self.name]).output();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = output(docker().args(["logs", "--tail", "30", &self.name]));
            eprintln!("--- the log of {} ---\n{}---", self.name, super::agent::said(&log));
        }
        let _ = docker().args(["rm", "--force", "--volumes", &self.name]).output();
    }
}

impl Container {
    /// Its network namespace, for probes and servers. It is another one after a restart.
    ///
    /// # Panics
    /// When the container doesn't run.
    #[track_caller]
    pub fn namespace(&self) -> Namespace {
        let pid = self.inspect()["State"]["Pid"].as_u64().filter(|pid| *pid > 0);
        let pid = pid.unwrap_or_else(|| panic!("{} doesn't run", self.name));
        Namespace::of_process(&self.name, u32::try_from(pid).expect("a process id"))
    }

    /// Its IPv4 address in a network.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn v4(&self, network: &Network) -> IpAddr {
        self.address(network, "IPAddress")
    }

    /// Its IPv6 address in a network.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn v6(&self, network: &Network) -> IpAddr {
        self.address(network, "GlobalIPv6Address")
    }

    /// Runs a program in it.
    ///
    /// # Panics
    /// When docker can't be run.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        output(docker().args(["exec", &self.name]).args(command))
    }

    /// `docker COMMAND ... NAME`, which has to succeed.
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn docker(&self, command: &[&str]) -> String {
        run(docker().args(command).arg(&self.name))
    }

    #[track_caller]
    fn address(&self, network: &Network, key: &str) -> IpAddr {
        let inspected = self.inspect();
        let address = inspected["NetworkSettings"]["Networks"][&network.name][key].as_str().unwrap_or_default();
        address.parse().unwrap_or_else(|_| panic!("{} has no {key}: {:#}", self.name, inspected["NetworkSettings"]))
    }

    #[track_caller]
    fn inspect(&self) -> Value {
        let text = run(docker().args(["inspect", "--format", "{{json .}}", &self.name]));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("docker inspect {}: {error}: {text}", self.name))
    }
}

/// `docker import` of a directory.
///
/// # Panics
/// When it fails.
pub fn import(root: &Path, tag: &str, changes: &[&str]) {
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "-c", "-C"]).arg(root).arg(".").stdout(Stdio::piped());
    let mut tar = tar.spawn().expect("tar in the PATH");
    let archive = tar.stdout.take().expect("a pipe was asked for");
    let mut import = docker();
    import.arg("import").args(changes.iter().flat_map(|change| ["--change", change])).args(["-", tag]).stdin(archive);
    run(&mut import);
    assert!(tar.wait().is_ok_and(|status| status.success()), "tar failed");
}

/// Puts BusyBox, and Bash and Dropbear with their libraries, into a directory. The SSH server takes the key in `$KEY`.
fn fill(root: &Path) {
    let make = |directory: &str| fs::create_dir_all(root.join(directory)).expect("a new directory");
    ["bin", "usr/sbin", "etc/dropbear", "root/.ssh", "tmp", "var/run", "proc", "sys", "dev"].into_iter().for_each(make);
    copy(root, &program("busybox"), Some("bin/busybox"));
    for applet in ["sh", "sleep", "echo", "hostname", "cat", "ls", "nc"] {
        symlink("busybox", root.join("bin").join(applet)).expect("a new name");
    }
    // Bash, unlike BusyBox, can send datagrams.
    for (name, to) in [("dropbear", "usr/sbin/dropbear"), ("bash", "bin/bash")] {
        let program = program(name);
        copy(root, &program, Some(to));
        let listed = run(Command::new("ldd").arg(&program));
        let words = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
        listed.lines().filter_map(words).for_each(|library| copy(root, &library, None));
    }
    let write = |path: &str, text: &str| fs::write(root.join(path), text).expect("a new file");
    write("etc/passwd", "root:*:0:0:root:/root:/bin/sh\n");
    write("etc/group", "root:x:0:\n");
    write("etc/shells", "/bin/sh\n");
    // Dropbear ignores keys that others could write. -R makes the host's keys, -F stays in the foreground.
    let start = "#!/bin/sh\necho \"$KEY\" > /root/.ssh/authorized_keys\nexec /usr/sbin/dropbear -R -F -E\n";
    write("bin/ssh-server", start);
    for (path, mode) in [(".", 0o755), ("root", 0o700), ("root/.ssh", 0o700), ("bin/ssh-server", 0o755)] {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).expect("one's own file");
    }
}

fn copy(root: &Path, file: &Path, to: Option<&str>) {
    let to = root.join(to.map_or_else(|| file.strip_prefix("/").unwrap_or(file), Path::new));
    let copied = fs::create_dir_all(to.parent().unwrap_or(root)).and_then(|()| fs::copy(file, &to));
    assert!(copied.is_ok(), "{}: {copied:?}", file.display());
}

fn program(name: &str) -> PathBuf {
    let places = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin"];
    let found = places.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} isn't there; 'cargo xtask test' installs it"))
}

/// Removes what runs that were killed left behind.
fn sweep() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        let launchers = run(docker().args(["ps", "-a", "--format", "{{.Label \"dev.sg-agent.launcher\"}}"]));
        for launcher in launchers.lines() {
            let owner = Path::new(launcher).parent().and_then(Path::file_name).and_then(std::ffi::OsStr::to_str);
            if owner.is_some_and(super::sweep::is_orphan) {
                remove_launched(launcher);
            }
        }
        for (list, remove) in [
            (&["ps", "-a", "--format", "{{.Names}}"][..], &["rm", "--force"][..]),
            (&["network", "ls", "--format", "{{.Name}}"], &["network", "rm"]),
            (&["images", "--format", "{{.Repository}}"], &["rmi", "--force"]),
        ] {
            // An image's name may have a registry's before it.
            let own = |name: &&str| name.rsplit('/').next().is_some_and(super::sweep::is_orphan);
            for name in run(docker().args(list)).lines().filter(own) {
                let _ = docker().args(remove).arg(name).output();
            }
        }
    });
}
