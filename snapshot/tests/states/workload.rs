//! What is done to a store, and what may be found in it at each moment.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use snapshot::{GenerationId, NewGeneration, Options, Parent, RetentionPolicy, Store, StoreError, TransferError};
use vfs::Vfs;
use vfs::crash::CrashVfs;

use super::plain;
use crate::world::{self, CODECS, Image, dir, fill, open, page, put};

/// A generation as it must be found.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) label: Option<String>,
    pub(crate) protected: bool,
    pub(crate) context: Vec<u8>,
    /// By region.
    pub(crate) bytes: BTreeMap<String, Vec<u8>>,
}

impl Held {
    fn new(image: &Image) -> Self {
        let bytes = |seeds: &Vec<u32>| seeds.iter().flat_map(|seed| page(*seed)).collect();
        let bytes = image.regions.iter().map(|(name, seeds)| (name.clone(), bytes(seeds))).collect();
        Self { label: None, protected: false, context: image.context.clone(), bytes }
    }
}

/// All generations of a store, by lineage and number.
pub(crate) type Stage = BTreeMap<(String, u64), Held>;

/// Something done to a store. It calls the second argument when a stage is reached: from then on there is no way back.
pub(crate) type Change = dyn Fn(&Arc<dyn Vfs>, &Options, &mut dyn FnMut()) -> Result<(), StoreError> + Send + Sync;

/// An operation, and the stages that a store goes through by it.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) options: Options,
    /// What it begins with.
    pub(crate) disk: CrashVfs,
    /// The first is what was there before.
    pub(crate) stages: Vec<Stage>,
    /// Numbers of `web` up to this one were given out before.
    pub(crate) given_out: u64,
    /// The disk has rotted beforehand: what is found may need a repair.
    pub(crate) damaged: bool,
    /// The store is there beforehand.
    pub(crate) exists: bool,
    pub(crate) change: Box<Change>,
}

fn id(lineage: &str, number: u64) -> GenerationId {
    GenerationId::new(lineage, number)
}

fn key(lineage: &str, number: u64) -> (String, u64) {
    (lineage.to_owned(), number)
}

/// One order for everything, and packs as small as they may be.
fn options() -> Options {
    Options { data_pack_bytes: 64 << 10, ..world::options() }
}

/// Generations 1, 3 and 4 of `web` (2 and 5 were purged, so that there is something to sweep and a number that must not come
/// again) and `fork@1`.
struct History {
    disk: CrashVfs,
    stage: Stage,
    newest: Image,
}

const GIVEN_OUT: u64 = 5;

fn history(options: &Options) -> History {
    let disk = CrashVfs::new();
    let store = open(&plain(&disk), options).unwrap();
    let mut stage = Stage::new();
    let mut newest = Image::new(&[("disk", 2), ("ram", 34)]);
    for number in 1..=GIVEN_OUT as u32 {
        let mut image = newest.clone();
        // One that has a block of the archive to itself, so that nothing else keeps it alive.
        image.context = vec![number as u8; if number == 3 { 4500 } else { 40 }];
        let puts =
            [put("ram", u64::from(number), 2 * number + 1), put("ram", 33, 20 + number), put("disk", 0, 41 + number)];
        let (id, made) =
            world::commit(&store, "web", Parent::Newest, &image, &puts[..if number < 4 { 3 } else { 1 }]).unwrap();
        stage.insert((id.lineage, id.number), Held::new(&made));
        if number < GIVEN_OUT as u32 {
            newest = made;
        }
    }
    store.fork(&id("web", 3), "fork", 9).unwrap();
    stage.insert(key("fork", 1), stage[&key("web", 3)].clone());
    store.purge(&[id("web", 2), id("web", 5)]).unwrap();
    [2, 5].iter().for_each(|gone| drop(stage.remove(&key("web", *gone))));
    drop(store);
    History { disk: disk.after_cut(0), stage, newest }
}

/// Builds a workload on that history.
fn workload(name: &'static str, options: Options, history: History, then: Vec<Stage>, change: Box<Change>) -> Workload {
    let stages = std::iter::once(history.stage).chain(then).collect();
    Workload { name, options, disk: history.disk, stages, given_out: GIVEN_OUT, damaged: false, exists: true, change }
}

fn without(stage: &Stage, gone: &[(&str, u64)]) -> Stage {
    let mut left = stage.clone();
    gone.iter().for_each(|(lineage, number)| drop(left.remove(&key(lineage, *number)).unwrap()));
    left
}

fn with(stage: &Stage, lineage: &str, number: u64, held: Held) -> Stage {
    let mut more = stage.clone();
    assert!(more.insert(key(lineage, number), held).is_none());
    more
}

/// A change that is one call.
fn once(call: impl Fn(&Store) -> Result<(), StoreError> + Send + Sync + 'static) -> Box<Change> {
    Box::new(move |vfs, options, reached| {
        call(&open(vfs, options)?)?;
        reached();
        Ok(())
    })
}

