//! How the guest learns of a virtio-mmio device.

use acpi_tables::{Aml, AmlSink, aml};
use devices::virtio::mmio::SIZE;

/// A device of the DSDT: `LNRO0005`, which is what Linux knows virtio-mmio by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct AcpiNode {
    pub(super) number: usize,
    pub(super) address: u64,
    pub(super) gsi: u32,
}

impl Aml for AcpiNode {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let name = aml::Path::new(&format!("V{:03X}", self.number));
        // Below 4 GiB, as all of the gap is.
        let base = u32::try_from(self.address).unwrap_or(u32::MAX);
        let memory = aml::Memory32Fixed::new(true, base, SIZE as u32);
        // A consumer's, edge-triggered, active-high, not shared.
        let interrupt = aml::Interrupt::new(true, true, false, false, self.gsi);
        let hid = aml::Name::new("_HID".into(), &"LNRO0005");
        let uid = aml::Name::new("_UID".into(), &self.number);
        let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
        let resources = aml::ResourceTemplate::new(vec![&memory, &interrupt]);
        let resources = aml::Name::new("_CRS".into(), &resources);
        aml::Device::new(name, vec![&hid, &uid, &coherent, &resources]).to_aml_bytes(sink);
    }
}
