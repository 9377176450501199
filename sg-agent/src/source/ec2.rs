//! An EC2 endpoint as a source: which calls make an inventory. Owns the order of the calls and what each is filtered
//! by; polls when it is told to. What answers say of each other is `relations`'.

mod launch;
mod relations;
#[cfg(test)]
mod tests;

pub use launch::{Launch, LaunchInterface};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use futures_util::future::try_join_all;

use self::relations::{Surroundings, add_reservations, live_instances, references, unlisted_hosts};
use super::answer::{
    AnswerError, Call, DescribeInstances, DescribeManagedPrefixLists, DescribeNetworkAcls, DescribeNetworkInterfaces,
    DescribeSecurityGroupRules, DescribeSecurityGroups, DescribeSubnets, DescribeVpcPeeringConnections, DescribeVpcs,
    GetManagedPrefixListEntries,
};
use super::client::{Client, Parameters};
use super::convert::{self, Facts};
use super::corrections::{Corrections, ModifiedRule};
use super::quirks::{self, Quirks};
use super::rule_ids::RuleIds;
use super::settings::{Ec2Options, Settings};
use super::wire;
use super::{Extent, SourceError, Wanted};
use crate::model::{GroupId, Inventory, Scope};

/// An instance that there isn't.
const NOBODY: &str = "i-00000000000000000";

/// The values that AWS takes in one filter.
const FILTER_VALUES: usize = 200;

/// Above so many groups all rules are read, where all groups are: Moto's filter costs more than what it saves.
const FILTER_RULES: usize = 20;

/// One endpoint, one account and region.
#[derive(Debug)]
pub struct Ec2 {
    client: Client,
    quirks: Quirks,
    emulator: bool,
    assumed: Scope,
    account_is_known: bool,
    learnt: OnceLock<Scope>,
    told_of_default_groups: AtomicBool,
    rule_ids: RuleIds,
    corrections: Corrections,
    lacks_ids: AtomicBool,
    /// Whether the endpoint has rules with ids at all, as far as it was asked.
    lists_rules: AtomicBool,
    vpcs: Mutex<BTreeMap<String, wire::Vpc>>,
    ground: Mutex<Option<Ground>>,
    /// Groups that instances have and that the endpoint, asked twice, doesn't list.
    unlisted: Mutex<BTreeSet<String>>,
}

/// What a change of rules leaves as it is.
#[derive(Debug)]
struct Ground {
    /// What was asked for.
    instances: BTreeSet<String>,
    reservations: Vec<wire::Reservation>,
    subnets: Vec<wire::Subnet>,
    acls: Vec<wire::NetworkAcl>,
}

impl Ec2 {
    /// Takes what the options leave open from the environment. Connects to nothing yet.
    pub fn new(options: &Ec2Options) -> Result<Self, SourceError> {
        let settings =
            Settings::resolve(options, |name| std::env::var(name).ok(), |path| std::fs::read_to_string(path).ok())?;
        let client = Client::new(&settings)?;
        let account = settings.account.as_deref().unwrap_or(quirks::DEFAULT_ACCOUNT);
        Ok(Self {
            client,
            quirks: Quirks {
                default_self_rule: settings.emulator && options.add_default_self_rule,
                default_acl_ipv6: settings.emulator,
            },
            emulator: settings.emulator,
            assumed: Scope { account: account.into(), region: settings.region.as_str().into() },
            account_is_known: settings.account.is_some(),
            learnt: OnceLock::new(),
            told_of_default_groups: AtomicBool::new(false),
            rule_ids: RuleIds::default(),
            corrections: Corrections::default(),
            lacks_ids: AtomicBool::new(false),
            lists_rules: AtomicBool::new(true),
            vpcs: Mutex::default(),
            ground: Mutex::default(),
            unlisted: Mutex::default(),
        })
    }

    /// The endpoint's URL.
    pub fn endpoint(&self) -> String {
        self.client.url()
    }

    /// Whether it isn't AWS itself.
    pub fn is_emulator(&self) -> bool {
        self.emulator
    }

