//! A memory balloon, and the string by which it is held.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::virtio::{Balloon, BalloonSize, Reclaim};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::super::memory::GuestRam;
use super::Attachment;

/// Sets the size of a machine's balloon.
#[derive(Debug)]
pub struct BalloonControl {
    size: BalloonSize,
    bell: OwnedFd,
}

/// How large a balloon is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// How large it is to be.
    pub target: u64,
    /// How large the guest says that it is.
    pub actual: u64,
}

impl BalloonControl {
    /// Wishes for a balloon of so many bytes. The guest's driver takes its time.
    ///
    /// # Errors
    /// The driver cannot be told.
    pub fn set_target(&self, bytes: u64) -> io::Result<()> {
        self.size.set_target(bytes);
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    /// How large it is.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        BalloonStatus { target: self.size.target(), actual: self.size.actual() }
    }
}

/// Memory that the guest gives away goes back to where it lies.
struct GivingUp(Arc<GuestRam>);

impl Reclaim for GivingUp {
    fn reclaim(&mut self, start: GuestAddress, length: u64) {
        self.0.give_up(start, length);
    }
}

/// A balloon in `ram`.
pub(in super::super) fn attach(ram: &Arc<GuestRam>) -> io::Result<(Attachment, BalloonControl)> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let (size, source) = (BalloonSize::default(), bell.try_clone()?);
    let device = Balloon::new(size.clone(), Box::new(GivingUp(Arc::clone(ram))));
    let attachment = Attachment { id: "balloon".to_owned(), device: Box::new(device), sources: vec![source] };
    Ok((attachment, BalloonControl { size, bell }))
}
