//! The flags of `run` and `resume` that say when generations are taken, how they are stored, and which stay.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::machine::config::generations::{Compress, GenerationsConfig, Integrity};
use crate::machine::config::{ByteSize, VmConfig};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Generations")]
pub(super) struct RetentionArgs {
    /// Take a generation each time this has passed, as in 10s; 0s: only when asked for [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    snapshot_every: Option<Duration>,
    /// Automatic generations that stay at most; 0: any number [default: 1000]
    #[arg(long, value_name = "N")]
    max_snapshots: Option<u32>,
    /// Automatic generations that stay at least, however old [default: 10]
    #[arg(long, value_name = "N")]
    min_snapshots: Option<u32>,
    /// Age from which on automatic generations go, as in 7days; 0s: age does not matter [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    expiration: Option<Duration>,
    /// Generations that lean on one stored copy of a page before another is written; 0: any number [default: 0]
    #[arg(long, value_name = "N")]
    redundancy: Option<u32>,
    /// What a restore does with a page that is lost in every copy: fail, or warn and go on [default: fail]
    #[arg(long, value_name = "POLICY")]
    integrity: Option<Integrity>,
    /// How pages are stored: none, lz4 or zstd [default: none]
    #[arg(long, value_name = "CODEC")]
    compress: Option<Compress>,
    /// What is gathered before it is written [default: 4M]
    #[arg(long, value_name = "SIZE")]
    bufsize: Option<ByteSize>,
    /// Per cent of the store that deleted generations may hold before their space is taken back [default: 25]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    threshold: Option<u32>,
}

impl RetentionArgs {
    /// Puts what was given over what `config` has.
    pub(super) fn configure(&self, config: &mut VmConfig) {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let some_unless_zero = |time: Duration| (!time.is_zero()).then(|| milliseconds(time));
        if let Some(every) = self.snapshot_every {
            config.snapshot_every_ms = some_unless_zero(every);
        }
        let GenerationsConfig {
            max_snapshots,
            min_snapshots,
            expiration_ms,
            redundancy,
            integrity,
            compress,
            bufsize,
            threshold,
        } = &mut config.generations;
        if let Some(most) = self.max_snapshots {
            *max_snapshots = (most > 0).then_some(most);
        }
        if let Some(expiration) = self.expiration {
            *expiration_ms = some_unless_zero(expiration);
        }
        if let Some(copies) = self.redundancy {
            *redundancy = NonZeroU32::new(copies);
        }
        *min_snapshots = self.min_snapshots.unwrap_or(*min_snapshots);
        *integrity = self.integrity.unwrap_or(*integrity);
        *compress = self.compress.unwrap_or(*compress);
        *bufsize = self.bufsize.unwrap_or(*bufsize);
        *threshold = self.threshold.unwrap_or(*threshold);
    }
}
