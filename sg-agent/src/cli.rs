//! The command line: what each option is called, means and defaults to. Raw arguments only; `main` makes the
//! daemon's options of them.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use sg_common::abi::{DEFAULT_ALLOWANCE, MAX_FLOWS};
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};

use crate::daemon::EnforcedBridge;
use crate::discovery::{AttachSpec, names};
use crate::early::EarlyDrop;
use crate::exempt::Service;
use crate::explain::Party;
use crate::launcher::{ImageSpec, parse_image, parse_range};
use crate::model::InstanceId;
use crate::proxy::PublishSpec;

/// Makes EC2 security groups real on this machine: reads them from any EC2-compatible API and enforces them in the
/// kernel, on the veths of the containers that stand for instances.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Where this agent is.
    #[command(flatten)]
    pub places: PlaceArgs,
}

/// Options of every subcommand: which agent is meant.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Directory of the agent's control socket and lock
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/sg-agent", env = "SG_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Directory on bpffs where programs and flows stay when the agent goes
    #[arg(long, global = true, value_name = "DIR", default_value = "/sys/fs/bpf/sg-agent", env = "SG_BPFFS")]
    pub bpffs: PathBuf,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent: enforce security groups until stopped, and keep them enforced after
    Run(Box<RunArgs>),
    /// Show what is enforced: instances, groups, policies, counters, published ports
    Status(StatusArgs),
    /// Tell the published ports: which port of the host leads to which port of which instance
    Ports(PortsArgs),
    /// Say whether a packet would pass, by which rule, or which rule comes nearest
    Explain(ExplainArgs),
    /// Take all enforcement of this agent away: programs, pins, flows
    Detach(DetachArgs),
}

