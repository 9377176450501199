//! Rules that Moto shows otherwise than they were modified: ModifySecurityGroupRules to an IPv6 network, a group or a
//! prefix list leaves the old peer in both Describe calls (Moto 5.2.5). Whoever saw the call pass knows better. Owns
//! what was seen, and until when it stands for what is described.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::wire;

/// More modified rules at once than anybody has; the oldest ids give way to new ones.
const MOST: usize = 4_096;

/// A rule as ModifySecurityGroupRules was called for it. A field that the call left out is `None`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ModifiedRule {
    /// The rule's id.
    pub id: String,
    /// An IPv4 network.
    pub ipv4: Option<String>,
    /// An IPv6 network.
    pub ipv6: Option<String>,
    /// A prefix list's id.
    pub prefix_list: Option<String>,
    /// A group's id.
    pub group: Option<String>,
}

impl ModifiedRule {
    /// Takes a field of the call in, by its name there. What isn't about the peer is described rightly.
    pub fn set(&mut self, name: &str, value: String) {
        match name {
            "SecurityGroupRuleId" => self.id = value,
            "CidrIpv4" => self.ipv4 = Some(value),
            "CidrIpv6" => self.ipv6 = Some(value),
            "PrefixListId" => self.prefix_list = Some(value),
            "ReferencedGroupId" => self.group = Some(value),
            _ => {}
        }
    }

    /// The rule that is described, with the peer that it was given.
    fn applied_to(&self, described: &wire::GroupRule) -> wire::GroupRule {
        let referenced = self.group.as_ref().map(|id| {
            let same = described.referenced.clone().filter(|group| group.id == *id);
            same.unwrap_or_else(|| wire::GroupRef { id: id.clone(), ..Default::default() })
        });
        wire::GroupRule {
            ipv4: self.ipv4.clone(),
            ipv6: self.ipv6.clone(),
            prefix_list: self.prefix_list.clone(),
            referenced,
            ..described.clone()
        }
    }
}

/// Modifications that the endpoint doesn't show.
#[derive(Debug, Default)]
pub struct Corrections(Mutex<BTreeMap<String, Correction>>);

#[derive(Debug)]
struct Correction {
    rule: ModifiedRule,
    /// What was described when it was first looked for: anything else later is a newer change.
    described: Option<wire::GroupRule>,
}

impl Corrections {
    /// Takes modifications in; a later one of a rule replaces an earlier one.
    pub fn note(&self, rules: Vec<ModifiedRule>) {
        let mut all = self.lock();
        for rule in rules {
            all.insert(rule.id.clone(), Correction { rule, described: None });
            if all.len() > MOST {
                all.pop_first();
            }
        }
    }

    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The endpoint has begun anew: the same ids may be other rules.
    pub fn forget(&self) {
        self.lock().clear();
    }

    /// Puts described rules right. A modification is over once the endpoint shows it, or something newer. That of a rule
    /// that is gone does nothing: rules' ids are given once.
    pub fn apply(&self, rules: &mut [wire::GroupRule]) {
        let mut all = self.lock();
        if all.is_empty() {
            return;
        }
        let mut over = BTreeSet::new();
        for described in rules {
            let Some(correction) = all.get_mut(&described.id) else { continue };
            let modified = correction.rule.applied_to(described);
            let is_newer = correction.described.as_ref().is_some_and(|first| first != described);
            if modified == *described || is_newer {
                over.insert(described.id.clone());
                continue;
            }
            correction.described.get_or_insert_with(|| described.clone());
            tracing::debug!(rule = %described.id, "is enforced as it was modified, which the endpoint doesn't show");
            *described = modified;
        }
        all.retain(|id, _| !over.contains(id));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Correction>> {
        // Whoever panicked left whole entries in it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(ipv4: &str) -> wire::GroupRule {
        wire::GroupRule { id: "sgr-1".into(), group: "sg-1".into(), ipv4: Some(ipv4.into()), ..Default::default() }
    }

    fn applied(corrections: &Corrections, rule: wire::GroupRule) -> (Option<String>, Option<String>) {
        let mut rules = [rule];
        corrections.apply(&mut rules);
        let [rule] = rules;
        (rule.ipv4, rule.referenced.map(|group| group.id))
    }

    #[test]
    fn a_modification_stands_until_something_newer_is_described() {
        let corrections = Corrections::default();
        let to_group = ModifiedRule { id: "sgr-1".into(), group: Some("sg-2".into()), ..Default::default() };
        corrections.note(vec![to_group.clone()]);
        let old = || described("0.0.0.0/0");
        for _ in 0..2 {
            assert_eq!(applied(&corrections, old()), (None, Some("sg-2".into())));
        }
        // Somebody else gave it another network.
        assert_eq!(applied(&corrections, described("10.0.0.0/8")), (Some("10.0.0.0/8".into()), None));
        assert_eq!(applied(&corrections, old()), (Some("0.0.0.0/0".into()), None), "it is over for good");
        // An endpoint that shows what was asked for needs no correction.
        corrections.note(vec![to_group.clone()]);
        let shown = to_group.applied_to(&old());
        assert_eq!(applied(&corrections, shown), (None, Some("sg-2".into())));
        assert_eq!(applied(&corrections, old()), (Some("0.0.0.0/0".into()), None));
        // After a reset the same id is another rule.
        corrections.note(vec![to_group]);
        corrections.forget();
        assert_eq!(applied(&corrections, old()), (Some("0.0.0.0/0".into()), None));
    }
}
