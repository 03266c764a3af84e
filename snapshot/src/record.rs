//! The records of the ledger: one slot of 4 KiB each, so that none shares a disk block with another.

use crate::batch::is_zero;
use crate::frame::{Append, Fields, Malformed, crc};
use crate::generation::{Generation, GenerationId, LABEL_MAX, NAME_MAX, Origin};
use crate::hash::Hash;
use crate::node::NodeRef;

/// Bytes of a slot.
pub(crate) const SLOT: usize = 4096;
/// Bytes before a slot's body.
const HEADER: usize = 60;
/// Most bytes of a body.
pub(crate) const BODY_MAX: usize = SLOT - HEADER;
/// Most generations that one purge record names.
pub(crate) const PURGE_MAX: usize = 400;
/// Largest sequence number and count: so far below 2^64 that nothing that is added to it overflows.
const COUNT_MAX: u64 = 1 << 62;
/// Largest end of a pack: four times what [`crate::Options`] allows.
const END_MAX: u64 = 1 << 39;
const MAGIC: u64 = u64::from_le_bytes(*b"PERDURLG");
/// Of the ledger's format.
pub(crate) const VERSION: u16 = 1;

/// How far a pack was written when a generation was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PackEnd {
    /// 0: none yet.
    pub(crate) pack: u32,
    /// In bytes, a multiple of 4096.
    pub(crate) end: u64,
}

/// Where the next writer goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ends {
    pub(crate) data: PackEnd,
    pub(crate) archive: PackEnd,
}

/// A generation with what only the store needs to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Committed {
    pub(crate) info: Generation,
    pub(crate) manifest: NodeRef,
    pub(crate) ends: Ends,
}

/// What a slot says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// Slot 0: how often the ledger was rewritten, how many slots that made, how many records were lost before,
    /// and the bytes that purged generations had stored and no sweep has looked for yet.
    Header { epoch: u64, slots: u64, lost: u64, unswept: u64 },
    /// A generation was committed.
    Generation(Box<Committed>),
    /// Generations were deleted.
    Purge { lineage: String, numbers: Vec<u64> },
    /// A generation's label or protection was changed.
    Update { id: GenerationId, label: Option<String>, protected: bool },
    /// What must outlive the records that a rewrite drops: the next number of a lineage.
    Floor { lineage: String, next: u64 },
    /// The same for the packs.
    Resume(Ends),
}

/// A record with its place in the order of all records, over rewrites too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) store: [u8; 16],
    pub(crate) sequence: u64,
    pub(crate) record: Record,
}

impl Slot {
    /// The 4096 bytes of the slot. All texts were checked to be short enough to fit.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (kind, body) = encode_body(&self.record);
        seal(self.store, self.sequence, kind, &body)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(bytes);
        if bytes.len() != SLOT || fields.u64()? != MAGIC {
            return Err(Malformed("it does not begin as a slot does"));
        }
        let (version, kind, length) = (fields.u16()?, fields.u16()?, fields.u32()? as usize);
        if version != VERSION {
            return Err(Malformed("its version is unknown"));
        }
        let (sequence, store) = (fields.u64()?, fields.array()?);
        let (sum, hash) = (fields.u32()?, Hash(fields.array()?));
        if length > BODY_MAX || sequence > COUNT_MAX {
            return Err(Malformed("its length or number is impossible"));
        }
        let mut plain = bytes[..HEADER + length].to_vec();
        plain[40..60].fill(0);
        if crc(&plain) != sum || Hash::of(&plain) != hash || !is_zero(&bytes[HEADER + length..]) {
            return Err(Malformed("its checksum is wrong"));
        }
        let mut body = Fields::new(&plain[HEADER..]);
        let record = decode_body(kind, sequence, &mut body)?;
        body.end()?;
        Ok(Self { store, sequence, record })
    }
}

/// Makes `body` a slot. It must not be longer than [`BODY_MAX`].
pub(crate) fn seal(store: [u8; 16], sequence: u64, kind: u16, body: &[u8]) -> Vec<u8> {
    debug_assert!(body.len() <= BODY_MAX);
    let mut out = Vec::with_capacity(SLOT);
    out.u64(MAGIC);
    out.u16(VERSION);
    out.u16(kind);
    out.u32(body.len() as u32);
    out.u64(sequence);
    out.extend_from_slice(&store);
    out.resize(HEADER, 0);
    out.extend_from_slice(body);
    let sum = crc(&out);
    let hash = Hash::of(&out);
    out[40..44].copy_from_slice(&sum.to_le_bytes());
    out[44..60].copy_from_slice(&hash.0);
    out.resize(SLOT, 0);
    out
}

/// The version of a slot that begins as one of ours does and is of another version.
pub(crate) fn foreign_version(bytes: &[u8]) -> Option<u16> {
    let mut fields = Fields::new(bytes);
    let (magic, version) = (fields.u64().ok()?, fields.u16().ok()?);
    (magic == MAGIC && version != VERSION).then_some(version)
}

