//! Read your writes: when a call returns, its change is enforced.

use std::path::Path;
use std::thread;

use tests::e2e::{Agent, Attempt, Endpoint, Moto, Server, World, element, run, unique, wait_for};

use crate::{GATEWAY, Stage};

/// How often a rule comes and goes; `SG_ROUNDS` has it otherwise.
const ROUNDS: u32 = 25;

#[test]
fn a_call_that_has_returned_is_enforced() {
    // Nothing is noticed by polling while this test runs.
    let mut stage = Stage::polling(Moto::shared(), "3600");
    stage.agent.start().wait();
    let _server = stage.serve(22);
    let rounds = std::env::var("SG_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker_gateway/read_your_writes.py");
    let python = std::env::var_os("SG_MOTO_PYTHON")
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python").into_os_string());
    let mut hammer = stage.world.outside.command(python);
    hammer.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    hammer.arg(script).arg(format!("http://{GATEWAY}")).args([&stage.group, "10.0.1.10", "22", &rounds.to_string()]);
    let said = run(&mut hammer);
    println!("{said}");
    let denied = said.strip_prefix(&format!("{rounds} rounds, 0 wrong outcomes, "));
    let denied =
        denied.and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok()).unwrap_or_else(|| panic!("{said}"));
    let gateway = &stage.agent.status()["gateway"];
    assert_eq!(gateway["committed"], 2 * rounds, "{gateway:#}");
    assert_eq!((&gateway["late"], &gateway["failed"]), (&0.into(), &0.into()), "{gateway:#}");
    // None that was to pass was denied first, and passed when it was sent again.
    assert_eq!(stage.agent.packets(&stage.id, "ingress", "no_rule"), denied);
}

#[test]
fn what_others_change_is_noticed_by_polling() {
    let mut stage = Stage::new(Moto::shared());
    stage.agent.start().wait();
    let _server = stage.serve(22);
    stage.tcp(22).vanishes();
    stage.moto.authorize(&stage.group, 22, "0.0.0.0/0");
    wait_for("the rule to be enforced", || (stage.agent.interface(&stage.id)["ingress_rules"] == 1).then_some(()));
    stage.tcp(22).passes();
    assert_eq!(stage.agent.status()["gateway"]["requests"], 0);
}

#[test]
fn changes_at_the_same_time_are_all_enforced_when_they_return() {
    let mut stage = Stage::polling(Moto::shared(), "3600");
    stage.agent.start().wait();
    let ports = 8001..8013;
    let servers: Vec<Server> = ports.clone().map(|port| stage.serve(port)).collect();
    thread::scope(|scope| {
        for port in ports.clone() {
            let stage = &stage;
            scope.spawn(move || {
                stage.gateway.authorize(&stage.group, port, "203.0.113.9/32");
                stage.tcp(port).passes();
            });
        }
    });
    assert!(servers.iter().all(|server| server.accepted() == 1));
    assert_eq!(stage.agent.packets(&stage.id, "ingress", "no_rule"), 0, "not one packet came too early");
    let gateway = &stage.agent.status()["gateway"];
    assert_eq!((&gateway["changes"], &gateway["committed"]), (&12.into(), &12.into()), "{gateway:#}");
}

