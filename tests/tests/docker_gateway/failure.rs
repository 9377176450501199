//! The endpoint is away, hangs, is slow, talks nonsense or has lost its memory: what is enforced meanwhile, what `status`
//! and the log say, and that it passes.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::e2e::{Moto, Server, wait_for};

use crate::Stage;

impl Stage<'_> {
    /// Port 22 is allowed and 23 isn't, as when the endpoint was last heard.
    #[track_caller]
    fn stands(&self) {
        self.tcp(22).passes();
        self.tcp(23).vanishes();
    }

    /// Waits until the status names a problem with this in it.
    #[track_caller]
    fn has_problem(&self, words: &str) -> Value {
        wait_for(&format!("a problem with {words:?}"), || {
            let status = self.agent.status();
            status["problems"].to_string().contains(words).then_some(status)
        })
    }

    /// Waits until all is well again.
    #[track_caller]
    fn is_well(&mut self) {
        self.agent.wait();
        assert_eq!(self.agent.status()["enforced"], true);
    }

    /// A server behind the rule, and one where there is none.
    fn servers(&self) -> [Server; 2] {
        self.moto.authorize(&self.group, 22, "0.0.0.0/0");
        [self.serve(22), self.serve(23)]
    }
}

#[test]
fn while_the_endpoint_is_away_the_last_policy_stands() {
    let moto = Moto::own();
    let mut stage = Stage::new(&moto);
    let _servers = stage.servers();
    stage.agent.start().wait();
    stage.stands();
    moto.stop();
    let status = stage.has_problem("can't be reached");
    assert_eq!(status["enforced"], false, "{status:#}");
    assert!(status["sources"][0]["age_seconds"].as_f64().is_some(), "it was read once: {status:#}");
    stage.agent.logged(&["WARN", "can't be reached", "the last good policy stands"]);
    stage.stands();
    // A client of the gateway is told, in one line, and what it may have changed isn't claimed to be enforced.
    let answer = stage.gateway.answer(("test", "us-east-1"), "DeleteSecurityGroup", &[("GroupId", &stage.group)]);
    let answer = answer.expect("the gateway answers");
    assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway") || answer.starts_with("HTTP/1.0 502"), "{answer}");
    assert!(
        answer.contains("x-sg-agent-commit: failed; ") && answer.trim_end().ends_with("is it running?"),
        "{answer}"
    );
    let gateway = &stage.agent.status()["gateway"];
    assert_eq!((&gateway["failed"], &gateway["unanswered"]), (&1.into(), &1.into()), "{gateway:#}");
}

