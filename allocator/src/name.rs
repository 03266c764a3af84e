//! Names of regions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most bytes a whole name may have.
pub const MAX_NAME: usize = 255;
/// The most bytes one component may have.
pub const MAX_COMPONENT: usize = 64;

/// A hierarchical name such as `web/ram`.
///
/// Components are separated by `/`; each is `[A-Za-z0-9][A-Za-z0-9._-]*`, at most [`MAX_COMPONENT`] bytes; the whole at
/// most [`MAX_NAME`]. No name is a path of the host: it never reaches the file system.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RegionName(String);

/// Why a name is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("a region's name is empty: give one such as web/ram")]
    Empty,
    /// Longer than [`MAX_NAME`].
    #[error("a region's name has {length} bytes, {MAX_NAME} are allowed: shorten it")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// `/web`, `web/` or `web//ram`.
    #[error("region name {name:?} has an empty part: separate parts by single slashes, with none at either end")]
    EmptyPart {
        /// The name.
        name: String,
    },
    /// A part longer than [`MAX_COMPONENT`].
    #[error("in region name {name:?} the part {part:?} has {} bytes, {MAX_COMPONENT} are allowed: shorten it", part.len())]
    PartTooLong {
        /// The name.
        name: String,
        /// The part.
        part: String,
    },
    /// `.`, `..`, `-x` and the like.
    #[error(
        "in region name {name:?} the part {part:?} begins with {found:?}: begin it with a letter or digit (A-Z a-z 0-9)"
    )]
    BadStart {
        /// The name.
        name: String,
        /// The part.
        part: String,
        /// Its first character.
        found: char,
    },
    /// A space, a backslash, an umlaut.
    #[error("region name {name:?} has {found:?} in it: use A-Z a-z 0-9 . _ - and / between parts")]
    BadCharacter {
        /// The name.
        name: String,
        /// What is not allowed.
        found: char,
    },
}

impl RegionName {
    /// What messages call something that is no region of a pool. `text` is not looked at.
    pub(crate) fn internal(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its parts, from the root.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// `self` with `part` (one component or several) below it.
    ///
    /// # Errors
    /// As parsing the whole.
    pub fn join(&self, part: &str) -> Result<Self, NameError> {
        format!("{}/{part}", self.0).parse()
    }

    /// Whether this is `root` or lies below it.
    #[must_use]
    pub fn is_within(&self, root: &Self) -> bool {
        self.below(root).is_some()
    }

    /// What is left of this name below `root`: `""` for the root itself, `/ram` for `web/ram` below `web`.
    fn below(&self, root: &Self) -> Option<&str> {
        let rest = self.0.strip_prefix(root.as_str())?;
        (rest.is_empty() || rest.starts_with('/')).then_some(rest)
    }

    /// This name with `from` at its beginning replaced by `to`; `None` if it is not within `from`.
    ///
    /// # Errors
    /// As parsing, when the result is too long.
    pub fn moved(&self, from: &Self, to: &Self) -> Option<Result<Self, NameError>> {
        let rest = self.below(from)?;
        Some(format!("{to}{rest}").parse())
    }
}

impl FromStr for RegionName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > MAX_NAME {
            return Err(NameError::TooLong { length: text.len() });
        }
        let name = || text.to_owned();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        for part in text.split('/') {
            let Some(first) = part.chars().next() else {
                return Err(NameError::EmptyPart { name: name() });
            };
            if let Some(found) = part.chars().find(|&c| !allowed(c)) {
                return Err(NameError::BadCharacter { name: name(), found });
            }
            let part = || part.to_owned();
            if !first.is_ascii_alphanumeric() {
                return Err(NameError::BadStart { name: name(), part: part(), found: first });
            }
            if part().len() > MAX_COMPONENT {
                return Err(NameError::PartTooLong { name: name(), part: part() });
            }
        }
        Ok(Self(name()))
    }
}

impl TryFrom<String> for RegionName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<RegionName> for String {
    fn from(name: RegionName) -> Self {
        name.0
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> RegionName {
        text.parse().unwrap()
    }

    #[test]
    fn ordinary_names_are_taken() {
        for text in ["web", "web/ram", "a.b-c_d/0/x", "9", &"x/".repeat(127), &"y".repeat(64)] {
            let text = text.trim_end_matches('/');
            assert_eq!(name(text).to_string(), text);
        }
    }

    #[test]
    fn path_tricks_and_bad_names_are_refused_with_the_reason() {
        let cases = [
            ("", "empty"),
            ("/", "empty part"),
            ("/web", "empty part"),
            ("web/", "empty part"),
            ("web//ram", "empty part"),
            (".", "begins with '.'"),
            ("..", "begins with '.'"),
            ("web/../x", "begins with '.'"),
            ("-x", "begins with '-'"),
            ("_x", "begins with '_'"),
            ("a b", "has ' ' in it"),
            ("a\\b", "in it"),
            ("a\0b", "in it"),
            ("weiß", "has 'ß' in it"),
            ("web/ram\n", "in it"),
            (&"y".repeat(65), "64 are allowed"),
            (&"y/".repeat(200), "255 are allowed"),
        ];
        for (text, reason) in cases {
            let error = text.parse::<RegionName>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_subtree_goes_by_parts_and_not_by_letters() {
        assert!(name("web/ram").is_within(&name("web")));
        assert!(name("web").is_within(&name("web")));
        assert!(!name("website/ram").is_within(&name("web")));
        assert!(!name("web").is_within(&name("web/ram")));
        let moved = name("web/ram").moved(&name("web"), &name("app/one"));
        assert_eq!(moved, Some(Ok(name("app/one/ram"))));
        assert_eq!(name("website").moved(&name("web"), &name("app")), None);
        assert_eq!(name("web").join("ram/x").unwrap(), name("web/ram/x"));
        assert!(name("web").join("../x").is_err());
        let long = name(&vec!["y".repeat(60); 4].join("/"));
        assert!(name("web/ram-00000000").moved(&name("web"), &long).unwrap().is_err());
    }

    #[test]
    fn serde_validates() {
        assert_eq!(serde_json::from_str::<RegionName>("\"web/ram\"").unwrap(), name("web/ram"));
        assert!(serde_json::from_str::<RegionName>("\"../ram\"").is_err());
        assert_eq!(serde_json::to_string(&name("a/b")).unwrap(), "\"a/b\"");
    }

    proptest! {
        #[test]
        fn what_parses_is_harmless(text in "[a-zA-Z0-9./_\\- \\\\]{0,40}") {
            if let Ok(name) = text.parse::<RegionName>() {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert!(name.components().all(|p| !p.is_empty() && !p.starts_with('.')));
            }
        }
    }
}
