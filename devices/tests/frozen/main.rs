//! All devices, frozen and resumed, through the public interface.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the verdict")]

mod freezing;
mod golden;
mod hostile;
mod house;
