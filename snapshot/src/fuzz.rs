//! Entry points for fuzzing: each takes any bytes, and panics only where the store has a fault. The targets in `fuzz/` call
//! them; so do the tests here, with every input in `fuzz/corpus`, so that no target rots.
//!
//! A checksum stops a fuzzer at the door. So each entry tries the bytes as they are, and then with a frame around them whose
//! checksums are right: what the store would meet if somebody had made the file on purpose.

use std::path::Path;
use std::sync::Arc;

use vfs::crash::CrashVfs;
use vfs::{OpenMode, Vfs};

use crate::codec::{Codec, decode};
use crate::frame::{Append, Fields};
use crate::generation::{GenerationId, NewGeneration, PAGE_SIZE, RegionSpec};
use crate::mark::Marks;
use crate::node::{self, Node, encode_blob, encode_inner, encode_leaf, encode_manifest};
use crate::pack::check_header;
use crate::record::{BODY_MAX, SLOT, Slot, foreign_version, seal};
use crate::store::{Options, Store};
use crate::transfer::checksum;

/// A target: bytes in, nothing out.
pub type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, Target); 6] = [
    ("ledger_slot", ledger_slot),
    ("ledger", ledger),
    ("node", node),
    ("pack_header", pack_header),
    ("page", page),
    ("export", export),
];

const STORE: [u8; 16] = [7; 16];

fn options() -> Options {
    Options { threads: 1, bufsize: 1 << 16, store_id: Some(STORE), ..Options::default() }
}

/// A slot of the ledger: what is accepted is written back as the same bytes.
pub fn ledger_slot(bytes: &[u8]) {
    let check = |bytes: &[u8]| {
        let _ = foreign_version(bytes);
        if let Ok(slot) = Slot::decode(bytes) {
            assert!(slot.encode() == bytes, "accepted, and written back otherwise: {slot:?}");
        }
    };
    check(bytes);
    if let Some((kind, body)) = bytes.split_first() {
        check(&seal(STORE, 1, u16::from(*kind), &body[..body.len().min(BODY_MAX)]));
    }
}

/// Whole ledgers, of slots with right checksums: a store with such a ledger can be opened, asked, written, purged, swept and repaired, or
/// says why not.
pub fn ledger(bytes: &[u8]) {
    let mut fields = Fields::new(bytes);
    let mut slots = Vec::new();
    // Kind, file (0, 1: either; else both), sequence, length, body.
    let mut next = || {
        let (kind, files, length) = (fields.u8().ok()?, fields.u8().ok()?, fields.u16().ok()?);
        let sequence = fields.u64().ok()?;
        let body = fields.bytes(usize::from(length).min(BODY_MAX).min(fields.left())).ok()?;
        Some((files, seal(STORE, sequence, u16::from(kind), body)))
    };
    while slots.len() < 32 {
        let Some(slot) = next() else { break };
        slots.push(slot);
    }
    let disk = CrashVfs::new();
    let dir = Path::new("/store");
    let made = || -> std::io::Result<()> {
        disk.create_dir_all(&dir.join("packs"))?;
        for (number, name) in (0u8..).zip(crate::ledger::FILES) {
            let file = disk.open(&dir.join(name), OpenMode::CreateNew)?;
            for (at, (files, slot)) in slots.iter().enumerate() {
                if *files > 1 || *files == number {
                    file.write_all_at(slot, (at * SLOT) as u64)?;
                }
            }
        }
        Ok(())
    };
    assert!(made().is_ok());
    use_store(&disk, dir);
}

fn use_store(disk: &CrashVfs, dir: &Path) {
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    let Ok(store) = Store::open(vfs, dir, options()) else { return };
    let _ = (store.usage(), store.sweep_is_due());
    let all: Vec<GenerationId> =
        store.lineages().iter().flat_map(|lineage| store.generations(lineage)).map(|found| found.id).collect();
    for id in &all {
        let _ = store.reader(id);
        let _ = store.newest_verified(&id.lineage, crate::Depth::Pages);
        let _ = store.diff(id, &all[0]);
    }
    let _ = store.scrub(&mut |_| ());
    let _ = store.protect(&GenerationId::new("a", 1), true);
    let _ = take(&store);
    let _ = all.first().map(|id| store.purge(std::slice::from_ref(id)));
    let _ = store.sweep(&mut |_| ());
    let _ = store.repair(&mut |_| ());
    let _ = store.zombies();
}

fn take(store: &Store) -> Result<(), crate::StoreError> {
    let mut writer = store.begin(NewGeneration::automatic("a", 1))?;
    let ram = writer.region(&RegionSpec { name: "ram".into(), kind: "ram".into(), size: 3 * PAGE_SIZE as u64 })?;
    writer.put(ram, 1, &[1; PAGE_SIZE])?;
    writer.commit().map(drop)
}

