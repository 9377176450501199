//! The last round: what it went by, what came of it, and how the next one follows from it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::members::{Asked, Members};
use super::numbers::Numbers;
use super::peerings::Peerings;
use super::place::Placing;
use super::rules::{self, Findings, Policies, Resolved, Source};
use super::{Desired, EniKey, GroupKey, Inputs, Interface, PolicyKey, Round, Settings, World};
use crate::discovery::Attachment;
use crate::model::{Eni, InstanceId, Inventory, NetworkAcl, Scope, SecurityGroup, VpcId, Warning};
use crate::sharing::Set;

/// The last round.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) world: World,
    pub(super) desired: Desired,
    default: Option<Scope>,
    attachments: Arc<[Attachment]>,
    peerings: Peerings,
    /// How many groups and interfaces each VPC has.
    homes: HashMap<(Scope, VpcId), isize>,
    placing: Placing,
    /// The placements' interfaces, and what is to be told of them.
    interfaces: Vec<Arc<Interface>>,
    told: Vec<Vec<Warning>>,
    policies: Policies,
    asked: Asked,
    members: Members,
    warnings: Warnings,
}

/// What differs between two worlds.
pub(super) struct Changes {
    /// What policies are made of.
    sources: Vec<Source>,
    acls: Vec<AclChange>,
    instances: Vec<InstanceId>,
    enis: Vec<EniChange>,
    /// How many groups and interfaces more, or less, each VPC has: where it is may be known by them.
    homes: HashMap<(Scope, VpcId), isize>,
}

/// What a network ACL was, and what it is.
type AclChange = (Option<Arc<NetworkAcl>>, Option<Arc<NetworkAcl>>);

struct EniChange {
    key: EniKey,
    before: Option<Arc<Eni>>,
    after: Option<Arc<Eni>>,
}

impl Changes {
    /// Costs what differs, where the two share the rest.
    pub(super) fn between(before: &World, after: &World) -> Self {
        let mut changes =
            Self { sources: vec![], acls: vec![], instances: vec![], enis: vec![], homes: HashMap::new() };
        let nothing = Inventory::default();
        for (scope, after) in after {
            changes.add(scope, before.get(scope).unwrap_or(&nothing), after);
        }
        changes
    }

    fn add(&mut self, scope: &Scope, before: &Inventory, after: &Inventory) {
        for group in before.groups.changes(&after.groups) {
            let vpc = |group: Option<&Arc<SecurityGroup>>| group.map(|group| group.vpc.clone());
            let (was, is) = (vpc(group.before), vpc(group.after));
            if was != is {
                self.sources.push(Source::Reference(scope.clone(), group.key.clone()));
            }
            self.move_home(scope, was.flatten(), is.flatten());
            self.sources.push(Source::Group(scope.clone(), group.key.clone()));
        }
        for list in before.prefix_lists.changes(&after.prefix_lists) {
            self.sources.push(Source::List(scope.clone(), list.key.clone()));
        }
        for acl in before.acls.changes(&after.acls) {
            self.sources.push(Source::Acl(scope.clone(), acl.key.clone()));
            self.acls.push((acl.before.cloned(), acl.after.cloned()));
        }
        self.instances.extend(before.instances.changes(&after.instances).map(|instance| instance.key.clone()));
        for eni in before.enis.changes(&after.enis) {
            let vpc = |eni: Option<&Arc<Eni>>| eni.and_then(|eni| eni.vpc.clone());
            self.move_home(scope, vpc(eni.before), vpc(eni.after));
            let key = (scope.clone(), eni.key.clone());
            self.enis.push(EniChange { key, before: eni.before.cloned(), after: eni.after.cloned() });
        }
    }

    fn move_home(&mut self, scope: &Scope, before: Option<VpcId>, after: Option<VpcId>) {
        if before != after {
            before.into_iter().for_each(|vpc| *self.homes.entry((scope.clone(), vpc)).or_default() -= 1);
            after.into_iter().for_each(|vpc| *self.homes.entry((scope.clone(), vpc)).or_default() += 1);
        }
    }
}

impl Memory {
    /// Nothing yet but where the attachments are: everything else differs from it.
    pub(super) fn begin(inputs: &Inputs, placing: Placing) -> Self {
        let mut memory = Self { peerings: Peerings::of(&inputs.world), placing, ..Self::default() };
        memory.warnings.add(&memory.placing.warnings);
        memory
    }

