//! A generation as one stream, verified end to end.
//!
//! Chunks with a CRC each; at the end the BLAKE3 hash of everything before. Zero pages are left out.

use std::io::{self, Read, Write};

use crate::error::StoreError;
use crate::frame::{Append, Fields, Malformed};
use crate::generation::{
    BLOB_MAX, BLOBS_MAX, Generation, GenerationId, KIND_MAX, LABEL_MAX, NAME_MAX, NewGeneration, Origin, PAGE_SIZE,
    Page, Parent, REGION_MAX, REGIONS_MAX, RegionSpec,
};
use crate::reader::Reader;
use crate::store::Store;
use crate::writer::{RegionKey, Writer};

const MAGIC: u64 = u64::from_le_bytes(*b"PERDUEXP");
const VERSION: u32 = 1;
/// Longest body of a chunk.
const CHUNK_MAX: usize = 1 << 20;
/// Pages in a chunk.
const RUN_MAX: usize = 128;
const META: u32 = 1;
const BLOB: u32 = 2;
const PAGES: u32 = 3;
const END: u32 = 4;

/// Why an export or an import did not happen.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The stream could not be written.
    #[error("cannot write the export: see the cause, make room, and export again")]
    Write(#[source] io::Error),
    /// The stream could not be read.
    #[error("cannot read the export: see the cause; if it ends too early, it was not written whole")]
    Read(#[source] io::Error),
    /// The stream is not an export, or was changed on the way.
    #[error(
        "the export is damaged at chunk {chunk}: {why}; nothing was imported; copy it again from where it was made"
    )]
    Malformed {
        /// Counted from 0.
        chunk: u64,
        /// What is wrong.
        why: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Writes a generation as one stream. Every page is verified before it goes out. Returns how many bytes were written.
    ///
    /// # Errors
    /// [`TransferError::Write`]; [`TransferError::Store`] if the generation is not there or damaged.
    pub fn export(&self, id: &GenerationId, to: &mut dyn Write) -> Result<u64, TransferError> {
        let reader = self.reader(id)?;
        let mut out = Out { to, hash: blake3::Hasher::new(), written: 0 };
        out.chunk(META, &encode_meta(&reader))?;
        for (index, blob) in reader.blobs().iter().enumerate() {
            let bytes = reader.blob(&blob.name)?.unwrap_or_default();
            for piece in bytes.chunks(CHUNK_MAX - 2) {
                let mut body = Vec::with_capacity(piece.len() + 2);
                body.u16(index as u16);
                body.extend_from_slice(piece);
                out.chunk(BLOB, &body)?;
            }
        }
        let mut pages = 0;
        for region in 0..reader.regions().len() {
            pages += export_region(&reader, region, &mut out)?;
        }
        let mut body = Vec::new();
        body.u64(pages);
        body.extend_from_slice(out.hash.finalize().as_bytes());
        out.chunk(END, &body)?;
        out.to.flush().map_err(TransferError::Write)?;
        Ok(out.written)
    }

    /// Reads a stream that [`Store::export`] wrote, as a new generation of `lineage`. Nothing is committed before the whole stream
    /// has verified; pages that the store has already are not stored again.
    ///
    /// # Errors
    /// [`TransferError::Read`], [`TransferError::Malformed`], [`TransferError::Store`]: nothing was imported.
    pub fn import(&self, lineage: &str, from: &mut dyn Read) -> Result<Generation, TransferError> {
        Export::open(from)?.import(self, lineage)
    }
}

/// A stream that [`Store::export`] wrote, of which no more was read than what it says of itself.
pub struct Export<'a> {
    input: In<'a>,
    meta: Meta,
}

impl std::fmt::Debug for Export<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("id", &self.meta.id).finish_non_exhaustive()
    }
}

impl<'a> Export<'a> {
    /// Reads the beginning.
    ///
    /// # Errors
    /// [`TransferError::Read`], [`TransferError::Malformed`].
    pub fn open(from: &'a mut dyn Read) -> Result<Self, TransferError> {
        let mut input = In { from, hash: blake3::Hasher::new(), chunk: 0 };
        let (kind, body) = input.chunk()?;
        if kind != META {
            return Err(input.malformed(Malformed("it does not begin as an export does")));
        }
        let meta = decode_meta(&body).map_err(|why| input.malformed(why))?;
        Ok(Self { input, meta })
    }

