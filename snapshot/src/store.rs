//! The store: opening it, asking it, and the few changes that are one record.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vfs::cut::point::{Point, pass};
use vfs::{OpenMode, Vfs, VfsFile};

use crate::archive::Archive;
use crate::codec::Compression;
use crate::dedup::DedupIndex;
use crate::error::StoreError;
use crate::generation::{Generation, GenerationId, PAGE_SIZE, check_label};
use crate::layout::Layout;
use crate::ledger::{Ledger, State};
use crate::pack::{Packs, sync_dir};
use crate::record::{PURGE_MAX, Record};
use crate::retention::{Candidate, Reason, RetentionPolicy, Verdict};
use crate::sweep::Swept;

const LOCK: &str = "lock";
const PACKS: &str = "packs";

/// What to do with a page whose every copy is damaged, in an eager restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Integrity {
    /// Stop the restore.
    #[default]
    Fail,
    /// Leave the page out, name it in the report, and go on.
    Warn,
}

/// How a store is used. Nothing of this is written down; two openings may differ.
#[derive(Debug, Clone)]
pub struct Options {
    /// How new pages are stored.
    pub compression: Compression,
    /// How many generations may lean on one stored copy of a page before another copy is written. `None`: any number.
    ///
    /// Counted along a line of descent. Every page is looked at once in half as many generations, so that the
    /// work is spread evenly: about 1/(0.75 × redundancy) of all pages is written again with each generation.
    pub redundancy: Option<NonZeroU32>,
    /// Bytes of data packs over which the pages of a new generation may be spread, in per cent of their own bytes. Where small changes have
    /// spread them further, the generation has some of them written once more, side by side, so that it is restored as quickly as the
    /// first one. At most four bytes are copied for one that changed; uniformly scattered changes need about 2.8
    /// at 115 per cent, others less. `None`: nothing is copied.
    pub spread: Option<NonZeroU32>,
    /// Bytes of a data pack that are looked at as one for that: pieces of about that size is what a restore reads. A generation of less than
    /// 16 of them is left as it is.
    pub segment_bytes: u64,
    /// Bytes gathered before they are written, for each kind of pack. Twice that is held in memory.
    pub bufsize: usize,
    /// Pages that the index of equal pages remembers (40 bytes each). 0: only pages equal to the same page of the parent, or to one in
    /// the same batch, are stored once.
    pub dedup_pages: usize,
    /// Threads that hash, compress, verify and sync. With 1 everything happens in one order, always the same.
    pub threads: usize,
    /// What an eager restore does with a page that is lost.
    pub integrity: Integrity,
    /// Bytes from which on a data pack is full.
    pub data_pack_bytes: u64,
    /// Bytes from which on an archive pack is full.
    pub archive_pack_bytes: u64,
    /// A sweep is due when purged generations had stored more than this many per cent of what is stored. See [`Store::sweep_is_due`].
    pub threshold: u32,
    /// How long a writer waits for another one to finish.
    pub lock_wait: Duration,
    /// The identity of a store that is made by this opening; random if `None`.
    pub store_id: Option<[u8; 16]>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            compression: Compression::None,
            redundancy: None,
            spread: NonZeroU32::new(115),
            segment_bytes: 1 << 20,
            bufsize: 4 << 20,
            dedup_pages: 1 << 20,
            threads: std::thread::available_parallelism().map_or(1, |count| count.get().min(4)),
            integrity: Integrity::Fail,
            data_pack_bytes: 256 << 20,
            archive_pack_bytes: 64 << 20,
            threshold: 25,
            lock_wait: Duration::from_secs(10),
            store_id: None,
        }
    }
}

/// What a store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Generations, over all lineages.
    pub generations: u64,
    /// Bytes of pages that these generations added.
    pub page_bytes: u64,
    /// Bytes of archive that they added, both mirrors counted.
    pub archive_bytes: u64,
    /// Bytes that purged generations had added, and that no sweep has looked for since. Some of them may still be in use.
    pub unswept_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) dir: PathBuf,
    pub(crate) vfs: Arc<dyn Vfs>,
    pub(crate) options: Options,
    pub(crate) packs: Arc<Packs>,
    pub(crate) archive: Archive,
    pub(crate) ledger: Ledger,
    pub(crate) dedup: Mutex<DedupIndex>,
    /// Where the generation lies that this handle wrote last.
    pub(crate) layout: Mutex<Option<Layout>>,
    /// What the last sweep by this handle found alive, so that the next one need not punch the same holes.
    pub(crate) swept: Mutex<Swept>,
    state: Mutex<Arc<State>>,
    poisoned: AtomicBool,
}

