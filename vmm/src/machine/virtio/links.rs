//! What joins a VM's devices to the host, kept over reboots of the guest: a tap and a socket are one machine's at a time, and the next machine
//! is put together while the last one is still there.

use std::sync::Arc;

use super::super::config::VmConfig;
use super::super::devices::DeviceError;
use super::sockets::Listener;
use super::tap::HostTap;
use super::{Attachment, sockets, tap};

/// The host's ends of a VM's network cards and sockets. They are let go of when this is dropped, and the machines with it.
#[derive(Debug, Default)]
pub struct Links {
    taps: Option<Vec<HostTap>>,
    listener: Option<Arc<Listener>>,
}

impl Links {
    /// The devices of a machine made of `config`, which is the same each time; takes the host's ends the first time.
    ///
    /// # Errors
    /// [`DeviceError::Tap`], [`DeviceError::Sockets`].
    pub fn attach(&mut self, config: &VmConfig) -> Result<Vec<Attachment>, DeviceError> {
        let taps = match &mut self.taps {
            Some(taps) => taps,
            none => {
                let open = config.net.iter().map(|card| HostTap::open(&card.tap));
                none.insert(open.collect::<Result<_, _>>()?)
            }
        };
        let mut attachments = Vec::new();
        for (number, (card, host)) in config.net.iter().zip(taps).enumerate() {
            attachments.push(tap::attach(number, card, host)?);
        }
        if let Some(vsock) = &config.vsock {
            let listener = match &mut self.listener {
                Some(listener) => listener,
                none => none.insert(Listener::open(&vsock.socket)?),
            };
            attachments.push(sockets::attach(vsock, listener)?);
        }
        Ok(attachments)
    }
}
