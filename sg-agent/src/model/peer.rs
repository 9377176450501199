//! A rule's other side. Owns 'exactly one peer' (SG-1.6); whether a group or list exists isn't known here.

use std::fmt;

use super::cidr::{CidrError, parse_ipv4, parse_ipv6};
use super::{GroupId, Peer, PrefixListId};

/// The fields that can name a peer, as a control plane gives them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerFields<'a> {
    /// An IPv4 network.
    pub ipv4: Option<&'a str>,
    /// An IPv6 network.
    pub ipv6: Option<&'a str>,
    /// A group's id.
    pub group: Option<&'a str>,
    /// A prefix list's id.
    pub prefix_list: Option<&'a str>,
}

/// Why the fields don't name one peer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// None is there.
    #[error("it names no peer; a rule needs a CIDR, a prefix list or a group")]
    None,
    /// More than one is there.
    #[error("it names more than one peer ({0}); a rule has exactly one")]
    Several(String),
    /// A bad network.
    #[error(transparent)]
    Cidr(#[from] CidrError),
}

impl Peer {
    /// The one peer that the fields name.
    pub fn parse(fields: PeerFields<'_>) -> Result<Self, PeerError> {
        match fields {
            PeerFields { ipv4: Some(net), ipv6: None, group: None, prefix_list: None } => {
                Ok(Self::Ipv4(parse_ipv4(net)?))
            }
            PeerFields { ipv4: None, ipv6: Some(net), group: None, prefix_list: None } => {
                Ok(Self::Ipv6(parse_ipv6(net)?))
            }
            PeerFields { ipv4: None, ipv6: None, group: Some(id), prefix_list: None } => {
                Ok(Self::Group(GroupId::from(id)))
            }
            PeerFields { ipv4: None, ipv6: None, group: None, prefix_list: Some(id) } => {
                Ok(Self::PrefixList(PrefixListId::from(id)))
            }
            PeerFields { ipv4: None, ipv6: None, group: None, prefix_list: None } => Err(PeerError::None),
            several => Err(PeerError::Several(several.to_string())),
        }
    }
}

impl fmt::Display for PeerFields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named: Vec<&str> = [self.ipv4, self.ipv6, self.group, self.prefix_list].into_iter().flatten().collect();
        f.write_str(&named.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SG-1.6
    #[test]
    fn one_field_is_one_peer() {
        let peer = |fields| Peer::parse(fields).unwrap();
        assert_eq!(
            peer(PeerFields { ipv4: Some("10.0.0.5/8"), ..Default::default() }),
            Peer::Ipv4("10.0.0.0/8".parse().unwrap())
        );
        assert_eq!(peer(PeerFields { ipv6: Some("::/0"), ..Default::default() }), Peer::Ipv6("::/0".parse().unwrap()));
        assert_eq!(peer(PeerFields { group: Some("sg-1"), ..Default::default() }), Peer::Group("sg-1".into()));
        assert_eq!(
            peer(PeerFields { prefix_list: Some("pl-1"), ..Default::default() }),
            Peer::PrefixList("pl-1".into())
        );
    }

    #[test]
    fn none_several_or_a_network_of_the_other_family_is_refused() {
        assert_eq!(Peer::parse(PeerFields::default()), Err(PeerError::None));
        let two = PeerFields { ipv4: Some("10.0.0.0/8"), group: Some("sg-1"), ..Default::default() };
        assert_eq!(Peer::parse(two), Err(PeerError::Several("10.0.0.0/8, sg-1".into())));
        let swapped = PeerFields { ipv4: Some("::/0"), ..Default::default() };
        assert_eq!(Peer::parse(swapped), Err(PeerError::Cidr(CidrError::NotIpv4("::/0".into()))));
    }
}
