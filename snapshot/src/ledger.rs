//! The ledger: which generations there are. Two files with equal slots; a record counts if either has it whole.
//!
//! A commit appends its slot to both and syncs both. The slot is the root of everything that the generation is, and all
//! of that was durable before, so a cut finds either the generation or none of it. A slot never shares a disk block
//! with another and is never written again. A rewrite (to drop what was purged, or to make the two equal again) builds a
//! new file beside and renames it over the old one, first `ledger-a`, then `ledger-b`; the epoch tells which is younger.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use vfs::{OpenMode, Vfs, VfsFile};

use crate::error::StoreError;
use crate::fault::seeded;
use crate::generation::GenerationId;
use crate::pack::{run_all, sync_dir};
use crate::record::{Committed, Ends, Record, SLOT, Slot, VERSION, foreign_version};

/// The two copies.
pub(crate) const FILES: [&str; 2] = ["ledger-a", "ledger-b"];
/// The ending of a file that is being built.
pub(crate) const UNFINISHED: &str = ".new";
/// Bytes read at a time.
const READ: usize = 256 * SLOT;

/// What became of one slot of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    Good(Slot),
    /// All zero: skipped, or never written.
    Blank,
    Bad,
}

/// The content of one ledger file.
#[derive(Debug, Clone, Default)]
struct Copy {
    present: bool,
    length: u64,
    slots: Vec<Found>,
    /// A slot of another version of the format was met.
    foreign: Option<u16>,
}

impl Copy {
    fn epoch(&self) -> Option<u64> {
        match self.slots.first() {
            Some(Found::Good(Slot { record: Record::Header { epoch, .. }, .. })) => Some(*epoch),
            _ => None,
        }
    }
}

/// A bad slot of a ledger file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadSlot {
    /// 0 or 1: index in [`FILES`].
    pub(crate) file: usize,
    pub(crate) slot: u64,
    /// Whether the other file has it.
    pub(crate) healable: bool,
}

/// All that the ledger says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) store: [u8; 16],
    pub(crate) epoch: u64,
    /// The last sequence number given out.
    pub(crate) sequence: u64,
    /// By lineage and number.
    pub(crate) generations: BTreeMap<String, BTreeMap<u64, Arc<Committed>>>,
    /// The next number of each lineage.
    pub(crate) next: BTreeMap<String, u64>,
    pub(crate) ends: Ends,
    /// Length of each file, to see whether anybody appended.
    pub(crate) lengths: [u64; 2],
    /// Slots in the longer file.
    pub(crate) slots: u64,
    pub(crate) bad: Vec<BadSlot>,
    /// Committed records that neither file has whole any more.
    pub(crate) lost: u64,
    /// Bytes that purged generations had stored, and that no sweep has looked for since.
    pub(crate) unswept: u64,
    /// The files are not equal: the next writer rewrites them.
    pub(crate) unequal: bool,
}

impl State {
    /// What is known before the ledger is read.
    pub(crate) fn empty() -> Self {
        Self {
            store: [0; 16],
            epoch: 0,
            sequence: 0,
            generations: BTreeMap::new(),
            next: BTreeMap::new(),
            ends: Ends::default(),
            lengths: [0; 2],
            slots: 0,
            bad: Vec::new(),
            lost: 0,
            unswept: 0,
            unequal: true,
        }
    }

    pub(crate) fn get(&self, id: &GenerationId) -> Option<&Arc<Committed>> {
        self.generations.get(&id.lineage)?.get(&id.number)
    }

    pub(crate) fn find(&self, id: &GenerationId) -> Result<&Arc<Committed>, StoreError> {
        self.get(id).ok_or_else(|| StoreError::NoSuchGeneration { id: id.clone() })
    }

    /// All generations, the newest commit first.
    pub(crate) fn newest_first(&self) -> Vec<Arc<Committed>> {
        let mut all: Vec<_> = self.generations.values().flat_map(|lineage| lineage.values().cloned()).collect();
        all.sort_by_key(|committed| std::cmp::Reverse(committed.info.sequence));
        all
    }

    /// How many generations there are.
    pub(crate) fn count(&self) -> usize {
        self.generations.values().map(BTreeMap::len).sum()
    }

    /// Slots that a rewrite would need.
    fn needed(&self) -> u64 {
        (2 + self.next.len() + self.count()) as u64
    }

    /// Whether a rewrite would make the ledger much shorter.
    pub(crate) fn is_wasteful(&self) -> bool {
        self.slots > 64 + 2 * self.needed()
    }

