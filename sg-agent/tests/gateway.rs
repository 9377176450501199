//! The gateway between raw sockets: what arrives at the endpoint is what the client sent, and the answer to a change
//! waits for its commit. No root, no agent: the commits are the test's.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use sg_agent::gateway::{Commit, Gateway, GatewayError, Options};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);
/// Commits that the test may leave unheard before the gateway notices.
const ROOM: usize = 8;
const AUTH: &str = "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/ec2/aws4_request\r\n";
const FORM: &str = "Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\n";

/// A gateway to a listener of the test's own.
struct Stage {
    gateway: Gateway,
    upstream: TcpListener,
    commits: mpsc::Receiver<Commit>,
    shutdown: CancellationToken,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn stage(commit_timeout: Duration) -> Stage {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}/", upstream.local_addr().unwrap());
    let (tell, commits) = mpsc::channel(ROOM);
    let shutdown = CancellationToken::new();
    let options = Options { address: Some("127.0.0.1:0".parse().unwrap()), commit_timeout };
    let gateway = Gateway::start(&options, &endpoint, tell, shutdown.clone()).await.unwrap();
    Stage { gateway, upstream, commits, shutdown }
}

impl Stage {
    async fn client(&self) -> Peer {
        Peer(TcpStream::connect(self.gateway.address()).await.unwrap())
    }

    /// The endpoint's side of the next connection.
    async fn accept(&self) -> Peer {
        Peer(within(self.upstream.accept()).await.unwrap().0)
    }

    /// A client's request, as the endpoint gets it.
    async fn passes(&self, request: &[u8], until: &[u8]) -> (Peer, Peer, Vec<u8>) {
        let mut client = self.client().await;
        client.say(request).await;
        let mut server = self.accept().await;
        let came = server.hear(until).await;
        (client, server, came)
    }
}

/// One end of a connection.
struct Peer(TcpStream);

impl Peer {
    async fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Reads until what came ends with these bytes.
    async fn hear(&mut self, end: &[u8]) -> Vec<u8> {
        let mut came = Vec::new();
        while !came.ends_with(end) {
            let length = within(self.0.read_buf(&mut came)).await.unwrap();
            assert!(length > 0, "it ended with {:?}", String::from_utf8_lossy(&came));
        }
        came
    }

    /// Everything until the other side closes.
    async fn rest(&mut self) -> String {
        let mut came = Vec::new();
        within(self.0.read_to_end(&mut came)).await.unwrap();
        String::from_utf8(came).unwrap()
    }

    /// Nothing has come yet.
    async fn has_nothing(&mut self) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut byte = [0];
        match self.0.try_read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            other => panic!("nothing was to come: {other:?} {byte:?}"),
        }
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

fn head_of(message: &[u8]) -> (Vec<String>, &[u8]) {
    let end = message.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
    let head = std::str::from_utf8(&message[..end]).unwrap();
    (head.split("\r\n").map(str::to_owned).collect(), &message[end + 4..])
}

