//! How a program of the host says which port of the guest it wants: `CONNECT 52\n`, as with Firecracker.

/// The longest line that makes sense: `CONNECT 4294967295`, and some blanks.
const LINE_MAX: usize = 32;

/// What came so far.
#[derive(Default)]
pub(super) struct Handshake {
    line: Vec<u8>,
}

/// Where that leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// To the next byte.
    More,
    /// To this port of the guest.
    Port(u32),
    /// Nowhere.
    Nonsense,
}

impl Handshake {
    /// Takes the next byte. What comes behind the line is the connection's, so no more may be read.
    pub(super) fn push(&mut self, byte: u8) -> Step {
        if byte == b'\n' {
            return self.port().map_or(Step::Nonsense, Step::Port);
        }
        self.line.push(byte);
        if self.line.len() > LINE_MAX { Step::Nonsense } else { Step::More }
    }

    fn port(&self) -> Option<u32> {
        let line = std::str::from_utf8(&self.line).ok()?;
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(verb), Some(port), None) if verb.eq_ignore_ascii_case("connect") => port.parse().ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(text: &str) -> Step {
        let mut handshake = Handshake::default();
        let mut steps = text.bytes().map(|byte| handshake.push(byte));
        steps.find(|step| *step != Step::More).unwrap_or(Step::More)
    }

    #[test]
    fn a_line_names_a_port() {
        assert_eq!(say("CONNECT 52\n"), Step::Port(52));
        assert_eq!(say("connect  4294967295 \r\n"), Step::Port(u32::MAX));
        assert_eq!(say("CONNECT 52"), Step::More);
    }

    #[test]
    fn anything_else_leads_nowhere() {
        for text in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "GET / HTTP/1.1\n",
            "\u{fffd}\n",
        ] {
            assert_eq!(say(text), Step::Nonsense, "{text:?}");
        }
        assert_eq!(say(&"x".repeat(33)), Step::Nonsense);
    }
}
