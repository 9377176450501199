//! `--attach INSTANCE_ID=LINK[,ip=ADDR]...[,mac=MAC][,eni=ENI][,account=ACCOUNT][,region=REGION]`: its syntax.
//! Looks at no link.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use super::names::{self, quoted};
use crate::model::{EniId, InstanceId};

/// A host-side link that Docker doesn't know, and the instance that it belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachSpec {
    /// Whose link it is.
    pub instance: InstanceId,
    /// The host-side link's name.
    pub link: String,
    /// Addresses, before those that can be read from the other end.
    pub addresses: Vec<IpAddr>,
    /// The guest's MAC address, instead of the one that can be read.
    pub mac: Option<[u8; 6]>,
    /// The network interface that it stands for.
    pub eni: Option<EniId>,
    /// The account.
    pub account: Option<Arc<str>>,
    /// The region.
    pub region: Option<Arc<str>>,
}

/// Why a text is no [`AttachSpec`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{problem}; --attach takes INSTANCE_ID=LINK[,ip=ADDR]...[,mac=MAC][,eni=ENI][,account=ACCOUNT][,region=REGION]"
)]
pub struct AttachError {
    problem: String,
}

impl FromStr for AttachSpec {
    type Err = AttachError;

    fn from_str(text: &str) -> Result<Self, AttachError> {
        parse(text).map_err(|problem| AttachError { problem })
    }
}

fn parse(text: &str) -> Result<AttachSpec, String> {
    let mut items = text.split(',');
    let head = items.next().unwrap_or_default();
    let (instance, link) =
        head.split_once('=').ok_or_else(|| format!("{} doesn't start with INSTANCE_ID=LINK", quoted(text)))?;
    let mut spec = AttachSpec {
        instance: InstanceId(names::id(instance)?.into()),
        link: names::link(link)?.to_owned(),
        addresses: Vec::new(),
        mac: None,
        eni: None,
        account: None,
        region: None,
    };
    for item in items {
        let (key, value) = item.split_once('=').ok_or_else(|| format!("{} is not KEY=VALUE", quoted(item)))?;
        match key {
            "ip" => {
                let address = address(value)?;
                if spec.addresses.contains(&address) {
                    return Err(format!("ip={address} is there twice"));
                }
                spec.addresses.push(address);
            }
            "mac" => once(&mut spec.mac, key, names::mac(value).map_err(|problem| format!("mac={problem}"))?)?,
            "eni" => once(&mut spec.eni, key, EniId(names::id(value)?.into()))?,
            "account" => once(&mut spec.account, key, names::account(value)?.into())?,
            "region" => once(&mut spec.region, key, names::region(value)?.into())?,
            _ => return Err(format!("{} is none of ip, mac, eni, account and region", quoted(key))),
        }
    }
    // The first IPv4 address is the primary one; sorting is stable.
    spec.addresses.sort_by_key(IpAddr::is_ipv6);
    Ok(spec)
}

fn once<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        Some(_) => Err(format!("{key}= is there twice")),
        None => Ok(()),
    }
}

fn address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| format!("ip={} is no IPv4 or IPv6 address (without a prefix length)", quoted(text)))?;
    let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || mapped || broadcast {
        return Err(format!("ip={address} can't be an interface's address"));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_specification_is_read() {
        let spec: AttachSpec = "i-web=tap0,ip=2001:db8::7,ip=203.0.113.7,ip=203.0.113.8,mac=02:42:AC-11:00:02,\
                                eni=eni-1,account=123456789012,region=us-east-1"
            .parse()
            .expect("a good one");
        let addresses: Vec<_> = spec.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["203.0.113.7", "203.0.113.8", "2001:db8::7"]);
        assert_eq!((spec.instance, spec.link.as_str()), (InstanceId::from("i-web"), "tap0"));
        assert_eq!(spec.mac, Some([2, 0x42, 0xac, 0x11, 0, 2]));
        assert_eq!(spec.eni, Some(EniId::from("eni-1")));
        assert_eq!((spec.account.as_deref(), spec.region.as_deref()), (Some("123456789012"), Some("us-east-1")));
    }

    #[test]
    fn the_short_form_is_enough() {
        let spec: AttachSpec = "i-web=veth0@x".parse().expect("a good one");
        assert_eq!((spec.link.as_str(), spec.addresses.len(), spec.mac), ("veth0@x", 0, None));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, wrong) in [
            ("", r#""" doesn't start"#),
            ("i-web", r#""i-web" doesn't start"#),
            ("=veth0", r#""" is no id"#),
            ("i web=veth0", r#""i web" is no id"#),
            ("i-web=", r#""" is no link's name"#),
            ("i-web=a-name-too-long-0", r#""a-name-too-long-0" is no link's name"#),
            ("i-web=../x", r#""../x" is no link's name"#),
            ("i-web=veth0,", r#""" is not KEY=VALUE"#),
            ("i-web=veth0,203.0.113.7", r#""203.0.113.7" is not KEY=VALUE"#),
            ("i-web=veth0,ip=203.0.113.7/24", r#"ip="203.0.113.7/24" is no IPv4"#),
            ("i-web=veth0,ip=127.0.0.1", "ip=127.0.0.1 can't be"),
            ("i-web=veth0,ip=::ffff:203.0.113.7", "ip=::ffff:203.0.113.7 can't be"),
            ("i-web=veth0,ip=203.0.113.7,ip=203.0.113.7", "ip=203.0.113.7 is there twice"),
            ("i-web=veth0,mac=02:42", r#"mac="02:42" is no unicast"#),
            ("i-web=veth0,mac=ff:ff:ff:ff:ff:ff", "is no unicast"),
            ("i-web=veth0,mac=02:42:ac:11:00:+2", "is no unicast"),
            ("i-web=veth0,mac=02:42:ac:11:00:02:03", "is no unicast"),
            ("i-web=veth0,eni=a,eni=b", "eni= is there twice"),
            ("i-web=veth0,account=1", r#""1" is no account"#),
            ("i-web=veth0,port=1", r#""port" is none of ip"#),
        ] {
            let error = text.parse::<AttachSpec>().expect_err(text).to_string();
            assert!(error.contains(wrong), "{text:?} gave {error:?}, without {wrong:?}");
        }
    }
}
