//! Files as people write and print them, good and bad.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::model::{GroupId, Peer, Rule, Traffic};

/// A file that is gone when the test is, however it ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(text: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sg-agent-rules-{}-{}.json", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing else to do about one that can't be removed.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn load(text: &str) -> Result<Inventory, SourceError> {
    RulesFile::load(&Scratch::new(text).0)
}

const GROUPS: &str = r#"{"SecurityGroups": [
    {"GroupId": "sg-web", "GroupName": "web", "VpcId": "vpc-1", "OwnerId": "123456789012",
     "IpPermissions": [
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
         "IpRanges": [{"CidrIp": "10.0.0.5/8", "Description": "d"}, {"CidrIp": "10.0.0.0/8"}],
         "UserIdGroupPairs": [{"GroupId": "sg-db", "UserId": "123456789012"}]},
        {"IpProtocol": "icmp", "FromPort": 8, "ToPort": -1, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}],
     "IpPermissionsEgress": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
    {"GroupId": "sg-db", "GroupName": "default"}]}"#;

#[test]
fn groups_are_taken_as_they_are_with_ids_by_their_place() {
    let inventory = load(GROUPS).unwrap();
    let web = &inventory.groups[&"sg-web".into()];
    let tcp = Traffic::Tcp { from: 22, to: 22 };
    assert_eq!(
        web.ingress,
        [
            Rule { id: "sg-web/ingress[0]".into(), traffic: tcp, peer: Peer::Ipv4("10.0.0.0/8".parse().unwrap()) },
            Rule { id: "sg-web/ingress[2]".into(), traffic: tcp, peer: Peer::Group("sg-db".into()) },
            Rule {
                id: "sg-web/ingress[3]".into(),
                traffic: Traffic::Icmp { kind: Some(8), code: None },
                peer: Peer::Ipv4("0.0.0.0/0".parse().unwrap()),
            },
        ]
    );
    assert_eq!(web.egress[0].id, "sg-web/egress[0]".into());
    assert!(inventory.groups[&"sg-db".into()].ingress.is_empty(), "nothing is added to a file's default group");
    assert!(inventory.warnings.is_empty());
}

#[test]
fn an_instance_alone_gets_an_interface() {
    let text = r#"[{"Reservations": [{"Instances": [
        {"InstanceId": "i-1", "State": {"Code": 16, "Name": "running"}, "PrivateIpAddress": "10.0.0.4",
         "SecurityGroups": [{"GroupId": "sg-web"}], "Tags": [{"Key": "Name", "Value": "one"}]},
        {"InstanceId": "i-2", "State": {"Code": 48, "Name": "terminated"}, "PrivateIpAddress": "10.0.0.5",
         "SecurityGroups": [{"GroupId": "sg-web"}]},
        {"InstanceId": "i-3", "SecurityGroups": [{"GroupId": "sg-web"}],
         "NetworkInterfaces": [{"NetworkInterfaceId": "eni-3", "Groups": [{"GroupId": "sg-web"}],
            "PrivateIpAddresses": [{"PrivateIpAddress": "10.0.0.7"}, {"PrivateIpAddress": "10.0.0.6"}],
            "PrivateIpAddress": "10.0.0.7", "Ipv6Addresses": [{"Ipv6Address": "2001:db8::1"}],
            "Ipv4Prefixes": [{"Ipv4Prefix": "10.0.1.0/28"}]}]}]}]}, {"SecurityGroups": []}]"#;
    let inventory = load(text).unwrap();
    assert_eq!(inventory.instances.len(), 2);
    assert_eq!(inventory.instances[&"i-1".into()].name.as_deref(), Some("one"));
    let synthetic = &inventory.enis[&"eni-i-1".into()];
    assert_eq!(synthetic.addresses, ["10.0.0.4".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(synthetic.groups, [GroupId::from("sg-web")].into());
    assert_eq!(synthetic.instance, Some("i-1".into()));
    let given = &inventory.enis[&"eni-3".into()];
    let addresses: Vec<String> = given.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.7", "10.0.0.6", "2001:db8::1"]);
    assert_eq!(given.prefixes[0].to_string(), "10.0.1.0/28");
    assert_eq!(inventory.enis.len(), 2, "the terminated instance has none");
}

#[test]
fn interfaces_alone_make_their_instances() {
    let text = r#"{"NetworkInterfaces": [
        {"NetworkInterfaceId": "eni-1", "Attachment": {"InstanceId": "i-1", "DeviceIndex": 1}, "SourceDestCheck": false,
         "Groups": [{"GroupId": "sg-a"}]}, {"NetworkInterfaceId": "eni-0", "Groups": []}]}"#;
    let inventory = load(text).unwrap();
    assert_eq!(inventory.instances[&"i-1".into()].enis, ["eni-1".into()]);
    let eni = &inventory.enis[&"eni-1".into()];
    assert!(!eni.source_dest_check && eni.device_index == 1);
    assert_eq!(inventory.enis[&"eni-0".into()].instance, None);
}

