//! Persistent memory and the virtio console as the command line has them. The guest is bare-metal and knows neither: what a stock Linux does with them the lab
//! shows.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use allocator::Pool;
use allocator::rvm::{LogSpec, Options, Rvm};
use serde_json::{Value, json};

use crate::vm::{COUNTER, MEDIA, Vm};
use tests::perdure::Perdure;
use vfs::HostVfs;

const SIZE: u64 = 2 << 20;

/// The region `NAME/log`: its file, and where in that it begins.
fn region(vm: &Vm, name: &str) -> (PathBuf, u64) {
    let inspected = vm.perdure.run(&["inspect", name, "--json"]).expect_code(0).json();
    let regions = inspected["regions"].as_array().expect("regions");
    let log = regions.iter().find(|region| region["name"] == format!("{name}/log")).expect("its persistent memory");
    assert_eq!((&log["kind"], &log["size"]), (&json!("pmem"), &json!(SIZE)));
    let path = PathBuf::from(log["file"].as_str().expect("a path"));
    let begin = path.metadata().expect("it is there").len() - SIZE;
    (path, begin)
}

/// Writes to it while nobody has it.
fn write(vm: &Vm, text: &[u8]) {
    let (path, begin) = region(vm, "web");
    let file = OpenOptions::new().write(true).open(path).expect("a file");
    file.write_all_at(text, begin + 5000).expect("there is room");
}

fn read(vm: &Vm, name: &str) -> String {
    let (path, begin) = region(vm, name);
    let mut bytes = [0; 4];
    let file = OpenOptions::new().read(true).open(path).expect("a file");
    file.read_exact_at(&mut bytes, begin + 5000).expect("it is as long");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn devices(vm: &Vm) -> Value {
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    inspected["context"]["standing"]["machine"]["devices"].clone()
}

#[test]
fn persistent_memory_is_made_frozen_resumed_kept_when_the_guest_ends_and_removed_with_the_vm() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        let what = ["--medium", medium, "--pmem", "log:2M", "--console", "virtio"];
        vm.start(&[&COUNTER[..], &what].concat());
        vm.wait_for_more();
        for _ in 0..2 {
            vm.freeze();
            let devices = devices(&vm);
            assert_eq!(devices["pmem0"]["behind"], json!({"kind": "pmem-v1", "start": 1_u64 << 32, "size": SIZE}));
            assert_eq!(devices["console"]["behind"], json!({"kind": "console-v1", "sent": 0}));
            vm.resume();
            vm.wait_for_more();
        }
        vm.command("stop").expect_code(0);
        vm.verify();
        write(&vm, b"kept");
        let inspected = vm.perdure.run(&["inspect", "web"]).expect_code(0).stdout;
        assert!(inspected.contains("log:2M") && inspected.contains("virtio (hvc0)"), "{inspected}");
        for (other, words) in [("log:4M", "log:2M; not log:4M"), ("data:2M", "log:2M; not data:2M")] {
            let refused = vm.perdure.run(&["run", "web", "--detach", "--pmem", other]).expect_code(1).stderr;
            assert!(refused.contains(words), "{refused}");
        }
        vm.perdure.run(&["run", "web", "--detach"]).expect_code(0);
        vm.command("stop").expect_code(0);
        assert_eq!(read(&vm, "web"), "kept", "{medium}");
        vm.command("remove").expect_code(0);
        let list = vm.perdure.run(&["pool", "list"]).expect_code(0).stdout;
        assert!(!list.contains("web/"), "{list}");
    }
}

