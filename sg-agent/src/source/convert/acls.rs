//! Network ACLs (SG-5). An allowing entry that isn't understood is left out; a denying one denies the more.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sg_common::abi::Direction;

use super::super::quirks::{self, Quirks};
use super::super::wire;
use super::{NotANumber, Warnings, identified, number, text};
use crate::model::{AclEntry, CidrError, NetworkAcl, Traffic, TrafficError, parse_ipv4, parse_ipv6};

/// What is wrong with an entry.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Traffic(#[from] TrafficError),
    #[error(transparent)]
    Number(#[from] NotANumber),
    #[error(transparent)]
    Cidr(#[from] CidrError),
    #[error("it needs one network, IPv4 or IPv6")]
    Networks,
    #[error("{0:?} is neither allow nor deny")]
    Action(String),
}

pub(super) fn acl<K: for<'a> From<&'a str>>(
    wire: &wire::NetworkAcl,
    quirks: Quirks,
    warnings: &mut Warnings,
) -> Option<(K, NetworkAcl)> {
    let id = identified(&wire.id, "a network ACL", warnings)?;
    let mut directions = [false, true].map(|egress| {
        let of_direction = wire.entries.iter().filter(|entry| entry.egress == egress);
        of_direction.flat_map(|wire| entries(wire, id, warnings)).collect::<Vec<_>>()
    });
    for entries in &mut directions {
        if wire.default && quirks.default_acl_ipv6 {
            quirks::complete_default_acl(entries);
        }
        // Moto prints them as they were made.
        entries.sort_by_key(|entry| entry.number);
    }
    let [ingress, egress] = directions;
    let subnets = wire.associations.iter().filter(|a| !a.subnet.is_empty());
    let subnets = subnets.map(|a| a.subnet.as_str().into()).collect();
    Some((id.into(), NetworkAcl { id: id.into(), subnets, ingress, egress }))
}

fn entries(wire: &wire::AclEntry, acl: &str, warnings: &mut Warnings) -> Vec<AclEntry> {
    let direction = if wire.egress { Direction::Egress } else { Direction::Ingress }.name();
    let place = match number(&wire.number) {
        Ok(Some(place)) => u32::try_from(place).ok(),
        _ => None,
    };
    // A number that isn't one: a denial comes first, then.
    let number = place.unwrap_or(0);
    let understood = place.ok_or_else(|| NotANumber(format!("{:?}", wire.number)).into()).and_then(|_| entry(wire));
    let problem = match understood {
        Ok((allow, traffic, network)) => return vec![AclEntry { number, allow, traffic, network }],
        Err(problem) => problem,
    };
    if wire.action.eq_ignore_ascii_case("allow") {
        warnings.push(acl, format!("{direction} entry {number} left out: {problem}"));
        return Vec::new();
    }
    let networks = match network(wire) {
        Ok(network) => vec![network],
        Err(_) => vec![IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())],
    };
    let denied: Vec<String> = networks.iter().map(ToString::to_string).collect();
    let denied = denied.join(" and ");
    warnings.push(acl, format!("{direction} entry {number} denies all of {denied} instead: {problem}"));
    networks.into_iter().map(|network| AclEntry { number, allow: false, traffic: Traffic::All, network }).collect()
}

fn entry(wire: &wire::AclEntry) -> Result<(bool, Traffic, IpNet), Problem> {
    let allow = match wire.action.as_str() {
        "allow" => true,
        "deny" => false,
        action => return Err(Problem::Action(action.to_owned())),
    };
    Ok((allow, traffic(wire)?, network(wire)?))
}

fn traffic(wire: &wire::AclEntry) -> Result<Traffic, Problem> {
    let protocol = text(&wire.protocol);
    let icmp = matches!(protocol, Some("1" | "58" | "icmp" | "icmpv6"));
    let (from, to) = match (icmp, &wire.icmp, &wire.ports) {
        (true, Some(icmp), _) => (number(&icmp.kind)?, number(&icmp.code)?),
        // Moto drops them; AWS always prints them.
        (true, None, _) => (Some(-1), Some(-1)),
        (false, _, Some(ports)) => (number(&ports.from)?, number(&ports.to)?),
        (false, _, None) => (None, None),
    };
    Ok(Traffic::parse(protocol, from, to)?)
}

fn network(wire: &wire::AclEntry) -> Result<IpNet, Problem> {
    match (text(&wire.ipv4), text(&wire.ipv6)) {
        (Some(ipv4), None) => Ok(IpNet::V4(parse_ipv4(ipv4)?)),
        (None, Some(ipv6)) => Ok(IpNet::V6(parse_ipv6(ipv6)?)),
        _ => Err(Problem::Networks),
    }
}