#[test]
fn a_rule_that_moto_does_not_show_as_it_was_modified_is_enforced_as_it_was() {
    let mut stage = Stage::new(Moto::shared());
    stage.moto.authorize(&stage.group, 22, "203.0.113.0/24");
    stage.agent.start().wait();
    let _server = stage.serve(22);
    stage.tcp(22).passes();
    let rules = stage
        .moto
        .call("DescribeSecurityGroupRules", &[("Filter.1.Name", "group-id"), ("Filter.1.Value.1", &stage.group)]);
    let ingress = rules.split("<item>").find(|rule| rule.contains("203.0.113.0/24")).expect("the rule is listed");
    let rule = element(ingress, "securityGroupRuleId");
    let other = stage.moto.group();
    let modify = |gateway: &Moto, peer: (&str, &str)| {
        gateway.call(
            "ModifySecurityGroupRules",
            &[
                ("GroupId", &stage.group),
                ("SecurityGroupRule.1.SecurityGroupRuleId", &rule),
                ("SecurityGroupRule.1.SecurityGroupRule.IpProtocol", "tcp"),
                ("SecurityGroupRule.1.SecurityGroupRule.FromPort", "22"),
                ("SecurityGroupRule.1.SecurityGroupRule.ToPort", "22"),
                peer,
            ],
        );
    };
    modify(&stage.gateway, ("SecurityGroupRule.1.SecurityGroupRule.ReferencedGroupId", &other));
    stage.tcp(22).vanishes();
    let (allowed, explained) = stage.agent.explain(&["--to", &stage.id, "--from", "203.0.113.9", "--port", "22"]);
    assert!(!allowed && explained.to_string().contains(&other), "{explained:#}");
    // Further reads don't bring the old network back.
    stage.agent.wait();
    stage.tcp(22).vanishes();
    modify(&stage.gateway, ("SecurityGroupRule.1.SecurityGroupRule.CidrIpv6", "2001:db8:ffff::/64"));
    let v6 = Attempt::tcp(&stage.world.outside, stage.world.instance("a").v6.into(), 22);
    v6.passes();
    stage.tcp(22).vanishes();
    // A network that Moto takes, and whoever gives it.
    modify(stage.moto, ("SecurityGroupRule.1.SecurityGroupRule.CidrIpv4", "203.0.113.9/32"));
    stage.agent.wait();
    stage.tcp(22).passes();
    v6.vanishes();
}

/// Three scopes of one Moto, each with an instance of its own.
#[test]
fn accounts_and_regions_are_each_their_own() {
    let moto = Moto::shared();
    let world = World::new(&["a", "b", "c"]);
    let mut agent = Agent::new(Some(&world.host));
    let endpoint = Endpoint::start(Some(&world.host));
    endpoint.forward(moto.address());
    Moto::reach(&mut agent, &endpoint.url());
    agent.arguments(["--no-docker", "--gateway", GATEWAY, "--poll-interval", "3600", "--commit-timeout", crate::LONG]);
    let gateway = moto.through(GATEWAY.parse().expect("an address"), &world.host);
    let own = "123456789012";
    let mut hosts = Vec::new();
    for (name, account, region) in
        [("a", own, "us-east-1"), ("b", own, "eu-west-1"), ("c", "111122223333", "eu-west-1")]
    {
        let call = |action: &str, parameters: &[(&str, &str)]| {
            let answer = moto.answer((account, region), action, parameters).expect("Moto answers");
            assert!(answer.contains(" 200 "), "{answer}");
            answer
        };
        let unique = unique();
        let group =
            element(&call("CreateSecurityGroup", &[("GroupName", &unique), ("GroupDescription", "d")]), "groupId");
        let run = [("ImageId", "ami-12c6146b"), ("MinCount", "1"), ("MaxCount", "1"), ("SecurityGroupId.1", &group)];
        let id = element(&call("RunInstances", &run), "instanceId");
        agent.arguments(["--attach".to_owned(), format!("{id}=veth-{name},account={account},region={region}")]);
        hosts.push((name, account, region, group));
    }
    agent.start().wait();
    assert_eq!(agent.status()["sources"].as_array().map(Vec::len), Some(3), "{:#}", agent.status());
    for (name, account, region, group) in &hosts {
        let _server = Server::start(world.namespace(name), 22);
        let tcp = Attempt::tcp(&world.outside, world.instance(name).v4.into(), 22);
        tcp.vanishes();
        let rule = [
            ("GroupId", group.as_str()),
            ("IpPermissions.1.IpProtocol", "tcp"),
            ("IpPermissions.1.FromPort", "22"),
            ("IpPermissions.1.ToPort", "22"),
            ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
        ];
        for (action, allowed) in [("AuthorizeSecurityGroupIngress", true), ("RevokeSecurityGroupIngress", false)] {
            let answer = gateway.answer((account, region), action, &rule).expect("the gateway answers");
            assert!(answer.contains(" 200 ") && !answer.contains("x-sg-agent-commit"), "{answer}");
            tcp.passes_if(allowed);
        }
    }
}
