//! What a call of ModifySecurityGroupRules asks for, read from its form. What is done with it is `source`'s.

use std::collections::BTreeMap;

use crate::source::ModifiedRule;

/// The rules that a form modifies; none, if it is of another action.
pub fn rules(form: &[u8]) -> Vec<ModifiedRule> {
    let mut is_modification = false;
    let mut rules: BTreeMap<String, ModifiedRule> = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(form) {
        if name == "Action" {
            is_modification = value == "ModifySecurityGroupRules";
        }
        let Some((number, field)) = name.strip_prefix("SecurityGroupRule.").and_then(|rest| rest.split_once('.'))
        else {
            continue;
        };
        let rule = rules.entry(number.to_owned()).or_default();
        let field = field.strip_prefix("SecurityGroupRule.").unwrap_or(field);
        rule.set(field, value.into_owned());
    }
    if is_modification { rules.into_values().filter(|rule| !rule.id.is_empty()).collect() } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_is_read_by_its_number() {
        let form = "Action=ModifySecurityGroupRules&GroupId=sg-1&SecurityGroupRule.1.SecurityGroupRuleId=sgr-1\
                    &SecurityGroupRule.1.SecurityGroupRule.IpProtocol=tcp&SecurityGroupRule.1.SecurityGroupRule.FromPort=22\
                    &SecurityGroupRule.1.SecurityGroupRule.ToPort=22\
                    &SecurityGroupRule.1.SecurityGroupRule.ReferencedGroupId=sg-2\
                    &SecurityGroupRule.2.SecurityGroupRuleId=sgr-2&SecurityGroupRule.2.SecurityGroupRule.CidrIpv6=%3A%3A%2F0";
        let rules = rules(form.as_bytes());
        assert_eq!(rules.len(), 2);
        assert_eq!((rules[0].id.as_str(), rules[0].group.as_deref()), ("sgr-1", Some("sg-2")));
        assert_eq!((rules[1].id.as_str(), rules[1].ipv6.as_deref()), ("sgr-2", Some("::/0")));
        assert!(super::rules(&form.replace("Action=Modify", "Action=Describe").into_bytes()).is_empty());
    }
}