/// `sg-agent run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The EC2 API to read from [env: AWS_ENDPOINT_URL_EC2, AWS_ENDPOINT_URL]
    #[arg(long, value_name = "URL", conflicts_with = "rules", help_heading = "Rules")]
    pub endpoint_url: Option<String>,
    /// The region [env: AWS_REGION, AWS_DEFAULT_REGION; default: the profile's, or us-east-1]
    #[arg(long, value_name = "REGION", help_heading = "Rules")]
    pub region: Option<String>,
    /// The account, where an emulator has several
    #[arg(long, value_name = "ID", help_heading = "Rules")]
    pub account: Option<String>,
    /// Read rules, instances and interfaces from a JSON file as 'aws ec2 describe-*' prints them; read again when it
    /// changes
    #[arg(long, value_name = "FILE", help_heading = "Rules")]
    pub rules: Option<PathBuf>,
    /// Seconds between two polls of the endpoint
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds, help_heading = "Rules")]
    pub poll_interval: Duration,
    /// Where clients reach the endpoint through the agent, so that a change is enforced when they have its answer
    /// [default: 127.0.0.1:4566, where the endpoint is an emulator]
    #[arg(long, value_name = "ADDR:PORT", conflicts_with_all = ["rules", "no_gateway"], help_heading = "Gateway")]
    pub gateway: Option<SocketAddr>,
    /// No gateway: changes are noticed by polling
    #[arg(long, help_heading = "Gateway")]
    pub no_gateway: bool,
    /// Seconds that the answer to a change waits until it is enforced; then it passes with a header that says so
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds, help_heading = "Gateway")]
    pub commit_timeout: Duration,

    /// Serve what 'status' says to Prometheus, at /metrics of this address
    #[arg(long, value_name = "ADDR:PORT", help_heading = "Observation")]
    pub metrics: Option<SocketAddr>,

    /// Don't give an emulator's default groups the rule that AWS's have (all traffic from themselves)
    #[arg(long, help_heading = "Rules")]
    pub no_default_self_rule: bool,

    /// Don't look for instances among Docker's containers
    #[arg(long, help_heading = "Instances")]
    pub no_docker: bool,
    /// Enforce on a host-side link that Docker doesn't know: a veth, a VM's tap (repeatable)
    #[arg(long, value_name = "INSTANCE_ID=LINK[,ip=ADDR][,mac=MAC][,eni=ENI]", help_heading = "Instances")]
    pub attach: Vec<AttachSpec>,
    /// Deny a new port of this bridge everything, from its first packet, until it is known whose it is; 'auto' is every
    /// bridge that an instance is on (repeatable)
    #[arg(long, value_name = "auto|BRIDGE", value_parser = bridge, help_heading = "Instances")]
    pub enforce_bridge: Vec<EnforcedBridge>,
    /// Publish an instance's port on the host; the client's own address is checked at each connection (repeatable)
    #[arg(long, value_name = "INSTANCE_ID:[ADDR:]HOST_PORT=PORT[/udp]", help_heading = "Published ports")]
    pub publish: Vec<PublishSpec>,
    /// What denied clients of published ports see: nothing, so that they time out, or a refused connection (TCP)
    #[arg(long, value_enum, default_value_t = Deny::Drop, help_heading = "Published ports")]
    pub deny: Deny,
    /// Where they are denied before the handshake: 'auto' is every link by which a published port is reached, 'off'
    /// leaves it to the proxy, which resets them after it
    #[arg(long, value_name = "auto|off|LINK[,LINK]", default_value = "auto", help_heading = "Published ports")]
    pub early_drop: EarlyDrop,
    /// Ask the endpoint at each connection, and let nobody in on an answer that is older; who comes meanwhile shares one
    /// question. Nothing is denied before the handshake then
    #[arg(long, value_enum, value_name = "WHOM", conflicts_with = "rules", help_heading = "Published ports")]
    pub live: Option<Live>,
    /// A balancer's network, which must say by the PROXY protocol (version 1 or 2) who its clients are; they are judged
    /// in its place, after the handshake (repeatable)
    #[arg(long, value_name = "CIDR", value_parser = network, help_heading = "Published ports")]
    pub trust_proxy: Vec<IpNet>,
    /// Tell instances of each connection's client by a PROXY header, which their servers have to expect
    #[arg(long, value_enum, value_name = "VERSION", help_heading = "Published ports")]
    pub proxy_protocol: Option<ProxyProtocol>,

    /// Seconds that a connection to a published port waits for rules that may be out of date to be read anew
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds, help_heading = "Published ports")]
    pub fresh_timeout: Duration,

    /// Make a container of every instance that the endpoint has: for emulators that only keep book, as Moto
    #[arg(long, conflicts_with_all = ["rules", "no_docker"], help_heading = "Launching")]
    pub launch: bool,
    /// The image that stands for a machine image, by its id or name; '*' stands for any text (repeatable)
    #[arg(long, value_name = "AMI=IMAGE", requires = "launch", help_heading = "Launching")]
    pub launch_image: Vec<ImageSpec>,
    /// The image of all others [default: sg-agent/instance:latest, which 'cargo xtask run' makes]
    #[arg(long, value_name = "IMAGE", value_parser = parse_image, requires = "launch", help_heading = "Launching")]
    pub launch_default_image: Option<String>,
    /// The same from a TOML file: default = "IMAGE", and a table [images] of "AMI" = "IMAGE"
    #[arg(long, value_name = "FILE", requires = "launch", help_heading = "Launching")]
    pub launch_config: Option<PathBuf>,
    /// The host's ports at which launched instances' ports are published
    #[arg(long, value_name = "FIRST-LAST", default_value = "32000-32767", value_parser = parse_range, help_heading = "Launching")]
    pub launch_ports: RangeInclusive<u16>,

    /// What a revoked rule does to tracked flows: 'aws' lets them end by themselves, 'cut' ends them at once
    #[arg(long, value_enum, default_value_t = OnRevoke::Aws, help_heading = "Semantics")]
    pub on_revoke: OnRevoke,
    /// Whether an instance without a security group may do everything or nothing
    #[arg(long, value_enum, default_value_t = NoGroup::Allow, help_heading = "Semantics")]
    pub no_group: NoGroup,
    /// What holds for an instance that the control plane doesn't know, or no longer, or can't be asked about: 'deny'
    /// denies it everything; 'last' lets the last policy stand and denies what was never known; 'allow' lets the last
    /// policy stand and allows everything to what was never known
    #[arg(long, value_enum, default_value_t = Unknown::Last, help_heading = "Semantics")]
    pub unknown: Unknown,
    /// Whether ICMP errors about tracked flows pass by themselves, or need a rule
    #[arg(long, value_enum, default_value_t = IcmpErrors::Related, help_heading = "Semantics")]
    pub icmp_errors: IcmpErrors,
    /// A service that groups do not filter, beside AWS's own and the gateways' DNS and DHCP (repeatable)
    #[arg(long, value_name = "ADDR:PORT/PROTOCOL", help_heading = "Semantics")]
    pub exempt: Vec<Service>,
    /// Idle seconds after which an established TCP flow is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 432_000, value_parser = clap::value_parser!(u64).range(60..=432_000), help_heading = "Semantics")]
    pub tcp_established_timeout: u64,
    /// Idle seconds after which a UDP flow of more than one exchange is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(60..=180), help_heading = "Semantics")]
    pub udp_stream_timeout: u64,
    /// Idle seconds after which any other UDP flow is forgotten
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(30..=60), help_heading = "Semantics")]
    pub udp_timeout: u64,
    /// Tracked flows that one interface may have at a time; new ones beyond are dropped and counted
    #[arg(long, value_name = "FLOWS", default_value_t = DEFAULT_ALLOWANCE, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_FLOWS)), help_heading = "Semantics")]
    pub conntrack_allowance: u32,

    /// Log every packet that is dropped, with its reason (slow: for looking into one problem)
    #[arg(long)]
    pub log_drops: bool,
    /// End enforcement when the agent ends
    #[arg(long)]
    pub detach_on_exit: bool,
}

