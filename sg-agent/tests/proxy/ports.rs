//! Which ports are listened on, how many connections they have at once, and how they end.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use crate::support::ports::free_port;
use crate::support::{Rules, Scene, connect, ends_in_reset, free_socket, is_reset, publish, talk, until, within};
use crate::{OTHER, SOME, some};

#[tokio::test]
async fn both_loopback_addresses_are_listened_on_and_judged_apart() {
    let mut scene = Scene::new(Rules::from(&["::/0"])).await;
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this host has no ::1");
        return;
    }
    let at = SocketAddr::new("::1".parse().unwrap(), free_port());
    let mut published = publish(at, scene.instance);
    published.bind = sg_agent::proxy::DEFAULT_BIND.to_vec();
    assert_eq!(scene.proxy.reconcile(vec![published]).await, []);
    let client = connect("::1", at).await.unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client, server)).await;
    let four = ([127, 0, 0, 1], at.port()).into();
    assert!(is_reset("127.0.0.1", four).await);
    scene.enforce(&Rules::from(&["0.0.0.0/0"]));
    assert!(is_reset("::1", at).await);
    let client = connect("127.0.0.1", four).await.unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client, server)).await;
}

#[tokio::test]
async fn beyond_the_limit_clients_wait() {
    let scene = Scene::with(some(), 0, |proxy| proxy.max_connections(1)).await;
    let mut first = scene.connected(SOME).await;
    talk(&mut first).await;
    let client = connect(SOME, scene.at).await.unwrap();
    let third = connect(OTHER, scene.at).await.unwrap();
    // The first one gets all of the port's attention however often it asks.
    for _ in 0..50 {
        talk(&mut first).await;
    }
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (1, 0));
    drop(first);
    let server = within(scene.server.accept()).await.unwrap().0;
    let mut second = (client, server);
    talk(&mut second).await;
    drop((second, third));
    until("both had their turn", || scene.counters().refused == 1).await;
}

#[tokio::test]
async fn the_limit_of_all_ports_holds_for_each() {
    let mut scene = Scene::with(some(), 0, |proxy| proxy.most_connections(1)).await;
    let second = publish(free_socket(), scene.instance);
    assert_eq!(scene.proxy.reconcile(vec![scene.published.clone(), second.clone()]).await, []);
    let mut first = scene.connected(SOME).await;
    talk(&mut first).await;
    assert_eq!(scene.proxy.connections(), (1, 1));
    let waiting = connect(SOME, (second.bind[0], second.host_port).into()).await.unwrap();
    for _ in 0..50 {
        talk(&mut first).await;
    }
    assert!(!scene.is_knocked_at());
    drop(first);
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (waiting, server)).await;
}

#[tokio::test]
async fn a_port_in_use_is_a_warning_and_is_tried_again() {
    let mut scene = Scene::new(some()).await;
    let taken = free_socket();
    let holder = std::net::TcpListener::bind(taken).unwrap();
    let wanted = vec![scene.published.clone(), publish(taken, scene.instance)];
    let warnings = scene.proxy.reconcile(wanted.clone()).await;
    let [warning] = warnings.as_slice() else { panic!("one warning: {warnings:?}") };
    let text = warning.to_string();
    assert!(text.contains(&taken.to_string()) && text.contains("ss -ltnp"), "{text}");
    assert_eq!(warning.subject, wanted[1].to_string());
    // The other port is none the worse for it.
    talk(&mut scene.connected(SOME).await).await;
    drop(holder);
    assert_eq!(scene.proxy.reconcile(wanted).await, []);
    let client = connect(SOME, taken).await.unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client, server)).await;
}

#[tokio::test]
async fn a_port_wanted_twice_goes_to_one_and_names_it() {
    let mut scene = Scene::new(some()).await;
    let mut second = scene.published.clone();
    second.port += 1;
    let warnings = scene.proxy.reconcile(vec![scene.published.clone(), second.clone()]).await;
    let [warning] = warnings.as_slice() else { panic!("one warning: {warnings:?}") };
    assert!(warning.to_string().contains(&format!("published for {}", scene.published)), "{warning}");
    talk(&mut scene.connected(SOME).await).await;
    // When the first gives it up, the second has it within the same call.
    assert_eq!(scene.proxy.reconcile(vec![second.clone()]).await, []);
    let counters = scene.counters();
    assert_eq!((counters.host_port, counters.port), (second.host_port, second.port));
    assert!(is_reset(SOME, scene.at).await);
}

#[tokio::test]
async fn a_port_that_is_closed_keeps_its_live_connections() {
    let mut scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    assert_eq!(scene.proxy.reconcile(Vec::new()).await, []);
    assert_eq!(connect(SOME, scene.at).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(scene.proxy.counters(), []);
    talk(&mut pair).await;
}

#[tokio::test]
async fn a_shutdown_waits_for_those_that_end_and_resets_the_others() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    within(scene.proxy.shutdown(Duration::from_millis(50))).await;
    assert!(ends_in_reset(&mut pair.0).await && ends_in_reset(&mut pair.1).await);
    assert_eq!(connect(SOME, scene.at).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);

    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    let ending = tokio::spawn(scene.proxy.shutdown(Duration::from_secs(3_600)));
    until("the listener is closed", || std::net::TcpStream::connect(scene.at).is_err()).await;
    talk(&mut pair).await;
    drop(pair);
    within(ending).await.unwrap();
}