    fn apply(&mut self, slot: Slot) {
        self.sequence = self.sequence.max(slot.sequence);
        match slot.record {
            // The younger epoch's header comes last, and before anything purged since.
            Record::Header { unswept, .. } => self.unswept = unswept,
            Record::Generation(committed) => {
                let id = &committed.info.id;
                let next = self.next.entry(id.lineage.clone()).or_insert(1);
                *next = (*next).max(id.number.saturating_add(1));
                self.ends = committed.ends;
                self.generations.entry(id.lineage.clone()).or_default().insert(id.number, Arc::from(committed));
            }
            Record::Purge { lineage, numbers } => {
                if let Some(generations) = self.generations.get_mut(&lineage) {
                    let forgotten = usize::from(seeded("a purge forgets the first of its generations"));
                    for gone in numbers.iter().skip(forgotten).filter_map(|number| generations.remove(number)) {
                        let bytes = gone.info.page_bytes_stored.saturating_add(gone.info.archive_bytes_stored);
                        self.unswept = self.unswept.saturating_add(bytes);
                    }
                    if generations.is_empty() {
                        self.generations.remove(&lineage);
                    }
                }
            }
            Record::Update { id, label, protected } => {
                let found = self.generations.get_mut(&id.lineage).and_then(|lineage| lineage.get_mut(&id.number));
                if let Some(committed) = found {
                    let committed = Arc::make_mut(committed);
                    (committed.info.label, committed.info.protected) = (label, protected);
                }
            }
            Record::Floor { lineage, next } => {
                let known = self.next.entry(lineage).or_insert(1);
                *known = (*known).max(next);
            }
            Record::Resume(ends) => self.ends = ends,
        }
    }
}

/// The two files.
#[derive(Debug)]
pub(crate) struct Ledger {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    threads: usize,
}

impl Ledger {
    pub(crate) fn new(vfs: Arc<dyn Vfs>, dir: PathBuf, threads: usize) -> Self {
        Self { vfs, dir, threads }
    }

    pub(crate) fn path(&self, file: usize) -> PathBuf {
        self.dir.join(FILES[file])
    }