/// SG-3.4.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum OnRevoke {
    /// As AWS does.
    Aws,
    /// As people who test a revoke want it.
    Cut,
}

/// SG-7.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Deny {
    /// As AWS does.
    Drop,
    /// As a closed port does.
    Reject,
}

/// Who is asked about a connection, instead of the rules in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Live {
    /// The endpoint.
    Endpoint,
}

/// How instances are told of clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ProxyProtocol {
    /// The binary header.
    V2,
}

/// SG-2.5.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum NoGroup {
    /// Everything is allowed, with a warning.
    Allow,
    /// Everything is denied.
    Deny,
}

/// What isn't known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Unknown {
    /// It is denied everything.
    Deny,
    /// The last that was known.
    Last,
    /// The last that was known, or everything.
    Allow,
}

/// SG-3.7.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum IcmpErrors {
    /// They pass.
    Related,
    /// A rule has to allow them.
    Strict,
}

/// `sg-agent status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print JSON (a stable interface)
    #[arg(long)]
    pub json: bool,
    /// Read everything anew and wait until it is enforced; fail after so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub wait: Option<Duration>,
}

/// `sg-agent ports`.
#[derive(Debug, Args)]
pub struct PortsArgs {
    /// Only this instance's
    #[arg(value_name = "INSTANCE")]
    pub instance: Option<InstanceId>,
    /// Print JSON (a stable interface)
    #[arg(long)]
    pub json: bool,
}

