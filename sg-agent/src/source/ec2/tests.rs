//! Which calls an inventory takes, and that its parts come together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::super::fake::{Fake, Reply, Request};
use super::super::fixture;
use super::*;
use crate::model::{InstanceId, Peer, Traffic};

/// What Moto recorded, whatever is filtered by.
fn recorded(request: &Request, _: usize) -> Reply {
    Reply::ok(match request.form["Action"].as_str() {
        "DescribeInstances" => fixture!("DescribeInstances_multi_eni_eip"),
        "DescribeNetworkInterfaces" => fixture!("DescribeNetworkInterfaces_multi"),
        "DescribeSecurityGroups" => fixture!("DescribeSecurityGroups_full"),
        "DescribeSecurityGroupRules" => fixture!("DescribeSecurityGroupRules"),
        "DescribeManagedPrefixLists" => fixture!("DescribeManagedPrefixLists"),
        "GetManagedPrefixListEntries" => fixture!("GetManagedPrefixListEntries"),
        "DescribeVpcs" => fixture!("DescribeVpcs"),
        "DescribeSubnets" => fixture!("DescribeSubnets"),
        "DescribeNetworkAcls" => fixture!("DescribeNetworkAcls_default"),
        "DescribeVpcPeeringConnections" => fixture!("DescribeVpcPeeringConnections"),
        other => panic!("{other} was asked for"),
    })
}

fn ec2(fake: &Fake) -> Ec2 {
    let options = Ec2Options {
        endpoint: Some(fake.url.clone()),
        region: Some("us-east-1".into()),
        account: Some("123456789012".into()),
        ..Default::default()
    };
    Ec2::new(&options).unwrap()
}

#[tokio::test]
async fn everything_is_one_call_a_kind() {
    // The recordings are of different moments: an instance's groups have to be among those that are listed.
    let fake = Fake::start(move |request, n| {
        let recorded = recorded(request, n);
        let text = String::from_utf8(recorded.body).unwrap();
        let as_listed = |text: String, id| text.replace(id, "sg-c4fac25716521a0ec");
        let text = ["sg-2f7fd6a8e02fd119b", "sg-fb78ed0fa73d326f3"].into_iter().fold(text, as_listed);
        Reply { body: text.into_bytes(), ..recorded }
    })
    .await;
    let inventory = ec2(&fake).inventory(&Wanted::default()).await.unwrap();
    assert_eq!(
        fake.actions(),
        [
            "DescribeInstances",
            "DescribeManagedPrefixLists",
            "DescribeNetworkAcls",
            "DescribeNetworkInterfaces",
            "DescribeSecurityGroupRules",
            "DescribeSecurityGroups",
            "DescribeSubnets",
            "DescribeVpcPeeringConnections",
            "DescribeVpcs",
            "GetManagedPrefixListEntries",
        ]
    );
    let group = &inventory.groups[&"sg-c4fac25716521a0ec".into()];
    let of_list = group.ingress.iter().find(|rule| matches!(rule.peer, Peer::PrefixList(_))).unwrap();
    assert_eq!(of_list.id, "sgr-1d88bc3195fda5685".into());
    assert_eq!(inventory.prefix_lists[&"pl-b952479453cafcd39".into()].entries.len(), 2);
    assert_eq!(inventory.instances.keys().collect::<Vec<_>>(), [&InstanceId::from("i-ff1051133a966d34b")]);
    assert_eq!(inventory.peerings.len(), 1);
}

#[tokio::test]
async fn without_rule_ids_the_groups_permissions_are_taken() {
    let fake = Fake::start(|request, n| match request.form["Action"].as_str() {
        "DescribeSecurityGroupRules" | "DescribeNetworkAcls" => Reply::error("InvalidAction"),
        _ => recorded(request, n),
    })
    .await;
    let inventory = ec2(&fake).inventory(&Wanted::default()).await.unwrap();
    let group = &inventory.groups[&"sg-c4fac25716521a0ec".into()];
    assert_eq!(group.ingress[0].id, "sg-c4fac25716521a0ec/ingress[0]".into());
    assert_eq!(group.ingress[0].traffic, Traffic::Tcp { from: 80, to: 90 });
    assert!(inventory.acls.is_empty());
}

