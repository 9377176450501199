//! What the agent says (`status`, `explain`) against what is so.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};

use tests::e2e::{Lab, Paused, output, said as said_by, wait_for};

use crate::{try_all, vanish};

#[test]
fn explain_says_what_happens() {
    let mut lab = Lab::with(&["a", "b", "c"])
        .rules(|rules| {
            rules.ingress("sg-b", &["tcp 22 10.0.1.10/32", "udp 5000-5010 0.0.0.0/0", "tcp 3306 sg-c", "tcp 80 ::/0"])
        })
        .rules(|rules| rules.egress("sg-c", &["tcp 22 0.0.0.0/0", "tcp 3306 sg-b"]))
        .start();
    let ports = [22, 80, 3306, 5000, 5011];
    lab.serve("b", &ports);
    let mut said = Vec::new();
    for (from, port, family) in ["a", "c", "outside"]
        .into_iter()
        .flat_map(|from| ports.into_iter().flat_map(move |port| [0, 1].map(|family| (from, port, family))))
    {
        let (address, peer) = (lab.addresses(from)[family].to_string(), lab.addresses("b")[family].to_string());
        let number = port.to_string();
        for (protocol, attempts) in [("tcp", lab.tcp(from, "b", port)), ("udp", lab.udp(from, "b", port))] {
            let packet = ["--proto", protocol, "--port", &number];
            let gate = |arguments: &[&str]| lab.agent.explain(&[arguments, &packet].concat()).0;
            // An address has no gate of its own; an instance has.
            let sender = format!("i-{from}");
            let allowed = gate(&["--to", "i-b", "--from", &address])
                && (from == "outside" || gate(&["--egress", "--from", &sender, "--to", &peer]));
            said.push((attempts[family].clone(), allowed));
        }
    }
    let allowed = said.iter().filter(|(_, allowed)| *allowed).count();
    assert!((5..said.len() - 5).contains(&allowed), "both verdicts are tried: {allowed} of {}", said.len());
    try_all(said);
}

#[test]
fn explain_names_the_rule_or_the_nearest_miss() {
    let lab = Lab::with(&["a", "b"])
        .rules(|rules| {
            rules.ingress("sg-b", &["tcp 22 10.0.1.10/32", "tcp 3306 sg-a"]).egress("sg-a", &["udp 53 0.0.0.0/0"])
        })
        .start();
    let (allowed, said) = lab.agent.explain(&["--to", "i-b", "--from", "10.0.1.10", "--port", "22"]);
    let gate = &said["gates"][0];
    assert!(allowed, "{said:#}");
    assert_eq!((&gate["rule"]["group"], &gate["rule"]["peer"]), (&"sg-b".into(), &"10.0.1.10/32".into()), "{said:#}");
    let (allowed, said) =
        lab.agent.explain(&["--from", "i-a", "--to", "203.0.113.9", "--port", "53", "--proto", "udp"]);
    assert!(allowed && said["gates"][0]["direction"] == "egress" && said["gates"][0]["instance"] == "i-a", "{said:#}");
    for (ends, words) in [
        (["--from", "10.0.1.10", "--to", "i-b", "--egress"].as_slice(), "name that by --from"),
        (&["--from", "i-a", "--to", "i-b", "--egress"], "leave --egress out"),
        (&["--from", "10.0.1.10", "--to", "10.0.1.11"], "neither --from nor --to is an instance"),
    ] {
        let refused = output(lab.agent.command().arg("explain").args(ends).args(["--port", "22"]));
        assert!(
            refused.status.code() == Some(2) && said_by(&refused).contains(words),
            "{ends:?}: {}",
            said_by(&refused)
        );
    }
    let (allowed, said) = lab.agent.explain(&["--to", "i-b", "--from", "203.0.113.9", "--port", "22"]);
    let gate = &said["gates"][0];
    assert!(!allowed, "{said:#}");
    assert_eq!(
        (&gate["reason"], &gate["nearest"]["mismatch"]),
        (&"ENI_SG_RULES_MISMATCH".into(), &"peer".into()),
        "{said:#}"
    );
    // Of two instances both are asked, the sender first.
    let (allowed, said) = lab.agent.explain(&["--to", "i-b", "--from", "i-a", "--port", "3306"]);
    assert!(!allowed, "{said:#}");
    let gates: Vec<_> =
        said["gates"].as_array().into_iter().flatten().map(|gate| (&gate["instance"], &gate["allowed"])).collect();
    assert_eq!(gates, [(&"i-a".into(), &false.into()), (&"i-b".into(), &true.into())], "{said:#}");
    let (allowed, said) = lab.agent.explain(&["--to", "i-a", "--from", "10.0.1.20", "--proto", "icmp"]);
    assert_eq!((allowed, &said["gates"][0]["reason"]), (false, &"SG_HAS_NO_RULES".into()), "{said:#}");
}

