//! The command line, end to end: each test drives the binary through [`tests::perdure::Perdure`], on a pool of its own.
//! They run on this machine's `/dev/kvm`, or in the lab where there is none (tests/run chooses).

mod benches;
mod budget;
mod console;
mod damage;
mod disks;
mod doctor;
mod documents;
mod generations;
mod generations_capture;
mod holdup;
mod host;
mod hostile_guests;
mod jail;
mod kernels;
mod killed;
mod lazy;
mod lazy_paged;
mod lifecycle;
mod machine_code;
mod network;
mod outages;
mod ownership;
mod pages;
mod paging;
mod pmem;
mod pool_bytes;
mod random;
mod records;
mod simulated;
mod typing;
mod usage;
mod vm;