    /// Whether there is a ledger.
    pub(crate) fn exists(&self) -> Result<bool, StoreError> {
        for file in 0..FILES.len() {
            let path = self.path(file);
            if self.vfs.entry_kind(&path).map_err(StoreError::io("look for", &path))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the ledger of a new store.
    pub(crate) fn create(&self, store: [u8; 16]) -> Result<(), StoreError> {
        let header =
            Slot { store, sequence: 0, record: Record::Header { epoch: 1, slots: 1, lost: 0, unswept: 0 } }.encode();
        for file in 0..FILES.len() {
            self.replace(file, &header)?;
        }
        Ok(())
    }

    /// Builds a file beside and renames it into place.
    fn replace(&self, file: usize, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(file);
        let unfinished = self.dir.join(format!("{}{UNFINISHED}", FILES[file]));
        let handle =
            self.vfs.open(&unfinished, OpenMode::CreateTruncate).map_err(StoreError::io("create", &unfinished))?;
        handle.write_all_at(bytes, 0).map_err(StoreError::io("write", &unfinished))?;
        handle.sync_all().map_err(StoreError::io("sync", &unfinished))?;
        self.vfs.rename(&unfinished, &path).map_err(StoreError::io("rename a new file to", &path))?;
        sync_dir(&*self.vfs, &self.dir)
    }

    /// Reads both files and puts together what they say.
    pub(crate) fn load(&self) -> Result<State, StoreError> {
        let mut a = self.read(0)?;
        let mut b = self.read(1)?;
        let not_a_store = |why: &str| StoreError::NotAStore { path: self.dir.clone(), why: why.to_owned() };
        let store = [&a, &b]
            .iter()
            .flat_map(|copy| &copy.slots)
            .find_map(|found| if let Found::Good(slot) = found { Some(slot.store) } else { None })
            .ok_or_else(|| match a.foreign.or(b.foreign) {
                Some(version) => {
                    not_a_store(&format!("its format has version {version}, this program knows {VERSION}"))
                }
                None => not_a_store("no slot of either ledger can be read; restore them from a backup"),
            })?;
        for copy in [&mut a, &mut b] {
            for found in &mut copy.slots {
                if matches!(found, Found::Good(slot) if slot.store != store) {
                    *found = Found::Bad;
                }
            }
        }
        Ok(unite(store, a, b))
    }

    fn read(&self, file: usize) -> Result<Copy, StoreError> {
        let path = self.path(file);
        let handle = match self.vfs.open(&path, OpenMode::Read) {
            Ok(handle) => handle,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Copy::default()),
            Err(error) => return Err(StoreError::io("open", &path)(error)),
        };
        let mut copy = Copy { present: true, ..Copy::default() };
        // One slot more than there is, so that the end shows; most ledgers are short.
        let length = handle.len().map_err(StoreError::io("read the length of", &path))?;
        let slots = usize::try_from(length / SLOT as u64).unwrap_or(usize::MAX).saturating_add(2);
        let mut buffer = vec![0; slots.saturating_mul(SLOT).min(READ)];
        loop {
            let count = read_up_to(&*handle, &mut buffer, copy.length).map_err(StoreError::io("read", &path))?;
            copy.length += count as u64;
            copy.foreign = copy.foreign.or_else(|| buffer[..count].chunks(SLOT).find_map(foreign_version));
            copy.slots.extend(buffer[..count].chunks(SLOT).map(|bytes| match Slot::decode(bytes) {
                Ok(slot) => Found::Good(slot),
                Err(_) if bytes.iter().all(|byte| *byte == 0) => Found::Blank,
                Err(_) => Found::Bad,
            }));
            if count < buffer.len() {
                return Ok(copy);
            }
        }
    }

    /// Whether the files are as `state` left them, without reading them.
    pub(crate) fn is_current(&self, state: &State) -> Result<bool, StoreError> {
        let mut buffer = vec![0; SLOT];
        for (file, length) in state.lengths.iter().enumerate() {
            let path = self.path(file);
            let handle = match self.vfs.open(&path, OpenMode::Read) {
                Ok(handle) => handle,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(StoreError::io("open", &path)(error)),
            };
            if handle.len().map_err(StoreError::io("read the length of", &path))? != *length {
                return Ok(false);
            }
            let count = read_up_to(&*handle, &mut buffer, 0).map_err(StoreError::io("read", &path))?;
            match Slot::decode(&buffer[..count]) {
                Ok(Slot { store, record: Record::Header { epoch, .. }, .. })
                    if store == state.store && epoch == state.epoch => {}
                _ => return Ok(false),
            }
        }
        Ok(!state.unequal)
    }

    /// Appends records to both files and makes them durable. The caller holds the store's lock, and `state` is current.
    ///
    /// On an error the records are not there, unless taking them back failed as well: the second value says so.
    pub(crate) fn append(&self, state: &mut State, records: Vec<Record>) -> Result<(), (StoreError, bool)> {
        let certain = |error| (error, true);
        let start = state.lengths[0].max(state.lengths[1]).next_multiple_of(SLOT as u64);
        let mut slots = Vec::new();
        let mut bytes = Vec::with_capacity(records.len() * SLOT);
        for mut record in records {
            let sequence = state.sequence + 1 + slots.len() as u64;
            if let Record::Generation(committed) = &mut record {
                committed.info.sequence = sequence;
            }
            let slot = Slot { store: state.store, sequence, record };
            bytes.extend_from_slice(&slot.encode());
            slots.push(slot);
        }
        let mut handles = Vec::new();
        for file in 0..FILES.len() {
            let path = self.path(file);
            let handle =
                self.vfs.open(&path, OpenMode::ReadWrite).map_err(StoreError::io("open", &path)).map_err(certain)?;
            handles.push((handle, path));
        }
        let written = handles
            .iter()
            .try_for_each(|(handle, path)| handle.write_all_at(&bytes, start).map_err(StoreError::io("write", path)));
        if let Err(error) = written {
            let undone = handles
                .iter()
                .zip(state.lengths)
                .all(|((handle, _), length)| handle.set_len(length).and_then(|()| handle.sync_all()).is_ok());
            return Err((error, undone));
        }
        let syncs = handles.iter().map(|(handle, path)| -> Box<dyn FnOnce() -> Result<(), StoreError> + Send + '_> {
            Box::new(move || handle.sync_data().map_err(StoreError::io("sync", path)))
        });
        // Whether the records are there after a failed sync, nobody knows.
        run_all(syncs.collect(), self.threads).map_err(|error| (error, false))?;
        slots.into_iter().for_each(|slot| state.apply(slot));
        state.lengths = [start + bytes.len() as u64; 2];
        state.slots = state.lengths[0] / SLOT as u64;
        Ok(())
    }

