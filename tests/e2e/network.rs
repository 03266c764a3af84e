//! Network cards, sockets and balloons as the command line has them. The guests are bare-metal and know none of them: what a stock Linux does
//! with them the lab shows.

use std::os::unix::net::{UnixListener, UnixStream};

use crate::vm::{COUNTER, Vm};
use tests::perdure::Perdure;

/// A tap that there is not.
const NO_TAP: &str = "tap=perdure-none";

#[test]
fn what_is_no_card_and_a_tap_that_there_is_not_are_refused_and_leave_nothing() {
    let perdure = Perdure::new();
    let run =
        |net: &str| perdure.run(&[&["run", "web", "--detach", "--memory", "8M", "--net", net][..], &COUNTER].concat());
    for (net, why) in
        [("vm0", "write tap=NAME"), ("tap=vm0,mac=01:00:5e:10:00:01", "MAC address"), ("tap=a/b", "slash")]
    {
        let refused = run(net).expect_code(2).stderr;
        assert!(refused.contains(why), "{net}: {refused}");
    }
    let refused = run(NO_TAP).expect_code(1).stderr;
    assert!(refused.contains("ip tuntap add perdure-none mode tap"), "{refused}");
    let list = perdure.run(&["list", "--json"]).expect_code(0).stdout;
    assert!(!list.contains("web"), "{list}");
}

#[test]
fn a_vm_without_cards_or_sockets_or_balloon_gets_none_at_its_resume() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    let refused = vm.perdure.run(&["balloon", "web", "1M"]).expect_code(1).stderr;
    assert!(refused.contains("no memory balloon"), "{refused}");
    vm.freeze();
    for (option, value, why) in [("--net", NO_TAP, "has 0 network cards"), ("--vsock", "3:/x", "no sockets")] {
        let refused = vm.perdure.run(&["resume", "web", "--detach", option, value]).expect_code(1).stderr;
        assert!(refused.contains(why), "{refused}");
    }
    vm.resume();
    vm.wait_for_more();
    vm.command("stop").expect_code(0);
    vm.verify();
}

#[test]
fn sockets_are_listened_to_and_listened_to_again_after_an_outage_elsewhere_too() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().expect("a directory"));
    let (first, second) = (directory.path().join("first"), directory.path().join("second"));
    let sockets = |path: &std::path::Path| format!("7:{}", path.display());
    let taken = UnixListener::bind(&first).expect("a socket");
    let (serial, cards) = (vm.serial(), sockets(&first));
    let serial = serial.to_str().expect("a path of plain text");
    let run =
        [&["run", "web", "--detach", "--memory", "8M", "--serial", serial, "--vsock", &cards][..], &COUNTER].concat();
    let refused = vm.perdure.run(&run).expect_code(1).stderr;
    assert!(refused.contains("somebody listens there already"), "{refused}");
    drop(taken);
    vm.perdure.run(&run).expect_code(0);
    UnixStream::connect(&first).expect("it listens");
    for (resume, now) in [(None, &first), (Some(sockets(&second)), &second)] {
        vm.wait_for_more();
        vm.freeze();
        UnixStream::connect(now).expect_err("nobody listens");
        let more = resume.iter().flat_map(|vsock| ["--vsock", vsock]);
        vm.perdure.run(&["resume", "web", "--detach"].into_iter().chain(more).collect::<Vec<_>>()).expect_code(0);
        UnixStream::connect(now).expect("it listens");
    }
    vm.wait_for_more();
    vm.freeze();
    let inspected = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    assert_eq!(inspected["config"]["vsock"]["socket"], second.to_str().expect("a path of plain text"));
    let device = &inspected["context"]["standing"]["machine"]["devices"]["vsock"]["behind"];
    assert_eq!((&device["kind"], &device["cid"]), (&"vsock-v1".into(), &7.into()));
    let refused = vm.perdure.run(&["resume", "web", "--detach", "--vsock", "8:/x"]).expect_code(1).stderr;
    assert!(refused.contains("the CID of VM web is 7 and stays so"), "{refused}");
    vm.resume();
    vm.command("stop").expect_code(0);
    vm.verify();
}

#[test]
fn a_balloon_keeps_its_target_over_an_outage() {
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--balloon"]].concat());
    vm.wait_for_more();
    let refused = vm.perdure.run(&["balloon", "web", "1T"]).expect_code(1).stderr;
    assert!(refused.contains("does not fit"), "{refused}");
    vm.perdure.run(&["balloon", "web", "1M"]).expect_code(0);
    vm.freeze();
    vm.resume();
    let inspected = vm.perdure.run(&["inspect", "web"]).expect_code(0).stdout;
    assert!(
        inspected.lines().any(|line| line.starts_with("balloon") && line.contains("0 B, to be 1 MiB")),
        "{inspected}"
    );
    let top = vm.perdure.run(&["top", "--once", "--json"]).expect_code(0).json();
    assert_eq!(top[0]["balloon"], 0, "{top}");
    vm.wait_for_more();
    vm.command("stop").expect_code(0);
    vm.verify();
}
