//! The executable: parses, does what was asked, and turns the outcome into text and an exit code.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Parser as _;
use sg_agent::cli::{
    Cli, Command, Deny, DetachArgs, ExplainArgs, IcmpErrors, NoGroup, OnRevoke, PlaceArgs, PortsArgs, RunArgs,
    StatusArgs, Unknown,
};
use sg_agent::conntrack_settings::timeouts;
use sg_agent::daemon::{self, LockError, NotRunning, Options, Origins, Places, Reply, Request, ask};
use sg_agent::datapath::Pins;
use sg_agent::exempt::Service;
use sg_agent::explain::Party;
use sg_agent::source::Ec2Options;
use sg_agent::status::PublishedPort;
use sg_agent::{discovery, explain, gateway, launcher, proxy, render, resolve, source};
use sg_common::abi::{CUT_ON_REVOKE, Config, RELATED_ERRORS};
use sg_common::packet::{ICMP, ICMPV6, TCP, UDP};

/// The exit code of what could not be done, beside 1 for "denied" and "not enforced".
const ERROR: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    init_log();
    if let Command::Run(args) = &cli.command
        && let Err(error) = give_up_privileges(&cli.places, args)
    {
        eprintln!("sg-agent: {}", render::clean(&format!("{error:#}")));
        return ExitCode::from(ERROR);
    }
    let places = Places { state_dir: cli.places.state_dir, bpffs: cli.places.bpffs };
    // One for the daemon's work, which may block, and the proxy's connections on all of them.
    let workers = std::thread::available_parallelism().map_or(2, |processors| processors.get().clamp(2, 8));
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("sg-agent: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => daemon::run(options(places, *args)?).await.map(|()| ExitCode::SUCCESS),
            Command::Status(args) => status(&places, &args).await,
            Command::Ports(args) => ports(&places, &args).await,
            Command::Explain(args) => explain_packet(&places, args).await,
            Command::Detach(args) => detach(&places, &args),
        }
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sg-agent: {}", render::clean(&format!("{error:#}")));
            ExitCode::from(ERROR)
        }
    }
}

/// Before there are other threads: each has privileges of its own. Files that it was told to use stay within reach.
fn give_up_privileges(places: &PlaceArgs, args: &RunArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let profiles = if args.rules.is_some() { Vec::new() } else { source::profile_files() };
    let asks_for_command =
        |path: &PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains("credential_process"));
    let may_execute = profiles.iter().any(asks_for_command);
    let read: Vec<PathBuf> = args.rules.iter().cloned().chain(profiles).collect();
    let mut write = vec![places.state_dir.clone(), places.bpffs.clone()];
    let docker = std::env::var("DOCKER_HOST").unwrap_or_default();
    write.extend(docker.strip_prefix("unix://").filter(|_| !args.no_docker).map(PathBuf::from));
    Ok(sg_agent::privileges::restrict(&read, &write, may_execute)?)
}

/// Logs go to standard error; `RUST_LOG` says how much. Colours only for a terminal, and never with `NO_COLOR`.
fn init_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(render::one_line_each)
        .with_ansi(colours)
        .with_target(false)
        .init();
}

fn options(places: Places, args: RunArgs) -> Result<Options> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root to load eBPF programs and enter network namespaces; run it with sudo");
    }
    let origins = match args.rules {
        // One that comes to be unreadable later is waited for; a name that is nothing's is a mistyped one.
        Some(file) if !file.exists() => bail!("--rules {}: there is no such file", file.display()),
        Some(file) => Origins::File(file),
        None => Origins::Endpoint(Ec2Options {
            endpoint: args.endpoint_url,
            region: args.region,
            account: args.account,
            add_default_self_rule: !args.no_default_self_rule,
            ..Ec2Options::default()
        }),
    };
    let launch = match args.launch {
        true => Some(launcher::Options {
            images: launcher::Images::new(args.launch_image, args.launch_default_image, args.launch_config.as_deref())?,
            ports: args.launch_ports,
        }),
        false => None,
    };
    let mut exempt = Service::defaults("/etc/resolv.conf".as_ref());
    exempt.extend(args.exempt);
    let cut = if args.on_revoke == OnRevoke::Cut { CUT_ON_REVOKE } else { 0 };
    let related = if args.icmp_errors == IcmpErrors::Related { RELATED_ERRORS } else { 0 };
    Ok(Options {
        places,
        origins,
        discovery: discovery::Options {
            docker: !args.no_docker,
            attach: args.attach,
            ports: !args.enforce_bridge.is_empty(),
            ..Default::default()
        },
        enforce_bridges: args.enforce_bridge,
        publish: args.publish,
        deny: if args.deny == Deny::Reject { proxy::Deny::Reject } else { proxy::Deny::Drop },
        early_drop: args.early_drop,
        live: args.live.is_some(),
        trust_proxy: args.trust_proxy,
        tell_client: args.proxy_protocol.is_some(),
        poll_interval: args.poll_interval,
        metrics: args.metrics,
        gateway: (!args.no_gateway)
            .then_some(gateway::Options { address: args.gateway, commit_timeout: args.commit_timeout }),
        fresh_timeout: args.fresh_timeout,
        resolve: resolve::Settings {
            deny_without_group: args.no_group == NoGroup::Deny,
            unknown: match args.unknown {
                Unknown::Deny => resolve::Unknown::Deny,
                Unknown::Last => resolve::Unknown::Last,
                Unknown::Allow => resolve::Unknown::Allow,
            },
            exempt,
        },
        config: Config {
            timeouts: timeouts(args.tcp_established_timeout, args.udp_stream_timeout, args.udp_timeout),
            flags: cut | related,
            allowance: args.conntrack_allowance,
            ..Config::default()
        },
        launch,
        log_drops: args.log_drops,
        detach_on_exit: args.detach_on_exit,
    })
}

