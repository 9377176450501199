//! Input that can't be used: one clear line that names it, the last good policy goes on, and nothing gets wider.

use std::process::Command;

use serde_json::{Value, json};
use tests::e2e::{Agent, Attempt, Endpoint, Lab, Rules, Server, World, output, wait_for};

use crate::{pass, vanish};

#[test]
fn an_invalid_rule_is_named_and_widens_nothing() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24"])).start();
    lab.serve("b", &[22, 23]);
    let any = json!([{"CidrIp": "0.0.0.0/0"}]);
    let bad: [(&str, Value); 9] = [
        (
            "10.0.0.0/33",
            json!({"IpProtocol": "tcp", "FromPort": 23, "ToPort": 23, "IpRanges": [{"CidrIp": "10.0.0.0/33"}]}),
        ),
        ("zzz", json!({"IpProtocol": "-1", "IpRanges": [{"CidrIp": "zzz"}]})),
        ("2001:db8::/129", json!({"IpProtocol": "-1", "Ipv6Ranges": [{"CidrIpv6": "2001:db8::/129"}]})),
        ("65000", json!({"IpProtocol": "tcp", "FromPort": 65000, "ToPort": 1, "IpRanges": any})),
        ("70000", json!({"IpProtocol": "tcp", "FromPort": 0, "ToPort": 70000, "IpRanges": any})),
        ("bogus", json!({"IpProtocol": "bogus", "IpRanges": any})),
        ("300", json!({"IpProtocol": "300", "IpRanges": any})),
        ("protocol", json!({"FromPort": 0, "ToPort": 65535, "IpRanges": any})),
        ("sg-gone", json!({"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-gone"}]})),
    ];
    let good = lab.rules.clone();
    for (word, rule) in bad {
        let before = lab.agent.log();
        lab.change(|rules| rules.ingress_json("sg-b", rule.clone()));
        let log = lab.agent.log();
        let news = log.strip_prefix(&before).expect("the log only grows");
        let named: Vec<_> = news.lines().filter(|line| line.contains("WARN") && line.contains(word)).collect();
        assert_eq!(named.len(), 1, "one line names {word}: {news}");
        let status = lab.agent.status();
        assert!(status["warnings"].to_string().contains(word), "{word}: {:#}", status["warnings"]);
        lab.tcp("a", "b", 22)[0].passes();
        vanish(
            [lab.tcp("a", "b", 23), lab.udp("a", "b", 23), lab.ping("a", "b"), lab.tcp("outside", "b", 22)].concat(),
        );
        lab.rules = good.clone();
    }
    // With the last of them gone, the warning is.
    lab.change(|rules| rules);
    assert_eq!(lab.agent.status()["warnings"], json!([]));
}

