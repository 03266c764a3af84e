//! A vCPU's registers: at its first instruction, and saved and restored whole.
//!
//! # Order
//!
//! Reading: `MP_STATE` first, since reading it lets pending INIT and SIPI take effect, which changes all else.
//! Writing: CPUID before anything that it permits; SREGS (mode, APIC base) before LAPIC; XCRS before XSAVE; the TSC
//! before the clocks derived from it; LAPIC before `IA32_TSC_DEADLINE`, which KVM ignores unless the APIC's timer is in
//! deadline mode by then; events and `MP_STATE` last. (Kernel: `Documentation/virt/kvm/api.rst`; the same order was
//! tried out for hand-overs between processes.)

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::fam::FamStruct;
use zerocopy::IntoBytes;

use super::super::boot::{BOOT_CS, BOOT_DS, Entry, EntryProtocol};
use super::failure::Position;
use super::state::{Blob, VcpuStateV1};
use super::vm::Outage;
use super::{Doing, KvmError, Vm};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Fast string operations, which kernels look for.
const MISC_ENABLE_FAST_STRING: u64 = 1;

const MP_STATE_MOST: u32 = 10;
/// `kvm_xsave` up to its flexible end.
const XSAVE_SIZE: usize = 4096;
/// More than the largest XSAVE area that exists (AMX: 11 KiB), to bound what a damaged context can ask for.
const XSAVE_MOST: usize = 64 << 10;
/// Far more than KVM lists (about 150), for the same reason.
const MSRS_MOST: usize = 4096;

const RFLAGS_RESERVED: u64 = 1 << 1;
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Sets up the first vCPU for its first instruction.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_entry(fd: &VcpuFd, entry: &Entry) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().doing("reading segment registers (KVM_GET_SREGS)")?;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, rip: entry.rip, ..Default::default() };
    match entry.protocol {
        EntryProtocol::Linux64 { boot_params, page_tables, gdt, idt } => {
            regs.rsi = boot_params;
            flat_segments(&mut sregs, Code::Long, gdt, idt);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = page_tables;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        EntryProtocol::Pvh { start_info, gdt, idt } => {
            regs.rbx = start_info;
            flat_segments(&mut sregs, Code::Protected, gdt, idt);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }
    fd.set_sregs(&sregs).doing("setting segment registers (KVM_SET_SREGS)")?;
    fd.set_regs(&regs).doing("setting registers (KVM_SET_REGS)")
}

/// Tells a vCPU what it is.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_cpuid(fd: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    fd.set_cpuid2(cpuid).doing("setting CPUID (KVM_SET_CPUID2)")
}

/// The FPU and MSRs of any vCPU at power-on, as far as KVM's reset state is not enough.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn set_power_on(fd: &VcpuFd) -> Result<(), KvmError> {
    // Control words as FNINIT and the SSE reset leave them (Intel SDM volume 1, 8.1.5 and 11.6.4).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).doing("setting the FPU (KVM_SET_FPU)")?;
    let refused = set_msrs(fd, &[(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING)])?;
    if !refused.is_empty() {
        tracing::debug!("this KVM does not take IA32_MISC_ENABLE");
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Code {
    Long,
    Protected,
}

/// Flat 4 GiB segments as the GDT in guest memory describes them, and a TSS, without which VMX does not enter a guest.
fn flat_segments(sregs: &mut kvm_sregs, code: Code, gdt: u64, idt: u64) {
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: BOOT_DS,
        type_: 0x3, // read, write, accessed
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let long = code == Code::Long;
    sregs.cs = kvm_segment { selector: BOOT_CS, type_: 0xb, db: u8::from(!long), l: u8::from(long), ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: 0, limit: 0x67, type_: 0xb, s: 0, g: 0, db: 0, ..data };
    (sregs.gdt.base, sregs.gdt.limit) = (gdt, 31);
    (sregs.idt.base, sregs.idt.limit) = (idt, 7);
}

/// Where a vCPU stands, for messages. Zeros where it cannot be read.
#[must_use]
pub fn position(fd: &VcpuFd) -> Position {
    let rip = fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
    let sregs = fd.get_sregs().unwrap_or_default();
    Position { rip, cr0: sregs.cr0, cr3: sregs.cr3, cs: sregs.cs.selector }
}

/// Reads all state of a stopped vCPU.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn save(vm: &Vm, fd: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuStateV1, KvmError> {
    let mp_state = fd.get_mp_state().doing("reading the run state (KVM_GET_MP_STATE)")?.mp_state;
    let regs = fd.get_regs().doing("reading registers (KVM_GET_REGS)")?;
    let sregs = fd.get_sregs().doing("reading segment registers (KVM_GET_SREGS)")?;
    let xsave = save_xsave(vm, fd)?;
    let xcrs = fd.get_xcrs().doing("reading extended control registers (KVM_GET_XCRS)")?;
    let debug = fd.get_debug_regs().doing("reading debug registers (KVM_GET_DEBUGREGS)")?;
    let lapic = fd.get_lapic().doing("reading the local APIC (KVM_GET_LAPIC)")?;
    let msrs = get_msrs(fd, msr_indices)?;
    let events = fd.get_vcpu_events().doing("reading pending events (KVM_GET_VCPU_EVENTS)")?;
    let cpuid = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).doing("reading CPUID (KVM_GET_CPUID2)")?;
    Ok(VcpuStateV1 {
        cpuid: Blob::from_bytes(cpuid.as_slice().as_bytes().to_vec()),
        tsc_khz: fd.get_tsc_khz().ok(),
        sregs: Blob::of(&sregs),
        regs: Blob::of(&regs),
        xcrs: Blob::of(&xcrs),
        xsave,
        msrs,
        lapic: Blob::of(&lapic),
        debug_registers: Blob::of(&debug),
        events: Blob::of(&events),
        mp_state,
    })
}

