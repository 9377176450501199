//! Two containers on one bridge, with a filter between them: ours, the kernel's others, or none. Everything is in
//! namespaces of its own and goes with the value.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Stdio;

use ::tests::e2e::{Agent, Namespace, Rules, World};
use ::tests::programs::{self, Hook};
use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;

/// The port that the last rule is about.
pub const PORT: u16 = 7_000;
/// A port that no rule is about.
pub const DENIED: u16 = 9;
/// The first port of the other rules.
const FIRST: u16 = 20_000;

/// What filters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// Nothing.
    None,
    /// A TCX program in each place of ours that passes everything.
    Null,
    /// A TCX program that drops what goes to the second container.
    TcxDrop,
    /// sg-agent with so many rules.
    Ours(usize),
    /// nftables with so many rules and conntrack.
    Nft(usize),
    /// nftables with one interval set of so many elements, and conntrack.
    NftSet(usize),
    /// iptables-legacy with so many rules and conntrack.
    Iptables(usize),
    /// iptables-legacy with one rule that drops, without conntrack.
    IptablesDrop,
}

impl Filter {
    /// What the report calls it.
    pub fn name(self) -> String {
        match self {
            Self::None => "no filter".into(),
            Self::Null => "null programs".into(),
            Self::TcxDrop => "bare TCX drop".into(),
            Self::Ours(rules) => format!("sg-agent, {rules} rules"),
            Self::Nft(rules) => format!("nft, {rules} rules"),
            Self::NftSet(rules) => format!("nft interval set, {rules} elements"),
            Self::Iptables(rules) => format!("iptables-legacy, {rules} rules"),
            Self::IptablesDrop => "iptables-legacy, one rule".into(),
        }
    }

    fn is_netfilter(self) -> bool {
        matches!(self, Self::Nft(_) | Self::NftSet(_) | Self::Iptables(_) | Self::IptablesDrop)
    }
}

/// The place.
#[derive(Debug)]
pub struct Site {
    /// What filters here.
    pub filter: Filter,
    /// It goes before the links that it is attached to.
    _agent: Option<Agent>,
    _links: Vec<OwnedFd>,
    world: World,
}

impl Site {
    /// Makes it.
    ///
    /// # Errors
    /// A filter that isn't to be had here.
    pub fn new(filter: Filter) -> Result<Self> {
        let world = World::new(&["a", "b"]);
        for namespace in [&world.host, &world.instances[0].namespace, &world.instances[1].namespace] {
            many_connections(namespace);
        }
        world.host.sysctl("net/bridge/bridge-nf-call-iptables", if filter.is_netfilter() { "1" } else { "0" });
        // Some filters drop questions for neighbours as well, and what is to be denied would wait for an answer.
        let server = &world.instances[1];
        let mac = server.mac.map(|byte| format!("{byte:02x}")).join(":");
        world.instances[0].namespace.ip(&format!("neigh replace {} lladdr {mac} dev eth0 nud permanent", server.v4));
        let mut site = Self { filter, _agent: None, _links: Vec::new(), world };
        match filter {
            Filter::None => {}
            Filter::Null => site._links = site.hook(programs::NEXT, &["a", "b"], &[Hook::Ingress, Hook::Egress])?,
            Filter::TcxDrop => site._links = site.hook(programs::SHOT, &["b"], &[Hook::Egress])?,
            Filter::Ours(rules) => site._agent = Some(ours(&site.world, rules, &[])),
            Filter::Nft(rules) => feed(&site.world.host, "nft", &["-f", "-"], &nft(rules))?,
            Filter::NftSet(rules) => feed(&site.world.host, "nft", &["-f", "-"], &nft_set(rules))?,
            Filter::Iptables(rules) => feed(&site.world.host, "iptables-legacy-restore", &[], &iptables(rules))?,
            Filter::IptablesDrop => feed(
                &site.world.host,
                "iptables-legacy-restore",
                &[],
                "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -p udp -j DROP\nCOMMIT\n",
            )?,
        }
        Ok(site)
    }

    /// The container that begins everything.
    pub fn client(&self) -> &Namespace {
        &self.world.instances[0].namespace
    }

    /// The container that serves.
    pub fn server(&self) -> &Namespace {
        &self.world.instances[1].namespace
    }

    /// The server's IPv4 address.
    pub fn address(&self) -> IpAddr {
        self.world.instances[1].v4.into()
    }

    /// The address that the last rule is about.
    pub fn allowed(&self) -> SocketAddr {
        (self.address(), PORT).into()
    }