/// Six pages, one of which the store has already and one of which is zero; and a generation of them.
fn commit(store: &Store, base: &Image) -> Result<Image, StoreError> {
    let puts = [
        put("ram", 0, 101),
        put("ram", 7, 102),
        put("ram", 32, 103),
        put("ram", 33, 0),
        put("disk", 1, 101),
        put("disk", 0, 104),
    ];
    let image = Image { context: b"the next context".to_vec(), ..base.clone() };
    let mut writer = store.begin(NewGeneration::automatic("web", 1000))?;
    let image = fill(&mut writer, &image, &puts)?;
    writer.commit()?;
    Ok(image)
}

fn snapshot(name: &'static str, options: Options) -> Workload {
    let history = history(&options);
    let scratch = history.disk.after_kill();
    let made = commit(&open(&plain(&scratch), &options).unwrap(), &history.newest).unwrap();
    let after = with(&history.stage, "web", 6, Held::new(&made));
    let base = history.newest.clone();
    workload(name, options, history, vec![after], once(move |store| commit(store, &base).map(drop)))
}

/// A snapshot after one whose writer died during its last step before the commit: `left` says what of it is there.
fn snapshot_after_a_death(name: &'static str, left: impl Fn(&CrashVfs) -> CrashVfs) -> Workload {
    let whole = snapshot(name, options());
    let disk = whole.disk.after_kill();
    (whole.change)(&plain(&disk), &whole.options, &mut || ()).unwrap();
    let commit = disk.trace().iter().position(|what| what.contains("of /pool/store/ledger-a")).unwrap();
    let dying = whole.disk.after_kill();
    dying.cut_at(commit as u64);
    assert!((whole.change)(&plain(&dying), &whole.options, &mut || ()).is_err());
    Workload { disk: left(&dying), ..whole }
}

fn purge() -> Workload {
    let history = history(&options());
    let after = without(&history.stage, &[("web", 1), ("web", 4)]);
    workload("purge", options(), history, vec![after], once(|store| store.purge(&[id("web", 1), id("web", 4)])))
}

fn prune() -> Workload {
    let history = history(&options());
    let after = without(&history.stage, &[("web", 1), ("web", 3)]);
    let policy = RetentionPolicy { max_snapshots: Some(1), ..RetentionPolicy::default() };
    let prune = move |store: &Store| store.retain("web", &policy, 5000).map(drop);
    workload("prune", options(), history, vec![after], once(prune))
}

fn sweep() -> Workload {
    let history = history(&options());
    let same = history.stage.clone();
    workload("sweep", options(), history, vec![same], once(|store| store.sweep(&mut |_| ()).map(drop)))
}

fn purge_and_sweep() -> Workload {
    let options = Options { compression: CODECS[1], ..options() };
    let history = history(&options);
    let after = without(&history.stage, &[("web", 3)]);
    let change: Box<Change> = Box::new(|vfs, options, reached| {
        let store = open(vfs, options)?;
        store.purge(&[id("web", 3)])?;
        reached();
        store.sweep(&mut |_| ()).map(drop)
    });
    workload("purge and sweep", options, history, vec![after], change)
}

/// Whoever purged was killed: the record can be read and is not durable.
fn sweep_after_a_killed_purge() -> Workload {
    let purge = purge();
    purge.disk.cut_at({
        let whole = purge.disk.after_kill();
        (purge.change)(&plain(&whole), &purge.options, &mut || ()).unwrap();
        let sync = whole.trace().iter().rposition(|what| what.contains("sync /pool/store/ledger-a")).unwrap();
        sync as u64 + 1
    });
    assert!((purge.change)(&plain(&purge.disk), &purge.options, &mut || ()).is_err());
    let sweep = once(|store| store.sweep(&mut |_| ()).map(drop));
    Workload { name: "sweep after a killed purge", disk: purge.disk.after_kill(), change: sweep, ..purge }
}

fn label_and_protect() -> Workload {
    let history = history(&options());
    let mut labelled = history.stage.clone();
    labelled.get_mut(&key("web", 3)).unwrap().label = Some("before the upgrade".to_owned());
    let mut protected = labelled.clone();
    protected.get_mut(&key("web", 3)).unwrap().protected = true;
    let change: Box<Change> = Box::new(|vfs, options, reached| {
        let store = open(vfs, options)?;
        store.label(&id("web", 3), Some("before the upgrade"))?;
        reached();
        store.protect(&id("web", 3), true)?;
        reached();
        Ok(())
    });
    workload("label and protect", options(), history, vec![labelled, protected], change)
}

fn fork() -> Workload {
    let history = history(&options());
    let after = with(&history.stage, "sibling", 1, history.stage[&key("web", 4)].clone());
    let fork = |store: &Store| store.fork(&id("web", 4), "sibling", 11).map(drop);
    workload("fork", options(), history, vec![after], once(fork))
}

