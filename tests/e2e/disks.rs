//! Disks as the command line has them. The guest is bare-metal and knows no disks: what a stock Linux does with them the lab shows.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::vm::{COUNTER, Vm};
use tests::perdure::Perdure;

/// A raw image of `size` bytes.
fn image(directory: &Path, name: &str, size: u64) -> PathBuf {
    let path = directory.join(name);
    File::create(&path).and_then(|file| file.set_len(size)).expect("a file");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of plain text")
}

#[test]
fn disks_are_made_shown_frozen_resumed_and_removed_with_the_vm_and_an_image_stays() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let own = image(directory.path(), "own.img", 1 << 20);
    let shared = format!("{},ro", text(&image(directory.path(), "shared.img", 512)));
    vm.start(&[&COUNTER[..], &["--disk", "data:2M", "--disk", text(&own), "--disk", &shared]].concat());
    vm.wait_for_more();
    for _ in 0..2 {
        vm.freeze();
        let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
        let expected = serde_json::json!([
            {"pool": {"name": "data", "size": "2M"}},
            {"file": {"path": text(&own)}},
            {"file": {"path": shared.trim_end_matches(",ro"), "read-only": true}},
        ]);
        assert_eq!(inspected["config"]["disks"], expected);
        let devices = &inspected["context"]["standing"]["machine"]["devices"];
        let sectors = [0, 1, 2].map(|disk| devices[format!("disk{disk}")]["behind"]["sectors"].as_u64());
        assert_eq!(sectors, [Some(4096), Some(2048), Some(1)], "{devices}");
        vm.resume();
        vm.wait_for_more();
    }
    let list = vm.perdure.run(&["pool", "list"]).expect_code(0).stdout;
    assert!(list.lines().any(|line| line.starts_with("web/data") && line.contains("disk")), "{list}");
    vm.command("stop").expect_code(0);
    vm.verify();
    vm.command("remove").expect_code(0);
    let list = vm.perdure.run(&["pool", "list"]).expect_code(0).stdout;
    assert!(!list.contains("web/"), "{list}");
    assert_eq!(own.metadata().expect("it is there").len(), 1 << 20);
}

#[test]
fn an_image_is_written_by_one_vm_and_read_by_many() {
    let (one, other, directory) = (Vm::new("one"), Vm::new("other"), tempfile::tempdir().expect("a directory"));
    let path = image(directory.path(), "disk.img", 1 << 20);
    let read_only = format!("{},ro", text(&path));
    let run = |vm: &Vm, name, disk: &str| {
        let arguments = ["run", name, "--detach", "--memory", "8M", "--serial", "none", "--disk", disk];
        vm.perdure.run(&[&arguments[..], &COUNTER].concat())
    };
    run(&one, "one", &read_only).expect_code(0);
    run(&other, "other", &read_only).expect_code(0);
    other.command("stop").expect_code(0);
    for disk in [text(&path), &read_only] {
        one.command("stop").expect_code(0);
        run(&one, "one", text(&path)).expect_code(0);
        let refused = run(&other, "other", disk).expect_code(1).stderr;
        assert!(refused.contains("disk.img is in use"), "{refused}");
    }
    one.command("stop").expect_code(0);
    run(&other, "other", text(&path)).expect_code(0);
}

#[test]
fn what_is_no_disk_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let odd = image(directory.path(), "odd", 1000);
    let missing = directory.path().join("missing");
    let large = image(directory.path(), "large", (1 << 20) + 512);
    let from = |origin: &Path| format!("data:1M,from={}", text(origin));
    let perdure = Perdure::new();
    for (disk, code, words) in [
        (text(&odd), 1, "whole number of sectors"),
        (text(&missing), 1, "missing"),
        (text(directory.path()), 1, "is no disk"),
        ("/dev/null", 1, "is no disk"),
        ("data", 2, "is no disk"),
        ("data:1", 2, "1M at least"),
        ("ram:1M", 2, "ram:1M"),
        (&from(&missing), 1, "missing"),
        (&from(&odd), 1, "whole number of sectors"),
        (&from(&large), 1, "more than the 1M of the disk data"),
        (&format!("{},from={}", text(&large), text(&large)), 2, "is no disk"),
    ] {
        let refused = perdure.run(&["run", "web", "--disk", disk]).expect_code(code).stderr;
        assert!(refused.contains(words), "{disk}: {refused}");
        assert_eq!(perdure.run(&["list", "--json"]).json().as_array().map_or(0, Vec::len), 0, "{disk}");
    }
}

/// The bytes of the disk `data` of the pool.
fn data(vm: &Vm) -> Vec<u8> {
    let document = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    let regions = document["regions"].as_array().expect("regions");
    let region = regions.iter().find(|region| region["name"] == "web/data").expect("its disk");
    let mut file = std::fs::read(region["file"].as_str().expect("a path")).expect("a region's file");
    let size = usize::try_from(region["size"].as_u64().expect("a size")).expect("a small one");
    file.split_off(file.len() - size)
}

