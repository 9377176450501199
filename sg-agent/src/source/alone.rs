//! One answer by itself, without the calls around it: what fuzzers and their regression tests read. The parser and the
//! conversion are those of every inventory; only what other answers would have said is made up.

use std::collections::BTreeSet;

use super::answer::{
    self, AnswerError, Call, DescribeInstances, DescribeManagedPrefixLists, DescribeNetworkAcls,
    DescribeNetworkInterfaces, DescribeSecurityGroupRules, DescribeSecurityGroups, DescribeSubnets,
    DescribeVpcPeeringConnections, DescribeVpcs, GetManagedPrefixListEntries,
};
use super::convert::Facts;
use super::quirks::Quirks;
use super::wire;
use crate::model::Inventory;

/// The id of the prefix list whose entries come without it.
const LIST: &str = "pl-0";

/// How one action's answer is read.
type Read = fn(u16, &[u8]) -> Result<Facts, AnswerError>;

/// Every action that is ever asked for.
const READERS: [(&str, Read); 10] = [
    (DescribeInstances::ACTION, |status, body| {
        let reservations = Some(items::<DescribeInstances>(status, body)?);
        Ok(Facts { reservations, ..Facts::default() })
    }),
    (DescribeNetworkInterfaces::ACTION, |status, body| {
        Ok(Facts { interfaces: items::<DescribeNetworkInterfaces>(status, body)?, ..Facts::default() })
    }),
    (DescribeSecurityGroups::ACTION, |status, body| {
        Ok(Facts { groups: items::<DescribeSecurityGroups>(status, body)?, ..Facts::default() })
    }),
    (DescribeSecurityGroupRules::ACTION, |status, body| {
        let rules = items::<DescribeSecurityGroupRules>(status, body)?;
        let ids: BTreeSet<&String> = rules.iter().map(|rule| &rule.group).collect();
        let groups = ids.into_iter().map(|id| wire::SecurityGroup { id: id.clone(), ..Default::default() }).collect();
        Ok(Facts { groups, rules: Some(rules), ..Facts::default() })
    }),
    (DescribeManagedPrefixLists::ACTION, |status, body| {
        Ok(Facts { prefix_lists: items::<DescribeManagedPrefixLists>(status, body)?, ..Facts::default() })
    }),
    (GetManagedPrefixListEntries::ACTION, |status, body| {
        let entries = Some(wire::List(items::<GetManagedPrefixListEntries>(status, body)?));
        let list = wire::PrefixList { id: LIST.to_owned(), entries, ..Default::default() };
        Ok(Facts { prefix_lists: vec![list], ..Facts::default() })
    }),
    (DescribeVpcs::ACTION, |status, body| Ok(Facts { vpcs: items::<DescribeVpcs>(status, body)?, ..Facts::default() })),
    (DescribeSubnets::ACTION, |status, body| {
        Ok(Facts { subnets: items::<DescribeSubnets>(status, body)?, ..Facts::default() })
    }),
    (DescribeNetworkAcls::ACTION, |status, body| {
        Ok(Facts { acls: items::<DescribeNetworkAcls>(status, body)?, ..Facts::default() })
    }),
    (DescribeVpcPeeringConnections::ACTION, |status, body| {
        Ok(Facts { peerings: items::<DescribeVpcPeeringConnections>(status, body)?, ..Facts::default() })
    }),
];

/// The actions whose answers [`parse_answer`] reads: every one that an inventory needs.
pub fn actions() -> impl Iterator<Item = &'static str> {
    READERS.iter().map(|(action, _)| *action)
}

/// What one answer says by itself, with an emulator's omissions completed; `None` for an action that is never asked
/// for. Groups that listed rules belong to are taken as there, and so is the prefix list of listed entries.
///
/// # Errors
/// The reason why it is no answer to the action.
pub fn parse_answer(action: &str, status: u16, body: &[u8]) -> Option<Result<Inventory, AnswerError>> {
    let (_, read) = READERS.iter().find(|(name, _)| *name == action)?;
    let quirks = Quirks { default_self_rule: true, default_acl_ipv6: true };
    Some(read(status, body).map(|facts| facts.inventory(quirks)))
}

fn items<C: Call>(status: u16, body: &[u8]) -> Result<Vec<C::Item>, AnswerError> {
    answer::read::<C>(status, body).map(|(items, _)| items)
}
