//! Bytes, ends and resets arrive as they would without the proxy.

use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Scene, connect, ends_in_reset, reset, talk, until, within};
use crate::{SOME, some};

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
