use super::*;
use crate::chain::ChainError;
use crate::judge::{Judge, Links};
use proptest::prelude::*;

/// Captured on KVM.
const FIRST: &str = include_str!("../../tests/golden/records.txt");
/// The same disk, a start later.
const SECOND: &str = include_str!("../../tests/golden/records-found.txt");
/// The first five records of a disk, of 1 KiB each, as the guest wrote them.
const DISK: &[u8] = include_bytes!("../../tests/golden/records.disk");

fn judged(lives: &[&str]) -> Result<Links, ChainError> {
    let mut judge = Judge::of(lives[0]).unwrap()?;
    lives.iter().try_for_each(|life| judge.follow(life))?;
    judge.preview("")
}

fn line<'a>(text: &'a str, start: &str) -> &'a str {
    text.split_inclusive('\n').find(|line| line.starts_with(start)).unwrap()
}

#[test]
fn a_real_run_verifies_to_its_end_and_so_does_one_that_found_records() {
    assert_eq!(judged(&[FIRST]), Ok(Links { reached: 20, rewound: 0 }));
    assert_eq!(judged(&[SECOND]), Ok(Links { reached: 31, rewound: 0 }));
    for (text, until, reached) in
        [(FIRST, "record 3 ", 0), (FIRST, "record 18 ", 15), (SECOND, "record 21 ", 20), (SECOND, "done", 30)]
    {
        assert_eq!(judged(&[&text[..text.find(until).unwrap()]]), Ok(Links { reached, rewound: 0 }), "{until}");
    }
}

#[test]
fn a_record_that_is_lost_doubled_or_altered_in_the_output_is_named() {
    let (six, nine) = (line(FIRST, "record 6 "), line(FIRST, "record 9 "));
    let lost = judged(&[&FIRST.replace(nine, "")]).unwrap_err();
    assert_eq!(lost, ChainError::Lost { unit: "record", expected: 9, found: 12 });
    let doubled = judged(&[&FIRST.replace(nine, &format!("{six}{nine}"))]).unwrap_err();
    assert_eq!(doubled, ChainError::Doubled { unit: "record", expected: 9, found: 6 });
    let altered = judged(&[&FIRST.replace(nine, &nine.replace('a', "b"))]).unwrap_err();
    assert!(matches!(altered, ChainError::Altered { unit: "record", number: 9, .. }), "{altered}");
    let broken = FIRST.replace(nine, "chain broken at record 9 its slot holds 0000000000000000\n");
    assert!(matches!(judged(&[&broken]), Err(ChainError::Broken { .. })));
    let begun = format!("{}chain broken at record 9 its slot holds 0000000000000000\n", line(FIRST, "records "));
    assert!(matches!(Judge::of(&begun), Some(Err(ChainError::Broken { .. }))), "at its start");
    let found = SECOND.replace("found 20 97", "found 20 96");
    assert!(judged(&[&found]).is_err(), "a hash that is not that of the chain");
}

#[test]
fn a_way_back_verifies_in_lives_only() {
    let (cut, back) = (FIRST.find("record 15 ").unwrap() + 9, FIRST.find("record 6 ").unwrap() + 4);
    assert_eq!(judged(&[&FIRST[..cut], &FIRST[back..]]), Ok(Links { reached: 20, rewound: 1 }));
    assert!(judged(&[&format!("{}{}", &FIRST[..cut], &FIRST[back..])]).is_err());
}

#[test]
fn forged_first_lines_are_refused() {
    let lines = |first: &str, second: &str| format!("records count=0 {first} hz=1 on=disk verify=1\n{second}\n");
    let right = "flush=2 size=512";
    let slots = "slots 16 found 0 0070657264757265";
    assert!(Judge::of(&lines(right, slots)).unwrap().is_ok());
    for (first, second) in [
        ("flush=0 size=512", slots),
        ("flush=3 size=512", slots),
        ("flush=2 size=511", slots),
        ("flush=2 size=8192", slots),
        (right, ""),
        (right, "slots 0 found 0 0"),
        (right, "slots 99999999 found 0 0"),
        (right, "slots 16 found 999999999999 0"),
        (right, "slots 16 lost 0 0"),
    ] {
        assert!(matches!(Judge::of(&lines(first, second)), Some(Err(ChainError::Banner(_)))), "{first} {second}");
    }
    let elsewhere = lines(right, slots).replace("on=disk", "on=tape");
    assert!(matches!(Judge::of(&elsewhere), Some(Err(ChainError::Banner(_)))));
    assert!(matches!(Judge::of("records count=0\n"), Some(Err(_))), "its second line is missing");
}

