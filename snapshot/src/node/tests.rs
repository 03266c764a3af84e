use super::*;
use proptest::prelude::*;

fn any_ref() -> impl Strategy<Value = NodeRef> {
    (any::<u32>(), any::<u32>(), NODE_HEADER as u32..=NODE_MAX as u32, any::<[u8; 16]>())
        .prop_map(|(pack, unit, length, hash)| NodeRef { pack, unit, length, hash: Hash(hash) })
}

fn any_link() -> impl Strategy<Value = Link> {
    let shape = prop_oneof![
        Just((PAGE_SIZE as u16, Codec::Raw)),
        (1..4096u16, prop_oneof![Just(Codec::Lz4), Just(Codec::Zstd)])
    ];
    (any::<u32>(), any::<u32>(), shape, any::<u16>(), any::<u32>())
        .prop_map(|(pack, unit, (length, codec), born, crc)| Link { pack, unit, length, codec, born, crc })
}

fn any_entry() -> impl Strategy<Value = Entry> {
    (any::<[u8; 16]>(), any_link(), proptest::option::of(any_link())).prop_map(|(hash, first, second)| Entry {
        hash: Hash(hash),
        first,
        second,
    })
}

fn slots<T: std::fmt::Debug>(item: impl Strategy<Value = T>) -> impl Strategy<Value = Box<[Option<T>; FANOUT]>> {
    proptest::collection::vec(proptest::option::of(item), FANOUT).prop_map(|items| Box::new(items.try_into().unwrap()))
}

fn any_manifest() -> impl Strategy<Value = Manifest> {
    let region = ("[a-z/]{1,20}", "[a-z]{1,8}", 0..=REGION_MAX, 0..=LEVEL_MAX, proptest::option::of(any_ref()))
        .prop_map(|(name, kind, size, level, root)| ManifestRegion { name, kind, size, level, root });
    let blob = ("[a-z]{1,9}", proptest::collection::vec(any_ref(), 0..4)).prop_map(|(name, pieces)| ManifestBlob {
        name,
        length: (pieces.len() * BLOB_PIECE) as u64,
        pieces,
    });
    (proptest::collection::vec(region, 0..6), proptest::collection::vec(blob, 0..4))
        .prop_map(|(regions, blobs)| Manifest { regions, blobs })
}

proptest! {
    #[test]
    fn every_node_comes_back_as_it_went(
        leaf in slots(any_entry()), children in slots(any_ref()), level in 1..=LEVEL_MAX,
        manifest in any_manifest(), piece in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        prop_assert_eq!(decode(&encode_leaf(&leaf)).unwrap(), Node::Leaf(leaf));
        prop_assert_eq!(decode(&encode_inner(level, &children)).unwrap(), Node::Inner { level, children });
        prop_assert_eq!(decode(&encode_manifest(&manifest).unwrap()).unwrap(), Node::Manifest(manifest));
        prop_assert_eq!(decode(&encode_blob(&piece)).unwrap(), Node::Blob(piece));
    }

    #[test]
    fn a_flipped_bit_is_refused(leaf in slots(any_entry()), at in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = encode_leaf(&leaf);
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn hostile_bodies_are_refused_without_a_panic(
        kind in 0u8..6, level in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        let _ = decode(&frame(kind, level, &body));
        let _ = decode(&body);
    }
}

#[test]
fn a_whole_node_in_the_wrong_place_is_refused() {
    let right = encode_blob(b"right");
    let wrong = encode_blob(b"wrong");
    let node = NodeRef { pack: 1, unit: 0, length: right.len() as u32, hash: Hash::of(&right) };
    assert_eq!(verify(&node, &right), Ok(Node::Blob(b"right".to_vec())));
    assert_eq!(verify(&node, &wrong), Err(Malformed("it is another node")));
}

#[test]
fn levels_hold_what_they_must() {
    for (pages, level) in [(0, 0), (1, 0), (32, 0), (33, 1), (1024, 1), (1025, 2), (1 << 18, 3), (1 << 40, 7)] {
        assert_eq!(level_for(pages), level, "{pages} pages");
    }
    assert_eq!(slot_of(33, 0), 1);
    assert_eq!(slot_of(33, 1), 1);
    assert_eq!(slot_of(1 << 10, 2), 1);
}
