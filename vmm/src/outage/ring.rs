//! What a guest that keeps records on a disk ([`guests::records`]) was told to be durable, held against the disk itself, from outside. Persistent memory
//! counts as a disk here: what a flush of it covered is in its region's file, too, on each medium.
//!
//! What its console says is the acknowledgement. The disk is read by the host: after a cut, as it survived, before anything runs; and again as the VM
//! runs on, for what it has not overwritten meanwhile. After a return to a generation the disk is that of the generation, and what was acknowledged
//! since is due no more: from then on what the guest says anew counts.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use allocator::Pool;
use guests::records::{self, Ring};

/// What is known of a VM's records.
#[derive(Debug, Default)]
pub(super) struct Records {
    /// The region that is its disk.
    region: Option<String>,
    ring: Option<Ring>,
    /// The last that is durable, as its console had it.
    acknowledged: Option<u64>,
}

/// Who may write to the disk while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Nobody,
    /// It goes on writing.
    Guest,
}

impl Records {
    /// Those on this region, if its guest keeps some.
    pub(super) fn on(region: Option<String>) -> Self {
        Self { region, ..Self::default() }
    }

    /// It is made anew, disk and all.
    pub(super) fn forget(&mut self) {
        (self.ring, self.acknowledged) = (None, None);
    }

    /// It goes back to a generation, its disk with it.
    pub(super) fn go_back(&mut self) {
        self.acknowledged = None;
    }

    /// What a life of it has printed, up to now or in all. What is wrong with that.
    pub(super) fn hear(&mut self, life: &str) -> Option<String> {
        self.ring = Ring::of(life).ok().or(self.ring);
        let (before, now) = (self.acknowledged?, records::acknowledged(life)?);
        (now < before).then(|| format!("record {before} was told to be durable, and it goes on from {now}"))
    }

    fn learn(&mut self, life: &str) {
        self.acknowledged = records::acknowledged(life).or(self.acknowledged);
    }

    /// A life of it is over, which printed this.
    pub(super) fn bury(&mut self, life: &str) -> Option<String> {
        let wrong = self.hear(life);
        self.learn(life);
        wrong
    }

    /// What is wrong with the disk after a cut, on which the guest goes on from its memory or its kernel.
    pub(super) fn survived(&self, pool: &Path) -> Option<String> {
        self.look(pool, Writer::Nobody, || self.acknowledged)
    }

    /// What is wrong with the disk of a VM that runs. `life` gives what its present life has printed so far.
    pub(super) fn watch(&mut self, pool: &Path, life: impl Fn() -> String) -> Option<String> {
        let printed = life();
        let wrong = self.hear(&printed);
        self.learn(&printed);
        wrong.or_else(|| self.look(pool, Writer::Guest, || records::acknowledged(&life()).or(self.acknowledged)))
    }

    /// Reads the disk; `now` gives what is acknowledged when that is done.
    fn look(&self, pool: &Path, writer: Writer, now: impl Fn() -> Option<u64>) -> Option<String> {
        let (region, ring, acknowledged) = (self.region.as_ref()?, self.ring?, self.acknowledged?);
        let slots = match read(pool, region, &ring) {
            Ok(slots) => slots,
            Err(error) => return Some(format!("its disk cannot be read: {error}")),
        };
        let ahead = match writer {
            Writer::Nobody => 0,
            // Of what it has printed, some may not be here yet.
            Writer::Guest => ring.slots() / 4,
        };
        let written = ring.written_after(now()?).saturating_add(ahead);
        ring.verify(&slots, acknowledged, written).err().map(|error| error.to_string())
    }
}

fn read(pool: &Path, region: &str, ring: &Ring) -> io::Result<records::Slots> {
    let pool = Pool::open(pool, vfs::cut::host()).map_err(io::Error::other)?;
    let found = pool.list().into_iter().find(|found| found.name.to_string() == region);
    let found = found.ok_or_else(|| io::Error::other(format!("there is no region {region}")))?;
    let file = std::fs::File::open(pool.path_of(&found))?;
    ring.read(|at, buffer| match at.checked_add(buffer.len() as u64) {
        Some(end) if end <= found.size => file.read_exact_at(buffer, found.data_offset + at),
        _ => Err(io::Error::other("it is smaller than its guest says")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "records count=0 flush=1 hz=1 on=disk size=512 verify=1\nslots 64 found 0 0070657264757265\n";

    #[test]
    fn what_was_acknowledged_counts_until_a_generation_takes_its_place() {
        let mut records = Records::on(None);
        assert_eq!(records.bury(&format!("{BEGIN}record 1 00\nrecord 2 00\nrec")), None);
        assert_eq!((records.acknowledged, records.ring), (Some(2), Ring::of(BEGIN).ok()));
        assert_eq!(records.bury("ord 3 00\n"), None, "no whole line");
        assert_eq!(records.hear("record 2 00\n"), None);
        let wrong = records.hear("record 1 00\n");
        assert!(wrong.is_some_and(|wrong| wrong.contains("record 2 was told")), "it went back, and to no generation");
        // Booted anew: the disk is the same.
        assert!(records.hear(BEGIN).is_some());
        records.go_back();
        assert_eq!(records.bury("record 1 00\n"), None);
        assert_eq!(records.acknowledged, Some(1));
        records.forget();
        assert_eq!(records.survived(Path::new("/nowhere")), None, "nothing was told");
    }

    #[test]
    fn a_disk_that_cannot_be_read_is_no_good_disk() {
        let mut records = Records::on(Some("web/data".to_owned()));
        records.bury(&format!("{BEGIN}record 1 00\n"));
        assert!(records.survived(Path::new("/nowhere")).is_some_and(|wrong| wrong.contains("cannot be read")));
    }
}
