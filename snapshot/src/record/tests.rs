use super::*;
use proptest::prelude::*;

fn any_id() -> impl Strategy<Value = GenerationId> {
    ("[a-z/]{1,255}", any::<u64>()).prop_map(|(lineage, number)| GenerationId { lineage, number })
}

fn any_label() -> impl Strategy<Value = Option<String>> {
    proptest::option::of("[ -~]{1,1024}")
}

fn any_ends() -> impl Strategy<Value = Ends> {
    let end = (any::<u32>(), 0..=END_MAX).prop_map(|(pack, end)| PackEnd { pack, end });
    (end.clone(), end).prop_map(|(data, archive)| Ends { data, archive })
}

fn any_committed() -> impl Strategy<Value = Committed> {
    let who = (any_id(), proptest::option::of(any_id()), any_label(), any::<bool>(), any::<bool>());
    let numbers = (any::<u64>(), any::<u32>(), any::<[u64; 4]>());
    (who, numbers, any::<[u8; 16]>(), any_ends()).prop_map(
        |((id, parent, label, protected, manual), (time_ms, depth, sizes), hash, ends)| Committed {
            info: Generation {
                id,
                parent,
                time_ms,
                label,
                protected,
                origin: if manual { Origin::Manual } else { Origin::Automatic },
                sequence: 7,
                depth,
                logical_bytes: sizes[0],
                pages_stored: sizes[1],
                page_bytes_stored: sizes[2],
                archive_bytes_stored: sizes[3],
            },
            manifest: NodeRef { pack: 3, unit: 4, length: 99, hash: Hash(hash) },
            ends,
        },
    )
}

fn any_record() -> impl Strategy<Value = Record> {
    prop_oneof![
        ([0..=COUNT_MAX, 0..=COUNT_MAX, 0..=COUNT_MAX], any::<u64>())
            .prop_map(|([epoch, slots, lost], unswept)| Record::Header { epoch, slots, lost, unswept }),
        any_committed().prop_map(|committed| Record::Generation(Box::new(committed))),
        ("[a-z]{1,255}", proptest::collection::vec(any::<u64>(), 0..=PURGE_MAX))
            .prop_map(|(lineage, numbers)| Record::Purge { lineage, numbers }),
        (any_id(), any_label(), any::<bool>()).prop_map(|(id, label, protected)| Record::Update {
            id,
            label,
            protected
        }),
        ("[a-z]{1,255}", any::<u64>()).prop_map(|(lineage, next)| Record::Floor { lineage, next }),
        any_ends().prop_map(Record::Resume),
    ]
}

proptest! {
    #[test]
    fn every_record_fits_its_slot_and_comes_back(record in any_record(), store in any::<[u8; 16]>()) {
        let slot = Slot { store, sequence: 7, record };
        let bytes = slot.encode();
        prop_assert_eq!(bytes.len(), SLOT);
        prop_assert_eq!(Slot::decode(&bytes).unwrap(), slot);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused(record in any_record(), at in 0..SLOT, bit in 0..8) {
        let mut bytes = Slot { store: [1; 16], sequence: 7, record }.encode();
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Slot::decode(&bytes).is_err());
    }

    #[test]
    fn hostile_bodies_are_refused_without_a_panic(kind in 0u16..9, body in proptest::collection::vec(any::<u8>(), 0..500)) {
        let _ = decode_body(kind, 1, &mut Fields::new(&body));
        let _ = Slot::decode(&body);
    }
}
