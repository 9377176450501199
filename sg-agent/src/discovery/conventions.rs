//! Which containers stand for an instance: sg-agent's own labels, and those and the names that EC2 emulators give.
//! Owns the table and its reading; asks Docker nothing.
//!
//! A claim needs an instance id that is valid; one that isn't is a warning, and no claim. Any other label that is
//! invalid is a warning, and left out.

use std::collections::HashMap;
use std::sync::Arc;

use super::names;
use super::publish::{self, PublishSpec};
use crate::model::{EniId, InstanceId};

/// sg-agent's own labels. The last four add to, and win over, what an emulator's convention says.
pub(crate) const INSTANCE: &str = "dev.sg-agent.instance-id";
pub(crate) const ACCOUNT: &str = "dev.sg-agent.account";
pub(crate) const REGION: &str = "dev.sg-agent.region";
/// One id for each of the container's interfaces, in their order, separated by commas.
pub(crate) const ENI: &str = "dev.sg-agent.eni";
pub(crate) const PUBLISH: &str = "dev.sg-agent.publish";

/// Where a convention keeps a value.
#[derive(Clone, Copy)]
enum From {
    /// Nowhere.
    Nowhere,
    /// In this label.
    Label(&'static str),
    /// In the name, after the prefix: all of it, if that is an id that starts with `i-`.
    NameRest,
    /// In the name `PREFIX<account>-<region>-<instance>`, once the instance is known.
    NameAccount,
    /// The same name's region.
    NameRegion,
}

/// How one system marks its instances' containers.
struct Convention {
    system: &'static str,
    /// The container's name starts so.
    name: &'static str,
    /// The container has this label with this value.
    only_if: Option<(&'static str, &'static str)>,
    instance: From,
    account: From,
    region: From,
}

/// In this order; the first that fits is taken.
///
/// LocalEmu puts its instance label on side-cars too, with another service. floci also sets AWS_EC2_INSTANCE_ID in
/// the environment, to what the name says. ministack's label has a name that anybody may use, so its name counts too.
#[rustfmt::skip]
const CONVENTIONS: &[Convention] = &[
    Convention { system: "sg-agent",   name: "",                only_if: None,                             instance: From::Label(INSTANCE),               account: From::Nowhere,                      region: From::Nowhere },
    Convention { system: "LocalEmu",   name: "",                only_if: Some(("localemu.service", "ec2")), instance: From::Label("localemu.instance-id"), account: From::Label("localemu.account-id"), region: From::Label("localemu.region") },
    Convention { system: "LocalEmu",   name: "localemu-ec2-",   only_if: None,                             instance: From::NameRest,                      account: From::Nowhere,                      region: From::Nowhere },
    Convention { system: "LocalStack", name: "localstack-ec2.", only_if: None,                             instance: From::NameRest,                      account: From::Nowhere,                      region: From::Nowhere },
    Convention { system: "floci",      name: "floci-ec2-",      only_if: None,                             instance: From::NameRest,                      account: From::Nowhere,                      region: From::Nowhere },
    Convention { system: "ministack",  name: "ministack-ec2-",  only_if: None,                             instance: From::Label("instance_id"),          account: From::NameAccount,                  region: From::NameRegion },
    Convention { system: "fakecloud",  name: "",                only_if: None,                             instance: From::Label("fakecloud-ec2"),        account: From::Nowhere,                      region: From::Nowhere },
];

/// What a container says that it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Claim {
    /// Whose convention told.
    pub(super) system: &'static str,
    pub(crate) instance: InstanceId,
    pub(super) account: Option<Arc<str>>,
    pub(super) region: Option<Arc<str>>,
    /// By the order of the container's interfaces; none where an item is empty.
    pub(super) enis: Vec<Option<EniId>>,
    pub(super) publish: Vec<PublishSpec>,
}

/// Reads a container's name (without a slash) and labels. What is wrong goes to `problems`.
pub(crate) fn claim(name: &str, labels: &HashMap<String, String>, problems: &mut Vec<String>) -> Option<Claim> {
    let (convention, instance) =
        CONVENTIONS.iter().find_map(|convention| Some((convention, convention.instance(name, labels)?)))?;
    let instance = match names::id(instance) {
        Ok(id) => id,
        Err(problem) => {
            problems.push(format!(
                "{} instance id: {problem}; the container is not taken for an instance",
                convention.system
            ));
            return None;
        }
    };
    let label = |key: &str| labels.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let account = label(ACCOUNT).or_else(|| convention.account.read(convention, name, labels, instance));
    let region = label(REGION).or_else(|| convention.region.read(convention, name, labels, instance));
    let mut valid = |value: Option<&str>, check: fn(&str) -> Result<&str, String>| -> Option<Arc<str>> {
        match check(value?) {
            Ok(value) => Some(value.into()),
            Err(problem) => {
                problems.push(format!("{problem}; the label or name that says so is left out"));
                None
            }
        }
    };
    let account = valid(account, names::account);
    let region = valid(region, names::region);
    let enis = label(ENI).into_iter().flat_map(|list| list.split(',')).map(str::trim);
    let enis = enis.map(|eni| valid(Some(eni).filter(|eni| !eni.is_empty()), names::id).map(EniId)).collect();
    let publish = publish::parse_list(label(PUBLISH).unwrap_or_default()).unwrap_or_else(|problem| {
        problems.push(format!("label {PUBLISH}: {problem}; no port of it is published"));
        Vec::new()
    });
    Some(Claim { system: convention.system, instance: InstanceId(instance.into()), account, region, enis, publish })
}

