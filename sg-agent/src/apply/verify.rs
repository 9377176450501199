//! Whether the kernel still has what was put there: programs on links, entries of rule maps. What somebody else took
//! away or wrote is put right, and told. Nothing here decides what should be there.
//!
//! Programs, pins, settings, bindings, lines, interfaces and headers are looked at whole each time; the other maps in
//! parts of [`PART`] entries, so that a look is bounded. It finds what fewer entries hide at once, more of them in rotation.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use aya::maps::{IterableMap as _, MapError};
use sg_common::abi::{self, ExemptKey, Interface, Member, MemberKey, OwnKey, Policy, ReferenceKey};
use sg_common::policy::Tables as _;

use super::policies::{self, Written};
use super::services::exempt_key;
use super::{Applier, ApplyError, bindings, members};
use crate::datapath::{DatapathError, Fault, Scan, absent_is_fine};
use crate::exempt::Service;

/// The kind of repair after which flows are judged anew.
const ALTERED: &str = "map_altered";
/// Entries of one map that are looked at in one go, which takes a few milliseconds.
const PART: usize = 16_384;

/// Something that was not as it was left, and is again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repair {
    /// Its kind, as it is counted.
    pub kind: &'static str,
    /// The link or map.
    pub subject: String,
    /// What was wrong.
    pub problem: &'static str,
}

/// How far the maps have been looked at since they last changed.
#[derive(Debug, Default)]
pub(super) struct Audit {
    /// How many references the policies in force have.
    references: usize,
    scans: Scans,
}

#[derive(Debug, Default)]
struct Scans {
    interfaces: Scan,
    policies: Scan,
    references: Scan,
    members: Scan,
    own: Scan,
    exempt: Scan,
}

/// Things that one look puts right on a link.
const FAULTS: usize = 4;

impl Applier {
    /// Looks, and puts right what isn't as it was left.
    ///
    /// # Errors
    /// What could not be looked at or put right; all else was.
    pub fn verify(&mut self) -> (Vec<Repair>, Vec<ApplyError>) {
        if self.store.is_untidy() {
            self.collect();
        }
        let (mut repairs, mut errors) = (Vec::new(), Vec::new());
        self.verify_links(&mut repairs, &mut errors);
        if let Err(error) = self.verify_words(&mut repairs).and_then(|()| self.verify_maps(&mut repairs)) {
            errors.push(error);
        }
        // Flows that were judged meanwhile look as if they had been judged rightly.
        if repairs.iter().any(|repair| repair.kind == ALTERED) {
            self.unsettled = true;
            self.collect();
        }
        (repairs, errors)
    }

