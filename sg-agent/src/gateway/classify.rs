//! Which calls may change what is enforced, and whose state they change. Owns the tables; what is not in them, and what
//! a request leaves open, counts as a change where a service is listed. Reads requests, changes none.

use std::collections::BTreeSet;

use http::request::Parts;
use http::{HeaderMap, Method, header};

use super::{Extent, Whom};
use crate::source::quirks::{ACCOUNT_HEADER, DEFAULT_ACCOUNT, is_account};

/// The services by which groups, instances and interfaces change, by their names in credential scopes. Beside EC2
/// itself those whose emulation makes or changes EC2's resources in-process, without a call of EC2's on the wire
/// (Moto 5.2.5: every backend that calls the one of EC2).
const SERVICES: [&str; 17] = [
    "autoscaling",
    "batch",
    "cloudcontrolapi",
    "cloudformation",
    "ds",
    "ec2",
    "ecs",
    "eks",
    "elasticache",
    "elasticfilesystem",
    "elasticloadbalancing",
    "elasticmapreduce",
    "memorydb",
    "rds",
    "redshift",
    "route53resolver",
    "workspaces",
];

/// How the actions begin that change nothing. EC2 has others, such as `Search...`: they are taken for changes.
const READING: [&str; 3] = ["Describe", "Get", "List"];

/// How EC2's actions begin that change groups' rules and nothing else.
const RULES: [&str; 4] = [
    "AuthorizeSecurityGroup",
    "RevokeSecurityGroup",
    "ModifySecurityGroupRules",
    "UpdateSecurityGroupRuleDescriptions",
];

/// How the paths of emulators' own controls begin, such as `/moto-api/reset` and `/_localstack/state/reset`.
const OWN_CONTROLS: [&str; 2] = ["/moto-api/", "/_localstack/"];

/// Above so many bytes a form isn't looked into: it is taken for a change. AWS's longest, a stack's template, has 51,200.
const LONGEST_FORM: u64 = 256 * 1024;

/// What a call does to what is enforced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing.
    None,
    /// It may change so much of what is enforced for these.
    Change(Whom, Extent),
}

/// Whether the request's body is needed to tell, and small enough to be held.
pub fn wants_form(head: &Parts, length: Option<u64>) -> bool {
    let Signed { service, .. } = Signed::of(head);
    // S3's bodies are objects, whatever they claim to be.
    service.is_none_or(is_listed)
        && head.method == Method::POST
        && is_form(&head.headers)
        && length.is_some_and(|length| (1..=LONGEST_FORM).contains(&length))
}

/// What a request does. `form` is its body, where that was wanted.
pub fn effect(head: &Parts, form: Option<&[u8]>) -> Effect {
    if is_own_control(head) {
        return Effect::Change(Whom::default(), Extent::Anew);
    }
    let signed = Signed::of(head);
    let query = head.uri.query().unwrap_or_default();
    let named = |text: &[u8]| -> Vec<String> {
        let pairs = form_urlencoded::parse(text);
        pairs.filter(|(name, _)| name == "Action").map(|(_, action)| action.into_owned()).collect()
    };
    let mut actions = named(query.as_bytes());
    actions.extend(form.map(named).into_iter().flatten());
    actions.extend(target(&head.headers).map(str::to_owned));
    if form.is_none() && may_hide_an_action(head, signed.service) {
        // Whatever the query says.
        actions.push(String::new());
    }
    let changes = match signed.service {
        Some(service) if !is_listed(service) => false,
        // REST says by the method what it does, and there is nothing else to go by.
        Some(_) if actions.is_empty() => !matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS),
        // Unsigned, for whatever service: an action is one of the Query API.
        _ => actions.iter().any(|action| !is_reading(action)),
    };
    if !changes {
        return Effect::None;
    }
    // Stacks and peerings reach across regions.
    let is_local = signed.service == Some("ec2") && !actions.iter().any(|action| action.contains("Peering"));
    let whom = if is_local { signed.whom(&head.headers) } else { Whom::default() };
    let of_rules = |action: &String| RULES.iter().any(|prefix| action.starts_with(prefix));
    // What can't be looked into may be anything.
    let is_of_rules = signed.service == Some("ec2") && !actions.is_empty() && actions.iter().all(of_rules);
    Effect::Change(whom, if is_of_rules { Extent::Rules } else { Extent::Everything })
}

