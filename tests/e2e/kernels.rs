//! Kernels that cannot be started: each is refused with its reason, and leaves no trace.

use tests::perdure::Perdure;

use crate::machine_code::{CODE, POWER_OFF, Segment, elf, write};
use crate::vm::record;

/// The kernel is refused in words that contain `why`, in time and before anything was printed by a guest.
#[track_caller]
fn refused(bytes: &[u8], why: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", bytes);
    let perdure = Perdure::new();
    for detach in [&[][..], &["--detach"]] {
        let ended = perdure.run(&[&["run", "--kernel", &kernel, "--memory", "8M"], detach].concat()).expect_code(1);
        assert_eq!(ended.stdout, "");
        for words in why.iter().chain(&[kernel.as_str()]) {
            assert!(ended.stderr.contains(words), "no {words:?} in: {}", ended.stderr);
        }
    }
}

#[test]
fn a_start_that_is_refused_leaves_no_vm_that_was_given_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", b"no kernel");
    let perdure = Perdure::new();
    for kernel in [kernel.as_str(), "/nowhere/vmlinuz"] {
        for detach in [&[][..], &["--detach"]] {
            perdure.run(&[&["run", "--kernel", kernel, "--memory", "8M"], detach].concat()).expect_code(1);
        }
    }
    assert_eq!(perdure.run(&["list", "--json"]).expect_code(0).json(), serde_json::json!([]));
    assert_eq!(perdure.run(&["pool", "list", "--json"]).expect_code(0).json(), serde_json::json!([]));
}

fn sound() -> Segment {
    Segment::code(POWER_OFF)
}

#[test]
fn the_elf_that_the_refused_ones_are_made_from_runs() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", &elf(&[sound()]));
    Perdure::new().run(&["run", "--kernel", &kernel, "--memory", "8M"]).expect_code(0);
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    refused(b"#!/bin/sh\necho hello\n", &["neither an ELF nor a bzImage"]);
    refused(b"", &["neither an ELF nor a bzImage"]);
    refused(&[0; 1 << 20], &["neither an ELF nor a bzImage"]);
}

#[test]
fn an_elf_that_was_cut_short_is_refused_wherever_it_was_cut() {
    let whole = elf(&[sound()]);
    for length in [4, 20, 63, 64, 100, 119, 120, whole.len() - 1] {
        refused(&whole[..length], &["truncated"]);
    }
}

#[test]
fn an_elf_whose_segments_overlap_is_refused() {
    let second = Segment { address: CODE + 4, ..sound() };
    refused(&elf(&[sound(), second]), &["overlap"]);
}

#[test]
fn an_elf_that_overflows_the_address_space_is_refused() {
    for memory in [u64::MAX, u64::MAX - CODE, 1 << 63] {
        refused(&elf(&[Segment { memory, ..sound() }]), &[]);
    }
    refused(&elf(&[sound(), Segment { address: u64::MAX - 4, ..sound() }]), &["address space"]);
}

#[test]
fn an_elf_below_the_first_mebibyte_is_refused() {
    refused(&elf(&[sound(), Segment { address: 0x1000, ..sound() }]), &["below 1 MiB"]);
}

#[test]
fn an_elf_for_another_machine_is_refused() {
    let mut arm = elf(&[sound()]);
    arm[18] = 183;
    refused(&arm, &["another architecture"]);
    let mut narrow = elf(&[sound()]);
    narrow[4] = 1;
    refused(&narrow, &["32-bit"]);
}

#[test]
fn a_kernel_larger_than_ram_is_refused_and_told_how_much_it_needs_and_starts_with_that() {
    let directory = tempfile::tempdir().unwrap();
    let large = elf(&[sound(), Segment { address: 16 << 20, memory: 4 << 20, bytes: vec![1; 1 << 20] }]);
    refused(&large, &["--memory 20M"]);
    let kernel = write(directory.path(), "kernel", &large);
    let perdure = Perdure::new();
    perdure.run(&["run", "large", "--kernel", &kernel, "--memory", "8M"]).expect_code(1);
    // The advice can be followed: nothing of the first attempt stands in the way.
    perdure.run(&["run", "large", "--kernel", &kernel, "--memory", "20M"]).expect_code(0);
}

#[test]
fn a_kernel_or_initrd_that_is_not_there_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", &elf(&[sound()]));
    let perdure = Perdure::new();
    let ended = perdure.run(&["run", "--kernel", "/nowhere/vmlinuz", "--memory", "8M"]).expect_code(1);
    assert!(ended.stderr.contains("/nowhere/vmlinuz") && ended.stderr.contains("No such file"), "{}", ended.stderr);
    let ended =
        perdure.run(&["run", "--kernel", &kernel, "--initrd", "/nowhere/initrd", "--memory", "8M"]).expect_code(1);
    assert!(ended.stderr.contains("/nowhere/initrd"), "{}", ended.stderr);
    let here = directory.path().to_str().unwrap();
    let ended = perdure.run(&["run", "--kernel", here, "--memory", "8M"]).expect_code(1);
    assert!(ended.stderr.contains("not a regular file"), "{}", ended.stderr);
}

#[test]
fn what_a_refused_start_left_in_ram_is_not_there_at_the_next_start() {
    // The kernel is in memory already when the initrd turns out not to fit.
    let directory = tempfile::tempdir().unwrap();
    let marks = Segment { address: 4 << 20, memory: 4096, bytes: vec![1; 4096] };
    let first = write(directory.path(), "first", &elf(&[sound(), marks]));
    let initrd = write(directory.path(), "initrd", &vec![0; 16 << 20]);
    let second = write(directory.path(), "second", &elf(&[Segment::code(&crate::machine_code::remembers())]));
    let perdure = Perdure::new();
    perdure.run(&["run", "ram", "--kernel", &first, "--initrd", &initrd, "--memory", "8M"]).expect_code(1);
    assert_eq!(perdure.run(&["run", "ram", "--kernel", &second, "--memory", "8M"]).expect_code(0).stdout, "0");
}

#[test]
fn a_refused_start_leaves_a_vm_that_was_there_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (kernel, bad) = (write(directory.path(), "kernel", &elf(&[sound()])), write(directory.path(), "bad", b"bad"));
    let perdure = Perdure::new();
    perdure.run(&["run", "there", "--kernel", &kernel, "--memory", "8M"]).expect_code(0);
    perdure.run(&["run", "there", "--kernel", &bad]).expect_code(1);
    assert_eq!(record(&perdure, "there")["state"], "stopped", "{}", record(&perdure, "there"));
    perdure.run(&["run", "there"]).expect_code(0);
}