fn encode_body(record: &Record) -> (u16, Vec<u8>) {
    let mut out = Vec::new();
    let kind = match record {
        Record::Header { epoch, slots, lost, unswept } => {
            [epoch, slots, lost, unswept].into_iter().for_each(|number| out.u64(*number));
            1
        }
        Record::Generation(committed) => {
            encode_generation(committed, &mut out);
            2
        }
        Record::Purge { lineage, numbers } => {
            debug_assert!(numbers.len() <= PURGE_MAX);
            out.text(lineage);
            out.u16(numbers.len() as u16);
            numbers.iter().for_each(|number| out.u64(*number));
            3
        }
        Record::Update { id, label, protected } => {
            encode_id(id, &mut out);
            out.text(label.as_deref().unwrap_or(""));
            out.u8(u8::from(*protected));
            4
        }
        Record::Floor { lineage, next } => {
            out.text(lineage);
            out.u64(*next);
            5
        }
        Record::Resume(ends) => {
            encode_ends(ends, &mut out);
            6
        }
    };
    (kind, out)
}

fn decode_body(kind: u16, sequence: u64, body: &mut Fields<'_>) -> Result<Record, Malformed> {
    Ok(match kind {
        1 => {
            let mut count = || body.u64().and_then(within(COUNT_MAX));
            Record::Header { epoch: count()?, slots: count()?, lost: count()?, unswept: body.u64()? }
        }
        2 => Record::Generation(Box::new(decode_generation(sequence, body)?)),
        3 => {
            let lineage = body.text(NAME_MAX)?;
            let count = usize::from(body.u16()?);
            if count > PURGE_MAX {
                return Err(Malformed("it purges too many generations"));
            }
            Record::Purge { lineage, numbers: (0..count).map(|_| body.u64()).collect::<Result<_, _>>()? }
        }
        4 => Record::Update { id: decode_id(body)?, label: decode_label(body)?, protected: decode_flag(body)? },
        5 => Record::Floor { lineage: body.text(NAME_MAX)?, next: body.u64()? },
        6 => Record::Resume(decode_ends(body)?),
        _ => return Err(Malformed("its kind is unknown")),
    })
}

/// Refuses numbers above `most`.
fn within(most: u64) -> impl Fn(u64) -> Result<u64, Malformed> {
    move |number| if number <= most { Ok(number) } else { Err(Malformed("a number in it is impossible")) }
}

fn encode_generation(committed: &Committed, out: &mut Vec<u8>) {
    // Destructured, so that a field that is forgotten here does not compile. The sequence is the slot's own.
    let Committed { info, manifest, ends } = committed;
    let Generation {
        id,
        parent,
        time_ms,
        label,
        protected,
        origin,
        sequence: _,
        depth,
        logical_bytes,
        pages_stored,
        page_bytes_stored,
        archive_bytes_stored,
    } = info;
    encode_id(id, out);
    out.u8(u8::from(parent.is_some()));
    parent.iter().for_each(|parent| encode_id(parent, out));
    out.u64(*time_ms);
    out.text(label.as_deref().unwrap_or(""));
    out.u8(u8::from(*protected));
    out.u8(u8::from(*origin == Origin::Manual));
    out.u32(*depth);
    for number in [logical_bytes, pages_stored, page_bytes_stored, archive_bytes_stored] {
        out.u64(*number);
    }
    manifest.encode(out);
    encode_ends(ends, out);
}

fn decode_generation(sequence: u64, body: &mut Fields<'_>) -> Result<Committed, Malformed> {
    let id = decode_id(body)?;
    let parent = if decode_flag(body)? { Some(decode_id(body)?) } else { None };
    let (time_ms, label, protected) = (body.u64()?, decode_label(body)?, decode_flag(body)?);
    let origin = if decode_flag(body)? { Origin::Manual } else { Origin::Automatic };
    let depth = body.u32()?;
    let (logical_bytes, pages_stored) = (body.u64()?, body.u64()?);
    let (page_bytes_stored, archive_bytes_stored) = (body.u64()?, body.u64()?);
    let info = Generation {
        id,
        parent,
        time_ms,
        label,
        protected,
        origin,
        sequence,
        depth,
        logical_bytes,
        pages_stored,
        page_bytes_stored,
        archive_bytes_stored,
    };
    Ok(Committed { info, manifest: NodeRef::decode(body)?, ends: decode_ends(body)? })
}

fn encode_id(id: &GenerationId, out: &mut Vec<u8>) {
    out.text(&id.lineage);
    out.u64(id.number);
}

fn decode_id(body: &mut Fields<'_>) -> Result<GenerationId, Malformed> {
    Ok(GenerationId { lineage: body.text(NAME_MAX)?, number: body.u64()? })
}

fn decode_label(body: &mut Fields<'_>) -> Result<Option<String>, Malformed> {
    let text = body.text(LABEL_MAX)?;
    Ok((!text.is_empty()).then_some(text))
}

fn decode_flag(body: &mut Fields<'_>) -> Result<bool, Malformed> {
    match body.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed("a flag in it is neither 0 nor 1")),
    }
}

fn encode_ends(ends: &Ends, out: &mut Vec<u8>) {
    for end in [ends.data, ends.archive] {
        out.u32(end.pack);
        out.u64(end.end);
    }
}

fn decode_ends(body: &mut Fields<'_>) -> Result<Ends, Malformed> {
    let mut end = || Ok(PackEnd { pack: body.u32()?, end: body.u64().and_then(within(END_MAX))? });
    Ok(Ends { data: end()?, archive: end()? })
}

#[cfg(test)]
mod tests;
