//! The embedded images, read as a loader reads them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking, as tests do")]

use guests::{Guest, ports};

fn word(image: &[u8], at: usize, bytes: usize) -> u64 {
    image[at..at + bytes].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

struct Segment {
    kind: u64,
    offset: usize,
    address: u64,
    file: u64,
    memory: u64,
}

fn segments(image: &[u8]) -> Vec<Segment> {
    let table = usize::try_from(word(image, 32, 8)).unwrap();
    (0..usize::try_from(word(image, 56, 2)).unwrap())
        .map(|index| table + index * 56)
        .map(|at| Segment {
            kind: word(image, at, 4),
            offset: usize::try_from(word(image, at + 8, 8)).unwrap(),
            address: word(image, at + 24, 8),
            file: word(image, at + 32, 8),
            memory: word(image, at + 40, 8),
        })
        .collect()
}

fn for_each(check: impl Fn(&Guest, &[u8])) {
    assert!(!guests::all().is_empty());
    for guest in guests::all() {
        check(guest, guest.image);
    }
}

#[test]
fn every_image_is_an_elf_executable_for_x86_64() {
    for_each(|guest, image| {
        assert_eq!(&image[..8], b"\x7fELF\x02\x01\x01\x00", "{}", guest.name);
        assert_eq!((word(image, 16, 2), word(image, 18, 2), word(image, 20, 4)), (2, 62, 1), "{}", guest.name);
        assert_eq!((word(image, 52, 2), word(image, 54, 2)), (64, 56), "{}", guest.name);
    });
}

#[test]
fn every_image_is_one_segment_at_the_load_address_that_holds_its_entry() {
    for_each(|guest, image| {
        let segments = segments(image);
        let load: Vec<&Segment> = segments.iter().filter(|segment| segment.kind == 1).collect();
        assert_eq!(load.len(), 1, "{}", guest.name);
        assert_eq!((load[0].offset, load[0].address), (0, ports::LOAD_ADDRESS), "{}", guest.name);
        assert_eq!((load[0].file, load[0].memory), (image.len() as u64, ports::IMAGE_MEMORY), "{}", guest.name);
        let entry = word(image, 24, 8);
        assert!((ports::LOAD_ADDRESS..ports::LOAD_ADDRESS + load[0].file).contains(&entry), "{}", guest.name);
        assert_ne!(image[usize::try_from(entry - ports::LOAD_ADDRESS).unwrap()], 0, "{}: no code at entry", guest.name);
    });
}

/// Gates and descriptors hold 16 bits of an address within the image, and the guest's own memory follows it.
#[test]
fn every_image_ends_before_the_memory_behind_it() {
    for_each(|guest, image| assert!(image.len() <= 0x1_0000, "{}: {} bytes", guest.name, image.len()));
}

#[test]
fn echo_alone_has_a_pvh_entry() {
    for_each(|guest, image| {
        let segments = segments(image);
        let note = segments.iter().find(|segment| segment.kind == 4);
        assert_eq!(note.is_some(), guest.name == "echo", "{}", guest.name);
        if let Some(note) = note {
            let at = note.offset;
            assert_eq!((word(image, at, 4), word(image, at + 4, 4)), (4, 4));
            assert_eq!(word(image, at + 8, 4), u64::from(ports::PVH_NOTE_TYPE));
            assert_eq!(&image[at + 12..at + 16], b"Xen\0");
            let entry = word(image, at + 16, 4);
            assert!((ports::LOAD_ADDRESS..ports::LOAD_ADDRESS + image.len() as u64).contains(&entry));
        }
    });
}

/// The default of parameter `key` in the image's own table: the row whose first word points to "key=".
fn default(image: &[u8], key: &str) -> Option<(u64, u64)> {
    let text: Vec<u8> = key.bytes().chain(*b"=\0").collect();
    let at = (0..image.len()).find(|at| image[*at..].starts_with(&text) && image[at - 1] == 0)?;
    let address = ports::LOAD_ADDRESS + at as u64;
    let row = (0..image.len() - 24).step_by(8).find(|row| word(image, *row, 8) == address)?;
    Some((word(image, row + 8, 8), word(image, row + 16, 8)))
}

fn number(text: &str) -> u64 {
    match text.split_at(text.len() - 1) {
        (digits, "K") => digits.parse::<u64>().unwrap() << 10,
        (digits, "M") => digits.parse::<u64>().unwrap() << 20,
        _ => text.parse().unwrap(),
    }
}

#[test]
fn the_documented_defaults_are_those_of_the_images() {
    let mut checked = 0;
    for_each(|guest, image| {
        for parameter in guest.parameters.iter().filter(|_| guest.name != "probe") {
            let (value, names) = default(image, parameter.name).unwrap_or_else(|| panic!("{}", parameter.name));
            if names == 0 {
                assert_eq!(value, number(parameter.default), "{} {}", guest.name, parameter.name);
            } else {
                let at = usize::try_from(names - ports::LOAD_ADDRESS).unwrap();
                let name = image[at..].split(|byte| *byte == 0).nth(usize::try_from(value).unwrap()).unwrap();
                assert_eq!(name, parameter.default.as_bytes(), "{} {}", guest.name, parameter.name);
            }
        }
    });
    for guest in guests::all() {
        checked += guest.parameters.len();
    }
    assert!(checked >= 20, "{checked} parameters");
}

#[test]
fn guests_are_found_by_their_names() {
    for_each(|guest, image| assert_eq!(guests::by_name(guest.name).map(|found| found.image), Some(image)));
    assert!(guests::by_name("nobody").is_none());
    let mut names: Vec<&str> = guests::all().iter().map(|guest| guest.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), guests::all().len());
}
