//! The proxies in one namespace, each on ports of its own, before one container; and the processor time that they take.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ::tests::e2e::{Agent, Namespace, Rules, World};
use anyhow::{Context as _, Result, bail};

use crate::load::{Server, Service};
use crate::record::Recorder;
use crate::site::many_connections;

/// The container's ports: one that echoes, one that takes everything.
const PORTS: [u16; 2] = [80, 81];
/// How long a proxy may take until it listens; Moto takes seconds.
const START: Duration = Duration::from_secs(60);
/// Where Moto listens in the namespace.
const MOTO: u16 = 5_000;

/// Who stands between the client and the container.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Nobody.
    Direct,
    /// sg-agent.
    Ours,
    /// Docker's own, of `docker run -p`.
    DockerProxy,
    /// HAProxy in TCP mode.
    HaProxy,
    /// nginx's stream module.
    Nginx,
    /// One that asks Moto about each connection.
    AsksMoto,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 6] =
        [Self::Direct, Self::Ours, Self::DockerProxy, Self::HaProxy, Self::Nginx, Self::AsksMoto];

    /// What the report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ours => "sg-agent",
            Self::DockerProxy => "docker-proxy",
            Self::HaProxy => "HAProxy",
            Self::Nginx => "nginx stream",
            Self::AsksMoto => "asks Moto each time",
        }
    }

    fn ports(self) -> [u16; 2] {
        let first = 31_000 + 10 * self as u16;
        [first, first + 1]
    }
}

/// A process that ends with its value.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        for pid in family(self.0.id()) {
            let Ok(pid) = i32::try_from(pid) else { continue };
            // One that has ended already is as good.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}

/// All of them.
#[derive(Debug)]
pub struct Stand {
    processes: Vec<(Kind, Process)>,
    asker: Option<Asker>,
    _moto: Option<Process>,
    agent: Agent,
    servers: [Server; 2],
    world: World,
}

impl Stand {
    /// Sets them up. For a proxy that isn't to be had a note says why not.
    ///
    /// # Errors
    /// What all of them need isn't there.
    pub fn new(recorder: &Recorder) -> Result<Self> {
        let world = World::new(&["b"]);
        let container = &world.instances[0];
        for namespace in [&world.host, &container.namespace] {
            many_connections(namespace);
        }
        world.host.sysctl("net/bridge/bridge-nf-call-iptables", "0");
        let address = IpAddr::from(container.v4);
        let servers = [
            Server::start(&container.namespace, (address, PORTS[0]).into(), Service::Echo)?,
            Server::start(&container.namespace, (address, PORTS[1]).into(), Service::Sink)?,
        ];
        let mut stand = Self { processes: Vec::new(), asker: None, _moto: None, agent: agent(&world), servers, world };
        for kind in [Kind::DockerProxy, Kind::HaProxy, Kind::Nginx] {
            recorder.check()?;
            if let Err(error) = stand.start(kind, address) {
                recorder.note(&format!("without {}: {error:#}", kind.name()));
                stand.processes.retain(|(its, _)| *its != kind);
            }
        }
        if let Err(error) = stand.ask_moto() {
            recorder.note(&format!("without the one that asks Moto: {error:#}"));
        }
        Ok(stand)
    }

    /// Those that stand.
    pub fn kinds(&self) -> Vec<Kind> {
        let stands = |kind: &Kind| match kind {
            Kind::Direct | Kind::Ours => true,
            Kind::AsksMoto => self.asker.is_some(),
            kind => self.processes.iter().any(|(its, _)| its == kind),
        };
        Kind::ALL.into_iter().filter(stands).collect()
    }

    /// Where clients are.
    pub fn client(&self) -> &Namespace {
        &self.world.host
    }

    /// Where this kind's clients connect to the echo.
    pub fn echo(&self, kind: Kind) -> SocketAddr {
        self.port(kind, 0)
    }

    /// Where they connect to the sink.
    pub fn sink(&self, kind: Kind) -> SocketAddr {
        self.port(kind, 1)
    }

    /// The sink itself.
    pub fn sink_server(&self) -> &Server {
        &self.servers[1]
    }

    fn port(&self, kind: Kind, which: usize) -> SocketAddr {
        match kind {
            Kind::Direct => self.servers[which].address,
            kind => (Ipv4Addr::LOCALHOST, kind.ports()[which]).into(),
        }
    }

