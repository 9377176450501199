//! A packet's fate and its reason. The numbers are stable: counters, `--json` and metrics carry them.

use crate::abi::USUAL_KINDS;

/// What becomes of a packet, and why. It leaves the data path as a TC action in one place only.
pub type Verdict = Result<Pass, Drop>;

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal, $text:literal;)+ }) => {
        $(#[$doc])*
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        pub enum $name { $($(#[$variant_doc])* $variant = $number,)+ }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in counters, JSON and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The reason behind a number that a map holds.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// Why a packet goes on.
    Pass {
        /// It belongs to a tracked flow (SG-3.1).
        Established = 1, "established";
        /// A rule allows it and a flow was made for it.
        New = 2, "new";
        /// A rule allows it, and it needs no tracking (SG-3.2).
        Untracked = 3, "untracked";
        /// A rule allows this packet of a flow whose start was not seen, and nothing is kept (SG-3.4, SG-3.9).
        MidFlow = 4, "mid_flow";
        /// An ICMP error about a tracked flow (SG-3.7).
        Related = 5, "related";
        /// A later fragment of a packet whose first fragment passed (SG-3.8).
        Fragment = 6, "fragment";
        /// ARP or neighbour discovery (SG-4.2).
        Neighbor = 7, "neighbor";
        /// DHCP (SG-4.1).
        Dhcp = 8, "dhcp";
        /// A service that groups do not filter (SG-4.1).
        Exempt = 9, "exempt_service";
        /// The agent's own proxy, which judged the client already.
        Proxied = 10, "proxied";
    }
}

reasons! {
    /// Why a packet ends here.
    Drop {
        /// No rule of the interface's groups matches (SG-2.1).
        NoRule = 32, "no_rule";
        /// The network ACL denies (SG-5.1).
        Acl = 33, "network_acl";
        /// The interface is attached, but what it may do is not known yet.
        UnknownInterface = 34, "unknown_interface";
        /// The table of flows is full (SG-3.6).
        ConntrackFull = 35, "conntrack_allowance_exceeded";
        /// A source address that is not the interface's own (SG-4.3).
        SourceAddress = 36, "source_address";
        /// A source MAC address that is not the interface's own (SG-4.3).
        SourceMac = 37, "source_mac";
        /// A destination address that is not the interface's own (SG-4.3).
        DestinationAddress = 38, "destination_address";
        /// ARP that speaks for another interface (SG-4.3).
        ForgedArp = 39, "forged_arp";
        /// Neighbour discovery that speaks for another interface, or that only a router may send (SG-4.3).
        ForgedNeighbor = 40, "forged_neighbor";
        /// Broadcast or multicast (SG-4.4).
        Multicast = 41, "multicast";
        /// Neither IPv4, IPv6 nor ARP.
        NotIp = 42, "not_ip";
        /// A VLAN tag: an interface belongs to one subnet.
        Vlan = 43, "vlan";
        /// A header that ends too early, or whose lengths contradict each other.
        Malformed = 44, "malformed";
        /// More IPv6 extension headers than any legal packet has.
        ExtensionHeaders = 45, "extension_headers";
        /// A routing header that would send the packet on from here (RFC 5095).
        RoutingHeader = 46, "routing_header";
        /// A loopback or IPv4-mapped address, or a source that can't be one.
        Martian = 47, "martian";
        /// A fragment whose first one was not seen, or was dropped (SG-3.8).
        FragmentOrphan = 48, "fragment_orphan";
        /// A fragment that could rewrite the header that was judged (RFC 3128).
        FragmentOverlap = 49, "fragment_overlap";
        /// The flow's rule was revoked (SG-3.4 with `--on-revoke=cut`).
        Revoked = 50, "revoked";
        /// The interface's maps contradict each other; reported as a fault of the agent.
        Inconsistent = 51, "inconsistent";
        /// An IPv4 option that sends the packet by way of somebody else (RFC 791, 3.1): its destination isn't the one
        /// that rules are asked about.
        SourceRoute = 52, "source_route";
    }
}

/// The number that counters carry for a verdict.
#[inline(always)]
pub const fn number(verdict: &Verdict) -> u8 {
    match verdict {
        Ok(pass) => *pass as u8,
        Err(drop) => *drop as u8,
    }
}

/// The verdicts that most packets meet, which are counted in an array: the others are looked up in a hash.
pub const USUAL: [Verdict; USUAL_KINDS] =
    [Ok(Pass::Established), Ok(Pass::New), Ok(Pass::Untracked), Err(Drop::NoRule)];

/// Where in [`USUAL`] a verdict is.
#[inline(always)]
pub const fn usual(verdict: &Verdict) -> Option<usize> {
    match verdict {
        Ok(Pass::Established) => Some(0),
        Ok(Pass::New) => Some(1),
        Ok(Pass::Untracked) => Some(2),
        Err(Drop::NoRule) => Some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_ones_are_where_they_are_said_to_be() {
        for (place, verdict) in USUAL.iter().enumerate() {
            assert_eq!(usual(verdict), Some(place));
        }
        let all = Pass::ALL.iter().map(|&pass| Ok(pass)).chain(Drop::ALL.iter().map(|&drop| Err(drop)));
        assert_eq!(all.filter(|verdict: &Verdict| usual(verdict).is_some()).count(), USUAL.len());
    }

    #[test]
    fn numbers_read_back_and_never_meet() {
        for &pass in Pass::ALL {
            assert_eq!(Pass::from_number(pass as u8), Some(pass));
            assert_eq!(Drop::from_number(pass as u8), None);
        }
        for &drop in Drop::ALL {
            assert_eq!(Drop::from_number(drop as u8), Some(drop));
            assert_eq!(Pass::from_number(drop as u8), None);
        }
    }
}