    /// Without segmentation offload each packet crosses the bridge by itself.
    ///
    /// # Errors
    /// ethtool's.
    pub fn segment_by_hand(&self) -> Result<()> {
        for namespace in [self.client(), self.server()] {
            let mut ethtool = namespace.command("ethtool");
            let output = ethtool.args(["-K", "eth0", "tso", "off", "gso", "off"]).output().context("no ethtool")?;
            ensure!(output.status.success(), "ethtool: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    fn hook(&self, action: i32, names: &[&str], hooks: &[Hook]) -> Result<Vec<OwnedFd>> {
        let program = programs::returning(action)?;
        self.world.host.run(|| {
            let mut links = Vec::new();
            for name in names {
                let index = if_nametoindex(self.world.instance(name).link.as_str())?;
                for hook in hooks {
                    links.push(programs::attach(program.as_fd(), index, *hook).context("TCX needs Linux 6.6")?);
                }
            }
            Ok(links)
        })
    }
}

/// Gives a program of the namespace its rules.
///
/// # Errors
/// What it says of them.
pub fn feed(namespace: &Namespace, program: &str, arguments: &[&str], text: &str) -> Result<()> {
    let mut command = namespace.command(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{program} isn't there"))?;
    child.stdin.take().context("a pipe was asked for")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Thousands of connections a second to one port: ends that linger would use up all ports, or conntrack's table.
pub fn many_connections(namespace: &Namespace) {
    namespace.sysctl("net/ipv4/ip_local_port_range", "1024 65535");
    namespace.sysctl("net/ipv4/tcp_max_tw_buckets", "64");
    namespace.sysctl("net/ipv4/tcp_tw_reuse", "1");
    namespace.run(|| {
        // Not there before something in the namespace uses conntrack, on some kernels.
        let _ = std::fs::write("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1");
    });
}

/// An agent over both containers: what comes to the second has so many rules, of which the last one matches, and
/// everything is tracked. `more` are further arguments.
pub fn ours(world: &World, rules: usize, more: &[&str]) -> Agent {
    let mut agent = Agent::new(Some(&world.host));
    let mut file = Rules::new(agent.directory().join("rules.json"));
    let others: Vec<String> = (0..rules - 1).map(|rule| format!("tcp {} 10.0.1.0/24", FIRST + rule as u16)).collect();
    let (tcp, udp) = (format!("tcp {PORT}-{} 10.0.1.0/24", PORT + 1), format!("udp {PORT} 10.0.1.0/24"));
    let mut ingress: Vec<&str> = others.iter().map(String::as_str).collect();
    ingress.extend([tcp.as_str(), udp.as_str()]);
    for instance in &world.instances {
        let group = format!("sg-{}", instance.name);
        file.ingress(&group, &ingress).egress(&group, &["-1 - 10.0.1.0/24"]);
        file.instance(&instance.id(), &[&group], &instance.addresses());
        agent.arguments(["--attach".to_owned(), format!("{}={}", instance.id(), instance.link)]);
    }
    file.write();
    agent.arguments(["--no-docker", "--rules"]).arguments([file.path()]).arguments(more);
    agent.start().wait();
    agent
}

const ESTABLISHED: &str = "ct state established,related accept";

fn nft(rules: usize) -> String {
    let mut text =
        format!("table ip f {{\n chain c {{\n type filter hook forward priority 0; policy drop;\n {ESTABLISHED}\n");
    for rule in 0..rules - 1 {
        let _ = writeln!(text, " ip saddr 10.0.1.0/24 tcp dport {} accept", usize::from(FIRST) + rule);
    }
    let _ = writeln!(text, " ip saddr 10.0.1.0/24 tcp dport {PORT} accept\n udp dport {PORT} accept\n }}\n}}");
    text
}

fn nft_set(elements: usize) -> String {
    let mut text =
        String::from("table ip f {\n set s {\n type ipv4_addr . inet_service\n flags interval\n elements = {");
    for element in 0..elements - 1 {
        let _ = write!(text, " 10.0.1.0/24 . {},", usize::from(FIRST) + element);
    }
    let _ = write!(text, " 10.0.1.0/24 . {PORT} }}\n }}\n chain c {{\n");
    let _ = writeln!(text, " type filter hook forward priority 0; policy drop;\n {ESTABLISHED}");
    let _ = writeln!(text, " ip saddr . tcp dport @s accept\n udp dport {PORT} accept\n }}\n}}");
    text
}

fn iptables(rules: usize) -> String {
    let mut text =
        String::from("*filter\n:FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n");
    for rule in 0..rules - 1 {
        let _ = writeln!(text, "-A FORWARD -s 10.0.1.0/24 -p tcp --dport {} -j ACCEPT", usize::from(FIRST) + rule);
    }
    let _ = writeln!(
        text,
        "-A FORWARD -s 10.0.1.0/24 -p tcp --dport {PORT} -j ACCEPT\n-A FORWARD -p udp --dport {PORT} -j ACCEPT\nCOMMIT"
    );
    text
}