    /// Seconds of processor time that a proxy has taken so far.
    pub fn processor_time(&self, kind: Kind) -> Option<f64> {
        let pids: Vec<u32> = match kind {
            Kind::Direct | Kind::AsksMoto => return None,
            Kind::Ours => vec![self.agent.pid()],
            kind => {
                self.processes.iter().filter(|(its, _)| *its == kind).flat_map(|(_, one)| family(one.0.id())).collect()
            }
        };
        Some(pids.into_iter().map(ticks).sum())
    }

    fn start(&mut self, kind: Kind, address: IpAddr) -> Result<()> {
        let directory = self.agent.directory();
        let [echo, sink] = kind.ports();
        let mut commands = Vec::new();
        match kind {
            Kind::DockerProxy => {
                for (port, target) in kind.ports().into_iter().zip(PORTS) {
                    let mut command = self.peer("docker-proxy")?;
                    command.args(["-proto", "tcp", "-host-ip", "127.0.0.1", "-host-port", &port.to_string()]);
                    command.args(["-container-ip", &address.to_string(), "-container-port", &target.to_string()]);
                    commands.push(command);
                }
            }
            Kind::HaProxy => {
                let one = |name: &str, port, target| {
                    format!("listen {name}\n  bind 127.0.0.1:{port}\n  server s {address}:{target}\n")
                };
                let text = format!(
                    "global\n  maxconn 4096\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n{}{}",
                    one("echo", echo, PORTS[0]),
                    one("sink", sink, PORTS[1])
                );
                let file = directory.join("haproxy.cfg");
                fs::write(&file, text)?;
                let mut command = self.peer("haproxy")?;
                command.arg("-db").arg("-f").arg(file);
                commands.push(command);
            }
            Kind::Nginx => {
                let module = peers().join("usr/lib/nginx/modules/ngx_stream_module.so");
                let one = |port, target| {
                    format!("  server {{ listen 127.0.0.1:{port} backlog=4096; proxy_pass {address}:{target}; }}\n")
                };
                let text = format!(
                    "load_module {};\nuser root;\ndaemon off;\nworker_processes auto;\npid {}/nginx.pid;\nerror_log stderr crit;\nevents {{ worker_connections 4096; }}\nstream {{\n{}{}}}\n",
                    module.display(),
                    directory.display(),
                    one(echo, PORTS[0]),
                    one(sink, PORTS[1])
                );
                let file = directory.join("nginx.conf");
                fs::write(&file, text)?;
                let mut command = self.peer("nginx")?;
                command.args(["-e", "stderr", "-c"]).arg(file);
                commands.push(command);
            }
            _ => bail!("{} is no program", kind.name()),
        }
        for mut command in commands {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            let child = command.spawn().with_context(|| format!("{:?} can't be started", command.get_program()))?;
            self.processes.push((kind, Process(child)));
        }
        for port in kind.ports() {
            let listening = self.listening(port, |stand| {
                let ended = stand.processes.iter_mut().filter(|(its, _)| *its == kind);
                ended.map(|(_, one)| one).find_map(|one| one.0.try_wait().ok().flatten().map(|_| said(&mut one.0)))
            });
            listening.with_context(|| format!("{} doesn't listen", kind.name()))?;
        }
        Ok(())
    }

    fn listening(&mut self, port: u16, mut ended: impl FnMut(&mut Self) -> Option<String>) -> Result<()> {
        let end = Instant::now() + START;
        while Instant::now() < end {
            let connect = || TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), Duration::from_secs(1));
            if self.world.host.run(connect).is_ok() {
                return Ok(());
            }
            if let Some(said) = ended(self) {
                bail!("it has ended: {said}");
            }
            thread::sleep(Duration::from_millis(50));
        }
        bail!("nothing listens on port {port} after {} s", START.as_secs())
    }

    /// A peer's program in the namespace: of the directory into which its packages were unpacked, or the machine's.
    fn peer(&self, name: &str) -> Result<Command> {
        let places = [peers().join("usr/sbin"), "/usr/sbin".into(), "/usr/bin".into(), "/usr/libexec/docker".into()];
        let found = places.iter().map(|place| place.join(name)).find(|path| path.is_file());
        // docker-proxy says on descriptor 3 that it listens, and closes that then, whatever it is.
        let mut command = self.world.host.command("sh");
        command.args(["-c", "exec \"$0\" \"$@\" 3>/dev/null"]);
        command.arg(found.with_context(|| format!("{name} isn't there"))?);
        command.env("LD_LIBRARY_PATH", peers().join("usr/lib").join(format!("{}-linux-gnu", std::env::consts::ARCH)));
        Ok(command)
    }

    fn ask_moto(&mut self) -> Result<()> {
        let python = std::env::var_os("SG_MOTO_PYTHON").context("SG_MOTO_PYTHON names no Python that has Moto")?;
        let mut moto = self.world.host.command(python);
        moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &MOTO.to_string()]);
        moto.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self._moto = Some(Process(moto.spawn().context("Moto can't be started")?));
        self.listening(MOTO, |_| None)?;
        let asker = Asker::start(&self.world.host, Kind::AsksMoto.ports()[0], self.servers[0].address);
        self.asker = Some(asker?);
        Ok(())
    }
}

