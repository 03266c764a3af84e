//! Stock Debian in perdure, and the plug pulled with no warning at all: what is left is the newest generation.

use std::path::Path;
use std::time::Duration;
use tests::lab::chain;
use tests::lab::disk::{Cache, Disk};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

const SOON: Duration = Duration::from_secs(60);
const GUEST_BOOT: Duration = Duration::from_secs(180);
/// MiB of state under the chain, and milliseconds between links.
const CHAIN: (usize, u32) = (8, 20);
const LINKS: u64 = 100;
const CUTS: u64 = 1;
/// A generation a second: so much of the guest's time a cut may cost, and what it takes to store one in emulation.
const LOST_MOST_MS: u64 = 8_000;

/// What one life of the guest printed: whole links alone, by their number.
fn links(console: &[u8]) -> Vec<(u64, String)> {
    let text = String::from_utf8_lossy(console);
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let link = |line: &str| {
        let step = chain::last_step(format!("{line}\n").as_bytes());
        (step > 0).then(|| (step, line.to_owned()))
    };
    whole.lines().filter_map(link).collect()
}

fn milliseconds(link: &str) -> u64 {
    link.trim_end().rsplit(' ').next().and_then(|ms| ms.parse().ok()).unwrap_or(0)
}

/// Goes back to where the next life begins, and on with it. What both printed must be the same; what was lost, in ms.
fn splice(told: &mut Vec<(u64, String)>, next: Vec<(u64, String)>) -> u64 {
    let first = next.first().expect("it goes on").0;
    let hash = |link: &str| link.split(' ').nth(2).unwrap_or_default().to_owned();
    for (step, link) in &next {
        if let Some((_, before)) = told.iter().find(|(told, _)| told == step) {
            assert_eq!(hash(before), hash(link), "link {step} is another than before the cut");
        }
    }
    let end = told.last().map_or(0, |(_, link)| milliseconds(link));
    told.retain(|(step, _)| *step < first);
    let back_to = told.last().map_or(0, |(_, link)| milliseconds(link));
    told.extend(next);
    end.saturating_sub(back_to)
}

#[test]
fn a_chain_in_stock_linux_loses_no_more_than_the_interval_at_cuts_that_nobody_announced() {
    in_emulation(chain_survives_unannounced_cuts);
}

fn chain_survives_unannounced_cuts() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(&directory.path().join("disk"), 3072, Cache::Volatile { seed: 4 });
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    let options = Options { disk: Some(disk.clone()), files, ..Options::default() };
    let perdure = "export PERDURE_POOL=/pool/pool PERDURE_LOG=info; perdure";
    let serial = "/tmp/serial";

    let mut l1 = L1::boot(&options);
    l1.check(
        &format!(
            "{perdure} run web --kernel {} --initrd {} --cmdline 'console=ttyS0 quiet perdure.chain={},{}' --memory 192M \
             --medium file --serial {serial} --snapshot-every 1s --max-snapshots 5 --detach",
            guest::KERNEL,
            guest::INITRD,
            CHAIN.0,
            CHAIN.1
        ),
        SOON,
    );
    let mut told: Vec<(u64, String)> = Vec::new();
    for cut in 0..=CUTS {
        let enough = told.last().map_or(0, |(step, _)| *step) + LINKS;
        // From the first link on, so that a generation that is gone back to lies behind it.
        l1.wait_until(&format!("tail -c 4096 {serial}"), GUEST_BOOT, |seen| chain::last_step(&seen.output) >= enough);
        let newest = l1.check(&format!("{perdure} generations web | tail -n 2"), SOON);
        let printed = links(&l1.get(serial));
        let lost = if cut == 0 {
            told.extend(printed);
            0
        } else {
            splice(&mut told, printed)
        };
        eprintln!("cut {cut}: {lost} ms of the guest's time were lost before; now at link {enough}; {newest}");
        assert!(lost <= LOST_MOST_MS, "cut {cut}: {lost} ms were lost");
        if cut == CUTS {
            break;
        }
        l1.power_cut();
        l1 = L1::boot(&options);
        let words = l1.check(&format!("{perdure} resume web --detach 2>&1"), GUEST_BOOT);
        assert!(words.contains("generation"), "it says what it goes on from: {words}");
    }
    let console: String = told.iter().map(|(_, link)| format!("{link}\n")).collect();
    let verified = chain::verify(console.as_bytes(), CHAIN.0).unwrap_or_else(|broken| panic!("{broken}"));
    assert!(verified.steps >= LINKS * CUTS, "{verified:?}");
}
