//! What the launcher asks of an endpoint, and what it tells it. Owns these calls; what becomes of instances is the
//! launcher's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ipnet::Ipv4Net;
use serde::Deserialize;

use super::super::answer::{Call, DescribeImages, DescribeInstances, DescribeKeyPairs};
use super::super::client::Parameters;
use super::super::convert::is_terminated;
use super::super::{SourceError, wire};
use super::Ec2;
use crate::model::{EniId, InstanceId, VpcId};

/// States of instances that have, or get, a container. Of terminated ones, which Moto lists for good, only those are asked
/// for that have one.
const LIVE: [&str; 4] = ["pending", "running", "stopping", "stopped"];

/// An instance, as far as starting it goes. Its texts are as the endpoint has them: unchecked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Its id.
    pub instance: InstanceId,
    /// Whether it is to run, or stands still.
    pub runs: bool,
    /// The machine image's id.
    pub ami: String,
    /// The key pair's name.
    pub key: Option<String>,
    /// Its interfaces, the primary one first.
    pub interfaces: Vec<LaunchInterface>,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

impl Launch {
    /// Its interfaces' ids, in their order.
    pub fn enis(&self) -> impl Iterator<Item = &EniId> {
        self.interfaces.iter().map(|interface| &interface.eni)
    }
}

/// An interface of such an instance.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LaunchInterface {
    /// Its id.
    pub eni: EniId,
    /// Its VPC.
    pub vpc: VpcId,
    /// That one's primary network, if it is known.
    pub network: Option<Ipv4Net>,
    /// Its private IPv4 addresses, the primary one first.
    pub addresses: Vec<Ipv4Addr>,
}

/// An answer that says no more than that it was done.
macro_rules! done {
    ($($action:ident),+) => {$(
        #[derive(Deserialize)]
        struct $action {}

        impl Call for $action {
            const ACTION: &'static str = stringify!($action);
            type Item = ();

            fn into_page(self) -> (Vec<()>, Option<String>) {
                (Vec::new(), None)
            }
        }
    )+};
}

done!(CreateTags, AssignPrivateIpAddresses);

/// One attribute of an instance.
#[derive(Deserialize)]
struct DescribeInstanceAttribute {
    #[serde(rename = "userData", default)]
    user_data: Option<wire::AttributeValue>,
}

impl Call for DescribeInstanceAttribute {
    const ACTION: &'static str = "DescribeInstanceAttribute";
    type Item = String;

    fn into_page(self) -> (Vec<String>, Option<String>) {
        (self.user_data.and_then(|data| data.value).into_iter().collect(), None)
    }
}

impl Ec2 {
    /// The account, if it was told and not found out.
    pub fn told_account(&self) -> Option<&str> {
        self.account_is_known.then_some(&*self.assumed.account)
    }

    /// Every instance of the account and region that isn't terminated: one call, and one more for each new VPC.
    pub async fn launches(&self) -> Result<Vec<Launch>, SourceError> {
        let states = LIVE.map(str::to_owned).into();
        let reservations = self.filtered::<DescribeInstances>("instance-state-name", &states).await?;
        let instances = || reservations.iter().flat_map(|reservation| &reservation.instances);
        let vpcs: BTreeSet<String> =
            instances().flat_map(|instance| &instance.interfaces).filter_map(|eni| eni.vpc.clone()).collect();
        let vpcs = self.vpcs(&vpcs).await?;
        let network = |id: &str| vpcs.iter().find(|vpc| vpc.id == id).and_then(|vpc| vpc.ipv4.as_ref()?.parse().ok());
        Ok(instances().map(|instance| launch(instance, &network)).collect())
    }

    /// Which of these are listed as terminated, or about to be.
    pub async fn terminated(&self, instances: &BTreeSet<InstanceId>) -> Result<BTreeSet<InstanceId>, SourceError> {
        // By a filter: an id that the endpoint doesn't know is no error then.
        let ids = instances.iter().map(InstanceId::to_string).collect();
        let reservations = self.filtered::<DescribeInstances>("instance-id", &ids).await?;
        let found = reservations.iter().flat_map(|reservation| &reservation.instances);
        let over = found.filter(|instance| is_over(&instance.state)).map(|instance| instance.id.as_str().into());
        Ok(over.filter(|id| instances.contains(id)).collect())
    }

    /// What the instance was given to run at its first start.
    pub async fn user_data(&self, instance: &InstanceId) -> Result<Option<Vec<u8>>, SourceError> {
        let parameters = parameters(&[("InstanceId", &instance.0), ("Attribute", "userData")]);
        let found = self.client.all::<DescribeInstanceAttribute>(parameters).await?;
        let data =
            found.first().map(|text| text.split_whitespace().collect::<String>()).filter(|text| !text.is_empty());
        // What isn't base64 was given as it is: emulators pass on what they got.
        Ok(data.map(|text| BASE64_STANDARD.decode(&text).unwrap_or_else(|_| found[0].clone().into_bytes())))
    }

    /// A key pair's public key, in OpenSSH's form.
    pub async fn public_key(&self, name: &str) -> Result<Option<String>, SourceError> {
        let parameters = parameters(&[("KeyName.1", name), ("IncludePublicKey", "true")]);
        let pairs = self.client.all::<DescribeKeyPairs>(parameters).await?;
        Ok(pairs.into_iter().find(|pair| pair.name == name).and_then(|pair| pair.public))
    }

