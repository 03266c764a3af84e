//! Where news reach the thread that decides: from the machine, from memory, from clients. Each rings the same bell.

use std::sync::{Arc, mpsc};

use allocator::filler::FillerEvents;
use allocator::paging::PagingEvents;

use super::console::{Console, ConsoleError};
use super::control::Pending;
use super::memory_news::MemoryNews;
use super::wake::Wake;
use crate::machine::{MachineEvent, Wiring};

/// News that reach the supervisor through its inboxes.
pub(super) struct Inboxes {
    pub(super) machine: mpsc::Receiver<MachineEvent>,
    machine_sender: mpsc::Sender<MachineEvent>,
    pub(super) memory: mpsc::Receiver<MemoryNews>,
    memory_sender: mpsc::Sender<MemoryNews>,
    pub(super) control: mpsc::Receiver<Pending>,
    pub(super) control_sender: Option<mpsc::Sender<Pending>>,
    pub(super) wake: Arc<Wake>,
}

impl Inboxes {
    pub(super) fn new() -> std::io::Result<Self> {
        let (machine_sender, machine) = mpsc::channel();
        let (memory_sender, memory) = mpsc::channel();
        let (control_sender, control) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        Ok(Self { machine, machine_sender, memory, memory_sender, control, control_sender: Some(control_sender), wake })
    }

    /// Where news of memory that is being restored goes.
    pub(super) fn of_memory(&self) -> FillerEvents {
        let (sender, wake) = (self.memory_sender.clone(), Arc::clone(&self.wake));
        Arc::new(move |event| {
            // The supervisor has ended if nobody receives.
            let _ = sender.send(MemoryNews::Restore(event));
            wake.ring();
        })
    }

    /// Where news of memory that is paged goes.
    pub(super) fn of_paging(&self) -> PagingEvents {
        let (sender, wake) = (self.memory_sender.clone(), Arc::clone(&self.wake));
        Arc::new(move |event| {
            let _ = sender.send(MemoryNews::Paging(event));
            wake.ring();
        })
    }

    pub(super) fn wiring(&self, console: &Console) -> Result<Wiring, ConsoleError> {
        let (sender, wake) = (self.machine_sender.clone(), Arc::clone(&self.wake));
        let events = move |event| {
            // The supervisor has ended if nobody receives.
            let _ = sender.send(event);
            wake.ring();
        };
        let attachments = console.attachment()?.into_iter().collect();
        Ok(Wiring { serial_output: Box::new(console.output()), events: Arc::new(events), attachments })
    }
}