    /// Whether everything that this doesn't resolve again stays as it is: accounts, VPCs, peerings, subnets, which
    /// subnets have a network ACL, and which interface each attachment is.
    pub(super) fn can_follow(&self, inputs: &Inputs, changes: &Changes) -> bool {
        let is_same = |(scope, inventory): (&Scope, &Inventory)| {
            self.world.get(scope).is_some_and(|known| {
                (&known.vpcs, &known.subnets, &known.peerings)
                    == (&inventory.vpcs, &inventory.subnets, &inventory.peerings)
            })
        };
        let acls_stay = |(before, after): &AclChange| match (before, after) {
            (Some(before), Some(after)) => {
                before.subnets == after.subnets && rules::restricts(before) == rules::restricts(after)
            }
            _ => false,
        };
        let stays =
            |eni: &EniChange| self.placing.is_indifferent_to(&eni.key, eni.before.as_deref(), eni.after.as_deref());
        let is_found_or_lost = |(home, more): (&(Scope, VpcId), &isize)| {
            let known = self.homes.get(home).copied().unwrap_or(0);
            (known > 0) != (known + more > 0)
        };
        self.default.as_ref() == Some(&inputs.default)
            && (Arc::ptr_eq(&self.attachments, &inputs.attachments) || self.attachments == inputs.attachments)
            && self.world.len() == inputs.world.len()
            && inputs.world.iter().all(is_same)
            && changes.acls.iter().all(acls_stay)
            && changes.instances.iter().all(|instance| self.placing.is_indifferent_to_instance(instance))
            && changes.enis.iter().all(stays)
            && (!changes.homes.iter().any(is_found_or_lost) || self.peerings == Peerings::of(&inputs.world))
    }

    /// Resolves again what is made of anything that differs.
    pub(super) fn follow(&mut self, inputs: Inputs, changes: &Changes, settings: &Settings, numbers: &mut Numbers) {
        for eni in &changes.enis {
            for &index in self.placing.of_eni.get(&eni.key).into_iter().flatten() {
                self.placing.placements[index].eni = eni.after.clone();
            }
        }
        for (home, more) in &changes.homes {
            *self.homes.entry(home.clone()).or_default() += more;
        }
        let world = &inputs.world;
        let mut next = Next {
            round: Round { settings, world, peerings: &self.peerings, placing: &self.placing, numbers },
            desired: &mut self.desired,
            interfaces: &mut self.interfaces,
            told: &mut self.told,
            policies: &mut self.policies,
            asked: &mut self.asked,
            members: &mut self.members,
            warnings: &mut self.warnings,
            flipped: BTreeSet::new(),
            subnets_flipped: false,
        };
        next.tell(&self.world);
        next.policies(&changes.sources);
        next.interfaces(&changes.enis);
        next.members(&changes.enis);
        self.desired.warnings = self.warnings.all.clone();
        (self.world, self.default, self.attachments) = (inputs.world, Some(inputs.default), inputs.attachments);
    }
}

/// A round under way.
struct Next<'a> {
    round: Round<'a>,
    desired: &'a mut Desired,
    interfaces: &'a mut Vec<Arc<Interface>>,
    told: &'a mut Vec<Vec<Warning>>,
    policies: &'a mut Policies,
    asked: &'a mut Asked,
    members: &'a mut Members,
    warnings: &'a mut Warnings,
    /// Groups that rules refer to now and didn't, or the other way round.
    flipped: BTreeSet<u32>,
    /// The same of any subnet.
    subnets_flipped: bool,
}

