//! Pools that something happened to: what was found is said, nothing is altered, nothing is guessed.

use std::fs;
use std::path::PathBuf;

use allocator::frame;
use serde_json::Value;
use tests::perdure::Ended;

use crate::pool_bytes::PoolBytes;
use crate::vm::{COUNTER, MEDIA, SOON, Vm};

const CATALOG: frame::Magic = *b"PERDCATL";
const CONTEXT: frame::Magic = *b"PDCONTXT";
const MOST: usize = 1 << 20;
/// Where the two copies of a region's header lie, and where a copy's CRC is (FORMAT.md).
const COPIES: [usize; 2] = [0, 4096];
const CRC: usize = 508;

/// A VM frozen with some of its chain behind it.
fn frozen(medium: &str) -> Vm {
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
    vm.wait_for_more();
    vm.freeze();
    vm
}

fn inspection(vm: &Vm) -> Value {
    vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json()
}

/// The file of `web/ram` or `web/context`, and where its data begin.
fn region(vm: &Vm, name: &str) -> (PathBuf, usize) {
    let inspection = inspection(vm);
    let regions = inspection["regions"].as_array().expect("regions");
    let region = regions.iter().find(|region| region["name"] == name).unwrap_or_else(|| panic!("{inspection}"));
    let path = PathBuf::from(region["file"].as_str().expect("a path"));
    let length = fs::metadata(&path).expect("its file").len();
    let data = length - region["size"].as_u64().expect("a size");
    (path, usize::try_from(data).unwrap())
}

fn edit(path: &PathBuf, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("a file");
    change(&mut bytes);
    fs::write(path, bytes).expect("a file");
}

/// Edits the slot of the context that counts (the newest) or the other one.
fn edit_slot(vm: &Vm, newest: bool, change: impl FnOnce(&mut [u8])) {
    let sequence = inspection(vm)["context"]["sequence"].as_u64().expect("a sequence");
    let index = usize::try_from(if newest { sequence % 2 } else { (sequence + 1) % 2 }).unwrap();
    let (path, data) = region(vm, "web/context");
    edit(&path, |bytes| {
        let slot = (bytes.len() - data) / 2;
        change(&mut bytes[data + index * slot..data + (index + 1) * slot]);
    });
}

/// `resume` fails with `why`, and so it does again: nothing was altered.
#[track_caller]
fn refused(vm: &Vm, why: &[&str]) -> Ended {
    let before = PoolBytes::of(vm.perdure.pool());
    let ended = vm.command("resume").expect_code(1);
    for words in why {
        assert!(ended.stderr.contains(words), "no {words:?} in: {}", ended.stderr);
    }
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    vm.perdure.run(&["resume", "web", "--detach"]).expect_code(1);
    // Those who only look are told, too, and none of them stumbles.
    vm.perdure.run(&["list"]).expect_code(0);
    vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    vm.perdure.run(&["pool", "list"]).expect_code(0);
    assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "something was altered");
    ended
}

#[test]
fn a_context_that_is_damaged_anywhere_is_refused() {
    for (medium, at) in [("file", 3), ("file", 9), ("file", 17), ("nvdimm", 25), ("nvdimm", 40), ("nvdimm", 2000)] {
        let vm = frozen(medium);
        edit_slot(&vm, true, |slot| slot[at] ^= 0x10);
        refused(&vm, &["damaged", "web"]);
        assert_eq!(vm.state(), "unclean", "{}", vm.record());
        fs::remove_file(vm.serial()).unwrap();
        vm.start(&[]);
        vm.wait_for_more();
        vm.verify();
    }
}

#[test]
fn damage_to_the_context_before_does_not_matter() {
    for medium in MEDIA {
        let vm = frozen(medium);
        edit_slot(&vm, false, |slot| slot[40] ^= 1);
        vm.resume();
        vm.wait_for_more();
        vm.freeze();
        vm.verify();
    }
}

#[test]
fn a_vm_without_any_context_that_verifies_is_damaged_and_can_only_be_removed() {
    let vm = frozen("file");
    for newest in [true, false] {
        edit_slot_of_both(&vm, newest);
    }
    refused(&vm, &["context", "nothing was altered"]);
    let record = vm.record();
    assert_eq!(record["state"], "damaged", "{record}");
    assert!(record["detail"].as_str().is_some_and(|detail| detail.contains("slot")), "{record}");
    vm.command("run").expect_code(1);
    vm.command("remove").expect_code(0);
    assert_eq!(vm.state(), "absent");
}

