//! Pack files: append-only, numbered, never overwritten.
//!
//! A data pack holds pages and nothing else after its header block, so that they lie page-aligned and a dead one can be given
//! back to the file system where it is. An archive pack holds nodes, and exists twice: its mirrors have equal bytes at equal
//! offsets, so that one reference finds both.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vfs::{EntryKind, IoBuffer, OpenMode, ReadFrom, Vfs, VfsFile};

use crate::error::StoreError;
use crate::frame::{Append, Fields, Malformed, crc};
use crate::hash::Hash;
use crate::place::Place;
use crate::record::PackEnd;

/// Bytes of a pack's header; also what the ends of packs are rounded up to, so that no disk block that holds something
/// committed is ever written again.
pub(crate) const BLOCK: u64 = 4096;
/// Files kept open for reading.
const OPEN_MAX: usize = 256;
/// Written bytes after which a big pack is synced in the background, so that the commit does not wait for all of it.
const SYNC_EVERY: u64 = 32 << 20;
/// Smallest write worth a thread.
const BACKGROUND_MIN: usize = 1 << 20;
/// Largest read for which ordinary memory does.
const SMALL_READ: usize = 128 << 10;
const HUGE_PAGE: usize = 2 << 20;
const MAGIC: u64 = u64::from_le_bytes(*b"PERDUPAK");
const VERSION: u16 = 1;

/// Which file of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum PackFile {
    Data,
    ArchiveA,
    ArchiveB,
}

/// The mirrors of the archive.
pub(crate) const MIRRORS: &[PackFile] = &[PackFile::ArchiveA, PackFile::ArchiveB];
/// Pages are in one file.
pub(crate) const DATA: &[PackFile] = &[PackFile::Data];

impl PackFile {
    pub(crate) fn name(self, pack: u32) -> String {
        match self {
            Self::Data => format!("data-{pack:08x}"),
            Self::ArchiveA => format!("arc-{pack:08x}.a"),
            Self::ArchiveB => format!("arc-{pack:08x}.b"),
        }
    }

    /// What a file name in the pack directory stands for; `None` if nothing of the store's.
    pub(crate) fn parse(name: &str) -> Option<(Self, u32)> {
        let (file, number) = match name.strip_prefix("data-") {
            Some(number) => (Self::Data, number),
            None => match name.strip_prefix("arc-")?.split_once('.')? {
                (number, "a") => (Self::ArchiveA, number),
                (number, "b") => (Self::ArchiveB, number),
                _ => return None,
            },
        };
        let pack = u32::from_str_radix(number, 16).ok()?;
        (file.name(pack) == name).then_some((file, pack))
    }
}

/// The header block of pack `pack`; equal in both mirrors.
pub(crate) fn header(store: [u8; 16], data: bool, pack: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(BLOCK as usize);
    out.u64(MAGIC);
    out.u16(VERSION);
    out.u16(if data { 1 } else { 2 });
    out.u32(pack);
    out.extend_from_slice(&store);
    out.u32(crc(&out));
    let hash = Hash::of(&out);
    out.extend_from_slice(&hash.0);
    out.resize(BLOCK as usize, 0);
    out
}

/// Whether `bytes` is the header of that pack.
pub(crate) fn check_header(bytes: &[u8], store: [u8; 16], data: bool, pack: u32) -> Result<(), Malformed> {
    let mut fields = Fields::new(bytes);
    if fields.u64()? != MAGIC {
        return Err(Malformed("it does not begin as a pack does"));
    }
    if fields.u16()? != VERSION {
        return Err(Malformed("its version is unknown"));
    }
    if bytes == header(store, data, pack) { Ok(()) } else { Err(Malformed("its header is not this pack's")) }
}

/// Bytes of memory for a read of `length` bytes: huge pages, unless it is so small that to zero one takes longer than the read.
fn capacity(length: usize) -> usize {
    if length <= SMALL_READ { length } else { length.next_multiple_of(HUGE_PAGE) }
}

/// What the pack directory holds.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) packs: Vec<(PackFile, u32)>,
    /// Files that are no packs.
    pub(crate) strays: Vec<String>,
}

/// The pack directory of a store.
#[derive(Debug)]
pub(crate) struct Packs {
    pub(crate) vfs: Arc<dyn Vfs>,
    pub(crate) dir: PathBuf,
    open: Mutex<HashMap<(PackFile, u32), Arc<dyn VfsFile>>>,
}

