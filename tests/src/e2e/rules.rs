//! The rules file: groups and instances in a short form, written as the AWS CLI prints them. Checks nothing: what is
//! nonsense is written as it is.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Groups and instances. A rule is `PROTOCOL PORTS PEER`: `tcp 22 10.0.0.0/8`, `udp 5000-5010 ::/0`, `icmp 8/-1
/// 0.0.0.0/0`, `-1 - sg-app`, `tcp 443 pl-list`.
#[derive(Clone, Debug)]
pub struct Rules {
    path: PathBuf,
    groups: BTreeMap<String, Group>,
    instances: BTreeMap<String, Member>,
    lists: BTreeMap<String, Vec<String>>,
}

#[derive(Clone, Debug, Default)]
struct Group {
    ingress: Vec<Value>,
    egress: Vec<Value>,
}

#[derive(Clone, Debug)]
struct Member {
    groups: Vec<String>,
    addresses: Vec<IpAddr>,
}

/// AWS's egress of a group that nobody changed, in both families.
const EVERYTHING: [&str; 2] = ["-1 - 0.0.0.0/0", "-1 - ::/0"];

impl Rules {
    /// A file without anything in it yet; it is made by [`Rules::write`].
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), groups: BTreeMap::new(), instances: BTreeMap::new(), lists: BTreeMap::new() }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A group's ingress rules, instead of those before. A new group lets everything out.
    pub fn ingress(&mut self, group: &str, rules: &[&str]) -> &mut Self {
        self.group(group).ingress = rules.iter().map(|rule| permission(rule)).collect();
        self
    }

    /// A group's egress rules, instead of those before.
    pub fn egress(&mut self, group: &str, rules: &[&str]) -> &mut Self {
        self.group(group).egress = rules.iter().map(|rule| permission(rule)).collect();
        self
    }

    /// One more ingress rule, word for word.
    pub fn ingress_json(&mut self, group: &str, permission: Value) -> &mut Self {
        self.group(group).ingress.push(permission);
        self
    }

    /// Which groups an instance is in. It keeps its addresses.
    pub fn member(&mut self, instance: &str, groups: &[&str]) -> &mut Self {
        let addresses = self.instances.get(instance).map(|member| member.addresses.clone()).unwrap_or_default();
        self.instance(instance, groups, &addresses)
    }

    /// An instance with one network interface.
    pub fn instance(&mut self, id: &str, groups: &[&str], addresses: &[IpAddr]) -> &mut Self {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        self.instances.insert(id.to_owned(), Member { groups, addresses: addresses.to_vec() });
        self
    }

    /// Leaves an instance out.
    pub fn forget(&mut self, id: &str) -> &mut Self {
        self.instances.remove(id);
        self
    }

    /// A prefix list's networks, instead of those before.
    pub fn prefix_list(&mut self, id: &str, networks: &[&str]) -> &mut Self {
        self.lists.insert(id.to_owned(), networks.iter().map(|network| (*network).to_owned()).collect());
        self
    }

    /// Writes the file, in one step for whoever reads it.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn write(&self) {
        self.write_text(&self.json().to_string());
    }

    /// Writes something else into the file.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn write_text(&self, text: &str) {
        let fresh = self.path.with_extension("new");
        let result = fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &self.path));
        assert!(result.is_ok(), "{}: {result:?}", self.path.display());
    }

    fn group(&mut self, id: &str) -> &mut Group {
        self.groups.entry(id.to_owned()).or_insert_with(|| Group {
            ingress: Vec::new(),
            egress: EVERYTHING.iter().map(|rule| permission(rule)).collect(),
        })
    }

    fn json(&self) -> Value {
        let groups = self.groups.iter().map(|(id, group)| {
            json!({
                "GroupId": id, "GroupName": id, "OwnerId": "123456789012", "VpcId": "vpc-1",
                "IpPermissions": group.ingress, "IpPermissionsEgress": group.egress,
            })
        });
        let instances = self.instances.iter().map(|(id, member)| instance(id, member));
        let lists = self.lists.iter().map(|(id, networks)| {
            let entries: Vec<_> = networks.iter().map(|network| json!({"Cidr": network})).collect();
            let family = if networks.iter().any(|network| network.contains(':')) { "IPv6" } else { "IPv4" };
            json!({"PrefixListId": id, "AddressFamily": family, "Version": 1, "Entries": entries})
        });
        json!({
            "SecurityGroups": groups.collect::<Vec<_>>(),
            "Reservations": [{"OwnerId": "123456789012", "Instances": instances.collect::<Vec<_>>()}],
            "PrefixLists": lists.collect::<Vec<_>>(),
        })
    }
}

fn instance(id: &str, member: &Member) -> Value {
    let groups: Vec<_> = member.groups.iter().map(|group| json!({"GroupId": group, "GroupName": group})).collect();
    let v4 = member.addresses.iter().filter(|address| address.is_ipv4());
    let v6 = member.addresses.iter().filter(|address| address.is_ipv6());
    let v4: Vec<_> = v4.map(|address| json!({"PrivateIpAddress": address})).collect();
    let v6: Vec<_> = v6.map(|address| json!({"Ipv6Address": address})).collect();
    json!({
        "InstanceId": id, "State": {"Code": 16, "Name": "running"}, "VpcId": "vpc-1", "SecurityGroups": groups,
        "NetworkInterfaces": [{
            "NetworkInterfaceId": format!("eni-{id}"), "Attachment": {"DeviceIndex": 0}, "Groups": groups,
            "VpcId": "vpc-1", "PrivateIpAddresses": v4, "Ipv6Addresses": v6,
        }],
    })
}

/// A rule in the short form.
fn permission(text: &str) -> Value {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [protocol, ports, peer] = words[..] else { panic!("{text:?} is not PROTOCOL PORTS PEER") };
    let mut permission = json!({"IpProtocol": protocol});
    if ports != "-" {
        let separator = if protocol.starts_with("icmp") { '/' } else { '-' };
        let (from, to) = ports.split_once(separator).unwrap_or((ports, ports));
        let port = |text: &str| text.parse::<i64>().unwrap_or_else(|_| panic!("{text:?} is no port"));
        permission["FromPort"] = port(from).into();
        permission["ToPort"] = port(to).into();
    }
    let (key, value) = match peer {
        _ if peer.starts_with("sg-") => ("UserIdGroupPairs", json!({"GroupId": peer, "UserId": "123456789012"})),
        _ if peer.starts_with("pl-") => ("PrefixListIds", json!({"PrefixListId": peer})),
        _ if peer.contains(':') => ("Ipv6Ranges", json!({"CidrIpv6": peer})),
        _ => ("IpRanges", json!({"CidrIp": peer})),
    };
    permission[key] = json!([value]);
    permission
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_is_written_as_the_cli_prints_it() {
        let cidr = json!({"IpProtocol": "tcp", "FromPort": 22, "ToPort": 23, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]});
        assert_eq!(permission("tcp 22-23 10.0.0.0/8"), cidr);
        let icmp = json!({"IpProtocol": "icmp", "FromPort": 8, "ToPort": -1, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]});
        assert_eq!(permission("icmp 8/-1 ::/0"), icmp);
        let list = json!({"IpProtocol": "-1", "PrefixListIds": [{"PrefixListId": "pl-1"}]});
        assert_eq!(permission("-1 - pl-1"), list);
    }
}
