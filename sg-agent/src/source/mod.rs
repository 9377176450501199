//! R1: where groups, instances and interfaces come from: an EC2-compatible endpoint, or a file. Owns the calls, the
//! wire format and what is asked for; makes no policy, watches nothing, and remembers nothing between two reads but the
//! ids of rules.

mod alone;
mod answer;
mod client;
mod convert;
mod corrections;
mod ec2;
#[cfg(test)]
pub(crate) mod fake;
mod file;
pub(crate) mod quirks;
mod rule_ids;
mod settings;
mod wire;

use std::collections::BTreeSet;
use std::path::PathBuf;

pub use alone::{actions, parse_answer};
pub use answer::AnswerError;
pub use corrections::ModifiedRule;
pub use ec2::{Ec2, Launch, LaunchInterface};
pub use file::RulesFile;
pub use settings::{Ec2Options, profile_files};

use crate::model::{GroupId, InstanceId};

/// What an inventory is to hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// These instances, their interfaces' groups with the rules, and the members of the groups that those refer to;
    /// a group that is only referred to comes without rules. `None` is everything.
    pub instances: Option<BTreeSet<InstanceId>>,
    /// The same for groups that another account's rules refer to (SG-1.12).
    pub groups: BTreeSet<GroupId>,
    /// How much of it has to be read anew.
    pub extent: Extent,
}

/// How much is read anew. Less than everything is for somebody who waits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Extent {
    /// Groups, their rules and what those refer to. Instances and subnets may be those of the last read.
    Rules,
    /// Everything that is enforced. Rules of groups that have changed may come without their ids.
    Enforced,
    /// Everything.
    #[default]
    Everything,
}

/// Why there is no inventory; the one before it stays good.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A setting that can't be used.
    #[error("{name} is {value:?}, which is no {expected}")]
    Setting {
        /// The option or variable.
        name: &'static str,
        /// What it says.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The HTTP client can't be made.
    #[error("the HTTP client can't be set up")]
    Client(#[source] reqwest::Error),
    /// No credentials, or they can't be used.
    #[error(
        "{action} at {url} can't be signed: {reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )]
    Credentials {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// What the signer says.
        reason: String,
    },
    /// Nothing answers there.
    #[error("{action}: {url} can't be reached: {reason}; is it running, and is the endpoint URL right?")]
    Unreachable {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// What the network says.
        reason: String,
    },
    /// The connection broke off in the answer.
    #[error(
        "{action} at {url}: the answer broke off after {received} bytes: {reason}; it is tried again with the next read"
    )]
    BrokenOff {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// How much came.
        received: usize,
        /// What the network says.
        reason: String,
    },
    /// Two answers in one.
    #[error("{source_name}: {what} is listed twice, and not the same way: neither is believed; list it once")]
    Contradiction {
        /// The endpoint or file.
        source_name: String,
        /// What is.
        what: String,
    },
    /// More than an answer may have.
    #[error(
        "{action} at {url}: the answer is larger than {limit} bytes; name the instances instead of reading everything"
    )]
    TooLarge {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// The limit.
        limit: usize,
    },
    /// Asked too often, and waiting didn't help.
    #[error("{action} at {url} was throttled {attempts} times in a row ({reason}); poll less often")]
    Throttled {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// What the last answer was.
        reason: String,
    },
    /// Something else than the answer came.
    #[error("{action} at {url}: {problem}; {hint}")]
    Answer {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// What came.
        #[source]
        problem: AnswerError,
        /// What to do.
        hint: &'static str,
    },
    /// A server that never comes to the last page.
    #[error("{action} at {url}: the answer's pages don't end: token {token:?} came twice; this is the server's defect")]
    EndlessPages {
        /// The call.
        action: &'static str,
        /// The endpoint.
        url: String,
        /// The token.
        token: String,
    },
    /// A rules file that can't be read.
    #[error("{path}: {reason}; is the path right?")]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        reason: std::io::Error,
    },
    /// A rules file that isn't what it should be.
    #[error("{path}:{line}:{column}: {problem}; expected is what `aws ec2 describe-security-groups` prints")]
    Json {
        /// Its path.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column.
        column: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A rules file that says nothing.
    #[error(
        "{path} has none of {expected}; put in what `aws ec2 describe-security-groups` and `describe-instances` print"
    )]
    EmptyFile {
        /// Its path.
        path: PathBuf,
        /// What it may have.
        expected: &'static str,
    },
}

impl SourceError {
    /// What is the same for all of an outage: it is told once, whichever call meets it, and however its connection
    /// fails: those that are open when an endpoint goes are reset, later ones are refused.
    pub fn outage(&self) -> String {
        match self {
            Self::Unreachable { url, .. } => format!("{url} can't be reached"),
            Self::BrokenOff { url, .. } => format!("{url} breaks off"),
            Self::Credentials { action, .. }
            | Self::TooLarge { action, .. }
            | Self::Throttled { action, .. }
            | Self::Answer { action, .. }
            | Self::EndlessPages { action, .. } => self.to_string().replace(action, "a call"),
            Self::Setting { .. }
            | Self::Client(_)
            | Self::Contradiction { .. }
            | Self::File { .. }
            | Self::Json { .. }
            | Self::EmptyFile { .. } => self.to_string(),
        }
    }
}

/// A recorded answer of Moto 5.2.5.
#[cfg(test)]
macro_rules! fixture {
    ($name:literal) => {
        &include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/source/fixtures/", $name, ".xml"))[..]
    };
}
#[cfg(test)]
use fixture;