fn edit_slot_of_both(vm: &Vm, first: bool) {
    let (path, data) = region(vm, "web/context");
    edit(&path, |bytes| {
        let slot = (bytes.len() - data) / 2;
        bytes[data + if first { 0 } else { slot } + 36] ^= 1;
    });
}

#[test]
fn a_context_of_a_newer_version_is_not_called_damaged() {
    let vm = frozen("file");
    edit_slot(&vm, true, |slot| {
        let body = frame::decode(slot, CONTEXT, 1, MOST).expect("a context").body.to_vec();
        let newer = frame::encode(CONTEXT, 2, &body);
        slot[..newer.len()].copy_from_slice(&newer);
    });
    refused(&vm, &["version", "newer perdure"]);
}

/// Makes nonsense of a context.
type Edit = fn(&mut Value);

#[test]
fn a_context_that_verifies_and_makes_no_sense_is_refused_and_the_vm_stays_frozen() {
    let nonsense: [(&str, Edit); 6] = [
        ("no vCPUs", |context| context["standing"]["machine"]["vcpus"] = Value::Array(Vec::new())),
        ("a device less", |context| {
            context["standing"]["machine"]["devices"].as_object_mut().unwrap().remove("power");
        }),
        ("a device more", |context| {
            let power = context["standing"]["machine"]["devices"]["power"].clone();
            context["standing"]["machine"]["devices"]["stranger"] = power;
        }),
        ("no state at all", |context| context["standing"] = Value::from("frozen")),
        ("more CPUs than were saved", |context| context["config"]["cpus"] = Value::from(3)),
        ("more memory than there is", |context| context["config"]["memory"] = Value::from("16M")),
    ];
    for (index, (what, make)) in nonsense.into_iter().enumerate() {
        println!("{what}");
        let vm = frozen(MEDIA[index % 2]);
        let (path, data) = region(&vm, "web/context");
        let sound = fs::read(&path).unwrap();
        edit_slot(&vm, true, |slot| {
            let body = frame::decode(slot, CONTEXT, 1, MOST).expect("a context").body;
            let mut context: Value = serde_json::from_slice(body).expect("JSON");
            make(&mut context);
            let bytes = frame::encode(CONTEXT, 1, &serde_json::to_vec(&context).unwrap());
            slot[..bytes.len()].copy_from_slice(&bytes);
        });
        let ended = vm.perdure.run_within(SOON, &["resume", "web"]);
        assert_eq!(ended.code, Some(1), "{what}: {ended:?}");
        assert!(!ended.stderr.contains("panicked") && ended.stderr.contains("web"), "{what}: {}", ended.stderr);
        // With its context back it goes on: nobody touched the rest.
        edit(&path, |bytes| bytes[data..].copy_from_slice(&sound[data..]));
        assert_eq!(vm.state(), "frozen", "{what}: {}", vm.record());
        vm.resume();
        vm.wait_for_more();
        vm.freeze();
        vm.verify();
    }
}

#[test]
fn a_header_with_one_damaged_copy_is_not_believed_and_with_two_not_read() {
    for (medium, copy) in [("file", 0), ("file", 1), ("nvdimm", 0), ("nvdimm", 1)] {
        let vm = frozen(medium);
        let (path, _) = region(&vm, "web/ram");
        edit(&path, |bytes| bytes[COPIES[copy] + 100] ^= 1);
        // Which copy was the newer one nobody can tell any more: the stamp of the other one is not believed.
        refused(&vm, &["header", "damaged"]);
        assert_eq!(vm.state(), "unclean");
        let check = vm.perdure.run(&["pool", "check"]).expect_code(1);
        assert!(check.stdout.contains("web/ram"), "{}", check.stdout);

        edit(&path, |bytes| bytes[COPIES[1 - copy] + 100] ^= 1);
        refused(&vm, &["both copies of the header"]);
        assert_eq!(vm.state(), "damaged");
        vm.perdure.run(&["pool", "check", "--json"]).expect_code(1).json();
    }
}

#[test]
fn a_header_of_a_newer_version_is_not_called_damaged() {
    let vm = frozen("nvdimm");
    let (path, _) = region(&vm, "web/ram");
    edit(&path, |bytes| {
        for copy in COPIES {
            bytes[copy + 8] = 2;
            let crc = crc32fast::hash(&bytes[copy..copy + CRC]);
            bytes[copy + CRC..copy + CRC + 4].copy_from_slice(&crc.to_le_bytes());
        }
    });
    refused(&vm, &["newer perdure", "version 2"]);
}

