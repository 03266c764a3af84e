//! Does a machine survive a freeze here? A counting guest is stopped, read, set up anew on a second machine, read again,
//! and let run to its end. What the two readings differ in, this KVM does not restore; whether the guest noticed, its hash
//! chain tells.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::Value;

use super::throwaway::{End, Output, Throwaway, memory};
use crate::machine::config::ClockPolicy;
use crate::machine::kvm::vm::Outage;
use crate::machine::time::nanoseconds;
use crate::machine::{Machine, MachineStateV1};

/// Ticks in all, and those before the freeze.
const TICKS: u64 = 10;
const TICKS_BEFORE: u64 = 4;
/// Ticks a second: an emulated kernel keeps up with it.
const HZ: u32 = 100;
/// How long nothing may come: a tick takes 10 ms.
const PATIENCE: Duration = Duration::from_secs(5);

/// A field in which the state before and after differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    pub(super) field: String,
    pub(super) before: String,
    pub(super) after: String,
    /// It moves with time, so it has to differ.
    pub(super) moves: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Findings {
    /// The guest went on in the second machine, no tick and no byte lost.
    pub(super) continues: bool,
    /// Nothing differs but what moves with time.
    pub(super) equal: bool,
    pub(super) differences: Vec<Difference>,
    /// MSRs that make up a vCPU's state here.
    pub(super) msrs: usize,
    /// The frequency of the TSC.
    pub(super) tsc_khz: Option<u32>,
    /// Reading all state of the machine.
    pub(super) save_nanoseconds: u64,
    /// Setting all of it on a fresh machine, its vCPU made.
    pub(super) restore_nanoseconds: u64,
    /// Why it came to no end, or what the guest noticed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// Freezes a guest, and lets it go on in another machine.
pub(super) fn run() -> anyhow::Result<Findings> {
    let cmdline = format!("ticks={TICKS} hz={HZ} ram=64K");
    let (ram, output) = (memory()?, Output::default());
    let mut first = Throwaway::assemble("counter", &cmdline, ram.clone(), &output)?;
    first.machine.boot()?;
    first.machine.run()?;
    let awaited = format!("\ntick {TICKS_BEFORE} ");
    match first.wait(PATIENCE, |text| text.contains(&awaited)) {
        End::Reached => {}
        end => anyhow::bail!("the guest did not get as far as to be frozen: {end}"),
    }
    first.machine.pause()?;
    let (before, save) = timed(|| save(&first.machine))?;

    let mut second = Throwaway::assemble("counter", &cmdline, ram, &output)?;
    let outage = Outage::since(&before.vm.clock, ClockPolicy::Continue);
    let ((), restore) = timed(|| Ok(second.machine.restore(&before, outage)?))?;
    let (after, _) = timed(|| self::save(&second.machine))?;
    let differences = differences(&before, &after)?;
    second.machine.run()?;
    let end = second.wait(PATIENCE, |_| false);
    let error = unbroken(&end, &output.text()).err();
    let vcpu = before.vcpus.first();
    Ok(Findings {
        continues: error.is_none(),
        equal: differences.iter().all(|difference| difference.moves),
        differences,
        msrs: vcpu.map_or(0, |vcpu| vcpu.msrs.len()),
        tsc_khz: vcpu.and_then(|vcpu| vcpu.tsc_khz),
        save_nanoseconds: save,
        restore_nanoseconds: restore,
        error,
    })
}

fn save(machine: &Machine) -> anyhow::Result<MachineStateV1> {
    machine.quiesce_devices(Instant::now())?;
    Ok(machine.save_cpus(machine.save_devices())?)
}

fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, u64)> {
    let begun = Instant::now();
    let done = work()?;
    Ok((done, nanoseconds(begun.elapsed())))
}

/// Whether the guest came to its end with no tick and no byte lost, doubled or altered.
fn unbroken(end: &End, output: &str) -> Result<(), String> {
    let report = guests::chain::verify(output).map_err(|error| error.to_string())?;
    if report.complete && report.ticks == TICKS {
        return Ok(());
    }
    Err(format!("after its restore the guest got to tick {} of {TICKS}: {end}", report.ticks))
}