impl Packs {
    pub(crate) fn new(vfs: Arc<dyn Vfs>, dir: PathBuf) -> Self {
        Self { vfs, dir, open: Mutex::new(HashMap::new()) }
    }

    pub(crate) fn path(&self, file: PackFile, pack: u32) -> PathBuf {
        self.dir.join(file.name(pack))
    }

    fn handle(&self, file: PackFile, pack: u32) -> io::Result<Arc<dyn VfsFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = open.get(&(file, pack)) {
            return Ok(Arc::clone(handle));
        }
        let handle: Arc<dyn VfsFile> = self.vfs.open(&self.path(file, pack), OpenMode::Read)?.into();
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert((file, pack), Arc::clone(&handle));
        Ok(handle)
    }

    /// Closes what is open of a pack: its file was replaced or removed.
    pub(crate) fn forget(&self, file: PackFile, pack: u32) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&(file, pack));
    }

    /// Reads exactly `buffer.len()` bytes.
    pub(crate) fn read(&self, file: PackFile, pack: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.handle(file, pack)?.read_exact_at(buffer, offset)
    }

    /// Reads what there is of `buffer.len()` bytes; the rest of the buffer is zeroed. Returns how many there were.
    pub(crate) fn read_some(&self, file: PackFile, pack: u32, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let handle = self.handle(file, pack)?;
        let mut done = 0;
        while done < buffer.len() {
            match handle.read_at(&mut buffer[done..], offset + done as u64)? {
                0 => break,
                count => done += count,
            }
        }
        buffer[done..].fill(0);
        Ok(done)
    }

    /// Reads the bytes of `place` to the front of `buffer` as [`Packs::read_some`] does, and makes it longer if need be.
    pub(crate) fn read_place(&self, file: PackFile, place: Place, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let length = (place.end - place.start) as usize;
        // Never shorter: what is cut off would have to be zeroed to get it back.
        buffer.resize(buffer.len().max(length), 0);
        self.read_some(file, place.pack, place.start, &mut buffer[..length])
    }

    /// Reads the bytes of `place`, many at once, into `buffer`, or into a new one if that is too short. Returns where in it they begin, and how
    /// many there were; the rest of them is zeroed.
    pub(crate) fn read_large(
        &self,
        file: PackFile,
        place: Place,
        from: ReadFrom,
        buffer: &mut Option<IoBuffer>,
    ) -> io::Result<(usize, usize)> {
        // Whole blocks, as direct I/O wants them.
        let start = place.start & !(BLOCK - 1);
        let (skip, length) = ((place.start - start) as usize, (place.end.next_multiple_of(BLOCK) - start) as usize);
        let fits = buffer.take_if(|buffer| buffer.len() >= length);
        let buffer = buffer.insert(fits.map_or_else(|| IoBuffer::new(capacity(length)), Ok)?);
        let handle = self.handle(file, place.pack)?;
        let mut done = 0;
        while done < length {
            match handle.read_large_at(&mut buffer[done..length], start + done as u64, from)? {
                0 => break,
                count => done += count,
            }
        }
        buffer[done..length].fill(0);
        Ok((skip, done.saturating_sub(skip).min((place.end - place.start) as usize)))
    }

    /// The length of a pack file.
    pub(crate) fn length(&self, file: PackFile, pack: u32) -> io::Result<u64> {
        self.handle(file, pack)?.len()
    }

    /// All files of the pack directory: those of packs, and the names of others.
    pub(crate) fn list(&self) -> Result<Listing, StoreError> {
        let entries = self.vfs.read_dir(&self.dir).map_err(StoreError::io("list", &self.dir))?;
        let mut listing = Listing::default();
        for entry in entries.into_iter().filter(|entry| entry.kind == EntryKind::File) {
            match PackFile::parse(&entry.name) {
                Some(pack) => listing.packs.push(pack),
                None => listing.strays.push(entry.name),
            }
        }
        Ok(listing)
    }
}

/// One pack file being written, with the sync of its older part that may be under way.
#[derive(Debug)]
struct Open {
    file: Arc<dyn VfsFile>,
    path: PathBuf,
    syncing: Option<JoinHandle<io::Result<()>>>,
}

