//! The source against a real Moto: paging, what a poll costs, and the quirks that recorded answers can't show. Needs
//! `SG_MOTO_PYTHON`, a Python with `moto[server,ec2]`; says so where there is none.

#[path = "support/ports.rs"]
mod ports;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sg_agent::model::{GroupId, InstanceId, Inventory, Peer, Traffic};
use sg_agent::source::{Ec2, Ec2Options, Wanted};

/// A Moto of the test's own, ended and cleared away when the test is over, however it ends.
struct Moto {
    url: String,
    server: Child,
    log: PathBuf,
    http: reqwest::Client,
}

impl Moto {
    async fn start(name: &str) -> Option<Self> {
        let Ok(python) = std::env::var("SG_MOTO_PYTHON") else {
            eprintln!("skipped: SG_MOTO_PYTHON names no Python with moto[server,ec2]");
            return None;
        };
        let port = ports::free_port();
        let log = std::env::temp_dir().join(format!("sg-agent-moto-{name}-{}.log", std::process::id()));
        let server = Command::new(&python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("{python} can't be started: {error}"));
        let moto = Self { url: format!("http://127.0.0.1:{port}"), server, log, http: reqwest::Client::new() };
        let deadline = Instant::now() + Duration::from_secs(300);
        while moto.http.get(format!("{}/moto-api/", moto.url)).send().await.is_err() {
            assert!(Instant::now() < deadline, "Moto doesn't come up: {}", std::fs::read_to_string(&moto.log).unwrap());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some(moto)
    }

    async fn call(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("Action", action).append_pair("Version", "2016-11-15").extend_pairs(parameters);
        let request = self.http.post(&self.url).body(form.finish());
        let request = request.header("content-type", "application/x-www-form-urlencoded").header(
            "authorization",
            "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=x",
        );
        let response = request.send().await.unwrap();
        let status = response.status();
        let body = response.text().await.unwrap();
        assert!(status.is_success(), "{action} {parameters:?}: {body}");
        body
    }

    /// The text of the first such element of the call's answer.
    async fn made(&self, element: &str, action: &str, parameters: &[(&str, &str)]) -> String {
        let body = self.call(action, parameters).await;
        first(&body, element).unwrap_or_else(|| panic!("no <{element}> in {body}"))
    }

    async fn group(&self, name: &str, vpc: &str) -> String {
        let parameters = [("GroupName", name), ("GroupDescription", "d"), ("VpcId", vpc)];
        self.made("groupId", "CreateSecurityGroup", &parameters).await
    }

    async fn instance(&self, subnet: &str, group: &str) -> String {
        let parameters = [
            ("ImageId", "ami-12c6146b"),
            ("MinCount", "1"),
            ("MaxCount", "1"),
            ("SubnetId", subnet),
            ("SecurityGroupId.1", group),
        ];
        self.made("instanceId", "RunInstances", &parameters).await
    }

    fn ec2(&self) -> Ec2 {
        let options = Ec2Options {
            endpoint: Some(self.url.clone()),
            region: Some("us-east-1".into()),
            account: Some("123456789012".into()),
            ..Default::default()
        };
        Ec2::new(&options).unwrap()
    }

    /// How many calls it has answered: Moto logs one line each.
    fn answered(&self) -> usize {
        std::fs::read_to_string(&self.log).unwrap().matches("\"POST / HTTP/1.1").count()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // Best effort: there is nobody left to tell.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

fn first(body: &str, element: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("<{element}>"))?;
    rest.split_once('<').map(|(text, _)| text.to_owned())
}

async fn poll(ec2: &Ec2, instances: &[&str]) -> Inventory {
    let instances: BTreeSet<InstanceId> = instances.iter().map(|id| InstanceId::from(*id)).collect();
    ec2.inventory(&Wanted { instances: Some(instances), ..Wanted::default() }).await.unwrap()
}

fn groups_of(inventory: &Inventory, instance: &str) -> Vec<BTreeSet<GroupId>> {
    let instance = &inventory.instances[&InstanceId::from(instance)];
    instance.enis.iter().map(|eni| inventory.enis[eni].groups.clone()).collect()
}

fn set(ids: &[&String]) -> BTreeSet<GroupId> {
    ids.iter().map(|id| GroupId::from(id.as_str())).collect()
}

#[tokio::test]
async fn all_pages_are_read_and_a_poll_asks_for_little() {
    let Some(moto) = Moto::start("pages").await else { return };
    let vpc = moto.made("vpcId", "DescribeVpcs", &[]).await;
    let subnet = moto.made("subnetId", "DescribeSubnets", &[]).await;
    let (web, db) = (moto.group("web", &vpc).await, moto.group("db", &vpc).await);
    let list =
        [("PrefixListName", "l"), ("MaxEntries", "5"), ("AddressFamily", "IPv4"), ("Entry.1.Cidr", "192.0.2.0/24")];
    let list = moto.made("prefixListId", "CreateManagedPrefixList", &list).await;
    let mysql = |group: &str| {
        BTreeMap::from([
            ("GroupId", group.to_owned()),
            ("IpPermissions.1.IpProtocol", "tcp".to_owned()),
            ("IpPermissions.1.FromPort", "3306".to_owned()),
            ("IpPermissions.1.ToPort", "3306".to_owned()),
        ])
    };
    for (key, value) in
        [("IpPermissions.1.Groups.1.GroupId", &web), ("IpPermissions.1.PrefixListIds.1.PrefixListId", &list)]
    {
        let base = mysql(&db);
        let mut parameters: Vec<(&str, &str)> = base.iter().map(|(key, value)| (*key, value.as_str())).collect();
        parameters.push((key, value));
        moto.call("AuthorizeSecurityGroupIngress", &parameters).await;
    }
    let database = moto.instance(&subnet, &db).await;
    let mut servers = Vec::new();
    for _ in 0..120 {
        servers.push(moto.instance(&subnet, &web).await);
    }
    moto.call("TerminateInstances", &[("InstanceId.1", &servers[0])]).await;

    let ec2 = moto.ec2();
    let before = moto.answered();
    let everything = ec2.inventory(&Wanted::default()).await.unwrap();
    assert_eq!(everything.instances.len(), 120, "121 less the terminated one, over two pages");
    assert!(everything.warnings.is_empty(), "{:?}", everything.warnings);
    // Eight kinds, one of them in two pages, and the prefix list with its entries.
    assert_eq!(moto.answered() - before, 11);

    let before = moto.answered();
    let inventory = poll(&ec2, &[&database]).await;
    let calls = moto.answered() - before;
    // Its VPC among them, which is asked for once.
    assert_eq!(calls, 11, "a poll of one instance, whose group's rules are known; its 120 peers come in two pages");
    let group = &inventory.groups[&GroupId::from(db.as_str())];
    let peers: BTreeSet<Peer> = group.ingress.iter().map(|rule| rule.peer.clone()).collect();
    assert_eq!(peers, [Peer::Group(web.as_str().into()), Peer::PrefixList(list.as_str().into())].into());
    assert!(group.ingress.iter().all(|rule| rule.id.0.starts_with("sgr-")));
    assert!(group.ingress.iter().all(|rule| rule.traffic == Traffic::Tcp { from: 3306, to: 3306 }));
    let members = inventory.enis.values().filter(|eni| eni.groups.contains(&GroupId::from(web.as_str())));
    assert_eq!(members.count(), 119, "the terminated one is no member");
    let referred = &inventory.groups[&GroupId::from(web.as_str())];
    assert!(referred.egress.is_empty(), "a group that is only referred to comes without rules");
    assert!(!everything.groups[&GroupId::from(web.as_str())].egress.is_empty());
    assert_eq!(inventory.prefix_lists.len(), 1);
    assert_eq!((inventory.subnets.len(), inventory.acls.len()), (1, 1));

    let before = moto.answered();
    let inventory = poll(&ec2, &[&servers[1], &servers[2]]).await;
    assert_eq!(moto.answered() - before, 5, "a poll of instances whose groups refer to nothing");
    let before = moto.answered();
    assert_eq!(poll(&ec2, &[&servers[1], &servers[2]]).await, inventory);
    assert_eq!(moto.answered() - before, 4, "the same again, with no rule changed");
    let rule = [
        ("GroupId", web.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "80"),
        ("IpPermissions.1.ToPort", "80"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0"),
    ];
    let id = moto.made("securityGroupRuleId", "AuthorizeSecurityGroupIngress", &rule).await;
    let changed = poll(&ec2, &[&servers[1]]).await.groups[&GroupId::from(web.as_str())].ingress.clone();
    assert_eq!(changed.iter().map(|rule| &*rule.id.0).collect::<Vec<_>>(), [id.as_str()]);
    assert_eq!(inventory.instances.len(), 2);
    assert!(poll(&ec2, &["i-0000000000000000f"]).await.instances.is_empty(), "one that doesn't exist is no error");

    moto.call("DeleteSecurityGroup", &[("GroupId", &web)]).await;
    let inventory = poll(&ec2, &[&database]).await;
    assert_eq!(inventory.warnings.len(), 1, "{:?}", inventory.warnings);
    let warning = inventory.warnings.get_min().expect("the only one");
    assert!(warning.problem.contains(&format!("group {web} does not exist")), "{warning}");
    assert_eq!(inventory.groups[&GroupId::from(db.as_str())].ingress.len(), 1);
}

#[tokio::test]
async fn groups_that_change_after_the_launch_are_seen() {
    let Some(moto) = Moto::start("groups").await else { return };
    let vpc = moto.made("vpcId", "DescribeVpcs", &[]).await;
    let subnet = moto.made("subnetId", "DescribeSubnets", &[]).await;
    let [a, b, c] = [moto.group("a", &vpc).await, moto.group("b", &vpc).await, moto.group("c", &vpc).await];
    let ec2 = moto.ec2();
    let instance = moto.instance(&subnet, &a).await;
    assert_eq!(groups_of(&poll(&ec2, &[&instance]).await, &instance), [set(&[&a])]);

    let interface = [("SubnetId", subnet.as_str()), ("SecurityGroupId.1", &b)];
    let second = moto.made("networkInterfaceId", "CreateNetworkInterface", &interface).await;
    let attach = [("NetworkInterfaceId", second.as_str()), ("InstanceId", &instance), ("DeviceIndex", "1")];
    moto.call("AttachNetworkInterface", &attach).await;
    // Moto prints the second as of both groups; its own is b alone.
    assert_eq!(groups_of(&poll(&ec2, &[&instance]).await, &instance), [set(&[&a]), set(&[&b])]);

    moto.call("ModifyInstanceAttribute", &[("InstanceId", &instance), ("GroupId.1", &c)]).await;
    moto.call("ModifyInstanceAttribute", &[("InstanceId", &instance), ("SourceDestCheck.Value", "false")]).await;
    let everything = ec2.inventory(&Wanted::default()).await.unwrap();
    for inventory in [poll(&ec2, &[&instance]).await, everything] {
        assert_eq!(groups_of(&inventory, &instance), [set(&[&c]), set(&[&b])]);
        let checks: Vec<bool> = inventory
            .enis
            .values()
            .map(|eni| (eni.device_index, eni.source_dest_check))
            .collect::<BTreeMap<_, _>>()
            .into_values()
            .collect();
        assert_eq!(checks, [false, true]);
        assert_eq!(
            inventory.warnings.len(),
            1,
            "that the primary one can be read in two ways: {:?}",
            inventory.warnings
        );
    }

    // Whoever has a rule for c sees the instance as its member, though its interface's own group is a.
    let rule = [
        ("GroupId", a.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.Groups.1.GroupId", &c),
    ];
    moto.call("AuthorizeSecurityGroupIngress", &rule).await;
    let other = moto.instance(&subnet, &a).await;
    assert_eq!(groups_of(&poll(&ec2, &[&other]).await, &instance), [set(&[&c]), set(&[&b])]);
}

#[tokio::test]
async fn a_rule_changed_to_a_group_keeps_its_network() {
    let Some(moto) = Moto::start("modify").await else { return };
    let vpc = moto.made("vpcId", "DescribeVpcs", &[]).await;
    let subnet = moto.made("subnetId", "DescribeSubnets", &[]).await;
    let (a, b) = (moto.group("a", &vpc).await, moto.group("b", &vpc).await);
    let rule = [
        ("GroupId", a.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "22"),
        ("IpPermissions.1.ToPort", "22"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "10.1.0.0/16"),
    ];
    let id = moto.made("securityGroupRuleId", "AuthorizeSecurityGroupIngress", &rule).await;
    let instance = moto.instance(&subnet, &a).await;
    let ec2 = moto.ec2();
    let modify = |key: &'static str, value: String| {
        let (id, a, moto) = (id.clone(), a.clone(), &moto);
        async move {
            let rule = [
                ("GroupId", a.as_str()),
                ("SecurityGroupRule.1.SecurityGroupRuleId", &id),
                ("SecurityGroupRule.1.SecurityGroupRule.IpProtocol", "tcp"),
                ("SecurityGroupRule.1.SecurityGroupRule.FromPort", "23"),
                ("SecurityGroupRule.1.SecurityGroupRule.ToPort", "23"),
                (key, &value),
            ];
            moto.call("ModifySecurityGroupRules", &rule).await;
        }
    };
    // Nothing of the group is printed, so that nothing can be made of it: this is Moto's word, not a reading of it.
    modify("SecurityGroupRule.1.SecurityGroupRule.ReferencedGroupId", b).await;
    let inventory = poll(&ec2, &[&instance]).await;
    let rules = &inventory.groups[&GroupId::from(a.as_str())].ingress;
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0].id, id.as_str().into());
    assert_eq!(rules[0].peer, Peer::Ipv4("10.1.0.0/16".parse().unwrap()));
    assert_eq!(rules[0].traffic, Traffic::Tcp { from: 23, to: 23 });
    // What it stores without looking is left out, by name.
    modify("SecurityGroupRule.1.SecurityGroupRule.CidrIpv4", "zzz".into()).await;
    let inventory = poll(&ec2, &[&instance]).await;
    assert!(inventory.groups[&GroupId::from(a.as_str())].ingress.is_empty());
    assert_eq!(inventory.warnings.len(), 1);
    assert_eq!(inventory.warnings.get_min().expect("the only one").subject, id);
}
