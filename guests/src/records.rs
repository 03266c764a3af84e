//! What `records` prints and writes, and its judge.
//!
//! # Output
//! ```text
//! records count=<n> flush=<n> hz=<n> on=<disk|pmem> size=<bytes> verify=<0|1>
//! slots <n> found <n> <hash, 16 hexadecimal digits>     records that the disk (or persistent memory) holds; the last one that is there, durably
//! record <n> <hash>              each `flush`-th: it and all before it are durable, a flush says so
//! done <n> <hash>                after record `count`, flushed, then the machine powers off
//! ```
//! or `chain broken at record <n> <what> <16 hexadecimal digits>` and an end with code 1, `what` being `its slot holds` (another
//! record's number, or 0 for none), `hash` (it is not that of the chain), or `device status` (it refused a request).
//!
//! # On the disk
//! Record n lies in slot (n - 1) mod `slots`, `size` bytes each from the disk's first on. Its hash is h(n) = fold(h(n - 1), n), with
//! [`crate::chain::fold`]. Each of its sectors holds, in words of 8 bytes, little-endian: [`MAGIC`]; n; h(n); i, the sector's number in the record;
//! and 60 times fold(h(n), i). So a record is whole or is none, whichever of its sectors came to the disk.
//!
//! Before a slot is overwritten it is read: it must hold what the guest's memory says, also if that is no record. At its start, knowing nothing, the
//! guest reads all slots. What it finds it takes to have been flushed up to the last multiple of `flush` before the greatest number; all of that must
//! be there, as links of one chain, but for those whose slots twice `flush` records behind it may have been on their way to. What follows it without a gap it takes, too, and makes durable.

use std::io;

use crate::banner::{Banner, BannerError};
use crate::chain::{ChainError, fold};
use crate::transcript::Extent;

const SEED: u64 = 0x0070_6572_6475_7265;
const SECTOR: usize = 512;
const WORD: usize = 8;
/// Of the records' `flush`, the ring holds as many at least.
const LEAST_FLUSHES: u64 = 8;
/// The name of the guest.
const GUEST: &str = "records";

/// What each sector of a record begins with: `p:record`, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"p:record");
/// Greatest number of slots.
pub const MAX_SLOTS: u64 = 65536;
/// Greatest number of records that is recomputed.
pub const MAX_RECORDS: u64 = 1 << 28;

/// The last record that is durable, as whole lines of `output` tell.
#[must_use]
pub fn acknowledged(output: &str) -> Option<u64> {
    output.split_inclusive('\n').rev().find_map(|line| {
        let words: Vec<&str> = line.strip_suffix('\n')?.split(' ').collect();
        match words[..] {
            ["record" | "done", number, _] | ["slots", _, "found", number, _] => number.parse().ok(),
            _ => None,
        }
    })
}

/// The last record that the guest found on its disk as it began, where `output` is its beginning.
#[must_use]
pub fn found(output: &str) -> Option<u64> {
    Banner::parse(GUEST, output).and_then(|_| second_line(output)).ok().map(|(_, found)| found)
}

/// Hashes of the records from 1 on.
fn hashes() -> impl Iterator<Item = (u64, u64)> {
    (1..).scan(SEED, |hash, number| {
        *hash = fold(*hash, number);
        Some((number, *hash))
    })
}

fn hash_of(number: u64) -> u64 {
    (1..=number).fold(SEED, fold)
}

/// The record whose bytes these are, number and hash; `None` if they are no whole one.
fn examine(bytes: &[u8]) -> Option<(u64, u64)> {
    let words = |sector: &[u8]| -> Vec<u64> {
        let (words, _) = sector.as_chunks::<WORD>();
        words.iter().map(|word| u64::from_le_bytes(*word)).collect()
    };
    let first = words(bytes.get(..SECTOR)?);
    let (&number, &hash) = (first.get(1)?, first.get(2)?);
    let whole = bytes.chunks(SECTOR).zip(0..).all(|(sector, index)| match words(sector).split_at_checked(4) {
        Some((head, rest)) => {
            head == [MAGIC, number, hash, index] && rest.iter().all(|word| *word == fold(hash, index))
        }
        None => false,
    });
    (whole && number > 0).then_some((number, hash))
}

