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
    let perdure = Perdure::new();
    for (disk, code, words) in [
        (text(&odd), 1, "whole number of sectors"),
        (text(&missing), 1, "missing"),
        (text(directory.path()), 1, "is no disk"),
        ("/dev/null", 1, "is no disk"),
        ("data", 2, "is no disk"),
        ("data:1", 2, "1M at least"),
        ("ram:1M", 2, "ram:1M"),
    ] {
        let refused = perdure.run(&["run", "web", "--disk", disk]).expect_code(code).stderr;
        assert!(refused.contains(words), "{disk}: {refused}");
        assert_eq!(perdure.run(&["list", "--json"]).json().as_array().map_or(0, Vec::len), 0, "{disk}");
    }
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
fn what_rolls_memory_back_refuses_to_leave_disks_behind_unless_forced() {
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
        assert!(refused.contains("disk.img, data:1M"), "{refused}");
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