fn differences(before: &MachineStateV1, after: &MachineStateV1) -> anyhow::Result<Vec<Difference>> {
    let (mut before, mut after) = (before.clone(), after.clone());
    let mut found = Vec::new();
    // MSRs by their number rather than their place; what is left of the state has none.
    for (index, (before, after)) in before.vcpus.iter_mut().zip(&mut after.vcpus).enumerate() {
        let (before, after) = (std::mem::take(&mut before.msrs), std::mem::take(&mut after.msrs));
        compare_msrs(index, &before, &after, &mut found);
    }
    compare("", &serde_json::to_value(&before)?, &serde_json::to_value(&after)?, &mut found);
    Ok(found)
}

/// MSRs that count time: TSC, MPERF, APERF.
const MOVING_MSRS: [u32; 3] = [0x10, 0xe7, 0xe8];

fn compare_msrs(vcpu: usize, before: &[(u32, u64)], after: &[(u32, u64)], found: &mut Vec<Difference>) {
    let value_in =
        |msrs: &[(u32, u64)], number| msrs.iter().find(|(known, _)| *known == number).map(|(_, value)| *value);
    let show = |value: Option<u64>| value.map_or_else(|| "cannot be read".to_owned(), |value| format!("{value:#x}"));
    let only_after = after.iter().filter(|(number, _)| value_in(before, *number).is_none());
    for &(number, _) in before.iter().chain(only_after) {
        let (was, is) = (value_in(before, number), value_in(after, number));
        if was != is {
            let moves = MOVING_MSRS.contains(&number) && was.is_some() && is.is_some();
            let field = format!("vcpus[{vcpu}].msrs[{number:#x}]");
            found.push(Difference { field, before: show(was), after: show(is), moves });
        }
    }
}

fn compare(path: &str, before: &Value, after: &Value, found: &mut Vec<Difference>) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let keys: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let value = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                compare(&path, &value(before), &value(after), found);
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (index, (before, after)) in before.iter().zip(after).enumerate() {
                compare(&format!("{path}[{index}]"), before, after, found);
            }
        }
        _ if before == after => {}
        (Value::String(old), Value::String(new)) => match (STANDARD.decode(old), STANDARD.decode(new)) {
            (Ok(old), Ok(new)) if old.len() == new.len() => compare_bytes(path, &old, &new, found),
            _ => found.push(differing(path, before, after)),
        },
        _ => found.push(differing(path, before, after)),
    }
}

fn differing(path: &str, before: &Value, after: &Value) -> Difference {
    // The guest's clock goes on from where it stood, so it is off the host's by the outage.
    let moves = ["vm.clock.", "devices.rtc.offset_"].iter().any(|clock| path.starts_with(clock));
    Difference { field: path.to_owned(), before: before.to_string(), after: after.to_string(), moves }
}

