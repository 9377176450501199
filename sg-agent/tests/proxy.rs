//! The proxy on real sockets: who gets through, what a change does, and that bytes, ends and resets arrive as they
//! would without it.

#[path = "proxy/balancers.rs"]
mod balancers;
#[path = "proxy/datagrams.rs"]
mod datagrams;
mod support;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use sg_agent::apply::Snapshot;
use sg_agent::proxy::{Live, OnRevoke};
use socket2::SockRef;
use support::{
    Rules, Scene, connect, ends_in_reset, free_socket, is_reset, ports::free_port, publish, reset, snapshot, talk,
    until, within,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const SOME: &str = "127.0.0.3";
const OTHER: &str = "127.0.0.4";

fn some() -> Rules {
    Rules::from(&["127.0.0.3/32"])
}

#[tokio::test]
async fn the_clients_own_address_decides() {
    let scene = Scene::new(some()).await;
    talk(&mut scene.connected(SOME).await).await;
    assert!(is_reset(OTHER, scene.at).await);
    assert!(!scene.is_knocked_at(), "a refused client must not reach the instance");
    let counters = scene.counters();
    assert_eq!((counters.accepted, counters.refused, counters.failed, counters.cut), (1, 1, 0, 0));
}

#[tokio::test]
async fn a_local_client_is_in_any_source_and_in_no_private_network() {
    let scene = Scene::new(Rules::from(&["10.0.0.0/8"])).await;
    assert!(is_reset("127.0.0.1", scene.at).await);
    scene.enforce(&Rules::from(&["0.0.0.0/0"]));
    talk(&mut scene.connected("127.0.0.1").await).await;
}

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_counts_for_the_very_next_connection() {
    let scene = Scene::new(Rules::default()).await;
    for _ in 0..200 {
        scene.enforce(&some());
        talk(&mut scene.connected(SOME).await).await;
        scene.enforce(&Rules::default());
        assert!(is_reset(SOME, scene.at).await);
    }
    assert!(!scene.is_knocked_at());
    let counters = scene.counters();
    assert_eq!((counters.accepted, counters.refused, counters.cut), (200, 200, 0));
}

#[tokio::test]
async fn tracked_connections_outlive_a_revoke() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    scene.enforce(&Rules::default());
    assert!(is_reset(SOME, scene.at).await);
    talk(&mut pair).await;
    assert_eq!(scene.counters().active, 1);
}

#[tokio::test]
async fn untracked_connections_end_with_their_rule() {
    let open = Rules { is_egress_free: true, ..Rules::from(&["0.0.0.0/0"]) };
    let scene = Scene::new(open.clone()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    // Another rule that covers it does as well.
    scene.enforce(&Rules { is_egress_free: true, ..some() });
    talk(&mut pair).await;
    scene.enforce(&Rules { is_egress_free: true, ..Rules::default() });
    assert!(ends_in_reset(&mut pair.0).await && ends_in_reset(&mut pair.1).await);
    until("the cut is counted", || scene.counters().cut == 1).await;
}

#[tokio::test]
async fn a_network_acl_ends_tracked_connections_too() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    scene.enforce(&Rules { acl_denies: Some(vec!["127.0.0.4/32"]), ..some() });
    talk(&mut pair).await;
    scene.enforce(&Rules { acl_denies: Some(vec!["127.0.0.3/32"]), ..some() });
    assert!(ends_in_reset(&mut pair.0).await && ends_in_reset(&mut pair.1).await);
    assert!(is_reset(SOME, scene.at).await);
}

#[tokio::test]
async fn cut_ends_what_no_longer_passes_and_nothing_else() {
    let both = Rules::from(&["127.0.0.3/32", "127.0.0.4/32"]);
    let scene = Scene::with(both, 0, |proxy| proxy.on_revoke(OnRevoke::Cut)).await;
    let mut revoked = scene.connected(OTHER).await;
    let mut kept = scene.connected(SOME).await;
    talk(&mut revoked).await;
    scene.enforce(&some());
    assert!(ends_in_reset(&mut revoked.0).await && ends_in_reset(&mut revoked.1).await);
    talk(&mut kept).await;
    until("one is cut, one goes on", || (scene.counters().cut, scene.counters().active) == (1, 1)).await;
    // An instance that is gone is nothing that a client may talk to.
    scene.snapshots.send_replace(Snapshot::default().into());
    assert!(ends_in_reset(&mut kept.0).await);
}

