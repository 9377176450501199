//! Exempt services as `EXEMPT` holds them.

use sg_common::abi::ExemptKey;

use super::{Applier, ApplyError};
use crate::datapath::{DatapathError, absent_is_fine};
use crate::exempt::Service;
use crate::resolve::Desired;
use crate::sharing::Set;

type Exempt = Set<(u32, Service)>;

impl Applier {
    /// Writes those that are new, and removes those that are gone.
    pub(super) fn write_exempt(&mut self, desired: &Desired) -> Result<(), ApplyError> {
        let failed = |error| DatapathError::Write { map: "EXEMPT", error };
        if self.tables.exempt == desired.exempt {
            return Ok(());
        }
        let without = |all: &Exempt, others: &Exempt| -> Vec<_> {
            all.iter().filter(|place| !others.contains(*place)).cloned().collect()
        };
        let gone = without(&self.tables.exempt, &desired.exempt);
        for place in gone {
            self.maps.writes += 1;
            absent_is_fine(self.maps.exempt.remove(&exempt_key(&place))).map_err(failed)?;
            self.tables.exempt.remove(&place);
        }
        let new = without(&desired.exempt, &self.tables.exempt);
        for place in new {
            self.maps.writes += 1;
            self.maps.exempt.insert(exempt_key(&place), 1, 0).map_err(failed)?;
            self.tables.exempt.insert(place);
        }
        // The same, and shared: the next comparison costs nothing.
        self.tables.exempt = desired.exempt.clone();
        Ok(())
    }
}

pub(super) fn exempt_key((vpc, service): &(u32, Service)) -> ExemptKey {
    ExemptKey { vpc: *vpc, address: service.address.into(), port: service.port, protocol: service.protocol, pad: 0 }
}
