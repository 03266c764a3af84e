//! What runs inside perdure inside the lab: Debian's kernel and an initial file system.

use super::{cpio, image};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::path::{Path, PathBuf};

/// Where [`files`] puts perdure in L1.
pub const PERDURE: &str = "/bin/perdure";
/// Where [`files`] puts the guest's kernel in L1.
pub const KERNEL: &str = "/guest/vmlinuz";
/// Where [`files`] puts the guest's initramfs in L1.
pub const INITRD: &str = "/guest/initrd";

/// The stock Debian kernel (a bzImage), for L1 and for its guests alike.
pub fn kernel() -> PathBuf {
    image().join("vmlinuz")
}

/// The guest's initramfs: busybox, and the chain program at `chain_program` (the built binary `chain`) as `/chain`.
///
/// # Panics
///
/// When one of the files cannot be read.
pub fn initrd(chain_program: &Path) -> Vec<u8> {
    let base = read(&image().join("guest.cpio"));
    cpio::append(base, &[cpio::File::program("chain", read(chain_program))])
}

/// The words of a kernel's command line that make `guest-init` run a shell script. Linux takes 2 KiB of them in all.
pub fn script(text: &str) -> String {
    format!("perdure.script={}", BASE64.encode(text))
}

/// For [`Options::files`](super::machine::Options::files): perdure (see [`binary`](crate::perdure::binary)), and the
/// guest's kernel and initramfs.
///
/// # Panics
///
/// When one of the files cannot be read.
pub fn files(chain_program: &Path) -> Vec<cpio::File> {
    vec![
        cpio::File::program(&PERDURE[1..], read(&crate::perdure::binary())),
        cpio::File::data(&KERNEL[1..], read(&kernel())),
        cpio::File::data(&INITRD[1..], initrd(chain_program)),
    ]
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()))
}