/// Whether a body that wasn't read can name an action: endpoints take it from there as well as from the query.
fn may_hide_an_action(head: &Parts, service: Option<&str>) -> bool {
    let has_body = head.headers.contains_key(header::TRANSFER_ENCODING)
        || text(&head.headers, header::CONTENT_LENGTH.as_str()).is_some_and(|length| length != "0");
    let kind = text(&head.headers, header::CONTENT_TYPE.as_str()).unwrap_or_default().to_ascii_lowercase();
    let is_query_api = match service {
        Some(service) => is_listed(service) && target(&head.headers).is_none(),
        None => kind.starts_with("application/x-www-form-urlencoded"),
    };
    head.method == Method::POST && has_body && is_query_api
}

fn is_listed(service: &str) -> bool {
    SERVICES.contains(&service)
}

fn is_reading(action: &str) -> bool {
    READING.iter().any(|prefix| action.starts_with(prefix))
}

fn is_own_control(head: &Parts) -> bool {
    let path = head.uri.path();
    let is_reading = matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS);
    !is_reading && OWN_CONTROLS.iter().any(|prefix| path.starts_with(prefix))
}

fn is_form(headers: &HeaderMap) -> bool {
    let kind = text(headers, header::CONTENT_TYPE.as_str()).unwrap_or_default();
    // Some clients send a form without saying so.
    let is_form = kind.is_empty() || kind.to_ascii_lowercase().starts_with("application/x-www-form-urlencoded");
    is_form && !headers.contains_key(header::CONTENT_ENCODING)
}

/// The operation of a JSON service: `AmazonEC2ContainerServiceV20141113.RunTask`.
fn target(headers: &HeaderMap) -> Option<&str> {
    text(headers, "x-amz-target")?.rsplit('.').next()
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// What a request's signature says, or its host where it has none.
#[derive(Default)]
struct Signed<'a> {
    key: Option<&'a str>,
    region: Option<&'a str>,
    service: Option<&'a str>,
}

impl<'a> Signed<'a> {
    fn of(head: &'a Parts) -> Self {
        let header = text(&head.headers, header::AUTHORIZATION.as_str()).and_then(|text| {
            let (_, rest) = text.split_once("Credential=")?;
            rest.split([',', ' ']).next()
        });
        // Presigned. The slashes are escaped, or not.
        let query = || {
            let pairs = head.uri.query()?.split('&');
            pairs.filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == "X-Amz-Credential").map(|(_, v)| v)
        };
        let Some(scope) = header.or_else(query) else {
            return Self { service: host_service(&head.headers), ..Self::default() };
        };
        let parts: Vec<&str> =
            scope.split('/').flat_map(|part| part.split("%2F")).flat_map(|p| p.split("%2f")).collect();
        match parts[..] {
            [key, _, region, service, _] => Self { key: Some(key), region: Some(region), service: Some(service) },
            // SigV4A signs for every region.
            [key, _, service, _] => Self { key: Some(key), region: None, service: Some(service) },
            _ => Self::default(),
        }
    }

    /// Whose state an EC2 call is about. What can't be told for certain is left open, which is everybody's.
    fn whom(&self, headers: &HeaderMap) -> Whom {
        let agent = text(headers, header::USER_AGENT.as_str()).unwrap_or_default();
        let by_agent = agent.split(' ').find_map(|word| word.strip_prefix("region/"));
        let regions: BTreeSet<&str> = [self.region, by_agent, host_region(headers)].into_iter().flatten().collect();
        let region = (regions.len() == 1).then(|| regions.first().map(|region| (*region).into())).flatten();
        let accounts = match (text(headers, ACCOUNT_HEADER), self.key) {
            (Some(account), _) => vec![account.into()],
            // LocalStack takes it for the account, Moto doesn't.
            (None, Some(key)) if is_account(key) => vec![key.into(), DEFAULT_ACCOUNT.into()],
            // Moto knows keys that STS gave for other accounts.
            _ => Vec::new(),
        };
        Whom { accounts, region }
    }
}