/// Where `cargo xtask bench` unpacks peers' packages.
fn peers() -> PathBuf {
    std::env::var_os("SG_BENCH_PEERS").map(PathBuf::from).unwrap_or_else(|| "/nonexistent".into())
}

fn agent(world: &World) -> Agent {
    let mut agent = Agent::new(Some(&world.host));
    let mut rules = Rules::new(agent.directory().join("rules.json"));
    let instance = &world.instances[0];
    rules.ingress("sg-b", &["tcp 80-81 0.0.0.0/0"]).instance(&instance.id(), &["sg-b"], &instance.addresses());
    rules.write();
    agent.arguments(["--no-docker", "--rules"]).arguments([rules.path()]);
    agent.arguments(["--attach".to_owned(), format!("{}={}", instance.id(), instance.link)]);
    for (port, target) in Kind::Ours.ports().into_iter().zip(PORTS) {
        agent.arguments(["--publish".to_owned(), format!("{}:127.0.0.1:{port}={target}", instance.id())]);
    }
    agent.start().wait();
    agent
}

fn said(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        // What can't be read isn't told.
        let _ = stderr.read_to_string(&mut text);
    }
    text.trim().to_owned()
}

/// A process and its children.
fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children.flat_map(family)).collect()
}

/// A process's processor time in seconds: its own and the kernel's for it.
fn ticks(pid: u32) -> f64 {
    /// `USER_HZ`, the same on every architecture that Linux runs on today.
    const HZ: f64 = 100.0;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    // Fields 14 and 15; the third is the first behind the name.
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (field(14) + field(15)) / HZ
}

/// A proxy that asks Moto who may connect, at each connection: the instance's groups, then their rules.
#[derive(Debug)]
struct Asker {
    stopping: Arc<AtomicBool>,
    port: u16,
    namespace: fs::File,
    threads: Vec<JoinHandle<()>>,
}

impl Asker {
    fn start(namespace: &Namespace, port: u16, to: SocketAddr) -> Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let listener = Arc::new(namespace.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)))?);
        let threads = (0..8)
            .map(|_| {
                let (listener, stopping, handle) = (Arc::clone(&listener), Arc::clone(&stopping), namespace.handle());
                thread::spawn(move || {
                    if nix::sched::setns(&handle, nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                        return;
                    }
                    while let Ok((client, _)) = listener.accept() {
                        if stopping.load(Ordering::Relaxed) {
                            return;
                        }
                        // The client sees it.
                        let _ = relay(client, to);
                    }
                })
            })
            .collect();
        Ok(Self { stopping, port, namespace: namespace.handle(), threads })
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        let (namespace, port, threads) = (&self.namespace, self.port, self.threads.len());
        thread::scope(|scope| {
            scope.spawn(|| {
                if nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).is_ok() {
                    for _ in 0..threads {
                        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
                    }
                }
            });
        });
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn relay(mut client: TcpStream, to: SocketAddr) -> std::io::Result<()> {
    for action in ["DescribeInstances", "DescribeSecurityGroups"] {
        ask(action)?;
    }
    client.set_nodelay(true)?;
    let mut server = TcpStream::connect(to)?;
    server.set_nodelay(true)?;
    // An exchange of single bytes is all that it is measured by.
    let mut byte = [0];
    while client.read(&mut byte)? > 0 {
        server.write_all(&byte)?;
        server.read_exact(&mut byte)?;
        client.write_all(&byte)?;
    }
    server.shutdown(Shutdown::Write)
}

fn ask(action: &str) -> std::io::Result<()> {
    let mut moto = TcpStream::connect((Ipv4Addr::LOCALHOST, MOTO))?;
    moto.set_read_timeout(Some(START))?;
    let body = format!("Action={action}&Version=2016-11-15");
    write!(
        moto,
        "POST / HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/ec2/aws4_request\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    moto.read_to_string(&mut answer)?;
    if answer.split(' ').nth(1) == Some("200") {
        Ok(())
    } else {
        Err(std::io::Error::other(format!("Moto doesn't answer {action}")))
    }
}
