//! Where the bytes of frames are: in the RAM region itself, or, where that survives only what was saved to it, in memory beside it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Geometry, PagingError};
use crate::medium::MediumKind;
use crate::medium::paged::FrameFile;
use crate::region::Region;

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
            MediumKind::Nvdimm => Some(working_memory(needed).map_err(|source| {
                let doing = "make working memory for frames (memfd)";
                PagingError::System { doing, source }
            })?),
        };
        Ok(Self { region, memory, cluster: geometry.cluster() })
    }

    /// Whether the region is only the image of working memory.
    pub(super) fn is_apart(&self) -> bool {
        self.memory.is_some()
    }

    /// What is mapped where frames are placed.
    pub(super) fn file(&self) -> Result<FrameFile<'_>, PagingError> {
        let sync = self.region.medium_kind() == MediumKind::Dax;
        match &self.memory {
            Some(memory) => Ok(FrameFile { file: memory.as_fd(), offset: 0, sync }),
            None => Ok(FrameFile { file: self.region.descriptor()?, offset: self.region.data_offset(), sync }),
        }
    }

    fn at(&self, frame: u32) -> u64 {
        u64::from(frame) * self.cluster
    }

    /// Fills `bytes` with what working memory has from frame `first` on, and `offset` bytes into that.
    pub(super) fn read(&self, first: u32, offset: u64, bytes: &mut [u8]) -> Result<(), PagingError> {
        let at = self.at(first) + offset;
        match &self.memory {
            Some(memory) => memory_io("read", std::os::unix::fs::FileExt::read_exact_at(memory, bytes, at)),
            None => Ok(self.region.read_at(bytes, at)?),
        }
    }

    /// Writes to working memory from frame `first` on.
    ///
    /// By `write`, and not through a mapping: the page cache that it makes is of small pieces, all of which have blocks. On ext4 the guest's
    /// first write to a page costs 1 to 2 µs then, and 10 to 13 where a page fault made it (seen on Linux 6.18).
    pub(super) fn write(&self, first: u32, bytes: &[u8]) -> Result<(), PagingError> {
        let at = self.at(first);
        match &self.memory {
            Some(memory) => memory_io("write", std::os::unix::fs::FileExt::write_all_at(memory, bytes, at)),
            None => Ok(self.region.write_at(bytes, at)?),
        }
    }

    /// As [`FrameStore::read`], of the image.
    pub(super) fn read_image(&self, frame: u32, offset: u64, bytes: &mut [u8]) -> Result<(), PagingError> {
        Ok(self.region.read_at(bytes, self.at(frame) + offset)?)
    }

    /// Copies a frame from working memory to the image.
    pub(super) fn save(&self, frame: u32, buffer: &mut Vec<u8>) -> Result<(), PagingError> {
        buffer.resize(usize::try_from(self.cluster).unwrap_or(0), 0);
        self.read(frame, 0, buffer)?;
        Ok(self.region.write_at(buffer, self.at(frame))?)
    }

    /// A frame's memory is not needed for now: what it takes in RAM is given back, but not its place on the medium, so that it can be had
    /// again. On `dax` the place is the memory, and stays.
    pub(super) fn release(&self, frame: u32) -> Result<(), PagingError> {
        let at = self.at(frame);
        if let Some(memory) = &self.memory {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            let punched = rustix::fs::fallocate(memory, flags, at, self.cluster);
            return punched
                .map_err(|source| PagingError::System { doing: "release working memory", source: source.into() });
        }
        match self.region.medium_kind() {
            MediumKind::File => Ok(self.region.zero_at(at, self.cluster)?),
            MediumKind::Dax | MediumKind::Nvdimm => Ok(()),
        }
    }

    /// What the page cache has of the region.
    #[cfg(test)]
    pub(super) fn cached_bytes(&self) -> Option<u64> {
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

fn memory_io(doing: &'static str, done: std::io::Result<()>) -> Result<(), PagingError> {
    done.map_err(|source| PagingError::System {
        doing: if doing == "read" { "read a frame of working memory" } else { "write a frame of working memory" },
        source,
    })
}
