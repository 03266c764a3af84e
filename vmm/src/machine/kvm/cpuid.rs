//! What a vCPU says of itself: KVM's supported leaves, with the topology of this VM written in.
//!
//! One package, one thread a core. Sources: Intel SDM volume 2A (CPUID), AMD APM volume 3 appendix E, and the kernel's
//! `Documentation/virt/kvm/cpuid.rst`.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::{Host, KvmError};

/// The leaves for vCPU `index` of `cpus`.
///
/// # Errors
/// [`KvmError::Ioctl`].
pub fn for_vcpu(host: &Host, supported: &CpuId, index: u32, cpus: u32) -> Result<CpuId, KvmError> {
    let topology = Topology { index, cpus, tsc_deadline: host.has_tsc_deadline() };
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Leaves 0xb and 0x1f are written anew below; 0x1f (dies) may be left out, then 0xb counts.
        .filter(|entry| entry.function != 0xb && entry.function != 0x1f)
        .copied()
        .collect();
    for entry in &mut entries {
        topology.write_into(entry);
    }
    if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        entries.extend(topology.extended_topology());
    }
    CpuId::from_entries(&entries)
        .map_err(|error| KvmError::BadState { what: "CPUID", why: format!("too many leaves: {error:?}") })
}

#[derive(Debug, Clone, Copy)]
struct Topology {
    index: u32,
    cpus: u32,
    tsc_deadline: bool,
}

impl Topology {
    /// How many bits of the APIC ID tell the cores of the package apart.
    fn core_bits(self) -> u32 {
        self.cpus.max(1).next_power_of_two().trailing_zeros()
    }

    fn write_into(self, entry: &mut kvm_cpuid_entry2) {
        match (entry.function, entry.index) {
            (0x1, _) => self.features(entry),
            (0x4 | 0x8000_001d, _) => self.cache(entry),
            // No performance counters: their state would not survive, and a guest must not rely on them.
            (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0001, _) => {
                const CMP_LEGACY: u32 = 1 << 1;
                const PERF_COUNTERS: u32 = (1 << 23) | (1 << 24) | (1 << 28);
                entry.ecx &= !PERF_COUNTERS;
                entry.ecx = if self.cpus > 1 { entry.ecx | CMP_LEGACY } else { entry.ecx & !CMP_LEGACY };
            }
            (0x8000_0008, _) => entry.ecx = (self.core_bits() << 12) | ((self.cpus - 1) & 0xff),
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (self.index, self.index & 0xff, 0),
            _ => {}
        }
    }

    fn features(self, entry: &mut kvm_cpuid_entry2) {
        const HTT: u32 = 1 << 28;
        const TSC_DEADLINE: u32 = 1 << 24;
        const HYPERVISOR: u32 = 1 << 31;
        let logical = self.cpus.next_power_of_two().min(128);
        entry.ebx = (entry.ebx & 0x0000_ffff) | (self.index.min(255) << 24) | (logical << 16);
        entry.edx = if self.cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        entry.ecx |= HYPERVISOR;
        if self.tsc_deadline {
            entry.ecx |= TSC_DEADLINE;
        }
    }

    /// Leaf 4 (Intel) and 0x8000001d (AMD): levels 1 and 2 are a core's own, level 3 is the package's.
    fn cache(self, entry: &mut kvm_cpuid_entry2) {
        let (kind, level) = (entry.eax & 0x1f, (entry.eax >> 5) & 7);
        if kind == 0 {
            return;
        }
        let sharing = if level >= 3 { (self.cpus - 1) & 0xfff } else { 0 };
        entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        if entry.function == 0x4 {
            entry.eax |= ((1 << self.core_bits()) - 1).min(0x3f) << 26;
        }
    }

    /// Leaf 0xb: subleaf 0 is the thread level, 1 the core level, 2 ends the list.
    fn extended_topology(self) -> [kvm_cpuid_entry2; 3] {
        const SIGNIFICANT_INDEX: u32 = 1;
        let level = |index, bits: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            eax: bits,
            ebx: count,
            ecx: (kind << 8) | index,
            edx: self.index,
            ..Default::default()
        };
        [level(0, 0, 1, 1), level(1, self.core_bits(), self.cpus, 2), level(2, 0, 0, 0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    #[test]
    fn apic_ids_and_counts_are_written_into_leaf_1() {
        let mut leaf = entry(1, 0);
        leaf.ebx = 0xffff_1234;
        Topology { index: 2, cpus: 3, tsc_deadline: true }.write_into(&mut leaf);
        assert_eq!(leaf.ebx, 0x0204_1234);
        assert_eq!((leaf.edx >> 28) & 1, 1);
        assert_eq!((leaf.ecx >> 24) & 1, 1);
        assert_eq!(leaf.ecx >> 31, 1);
    }

    #[test]
    fn a_single_cpu_is_not_hyperthreaded() {
        let mut leaf = entry(1, 0);
        leaf.edx = u32::MAX;
        Topology { index: 0, cpus: 1, tsc_deadline: false }.write_into(&mut leaf);
        assert_eq!((leaf.edx >> 28) & 1, 0);
    }

    #[test]
    fn the_third_cache_level_is_shared_by_all_and_the_first_by_none() {
        let topology = Topology { index: 0, cpus: 4, tsc_deadline: false };
        let mut first = entry(4, 0x1 | (1 << 5) | (7 << 14));
        let mut third = entry(4, 0x3 | (3 << 5));
        topology.write_into(&mut first);
        topology.write_into(&mut third);
        assert_eq!((first.eax >> 14) & 0xfff, 0);
        assert_eq!((third.eax >> 14) & 0xfff, 3);
        assert_eq!(third.eax >> 26, 3);
    }

    #[test]
    fn leaf_b_names_the_apic_id_on_every_level() {
        let levels = Topology { index: 5, cpus: 6, tsc_deadline: false }.extended_topology();
        assert!(levels.iter().all(|level| level.edx == 5));
        assert_eq!((levels[1].eax, levels[1].ebx), (3, 6));
    }
}
