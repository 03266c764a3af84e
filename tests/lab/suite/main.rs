//! The lab's tests: they boot real machines and pull the plug.

mod cuts;
mod devices;
mod disks;
mod generations;
mod machine;
mod network;
mod outages;
mod paging;