impl Next<'_> {
    /// What the sources warn about.
    fn tell(&mut self, before: &World) {
        let nothing = Set::new();
        for (scope, inventory) in self.round.world {
            let before = before.get(scope).map_or(&nothing, |inventory| &inventory.warnings);
            if *before != inventory.warnings {
                self.warnings.add(&inventory.warnings);
                self.warnings.take(before);
            }
        }
    }

    fn policies(&mut self, sources: &[Source]) {
        let again: BTreeSet<PolicyKey> =
            sources.iter().flat_map(|source| self.policies.made_of(source)).cloned().collect();
        for key in again {
            self.resolve(&key);
        }
    }

    fn interfaces(&mut self, changes: &[EniChange]) {
        let placing = self.round.placing;
        let count = placing.placements.len();
        let again: BTreeSet<usize> = if self.interfaces.is_empty() {
            (0..count).collect()
        } else {
            changes.iter().flat_map(|eni| placing.of_eni.get(&eni.key)).flatten().copied().collect()
        };
        let mut exempt = self.interfaces.len() != count;
        for index in again {
            let placement = &placing.placements[index];
            let mut warnings = Vec::new();
            let interface = Arc::new(self.round.interface(placement, &mut warnings));
            self.warnings.add(&warnings);
            self.retain(&interface);
            self.desired.interfaces.insert_shared(placement.attachment.link.ifindex, Arc::clone(&interface));
            if index == self.interfaces.len() {
                self.interfaces.push(interface);
                self.told.push(warnings);
                continue;
            }
            let before = std::mem::replace(&mut self.interfaces[index], interface);
            let told = std::mem::replace(&mut self.told[index], warnings);
            exempt |= before.vpc != self.interfaces[index].vpc;
            self.release(&before);
            self.warnings.take(&told);
        }
        if exempt {
            self.desired.exempt = self.round.exempt(self.interfaces).into();
        }
    }

    /// One interface more has these policies, and asks about its subnet.
    fn retain(&mut self, interface: &Interface) {
        for key in [Some(&interface.policy), interface.acl.as_ref()].into_iter().flatten() {
            if !self.policies.retain(key) {
                self.resolve(key);
            }
        }
        if let Some(subnet) = interface.subnet_number {
            self.subnets_flipped |= self.asked.subnets.add(subnet);
        }
    }

    fn release(&mut self, interface: &Interface) {
        for key in [Some(&interface.policy), interface.acl.as_ref()].into_iter().flatten() {
            if let Some(resolved) = self.policies.release(key) {
                self.forget(&resolved.findings);
                self.desired.policies.remove(key);
            }
        }
        if let Some(subnet) = interface.subnet_number {
            self.subnets_flipped |= self.asked.subnets.take(subnet);
        }
    }

    fn resolve(&mut self, key: &PolicyKey) {
        let resolved = self.round.policy(key);
        self.warnings.add(&resolved.findings.warnings);
        for &group in &resolved.findings.referenced {
            if self.asked.groups.add(group) {
                self.flip(group);
            }
        }
        if self.desired.policies.get(key) != Some(&*resolved.spec) {
            self.desired.policies.insert_shared(key.clone(), Arc::clone(&resolved.spec));
        }
        if let Some(Resolved { findings, .. }) = self.policies.put(key, resolved) {
            self.forget(&findings);
        }
    }

    /// What came up with a policy that is no more.
    fn forget(&mut self, findings: &Findings) {
        self.warnings.take(&findings.warnings);
        for &group in &findings.referenced {
            if self.asked.groups.take(group) {
                self.flip(group);
            }
        }
    }

    fn flip(&mut self, group: u32) {
        if !self.flipped.remove(&group) {
            self.flipped.insert(group);
        }
    }

    fn members(&mut self, changes: &[EniChange]) {
        for eni in changes {
            self.members.regroup(&eni.key, eni.before.as_deref(), eni.after.as_deref());
        }
        let mut again: BTreeSet<EniKey> = changes.iter().map(|eni| eni.key.clone()).collect();
        if self.subnets_flipped {
            for (scope, inventory) in self.round.world {
                again.extend(inventory.enis.keys().map(|eni| (scope.clone(), eni.clone())));
            }
        }
        for &group in &self.flipped {
            let group: Option<&GroupKey> = self.round.numbers.groups.key(group);
            again.extend(group.into_iter().flat_map(|group| self.members.in_group(group)).cloned());
        }
        let mut places = BTreeSet::new();
        for key in again {
            let eni = self.round.world.get(&key.0).and_then(|inventory| inventory.enis.get(&key.1));
            let contribution = eni.and_then(|eni| self.round.contribution(&key.0, eni, self.asked));
            self.members.put(key, contribution, &mut places);
        }
        self.members.bring(&places, &mut self.desired.members);
    }
}

/// Warnings, each with how many parts of the state have it.
#[derive(Debug, Default)]
struct Warnings {
    counts: BTreeMap<Warning, usize>,
    all: Set<Warning>,
}

impl Warnings {
    fn add<'a>(&mut self, warnings: impl IntoIterator<Item = &'a Warning>) {
        for warning in warnings {
            match self.counts.get_mut(warning) {
                Some(count) => *count += 1,
                None => {
                    self.counts.insert(warning.clone(), 1);
                    self.all.insert(warning.clone());
                }
            }
        }
    }

    fn take<'a>(&mut self, warnings: impl IntoIterator<Item = &'a Warning>) {
        for warning in warnings {
            let Some(count) = self.counts.get_mut(warning) else { continue };
            *count -= 1;
            if *count == 0 {
                self.counts.remove(warning);
                self.all.remove(warning);
            }
        }
    }
}