    fn verify_links(&mut self, repairs: &mut Vec<Repair>, errors: &mut Vec<ApplyError>) {
        let mut hooks = std::mem::take(&mut self.hooks);
        for (ifindex, hook) in &mut hooks {
            let Some(enforced) = self.snapshot.interfaces.get(ifindex) else { continue };
            let name = &enforced.interface.link;
            let mut note = |kind, problem| repairs.push(Repair { kind, subject: name.clone(), problem });
            let mut result = Ok(());
            // Somebody else may insist as well: what is still wrong after this is for the next look.
            for _ in 0..FAULTS {
                match self.datapath.check(hook) {
                    Ok(None) => break,
                    Ok(Some((direction, fault))) => {
                        let (kind, problem) = describe(fault);
                        result = self.datapath.repair(hook, name, direction, fault);
                        if result.is_err() {
                            break;
                        }
                        note(kind, problem);
                    }
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            let renewed = result.and_then(|()| self.datapath.renew_filters(hook, name));
            match renewed {
                Ok(true) => {
                    let (kind, problem) = describe(Fault::Detached);
                    note(kind, problem);
                }
                Ok(false) => {}
                Err(error) => errors.push(error.into()),
            }
        }
        self.hooks = hooks;
    }

    /// Settings, bindings and lines: what costs no system call, or one.
    fn verify_words(&mut self, repairs: &mut Vec<Repair>) -> Result<(), ApplyError> {
        // What a CPU keeps of the interfaces' entries is in no map that is read here: it is taken anew instead.
        if self.maps.interfaces.renew() {
            repairs.push(altered("EDITION"));
        }
        if self.maps.config()? != self.config {
            self.maps.set_config(&self.config)?;
            repairs.push(altered("CONFIG"));
        }
        let mut found = false;
        for slot in 0..abi::MAX_BINDINGS {
            let word = bindings::word(self.tables.bindings.get(&slot).copied().unwrap_or_default());
            if self.maps.bindings.load(slot) != word {
                self.maps.bindings.store(slot, word);
                found = true;
            }
        }
        if found {
            repairs.push(altered("BINDINGS"));
        }
        let lines = self.bound.values().map(|bound| bound.written.restore_lines(&self.maps));
        if lines.fold(false, |found, altered| found | altered) {
            repairs.push(altered("RULES"));
        }
        Ok(())
    }

    fn verify_maps(&mut self, repairs: &mut Vec<Repair>) -> Result<(), ApplyError> {
        if !self.retired.is_empty() || self.store.is_untidy() {
            // They are about to go.
            return Ok(());
        }
        let mut audit = self.audit.take().unwrap_or_else(|| self.expectations());
        let result = self.verify_entries(&mut audit, repairs);
        self.audit = Some(audit);
        result
    }

    fn expectations(&self) -> Audit {
        Audit {
            references: self.tables.policies.values().map(|policy| policy.referenced().count()).sum(),
            scans: Scans::default(),
        }
    }

    fn verify_entries(&mut self, audit: &mut Audit, repairs: &mut Vec<Repair>) -> Result<(), ApplyError> {
        let Audit { references, scans } = audit;

        /// Reads a part of a map: entries that nobody wrote go, and those that are missing or different are written.
        macro_rules! verify {
            ($map:ident, $name:literal, $scan:ident, $key:ty, $value:ty, $expected:expr, $count:expr, $restore:expr) => {{
                let failed = |error| DatapathError::Write { map: $name, error };
                let (entries, all) =
                    scans.$scan.read::<$key, $value>(self.maps.$map.map().fd(), PART).map_err(cannot_read($name))?;
                let expected = $expected;
                let mut is_altered = false;
                let mut strange = Vec::new();
                for (key, value) in &entries {
                    match expected(key) {
                        Some(right) if right == *value => {}
                        Some(_) => is_altered = true,
                        None => strange.push(*key),
                    }
                }
                is_altered |= !strange.is_empty() || all.is_some_and(|all| all < $count);
                if is_altered {
                    for key in &strange {
                        absent_is_fine(self.maps.$map.remove(key)).map_err(failed)?;
                    }
                    let restore: fn(&mut Self) -> Result<(), ApplyError> = $restore;
                    restore(self)?;
                    scans.$scan = Scan::default();
                    repairs.push(altered($name));
                }
            }};
        }

        verify!(
            interfaces,
            "INTERFACES",
            interfaces,
            u32,
            Interface,
            |ifindex: &u32| self.entries.get(ifindex).copied(),
            self.entries.len(),
            |applier| {
                for (ifindex, entry) in &applier.entries {
                    let failed = |error| DatapathError::Write { map: "INTERFACES", error };
                    applier.maps.interfaces.insert(ifindex, entry, 0).map_err(failed)?;
                }
                Ok(())
            }
        );
        verify!(
            references,
            "REFERENCES",
            references,
            ReferenceKey,
            u32,
            |key: &ReferenceKey| self.reference(key),
            *references,
            Self::restore_policies
        );
        verify!(
            members,
            "MEMBERS",
            members,
            MemberKey,
            Member,
            |key: &MemberKey| self.tables.membership(key.vpc, &key.address).copied(),
            self.tables.members.len(),
            Self::restore_members
        );
        verify!(
            secondaries,
            "SECONDARIES",
            own,
            OwnKey,
            u32,
            |key: &OwnKey| self.secondaries.contains(&(key.eni, IpAddr::from(key.address))).then_some(1),
            self.secondaries.len(),
            |applier| {
                let secondaries = std::mem::take(&mut applier.secondaries);
                applier.add_secondaries(&secondaries)
            }
        );
        verify!(
            exempt,
            "EXEMPT",
            exempt,
            ExemptKey,
            u32,
            |key: &ExemptKey| {
                let service = Service { address: key.address.into(), protocol: key.protocol, port: key.port };
                let place = (key.vpc, service);
                (exempt_key(&place) == *key && self.tables.exempt.contains(&place)).then_some(1)
            },
            self.tables.exempt.len(),
            |applier| {
                for place in &applier.tables.exempt {
                    let failed = |error| DatapathError::Write { map: "EXEMPT", error };
                    applier.maps.exempt.insert(exempt_key(place), 1, 0).map_err(failed)?;
                }
                Ok(())
            }
        );
        self.verify_headers(&mut scans.policies, repairs)
    }

    /// The policies' headers: an array, in which nothing is missing or too much.
    fn verify_headers(&mut self, scan: &mut Scan, repairs: &mut Vec<Repair>) -> Result<(), ApplyError> {
        // One more than there are: the kernel says that it is at the end when it finds no next one.
        let most = 2 * abi::MAX_POLICIES as usize + 1;
        let (entries, _) =
            scan.read::<u32, Policy>(self.maps.policies.map().fd(), most).map_err(cannot_read("POLICIES"))?;
        let bound: HashMap<u32, &Written> =
            self.bound.values().map(|bound| (bound.written.number, &bound.written)).collect();
        let right = |id: u32| {
            bound.get(&(id >> 1)).map_or(Policy::default(), |written| written.header(policies::direction(id)))
        };
        let wrong: Vec<(u32, Policy)> =
            entries.iter().filter(|&&(id, header)| right(id) != header).map(|&(id, _)| (id, right(id))).collect();
        for &(id, header) in &wrong {
            let failed = |error| DatapathError::Write { map: "POLICIES", error };
            self.maps.policies.set(id, header, 0).map_err(failed)?;
        }
        if !wrong.is_empty() {
            repairs.push(altered("POLICIES"));
        }
        Ok(())
    }

    /// The row of a group that a table in force refers to.
    fn reference(&self, key: &ReferenceKey) -> Option<u32> {
        let table = self.tables.policies.get(&(key.table >> 1))?.table(policies::direction(key.table));
        table.references.get(&key.group).copied()
    }

    fn restore_policies(&mut self) -> Result<(), ApplyError> {
        for bound in self.bound.values() {
            bound.written.restore(&mut self.maps)?;
        }
        Ok(())
    }

    fn restore_members(&mut self) -> Result<(), ApplyError> {
        for (place, member) in &self.tables.members {
            let failed = |error| DatapathError::Write { map: "MEMBERS", error };
            self.maps.members.insert(members::key(place), member, 0).map_err(failed)?;
        }
        Ok(())
    }
}

fn cannot_read(map: &'static str) -> impl FnOnce(io::Error) -> DatapathError {
    move |error| DatapathError::Read { map, error: MapError::IoError(error) }
}

fn altered(map: &str) -> Repair {
    Repair { kind: ALTERED, subject: format!("map {map}"), problem: "was written to by somebody else" }
}

fn describe(fault: Fault) -> (&'static str, &'static str) {
    match fault {
        Fault::Detached => ("program_detached", "its program had been taken off"),
        Fault::Preceded => ("program_preceded", "another program decided before this agent's"),
        Fault::Unpinned => ("program_unpinned", "its program would have gone with the agent: the pin was removed"),
    }
}
