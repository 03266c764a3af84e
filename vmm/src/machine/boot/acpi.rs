//! ACPI tables for a hardware-reduced platform (ACPI 6.5).
//!
//! ```text
//!   RSDP ─► XSDT ─┬─► FADT ─► DSDT: \_S5, CPUs, COM1, RTC, events, and what the machine adds
//!                 └─► MADT: local APICs, the I/O APIC
//! ```
//!
//! Cloud kernels read no MP table: CPUs and I/O APIC come from the MADT alone. Hardware-reduced means that
//! there is no PM timer, SCI or fixed event block to emulate: power-off and reset are one port each.
//! `iasl -d` reads the tables without a complaint.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::BootSpec;
use super::events::Events;
use super::layout::{ACPI_END, ACPI_START, IOAPIC, LAPIC};

/// Sleep control register, a byte: `SLP_EN` is bit 5, `SLP_TYP` bits 2–4.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register, a byte: `WAK_STS` is bit 7; written (and ignored) before a sleep.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// `SLP_TYP` of S5, soft-off.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What a guest writes to [`SLEEP_CONTROL_PORT`] to power off: `SLP_EN` and [`S5_SLEEP_TYPE`].
pub const POWER_OFF_VALUE: u8 = 1 << 5 | S5_SLEEP_TYPE << 2;
/// Reset register, a byte. (Port 0xcf8 is PCI's; only byte accesses to 0xcf9 count.)
pub const RESET_PORT: u16 = 0xcf9;
/// What a guest writes to [`RESET_PORT`] for a full reset.
pub const RESET_VALUE: u8 = 6;
/// I/O ports of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Index port of the RTC; the data port is the next.
pub const RTC_PORT: u16 = 0x70;

/// The most CPUs that the tables can name; KVM has no more either.
pub const CPUS_MAX: u16 = 4096;

const OEM_ID: [u8; 6] = *b"PERDUR";
const OEM_TABLE_ID: [u8; 8] = *b"PERDURE ";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 16;

/// Boot architecture flags of the FADT: nothing to probe for. Bit 1, an 8042 keyboard controller, is clear
/// too: the one at ports 0x60 and 0x64 does no more than a reset. Bit 5, "no CMOS RTC", is clear: there is one.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;

