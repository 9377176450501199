//! A rule's protocol and ports. Owns what the API's three fields mean together (SG-1.1 to SG-1.4); never reads more
//! into them than they say.

use std::fmt;

use super::Traffic;

/// Why a protocol and its ports can't be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TrafficError {
    /// There is no protocol.
    #[error("it has no protocol; -1 would mean every one")]
    NoProtocol,
    /// A name that EC2 doesn't know.
    #[error("{0:?} is no protocol; EC2 knows tcp, udp, icmp, icmpv6, -1 and the numbers 0 to 255")]
    UnknownProtocol(String),
    /// A protocol number that doesn't fit.
    #[error("protocol number {0} is above 255")]
    NumberTooLarge(String),
    /// TCP or UDP without one of its ports.
    #[error("{protocol} has no {end}")]
    NoPort {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// The end that is missing.
        end: PortEnd,
    },
    /// A port that isn't one.
    #[error("{end} {port} is not between 0 and 65535")]
    BadPort {
        /// Which end.
        end: PortEnd,
        /// What it says.
        port: i64,
    },
    /// A range that ends before it starts.
    #[error("the port range ends before it starts: {from} to {to}")]
    Backwards {
        /// Its first port.
        from: u16,
        /// Its last.
        to: u16,
    },
    /// ICMP without its type or code.
    #[error("{protocol} has no {field}; -1 would mean any")]
    NoIcmp {
        /// `icmp` or `icmpv6`.
        protocol: &'static str,
        /// What is missing.
        field: IcmpField,
    },
    /// An ICMP type or code that isn't one.
    #[error("{protocol} {field} {value} is not between -1 and 255")]
    BadIcmp {
        /// `icmp` or `icmpv6`.
        protocol: &'static str,
        /// Which of the two.
        field: IcmpField,
        /// What it says.
        value: i64,
    },
    /// A code for every type (SG-1.3).
    #[error("{protocol} code {code} can't go with every type; with type -1 the code is -1")]
    CodeWithoutType {
        /// `icmp` or `icmpv6`.
        protocol: &'static str,
        /// The code.
        code: u8,
    },
}

/// An end of a port range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortEnd {
    /// `FromPort`.
    From,
    /// `ToPort`.
    To,
}

/// A field of an ICMP rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpField {
    /// `FromPort`.
    Type,
    /// `ToPort`.
    Code,
}

impl Traffic {
    /// Reads `IpProtocol`, `FromPort` and `ToPort`.
    pub fn parse(protocol: Option<&str>, from: Option<i64>, to: Option<i64>) -> Result<Self, TrafficError> {
        let protocol = protocol.ok_or(TrafficError::NoProtocol)?;
        match protocol.to_ascii_lowercase().as_str() {
            "-1" => Ok(Self::All),
            "tcp" | "6" => ports("tcp", from, to).map(|(from, to)| Self::Tcp { from, to }),
            "udp" | "17" => ports("udp", from, to).map(|(from, to)| Self::Udp { from, to }),
            "icmp" | "1" => icmp("icmp", from, to).map(|(kind, code)| Self::Icmp { kind, code }),
            // SG-1.3: ICMPv6 alone may leave both out.
            "icmpv6" | "58" if from.is_none() && to.is_none() => Ok(Self::Icmpv6 { kind: None, code: None }),
            "icmpv6" | "58" => icmp("icmpv6", from, to).map(|(kind, code)| Self::Icmpv6 { kind, code }),
            number => other(number, protocol),
        }
    }
}

fn ports(protocol: &'static str, from: Option<i64>, to: Option<i64>) -> Result<(u16, u16), TrafficError> {
    let port = |end, port: Option<i64>| {
        let port = port.ok_or(TrafficError::NoPort { protocol, end })?;
        u16::try_from(port).map_err(|_| TrafficError::BadPort { end, port })
    };
    let (from, to) = (port(PortEnd::From, from)?, port(PortEnd::To, to)?);
    if from > to { Err(TrafficError::Backwards { from, to }) } else { Ok((from, to)) }
}

