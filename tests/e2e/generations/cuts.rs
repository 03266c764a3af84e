//! Commands killed at any moment of the time that they take here and now. The seeds are in the tests; what the moments hit is never the same.

use std::time::{Duration, Instant};

use tests::perdure::{LIMIT, Perdure, Signal};

use super::{RUN, Web, path};

/// Moments to kill at. xorshift64 (Marsaglia 2003).
struct Moments(u64);

impl Moments {
    /// Up to `most`.
    fn next(&mut self, most: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_nanos(self.0 % u64::try_from(most.as_nanos()).expect("a short time"))
    }
}

/// A rollback killed at any moment leaves what was, or what was chosen, or what was kept: never a mixture, which would break the
/// chain, and never nothing.
#[test]
fn a_rollback_killed_at_any_moment_leaves_a_vm_that_goes_on() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    let mut moments = Moments(0x9E37_79B9_7F4A_7C15);
    // With its first ticks, and a freeze.
    let begun = Instant::now();
    web.live(&["resume", "web", "--generation", "1"]);
    let whole = begun.elapsed();
    for round in 0..40 {
        let moment = moments.next(whole);
        let choice = ["1", "2"][usize::from(round % 3 == 2 && web.ids().len() > 1)];
        let discard = round % 4 == 3;
        let mut arguments = vec!["resume", "web", "--generation", choice];
        arguments.extend(discard.then_some("--discard"));
        let rolling = web.perdure.spawn(&arguments);
        std::thread::sleep(moment);
        rolling.signal(Signal::KILL);
        web.lives.push(rolling.wait(LIMIT).stdout);
        web.live(&["resume", "web"]);
    }
    let report = web.unbroken();
    assert!(report.rewound > 10, "{report:?}");
    web.perdure.run(&["scrub"]).expect_code(0);
}

/// A fork or import killed at any moment leaves a VM that goes on, or nothing but what `remove` takes away. Never one that
/// boots where it should go on, and never one that is in the way.
#[test]
fn a_birth_killed_at_any_moment_leaves_a_vm_that_goes_on_or_nothing_in_the_way() {
    let mut web = Web::new();
    web.live(&RUN);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("web.export");
    web.perdure.run(&["export", "web", path(&file)]).expect_code(0);
    let mut moments = Moments(0xD1B5_4A32_D192_ED03);
    let (mut whole, mut gone) = (0, 0);
    let births = [["fork", "web@1", "young"], ["import", path(&file), "young"]];
    let took = births.map(|birth| {
        let took = web.perdure.run(&birth).expect_code(0).took;
        web.perdure.run(&["remove", "young", "--force"]).expect_code(0);
        took
    });
    for round in 0..30 {
        let birth = births[round % 2];
        let being_born = web.perdure.spawn(&birth);
        // Beyond its end in a third of them.
        std::thread::sleep(moments.next(took[round % 2] * 3 / 2));
        being_born.signal(Signal::KILL);
        being_born.wait(LIMIT);
        let mut young = Web { perdure: Perdure::on(web.perdure.pool()), name: "young", lives: web.lives.clone() };
        if web.perdure.run(&["resume", "young", "--detach"]).code == Some(0) {
            web.perdure.run(&["powerfail", "young"]).expect_code(0);
            whole += 1;
        } else {
            // What the cut left may be in the way until it is removed, and says so.
            if web.perdure.run(&birth).code != Some(0) {
                web.perdure.run(&["remove", "young", "--force"]).expect_code(0);
                web.perdure.run(&birth).expect_code(0);
            }
            young.live(&["resume", "young"]);
            assert_eq!(young.unbroken().rewound, 0, "round {round}");
            gone += 1;
        }
        web.perdure.run(&["remove", "young", "--force"]).expect_code(0);
    }
    assert!(whole > 0 && gone > 0, "the moments hit one kind only: {whole} whole, {gone} gone");
    web.perdure.run(&["scrub"]).expect_code(0);
    web.live(&["resume", "web"]);
    assert_eq!(web.unbroken().rewound, 0);
}