/// `shape`: how the VM's memory is divided; `lazy`: how it is brought back.
fn goes_back(shape: &[&str], lazy: &[&str]) {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let serial = vm.serial();
    let what =
        ["run", "web", "--detach", "--serial", serial.to_str().expect("a path of plain text"), "--pmem", "log:2M"];
    vm.perdure.run(&[&what[..], shape, &COUNTER].concat()).expect_code(0);
    vm.wait_for_more();
    vm.freeze();
    write(&vm, b"then");
    vm.resume();
    vm.wait_for_more();
    vm.command("snapshot").expect_code(0);
    vm.freeze();
    write(&vm, b"lost");
    let export = directory.path().join("export");
    let export = export.to_str().expect("a path of plain text");
    vm.perdure.run(&["export", "web@1", export]).expect_code(0);
    vm.perdure.run(&[&["resume", "web", "--detach", "--generation", "1"], lazy].concat()).expect_code(0);
    vm.wait_for_more();
    vm.freeze();
    assert_eq!(read(&vm, "web"), "then");
    write(&vm, b"next");
    vm.resume();
    vm.wait_for_more();
    // What memory is still to come from the first generation, this one leans on; persistent memory has gone on from it.
    let taken = vm.command("snapshot").expect_code(0).stdout;
    vm.freeze();
    write(&vm, b"lost");
    let (newest, _) = taken.split_once(':').expect("its name");
    vm.perdure.run(&["fork", newest, "two"]).expect_code(0);
    vm.perdure.run(&["import", export, "three"]).expect_code(0);
    assert_eq!((read(&vm, "two"), read(&vm, "three")), ("next".to_owned(), "then".to_owned()));
}

#[test]
fn persistent_memory_goes_back_with_memory_and_into_a_fork_and_an_export() {
    goes_back(&["--memory", "8M"], &[]);
    goes_back(&["--memory", "8M"], &["--lazy", "--no-prefetch"]);
}

#[test]
fn persistent_memory_goes_back_with_memory_that_is_paged() {
    goes_back(&["--memory", "16M", "--ram", "2M"], &[]);
    goes_back(&["--memory", "16M", "--ram", "2M"], &["--lazy", "--no-prefetch"]);
}

#[test]
fn a_configuration_file_gives_persistent_memory_and_a_virtio_console() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("web.json");
    let config = json!({"pmem": [{"name": "log", "size": "2M"}], "console": "virtio"});
    std::fs::write(&file, config.to_string()).expect("it is written");
    vm.start(&[&COUNTER[..], &["--config", file.to_str().expect("a path of plain text")]].concat());
    vm.wait_for_more();
    vm.freeze();
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    assert_eq!((&inspected["config"]["pmem"], &inspected["config"]["console"]), (&config["pmem"], &config["console"]));
    let devices = devices(&vm);
    assert!(devices["pmem0"].is_object() && devices["console"].is_object(), "{devices}");
}

#[test]
fn persistent_memory_that_cannot_be_is_refused_and_leaves_nothing() {
    let perdure = Perdure::new();
    for (pmem, words) in [
        ("log", "NAME:SIZE"),
        ("log:1M", "2M at least"),
        ("log:3M", "multiple"),
        ("ram:2M", "ram:2M"),
        ("log:64T", "addresses"),
    ] {
        let refused = perdure.run(&["run", "web", "--pmem", pmem]).expect_code(2).stderr;
        assert!(refused.contains(words), "{pmem}: {refused}");
        assert_eq!(perdure.run(&["list", "--json"]).json().as_array().map_or(0, Vec::len), 0, "{pmem}");
    }
}

#[test]
fn persistent_memory_that_belongs_to_a_log_is_refused_until_it_is_given_back() {
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--pmem", "log:2M"]].concat());
    vm.command("stop").expect_code(0);
    let open = || Arc::new(Pool::open(vm.perdure.pool(), Arc::new(HostVfs)).expect("a pool"));
    let (bank, region) = ("bank/log".parse().expect("a name"), "web/log".parse().expect("a name"));
    Rvm::create_log(&open(), &bank, LogSpec { size: 2 << 20, ..LogSpec::default() }).expect("room for a log");
    let used = Rvm::initialize(open(), &bank, Options::default()).expect("a new log");
    used.map(&region).expect("a region that nobody has");
    drop(used);
    let refused = vm.perdure.run(&["run", "web", "--detach"]).expect_code(1).stderr;
    assert!(refused.contains("web/log belongs to the log bank/log of recoverable memory"), "{refused}");
    // A log itself is none either.
    let refused = vm.perdure.run(&["run", "bank", "--detach", "--pmem", "log:2M"]).expect_code(1).stderr;
    assert!(refused.contains("kind log"), "{refused}");
    let used = Rvm::initialize(open(), &bank, Options::default()).expect("a log");
    let memory = used.map(&region).expect("it belongs to this log");
    used.unmap(memory).expect("nobody else has a part");
    drop(used);
    vm.perdure.run(&["run", "web", "--detach"]).expect_code(0);
    vm.command("stop").expect_code(0);
}
