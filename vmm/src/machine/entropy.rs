//! The host's random numbers.

use std::io;

use devices::virtio::rng::Entropy;
use rustix::rand::{GetRandomFlags, getrandom};

/// `getrandom(2)`.
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match getrandom(&mut *rest, GetRandomFlags::empty()) {
                Ok(got) => rest = rest.get_mut(got..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// 16 bytes that nobody else has drawn.
///
/// # Errors
/// As the system says.
pub fn unique() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    HostEntropy.fill(&mut bytes)?;
    Ok(bytes)
}
