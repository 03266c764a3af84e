//! Brings pages home behind the guest, few at a time.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Shared, lock};
use crate::machine::config::VmConfig;
use crate::machine::memory::PAGE_SIZE;

/// Pages that are under way at a time. A freeze that begins meanwhile waits behind them at the device.
const BATCH: u64 = 32;
/// Pages that are flushed before those that wait hear of it: a quarter of what may be dirty, within these.
const QUOTA: std::ops::Range<u64> = 256..4096;
/// The guest's pages may go unseen for so long: they are bounded. What devices write is not.
const RARELY: Duration = Duration::from_millis(50);
/// The most that devices are taken to write, in bytes a second.
const DEVICES_PER_SECOND: u64 = 1 << 30;
/// How often a journal is written to see whether the medium still keeps its pace.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// Of how many pages: fewer than at the start, since a freeze that begins meanwhile waits.
const PROBE_PAGES: u64 = 256;

/// How often to look: so often that devices cannot write a quarter of `limit` pages unseen, if it has any that write much.
pub(super) fn period(config: &VmConfig, limit: u64) -> Duration {
    let devices = !config.disks.is_empty() || !config.net.is_empty() || config.vsock.is_some();
    let unseen = Duration::from_nanos((limit * PAGE_SIZE / 4).saturating_mul(1_000_000_000) / DEVICES_PER_SECOND);
    if devices { unseen.clamp(Duration::from_millis(1), RARELY) } else { RARELY }
}

/// The thread's life.
pub(super) fn serve(shared: &Shared) {
    let is_over = || shared.is_over.load(Ordering::SeqCst);
    let mut probed = (Instant::now(), 0);
    while !is_over() {
        let pages = shared.pages();
        pages.wait(shared.period, &is_over);
        if is_over() || shared.is_held.load(Ordering::SeqCst) {
            if !is_over() {
                // A freeze is under way, or done: its thaw tells.
                std::thread::sleep(Duration::from_millis(1));
            }
            continue;
        }
        let standing = match pages.look() {
            Ok(standing) => standing,
            Err(error) => return shared.give_up(error.to_string()),
        };
        let much = 2 * standing.unflushed >= shared.limit.load(Ordering::Relaxed);
        if (standing.waiting > 0 || much)
            && let Err(why) = cycle(shared)
        {
            pages.flushed(false);
            return shared.give_up(why);
        }
        let flushed = shared.flushed.load(Ordering::Relaxed);
        if probed.0.elapsed() > PROBE_EVERY && flushed != probed.1 {
            probe(shared);
            probed = (Instant::now(), flushed);
        }
    }
}

/// Makes durable a part of what is cold, and of what became so meanwhile. What is dirty beside it would go with the flush at its end, all at once;
/// so it goes before, by the batch. Only a part: who waits for room gets some, and a freeze that comes first has not undone all of it.
fn cycle(shared: &Shared) -> Result<(), String> {
    let pages = shared.pages();
    let quota = (shared.limit.load(Ordering::Relaxed) / 4).clamp(QUOTA.start, QUOTA.end);
    let mut touched = vec![false; shared.parts.len()];
    let mut count = 0;
    for round in 1..=2 {
        pages.rearm().map_err(|error| error.to_string())?;
        while count < round * quota {
            if shared.is_held.load(Ordering::SeqCst) || shared.is_over.load(Ordering::SeqCst) {
                // They count as unflushed again.
                pages.flushed(false);
                return Ok(());
            }
            let runs = pages.take(BATCH);
            if runs.is_empty() {
                break;
            }
            count += runs.iter().map(|run| run.end - run.start).sum::<u64>();
            for (part, touched) in shared.parts.iter().zip(&mut touched) {
                let own = part.of(&runs);
                if !own.is_empty() {
                    part.write_behind(&own).map_err(|error| error.to_string())?;
                    *touched = true;
                }
            }
        }
    }
    let touched = shared.parts.iter().zip(&touched).filter(|(_, touched)| **touched);
    touched.map(|(part, _)| part).try_for_each(super::Part::sync).map_err(|error| error.to_string())?;
    shared.flushed.fetch_add(count * PAGE_SIZE, Ordering::Relaxed);
    pages.flushed(true);
    Ok(())
}

/// Whether the medium still keeps its pace.
fn probe(shared: &Shared) {
    let mut journal = lock(&shared.journal);
    if shared.is_held.load(Ordering::SeqCst) {
        return;
    }
    let begun = Instant::now();
    let probed = journal.probe(PROBE_PAGES);
    let took = begun.elapsed();
    drop(journal);
    match probed {
        Ok(()) => {
            shared.pace().learn_journal(PROBE_PAGES * PAGE_SIZE, took);
            shared.reckon();
        }
        Err(error) => tracing::warn!("{}: the pace of its medium is not known: {error}", shared.name),
    }
}
