use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use allocator::{MediumKind, Pool};
use serde_json::{Value, json};
use snapshot::Options;
use vfs::host::HostVfs;

use super::*;
use crate::machine::config::generations::GenerationsConfig;
use crate::persistence::recovery::assess;

const MEMORY: u64 = 4 << 20;

struct Home {
    _directory: tempfile::TempDir,
    pool: Pool,
    store: Store,
}

impl Home {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path().join("pool"), Arc::new(HostVfs)).unwrap();
        let options = Options { lock_wait: Duration::from_millis(20), ..Options::default() };
        let store = Store::open(Arc::new(HostVfs), &directory.path().join("store"), options).unwrap();
        Self { _directory: directory, pool, store }
    }

    /// A VM that is frozen, its memory filled from `seed`.
    fn frozen(&self, seed: u8) -> VmRegions {
        let config = VmConfig { memory: ByteSize(MEMORY), medium: Some(MediumKind::File), ..VmConfig::default() };
        let mut regions = VmRegions::create(&self.pool, "web", &config).unwrap();
        freeze(&mut regions, seed);
        regions
    }
}

/// Memory of which some pages are zero.
fn image(seed: u8) -> Vec<u8> {
    let page = |number: u64| match number.wrapping_mul(u64::from(seed)) % 3 {
        0 => [0; snapshot::PAGE_SIZE],
        kind => [seed.wrapping_add(number as u8) | kind as u8; snapshot::PAGE_SIZE],
    };
    (0..MEMORY / snapshot::PAGE_SIZE as u64).flat_map(page).collect()
}

fn freeze(regions: &mut VmRegions, seed: u8) {
    regions.clear_stamp().unwrap();
    regions.ram().write_at(&image(seed), 0).unwrap();
    regions.ram().sync().unwrap();
    let sequence = regions.next_sequence();
    let context = json!({
        "sequence": sequence, "written_ns": 1, "config": regions.config(), "standing": standing(1, seed),
    });
    regions.adopt(serde_json::from_value(context).unwrap()).unwrap();
}

fn standing(cpus: usize, mark: u8) -> Value {
    let vcpu = json!({
        "cpuid": "", "tsc_khz": null, "sregs": "", "regs": "", "xcrs": "", "xsave": "", "msrs": [[1, mark]], "lapic": "",
        "debug_registers": "", "events": "", "mp_state": 0,
    });
    let vm = json!({ "irqchips": ["", "", ""], "pit": "", "clock": { "kvmclock_ns": 1, "realtime_ns": 1 } });
    let machine = json!({ "devices": {}, "vcpus": vec![vcpu; cpus], "vm": vm });
    json!({ "is": "frozen", "machine": machine, "console": { "input": "", "output": "" } })
}

/// A context that says its memory is still to come from a generation.
fn half_restored() -> Value {
    let mut standing = standing(1, 3);
    standing["restoring"] =
        json!({ "generation": "web@1", "unprotect": false, "cluster": 65536, "present": "AAAAAAAAAAA=" });
    standing
}

fn memory(regions: &VmRegions) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    regions.ram().read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Which freeze the VM is at: by its memory, every byte of it, and by its machine.
fn seed_of(regions: &VmRegions, seeds: &[u8]) -> Option<u8> {
    assess(regions).ok()?;
    let memory = memory(regions);
    let seed = seeds.iter().copied().find(|seed| memory == image(*seed)).expect("a mixture");
    let machine = serde_json::to_value(&regions.context().standing).unwrap();
    assert_eq!(machine["machine"]["vcpus"][0]["msrs"][0][1], seed, "memory and machine are of two moments");
    Some(seed)
}

fn quiet(_: u64, _: u64) {}

