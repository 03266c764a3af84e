//! How perdure is tested from the outside: by driving the binary as a user does.
//!
//! ```text
//!   tests/run            the one test command
//!   tests/e2e/*          ── Perdure ──►  the binary, on this machine's /dev/kvm
//!   tests/lab/*          ── L1 ──► QEMU ─► Debian + /dev/kvm ─► the binary ─► Debian
//! ```
//!
//! [`Perdure`](perdure::Perdure) runs the command line on a pool of its own. [`lab`] is a whole machine whose plug can
//! be pulled: its `/dev/kvm` is full (a stock Linux boots in it), its disk forgets what was not flushed, and it
//! has persistent memory.
//!
//! Everything here reports by panicking, with what was seen in the message: a harness has no caller that could do better.

pub mod lab;
pub mod perdure;
