//! Where a log and the regions that it serves are found.

use std::fmt;
use std::sync::Arc;

use super::RvmError;
use crate::name::RegionName;
use crate::pool::Pool;
use crate::region::Region;

/// A set of regions (LRVM: external data segments), logs among them.
pub(crate) trait Segments: Send + Sync + fmt::Debug {
    /// Looks which there are, for what [`Segments::name_of`] says from now on.
    fn refresh(&self) -> Result<(), RvmError>;

    /// Opens one; nobody else has it while it lives.
    fn open(&self, name: &RegionName) -> Result<Region, RvmError>;

    /// The name of the one with that id.
    fn name_of(&self, id: u64) -> Option<RegionName>;
}

impl Segments for Arc<Pool> {
    fn refresh(&self) -> Result<(), RvmError> {
        Ok(Pool::refresh(self)?)
    }

    fn open(&self, name: &RegionName) -> Result<Region, RvmError> {
        Ok(Region::open(self.lease(name)?)?)
    }

    fn name_of(&self, id: u64) -> Option<RegionName> {
        self.list().into_iter().find(|region| region.id == id).map(|region| region.name)
    }
}
