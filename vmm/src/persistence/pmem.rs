//! The persistent memory of one VM: regions of its pool, leased and stamped with it, mapped where the guest finds them.
//!
//! To its guest it is storage: it stays when the guest ends, as a disk does, and what the guest has flushed is durable. To a freeze and to
//! generations it is memory: pages that change are watched with those of RAM, and it is of the same moment.

use std::io;
use std::sync::Arc;

use allocator::{Kind, MediumKind, Pool, Region, RegionError, RegionName, RegionSpec};

use super::regions::{self, RegionsError};
use crate::machine::config::VmConfig;
use crate::machine::memory::{self, GuestRam};
use crate::machine::virtio::Attachment;
use crate::machine::virtio::pmem::{self, PersistentMemory};

/// What can go wrong with persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// It cannot be joined to the machine.
    #[error("cannot begin with the persistent memory {name}")]
    Begin {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not durable.
    #[error("cannot make the persistent memory {name} durable")]
    Persist {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The regions that it needs, beside a VM's others.
pub(super) fn wanted(
    vm: &str,
    config: &VmConfig,
    medium: Option<MediumKind>,
) -> Result<Vec<(RegionName, RegionSpec)>, RegionsError> {
    let spec = |size| RegionSpec { kind: Kind::Pmem, size, medium };
    let region = |one: &crate::machine::config::pmem::PmemConfig| {
        regions::region_name(vm, &one.name).map(|name| (name, spec(one.size.0)))
    };
    config.pmem.iter().map(region).collect()
}

#[derive(Debug)]
struct Piece {
    name: String,
    region: Arc<Region>,
    /// Once it is in use.
    memory: Option<Arc<PersistentMemory>>,
}

/// The persistent memory of a VM, in the order of the configuration.
#[derive(Debug, Default)]
pub(super) struct PmemRegions(Vec<Piece>);

impl PmemRegions {
    /// Leases its regions.
    pub(super) fn lease(pool: &Pool, vm: &str, config: &VmConfig) -> Result<Self, RegionsError> {
        let mut pieces = Vec::new();
        for one in &config.pmem {
            let region = regions::lease(pool, vm, &regions::region_name(vm, &one.name)?)?;
            let (config, region_size) = (one.size.0, region.size());
            if config != region_size {
                return Err(RegionsError::Mismatch { name: format!("{vm}/{}", one.name), config, region: region_size });
            }
            pieces.push(Piece { name: one.name.clone(), region: Arc::new(region), memory: None });
        }
        Ok(Self(pieces))
    }

    /// Maps all of it, for placing it behind RAM. The mappings stay.
    pub(super) fn map(&mut self) -> Result<Vec<memory::Pmem>, RegionError> {
        let map = |piece: &mut Piece| {
            let memory = match &piece.memory {
                Some(memory) => Arc::clone(memory),
                None => Arc::new(PersistentMemory::map(Arc::clone(&piece.region))?),
            };
            piece.memory = Some(Arc::clone(&memory));
            Ok(memory::Pmem { name: piece.name.clone(), host: Box::new(memory) })
        };
        self.0.iter_mut().map(map).collect()
    }

    /// What a machine over `ram` is joined to.
    pub(super) fn attach(&self, ram: &GuestRam) -> Result<Vec<Attachment>, PmemError> {
        let attach = |(number, memory): (usize, &Arc<PersistentMemory>)| {
            let name = self.0.get(number).map(|piece| piece.name.clone()).unwrap_or_default();
            pmem::attach(number, ram, memory).map_err(|source| PmemError::Begin { name, source })
        };
        self.0.iter().filter_map(|piece| piece.memory.as_ref()).enumerate().map(attach).collect()
    }

    /// What is in use, in the order of the configuration.
    pub(super) fn mapped(&self) -> impl Iterator<Item = &Arc<PersistentMemory>> {
        self.0.iter().filter_map(|piece| piece.memory.as_ref())
    }

    /// By their names.
    pub(super) fn leased(&self) -> impl Iterator<Item = (&str, &Region)> {
        self.0.iter().map(|piece| (piece.name.as_str(), &*piece.region))
    }

    /// Makes durable what was written, of what is in use.
    pub(super) fn persist(&self) -> Result<(), PmemError> {
        self.0.iter().try_for_each(|Piece { name, memory, .. }| {
            let persisted = memory.as_ref().map_or(Ok(()), |memory| memory.persist());
            persisted.map_err(|source| PmemError::Persist { name: name.clone(), source })
        })
    }
}
