//! UDP through the proxy: a flow for each client, judged, bounded, idle after a while.

use std::net::SocketAddr;
use std::time::Duration;

use sg_agent::apply::Snapshot;
use sg_agent::proxy::{IdleTimes, OnRevoke, PortCounters, Proxy, Published, Transport};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;

use crate::support::{Rules, connect, free_socket, publish, snapshot, talk, until, within};
use crate::{OTHER, SOME, some};

/// How long it must be silent where nothing may come. What comes takes less than a millisecond.
const SILENCE: Duration = Duration::from_millis(300);

/// A published port of an instance that has one socket.
struct Scene {
    server: UdpSocket,
    snapshots: watch::Sender<std::sync::Arc<Snapshot>>,
    proxy: Proxy,
    at: SocketAddr,
}

impl Scene {
    async fn with(rules: Rules, with: impl FnOnce(Proxy) -> Proxy) -> Self {
        let server = UdpSocket::bind("127.0.0.2:0").await.unwrap();
        let instance = server.local_addr().unwrap();
        let (snapshots, receiver) = watch::channel(snapshot(instance, &rules));
        let mut proxy = with(Proxy::new(receiver, 0));
        let at = free_socket();
        let published = Published { transport: Transport::Udp, ..publish(at, instance) };
        assert_eq!(proxy.reconcile(vec![published]).await, []);
        Self { server, snapshots, proxy, at }
    }

    fn enforce(&self, rules: &Rules) {
        self.snapshots.send_replace(snapshot(self.server.local_addr().unwrap(), rules));
    }

    async fn client(&self, address: &str) -> UdpSocket {
        let client = UdpSocket::bind((address, 0)).await.unwrap();
        client.connect(self.at).await.unwrap();
        client
    }

    fn counters(&self) -> PortCounters {
        let udp = |counters: &PortCounters| counters.protocol == "udp";
        self.proxy.counters().into_iter().map(|(_, counters)| counters).find(udp).expect("the port is published")
    }

    /// Says something, and takes the instance's answer to it.
    async fn talk(&self, client: &UdpSocket, says: &[u8]) {
        client.send(says).await.unwrap();
        let mut came = vec![0; 65_535];
        let (length, from) = within(self.server.recv_from(&mut came)).await.unwrap();
        assert_eq!(&came[..length], says);
        let answer: Vec<u8> = says.iter().rev().copied().collect();
        self.server.send_to(&answer, from).await.unwrap();
        let length = within(client.recv(&mut came)).await.unwrap();
        assert_eq!(came[..length], answer);
    }

