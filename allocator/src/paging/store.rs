//! Where the bytes of frames are: in the RAM region itself, or, where that survives only what was saved to it, in memory beside it.
//!
//! Memory beside it is as long as the guest's, and has of it what is in frames, each cluster at its own place: the number of a frame says where
//! in the image a cluster is saved, and that there is RAM for it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Geometry, PagingError};
use crate::medium::MediumKind;
use crate::medium::paged::{FrameFile, PagedMemory};
use crate::region::Region;

/// Bytes that are written to the image at a time, at most.
const SAVED_AT_ONCE: usize = 1 << 20;

/// A cluster, and the frame that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) cluster: u32,
    pub(super) frame: u32,
}

/// The file of frames.
#[derive(Debug)]
pub(super) struct FrameStore {
    region: Arc<Region>,
    /// Working memory on `nvdimm`: DRAM, which the region is the image of.
    memory: Option<File>,
    cluster: u64,
}

impl FrameStore {
    pub(super) fn new(region: Arc<Region>, geometry: Geometry) -> Result<Self, PagingError> {
        let needed = u64::from(geometry.frames()) * geometry.cluster();
        if region.size() < needed {
            return Err(PagingError::TooSmall { name: region.name().clone(), size: region.size(), needed });
        }
        let memory = match region.medium_kind() {
            MediumKind::Dax | MediumKind::File => None,
            MediumKind::Nvdimm => {
                let length = u64::from(geometry.clusters()) * geometry.cluster();
                Some(working_memory(length).map_err(|source| {
                    let doing = "make working memory for frames (memfd)";
                    PagingError::System { doing, source }
                })?)
            }
        };
        Ok(Self { region, memory, cluster: geometry.cluster() })
    }

    /// Whether the region is only the image of working memory.
    pub(super) fn is_apart(&self) -> bool {
        self.memory.is_some()
    }

    /// Addresses for the guest's memory, none of which is there yet.
    pub(super) fn reserve(&self, geometry: Geometry) -> Result<PagedMemory, PagingError> {
        let memory = match &self.memory {
            Some(memory) => PagedMemory::over(memory.as_fd(), geometry.memory(), geometry.cluster()),
            None => PagedMemory::reserve(geometry.memory(), geometry.cluster()),
        };
        memory.map_err(|source| PagingError::System { doing: "page guest memory (userfaultfd)", source })
    }

    /// Gives the guest `count` clusters that follow one another, as their frames must ([`FrameStore::follows`]).
    pub(super) fn place(&self, guest: &PagedMemory, first: Spot, count: u32) -> Result<(), PagingError> {
        let placed = if self.is_apart() {
            guest.show(first.cluster, count)
        } else {
            let sync = self.region.medium_kind() == MediumKind::Dax;
            let frames = FrameFile { file: self.region.descriptor()?, offset: self.region.data_offset(), sync };
            guest.place(frames, first.frame, first.cluster, count)
        };
        placed.map_err(|source| PagingError::System { doing: "map a frame", source })
    }

    /// Whether `next`, which is the cluster behind `one`, can be read, written and placed together with it.
    pub(super) fn follows(&self, one: Spot, next: Spot) -> bool {
        self.is_apart() || one.frame + 1 == next.frame
    }

    fn in_image(&self, frame: u32) -> u64 {
        u64::from(frame) * self.cluster
    }

    fn in_memory(&self, cluster: u32) -> u64 {
        u64::from(cluster) * self.cluster
    }

    /// Fills `bytes` with what working memory has from a cluster on, and `offset` bytes into that.
    pub(super) fn read(&self, first: Spot, offset: u64, bytes: &mut [u8]) -> Result<(), PagingError> {
        match &self.memory {
            Some(memory) => {
                let at = self.in_memory(first.cluster) + offset;
                memory_io("read", std::os::unix::fs::FileExt::read_exact_at(memory, bytes, at))
            }
            None => Ok(self.region.read_at(bytes, self.in_image(first.frame) + offset)?),
        }
    }

