//! One moment of a disk that goes on: which pages of it changed, and what those were then.
//!
//! ```text
//!   the guest's requests ─► before_change ─► written: changed since the last generation
//!                                        └─► while a moment is stored: what was there is copied out before it is overwritten
//!   a generation's pause ─► Moment::begin ─► what was written is due, and nothing counts as written any more
//!   its store ──────────► Moment::take ───► a page as it was then: the copy if there is one, else what the file has
//! ```
//!
//! The guest waits for a copy only where it overwrites a page that is due and not stored yet. A moment that is given up leaves its pages
//! to the next one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::image::Image;
use crate::machine::dirty::PageSet;
use crate::machine::memory::PAGE_SIZE;

/// The most bytes of copies that wait to be stored. A guest that overwrites more than the store keeps up with has no generation for it.
const COPIES_MAX: usize = 64 << 20;

/// What is known of a disk's changes.
#[derive(Debug)]
pub(super) struct Changes(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The generation that `written` is relative to; `None`: everything may have changed.
    base: Option<String>,
    written: PageSet,
    due: Option<Due>,
}

/// A moment that is being stored.
#[derive(Debug)]
struct Due {
    /// Pages that are wanted, and still in the file as they were.
    pages: PageSet,
    copies: BTreeMap<u64, Vec<u8>>,
    /// Why it cannot be had any more.
    lost: Option<io::Error>,
}

impl Changes {
    /// Of a disk of `length` bytes, of which nothing is known.
    pub(super) fn new(length: u64) -> Self {
        let written = PageSet::new(length.div_ceil(PAGE_SIZE));
        Self(Mutex::new(State { base: None, written, due: None }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes `range` of the image, whose data begins at `offset` of `file`, are about to be changed.
    pub(super) fn before_change(&self, file: &File, offset: u64, range: &Range<u64>) {
        let pages = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        let mut state = self.lock();
        state.written.insert_run(&pages);
        if let Some(due) = &mut state.due {
            due.copy_out(file, offset, pages);
        }
    }
}

impl Due {
    fn copy_out(&mut self, file: &File, offset: u64, pages: Range<u64>) {
        for page in pages {
            if self.lost.is_some() {
                return;
            }
            if !self.pages.contains(page) {
                continue;
            }
            let mut bytes = vec![0; PAGE_SIZE as usize];
            if let Err(error) = file.read_exact_at(&mut bytes, offset + page * PAGE_SIZE) {
                return self.lose(error);
            }
            self.pages.remove_run(&(page..page + 1));
            self.copies.insert(page, bytes);
            if self.copies.len() * PAGE_SIZE as usize > COPIES_MAX {
                let why = "the guest overwrites it more quickly than it is stored";
                return self.lose(io::Error::other(why));
            }
        }
    }

    fn lose(&mut self, why: io::Error) {
        self.copies.clear();
        self.pages.clear();
        self.lost = Some(why);
    }
}

/// One moment of a disk. While it lives what is overwritten is copied.
#[derive(Debug)]
pub struct Moment {
    image: Arc<Image>,
    changes: Arc<Changes>,
    base: Option<String>,
    pages: PageSet,
    stored: bool,
}

impl Moment {
    /// Now, of an image whose changes are known. Nothing may be under way: the disk's device is quiesced.
    #[must_use]
    pub fn begin(image: &Arc<Image>) -> Option<Self> {
        let changes = Arc::clone(image.changes()?);
        let mut state = changes.lock();
        let empty = PageSet::new(state.written.bound());
        let mut pages = std::mem::replace(&mut state.written, empty);
        let base = state.base.clone();
        if base.is_none() {
            let all = 0..pages.bound();
            pages.insert_run(&all);
        }
        state.due = Some(Due { pages: pages.clone(), copies: BTreeMap::new(), lost: None });
        drop(state);
        Some(Self { image: Arc::clone(image), changes, base, pages, stored: false })
    }

    /// The disk's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.image.name()
    }

    /// The disk's bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.image.length()
    }

    /// The generation that [`Moment::pages`] are relative to; `None`: they are all.
    #[must_use]
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// The pages that changed, or all.
    #[must_use]
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// The pages that may be other than zeros.
    ///
    /// # Errors
    /// As the file system says.
    pub fn data(&self) -> io::Result<PageSet> {
        let (file, offset) = self.image.file();
        let mut data = data_pages(file, &(offset..offset + self.image.length()))?;
        // What was copied may have been data then, though it is a hole now.
        if let Some(due) = &self.changes.lock().due {
            due.copies.keys().for_each(|page| data.insert(*page));
        }
        Ok(data)
    }

    /// Fills `bytes` with pages from `first` on, as they were. Each is to be taken once.
    ///
    /// # Errors
    /// The file cannot be read, or the moment was lost.
    pub fn take(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (file, offset) = self.image.file();
        // Nothing of it is overwritten while it is read.
        let mut state = self.changes.lock();
        let due = state.due.as_mut().ok_or(io::ErrorKind::NotFound)?;
        due.check()?;
        file.read_exact_at(bytes, offset + first * PAGE_SIZE)?;
        let run = first..first + bytes.len() as u64 / PAGE_SIZE;
        for (page, to) in run.clone().zip(bytes.chunks_exact_mut(PAGE_SIZE as usize)) {
            if let Some(copy) = due.copies.remove(&page) {
                to.copy_from_slice(&copy);
            }
        }
        due.pages.remove_run(&run);
        Ok(())
    }

    /// Whether all that was taken is what it was.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> io::Result<()> {
        self.changes.lock().due.as_mut().map_or(Ok(()), Due::check)
    }

    /// Generation `id` has it, durably: changes are relative to that from now on.
    pub fn stored(mut self, id: &str) {
        self.stored = true;
        self.changes.lock().base = Some(id.to_owned());
    }

    /// The next one is to be of all pages: what this one is relative to cannot be built on.
    pub fn forget_base(&self) {
        self.changes.lock().base = None;
    }
}

impl Due {
    fn check(&mut self) -> io::Result<()> {
        match &self.lost {
            None => Ok(()),
            Some(error) => Err(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        let mut state = self.changes.lock();
        state.due = None;
        if !self.stored {
            state.written.union(&self.pages);
        }
    }
}

/// The pages of `part` of `file` that are no holes, counted from its beginning.
///
/// # Errors
/// As the file system says.
pub fn data_pages(file: &File, part: &Range<u64>) -> io::Result<PageSet> {
    let mut data = PageSet::new((part.end - part.start).div_ceil(PAGE_SIZE));
    let mut at = part.start;
    while at < part.end {
        let begin = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(begin) if begin < part.end => begin,
            // No more of it.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(begin))?.min(part.end);
        data.insert_run(&((begin - part.start) / PAGE_SIZE..(end - part.start).div_ceil(PAGE_SIZE)));
        at = end.max(begin + 1);
    }
    Ok(data)
}
