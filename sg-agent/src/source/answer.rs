//! One answer of the EC2 Query API, from its bytes to a page of items or the reason why it isn't one. Owns what the
//! root element must be and the two shapes of errors; what the items mean is `convert`'s.

use quick_xml::events::Event;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::wire::{self, List};

/// How much of an answer that isn't one a message shows.
const SHOWN: usize = 80;

/// A call whose answer is a list, in pages.
pub trait Call: DeserializeOwned {
    /// Its name, and its answer's root element without `Response`.
    const ACTION: &'static str;
    /// What is listed.
    type Item;
    /// The items, and the token that fetches the next page.
    fn into_page(self) -> (Vec<Self::Item>, Option<String>);
}

macro_rules! calls {
    ($($(#[$doc:meta])* $action:ident: $set:literal of $item:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Deserialize)]
        pub struct $action {
            // Not defaulted: an answer without its list isn't one with an empty list.
            #[serde(rename = $set)]
            items: List<wire::$item>,
            #[serde(rename = "nextToken")]
            next: Option<String>,
        }

        impl Call for $action {
            const ACTION: &'static str = stringify!($action);
            type Item = wire::$item;

            fn into_page(self) -> (Vec<wire::$item>, Option<String>) {
                (self.items.0, self.next.filter(|token| !token.is_empty()))
            }
        }
    )+};
}

calls! {
    /// Instances, by reservation.
    DescribeInstances: "reservationSet" of Reservation,
    /// Interfaces, attached or not.
    DescribeNetworkInterfaces: "networkInterfaceSet" of NetworkInterface,
    /// Groups.
    DescribeSecurityGroups: "securityGroupInfo" of SecurityGroup,
    /// Rules, with their ids.
    DescribeSecurityGroupRules: "securityGroupRuleSet" of GroupRule,
    /// Prefix lists, without their entries.
    DescribeManagedPrefixLists: "prefixListSet" of PrefixList,
    /// One prefix list's entries, at its latest version.
    GetManagedPrefixListEntries: "entrySet" of PrefixListEntry,
    /// VPCs.
    DescribeVpcs: "vpcSet" of Vpc,
    /// Subnets.
    DescribeSubnets: "subnetSet" of Subnet,
    /// Network ACLs.
    DescribeNetworkAcls: "networkAclSet" of NetworkAcl,
    /// Peering connections.
    DescribeVpcPeeringConnections: "vpcPeeringConnectionSet" of Peering,
    /// Key pairs.
    DescribeKeyPairs: "keySet" of KeyPair,
    /// Machine images.
    DescribeImages: "imagesSet" of Image,
}

/// Why an answer isn't a page.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AnswerError {
    /// AWS's own: a code and a message.
    #[error("{code}: {message}")]
    Refused {
        /// `InvalidGroup.NotFound` and the like.
        code: String,
        /// What it says to people.
        message: String,
    },
    /// No XML at all, as the HTML of a web server's error.
    #[error("HTTP {status} with what isn't XML: {shown:?}")]
    NotXml {
        /// The HTTP status.
        status: u16,
        /// How it begins.
        shown: String,
    },
    /// XML, of something else.
    #[error("HTTP {status} with <{root}> where <{expected}> should be")]
    WrongRoot {
        /// The HTTP status.
        status: u16,
        /// The root element that it has.
        root: String,
        /// The one that it should have.
        expected: String,
    },
    /// The right root, but cut off or not as it should be inside.
    #[error("the answer is cut off or malformed: {0}")]
    Malformed(String),
}

#[derive(Deserialize)]
struct Errors {
    #[serde(rename = "Errors")]
    errors: ErrorList,
}

#[derive(Deserialize)]
struct ErrorList {
    #[serde(rename = "Error")]
    error: ErrorItem,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(rename = "Code")]
    code: String,
    #[serde(rename = "Message", default)]
    message: String,
}