impl Open {
    fn join(&mut self) -> Result<(), StoreError> {
        match self.syncing.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(source))) => Err(StoreError::io("sync", &self.path)(source)),
            Some(Err(_)) => Err(StoreError::io("sync", &self.path)(io::Error::other("the thread that synced it died"))),
        }
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.join()?;
        self.file.sync_data().map_err(StoreError::io("sync", &self.path))
    }
}

/// A pack (all its mirrors) that this writer has written to.
#[derive(Debug)]
struct Touched {
    pack: u32,
    files: Vec<Open>,
    /// Where the writer began; 0 if it made the pack.
    start: u64,
}

/// What a write in the background gives back: its buffer, and how it went.
type Written = (Vec<u8>, Result<(), StoreError>);

/// Appends to the packs of one kind, in large blocks, and moves on to a new pack when one is full.
#[derive(Debug)]
pub(crate) struct Appender {
    packs: Arc<Packs>,
    kinds: &'static [PackFile],
    store: [u8; 16],
    full: u64,
    bufsize: usize,
    threads: usize,
    resume: PackEnd,
    touched: Vec<Touched>,
    /// What of the current pack is in the file, or on its way there; the buffer comes after.
    flushed: u64,
    /// The write that is under way, and where it began.
    writing: Option<(JoinHandle<Written>, u64)>,
    synced: u64,
    /// A write in the background failed. Nothing more is written, whoever heard of it.
    broken: Option<io::ErrorKind>,
    buffer: Vec<u8>,
    /// Bytes appended since the start, padding excluded.
    pub(crate) appended: u64,
}

/// What an [`Appender`] needs to know of its store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AppendPolicy {
    pub(crate) store: [u8; 16],
    /// Size from which on a pack is full.
    pub(crate) full: u64,
    pub(crate) bufsize: usize,
    pub(crate) threads: usize,
}

impl Appender {
    pub(crate) fn new(packs: Arc<Packs>, kinds: &'static [PackFile], resume: PackEnd, policy: AppendPolicy) -> Self {
        let AppendPolicy { store, full, bufsize, threads } = policy;
        Self {
            packs,
            kinds,
            store,
            full,
            bufsize,
            threads,
            resume,
            touched: Vec::new(),
            flushed: 0,
            writing: None,
            synced: 0,
            broken: None,
            buffer: Vec::new(),
            appended: 0,
        }
    }

    /// Where the next writer may go on, once everything is sealed.
    pub(crate) fn end(&self) -> PackEnd {
        match self.touched.last() {
            Some(current) => PackEnd { pack: current.pack, end: self.flushed + self.buffer.len() as u64 },
            None => self.resume,
        }
    }

    /// Whether directory entries were made.
    pub(crate) fn created(&self) -> bool {
        self.touched.iter().any(|touched| touched.start == 0)
    }

    fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Makes sure that a pack is open and not full.
    fn ready(&mut self) -> Result<(), StoreError> {
        if self.touched.is_empty() && self.reopen()? {
            return Ok(());
        }
        if !self.touched.is_empty() && self.position() < self.full {
            return Ok(());
        }
        self.seal()?;
        self.create()
    }

