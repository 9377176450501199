//! What emulators do otherwise than AWS, and what is done about it, in one place. Each entry says what was seen, with
//! which emulator, and why the answer is the closed one of those possible.

use std::collections::BTreeSet;

use ipnet::{IpNet, Ipv6Net};
use reqwest::Url;

use crate::model::{AclEntry, GroupId, Peer, Rule, SecurityGroup, Traffic};

/// The account that Moto puts what it isn't told otherwise into.
pub const DEFAULT_ACCOUNT: &str = "123456789012";

/// The access key where none is configured: LocalStack's documented one, and any will do for Moto.
pub const DUMMY_ACCESS_KEY: &str = "test";

/// The secret that goes with it; emulators don't verify the signature.
pub const DUMMY_SECRET_KEY: &str = "test";

/// The header by which Moto takes the account; LocalStack takes it from a twelve-digit access key.
pub const ACCOUNT_HEADER: &str = "x-moto-account-id";

/// The id of a rule that stands in for AWS's own.
const DEFAULT_SELF_RULE: &str = "sgr-default-self";

/// Which completions of an emulator's answers are wanted. All are off for AWS and for files, which mean what they say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quirks {
    /// Give the default group the self rule that AWS would have given it (SG-1.13).
    pub default_self_rule: bool,
    /// Give default network ACLs the IPv6 entries that AWS would have given them (SG-5.3).
    pub default_acl_ipv6: bool,
}

/// Whether an endpoint is an emulator's: any that isn't of AWS's own domains.
pub fn is_emulator(endpoint: &Url) -> bool {
    let aws = [".amazonaws.com", ".amazonaws.com.cn", ".api.aws", ".amazonwebservices.com.cn"];
    let host = endpoint.host_str().unwrap_or_default();
    !aws.iter().any(|domain| host.ends_with(domain))
}

/// Whether a text is an account's id, which LocalStack takes for an access key as well.
pub fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether an error code says that the action isn't implemented. Optional parts are then taken as absent: an emulator
/// without network ACLs has none.
pub fn is_unsupported(code: &str) -> bool {
    matches!(
        code,
        "InvalidAction" | "UnknownAction" | "UnsupportedOperation" | "NotImplemented" | "ActionNotImplemented"
    )
}

/// Moto's default groups have no ingress rule, where AWS's let their members in (SG-1.13). Whoever revoked the rule
/// meant it, but Moto can't tell that apart from never having had it.
pub fn complete_default_group(group: &mut SecurityGroup) {
    if group.name == "default" && group.ingress.is_empty() {
        let peer = Peer::Group(group.id.clone());
        group.ingress.push(Rule { id: DEFAULT_SELF_RULE.into(), traffic: Traffic::All, peer });
    }
}

/// Whether a rule is of [`complete_default_group`]'s making.
pub fn is_default_self_rule(rule: &Rule) -> bool {
    &*rule.id.0 == DEFAULT_SELF_RULE
}

/// Moto's default network ACLs say nothing about IPv6, where AWS's allow it by entry 101 (SG-5.3). A direction that
/// has any IPv6 entry is left as it is.
pub fn complete_default_acl(entries: &mut Vec<AclEntry>) {
    if !entries.iter().any(|entry| matches!(entry.network, IpNet::V6(_))) {
        let network = IpNet::V6(Ipv6Net::default());
        entries.push(AclEntry { number: 101, allow: true, traffic: Traffic::All, network });
    }
}

/// An interface's groups, from what its instance and itself print.
///
/// In AWS an instance's groups are its primary interface's. Moto keeps two sets, an instance's and an interface's own,
/// and prints the interface's as the union: ModifyInstanceAttribute changes only the former,
/// ModifyNetworkInterfaceAttribute only the latter, and which of the two came last can't be seen. So:
/// - an instance without groups of its own (launched with `NetworkInterface.N`): what the interface prints;
/// - the primary interface: the instance's set, the smaller of the two readings;
/// - another interface: its own set where it was asked for (see [`union_suspects`]), else what it prints.
pub fn groups(primary: bool, instance: &BTreeSet<GroupId>, printed: BTreeSet<GroupId>) -> BTreeSet<GroupId> {
    if primary && !instance.is_empty() { instance.clone() } else { printed }
}

/// Whether what a secondary interface prints can be Moto's union of its own groups and its instance's. Only then is it
/// worth asking for its own by `Filter group-id`, which matches those alone.
pub fn union_suspects(primary: bool, instance: &BTreeSet<GroupId>, printed: &BTreeSet<GroupId>) -> bool {
    !primary && !instance.is_empty() && instance.is_subset(printed)
}

/// Whether a primary interface's groups can be read in two ways.
pub fn is_ambiguous(primary: bool, instance: &BTreeSet<GroupId>, printed: &BTreeSet<GroupId>) -> bool {
    primary && !instance.is_empty() && !printed.is_empty() && instance != printed
}

/// Source/destination check of an interface. ModifyInstanceAttribute sets the primary interface's in AWS, but only the
/// instance's in Moto: off is what somebody asked for, on is the default of both.
pub fn source_dest_check(primary: bool, instance: Option<bool>, interface: Option<bool>) -> bool {
    interface.unwrap_or(true) && (!primary || instance.unwrap_or(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[&str]) -> BTreeSet<GroupId> {
        ids.iter().map(|id| GroupId::from(*id)).collect()
    }

    #[test]
    fn only_awss_domains_are_aws() {
        for (url, emulator) in [
            ("http://127.0.0.1:5000", true),
            ("http://moto:5000", true),
            ("http://ec2.amazonaws.com.example.org", true),
            ("https://ec2.eu-west-1.amazonaws.com", false),
            ("https://ec2.cn-north-1.amazonaws.com.cn", false),
        ] {
            assert_eq!(is_emulator(&url.parse().unwrap()), emulator, "{url}");
        }
    }

    #[test]
    fn a_primary_interface_has_its_instances_groups() {
        assert_eq!(groups(true, &set(&["d"]), set(&["a", "b", "d"])), set(&["d"]));
        assert_eq!(groups(true, &set(&[]), set(&["a"])), set(&["a"]));
        assert_eq!(groups(false, &set(&["a"]), set(&["a", "b"])), set(&["a", "b"]));
        assert!(is_ambiguous(true, &set(&["d"]), &set(&["a", "d"])));
        assert!(!is_ambiguous(true, &set(&["a", "b"]), &set(&["a", "b"])));
        assert!(union_suspects(false, &set(&["a"]), &set(&["a", "b"])));
        assert!(!union_suspects(false, &set(&["a"]), &set(&["b"])));
        assert!(!union_suspects(true, &set(&["a"]), &set(&["a", "b"])));
    }

    #[test]
    fn check_is_off_only_where_somebody_turned_it_off() {
        assert!(source_dest_check(true, None, None));
        assert!(!source_dest_check(true, Some(false), Some(true)));
        assert!(!source_dest_check(true, Some(true), Some(false)));
        assert!(source_dest_check(false, Some(false), Some(true)));
    }
}
