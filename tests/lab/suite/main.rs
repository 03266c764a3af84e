//! The lab's tests: they boot real machines and pull the plug.

mod bank;
mod cuts;
mod devices;
mod disks;
mod holdup;
mod machine;
mod network;
mod outages;
mod paging;
mod peer;
mod pmem;
mod sockets;
mod sqlite;
mod time;
