//! Moto's ugly answers: an invalid rule never widens anything, and a control plane that is away changes nothing.

use tests::e2e::{Endpoint, wait_for};

use crate::Stage;

#[test]
fn what_moto_takes_and_aws_would_not_widens_nothing() {
    let mut stage = Stage::new();
    let moto = stage.moto;
    let group = moto.group();
    moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    let gone = moto.group();
    let permission = |words: &[(&str, &str)], peer: (&str, &str)| {
        let keyed = |(key, value): (&str, &str)| (format!("IpPermissions.1.{key}"), value.to_owned());
        let all: Vec<_> = words.iter().copied().chain([peer]).map(keyed).collect();
        let mut all: Vec<(&str, &str)> = all.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        all.push(("GroupId", &group));
        moto.call("AuthorizeSecurityGroupIngress", &all);
    };
    let any = ("IpRanges.1.CidrIp", "0.0.0.0/0");
    permission(&[("IpProtocol", "tcp"), ("FromPort", "65000"), ("ToPort", "1")], any);
    permission(&[("IpProtocol", "tcp"), ("FromPort", "0"), ("ToPort", "70000")], any);
    permission(&[("IpProtocol", "bogus"), ("FromPort", "0"), ("ToPort", "65535")], any);
    permission(&[("IpProtocol", "300"), ("FromPort", "0"), ("ToPort", "65535")], any);
    permission(&[("FromPort", "0"), ("ToPort", "65535")], any);
    permission(&[("IpProtocol", "-1")], ("Groups.1.GroupId", &gone));
    permission(&[("IpProtocol", "-1")], ("PrefixListIds.1.PrefixListId", "pl-0123456789abcdef0"));
    moto.call("DeleteSecurityGroup", &[("GroupId", &gone)]);
    stage.agent.start().wait();
    let _servers = [22, 23, 65000].map(|port| b.serve(port));
    a.tcp(&b, 22).passes();
    a.tcp(&b, 23).vanishes();
    a.tcp(&b, 65000).vanishes();
    let log = stage.agent.log();
    for word in ["65000", "70000", "bogus", "300", "protocol", &gone, "pl-0123456789abcdef0"] {
        let lines = log.lines().filter(|line| line.contains("WARN") && line.contains(&group) && line.contains(word));
        assert!(lines.count() >= 1, "a line names {word}: {log}");
    }
}

#[test]
fn while_the_control_plane_is_away_the_last_good_policy_stands() {
    let mut stage = Stage::new();
    let moto = stage.moto;
    let group = moto.group();
    moto.authorize(&group, 22, "0.0.0.0/0");
    let (a, b) = (stage.instance("a", &[&group]), stage.instance("b", &[&group]));
    let front = Endpoint::start(None);
    front.forward(moto.address());
    let mut agent = tests::e2e::Agent::new(None);
    moto.serve(&mut agent, &front.url());
    stage.agent = agent;
    stage.agent.start().wait();
    let _servers = [22, 23].map(|port| b.serve(port));
    let html = "<!doctype html>\n<title>500 Internal Server Error</title>\n<h1>Internal Server Error</h1>";
    let error = "<Response><Errors><Error><Code>InternalError</Code><Message>no</Message></Error></Errors></Response>";
    // Cut off, whichever call a read that is under way comes to.
    let empty = "<{action}Response xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><reservationSet/>";
    let s3 = "<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>";
    for (status, kind, body) in [
        ("500 INTERNAL SERVER ERROR", "text/html", html),
        ("400 BAD REQUEST", "text/xml", error),
        ("200 OK", "text/xml", empty),
        ("200 OK", "text/xml", s3),
        ("200 OK", "text/html", html),
        ("", "", ""),
    ] {
        let before = stage.agent.log();
        match status {
            "" => front.hang_up(),
            _ => front.answer(status, kind, body),
        }
        let asked = front.asked();
        wait_for("it is asked again", || (front.asked() > asked + 1).then_some(()));
        wait_for("the status tells of it", || {
            let status = stage.agent.status();
            let error = status["sources"][0]["error"].as_str()?;
            (status["enforced"] == false && error.contains(&front.url())).then_some(())
        });
        a.tcp(&b, 22).passes();
        a.tcp(&b, 23).vanishes();
        front.forward(moto.address());
        stage.agent.wait();
        let log = stage.agent.log();
        let news = log.strip_prefix(&before).expect("the log only grows");
        let lines: Vec<_> = news.lines().filter(|line| line.contains("WARN")).collect();
        assert_eq!(lines.len(), 1, "one line tells of it: {news}");
        assert!(lines[0].contains(&front.url()) && lines[0].contains("the last good policy stands"), "{news}");
    }
    assert_eq!(stage.agent.status()["enforced"], true);
}
