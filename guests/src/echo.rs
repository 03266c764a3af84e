//! What `echo` prints, and its judge.
//!
//! # Output
//! ```text
//! echo
//! ready                                     from here on input is taken
//! line <n> <hash> <text>                    for each line of input, n from 1
//! bye <lines> <bytes> <hash>                after the line `quit`; then the machine powers off
//! ```
//! A line of input ends with CR or LF, or after [`MAX_LINE`] bytes; empty lines give nothing. The hash is
//! [`crate::chain::fold`] over every byte of every line and an LF (10) behind each, beginning with the seed of the chain.

use crate::banner::{Banner, BannerError};
use crate::chain::fold;
use crate::transcript::{Difference, Transcript};

const SEED: u64 = 0x0070_6572_6475_7265;

/// Bytes after which a line of input ends in any case.
pub const MAX_LINE: usize = 240;

/// An output that answers its input without fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EchoReport {
    /// Lines that came back in full.
    pub lines: usize,
    /// The output ends within a line.
    pub partial: bool,
    /// All input came back, and the guest has nothing left to say.
    pub complete: bool,
}

/// The first fault of an output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EchoError {
    /// The first line cannot be used.
    #[error(transparent)]
    Banner(#[from] BannerError),
    /// Bytes of input or output were lost, doubled or altered.
    #[error("verifying the echo: {expected:?} was due, {found:?} was printed")]
    Different {
        /// The line due; empty where nothing more was.
        expected: String,
        /// The line found.
        found: String,
    },
    /// Lines are compared as text.
    #[error("verifying the echo: the input is not plain ASCII; send ASCII to a guest that is to be verified")]
    NotAscii,
}

/// Compares every byte of `output`, which may end anywhere, with what `input` must have given.
///
/// # Errors
/// The first line that differs, or an input that is not ASCII.
pub fn verify(input: &str, output: &str) -> Result<EchoReport, EchoError> {
    if !input.is_ascii() {
        return Err(EchoError::NotAscii);
    }
    Banner::parse("echo", output)?;
    let answers = answers(input);
    let due = ["echo".to_owned(), "ready".to_owned()].into_iter().chain(answers.iter().cloned());
    let extent = Transcript::new(due)
        .compare(&[output])
        .map_err(|Difference { expected, found }| EchoError::Different { expected, found })?;
    let printed = answers.iter().take(extent.lines.saturating_sub(2));
    let lines = printed.filter(|answer| answer.starts_with("line ")).count();
    Ok(EchoReport { lines, partial: extent.partial, complete: extent.complete })
}

/// The lines that `input` gives, from the first `line` to `bye`.
fn answers(input: &str) -> Vec<String> {
    let (mut answers, mut hash, mut bytes) = (Vec::new(), SEED, 0);
    // What follows the last line end is a line only where it is long enough.
    let (whole, rest) = input.split_at(input.rfind(['\r', '\n']).map_or(0, |end| end + 1));
    let full = pieces(rest).filter(|piece| piece.len() == MAX_LINE);
    for text in whole.split(['\r', '\n']).flat_map(pieces).chain(full) {
        hash = fold(text.bytes().fold(hash, |hash, byte| fold(hash, u64::from(byte))), 10);
        bytes += text.len();
        let count = answers.len() + 1;
        answers.push(format!("line {count} {hash:016x} {text}"));
        if text == "quit" {
            answers.push(format!("bye {count} {bytes} {hash:016x}"));
            break;
        }
    }
    answers
}

/// `line` in pieces of at most [`MAX_LINE`] bytes; none where it is empty.
fn pieces(line: &str) -> impl Iterator<Item = &str> {
    (0..line.len()).step_by(MAX_LINE).map(|start| &line[start..line.len().min(start + MAX_LINE)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INPUT: &str = include_str!("../tests/golden/echo-input.txt");
    /// Captured on KVM.
    const OUTPUT: &str = include_str!("../tests/golden/echo-output.txt");

    #[test]
    fn a_real_run_verifies_to_its_end() {
        let report = verify(INPUT, OUTPUT).unwrap();
        assert_eq!(report, EchoReport { lines: 6, partial: false, complete: true });
    }

    #[test]
    fn a_lost_byte_of_input_is_found() {
        let error = verify(&INPUT.replace("fox", "fx"), OUTPUT).unwrap_err();
        assert!(matches!(&error, EchoError::Different { found, .. } if found.ends_with("brown fox")), "{error}");
    }

    #[test]
    fn input_without_a_line_end_gives_nothing_yet() {
        assert_eq!(answers("abc"), Vec::<String>::new());
        assert_eq!(answers("abc\r\n\nde").len(), 1);
        assert_eq!(answers(&"x".repeat(MAX_LINE + 1)).len(), 1);
    }

    #[test]
    fn input_that_is_not_ascii_is_refused() {
        assert_eq!(verify("\u{e9}\n", OUTPUT), Err(EchoError::NotAscii));
    }

    proptest! {
        #[test]
        fn any_altered_byte_is_found(at in 0..OUTPUT.len(), flip in 0_u8..7) {
            let mut bytes = OUTPUT.as_bytes().to_vec();
            bytes[at] ^= 1 << flip;
            prop_assert!(verify(INPUT, &String::from_utf8(bytes).unwrap()).is_err());
        }
    }
}