#[test]
fn what_is_acknowledged_is_what_whole_lines_say() {
    assert_eq!(acknowledged(FIRST), Some(20));
    assert_eq!(acknowledged(&FIRST[..FIRST.find("record 18 ").unwrap() + 12]), Some(15));
    assert_eq!(acknowledged(&SECOND[..SECOND.find("record ").unwrap()]), Some(20));
    assert_eq!(acknowledged("ord 7 0011\nrecord 8 22"), None);
}

/// A disk of 16 slots of 1 KiB, as the guest leaves it after record `last`.
fn disk(last: u64) -> Vec<u8> {
    let mut disk = vec![0; 16 << 10];
    for (number, hash) in hashes().take_while(|(number, _)| *number <= last) {
        let at = usize::try_from((number - 1) % 16).unwrap() << 10;
        for (sector, index) in disk[at..at + 1024].chunks_mut(SECTOR).zip(0..) {
            let words = [MAGIC, number, hash, index].into_iter().chain(std::iter::repeat(fold(hash, index)));
            sector.chunks_mut(WORD).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
        }
    }
    disk
}

const RING: Ring = Ring { slots: 16, size: 1024, flush: 1 };

fn verify(disk: &[u8], acknowledged: u64) -> Result<u64, RecordError> {
    let read = |at: u64, buffer: &mut [u8]| {
        let at = usize::try_from(at).unwrap();
        buffer.copy_from_slice(&disk[at..at + buffer.len()]);
        Ok(())
    };
    let slots = RING.read(read).unwrap();
    RING.verify(&slots, acknowledged, RING.written_after(acknowledged))
}

#[test]
fn the_disk_of_a_real_run_holds_what_it_is_said_to_hold() {
    assert_eq!(disk(5)[..DISK.len()], *DISK);
    assert_eq!(verify(&disk(5), 5), Ok(5));
    let ring = Ring::of(SECOND).unwrap();
    assert_eq!(ring, Ring { slots: 256, size: 4096, flush: 3 });
}

#[test]
fn a_record_that_is_lost_doubled_or_altered_on_the_disk_is_named() {
    assert_eq!(verify(&disk(40), 40), Ok(14), "two of the sixteen may be written anew by now");
    assert_eq!(verify(&disk(41), 40), Ok(14));
    assert_eq!(verify(&disk(39), 40), Err(RecordError::Lost { number: 40, found: Some(24) }));
    assert_eq!(verify(&disk(7), 8), Err(RecordError::Lost { number: 8, found: None }));
    assert_eq!(verify(&disk(43), 40), Err(RecordError::Ahead { number: 43, written: 42 }));
    let mut doubled = disk(40);
    doubled.copy_within(8 << 10..9 << 10, 7 << 10);
    // Record 41 takes the slot of 25, which is not looked at any more; 40 lies in slot 7.
    assert_eq!(verify(&doubled, 40), Err(RecordError::Lost { number: 40, found: Some(25) }));
    let mut altered = disk(40);
    for (sector, index) in altered[7 << 10..8 << 10].chunks_mut(SECTOR).zip(0..) {
        let words = [MAGIC, 40, 1, index].into_iter().chain(std::iter::repeat(fold(1, index)));
        sector.chunks_mut(WORD).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
    }
    assert!(matches!(verify(&altered, 40), Err(RecordError::Altered { number: 40, found: 1, .. })));
    // A record of which one sector is that of another life.
    let mut torn = disk(40);
    let other = disk(24);
    torn[(7 << 10) + SECTOR..8 << 10].copy_from_slice(&other[(7 << 10) + SECTOR..8 << 10]);
    assert_eq!(verify(&torn, 40), Err(RecordError::Lost { number: 40, found: None }));
}

proptest! {
    #[test]
    fn any_altered_byte_of_the_output_is_found(at in FIRST.find(" found").unwrap()..FIRST.len(), flip in 0_u8..7) {
        let mut bytes = FIRST.as_bytes().to_vec();
        bytes[at] ^= 1 << flip;
        let text = String::from_utf8(bytes).unwrap();
        prop_assert!(Judge::of(&text).is_none_or(|judge| judge.and_then(|mut judge| judge.follow(&text)).is_err()));
    }

    #[test]
    fn any_altered_bit_of_a_record_that_counts_is_found(bit in 0_usize..16 << 13) {
        let mut altered = disk(40);
        altered[bit / 8] ^= 1 << (bit % 8);
        // Slots 8 and 9 may be on their way to records 41 and 42.
        let counts = !(8..10).contains(&(bit >> 13));
        prop_assert_eq!(verify(&altered, 40).is_err(), counts);
    }

    #[test]
    fn no_bytes_of_a_disk_are_more_than_lost(bytes in proptest::collection::vec(any::<u8>(), 16 << 10), last in 1_u64..100) {
        prop_assert!(verify(&bytes, last).is_err());
    }
}