/// A node of the archive: what is accepted is written back as the same bytes, and a walk can follow it.
pub fn node(bytes: &[u8]) {
    check_node(bytes);
    if let [kind, level, body @ ..] = bytes {
        check_node(&node::frame(*kind, *level, &body[..body.len().min(node::BLOB_PIECE)]));
    }
}

fn check_node(bytes: &[u8]) {
    let Ok(node) = node::decode(bytes) else { return };
    let again = match &node {
        Node::Leaf(leaf) => Some(encode_leaf(leaf)),
        Node::Inner { level, children } => Some(encode_inner(*level, children)),
        Node::Manifest(manifest) => encode_manifest(manifest),
        Node::Blob(piece) => Some(encode_blob(piece)),
    };
    assert!(again.as_deref() == Some(bytes), "accepted, and written back otherwise: {node:?}");
    let (mut marks, mut next) = (Marks::default(), Vec::new());
    marks.follow(&node, &mut next);
    let held: usize = marks.data.values().map(crate::mark::Blocks::memory).sum();
    assert!(held <= 64 * bytes.len(), "{held} bytes to remember what {} bytes refer to", bytes.len());
}

/// The header of a pack.
pub fn pack_header(bytes: &[u8]) {
    let _ = check_header(bytes, STORE, true, 1);
    let mut good = crate::pack::header(STORE, true, 1);
    assert!(check_header(&good, STORE, true, 1).is_ok());
    let same = good.len() == bytes.len() && good == bytes;
    for (into, byte) in good.iter_mut().zip(bytes) {
        *into ^= byte;
    }
    let unchanged = bytes.iter().take(good.len()).all(|byte| *byte == 0);
    assert_eq!(check_header(&good, STORE, true, 1).is_ok(), unchanged || same);
}

/// A stored page.
pub fn page(bytes: &[u8]) {
    let mut page = [0; PAGE_SIZE];
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        let _ = decode(codec, bytes, &mut page);
    }
}

/// An export: what is imported is exported as the same pages.
pub fn export(bytes: &[u8]) {
    import_twice(bytes);
    // The same with right checksums: kind, length, body; and an end.
    let mut fields = Fields::new(bytes);
    let (mut stream, mut pages) = (Vec::new(), 0u64);
    while let (Ok(kind), Ok(length)) = (fields.u8(), fields.u16()) {
        let Ok(body) = fields.bytes(usize::from(length).min(fields.left())) else { break };
        // A body of pages may repeat its last byte up to whole pages: nobody's corpus needs to hold them.
        let mut body = body.to_vec();
        if kind == 3 && body.len() > 14 {
            let count = (body.len() - 14).min(8);
            pages += count as u64;
            body.resize(14 + count * PAGE_SIZE, body[body.len() - 1]);
            body[10..14].copy_from_slice(&(count as u32).to_le_bytes());
        }
        chunk(&mut stream, u32::from(kind), &body);
    }
    let hash = blake3::hash(&stream);
    let mut body = Vec::new();
    body.u64(pages);
    body.extend_from_slice(hash.as_bytes());
    chunk(&mut stream, 4, &body);
    import_twice(&stream);
}

fn chunk(stream: &mut Vec<u8>, kind: u32, body: &[u8]) {
    stream.u32(kind);
    stream.u32(body.len() as u32);
    stream.u32(checksum(kind, body));
    stream.extend_from_slice(body);
}

fn import_twice(stream: &[u8]) {
    let open = || {
        let vfs: Arc<dyn Vfs> = Arc::new(CrashVfs::new());
        Store::open(vfs, Path::new("/store"), options()).ok()
    };
    let (Some(first), Some(second)) = (open(), open()) else { return };
    let Ok(made) = first.import("copy", &mut &stream[..]) else {
        assert!(first.generations("copy").is_empty());
        return;
    };
    let [mut once, mut again] = [Vec::new(), Vec::new()];
    assert!(first.export(&made.id, &mut once).is_ok());
    let copy = second.import("copy", &mut &once[..]);
    assert!(copy.is_ok_and(|copy| second.export(&copy.id, &mut again).is_ok()));
    assert!(once == again, "an import of an export is another export");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn corpus(target: &str) -> Vec<PathBuf> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        fs::read_dir(&dir).expect("a corpus").map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn every_input_of_the_corpora_passes() {
        for (name, target) in TARGETS {
            let inputs = corpus(name);
            assert!(inputs.len() > 2, "the corpus of {name} has {} inputs", inputs.len());
            for path in inputs {
                println!("{}", path.display());
                target(&fs::read(path).unwrap());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        #[test]
        fn inputs_of_the_corpora_with_a_few_bytes_changed_pass(
            which in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            for (name, target) in TARGETS {
                let mut bytes = fs::read(which.get(&corpus(name))).unwrap();
                for (at, byte) in changes.iter().filter(|_| !bytes.is_empty()).collect::<Vec<_>>() {
                    let at = at.index(bytes.len());
                    bytes[at] = *byte;
                }
                target(&bytes);
            }
        }
    }
}
