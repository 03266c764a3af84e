//! What a device may ask of the machine as a whole.

/// A switch of the machine that a guest may throw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineRequest {
    /// Reset all CPUs and devices and start anew.
    Reset,
    /// Turn the machine off; it does not come back by itself.
    PowerOff,
    /// End the VMM with this exit code (a guest under test).
    DebugExit(u8),
}

/// Takes requests from devices; implemented by the VMM.
///
/// A request is called for on a vCPU's thread in the middle of a port write, so an implementation notes it and returns.
/// It belongs to the machine from then on: no device keeps it, so a freeze in between has to keep it (or act on it).
pub trait MachineControl: Send + Sync {
    /// Asks for `request`.
    fn request(&self, request: MachineRequest);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Notes what is requested.
    #[derive(Default)]
    pub(crate) struct Requests(Mutex<Vec<MachineRequest>>);

    impl Requests {
        pub(crate) fn new() -> Arc<Self> {
            Arc::default()
        }

        pub(crate) fn take(&self) -> Vec<MachineRequest> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl MachineControl for Requests {
        fn request(&self, request: MachineRequest) {
            self.0.lock().unwrap().push(request);
        }
    }
}
