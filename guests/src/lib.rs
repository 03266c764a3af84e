//! Small bare-metal x86-64 kernels, embedded in the program that uses this crate, and the means to judge
//! what they print.
//!
//! A guest here has one purpose: that an outage which harms anything is *seen*. What each prints is a
//! function of its parameters alone, so that a verifier in safe Rust can recompute it and name the first
//! byte that is wrong.
//!
//! ```text
//!   asm/*.s ──global_asm!──► images ──► guest::{all, by_name} ──► the VMM loads Guest::image (ELF64)
//!                                                                       │ serial, report port
//!   chain, echo, turns, walk, pages, records, probe  ◄── what the guest printed ────────┘
//! ```
//!
//! | guest | does | judged by |
//! |---|---|---|
//! | `counter` | chains a hash over timer ticks, registers and RAM | [`chain`] |
//! | `echo` | gives back serial input line by line | [`echo`] |
//! | `memwalk` | touches a working set, at CPL3 | [`walk`] |
//! | `pages` | touches the pages of a list that the host gives it, at CPL3 | [`pages`] |
//! | `records` | appends records to a disk or persistent memory, and says when they are durable | [`records`], the disk's bytes included |
//! | `smp` | processors take turns | [`turns`] |
//! | `probe` | tries what a KVM can run | [`probe`] |
//! | `boot` | prints `boot`, reports 1, rests without a timer | |
//!
//! The images need no tool but rustc, and no CPU feature beyond x86-64 itself. At CPL0 they keep to instructions
//! that KVM's emulator knows, because there are KVMs without VMX or SVM that run CPL0 in it.
//!
//! [`judge`] follows one of the first kind through many lives, piece by piece.
//!
//! [`ports`] tells what a VMM must provide: the entry protocols and the ports.

mod banner;
pub mod chain;
pub mod echo;
mod guest;
mod images;
pub mod judge;
pub mod pages;
pub mod ports;
pub mod probe;
pub mod random;
pub mod records;
mod transcript;
pub mod turns;
pub mod walk;

pub use banner::BannerError;
pub use guest::{Guest, Parameter, all, by_name};