#[test]
fn every_byte_becomes_the_generations_and_what_was_can_be_had_back() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    let first = keep(&home.store, &regions, "one").unwrap().id;
    freeze(&mut regions, 2);
    let sequence = regions.context().sequence;
    let restored = roll_back(&home.store, &mut regions, &first, false, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!(seed_of(&regions, &[1, 2]), Some(1));
    assert_eq!(regions.context().sequence, sequence + 1);
    // It is on the medium, not in this process.
    drop(regions);
    let mut regions = VmRegions::open(&home.pool, "web").unwrap();
    assert_eq!(seed_of(&regions, &[1, 2]), Some(1));
    let kept = restored.kept.unwrap().id;
    roll_back(&home.store, &mut regions, &kept, true, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!(seed_of(&regions, &[1, 2]), Some(2));
}

#[test]
fn disks_and_persistent_memory_go_back_with_memory() {
    let home = Home::new();
    let config = VmConfig {
        memory: ByteSize(MEMORY),
        disks: vec!["data:1M".parse().unwrap()],
        pmem: vec!["log:2M".parse().unwrap()],
        ..VmConfig::default()
    };
    let mut regions = VmRegions::create(&home.pool, "web", &config).unwrap();
    let fill = |regions: &VmRegions, seed: u8| {
        for (at, (_, region)) in (1..).zip(regions.storage()) {
            region.write_at(&[seed + at; 5000], 4000 * u64::from(seed)).unwrap();
        }
    };
    let seen = |regions: &VmRegions| {
        let read = |(name, region): (&str, &Region)| {
            let mut bytes = vec![0; region.size() as usize];
            region.read_at(&mut bytes, 0).unwrap();
            (name.to_owned(), bytes)
        };
        regions.storage().map(read).collect::<Vec<_>>()
    };
    fill(&regions, 10);
    freeze(&mut regions, 1);
    let (first, then) = (keep(&home.store, &regions, "one").unwrap().id, seen(&regions));
    assert_eq!(then.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["data", "log"]);
    regions.clear_stamp().unwrap();
    fill(&regions, 100);
    freeze(&mut regions, 2);
    let later = seen(&regions);
    let restored = roll_back(&home.store, &mut regions, &first, false, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!(seed_of(&regions, &[1, 2]), Some(1));
    assert!(seen(&regions) == then && then != later);
    roll_back(&home.store, &mut regions, &restored.kept.unwrap().id, true, &mut Pages::Now(&mut quiet)).unwrap();
    assert!(seen(&regions) == later);
    // What is not of the context is not resumed.
    let (_, log) = regions.storage().last().unwrap();
    log.clear_stamp().unwrap();
    let doubt = assess(&regions).unwrap_err().to_string();
    assert!(doubt.contains("its persistent memory log is not stamped clean"), "{doubt}");
}

#[test]
fn what_the_vm_has_of_its_own_stays_its_own() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    let id = keep(&home.store, &regions, "one").unwrap().id;
    let mut config = regions.config().clone();
    (config.family, config.cmdline) = (Some("shop".to_owned()), "other".to_owned());
    regions.set_config(config);
    roll_back(&home.store, &mut regions, &id, true, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!((regions.config().family.as_deref(), regions.config().cmdline.as_str()), (Some("shop"), ""));
}

#[test]
fn a_cut_in_the_middle_of_a_restore_is_recovered_to_what_was_chosen() {
    for discard in [false, true] {
        let home = Home::new();
        let mut regions = home.frozen(1);
        let first = keep(&home.store, &regions, "one").unwrap().id;
        freeze(&mut regions, 2);
        let cut = &mut |done, _| assert!(done == 0, "the power is out");
        let ended = catch_unwind(AssertUnwindSafe(|| {
            roll_back(&home.store, &mut regions, &first, discard, &mut Pages::Now(cut))
        }));
        assert!(ended.is_err());
        drop(regions);
        let mut regions = VmRegions::open(&home.pool, "web").unwrap();
        assert!(assess(&regions).is_err(), "half a restore counts as whole");
        let restored = recover(&home.store, &mut regions, &mut Pages::Now(&mut quiet)).unwrap();
        // Where it was the newest already, it need not be made so.
        let chosen = if discard { Some(restored.generation.id) } else { restored.generation.parent };
        assert_eq!(chosen, Some(first));
        assert_eq!(seed_of(&regions, &[1, 2]), Some(1));
    }
}

#[test]
fn a_store_that_is_busy_leaves_the_vm_as_it_was() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    let first = keep(&home.store, &regions, "one").unwrap().id;
    freeze(&mut regions, 2);
    keep(&home.store, &regions, "two").unwrap();
    let writer = home.store.begin(NewGeneration::automatic("other", 1)).unwrap();
    for discard in [false, true] {
        let refused = roll_back(&home.store, &mut regions, &first, discard, &mut Pages::Now(&mut quiet)).unwrap_err();
        assert!(matches!(refused, RollbackError::Store(StoreError::Busy { .. })), "{refused}");
        assert_eq!(seed_of(&regions, &[1, 2]), Some(2));
    }
    drop(writer);
}

/// A generation whose context is `context`, on RAM of `size` bytes, with one more region if `more`.
fn forge(home: &Home, context: &[u8], size: u64, more: bool) -> GenerationId {
    let mut writer = home.store.begin(NewGeneration::automatic("web", 1)).unwrap();
    let region = |name: &str, size| RegionSpec { name: name.to_owned(), kind: "ram".to_owned(), size };
    let ram = writer.region(&region(REGION_RAM, size)).unwrap();
    writer.put_run(ram, 0, &[9; snapshot::PAGE_SIZE]).unwrap();
    if more {
        writer.region(&region("disk", 4096)).unwrap();
    }
    writer.blob(BLOB_CONTEXT, context).unwrap();
    writer.commit().unwrap().id
}

#[test]
fn integrity_decides_whether_a_lost_page_stops_a_rollback() {
    let directory = tempfile::tempdir().unwrap();
    for integrity in [Integrity::Fail, Integrity::Warn] {
        let home = Home::new();
        let at = directory.path().join(format!("{integrity:?}"));
        let config = GenerationsConfig { integrity, ..GenerationsConfig::default() };
        let options = crate::persistence::generations::options(&config);
        let store = Store::open(Arc::new(HostVfs), &at, options).unwrap();
        let mut regions = home.frozen(1);
        regions.set_config(VmConfig { generations: config, ..regions.config().clone() });
        let id = keep(&store, &regions, "one").unwrap().id;
        freeze(&mut regions, 2);
        let pack = std::fs::read_dir(at.join("packs")).unwrap().map(|entry| entry.unwrap().path());
        let pack = pack.into_iter().find(|path| path.to_string_lossy().contains("data-")).unwrap();
        let mut bytes = std::fs::read(&pack).unwrap();
        let end = bytes.len();
        bytes[end - 100] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
        match (integrity, roll_back(&store, &mut regions, &id, true, &mut Pages::Now(&mut quiet))) {
            (Integrity::Fail, Err(RollbackError::Store(StoreError::Damaged { .. }))) => {
                assert_eq!(seed_of(&regions, &[1, 2]), Some(2));
            }
            (Integrity::Warn, Ok(restored)) => {
                assert!(!restored.report.damaged.is_empty());
                assert!(assess(&regions).is_ok());
            }
            (_, other) => panic!("{integrity:?}: {other:?}"),
        }
    }
}

#[test]
fn hostile_generations_are_refused_with_the_reason_and_passed_over_by_a_recovery() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    keep(&home.store, &regions, "good").unwrap();
    freeze(&mut regions, 2);
    let config = |change: &dyn Fn(&mut VmConfig)| {
        let mut config = regions.config().clone();
        change(&mut config);
        config
    };
    let context = |config: VmConfig, standing: Value| {
        let sequence = u64::MAX;
        let context = json!({ "sequence": sequence, "written_ns": 0, "config": config, "standing": standing });
        serde_json::to_vec(&context).unwrap()
    };
    let good = context(config(&|_| ()), standing(1, 3));
    let forged = [
        (forge(&home, b"{", MEMORY, false), "can be read: EOF"),
        (forge(&home, &[b' '; 34 << 20], MEMORY, false), "longer than any"),
        (forge(&home, &good, MEMORY * 2, false), "of memory"),
        (forge(&home, &good, 4096, false), "of memory"),
        (forge(&home, &good, MEMORY, true), "region disk"),
        (forge(&home, &context(config(&|_| ()), standing(0, 3)), MEMORY, false), "vCPUs"),
        (forge(&home, &context(config(&|_| ()), json!({ "is": "created" })), MEMORY, false), "not running"),
        (forge(&home, &context(config(&|_| ()), half_restored()), MEMORY, false), "memory is elsewhere"),
        (forge(&home, &context(config(&|config| config.cpus = 0), standing(0, 3)), MEMORY, false), "describes no VM"),
        (forge(&home, &context(config(&|config| config.cpus = 2), standing(2, 3)), MEMORY, false), "CPUs"),
        (
            forge(
                &home,
                &context(config(&|config| config.memory = ByteSize(MEMORY * 2)), standing(1, 3)),
                MEMORY,
                false,
            ),
            "of memory",
        ),
    ];
    for (id, why) in &forged {
        let refused = roll_back(&home.store, &mut regions, id, true, &mut Pages::Now(&mut quiet)).unwrap_err();
        assert!(refused.to_string().contains(why), "{id}: {refused}");
        assert_eq!(seed_of(&regions, &[1, 2]), Some(2), "{id}");
    }
    regions.clear_stamp().unwrap();
    let restored = recover(&home.store, &mut regions, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!((restored.generation.label.as_deref(), restored.skipped.len()), (Some("good"), forged.len()));
    assert_eq!(seed_of(&regions, &[1, 2]), Some(1));
}

#[test]
fn what_is_kept_of_a_half_restored_vm_is_the_generation_but_for_what_is_there() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    let first = keep(&home.store, &regions, "one").unwrap().id;
    freeze(&mut regions, 2);
    roll_back(&home.store, &mut regions, &first, true, &mut Pages::Later).unwrap();
    assert!(home.store.generation(&first).unwrap().protected);
    assert_eq!(memory(&regions), vec![0; MEMORY as usize], "nothing has come yet");
    // As a freeze in the middle leaves it: two clusters came, and one of them was written to.
    let mut wanted = image(1);
    wanted[5 * 65536 + 7] ^= 0xFF;
    for cluster in [0, 5] {
        let range = cluster * 65536..(cluster + 1) * 65536;
        regions.ram().write_at(&wanted[range.clone()], range.start as u64).unwrap();
    }
    let mut context = regions.context().clone();
    context.sequence = regions.next_sequence();
    let Standing::Frozen(frozen) = &mut context.standing else { panic!("{context:?}") };
    let record = frozen.restoring.as_mut().unwrap();
    assert_eq!((record.progress(MEMORY), record.unprotect), ((0, 64), true));
    record.present[0] = 0b10_0001;
    regions.adopt(context).unwrap();

    let kept = keep(&home.store, &regions, "half").unwrap().id;
    let restored = roll_back(&home.store, &mut regions, &kept, true, &mut Pages::Now(&mut quiet)).unwrap();
    assert_eq!(restored.generation.id, kept);
    assert!(memory(&regions) == wanted, "a page is not what it was");
    assert!(regions.context().standing.restoring().is_none());
    assert!(!home.store.generation(&first).unwrap().protected, "nothing needs it any more");
}

#[test]
fn where_nothing_can_be_used_each_reason_is_told_and_nothing_is_stamped() {
    let home = Home::new();
    let mut regions = home.frozen(1);
    regions.clear_stamp().unwrap();
    let none = recover(&home.store, &mut regions, &mut Pages::Now(&mut quiet)).unwrap_err();
    assert!(matches!(none, RollbackError::Store(StoreError::EmptyLineage { .. })), "{none}");
    forge(&home, b"", MEMORY, false);
    let refused = recover(&home.store, &mut regions, &mut Pages::Now(&mut quiet)).unwrap_err();
    assert!(
        refused.to_string().contains("none of the 1 generations") && refused.to_string().contains("web@1"),
        "{refused}"
    );
    assert!(assess(&regions).is_err());
}