#[tokio::test]
async fn clients_of_an_instance_that_is_gone_are_refused() {
    let scene = Scene::new(some()).await;
    scene.snapshots.send_replace(Snapshot::default().into());
    assert!(is_reset(SOME, scene.at).await);
    let mut unattached = Snapshot::clone(&snapshot(scene.instance, &some()));
    unattached.interfaces.values_mut().for_each(|enforced| enforced.attached = false);
    scene.snapshots.send_replace(unattached.into());
    assert!(is_reset(SOME, scene.at).await);
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (0, 2));
    scene.enforce(&some());
    talk(&mut scene.connected(SOME).await).await;
}

#[tokio::test]
async fn clients_of_a_port_that_the_instance_does_not_serve_are_reset() {
    let mut scene = Scene::new(some()).await;
    scene.server = TcpListener::bind("127.0.0.2:0").await.unwrap();
    assert!(is_reset(SOME, scene.at).await);
    until("the failure is counted", || scene.counters().active == 0).await;
    assert_eq!((scene.counters().accepted, scene.counters().failed), (1, 1));
}

#[tokio::test]
async fn a_closed_half_leaves_the_other_open() {
    let scene = Scene::new(some()).await;
    for client_first in [true, false] {
        let (client, server) = scene.connected(SOME).await;
        let (mut first, mut last) = if client_first { (client, server) } else { (server, client) };
        first.write_all(b"all of it").await.unwrap();
        first.shutdown().await.unwrap();
        let mut said = Vec::new();
        within(last.read_to_end(&mut said)).await.unwrap();
        assert_eq!(said, b"all of it");
        last.write_all(b"an answer").await.unwrap();
        let mut answer = [0; 9];
        within(first.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"an answer");
        assert_eq!(scene.counters().active, 1);
        last.shutdown().await.unwrap();
        assert_eq!(within(first.read(&mut answer)).await.unwrap(), 0);
        until("both halves are closed", || scene.counters().active == 0).await;
    }
}

#[tokio::test]
async fn a_reset_reaches_the_other_side() {
    let scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    reset(pair.0);
    assert!(ends_in_reset(&mut pair.1).await);
    let mut pair = scene.connected(SOME).await;
    talk(&mut pair).await;
    reset(pair.1);
    assert!(ends_in_reset(&mut pair.0).await);
    until("nothing is left open", || scene.counters().active == 0).await;
}

#[tokio::test]
async fn urgent_bytes_stay_urgent_and_in_their_place() {
    let scene = Scene::new(some()).await;
    for client_first in [true, false] {
        let (client, server) = scene.connected(SOME).await;
        let (mut from, to) = if client_first { (client, server) } else { (server, client) };
        // In one piece and in two; with nothing behind it, and with something.
        for (before, behind) in [(&b"one"[..], &b""[..]), (b"", b"two"), (b"three", b"four")] {
            from.write_all(before).await.unwrap();
            assert_eq!(SockRef::from(&from).send_out_of_band(b"!").unwrap(), 1);
            from.write_all(behind).await.unwrap();
            let mut urgent = [std::mem::MaybeUninit::new(0)];
            until("the urgent byte arrives", || SockRef::from(&to).recv_out_of_band(&mut urgent).is_ok()).await;
            // Not by tokio, which takes a read that stops at the mark for all there is.
            let (mut came, all): (Vec<u8>, _) = (Vec::new(), [before, behind].concat());
            until("the bytes around it arrive", || {
                let mut piece = [0; 16];
                let length = recv(to.as_raw_fd(), &mut piece, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
                came.extend(&piece[..length]);
                came.len() >= all.len()
            })
            .await;
            assert_eq!(came, all);
        }
        let mut pair = (from, to);
        talk(&mut pair).await;
    }
}

#[tokio::test]
async fn fresh_rules_are_asked_for_at_each_connection() {
    let (live, mut asks) = Live::new();
    let live = live.patience(Duration::from_secs(3_600));
    let scene = Scene::with(Rules::default(), 0, |proxy| proxy.live(Some(live))).await;
    // The answer brings the rule that lets it in.
    let client = tokio::spawn(connect(SOME, scene.at));
    let ask = within(asks.recv()).await.expect("it was asked");
    assert!(!scene.is_knocked_at());
    scene.enforce(&some());
    ask.send(()).unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client.await.unwrap().unwrap(), server)).await;
    // And the one that doesn't.
    let client = tokio::spawn(is_reset(SOME, scene.at));
    let ask = within(asks.recv()).await.expect("it was asked");
    scene.enforce(&Rules::default());
    ask.send(()).unwrap();
    assert!(client.await.unwrap());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (1, 1));
}