/// The service of a host such as `ec2.eu-west-1.amazonaws.com`.
fn host_service(headers: &HeaderMap) -> Option<&str> {
    host_labels(headers).first().copied().filter(|first| is_listed(first))
}

fn host_region(headers: &HeaderMap) -> Option<&str> {
    match host_labels(headers)[..] {
        [service, region, _, ..] if is_listed(service) => Some(region),
        _ => None,
    }
}

fn host_labels(headers: &HeaderMap) -> Vec<&str> {
    let host = text(headers, header::HOST.as_str()).unwrap_or_default();
    let labels: Vec<&str> = host.split(':').next().unwrap_or_default().split('.').collect();
    if labels.len() > 1 { labels } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &str = "application/x-www-form-urlencoded; charset=utf-8";

    fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn signed(service: &str) -> (&'static str, String) {
        let scope = format!("Credential=AKIDEXAMPLE/20260101/eu-west-1/{service}/aws4_request");
        ("authorization", format!("AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"))
    }

    fn query(service: &str, action: &str) -> Effect {
        let (name, value) = signed(service);
        let head = request("POST", "/", &[(name, &value), ("content-type", FORM), ("host", "127.0.0.1:4566")]);
        assert_eq!(wants_form(&head, Some(60)), is_listed(service), "{service} {action}");
        let form = format!("Action={action}&Version=2016-11-15&GroupId=sg-1");
        effect(&head, Some(form.as_bytes()))
    }

    /// The table of what changes enforcement in Moto.
    #[test]
    fn every_ec2_action_that_does_not_read_is_a_change() {
        let changes = [
            "CreateSecurityGroup",
            "DeleteSecurityGroup",
            "AuthorizeSecurityGroupIngress",
            "AuthorizeSecurityGroupEgress",
            "RevokeSecurityGroupIngress",
            "RevokeSecurityGroupEgress",
            "ModifySecurityGroupRules",
            "UpdateSecurityGroupRuleDescriptionsIngress",
            "CreateManagedPrefixList",
            "ModifyManagedPrefixList",
            "DeleteManagedPrefixList",
            "RunInstances",
            "StartInstances",
            "StopInstances",
            "TerminateInstances",
            "RebootInstances",
            "ModifyInstanceAttribute",
            "CreateNetworkInterface",
            "DeleteNetworkInterface",
            "AttachNetworkInterface",
            "DetachNetworkInterface",
            "ModifyNetworkInterfaceAttribute",
            "AssignPrivateIpAddresses",
            "UnassignPrivateIpAddresses",
            "AssignIpv6Addresses",
            "AllocateAddress",
            "AssociateAddress",
            "CreateNetworkAclEntry",
            "ReplaceNetworkAclEntry",
            "DeleteNetworkAclEntry",
            "ReplaceNetworkAclAssociation",
            "CreateSubnet",
            "DeleteVpc",
            "CreateFlowLogs",
            // Nobody knows it: it is taken for a change.
            "SearchTransitGatewayRoutes",
            "SomethingNew",
            "describeInstances",
            "",
        ];
        let here = Whom { accounts: Vec::new(), region: Some("eu-west-1".into()) };
        for action in changes {
            let extent = if action.contains("SecurityGroupI")
                || action.contains("SecurityGroupE")
                || action.contains("GroupRule")
            {
                Extent::Rules
            } else {
                Extent::Everything
            };
            assert_eq!(query("ec2", action), Effect::Change(here.clone(), extent), "{action}");
        }
        for action in ["AcceptVpcPeeringConnection", "DeleteVpcPeeringConnection"] {
            assert_eq!(
                query("ec2", action),
                Effect::Change(Whom::default(), Extent::Everything),
                "{action}: the other region's as well"
            );
        }
        for action in ["DescribeSecurityGroups", "GetManagedPrefixListEntries", "ListImagesInRecycleBin"] {
            assert_eq!(query("ec2", action), Effect::None, "{action}");
        }
    }

    #[test]
    fn a_body_that_was_not_read_may_say_something_else_than_the_query() {
        let (name, value) = signed("ec2");
        for headers in [&[(name, value.as_str())][..], &[]] {
            let more = [("content-type", FORM), ("content-length", "300000"), ("host", "127.0.0.1:4566")];
            let head = request("POST", "/?Action=DescribeInstances", &[headers, &more].concat());
            assert!(!wants_form(&head, Some(300_000)));
            assert!(matches!(effect(&head, None), Effect::Change(_, Extent::Everything)), "{headers:?}");
        }
    }

    #[test]
    fn other_services_change_what_is_enforced_everywhere_or_nothing() {
        for (service, action) in [
            ("cloudformation", "CreateStack"),
            ("cloudformation", "DeleteStack"),
            ("autoscaling", "SetDesiredCapacity"),
            ("rds", "CreateDBInstance"),
            ("elasticloadbalancing", "CreateLoadBalancer"),
        ] {
            assert_eq!(
                query(service, action),
                Effect::Change(Whom::default(), Extent::Everything),
                "{service} {action}"
            );
        }
        for (service, action) in [
            ("cloudformation", "DescribeStacks"),
            ("rds", "DescribeDBInstances"),
            ("elasticloadbalancing", "DescribeTargetHealth"),
            ("sts", "AssumeRole"),
            ("iam", "CreateRole"),
            ("sqs", "SendMessage"),
            ("s3", "RunInstances"),
        ] {
            assert_eq!(query(service, action), Effect::None, "{service} {action}");
        }
    }

    #[test]
    fn json_and_rest_services_say_it_elsewhere() {
        let json = |service: &str, target: &str| {
            let (name, value) = signed(service);
            effect(&request("POST", "/", &[(name, &value), ("x-amz-target", target)]), None)
        };
        let all = Effect::Change(Whom::default(), Extent::Everything);
        assert_eq!(json("ecs", "AmazonEC2ContainerServiceV20141113.RunTask"), all);
        assert_eq!(json("ecs", "AmazonEC2ContainerServiceV20141113.DescribeTasks"), Effect::None);
        assert_eq!(json("dynamodb", "DynamoDB_20120810.PutItem"), Effect::None);
        let rest = |service: &str, method: &str| {
            let (name, value) = signed(service);
            effect(&request(method, "/clusters", &[(name, &value)]), None)
        };
        assert_eq!(rest("eks", "POST"), all);
        assert_eq!(rest("eks", "GET"), Effect::None);
        assert_eq!(rest("s3", "PUT"), Effect::None);
        assert_eq!(rest("lambda", "POST"), Effect::None);
    }

    #[test]
    fn emulators_own_controls_change_everything() {
        for (method, path, changes) in [
            ("POST", "/moto-api/reset", true),
            ("POST", "/moto-api/recorder/replay-recording", true),
            ("GET", "/moto-api/data.json", false),
            ("POST", "/_localstack/state/reset", true),
            ("GET", "/_localstack/health", false),
            ("PUT", "/moto-apis/reset", false),
            ("PUT", "/bucket/_key", false),
            ("POST", "/_other/reset", false),
        ] {
            let expected = if changes { Effect::Change(Whom::default(), Extent::Anew) } else { Effect::None };
            assert_eq!(effect(&request(method, path, &[]), None), expected, "{method} {path}");
        }
    }

    #[test]
    fn what_can_not_be_looked_into_is_a_change_of_a_listed_service() {
        let (name, value) = signed("ec2");
        let large = request("POST", "/", &[(name, &value), ("content-type", FORM)]);
        assert!(!wants_form(&large, Some(LONGEST_FORM + 1)) && !wants_form(&large, None));
        assert!(matches!(effect(&large, None), Effect::Change(_, Extent::Everything)));
        let packed = request("POST", "/", &[(name, &value), ("content-type", FORM), ("content-encoding", "gzip")]);
        assert!(!wants_form(&packed, Some(10)));
        assert!(matches!(effect(&packed, None), Effect::Change(_, Extent::Everything)));
        // Two actions: whichever the endpoint takes.
        let rules =
            request("POST", "/?Action=AuthorizeSecurityGroupIngress", &[(name, &value), ("content-type", FORM)]);
        let run = effect(&rules, Some(b"Action=RunInstances"));
        assert!(matches!(run, Effect::Change(_, Extent::Everything)), "{run:?}");
        let both = request("POST", "/?Action=DescribeInstances", &[(name, &value), ("content-type", FORM)]);
        assert!(matches!(effect(&both, Some(b"Action=TerminateInstances")), Effect::Change(..)));
        // An action in the query alone, as GET.
        let get = request("GET", "/?Action=StopInstances&InstanceId.1=i-1", &[(name, &value)]);
        assert!(matches!(effect(&get, None), Effect::Change(..)));
    }

    #[test]
    fn without_a_signature_the_host_and_the_action_tell() {
        let to = |host: &str, uri: &str| effect(&request("GET", uri, &[("host", host)]), None);
        assert_ne!(to("ec2.eu-west-1.amazonaws.com", "/?Action=StopInstances"), Effect::None);
        assert_ne!(to("127.0.0.1:4566", "/?Action=StopInstances"), Effect::None);
        assert_eq!(to("127.0.0.1:4566", "/?Action=DescribeInstances"), Effect::None);
        assert_eq!(to("127.0.0.1:4566", "/bucket/key"), Effect::None);
        let put = request("PUT", "/bucket/key", &[("content-type", FORM)]);
        assert!(!wants_form(&put, Some(20)), "an object");
        assert_eq!(effect(&put, None), Effect::None);
    }

    #[test]
    fn whose_state_it_is_comes_from_the_request() {
        let whom = |headers: &[(&str, &str)], key: &str, region: &str| {
            let credential =
                format!("AWS4-HMAC-SHA256 Credential={key}/20260101/{region}/ec2/aws4_request, Signature=0");
            let all = [&[("authorization", credential.as_str())], headers].concat();
            match effect(&request("GET", "/?Action=RunInstances", &all), None) {
                Effect::Change(whom, _) => (whom.accounts.iter().map(ToString::to_string).collect(), whom.region),
                other => panic!("RunInstances is a change, not {other:?}"),
            }
        };
        let any: Vec<String> = Vec::new();
        let region = |name: &str| Some(std::sync::Arc::<str>::from(name));
        assert_eq!(whom(&[], "test", "eu-west-1"), (any.clone(), region("eu-west-1")));
        assert_eq!(whom(&[("user-agent", "sdk region/eu-west-1 x")], "test", "eu-west-1").1, region("eu-west-1"));
        assert_eq!(whom(&[("user-agent", "sdk region/us-east-1 x")], "test", "eu-west-1").1, None);
        assert_eq!(whom(&[("host", "ec2.us-west-2.amazonaws.com")], "test", "eu-west-1").1, None);
        assert_eq!(whom(&[(ACCOUNT_HEADER, "111122223333")], "test", "eu-west-1").0, ["111122223333"]);
        assert_eq!(whom(&[], "000000000000", "eu-west-1").0, ["000000000000", DEFAULT_ACCOUNT]);
        let presigned = "/?Action=RunInstances&X-Amz-Credential=k%2F20260101%2Feu-north-1%2Fec2%2Faws4_request";
        let Effect::Change(whom, _) = effect(&request("GET", presigned, &[]), None) else { panic!("a change") };
        assert_eq!(whom.region, region("eu-north-1"));
    }
}