#[test]
fn a_disk_of_the_pool_begins_as_the_image_that_it_is_made_from_and_is_not_made_twice() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    // With a hole, and an end in the middle of a page.
    let path = image(directory.path(), "root.img", (1 << 20) + 512);
    let file = OpenOptions::new().write(true).open(&path).expect("it is there");
    for offset in [0, 1000, 300_000, 1 << 20] {
        file.write_all_at(&[0xa5; 300], offset).expect("written");
    }
    let mut expected = std::fs::read(&path).expect("it is there");
    expected.resize(2 << 20, 0);
    let disk = format!("data:2M,from={}", text(&path));
    let begin = || vm.start(&[&COUNTER[..], &["--disk", &disk]].concat());
    begin();
    assert!(data(&vm) == expected, "the disk is another than the image");
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    assert_eq!(inspected["config"]["disks"], serde_json::json!([{"pool": {"name": "data", "size": "2M"}}]));
    vm.command("stop").expect_code(0);
    // The same command starts the VM that there is, with the disk that it has.
    std::fs::remove_file(&path).expect("removed");
    begin();
    vm.command("stop").expect_code(0);
    assert!(data(&vm) == expected, "the disk was made anew");
}

#[test]
fn an_image_that_changed_its_size_while_the_vm_was_frozen_is_refused_and_nothing_is_altered() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let path = image(directory.path(), "disk.img", 1 << 20);
    vm.start(&[&COUNTER[..], &["--disk", text(&path)]].concat());
    vm.wait_for_more();
    vm.freeze();
    let resize = |size| OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(size)).expect("a size");
    resize(2 << 20);
    let refused = vm.perdure.run(&["resume", "web", "--detach"]).expect_code(1).stderr;
    assert!(refused.contains("2048 sectors, and disk disk has 4096 now"), "{refused}");
    assert_eq!(vm.state(), "frozen");
    std::fs::rename(&path, directory.path().join("away")).expect("renamed");
    let refused = vm.perdure.run(&["resume", "web", "--detach"]).expect_code(1).stderr;
    assert!(refused.contains("disk.img"), "{refused}");
    assert_eq!(vm.state(), "frozen");
    std::fs::rename(directory.path().join("away"), &path).expect("renamed");
    resize(1 << 20);
    vm.resume();
    vm.wait_for_more();
    vm.verify();
}

#[test]
fn what_rolls_memory_back_refuses_to_leave_an_image_behind_unless_forced() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let path = image(directory.path(), "disk.img", 1 << 20);
    vm.start(&[&COUNTER[..], &["--disk", text(&path), "--disk", "data:1M"]].concat());
    vm.wait_for_more();
    vm.command("snapshot").expect_code(0);
    vm.freeze();
    let export = directory.path().join("export");
    vm.perdure.run(&["export", "web", text(&export)]).expect_code(0);
    let refuse = |arguments: &[&str]| {
        let refused = vm.perdure.run(arguments).expect_code(1).stderr;
        assert!(refused.contains("disk.img") && !refused.contains("data:1M"), "{refused}");
        assert!(refused.contains("--force"), "{refused}");
    };
    refuse(&["resume", "web", "--detach", "--generation", "1"]);
    refuse(&["fork", "web", "two"]);
    refuse(&["import", text(&export), "three"]);
    assert_eq!(vm.state(), "frozen");
    vm.resume();
    // Cut off: a recovery would be one, too.
    tests::perdure::signal(vm.pid(), tests::perdure::Signal::KILL);
    vm.wait_for_state("unclean");
    refuse(&["resume", "web", "--detach"]);
    vm.perdure.run(&["resume", "web", "--detach", "--force"]).expect_code(0);
    vm.wait_for_more();
}

/// Where the data of a region's file begins.
const DATA: u64 = 2 << 20;

/// The file of the region `name` of the VM.
fn region(vm: &Vm, name: &str) -> (PathBuf, u64) {
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    let regions = inspected["regions"].as_array().expect("regions").clone();
    let disk = regions.into_iter().find(|region| region["name"] == name).expect("its disk");
    let path = PathBuf::from(disk["file"].as_str().expect("a path"));
    let begin = path.metadata().expect("it is there").len() - disk["size"].as_u64().expect("a size");
    assert!(begin <= DATA, "{begin}");
    (path, begin)
}