#[test]
fn a_region_whose_file_is_missing_is_named_with_its_path() {
    for (medium, name) in [("file", "web/ram"), ("nvdimm", "web/ram"), ("file", "web/context")] {
        let vm = frozen(medium);
        let (path, _) = region(&vm, name);
        let aside = vm.serial().with_extension("aside");
        fs::copy(&path, &aside).unwrap();
        fs::remove_file(&path).unwrap();
        refused(&vm, &["is missing", path.to_str().unwrap()]);
        assert_eq!(vm.state(), "damaged");
        vm.perdure.run(&["pool", "check"]).expect_code(1);
        // With its medium back the VM goes on.
        fs::copy(&aside, &path).unwrap();
        vm.resume();
        vm.wait_for_more();
        vm.verify();
    }
}

#[test]
fn a_region_whose_file_was_cut_short_is_refused() {
    let vm = frozen("file");
    let (path, _) = region(&vm, "web/ram");
    edit(&path, |bytes| bytes.truncate(bytes.len() / 2));
    refused(&vm, &["cut short"]);
    assert_eq!(vm.state(), "damaged");
}

#[test]
fn a_region_file_of_another_vm_is_refused() {
    let vm = frozen("file");
    vm.perdure
        .run(&[&["run", "other", "--detach", "--serial", "none", "--memory", "8M"], &COUNTER[..]].concat())
        .expect_code(0);
    vm.perdure.run(&["powerfail", "other"]).expect_code(0);
    let other = vm.perdure.run(&["inspect", "other", "--json"]).expect_code(0).json();
    let other = other["regions"][0]["file"].as_str().expect("a path").to_owned();
    let (path, _) = region(&vm, "web/ram");
    fs::copy(other, path).unwrap();
    refused(&vm, &["is not that of region web/ram"]);
}

/// Every command that needs the pool fails with `why`, and alters nothing.
#[track_caller]
fn no_pool(vm: &Vm, why: &[&str]) {
    let before = PoolBytes::of(vm.perdure.pool());
    let commands: [&[&str]; 9] = [
        &["list"],
        &["list", "--json"],
        &["inspect", "web"],
        &["resume", "web"],
        &["run", "web"],
        &["run", "--detach"],
        &["remove", "web", "--force"],
        &["pool", "list"],
        &["pool", "check"],
    ];
    for command in commands {
        let ended = vm.perdure.run(command).expect_code(1);
        for words in why {
            assert!(ended.stderr.contains(words), "{command:?}: no {words:?} in: {}", ended.stderr);
        }
        assert_eq!(ended.stdout, "", "{command:?}");
    }
    assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "something was altered");
}

#[test]
fn a_catalog_that_is_damaged_or_cut_short_is_left_alone() {
    let vm = frozen("file");
    let catalog = vm.perdure.pool().join("catalog");
    let sound = fs::read(&catalog).unwrap();
    // Its frame, the first change in its log (header, body), the settings of a medium.
    let (log, memory) = (4096, 4096 + (64 << 10));
    for at in [0, 8, 16, 24, 28, 40, log + 8192 + 8, log + 8192 + 60, memory + 600] {
        edit(&catalog, |bytes| bytes[at] ^= 1);
        no_pool(&vm, &["catalog", "damaged", "nothing was altered"]);
        fs::write(&catalog, &sound).unwrap();
    }
    for length in [0, 31, 32, sound.len() - 1] {
        fs::write(&catalog, &sound[..length]).unwrap();
        no_pool(&vm, &["catalog"]);
    }
    fs::remove_file(&catalog).unwrap();
    no_pool(&vm, &[]);
    fs::write(&catalog, &sound).unwrap();
    vm.resume();
    vm.wait_for_more();
    vm.verify();
}

#[test]
fn a_pool_of_a_newer_version_is_left_alone() {
    let vm = frozen("file");
    let catalog = vm.perdure.pool().join("catalog");
    edit(&catalog, |bytes| *bytes = frame::encode(CATALOG, 3, frame::decode(bytes, CATALOG, 2, MOST).unwrap().body));
    no_pool(&vm, &["newer perdure", "version 3", "nothing was altered"]);
}