    /// Says something, which is refused, and which the instance must not hear.
    async fn is_unheard(&self, client: &UdpSocket) {
        let before = self.counters().refused;
        client.send(b"?").await.unwrap();
        until("it is refused", || self.counters().refused > before).await;
        let heard = tokio::time::timeout(SILENCE, self.server.recv(&mut [0; 16])).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}

#[tokio::test]
async fn each_client_has_a_flow_of_its_own() {
    let scene = Scene::with(Rules::from(&["127.0.0.0/8"]), |proxy| proxy).await;
    let clients = [scene.client(SOME).await, scene.client(SOME).await, scene.client(OTHER).await];
    for round in 0..3_u8 {
        for (number, client) in (0..).zip(&clients) {
            scene.talk(client, &[round, number, 7]).await;
        }
    }
    scene.talk(&clients[0], &[5; 9_000]).await;
    let counted = scene.counters();
    assert_eq!((counted.accepted, counted.active, counted.refused), (3, 3, 0));
    assert_eq!((counted.bytes_to_instance, counted.bytes_to_clients), (9_027, 9_027));
    assert_eq!(counted.protocol, "udp");
}

#[tokio::test]
async fn the_clients_own_address_decides() {
    let scene = Scene::with(some(), |proxy| proxy).await;
    let (allowed, denied) = (scene.client(SOME).await, scene.client(OTHER).await);
    scene.talk(&allowed, b"yes").await;
    scene.is_unheard(&denied).await;
    assert_eq!((scene.counters().accepted, scene.counters().refused, scene.counters().active), (1, 1, 1));
    scene.enforce(&Rules::from(&["127.0.0.4/32"]));
    scene.talk(&denied, b"now").await;
    // What began when it was allowed goes on (SG-3.4).
    scene.talk(&allowed, b"still").await;
}

#[tokio::test]
async fn cut_ends_flows_that_no_longer_pass() {
    let scene = Scene::with(some(), |proxy| proxy.on_revoke(OnRevoke::Cut)).await;
    let client = scene.client(SOME).await;
    scene.talk(&client, b"yes").await;
    scene.enforce(&Rules::default());
    until("the flow is cut", || (scene.counters().cut, scene.counters().active) == (1, 0)).await;
    scene.is_unheard(&client).await;
    scene.enforce(&some());
    scene.talk(&client, b"again").await;
}

#[tokio::test]
async fn idle_flows_are_forgotten() {
    // Longer than an exchange takes on a machine that is busy, or it would be two flows.
    let idle = IdleTimes { single: Duration::from_secs(3), stream: Duration::from_secs(3_600) };
    let scene = Scene::with(some(), |proxy| proxy.idle(idle)).await;
    let (single, stream) = (scene.client(SOME).await, scene.client(SOME).await);
    scene.talk(&stream, b"one").await;
    scene.talk(&stream, b"two").await;
    until("one exchange is forgotten", || scene.counters().active <= 1).await;
    let before = scene.counters().accepted;
    scene.talk(&single, b"one").await;
    until("one exchange is forgotten", || scene.counters().active <= 1).await;
    scene.talk(&single, b"two").await;
    assert_eq!(scene.counters().accepted, before + 2, "the second is a flow of its own");
}

#[tokio::test]
async fn beyond_the_limit_there_are_no_flows() {
    let scene = Scene::with(some(), |proxy| proxy.max_connections(1)).await;
    let (first, second) = (scene.client(SOME).await, scene.client(SOME).await);
    scene.talk(&first, b"one").await;
    scene.is_unheard(&second).await;
    scene.talk(&first, b"two").await;
    assert_eq!((scene.counters().accepted, scene.counters().refused, scene.counters().limit), (1, 1, 1));
}

#[tokio::test]
async fn flows_leave_half_of_all_room_to_connections() {
    let mut scene = Scene::with(some(), |proxy| proxy.most_connections(4)).await;
    let published = scene.proxy.listening().remove(0).published;
    // The same number as the instance's UDP port has, which is what rules allow.
    let server = TcpListener::bind(scene.server.local_addr().unwrap()).await.unwrap();
    let at = free_socket();
    let tcp = publish(at, server.local_addr().unwrap());
    assert_eq!(scene.proxy.reconcile(vec![published, tcp]).await, []);
    let clients = [scene.client(SOME).await, scene.client(SOME).await, scene.client(SOME).await];
    scene.talk(&clients[0], b"one").await;
    scene.talk(&clients[1], b"two").await;
    scene.is_unheard(&clients[2]).await;
    assert_eq!(scene.proxy.connections(), (2, 4));
    let mut connections = Vec::new();
    for _ in 0..2 {
        let client = connect(SOME, at).await.unwrap();
        connections.push((client, within(server.accept()).await.unwrap().0));
    }
    for pair in &mut connections {
        talk(pair).await;
    }
    assert_eq!(scene.proxy.connections(), (4, 4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_datagram_goes_to_another_clients_flow() {
    // Each new flow's socket may catch others' datagrams for a moment.
    const CLIENTS: u16 = 64;
    const ROUNDS: u16 = 4;
    let scene = Scene::with(Rules::from(&["127.0.0.0/8"]), |proxy| proxy).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(scene.client(SOME).await);
    }
    for round in 0..ROUNDS {
        for (number, client) in (0..).zip(&clients) {
            client.send(&[number, round].map(u16::to_be_bytes).concat()).await.unwrap();
        }
    }
    let mut senders = std::collections::HashMap::new();
    for _ in 0..CLIENTS * ROUNDS {
        let mut came = [0; 4];
        let (_, from) = within(scene.server.recv_from(&mut came)).await.unwrap();
        let number = u16::from_be_bytes([came[0], came[1]]);
        assert_eq!(*senders.entry(from).or_insert(number), number, "{from} is one client's flow");
    }
    assert_eq!((senders.len(), scene.counters().accepted), (usize::from(CLIENTS), u64::from(CLIENTS)));
}