#[tokio::test]
async fn without_an_answer_about_fresh_rules_nobody_gets_in() {
    let (live, mut asks) = Live::new();
    let live = live.patience(Duration::from_millis(500));
    // The rules in force would let it in, and don't count.
    let scene = Scene::with(some(), 0, |proxy| proxy.live(Some(live))).await;
    assert!(is_reset(SOME, scene.at).await);
    assert!(within(asks.recv()).await.expect("it was asked").is_closed());
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (0, 1));
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
async fn a_reset_is_noticed_behind_a_reader_that_does_not_read() {
    let scene = Scene::new(some()).await;
    let (client, mut server) = scene.connected(SOME).await;
    // Fill every buffer on the way: when nothing goes on any more for a while, the proxy waits for the instance to read.
    let chunk = vec![0; 1 << 20];
    let mut sent = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(200), client.writable()).await {
        written.unwrap();
        sent += client.try_write(&chunk).unwrap_or(0);
    }
    assert!(sent > 0);
    assert_eq!(scene.counters().active, 1);
    reset(client);
    until("the connection is given up", || scene.counters().active == 0).await;
    assert!(ends_in_reset(&mut server).await);
}

#[tokio::test]
async fn an_answer_right_before_a_reset_arrives() {
    let scene = Scene::new(some()).await;
    for _ in 0..20 {
        let (mut client, mut server) = scene.connected(SOME).await;
        client.write_all(&[1; 4096]).await.unwrap();
        assert!(within(server.peek(&mut [0; 1])).await.unwrap() > 0);
        // The request is left unread, so closing resets the connection.
        server.write_all(b"413 Content Too Large").await.unwrap();
        drop(server);
        let mut answer = [0; 21];
        within(client.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"413 Content Too Large");
        assert!(ends_in_reset(&mut client).await);
    }
}

