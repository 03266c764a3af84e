//! What `pages` does and prints, its list, and its judge.
//!
//! # List
//! The initial RAM disk: entries of 4 bytes, little-endian, that are walked round and round. The lower 31 bits are the number of
//! a page of the working set, from 0; the top bit says that the access writes. An entry beyond `pages=` ends the guest with
//! code 2 before it begins.
//!
//! # Output
//! ```text
//! pages pages=<n> writes=<list|all|none> count=<n> every=<n>
//! list <entries> pages <n>                  pages of the working set
//! at <accesses>                             every `every` accesses, also through the report port
//! done <accesses> <writes> <hash>           after `count` accesses
//! ```
//! or `pages: damaged page <n> at access <n> address <hex> holds <hex> due <hex>` and an end with code 1. The hash folds
//! ([`crate::chain::fold`]) every entry as it stands in the list.
//!
//! The number of accesses done lies, 8 bytes, at guest-physical address [`PROGRESS_ADDRESS`], current to the last access: reading it
//! there costs the guest nothing.
//!
//! # Pages
//! A page holds 512 words. Word i is [`word`] of the page and i, but for word 1, the page's version, and the last, the page's first
//! word plus its version. Its first access writes all of them, with version 1; a write gives it the next version. An access
//! compares the first word, the version, the last, and one of the others that the hash chooses, with versions kept in a table of their own, 4 bytes a
//! page, where 0 is not valid and 2^32 - 1 stands for "never touched". So a page that comes back as it was before its last
//! write, as another page, as zeros or in part is found, and so is a table that comes back as zeros. Nothing repeats or compresses.
//!
//! # Places
//! From [`crate::ports::FREE_ADDRESS`] on: a page directory for each GiB but the first, the table of versions, and then the working set, in
//! what is left of usable memory, page after page; the list is left out.

use crate::banner::{Banner, BannerError};
use crate::chain::fold;
use crate::transcript::{Difference, Transcript};

/// Guest-physical address of the number of accesses done, 8 bytes, little-endian.
pub const PROGRESS_ADDRESS: u64 = 0x11_f000;
/// Set in an entry whose access writes.
pub const WRITE: u32 = 1 << 31;
/// Words of a page.
pub const PAGE_WORDS: usize = 512;
/// Greatest `count` and `every` that are recomputed, so that a forged first line cannot keep a verifier busy for ever.
pub const MAX_ACCESSES: u64 = 1 << 30;

const SEED: u64 = 0x0070_6572_6475_7265;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX: u64 = 0xbf58_476d_1ce4_e5b9;

/// The word at `index` of page `page`, as its first access leaves it, but for the two that hold the version.
#[must_use]
pub const fn word(page: u32, index: usize) -> u64 {
    let first = (page as u64 + 1).wrapping_mul(STEP);
    (first ^ (first >> 32)).wrapping_mul(MIX).wrapping_add((index as u64).wrapping_mul(STEP))
}

/// One access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The page's number, below 2^31.
    pub page: u32,
    /// Whether it writes.
    pub write: bool,
}

impl Access {
    /// Its entry in a list.
    #[must_use]
    pub const fn entry(self) -> u32 {
        let write = if self.write { WRITE } else { 0 };
        (self.page & !WRITE) | write
    }

    /// The access that an entry stands for.
    #[must_use]
    pub const fn of(entry: u32) -> Self {
        Self { page: entry & !WRITE, write: entry & WRITE != 0 }
    }
}

/// A list that cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// Nothing in it, or a part of an entry.
    #[error("a list of {0} bytes: there must be one entry of 4 bytes, or more, and no part of one")]
    Length(usize),
    /// An entry beyond the working set.
    #[error("entry {entry} of the list names page {page}, and there are {pages}")]
    Beyond {
        /// Which entry, from 0.
        entry: usize,
        /// The page.
        page: u32,
        /// How many there are.
        pages: u32,
    },
}

/// A list of accesses, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    entries: Vec<u32>,
    pages: u32,
}

impl List {
    /// Takes accesses to `pages` pages.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn new(accesses: impl IntoIterator<Item = Access>, pages: u32) -> Result<Self, ListError> {
        Self { entries: accesses.into_iter().map(Access::entry).collect(), pages }.check()
    }

    /// Reads the bytes of a list; `pages` as the guest's parameter: 0 is as many as the list names.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn parse(bytes: &[u8], pages: u32) -> Result<Self, ListError> {
        let (entries, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(ListError::Length(bytes.len()));
        }
        let entries: Vec<u32> = entries.iter().map(|entry| u32::from_le_bytes(*entry)).collect();
        let most = entries.iter().map(|entry| Access::of(*entry).page).max().unwrap_or(0);
        Self { entries, pages: if pages == 0 { most.saturating_add(1) } else { pages } }.check()
    }

    fn check(self) -> Result<Self, ListError> {
        if self.entries.is_empty() {
            return Err(ListError::Length(0));
        }
        let pages = self.pages;
        let beyond =
            self.entries.iter().map(|entry| Access::of(*entry).page).enumerate().find(|(_, page)| *page >= pages);
        beyond.map_or(Ok(self), |(entry, page)| Err(ListError::Beyond { entry, page, pages }))
    }

    /// The bytes of the initial RAM disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
    }

    /// The entries.
    #[must_use]
    pub fn entries(&self) -> &[u32] {
        &self.entries
    }

    /// Pages of the working set.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// How much memory the guest needs beside its pages and the list, in bytes, in a machine with `memory` bytes.
    #[must_use]
    pub fn overhead(&self, memory: u64) -> u64 {
        // Directories for each GiB, of which there is one more than memory has, because of the gap below 4 GiB.
        let directories = (memory.div_ceil(1 << 30) + 1) * 4096;
        crate::ports::FREE_ADDRESS + directories + (u64::from(self.pages) * 4).next_multiple_of(4096)
    }
}

