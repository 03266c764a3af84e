//! The nodes of the archive: leaves, inner nodes, manifests and pieces of blobs, as they lie in archive packs.
//!
//! Every node stands in a frame with magic, kind, version, length and CRC; whoever refers to it knows its hash, so that a
//! node that is whole but is not the one that was meant (a lost write, a file put back from elsewhere) is found out too.

use crate::codec::Codec;
use crate::frame::{Append, Fields, Malformed};
use crate::generation::{BLOB_MAX, BLOBS_MAX, KIND_MAX, NAME_MAX, PAGE_SIZE, REGION_MAX, REGIONS_MAX};
use crate::hash::Hash;
use crate::place::Place;

/// Children of an inner node, and pages under a leaf.
pub(crate) const FANOUT: usize = 32;
/// log2 of [`FANOUT`].
pub(crate) const FANOUT_BITS: u32 = 5;
/// Levels above the leaves that 2^40 pages need.
pub(crate) const LEVEL_MAX: u8 = 7;
/// Bytes before a node's body.
pub(crate) const NODE_HEADER: usize = 16;
/// Longest node, header included.
pub(crate) const NODE_MAX: usize = 1 << 18;
/// Content of one piece of a blob.
pub(crate) const BLOB_PIECE: usize = NODE_MAX - NODE_HEADER;
/// Nodes start at multiples of this in an archive pack.
pub(crate) const NODE_UNIT: u64 = 64;
/// Pages start at multiples of this in a data pack.
pub(crate) const PAGE_UNIT: u64 = 128;

const MAGIC: u32 = u32::from_le_bytes(*b"PDNO");
const VERSION: u8 = 1;
const LEAF: u8 = 1;
const INNER: u8 = 2;
const MANIFEST: u8 = 3;
const BLOB: u8 = 4;

/// Where a node lies (in both mirrors of an archive pack), and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NodeRef {
    pub(crate) pack: u32,
    /// Offset in units of [`NODE_UNIT`].
    pub(crate) unit: u32,
    /// Of the frame, header included.
    pub(crate) length: u32,
    pub(crate) hash: Hash,
}

impl NodeRef {
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.unit) * NODE_UNIT
    }

    pub(crate) fn place(&self) -> Place {
        Place { pack: self.pack, start: self.offset(), end: self.offset() + u64::from(self.length) }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.u32(self.pack);
        out.u32(self.unit);
        out.u32(self.length);
        out.extend_from_slice(&self.hash.0);
    }

    pub(crate) fn decode(fields: &mut Fields<'_>) -> Result<Self, Malformed> {
        let node =
            Self { pack: fields.u32()?, unit: fields.u32()?, length: fields.u32()?, hash: Hash(fields.array()?) };
        match node.length as usize {
            NODE_HEADER..=NODE_MAX => Ok(node),
            _ => Err(Malformed("a reference in it has an impossible length")),
        }
    }
}

/// A backlink: where a copy of a page's content lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) pack: u32,
    /// Offset in units of [`PAGE_UNIT`].
    pub(crate) unit: u32,
    /// Of the stored bytes.
    pub(crate) length: u16,
    pub(crate) codec: Codec,
    /// The depth, modulo 2^16, of the generation that wrote this copy: tells how many lean on it.
    pub(crate) born: u16,
    /// Of the stored bytes.
    pub(crate) crc: u32,
}

impl Link {
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.unit) * PAGE_UNIT
    }

    pub(crate) fn end(&self) -> u64 {
        self.offset() + u64::from(self.length)
    }

    pub(crate) fn place(&self) -> Place {
        Place { pack: self.pack, start: self.offset(), end: self.end() }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.u32(self.pack);
        out.u32(self.unit);
        out.u16(self.length | self.codec.number() << 13);
        out.u16(self.born);
        out.u32(self.crc);
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, Malformed> {
        let (pack, unit, packed, born, crc) =
            (fields.u32()?, fields.u32()?, fields.u16()?, fields.u16()?, fields.u32()?);
        let link = Self { pack, unit, length: packed & 0x1FFF, codec: Codec::from_number(packed >> 13)?, born, crc };
        let length = usize::from(link.length);
        if length == 0 || length > PAGE_SIZE || (link.codec == Codec::Raw && length != PAGE_SIZE) {
            return Err(Malformed("a backlink in it has an impossible length"));
        }
        Ok(link)
    }
}

/// A page that is not zero: what it is, and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) hash: Hash,
    pub(crate) first: Link,
    /// An older copy, where redundancy asked for another.
    pub(crate) second: Option<Link>,
}

