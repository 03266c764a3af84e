//! The host's random numbers.

use std::io;

use devices::virtio::rng::Entropy;
use rustix::rand::{GetRandomFlags, getrandom};

/// `getrandom(2)`.
pub(super) struct HostEntropy;

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