#[test]
fn while_the_endpoint_hangs_a_change_is_answered_late_and_nothing_else_waits() {
    let mut stage = Stage::with(Moto::shared(), "0.2", "0.5");
    let publish = format!("{}:203.0.113.1:2222=22", stage.id);
    stage.agent.arguments(["--fresh-timeout", "0.5", "--publish", &publish]);
    let [server, _other] = stage.servers();
    stage.agent.start().wait();
    // The change goes through and is answered; reading it anew hangs.
    let upstream = stage.moto.address();
    let (group, port) = (stage.group.clone(), ("IpPermissions.1.FromPort", "23"));
    let rule = [
        ("GroupId", group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        port,
        ("IpPermissions.1.ToPort", "23"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    stage.endpoint.hang_all_but("AuthorizeSecurityGroupIngress", upstream);
    let answer = stage.gateway.answer(("test", "us-east-1"), "AuthorizeSecurityGroupIngress", &rule);
    let answer = answer.expect("the gateway answers");
    assert!(answer.contains(" 200 ") && answer.contains("x-sg-agent-commit: late"), "{answer}");
    // A connection to a published port waits for fresh rules only so long; then the last ones stand. Nothing else tells
    // the agent that it is late: it isn't asked for its status, and the read that hangs isn't over.
    let (before, asked) = (server.accepted(), stage.endpoint.asked());
    let published = tests::e2e::Attempt::tcp(&stage.world.outside, [203, 0, 113, 1].into(), 2222);
    let has_waited = |_| {
        let began = Instant::now();
        published.passes();
        // The agent and the client hear at the same time that it is late; either may be first.
        began.elapsed() >= Duration::from_millis(500) || {
            thread::sleep(Duration::from_millis(20));
            false
        }
    };
    assert!((0..50).any(has_waited), "rules are stale, and nobody waits for fresh ones");
    assert!(server.accepted() > before);
    assert_eq!(stage.agent.status()["gateway"]["late"], 1);
    stage.agent.logged(&["WARN", "answered before it is enforced", "late"]);
    stage.stands();
    stage.has_problem("can't be reached");
    wait_for("the endpoint to be asked once more", || (stage.endpoint.asked() > asked).then_some(()));
    stage.endpoint.forward(upstream);
    stage.is_well();
    stage.tcp(23).passes();
}

#[test]
fn a_slow_endpoint_is_waited_for() {
    let mut stage = Stage::new(Moto::shared());
    let _servers = stage.servers();
    stage.agent.start().wait();
    stage.endpoint.delay(stage.moto.address(), Duration::from_millis(300));
    stage.gateway.revoke(&stage.group, 22, "0.0.0.0/0");
    stage.tcp(22).vanishes();
    stage.gateway.authorize(&stage.group, 23, "0.0.0.0/0");
    stage.tcp(23).passes();
    assert_eq!(stage.agent.status()["gateway"]["late"], 0);
}

#[test]
fn nonsense_changes_nothing() {
    let mut stage = Stage::new(Moto::shared());
    let _servers = stage.servers();
    stage.agent.start().wait();
    let empty = r#"<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15"><reserv"#;
    for (status, kind, body, words) in [
        ("200 OK", "text/xml", "", "Describe"),
        ("200 OK", "text/html", "<html><body>a login page</body></html>", "html"),
        ("200 OK", "application/json", "{\"instances\": []}", "Describe"),
        ("200 OK", "text/xml", empty, "Describe"),
        ("200 OK", "text/xml", "<ListAllMyBucketsResult></ListAllMyBucketsResult>", "ListAllMyBucketsResult"),
        ("500 INTERNAL SERVER ERROR", "text/html", "<h1>Internal Server Error</h1>", "500"),
        ("302 Found", "text/plain", "elsewhere", "302"),
    ] {
        stage.endpoint.answer(status, kind, body);
        let status = stage.has_problem(words);
        assert_eq!(status["enforced"], false, "{body:?}: {status:#}");
        stage.stands();
        // Or the next one's problem could be this one's.
        stage.endpoint.forward(stage.moto.address());
        stage.is_well();
        stage.stands();
    }
}

#[test]
fn an_endpoint_that_begins_anew_takes_no_policy_away() {
    let moto = Moto::own();
    let seed = || {
        // What Moto makes by itself comes before.
        moto.call("DescribeVpcs", &[]);
        moto.control("seed?a=4711");
    };
    seed();
    let mut stage = Stage::new(&moto);
    let _servers = stage.servers();
    stage.agent.start().wait();
    stage.stands();
    let known = |stage: &Stage| stage.agent.interface(&stage.id)["policy"].clone();
    // It is up again, and knows nothing.
    moto.restart();
    stage.agent.logged(&["WARN", &stage.id, "no longer known", "its last policy stands"]);
    stage.agent.wait();
    stage.stands();
    assert_eq!(known(&stage), "groups");
    // The same ids come back, with another rule: now that one counts.
    seed();
    let again = Stage::again(&stage);
    assert_eq!(again, (stage.group.clone(), stage.id.clone()), "the seed gives the same ids");
    moto.authorize(&stage.group, 23, "0.0.0.0/0");
    stage.agent.wait();
    stage.tcp(22).vanishes();
    stage.tcp(23).passes();
    assert!(!stage.agent.status()["warnings"].to_string().contains("no longer known"));
    // The same through the gateway: the reset is read before it is answered.
    let reset = stage.gateway.control("reset");
    assert!(!reset.contains("x-sg-agent-commit"), "{reset}");
    assert!(stage.agent.status()["warnings"].to_string().contains("no longer known"));
    stage.tcp(23).passes();
}

impl Stage<'_> {
    /// Makes the group and the instance once more; their ids.
    #[track_caller]
    fn again(&self) -> (String, String) {
        let group = self.moto.group();
        let id = self.moto.instance(&[&group]);
        (group, id)
    }
}

#[test]
fn what_is_unknown_is_denied_kept_or_allowed() {
    for (choice, never, lost, away) in
        [("deny", false, false, false), ("last", false, true, true), ("allow", true, true, true)]
    {
        let moto = Moto::own();
        let mut stage = Stage::new(&moto);
        stage.agent.arguments(["--unknown", choice]);
        let _servers = stage.servers();
        // Never known: the agent has heard of nothing but its name.
        moto.restart();
        stage.agent.start().wait();
        assert_eq!(stage.agent.interface(&stage.id)["eni"], Value::Null);
        stage.tcp(22).passes_if(never);
        drop(stage);

        let mut stage = Stage::new(&moto);
        stage.agent.arguments(["--unknown", choice]);
        let _servers = stage.servers();
        stage.agent.start().wait();
        stage.stands();
        // Known once, and forgotten.
        moto.control("reset");
        stage.agent.logged(&["WARN", &stage.id, "known to the control plane"]);
        stage.tcp(22).passes_if(lost);
        stage.tcp(23).vanishes();
        drop(stage);

        let mut stage = Stage::new(&moto);
        stage.agent.arguments(["--unknown", choice]);
        let _servers = stage.servers();
        stage.agent.start().wait();
        stage.stands();
        // Known, and not to be asked about.
        moto.stop();
        stage.has_problem("can't be reached");
        stage.tcp(22).passes_if(away);
        stage.tcp(23).vanishes();
        moto.restart();
    }
}

#[test]
fn a_connection_to_a_published_port_has_stale_rules_read_anew() {
    let mut stage = Stage::polling(Moto::shared(), "3600");
    let publish = format!("{}:203.0.113.1:2222=22", stage.id);
    // Long: the test is about what wakes it, not about how long it sleeps.
    stage.agent.arguments(["--publish", &publish, "--fresh-timeout", "60"]);
    // Nor about who asks first, if it takes so long that the agent asks again by itself: refused by either.
    stage.agent.arguments(["--early-drop", "off"]);
    let _servers = stage.servers();
    stage.agent.start().wait();
    let published = tests::e2e::Attempt::tcp(&stage.world.outside, [203, 0, 113, 1].into(), 2222);
    published.passes();
    // The endpoint is away when a change is to be committed, and back soon after.
    let upstream = stage.moto.address();
    let rule = [
        ("GroupId", stage.group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    stage.endpoint.hang_up_on_all_but("RevokeSecurityGroupIngress", upstream);
    let answer = stage.gateway.answer(("test", "us-east-1"), "RevokeSecurityGroupIngress", &rule);
    let answer = answer.expect("the gateway answers");
    assert!(answer.contains(" 200 ") && answer.contains("x-sg-agent-commit: failed"), "{answer}");
    published.passes();
    stage.endpoint.forward(upstream);
    published.is_refused();
    stage.tcp(22).vanishes();
    stage.is_well();
}

#[test]
fn a_connection_to_a_published_port_has_rules_read_anew_that_were_refused() {
    let mut stage = Stage::polling(Moto::shared(), "3600");
    let publish = format!("{}:203.0.113.1:2222=22", stage.id);
    stage.agent.arguments(["--publish", &publish, "--fresh-timeout", "60"]);
    let _servers = stage.servers();
    // One group more than an address can be in.
    let groups: Vec<String> = (0..17).map(|_| stage.moto.group()).collect();
    stage.moto.instance(&groups.iter().map(String::as_str).collect::<Vec<_>>());
    stage.agent.start().wait();
    let published = tests::e2e::Attempt::tcp(&stage.world.outside, [203, 0, 113, 1].into(), 2222);
    published.passes();
    let names: Vec<String> = (1..=groups.len()).map(|n| format!("IpPermissions.1.Groups.{n}.GroupId")).collect();
    let mut rule = vec![
        ("GroupId", stage.group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "80"),
        ("IpPermissions.1.ToPort", "80"),
    ];
    rule.extend(names.iter().zip(&groups).map(|(name, group)| (name.as_str(), group.as_str())));
    let answer = stage.gateway.answer(("test", "us-east-1"), "AuthorizeSecurityGroupIngress", &rule);
    let answer = answer.expect("the gateway answers");
    assert!(answer.contains(" 200 ") && answer.contains("x-sg-agent-commit: failed"), "{answer}");
    assert!(answer.contains("refused whole"), "{answer}");
    published.passes();
    // It fits again, which the agent isn't told: who comes finds out.
    stage.moto.call("RevokeSecurityGroupIngress", &rule);
    stage.moto.revoke(&stage.group, 22, "0.0.0.0/0");
    published.is_refused();
    stage.tcp(22).vanishes();
    stage.is_well();
}

#[test]
fn a_docker_engine_that_hangs_holds_no_change_up() {
    let mut stage = Stage::new(Moto::shared());
    let socket = stage.agent.directory().join("docker.sock");
    let engine = Engine::listen(&socket);
    stage.agent.environment("DOCKER_HOST", format!("unix://{}", socket.display()));
    stage.agent.without("--no-docker");
    let _servers = stage.servers();
    stage.agent.start().wait();
    stage.stands();
    engine.hangs.store(true, SeqCst);
    // A link comes: a look begins, and hangs at the engine.
    stage.world.host.ip("link add veth-new type veth peer name veth-end");
    wait_for("the agent to ask the engine", || engine.hung.load(SeqCst).then_some(()));
    stage.gateway.revoke(&stage.group, 22, "0.0.0.0/0");
    stage.tcp(22).vanishes();
    let gateway = &stage.agent.status()["gateway"];
    assert_eq!((&gateway["committed"], &gateway["late"]), (&1.into(), &0.into()), "{gateway:#}");
}

/// A Docker engine without a container, that can be made to hang.
struct Engine {
    hangs: Arc<AtomicBool>,
    hung: Arc<AtomicBool>,
}

impl Engine {
    fn listen(path: &std::path::Path) -> Self {
        let listener = UnixListener::bind(path).expect("a socket in the agent's directory");
        let engine = Self { hangs: Arc::default(), hung: Arc::default() };
        let (hangs, hung) = (Arc::clone(&engine.hangs), Arc::clone(&engine.hung));
        // They end with the program.
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (hangs, hung) = (Arc::clone(&hangs), Arc::clone(&hung));
                thread::spawn(move || {
                    let mut buffer = [0; 8192];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let request = String::from_utf8_lossy(&buffer[..length]).into_owned();
                        let is_stream = request.contains("/events");
                        if hangs.load(SeqCst) && !is_stream {
                            hung.store(true, SeqCst);
                            thread::park();
                        }
                        let body = if request.contains("/version") { r#"{"ApiVersion":"1.47"}"# } else { "[]" };
                        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
                        let answer = if is_stream {
                            format!("{head}Transfer-Encoding: chunked\r\n\r\n")
                        } else {
                            format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())
                        };
                        if stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        engine
    }
}