    /// Whether rules of the last read came without their ids.
    pub fn lacks_ids(&self) -> bool {
        self.lacks_ids.load(Ordering::Relaxed)
    }

    /// Rules were modified so, whatever an emulator will show.
    pub fn note_modified(&self, rules: Vec<ModifiedRule>) {
        if self.emulator {
            self.corrections.note(rules);
        }
    }

    /// The endpoint has begun anew, with the same ids for other things.
    pub fn forget(&self) {
        self.corrections.forget();
        self.doubt();
    }

    /// Whether a modification is known that the endpoint may not show.
    #[cfg(test)]
    pub fn has_corrections(&self) -> bool {
        !self.corrections.is_empty()
    }

    /// What was read may no longer be so. What was modified stands: no answer of the endpoint would show it.
    pub fn doubt(&self) {
        self.known_vpcs().clear();
        *self.last_ground() = None;
        self.known_unlisted().clear();
    }

    /// The account and region. Without `account` among the options it is the owner of what the first inventory held,
    /// and until then Moto's default.
    pub fn scope(&self) -> &Scope {
        self.learnt.get().unwrap_or(&self.assumed)
    }

    /// Reads what is wanted. All or nothing: one call that fails fails it.
    pub async fn inventory(&self, wanted: &Wanted) -> Result<Inventory, SourceError> {
        let mut facts = self.facts(wanted).await?;
        let is_torn = !facts.unlisted.is_subset(&self.known_unlisted());
        if is_torn {
            // Something changed between two answers. Once more, with nothing from before; what is so then is so, also the
            // next time: a group that isn't there allows nothing.
            self.doubt();
            facts = self.facts(wanted).await?;
        }
        self.known_unlisted().clone_from(&facts.unlisted);
        if let Some(what) = facts.contradiction() {
            return Err(SourceError::Contradiction { source_name: self.endpoint(), what });
        }
        facts.own_groups = self.own_groups(&facts).await?;
        self.learn_account(&facts);
        let inventory = facts.inventory(self.quirks);
        self.tell_of_default_groups(&inventory);
        Ok(inventory)
    }

    async fn facts(&self, wanted: &Wanted) -> Result<Facts, SourceError> {
        let Some(instances) = &wanted.instances else { return self.everything().await };
        let text = |ids: &mut dyn Iterator<Item = String>| ids.collect::<BTreeSet<_>>();
        let instances = text(&mut instances.iter().map(ToString::to_string));
        self.of(instances, text(&mut wanted.groups.iter().map(ToString::to_string)), wanted.extent).await
    }

    async fn everything(&self) -> Result<Facts, SourceError> {
        let (reservations, interfaces, (groups, rules), vpcs, subnets, acls, peerings) = tokio::try_join!(
            self.client.all::<DescribeInstances>(vec![]),
            self.client.all::<DescribeNetworkInterfaces>(vec![]),
            self.groups(None, Extent::Everything),
            optional(self.client.all::<DescribeVpcs>(vec![])),
            optional(self.client.all::<DescribeSubnets>(vec![])),
            optional(self.client.all::<DescribeNetworkAcls>(vec![])),
            optional(self.client.all::<DescribeVpcPeeringConnections>(vec![])),
        )?;
        let (_, lists) = references(&groups, rules.as_deref());
        let prefix_lists = self.prefix_lists(lists).await?;
        let unlisted = Surroundings::of(&reservations).unlisted(&groups);
        let reservations = Some(reservations);
        Ok(Facts {
            groups,
            unlisted,
            rules,
            reservations,
            interfaces,
            prefix_lists,
            vpcs,
            subnets,
            acls,
            peerings,
            ..Facts::default()
        })
    }