/// A store of generations. Clones share it.
///
/// # Why it is as it is
///
/// * **Nothing committed is overwritten.** Packs are appended to from block to block; a record in the ledger is appended; a
///   repair builds a new file and renames it over the damaged one. So a crash has nothing to tear.
/// * **One commit point.** Pages, then archive, are written and synced; then one slot of the ledger makes all of it count.
/// * **Reference counts do not exist.** What is alive is what the generations in the ledger reach ([`Store::sweep`] walks it,
///   each shared subtree once). A purge is one record; space returns with the next sweep, which punches dead pages out of
///   their packs where they lie and removes packs that are dead whole: it moves nothing, so it can lose nothing.
/// * **Reading is lock-free.** A reader needs the ledger as it was when it looked, and packs that only grow. Writers,
///   sweeps and repairs take turns by an exclusive lock on the file `lock`, which dies with its holder; several processes
///   (a VM and its forks) may share a store.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// Held by whoever changes the store; released on drop.
#[derive(Debug)]
pub(crate) struct WriteLock {
    _file: Box<dyn VfsFile>,
}

impl Store {
    /// Opens the store in `dir`, and makes it if there is none.
    ///
    /// Reads the ledger only: the time depends on the number of generations (some microseconds each), not on what they hold.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if neither ledger can be read, [`StoreError::Io`].
    pub fn open(vfs: Arc<dyn Vfs>, dir: &Path, options: Options) -> Result<Self, StoreError> {
        let store = Self::attach(vfs, dir, options)?;
        if !store.inner.ledger.exists()? {
            store.create()?;
        }
        store.refresh()?;
        Ok(store)
    }

    /// Opens the store in `dir`, which must be there.
    ///
    /// # Errors
    /// As [`Store::open`]; [`StoreError::NotAStore`] if there is none.
    pub fn open_existing(vfs: Arc<dyn Vfs>, dir: &Path, options: Options) -> Result<Self, StoreError> {
        let store = Self::attach(vfs, dir, options)?;
        if !store.inner.ledger.exists()? {
            return Err(StoreError::NotAStore { path: dir.to_owned(), why: "there is no ledger in it".into() });
        }
        store.refresh()?;
        Ok(store)
    }

