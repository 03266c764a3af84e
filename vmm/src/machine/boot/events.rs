//! What the machine tells the guest's ACPI of its own accord: a new VM generation ID, and the power button.
//!
//! A hardware-reduced platform has no SCI; its events are interrupts of a Generic Event Device (ACPI 6.5, section 5.6.9), whose method `_EVT`
//! gets the interrupt's number and notifies the object that is concerned.

use acpi_tables::{Aml, AmlSink, aml};

use super::layout::VM_GENERATION_ID;

/// Interrupt of the power button: the SCI's usual one, which a hardware-reduced platform has not.
pub const POWER_BUTTON_GSI: u32 = 9;
/// Interrupt of a new VM generation ID: the last pin of the I/O APIC.
pub const GENERATION_GSI: u32 = 23;

/// Pressed (section 4.8.3.2), and changed (the VM generation ID's specification): the same code.
const CHANGED: u8 = 0x80;

/// The three objects of the DSDT.
pub(super) struct Events;

impl Aml for Events {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let button_id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C"));
        aml::Device::new("PWRB".into(), vec![&button_id]).to_aml_bytes(sink);
        generation_id(sink);
        event_device(sink);
    }
}

/// `VM_Gen_Counter` is the ID that the specification asks for; Linux before 6.10 takes it in capitals alone, or VMGENCTR.
fn generation_id(sink: &mut dyn AmlSink) {
    let hid = aml::Name::new("_HID".into(), &"VMGENCTR");
    let cid = aml::Name::new("_CID".into(), &"VM_Gen_Counter");
    let ddn = aml::Name::new("_DDN".into(), &"VM_Gen_Counter");
    let (low, high) = (VM_GENERATION_ID & u64::from(u32::MAX), VM_GENERATION_ID >> 32);
    let address = aml::Package::new(vec![&low, &high]);
    let address = aml::Name::new("ADDR".into(), &address);
    aml::Device::new("VGEN".into(), vec![&hid, &cid, &ddn, &address]).to_aml_bytes(sink);
}

fn event_device(sink: &mut dyn AmlSink) {
    let edge = |gsi| aml::Interrupt::new(true, true, false, false, gsi);
    let (button, generation) = (edge(POWER_BUTTON_GSI), edge(GENERATION_GSI));
    let resources = aml::ResourceTemplate::new(vec![&button, &generation]);
    let resources = aml::Name::new("_CRS".into(), &resources);
    let (button, generation) = (aml::Path::new("PWRB"), aml::Path::new("VGEN"));
    let press = aml::Notify::new(&button, &CHANGED);
    let renew = aml::Notify::new(&generation, &CHANGED);
    let pressed = aml::Equal::new(&aml::Arg(0), &POWER_BUTTON_GSI);
    let renewed = aml::Equal::new(&aml::Arg(0), &GENERATION_GSI);
    let (press, renew) = (aml::If::new(&pressed, vec![&press]), aml::If::new(&renewed, vec![&renew]));
    let event = aml::Method::new("_EVT".into(), 1, true, vec![&press, &renew]);
    let hid = aml::Name::new("_HID".into(), &"ACPI0013");
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    aml::Device::new("GED_".into(), vec![&hid, &uid, &resources, &event]).to_aml_bytes(sink);
}