    /// The wanted instances first, then their groups, then what those refer to: three rounds, whatever else is there.
    async fn of(
        &self,
        mut instances: BTreeSet<String>,
        elsewhere: BTreeSet<String>,
        extent: Extent,
    ) -> Result<Facts, SourceError> {
        if instances.is_empty() {
            // Still asked, so that an endpoint that doesn't answer is known before anybody depends on it.
            instances.insert(NOBODY.to_owned());
        }
        let last = self.last_ground().take().filter(|last| extent == Extent::Rules && last.instances == instances);
        let mut reservations = match &last {
            Some(last) => last.reservations.clone(),
            None => self.filtered::<DescribeInstances>("instance-id", &instances).await?,
        };
        let own = reservations.clone();
        let around = Surroundings::of(&reservations);
        let networks = async {
            match last {
                Some(last) => Ok((last.subnets, last.acls)),
                None => tokio::try_join!(
                    optional(self.filtered::<DescribeSubnets>("subnet-id", &around.subnets)),
                    optional(self.filtered::<DescribeNetworkAcls>("association.subnet-id", &around.subnets)),
                ),
            }
        };
        let ((mut groups, rules), vpcs, (subnets, acls)) =
            tokio::try_join!(self.groups(Some(&around.groups), extent), self.vpcs(&around.vpcs), networks)?;
        let unlisted = around.unlisted(&groups);
        let (kept_subnets, kept_acls) = (subnets.clone(), acls.clone());
        *self.last_ground() = Some(Ground { instances, reservations: own, subnets: kept_subnets, acls: kept_acls });

        let (mut referred, lists) = references(&groups, rules.as_deref());
        referred.extend(elsewhere.iter().cloned());
        let unread: BTreeSet<String> = referred.difference(&around.groups).cloned().collect();
        // Moto's filter on interfaces matches their own groups, the one on instances matches the instance's: members
        // by either are members.
        let (others, interfaces, hosts, prefix_lists) = tokio::try_join!(
            self.groups_by_id(&unread),
            self.filtered::<DescribeNetworkInterfaces>("group-id", &referred),
            self.filtered::<DescribeInstances>("instance.group-id", &referred),
            self.prefix_lists(lists),
        )?;
        add_reservations(&mut reservations, hosts);
        let hosts = unlisted_hosts(&interfaces, &reservations);
        let (hosts, peerings) = tokio::try_join!(
            self.filtered::<DescribeInstances>("instance-id", &hosts),
            self.peerings_between(&groups, &others, &referred),
        )?;
        add_reservations(&mut reservations, hosts);

        let bare = others.iter().map(|group| group.id.clone()).collect();
        groups.extend(others);
        let reservations = Some(reservations);
        Ok(Facts {
            groups,
            unlisted,
            rules,
            bare,
            reservations,
            interfaces,
            prefix_lists,
            vpcs,
            subnets,
            acls,
            peerings,
            ..Facts::default()
        })
    }