    fn attach(vfs: Arc<dyn Vfs>, dir: &Path, mut options: Options) -> Result<Self, StoreError> {
        options.threads = options.threads.clamp(1, 64);
        options.bufsize = options.bufsize.clamp(1 << 16, 1 << 30) & !0xFFF;
        options.segment_bytes = options.segment_bytes.clamp(PAGE_SIZE as u64, 1 << 30);
        options.data_pack_bytes = options.data_pack_bytes.clamp(1 << 16, 1 << 37);
        options.archive_pack_bytes = options.archive_pack_bytes.clamp(1 << 16, 1 << 37);
        let packs = Arc::new(Packs::new(Arc::clone(&vfs), dir.join(PACKS)));
        let inner = Inner {
            dir: dir.to_owned(),
            archive: Archive::new(Arc::clone(&packs)),
            ledger: Ledger::new(Arc::clone(&vfs), dir.to_owned(), options.threads),
            dedup: Mutex::new(DedupIndex::new(options.dedup_pages)),
            layout: Mutex::default(),
            swept: Mutex::default(),
            state: Mutex::new(Arc::new(State::empty())),
            poisoned: AtomicBool::new(false),
            vfs,
            options,
            packs,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn create(&self) -> Result<(), StoreError> {
        let Inner { vfs, dir, packs, .. } = &*self.inner;
        vfs.create_dir_all(&packs.dir).map_err(StoreError::io("create the directory", &packs.dir))?;
        let _lock = self.lock()?;
        if self.inner.ledger.exists()? {
            return Ok(());
        }
        // The names of the directories above, some of which may have been made just now, by this or by an attempt that died.
        for (distance, above) in dir.ancestors().skip(1).enumerate().filter(|(_, path)| !path.as_os_str().is_empty()) {
            let synced = sync_dir(&**vfs, above);
            // Far up there may be directories that one may pass and not read; those were there before.
            if distance == 0 {
                synced?;
            }
        }
        sync_dir(&**vfs, dir)?;
        self.inner.ledger.create(self.inner.options.store_id.unwrap_or_else(random_id))
    }

    /// Waits for the lock, within reason.
    pub(crate) fn lock(&self) -> Result<WriteLock, StoreError> {
        let Inner { vfs, dir, options, .. } = &*self.inner;
        self.check_poison()?;
        let path = dir.join(LOCK);
        let file = vfs.open(&path, OpenMode::OpenOrCreate).map_err(StoreError::io("open the lock", &path))?;
        let deadline = Instant::now() + options.lock_wait;
        loop {
            if file.try_lock().map_err(StoreError::io("lock", &path))? {
                return Ok(WriteLock { _file: file });
            }
            if Instant::now() >= deadline {
                return Err(StoreError::Busy { path: dir.clone() });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn check_poison(&self) -> Result<(), StoreError> {
        if self.inner.poisoned.load(Ordering::Acquire) {
            return Err(StoreError::Poisoned { path: self.inner.dir.clone() });
        }
        Ok(())
    }

    /// From now on this handle refuses to write: nobody knows what a failed sync left.
    pub(crate) fn poison(&self) {
        self.inner.poisoned.store(true, Ordering::Release);
    }

    pub(crate) fn layout(&self) -> MutexGuard<'_, Option<Layout>> {
        self.inner.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_guard(&self) -> MutexGuard<'_, Arc<State>> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ledger as this handle knows it.
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state_guard())
    }

    pub(crate) fn set_state(&self, state: State) {
        *self.state_guard() = Arc::new(state);
    }

    /// Looks what other processes have committed or purged since.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn refresh(&self) -> Result<(), StoreError> {
        let known = self.state();
        if known.slots == 0 || !self.inner.ledger.is_current(&known)? {
            self.set_state(self.inner.ledger.load()?);
        }
        Ok(())
    }

    /// The ledger as it is, in two equal copies. The caller holds the lock.
    pub(crate) fn current(&self) -> Result<State, StoreError> {
        self.refresh()?;
        let mut state = (*self.state()).clone();
        if state.unequal {
            self.inner.ledger.rewrite(&mut state).inspect_err(|_| self.poison())?;
            self.set_state(state.clone());
        }
        Ok(state)
    }

    /// Appends to the ledger. The caller holds the lock and got `state` from [`Store::current`].
    ///
    /// The second value of an error: whether the records are certainly not there.
    pub(crate) fn record(&self, state: &mut State, records: Vec<Record>) -> Result<(), (StoreError, bool)> {
        self.inner.ledger.append(state, records).inspect_err(|(_, undone)| {
            if !undone {
                self.poison();
            }
        })?;
        self.set_state(state.clone());
        Ok(())
    }

    fn change(&self, records: impl FnOnce(&State) -> Result<Vec<Record>, StoreError>) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let mut state = self.current()?;
        let records = records(&state)?;
        if records.is_empty() { Ok(()) } else { self.record(&mut state, records).map_err(|(error, _)| error) }
    }

    /// The lineages that have generations.
    #[must_use]
    pub fn lineages(&self) -> Vec<String> {
        self.state().generations.keys().cloned().collect()
    }

    /// The generations of `lineage`, the oldest first.
    #[must_use]
    pub fn generations(&self, lineage: &str) -> Vec<Generation> {
        let state = self.state();
        state.generations.get(lineage).into_iter().flat_map(BTreeMap::values).map(|found| found.info.clone()).collect()
    }

    /// The newest generation of `lineage`.
    #[must_use]
    pub fn newest(&self, lineage: &str) -> Option<Generation> {
        let state = self.state();
        state.generations.get(lineage)?.last_key_value().map(|(_, found)| found.info.clone())
    }

    /// One generation.
    ///
    /// # Errors
    /// [`StoreError::NoSuchGeneration`].
    pub fn generation(&self, id: &GenerationId) -> Result<Generation, StoreError> {
        Ok(self.state().find(id)?.info.clone())
    }

    /// What the store holds, from the ledger alone.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.state();
        let mut usage = Usage { unswept_bytes: state.unswept, ..Usage::default() };
        for committed in state.generations.values().flat_map(BTreeMap::values) {
            usage.generations += 1;
            usage.page_bytes = usage.page_bytes.saturating_add(committed.info.page_bytes_stored);
            usage.archive_bytes =
                usage.archive_bytes.saturating_add(committed.info.archive_bytes_stored.saturating_mul(2));
        }
        usage
    }