#[test]
fn a_rollback_a_fork_and_an_import_bring_a_disk_of_the_pool_back_with_the_memory() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    vm.start(&[&COUNTER[..], &["--disk", "data:4M"]].concat());
    vm.wait_for_more();
    vm.freeze();
    let (path, begin) = region(&vm, "web/data");
    // The guest knows no disks: it is written to in its stead, while nobody has it.
    let put = |path: &Path, at: u64, byte: u8| {
        let file = OpenOptions::new().write(true).open(path).expect("open");
        file.write_all_at(&[byte; 8192], at).expect("written");
    };
    let get = |path: &Path, at: u64| {
        let mut bytes = [0; 8192];
        File::open(path).and_then(|file| file.read_exact_at(&mut bytes, at)).expect("read");
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:?}");
        bytes[0]
    };
    let places = [begin, begin + (1 << 20), begin + (4 << 20) - 8192];
    places.iter().zip(1..).for_each(|(at, byte)| put(&path, *at, byte));
    let export = directory.path().join("export");
    vm.perdure.run(&["export", "web", text(&export)]).expect_code(0);
    vm.resume();
    vm.wait_for_more();
    vm.command("snapshot").expect_code(0);
    vm.freeze();
    let generations = vm.perdure.run(&["generations", "web", "--json"]).expect_code(0).json();
    let newest = generations["generations"].as_array().and_then(|all| all.last()?["id"].as_str().map(str::to_owned));
    let newest = newest.expect("its name");
    places.iter().for_each(|at| put(&path, *at, 0x77));
    put(&path, begin + (2 << 20), 0x77);

    vm.perdure.run(&["fork", &newest, "two"]).expect_code(0);
    vm.perdure.run(&["import", text(&export), "three"]).expect_code(0);
    vm.perdure.run(&["resume", "web", "--detach", "--generation", &newest]).expect_code(0);
    vm.wait_for_more();
    vm.freeze();
    for name in ["web/data", "two/data", "three/data"] {
        let path = if name == "web/data" { path.clone() } else { file_of(&vm, name) };
        let found: Vec<u8> = places.iter().map(|at| get(&path, *at)).collect();
        assert_eq!((found, get(&path, begin + (2 << 20))), (vec![1, 2, 3], 0), "{name}");
    }
    // What was before the rollback is a generation, too.
    let generations = vm.perdure.run(&["generations", "web", "--json"]).expect_code(0).json();
    let kept = generations["generations"].as_array().expect("generations").iter();
    let kept = kept.filter(|one| one["label"].as_str().is_some_and(|label| label.contains("before the rollback")));
    let kept = kept.map(|one| one["id"].as_str().expect("its name").to_owned()).next_back().expect("it was kept");
    vm.perdure.run(&["resume", "web", "--detach", "--discard", "--generation", &kept]).expect_code(0);
    vm.wait_for_more();
    vm.freeze();
    assert_eq!(places.map(|at| get(&path, at)), [0x77; 3]);
    // Cut off with no warning: the newest generation, with its disk.
    vm.resume();
    vm.command("snapshot").expect_code(0);
    let pid = vm.pid();
    tests::perdure::signal(pid, tests::perdure::Signal::KILL);
    vm.wait_for_state("unclean");
    put(&path, begin, 0x11);
    vm.resume();
    vm.wait_for_more();
    vm.freeze();
    assert_eq!(places.map(|at| get(&path, at)), [0x77; 3]);
}

/// The file of a region of any VM.
fn file_of(vm: &Vm, name: &str) -> PathBuf {
    let list = vm.perdure.run(&["pool", "list", "--json"]).expect_code(0).json();
    let find = |list: &serde_json::Value| {
        let regions = list.as_array().or_else(|| list["regions"].as_array())?;
        let region = regions.iter().find(|region| region["name"] == name)?;
        region["file"].as_str().map(PathBuf::from)
    };
    find(&list).unwrap_or_else(|| panic!("no {name} in {list}"))
}

#[test]
fn a_disk_of_the_pool_that_was_put_back_from_earlier_is_not_taken_for_the_frozen_one() {
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--disk", "data:1M"]].concat());
    vm.wait_for_more();
    vm.freeze();
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    let regions = inspected["regions"].as_array().expect("regions");
    let disk = regions.iter().find(|region| region["name"] == "web/data").expect("its disk");
    let path = PathBuf::from(disk["file"].as_str().expect("a path"));
    let old = std::fs::read(&path).expect("its bytes");
    vm.resume();
    vm.wait_for_more();
    vm.freeze();
    let new = std::fs::read(&path).expect("its bytes");
    let put = |bytes: &[u8]| {
        OpenOptions::new().write(true).open(&path).and_then(|file| file.write_all_at(bytes, 0)).expect("written");
    };
    put(&old);
    let refused = vm.perdure.run(&["resume", "web", "--detach"]).expect_code(1).stderr;
    assert!(refused.contains("its disk data is"), "{refused}");
    put(&new);
    vm.resume();
    vm.wait_for_more();
    vm.verify();
}
