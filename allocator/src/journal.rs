//! The journal of a freeze: pages from anywhere, written in one sequential stream.
//!
//! What a freeze finds dirty lies scattered over a VM's regions, and a medium takes scattered pages at a small part of its pace. So where time is
//! short they go here, one behind the other, with one flush ([`Journal::write`]); and home when the VM is looked at next ([`Journal::replay`]).
//! It is the write-ahead log of databases (Mohan et al., ARIES, 1992) with a single record, and redo alone.
//!
//! A journal says nothing by itself: the context names it ([`JournalV1`]), by number, length and checksum. So one that was never finished, or that
//! a later freeze has written over, is none. Replaying twice is replaying once. See FORMAT.md.

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfs::{IoBuffer, VfsFile};

use crate::frame::{self, FrameError};
use crate::medium::PAGE_SIZE;
use crate::region::{Region, RegionError};

const MAGIC: frame::Magic = *b"PDJOURNL";
const VERSION: u32 = 1;
const BODY_LEN: usize = 40;
/// Bytes of an entry of the list: a page's number.
const ENTRY: u64 = 8;
/// What is staged at a time, in bytes.
const CHUNK: usize = 2 << 20;
const PAGE: usize = PAGE_SIZE as usize;

/// What a context says of the journal that belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalV1 {
    /// The context's number.
    pub sequence: u64,
    /// Pages in it.
    pub pages: u64,
    /// CRC-32 of their numbers, as they are written, and of their content behind it.
    pub crc: u32,
}