    /// The generation that was exported. Its name is as the stream has it, and names nothing here.
    #[must_use]
    pub fn id(&self) -> &GenerationId {
        &self.meta.id
    }

    /// Reads the rest, as a new generation of `lineage`. See [`Store::import`].
    ///
    /// # Errors
    /// As [`Store::import`].
    pub fn import(self, store: &Store, lineage: &str) -> Result<Generation, TransferError> {
        let Self { mut input, meta } = self;
        let mut writer = store.begin(NewGeneration { lineage: lineage.to_owned(), ..meta.new })?;
        let regions = meta.regions.iter().map(|spec| writer.region(spec)).collect::<Result<Vec<_>, _>>()?;
        let mut blobs: Vec<(String, u64, Vec<u8>)> =
            meta.blobs.into_iter().map(|(name, length)| (name, length, Vec::new())).collect();
        let mut pages = 0;
        loop {
            let before = input.hash.finalize();
            let (kind, body) = input.chunk()?;
            match kind {
                BLOB => take_blob(&body, &mut blobs).map_err(|why| input.malformed(why))?,
                PAGES => pages += take_pages(&body, &regions, &mut writer, &input)?,
                END => {
                    check_end(&body, pages, &before).map_err(|why| input.malformed(why))?;
                    break;
                }
                _ => return Err(input.malformed(Malformed("its kind is unknown"))),
            }
        }
        for (name, length, bytes) in blobs {
            if bytes.len() as u64 != length {
                return Err(input.malformed(Malformed("a blob is not as long as it should be")));
            }
            writer.blob(&name, &bytes)?;
        }
        Ok(writer.commit()?)
    }
}

fn export_region(reader: &Reader, region: usize, out: &mut Out<'_>) -> Result<u64, TransferError> {
    let mut pages = 0;
    let mut page: Page = [0; PAGE_SIZE];
    for range in reader.present(region)? {
        for first in range.clone().step_by(RUN_MAX) {
            let count = (range.end - first).min(RUN_MAX as u64);
            let mut body = Vec::with_capacity(14 + count as usize * PAGE_SIZE);
            body.u16(region as u16);
            body.u64(first);
            body.u32(count as u32);
            for number in first..first + count {
                reader.read_page(region, number, &mut page)?;
                body.extend_from_slice(&page);
            }
            out.chunk(PAGES, &body)?;
            pages += count;
        }
    }
    Ok(pages)
}

fn take_blob(body: &[u8], blobs: &mut [(String, u64, Vec<u8>)]) -> Result<(), Malformed> {
    let mut fields = Fields::new(body);
    let index = usize::from(fields.u16()?);
    let (_, length, bytes) = blobs.get_mut(index).ok_or(Malformed("it belongs to a blob that is not announced"))?;
    bytes.extend_from_slice(fields.bytes(fields.left())?);
    if bytes.len() as u64 > *length { Err(Malformed("a blob is longer than announced")) } else { Ok(()) }
}

fn take_pages(body: &[u8], regions: &[RegionKey], writer: &mut Writer, input: &In<'_>) -> Result<u64, TransferError> {
    let mut fields = Fields::new(body);
    let mut parse = || {
        let (region, first, count) = (fields.u16()?, fields.u64()?, fields.u32()?);
        let bytes = fields.bytes(fields.left())?;
        if bytes.len() != (count as usize).saturating_mul(PAGE_SIZE) {
            return Err(Malformed("its pages are not as many as it says"));
        }
        let region = regions.get(usize::from(region)).ok_or(Malformed("its region is not announced"))?;
        Ok((*region, first, bytes))
    };
    let (region, first, bytes) = parse().map_err(|why| input.malformed(why))?;
    writer.put_run(region, first, bytes)?;
    Ok((bytes.len() / PAGE_SIZE) as u64)
}

fn check_end(body: &[u8], pages: u64, hash: &blake3::Hash) -> Result<(), Malformed> {
    let mut fields = Fields::new(body);
    let (announced, expected) = (fields.u64()?, fields.array::<32>()?);
    fields.end()?;
    if announced != pages {
        return Err(Malformed("pages are missing"));
    }
    if expected != *hash.as_bytes() {
        return Err(Malformed("its hash is not that of what came before"));
    }
    Ok(())
}

struct Meta {
    id: GenerationId,
    new: NewGeneration,
    regions: Vec<RegionSpec>,
    blobs: Vec<(String, u64)>,
}