#[test]
fn a_file_that_breaks_leaves_the_last_good_policy() {
    let mut lab = Lab::with(&["a", "b"])
        .rules(|rules| rules.ingress("sg-b", &["tcp 22 10.0.1.0/24", "tcp 22 2001:db8:1::/64"]))
        .start();
    lab.serve("b", &[22, 23]);
    let path = lab.rules.path().display().to_string();
    let (cut, misspelt) = (r#"{"SecurityGroups": ["#, "{\n  \"SecurityGrups\": []\n}");
    for (text, words) in [(cut, ":1:"), (misspelt, "SecurityGrups"), ("{}", "has none of"), ("", ":1:")] {
        let before = lab.agent.log();
        lab.rules.write_text(text);
        let status = wait_for(&format!("the error about {text:?}"), || {
            let status = lab.agent.status();
            let error = status["sources"][0]["error"].as_str()?;
            error.contains(words).then(|| status.clone())
        });
        assert_eq!(status["enforced"], false, "what is desired isn't known: {status:#}");
        assert!(status["problems"].to_string().contains(&path), "{status:#}");
        let log = lab.agent.log();
        let news = log.strip_prefix(&before).expect("the log only grows");
        let named: Vec<_> = news.lines().filter(|line| line.contains(&path)).collect();
        assert_eq!(named.len(), 1, "one line: {news}");
        assert!(named[0].contains("the last good policy stands"), "{news}");
        pass(lab.tcp("a", "b", 22));
        vanish(lab.tcp("a", "b", 23));
    }
    std::fs::remove_file(lab.rules.path()).expect("the file is there");
    wait_for("the error about the file that is gone", || {
        lab.agent.status()["sources"][0]["error"].as_str()?.contains("No such file").then_some(())
    });
    pass(lab.tcp("a", "b", 22));
    vanish(lab.tcp("a", "b", 23));
    // And it recovers by itself.
    lab.change(|rules| rules.ingress("sg-b", &["tcp 23 10.0.1.0/24", "tcp 23 2001:db8:1::/64"]));
    pass(lab.tcp("a", "b", 23));
    vanish(lab.tcp("a", "b", 22));
    assert_eq!(lab.agent.status()["enforced"], true);
}

#[test]
fn a_rules_file_without_rules_at_the_start_denies_and_is_waited_for() {
    let world = World::new(&["a", "b"]);
    let mut agent = Agent::new(Some(&world.host));
    let path = agent.directory().join("none.json");
    agent.arguments(["--no-docker", "--attach", "i-b=veth-b", "--rules"]).arguments([&path]);
    std::fs::write(&path, "").expect("a new file, that somebody is about to write");
    agent.start();
    agent.logged(&["WARN", "none.json", "EOF"]);
    let status = output(agent.command().args(["status", "--wait", "0.5"]));
    let said = String::from_utf8_lossy(&status.stderr).into_owned();
    assert!(!status.status.success() && said.trim().lines().count() == 1, "{said}");
    let server = Server::start(world.namespace("b"), 22);
    let attempt = Attempt::tcp(world.namespace("a"), world.instance("b").v4.into(), 22);
    attempt.vanishes();
    assert_eq!(server.accepted(), 0);
    let mut rules = Rules::new(&path);
    rules.ingress("sg-b", &["tcp 22 0.0.0.0/0"]).instance("i-b", &["sg-b"], &world.instance("b").addresses()).write();
    agent.wait();
    attempt.passes();
}

#[test]
fn an_endpoint_that_does_not_answer_is_named() {
    let world = World::new(&["a", "b"]);
    let endpoint = Endpoint::start(Some(&world.host));
    let html = "<!doctype html>\n<title>500 Internal Server Error</title>\n<h1>Internal Server Error</h1>";
    let mut agent = Agent::new(Some(&world.host));
    agent.environment("AWS_ACCESS_KEY_ID", "test").environment("AWS_SECRET_ACCESS_KEY", "test");
    agent.arguments(["--no-docker", "--attach", "i-b=veth-b", "--poll-interval", "0.1", "--endpoint-url"]);
    agent.arguments([endpoint.url()]);
    endpoint.answer("500 INTERNAL SERVER ERROR", "text/html; charset=utf-8", html);
    agent.start();
    let line = agent.logged(&["WARN", &endpoint.url(), "HTTP 500"]);
    assert!(line.contains("Describe") && !line.contains("<h1>"), "it names the call, and spares the page: {line}");
    // Whatever else comes is told once, too.
    endpoint.answer("200 OK", "text/html", "<html><body>a login page</body></html>");
    agent.logged(&["WARN", &endpoint.url(), "HTTP 200", "a login page"]);
    let url = endpoint.url();
    drop(endpoint);
    agent.logged(&["WARN", &url, "can't be reached"]);
    let log = agent.log();
    for words in ["HTTP 500", "HTTP 200", "can't be reached"] {
        let lines = log.lines().filter(|line| line.contains("WARN") && line.contains(words)).count();
        assert_eq!(lines, 1, "one line says {words:?}: {log}");
    }
    // What isn't known is denied.
    let _server = Server::start(world.namespace("b"), 22);
    let attempt = Attempt::tcp(world.namespace("a"), world.instance("b").v4.into(), 22);
    attempt.vanishes();
    let status = agent.status();
    assert_eq!(status["enforced"], false, "{status:#}");
    // It was the agent that denied.
    agent.stop();
    agent.detach();
    attempt.passes();
}

#[test]
fn a_port_that_the_gateway_can_not_have_is_named() {
    let world = World::new(&["b"]);
    let endpoint = Endpoint::start(Some(&world.host));
    let taken = world.host.run(|| std::net::TcpListener::bind("127.0.0.1:4566").expect("it is free"));
    let agent = || {
        let mut agent = Agent::new(Some(&world.host));
        agent.environment("AWS_ACCESS_KEY_ID", "test").environment("AWS_SECRET_ACCESS_KEY", "test");
        agent.arguments(["--no-docker", "--endpoint-url", &endpoint.url()]);
        agent
    };
    // By default it does without.
    let mut by_default = agent();
    by_default.start();
    by_default.logged(&["WARN", "cannot listen on 127.0.0.1:4566", "by polling alone"]);
    let status = by_default.status();
    assert_eq!(status["gateway"], Value::Null, "{status:#}");
    assert!(status["warnings"].to_string().contains("--no-gateway"), "{status:#}");
    by_default.stop();
    // Where it was asked for, it can't.
    let named = agent();
    let run = ["run", "--no-docker", "--endpoint-url", &endpoint.url(), "--gateway", "127.0.0.1:4566"];
    let ended = output(named.command().args(run));
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let errors: Vec<_> = said.lines().filter(|line| line.starts_with("sg-agent: ")).collect();
    assert!(!ended.status.success() && errors.len() == 1 && errors[0].contains("127.0.0.1:4566"), "{said}");
    drop(taken);
    // Nor can it stand before itself.
    let itself = named
        .command()
        .args(["run", "--no-docker", "--endpoint-url", "http://127.0.0.1:4566"])
        .args(&run[4..])
        .output();
    let said = String::from_utf8_lossy(&itself.expect("it runs").stderr).into_owned();
    assert!(said.contains("is the endpoint's own"), "{said}");
}

#[test]
fn arguments_that_can_not_be_used_are_named() {
    let world = World::new(&["b"]);
    let agent = Agent::new(Some(&world.host));
    for (arguments, words) in [
        (&["--attach", "i-b"][..], "'i-b'|\"i-b\""),
        (&["--attach", "i-b=veth-b,ip=10.0.1.300"], "10.0.1.300"),
        (&["--attach", "i-b=a-name-that-is-too-long"], "a-name-that-is-too-long"),
        (&["--attach", "i-b=veth-b,mac=nonsense"], "nonsense"),
        (&["--attach", "i-b=veth-b,speed=10"], "speed"),
        (&["--publish", "i-b:70000=22"], "70000"),
        (&["--exempt", "192.0.2.53"], "192.0.2.53"),
        (&["--udp-timeout", "5"], "5"),
        (&["--endpoint-url", "ftp://127.0.0.1/"], "ftp://127.0.0.1/"),
        (&["--rules", "/no/such/rules.json"], "/no/such/rules.json: there is no such file"),
        (&["--endpoint-url", "http://127.0.0.1:1", "--region", "Mars!"], "Mars!"),
        (&["--endpoint-url", "http://127.0.0.1:1", "--account", "me"], "me"),
    ] {
        let ended = output(agent.command().args(["run", "--no-docker"]).args(arguments));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        let errors: Vec<_> =
            said.lines().filter(|line| line.starts_with("error: ") || line.starts_with("sg-agent: ")).collect();
        assert!(!ended.status.success() && errors.len() == 1, "{arguments:?}: {said}");
        assert!(words.split('|').any(|word| errors[0].contains(word)), "{arguments:?}: {said}");
    }
}

#[test]
fn a_link_that_can_not_be_attached_to_is_named() {
    let mut lab = Lab::with(&["a", "b"]).arguments(&["--attach", "i-x=nowhere0", "--attach", "i-y=br0"]).start();
    lab.serve("b", &[22]);
    let status = lab.agent.status();
    let warnings = status["warnings"].to_string();
    assert!(warnings.contains("nowhere0") && warnings.contains("br0"), "{status:#}");
    for link in ["nowhere0", "br0"] {
        let log = lab.agent.log();
        let named = log.lines().filter(|line| line.contains("WARN") && line.contains(link)).count();
        assert_eq!(named, 1, "one line names {link}: {log}");
    }
    vanish(lab.tcp("a", "b", 22));
}

#[test]
fn without_root_it_says_so() {
    let mut lab = Lab::with(&["b"]).start();
    lab.agent.wait();
    // A copy that anybody may run: the one that was built may be in somebody's home directory.
    let copy = lab.agent.directory().join("sg-agent");
    std::fs::copy(lab.agent.command().get_program(), &copy).expect("room for a copy");
    let state = lab.agent.directory().join("state");
    for (subcommand, words) in [
        (&["run", "--no-docker"][..], "needs root"),
        (&["detach"], "needs root"),
        (&["status"], "root"),
        (&["explain", "--to", "i-b", "--from", "10.0.1.1", "--port", "22"], "root"),
    ] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy).args(subcommand);
        let ended = output(command.arg("--state-dir").arg(&state));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && said.contains(words), "{subcommand:?}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{subcommand:?}: {said}");
    }
    assert_eq!(lab.agent.status()["enforced"], true, "the agent doesn't mind");
}

