//! A host that lacks something: what, and what to do about it, in one line.

use std::process::Command;

use tests::perdure::{Ended, LIMIT, Running, binary};

/// Runs a script as root of a mount namespace of its own. `$0` is perdure, `$PERDURE_POOL` an empty directory.
#[track_caller]
fn in_a_namespace(script: &str) -> Ended {
    let pool = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(binary()).env("PERDURE_POOL", pool.path());
    let mut running = Running::start(&mut command, format!("(in a mount namespace) {script}"));
    running.close_stdin();
    running.wait(LIMIT)
}

#[test]
fn without_dev_kvm_run_says_what_to_do_and_leaves_nothing() {
    let script = r#"mount -t tmpfs none /dev && "$0" run --memory 8M; echo $?; "$0" list --json"#;
    let ended = in_a_namespace(script).expect_code(0);
    assert!(ended.stderr.contains("/dev/kvm does not exist") && ended.stderr.contains("modprobe"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "1\n[]\n");
}

#[test]
fn without_permission_run_says_whom_to_ask_and_leaves_nothing() {
    // On a file system mounted nodev a device file is refused even to root, with EACCES.
    let script = r#"mount -t tmpfs -o nodev none /dev && mknod /dev/kvm c 10 232 && "$0" run --memory 8M; echo $?
        "$0" list --json"#;
    let ended = in_a_namespace(script).expect_code(0);
    assert!(ended.stderr.contains("no permission") && ended.stderr.contains("group kvm"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "1\n[]\n");
}

#[test]
fn without_dev_kvm_a_frozen_vm_stays_frozen() {
    let script = r#"set -e
        "$0" run web --guest counter --memory 8M --serial none --detach >&2
        "$0" powerfail web >&2
        mount -t tmpfs none /dev
        set +e
        "$0" resume web; echo $?
        "$0" list"#;
    let ended = in_a_namespace(script).expect_code(0);
    assert!(ended.stdout.starts_with("1\n") && ended.stdout.contains("frozen"), "{}", ended.stdout);
    assert!(ended.stderr.contains("/dev/kvm does not exist"), "{}", ended.stderr);
}

#[test]
fn what_is_no_kvm_is_called_none() {
    let ended = in_a_namespace(r#"mount --bind /dev/null /dev/kvm && "$0" run --memory 8M"#).expect_code(1);
    assert!(ended.stderr.contains("/dev/kvm"), "{}", ended.stderr);
}

#[test]
fn a_full_disk_is_noticed_before_the_guest_runs_and_what_fits_still_runs() {
    for medium in crate::vm::MEDIA {
        let script = format!(
            r#"mount -t tmpfs -o size=20m none "$PERDURE_POOL" || exit 9
            "$0" run big --memory 64M --medium {medium}; echo big $?
            "$0" run --memory 64M --medium {medium}; echo unnamed $?
            "$0" list --json
            "$0" pool check || echo check $?
            "$0" run small --memory 8M --medium {medium} --guest counter --cmdline 'ticks=3 hz=500 ram=8K' >/dev/null
            echo small $?
            "$0" pool check || echo check $?"#
        );
        let ended = in_a_namespace(&script).expect_code(0);
        let expected = "big 1\nunnamed 1\n[]\n0 regions, 0 problems\nsmall 0\n2 regions, 0 problems\n";
        assert_eq!(ended.stdout, expected, "{medium}: {}", ended.stderr);
        assert!(ended.stderr.contains("are free on that file system: make room"), "{}", ended.stderr);
    }
}

#[test]
fn serial_output_that_finds_its_disk_full_waits_and_is_not_lost() {
    // The disk takes 4 KiB; the guest writes more; then there is room again, after an outage.
    let script = r#"set -e
        mkdir -p "$PERDURE_POOL/disk"
        mount -t tmpfs -o size=4k none "$PERDURE_POOL/disk"
        "$0" run web --guest counter --cmdline 'hz=1000 ram=8K' --memory 8M --serial "$PERDURE_POOL/disk/serial" --detach >&2
        grows_to() { until [ "$(wc -c <"$PERDURE_POOL/disk/serial")" -ge "$1" ]; do sleep 0.05; done; }
        grows_to 4096
        sleep 0.3
        "$0" powerfail web >&2
        mount -o remount,size=4m "$PERDURE_POOL/disk"
        "$0" resume web --detach >&2
        grows_to 6000
        "$0" powerfail web >&2
        cat "$PERDURE_POOL/disk/serial""#;
    let ended = in_a_namespace(script).expect_code(0);
    assert!(ended.stdout.len() >= 6000, "{}", ended.stdout.len());
    crate::vm::unbroken(&ended.stdout);
}

#[test]
fn a_pool_that_cannot_be_written_is_named() {
    let script = r#"mount -t tmpfs -o ro none "$PERDURE_POOL" || exit 9
        "$0" run --memory 8M"#;
    let ended = in_a_namespace(script).expect_code(1);
    assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
}
