use super::*;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

fn corpus(target: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    inputs
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
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn inputs_of_the_corpora_with_a_few_bytes_changed_pass(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
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

    #[test]
    fn any_bytes_pass(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for (_, target) in TARGETS {
            // With a device that is set up, most of them mean something.
            target(&[&[0, 0xff, 0xff, 0xff, 0x3f], &bytes[..]].concat());
        }
    }
}