    /// Opens the pack of the last generation, if it is exactly as long as that generation left it. Otherwise something else (a
    /// writer that died) lies behind, and since nothing is overwritten, not even that, a new pack is begun.
    fn reopen(&mut self) -> Result<bool, StoreError> {
        if self.resume.pack == 0 || self.resume.end >= self.full || !self.resume.end.is_multiple_of(BLOCK) {
            return Ok(false);
        }
        let mut files = Vec::new();
        for kind in self.kinds {
            let path = self.packs.path(*kind, self.resume.pack);
            let file = match self.packs.vfs.open(&path, OpenMode::ReadWrite) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(StoreError::io("open", &path)(error)),
            };
            if file.len().map_err(StoreError::io("read the length of", &path))? != self.resume.end {
                return Ok(false);
            }
            files.push(Open { file: file.into(), path, syncing: None });
        }
        self.touched.push(Touched { pack: self.resume.pack, files, start: self.resume.end });
        (self.flushed, self.synced) = (self.resume.end, self.resume.end);
        Ok(true)
    }

    fn create(&mut self) -> Result<(), StoreError> {
        let mut pack = self.touched.last().map_or(self.resume.pack, |current| current.pack);
        'next: loop {
            pack =
                pack.checked_add(1).ok_or_else(|| StoreError::invalid("the store has used all 2^32 pack numbers"))?;
            let mut touched = Touched { pack, files: Vec::new(), start: 0 };
            for kind in self.kinds {
                let path = self.packs.path(*kind, pack);
                match self.packs.vfs.open(&path, OpenMode::CreateNew) {
                    Ok(file) => touched.files.push(Open { file: file.into(), path, syncing: None }),
                    // Left by a writer that died. The sweep removes it; here it is merely stepped over.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue 'next,
                    Err(error) => {
                        self.touched.push(touched);
                        return Err(StoreError::io("create", &path)(error));
                    }
                }
            }
            self.touched.push(touched);
            break;
        }
        (self.flushed, self.synced) = (0, 0);
        self.buffer = header(self.store, self.kinds == DATA, pack);
        Ok(())
    }

    /// Appends `bytes`, which must be a page or a node, at the next multiple of `align`. Returns pack and offset.
    pub(crate) fn append(&mut self, bytes: &[u8], align: u64) -> Result<(u32, u64), StoreError> {
        self.ready()?;
        self.pad(align);
        let offset = self.position();
        self.buffer.extend_from_slice(bytes);
        self.appended += bytes.len() as u64;
        if self.buffer.len() >= self.bufsize {
            self.flush()?;
        }
        Ok((self.end().pack, offset))
    }

    /// Appends a whole run of blocks.
    pub(crate) fn append_blocks(&mut self, bytes: &[u8]) -> Result<(u32, u64), StoreError> {
        self.ready()?;
        self.pad(BLOCK);
        let offset = self.position();
        if self.threads > 1 {
            // Copied, so that it can be written while the next run is being hashed.
            self.buffer.extend_from_slice(bytes);
            if self.buffer.len() >= self.bufsize {
                self.flush()?;
            }
        } else {
            self.flush()?;
            self.write(bytes)?;
        }
        self.appended += bytes.len() as u64;
        Ok((self.end().pack, offset))
    }

    fn pad(&mut self, align: u64) {
        let gap = self.position().next_multiple_of(align) - self.position();
        self.buffer.resize(self.buffer.len() + gap as usize, 0);
    }

    /// Writes out what is buffered: in the background, if there may be threads.
    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if self.threads < 2 || self.buffer.len() < BACKGROUND_MIN {
            self.settle()?;
            let mut buffer = std::mem::take(&mut self.buffer);
            let written = self.write(&buffer);
            buffer.clear();
            self.buffer = buffer;
            return written;
        }
        let spare = self.settle()?;
        let buffer = std::mem::replace(&mut self.buffer, spare);
        let Some(current) = self.touched.last() else { return Ok(()) };
        let files: Vec<_> = current.files.iter().map(|open| (Arc::clone(&open.file), open.path.clone())).collect();
        let start = self.flushed;
        self.flushed += buffer.len() as u64;
        let write = move || {
            let written = files
                .iter()
                .try_for_each(|(file, path)| file.write_all_at(&buffer, start).map_err(StoreError::io("write", path)));
            (buffer, written)
        };
        self.writing = Some((std::thread::spawn(write), start));
        Ok(())
    }

    /// Writes out what is buffered, and waits until a reader of the file would find it.
    pub(crate) fn publish(&mut self) -> Result<(), StoreError> {
        self.flush()?;
        self.settle().map(drop)
    }

    /// Waits for the write that is under way. Returns its buffer, empty, to be used again.
    fn settle(&mut self) -> Result<Vec<u8>, StoreError> {
        if let Some(kind) = self.broken {
            return Err(StoreError::io("write", &self.packs.dir)(kind.into()));
        }
        let Some((thread, _)) = self.writing.take() else { return Ok(Vec::new()) };
        let died = |_| StoreError::io("write", &self.packs.dir)(io::Error::other("the thread that wrote it died"));
        let (mut buffer, written) = thread.join().map_err(died).unwrap_or_else(|error| (Vec::new(), Err(error)));
        if let Err(error) = written {
            self.broken =
                Some(if let StoreError::Io { source, .. } = &error { source.kind() } else { io::ErrorKind::Other });
            return Err(error);
        }
        buffer.clear();
        self.sync_behind()?;
        Ok(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(current) = self.touched.last() else { return Ok(()) };
        for open in &current.files {
            open.file.write_all_at(bytes, self.flushed).map_err(StoreError::io("write", &open.path))?;
        }
        self.flushed += bytes.len() as u64;
        self.sync_behind()
    }

    /// Begins to sync what is written, if it has become much.
    fn sync_behind(&mut self) -> Result<(), StoreError> {
        let Some(current) = self.touched.last_mut() else { return Ok(()) };
        if self.threads > 1 && self.flushed - self.synced >= SYNC_EVERY {
            self.synced = self.flushed;
            for open in &mut current.files {
                open.join()?;
                let file = Arc::clone(&open.file);
                open.syncing = Some(std::thread::spawn(move || file.sync_data()));
            }
        }
        Ok(())
    }

    /// Writes everything out and pads to a block, so that the next writer shares none with this one.
    pub(crate) fn seal(&mut self) -> Result<(), StoreError> {
        if !self.touched.is_empty() {
            self.pad(BLOCK);
        }
        self.publish()
    }

    /// Reads back what was appended, written out or not.
    pub(crate) fn read(&mut self, pack: u32, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.writing.as_ref().is_some_and(|(_, start)| offset + buffer.len() as u64 > *start) {
            // What failed to be written fails the commit too.
            self.settle().map_err(io::Error::other)?;
        }
        let buffered = offset.checked_sub(self.flushed).filter(|_| self.touched.last().is_some_and(|t| t.pack == pack));
        match buffered.and_then(|from| self.buffer.get(from as usize..from as usize + buffer.len())) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => self.packs.read(self.kinds[0], pack, offset, buffer),
        }
    }

    /// The syncs that make everything appended durable, to be run in any order or at once.
    pub(crate) fn syncs(&mut self) -> impl Iterator<Item = Box<dyn FnOnce() -> Result<(), StoreError> + Send + '_>> {
        let sync =
            |open| -> Box<dyn FnOnce() -> Result<(), StoreError> + Send + '_> { Box::new(move || Open::sync(open)) };
        self.touched.iter_mut().flat_map(|touched| touched.files.iter_mut()).map(sync)
    }

    /// Takes back what was appended, as far as that still goes; the sweep does what is left.
    pub(crate) fn roll_back(&mut self) {
        self.buffer.clear();
        let _ = self.settle();
        for touched in std::mem::take(&mut self.touched) {
            for mut open in touched.files {
                let _ = open.join();
                if touched.start == 0 {
                    let _ = self.packs.vfs.remove_file(&open.path);
                } else {
                    let _ = open.file.set_len(touched.start);
                }
            }
            self.kinds.iter().for_each(|kind| self.packs.forget(*kind, touched.pack));
        }
    }
}

