//! The record: what a process did to files, in the order in which it was done.
//!
//! Frames, one after the other, native byte order (the record does not outlive the machine's run): length of the rest in 4 bytes, kind in 1,
//! three numbers of 8 bytes, payload. A frame is appended by one `write`; the last one may be torn by the end of its process, and
//! is left out then. Several processes may append to one record.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Numbers: handle, [`crate::OpenMode`] as [`mode_number`] has it. Payload: path.
    Open,
    /// Numbers: new handle, the handle whose file it is.
    Again,
    /// Numbers: handle, offset. Payload: bytes.
    Write,
    /// As `Write`, and durable.
    WriteDurable,
    /// Numbers: handle, length.
    SetLen,
    /// Numbers: handle, offset, length.
    Allocate,
    /// As `Allocate`.
    PunchHole,
    /// As `Allocate`.
    Zero,
    /// A sync begins. Numbers: handle, number of the sync.
    Sync,
    /// Numbers: -, number of the sync. Payload: path.
    SyncDir,
    /// A sync returned without error. Numbers: -, its number.
    Synced,
    /// Numbers: length of the first path. Payload: two paths.
    Rename,
    /// Payload: path.
    RemoveFile,
    /// Payload: path.
    CreateDirAll,
    /// Payload: path.
    RemoveDir,
    /// A crash point was passed. Numbers: its place among [`super::point::Point::ALL`].
    Point,
}

const KINDS: [Kind; 16] = [
    Kind::Open,
    Kind::Again,
    Kind::Write,
    Kind::WriteDurable,
    Kind::SetLen,
    Kind::Allocate,
    Kind::PunchHole,
    Kind::Zero,
    Kind::Sync,
    Kind::SyncDir,
    Kind::Synced,
    Kind::Rename,
    Kind::RemoveFile,
    Kind::CreateDirAll,
    Kind::RemoveDir,
    Kind::Point,
];

/// Bytes of a frame before its payload, its length left out.
const FIXED: usize = 1 + 3 * 8;

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) kind: Kind,
    pub(super) numbers: [u64; 3],
    pub(super) payload: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The frame of an entry.
    pub(super) fn encode(kind: Kind, numbers: [u64; 3], payload: &[&[u8]]) -> Vec<u8> {
        let length = FIXED + payload.iter().map(|part| part.len()).sum::<usize>();
        let mut frame = Vec::with_capacity(4 + length);
        frame.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        frame.push(kind as u8);
        numbers.iter().for_each(|number| frame.extend_from_slice(&number.to_ne_bytes()));
        payload.iter().for_each(|part| frame.extend_from_slice(part));
        frame
    }

    /// All whole entries of a record.
    pub(super) fn all(mut record: &'a [u8]) -> Vec<Self> {
        let mut entries = Vec::new();
        while let Some((entry, rest)) = Self::first(record) {
            entries.push(entry);
            record = rest;
        }
        entries
    }

    fn first(record: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (length, rest) = record.split_first_chunk::<4>()?;
        let (frame, rest) = rest.split_at_checked(usize::try_from(u32::from_ne_bytes(*length)).ok()?)?;
        let (kind, frame) = frame.split_first()?;
        let kind = *KINDS.get(usize::from(*kind))?;
        let (a, frame) = frame.split_first_chunk::<8>()?;
        let (b, frame) = frame.split_first_chunk::<8>()?;
        let (c, payload) = frame.split_first_chunk::<8>()?;
        let numbers = [a, b, c].map(|number| u64::from_ne_bytes(*number));
        Some((Self { kind, numbers, payload }, rest))
    }

    /// The payload as a path.
    pub(super) fn path(&self) -> PathBuf {
        path(self.payload)
    }

    /// The payload as two paths.
    pub(super) fn two_paths(&self) -> Option<(PathBuf, PathBuf)> {
        let (a, b) = self.payload.split_at_checked(usize::try_from(self.numbers[0]).ok()?)?;
        Some((path(a), path(b)))
    }
}

fn path(bytes: &[u8]) -> PathBuf {
    Path::new(std::ffi::OsStr::from_bytes(bytes)).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_a_torn_one_is_left_out() {
        let mut record = Entry::encode(Kind::Write, [7, 4096, 0], &[b"hello"]);
        record.extend(Entry::encode(Kind::Rename, [2, 0, 0], &[b"/a", b"/b"]));
        let whole = record.len();
        record.extend(Entry::encode(Kind::Synced, [0, 9, 0], &[]));
        let all = Entry::all(&record);
        assert_eq!(all.len(), 3);
        assert_eq!((all[0].kind, all[0].numbers, all[0].payload), (Kind::Write, [7, 4096, 0], &b"hello"[..]));
        assert_eq!(all[1].two_paths().unwrap(), (PathBuf::from("/a"), PathBuf::from("/b")));
        for end in whole..record.len() {
            assert_eq!(Entry::all(&record[..end]).len(), 2, "{end}");
        }
    }

    #[test]
    fn each_kind_is_found_at_its_number() {
        for (number, kind) in KINDS.into_iter().enumerate() {
            assert_eq!(kind as usize, number);
        }
    }
}
