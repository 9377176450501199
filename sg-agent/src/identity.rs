//! Whose an address is. An instance may give its own interface any address and MAC address; what is another's, or the
//! host's, doesn't become its own by that. Remembers what each link had when it was first seen; reads no links.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crate::discovery::{Attachment, OUT_OF_SIGHT};
use crate::model::{Eni, Scope, VpcId, Warning};

/// An attachment as it describes itself, and what the control plane says of it.
#[derive(Debug)]
pub struct Claim<'a> {
    /// The attachment.
    pub attachment: &'a Attachment,
    /// Its VPC, where the control plane knows one.
    pub vpc: Option<(&'a Scope, &'a VpcId)>,
    /// Its interface.
    pub eni: Option<&'a Eni>,
    /// All interfaces of its account and region.
    pub enis: Vec<&'a Eni>,
}

/// What links had when they were first seen, and what they have been given since.
#[derive(Debug, Default)]
pub struct Identities(HashMap<u32, Known>);

#[derive(Debug)]
struct Known {
    mac: [u8; 6],
    first: BTreeSet<IpAddr>,
    later: BTreeSet<IpAddr>,
}

/// Why an address should be an interface's own: the lower, the better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Title {
    /// The control plane says so.
    Assigned,
    /// It had the address when its link was first seen.
    First,
    /// It was given the address later, but has had it before.
    Held,
    /// It was given the address just now.
    New,
}

impl Identities {
    /// The attachments with those addresses and MAC addresses that are their own. For each other one a warning.
    pub fn settle(&mut self, claims: &[Claim], warnings: &mut BTreeSet<Warning>) -> Vec<Attachment> {
        let present: BTreeSet<u32> = claims.iter().map(|claim| claim.attachment.link.ifindex).collect();
        self.0.retain(|ifindex, _| present.contains(ifindex));
        for claim in claims {
            let attachment = claim.attachment;
            self.0.entry(attachment.link.ifindex).or_insert_with(|| Known {
                mac: attachment.mac,
                first: attachment.addresses.iter().copied().collect(),
                later: BTreeSet::new(),
            });
        }
        let mut claimants: BTreeMap<IpAddr, Vec<&Claim>> = BTreeMap::new();
        for claim in claims {
            claim.attachment.addresses.iter().for_each(|&address| claimants.entry(address).or_default().push(claim));
        }
        let mut settled = Vec::new();
        for claim in claims {
            let mut own = claim.attachment.clone();
            own.addresses.retain(|address| match self.refusal(claim, address, &claimants[address]) {
                None => true,
                Some(owner) => {
                    let problem = format!("has {address} on {}, which is {owner}: it isn't its own", own.link.name);
                    warnings.insert(Warning { subject: own.instance.to_string(), problem });
                    false
                }
            });
            if let Some(owner) = self.owner_of_mac(claim, claims) {
                let problem = format!("has the MAC address of {owner} on {}: it isn't its own", own.link.name);
                warnings.insert(Warning { subject: own.instance.to_string(), problem });
                own.mac = self.0[&own.link.ifindex].mac;
            }
            settled.push(own);
        }
        for own in &settled {
            if let Some(known) = self.0.get_mut(&own.link.ifindex) {
                if known.mac == OUT_OF_SIGHT {
                    known.mac = own.mac;
                }
                known.later = own.addresses.iter().copied().collect();
            }
        }
        settled
    }

    /// Whose the address is, if it isn't the claimant's.
    fn refusal(&self, claim: &Claim, address: &IpAddr, claimants: &[&Claim]) -> Option<String> {
        if claim.attachment.gateways.contains(address) {
            return Some("the host's".to_owned());
        }
        let index = claim.attachment.link.ifindex;
        let title = self.title(claim, address);
        let better = claimants.iter().find(|other| {
            let other_index = other.attachment.link.ifindex;
            (self.title(other, address), other_index) < (title, index) && meet(claim, other)
        });
        if let Some(other) = better {
            return Some(format!("{}'s", other.attachment.instance));
        }
        if title < Title::Held {
            return None;
        }
        let others = claim.enis.iter().filter(|eni| eni.vpc.as_ref() == claim.vpc.map(|(_, vpc)| vpc));
        let mut others = others.filter(|eni| claim.eni.is_none_or(|own| own.id != eni.id));
        others.find(|eni| eni.private_addresses().any(|theirs| theirs == *address)).map(|eni| format!("{}'s", eni.id))
    }

