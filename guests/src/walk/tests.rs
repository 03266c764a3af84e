use super::*;

/// Captured on KVM with 5000 MiB of memory, on both sides of the 32-bit gap: one run of each kind.
const RUNS: &str = include_str!("../../tests/golden/memwalk.txt");

fn runs() -> Vec<String> {
    let mut runs: Vec<String> = Vec::new();
    for line in RUNS.lines() {
        if line.starts_with("memwalk") {
            runs.push(String::new());
        }
        let run = runs.last_mut().unwrap();
        run.push_str(line);
        run.push('\n');
    }
    runs
}

fn walk(pattern: Pattern, pages: u64) -> Walk {
    Walk::new(WalkParameters { pattern, pages, write: 50, seed: 1, hot: 10, heat: 90, phase: 100 }).unwrap()
}

#[test]
fn real_runs_of_all_patterns_verify_to_their_end() {
    let mut seen = Vec::new();
    for run in runs() {
        let report = verify(&run).unwrap();
        assert!(report.complete && report.touches > 0, "{run}");
        seen.push(report.parameters.pattern);
    }
    assert!(Pattern::ALL.iter().all(|pattern| seen.contains(pattern)), "{seen:?}");
}

#[test]
fn any_altered_byte_of_the_end_is_found() {
    for run in runs() {
        for at in run.find("\npages").unwrap() + 1..run.len() {
            let mut bytes = run.clone().into_bytes();
            bytes[at] ^= 1;
            let altered = String::from_utf8(bytes).unwrap();
            // With ws=0 the pages are known from the output alone, and the hash need not depend on each of them.
            if !run.contains("ws=0") || at > run.find("\ndone").unwrap() {
                assert!(verify(&altered).is_err(), "{altered}");
            }
        }
    }
}

#[test]
fn a_walk_that_is_still_going_on_verifies() {
    let run = &runs()[0];
    let report = verify(&run[..run.find("done").unwrap()]).unwrap();
    assert!(!report.complete);
}

#[test]
fn the_guests_own_verdict_is_passed_on() {
    let run = &runs()[1];
    let broken = "walk broken at touch 12 page 7 address 0000000002000000";
    let error = verify(&format!("{}{broken}\n", &run[..run.find("done").unwrap()])).unwrap_err();
    assert_eq!(error, WalkError::Broken { line: broken.to_owned() });
}

#[test]
fn zipf_ranks_follow_one_over_k() {
    const PAGES: u64 = 1000; // no power of two
    const DRAWS: u32 = 400_000;
    let mut walk = walk(Pattern::Zipf, PAGES);
    let mut seen = vec![0_u32; 1000];
    for _ in 0..DRAWS {
        seen[usize::try_from(walk.zipf_rank()).unwrap()] += 1;
    }
    let harmonic: f64 = (1..=PAGES).map(|k| 1.0 / k as f64).sum();
    for k in [1_usize, 2, 3, 4, 7, 8, 50, 127, 128] {
        let expected = f64::from(DRAWS) / (k as f64 * harmonic);
        let got = f64::from(seen[k - 1]);
        assert!((got - expected).abs() < 5.0 * expected.sqrt(), "rank {k}: {got} drawn, {expected} expected");
    }
    assert!(seen[512..].iter().sum::<u32>() > 0, "the last, incomplete octave is drawn from too");
}

#[test]
fn hot_pages_get_their_share() {
    let mut touches = std::collections::HashMap::new();
    for touch in walk(Pattern::HotCold, 1000).take(100_000) {
        *touches.entry(touch.page).or_insert(0_u32) += 1;
    }
    let mut counts: Vec<u32> = touches.into_values().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let hot: u32 = counts.iter().take(100).sum();
    assert!((89_000..91_000).contains(&hot), "{hot} of 100000 touches in a tenth of the pages");
}

#[test]
fn phases_move_through_all_pages() {
    let first: Vec<u64> = walk(Pattern::Phases, 1000).take(100).map(|touch| touch.page).collect();
    let second: Vec<u64> = walk(Pattern::Phases, 1000).skip(100).take(100).map(|touch| touch.page).collect();
    assert!(first.iter().all(|page| *page < 250) && second.iter().all(|page| (250..500).contains(page)));
}

#[test]
fn scattering_is_a_permutation() {
    for pages in [1, 2, 3, 1000, 4096, 65_537] {
        let walk = walk(Pattern::Zipf, pages);
        let distinct: std::collections::HashSet<u64> = (0..pages).map(|rank| walk.scatter(rank)).collect();
        assert_eq!(distinct.len() as u64, pages);
    }
}
