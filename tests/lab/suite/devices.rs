//! What a stock Linux makes of devices that have no lab test of their own: randomness, the VM generation ID, the power button.

use std::path::Path;
use std::time::Duration;
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

const SOON: Duration = Duration::from_secs(180);
const GUEST_BOOT: Duration = Duration::from_secs(180);
const SERIAL: &str = "/tmp/serial";

/// Draws random numbers, tells its VM generation ID and what ACPI's event device heard whenever the ID is another (Debian's cloud kernel has
/// no driver of its own for it), and turns itself off when its power button is pressed.
const SCRIPT: &str = r#"
echo "guest: $(cat /sys/class/misc/hw_random/rng_current) gave $(head -c 8 /dev/hwrng | wc -c) bytes"
while :; do
    id=$(od -An -tx1 -N 16 -j 0xff000 /dev/mem | tr -d ' ')
    [ "$id" = "$seen" ] || echo "guest: id $id, events $(awk '/23-edge/ { print $2 }' /proc/interrupts)"
    seen=$id
    sleep 0.3
done &
echo "guest: ready"
head -c 24 /dev/input/event0 >/tmp/event && echo "guest: pressed"
"#;

/// The IDs that the guest saw, and how many events it had heard of by then.
fn ids(serial: &str) -> Vec<(String, String)> {
    let told = serial.lines().filter_map(|line| line.trim().strip_prefix("guest: id ")?.split_once(", events "));
    told.map(|(id, events)| (id.to_owned(), events.to_owned())).collect()
}

#[test]
fn stock_linux_draws_random_numbers_hears_that_it_went_back_and_of_its_power_button() {
    in_emulation(devices_work);
}

fn devices_work() {
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    let mut l1 = L1::boot(&Options { files, ..Options::default() });
    let perdure = "export PERDURE_POOL=/tmp/pool PERDURE_LOG=info; perdure";
    let cmdline = format!("console=ttyS0 quiet {}", guest::script(SCRIPT));
    l1.check(
        &format!(
            "{perdure} run web --kernel {} --initrd {} --cmdline '{cmdline}' --memory 128M --rng --serial {SERIAL} --detach",
            guest::KERNEL,
            guest::INITRD
        ),
        SOON,
    );
    let wait_for = |l1: &mut L1, words: &str| {
        l1.wait_until(&format!("cat {SERIAL}"), GUEST_BOOT, |seen| seen.text().contains(words));
    };
    wait_for(&mut l1, "guest: ready");
    l1.check(&format!("{perdure} snapshot web"), SOON);

    // A resume from a freeze is no news to the guest.
    l1.check(&format!("{perdure} powerfail web && {perdure} resume web --detach"), SOON);
    l1.check(&format!("echo resumed >>{SERIAL}; sleep 2"), SOON);
    let text = l1.check(&format!("cat {SERIAL}"), SOON);
    assert!(text.contains("gave 8 bytes") && text.contains("virtio_rng"), "{text}");
    let [(first, none)] = &ids(&text)[..] else { panic!("{text}") };
    assert_eq!((first.len(), &**none), (32, "0"), "{text}");

    l1.check(&format!("{perdure} powerfail web && {perdure} resume web --generation 1 --detach"), SOON);
    wait_for(&mut l1, ", events 1");
    let text = l1.check(&format!("cat {SERIAL}"), SOON);
    let [(_, _), (second, _)] = &ids(&text)[..] else { panic!("{text}") };
    assert_ne!(first, second);

    let stopped = l1.check(&format!("{perdure} stop web --timeout 50s"), SOON);
    assert!(!stopped.contains("is turned off"), "{stopped}");
    wait_for(&mut l1, "guest: pressed");
}
