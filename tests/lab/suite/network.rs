//! Stock Debian with a network card, and peers in L1 that stay up while its power is gone.

use std::path::Path;
use std::time::Duration;
use tests::lab::disk::{Cache, Disk};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::outages::assert_frozen;

const SOON: Duration = Duration::from_secs(180);
const GUEST_BOOT: Duration = Duration::from_secs(300);
/// How long the VM is gone. A peer retransmits some times in it.
const OUTAGE: Duration = Duration::from_secs(3);
/// Numbered lines that must reach the peer before the outage, and after it.
const LINES: u64 = 100;
/// Where L1's end of the guest's link has its address; the guest has .2.
const BRIDGE: &str = "\
    brctl addbr br0 && ip addr add 10.0.0.1/24 dev br0 && ip link set br0 up && \
    for tap in vm0 vm1; do tunctl -t $tap && ip link set $tap up && brctl addif br0 $tap || exit 1; done";
const MAC: &str = "02:00:5e:10:00:01";
const PERDURE: &str = "export PERDURE_POOL=/pool/pool; perdure";

/// L1 with a bridge and two taps in it, a peer that listens, and a VM `web` on the first tap, that runs `script` when it has its address.
fn boot(disk: &Disk, script: &str) -> L1 {
    let options = Options {
        disk: Some(disk.clone()),
        files: guest::files(Path::new(env!("CARGO_BIN_EXE_chain"))),
        ..Options::default()
    };
    let mut l1 = L1::boot(&options);
    l1.check(BRIDGE, SOON);
    l1.spawn("sleep 1000000 | nc -l -p 7000 >/tmp/received; echo ended", "/tmp/peer");
    // What the guest sends of itself: nothing but what the script says.
    let script = format!(
        "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6\n\
         ip addr add 10.0.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 10.0.0.1 && echo the network is up\n{script}"
    );
    l1.check(
        &format!(
            "{PERDURE} run web --kernel {} --initrd {} --memory 256M --net tap=vm0,mac={MAC} --serial /tmp/serial --detach \
             --cmdline 'console=ttyS0 quiet {}'",
            guest::KERNEL,
            guest::INITRD,
            guest::script(&script)
        ),
        SOON,
    );
    l1.wait_until("cat /tmp/serial", GUEST_BOOT, |seen| seen.text().contains("the network is up"));
    l1
}

/// The power fails, and comes back some time later.
fn outage(l1: &mut L1, resume: &str) {
    l1.check(&format!("{PERDURE} powerfail web"), SOON);
    assert_frozen(&l1.check(&format!("{PERDURE} list --json"), SOON), "web");
    assert_ne!(l1.run("pidof perdure", SOON).status, 0, "a VMM is left after the freeze");
    std::thread::sleep(OUTAGE);
    l1.check(&format!("{PERDURE} resume web --detach {resume}"), SOON);
}

/// The last of the lines that a peer got. They are numbered from 1 on, and none is missing.
fn last_line(received: &str) -> u64 {
    // The last one may still be under way.
    let whole = received.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let numbers = whole.lines().map(|line| line.parse::<u64>().unwrap_or_else(|error| panic!("{line:?}: {error}")));
    numbers.fold(0, |last, number| {
        assert_eq!(number, last + 1, "lines are missing, or came twice");
        number
    })
}

#[test]
fn a_tcp_connection_of_a_guest_goes_on_after_an_outage() {
    in_emulation(|| {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::create(&directory.path().join("disk"), 1024, Cache::Host);
        let send =
            "n=0; while n=$((n + 1)); echo $n; do sleep 0.02; done | nc 10.0.0.1 7000\necho the connection is gone";
        let mut l1 = boot(&disk, send);
        let peer = "cat /tmp/received";
        let mut lines = 0;
        // The second time to another tap.
        for resume in ["", "--net tap=vm1"] {
            l1.wait_until(peer, GUEST_BOOT, |seen| last_line(&seen.text()) >= lines + LINES);
            outage(&mut l1, resume);
            lines = last_line(&l1.check(peer, SOON));
        }
        l1.wait_until(peer, SOON, |seen| last_line(&seen.text()) >= lines + LINES);
        assert_eq!(l1.check("cat /tmp/peer", SOON), "", "the peer saw no end");
        assert!(!l1.check("cat /tmp/serial", SOON).contains("the connection is gone"));
        l1.check("ping -c 3 10.0.0.2", SOON);
    });
}

/// The port of the bridge behind which it has seen the guest's address: the byte after it in each entry of 16 of what the bridge knows.
const PORT: &str = "hexdump -v -e '16/1 \"%02x \" \"\\n\"' /sys/class/net/br0/brforward | sed -n 's/^02 00 5e 10 00 01 \\(..\\).*/\\1/p'";

#[test]
fn a_guest_that_says_nothing_is_found_behind_the_tap_that_it_was_moved_to() {
    in_emulation(|| {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::create(&directory.path().join("disk"), 1024, Cache::Host);
        let mut l1 = boot(&disk, "sleep 1000000");
        assert_eq!(l1.check(PORT, SOON).trim(), "01");
        outage(&mut l1, "--net tap=vm1");
        // Nobody asks it for anything: it announces itself.
        l1.wait_until(PORT, SOON, |seen| seen.text().trim() == "02");
        l1.check("ping -c 3 10.0.0.2", SOON);
        // A tap that somebody has: the holder is named, and the VM stays frozen.
        l1.check(&format!("{PERDURE} powerfail web"), SOON);
        l1.check(
            &format!("{PERDURE} run other --guest counter --serial none --detach --memory 16M --net tap=vm0"),
            SOON,
        );
        let refused = l1.run(&format!("{PERDURE} resume web --detach --net tap=vm0"), SOON);
        let other = l1.check("pidof perdure", SOON);
        assert_ne!(refused.status, 0);
        assert!(
            refused.text().contains(&format!("process {} (perdure run other) has it", other.trim())),
            "{}",
            refused.text()
        );
        l1.check(&format!("{PERDURE} resume web --detach"), SOON);
        l1.check("ping -c 3 10.0.0.2", SOON);
    });
}