/// What is in the slots of a disk: number and hash each of a whole record.
pub type Slots = Vec<Option<(u64, u64)>>;

/// A record that was told to be durable, and is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its slot holds another one, or none.
    #[error("record {number} was told to be durable, and its slot of the disk holds {}", found.map_or("no whole record".to_owned(), |found| format!("record {found}")))]
    Lost {
        /// Its number.
        number: u64,
        /// The one that is there.
        found: Option<u64>,
    },
    /// There is one that cannot have been written yet.
    #[error("the disk holds record {number}, and {written} is the last that its guest can have written")]
    Ahead {
        /// Its number.
        number: u64,
        /// See [`Ring::written_after`].
        written: u64,
    },
    /// It is there, and no link of the chain.
    #[error("record {number} of the disk has the hash {found:016x}, and {expected:016x} is that of the chain")]
    Altered {
        /// Its number.
        number: u64,
        /// As the chain has it.
        expected: u64,
        /// As the disk has it.
        found: u64,
    },
}

/// How the records of a disk lie on it, and how many are written between two flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    slots: u64,
    size: u64,
    flush: u64,
}

impl Ring {
    /// That of the guest whose first two lines `output` begins with.
    ///
    /// # Errors
    /// [`BannerError`]: it is another guest's, or not all there.
    pub fn of(output: &str) -> Result<Self, BannerError> {
        let banner = Banner::parse(GUEST, output)?;
        let size = banner.number("size", 4096)? / SECTOR as u64 * SECTOR as u64;
        let flush = banner.number("flush", MAX_SLOTS)?;
        let (slots, _) = second_line(output)?;
        let invalid =
            |key, value: u64, limit| BannerError::Parameter { guest: GUEST, key, value: value.to_string(), limit };
        match (size, flush) {
            (0, _) => Err(invalid("size", size, 4096)),
            (_, flush) if flush == 0 || flush > slots / LEAST_FLUSHES => {
                Err(invalid("flush", flush, slots / LEAST_FLUSHES))
            }
            _ => Ok(Self { slots, size, flush }),
        }
    }

    /// Records that may be written after `acknowledged` before another one is: those of one flush, and those of the next, whose
    /// acknowledgement may be on its way.
    #[must_use]
    pub fn written_after(&self, acknowledged: u64) -> u64 {
        acknowledged.saturating_add(2 * self.flush)
    }

    /// Slots.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.slots
    }

    /// Reads all slots: `read` fills a buffer from an offset of the disk, in bytes.
    ///
    /// # Errors
    /// As `read` says.
    pub fn read(&self, mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<Slots> {
        let mut record = vec![0; usize::try_from(self.size).unwrap_or(0)];
        let mut slot = |slot: u64| {
            read(slot * self.size, &mut record)?;
            Ok(examine(&record))
        };
        (0..self.slots).map(&mut slot).collect()
    }

    /// Looks at all records up to `acknowledged` that nothing up to record `written` has taken the place of. How many these are.
    ///
    /// # Errors
    /// [`RecordError`]: the first that is not there as it was written, or one beyond `written`.
    pub fn verify(&self, slots: &Slots, acknowledged: u64, written: u64) -> Result<u64, RecordError> {
        if let Some((number, _)) = slots.iter().flatten().find(|(number, _)| *number > written) {
            return Err(RecordError::Ahead { number: *number, written });
        }
        let first = written.saturating_sub(self.slots) + 1;
        let due = hashes().take_while(|(number, _)| *number <= acknowledged.min(MAX_RECORDS));
        let mut count = 0;
        for (number, expected) in due.skip_while(|(number, _)| *number < first) {
            let slot = usize::try_from((number - 1) % self.slots).ok();
            match slot.and_then(|slot| slots.get(slot)).copied().flatten() {
                Some((found, hash)) if found == number && hash == expected => count += 1,
                Some((found, hash)) if found == number => {
                    return Err(RecordError::Altered { number, expected, found: hash });
                }
                other => return Err(RecordError::Lost { number, found: other.map(|(found, _)| found) }),
            }
        }
        Ok(count)
    }
}

