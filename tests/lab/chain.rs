//! A hash chain over megabytes of RAM: one lost, doubled or altered byte anywhere breaks every link after it.
//!
//! ```text
//!   step n:  hash(n) = BLAKE3(hash(n-1), n, window(n))     window: 64 pages, walking round the whole state
//!            16 pages, chosen by hash(n), are overwritten with bytes drawn from hash(n)
//!   printed: "chain n hash(n) milliseconds"                milliseconds: the guest's monotonic clock since it began
//! ```
//!
//! The host repeats the computation, so a chain is not merely self-consistent but the right one. BLAKE3 works in vector
//! registers, so a vCPU frozen in the middle of a step has live SSE/AVX state.

use std::fmt;

const PAGE: usize = 4096;
const WINDOW: u64 = 64;
const REWRITTEN: usize = 16;

/// A chain in progress.
#[derive(Clone)]
pub struct Chain {
    state: Vec<u8>,
    hash: [u8; 32],
    step: u64,
}

impl Chain {
    /// A chain over `mebibytes` of state, before its first step.
    ///
    /// # Panics
    ///
    /// When `mebibytes` is 0.
    pub fn new(mebibytes: usize) -> Self {
        assert!(mebibytes > 0, "a chain needs at least 1 MiB of state");
        let mut state = vec![0; mebibytes << 20];
        let seed = blake3::hash(b"perdure hash chain 1");
        blake3::Hasher::new_keyed(seed.as_bytes()).finalize_xof().fill(&mut state);
        Self { state, hash: *seed.as_bytes(), step: 0 }
    }

    /// Takes the next step and returns its number and hash.
    pub fn advance(&mut self) -> (u64, String) {
        self.step += 1;
        let pages = (self.state.len() / PAGE) as u64;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.hash).update(&self.step.to_le_bytes());
        for offset in 0..WINDOW {
            let page = (self.step * WINDOW + offset) % pages;
            hasher.update(&self.state[page as usize * PAGE..][..PAGE]);
        }
        let hash = hasher.finalize();
        let mut bytes = hasher.finalize_xof();
        for _ in 0..REWRITTEN {
            let mut index = [0; 8];
            bytes.fill(&mut index);
            let page = (u64::from_le_bytes(index) % pages) as usize;
            bytes.fill(&mut self.state[page * PAGE..][..PAGE]);
        }
        self.hash = *hash.as_bytes();
        (self.step, hash.to_hex().to_string())
    }
}

/// What a verified console log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Links found, from step 1 on, without a gap.
    pub steps: u64,
    /// The greatest jump of the guest's monotonic clock between two links, in milliseconds.
    pub greatest_pause_ms: u64,
}

/// Where a chain broke, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The line that should have been the next link.
    pub line: String,
    /// The last step that was right.
    pub after: u64,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "the chain is broken after step {}: {}: {:?}", self.after, self.reason, self.line)
    }
}

/// Verifies a guest's console from its first boot on. A last line without its newline is still being printed and not
/// looked at; lines without the word `chain` are the kernel's.
///
/// # Errors
///
/// The first link that is missing, doubled, garbled or wrong, or whose clock ran backwards.
pub fn verify(console: &[u8], mebibytes: usize) -> Result<Verified, Broken> {
    let text = String::from_utf8_lossy(console);
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut chain = Chain::new(mebibytes);
    let mut found = Verified { steps: 0, greatest_pause_ms: 0 };
    let mut clock = None;
    // The kernel echoes its command line, which says perdure.chain.
    for line in complete.lines().filter(|line| line.contains("chain ") && !line.contains("perdure.chain")) {
        let broken = |reason| Broken { line: line.to_owned(), after: found.steps, reason };
        let (step, hash, ms) = parse(line).ok_or_else(|| broken("not a link"))?;
        let expected = chain.advance();
        if step != expected.0 {
            return Err(broken("a step is missing or doubled"));
        }
        if hash != expected.1 {
            return Err(broken("the hash is not the one that follows"));
        }
        if let Some(before) = clock {
            let pause = ms.checked_sub(before).ok_or_else(|| broken("the clock ran backwards"))?;
            found.greatest_pause_ms = found.greatest_pause_ms.max(pause);
        }
        clock = Some(ms);
        found.steps = step;
    }
    Ok(found)
}

/// The number of the last complete link in a console, unverified: for waiting until a guest got somewhere.
pub fn last_step(console: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(console);
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().rev().find_map(parse).map_or(0, |(step, ..)| step)
}

/// The number, the hash and the milliseconds of a link; of any other line, none.
pub(super) fn parse(line: &str) -> Option<(u64, &str, u64)> {
    let mut words = line.trim_end().split(' ');
    let link = match (words.next()?, words.next()?, words.next()?, words.next()?) {
        ("chain", step, hash, ms) => (step.parse().ok()?, hash, ms.parse().ok()?),
        _ => return None,
    };
    words.next().is_none().then_some(link)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn console(steps: u64) -> Vec<u8> {
        let mut chain = Chain::new(1);
        let mut text = String::from("[    0.1] Command line: perdure.chain \r\n");
        for at in 0..steps {
            let (step, hash) = chain.advance();
            text += &format!("chain {step} {hash} {}\r\n", at * 50);
        }
        text.into_bytes()
    }

    #[test]
    fn an_unbroken_chain_verifies_and_a_torn_last_line_is_left_alone() {
        let mut log = console(20);
        assert_eq!(verify(&log, 1), Ok(Verified { steps: 20, greatest_pause_ms: 50 }));
        log.extend_from_slice(b"chain 21 00");
        assert_eq!(verify(&log, 1).map(|found| found.steps), Ok(20));
        assert_eq!(last_step(&log), 20);
    }

    #[test]
    fn one_altered_bit_of_state_shows_within_one_walk_of_the_window() {
        let mut altered = Chain::new(1);
        let mut good = altered.clone();
        altered.state[123_456] ^= 1;
        let walk = altered.state.len() / PAGE / WINDOW as usize;
        // A page may be rewritten before the window comes by, and the alteration with it; this one is not.
        let differs = (0..walk).any(|_| altered.advance() != good.advance());
        assert!(differs);
    }

    #[test]
    fn a_clock_that_runs_backwards_is_a_break() {
        let log = String::from_utf8(console(3)).unwrap().replace(" 100\r\n", " 49\r\n");
        assert_eq!(verify(log.as_bytes(), 1).unwrap_err().reason, "the clock ran backwards");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any one line lost or doubled, or any one byte of a link changed, is seen.
        #[test]
        fn any_damage_to_the_log_is_seen(line in 1usize..12, kind in 0u8..3, byte in 0usize..70) {
            let log = String::from_utf8(console(12)).unwrap();
            let mut lines: Vec<String> = log.lines().map(str::to_owned).collect();
            match kind {
                0 => drop(lines.remove(line)),
                1 => lines.insert(line, lines[line].clone()),
                _ => {
                    let mut bytes = lines[line].clone().into_bytes();
                    bytes[byte] = if bytes[byte] == b'~' { b'!' } else { b'~' };
                    lines[line] = String::from_utf8(bytes).unwrap();
                }
            }
            let damaged = lines.join("\n") + "\n";
            let seen = verify(damaged.as_bytes(), 1);
            prop_assert!(seen.map_or(true, |found| found.steps < 12));
        }
    }
}