fn icmp(
    protocol: &'static str,
    kind: Option<i64>,
    code: Option<i64>,
) -> Result<(Option<u8>, Option<u8>), TrafficError> {
    let field = |field, value: Option<i64>| match value {
        None => Err(TrafficError::NoIcmp { protocol, field }),
        Some(-1) => Ok(None),
        Some(value) => u8::try_from(value).map(Some).map_err(|_| TrafficError::BadIcmp { protocol, field, value }),
    };
    match (field(IcmpField::Type, kind)?, field(IcmpField::Code, code)?) {
        // To force the code to -1 would allow more than was asked for.
        (None, Some(code)) => Err(TrafficError::CodeWithoutType { protocol, code }),
        fields => Ok(fields),
    }
}

fn other(number: &str, as_given: &str) -> Result<Traffic, TrafficError> {
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return Err(TrafficError::UnknownProtocol(as_given.to_owned()));
    }
    match number.parse() {
        // `006` and its like would pass by the check of the ports.
        Ok(1 | 6 | 17 | 58) => Err(TrafficError::UnknownProtocol(as_given.to_owned())),
        Ok(number) => Ok(Traffic::Other { number }),
        Err(_) => Err(TrafficError::NumberTooLarge(as_given.to_owned())),
    }
}

impl fmt::Display for PortEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::From => "first port",
            Self::To => "last port",
        })
    }
}