fn exported(history: &History) -> Vec<u8> {
    let mut stream = Vec::new();
    open(&plain(&history.disk.after_kill()), &options()).unwrap().export(&id("web", 4), &mut stream).unwrap();
    stream
}

fn stored<T>(result: Result<T, TransferError>) -> Result<(), StoreError> {
    match result {
        Ok(_) => Ok(()),
        Err(TransferError::Store(error)) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// Into a store that does not have the pages.
fn import() -> Workload {
    let stream = exported(&history(&options()));
    let lz4 = Options { compression: CODECS[1], ..options() };
    let mut history = history(&options());
    let imported = history.stage[&key("web", 4)].clone();
    let disk = CrashVfs::new();
    open(&plain(&disk), &lz4).unwrap();
    (history.disk, history.stage) = (disk.after_cut(0), Stage::new());
    let after = with(&history.stage, "copy", 1, imported);
    let import = move |store: &Store| stored(store.import("copy", &mut &stream[..]));
    Workload { given_out: 0, ..workload("import", lz4, history, vec![after], once(import)) }
}

/// Changes nothing, so there is nothing that a cut could leave.
fn export() -> Workload {
    let history = history(&options());
    let same = history.stage.clone();
    let export = |store: &Store| stored(store.export(&id("web", 4), &mut Vec::new()));
    workload("export", options(), history, vec![same], once(export))
}

fn create() -> Workload {
    let mut history = history(&options());
    (history.disk, history.stage) = (CrashVfs::new(), Stage::new());
    let create: Box<Change> = Box::new(|vfs, options, reached| {
        open(vfs, options)?;
        reached();
        Store::open_existing(Arc::clone(vfs), &dir(), options.clone()).map(drop)
    });
    Workload { given_out: 0, exists: false, ..workload("create", options(), history, vec![Stage::new()], create) }
}

fn repair(name: &'static str, options: Options, rot: impl Fn(&CrashVfs)) -> Workload {
    let history = history(&options);
    rot(&history.disk);
    let same = history.stage.clone();
    let repair = once(|store| store.repair(&mut |_| ()).map(drop));
    let repair = Workload { damaged: true, ..workload(name, options, history, vec![same], repair) };
    let scratch = repair.disk.after_kill();
    let report = open(&plain(&scratch), &repair.options).unwrap().repair(&mut |_| ()).unwrap();
    assert!(!report.healed.is_empty() && report.remaining.is_clean(), "{report:?}");
    repair
}

fn file_of(disk: &CrashVfs, name: &str) -> (std::path::PathBuf, u64) {
    let all = world::files(disk, &dir());
    all.into_iter().find(|(path, _)| path.to_string_lossy().contains(name)).unwrap()
}

/// One mirror of the archive, and the other copy of the ledger.
fn repair_of_mirrors() -> Workload {
    repair("repair of a mirror and a ledger", options(), |disk| {
        let (mirror, length) = file_of(disk, ".b");
        (4096 + 20..length).step_by(4096).for_each(|at| disk.flip(&mirror, at, 0x10).unwrap());
        disk.flip(&dir().join("ledger-a"), 4096 * 3 + 50, 1).unwrap();
    })
}

/// A page with a second copy, among pages that have one.
fn repair_of_a_page() -> Workload {
    let options = Options { redundancy: NonZeroU32::new(1), data_pack_bytes: 1 << 20, ..options() };
    repair("repair of a page", options.clone(), |disk| {
        let (data, length) = file_of(disk, "data-");
        let store = open(&plain(disk), &options).unwrap();
        let heals = |block: &u64| {
            disk.flip(&data, block * 4096 + 9, 2).unwrap();
            let report = store.scrub(&mut |_| ()).unwrap();
            let heals = !report.damage.is_empty() && report.damage.iter().all(|damage| damage.healable);
            if !heals {
                disk.flip(&data, block * 4096 + 9, 2).unwrap();
            }
            heals
        };
        assert!((1..length / 4096).any(|block| heals(&block)));
    })
}

/// All of them.
pub(crate) fn all() -> Vec<Workload> {
    let lean = Options { redundancy: NonZeroU32::new(1), compression: CODECS[2], ..options() };
    vec![
        create(),
        snapshot("snapshot", Options { data_pack_bytes: 1 << 20, ..options() }),
        snapshot("snapshot into a new pack", options()),
        snapshot("snapshot with LZ4", Options { compression: CODECS[1], ..options() }),
        snapshot("snapshot with redundancy and Zstandard", lean),
        snapshot_after_a_death("snapshot after a cut", |dying| dying.after_cut(1)),
        snapshot_after_a_death("snapshot after a kill", CrashVfs::after_kill),
        purge(),
        prune(),
        sweep(),
        purge_and_sweep(),
        sweep_after_a_killed_purge(),
        label_and_protect(),
        fork(),
        import(),
        export(),
        repair_of_mirrors(),
        repair_of_a_page(),
    ]
}
