//! What a disk of the pool begins as: the bytes of a raw image, or of a block device, copied when the VM is made.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::{DiskError, open_raw};
use crate::machine::config::VmConfig;
use crate::machine::config::disks::DiskConfig;

/// Bytes read at a time. A piece that is all zeros is not written: a new region is zeros.
const PIECE: usize = 64 << 10;

/// An image to copy, locked against writers.
#[derive(Debug)]
pub(super) struct Origin {
    /// The disk that is made from it.
    pub(super) disk: String,
    path: PathBuf,
    file: File,
    /// Bytes.
    size: u64,
}

/// Opens what the disks of `config` are made from. Each must fit.
pub(super) fn open(config: &VmConfig) -> Result<Vec<Origin>, DiskError> {
    let mut origins = Vec::new();
    for disk in &config.disks {
        let DiskConfig::Pool { name, size: room, from: Some(path) } = disk else { continue };
        let (file, size) = open_raw(path, true)?;
        if size > room.0 {
            return Err(DiskError::TooLarge { path: path.clone(), size, disk: name.clone(), room: *room });
        }
        origins.push(Origin { disk: name.clone(), path: path.clone(), file, size });
    }
    Ok(origins)
}

impl Origin {
    /// Copies it to the new region that lies in `part` of `file`, durably.
    pub(super) fn copy_to(&self, file: &File, part: &Range<u64>) -> Result<(), DiskError> {
        let failed = |source| DiskError::Copy { path: self.path.clone(), disk: self.disk.clone(), source };
        self.copy(file, part.start).and_then(|()| file.sync_data()).map_err(failed)?;
        tracing::info!("the disk {} has what {} holds: {} bytes", self.disk, self.path.display(), self.size);
        Ok(())
    }

    fn copy(&self, file: &File, begin: u64) -> io::Result<()> {
        let mut buffer = vec![0; PIECE];
        let mut done = 0;
        while done < self.size {
            let left = usize::try_from(self.size - done).unwrap_or(PIECE);
            let count = left.min(PIECE);
            let piece = buffer.get_mut(..count).unwrap_or_default();
            self.file.read_exact_at(piece, done)?;
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, begin + done)?;
            }
            done += count as u64;
        }
        Ok(())
    }
}