/// Reads a page of `C`'s answer.
pub fn read<C: Call>(status: u16, body: &[u8]) -> Result<(Vec<C::Item>, Option<String>), AnswerError> {
    let not_xml = || AnswerError::NotXml { status, shown: shown(body) };
    let text = std::str::from_utf8(body).map_err(|_| not_xml())?;
    let root = root(text).ok_or_else(not_xml)?;
    let expected = format!("{}Response", C::ACTION);
    if root == "Response" {
        let errors: Errors = parse(text)?;
        let ErrorItem { code, message } = errors.errors.error;
        return Err(AnswerError::Refused { code, message });
    }
    if root.eq_ignore_ascii_case("html") {
        return Err(not_xml());
    }
    if root != expected || !(200..300).contains(&status) {
        return Err(AnswerError::WrongRoot { status, root, expected });
    }
    parse::<C>(text).map(C::into_page)
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, AnswerError> {
    quick_xml::de::from_str(text).map_err(|error| AnswerError::Malformed(error.to_string()))
}

/// The root element's name, if there is one.
fn root(text: &str) -> Option<String> {
    let mut reader = quick_xml::Reader::from_str(text);
    loop {
        match reader.read_event().ok()? {
            Event::Start(element) | Event::Empty(element) => {
                return Some(element.local_name().as_ref().to_owned());
            }
            Event::Eof => return None,
            Event::Text(text) if !text.trim_ascii().is_empty() => return None,
            _ => {}
        }
    }
}

/// The beginning of it, on one line.
fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(4 * SHOWN)]);
    let line: Vec<&str> = text.split_whitespace().collect();
    line.join(" ").chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::fixture;

    #[test]
    fn an_aws_error_keeps_its_code_and_message() {
        let body = fixture!("Error_DescribeSecurityGroups_NotFound");
        let Err(AnswerError::Refused { code, message }) = read::<DescribeSecurityGroups>(400, body) else {
            panic!("an error was read as an answer");
        };
        assert_eq!(code, "InvalidGroup.NotFound");
        assert!(message.contains("does not exist"), "{message}");
    }

    #[test]
    fn html_s3_and_other_actions_are_no_answers() {
        let html = read::<DescribeSecurityGroups>(500, fixture!("Error_500_tcp_no_ports")).err().unwrap();
        assert!(html.to_string().starts_with("HTTP 500 with what isn't XML"), "{html}");
        let s3 = read::<DescribeSecurityGroups>(200, fixture!("Unauthenticated_routes_to_S3")).err().unwrap();
        assert!(s3.to_string().contains("<ListAllMyBucketsResult> where <DescribeSecurityGroupsResponse>"), "{s3}");
        let other = read::<DescribeSubnets>(200, fixture!("DescribeNetworkAcls")).err().unwrap();
        assert!(matches!(other, AnswerError::WrongRoot { .. }), "{other}");
        for nothing in [&b""[..], b"   ", b"{\"a\": 1}", b"plain text", b"\xff\xfe"] {
            let error = read::<DescribeSubnets>(200, nothing).err().unwrap();
            assert!(matches!(error, AnswerError::NotXml { .. }), "{error}");
        }
    }

    #[test]
    fn an_answer_without_its_list_or_with_a_failing_status_is_none() {
        let error = read::<DescribeSubnets>(200, b"<DescribeSubnetsResponse/>").err().unwrap();
        assert!(matches!(error, AnswerError::Malformed(_)), "{error}");
        let empty = b"<DescribeSubnetsResponse><subnetSet/></DescribeSubnetsResponse>";
        assert!(read::<DescribeSubnets>(200, empty).unwrap().0.is_empty());
        assert!(read::<DescribeSubnets>(502, empty).is_err());
    }

    #[test]
    fn no_cut_off_answer_is_read() {
        let body = fixture!("DescribeSecurityGroupRules");
        assert_eq!(read::<DescribeSecurityGroupRules>(200, body).unwrap().0.len(), 14);
        let whole = body.trim_ascii_end().len();
        for cut in 0..whole {
            assert!(read::<DescribeSecurityGroupRules>(200, &body[..cut]).is_err(), "cut at {cut} of {whole}");
        }
    }

    #[test]
    fn the_token_of_the_next_page_is_found() {
        let (reservations, next) =
            read::<DescribeInstances>(200, fixture!("DescribeInstances_page1_nextToken")).unwrap();
        assert_eq!((reservations.len(), next.as_deref()), (5, Some("r-e3272b3edf47bb27b")));
    }
}
