//! The UART's wish for an interrupt, held until the port passes it on.

use std::cell::Cell;
use std::convert::Infallible;

use vm_superio::Trigger;

/// Set by the UART, taken by the port. Several wishes during one access are one edge, as they are on a wire that is
/// already high.
#[derive(Default)]
pub(super) struct Edge(Cell<bool>);

impl Edge {
    /// Whether an edge is wanted; it no longer is afterwards.
    pub(super) fn take(&self) -> bool {
        self.0.take()
    }
}

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}
