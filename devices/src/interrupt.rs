//! The interrupt line that a device pulls.

use std::io;

/// An edge-triggered interrupt line (ISA style), implemented by the VMM.
///
/// # What an implementation owes
///
/// When [`trigger`](Self::trigger) returns `Ok`, the edge is *in* the interrupt controller, and so in the state that is
/// saved of it. A device then forgets it: that is what keeps an interrupt from being lost or doubled by a freeze. An
/// irqfd hands its edge to a kernel worker and returns before that; whoever uses one has to wait for the worker before
/// the interrupt controller is saved (or use `KVM_IRQ_LINE`, which is done when it returns).
pub trait InterruptLine: Send + Sync {
    /// Raises and lowers the line.
    ///
    /// # Errors
    ///
    /// If the edge did not reach the interrupt controller. The device keeps it and tries again.
    fn trigger(&self) -> io::Result<()>;
}
