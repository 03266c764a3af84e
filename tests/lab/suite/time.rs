//! The clocks of a stock Linux that are to jump over an outage, of hours, on more CPUs than there are below it. Clocks that go on from where
//! they stood: see the Debian of [`crate::sqlite`].

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use tests::lab::disk::{Cache, Disk};
use tests::lab::guest;
use tests::lab::kernel_log;
use tests::lab::machine::{L1, Options, in_emulation};

const SOON: Duration = Duration::from_secs(180);
const GUEST_BOOT: Duration = Duration::from_secs(600);
const PERDURE: &str = "export PERDURE_POOL=/pool/pool PERDURE_LOG=info; perdure";
const SERIAL: &str = "/tmp/serial";
/// L1 has one.
const CPUS: u32 = 4;
/// How far L1's clock is set on while the VM is frozen, in seconds: the outage as it sees it, but for L1's boot.
const AWAY: i64 = 3 * 60 * 60;
/// By how much clocks may differ: they show whole seconds, and a guest that boots takes its clock's from another.
const OFF: i64 = 2;

/// Says what its clocks show, again and again. When its power button is pressed each CPU does something, and its kernel says what it has to
/// say. Its watchdogs wait for 20 s and more before they bark, as they do everywhere: less is nothing on a busy machine, and hours are more. A CPU that wakes from
/// idleness is not suspected, so one never sleeps.
const SCRIPT: &str = r#"
now() { read -r up rest </proc/uptime; echo "time: $up $(date +%s) $(cat /sys/class/rtc/rtc0/since_epoch) $(cat /sys/devices/system/cpu/online)"; }
echo "clocksource: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
while now; do sleep 1; done &
told=$!
taskset -c 1 sh -c 'while :; do :; done' &
busy=$!
until [ -e /dev/input/event0 ]; do sleep 0.1; done
head -c 24 /dev/input/event0 >/tmp/event
kill $busy $told
for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu sleep 0.1 && echo "runs: CPU $cpu"; done
echo "kernel log begins"
dmesg -r | grep '^<[0-4]>'
echo "kernel log ends: $(dmesg | wc -l)"
"#;

/// What a guest's clocks show.
#[derive(Debug, Clone)]
struct Clocks {
    /// Seconds since it booted.
    uptime: f64,
    /// Seconds since 1970, by its system clock.
    date: i64,
    /// The same by its real-time clock.
    rtc: i64,
    /// Its CPUs.
    online: String,
}

impl Clocks {
    fn read(line: &str) -> Option<Self> {
        let words: Vec<_> = line.trim().strip_prefix("time: ")?.split(' ').collect();
        let [uptime, date, rtc, online] = words.as_slice() else { return None };
        let (uptime, date, rtc) = (uptime.parse().ok()?, date.parse().ok()?, rtc.parse().ok()?);
        Some(Self { uptime, date, rtc, online: (*online).to_owned() })
    }
}

/// Waits for the second time that the guest tells its clocks, which it read in that time. What they showed, and L1's own clock before and after.
fn now(l1: &mut L1) -> (Clocks, RangeInclusive<i64>) {
    let told = format!("$(grep -c '^time: .*-{}' {SERIAL})", CPUS - 1);
    let wait = format!("date +%s; until=$(({told} + 2)); while [ {told} -lt $until ]; do sleep 0.1; done; date +%s");
    let seen = l1.check(&format!("{wait}; tail -c 400 {SERIAL}"), SOON);
    let mut lines = seen.lines();
    let mut date = || lines.next().and_then(|date| date.parse().ok()).expect("L1's date");
    let here = date()..=date();
    // The last line may still be under way.
    let clocks = lines
        .rev()
        .skip(usize::from(!seen.ends_with('\n')))
        .find_map(Clocks::read)
        .unwrap_or_else(|| panic!("the guest says nothing: {seen}"));
    (clocks, here)
}

/// With a device, since the guest's init loads no driver, and none for a power button, where it finds none.
fn run(l1: &mut L1) {
    let cmdline = format!("console=ttyS0 quiet {}", guest::script(SCRIPT));
    l1.check(
        &format!(
            "{PERDURE} run web --kernel {} --initrd {} --cpus {CPUS} --memory 192M --medium file --clock realtime --rng \
             --serial {SERIAL} --detach --cmdline '{cmdline}'",
            guest::KERNEL,
            guest::INITRD,
        ),
        SOON,
    );
    l1.wait_until(&format!("cat {SERIAL}"), GUEST_BOOT, |said| said.text().contains("time: "));
}

/// The clocks of a guest agree with L1's, and all its CPUs are there.
fn check(clocks: &Clocks, here: &RangeInclusive<i64>) {
    let allowed = here.start() - OFF..=here.end() + OFF;
    assert!(allowed.contains(&clocks.date), "a guest's clock and its host's: {clocks:?}, {here:?}");
    assert!(allowed.contains(&clocks.rtc), "its real-time clock and its host's: {clocks:?}, {here:?}");
    assert_eq!(clocks.online, format!("0-{}", CPUS - 1));
}

/// Presses the power button, and looks at what the guest says of its CPUs and its kernel.
fn stop(l1: &mut L1) {
    let stopped = l1.check(&format!("{PERDURE} stop web --timeout 200s 2>&1"), GUEST_BOOT);
    let said = l1.check(&format!("cat {SERIAL}"), SOON);
    assert!(!stopped.contains("is turned off"), "{stopped}{said}");
    for cpu in 0..CPUS {
        assert!(said.contains(&format!("runs: CPU {cpu}")), "CPU {cpu} does nothing: {said}");
    }
    kernel_log::assert_clean(&said);
}

fn clocks_jump_over_an_outage() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::create(&directory.path().join("disk"), 1024, Cache::Volatile { seed: 23 });
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    let options = Options { disk: Some(disk), files, ..Options::default() };
    let mut l1 = L1::boot(&options);
    run(&mut l1);
    let (clocks, here) = now(&mut l1);
    check(&clocks, &here);
    let before = clocks;
    let begun = here.start();
    l1.check(&format!("{PERDURE} powerfail web"), SOON);
    l1.power_cut();

    let mut l1 = L1::boot(&options);
    let resume = format!("{PERDURE} resume web --detach");
    let ended =
        l1.check(&format!("date -s @$(($(date +%s) + {AWAY})) >/dev/null && {resume} >/dev/null && date +%s"), SOON);
    let away = ended.trim().parse::<i64>().expect("L1's date") - begun;
    l1.wait_until(&format!("cat {SERIAL}"), SOON, |said| said.text().contains("time: "));
    // Each CPU's watchdog looks every 4 s.
    std::thread::sleep(Duration::from_secs(6));
    let (after, here) = now(&mut l1);
    eprintln!("away for {away} s: {before:?}, {after:?} at {here:?}");
    check(&after, &here);
    assert!(away >= AWAY, "the outage was {away} s long");
    // By its uptime as much has passed as by its clock.
    let passed = after.uptime - before.uptime - (after.date - before.date) as f64;
    assert!(passed.abs() <= 2.0 * OFF as f64, "{before:?}, {after:?}");
    stop(&mut l1);
}

#[test]
fn clocks_of_linux_on_more_cpus_than_its_host_has_jump_over_hours_of_outage_and_its_watchdogs_stay_calm() {
    in_emulation(clocks_jump_over_an_outage);
}
