//! What a pager knows of its clusters.

use std::collections::VecDeque;

use super::frames::Frames;
use super::read_ahead::Streams;
use super::slots::{SlotTable, SwapFile};
use super::{Geometry, PagingError, PagingStatus, SPARE, Spot};
use crate::replacement::Replacement;

/// The guest sees it in its frame.
pub(super) const MAPPED: u8 = 1;
/// A thread is at it, and nobody else may be.
pub(super) const BUSY: u8 = 2;
/// Somebody waits for it who was not served.
pub(super) const AWAITED: u8 = 4;
/// It cannot be had.
pub(super) const LOST: u8 = 8;
/// Its digest is that of its slot.
pub(super) const KNOWN: u8 = 16;
/// The RAM region has what its frame holds, or will after a flush; only on a medium whose working memory is apart.
pub(super) const SAVED: u8 = 32;
/// Its frame's bytes are in the RAM region and not yet in working memory.
pub(super) const IN_IMAGE: u8 = 64;
/// It is in the source alone, and perhaps zeros there.
pub(super) const ELSEWHERE: u8 = 128;

pub(super) type Digest = [u8; 16];

#[derive(Debug)]
pub(super) struct State {
    pub(super) flags: Vec<u8>,
    pub(super) frames: Frames,
    pub(super) slots: SlotTable,
    pub(super) policy: Replacement,
    pub(super) digests: Vec<Digest>,
    pub(super) streams: Streams,
    /// Clusters that somebody waits for, and that `faults` is to look at again.
    pub(super) backlog: VecDeque<u32>,
    /// Runs of clusters that `ahead` is to bring: the first one, and how many.
    pub(super) ahead: VecDeque<(u32, u32)>,
    /// Resident clusters to be placed without being asked for, the last one first.
    pub(super) to_place: Vec<u32>,
    /// Clusters that are being worked at.
    pub(super) busy: u32,
    /// Clusters that somebody waited for until they came from the source, in that order.
    pub(super) trace: Vec<u32>,
    /// `fetch` rests.
    pub(super) fetch_held: bool,
    /// `ahead`, `evict` and `fetch` rest.
    pub(super) held: bool,
    pub(super) ended: bool,
    /// The thread `faults` ends, too: last, since who withdraws waits for it.
    pub(super) deaf: bool,
    /// What was told, and does not hold any more when it changes.
    pub(super) full: bool,
    pub(super) unwritable: bool,
    pub(super) status: PagingStatus,
    /// Where the search for a slot that can be spared stood.
    pub(super) reclaim_at: u32,
}

impl State {
    pub(super) fn has(&self, cluster: u32, flag: u8) -> bool {
        self.flags.get(cluster as usize).is_some_and(|flags| flags & flag != 0)
    }

    pub(super) fn set(&mut self, cluster: u32, flag: u8) {
        if let Some(flags) = self.flags.get_mut(cluster as usize) {
            *flags |= flag;
        }
    }

    pub(super) fn clear(&mut self, cluster: u32, flag: u8) {
        if let Some(flags) = self.flags.get_mut(cluster as usize) {
            *flags &= !flag;
        }
    }

    pub(super) fn spot_of(&self, cluster: u32) -> Option<Spot> {
        Some(Spot { cluster, frame: self.frames.frame_of(cluster)? })
    }

    pub(super) fn begin_work(&mut self, cluster: u32) {
        self.set(cluster, BUSY);
        self.busy += 1;
    }

    /// The work at a cluster is done; who came meanwhile is looked at again. Whether somebody did.
    pub(super) fn end_work(&mut self, cluster: u32) -> bool {
        self.clear(cluster, BUSY);
        self.busy = self.busy.saturating_sub(1);
        let awaited = self.has(cluster, AWAITED);
        if awaited {
            self.clear(cluster, AWAITED);
            self.backlog.push_back(cluster);
        }
        awaited
    }
}

impl State {
    pub(super) fn fresh(geometry: Geometry, slots: u32) -> Self {
        let clusters = geometry.clusters();
        Self::with(
            geometry,
            Frames::new(clusters, geometry.frames, SPARE),
            SlotTable::new(clusters, slots),
            Replacement::new(clusters, geometry.frames),
        )
    }

    pub(super) fn with(geometry: Geometry, frames: Frames, slots: SlotTable, policy: Replacement) -> Self {
        let clusters = geometry.clusters();
        let status = PagingStatus { clusters: clusters.into(), cluster: geometry.cluster, ..PagingStatus::default() };
        Self {
            flags: vec![0; clusters as usize],
            frames,
            slots,
            policy,
            digests: vec![Digest::default(); clusters as usize],
            streams: Streams::new(geometry.cluster),
            backlog: VecDeque::new(),
            ahead: VecDeque::new(),
            to_place: Vec::new(),
            busy: 0,
            trace: Vec::new(),
            fetch_held: false,
            held: true,
            ended: false,
            deaf: false,
            reclaim_at: 0,
            full: false,
            unwritable: false,
            status,
        }
    }

    /// As the tables of a freeze say. `apart`: working memory is not the RAM region itself.
    pub(super) fn restored(geometry: Geometry, swap: &SwapFile, digest: u32, apart: bool) -> Result<Self, PagingError> {
        let clusters = geometry.clusters();
        let (slots, list) = swap.load(clusters, digest)?;
        let mut frames = Frames::new(clusters, geometry.frames, SPARE);
        for (cluster, frame) in &list {
            if !frames.claim(*cluster, *frame) {
                return Err(
                    swap.refuse("the frame list: it names a cluster or a frame twice, or one that there is not")
                );
            }
        }
        let order = list.iter().map(|(cluster, _)| *cluster);
        let policy = Replacement::restore(clusters, geometry.frames, order.clone());
        let mut state = Self::with(geometry, frames, slots, policy);
        let swapped = |cluster: &u32| state.slots.of(*cluster).is_some() && state.frames.frame_of(*cluster).is_none();
        state.status.swapped = (0..clusters).filter(swapped).count() as u64;
        state.to_place = order.rev().collect();
        if apart {
            list.iter().for_each(|(cluster, _)| state.set(*cluster, SAVED | IN_IMAGE));
        }
        Ok(state)
    }

    /// Clusters of which `present` does not say that they are here are elsewhere; `false` if the tables say that one of them is here.
    pub(super) fn mark_elsewhere(&mut self, present: &[bool]) -> bool {
        for cluster in 0..self.flags.len() as u32 {
            if present.get(cluster as usize) != Some(&true) {
                if self.slots.of(cluster).is_some() || self.frames.frame_of(cluster).is_some() {
                    return false;
                }
                self.set(cluster, ELSEWHERE);
                self.status.elsewhere += 1;
            }
        }
        true
    }

    /// A cluster has come, or is needed no more. Whether it was the last one that was elsewhere.
    pub(super) fn is_here(&mut self, cluster: u32) -> bool {
        if !self.has(cluster, ELSEWHERE) {
            return false;
        }
        self.clear(cluster, ELSEWHERE);
        self.status.elsewhere -= 1;
        self.status.elsewhere == 0
    }

    pub(super) fn status(&self) -> PagingStatus {
        PagingStatus {
            resident: self.frames.in_use().into(),
            frames: self.frames.limit().into(),
            slots_used: self.slots.in_use().into(),
            slots: self.slots.count().into(),
            near_misses: self.policy.near_misses(),
            ..self.status
        }
    }
}
