//! Which instances a call of RebootInstances names: no later answer of the endpoint tells that they were rebooted.

use crate::model::InstanceId;

/// The instances that a form reboots; none, if it is of another action.
pub fn instances(form: &[u8]) -> Vec<InstanceId> {
    let mut is_reboot = false;
    let mut instances = Vec::new();
    for (name, value) in form_urlencoded::parse(form) {
        if name == "Action" {
            is_reboot = value == "RebootInstances";
        } else if name.starts_with("InstanceId.") {
            instances.push(InstanceId::from(&*value));
        }
    }
    if is_reboot { instances } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reboot_reboots() {
        let form = |action: &str| format!("Action={action}&Version=2016-11-15&InstanceId.1=i-1&InstanceId.2=i-2");
        assert_eq!(instances(form("RebootInstances").as_bytes()), ["i-1".into(), "i-2".into()]);
        assert!(instances(form("StopInstances").as_bytes()).is_empty());
    }
}