    /// A machine image's name; none if there is no such image.
    pub async fn image_name(&self, ami: &str) -> Result<Option<String>, SourceError> {
        let images = self.filtered::<DescribeImages>("image-id", &BTreeSet::from([ami.to_owned()])).await?;
        Ok(images.into_iter().find(|image| image.id == ami).and_then(|image| image.name))
    }

    /// Sets tags of an instance.
    pub async fn tag(&self, instance: &InstanceId, tags: &BTreeMap<String, String>) -> Result<(), SourceError> {
        let mut all = parameters(&[("ResourceId.1", &instance.0)]);
        for ((key, value), n) in tags.iter().zip(1..) {
            let n: u32 = n;
            all.extend([(format!("Tag.{n}.Key"), key.clone()), (format!("Tag.{n}.Value"), value.clone())]);
        }
        self.client.all::<CreateTags>(all).await.map(drop)
    }

    /// Tells of an address that an interface has beside those that it was given.
    pub async fn assign_address(&self, eni: &EniId, address: Ipv4Addr) -> Result<(), SourceError> {
        let address = address.to_string();
        let parameters = parameters(&[("NetworkInterfaceId", &eni.0), ("PrivateIpAddress.1", &address)]);
        self.client.all::<AssignPrivateIpAddresses>(parameters).await.map(drop)
    }
}

fn parameters(pairs: &[(&str, &str)]) -> Parameters {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn is_over(state: &wire::InstanceState) -> bool {
    is_terminated(state) || state.name == "shutting-down"
}

fn launch(instance: &wire::Instance, network: &impl Fn(&str) -> Option<Ipv4Net>) -> Launch {
    let mut interfaces: Vec<&wire::NetworkInterface> = instance.interfaces.iter().collect();
    interfaces.sort_by_key(|eni| match eni.attachment.as_ref().and_then(|at| at.device_index.as_ref()) {
        Some(wire::Number::Int(index)) => *index,
        _ => 0,
    });
    let interfaces = interfaces.into_iter().map(|eni| {
        let vpc = eni.vpc.as_deref().unwrap_or_default();
        let all = eni.private_ip.iter().chain(eni.private_ips.iter().map(|ip| &ip.address));
        let mut addresses: Vec<Ipv4Addr> = Vec::new();
        for address in all.filter_map(|text| text.parse().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        LaunchInterface { eni: eni.id.as_str().into(), vpc: vpc.into(), network: network(vpc), addresses }
    });
    Launch {
        instance: instance.id.as_str().into(),
        runs: matches!(instance.state.name.as_str(), "pending" | "running"),
        ami: instance.image.clone(),
        key: instance.key.clone().filter(|key| !key.is_empty()),
        interfaces: interfaces.collect(),
        tags: instance.tags.iter().map(|tag| (tag.key.clone(), tag.value.clone())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::answer::read;
    use super::*;

    #[test]
    fn answers_that_only_say_done_and_attributes_are_read() {
        let done =
            b"<CreateTagsResponse xmlns=\"x\"><requestId>1</requestId><return>true</return></CreateTagsResponse>";
        assert!(read::<CreateTags>(200, done).unwrap().0.is_empty());
        let attribute = |inner: &str| {
            let root = "DescribeInstanceAttributeResponse";
            let xml = format!("<{root} xmlns=\"x\"><instanceId>i-1</instanceId>{inner}</{root}>");
            read::<DescribeInstanceAttribute>(200, xml.as_bytes()).unwrap().0
        };
        assert_eq!(attribute("<userData><value>IyE=</value></userData>"), ["IyE="]);
        assert_eq!(attribute("<userData/>"), Vec::<String>::new());
        assert_eq!(attribute(""), Vec::<String>::new());
    }

    #[test]
    fn the_primary_interface_comes_first_and_addresses_once() {
        let xml = "<item><instanceId>i-1</instanceId><instanceState><code>16</code><name>running</name></instanceState>\
                   <imageId>ami-1</imageId><keyName/><networkInterfaceSet>\
                   <item><networkInterfaceId>eni-b</networkInterfaceId><vpcId>vpc-1</vpcId>\
                   <attachment><deviceIndex>1</deviceIndex></attachment></item>\
                   <item><networkInterfaceId>eni-a</networkInterfaceId><vpcId>vpc-1</vpcId>\
                   <attachment><deviceIndex>0</deviceIndex></attachment><privateIpAddress>10.0.0.5</privateIpAddress>\
                   <privateIpAddressesSet><item><privateIpAddress>10.0.0.5</privateIpAddress></item>\
                   <item><privateIpAddress>10.0.0.9</privateIpAddress></item></privateIpAddressesSet></item>\
                   </networkInterfaceSet></item>";
        let instance: wire::Instance = quick_xml::de::from_str(xml).unwrap();
        let net: Ipv4Net = "10.0.0.0/16".parse().unwrap();
        let launch = launch(&instance, &|id| (id == "vpc-1").then_some(net));
        assert!(launch.runs && launch.key.is_none());
        let enis: Vec<_> = launch.interfaces.iter().map(|eni| &*eni.eni.0).collect();
        assert_eq!(enis, ["eni-a", "eni-b"]);
        let want: [Ipv4Addr; 2] = ["10.0.0.5".parse().unwrap(), "10.0.0.9".parse().unwrap()];
        assert_eq!(launch.interfaces[0].addresses, want);
        assert_eq!(launch.interfaces[0].network, Some(net));
    }
}
