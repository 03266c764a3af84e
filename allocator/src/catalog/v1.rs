//! A catalog of the first version: a frame, and JSON in it.

use super::{Catalog, CatalogDamage, CatalogError, MAGIC, MAX_LEN};
use crate::frame;
use std::path::Path;

/// `bytes` are all of the file.
pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Catalog, CatalogError> {
    let malformed = |reason: String| CatalogError::Malformed { path: path.to_owned(), reason };
    let frame = frame::decode(bytes, MAGIC, 1, MAX_LEN)
        .map_err(|source| CatalogError::Damaged { path: path.to_owned(), source: CatalogDamage::Frame(source) })?;
    if !frame.rest.is_empty() {
        return Err(malformed(format!("{} bytes follow it", frame.rest.len())));
    }
    let catalog: Catalog = serde_json::from_slice(frame.body).map_err(|error| malformed(error.to_string()))?;
    catalog.validate().map_err(malformed)?;
    Ok(catalog)
}
