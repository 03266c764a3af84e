//! The first line of a guest: its name, then each parameter in force as ` key=value`.

/// What is wrong with a first line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BannerError {
    /// The output is empty or its first line is not complete.
    #[error("reading the output of guest {guest}: no complete first line; let the guest run longer")]
    Missing {
        /// Whose output was expected.
        guest: &'static str,
    },
    /// The first line is another one.
    #[error("reading the output of guest {guest}: the first line is {line:?}; give the output from its start")]
    Foreign {
        /// Whose output was expected.
        guest: &'static str,
        /// The line.
        line: String,
    },
    /// A parameter has no value that the guest could have printed.
    #[error("reading the first line of guest {guest}: {key}={value:?} is missing, malformed or beyond {limit}")]
    Parameter {
        /// Whose output was expected.
        guest: &'static str,
        /// The parameter.
        key: &'static str,
        /// What stands there.
        value: String,
        /// The greatest value that is verified.
        limit: u64,
    },
}

/// A first line, taken apart.
pub(crate) struct Banner<'a> {
    guest: &'static str,
    /// The line without its line feed.
    pub(crate) line: &'a str,
}

impl<'a> Banner<'a> {
    /// Finds the first line of `guest` in `output`.
    pub(crate) fn parse(guest: &'static str, output: &'a str) -> Result<Self, BannerError> {
        let (line, _) = output.split_once('\n').ok_or(BannerError::Missing { guest })?;
        if line.split(' ').next() != Some(guest) {
            let line = line.chars().take(80).collect();
            return Err(BannerError::Foreign { guest, line });
        }
        Ok(Self { guest, line })
    }

    /// The word of parameter `key`.
    pub(crate) fn word(&self, key: &'static str) -> &'a str {
        let value = |word: &'a str| word.strip_prefix(key)?.strip_prefix('=');
        self.line.split(' ').find_map(value).unwrap_or_default()
    }

    /// The number of parameter `key`, at most `limit`.
    pub(crate) fn number(&self, key: &'static str, limit: u64) -> Result<u64, BannerError> {
        let word = self.word(key);
        match word.parse::<u64>() {
            Ok(number) if number <= limit && number.to_string() == word => Ok(number),
            _ => {
                let value = word.chars().take(40).collect();
                Err(BannerError::Parameter { guest: self.guest, key, value, limit })
            }
        }
    }
}