    /// Writes to working memory from a cluster on.
    ///
    /// By `write`, and not through a mapping: the page cache that it makes is of small pieces, all of which have blocks. On ext4 the guest's
    /// first write to a page costs 1 to 2 µs then, and 10 to 13 where a page fault made it (seen on Linux 6.18).
    pub(super) fn write(&self, first: Spot, bytes: &[u8]) -> Result<(), PagingError> {
        match &self.memory {
            Some(memory) => {
                let at = self.in_memory(first.cluster);
                memory_io("write", std::os::unix::fs::FileExt::write_all_at(memory, bytes, at))
            }
            None => Ok(self.region.write_at(bytes, self.in_image(first.frame))?),
        }
    }

    /// `count` clusters from `first` on, which are withdrawn and leave their frames, need no working memory any more. To be told before
    /// others may fill them. If it fails the memory stays until that happens.
    pub(super) fn forget(&self, first: u32, count: u32) {
        if let Some(memory) = &self.memory {
            let _ = punch(memory, self.in_memory(first), self.cluster * u64::from(count));
        }
    }

    /// As [`FrameStore::read`], of the image.
    pub(super) fn read_image(&self, frame: u32, offset: u64, bytes: &mut [u8]) -> Result<(), PagingError> {
        Ok(self.region.read_at(bytes, self.in_image(frame) + offset)?)
    }

    /// Copies clusters from working memory to the image, in the order of their frames, so that neighbours are written at once. Returns how many
    /// bytes.
    pub(super) fn save(&self, mut spots: Vec<Spot>) -> Result<u64, PagingError> {
        spots.sort_unstable_by_key(|spot| spot.frame);
        let size = usize::try_from(self.cluster).unwrap_or(0);
        let mut buffer = Vec::new();
        for run in spots.chunk_by(|one, next| one.frame + 1 == next.frame) {
            for part in run.chunks((SAVED_AT_ONCE / size.max(1)).max(1)) {
                let Some(first) = part.first() else { continue };
                buffer.resize(part.len() * size, 0);
                for (spot, bytes) in part.iter().zip(buffer.chunks_exact_mut(size)) {
                    self.read(*spot, 0, bytes)?;
                }
                self.region.write_at(&buffer, self.in_image(first.frame))?;
            }
        }
        Ok(spots.len() as u64 * self.cluster)
    }

    /// A free frame's memory is not needed for now: what it takes in RAM is given back, but not its place on the medium, so that it can be
    /// had again. On `dax` the place is the memory, and stays; working memory that is apart has nothing for free frames.
    pub(super) fn release(&self, frame: u32) -> Result<(), PagingError> {
        match self.region.medium_kind() {
            MediumKind::File => Ok(self.region.zero_at(self.in_image(frame), self.cluster)?),
            MediumKind::Dax | MediumKind::Nvdimm => Ok(()),
        }
    }

    /// What working memory takes in RAM; `None` if that cannot be told.
    #[cfg(test)]
    pub(super) fn memory_in_use(&self) -> Option<u64> {
        match &self.memory {
            Some(memory) => Some(std::os::unix::fs::MetadataExt::blocks(&memory.metadata().ok()?) * 512),
            None => self.cached_bytes(),
        }
    }

    /// What the page cache has of the region.
    #[cfg(test)]
    fn cached_bytes(&self) -> Option<u64> {
        self.region.lease().file.cached(self.region.data_offset(), self.region.size()).map(|cached| cached.bytes)
    }

    /// Makes the region durable.
    pub(super) fn sync(&self) -> Result<(), PagingError> {
        Ok(self.region.sync()?)
    }
}

fn working_memory(length: u64) -> std::io::Result<File> {
    let memory = rustix::fs::memfd_create("perdure-frames", rustix::fs::MemfdFlags::CLOEXEC)?;
    let memory = File::from(memory);
    memory.set_len(length)?;
    Ok(memory)
}

fn punch(memory: &File, at: u64, length: u64) -> std::io::Result<()> {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(memory, flags, at, length))?)
}

fn memory_io(doing: &'static str, done: std::io::Result<()>) -> Result<(), PagingError> {
    done.map_err(|source| PagingError::System {
        doing: if doing == "read" { "read a frame of working memory" } else { "write a frame of working memory" },
        source,
    })
}
