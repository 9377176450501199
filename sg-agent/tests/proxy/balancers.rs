//! The PROXY protocol, both ways: whose word counts, and what the instance is told.

use std::net::SocketAddr;

use proxy_header::{ParseConfig, ProxiedAddress, ProxyHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Rules, Scene, connect, ends_in_reset, talk, until, within};

/// The balancer that is trusted, and one that isn't.
const BALANCER: &str = "127.0.0.9";
const STRANGER: &str = "127.0.0.3";
const CLIENT: &str = "203.0.113.9:40000";

fn header(client: &str, version: u8) -> Vec<u8> {
    let proxied = ProxiedAddress::stream(client.parse().unwrap(), "192.0.2.1:80".parse().unwrap());
    let header = ProxyHeader::with_address(proxied);
    let mut bytes = Vec::new();
    if version == 1 { header.encode_v1(&mut bytes) } else { header.encode_v2(&mut bytes) }.unwrap();
    bytes
}

/// A port that is open to `sources`, with the balancer trusted.
async fn scene(sources: &[&'static str]) -> Scene {
    let trusted = vec!["127.0.0.9/32".parse().unwrap()];
    Scene::with(Rules::from(sources), 0, |proxy| proxy.trust(trusted)).await
}

async fn from_balancer(scene: &Scene, says: &[u8]) -> TcpStream {
    let mut stream = connect(BALANCER, scene.at).await.unwrap();
    stream.write_all(says).await.unwrap();
    stream
}

#[tokio::test]
async fn the_client_that_a_trusted_balancer_names_is_judged() {
    let scene = scene(&["203.0.113.0/24"]).await;
    for version in [1, 2] {
        let stream = from_balancer(&scene, &header(CLIENT, version)).await;
        let server = within(scene.server.accept()).await.unwrap().0;
        talk(&mut (stream, server)).await;
        let mut other = from_balancer(&scene, &header("198.51.100.9:40000", version)).await;
        assert!(ends_in_reset(&mut other).await);
    }
    let counted = scene.counters();
    assert_eq!((counted.accepted, counted.refused, counted.unintroduced), (2, 2, 0));
}

#[tokio::test]
async fn what_follows_the_header_is_the_instances() {
    let scene = scene(&["203.0.113.0/24"]).await;
    let mut says = header(CLIENT, 2);
    says.extend(b"GET / HTTP/1.0");
    // In pieces, as a network may deliver it.
    let mut stream = connect(BALANCER, scene.at).await.unwrap();
    for piece in says.chunks(5) {
        stream.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut server = within(scene.server.accept()).await.unwrap().0;
    let mut came = [0; 14];
    within(server.read_exact(&mut came)).await.unwrap();
    assert_eq!(&came, b"GET / HTTP/1.0");
    talk(&mut (stream, server)).await;
    assert!(scene.counters().bytes_to_instance >= 14);
}

#[tokio::test]
async fn a_balancer_that_speaks_for_nobody_is_judged_itself() {
    let scene = scene(&["127.0.0.9/32"]).await;
    let mut local = Vec::new();
    ProxyHeader::with_local().encode_v2(&mut local).unwrap();
    for says in [&local[..], b"PROXY UNKNOWN\r\n"] {
        let stream = from_balancer(&scene, says).await;
        let server = within(scene.server.accept()).await.unwrap().0;
        talk(&mut (stream, server)).await;
    }
}

#[tokio::test]
async fn garbage_from_a_trusted_balancer_is_closed_and_counted() {
    let scene = scene(&["0.0.0.0/0"]).await;
    let endless = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"[..], &[0; 5_000]].concat();
    for says in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"PROXY TCP4 nowhere\r\n", &endless] {
        let mut stream = connect(BALANCER, scene.at).await.unwrap();
        // It may be closed before all of it is said.
        let _ = stream.write_all(says).await;
        assert!(ends_in_reset(&mut stream).await, "{says:02x?}");
    }
    drop(from_balancer(&scene, b"PROX").await);
    until("all are counted", || scene.counters().unintroduced == 4).await;
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (0, 0));
}

#[tokio::test]
async fn nobody_else_is_taken_at_his_word() {
    let scene = scene(&["127.0.0.3/32"]).await;
    let mut stream = connect(STRANGER, scene.at).await.unwrap();
    let says = header("198.51.100.9:40000", 2);
    stream.write_all(&says).await.unwrap();
    let mut server = within(scene.server.accept()).await.unwrap().0;
    let mut came = vec![0; says.len()];
    within(server.read_exact(&mut came)).await.unwrap();
    assert_eq!(came, says, "they are bytes as any others");
}

#[tokio::test]
async fn the_instance_is_told_of_the_client() {
    let trusted = vec!["127.0.0.9/32".parse().unwrap()];
    let rules = Rules::from(&["203.0.113.0/24", "127.0.0.3/32"]);
    let scene = Scene::with(rules, 0, |proxy| proxy.tell_client(true).trust(trusted)).await;
    let direct = connect(STRANGER, scene.at).await.unwrap();
    let own = direct.local_addr().unwrap();
    let behind = async { (from_balancer(&scene, &header(CLIENT, 1)).await, CLIENT.parse::<SocketAddr>().unwrap()) };
    for (mut client, expected) in [(direct, own), behind.await] {
        client.write_all(b"hello").await.unwrap();
        let mut server = within(scene.server.accept()).await.unwrap().0;
        let mut came = [0; 28 + 5];
        within(server.read_exact(&mut came)).await.unwrap();
        let (header, length) = ProxyHeader::parse(&came, ParseConfig::default()).unwrap();
        let told = header.proxied_address().expect("a client");
        // The two may be accepted in either order.
        assert!([own, CLIENT.parse().unwrap()].contains(&told.source), "{told:?}, expected {expected}");
        assert_eq!(told.destination, scene.at);
        assert_eq!(&came[length..], b"hello");
    }
}