#[tokio::test]
async fn one_call_that_fails_fails_the_inventory() {
    let fake = Fake::start(|request, n| match request.form["Action"].as_str() {
        "DescribeNetworkAcls" => Reply::error("InternalError"),
        _ => recorded(request, n),
    })
    .await;
    let error = ec2(&fake).inventory(&Wanted::default()).await.unwrap_err().to_string();
    assert!(
        error.starts_with("DescribeNetworkAcls at http://127.0.0.1:") && error.contains("InternalError"),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_wanted_is_one_question() {
    let empty = "<DescribeInstancesResponse><reservationSet/></DescribeInstancesResponse>";
    let fake = Fake::start(move |_, _| Reply::ok(empty)).await;
    let wanted = Wanted { instances: Some(BTreeSet::new()), ..Wanted::default() };
    assert_eq!(ec2(&fake).inventory(&wanted).await.unwrap(), Inventory::default());
    assert_eq!(fake.actions(), ["DescribeInstances"]);
}

#[tokio::test]
async fn filters_are_split_at_what_aws_takes() {
    let fake =
        Fake::start(|_, _| Reply::ok("<DescribeInstancesResponse><reservationSet/></DescribeInstancesResponse>")).await;
    let instances: BTreeSet<InstanceId> = (0..401).map(|n| InstanceId::from(format!("i-{n:04}").as_str())).collect();
    let inventory = ec2(&fake).inventory(&Wanted { instances: Some(instances), ..Wanted::default() }).await.unwrap();
    assert!(inventory.instances.is_empty());
    let mut sizes: Vec<usize> = fake.requests().iter().map(|r| r.form.len() - 3).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 200, 200]);
}

#[tokio::test]
async fn the_account_is_learnt_from_the_owner() {
    let fake = Fake::start(|_, _| {
        Reply::ok("<DescribeInstancesResponse><reservationSet><item><ownerId>000000000007</ownerId><instancesSet/></item></reservationSet></DescribeInstancesResponse>")
    })
    .await;
    let mut ec2 = ec2(&fake);
    ec2.account_is_known = false;
    assert_eq!(ec2.scope().to_string(), "123456789012/us-east-1");
    ec2.inventory(&Wanted { instances: Some(["i-1".into()].into()), ..Wanted::default() }).await.unwrap();
    assert_eq!(ec2.scope().to_string(), "000000000007/us-east-1");
}

