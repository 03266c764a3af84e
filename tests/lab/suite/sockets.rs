//! Sockets between programs of a stock Debian and programs of L1, across an outage.

use std::path::Path;
use std::time::Duration;
use tests::lab::cpio::{self, File};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::outages::assert_frozen;

const SOON: Duration = Duration::from_secs(90);
const GUEST_BOOT: Duration = Duration::from_secs(300);
const PERDURE: &str = "export PERDURE_POOL=/tmp/pool; perdure";
const SERIAL: &str = "cat /tmp/serial";
const INITRD: &str = "guest/sockets-initrd";
/// More than any buffer on the way holds.
const BYTES: usize = 1 << 20;

/// Calls the host, and is called; then holds a connection, and calls again when that is gone.
const SCRIPT: &str = "\
    peer serve vsock:1234 &\n\
    peer call vsock:52 BYTES || exit\n\
    while peer hold vsock:52; do peer call vsock:52 BYTES && echo again || exit; done";

/// How often a line of `text` says `words`.
fn times(text: &str, words: &str) -> usize {
    text.lines().filter(|line| line.contains(words)).count()
}

/// What `peer call` prints when all came back as it was: the hash of the same bytes, computed here.
fn came_back() -> String {
    let mut bytes = vec![0; BYTES];
    blake3::Hasher::new_keyed(&[7; 32]).finalize_xof().fill(&mut bytes);
    format!("peer: {BYTES} bytes came back, {}", blake3::hash(&bytes).to_hex())
}

fn boot() -> L1 {
    let chain = Path::new(env!("CARGO_BIN_EXE_chain"));
    let program = std::fs::read(env!("CARGO_BIN_EXE_peer")).expect("a built program");
    let peer = File::program("bin/peer", program);
    let mut files = guest::files(chain);
    files.push(File::data(INITRD, cpio::append(guest::initrd(chain), std::slice::from_ref(&peer))));
    files.push(peer);
    let mut l1 = L1::boot(&Options { files, ..Options::default() });
    l1.spawn("peer serve /tmp/vsock_52", "/tmp/server");
    l1.wait_until("cat /tmp/server", SOON, |seen| seen.text().contains("serving"));
    let script = guest::script(&SCRIPT.replace("BYTES", &BYTES.to_string()));
    let run = format!(
        "{PERDURE} run web --kernel {} --initrd /{INITRD} --memory 256M --vsock 3:/tmp/vsock --serial /tmp/serial --detach \
         --cmdline 'console=ttyS0 quiet {script}'",
        guest::KERNEL
    );
    l1.check(&run, SOON);
    l1
}

fn sockets_work_before_and_after_an_outage() {
    let mut l1 = boot();
    let call = format!("peer call /tmp/vsock 1234 {BYTES}");
    let refused = "peer call /tmp/vsock 4321 1";
    for outages in 1..=2 {
        l1.wait_until(SERIAL, GUEST_BOOT, |seen| times(&seen.text(), "peer: connected") == outages);
        assert_eq!(times(&l1.check(SERIAL, SOON), &came_back()), outages, "the guest calls the host");
        assert_eq!(l1.check(&call, SOON).trim(), came_back(), "the host calls the guest");
        assert_ne!(l1.run(refused, SOON).status, 0, "nobody listens there");
        let held = format!("/tmp/held.{outages}");
        l1.spawn("peer hold /tmp/vsock 1234", &held);
        l1.wait_until(&format!("cat {held}"), SOON, |seen| seen.text().contains("peer: connected"));
        let (server, serial) = (l1.check("cat /tmp/server", SOON), l1.check(SERIAL, SOON));
        assert_eq!(times(&server, "is gone"), 2 * outages - 1, "{server}");
        assert_eq!(times(&serial, "peer: the connection is gone"), outages - 1, "{serial}");

        l1.check(&format!("{PERDURE} powerfail web"), SOON);
        assert_frozen(&l1.check(&format!("{PERDURE} list --json"), SOON), "web");
        // The host's ends, of a connection from each side, are told at once.
        l1.wait_until(&format!("cat {held}"), SOON, |seen| seen.text().contains("peer: the connection is gone"));
        l1.wait_until("cat /tmp/server", SOON, |seen| times(&seen.text(), "is gone") == 2 * outages);
        l1.check(&format!("{PERDURE} resume web --detach"), SOON);
        // And the guest's as soon as it runs again.
        l1.wait_until(SERIAL, SOON, |seen| times(&seen.text(), "peer: the connection is gone") == outages);
        l1.wait_until(SERIAL, SOON, |seen| times(&seen.text(), "again") == outages);
    }
}

#[test]
fn sockets_carry_a_megabyte_each_way_and_both_ends_are_told_of_an_outage_and_connect_anew() {
    in_emulation(sockets_work_before_and_after_an_outage);
}
