//! The lab: full KVM, a stock Linux, real power cuts and persistent memory, on a machine that has none of them.
//!
//! ```text
//!   this machine     lab driver (these modules), disk server, QEMU's TCG with an emulated AMD SVM
//!   L1               Debian's cloud kernel, our init; /dev/kvm works; perdure runs here; /pool (disk), /dax (pmem)
//!   guest            Debian's cloud kernel again, in perdure: a shell, the hash chain, a sort; or Debian and SQLite on a disk
//! ```
//!
//! - [`machine`]: [`L1`](machine::L1): boot, run commands, pull the plug
//! - [`disk`]: what a power cut does to a disk: the volatile write cache
//! - [`nbd`]: serves such a disk to QEMU
//! - [`cpio`]: adds files to an initramfs
//! - [`chain`]: the hash chain that a guest prints, and its verification
//! - [`debian`]: Debian on a disk of the pool, SQLite in it, and the disk as seen from outside; [`kernel_log`]: what its kernel complains of
//! - [`campaign`]: power cuts again and again, of a guest that is one or the other
//! - [`bench`]: disk and network beside QEMU's, by hand
//! - [`guest`]: kernels and initial file systems for the guest in perdure
//!
//! What a cut destroys here, and what it does not:
//!
//! | state | at [`L1::power_cut`](machine::L1::power_cut) |
//! |---|---|
//! | L1's CPUs, RAM, page cache, processes | gone |
//! | writes that L1's disk acknowledged and no flush followed | kept, lost or torn, sector by sector, by seed ([`disk::Cache::Volatile`]), or all kept ([`disk::Cache::Host`]) |
//! | writes before a completed flush | kept |
//! | stores to `/dax` | kept, flushed or not: TCG has no CPU cache to lose. So the lab shows that the data are in place, not that CLWB was not forgotten |

pub mod bench;
pub mod campaign;
pub mod chain;
pub mod cpio;
pub mod debian;
pub mod disk;
pub mod guest;
pub mod kernel_log;
pub mod machine;
pub mod nbd;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The directory of the lab's kernel and initramfs bases, prepared on first use.
///
/// # Panics
///
/// When `tests/lab/prepare` cannot get what it needs; the message is its own and says what to install.
pub fn image() -> PathBuf {
    static PREPARED: OnceLock<PathBuf> = OnceLock::new();
    PREPARED
        .get_or_init(|| {
            let prepare = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/prepare");
            let output = Command::new("bash")
                .arg(prepare)
                .stdin(Stdio::null())
                .output()
                .unwrap_or_else(|error| panic!("running {prepare}: {error}"));
            assert!(
                output.status.success(),
                "the lab cannot be prepared:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
            PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/lab"))
        })
        .clone()
}
