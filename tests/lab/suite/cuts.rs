//! A short campaign of power cuts; `tests/lab/cuts` runs a long one.

use std::path::PathBuf;
use tests::lab::campaign::{Chain, Moment, Plan, campaign};
use tests::lab::machine::in_emulation;

#[test]
fn a_guest_outlives_cuts_in_a_freeze_in_the_resume_after_it_and_with_no_warning() {
    in_emulation(|| {
        // Draws these three moments.
        let directory = tempfile::tempdir().expect("a directory");
        let plan = Plan {
            medium: "file".to_owned(),
            count: 3,
            seed: 120,
            chain: PathBuf::from(env!("CARGO_BIN_EXE_chain")),
            directory: directory.path().to_owned(),
        };
        let tally = campaign(&plan, Chain::new(), &mut |line| eprintln!("{line}"));
        let moments: Vec<_> = tally.cuts.keys().copied().collect();
        assert_eq!(moments, [Moment::Running, Moment::Freezing, Moment::Resuming], "{tally:?}");
    });
}