/// The connection is closed as Moto closes it after each answer.
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_arrives_as_it_was_sent() {
    let stage = stage(PATIENCE).await;
    let target = "PUT //bucket/a%2Fb/../%C3%BC+%20?x=%20&acl&y=a%2Bb HTTP/1.1";
    let request = format!(
        "{target}\r\nHost: bucket.s3.example:4566\r\nX-Amz-Meta-Under_score: 1\r\nx-amz-date: 20260101T000000Z\r\n\
         X-Amz-Tag: one\r\nX-Amz-Tag: two\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\na\0b\r\n"
    );
    let (mut client, mut server, came) = stage.passes(request.as_bytes(), b"a\0b\r\n").await;
    let (mut lines, body) = head_of(&came);
    assert_eq!(lines.remove(0), target);
    lines.sort();
    assert_eq!(
        lines,
        [
            "Content-Length: 5",
            "Host: bucket.s3.example:4566",
            "X-Amz-Meta-Under_score: 1",
            "X-Amz-Tag: one",
            "X-Amz-Tag: two",
            "x-amz-date: 20260101T000000Z",
        ]
    );
    assert_eq!(body, b"a\0b\r\n");
    let answer = "HTTP/1.1 404 Nothing There\r\nServer: Moto\r\nX-Odd_Name: 1\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno\n";
    server.say(answer.as_bytes()).await;
    let (mut lines, body) = head_of(&client.hear(b"no\n").await).clone_parts();
    assert_eq!(lines.remove(0), "HTTP/1.1 404 Nothing There");
    lines.sort();
    assert_eq!(lines, ["Content-Length: 3", "Server: Moto", "X-Odd_Name: 1"], "nothing is added");
    assert_eq!(body, b"no\n");
    // The client's connection goes on, though the endpoint closes its own.
    drop(server);
    client.say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let mut server = stage.accept().await;
    server.hear(b"\r\n\r\n").await;
    server.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    client.hear(b"ok").await;
    // One that keeps it gets the next request by it.
    client.say(b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(server.hear(b"\r\n\r\n").await.starts_with(b"GET /next "));
    server.say(OK).await;
    client.hear(b"ok").await;
}

/// A head and a body that don't borrow.
trait CloneParts {
    fn clone_parts(self) -> (Vec<String>, Vec<u8>);
}

impl CloneParts for (Vec<String>, &[u8]) {
    fn clone_parts(self) -> (Vec<String>, Vec<u8>) {
        (self.0, self.1.to_vec())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_streamed_both_ways() {
    let stage = stage(PATIENCE).await;
    // Chunks of aws-chunked within chunks of HTTP, with a signature each: not a byte of them is the gateway's.
    let head = "PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Encoding: aws-chunked\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut client = stage.client().await;
    client.say(head.as_bytes()).await;
    let part = "5;chunk-signature=00ff\r\nhello\r\n";
    client.say(format!("{:x}\r\n{part}\r\n", part.len()).as_bytes()).await;
    let mut server = stage.accept().await;
    // The first part is there before the second is sent.
    let came = server.hear(format!("{part}\r\n").as_bytes()).await;
    assert!(has_chunked(&came), "{}", String::from_utf8_lossy(&came));
    let end = "0;chunk-signature=11ee\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n";
    client.say(format!("{:x}\r\n{end}\r\n0\r\n\r\n", end.len()).as_bytes()).await;
    let came = server.hear(b"\r\n0\r\n\r\n").await;
    assert!(String::from_utf8_lossy(&came).contains(end), "{came:?}");
    // And the answer's first part before its second.
    server.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.hear(b"3\r\none\r\n").await;
    server.say(b"3\r\ntwo\r\n0\r\n\r\n").await;
    client.hear(b"3\r\ntwo\r\n0\r\n\r\n").await;
}

fn has_chunked(message: &[u8]) -> bool {
    head_of(message).0.iter().any(|line| line.eq_ignore_ascii_case("transfer-encoding: chunked"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_expects_100_gets_it_and_then_its_answer() {
    let stage = stage(PATIENCE).await;
    let mut client = stage.client().await;
    client.say(b"PUT /b/k HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n").await;
    client.hear(b"HTTP/1.1 100 Continue\r\n\r\n").await;
    client.say(b"body").await;
    let mut server = stage.accept().await;
    server.hear(b"body").await;
    // The endpoint's own 100 is between the gateway and it.
    server.say(b"HTTP/1.1 100 Continue\r\n\r\n").await;
    server.say(OK).await;
    let came = client.hear(b"ok").await;
    assert!(came.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&came));
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_messages_have_sane_answers() {
    let stage = stage(PATIENCE).await;
    // A HEAD's answer has a length, and no body.
    let (mut client, mut server, _) = stage.passes(b"HEAD /b/k HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n\r\n").await;
    server.say(b"HTTP/1.1 200 OK\r\nContent-Length: 123456\r\nConnection: close\r\n\r\n").await;
    let came = client.hear(b"\r\n\r\n").await;
    assert!(String::from_utf8_lossy(&came).contains("Content-Length: 123456"));
    // A protocol that is offered isn't taken up.
    let upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let (mut client, mut server, came) = stage.passes(upgrade, b"\r\n\r\n").await;
    assert_eq!(head_of(&came).0, ["GET / HTTP/1.1", "Host: x"]);
    server.say(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    assert!(client.hear(b"\r\n\r\n").await.starts_with(b"HTTP/1.1 426"));
    // HTTP/1.0 has no host and ends with the connection; an answer of unknown length as well.
    let (mut client, mut server, came) = stage.passes(b"GET /moto-api/ HTTP/1.0\r\n\r\n", b"\r\n\r\n").await;
    let host = format!("host: {}", stage.upstream.local_addr().unwrap());
    assert!(head_of(&came).0.iter().any(|line| line.eq_ignore_ascii_case(&host)), "{came:?}");
    server.say(b"HTTP/1.0 200 OK\r\n\r\nall of it").await;
    drop(server);
    assert!(client.rest().await.ends_with("\r\n\r\nall of it"));
    // It isn't for everybody's use.
    let mut client = stage.client().await;
    client.say(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n").await;
    assert!(client.hear(b"\n").await.starts_with(b"HTTP/1.1 501"));
}

fn change(action: &str) -> Vec<u8> {
    let form = format!("Action={action}&Version=2016-11-15");
    let length = form.len();
    format!("POST / HTTP/1.1\r\nHost: x\r\n{AUTH}{FORM}Content-Length: {length}\r\n\r\n{form}").into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_change_waits_for_its_commit() {
    let mut stage = stage(PATIENCE).await;
    // Whatever the status: an error may have changed something.
    for status in ["200 OK", "400 Bad Request", "500 Internal Server Error"] {
        let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
        assert!(stage.commits.try_recv().is_err(), "nothing is committed before the endpoint has answered");
        server.say(format!("HTTP/1.1 {status}\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndo").as_bytes()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(stage.commits.try_recv().is_err(), "nor before it has answered to the end");
        server.say(b"ne").await;
        let commit = within(stage.commits.recv()).await.unwrap();
        assert_eq!(commit.whom.region.as_deref(), Some("us-east-1"));
        client.has_nothing().await;
        commit.reply.send(Ok(())).unwrap();
        let (lines, _) = head_of(&client.hear(b"done").await).clone_parts();
        assert_eq!(lines, [format!("HTTP/1.1 {status}"), "Content-Length: 4".to_owned()]);
    }
    let status = stage.gateway.status();
    assert_eq!((status.requests, status.changes, status.committed, status.failed, status.late), (3, 3, 3, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_are_not_held_up_by_changes() {
    let mut stage = stage(PATIENCE).await;
    let (mut changer, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    server.say(OK).await;
    let commit = within(stage.commits.recv()).await.unwrap();
    let (mut reader, mut server, _) = stage.passes(&change("DescribeInstances"), b"2016-11-15").await;
    server.say(OK).await;
    reader.hear(b"ok").await;
    changer.has_nothing().await;
    commit.reply.send(Ok(())).unwrap();
    changer.hear(b"ok").await;
    assert!(stage.commits.try_recv().is_err(), "the read was no change");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_not_committed_says_so() {
    let mut stage = stage(PATIENCE).await;
    let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    server.say(OK).await;
    within(stage.commits.recv()).await.unwrap().reply.send(Err("it is\nfull ü".into())).unwrap();
    let (lines, body) = head_of(&client.hear(b"ok").await).clone_parts();
    assert!(lines.contains(&"x-sg-agent-commit: failed; it is?full ?".to_owned()), "{lines:?}");
    assert_eq!((lines[0].as_str(), &*body), ("HTTP/1.1 200 OK", &b"ok"[..]), "else it passes unchanged");
    let status = stage.gateway.status();
    assert_eq!((status.committed, status.failed, status.late), (0, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_commit_takes_too_long_says_so() {
    let mut stage = stage(Duration::from_millis(200)).await;
    let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    server.say(OK).await;
    let commit = within(stage.commits.recv()).await.unwrap();
    let (lines, _) = head_of(&client.hear(b"ok").await).clone_parts();
    assert!(lines.contains(&"x-sg-agent-commit: late".to_owned()), "{lines:?}");
    assert!(commit.reply.is_closed(), "whoever commits can see that nobody waits");
    let status = stage.gateway.status();
    assert_eq!((status.committed, status.failed, status.late), (0, 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_nobody_had_time_to_hear_of_is_heard_of_later() {
    let mut stage = stage(Duration::from_millis(50)).await;
    // Two more than the channel holds.
    for _ in 0..ROOM + 2 {
        let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
        server.say(OK).await;
        let (lines, _) = head_of(&client.hear(b"ok").await).clone_parts();
        assert!(lines.contains(&"x-sg-agent-commit: late".to_owned()), "{lines:?}");
    }
    for _ in 0..ROOM + 2 {
        assert!(within(stage.commits.recv()).await.unwrap().reply.is_closed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_does_not_answer_is_502_and_still_read_anew() {
    let mut stage = stage(PATIENCE).await;
    // It hangs up in the middle of a change, which may have happened.
    let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    server.say(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await;
    drop(server);
    within(stage.commits.recv()).await.unwrap().reply.send(Ok(())).unwrap();
    let (lines, body) = head_of(&client.hear(b"running?\n").await).clone_parts();
    assert_eq!(lines[0], "HTTP/1.1 502 Bad Gateway");
    assert_eq!(body.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
    // Nobody listens.
    let address = stage.upstream.local_addr().unwrap();
    stage.upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = stage.client().await;
    client.say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let said = String::from_utf8(client.hear(b"running?\n").await).unwrap();
    assert!(said.contains(&address.to_string()) && said.contains("refused"), "{said}");
    assert_eq!(stage.gateway.status().unanswered, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_long_to_be_held_is_507_after_its_commit() {
    const LENGTH: usize = 65 << 20;
    let mut stage = stage(PATIENCE).await;
    let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    server.say(format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\nConnection: close\r\n\r\n").as_bytes()).await;
    within(server.say(&vec![7; LENGTH - 1])).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(stage.commits.try_recv().is_err(), "the endpoint hasn't done all of it");
    server.say(&[7]).await;
    let commit = within(stage.commits.recv()).await.unwrap();
    client.has_nothing().await;
    commit.reply.send(Ok(())).unwrap();
    let (lines, body) = head_of(&client.hear(b"changed\n").await).clone_parts();
    assert_eq!(lines[0], "HTTP/1.1 507 Insufficient Storage");
    assert!(String::from_utf8(body).unwrap().contains("longer than 64 MiB"));
    let status = stage.gateway.status();
    assert_eq!((status.committed, status.unanswered), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_committed_though_its_client_has_gone() {
    let mut stage = stage(PATIENCE).await;
    let (mut client, mut server, _) = stage.passes(&change("RunInstances"), b"2016-11-15").await;
    client.0.shutdown().await.unwrap();
    assert_eq!(client.rest().await, "", "the gateway has seen it go");
    server.say(OK).await;
    within(stage.commits.recv()).await.unwrap().reply.send(Ok(())).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_can_not_be_had_is_an_error() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = taken.local_addr().unwrap();
    let start = async |endpoint: &str| {
        let options = Options { address: Some(address), commit_timeout: PATIENCE };
        Gateway::start(&options, endpoint, mpsc::channel(1).0, CancellationToken::new()).await.unwrap_err()
    };
    assert!(matches!(start("http://127.0.0.1:9").await, GatewayError::Listen { .. }));
    let itself = start(&format!("http://localhost:{}", address.port())).await;
    assert!(matches!(itself, GatewayError::Itself { .. }), "{itself}");
}