impl Entry {
    pub(crate) fn links(&self) -> impl Iterator<Item = Link> {
        [Some(self.first), self.second].into_iter().flatten()
    }
}

/// 32 consecutive pages.
pub(crate) type Leaf = [Option<Entry>; FANOUT];
/// 32 subtrees.
pub(crate) type Children = [Option<NodeRef>; FANOUT];

/// A region in a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManifestRegion {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) size: u64,
    /// The level of the root: 0 if it is a leaf.
    pub(crate) level: u8,
    /// `None`: all pages are zero.
    pub(crate) root: Option<NodeRef>,
}

/// A blob in a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManifestBlob {
    pub(crate) name: String,
    pub(crate) length: u64,
    pub(crate) pieces: Vec<NodeRef>,
}

/// The root of a generation's archive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Manifest {
    pub(crate) regions: Vec<ManifestRegion>,
    pub(crate) blobs: Vec<ManifestBlob>,
}

/// A node, parsed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    Leaf(Box<Leaf>),
    Inner { level: u8, children: Box<Children> },
    Manifest(Manifest),
    Blob(Vec<u8>),
}

/// Puts `body` into a frame.
pub(crate) fn frame(kind: u8, level: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(NODE_HEADER + body.len());
    out.u32(MAGIC);
    out.u8(kind);
    out.u8(VERSION);
    out.u8(level);
    out.u8(0);
    out.u32(body.len() as u32);
    let mut sum = crc32fast::Hasher::new();
    sum.update(&out);
    sum.update(body);
    out.u32(sum.finalize());
    out.extend_from_slice(body);
    out
}

pub(crate) fn encode_leaf(leaf: &Leaf) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + FANOUT * 32);
    let bits = |wanted: fn(&Entry) -> bool| {
        leaf.iter().enumerate().fold(0u32, |bits, (slot, entry)| match entry {
            Some(entry) if wanted(entry) => bits | 1 << slot,
            _ => bits,
        })
    };
    body.u32(bits(|_| true));
    body.u32(bits(|entry| entry.second.is_some()));
    for entry in leaf.iter().flatten() {
        body.extend_from_slice(&entry.hash.0);
        entry.links().for_each(|link| link.encode(&mut body));
    }
    frame(LEAF, 0, &body)
}

pub(crate) fn encode_inner(level: u8, children: &Children) -> Vec<u8> {
    let mut body = Vec::with_capacity(4 + FANOUT * 28);
    body.u32(children.iter().enumerate().fold(0, |bits, (slot, child)| bits | u32::from(child.is_some()) << slot));
    children.iter().flatten().for_each(|child| child.encode(&mut body));
    frame(INNER, level, &body)
}

pub(crate) fn encode_blob(piece: &[u8]) -> Vec<u8> {
    debug_assert!(piece.len() <= BLOB_PIECE);
    frame(BLOB, 0, piece)
}

/// `None` if the manifest is longer than a node may be.
pub(crate) fn encode_manifest(manifest: &Manifest) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    body.u16(manifest.regions.len() as u16);
    for region in &manifest.regions {
        body.text(&region.name);
        body.text(&region.kind);
        body.u64(region.size);
        body.u32(PAGE_SIZE as u32);
        body.u8(region.level);
        body.u8(u8::from(region.root.is_some()));
        region.root.iter().for_each(|root| root.encode(&mut body));
    }
    body.u16(manifest.blobs.len() as u16);
    for blob in &manifest.blobs {
        body.text(&blob.name);
        body.u64(blob.length);
        body.u32(blob.pieces.len() as u32);
        blob.pieces.iter().for_each(|piece| piece.encode(&mut body));
    }
    (NODE_HEADER + body.len() <= NODE_MAX).then(|| frame(MANIFEST, 0, &body))
}

/// Parses a framed node. The caller has compared its hash, or does so afterwards.
pub(crate) fn decode(bytes: &[u8]) -> Result<Node, Malformed> {
    let mut fields = Fields::new(bytes);
    if fields.u32()? != MAGIC {
        return Err(Malformed("it does not begin as a node does"));
    }
    let (kind, version, level, reserved) = (fields.u8()?, fields.u8()?, fields.u8()?, fields.u8()?);
    let (length, sum) = (fields.u32()? as usize, fields.u32()?);
    if version != VERSION || reserved != 0 {
        return Err(Malformed("its version is unknown"));
    }
    if kind != INNER && level != 0 {
        return Err(Malformed("its level is impossible"));
    }
    if length != fields.left() {
        return Err(Malformed("its length is not what it says"));
    }
    let mut found = crc32fast::Hasher::new();
    found.update(&bytes[..NODE_HEADER - 4]);
    found.update(&bytes[NODE_HEADER..]);
    if found.finalize() != sum {
        return Err(Malformed("its CRC is wrong"));
    }
    let node = match kind {
        LEAF => Node::Leaf(decode_leaf(&mut fields)?),
        INNER => decode_inner(level, &mut fields)?,
        MANIFEST => Node::Manifest(decode_manifest(&mut fields)?),
        BLOB => Node::Blob(fields.bytes(length)?.to_vec()),
        _ => return Err(Malformed("its kind is unknown")),
    };
    fields.end()?;
    Ok(node)
}

