//! Addresses as the data path holds them: one 16-byte form for both families.

/// An IPv6 address, or an IPv4 one in its mapped form (`::ffff:a.b.c.d`), in network byte order.
///
/// The parser refuses mapped addresses on the wire (RFC 4942, 2.2), so the two families can't be confused.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct Address(pub [u32; 4]);

/// The middle word of a mapped IPv4 address, as it lies in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// `::`, which also stands for "no address here".
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// The mapped form of an IPv4 address given as its four bytes.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self([0, 0, MAPPED, u32::from_ne_bytes(octets)])
    }

    /// An IPv6 address from its sixteen bytes.
    #[inline(always)]
    pub const fn v6(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The address's sixteen bytes in network order.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes(), d.to_ne_bytes());
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// The last four bytes: the IPv4 address, if it is one.
    #[inline(always)]
    pub const fn low(&self) -> [u8; 4] {
        self.0[3].to_ne_bytes()
    }

    /// The address's sixteen bytes as a number.
    #[inline(always)]
    pub const fn number(&self) -> u128 {
        let [a, b, c, d] = self.0;
        (u32::from_be(a) as u128) << 96
            | (u32::from_be(b) as u128) << 64
            | (u32::from_be(c) as u128) << 32
            | u32::from_be(d) as u128
    }

    /// The first four bytes of an IPv6 address as a number.
    #[inline(always)]
    const fn high(&self) -> u32 {
        u32::from_be(self.0[0])
    }

    /// `fe80::/10` (RFC 4291, 2.5.6).
    #[inline(always)]
    pub const fn is_link_local_v6(&self) -> bool {
        self.high() >> 22 == 0xfe80 >> 6
    }

    /// `ff00::/8`, or `224.0.0.0/4`.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() { self.low()[0] >> 4 == 0xe } else { self.high() >> 24 == 0xff }
    }

    /// Addresses that no interface of a VPC may carry on the wire, as source or destination:
    /// loopback of either family (RFC 1122, 3.2.1.3; RFC 4291, 2.5.3).
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.low()[0] == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
        }
    }

    /// Whether the address agrees with `network` in the bits that `mask` has set.
    ///
    /// Without branches, which would multiply the verifier's work.
    #[inline(always)]
    pub const fn within(&self, network: &Self, mask: &Self) -> bool {
        let (a, n, m) = (&self.0, &network.0, &mask.0);
        ((a[0] ^ n[0]) & m[0]) | ((a[1] ^ n[1]) & m[1]) | ((a[2] ^ n[2]) & m[2]) | ((a[3] ^ n[3]) & m[3]) == 0
    }

    /// The first address of the IPv6 prefix of [`crate::abi::DELEGATED_LENGTH`] that this one is in.
    #[inline(always)]
    pub const fn delegated(&self) -> Self {
        Self([self.0[0], self.0[1], self.0[2] & 0xffff_0000_u32.to_be(), 0])
    }

    /// The mask of a prefix of `length` bits, counted in the mapped form: an IPv4 `/24` has 120.
    pub const fn mask(length: u8) -> Self {
        let bits = if length == 0 { 0 } else { u128::MAX << (128 - length as u32) };
        Self::v6(bits.to_be_bytes())
    }
}

#[cfg(feature = "user")]
mod user {
    extern crate std;
    use super::Address;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    impl From<IpAddr> for Address {
        fn from(ip: IpAddr) -> Self {
            match ip {
                IpAddr::V4(v4) => Self::v4(v4.octets()),
                IpAddr::V6(v6) => Self::v6(v6.octets()),
            }
        }
    }

    impl From<Address> for IpAddr {
        fn from(address: Address) -> Self {
            if address.is_v4() {
                Self::V4(Ipv4Addr::from(address.low()))
            } else {
                Self::V6(Ipv6Addr::from(address.octets()))
            }
        }
    }

    impl std::fmt::Display for Address {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            IpAddr::from(*self).fmt(f)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_do_not_meet() {
        let v4 = Address::v4([10, 0, 1, 10]);
        assert!(v4.is_v4());
        assert_eq!(v4.low(), [10, 0, 1, 10]);
        assert!(!Address::v6([0x20; 16]).is_v4());
        assert!(!Address::UNSPECIFIED.is_v4());
    }

    #[test]
    fn within_counts_bits_of_the_mapped_form() {
        let subnet = Address::v4([10, 0, 1, 0]);
        let is_in = |address: Address, length| address.within(&subnet, &Address::mask(length));
        assert!(is_in(Address::v4([10, 0, 1, 255]), 96 + 24));
        assert!(!is_in(Address::v4([10, 0, 2, 1]), 96 + 24));
        assert!(is_in(Address::v4([10, 0, 1, 127]), 96 + 25));
        assert!(!is_in(Address::v4([10, 0, 1, 128]), 96 + 25));
        assert!(is_in(Address::v4([10, 0, 2, 1]), 96));
        assert!(!is_in(Address::v6([0; 16]), 96));
        assert!(is_in(Address::v6([9; 16]), 0));
        assert!(!is_in(Address::v4([10, 0, 1, 1]), 128));
    }

    #[test]
    fn special_ranges() {
        assert!(Address::v4([224, 0, 0, 1]).is_multicast());
        assert!(Address::v4([239, 255, 0, 1]).is_multicast());
        assert!(!Address::v4([223, 0, 0, 1]).is_multicast());
        let mut fe80 = [0; 16];
        (fe80[0], fe80[1]) = (0xfe, 0xbf);
        assert!(Address::v6(fe80).is_link_local_v6());
        fe80[1] = 0xc0;
        assert!(!Address::v6(fe80).is_link_local_v6());
        let mut one = [0; 16];
        one[15] = 1;
        assert!(Address::v6(one).is_loopback());
        assert!(Address::v4([127, 9, 9, 9]).is_loopback());
    }
}