impl Convention {
    /// The instance id as it stands there, unchecked, if this convention fits.
    fn instance<'a>(&self, name: &'a str, labels: &'a HashMap<String, String>) -> Option<&'a str> {
        let fits = name.starts_with(self.name)
            && self.only_if.is_none_or(|(key, value)| labels.get(key).is_some_and(|found| found == value));
        fits.then(|| self.instance.read(self, name, labels, "")).flatten()
    }
}

impl From {
    fn read<'a>(
        self,
        convention: &Convention,
        name: &'a str,
        labels: &'a HashMap<String, String>,
        instance: &str,
    ) -> Option<&'a str> {
        let rest = name.strip_prefix(convention.name)?;
        let scope = || rest.strip_suffix(instance)?.strip_suffix('-')?.split_once('-');
        match self {
            From::Nowhere => None,
            From::Label(key) => labels.get(key).map(String::as_str),
            From::NameRest => Some(rest).filter(|rest| rest.starts_with("i-")),
            From::NameAccount => scope().map(|(account, _)| account),
            From::NameRegion => scope().map(|(_, region)| region),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Labels = &'static [(&'static str, &'static str)];
    /// System, instance, account and region.
    type Want = (&'static str, &'static str, Option<&'static str>, Option<&'static str>);

    fn read(name: &str, labels: Labels) -> (Option<Claim>, Vec<String>) {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let mut problems = Vec::new();
        (claim(name, &labels, &mut problems), problems)
    }

    #[test]
    fn every_convention_is_read() {
        #[rustfmt::skip]
        let cases: &[(&str, Labels, Option<Want>)] = &[
            ("web", &[("dev.sg-agent.instance-id", "i-web")], Some(("sg-agent", "i-web", None, None))),
            ("web", &[("dev.sg-agent.instance-id", "i-web"), ("dev.sg-agent.account", "123456789012"), ("dev.sg-agent.region", "eu-west-1")],
                Some(("sg-agent", "i-web", Some("123456789012"), Some("eu-west-1")))),
            ("localemu-ec2-i-1", &[("localemu.service", "ec2"), ("localemu.instance-id", "i-1"), ("localemu.account-id", "000000000000"), ("localemu.region", "us-east-1")],
                Some(("LocalEmu", "i-1", Some("000000000000"), Some("us-east-1")))),
            ("localemu-ec2-i-1", &[], Some(("LocalEmu", "i-1", None, None))),
            ("flow-log-1", &[("localemu.service", "flow-log-sidecar"), ("localemu.instance-id", "i-1")], None),
            ("localstack-ec2.i-2", &[], Some(("LocalStack", "i-2", None, None))),
            ("floci-ec2-i-3", &[], Some(("floci", "i-3", None, None))),
            ("floci-ec2-role", &[], None),
            ("ministack-ec2-123456789012-ap-south-1-i-4", &[("instance_id", "i-4")], Some(("ministack", "i-4", Some("123456789012"), Some("ap-south-1")))),
            ("ministack-ec2-i-4-web", &[("instance_id", "i-4")], Some(("ministack", "i-4", None, None))),
            ("redis", &[("instance_id", "i-4")], None),
            ("k8s", &[("fakecloud-ec2", "i-5")], Some(("fakecloud", "i-5", None, None))),
            // The user's own label wins over an emulator's, and completes it.
            ("localstack-ec2.i-2", &[("dev.sg-agent.instance-id", "i-mine")], Some(("sg-agent", "i-mine", None, None))),
            ("localstack-ec2.i-2", &[("dev.sg-agent.region", "eu-west-1")], Some(("LocalStack", "i-2", None, Some("eu-west-1")))),
            ("redis", &[], None),
            ("my-localstack-ec2.i-2", &[], None),
        ];
        for (name, labels, want) in cases {
            let (claim, problems) = read(name, labels);
            let got = claim.as_ref().map(|c| (c.system, &*c.instance.0, c.account.as_deref(), c.region.as_deref()));
            assert_eq!((got, problems), (*want, vec![]), "{name} {labels:?}");
        }
    }

    #[test]
    fn interfaces_and_ports_come_in_order() {
        let (claim, problems) = read(
            "web",
            &[(INSTANCE, "i-web"), (ENI, "eni-a, ,eni-c"), (PUBLISH, "32022=22,8080=80"), (ACCOUNT, ""), (REGION, "")],
        );
        let claim = claim.expect("a claim");
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(claim.enis, [Some(EniId::from("eni-a")), None, Some(EniId::from("eni-c"))]);
        let ports = [(32022, 22), (8080, 80)].map(|(host_port, port)| PublishSpec {
            host_port,
            port,
            transport: crate::proxy::Transport::Tcp,
        });
        assert_eq!(claim.publish, ports);
    }

    #[test]
    fn what_is_invalid_is_named_and_left_out() {
        for bad in ["", "i-1 --privileged", "../../etc", "i-1\n"] {
            let labels = HashMap::from([(INSTANCE.to_owned(), bad.to_owned())]);
            let mut problems = Vec::new();
            assert_eq!(claim("web", &labels, &mut problems), None, "{bad:?}");
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(&format!("{bad:?}")), "{problems:?}");
        }
        let (claim, problems) =
            read("web", &[(INSTANCE, "i-1"), (ACCOUNT, "me"), (REGION, "Mars"), (ENI, "e;1"), (PUBLISH, "22")]);
        let claim = claim.expect("the id is good");
        assert_eq!((claim.account, claim.region, claim.enis, claim.publish), (None, None, vec![None], vec![]));
        assert_eq!(problems.len(), 4, "{problems:?}");
    }
}
