use super::*;
use proptest::prelude::*;

/// Captured on KVM with 8 MiB of memory; `list()` was its list.
const RUN: &str = include_str!("../../tests/golden/pages.txt");

/// Some pages more often than others, reads and writes.
fn list() -> List {
    let access = |i: u32| Access { page: (i * i) % 300, write: i.is_multiple_of(3) };
    List::new((0..1000).map(access), 300).unwrap()
}

#[test]
fn a_real_run_verifies_to_its_end() {
    let report = verify(RUN, &list().to_bytes()).unwrap();
    assert_eq!(report, PagesReport { accesses: 25_000, writes: 8350, complete: true });
}

#[test]
fn a_run_that_goes_on_tells_how_far_it_is() {
    let output = &RUN[..RUN.find("at 20000").unwrap() + 3];
    let report = verify(output, &list().to_bytes()).unwrap();
    assert_eq!(report, PagesReport { accesses: 15_000, writes: 0, complete: false });
}

#[test]
fn another_list_of_the_same_length_is_told_apart() {
    let mut bytes = list().to_bytes();
    bytes[3999] ^= 0x80;
    assert!(matches!(verify(RUN, &bytes), Err(PagesError::Different { .. })));
}

#[test]
fn a_doubled_line_is_found() {
    let doubled = RUN.replace("at 10000\n", "at 10000\nat 10000\n");
    let error = verify(&doubled, &list().to_bytes()).unwrap_err();
    assert_eq!(error, PagesError::Different { expected: "at 15000".into(), found: "at 10000".into() });
}

#[test]
fn the_guests_own_verdict_is_passed_on() {
    let line =
        "pages: damaged page 7 at access 5001 address 0000000000201000 holds 0000000000000000 due 0000000000000001";
    let output = format!("{}{line}\n", &RUN[..RUN.find("at 10000").unwrap()]);
    assert_eq!(verify(&output, &list().to_bytes()).unwrap_err(), PagesError::Damaged { line: line.into() });
}

#[test]
fn lists_that_are_none_are_refused() {
    assert_eq!(List::parse(&[], 0), Err(ListError::Length(0)));
    assert_eq!(List::parse(&[0; 7], 0), Err(ListError::Length(7)));
    let beyond = List::parse(&[0, 0, 0, 0, 5, 0, 0, 0x80], 5);
    assert_eq!(beyond, Err(ListError::Beyond { entry: 1, page: 5, pages: 5 }));
    assert_eq!(List::parse(&[0, 0, 0, 0, 5, 0, 0, 0x80], 0).unwrap().pages(), 6);
    assert!(List::parse(&[0xff; 8], 0).is_ok(), "2^31 pages");
}

#[test]
fn words_of_pages_differ() {
    let words = (0..100).flat_map(|page| (0..PAGE_WORDS).map(move |index| word(page, index)));
    let distinct: std::collections::HashSet<u64> = words.collect();
    assert_eq!(distinct.len(), 100 * PAGE_WORDS);
}

proptest! {
    #[test]
    fn a_list_survives_its_bytes(entries in proptest::collection::vec((0_u32..1000, any::<bool>()), 1..100)) {
        let list = List::new(entries.into_iter().map(|(page, write)| Access { page, write }), 1000).unwrap();
        prop_assert_eq!(List::parse(&list.to_bytes(), 1000).unwrap(), list);
    }

    #[test]
    fn any_altered_byte_is_found(at in "pages pages=0 writes=list count=25000 every=5000\n".len()..RUN.len(), flip in 0_u8..7) {
        let mut bytes = RUN.as_bytes().to_vec();
        bytes[at] ^= 1 << flip;
        prop_assert!(verify(&String::from_utf8(bytes).unwrap(), &list().to_bytes()).is_err());
    }

    #[test]
    fn forged_output_never_panics(output in "pages( pages=[0-9]{0,12})?( writes=[a-z]{0,4})?( count=[0-9]{0,5})?( every=[0-9]{0,5})?\n.{0,40}") {
        let _ = verify(&output, &[0, 0, 0, 0]);
    }
}