    /// Whether purged generations had stored so much that a [`Store::sweep`] is worth its walk.
    #[must_use]
    pub fn sweep_is_due(&self) -> bool {
        let usage = self.usage();
        let stored = usage.page_bytes.saturating_add(usage.archive_bytes).saturating_add(usage.unswept_bytes);
        usage.unswept_bytes > 0
            && u128::from(usage.unswept_bytes) * 100 >= u128::from(stored) * u128::from(self.inner.options.threshold)
    }

    /// Protects a generation from being deleted, or no longer.
    ///
    /// # Errors
    /// [`StoreError::NoSuchGeneration`], [`StoreError::Busy`], [`StoreError::Io`].
    pub fn protect(&self, id: &GenerationId, protected: bool) -> Result<(), StoreError> {
        self.change(|state| {
            let label = state.find(id)?.info.label.clone();
            Ok(vec![Record::Update { id: id.clone(), label, protected }])
        })
    }

    /// Labels a generation, or takes its label away.
    ///
    /// # Errors
    /// As [`Store::protect`]; [`StoreError::Invalid`] for a label that is too long.
    pub fn label(&self, id: &GenerationId, label: Option<&str>) -> Result<(), StoreError> {
        check_label(label)?;
        self.change(|state| {
            let protected = state.find(id)?.info.protected;
            Ok(vec![Record::Update { id: id.clone(), label: label.map(str::to_owned), protected }])
        })
    }

    /// Deletes generations: up to 400 of a lineage in one step, more in several. Their space returns with the next [`Store::sweep`].
    ///
    /// # Errors
    /// [`StoreError::NoSuchGeneration`], [`StoreError::Protected`], [`StoreError::Busy`], [`StoreError::Io`].
    pub fn purge(&self, ids: &[GenerationId]) -> Result<(), StoreError> {
        pass(Point::PurgeRecord);
        self.change(|state| {
            let mut lineages: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
            for id in ids {
                if state.find(id)?.info.protected {
                    return Err(StoreError::Protected { id: id.clone() });
                }
                lineages.entry(&id.lineage).or_default().push(id.number);
            }
            let purge = |(lineage, numbers): (&str, Vec<u64>)| {
                let one = |numbers: &[u64]| Record::Purge { lineage: lineage.to_owned(), numbers: numbers.to_vec() };
                numbers.chunks(PURGE_MAX).map(one).collect::<Vec<_>>()
            };
            Ok(lineages.into_iter().flat_map(purge).collect())
        })
    }

    /// What `policy` says of each generation of `lineage` at `now_ms`; nothing is deleted.
    #[must_use]
    pub fn judge(&self, lineage: &str, policy: &RetentionPolicy, now_ms: u64) -> Vec<Verdict> {
        let candidates: Vec<Candidate> = self.generations(lineage).iter().map(Candidate::from).collect();
        policy.judge(&candidates, now_ms)
    }

    /// Deletes what `policy` does not keep. Returns what was deleted, and why.
    ///
    /// # Errors
    /// As [`Store::purge`].
    pub fn retain(
        &self,
        lineage: &str,
        policy: &RetentionPolicy,
        now_ms: u64,
    ) -> Result<Vec<(GenerationId, Reason)>, StoreError> {
        self.refresh()?;
        let doomed: Vec<(GenerationId, Reason)> = self
            .judge(lineage, policy, now_ms)
            .into_iter()
            .filter(|verdict| !verdict.keep)
            .map(|verdict| (GenerationId::new(lineage, verdict.number), verdict.reason))
            .collect();
        let ids: Vec<GenerationId> = doomed.iter().map(|(id, _)| id.clone()).collect();
        if !ids.is_empty() {
            self.purge(&ids)?;
        }
        Ok(doomed)
    }
}

/// An identity for a new store, from the randomness that the standard library keys its hash maps with.
fn random_id() -> [u8; 16] {
    let half = || std::hash::RandomState::new().build_hasher().finish();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&half().to_le_bytes());
    id[8..].copy_from_slice(&half().to_le_bytes());
    id
}