/// Sends `length` bytes that no other seed makes, in uneven pieces, then closes the half; returns what came back.
async fn exchange(stream: TcpStream, seed: u64, length: usize) -> (Vec<u8>, Vec<u8>) {
    let mut state = seed;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(length)
    .collect();
    let (mut reader, mut writer) = stream.into_split();
    let mut received = Vec::new();
    let sending = async {
        for piece in bytes.chunks(100_003) {
            writer.write_all(piece).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    within(async { tokio::join!(sending, async { reader.read_to_end(&mut received).await.unwrap() }) }).await;
    (bytes, received)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_mebibytes_both_ways_at_once() {
    const LENGTH: usize = 8 << 20;
    let scene = Scene::new(some()).await;
    let (client, server) = scene.connected(SOME).await;
    let there = tokio::spawn(exchange(client, 1, LENGTH));
    let back = tokio::spawn(exchange(server, 2, LENGTH));
    let (sent, received) = within(there).await.unwrap();
    let (answered, asked) = within(back).await.unwrap();
    assert!(sent != answered, "the two directions must differ for a mix-up to show");
    assert!(sent == asked, "what the client sent must arrive as it was");
    assert!(answered == received, "what the instance sent must arrive as it was");
    until("both halves are closed", || scene.counters().active == 0).await;
    let counters = scene.counters();
    assert_eq!((counters.bytes_to_instance, counters.bytes_to_clients), (LENGTH as u64, LENGTH as u64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_at_once() {
    const MANY: usize = 200;
    let scene = Scene::new(some()).await;
    let clients: Vec<_> = (0..MANY).map(|_| tokio::spawn(connect(SOME, scene.at))).collect();
    let mut servers = Vec::new();
    for _ in 0..MANY {
        servers.push(within(scene.server.accept()).await.unwrap().0);
    }
    let mut exchanges = Vec::new();
    for (seed, client) in (0..).zip(clients) {
        exchanges.push(tokio::spawn(exchange(client.await.unwrap().unwrap(), seed, 40_000)));
    }
    assert_eq!((scene.counters().active, scene.counters().accepted), (MANY as u64, MANY as u64));
    let echoes = servers.into_iter().map(|mut server| {
        tokio::spawn(async move {
            let (mut reader, mut writer) = server.split();
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
        })
    });
    let echoes: Vec<_> = echoes.collect();
    for exchange in exchanges {
        let (sent, received) = within(exchange).await.unwrap();
        assert!(sent == received, "each client must get back its own bytes");
    }
    for echo in echoes {
        within(echo).await.unwrap();
    }
    until("all are closed", || scene.counters().active == 0).await;
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

#[tokio::test]
async fn without_an_applier_the_last_rules_stand() {
    let (sender, receiver) = watch::channel(snapshot(([127, 0, 0, 2], 9).into(), &some()));
    let mut scene = Scene::new(some()).await;
    let mut pair = scene.connected(SOME).await;
    drop(std::mem::replace(&mut scene.snapshots, sender));
    drop(receiver);
    talk(&mut pair).await;
    assert!(is_reset(OTHER, scene.at).await);
    talk(&mut scene.connected(SOME).await).await;
}

/// In a network namespace of this thread's own, where the whole host is the test's.
mod alone {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::process::Command;

    /// Runs a test there. The namespace goes with the thread.
    fn run(test: impl Future<Output = ()> + Send + 'static) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a network namespace needs CAP_SYS_ADMIN, a socket's mark CAP_NET_ADMIN");
            return;
        }
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            // An accepted socket takes the mark of the packet that began it, and so shows it. This directory is that of
            // the namespace of the thread that opens it (`net_ctl_header_lookup` in `net/sysctl_net.c`).
            std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").unwrap();
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn connections_to_the_instance_carry_the_mark() {
        const MARK: u32 = 0x5347;
        run(async {
            let scene = Scene::with(some(), MARK, |proxy| proxy).await;
            let (client, server) = scene.connected(SOME).await;
            assert_eq!(SockRef::from(&server).mark().unwrap(), MARK);
            assert_eq!(SockRef::from(&client).mark().unwrap(), 0);
            let unmarked = Scene::with(some(), 0, |proxy| proxy).await;
            let (_client, server) = unmarked.connected(SOME).await;
            assert_eq!(SockRef::from(&server).mark().unwrap(), 0);
        });
    }

    #[test]
    fn a_dual_stack_socket_judges_ipv4_clients_as_such() {
        run(async {
            let mut scene = Scene::new(some()).await;
            let mut published = publish(scene.at, scene.instance);
            published.bind = vec!["::".parse().unwrap()];
            assert_eq!(scene.proxy.reconcile(vec![published]).await, []);
            talk(&mut scene.connected(SOME).await).await;
            assert!(is_reset(OTHER, scene.at).await);
            assert!(is_reset("::1", ([0, 0, 0, 0, 0, 0, 0, 1], scene.at.port()).into()).await);
        });
    }

    #[test]
    fn all_addresses_of_both_families_can_be_apart() {
        run(async {
            let mut scene = Scene::new(some()).await;
            let mut published = publish(scene.at, scene.instance);
            published.bind = vec!["::".parse().unwrap(), "0.0.0.0".parse().unwrap()];
            assert_eq!(scene.proxy.reconcile(vec![published]).await, []);
            talk(&mut scene.connected(SOME).await).await;
        });
    }
}
