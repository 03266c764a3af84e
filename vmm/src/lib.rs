//! perdure: a KVM hypervisor whose virtual machines outlive the power.
//!
//! A VM's memory lies in **regions**: persistent files that a pool hands out by name (crate `allocator`). On a power-fail
//! signal the VMM **freezes** what is still volatile (vCPUs, interrupt controller, clock, devices) into a small **context**
//! and makes the regions durable. On power-up it **resumes** in place: no boot, no loading of RAM.
//!
//! ```text
//!   cli            one command a file; what people and scripts see
//!    │
//!   bench, outage  measures what the README promises; simulates cuts of the power
//!    │
//!   supervisor     one process, one VM: its life, its signals, its control socket, its terminal
//!    │
//!   persistence    freeze and resume, the context, what survived          ─── allocator: regions by name, media, paging
//!    │             generations: taken, restored, rolled back to           ─── snapshot: the store
//!    │
//!   machine        memory, buses, vCPUs, boot; knows nothing of outages   ─── devices, guests
//!    │
//!   machine::kvm   the only code that speaks to KVM
//! ```
//!
//! Each floor uses only those below it. Four places hold an order that must not be changed lightly, and each stands in one
//! file with its reasons: [`persistence::freeze`], [`persistence::resume`], [`persistence::rollback`], and setting a vCPU's
//! state, [`machine::kvm::registers`].
//!
//! Each thread gives up what it does not need before it deals with the guest or a client: [`machine::jail`]. Threads are started by
//! [`machine::jail::spawn`], with a role, for that.
//!
//! What can be trusted after an outage: a RAM region counts only while its header says `clean@N` and context N
//! verifies; the stamp is cleared, durably, before any vCPU runs. Everything else goes on from the newest generation that
//! verifies, or boots. Everything read from a pool, and everything that
//! a guest does, is taken for hostile.

pub mod bench;
pub mod cli;
pub mod machine;
pub mod outage;
pub mod persistence;
pub mod supervisor;