#[test]
fn a_change_that_does_not_fit_is_refused_whole_and_said_everywhere() {
    // SG-1.14
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["tcp 22 0.0.0.0/0"])).start();
    lab.serve("b", &[22, 80]);
    assert_eq!(lab.agent.status()["refused_changes"], 0);
    let good = lab.rules.clone();
    // One group more than an address can be in, and each of them referred to.
    let names: Vec<String> = (0..17).map(|number| format!("sg-z{number:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let references: Vec<String> = names.iter().map(|name| format!("tcp 80 {name}")).collect();
    let references: Vec<&str> = references.iter().map(String::as_str).collect();
    names.iter().for_each(|name| {
        lab.rules.ingress(name, &[]);
    });
    lab.rules.ingress("sg-b", &references).member("i-a", &names).write();
    let line = lab.agent.logged(&["ERROR", "10.0.1.", "17", "refused whole, the old policy stands"]);
    assert!(!line.contains("sg-b"), "it names the address: {line}");
    let status = lab.agent.status();
    assert!(status["problems"].to_string().contains("refused whole"), "{status:#}");
    assert_eq!((&status["refused_changes"], &status["enforced"]), (&json!(1), &json!(false)), "{status:#}");
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("a", "b", 80)[0].vanishes();

    lab.rules = good;
    lab.change(|rules| rules.ingress("sg-b", &["tcp 80 0.0.0.0/0"]));
    let status = lab.agent.status();
    assert_eq!((&status["problems"], &status["refused_changes"]), (&json!([]), &json!(1)), "{status:#}");
    lab.tcp("a", "b", 80)[0].passes();
    lab.tcp("a", "b", 22)[0].vanishes();
}

#[test]
fn a_group_that_is_listed_twice_is_one_or_a_contradiction() {
    let mut lab = Lab::with(&["a", "b"]).rules(|rules| rules.ingress("sg-b", &["tcp 22 0.0.0.0/0"])).start();
    lab.serve("b", &[22, 80]);
    let text = std::fs::read_to_string(lab.rules.path()).expect("the file");
    let document: Value = serde_json::from_str(&text).expect("what was written");
    let groups = document["SecurityGroups"].clone();
    // An object of the AWS CLI's for each call, and two of them with the same groups.
    lab.rules.write_text(&json!([document, {"SecurityGroups": groups}]).to_string());
    lab.agent.wait();
    assert_eq!(lab.agent.status()["warnings"], json!([]));
    lab.tcp("a", "b", 22)[0].passes();

    let other = text.replace("\"FromPort\":22,", "\"FromPort\":80,").replace("\"ToPort\":22", "\"ToPort\":80");
    let other: Value = serde_json::from_str(&other).expect("what was written, with another port");
    assert_ne!(other, document);
    lab.rules.write_text(&json!([document, {"SecurityGroups": other["SecurityGroups"]}]).to_string());
    let path = lab.rules.path().display().to_string();
    lab.agent.logged(&["WARN", &path, "security group sg-b is listed twice", "last good policy"]);
    lab.tcp("a", "b", 22)[0].passes();
    lab.tcp("a", "b", 80)[0].vanishes();
}