#[test]
fn the_status_has_everything_that_scripts_ask_for() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24", "tcp 22 ::/0"]).egress("sg-b", &[]))
        .arguments(&["--publish", "i-b:32022=22"])
        .start();
    lab.serve("b", &[22]);
    lab.tcp("a", "b", 22)[0].passes();
    let status = lab.agent.status();
    assert_eq!(status["enforced"], true, "{status:#}");
    assert_eq!(status["problems"], serde_json::json!([]));
    assert_eq!(status["pid"], lab.agent.pid());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["sources"][0]["source"], lab.rules.path().display().to_string());
    assert_eq!(status["sources"][0]["error"], serde_json::Value::Null);
    assert!(status["sources"][0]["age_seconds"].as_f64().is_some_and(|age| age >= 0.0));
    assert_eq!(status["published"].as_array().map(Vec::len), Some(1));
    for what in ["usage", "capacity"] {
        assert!(status[what].as_object().is_some_and(|object| !object.is_empty()), "{what}: {status:#}");
    }
    let b = lab.world.instance("b");
    let interface = lab.agent.interface("i-b");
    let mac = b.mac.map(|byte| format!("{byte:02x}")).join(":");
    for (field, expected) in [
        ("instance", serde_json::json!("i-b")),
        ("eni", serde_json::json!("eni-i-b")),
        ("link", serde_json::json!("veth-b")),
        ("attached", serde_json::json!(true)),
        ("mac", serde_json::json!(mac)),
        ("groups", serde_json::json!(["sg-b"])),
        ("policy", serde_json::json!("groups")),
        ("ingress_rules", serde_json::json!(2)),
        ("egress_rules", serde_json::json!(0)),
        ("network_acl", serde_json::Value::Null),
    ] {
        assert_eq!(interface[field], expected, "{field}: {interface:#}");
    }
    let addresses: Vec<_> = interface["addresses"].as_array().into_iter().flatten().collect();
    assert_eq!(addresses[0], "10.0.1.20");
    assert!(addresses.contains(&&"2001:db8:1::20".into()), "{addresses:?}");
    assert!(interface["counters"]["ingress"]["new"]["packets"].as_u64() >= Some(1), "{interface:#}");
    // A change of the rules is a new epoch of the policy, and a commit.
    lab.change(|rules| rules.ingress("sg-b", &[]));
    assert!(lab.agent.status()["generation"].as_u64() > status["generation"].as_u64());
    assert_ne!(lab.agent.interface("i-b")["epoch"], interface["epoch"]);
}

#[test]
fn the_metrics_count_what_the_status_counts() {
    const PORT: u16 = 9464;
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24"]))
        .arguments(&["--metrics", &format!("127.0.0.1:{PORT}")])
        .start();
    lab.serve("b", &[22]);
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("a", "b", 23)[0].vanishes();
    let scrape = |path: &str| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).expect("the agent listens");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    lab.world.host.run(|| {
        let answer = scrape("/metrics");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let figure = |name: &str, labels: &[&str]| {
            let is_it = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
            let line = answer.lines().find(is_it).unwrap_or_else(|| panic!("{name} {labels:?} is not in {answer}"));
            line.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok()).expect("a number")
        };
        assert_eq!(figure("sg_agent_enforced ", &[]), 1.0);
        assert_eq!(figure("sg_agent_interface_attached", &["i-b", "veth-b"]), 1.0);
        let packets = |reason| figure("sg_agent_packets_total", &["i-b", "ingress", reason]);
        assert!(packets("\"new\"") >= 1.0 && packets("\"no_rule\"") >= 1.0);
        assert!(scrape("/").starts_with("HTTP/1.1 404 "));
    });
}

/// The agent stands still while more is dropped than its log has room for: what it can't tell of it counts.
#[test]
fn lines_of_the_drop_log_that_are_lost_are_counted() {
    const DATAGRAMS: u64 = 5_000;
    let mut lab = Lab::with(&["a", "b"]).arguments(&["--log-drops"]).start();
    lab.serve("b", &[5000]);
    let [to, _] = lab.addresses("b");
    vanish(lab.udp("a", "b", 5000).into_iter().take(1));
    let lines = |lab: &Lab| lab.agent.log().matches("ingress dropped: no_rule").count() as u64;
    let lost = |lab: &Lab| lab.agent.status()["lost_log_lines"].as_u64().expect("a number");
    assert_eq!(lost(&lab), 0, "so few are all told");
    let paused = Paused::agent(&lab.agent);
    lab.world.namespace("a").run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        for _ in 0..DATAGRAMS {
            socket.send_to(b"x", (to, 5000)).expect("sending can't fail");
        }
    });
    drop(paused);
    wait_for("all are told or counted", || {
        let dropped = lab.agent.packets("i-b", "ingress", "no_rule");
        (dropped >= DATAGRAMS && lines(&lab) + lost(&lab) == dropped).then_some(())
    });
    assert!(lost(&lab) > 0 && lines(&lab) > 100, "{} lost, {} told", lost(&lab), lines(&lab));
}