/// Slots, and the last record found, as the second line of `output` has it.
fn second_line(output: &str) -> Result<(u64, u64), BannerError> {
    let line = output.split_inclusive('\n').nth(1).and_then(|line| line.strip_suffix('\n'));
    let line = line.ok_or(BannerError::Missing { guest: GUEST })?;
    let invalid =
        |key, limit| BannerError::Parameter { guest: GUEST, key, value: line.chars().take(60).collect(), limit };
    let words: Vec<&str> = line.split(' ').collect();
    let &["slots", slots, "found", found, _] = &words[..] else { return Err(invalid("slots", MAX_SLOTS)) };
    let number = |word: &str, limit| word.parse().ok().filter(|number: &u64| *number <= limit);
    let slots = number(slots, MAX_SLOTS).ok_or_else(|| invalid("slots", MAX_SLOTS))?;
    Ok((slots, number(found, MAX_RECORDS).ok_or_else(|| invalid("found", MAX_RECORDS))?))
}

/// The lines that the guest prints whose first two `output` begins with, and what tells the last durable record of an output that goes so far.
pub(crate) fn due(
    output: &str,
) -> Result<(impl Iterator<Item = String> + use<>, impl Fn(&Extent) -> u64 + use<>), ChainError> {
    // It looks at its disk before it says more.
    if let Some(line) = output.lines().nth(1).filter(|line| line.starts_with("chain broken")) {
        return Err(ChainError::Broken { line: line.to_owned() });
    }
    let Ring { slots, flush, .. } = Ring::of(output)?;
    let banner = Banner::parse(GUEST, output)?;
    let (_, found) = second_line(output)?;
    let count = banner.number("count", MAX_RECORDS)?;
    let on = match banner.word("on") {
        on @ ("disk" | "pmem") => on,
        other => {
            let value = other.chars().take(40).collect();
            return Err(BannerError::Parameter { guest: GUEST, key: "on", value, limit: 0 }.into());
        }
    };
    let [hz, size, verify] =
        [("hz", u64::MAX), ("size", u64::MAX), ("verify", u64::MAX)].map(|(key, limit)| banner.number(key, limit));
    let first = format!("{GUEST} count={count} flush={flush} hz={} on={on} size={} verify={}", hz?, size?, verify?);
    let hash = hash_of(found);
    let second = format!("slots {slots} found {found} {hash:016x}");
    let lines = [first, second].into_iter().chain(Appended { number: found, hash, flush, count, done: false });
    let reached = move |extent: &Extent| match u64::try_from(extent.lines).unwrap_or(u64::MAX) {
        _ if extent.complete => count.max(found),
        0 | 1 => 0,
        2 => found,
        lines => (found / flush).saturating_add(lines - 2).saturating_mul(flush),
    };
    Ok((lines, reached))
}

/// The lines about records that are appended.
struct Appended {
    number: u64,
    hash: u64,
    flush: u64,
    count: u64,
    done: bool,
}

impl Iterator for Appended {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if self.count != 0 && self.number >= self.count {
                let done = std::mem::replace(&mut self.done, true);
                return (!done).then(|| format!("done {} {:016x}", self.number, self.hash));
            }
            if self.number >= MAX_RECORDS {
                return None;
            }
            self.number += 1;
            self.hash = fold(self.hash, self.number);
            if self.number.is_multiple_of(self.flush) {
                return Some(format!("record {} {:016x}", self.number, self.hash));
            }
        }
    }
}

#[cfg(test)]
#[path = "records/tests.rs"]
mod tests;
