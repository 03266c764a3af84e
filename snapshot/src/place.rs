//! Where things lie in a pack, and which of them are read at once.

use std::ops::Range;

/// Most bytes of one read: whole blocks around it fit in one huge page.
const READ_MAX: u64 = (2 << 20) - 2 * 4096;
/// Bytes between pages that are read all the same, since a gap costs less than a read.
pub(crate) const PAGE_GAP: u64 = 32 << 10;
/// The same between nodes. An inner node lies behind the leaves under it: 32 KiB and more from the next one.
pub(crate) const NODE_GAP: u64 = 64 << 10;

/// Which bytes of a pack something takes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Cuts things, sorted by where they lie, into reads, with gaps of up to `gap` bytes in them.
pub(crate) fn coalesce<T>(sorted: &[T], gap: u64, place: impl Fn(&T) -> Place) -> Vec<Range<usize>> {
    let mut reads: Vec<Range<usize>> = Vec::new();
    let mut read = Place { pack: 0, start: 0, end: 0 };
    for (index, item) in sorted.iter().enumerate() {
        let place = place(item);
        let end = place.end.max(read.end);
        match reads.last_mut() {
            Some(last) if read.pack == place.pack && place.start <= read.end + gap && end - read.start <= READ_MAX => {
                last.end = index + 1;
                read.end = end;
            }
            _ => {
                reads.push(index..index + 1);
                read = place;
            }
        }
    }
    reads
}

/// The bytes from the first to the last of things that lie in one pack.
pub(crate) fn hull(places: impl IntoIterator<Item = Place>) -> Place {
    let mut places = places.into_iter();
    let first = places.next().unwrap_or(Place { pack: 0, start: 0, end: 0 });
    places.fold(first, |hull, place| Place { start: hull.start.min(place.start), end: hull.end.max(place.end), ..hull })
}