#[tokio::test]
async fn another_accounts_references_are_read_here_and_there() {
    // SG-1.12
    let instances = "<item><instanceId>i-1</instanceId><networkInterfaceSet><item><networkInterfaceId>eni-1\
                     </networkInterfaceId><groupSet><item><groupId>sg-1</groupId></item></groupSet></item>\
                     </networkInterfaceSet></item>";
    let rules = "<item><securityGroupRuleId>sgr-1</securityGroupRuleId><groupId>sg-1</groupId>\
                 <ipProtocol>-1</ipProtocol><referencedGroupInfo><groupId>sg-2</groupId><userId>000000000002</userId>\
                 <peeringStatus>active</peeringStatus></referencedGroupInfo></item>";
    let permissions = "<item><ipProtocol>-1</ipProtocol><groups><item><groupId>sg-2</groupId>\
                       <userId>000000000002</userId></item></groups></item>";
    let fake = Fake::start(move |request, _| {
        let action = request.form["Action"].as_str();
        let first = request.form.get("GroupId.1").or(request.form.get("Filter.1.Value.1")).map(String::as_str);
        let items = match (action, first) {
            ("DescribeInstances", Some("i-1")) => {
                format!("<reservationSet><item><instancesSet>{instances}</instancesSet></item></reservationSet>")
            }
            ("DescribeSecurityGroups", Some("sg-1")) => format!(
                "<securityGroupInfo><item><ownerId>000000000001</ownerId><groupId>sg-1</groupId><vpcId>vpc-1</vpcId>\
                 <ipPermissions>{permissions}</ipPermissions></item></securityGroupInfo>"
            ),
            ("DescribeSecurityGroupRules", _) => format!("<securityGroupRuleSet>{rules}</securityGroupRuleSet>"),
            ("DescribeInstances", _) => "<reservationSet/>".into(),
            ("DescribeSecurityGroups", _) => "<securityGroupInfo/>".into(),
            ("DescribeNetworkInterfaces", _) => "<networkInterfaceSet/>".into(),
            ("DescribeVpcPeeringConnections", _) => "<vpcPeeringConnectionSet/>".into(),
            _ => panic!("{action} isn't needed"),
        };
        Reply::ok(format!("<{action}Response>{items}</{action}Response>"))
    })
    .await;
    let ec2 = ec2(&fake);
    let instances = Some(BTreeSet::from([InstanceId::from("i-1")]));
    let inventory = ec2.inventory(&Wanted { instances, ..Wanted::default() }).await.unwrap();
    let peer = &inventory.groups[&"sg-1".into()].ingress[0].peer;
    assert_eq!(*peer, Peer::ForeignGroup { account: "000000000002".into(), group: "sg-2".into() });
    assert!(fake.actions().contains(&"DescribeVpcPeeringConnections".to_owned()), "only a peering makes it match");

    let asked = fake.requests().len();
    let groups = BTreeSet::from([GroupId::from("sg-7")]);
    ec2.inventory(&Wanted { instances: Some(BTreeSet::new()), groups, ..Wanted::default() }).await.unwrap();
    let about_it = |action: &str| {
        let requests = fake.requests().split_off(asked);
        let is_it = |form: &BTreeMap<String, String>| {
            let asked_for = form.get("GroupId.1").or(form.get("Filter.1.Value.1"));
            form["Action"] == action && asked_for.is_some_and(|value| value == "sg-7")
        };
        requests.iter().any(|request| is_it(&request.form))
    };
    for action in ["DescribeSecurityGroups", "DescribeNetworkInterfaces", "DescribeInstances"] {
        assert!(about_it(action), "{action}: the group that another account refers to, and its members");
    }
}

#[tokio::test]
async fn who_waits_for_a_change_waits_for_no_more_than_that() {
    // What rules refer to isn't there.
    let fake = Fake::start(|request, n| match request.form.get("GroupId.1") {
        Some(id) if !id.starts_with("sg-2f7fd6a8") => {
            Reply::ok("<DescribeSecurityGroupsResponse><securityGroupInfo/></DescribeSecurityGroupsResponse>")
        }
        _ => recorded(request, n),
    })
    .await;
    let ec2 = ec2(&fake);
    let instances: Option<BTreeSet<InstanceId>> = Some(["i-ff1051133a966d34b".into()].into());
    let urgent = Wanted { instances: instances.clone(), extent: Extent::Enforced, ..Wanted::default() };
    let asked_for_rules = || fake.actions().iter().filter(|action| *action == "DescribeSecurityGroupRules").count();
    let id = "sg-c4fac25716521a0ec".into();
    let first = |inventory: &Inventory| inventory.groups[&id].ingress[0].id.to_string();
    let before = ec2.inventory(&urgent).await.unwrap();
    assert_eq!((asked_for_rules(), first(&before)), (0, "sg-c4fac25716521a0ec/ingress[0]".to_owned()));
    let whole = ec2
        .inventory(&Wanted { instances: instances.clone(), extent: Extent::Everything, ..Wanted::default() })
        .await
        .unwrap();
    assert_eq!((asked_for_rules(), first(&whole)), (1, "sgr-18658cbeb6b4c0aab".to_owned()));
    let kept = ec2.inventory(&urgent).await.unwrap();
    assert_eq!((asked_for_rules(), &kept), (1, &whole), "what hasn't changed keeps its ids");
    // And where rules alone have changed, nothing but groups and what they refer to is read.
    let before = fake.actions();
    let rules = ec2.inventory(&Wanted { instances, extent: Extent::Rules, ..Wanted::default() }).await.unwrap();
    assert_eq!(rules, whole);
    let count = |actions: &[String], action: &str| actions.iter().filter(|other| *other == action).count();
    let after = fake.actions();
    for (action, more) in [("DescribeSecurityGroups", true), ("DescribeSubnets", false), ("DescribeNetworkAcls", false)]
    {
        assert_eq!(count(&after, action) > count(&before, action), more, "{action}");
    }
    // Others are asked for: theirs aren't known.
    let other = Wanted { instances: Some(["i-1".into()].into()), extent: Extent::Rules, ..Wanted::default() };
    ec2.inventory(&other).await.unwrap();
    assert!(count(&fake.actions(), "DescribeSubnets") > count(&after, "DescribeSubnets"));
}