/// `sg-agent explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Where the packet goes: an instance, whose ingress rules are asked at its primary interface, one of its interfaces, or
    /// an address
    #[arg(long, value_name = "INSTANCE|ENI|ADDR", value_parser = party)]
    pub to: Party,
    /// Where it comes from: an address, or an instance or interface, whose egress rules are asked
    #[arg(long, value_name = "ADDR|INSTANCE|ENI", value_parser = party)]
    pub from: Party,
    /// tcp, udp, icmp, icmpv6 or a protocol number
    #[arg(long, value_name = "PROTOCOL", default_value = "tcp", value_parser = protocol)]
    pub proto: u8,
    /// The destination port
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// ICMP's type and code, as 8/0
    #[arg(long, value_name = "TYPE/CODE", conflicts_with = "port", value_parser = icmp)]
    pub icmp_type: Option<u16>,
    /// Put such a packet through the attached programs too, and say if they disagree
    #[arg(long)]
    pub live: bool,
    /// Insist that --from is an instance, and its egress rules alone are asked
    #[arg(long)]
    pub egress: bool,
    /// Print JSON (a stable interface)
    #[arg(long)]
    pub json: bool,
}

/// `sg-agent detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let error = || format!("'{text}' is not a number of seconds between 0.05 and 86400");
    let seconds: f64 = text.parse().map_err(|_| error())?;
    if (0.05..=86_400.0).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(error()) }
}

fn bridge(text: &str) -> Result<EnforcedBridge, String> {
    if text == "auto" {
        return Ok(EnforcedBridge::Auto);
    }
    names::link(text).map(|name| EnforcedBridge::Named(name.to_owned()))
}

fn network(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse()
        .or_else(|_| address())
        .map_err(|_| format!("'{text}' is neither a network such as 10.0.0.0/8 nor an address"))
}

fn party(text: &str) -> Result<Party, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Party::Address(address));
    }
    if text.contains(['.', ':', '/']) {
        return Err(format!("'{text}' is neither an IP address nor an instance id"));
    }
    Ok(Party::Instance(text.into()))
}

fn protocol(text: &str) -> Result<u8, String> {
    match text {
        "tcp" => Ok(TCP),
        "udp" => Ok(UDP),
        "icmp" => Ok(ICMP),
        "icmpv6" => Ok(ICMPV6),
        _ => text.parse().map_err(|_| format!("'{text}' is not tcp, udp, icmp, icmpv6 or a number from 0 to 255")),
    }
}

fn icmp(text: &str) -> Result<u16, String> {
    let error = || format!("'{text}' is not an ICMP type and code such as 8/0");
    let (kind, code) = text.split_once('/').unwrap_or((text, "0"));
    let (kind, code): (u8, u8) = (kind.parse().map_err(|_| error())?, code.parse().map_err(|_| error())?);
    Ok(u16::from_be_bytes([kind, code]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_reads_what_its_help_shows() {
        let cli = Cli::try_parse_from([
            "sg-agent",
            "run",
            "--endpoint-url",
            "http://127.0.0.1:5000",
            "--attach",
            "i-1=veth0,ip=10.0.0.5",
            "--publish",
            "i-1:32022=22",
            "--publish",
            "i-1:[::]:5353=53/udp",
            "--early-drop",
            "lo,eth0",
            "--trust-proxy",
            "192.0.2.7",
            "--proxy-protocol",
            "v2",
            "--live",
            "endpoint",
            "--exempt",
            "192.0.2.53:53/udp",
            "--on-revoke",
            "cut",
            "--state-dir",
            "/tmp/x",
        ])
        .unwrap();
        assert_eq!(cli.places.state_dir, PathBuf::from("/tmp/x"));
        let cli = Cli::try_parse_from([
            "sg-agent",
            "explain",
            "--to",
            "i-1",
            "--from",
            "10.0.0.1",
            "--proto",
            "icmp",
            "--icmp-type",
            "8/0",
        ]);
        let Command::Explain(explain) = cli.unwrap().command else { panic!("explain") };
        assert_eq!((explain.proto, explain.icmp_type), (1, Some(8 << 8)));
    }

    #[test]
    fn values_out_of_aws_ranges_are_refused() {
        for option in ["--tcp-established-timeout=59", "--udp-stream-timeout=181", "--udp-timeout=29"] {
            assert!(Cli::try_parse_from(["sg-agent", "run", option]).is_err(), "{option}");
        }
    }
}
