//! How what an endpoint lists refers to each other: what has to be asked for next, and whether answers fit together. Asks
//! nothing.

use std::collections::BTreeSet;

use super::super::{convert, wire};
use crate::model::GroupId;

/// What live instances are in, by ids.
pub struct Surroundings {
    pub groups: BTreeSet<String>,
    pub subnets: BTreeSet<String>,
    pub vpcs: BTreeSet<String>,
}

impl Surroundings {
    pub fn of(reservations: &[wire::Reservation]) -> Self {
        let live = || live_instances(reservations);
        let interfaces = || live().flat_map(|instance| &instance.interfaces);
        Self {
            groups: live().flat_map(all_groups).map(|id| id.to_string()).filter(|id| !id.is_empty()).collect(),
            subnets: interfaces().filter_map(|interface| interface.subnet.clone()).collect(),
            vpcs: interfaces().filter_map(|interface| interface.vpc.clone()).collect(),
        }
    }

    /// Those of the groups that aren't there. No control plane lets an instance have such a group, so the answers are of
    /// different moments, or the endpoint's own state is broken.
    pub fn unlisted(&self, groups: &[wire::SecurityGroup]) -> BTreeSet<String> {
        let listed: BTreeSet<&str> = groups.iter().map(|group| group.id.as_str()).collect();
        self.groups.iter().filter(|id| !listed.contains(id.as_str())).cloned().collect()
    }
}

/// The groups and prefix lists that rules refer to.
pub fn references(
    groups: &[wire::SecurityGroup],
    rules: Option<&[wire::GroupRule]>,
) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut referred, mut lists) = (BTreeSet::new(), BTreeSet::new());
    for rule in rules.unwrap_or_default() {
        referred.extend(rule.referenced.iter().map(|group| group.id.clone()));
        lists.extend(rule.prefix_list.clone());
    }
    if rules.is_none() {
        let permissions = groups.iter().flat_map(|group| group.ingress.iter().chain(&group.egress));
        for permission in permissions {
            referred.extend(permission.groups.iter().map(|group| group.id.clone()));
            lists.extend(permission.prefix_lists.iter().map(|list| list.id.clone()));
        }
    }
    // A default group may get a rule that refers to itself.
    referred.extend(groups.iter().filter(|group| group.name == "default").map(|group| group.id.clone()));
    referred.remove("");
    lists.remove("");
    (referred, lists)
}

/// Instances that aren't terminated.
pub fn live_instances(reservations: &[wire::Reservation]) -> impl Iterator<Item = &wire::Instance> {
    let instances = reservations.iter().flat_map(|reservation| &reservation.instances);
    instances.filter(|instance| !convert::is_terminated(&instance.state))
}

fn all_groups(instance: &wire::Instance) -> BTreeSet<GroupId> {
    let of_interfaces = instance.interfaces.iter().flat_map(|interface| convert::groups(&interface.groups));
    convert::groups(&instance.groups).into_iter().chain(of_interfaces).collect()
}

/// Adds reservations whose instances aren't there yet.
pub fn add_reservations(reservations: &mut Vec<wire::Reservation>, more: Vec<wire::Reservation>) {
    let mut known: BTreeSet<String> = instance_ids(reservations).map(str::to_owned).collect();
    for mut reservation in more {
        reservation.instances.0.retain(|instance| known.insert(instance.id.clone()));
        reservations.push(reservation);
    }
}

/// The instances of interfaces of which nothing else is known: they may be terminated.
pub fn unlisted_hosts(interfaces: &[wire::NetworkInterface], reservations: &[wire::Reservation]) -> BTreeSet<String> {
    let known: BTreeSet<&str> = instance_ids(reservations).collect();
    let hosts = interfaces.iter().filter_map(|interface| interface.attachment.as_ref()?.instance.clone());
    hosts.filter(|id| !id.is_empty() && !known.contains(id.as_str())).collect()
}

fn instance_ids(reservations: &[wire::Reservation]) -> impl Iterator<Item = &str> {
    let instances = reservations.iter().flat_map(|reservation| &reservation.instances);
    instances.map(|instance| instance.id.as_str())
}
