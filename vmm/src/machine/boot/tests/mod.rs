//! Tests of the whole loader, on kernels made up here. What a kernel reads is checked at the offsets that the
//! protocols' own documents give, not through the structures that wrote it.

mod acpi;
mod bzimage;
mod elf;
mod fixtures;
mod handover;
mod hostile;