#[test]
fn rules_with_ids_come_before_permissions() {
    let rules = r#"[{"SecurityGroups": [{"GroupId": "sg-1", "GroupName": "a",
        "IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}]},
        {"SecurityGroupRules": [{"SecurityGroupRuleId": "sgr-1", "GroupId": "sg-1", "IsEgress": false,
        "IpProtocol": "tcp", "FromPort": 1, "ToPort": 2, "PrefixListId": "pl-1"}]},
        {"PrefixLists": [{"PrefixListId": "pl-1", "AddressFamily": "IPv4", "Version": 3,
        "Entries": [{"Cidr": "192.0.2.1/24"}, {"Cidr": "2001:db8::/32"}]}]}]"#;
    let inventory = load(rules).unwrap();
    let group = &inventory.groups[&"sg-1".into()];
    assert_eq!(group.ingress.len(), 1);
    assert_eq!(group.ingress[0].peer, Peer::PrefixList("pl-1".into()));
    let list = &inventory.prefix_lists[&"pl-1".into()];
    assert_eq!((list.version, list.entries.len()), (3, 1));
    assert!(list.entries.contains(&"192.0.2.0/24".parse().unwrap()));
    let warnings: Vec<String> = inventory.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(warnings, ["pl-1: entry 2001:db8::/32 left out: the list is of IPv4"]);
}

#[test]
fn bad_json_is_named_by_its_place() {
    let cases = [
        ("{\n  \"SecurityGroups\": [\n    {\"GroupId\": 7}\n  ]\n}", 3, "expected a string"),
        ("{\"SecurityGroups\": [{\"GroupId\": \"sg-1\"", 1, "EOF"),
        ("", 1, "EOF"),
        ("{\n\"SecurityGroup\": []}", 2, "unknown field `SecurityGroup`"),
        ("[{\"SecurityGroups\": [{\"IpPermissions\": {\"FromPort\":\n 22}}]}]", 1, "unknown field `FromPort`"),
        ("{\"SecurityGroups\": [{\"IpPermissions\": [{\"FromPort\":\n\"22\"}]}]}", 2, "expected an integer"),
        ("[{}, 3]", 1, "expected an object as the AWS CLI prints it"),
        ("{\"SecurityGroups\": []} x", 1, "trailing characters"),
    ];
    for (text, line, problem) in cases {
        let scratch = Scratch::new(text);
        match RulesFile::load(&scratch.0) {
            Err(error @ SourceError::Json { .. }) => {
                let place = format!("{}:{line}:", scratch.0.display());
                let told = error.to_string();
                assert!(told.starts_with(&place) && told.contains(problem), "{told}");
                assert!(!told.contains(" at line "), "the place is told once: {told}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn a_file_that_is_missing_or_says_nothing_is_an_error() {
    let missing = RulesFile::load("/nonexistent/rules.json").unwrap_err().to_string();
    assert!(missing.starts_with("/nonexistent/rules.json: ") && missing.contains("is the path right?"), "{missing}");
    for nothing in ["{}", "[]", "[{}]"] {
        assert!(matches!(load(nothing), Err(SourceError::EmptyFile { .. })), "{nothing}");
    }
}
