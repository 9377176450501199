//! The conformance cases (`tests/cases.yaml`): run as data where packets can be read from them, and accounted for
//! otherwise. A case that nothing shows fails the test.

use std::collections::BTreeSet;

use serde::Deserialize;
use sg_common::verdict::Drop;
use tests::cast::Host;
use tests::lab::Lab;
use tests::netns::isolated;
use tests::packets::{Packet, icmp, icmpv6, other, tcp, udp};

use crate::{
    acl, exempt, forget_flows, fragments, groups, icmp as icmp_tests, neighbor, rules, spoofing, state, untracked,
};

#[derive(Deserialize, Debug)]
struct Case {
    id: u32,
    setup: String,
    stimulus: String,
    expect: String,
    #[serde(rename = "ref")]
    norm: f64,
}

/// Cases that run as data.
const AS_DATA: &[u32] = &[1, 2, 3, 4, 6, 9, 11, 12, 18, 30];

/// Cases that a test shows: the functions are named so that they can't be gone.
const ELSEWHERE: &[(u32, fn())] = &[
    (8, rules::icmp_types_and_codes),
    (16, groups::a_prefix_list_s_new_version_counts_at_once),
    (20, groups::a_reference_means_private_addresses),
    (22, groups::who_leaves_a_group_is_out),
    (23, groups::no_trust_inside_a_group_without_a_self_rule),
    (24, groups::no_trust_inside_a_group_without_a_self_rule),
    (31, groups::both_ends_have_their_say),
    (32, groups::each_interface_by_its_own_groups),
    (33, groups::without_a_group_everything_passes_and_is_warned_about),
    (34, state::a_session_needs_one_direction),
    (35, state::revoking_a_tracked_rule_spares_its_flows),
    (37, untracked::a_revoke_stops_them_at_once),
    (38, untracked::without_the_reply_rule_they_are_tracked_and_stay),
    (40, state::replies_to_what_b_began),
    (43, acl::a_deny_cuts_tracked_flows),
    (44, state::udp_ages_by_its_exchanges),
    (45, state::udp_ages_by_its_exchanges),
    (47, state::pings_are_tracked_by_who_asked),
    (49, icmp_tests::related_errors_pass_and_strict_ones_need_a_rule),
    (50, state::a_full_table_drops_new_flows_only),
    (51, exempt::aws_services_need_no_rule),
    (53, neighbor::both_pass_without_any_rule),
    (54, spoofing::the_check_is_on),
    (57, fragments::the_first_decides_and_the_rest_follow),
    (59, acl::within_a_subnet_it_has_no_say),
    (60, acl::the_lowest_number_decides),
];

/// Cases about the control plane, flow logs and audit, which have no packets.
const NOT_PACKETS: &[u32] = &[14, 63, 65];

fn cases() -> Vec<Case> {
    serde_yaml_ng::from_str(include_str!("../../cases.yaml")).expect("cases as YAML")
}

#[test]
fn every_case_is_accounted_for() {
    let known: Vec<u32> =
        AS_DATA.iter().copied().chain(ELSEWHERE.iter().map(|&(id, _)| id)).chain(NOT_PACKETS.iter().copied()).collect();
    let once: BTreeSet<u32> = known.iter().copied().collect();
    assert_eq!(known.len(), once.len(), "a case is listed twice");
    let ids: BTreeSet<u32> = cases().iter().map(|case| case.id).collect();
    assert_eq!(ids, once, "cases.yaml (left) and the lists differ");
}

#[test]
fn cases_as_data() {
    isolated(|| {
        let mut lab = Lab::new("in none");
        for case in cases().iter().filter(|case| AS_DATA.contains(&case.id)) {
            forget_flows(&mut lab);
            lab.rules("sgB", &case.setup);
            let expected: Vec<&str> = case.expect.split(';').map(str::trim).collect();
            for (number, (from, to, packet)) in stimuli(case).into_iter().enumerate() {
                let (at, verdict) = lab.send(from, to, &packet);
                let shown = format!("case {} (SG-{}), packet {}: {packet:?}", case.id, case.norm, number + 1);
                match expected[number] {
                    "P" => assert!(verdict.is_ok() && at == to.name, "{shown}: {verdict:?} at {at}"),
                    "D" => assert_eq!((at, verdict), (to.name, Err(Drop::NoRule)), "{shown}"),
                    other => panic!("{shown}: '{other}' is neither P nor D"),
                }
            }
        }
    });
}

/// The packets of a case: `A>B tcp22`, `C`, `7999`, `type 8`, `128/0`, `ESP`. What one doesn't say is what the next
/// one that does says, or else the first rule; from A to B.
fn stimuli(case: &Case) -> Vec<(Host, Host, Packet)> {
    let traffic_of = |text: &str| {
        let is_traffic = |word: &&str| word.starts_with("tcp") || word.starts_with("udp");
        text.split_whitespace().find(is_traffic).map(str::to_owned)
    };
    let default = traffic_of(&case.stimulus).or_else(|| traffic_of(&case.setup));
    case.stimulus
        .split(';')
        .map(|stimulus| {
            let mut hosts = (Host::named("A"), Host::named("B"));
            let mut packet = None;
            let mut words = stimulus.split_whitespace();
            while let Some(word) = words.next() {
                if let Some((from, to)) = word.split_once('>') {
                    hosts = (Host::named(from), Host::named(to));
                } else if word.len() == 1 && word.chars().all(char::is_uppercase) {
                    hosts.0 = Host::named(word);
                } else {
                    let argument = if word == "type" { words.next() } else { None };
                    packet = Some(read(word, argument, default.as_deref(), hosts));
                }
            }
            let packet = packet.unwrap_or_else(|| read(default.as_deref().expect("a traffic"), None, None, hosts));
            (hosts.0, hosts.1, packet)
        })
        .collect()
}

fn read(word: &str, argument: Option<&str>, default: Option<&str>, (from, to): (Host, Host)) -> Packet {
    let port = |text: &str| text.parse::<u16>().unwrap_or_else(|error| panic!("'{word}': {error}"));
    if word == "type" {
        return icmp(from, to, argument.expect("a type").parse().expect("a type"), 0);
    }
    if let Some((kind, code)) = word.split_once('/') {
        return icmpv6(from, to, kind.parse().expect("a type"), code.parse().expect("a code"));
    }
    match word {
        "ESP" => other(from, to, 50),
        "AH" => other(from, to, 51),
        _ if word.starts_with("tcp") => tcp(from, to).ports(40000, port(&word[3..])).syn(),
        _ if word.starts_with("udp") => udp(from, to).ports(40000, port(&word[3..])),
        // A port alone has the protocol of the rule.
        _ => match default.map(|default| &default[..3]) {
            Some("tcp") => tcp(from, to).ports(40000, port(word)).syn(),
            Some("udp") => udp(from, to).ports(40000, port(word)),
            other => panic!("'{word}' is a port of {other:?}"),
        },
    }
}