    fn title(&self, claim: &Claim, address: &IpAddr) -> Title {
        if claim.eni.is_some_and(|eni| eni.private_addresses().any(|own| own == *address)) {
            return Title::Assigned;
        }
        match self.0.get(&claim.attachment.link.ifindex) {
            Some(known) if known.first.contains(address) => Title::First,
            Some(known) if known.later.contains(address) => Title::Held,
            _ => Title::New,
        }
    }

    /// Who has had the claimant's MAC address from the beginning, if it hasn't itself.
    fn owner_of_mac(&self, claim: &Claim, claims: &[Claim]) -> Option<String> {
        let (mac, index) = (claim.attachment.mac, claim.attachment.link.ifindex);
        if self.0.get(&index)?.mac == mac || mac == OUT_OF_SIGHT {
            return None;
        }
        let is_owner = |other: &&Claim| {
            let other_index = other.attachment.link.ifindex;
            other_index != index && self.0.get(&other_index).is_some_and(|known| known.mac == mac) && meet(claim, other)
        };
        claims.iter().find(is_owner).map(|other| other.attachment.instance.to_string())
    }
}

/// Whether one may be taken for the other: they share a bridge, or rules that name addresses.
fn meet(one: &Claim, other: &Claim) -> bool {
    one.attachment.segment == other.attachment.segment || (one.vpc.is_some() && one.vpc == other.vpc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Link, Origin};
    use crate::model::InstanceId;

    const HOST: &str = "203.0.113.1";

    fn attachment(ifindex: u32, segment: u32, addresses: &[&str]) -> Attachment {
        Attachment {
            instance: InstanceId::from(format!("i-{ifindex}").as_str()),
            account: None,
            region: None,
            eni: None,
            device_index: 0,
            link: Link { ifindex, name: format!("veth{ifindex}") },
            segment,
            mac: [2, 0, 0, 0, 0, ifindex as u8],
            addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
            networks: Vec::new(),
            gateways: vec![HOST.parse().expect("an address")],
            origin: Origin::Flag,
            publish: Vec::new(),
        }
    }

    /// What is left of each one's addresses, and how many warnings there are.
    fn settle(identities: &mut Identities, attachments: &[Attachment]) -> (Vec<Vec<String>>, usize) {
        let claims: Vec<_> = attachments
            .iter()
            .map(|attachment| Claim { attachment, vpc: None, eni: None, enis: Vec::new() })
            .collect();
        let mut warnings = BTreeSet::new();
        let settled = identities.settle(&claims, &mut warnings);
        (settled.iter().map(|own| own.addresses.iter().map(ToString::to_string).collect()).collect(), warnings.len())
    }

    #[test]
    fn a_neighbours_address_does_not_become_ones_own() {
        let mut identities = Identities::default();
        let [a, c] = [attachment(3, 9, &["203.0.113.10"]), attachment(4, 9, &["203.0.113.30"])];
        assert_eq!(settle(&mut identities, &[a.clone(), c.clone()]).1, 0);
        let thief = attachment(3, 9, &["203.0.113.30", "203.0.113.10", HOST, "203.0.113.11"]);
        let (left, warnings) = settle(&mut identities, &[thief.clone(), c.clone()]);
        assert_eq!(left, [vec!["203.0.113.10", "203.0.113.11"], vec!["203.0.113.30"]]);
        assert_eq!(warnings, 2);
        // Nor while its owner is away; and when that one is back, what was taken meanwhile is its own again.
        let away = attachment(4, 9, &[]);
        assert_eq!(settle(&mut identities, &[thief.clone(), away]).0[0].len(), 3);
        assert_eq!(settle(&mut identities, &[thief, c]).0[1], ["203.0.113.30"]);
    }

    #[test]
    fn other_segments_may_have_the_same_addresses() {
        let mut identities = Identities::default();
        let [a, b] = [attachment(3, 8, &["203.0.113.10"]), attachment(4, 9, &["203.0.113.10"])];
        assert_eq!(settle(&mut identities, &[a, b]), (vec![vec!["203.0.113.10".to_owned()]; 2], 0));
    }

    #[test]
    fn a_neighbours_mac_address_does_not_become_ones_own() {
        let mut identities = Identities::default();
        let [mut a, c] = [attachment(3, 9, &[]), attachment(4, 9, &[])];
        let mac = a.mac;
        settle(&mut identities, &[a.clone(), c.clone()]);
        a.mac = c.mac;
        let attachments = [a.clone(), c];
        let claims = attachments.each_ref().map(|attachment| Claim { attachment, vpc: None, eni: None, enis: vec![] });
        let mut warnings = BTreeSet::new();
        assert_eq!(identities.settle(&claims, &mut warnings)[0].mac, mac);
        assert_eq!(warnings.len(), 1);
    }
}
