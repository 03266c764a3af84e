//! cpio archives in the `newc` form, as the kernel unpacks them: an initramfs is any number of archives in a row.
//!
//! Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

use std::collections::BTreeSet;

/// A file to add.
#[derive(Clone, Debug)]
pub struct File {
    /// Where it goes, without the leading slash, as `bin/perdure`. Directories on the way are made.
    pub path: String,
    /// Permission bits, as `0o755`.
    pub mode: u32,
    /// Its bytes.
    pub content: Vec<u8>,
}

impl File {
    /// An executable file.
    pub fn program(path: &str, content: Vec<u8>) -> Self {
        Self { path: path.to_owned(), mode: 0o755, content }
    }

    /// A plain file.
    pub fn data(path: &str, content: Vec<u8>) -> Self {
        Self { path: path.to_owned(), mode: 0o644, content }
    }
}

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// `base` (an archive) followed by an archive of `files`.
pub fn append(mut base: Vec<u8>, files: &[File]) -> Vec<u8> {
    pad(&mut base);
    let mut inode = 1;
    let mut made = BTreeSet::new();
    for file in files {
        for (slash, _) in file.path.match_indices('/') {
            let directory = &file.path[..slash];
            if made.insert(directory.to_owned()) {
                entry(&mut base, &mut inode, directory, DIRECTORY | 0o755, &[]);
            }
        }
        entry(&mut base, &mut inode, &file.path, REGULAR | file.mode, &file.content);
    }
    entry(&mut base, &mut inode, "TRAILER!!!", 0, &[]);
    base
}

fn entry(archive: &mut Vec<u8>, inode: &mut u32, path: &str, mode: u32, content: &[u8]) {
    let size = u32::try_from(content.len()).unwrap_or_else(|_| panic!("{path}: a cpio member is below 4 GiB"));
    let name = u32::try_from(path.len() + 1).expect("a path fits in 32 bits");
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    let fields = [*inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(path.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
    *inode += 1;
}

/// Members and archives start at multiples of four bytes.
fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_unpacks_what_was_appended() {
        let directory = tempfile::tempdir().unwrap();
        let files = [
            File::program("a/b/run", b"#!/bin/sh\n".to_vec()),
            File::data("a/note", vec![7; 4097]),
            File::data("empty", Vec::new()),
        ];
        let archive = append(Vec::new(), &files);
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-i", "-d"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio runs (tests/lab/prepare installs it)");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(cpio.wait().unwrap().success());
        for file in &files {
            assert_eq!(std::fs::read(directory.path().join(&file.path)).unwrap(), file.content, "{}", file.path);
        }
    }

    #[test]
    fn a_second_archive_starts_aligned() {
        let archive = append(b"xyz".to_vec(), &[File::data("a", b"1".to_vec())]);
        assert_eq!(&archive[..10], b"xyz\x00070701");
        assert_eq!(archive.len() % 4, 0);
    }
}
