//! The numbers of the requests (ioctls) that are made of KVM, as `linux/kvm.h` composes them: for who decides which may be made.

use std::mem::size_of;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_dirty_log, kvm_enable_cap, kvm_fpu,
    kvm_ioeventfd, kvm_irq_level, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs,
    kvm_pit_config, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn io(number: u32) -> u64 {
    ioctl_expr(_IOC_NONE, KVMIO, number, 0)
}

const fn reads<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_READ, KVMIO, number, size_of::<T>() as u32)
}

const fn writes<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_WRITE, KVMIO, number, size_of::<T>() as u32)
}

const fn exchanges<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, number, size_of::<T>() as u32)
}

/// Entering the guest; the one that is made most.
pub const RUN: u64 = io(0x80);

/// Arming entries of dirty rings again.
pub const RESET_DIRTY_RINGS: u64 = io(0xc7);

/// Reading which pages a guest wrote.
pub const GET_DIRTY_LOG: u64 = writes::<kvm_dirty_log>(0x42);

/// Watching some of them again.
pub const CLEAR_DIRTY_LOG: u64 = exchanges::<kvm_clear_dirty_log>(0xc0);

/// What a vCPU's own thread asks for: it runs, and its state is read.
pub const OF_A_VCPU: &[u64] = &[
    RUN,
    RESET_DIRTY_RINGS,
    GET_DIRTY_LOG,
    io(0x03),                       // KVM_CHECK_EXTENSION
    writes::<kvm_irq_level>(0x61),  // KVM_IRQ_LINE
    reads::<kvm_regs>(0x81),        // KVM_GET_REGS
    reads::<kvm_sregs>(0x83),       // KVM_GET_SREGS
    exchanges::<kvm_msrs>(0x88),    // KVM_GET_MSRS
    reads::<kvm_lapic_state>(0x8e), // KVM_GET_LAPIC
    exchanges::<kvm_cpuid2>(0x91),  // KVM_GET_CPUID2
    reads::<kvm_mp_state>(0x98),    // KVM_GET_MP_STATE
    reads::<kvm_vcpu_events>(0x9f), // KVM_GET_VCPU_EVENTS
    reads::<kvm_debugregs>(0xa1),   // KVM_GET_DEBUGREGS
    io(0xa3),                       // KVM_GET_TSC_KHZ
    reads::<kvm_xsave>(0xa4),       // KVM_GET_XSAVE
    reads::<kvm_xcrs>(0xa6),        // KVM_GET_XCRS
    io(0xad),                       // KVM_KVMCLOCK_CTRL
    reads::<kvm_xsave>(0xcf),       // KVM_GET_XSAVE2
];

/// What tells which pages a guest wrote.
pub const OF_DIRTY_PAGES: &[u64] = &[
    RESET_DIRTY_RINGS,
    GET_DIRTY_LOG,
    CLEAR_DIRTY_LOG,
    writes::<kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
];

/// A device's interrupt.
pub const OF_A_DEVICE: &[u64] = &[writes::<kvm_irq_level>(0x61)]; // KVM_IRQ_LINE

/// What saves a machine, and puts a new one together when its guest reboots, beside [`OF_A_VCPU`] and [`OF_DIRTY_PAGES`].
pub const OF_A_MACHINE: &[u64] = &[
    io(0x00),                        // KVM_GET_API_VERSION
    io(0x01),                        // KVM_CREATE_VM
    exchanges::<kvm_msr_list>(0x02), // KVM_GET_MSR_INDEX_LIST
    io(0x04),                        // KVM_GET_VCPU_MMAP_SIZE
    exchanges::<kvm_cpuid2>(0x05),   // KVM_GET_SUPPORTED_CPUID
    io(0x41),                        // KVM_CREATE_VCPU
    writes::<kvm_enable_cap>(0xa3),  // KVM_ENABLE_CAP
    io(0x47),                        // KVM_SET_TSS_ADDR
    writes::<u64>(0x48),             // KVM_SET_IDENTITY_MAP_ADDR
    io(0x60),                        // KVM_CREATE_IRQCHIP
    exchanges::<kvm_irqchip>(0x62),  // KVM_GET_IRQCHIP
    reads::<kvm_irqchip>(0x63),      // KVM_SET_IRQCHIP
    writes::<kvm_irqfd>(0x76),       // KVM_IRQFD
    writes::<kvm_pit_config>(0x77),  // KVM_CREATE_PIT2
    writes::<kvm_ioeventfd>(0x79),   // KVM_IOEVENTFD
    writes::<kvm_clock_data>(0x7b),  // KVM_SET_CLOCK
    reads::<kvm_clock_data>(0x7c),   // KVM_GET_CLOCK
    writes::<kvm_regs>(0x82),        // KVM_SET_REGS
    writes::<kvm_sregs>(0x84),       // KVM_SET_SREGS
    writes::<kvm_msrs>(0x89),        // KVM_SET_MSRS
    writes::<kvm_fpu>(0x8d),         // KVM_SET_FPU
    writes::<kvm_cpuid2>(0x90),      // KVM_SET_CPUID2
    reads::<kvm_pit_state2>(0x9f),   // KVM_GET_PIT2
];
