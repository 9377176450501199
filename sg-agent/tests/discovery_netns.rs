//! Discovery on real links: `--attach` resolved in network namespaces that the tests make, and the watcher's events.
//! The part of the host is played by a namespace too, so nothing of the machine's own is touched. Needs root.

use std::net::IpAddr;
use std::process::{self, Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

use nix::sched::{CloneFlags, setns};
use sg_agent::discovery::{Attachment, Discovered, DiscoveryError, Options, Origin, scan, watch};
use tokio::sync::mpsc;
use tokio::time;

/// How long anything that must happen may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const MAC: [u8; 6] = [0x02, 0x00, 0x5e, 0x00, 0x53, 0x01];
const MAC_TEXT: &str = "02:00:5e:00:53:01";

/// Whether the tests can run; without root they fail, unless SG_ALLOW_SKIP says that they may be skipped.
fn may_run() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(env::var_os("SG_ALLOW_SKIP").is_some(), "needs root for network namespaces; SG_ALLOW_SKIP=1 skips it");
    eprintln!("skipped: needs root for network namespaces");
    false
}

/// A named network namespace; it goes when this is dropped, and its links with it.
struct Namespace(String);

impl Namespace {
    fn new(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // As the end-to-end tests name theirs, who take away what a killed run has left.
        let name = format!("sgt-{}-{}-{role}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name]);
        let namespace = Self(name);
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip` with these words, in the namespace.
    fn ip(&self, words: &str) -> String {
        let arguments: Vec<_> = ["-n", &self.0].into_iter().chain(words.split(' ')).collect();
        run("ip", &arguments)
    }

    fn ifindex(&self, link: &str) -> u32 {
        let text = self.ip(&format!("-o link show dev {link}"));
        text.split(':').next().and_then(|index| index.parse().ok()).expect("a line that starts with the index")
    }

    /// Runs a future on a thread in this namespace.
    fn block_on<T: Send>(&self, future: impl Future<Output = T> + Send) -> T {
        let file = fs::File::open(format!("/run/netns/{}", self.0)).expect("the namespace's file");
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("setns");
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.expect("a runtime").block_on(future)
            });
            inside.join().expect("the thread in the namespace")
        })
    }

    /// What a scan in this namespace finds, without Docker.
    fn scan(&self, specs: &[&str]) -> Discovered {
        self.block_on(scan(&options(specs))).expect("a scan")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// A process that is ended when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("iproute2 is installed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn options(specs: &[&str]) -> Options {
    let attach = specs.iter().map(|spec| spec.parse().expect("a good specification")).collect();
    Options { docker: false, attach, rescan: Duration::from_secs(3600), ..Options::default() }
}

/// A host with a bridge, and a guest on it by a veth: `port` here, `eth0` there.
fn bridged() -> (Namespace, Namespace) {
    let (host, guest) = (Namespace::new("host"), Namespace::new("guest"));
    host.ip("link add name br type bridge");
    host.ip("link set dev br address 02:00:5e:00:53:ff up");
    host.ip("address add 203.0.113.1/24 dev br");
    host.ip("address add 2001:db8:1::1/64 dev br nodad");
    host.ip(&format!("link add name port type veth peer name eth0 address {MAC_TEXT} netns {}", guest.0));
    host.ip("link set port master br up");
    guest.ip("address add 203.0.113.10/24 dev eth0");
    guest.ip("address add 203.0.113.11/24 dev eth0");
    guest.ip("address add 2001:db8:1::10/64 dev eth0 nodad");
    guest.ip("link set eth0 up");
    guest.ip("route add default via 203.0.113.254");
    guest.ip("-6 route add default via 2001:db8:1::fe");
    (host, guest)
}

fn only(found: Discovered) -> Attachment {
    assert_eq!(found.warnings, []);
    let [attachment] = <[_; 1]>::try_from(found.attachments).expect("exactly one attachment");
    attachment
}

fn text<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

#[test]
fn the_other_end_of_a_veth_is_read() {
    if !may_run() {
        return;
    }
    let (host, _guest) = bridged();
    let found = only(host.scan(&["i-web=port,eni=eni-1,account=123456789012,region=us-east-1"]));
    assert_eq!((&*found.instance.0, found.device_index, found.origin), ("i-web", 0, Origin::Flag));
    assert_eq!((found.link.ifindex, found.link.name.as_str()), (host.ifindex("port"), "port"));
    assert_eq!(found.mac, MAC);
    assert_eq!(text(&found.addresses), ["203.0.113.10", "203.0.113.11", "2001:db8:1::10", "fe80::5eff:fe00:5301"]);
    let mut networks = text(&found.networks);
    networks.sort();
    assert_eq!(networks, ["2001:db8:1::/64", "203.0.113.0/24", "fe80::/64"]);
    assert_eq!(
        text(&found.gateways),
        // Not the next hops that the guest's routes name: they aren't the host's.
        ["203.0.113.1", "2001:db8:1::1", "fe80::5eff:fe00:53ff"]
    );
    let (account, region) = (found.account.as_deref(), found.region.as_deref());
    assert_eq!((account, region), (Some("123456789012"), Some("us-east-1")));
}

#[test]
fn a_flags_own_addresses_come_first_and_its_mac_wins() {
    if !may_run() {
        return;
    }
    let (host, _guest) = bridged();
    let found = only(host.scan(&["i-web=port,ip=203.0.113.11,ip=198.51.100.9,mac=02:00:5e:00:53:77"]));
    let want = ["203.0.113.11", "198.51.100.9", "203.0.113.10", "2001:db8:1::10", "fe80::5eff:fe00:5301"];
    assert_eq!(text(&found.addresses), want);
    assert_eq!(found.mac, [0x02, 0, 0x5e, 0, 0x53, 0x77]);
}

#[test]
fn a_namespace_without_a_name_is_found_by_its_process() {
    if !may_run() {
        return;
    }
    let (host, guest) = bridged();
    let sleep = Command::new("ip").args(["netns", "exec", &guest.0, "sleep", "60"]).spawn().expect("iproute2");
    let _process = Process(sleep);
    // `ip` enters the namespace, and then becomes sleep.
    let comm = format!("/proc/{}/comm", _process.0.id());
    while fs::read_to_string(&comm).expect("the process runs").trim() != "sleep" {
        thread::sleep(Duration::from_millis(5));
    }
    drop(guest);
    let found = only(host.scan(&["i-web=port"]));
    assert_eq!((found.mac, found.addresses[0]), (MAC, IpAddr::from([203, 0, 113, 10])));
}

#[test]
fn both_ends_may_be_in_the_hosts_namespace() {
    if !may_run() {
        return;
    }
    let host = Namespace::new("host");
    host.ip(&format!("link add name port type veth peer name other address {MAC_TEXT}"));
    host.ip("address add 203.0.113.10/24 dev other");
    host.ip("address add 203.0.113.9/24 dev port");
    let found = only(host.scan(&["i-web=port"]));
    assert_eq!((found.mac, found.link.ifindex), (MAC, host.ifindex("port")));
    assert_eq!(
        (text(&found.addresses), text(&found.gateways)),
        (vec!["203.0.113.10".into()], vec!["203.0.113.9".into()])
    );
}

#[test]
fn a_tap_needs_to_be_told_its_guests_mac() {
    if !may_run() {
        return;
    }
    let (host, _guest) = bridged();
    host.ip("tuntap add dev tap0 mode tap");
    host.ip("link set tap0 master br");
    let found = host.scan(&["i-vm=tap0,ip=203.0.113.20"]);
    assert_eq!(found.attachments, []);
    let [warning] = &found.warnings[..] else { panic!("one warning: {:?}", found.warnings) };
    assert_eq!(warning.subject, "--attach i-vm=tap0");
    assert!(warning.problem.contains("pass mac=MAC"), "{warning}");

    let found = only(host.scan(&[&format!("i-vm=tap0,ip=203.0.113.20,mac={MAC_TEXT}")]));
    assert_eq!((found.mac, found.link.ifindex), (MAC, host.ifindex("tap0")));
    assert_eq!(
        (text(&found.addresses), text(&found.networks)),
        (vec!["203.0.113.20".into()], vec!["203.0.113.0/24".into()])
    );
    assert_eq!(found.gateways[0], IpAddr::from([203, 0, 113, 1]));
}

#[test]
fn links_that_are_not_there_shared_or_twice_are_told_and_the_rest_is_attached() {
    if !may_run() {
        return;
    }
    let (host, guest) = bridged();
    let specs = ["i-web=port", "i-other=port", "i-late=late", "i-bridge=br", "i-lo=lo", "i-web=second"];
    let found = host.scan(&specs);
    let subjects: Vec<_> = found.warnings.iter().map(|warning| warning.subject.as_str()).collect();
    let late = ["--attach i-bridge=br", "--attach i-late=late", "--attach i-lo=lo", "--attach i-other=port"];
    assert_eq!(subjects, [&late[..], &["--attach i-web=second"]].concat());
    assert_eq!((&*only_of(&found, "port").instance.0, found.attachments.len()), ("i-web", 1));

    host.ip(&format!("link add name late type veth peer name eth1 netns {}", guest.0));
    host.ip(&format!("link add name second type veth peer name eth2 netns {}", guest.0));
    guest.ip("address add 198.51.100.2/24 dev eth1");
    let found = host.scan(&specs);
    assert_eq!(found.attachments.len(), 3, "{found:?}");
    assert_eq!(text(&only_of(&found, "late").addresses), ["198.51.100.2"]);
    let second = only_of(&found, "second");
    assert_eq!((second.device_index, second.addresses.len()), (1, 0));
    assert!(found.warnings.iter().any(|w| w.subject == "--attach i-web=second" && w.problem.contains("pass ip=ADDR")));
}

fn only_of<'a>(found: &'a Discovered, link: &str) -> &'a Attachment {
    found.attachments.iter().find(|attachment| attachment.link.name == link).expect("an attachment of that link")
}

#[test]
fn without_docker_the_flags_links_are_still_told() {
    if !may_run() {
        return;
    }
    let (host, _guest) = bridged();
    let socket = "unix:///nonexistent/sgt-docker.sock";
    let options = Options { docker: true, docker_host: Some(socket.to_owned()), ..options(&["i-web=port"]) };
    match host.block_on(scan(&options)) {
        Err(error @ DiscoveryError::Docker { .. }) => {
            assert!(error.to_string().contains(socket), "{error}");
            let DiscoveryError::Docker { attached, .. } = error else { unreachable!("matched above") };
            assert_eq!(only(*attached).mac, MAC);
        }
        other => panic!("docker isn't there, but: {other:?}"),
    }
}

#[test]
fn links_and_addresses_that_change_are_heard_of_at_once() {
    if !may_run() {
        return;
    }
    let (host, guest) = bridged();
    // The host numbers the guest's namespace when it first lists the link that leads there.
    only(host.scan(&["i-web=port"]));
    let options = options(&[]);
    host.block_on(async {
        let (tx, mut rx) = mpsc::channel(1);
        let watcher = watch(&options, tx);
        let driver = async {
            let quiet = Duration::from_millis(400);
            while time::timeout(quiet, rx.recv()).await.is_ok() {}
            for change in [
                (&host, "link add name br2 type bridge"),
                (&host, "address add 198.51.100.1/24 dev br2"),
                (&guest, "address add 203.0.113.12/24 dev eth0"),
                (&guest, "address add 2001:db8:1::12/64 dev eth0 nodad"),
                (&host, "link del dev br2"),
            ] {
                change.0.ip(change.1);
                let heard = time::timeout(PATIENCE, rx.recv()).await;
                assert_eq!(heard, Ok(Some(())), "{}", change.1);
                while time::timeout(quiet, rx.recv()).await.is_ok() {}
            }
            drop(rx);
        };
        let (ended, ()) = tokio::join!(watcher, driver);
        ended.expect("the watcher ends when nobody listens");
    });
}

#[test]
fn a_rescan_is_asked_for_even_if_nothing_is_heard() {
    if !may_run() {
        return;
    }
    let host = Namespace::new("host");
    let options = Options { rescan: Duration::from_millis(50), ..options(&[]) };
    let heard = host.block_on(async {
        let (tx, mut rx) = mpsc::channel(1);
        let mut heard = 0;
        let count = async {
            while heard < 3 && rx.recv().await.is_some() {
                heard += 1;
            }
        };
        tokio::select! {
            ended = watch(&options, tx) => ended.expect("a watcher"),
            () = count => {}
            () = time::sleep(PATIENCE) => {}
        }
        heard
    });
    assert_eq!(heard, 3);
}
