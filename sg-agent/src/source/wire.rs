//! What the EC2 API prints, field by field, before anything is made of it. Owns the names that it uses in XML (camel
//! case, lists of `<item>`) and in the AWS CLI's JSON (Pascal case, arrays); one type reads both. Judges nothing.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize as DeriveDeserialize;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A list: `<set><item/>...</set>` or `[...]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct List<T>(pub Vec<T>);

/// A number that may be nonsense: one bad port mustn't take the whole answer with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Number {
    /// It is one.
    Int(i64),
    /// It isn't.
    Bad(String),
}

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident : $type:ty = $xml:literal $(| $json:literal)*),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(DeriveDeserialize, Clone, PartialEq, Eq, Debug, Default)]
        #[serde(default)]
        pub struct $name {
            $(
                #[serde(rename = $xml $(, alias = $json)*)]
                pub $field: $type,
            )+
        }
    )+};
}

wire! {
    /// A security group; its rules have no ids here.
    SecurityGroup {
        id: String = "groupId" | "GroupId",
        name: String = "groupName" | "GroupName",
        vpc: String = "vpcId" | "VpcId",
        owner: String = "ownerId" | "OwnerId",
        ingress: List<Permission> = "ipPermissions" | "IpPermissions",
        egress: List<Permission> = "ipPermissionsEgress" | "IpPermissionsEgress",
    }
    /// One protocol and port range of a group, with all its peers.
    Permission {
        protocol: Option<String> = "ipProtocol" | "IpProtocol",
        from: Option<Number> = "fromPort" | "FromPort",
        to: Option<Number> = "toPort" | "ToPort",
        groups: List<GroupRef> = "groups" | "UserIdGroupPairs",
        ipv4: List<Ipv4Range> = "ipRanges" | "IpRanges",
        ipv6: List<Ipv6Range> = "ipv6Ranges" | "Ipv6Ranges",
        prefix_lists: List<PrefixListRef> = "prefixListIds" | "PrefixListIds",
    }
    /// A group that something refers to or is in.
    GroupRef {
        id: String = "groupId" | "GroupId",
        owner: String = "userId" | "UserId",
        peering: Option<String> = "peeringStatus" | "PeeringStatus",
    }
    /// An IPv4 peer.
    Ipv4Range { cidr: String = "cidrIp" | "CidrIp" }
    /// An IPv6 peer.
    Ipv6Range { cidr: String = "cidrIpv6" | "CidrIpv6" }
    /// A prefix list as a peer.
    PrefixListRef { id: String = "prefixListId" | "PrefixListId" }
    /// A rule with its id.
    GroupRule {
        id: String = "securityGroupRuleId" | "SecurityGroupRuleId",
        group: String = "groupId" | "GroupId",
        egress: bool = "isEgress" | "IsEgress",
        protocol: Option<String> = "ipProtocol" | "IpProtocol",
        from: Option<Number> = "fromPort" | "FromPort",
        to: Option<Number> = "toPort" | "ToPort",
        ipv4: Option<String> = "cidrIpv4" | "CidrIpv4",
        ipv6: Option<String> = "cidrIpv6" | "CidrIpv6",
        prefix_list: Option<String> = "prefixListId" | "PrefixListId",
        referenced: Option<GroupRef> = "referencedGroupInfo" | "ReferencedGroupInfo",
    }
    /// What one RunInstances started.
    Reservation {
        owner: String = "ownerId" | "OwnerId",
        instances: List<Instance> = "instancesSet" | "Instances",
    }
    /// An instance.
    Instance {
        id: String = "instanceId" | "InstanceId",
        state: InstanceState = "instanceState" | "State",
        groups: List<GroupRef> = "groupSet" | "SecurityGroups",
        interfaces: List<NetworkInterface> = "networkInterfaceSet" | "NetworkInterfaces",
        tags: List<Tag> = "tagSet" | "Tags",
        private_ip: Option<String> = "privateIpAddress" | "PrivateIpAddress",
        ipv6: Option<String> = "ipv6Address" | "Ipv6Address",
        subnet: Option<String> = "subnetId" | "SubnetId",
        vpc: Option<String> = "vpcId" | "VpcId",
        source_dest_check: Option<bool> = "sourceDestCheck" | "SourceDestCheck",
        image: String = "imageId" | "ImageId",
        key: Option<String> = "keyName" | "KeyName",
    }
    /// An instance's state.
    InstanceState {
        code: Option<Number> = "code" | "Code",
        name: String = "name" | "Name",
    }
    /// An attribute's value, where one is set.
    AttributeValue { value: Option<String> = "value" | "Value" }
    /// A key pair.
    KeyPair {
        name: String = "keyName" | "KeyName",
        public: Option<String> = "publicKey" | "PublicKey",
    }
    /// A machine image.
    Image {
        id: String = "imageId" | "ImageId",
        name: Option<String> = "name" | "Name",
    }
    /// A tag.
    Tag {
        key: String = "key" | "Key",
        value: String = "value" | "Value",
    }
    /// A network interface, by itself or inside an instance.
    NetworkInterface {
        id: String = "networkInterfaceId" | "NetworkInterfaceId",
        attachment: Option<Attachment> = "attachment" | "Attachment",
        groups: List<GroupRef> = "groupSet" | "Groups",
        subnet: Option<String> = "subnetId" | "SubnetId",
        vpc: Option<String> = "vpcId" | "VpcId",
        private_ip: Option<String> = "privateIpAddress" | "PrivateIpAddress",
        private_ips: List<PrivateIp> = "privateIpAddressesSet" | "PrivateIpAddresses",
        ipv6s: List<Ipv6Address> = "ipv6AddressesSet" | "Ipv6Addresses",
        ipv4_prefixes: List<Ipv4Prefix> = "ipv4PrefixSet" | "Ipv4Prefixes",
        ipv6_prefixes: List<Ipv6Prefix> = "ipv6PrefixSet" | "Ipv6Prefixes",
        source_dest_check: Option<bool> = "sourceDestCheck" | "SourceDestCheck",
    }
    /// What an interface is attached to.
    Attachment {
        instance: Option<String> = "instanceId" | "InstanceId",
        device_index: Option<Number> = "deviceIndex" | "DeviceIndex",
    }
    /// A private IPv4 address; the public one beside it doesn't count (SG-1.9).
    PrivateIp { address: String = "privateIpAddress" | "PrivateIpAddress" }
    /// An IPv6 address.
    Ipv6Address { address: String = "ipv6Address" | "Ipv6Address" }
    /// A delegated IPv4 prefix.
    Ipv4Prefix { prefix: String = "ipv4Prefix" | "Ipv4Prefix" }
    /// A delegated IPv6 prefix.
    Ipv6Prefix { prefix: String = "ipv6Prefix" | "Ipv6Prefix" }
    /// A managed prefix list; its entries come with it in a file, and by a call of their own from an endpoint.
    PrefixList {
        id: String = "prefixListId" | "PrefixListId",
        family: Option<String> = "addressFamily" | "AddressFamily",
        version: Option<Number> = "version" | "Version",
        entries: Option<List<PrefixListEntry>> = "entrySet" | "Entries",
    }
    /// An entry of a prefix list.
    PrefixListEntry { cidr: String = "cidr" | "Cidr" }
    /// A VPC.
    Vpc {
        id: String = "vpcId" | "VpcId",
        ipv4: Option<String> = "cidrBlock" | "CidrBlock",
    }
    /// A subnet.
    Subnet {
        id: String = "subnetId" | "SubnetId",
        vpc: String = "vpcId" | "VpcId",
        ipv4: Option<String> = "cidrBlock" | "CidrBlock",
        ipv6: List<Ipv6Block> = "ipv6CidrBlockAssociationSet" | "Ipv6CidrBlockAssociationSet",
    }
    /// An IPv6 block of a subnet.
    Ipv6Block {
        cidr: String = "ipv6CidrBlock" | "Ipv6CidrBlock",
        state: Option<Ipv6BlockState> = "ipv6CidrBlockState" | "Ipv6CidrBlockState",
    }
    /// Whether the block is still the subnet's.
    Ipv6BlockState { state: String = "state" | "State" }
    /// A network ACL.
    NetworkAcl {
        id: String = "networkAclId" | "NetworkAclId",
        default: bool = "default" | "IsDefault",
        associations: List<AclAssociation> = "associationSet" | "Associations",
        entries: List<AclEntry> = "entrySet" | "Entries",
    }
    /// A subnet that an ACL is for.
    AclAssociation { subnet: String = "subnetId" | "SubnetId" }
    /// An entry of an ACL.
    AclEntry {
        number: Option<Number> = "ruleNumber" | "RuleNumber",
        egress: bool = "egress" | "Egress",
        action: String = "ruleAction" | "RuleAction",
        protocol: Option<String> = "protocol" | "Protocol",
        ports: Option<PortRange> = "portRange" | "PortRange",
        icmp: Option<IcmpTypeCode> = "icmpTypeCode" | "IcmpTypeCode",
        ipv4: Option<String> = "cidrBlock" | "CidrBlock",
        ipv6: Option<String> = "ipv6CidrBlock" | "Ipv6CidrBlock",
    }
    /// An ACL entry's ports.
    PortRange {
        from: Option<Number> = "from" | "From",
        to: Option<Number> = "to" | "To",
    }
    /// An ACL entry's ICMP type and code.
    IcmpTypeCode {
        kind: Option<Number> = "type" | "Type",
        code: Option<Number> = "code" | "Code",
    }
    /// A peering connection.
    Peering {
        accepter: PeeringVpc = "accepterVpcInfo" | "AccepterVpcInfo",
        requester: PeeringVpc = "requesterVpcInfo" | "RequesterVpcInfo",
        status: PeeringStatus = "status" | "Status",
    }
    /// One end of it.
    PeeringVpc {
        id: String = "vpcId" | "VpcId",
        owner: Option<String> = "ownerId" | "OwnerId",
        region: Option<String> = "region" | "Region",
    }
    /// Whether it is active.
    PeeringStatus { code: String = "code" | "Code" }
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> List<T> {
    /// What is in it.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }
}

impl<T> IntoIterator for List<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a List<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A struct to quick-xml is an element with children; serde_json takes an array for one as well.
        deserializer.deserialize_struct("List", &["item"], ListVisitor(PhantomData))
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = List<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<List<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<List<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "item" => items.push(map.next_value()?),
                // Attributes, such as a namespace.
                _ if key.starts_with('@') => {
                    map.next_value::<IgnoredAny>()?;
                }
                // An object where a list should be mustn't pass for an empty one.
                _ => return Err(serde::de::Error::unknown_field(&key, &["item"])),
            }
        }
        Ok(List(items))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_i64(NumberVisitor)
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer")
    }

    fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
        Ok(Number::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
        Ok(i64::try_from(value).map_or_else(|_| Number::Bad(value.to_string()), Number::Int))
    }

    fn visit_str<E>(self, value: &str) -> Result<Number, E> {
        Ok(Number::Bad(value.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_and_json_read_the_same() {
        let xml = "<item><ipProtocol>tcp</ipProtocol><fromPort>22</fromPort><toPort>x</toPort><groups/>\
                   <ipRanges> <item><cidrIp>10.0.0.0/8</cidrIp></item><item><cidrIp>10.1.0.0/16</cidrIp></item>\
                   </ipRanges></item>";
        let xml: Permission = quick_xml::de::from_str(xml).unwrap();
        let json = r#"{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 23, "UserIdGroupPairs": [],
                       "IpRanges": [{"CidrIp": "10.0.0.0/8"}, {"CidrIp": "10.1.0.0/16"}], "Unknown": 1}"#;
        let json: Permission = serde_json::from_str(json).unwrap();
        for read in [&xml, &json] {
            assert_eq!(read.protocol.as_deref(), Some("tcp"));
            assert_eq!(read.from, Some(Number::Int(22)));
            let cidrs: Vec<_> = read.ipv4.iter().map(|range| range.cidr.as_str()).collect();
            assert_eq!(cidrs, ["10.0.0.0/8", "10.1.0.0/16"]);
            assert!(read.groups.0.is_empty() && read.ipv6.0.is_empty());
        }
        assert_eq!(xml.to, Some(Number::Bad("x".into())));
        assert_eq!(json.to, Some(Number::Int(23)));
        assert!(serde_json::from_str::<Permission>(r#"{"IpRanges": {"CidrIp": "10.0.0.0/8"}}"#).is_err());
    }
}