/// Runs of bytes that differ, each a difference of its own.
fn compare_bytes(path: &str, before: &[u8], after: &[u8], found: &mut Vec<Difference>) {
    let differs = |at: &usize| before.get(*at) != after.get(*at);
    let mut at = 0;
    while let Some(start) = (at..before.len()).find(differs) {
        let end = (start..before.len()).find(|at| !differs(at)).unwrap_or(before.len());
        found.push(Difference {
            field: format!("{path} bytes {start:#x}..{end:#x}"),
            before: hex(&before[start..end]),
            after: hex(&after[start..end]),
            moves: moves_with_time(path, start, end),
        });
        at = end;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Parts of KVM's structures that time changes though no vCPU runs: the blob, and the bytes from and to.
const MOVING_BYTES: [(&str, usize, usize); 7] = [
    // The local APIC's current count (Intel SDM volume 3, 11.5.4).
    (".lapic", 0x390, 0x394),
    // `kvm_pit_state2`: `count_load_time` of its three channels, on the host's clock.
    (".pit", 16, 24),
    (".pit", 40, 48),
    (".pit", 64, 72),
    // `kvm_irqchip`: requests of the two PICs (`last_irr`, `irr`) and the IOAPIC (`irr`); the timer ticks on.
    (".irqchips[0]", 8, 10),
    (".irqchips[1]", 8, 10),
    (".irqchips[2]", 24, 28),
];

fn moves_with_time(path: &str, start: usize, end: usize) -> bool {
    MOVING_BYTES.iter().any(|(blob, from, to)| path.ends_with(blob) && *from <= start && end <= *to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn between(before: &Value, after: &Value) -> Vec<Difference> {
        let mut found = Vec::new();
        compare("", before, after, &mut found);
        found
    }

    #[test]
    fn equal_states_have_no_difference() {
        let state = json!({"vm": {"pit": STANDARD.encode([1; 112]), "clock": {"kvmclock_ns": 5}}});
        assert_eq!(between(&state, &state), []);
    }

    #[test]
    fn bytes_that_differ_are_told_run_by_run_and_time_is_told_apart() {
        let mut later = vec![0_u8; 112];
        later[17] = 9; // count_load_time of channel 0
        (later[24], later[25]) = (1, 2); // count of channel 1
        let blob = |bytes: &[u8]| json!({"vm": {"pit": STANDARD.encode(bytes)}});
        let found = between(&blob(&[0; 112]), &blob(&later));
        assert_eq!(found.len(), 2);
        assert!(found[0].moves && found[0].field == "vm.pit bytes 0x11..0x12", "{:?}", found[0]);
        assert!(!found[1].moves && found[1].field == "vm.pit bytes 0x18..0x1a", "{:?}", found[1]);
        assert_eq!((found[1].before.as_str(), found[1].after.as_str()), ("0000", "0102"));
    }

    #[test]
    fn a_field_that_is_gone_or_of_another_length_differs() {
        let found = between(&json!({"a": 1, "b": "AAAA"}), &json!({"b": "AAAAAAAA"}));
        assert_eq!(found.iter().map(|found| found.field.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(found.iter().all(|found| !found.moves));
    }

    #[test]
    fn clocks_move_and_other_numbers_do_not() {
        let found = between(
            &json!({"vm": {"clock": {"kvmclock_ns": 5}}, "vcpus": [{"mp_state": 3}], "devices": {"rtc": {"offset_seconds": 0, "index": 1}}}),
            &json!({"vm": {"clock": {"kvmclock_ns": 6}}, "vcpus": [{"mp_state": 0}], "devices": {"rtc": {"offset_seconds": -1, "index": 2}}}),
        );
        let moves: Vec<_> = found.iter().map(|found| (found.field.as_str(), found.moves)).collect();
        let told = [
            ("devices.rtc.index", false),
            ("devices.rtc.offset_seconds", true),
            ("vcpus[0].mp_state", false),
            ("vm.clock.kvmclock_ns", true),
        ];
        assert_eq!(moves, told);
    }

    #[test]
    fn msrs_are_told_by_number_also_one_that_only_one_machine_has() {
        let mut found = Vec::new();
        compare_msrs(0, &[(0x10, 5), (0x1a0, 1), (0x3a, 5)], &[(0x10, 9), (0x1a0, 0), (0xc1, 7)], &mut found);
        let told: Vec<_> = found.iter().map(|found| (found.field.as_str(), found.moves)).collect();
        assert_eq!(
            told,
            [
                ("vcpus[0].msrs[0x10]", true),
                ("vcpus[0].msrs[0x1a0]", false),
                ("vcpus[0].msrs[0x3a]", false),
                ("vcpus[0].msrs[0xc1]", false)
            ]
        );
        assert_eq!(found[2].after, "cannot be read");
    }

    #[test]
    fn a_lost_tick_and_an_early_end_are_no_continuity() {
        let banner = format!("counter ticks={TICKS} hz={HZ} every=1 ram=65536 verify=1\n");
        let mut chain = guests::chain::Chain::new(65536).unwrap();
        let ticks: Vec<String> = (1..=TICKS).map(|tick| format!("tick {tick} {:016x}\n", chain.advance())).collect();
        let done = format!("done {TICKS} {:016x}\n", chain.hash());
        let off = End::Request(devices::MachineRequest::PowerOff);
        assert_eq!(unbroken(&off, &format!("{banner}{}{done}", ticks.concat())), Ok(()));
        let lost = unbroken(&off, &format!("{banner}{}{}", ticks[..4].concat(), ticks[5..].concat()));
        assert!(lost.unwrap_err().contains("lost tick 5"));
        let early = unbroken(&End::Hangs(PATIENCE), &format!("{banner}{}", ticks[..4].concat()));
        assert!(early.unwrap_err().contains("tick 4 of 10: it hangs"));
    }
}
