//! A swap file of the kernel, on the pool's disk, for as long as a bench runs.
//!
//! util-linux's `mkswap`, `swapon` and `swapoff` do it. Swap belongs to the whole system: while it is there, other processes may be
//! swapped out to it as well if memory is short.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Absent, PagingError};

/// Makes a swap file of `bytes` at `path` and hands it to the kernel. Whoever asks for it takes it away: see [`super::guard`].
///
/// # Errors
/// [`PagingError::Absent`], with what is needed.
pub(super) fn add(path: &Path, bytes: u64) -> Result<(), PagingError> {
    write_zeros(path, bytes)
        .map_err(|error| Absent::new(format!("{} of {bytes} bytes cannot be written: {error}", path.display())))?;
    util_linux("mkswap", &["--quiet"], path)?;
    util_linux("swapon", &[], path)
}

/// Takes it back from the kernel and removes it. What lies in it and is still needed comes to memory first.
pub(super) fn remove(path: &Path) {
    let active = std::fs::read_to_string("/proc/swaps").is_ok_and(|swaps| is_active(&swaps, path));
    if active && let Err(error) = util_linux("swapoff", &[], path) {
        tracing::error!("{error}; `swapoff {}` gives the disk space back", path.display());
        return;
    }
    let _ = std::fs::remove_file(path);
}

/// Blocks that are there: a hole is refused, and a first write is dearer than a second.
fn write_zeros(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).open(path)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    let zeros = vec![0; 1 << 20];
    for _ in 0..bytes.div_ceil(zeros.len() as u64) {
        file.write_all(&zeros)?;
    }
    file.sync_all()
}

fn util_linux(program: &str, arguments: &[&str], path: &Path) -> Result<(), PagingError> {
    // Where it lies is not on the path of every user.
    let places = ["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).join(program));
    let program_path = places.into_iter().find(|place| place.exists()).unwrap_or_else(|| PathBuf::from(program));
    let run = Command::new(program_path).args(arguments).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).output();
    let failed = match run {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("{program} cannot be started: {error}"),
    };
    Err(Absent::new(format!(
        "{failed}: kernel swap needs root (CAP_SYS_ADMIN), util-linux and a file system that can hold swap"
    ))
    .into())
}

/// Whether `/proc/swaps` lists `path`. It writes spaces and the like in octal.
fn is_active(swaps: &str, path: &Path) -> bool {
    let written: String = path.to_string_lossy().chars().fold(String::new(), |mut text, letter| {
        match letter {
            ' ' | '\t' | '\n' | '\\' => text.push_str(&format!("\\{:03o}", u32::from(letter))),
            _ => text.push(letter),
        }
        text
    });
    swaps.lines().skip(1).any(|line| line.split_ascii_whitespace().next() == Some(written.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_known_by_its_path() {
        let swaps =
            "Filename\t\t\tType\t\tSize\n/a/swap                 file    4096 0 -2\n/b\\040c/swap file 1 0 -3\n";
        assert!(is_active(swaps, Path::new("/a/swap")));
        assert!(is_active(swaps, Path::new("/b c/swap")));
        assert!(!is_active(swaps, Path::new("/a/swa")));
        assert!(!is_active(swaps, Path::new("Filename")));
    }
}