    fn last_ground(&self) -> MutexGuard<'_, Option<Ground>> {
        self.ground.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_unlisted(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.unlisted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// VPCs. What is used of one, its primary network, never changes, so each is asked for once.
    async fn vpcs(&self, ids: &BTreeSet<String>) -> Result<Vec<wire::Vpc>, SourceError> {
        let unread: BTreeSet<String> = {
            let known = self.known_vpcs();
            ids.iter().filter(|id| !known.contains_key(*id)).cloned().collect()
        };
        let read = optional(self.filtered::<DescribeVpcs>("vpc-id", &unread)).await?;
        let mut known = self.known_vpcs();
        known.extend(read.into_iter().map(|vpc| (vpc.id.clone(), vpc)));
        Ok(ids.iter().filter_map(|id| known.get(id).cloned()).collect())
    }

    fn known_vpcs(&self) -> MutexGuard<'_, BTreeMap<String, wire::Vpc>> {
        self.vpcs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The groups, and their rules with ids: `None` where the endpoint can't list them, and the groups' permissions
    /// have to do. They do as well for groups that have changed, unless everything is asked for: Moto goes through every
    /// rule that there is for the ids, 100 ms and more at 20,000.
    async fn groups(
        &self,
        ids: Option<&BTreeSet<String>>,
        extent: Extent,
    ) -> Result<(Vec<wire::SecurityGroup>, Option<Vec<wire::GroupRule>>), SourceError> {
        let groups = match ids {
            None => self.client.all::<DescribeSecurityGroups>(vec![]).await?,
            Some(ids) => self.groups_by_id(ids).await?,
        };
        let now = Instant::now();
        let to_read = self.rule_ids.to_read(&groups, now);
        // A modification that isn't shown is known by the rule's id.
        if extent < Extent::Everything && self.corrections.is_empty() {
            self.lacks_ids.store(!to_read.is_empty() && self.lists_rules.load(Ordering::Relaxed), Ordering::Relaxed);
            let of = |group| self.rule_ids.kept(group).unwrap_or_else(|| convert::from_permissions(group));
            let rules = groups.iter().flat_map(of).collect();
            return Ok((groups, Some(rules)));
        }
        let rules = if ids.is_none() && to_read.len() > FILTER_RULES {
            self.client.all::<DescribeSecurityGroupRules>(vec![]).await
        } else {
            self.filtered::<DescribeSecurityGroupRules>("group-id", &to_read).await
        };
        match rules {
            Err(error) if is_unsupported(&error) => {
                self.lists_rules.store(false, Ordering::Relaxed);
                self.lacks_ids.store(false, Ordering::Relaxed);
                Ok((groups, None))
            }
            rules => {
                let mut rules = self.rule_ids.update(&groups, &to_read, rules?, now);
                self.corrections.apply(&mut rules);
                self.lacks_ids.store(false, Ordering::Relaxed);
                Ok((groups, Some(rules)))
            }
        }
    }

    /// Groups by their ids, which Moto finds at half the cost of the filter. One that is gone fails the whole call,
    /// which the filter doesn't.
    async fn groups_by_id(&self, ids: &BTreeSet<String>) -> Result<Vec<wire::SecurityGroup>, SourceError> {
        let ids_in = |chunk: &[&String]| -> Parameters {
            let numbered = chunk.iter().zip(1..);
            numbered.map(|(id, n): (_, u32)| (format!("GroupId.{n}"), (*id).clone())).collect()
        };
        let all: Vec<&String> = ids.iter().collect();
        let calls = all.chunks(FILTER_VALUES).map(|chunk| self.client.all::<DescribeSecurityGroups>(ids_in(chunk)));
        match try_join_all(calls).await {
            Err(error) if is_missing(&error) => self.filtered::<DescribeSecurityGroups>("group-id", ids).await,
            groups => Ok(groups?.into_iter().flatten().collect()),
        }
    }

    async fn prefix_lists(&self, ids: BTreeSet<String>) -> Result<Vec<wire::PrefixList>, SourceError> {
        let lists = optional(self.filtered::<DescribeManagedPrefixLists>("prefix-list-id", &ids)).await?;
        let with_entries = lists.into_iter().map(|mut list| async move {
            let id = vec![("PrefixListId".to_owned(), list.id.clone())];
            list.entries = Some(wire::List(self.client.all::<GetManagedPrefixListEntries>(id).await?));
            Ok(list)
        });
        try_join_all(with_entries).await
    }

    /// Peering matters only to a reference into another VPC (SG-1.12): of this account, or of another, whose groups
    /// aren't listed here.
    async fn peerings_between(
        &self,
        groups: &[wire::SecurityGroup],
        others: &[wire::SecurityGroup],
        referred: &BTreeSet<String>,
    ) -> Result<Vec<wire::Peering>, SourceError> {
        let listed = || groups.iter().chain(others);
        let vpcs: BTreeSet<&str> = listed().map(|group| group.vpc.as_str()).collect();
        let ids: BTreeSet<&str> = listed().map(|group| group.id.as_str()).collect();
        if vpcs.len() < 2 && referred.iter().all(|group| ids.contains(group.as_str())) {
            return Ok(Vec::new());
        }
        let active = BTreeSet::from(["active".to_owned()]);
        optional(self.filtered::<DescribeVpcPeeringConnections>("status-code", &active)).await
    }

    /// What Moto's union hides (see [`quirks::union_suspects`]): the own groups of secondary interfaces.
    async fn own_groups(&self, facts: &Facts) -> Result<BTreeMap<String, BTreeSet<GroupId>>, SourceError> {
        let mut own: BTreeMap<String, BTreeSet<GroupId>> = BTreeMap::new();
        let mut to_ask = BTreeSet::new();
        for instance in live_instances(facts.reservations.as_deref().unwrap_or_default()).filter(|_| self.emulator) {
            let of_instance = convert::groups(&instance.groups);
            for interface in &instance.interfaces {
                let index = interface.attachment.as_ref().and_then(|attachment| attachment.device_index.clone());
                let primary = matches!(index, None | Some(wire::Number::Int(0)));
                let printed = convert::groups(&interface.groups);
                if quirks::union_suspects(primary, &of_instance, &printed) {
                    own.insert(interface.id.clone(), BTreeSet::new());
                    to_ask.extend(printed.into_iter().filter(|group| !group.0.is_empty()));
                }
            }
        }
        let members = try_join_all(to_ask.iter().map(|group| async move {
            let only = BTreeSet::from([group.to_string()]);
            let members = self.filtered::<DescribeNetworkInterfaces>("group-id", &only).await?;
            Ok::<_, SourceError>((group, members))
        }));
        for (group, members) in members.await? {
            for member in members {
                if let Some(groups) = own.get_mut(&member.id) {
                    groups.insert(group.clone());
                }
            }
        }
        Ok(own)
    }

    /// One filter, as many calls as its values need; without values there is nothing to ask for.
    async fn filtered<C: Call>(&self, name: &str, values: &BTreeSet<String>) -> Result<Vec<C::Item>, SourceError> {
        let values: Vec<&String> = values.iter().collect();
        let calls = values.chunks(FILTER_VALUES).map(|values| {
            let mut parameters: Parameters = vec![("Filter.1.Name".to_owned(), name.to_owned())];
            let numbered = values.iter().zip(1..);
            parameters.extend(numbered.map(|(value, n): (_, u32)| (format!("Filter.1.Value.{n}"), (*value).clone())));
            self.client.all::<C>(parameters)
        });
        Ok(try_join_all(calls).await?.into_iter().flatten().collect())
    }

    fn learn_account(&self, facts: &Facts) {
        if self.account_is_known || self.learnt.get().is_some() {
            return;
        }
        let reservations = facts.reservations.iter().flatten().map(|reservation| &reservation.owner);
        let owner = reservations.chain(facts.groups.iter().map(|group| &group.owner)).find(|owner| !owner.is_empty());
        if let Some(owner) = owner {
            let scope = Scope { account: owner.as_str().into(), region: self.assumed.region.clone() };
            // Another read may have been first, with the same owner.
            self.learnt.get_or_init(|| scope);
        }
    }

    fn tell_of_default_groups(&self, inventory: &Inventory) {
        let completed = |group: &&crate::model::SecurityGroup| group.ingress.iter().any(quirks::is_default_self_rule);
        if let Some(group) = inventory.groups.values().find(completed)
            && !self.told_of_default_groups.swap(true, Ordering::Relaxed)
        {
            tracing::info!(
                group = %group.id,
                "default groups without an ingress rule get the self rule that AWS gives them"
            );
        }
    }
}

/// What an endpoint doesn't implement, it doesn't have.
async fn optional<T>(call: impl Future<Output = Result<Vec<T>, SourceError>>) -> Result<Vec<T>, SourceError> {
    match call.await {
        Err(error) if is_unsupported(&error) => {
            tracing::debug!(%error, "not implemented there; taken as empty");
            Ok(Vec::new())
        }
        items => items,
    }
}

fn is_unsupported(error: &SourceError) -> bool {
    matches!(error, SourceError::Answer { problem: AnswerError::Refused { code, .. }, .. }
        if quirks::is_unsupported(code))
}

/// One of the groups that were named is gone.
fn is_missing(error: &SourceError) -> bool {
    matches!(error, SourceError::Answer { problem: AnswerError::Refused { code, .. }, .. }
        if code == "InvalidGroup.NotFound" || code == "InvalidGroupId.Malformed")
}
