//! Rules as cases write them: `in tcp22 A/32 + icmp 8/-1, out none`. Turns them into the model's; enforces nothing.

use ipnet::IpNet;
use sg_agent::model::{GroupId, Peer, PrefixListId, Rule, RuleId, Traffic};

use crate::cast::Host;

/// Both directions of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// What may come in.
    pub ingress: Vec<Rule>,
    /// What may go out.
    pub egress: Vec<Rule>,
}

/// Reads `in RULE + RULE, out RULE`. A rule is a traffic and a peer; `all` and `none` stand for themselves. Without a
/// peer it is any of both families. A direction that isn't named: nothing in, everything out (SG-1.13).
///
/// # Panics
/// Where the text says something else.
pub fn rules(text: &str) -> Rules {
    let mut rules = Rules { ingress: Vec::new(), egress: list("all") };
    for clause in text.split([',', ';']).map(str::trim).filter(|clause| !clause.is_empty()) {
        match clause.split_once(' ') {
            Some(("in", rest)) => rules.ingress = list(rest),
            Some(("out", rest)) => rules.egress = list(rest),
            _ => panic!("'{clause}' in '{text}' is neither 'in RULES' nor 'out RULES'"),
        }
    }
    rules
}

fn list(text: &str) -> Vec<Rule> {
    if text.trim() == "none" {
        return Vec::new();
    }
    text.split('+').flat_map(|rule| one(rule.trim())).collect()
}

fn one(text: &str) -> Vec<Rule> {
    // Ports that come with a protocol that has none are ignored (SG-1.4), as are the ones that aren't there (SG-1.3).
    let text = text.replace("no ports", "").replace("from ", "");
    let mut words: Vec<&str> = text.split_whitespace().collect();
    if let Some(at) = words.iter().position(|&word| word == "ports") {
        words.drain(at..at + 2);
    }
    let mut words = words.into_iter();
    let first = words.next().unwrap_or_else(|| panic!("an empty rule"));
    let mut rest: Vec<&str> = words.collect();
    let codes = rest.first().copied().filter(|word| first.starts_with("icmp") && is_codes(word));
    if codes.is_some() {
        rest.remove(0);
    }
    let traffic = traffic(first, codes);
    let peers = match rest.as_slice() {
        [] => ["any4", "any6"].iter().flat_map(|peer| self::peers(peer)).collect(),
        [peer] => self::peers(peer),
        more => panic!("'{text}': {more:?} is more than one peer"),
    };
    let rule = |peer: Peer| Rule { id: RuleId::from(format!("{traffic:?} {peer:?}").as_str()), traffic, peer };
    peers.into_iter().map(rule).collect()
}

fn is_codes(word: &str) -> bool {
    word.split_once('/').is_some_and(|(kind, code)| kind.parse::<i16>().is_ok() && code.parse::<i16>().is_ok())
}

/// `tcp22`, `udp5000-5010`, `icmp` with `8/-1`, `-1`, `all`, `50`.
fn traffic(word: &str, codes: Option<&str>) -> Traffic {
    let range = |ports: &str| {
        let parse = |port: &str| port.parse::<u16>().unwrap_or_else(|error| panic!("'{word}': {error}"));
        match ports.split_once('-') {
            Some((from, to)) => (parse(from), parse(to)),
            None if ports.is_empty() => (0, u16::MAX),
            None => (parse(ports), parse(ports)),
        }
    };
    let any = |number: &str| u8::try_from(number.parse::<i16>().expect("a number")).ok();
    let (kind, code) = codes.and_then(|codes| codes.split_once('/')).map_or((None, None), |(k, c)| (any(k), any(c)));
    match word {
        "-1" | "all" => Traffic::All,
        "icmp" => Traffic::Icmp { kind, code },
        "icmpv6" => Traffic::Icmpv6 { kind, code },
        _ => {
            if let Some(ports) = word.strip_prefix("tcp") {
                let (from, to) = range(ports);
                Traffic::Tcp { from, to }
            } else if let Some(ports) = word.strip_prefix("udp") {
                let (from, to) = range(ports);
                Traffic::Udp { from, to }
            } else {
                Traffic::Other { number: word.parse().unwrap_or_else(|_| panic!("'{word}' is no protocol")) }
            }
        }
    }
}

/// `any4`, `any6`, `any`, `A/32`, `A/128`, a network, `sgA`, `pl-1`.
fn peers(word: &str) -> Vec<Peer> {
    let network = |text: &str| match text.parse::<IpNet>() {
        Ok(IpNet::V4(network)) => Peer::Ipv4(network.trunc()),
        Ok(IpNet::V6(network)) => Peer::Ipv6(network.trunc()),
        Err(error) => panic!("'{text}' is no peer: {error}"),
    };
    match word {
        "any4" => vec![network("0.0.0.0/0")],
        "any6" => vec![network("::/0")],
        "any" => vec![network("0.0.0.0/0"), network("::/0")],
        _ if word.starts_with("sg") => vec![Peer::Group(GroupId::from(word))],
        _ if word.starts_with("pl-") => vec![Peer::PrefixList(PrefixListId::from(word))],
        _ => match word.split_once('/') {
            Some((name @ ("A" | "B" | "C" | "X"), "32")) => vec![network(&format!("{}/32", Host::named(name).v4))],
            Some((name @ ("A" | "B" | "C" | "X"), "128")) => vec![network(&format!("{}/128", Host::named(name).v6))],
            _ => vec![network(word)],
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_cases_write_them() {
        let read = rules("in tcp22 A/32 + icmp 8/-1 any4, out none");
        assert_eq!(read.egress, []);
        assert_eq!(read.ingress.len(), 2);
        assert_eq!(read.ingress[0].traffic, Traffic::Tcp { from: 22, to: 22 });
        assert_eq!(read.ingress[0].peer, peers("10.0.1.10/32")[0]);
        assert_eq!(read.ingress[1].traffic, Traffic::Icmp { kind: Some(8), code: None });
        assert_eq!(rules("in none").egress.len(), 2, "everything out, for each family");
        assert_eq!(rules("in -1 ports 80-80 any4").ingress[0].traffic, Traffic::All);
        assert_eq!(rules("in tcp22 from sgA").ingress[0].peer, Peer::Group("sgA".into()));
        assert_eq!(rules("in icmpv6 no ports any6").ingress[0].traffic, Traffic::Icmpv6 { kind: None, code: None });
    }
}