#[tokio::test]
async fn a_group_that_is_gone_does_not_hide_the_others() {
    let fake = Fake::start(|request, n| {
        if request.form.contains_key("GroupId.1") {
            Reply::error("InvalidGroup.NotFound")
        } else {
            recorded(request, n)
        }
    })
    .await;
    let wanted = Wanted { instances: Some(["i-ff1051133a966d34b".into()].into()), ..Wanted::default() };
    assert!(ec2(&fake).inventory(&wanted).await.unwrap().groups.contains_key(&"sg-c4fac25716521a0ec".into()));
}

#[tokio::test]
async fn answers_of_different_moments_are_asked_for_again() {
    let instance = "<item><instanceId>i-1</instanceId><groupSet><item><groupId>sg-1</groupId></item></groupSet></item>";
    let there = Arc::new(AtomicBool::new(true));
    let moment = Arc::clone(&there);
    let fake = Fake::start(move |request, _| {
        let action = request.form["Action"].as_str();
        let items = match action {
            // It is gone as soon as it was told of, and its group with it.
            "DescribeInstances" if moment.swap(false, Relaxed) => {
                format!("<reservationSet><item><instancesSet>{instance}</instancesSet></item></reservationSet>")
            }
            "DescribeInstances" => "<reservationSet/>".to_owned(),
            "DescribeSecurityGroups" => "<securityGroupInfo/>".to_owned(),
            "DescribeNetworkInterfaces" => "<networkInterfaceSet/>".to_owned(),
            _ => panic!("{action} isn't needed"),
        };
        Reply::ok(format!("<{action}Response>{items}</{action}Response>"))
    })
    .await;
    let wanted = Wanted { instances: Some(["i-1".into()].into()), ..Wanted::default() };
    let inventory = ec2(&fake).inventory(&wanted).await.unwrap();
    assert!(inventory.instances.is_empty() && !there.load(Relaxed), "{inventory:?}");
}

#[tokio::test]
async fn a_group_that_really_is_not_listed_is_asked_for_twice_once() {
    let groups = "<item><groupId>sg-1</groupId></item><item><groupId>sg-2</groupId></item>";
    let instance = format!("<item><instanceId>i-1</instanceId><groupSet>{groups}</groupSet></item>");
    let fake = Fake::start(move |request, _| {
        let action = request.form["Action"].as_str();
        let items = match action {
            "DescribeInstances" => {
                format!("<reservationSet><item><instancesSet>{instance}</instancesSet></item></reservationSet>")
            }
            // One of them is there, which isn't all.
            "DescribeSecurityGroups" => {
                "<securityGroupInfo><item><groupId>sg-1</groupId></item></securityGroupInfo>".to_owned()
            }
            "DescribeSecurityGroupRules" => "<securityGroupRuleSet/>".to_owned(),
            _ => panic!("{action} isn't needed"),
        };
        Reply::ok(format!("<{action}Response>{items}</{action}Response>"))
    })
    .await;
    let ec2 = ec2(&fake);
    let wanted = Wanted { instances: Some(["i-1".into()].into()), ..Wanted::default() };
    let reads = || fake.actions().iter().filter(|action| *action == "DescribeInstances").count();
    for all in [2, 3, 4] {
        let inventory = ec2.inventory(&wanted).await.unwrap();
        assert_eq!(inventory.groups.keys().collect::<Vec<_>>(), [&GroupId::from("sg-1")]);
        assert_eq!(reads(), all, "so it was the last time");
    }
    // After an outage it may be otherwise.
    ec2.doubt();
    ec2.inventory(&wanted).await.unwrap();
    assert_eq!(reads(), 6);
}