fn decode_leaf(fields: &mut Fields<'_>) -> Result<Box<Leaf>, Malformed> {
    let (present, doubled) = (fields.u32()?, fields.u32()?);
    if doubled & !present != 0 {
        return Err(Malformed("it has second backlinks without first ones"));
    }
    let mut leaf = Box::new([None; FANOUT]);
    for (slot, entry) in leaf.iter_mut().enumerate().filter(|(slot, _)| present >> slot & 1 == 1) {
        let (hash, first) = (Hash(fields.array()?), Link::decode(fields)?);
        let second = if doubled >> slot & 1 == 1 { Some(Link::decode(fields)?) } else { None };
        *entry = Some(Entry { hash, first, second });
    }
    Ok(leaf)
}

fn decode_inner(level: u8, fields: &mut Fields<'_>) -> Result<Node, Malformed> {
    if level == 0 || level > LEVEL_MAX {
        return Err(Malformed("its level is impossible"));
    }
    let present = fields.u32()?;
    let mut children = Box::new([None; FANOUT]);
    for (_, child) in children.iter_mut().enumerate().filter(|(slot, _)| present >> slot & 1 == 1) {
        *child = Some(NodeRef::decode(fields)?);
    }
    Ok(Node::Inner { level, children })
}

fn decode_manifest(fields: &mut Fields<'_>) -> Result<Manifest, Malformed> {
    let mut manifest = Manifest::default();
    let regions = usize::from(fields.u16()?);
    if regions > REGIONS_MAX {
        return Err(Malformed("it has too many regions"));
    }
    for _ in 0..regions {
        let (name, kind, size) = (fields.text(NAME_MAX)?, fields.text(KIND_MAX)?, fields.u64()?);
        let (page_size, level, rooted) = (fields.u32()?, fields.u8()?, fields.u8()?);
        if size > REGION_MAX || page_size as usize != PAGE_SIZE || level > LEVEL_MAX || rooted > 1 {
            return Err(Malformed("it has an impossible region"));
        }
        let root = if rooted == 1 { Some(NodeRef::decode(fields)?) } else { None };
        manifest.regions.push(ManifestRegion { name, kind, size, level, root });
    }
    let blobs = usize::from(fields.u16()?);
    if blobs > BLOBS_MAX {
        return Err(Malformed("it has too many blobs"));
    }
    for _ in 0..blobs {
        let (name, length, count) = (fields.text(NAME_MAX)?, fields.u64()?, fields.u32()?);
        if length > BLOB_MAX || u64::from(count) != length.div_ceil(BLOB_PIECE as u64) {
            return Err(Malformed("it has an impossible blob"));
        }
        let pieces = (0..count).map(|_| NodeRef::decode(fields)).collect::<Result<_, _>>()?;
        manifest.blobs.push(ManifestBlob { name, length, pieces });
    }
    Ok(manifest)
}

/// The level that a root needs so that `pages` pages fit under it.
pub(crate) fn level_for(pages: u64) -> u8 {
    let mut level = 0;
    while level < LEVEL_MAX && pages > capacity(level) {
        level += 1;
    }
    level
}

/// Pages under a node of `level`.
pub(crate) fn capacity(level: u8) -> u64 {
    1 << (FANOUT_BITS * (u32::from(level) + 1))
}

/// The child of a node of `level` (the page, for a leaf) under which `page` lies.
pub(crate) fn slot_of(page: u64, level: u8) -> usize {
    (page >> (FANOUT_BITS * u32::from(level))) as usize % FANOUT
}

/// What `bytes` is, if it is the node that `node` refers to.
pub(crate) fn verify(node: &NodeRef, bytes: &[u8]) -> Result<Node, Malformed> {
    if bytes.len() != node.length as usize {
        return Err(Malformed("it is cut off"));
    }
    if Hash::of(bytes) != node.hash {
        return Err(Malformed(if decode(bytes).is_ok() { "it is another node" } else { "its bytes have changed" }));
    }
    decode(bytes)
}

#[cfg(test)]
mod tests;