/// Exit code 0: what is desired is enforced; 1: it isn't.
async fn status(places: &Places, args: &StatusArgs) -> Result<ExitCode> {
    let until = args.wait.map(|patience| Instant::now() + patience);
    let status = loop {
        if let Some(until) = until {
            wait_until(places, until).await?;
        }
        let answer = ask(&places.socket(), &Request::Status).await?;
        let Reply::Status(status) = answer else { bail!("the agent gave no status") };
        // What came between the two answers is waited for, too.
        if status.enforced || until.is_none_or(|until| until <= Instant::now()) {
            break status;
        }
    };
    let text = if args.json { render::json(&*status)? } else { render::status(&status) };
    print(&text)?;
    Ok(if status.enforced { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The published ports, of one instance or of all.
async fn ports(places: &Places, args: &PortsArgs) -> Result<ExitCode> {
    let Reply::Status(status) = ask(&places.socket(), &Request::Status).await? else {
        bail!("the agent gave no status")
    };
    let is_asked = |instance: &str| args.instance.as_ref().is_none_or(|asked| *asked.0 == *instance);
    let ports = status.published.iter().filter(|port| is_asked(&port.instance));
    let ports: Vec<PublishedPort> = ports.map(PublishedPort::from).collect();
    print(&if args.json { render::json(&ports)? } else { render::ports(&ports) })?;
    Ok(ExitCode::SUCCESS)
}

/// The agent may be starting up as well as catching up; one that was killed has left its socket.
async fn wait_until(places: &Places, until: Instant) -> Result<()> {
    let socket = places.socket();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match ask(&socket, &Request::Sync { seconds: left.as_secs_f64() }).await {
            Ok(_) => return Ok(()),
            Err(error) if !left.is_zero() && error.is::<NotRunning>() => {
                tokio::time::sleep(Duration::from_millis(50).min(left)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Exit code 0: allowed; 1: denied.
async fn explain_packet(places: &Places, args: ExplainArgs) -> Result<ExitCode> {
    if args.port.is_some() && !matches!(args.proto, TCP | UDP) {
        bail!("protocol {} has no ports; leave --port out (for ICMP there is --icmp-type)", args.proto);
    }
    let port = match (args.proto, args.port, args.icmp_type) {
        (TCP | UDP, Some(port), _) => port,
        (TCP | UDP, None, _) => bail!("--port is missing: which port is the packet for?"),
        // Echo requests.
        (ICMP, _, kind) => kind.unwrap_or(8 << 8),
        (ICMPV6, _, kind) => kind.unwrap_or(128 << 8),
        _ => 0,
    };
    let (instance, peer, egress) = match (args.from, args.to) {
        (Party::Instance(sender), to @ Party::Address(_)) => (sender, to, true),
        (from, Party::Instance(receiver)) if !args.egress => (receiver, from, false),
        (Party::Instance(_), Party::Instance(_)) => {
            bail!(
                "both ends are instances, and both gates are asked: leave --egress out, or name the receiver by its address"
            )
        }
        (Party::Address(from), _) if args.egress => {
            bail!(
                "--egress asks the rules of the instance that sends, but --from {from} is none: name that by --from, and where it sends to by --to"
            )
        }
        (Party::Address(_), _) => bail!("neither --from nor --to is an instance: whose rules are asked?"),
    };
    let query = explain::Query { instance, peer, protocol: args.proto, port, egress, live: args.live };
    let Reply::Explanation(explanation) = ask(&places.socket(), &Request::Explain(query)).await? else {
        bail!("the agent gave no explanation")
    };
    let text = if args.json { render::json(&explanation)? } else { render::explanation(&explanation) };
    print(&text)?;
    if explanation.kernel_disagrees {
        bail!("the kernel disagrees with the model: please report this, with the output of --json");
    }
    Ok(if explanation.allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn detach(places: &Places, args: &DetachArgs) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root to take programs off links; run it with sudo");
    }
    // A running agent would attach everything again at its next look.
    let _lock = match daemon::lock(&places.state_dir) {
        Ok(lock) => lock,
        Err(LockError::Held { holder, .. }) => {
            bail!("the agent still runs (pid {holder}) and would attach everything again; stop it first")
        }
        Err(error) => return Err(error.into()),
    };
    let _pins = Pins::new(&places.bpffs).lock()?;
    let report = Pins::new(&places.bpffs).remove_all();
    let text = if args.json { render::json(&report)? } else { render::detached(&report) };
    print(&text)?;
    Ok(if report.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A reader that has gone (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