    /// Makes everything in the files durable, whoever wrote it.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        for file in 0..FILES.len() {
            let path = self.path(file);
            let handle = self.vfs.open(&path, OpenMode::ReadWrite).map_err(StoreError::io("open", &path))?;
            handle.sync_data().map_err(StoreError::io("sync", &path))?;
        }
        Ok(())
    }

    /// Rewrites both files with what still counts.
    pub(crate) fn rewrite(&self, state: &mut State) -> Result<(), StoreError> {
        let (epoch, lost, unswept) = (state.epoch + 1, state.lost, state.unswept);
        let mut records = vec![(state.sequence, Record::Header { epoch, slots: state.needed(), lost, unswept })];
        let floors = state
            .next
            .iter()
            .filter(|_| !seeded("a rewrite forgets which numbers were given out"))
            .map(|(lineage, next)| Record::Floor { lineage: lineage.clone(), next: *next });
        records.extend(floors.chain([Record::Resume(state.ends)]).map(|record| (state.sequence, record)));
        let mut generations = state.newest_first();
        generations.reverse();
        records.extend(
            generations
                .into_iter()
                .map(|committed| (committed.info.sequence, Record::Generation(Box::new((*committed).clone())))),
        );
        let slots = records.len() as u64;
        let mut bytes = Vec::with_capacity(records.len() * SLOT);
        for (sequence, record) in records {
            bytes.extend_from_slice(&Slot { store: state.store, sequence, record }.encode());
        }
        for file in 0..FILES.len() {
            self.replace(file, &bytes)?;
        }
        state.epoch = epoch;
        state.lengths = [bytes.len() as u64; 2];
        state.slots = slots;
        state.bad.clear();
        state.unequal = false;
        Ok(())
    }
}

fn read_up_to(file: &dyn VfsFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// What two copies say together.
fn unite(store: [u8; 16], a: Copy, b: Copy) -> State {
    let lengths = [a.length, b.length];
    let slots = a.slots.len().max(b.slots.len()) as u64;
    let epochs = [a.epoch(), b.epoch()];
    let epoch = epochs.into_iter().flatten().max().unwrap_or(0);
    let mut unequal = !a.present || !b.present || a.length != b.length || epochs[0] != epochs[1];
    let mut bad = Vec::new();
    let both: [Copy; 2] = [a, b];
    for slot in 0..slots as usize {
        for file in 0..2 {
            let good = |file: usize| matches!(both[file].slots.get(slot), Some(Found::Good(_)));
            let bad_bytes = both[file].slots.get(slot) == Some(&Found::Bad);
            if bad_bytes || (!good(file) && good(1 - file)) {
                bad.push(BadSlot { file, slot: slot as u64, healable: good(1 - file) });
            }
        }
    }
    unequal |= (0..slots as usize).any(|slot| both[0].slots.get(slot) != both[1].slots.get(slot));
    unequal |= epochs[0].is_none() && slots > 0;
    let current = |copy: &Copy| copy.epoch() == Some(epoch);
    // A copy of an older epoch may hold what has been purged since: it counts only where the younger one is damaged.
    let older_counts = !both.iter().any(|copy| current(copy) && !copy.slots.contains(&Found::Bad));
    let mut order: Vec<&Copy> = both.iter().filter(|copy| older_counts || current(copy)).collect();
    order.sort_by_key(|copy| copy.epoch());
    let mut records: Vec<Slot> = order
        .iter()
        .flat_map(|copy| &copy.slots)
        .filter_map(|found| if let Found::Good(slot) = found { Some(slot.clone()) } else { None })
        .collect();
    // Stable: of one record in two versions the younger epoch's comes last. Applying one twice changes nothing.
    records.sort_by_key(|slot| slot.sequence);
    let lost = count_lost(&both, epoch);
    let mut state = State { store, epoch, lengths, slots, bad, lost, unequal, ..State::empty() };
    records.into_iter().for_each(|slot| state.apply(slot));
    state
}

/// Counts the committed records that no copy has whole any more.
fn count_lost(both: &[Copy; 2], epoch: u64) -> u64 {
    let any_current = both.iter().any(|copy| copy.epoch() == Some(epoch));
    let counted: Vec<&Copy> = both.iter().filter(|copy| !any_current || copy.epoch() == Some(epoch)).collect();
    let good = |slot: usize| {
        counted.iter().find_map(|copy| match copy.slots.get(slot) {
            Some(Found::Good(found)) => Some(found),
            _ => None,
        })
    };
    let (rewritten, mut before, mut lost) = match good(0) {
        Some(Slot { sequence, record: Record::Header { slots, lost, .. }, .. }) => (*slots as usize, *sequence, *lost),
        _ => (0, 0, 0),
    };
    let mut gap = 0;
    for slot in 1..counted.iter().map(|copy| copy.slots.len()).max().unwrap_or(0) {
        match good(slot) {
            // All slots of a rewrite held something.
            None if slot < rewritten => lost += 1,
            // An append that was cut off leaves a bad slot too, but then the numbers go on without a gap.
            None => gap += 1,
            Some(_) if slot < rewritten => {}
            Some(found) => {
                lost += found.sequence.saturating_sub(before).saturating_sub(1).min(gap);
                (before, gap) = (found.sequence, 0);
            }
        }
    }
    lost
}