/// Why a journal cannot be written or replayed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// There is no room.
    #[error("{pages} pages do not fit in a journal for {capacity}")]
    Full {
        /// Pages to be written.
        pages: u64,
        /// Pages for which there is room.
        capacity: u64,
    },
    /// Writing it.
    #[error("cannot write the journal")]
    Write(#[source] io::Error),
    /// A page that was to go in it, or to go home, cannot be copied.
    #[error("cannot copy page {page}")]
    Copy {
        /// The first of those that could not be.
        page: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its header is none.
    #[error("the journal's header cannot be read: nothing was altered")]
    Header(#[from] FrameError),
    /// It is not the one that is named.
    #[error("the journal is not the one that the context names ({0}): nothing was altered")]
    Other(String),
    /// Its list of pages cannot be.
    #[error("the journal names page {page} after {before:?}, of {bound}: nothing was altered")]
    List {
        /// The page.
        page: u64,
        /// The one before it.
        before: Option<u64>,
        /// How many pages there are.
        bound: u64,
    },
    /// Its bytes are not those that were written.
    #[error("the journal is damaged (CRC {found:08x}, {named:08x} is named): nothing was altered")]
    Damaged {
        /// As computed.
        found: u32,
        /// As the context has it.
        named: u32,
    },
    /// It changed while it was read.
    #[error("the journal changed while it was replayed: the medium gives other bytes each time it is read")]
    Unsteady,
}

/// A journal that is in use.
#[derive(Debug)]
pub struct Journal {
    region: Region,
    /// Past the page cache, where that can be.
    direct: Option<Box<dyn VfsFile>>,
    stage: IoBuffer,
}

/// Pages that a measurement can have at most: behind the journal there is room of its own for them, so that it never harms one.
pub const PROBE_PAGES: u64 = 1024;
const PROBE_SIZE: u64 = PROBE_PAGES * PAGE_SIZE;

/// The size of a region for so many pages, in bytes.
#[must_use]
pub fn region_size(pages: u64) -> u64 {
    journal_size(pages).saturating_add(PROBE_SIZE)
}

fn journal_size(pages: u64) -> u64 {
    let pages = pages.saturating_mul(PAGE_SIZE + ENTRY).div_ceil(PAGE_SIZE);
    pages.saturating_add(2).saturating_mul(PAGE_SIZE)
}

fn data_offset(pages: u64) -> u64 {
    PAGE_SIZE + pages.saturating_mul(ENTRY).div_ceil(PAGE_SIZE) * PAGE_SIZE
}

impl Journal {
    /// Takes up a journal's region. Nothing is read or written.
    ///
    /// # Errors
    /// [`JournalError::Region`], [`JournalError::Write`]: no memory.
    pub fn open(region: Region) -> Result<Self, JournalError> {
        let direct = region.direct()?;
        let mut stage = IoBuffer::new(CHUNK).map_err(JournalError::Write)?;
        // Its memory is had now, and not in a freeze.
        stage.fill(1);
        Ok(Self { region, direct, stage })
    }

    /// Pages for which there is room.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.region.size().saturating_sub(PROBE_SIZE + 2 * PAGE_SIZE) / (PAGE_SIZE + ENTRY)
    }

    /// Writes so many pages as a journal is written, where none lies, durably: to learn what that takes.
    ///
    /// # Errors
    /// [`JournalError::Full`]: more than [`PROBE_PAGES`]. [`JournalError::Write`], [`JournalError::Region`].
    pub fn probe(&mut self, pages: u64) -> Result<(), JournalError> {
        let capacity = PROBE_PAGES.min(self.region.size() / PAGE_SIZE);
        if pages > capacity {
            return Err(JournalError::Full { pages, capacity });
        }
        let start = (self.region.size() - capacity * PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE;
        let mut crc = crc32fast::Hasher::new();
        let fill = &mut |_, into: &mut [u8]| {
            into.fill(0x5a);
            Ok(())
        };
        self.write_pages(std::slice::from_ref(&(0..pages)), start, &mut crc, fill)?;
        self.sync()
    }

    fn sync(&self) -> Result<(), JournalError> {
        match &self.direct {
            Some(direct) => direct.sync_data().map_err(JournalError::Write),
            None => Ok(self.region.sync()?),
        }
    }

    /// Its region.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Writes the pages of `runs`, ascending, of the VM whose RAM is `ram`; durable when this returns. `copy` fills in the pages from a number on.
    ///
    /// # Errors
    /// [`JournalError::Full`], [`JournalError::Copy`], [`JournalError::Write`]: there is no journal then.
    pub fn write(
        &mut self,
        ram: &Region,
        sequence: u64,
        runs: &[Range<u64>],
        copy: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<JournalV1, JournalError> {
        let pages = runs.iter().map(|run| run.end - run.start).sum();
        let capacity = self.capacity();
        if pages > capacity {
            return Err(JournalError::Full { pages, capacity });
        }
        let mut crc = crc32fast::Hasher::new();
        self.write_list(runs, pages, &mut crc)?;
        self.write_pages(runs, data_offset(pages), &mut crc, copy)?;
        let named = JournalV1 { sequence, pages, crc: crc.finalize() };
        let header = frame::encode(MAGIC, VERSION, &body(ram, &named));
        let block = self.stage.get_mut(..PAGE).ok_or(io::ErrorKind::InvalidInput).map_err(no_room)?;
        block.fill(0);
        block.iter_mut().zip(header).for_each(|(to, byte)| *to = byte);
        self.put(PAGE, 0)?;
        self.sync()?;
        Ok(named)
    }

    fn write_list(&mut self, runs: &[Range<u64>], pages: u64, crc: &mut crc32fast::Hasher) -> Result<(), JournalError> {
        let mut numbers = runs.iter().cloned().flatten();
        let mut at = PAGE_SIZE;
        let end = data_offset(pages);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK);
            let chunk = self.stage.get_mut(..length).ok_or(io::ErrorKind::InvalidInput).map_err(no_room)?;
            chunk.fill(0);
            for (entry, number) in chunk.as_chunks_mut::<8>().0.iter_mut().zip(&mut numbers) {
                *entry = number.to_le_bytes();
            }
            crc.update(chunk);
            self.put(length, at)?;
            at += length as u64;
        }
        Ok(())
    }

    fn write_pages(
        &mut self,
        runs: &[Range<u64>],
        start: u64,
        crc: &mut crc32fast::Hasher,
        copy: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), JournalError> {
        let (mut staged, mut at) = (0, start);
        for run in runs {
            let mut page = run.start;
            while page < run.end {
                let room = (CHUNK - staged) / PAGE;
                let count = usize::try_from(run.end - page).unwrap_or(usize::MAX).min(room);
                let into = self.stage.get_mut(staged..staged + count * PAGE);
                let into = into.ok_or(io::ErrorKind::InvalidInput).map_err(no_room)?;
                copy(page, into).map_err(|source| JournalError::Copy { page, source })?;
                crc.update(into);
                staged += count * PAGE;
                page += count as u64;
                if staged == CHUNK {
                    self.put(staged, at)?;
                    at += staged as u64;
                    staged = 0;
                }
            }
        }
        if staged > 0 { self.put(staged, at) } else { Ok(()) }
    }

    /// Writes what is staged, whole pages.
    fn put(&self, length: usize, at: u64) -> Result<(), JournalError> {
        let bytes = self.stage.get(..length).ok_or(io::ErrorKind::InvalidInput).map_err(no_room)?;
        match &self.direct {
            Some(direct) => direct.write_all_at(bytes, self.region.data_offset() + at).map_err(JournalError::Write),
            None => Ok(self.region.write_at(bytes, at)?),
        }
    }

    /// Verifies that this is the journal that is `named`, of the VM whose RAM is `ram` and that has `bound` pages. Then gives `home` its pages, as
    /// runs: the first one's number, and their content.
    ///
    /// # Errors
    /// [`JournalError`]: unless it is [`JournalError::Copy`] or [`JournalError::Unsteady`], `home` was given nothing.
    pub fn replay(
        &mut self,
        ram: &Region,
        named: &JournalV1,
        bound: u64,
        home: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), JournalError> {
        self.verify_header(ram, named)?;
        let list = self.read_list(named, bound)?;
        let found = self.read_pages(named, &list, &mut |_, _| Ok(()))?;
        if found != named.crc {
            return Err(JournalError::Damaged { found, named: named.crc });
        }
        match self.read_pages(named, &list, home)? {
            again if again == named.crc => Ok(()),
            _ => Err(JournalError::Unsteady),
        }
    }

    fn verify_header(&self, ram: &Region, named: &JournalV1) -> Result<(), JournalError> {
        let mut bytes = [0; frame::HEADER_LEN + BODY_LEN];
        self.region.read_at(&mut bytes, 0)?;
        let found = frame::decode(&bytes, MAGIC, VERSION, BODY_LEN)?;
        let expected = body(ram, named);
        if found.body != expected {
            return Err(JournalError::Other(in_words(found.body, &expected)));
        }
        let capacity = self.capacity();
        if named.pages > capacity {
            return Err(JournalError::Full { pages: named.pages, capacity });
        }
        Ok(())
    }

    /// The list as it is written, its padding included.
    fn read_list(&self, named: &JournalV1, bound: u64) -> Result<Vec<u8>, JournalError> {
        // The capacity bounds it.
        let length = usize::try_from(data_offset(named.pages) - PAGE_SIZE).unwrap_or(usize::MAX);
        let mut list = vec![0; length];
        self.region.read_at(&mut list, PAGE_SIZE)?;
        let mut before = None;
        for page in numbers(&list, named.pages) {
            if page >= bound || before.is_some_and(|before| before >= page) {
                return Err(JournalError::List { page, before, bound });
            }
            before = Some(page);
        }
        Ok(list)
    }

    /// Returns the CRC of everything.
    fn read_pages(
        &mut self,
        named: &JournalV1,
        list: &[u8],
        home: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<u32, JournalError> {
        let mut crc = crc32fast::Hasher::new();
        crc.update(list);
        let all: Vec<u64> = numbers(list, named.pages).collect();
        let mut at = data_offset(named.pages);
        for some in all.chunks(CHUNK / PAGE) {
            let bytes = self.stage.get_mut(..some.len() * PAGE).ok_or(io::ErrorKind::InvalidInput).map_err(no_room)?;
            self.region.read_at(bytes, at)?;
            crc.update(bytes);
            at += bytes.len() as u64;
            let mut rest = &*bytes;
            for run in some.chunk_by(|one, next| one + 1 == *next) {
                let (here, later) = rest.split_at(run.len() * PAGE);
                let page = run.first().copied().unwrap_or(0);
                home(page, here).map_err(|source| JournalError::Copy { page, source })?;
                rest = later;
            }
        }
        Ok(crc.finalize())
    }
}

fn numbers(list: &[u8], pages: u64) -> impl Iterator<Item = u64> + '_ {
    let count = usize::try_from(pages).unwrap_or(usize::MAX);
    list.as_chunks::<8>().0.iter().take(count).map(|entry| u64::from_le_bytes(*entry))
}

fn no_room(kind: io::ErrorKind) -> JournalError {
    JournalError::Write(kind.into())
}

fn body(ram: &Region, named: &JournalV1) -> [u8; BODY_LEN] {
    let fields = [ram.pool_id(), ram.id(), named.sequence, named.pages, named.crc.into()];
    let mut body = [0; BODY_LEN];
    for (to, field) in body.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
        *to = field.to_le_bytes();
    }
    body
}

fn in_words(found: &[u8], expected: &[u8]) -> String {
    let names = ["pool", "region", "context", "pages", "CRC"];
    let fields =
        |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|field| u64::from_le_bytes(*field)).collect::<Vec<_>>();
    let differing =
        names.iter().zip(fields(found)).zip(fields(expected)).filter(|((_, found), expected)| found != expected);
    let words: Vec<_> =
        differing.map(|((name, found), expected)| format!("{name} {found:x}, not {expected:x}")).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests;
