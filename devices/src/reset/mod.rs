//! The two ways in which a PC's software resets it: the keyboard controller ([`KeyboardController`]) and the reset
//! control register ([`ResetControl`]).

mod control;
mod keyboard_controller;
mod state;
#[cfg(test)]
mod tests;

pub use control::ResetControl;
pub use keyboard_controller::KeyboardController;
pub use state::{KeyboardControllerStateV1, ResetStateV1};