impl fmt::Display for IcmpField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Type => "type",
            Self::Code => "code",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn protocols_and_their_numbers_mean_the_same() {
        use Traffic::*;
        let cases = [
            (("tcp", Some(80), Some(90)), Tcp { from: 80, to: 90 }),
            (("6", Some(80), Some(90)), Tcp { from: 80, to: 90 }),
            (("TCP", Some(0), Some(65535)), Tcp { from: 0, to: 65535 }),
            (("udp", Some(53), Some(53)), Udp { from: 53, to: 53 }),
            (("17", Some(53), Some(53)), Udp { from: 53, to: 53 }),
            (("icmp", Some(8), Some(0)), Icmp { kind: Some(8), code: Some(0) }),
            (("1", Some(8), Some(-1)), Icmp { kind: Some(8), code: None }),
            (("icmp", Some(-1), Some(-1)), Icmp { kind: None, code: None }),
            (("icmpv6", Some(128), Some(0)), Icmpv6 { kind: Some(128), code: Some(0) }),
            (("58", Some(-1), Some(-1)), Icmpv6 { kind: None, code: None }),
            (("icmpv6", None, None), Icmpv6 { kind: None, code: None }),
            (("-1", None, None), All),
            (("-1", Some(1), Some(1)), All),
            (("47", Some(-1), Some(-1)), Other { number: 47 }),
            (("50", Some(70000), None), Other { number: 50 }),
            (("0", None, None), Other { number: 0 }),
            (("255", None, None), Other { number: 255 }),
        ];
        for ((protocol, from, to), traffic) in cases {
            assert_eq!(Traffic::parse(Some(protocol), from, to), Ok(traffic), "{protocol} {from:?} {to:?}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused_with_its_reason() {
        use TrafficError::*;
        let unknown = |name: &str| UnknownProtocol(name.into());
        let cases = [
            ((None, Some(1), Some(1)), NoProtocol),
            ((Some("bogus"), Some(1), Some(1)), unknown("bogus")),
            ((Some(""), None, None), unknown("")),
            ((Some("-2"), None, None), unknown("-2")),
            ((Some("+47"), None, None), unknown("+47")),
            ((Some("006"), Some(1), Some(1)), unknown("006")),
            ((Some("256"), None, None), NumberTooLarge("256".into())),
            ((Some("300"), None, None), NumberTooLarge("300".into())),
            ((Some("tcp"), None, None), NoPort { protocol: "tcp", end: PortEnd::From }),
            ((Some("17"), Some(1), None), NoPort { protocol: "udp", end: PortEnd::To }),
            ((Some("tcp"), Some(-1), Some(-1)), BadPort { end: PortEnd::From, port: -1 }),
            ((Some("tcp"), Some(1), Some(65536)), BadPort { end: PortEnd::To, port: 65536 }),
            ((Some("tcp"), Some(90), Some(80)), Backwards { from: 90, to: 80 }),
            ((Some("icmp"), None, None), NoIcmp { protocol: "icmp", field: IcmpField::Type }),
            ((Some("icmp"), Some(8), None), NoIcmp { protocol: "icmp", field: IcmpField::Code }),
            ((Some("icmpv6"), Some(128), None), NoIcmp { protocol: "icmpv6", field: IcmpField::Code }),
            ((Some("icmp"), Some(256), Some(0)), BadIcmp { protocol: "icmp", field: IcmpField::Type, value: 256 }),
            ((Some("icmp"), Some(8), Some(-2)), BadIcmp { protocol: "icmp", field: IcmpField::Code, value: -2 }),
            ((Some("icmp"), Some(-1), Some(3)), CodeWithoutType { protocol: "icmp", code: 3 }),
        ];
        for ((protocol, from, to), error) in cases {
            assert_eq!(Traffic::parse(protocol, from, to), Err(error), "{protocol:?} {from:?} {to:?}");
        }
    }

    /// Whether the fields, read literally, allow one packet: what `parse` may never exceed.
    fn says(protocol: &str, from: Option<i64>, to: Option<i64>, packet: (u8, i64, i64)) -> bool {
        let (number, first, second) = packet;
        let any = |field: Option<i64>, value| field == Some(-1) || field == Some(value);
        let of = |name: &str, n: u8| protocol.eq_ignore_ascii_case(name) || protocol == n.to_string();
        match number {
            _ if protocol == "-1" => true,
            6 | 17 => of(if number == 6 { "tcp" } else { "udp" }, number) && from <= Some(first) && Some(first) <= to,
            1 => of("icmp", 1) && any(from, first) && any(to, second),
            58 => of("icmpv6", 58) && ((from.is_none() && to.is_none()) || (any(from, first) && any(to, second))),
            _ => protocol == number.to_string(),
        }
    }

    fn allows(traffic: Traffic, (number, first, second): (u8, i64, i64)) -> bool {
        let any = |field: Option<u8>, value| field.is_none_or(|field| i64::from(field) == value);
        match traffic {
            Traffic::All => true,
            Traffic::Tcp { from, to } => number == 6 && (i64::from(from)..=i64::from(to)).contains(&first),
            Traffic::Udp { from, to } => number == 17 && (i64::from(from)..=i64::from(to)).contains(&first),
            Traffic::Icmp { kind, code } => number == 1 && any(kind, first) && any(code, second),
            Traffic::Icmpv6 { kind, code } => number == 58 && any(kind, first) && any(code, second),
            Traffic::Other { number: other } => number == other,
        }
    }

    fn field() -> impl Strategy<Value = Option<i64>> {
        prop_oneof![Just(None), Just(Some(-1)), (-3i64..300).prop_map(Some), (65530i64..65540).prop_map(Some)]
    }

    proptest! {
        #[test]
        fn nothing_is_allowed_that_the_fields_do_not_say(
            protocol in prop_oneof![
                Just("tcp".to_owned()), Just("udp".to_owned()), Just("icmp".to_owned()), Just("icmpv6".to_owned()),
                Just("-1".to_owned()), (0u16..300).prop_map(|n| n.to_string()), "\\PC{0,6}",
            ],
            from in field(),
            to in field(),
            number in prop_oneof![Just(1u8), Just(6), Just(17), Just(58), any::<u8>()],
            first in prop_oneof![0i64..300, 65530i64..65536],
            second in 0i64..256,
        ) {
            if let Ok(traffic) = Traffic::parse(Some(&protocol), from, to) {
                let packet = (number, first, second);
                if allows(traffic, packet) {
                    prop_assert!(says(&protocol, from, to, packet), "{:?} from {} {:?} {:?}", traffic, protocol, from, to);
                }
            }
        }
    }
}
