//! Bytes in a saved state: one base64 string (RFC 4648 §4, padded) rather than an array of numbers.
//!
//! For `#[serde(with = "devices::base64_bytes")]` on a `Vec<u8>`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serializer, de};

/// Writes `bytes` as a string.
///
/// # Errors
///
/// Those of `serializer`.
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

/// Reads a string back into bytes.
///
/// # Errors
///
/// Those of `deserializer`, and text that is not base64.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(de::Error::custom)
}