/// An output without fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagesReport {
    /// Accesses that its last complete line tells of.
    pub accesses: u64,
    /// Of these, writes; 0 where it is not at its end.
    pub writes: u64,
    /// It came to its end.
    pub complete: bool,
}

/// The first fault of an output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagesError {
    /// The first line cannot be used.
    #[error(transparent)]
    Banner(#[from] BannerError),
    /// The list cannot have been this one.
    #[error(transparent)]
    List(#[from] ListError),
    /// The guest found a page damaged, or met an exception.
    #[error("verifying pages: the guest says {line:?}")]
    Damaged {
        /// Its last line.
        line: String,
    },
    /// The output is not that of this list.
    #[error("verifying pages: {expected:?} was due, {found:?} was printed; accesses were lost, doubled or altered")]
    Different {
        /// The line due; empty where nothing more was.
        expected: String,
        /// The line found.
        found: String,
    },
}

/// Recomputes the walk over the `list` that the guest was given and compares every byte of `output`, which may end anywhere.
///
/// # Errors
/// The first line that differs; see [`PagesError`].
pub fn verify(output: &str, list: &[u8]) -> Result<PagesReport, PagesError> {
    let banner = Banner::parse("pages", output)?;
    let pages = u32::try_from(banner.number("pages", u64::from(!WRITE))?).unwrap_or(0);
    let (count, every) = (banner.number("count", MAX_ACCESSES)?, banner.number("every", MAX_ACCESSES)?);
    let writes = banner.word("writes");
    let writes: fn(Access) -> bool = match writes {
        "list" => |access| access.write,
        "all" => |_| true,
        "none" => |_| false,
        other => {
            let value = other.chars().take(40).collect();
            return Err(BannerError::Parameter { guest: "pages", key: "writes", value, limit: 0 }.into());
        }
    };
    let list = List::parse(list, pages)?;
    let walk = Lines { list: &list, count, every, writes, accesses: 0, written: 0, hash: SEED, ended: false };
    let due = [banner.line.to_owned(), format!("list {} pages {}", list.entries.len(), list.pages)];
    let extent = Transcript::new(due.into_iter().chain(walk)).compare(&[output]).map_err(different)?;
    let last = output.lines().take(extent.lines).last().unwrap_or_default();
    let mut numbers = last.split(' ').skip(1).map(|number| number.parse().unwrap_or(0));
    let told = last.starts_with("at ") || last.starts_with("done ");
    let mut next = || numbers.next().filter(|_| told).unwrap_or(0);
    let (accesses, writes) = (next(), next());
    Ok(PagesReport { accesses, writes, complete: last.starts_with("done ") })
}

fn different(Difference { expected, found }: Difference) -> PagesError {
    if found.starts_with("pages: damaged") || found.starts_with("exception ") {
        PagesError::Damaged { line: found }
    } else {
        PagesError::Different { expected, found }
    }
}

/// The lines that a walk prints.
struct Lines<'a> {
    list: &'a List,
    count: u64,
    every: u64,
    writes: fn(Access) -> bool,
    accesses: u64,
    written: u64,
    hash: u64,
    ended: bool,
}

impl Lines<'_> {
    /// Walks up to access `end`.
    fn walk(&mut self, end: u64) {
        let length = self.list.entries.len();
        let from = usize::try_from(self.accesses % length as u64).unwrap_or(0);
        let ahead = usize::try_from(end - self.accesses).unwrap_or(usize::MAX);
        for entry in self.list.entries.iter().cycle().skip(from).take(ahead) {
            self.hash = fold(self.hash, u64::from(*entry));
            self.written += u64::from((self.writes)(Access::of(*entry)));
        }
        self.accesses = end;
    }
}

impl Iterator for Lines<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let line = match self.every {
            0 => None,
            every => self.accesses.checked_add(every).map(|next| next - next % every),
        };
        let end = (self.count != 0).then_some(self.count);
        match (line, end) {
            _ if self.ended => None,
            (Some(line), end) if end.is_none_or(|end| line <= end) => {
                self.walk(line);
                Some(format!("at {line}"))
            }
            (_, Some(end)) => {
                self.walk(end);
                self.ended = true;
                Some(format!("done {end} {} {:016x}", self.written, self.hash))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "pages/tests.rs"]
mod tests;
