//! A proxy on loopback with an instance behind it: snapshots made by hand and compiled for real, clients with an
//! address of their own, servers that do what a test wants. Asserts nothing about the proxy.

pub mod ports;

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use sg_agent::apply::{Enforced, Snapshot};
use sg_agent::compile::compile;
use sg_agent::model::{GroupId, InstanceId, Peer, RuleId, Scope, Traffic};
use sg_agent::proxy::{PortCounters, Proxy, Published, Transport};
use sg_agent::resolve::{AclRules, AclSpec, Allowance, GroupSpec, Interface, Peers, PolicyKey, Spec};
use sg_agent::sharing::Table;
use sg_agent::tables::InMemory;
use sg_common::abi::{self, Binding, NOWHERE};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

/// Longer than anything here takes on a busy machine; only a failure waits for it.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits for something that has to happen.
pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.expect("it has to happen within the limit")
}

/// Looks again and again until a condition holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let looking = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, looking).await.is_ok(), "{what}");
}

/// The rules of the one instance.
#[derive(Clone, Default)]
pub struct Rules {
    /// Sources from which its port may be reached.
    pub from: Vec<&'static str>,
    /// Whether every reply may leave, which makes flows from any source untracked.
    pub is_egress_free: bool,
    /// Sources that its network ACL denies, if it has one.
    pub acl_denies: Option<Vec<&'static str>>,
}

impl Rules {
    pub fn from(sources: &[&'static str]) -> Self {
        Self { from: sources.to_vec(), ..Self::default() }
    }
}

fn networks(network: &str) -> Peers {
    Peers::Networks(Arc::new(BTreeSet::from([network.parse().unwrap()])))
}

fn allowance(traffic: Traffic, network: &str) -> Allowance {
    let peer = match network.parse().unwrap() {
        IpNet::V4(network) => Peer::Ipv4(network),
        IpNet::V6(network) => Peer::Ipv6(network),
    };
    Allowance { id: RuleId::from("sgr-1"), group: GroupId::from("sg-1"), traffic, peer, peers: networks(network) }
}

/// What is enforced for an instance at `server` with these rules.
pub fn snapshot(server: SocketAddr, rules: &Rules) -> Arc<Snapshot> {
    const GROUPS: u32 = 1;
    const ACL: u32 = 2;
    let (from, to) = (server.port(), server.port());
    let ports = [Traffic::Tcp { from, to }, Traffic::Udp { from, to }];
    let everywhere = if rules.is_egress_free { vec!["0.0.0.0/0", "::/0"] } else { Vec::new() };
    let groups = GroupSpec {
        ingress: rules.from.iter().flat_map(|source| ports.map(|port| allowance(port, source))).collect(),
        egress: everywhere.into_iter().map(|network| allowance(Traffic::All, network)).collect(),
    };
    let mut tables = InMemory::default();
    let mut bind = |slot, spec| {
        tables.bindings.insert(slot, Binding { policy: slot, epoch: 1 });
        tables.policies.insert(slot, Arc::new(compile(&spec).unwrap()));
    };
    bind(GROUPS, Spec::Groups(groups));
    if let Some(denied) = &rules.acl_denies {
        let entry = |number, allow, network| AclSpec { number, allow, traffic: Traffic::All, peers: networks(network) };
        let mut ingress: Vec<_> = (1..).zip(denied).map(|(number, source)| entry(number, false, source)).collect();
        ingress.push(entry(100, true, "0.0.0.0/0"));
        bind(ACL, Spec::Acl(AclRules { ingress, egress: Vec::new() }));
    }
    let interface = Interface {
        link: "veth7".into(),
        instance: InstanceId::from("i-1"),
        scope: Scope { account: "123456789012".into(), region: "us-east-1".into() },
        eni: None,
        groups: BTreeSet::new(),
        policy: PolicyKey::Unknown,
        acl: None,
        vpc: 1,
        mac: [2, 0, 0, 0, 0, 7],
        addresses: vec![server.ip()],
        prefixes: Vec::new(),
        subnet_number: None,
        subnet: Vec::new(),
        source_dest_check: true,
    };
    let acl = if rules.acl_denies.is_some() { ACL } else { 0 };
    let (subnet4, subnet6) = (NOWHERE, NOWHERE);
    let (mask4, mask6) = (NOWHERE, NOWHERE);
    let entry =
        abi::Interface { groups: GROUPS, acl, vpc: 1, subnet4, mask4, subnet6, mask6, ..abi::Interface::default() };
    let interfaces = Table::from([(7, Enforced { interface: interface.into(), entry, attached: true })]);
    Arc::new(Snapshot { interfaces, tables, ..Snapshot::default() })
}

/// A published port of an instance, whose sockets `server` accepts.
pub struct Scene {
    /// The instance's listening socket.
    pub server: TcpListener,
    /// Where it is.
    pub instance: SocketAddr,
    /// The rules in force.
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    /// What is tested.
    pub proxy: Proxy,
    /// The published port.
    pub published: Published,
    /// Where clients connect to.
    pub at: SocketAddr,
}

impl Scene {
    /// Opens the port, with the proxy's settings changed by `with`.
    pub async fn with(rules: Rules, mark: u32, with: impl FnOnce(Proxy) -> Proxy) -> Self {
        let server = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let instance = server.local_addr().unwrap();
        let (snapshots, receiver) = watch::channel(snapshot(instance, &rules));
        let mut proxy = with(Proxy::new(receiver, mark));
        let at = free_socket();
        let published = publish(at, instance);
        assert_eq!(proxy.reconcile(vec![published.clone()]).await, []);
        Self { server, instance, snapshots, proxy, published, at }
    }