/// Runs `jobs`, all at once if there may be `threads`, else one after the other; all of them even if one fails.
pub(crate) fn run_all<'a>(
    jobs: Vec<Box<dyn FnOnce() -> Result<(), StoreError> + Send + 'a>>,
    threads: usize,
) -> Result<(), StoreError> {
    if threads < 2 || jobs.len() < 2 {
        return jobs.into_iter().map(|job| job()).fold(Ok(()), Result::and);
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = jobs.into_iter().map(|job| scope.spawn(job)).collect();
        running
            .into_iter()
            .map(|job| job.join().unwrap_or_else(|_| Err(StoreError::invalid("a thread that synced a file died"))))
            .fold(Ok(()), Result::and)
    })
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(vfs: &dyn Vfs, dir: &Path) -> Result<(), StoreError> {
    vfs.sync_dir(dir).map_err(StoreError::io("sync the directory", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_packs_are_read_back_and_others_are_not_taken_for_them() {
        for file in [PackFile::Data, PackFile::ArchiveA, PackFile::ArchiveB] {
            for pack in [1, 0xAB, u32::MAX] {
                assert_eq!(PackFile::parse(&file.name(pack)), Some((file, pack)));
            }
        }
        for other in ["data-1", "data-0000000g", "arc-00000001", "arc-00000001.c", "data-00000001.tmp", "data-+0000001"]
        {
            assert_eq!(PackFile::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_header_is_known_from_every_other() {
        let right = header([7; 16], true, 3);
        assert!(check_header(&right, [7; 16], true, 3).is_ok());
        assert!(check_header(&right, [7; 16], false, 3).is_err());
        assert!(check_header(&right, [7; 16], true, 4).is_err());
        assert!(check_header(&right, [8; 16], true, 3).is_err());
        assert!(check_header(&right[..100], [7; 16], true, 3).is_err());
    }
}