/// Why there are no ACPI tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Zero, or more than the tables can name.
    #[error("cannot describe {cpus} CPUs to the guest: use --cpus 1 to {CPUS_MAX}")]
    CpuCount {
        /// Number of CPUs.
        cpus: u16,
    },
    /// The area is full.
    #[error("the ACPI tables take {size} bytes, {limit} are free for them: use fewer devices or CPUs")]
    TooLarge {
        /// Bytes needed.
        size: u64,
        /// Bytes there are.
        limit: u64,
    },
    /// Guest memory refused a write.
    #[error("writing ACPI tables to guest memory at {address:#x}")]
    Write {
        /// Where.
        address: u64,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// Writes the tables to [`ACPI_START`] and returns the RSDP's address, which is the same.
pub(super) fn write<M: GuestMemoryBackend>(memory: &M, spec: &BootSpec<'_>) -> Result<u64, AcpiError> {
    let tables = tables(spec)?;
    memory
        .write_slice(&tables, GuestAddress(ACPI_START))
        .map_err(|source| AcpiError::Write { address: ACPI_START, source })?;
    Ok(ACPI_START)
}

/// All tables as they lie from [`ACPI_START`] on.
fn tables(spec: &BootSpec<'_>) -> Result<Vec<u8>, AcpiError> {
    if !(1..=CPUS_MAX).contains(&spec.cpus) {
        return Err(AcpiError::CpuCount { cpus: spec.cpus });
    }
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.push(&dsdt(spec));
    let fadt = area.push(&fadt(dsdt));
    let madt = area.push(&madt(spec.cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.push(&xsdt);
    let rsdp = encode(&Rsdp::new(OEM_ID, xsdt));
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let (size, limit) = (area.bytes.len() as u64, ACPI_END - ACPI_START);
    if size > limit { Err(AcpiError::TooLarge { size, limit }) } else { Ok(area.bytes) }
}

/// The tables, one behind the other.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its guest-physical address.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        let at = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(at as usize, 0);
        table.to_aml_bytes(&mut self.bytes);
        ACPI_START + at
    }
}

fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |address: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // Set means that there is no fixed button, and no RTC wake status in a fixed register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_MSI).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

/// MADT: CPU `n` has ACPI UID and APIC ID `n`.
///
/// Built on [`Sdt`], for the crate's own MADT has neither x2APIC nor NMI entries, nor the flags. There are no
/// interrupt source overrides: KVM's default routing takes GSI `n` to pin `n` of the I/O APIC, the PIT's included,
/// and ISA interrupts are edge-triggered and active-high unless the DSDT says otherwise.
fn madt(cpus: u16) -> Sdt {
    /// APIC ID 255 is xAPIC's broadcast; from there on entries are x2APIC's.
    const FIRST_X2APIC: u16 = 255;
    /// There is an 8259 as well, which has to be masked when the I/O APIC is used.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    const NMI_LINT: u8 = 1;

    let mut body = Vec::new();
    body.extend(LAPIC.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus.min(FIRST_X2APIC) {
        body.extend(encode(&ProcessorLocalApic::new(id as u8, id as u8, EnabledStatus::Enabled)));
    }
    for id in FIRST_X2APIC..cpus {
        // Processor Local x2APIC (9), 16 bytes: reserved, x2APIC ID, flags, ACPI UID.
        body.extend([9, 16, 0, 0]);
        body.extend([u32::from(id), ENABLED, u32::from(id)].into_iter().flat_map(u32::to_le_bytes));
    }
    // KVM's I/O APIC has ID 0 after a reset.
    body.extend(encode(&IoApic::new(0, IOAPIC, 0)));
    // Local APIC NMI (4): UID 255 means all, flags 0 "as the bus has it".
    body.extend([4, 6, 0xff, 0, 0, NMI_LINT]);
    if cpus > FIRST_X2APIC {
        // Local x2APIC NMI (10), 12 bytes: flags, UID (all), LINT, reserved.
        body.extend([10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, NMI_LINT, 0, 0, 0]);
    }
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&body);
    madt
}

fn dsdt(spec: &BootSpec<'_>) -> Sdt {
    let mut body = encode(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&S5_SLEEP_TYPE, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    ));
    let mut devices = Vec::new();
    for cpu in 0..spec.cpus {
        let name = aml::Path::new(&format!("C{cpu:03X}"));
        let hid = aml::Name::new("_HID".into(), &"ACPI0007");
        let uid = aml::Name::new("_UID".into(), &cpu);
        devices.extend(encode(&aml::Device::new(name, vec![&hid, &uid])));
    }
    if let Some(irq) = spec.serial_irq {
        devices.extend(isa_device("COM1", "PNP0501", COM1_PORT, 8, Some(irq)));
    }
    devices.extend(isa_device("RTC_", "PNP0B00", RTC_PORT, 2, spec.rtc_irq));
    devices.extend(encode(&Events));
    for device in spec.acpi_devices {
        device.to_aml_bytes(&mut devices);
    }
    body.extend(aml::Scope::raw("\\_SB_".into(), devices));

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// A device at fixed I/O ports, with an interrupt that is edge-triggered, active-high and not shared.
///
/// The extended form of the interrupt is used because for the short one Linux would ask the MADT's overrides.
fn isa_device(name: &str, hid: &str, port: u16, ports: u8, irq: Option<u32>) -> Vec<u8> {
    let io = aml::IO::new(port, port, 1, ports);
    let interrupt = irq.map(|irq| aml::Interrupt::new(true, true, false, false, irq));
    let mut resources: Vec<&dyn Aml> = vec![&io];
    resources.extend(interrupt.iter().map(|interrupt| interrupt as &dyn Aml));
    encode(&aml::Device::new(
        name.into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new(hid)),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
        ],
    ))
}
