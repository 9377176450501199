//! Networks as text. Owns what counts as a CIDR and its canonical form (SG-1.7); knows nothing of rules.

use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A text that is no network of the family that its field is for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CidrError {
    /// It isn't an IPv4 network.
    #[error("{0:?} is not an IPv4 network such as 10.0.0.0/8")]
    NotIpv4(String),
    /// It isn't an IPv6 network.
    #[error("{0:?} is not an IPv6 network such as 2001:db8::/32")]
    NotIpv6(String),
}

/// Reads an IPv4 network; bits past the prefix are cleared, as AWS clears them.
pub fn parse_ipv4(text: &str) -> Result<Ipv4Net, CidrError> {
    Ipv4Net::from_str(text).map(|net| net.trunc()).map_err(|_| CidrError::NotIpv4(text.to_owned()))
}

/// Reads an IPv6 network, the same way.
pub fn parse_ipv6(text: &str) -> Result<Ipv6Net, CidrError> {
    Ipv6Net::from_str(text).map(|net| net.trunc()).map_err(|_| CidrError::NotIpv6(text.to_owned()))
}

/// Reads a network where the field says nothing about its family.
pub fn parse_network(text: &str) -> Result<IpNet, CidrError> {
    if text.contains(':') { parse_ipv6(text).map(IpNet::V6) } else { parse_ipv4(text).map(IpNet::V4) }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// SG-1.7
    #[test]
    fn bits_past_the_prefix_are_cleared() {
        for (text, canonical) in
            [("10.0.0.5/8", "10.0.0.0/8"), ("100.68.0.18/18", "100.68.0.0/18"), ("0.0.0.0/0", "0.0.0.0/0")]
        {
            assert_eq!(parse_ipv4(text).unwrap().to_string(), canonical);
        }
        assert_eq!(parse_ipv6("2001:DB8::1/32").unwrap().to_string(), "2001:db8::/32");
    }

    #[test]
    fn what_is_no_network_is_named() {
        let bad = ["zzz", "", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0/8", " 10.0.0.0/8", "10.0.0.0/8 "];
        for text in bad {
            assert_eq!(parse_ipv4(text), Err(CidrError::NotIpv4(text.to_owned())));
        }
        for text in ["2001:db8::", "2001:db8::/129", "::/x", "10.0.0.0/8"] {
            assert_eq!(parse_ipv6(text), Err(CidrError::NotIpv6(text.to_owned())));
        }
        assert_eq!(parse_ipv4("::/0"), Err(CidrError::NotIpv4("::/0".into())));
    }

    proptest! {
        #[test]
        fn canonical_ipv4_covers_exactly_what_the_text_says(address: u32, length in 0u8..=32, probe: u32) {
            let net = parse_ipv4(&format!("{}/{length}", Ipv4Addr::from(address))).unwrap();
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            prop_assert_eq!(net.contains(&Ipv4Addr::from(probe)), probe & mask == address & mask);
            prop_assert_eq!(u32::from(net.addr()), address & mask);
        }

        #[test]
        fn canonical_ipv6_covers_exactly_what_the_text_says(address: u128, length in 0u8..=128, probe: u128) {
            let net = parse_ipv6(&format!("{}/{length}", Ipv6Addr::from(address))).unwrap();
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            // A random probe is hardly ever inside: keep the network's bits every other time.
            for probe in [probe, (address & mask) | (probe & !mask)] {
                prop_assert_eq!(net.contains(&Ipv6Addr::from(probe)), probe & mask == address & mask);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,24}") {
            for net in [parse_ipv4(&text).map(IpNet::V4), parse_ipv6(&text).map(IpNet::V6)].into_iter().flatten() {
                prop_assert_eq!(net, net.trunc());
                let length: u8 = text.rsplit('/').next().unwrap().parse().unwrap();
                prop_assert_eq!(net.prefix_len(), length);
            }
        }
    }
}
