//! Cuts of the power, simulated on a real file system.
//!
//! A process that is killed loses nothing that it has written: the kernel has it. So a simulator that kills a process has to take away, too,
//! what a cut would have taken. For that the process keeps a record, and the simulator holds a model of the disk against it:
//!
//! ```text
//!   before the process starts     while it runs                              after it was killed
//!   ────────────────────────────  ─────────────────────────────────────────  ─────────────────────────────────────────────
//!   image::Image::take: what the  record::RecordingVfs: each operation goes  image::Image::cut: the record is replayed on the
//!   directory holds, in a         to the host, and then into the record      model; what went past the record (mappings, raw
//!   CrashVfs; all of it durable   (a file); point: where it may be cut       descriptors) is found by comparison, and the kernel
//!                                                                            says whether it is on the medium (cachestat);
//!                                                                            the model is cut, and what is left goes back
//! ```
//!
//! What goes past the `Vfs` and may be flushed piece by piece (a guest's disks, its persistent memory) tells the record itself: [`trace`].
//!
//! Two environment variables switch it on, and nothing else does: `PERDURE_CUT_RECORD` names the record, `PERDURE_CUT_AT` where the process
//! kills itself ([`point`]).

pub mod image;
mod log;
pub mod point;
pub mod record;
pub mod trace;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::{HostVfs, Vfs};
use record::{Recorder, RecordingVfs};

/// Names the file that a process records its operations in.
pub const RECORD: &str = "PERDURE_CUT_RECORD";

/// The record of this process, if it keeps one.
fn recorder() -> Option<&'static Arc<Recorder>> {
    static RECORDER: OnceLock<Option<Arc<Recorder>>> = OnceLock::new();
    let open = || {
        let path = std::env::var_os(RECORD)?;
        // A simulator that is killed leaves no VMs behind.
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
        // A simulation whose record is missing would find nothing lost: better none at all.
        Some(Arc::new(Recorder::open(Path::new(&path)).unwrap_or_else(|_| std::process::abort())))
    };
    RECORDER.get_or_init(open).as_ref()
}

/// The file system of this machine, as this process is to use it: recorded if a simulator asks for that.
#[must_use]
pub fn host() -> Arc<dyn Vfs> {
    match recorder() {
        Some(recorder) => Arc::new(RecordingVfs::new(Arc::clone(recorder))),
        None => Arc::new(HostVfs),
    }
}