/// Sets all state of a fresh vCPU. Returns the MSRs that this KVM would not take.
///
/// # Errors
/// [`KvmError::Ioctl`], [`KvmError::BadState`].
pub fn restore(vm: &Vm, fd: &VcpuFd, state: &VcpuStateV1, outage: Outage) -> Result<Vec<u32>, KvmError> {
    let VcpuStateV1 { cpuid, tsc_khz, sregs, regs, xcrs, xsave, msrs, lapic, debug_registers, events, mp_state } =
        state;
    fd.set_cpuid2(&cpuid_of(cpuid)?).doing("setting CPUID (KVM_SET_CPUID2); is this another CPU model?")?;
    match_tsc_frequency(fd, *tsc_khz);
    fd.set_sregs(&sregs.view::<kvm_sregs>("segment registers")?).doing("setting segment registers (KVM_SET_SREGS)")?;
    fd.set_regs(&regs.view::<kvm_regs>("registers")?).doing("setting registers (KVM_SET_REGS)")?;
    fd.set_xcrs(&xcrs.view::<kvm_xcrs>("extended control registers")?).doing("setting XCRs (KVM_SET_XCRS)")?;
    restore_xsave(vm, fd, xsave)?;
    if msrs.len() > MSRS_MOST {
        return Err(KvmError::BadState { what: "MSRs", why: format!("there are {}", msrs.len()) });
    }
    let (deadline, mut others): (Vec<_>, Vec<_>) = msrs.iter().partition(|(index, _)| *index == MSR_IA32_TSC_DEADLINE);
    let jump = tsc_jump(tsc_khz.or_else(|| fd.get_tsc_khz().ok()), outage);
    if let Some((_, tsc)) = others.iter_mut().find(|(index, _)| *index == MSR_IA32_TSC) {
        *tsc = tsc.wrapping_add(jump);
    }
    let mut refused = set_msrs(fd, &others)?;
    fd.set_lapic(&lapic.view::<kvm_lapic_state>("local APIC")?).doing("setting the local APIC (KVM_SET_LAPIC)")?;
    refused.extend(set_msrs(fd, &deadline)?);
    fd.set_debug_regs(&debug_registers.view::<kvm_debugregs>("debug registers")?)
        .doing("setting debug registers (KVM_SET_DEBUGREGS)")?;
    fd.set_vcpu_events(&events.view::<kvm_vcpu_events>("pending events")?)
        .doing("setting pending events (KVM_SET_VCPU_EVENTS)")?;
    if *mp_state > MP_STATE_MOST {
        return Err(KvmError::BadState { what: "run state", why: format!("there is no state {mp_state}") });
    }
    fd.set_mp_state(kvm_mp_state { mp_state: *mp_state }).doing("setting the run state (KVM_SET_MP_STATE)")?;
    Ok(refused)
}

fn cpuid_of(blob: &Blob) -> Result<CpuId, KvmError> {
    let bad = |why: &str| KvmError::BadState { what: "CPUID", why: why.to_owned() };
    let bytes = blob.as_bytes();
    const ENTRY: usize = size_of::<kvm_cpuid_entry2>();
    if !bytes.len().is_multiple_of(ENTRY) || bytes.len() / ENTRY > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
        return Err(bad("its length is not that of a list of leaves"));
    }
    let entries: Vec<kvm_cpuid_entry2> =
        bytes.chunks_exact(ENTRY).filter_map(|entry| zerocopy::FromBytes::read_from_bytes(entry).ok()).collect();
    CpuId::from_entries(&entries).map_err(|_| bad("it has too many leaves"))
}