fn encode_meta(reader: &Reader) -> Vec<u8> {
    let info = reader.generation();
    let mut out = Vec::new();
    out.u64(MAGIC);
    out.u32(VERSION);
    out.text(&info.id.lineage);
    out.u64(info.id.number);
    out.u64(info.time_ms);
    out.text(info.label.as_deref().unwrap_or(""));
    out.u16(reader.regions().len() as u16);
    for region in reader.regions() {
        out.text(&region.name);
        out.text(&region.kind);
        out.u64(region.size);
    }
    out.u16(reader.blobs().len() as u16);
    for blob in reader.blobs() {
        out.text(&blob.name);
        out.u64(blob.length);
    }
    out
}

fn decode_meta(body: &[u8]) -> Result<Meta, Malformed> {
    let mut fields = Fields::new(body);
    if fields.u64()? != MAGIC {
        return Err(Malformed("it does not begin as an export does"));
    }
    if fields.u32()? != VERSION {
        return Err(Malformed("its version is unknown"));
    }
    let (lineage, number, time_ms, label) =
        (fields.text(NAME_MAX)?, fields.u64()?, fields.u64()?, fields.text(LABEL_MAX)?);
    let count = usize::from(fields.u16()?);
    if count > REGIONS_MAX {
        return Err(Malformed("it has too many regions"));
    }
    let mut region = || {
        let spec = RegionSpec { name: fields.text(NAME_MAX)?, kind: fields.text(KIND_MAX)?, size: fields.u64()? };
        if spec.size > REGION_MAX { Err(Malformed("a region is too large")) } else { Ok(spec) }
    };
    let regions = (0..count).map(|_| region()).collect::<Result<_, _>>()?;
    let count = usize::from(fields.u16()?);
    if count > BLOBS_MAX {
        return Err(Malformed("it has too many blobs"));
    }
    let mut blob = || {
        let (name, length) = (fields.text(NAME_MAX)?, fields.u64()?);
        if length > BLOB_MAX { Err(Malformed("a blob is too long")) } else { Ok((name, length)) }
    };
    let blobs = (0..count).map(|_| blob()).collect::<Result<_, _>>()?;
    fields.end()?;
    let id = GenerationId::new(lineage.clone(), number);
    let new = NewGeneration {
        lineage,
        parent: Parent::None,
        time_ms,
        label: (!label.is_empty()).then_some(label),
        protected: false,
        origin: Origin::Manual,
    };
    Ok(Meta { id, new, regions, blobs })
}

struct Out<'a> {
    to: &'a mut dyn Write,
    hash: blake3::Hasher,
    written: u64,
}

impl Out<'_> {
    fn chunk(&mut self, kind: u32, body: &[u8]) -> Result<(), TransferError> {
        let mut head = Vec::with_capacity(12);
        head.u32(kind);
        head.u32(body.len() as u32);
        head.u32(checksum(kind, body));
        for bytes in [&head[..], body] {
            self.hash.update(bytes);
            self.to.write_all(bytes).map_err(TransferError::Write)?;
            self.written += bytes.len() as u64;
        }
        Ok(())
    }
}

pub(crate) fn checksum(kind: u32, body: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&kind.to_le_bytes());
    sum.update(body);
    sum.finalize()
}

struct In<'a> {
    from: &'a mut dyn Read,
    hash: blake3::Hasher,
    chunk: u64,
}

impl In<'_> {
    fn malformed(&self, why: Malformed) -> TransferError {
        TransferError::Malformed { chunk: self.chunk.saturating_sub(1), why: why.0.to_owned() }
    }

    fn chunk(&mut self) -> Result<(u32, Vec<u8>), TransferError> {
        let mut head = [0; 12];
        self.from.read_exact(&mut head).map_err(TransferError::Read)?;
        self.chunk += 1;
        let mut fields = Fields::new(&head);
        let parsed = (|| Ok((fields.u32()?, fields.u32()? as usize, fields.u32()?)))();
        let (kind, length, sum) = parsed.map_err(|why| self.malformed(why))?;
        if length > CHUNK_MAX {
            return Err(self.malformed(Malformed("it is too long")));
        }
        let mut body = vec![0; length];
        self.from.read_exact(&mut body).map_err(TransferError::Read)?;
        if checksum(kind, &body) != sum {
            return Err(self.malformed(Malformed("its CRC is wrong")));
        }
        self.hash.update(&head);
        self.hash.update(&body);
        Ok((kind, body))
    }
}
