//! Damaged kernels. Whatever a file holds, loading it ends in an entry or an error, and in nothing else.

use proptest::prelude::*;

use super::super::layout::{AP_TRAMPOLINE, HIGH_RAM_START};
use super::super::load;
use super::fixtures::*;

const RAM: u64 = 8 * MIB;

/// Boots `image` and checks what holds of every boot, failed or not.
fn survive(image: &[u8]) -> Result<(), TestCaseError> {
    let memory = memory(RAM / MIB, HIGH_RAM_START);
    let result = load(&memory, &spec(image, RAM));
    if let Ok(entry) = result {
        prop_assert!((HIGH_RAM_START..RAM).contains(&entry.rip), "{entry:x?}");
        prop_assert_eq!(u64_at(&memory, 0xe_0000), u64::from_le_bytes(*b"RSD PTR "));
    }
    prop_assert_eq!(bytes(&memory, AP_TRAMPOLINE, 4096), vec![STALE; 4096]);
    Ok(())
}

fn mutations() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_elf_with_changed_bytes_loads_or_is_refused(changes in mutations()) {
        let mut image = elf(MIB, &[
            segment(MIB, &[0x90; 64], 128),
            notes([note(1, b"Linux\0", &[1; 5]), pvh_note(MIB as u32)].concat()),
            segment(2 * MIB, &[1; 16], 4096),
        ]);
        for (at, value) in changes {
            let at = at.index(image.len());
            image[at] = value;
        }
        survive(&image)?;
    }

    #[test]
    fn a_bzimage_with_a_changed_header_loads_or_is_refused(changes in mutations()) {
        let mut image = bzimage(&[0x55; 64]);
        for (at, value) in changes {
            let at = header::SETUP_SECTS + at.index(0x26c - header::SETUP_SECTS);
            image[at] = value;
        }
        survive(&image)?;
    }

    #[test]
    fn random_bytes_behind_a_good_beginning_load_or_are_refused(
        noise in proptest::collection::vec(any::<u8>(), 0..700), kind in 0..2,
    ) {
        let good = if kind == 0 { plain_elf()[..20].to_vec() } else { bzimage(b"")[..0x208].to_vec() };
        survive(&[good, noise].concat())?;
    }
}

#[test]
fn every_byte_of_the_headers_at_its_extremes_loads_or_is_refused() {
    let elf = pvh_elf();
    let headers = program_header(2);
    let notes_from = elf.len() - pvh_note(0).len();
    let bzimage = bzimage(b"kernel");
    let elf_bytes = (0..headers).chain(notes_from..elf.len()).map(|at| (&elf, at));
    let bzimage_bytes = (header::SETUP_SECTS..0x26c).map(|at| (&bzimage, at));
    for (image, at) in elf_bytes.chain(bzimage_bytes) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = image.clone();
            image[at] = value;
            survive(&image).unwrap();
        }
    }
}