/// Scales the TSC where the host's runs at another rate than before, if this KVM can. If it cannot, the guest's kvmclock is
/// right all the same (KVM tells it the new rate); what the guest measures by the TSC alone is off by the ratio.
fn match_tsc_frequency(fd: &VcpuFd, saved: Option<u32>) {
    /// As KVM itself compares rates: 250 parts per million (`tsc_tolerance_ppm`).
    const TOLERANCE: u32 = 4000;
    let (Some(saved), Ok(here)) = (saved, fd.get_tsc_khz()) else { return };
    if saved.abs_diff(here) > here / TOLERANCE && fd.set_tsc_khz(saved).is_err() {
        tracing::warn!(
            "the TSC runs at {here} kHz here and ran at {saved} kHz before, and this KVM cannot scale it: guests that take \
             their time from the TSC and not from kvmclock are off by that ratio"
        );
    }
}

fn tsc_jump(khz: Option<u32>, outage: Outage) -> u64 {
    let ticks = outage.clock_jump().as_nanos() * u128::from(khz.unwrap_or(0)) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn save_xsave(vm: &Vm, fd: &VcpuFd) -> Result<Blob, KvmError> {
    let extra = vm.xsave_extra_words();
    if extra == 0 {
        let xsave = fd.get_xsave().doing("reading the FPU and vector registers (KVM_GET_XSAVE)")?;
        return Ok(Blob::of(&xsave.region));
    }
    let mut xsave = Xsave::new(extra)
        .map_err(|error| KvmError::BadState { what: "XSAVE area", why: format!("its size is odd: {error:?}") })?;
    // SAFETY: `extra` is what KVM_CAP_XSAVE2 asks for beyond 4 KiB, so the kernel writes within the allocation.
    unsafe { fd.get_xsave2(&mut xsave) }.doing("reading the FPU and vector registers (KVM_GET_XSAVE2)")?;
    let whole = xsave.as_fam_struct_ref();
    let mut bytes = whole.xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(whole.as_slice().as_bytes());
    Ok(Blob::from_bytes(bytes))
}

fn restore_xsave(vm: &Vm, fd: &VcpuFd, blob: &Blob) -> Result<(), KvmError> {
    let bad = |why: String| KvmError::BadState { what: "XSAVE area", why };
    let bytes = blob.as_bytes();
    if !(XSAVE_SIZE..=XSAVE_MOST).contains(&bytes.len()) || !bytes.len().is_multiple_of(4) {
        return Err(bad(format!("it has {} bytes", bytes.len())));
    }
    let extra = vm.xsave_extra_words().max((bytes.len() - XSAVE_SIZE) / 4);
    let mut xsave = Xsave::new(extra).map_err(|error| bad(format!("{error:?}")))?;
    {
        // SAFETY: only bytes within the structure are changed, not its length.
        let whole = unsafe { xsave.as_mut_fam_struct() };
        let (classic, rest) = bytes.split_at(XSAVE_SIZE);
        whole.xsave.region.as_mut_bytes().copy_from_slice(classic);
        whole.as_mut_slice().as_mut_bytes()[..rest.len()].copy_from_slice(rest);
    }
    // SAFETY: the allocation is at least what KVM_CAP_XSAVE2 asks for, so the kernel reads within it.
    unsafe { fd.set_xsave2(&xsave) }.doing("setting the FPU and vector registers (KVM_SET_XSAVE)")
}

const _: () = assert!(size_of::<kvm_xsave>() == XSAVE_SIZE);

fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let mut msrs = msr_list(rest.iter().map(|index| (*index, 0)))?;
        let done = fd.get_msrs(&mut msrs).doing("reading MSRs (KVM_GET_MSRS)")?.min(rest.len());
        values.extend(msrs.as_slice()[..done].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it cannot read, though it lists it: step over that one.
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Sets MSRs one after another; returns those that KVM refused.
fn set_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<Vec<u32>, KvmError> {
    let mut refused = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let msrs = msr_list(rest.iter().copied())?;
        let done = fd.set_msrs(&msrs).doing("setting MSRs (KVM_SET_MSRS)")?.min(rest.len());
        refused.extend(rest.get(done).map(|(index, _)| *index));
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(refused)
}

fn msr_list(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries)
        .map_err(|error| KvmError::BadState { what: "MSRs", why: format!("too many: {error:?}") })
}
