//! One question about one enforced interface, answered as the kernel would: what the proxy and `explain` ask.
//!
//! Owns no look-up of its own: all of them are `sg_common::policy`'s, over the snapshot's tables. Knows no flows (it is
//! about packets that begin one) and no address checks (SG-4.3): a client's own address is judged as it is, so
//! 127.0.0.1 is in 0.0.0.0/0 and not in 10.0.0.0/8.

#![forbid(unsafe_code)]

use std::net::IpAddr;

use sg_common::abi::Direction;
use sg_common::policy::{Match, Query, Tables as _, begins};
use sg_common::verdict::{Drop, Pass, Verdict};

use crate::apply::{Enforced, Snapshot};

/// What becomes of a flow that begins.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// Whether it may, and why.
    pub verdict: Verdict,
    /// What the groups' rules say of it. A network ACL may deny nevertheless, and an exempt service needs no rule.
    pub matched: Match,
}

impl Decision {
    const UNKNOWN: Self = Self { verdict: Err(Drop::UnknownInterface), matched: Match::None };
}

/// Decides whether `peer` may begin a flow with the interface behind the link `ifindex`, or the interface with `peer`.
///
/// `port` is the destination's, or ICMP type << 8 | code; 0 for protocols that have neither. A mapped address
/// (`::ffff:a.b.c.d`, as a dual-stack socket shows its IPv4 clients) is the IPv4 address that it holds. An interface
/// that isn't enforced is denied everything.
pub fn admits(
    snapshot: &Snapshot,
    ifindex: u32,
    direction: Direction,
    peer: IpAddr,
    protocol: u8,
    port: u16,
) -> Decision {
    let Some(Enforced { entry: interface, .. }) = snapshot.interfaces.get(&ifindex) else { return Decision::UNKNOWN };
    let peer = peer.to_canonical().into();
    let (matched, verdict) = begins(&snapshot.tables, interface, direction, &Query { peer: &peer, protocol, port });
    // Services that nothing filters (SG-4.1).
    let is_exempt = || snapshot.tables.is_exempt(interface.vpc, &peer, protocol, port);
    let verdict =
        if verdict.is_err() && direction == Direction::Egress && is_exempt() { Ok(Pass::Exempt) } else { verdict };
    Decision { verdict, matched }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use ipnet::IpNet;
    use sg_common::abi::{self, Binding, NOWHERE};
    use sg_common::addr::Address;
    use sg_common::packet::{ICMP, TCP, UDP};

    use super::*;
    use crate::compile::compile;
    use crate::exempt::Service;
    use crate::model::{GroupId, InstanceId, Peer, RuleId, Scope, Traffic};
    use crate::resolve::{self, AclRules, AclSpec, Allowance, GroupSpec, Peers, PolicyKey, Spec};
    use crate::sharing::Table;
    use crate::tables::{self, InMemory};

    const LINK: u32 = 7;
    const VPC: u32 = 3;
    const GROUPS: u32 = 1;
    const ACL: u32 = 2;
    const WEB: u32 = 40;

    fn networks(network: &str) -> Peers {
        Peers::Networks(Arc::new(BTreeSet::from([network.parse().unwrap()])))
    }

    fn rule(traffic: Traffic, network: &str) -> Allowance {
        let peer = match network.parse().unwrap() {
            IpNet::V4(network) => Peer::Ipv4(network),
            IpNet::V6(network) => Peer::Ipv6(network),
        };
        Allowance { id: RuleId::from("sgr-1"), group: GroupId::from("sg-1"), traffic, peer, peers: networks(network) }
    }

    fn entry(number: u32, allow: bool, network: &str) -> AclSpec {
        AclSpec { number, allow, traffic: Traffic::All, peers: networks(network) }
    }

    fn tcp(from: u16, to: u16) -> Traffic {
        Traffic::Tcp { from, to }
    }

    fn snapshot(groups: GroupSpec, acl: Option<AclRules>) -> Snapshot {
        let key = PolicyKey::Unknown;
        let mut tables = InMemory::default();
        let mut bind = |slot, policy, spec: Spec| {
            tables.bindings.insert(slot, Binding { policy, epoch: 1 });
            tables.policies.insert(policy, Arc::new(compile(&spec).unwrap()));
        };
        bind(GROUPS, 11, Spec::Groups(groups));
        let has_acl = acl.is_some();
        if let Some(acl) = acl {
            bind(ACL, 12, Spec::Acl(acl));
        }
        let interface = resolve::Interface {
            link: "veth7".into(),
            instance: InstanceId::from("i-1"),
            scope: Scope { account: "123456789012".into(), region: "us-east-1".into() },
            eni: None,
            groups: BTreeSet::new(),
            policy: key,
            acl: None,
            vpc: VPC,
            mac: [2, 0, 0, 0, 0, 7],
            addresses: vec!["10.0.1.7".parse().unwrap()],
            prefixes: Vec::new(),
            subnet_number: None,
            subnet: vec!["10.0.1.0/24".parse().unwrap()],
            source_dest_check: true,
        };
        let entry = abi::Interface {
            groups: GROUPS,
            acl: if has_acl { ACL } else { 0 },
            vpc: VPC,
            subnet4: Address::v4([10, 0, 1, 0]),
            mask4: Address::mask(120),
            subnet6: NOWHERE,
            mask6: NOWHERE,
            ..abi::Interface::default()
        };
        let interfaces = Table::from([(LINK, Enforced { interface: interface.into(), entry, attached: true })]);
        Snapshot { interfaces, tables, ..Snapshot::default() }
    }

    fn ingress(rules: Vec<Allowance>) -> Snapshot {
        snapshot(GroupSpec { ingress: rules, egress: Vec::new() }, None)
    }

    #[track_caller]
    fn check(snapshot: &Snapshot, direction: Direction, peer: &str, protocol: u8, port: u16, expected: Verdict) {
        let decision = admits(snapshot, LINK, direction, peer.parse().unwrap(), protocol, port);
        assert_eq!(decision.verdict, expected, "{direction:?} {peer} {protocol} {port}");
    }

    #[test]
    fn rules_decide_by_address_protocol_and_port() {
        let snapshot = ingress(vec![rule(tcp(22, 23), "10.0.0.0/8"), rule(tcp(443, 443), "2001:db8::/32")]);
        let check = |peer, protocol, port, expected| {
            check(&snapshot, Direction::Ingress, peer, protocol, port, expected);
        };
        check("10.9.8.7", TCP, 22, Ok(Pass::New));
        check("10.9.8.7", TCP, 23, Ok(Pass::New));
        check("10.9.8.7", TCP, 24, Err(Drop::NoRule));
        check("10.9.8.7", UDP, 22, Err(Drop::NoRule));
        check("11.9.8.7", TCP, 22, Err(Drop::NoRule));
        check("2001:db8::1", TCP, 443, Ok(Pass::New));
        check("2001:db9::1", TCP, 443, Err(Drop::NoRule));
        check("10.9.8.7", ICMP, 8 << 8, Err(Drop::NoRule));
    }

    #[test]
    fn a_local_client_is_judged_by_its_own_address() {
        let any = ingress(vec![rule(tcp(22, 22), "0.0.0.0/0")]);
        check(&any, Direction::Ingress, "127.0.0.1", TCP, 22, Ok(Pass::New));
        check(&any, Direction::Ingress, "::1", TCP, 22, Err(Drop::NoRule));
        let private = ingress(vec![rule(tcp(22, 22), "10.0.0.0/8")]);
        check(&private, Direction::Ingress, "127.0.0.1", TCP, 22, Err(Drop::NoRule));
        let any6 = ingress(vec![rule(tcp(22, 22), "::/0")]);
        check(&any6, Direction::Ingress, "::1", TCP, 22, Ok(Pass::New));
        check(&any6, Direction::Ingress, "127.0.0.1", TCP, 22, Err(Drop::NoRule));
    }

    #[test]
    fn a_mapped_client_is_the_ipv4_address_that_it_holds() {
        let snapshot = ingress(vec![rule(tcp(22, 22), "10.0.0.0/8")]);
        check(&snapshot, Direction::Ingress, "::ffff:10.1.2.3", TCP, 22, Ok(Pass::New));
        let six = ingress(vec![rule(tcp(22, 22), "::/0")]);
        check(&six, Direction::Ingress, "::ffff:10.1.2.3", TCP, 22, Err(Drop::NoRule));
    }

    #[test]
    fn any_source_is_untracked_only_with_free_replies() {
        let open = |egress| snapshot(GroupSpec { ingress: vec![rule(tcp(80, 80), "0.0.0.0/0")], egress }, None);
        let free = open(vec![rule(Traffic::All, "0.0.0.0/0")]);
        check(&free, Direction::Ingress, "127.0.0.1", TCP, 80, Ok(Pass::Untracked));
        let six_only = open(vec![rule(Traffic::All, "::/0")]);
        check(&six_only, Direction::Ingress, "127.0.0.1", TCP, 80, Ok(Pass::New));
        let decision = admits(&free, LINK, Direction::Ingress, "127.0.0.1".parse().unwrap(), TCP, 80);
        assert_eq!(decision.matched, Match::Any);
    }

    #[test]
    fn a_member_of_a_referenced_group_passes_within_its_vpc() {
        let mut allowance = rule(tcp(3306, 3306), "192.0.2.0/24");
        (allowance.peer, allowance.peers) = (Peer::Group(GroupId::from("sg-web")), Peers::Group(WEB));
        let mut snapshot = ingress(vec![allowance]);
        let member = tables::member(&resolve::Membership { groups: BTreeSet::from([WEB]), subnet: None }).unwrap();
        snapshot.tables.members.insert((VPC, "10.0.1.8/32".parse().unwrap()), member);
        snapshot.tables.members.insert((VPC + 1, "10.0.1.9/32".parse().unwrap()), member);
        check(&snapshot, Direction::Ingress, "10.0.1.8", TCP, 3306, Ok(Pass::New));
        check(&snapshot, Direction::Ingress, "10.0.1.9", TCP, 3306, Err(Drop::NoRule));
    }

    #[test]
    fn the_acl_comes_first_on_the_way_in_and_last_on_the_way_out() {
        let groups =
            GroupSpec { ingress: vec![rule(tcp(22, 22), "0.0.0.0/0")], egress: vec![rule(tcp(443, 443), "0.0.0.0/0")] };
        let entries = vec![entry(90, false, "198.51.100.0/24"), entry(100, true, "0.0.0.0/0")];
        let acl = AclRules { ingress: entries.clone(), egress: entries };
        let snapshot = snapshot(groups, Some(acl));
        check(&snapshot, Direction::Ingress, "203.0.113.1", TCP, 22, Ok(Pass::New));
        check(&snapshot, Direction::Ingress, "198.51.100.1", TCP, 22, Err(Drop::Acl));
        // Both deny: the reason is that of the first.
        check(&snapshot, Direction::Ingress, "198.51.100.1", TCP, 80, Err(Drop::Acl));
        check(&snapshot, Direction::Egress, "198.51.100.1", TCP, 80, Err(Drop::NoRule));
        check(&snapshot, Direction::Egress, "198.51.100.1", TCP, 443, Err(Drop::Acl));
        check(&snapshot, Direction::Egress, "203.0.113.1", TCP, 443, Ok(Pass::New));
    }

    #[test]
    fn within_the_subnet_the_acl_has_no_say() {
        let groups = GroupSpec { ingress: vec![rule(tcp(22, 22), "0.0.0.0/0")], egress: Vec::new() };
        let snapshot = snapshot(groups, Some(AclRules::default()));
        check(&snapshot, Direction::Ingress, "10.0.1.200", TCP, 22, Ok(Pass::New));
        check(&snapshot, Direction::Ingress, "10.0.2.200", TCP, 22, Err(Drop::Acl));
    }

    #[test]
    fn exempt_services_pass_on_the_way_out_only() {
        let mut snapshot = snapshot(GroupSpec::default(), Some(AclRules::default()));
        let dns: Service = "169.254.169.253:53/udp".parse().unwrap();
        snapshot.tables.exempt.insert((VPC, dns));
        check(&snapshot, Direction::Egress, "169.254.169.253", UDP, 53, Ok(Pass::Exempt));
        check(&snapshot, Direction::Egress, "169.254.169.253", TCP, 53, Err(Drop::NoRule));
        check(&snapshot, Direction::Ingress, "169.254.169.253", UDP, 53, Err(Drop::Acl));
    }

    #[test]
    fn what_is_not_known_is_denied() {
        let snapshot = ingress(vec![rule(Traffic::All, "0.0.0.0/0")]);
        let elsewhere = admits(&snapshot, LINK + 1, Direction::Ingress, "10.0.0.1".parse().unwrap(), TCP, 22);
        assert_eq!(elsewhere.verdict, Err(Drop::UnknownInterface));
        let mut unbound = snapshot.clone();
        unbound.tables.bindings.clear();
        check(&unbound, Direction::Ingress, "10.0.0.1", TCP, 22, Err(Drop::NoRule));
        let mut torn = snapshot;
        torn.tables.policies.clear();
        check(&torn, Direction::Ingress, "10.0.0.1", TCP, 22, Err(Drop::Inconsistent));
    }
}
