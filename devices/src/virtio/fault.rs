//! Why a device cannot go on.

/// A driver or a host that makes it impossible to go on: the device asks for its reset.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A ring.
    #[error("the driver's ring makes no sense")]
    Ring(#[source] virtio_queue::Error),
    /// A request.
    #[error("the driver's request makes no sense: {0}")]
    Request(&'static str),
    /// The host.
    #[error("cannot {doing}")]
    Host {
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not come to rest in time.
    #[error("requests are still in flight when the freeze cannot wait any longer: {0}")]
    Busy(String),
}

impl Fault {
    pub(super) fn absent(source: std::io::Error) -> Self {
        Self::Host { doing: "have a part of the guest's memory", source }
    }

    pub(super) fn ring(source: virtio_queue::Error) -> Self {
        Self::Ring(source)
    }
}
