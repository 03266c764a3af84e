//! What makes a VM outlive the power: its regions, its context, and the two orders, freeze and resume.

pub mod capture;
pub mod context;
pub mod disks;
pub mod freeze;
pub mod generations;
pub mod holdup;
pub mod lifecycle;
pub mod paging;
pub mod pmem;
pub mod recovery;
pub mod regions;
pub mod restoring;
pub mod resume;
pub mod rollback;
pub mod working_set;
