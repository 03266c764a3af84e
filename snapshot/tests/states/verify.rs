//! What a store is worth that a cut has left.

use std::ops::RangeInclusive;
use std::sync::Arc;

use snapshot::{GenerationId, NewGeneration, PAGE_SIZE, Parent, Reader, RegionSpec, Store, StoreError};
use vfs::crash::CrashVfs;

use super::Mount;
use super::workload::{Held, Stage, Workload};
use crate::world::{Memory, dir, open, page};

fn told(doing: &'static str) -> impl Fn(StoreError) -> String {
    move |error| format!("{doing}: {error}")
}

/// Opens the store on `disk` as the next process would, and looks at everything:
///
/// 1. It holds exactly the generations of one of `stages`, and each is restored as it was.
/// 2. If the operation had `returned`, all of that is stored as often as it should be: a scrub finds nothing.
/// 3. The next snapshot succeeds, takes a number that never was, and reads as it should.
/// 4. After a sweep no zombie is left, a scrub is clean, and all is as under 1, now read page by page.
///
/// On a disk that had rotted, and on which a repair had not returned, another repair comes first.
///
/// Returns the stage that was found.
pub(crate) fn verify(
    workload: &Workload,
    disk: &CrashVfs,
    mount: &Mount,
    stages: RangeInclusive<usize>,
    returned: bool,
) -> Result<usize, String> {
    let vfs = mount(disk);
    let open_it = if workload.exists || returned { Store::open_existing } else { Store::open };
    let store = open_it(Arc::clone(&vfs), &dir(), workload.options.clone()).map_err(told("open"))?;
    let found = find(workload, &store, stages)?;
    let stage = &workload.stages[found];
    if returned {
        scrub(&store)?;
    } else if workload.damaged {
        let report = store.repair(&mut |_| ()).map_err(told("repair"))?;
        if !report.remaining.is_clean() {
            return Err(format!("a repair left {:?}", report.remaining));
        }
    }
    check_all(&store, stage, restore)?;
    let next = take_another(workload, &store, stage)?;
    store.purge(&[next]).map_err(told("purge"))?;
    let swept = store.sweep(&mut |_| ()).map_err(told("sweep"))?;
    if !swept.blocked_by.is_empty() {
        return Err(format!("the sweep is blocked by {:?}", swept.blocked_by));
    }
    drop(store);
    // A reader that remembers nothing.
    let store = open(&vfs, &workload.options).map_err(told("open again"))?;
    match store.zombies().map_err(told("look for zombies"))? {
        0 => {}
        zombies => return Err(format!("{zombies} zombies after a sweep")),
    }
    scrub(&store)?;
    find(workload, &store, found..=found)?;
    check_all(&store, stage, read_pages)?;
    Ok(found)
}

fn scrub(store: &Store) -> Result<(), String> {
    let report = store.scrub(&mut |_| ()).map_err(told("scrub"))?;
    if report.is_clean() { Ok(()) } else { Err(format!("a scrub found {report:?}")) }
}

/// The stage whose generations are there: exactly these.
fn find(workload: &Workload, store: &Store, stages: RangeInclusive<usize>) -> Result<usize, String> {
    let listed: Vec<_> = store.lineages().iter().flat_map(|lineage| store.generations(lineage)).collect();
    let is = |stage: &Stage| {
        listed.len() == stage.len()
            && listed.iter().all(|found| {
                let held = stage.get(&(found.id.lineage.clone(), found.id.number));
                held.is_some_and(|held| held.label == found.label && held.protected == found.protected)
            })
    };
    // The last of several that are equal.
    stages.clone().rev().find(|stage| is(&workload.stages[*stage])).ok_or_else(|| {
        let ids: Vec<_> = listed.iter().map(|found| (&found.id, &found.label, found.protected)).collect();
        format!("none of the stages {stages:?}: {ids:?}")
    })
}

/// Compares a region with what it must be.
type Compare = fn(&Reader, usize, &[u8]) -> Result<(), String>;

/// All at once.
fn restore(reader: &Reader, region: usize, expected: &[u8]) -> Result<(), String> {
    let memory = Memory::new(expected.len() / PAGE_SIZE);
    reader.restore_region(region, &memory, &mut |_, _| ()).map_err(told("restore"))?;
    if memory.bytes() == expected { Ok(()) } else { Err("it was restored as something else".to_owned()) }
}

/// Each page alone.
fn read_pages(reader: &Reader, region: usize, expected: &[u8]) -> Result<(), String> {
    let mut alone = [1; PAGE_SIZE];
    for (number, expected) in expected.chunks_exact(PAGE_SIZE).enumerate() {
        reader.read_page(region, number as u64, &mut alone).map_err(told("read a page"))?;
        if alone != expected {
            return Err(format!("page {number} was read as another"));
        }
    }
    Ok(())
}

fn check_all(store: &Store, stage: &Stage, compare: Compare) -> Result<(), String> {
    stage.iter().try_for_each(|((lineage, number), held)| {
        check(store, &GenerationId::new(lineage, *number), held, compare)
            .map_err(|why| format!("{lineage}@{number}: {why}"))
    })
}

fn check(store: &Store, id: &GenerationId, held: &Held, compare: Compare) -> Result<(), String> {
    let reader = store.reader(id).map_err(told("read"))?;
    if reader.regions().len() != held.bytes.len() {
        return Err(format!("it has {} regions", reader.regions().len()));
    }
    for (name, expected) in &held.bytes {
        let region = reader.region(name).ok_or_else(|| format!("it has no region {name}"))?;
        compare(&reader, region, expected).map_err(|why| format!("region {name}: {why}"))?;
    }
    match reader.blob("context").map_err(told("read the context"))? {
        Some(context) if context == held.context => Ok(()),
        other => Err(format!("the context is {other:?}")),
    }
}

/// One more generation of `web`, on top of what there is.
fn take_another(workload: &Workload, store: &Store, stage: &Stage) -> Result<GenerationId, String> {
    let newest = stage.range(("web".to_owned(), 0)..=("web".to_owned(), u64::MAX)).next_back();
    let mut expected = newest.map_or_else(
        || Held {
            label: None,
            protected: false,
            context: Vec::new(),
            bytes: [("ram".to_owned(), vec![0; 3 * PAGE_SIZE])].into(),
        },
        |(_, held)| Held { label: None, protected: false, ..held.clone() },
    );
    let new = NewGeneration { parent: Parent::Newest, ..NewGeneration::automatic("web", 2000) };
    let mut writer = store.begin(new).map_err(told("begin the next snapshot"))?;
    for (name, bytes) in &expected.bytes {
        let spec = RegionSpec { name: name.clone(), kind: "ram".into(), size: bytes.len() as u64 };
        let region = writer.region(&spec).map_err(told("declare a region"))?;
        if name == "ram" {
            writer.put(region, 2, &page(4243)).map_err(told("put a page"))?;
        }
    }
    expected.context = b"after".to_vec();
    writer.blob("context", &expected.context).map_err(told("put a blob"))?;
    let made = writer.commit().map_err(told("commit the next snapshot"))?.id;
    expected.bytes.get_mut("ram").ok_or("no ram")?[2 * PAGE_SIZE..3 * PAGE_SIZE].copy_from_slice(&page(4243));
    let taken = newest.map_or(0, |((_, number), _)| *number).max(workload.given_out);
    if made.number <= taken {
        return Err(format!("the next snapshot got number {}, which had been given out", made.number));
    }
    check(store, &made, &expected, restore).map_err(|why| format!("the next snapshot: {why}"))?;
    Ok(made)
}