    /// The same with the settings as they are by default.
    pub async fn new(rules: Rules) -> Self {
        Self::with(rules, 0, |proxy| proxy).await
    }

    /// Puts other rules in force.
    pub fn enforce(&self, rules: &Rules) {
        self.snapshots.send(snapshot(self.instance, rules)).unwrap();
    }

    /// A client's connection, and the instance's end of it.
    pub async fn connected(&self, from: &str) -> (TcpStream, TcpStream) {
        let client = connect(from, self.at).await.unwrap();
        let (server, _) = within(self.server.accept()).await.unwrap();
        (client, server)
    }

    /// The port's counters.
    pub fn counters(&self) -> PortCounters {
        self.proxy.counters().pop().expect("the port is published").1
    }

    /// Whether somebody waits in the instance's accept queue.
    pub fn is_knocked_at(&self) -> bool {
        SockRef::from(&self.server).accept().is_ok()
    }
}

/// A published port at one socket of this host.
pub fn publish(at: SocketAddr, instance: SocketAddr) -> Published {
    let (host_port, port) = (at.port(), instance.port());
    Published { instance: InstanceId::from("i-1"), bind: vec![at.ip()], host_port, port, transport: Transport::Tcp }
}

/// A socket that nobody has, at an address of this host that no other test of this process has.
pub fn free_socket() -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 64 | pid[2] & 0x3f, pid[3], NEXT.fetch_add(1, Ordering::Relaxed));
    std::net::TcpListener::bind((address, 0)).unwrap().local_addr().unwrap()
}

/// Connects from an address.
pub async fn connect(from: &str, to: SocketAddr) -> io::Result<TcpStream> {
    let from: IpAddr = from.parse().unwrap();
    let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(SocketAddr::new(from, 0))?;
    within(socket.connect(to)).await
}

/// Whether a client is turned away with a reset: at once, or by the time that it reads.
pub async fn is_reset(from: &str, to: SocketAddr) -> bool {
    match connect(from, to).await {
        Ok(mut client) => ends_in_reset(&mut client).await,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

/// Reads to the end, which has to be a reset.
pub async fn ends_in_reset(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    within(stream.read_to_end(&mut rest)).await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

/// Closes a stream with a reset.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Sends a word one way and back.
pub async fn talk((client, server): &mut (TcpStream, TcpStream)) {
    pass_on(client, server).await;
    pass_on(server, client).await;
}

async fn pass_on(from: &mut TcpStream, to: &mut TcpStream) {
    within(from.write_all(b"word")).await.unwrap();
    let mut word = [0; 4];
    within(to.read_exact(&mut word)).await.unwrap();
    assert_eq!(&word, b"word");
}
