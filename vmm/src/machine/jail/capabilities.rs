//! Capabilities: what makes root more than a user.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// What a thread of this process needs after set-up to open `files` again: nothing where they belong to its user. Root opens files of others by
/// CAP_DAC_OVERRIDE alone.
pub(super) fn needed(files: &[PathBuf]) -> CapabilitySet {
    let user = rustix::process::geteuid().as_raw();
    let is_others = |file: &PathBuf| std::fs::metadata(file).is_ok_and(|found| found.uid() != user);
    if user == 0 && files.iter().any(is_others) { CapabilitySet::DAC_OVERRIDE } else { CapabilitySet::empty() }
}

/// The calling thread has `kept` of its capabilities, and none else, for ever. The bounding set stays: nothing is executed, and there are no new
/// privileges.
pub(super) fn give_up(kept: CapabilitySet) -> io::Result<()> {
    let had = rustix::thread::capabilities(None)?;
    let kept = had.permitted & kept;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}
