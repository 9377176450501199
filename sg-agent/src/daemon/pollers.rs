//! Which sources are read: one poller for each account and region that something here is in, and what each is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::mpsc;

use super::poll::Poller;
use super::{Event, Options, Origins};
use crate::discovery::Attachment;
use crate::gateway::Whom;
use crate::model::{GroupId, InstanceId, Scope, Warning};
use crate::source::Ec2Options;

/// One poller for each account and region that something here is in.
pub(super) struct Pollers {
    pub(super) origins: Origins,
    interval: Duration,
    events: mpsc::Sender<Event>,
    pub(super) running: BTreeMap<Hint, Poller>,
}

/// What an attachment says of its account and region; `None` is the agent's own.
pub(super) type Hint = (Option<Arc<str>>, Option<Arc<str>>);

/// An attachment's hint. One that names the agent's own account or region says nothing by it: two pollers of one scope
/// would take each other's answers away.
fn hint(own: &Scope, attachment: &Attachment) -> Hint {
    let other = |said: &Option<Arc<str>>, own: &Arc<str>| said.clone().filter(|said| said != own);
    (other(&attachment.account, &own.account), other(&attachment.region, &own.region))
}

impl Pollers {
    pub(super) fn new(options: &Options, events: mpsc::Sender<Event>) -> Result<Self> {
        let mut pollers = Self {
            origins: options.origins.clone(),
            interval: options.poll_interval,
            events,
            running: BTreeMap::new(),
        };
        pollers.start((None, None))?;
        Ok(pollers)
    }

    fn start(&mut self, hint: Hint) -> Result<()> {
        let poller = match &self.origins {
            Origins::File(path) => Poller::of_file(path.clone(), hint.clone(), self.events.clone()),
            Origins::Endpoint(options) => {
                let own = |hint: &Option<Arc<str>>, option: &Option<String>| {
                    hint.as_ref().map(ToString::to_string).or_else(|| option.clone())
                };
                let options = Ec2Options {
                    account: own(&hint.0, &options.account),
                    region: own(&hint.1, &options.region),
                    ..options.clone()
                };
                Poller::of_endpoint(&options, hint.clone(), self.interval, self.events.clone())?
            }
        };
        self.running.insert(hint, poller);
        Ok(())
    }

    /// Asks each scope for exactly the instances that are attached here, and the groups that the others' rules refer to.
    pub(super) fn want(
        &mut self,
        attachments: &[Attachment],
        mut references: BTreeMap<Scope, BTreeSet<GroupId>>,
        warnings: &mut Vec<Warning>,
    ) {
        let own = self.own_scope();
        let mut wanted: BTreeMap<Hint, BTreeSet<InstanceId>> = BTreeMap::from([((None, None), BTreeSet::new())]);
        for attachment in attachments {
            wanted.entry(hint(&own, attachment)).or_default().insert(attachment.instance.clone());
        }
        self.running.retain(|hint, _| wanted.contains_key(hint));
        for (hint, instances) in wanted {
            if !self.running.contains_key(&hint)
                && let Err(error) = self.start(hint.clone())
            {
                let subject = format!("account {:?}, region {:?}", hint.0, hint.1);
                warnings.push(Warning { subject, problem: format!("cannot be polled: {error}") });
                continue;
            }
            if let Some(poller) = self.running.get(&hint) {
                poller.want(instances, references.remove(&poller.scope()).unwrap_or_default());
            }
        }
    }

    /// The sources that a change may be about. Which account a key belongs to is the endpoint's to say: if none that is
    /// read here fits, it is any of them.
    pub(super) fn of(&self, whom: &Whom) -> BTreeSet<Hint> {
        let in_region = || self.running.iter().filter(|(_, poller)| whom.has_region(&poller.scope()));
        let of_account = in_region().filter(|(_, poller)| whom.has_account(&poller.scope()));
        let exact: BTreeSet<Hint> = of_account.map(|(hint, _)| hint.clone()).collect();
        if exact.is_empty() { in_region().map(|(hint, _)| hint.clone()).collect() } else { exact }
    }

    /// The scope of what doesn't name its own.
    pub(super) fn own_scope(&self) -> Scope {
        self.running[&(None, None)].scope()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Link, Origin};

    #[test]
    fn naming_the_agents_own_scope_is_no_other_one() {
        let own = Scope { account: "123456789012".into(), region: "us-east-1".into() };
        let of = |account: Option<&str>, region: Option<&str>| {
            let attachment = Attachment {
                instance: "i-1".into(),
                account: account.map(Into::into),
                region: region.map(Into::into),
                eni: None,
                device_index: 0,
                link: Link { ifindex: 7, name: "veth7".into() },
                mac: [2, 0, 0, 0, 0, 7],
                addresses: Vec::new(),
                networks: Vec::new(),
                gateways: Vec::new(),
                origin: Origin::Flag,
                publish: Vec::new(),
            };
            hint(&own, &attachment)
        };
        assert_eq!(of(None, None), (None, None));
        assert_eq!(of(Some("123456789012"), Some("us-east-1")), (None, None));
        assert_eq!(of(Some("000000000000"), Some("us-east-1")), (Some("000000000000".into()), None));
        assert_eq!(of(None, Some("eu-west-1")), (None, Some("eu-west-1".into())));
    }
}
