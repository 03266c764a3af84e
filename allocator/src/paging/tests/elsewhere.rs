//! Memory that comes from a source while it is used.

use super::*;
use crate::filler::{ClusterSource, SourceError};
use std::sync::atomic::AtomicU64;

const CLUSTERS: u64 = MEMORY.div_ceil(CLUSTER);
const PAGES: u64 = MEMORY / PAGE_SIZE;
const PER_CLUSTER: u64 = CLUSTER / PAGE_SIZE;

/// A generation: each page has a number, where tests look for it.
#[derive(Debug, Clone)]
struct Past {
    pages: Arc<Vec<u64>>,
    damaged: Option<u64>,
    /// How often each cluster was read.
    reads: Arc<Vec<AtomicU64>>,
}

impl Past {
    /// Every fifth cluster is zeros.
    fn new() -> Self {
        let number = |page: u64| if (page / PER_CLUSTER).is_multiple_of(5) { 0 } else { page + 1_000_000 };
        let reads = (0..CLUSTERS).map(|_| AtomicU64::new(0)).collect();
        Self { pages: Arc::new((0..PAGES).map(number).collect()), damaged: None, reads: Arc::new(reads) }
    }

    fn reads(&self) -> Vec<u64> {
        self.reads.iter().map(|reads| reads.load(Ordering::SeqCst)).collect()
    }

    fn elsewhere(&self, present: Vec<bool>, prefetch: Option<Vec<u32>>) -> Option<Elsewhere> {
        Some(Elsewhere { source: Box::new(self.clone()), present, prefetch })
    }
}

impl ClusterSource for Past {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, SourceError> {
        let cluster = offset / CLUSTER;
        assert_eq!(bytes.len() as u64, CLUSTER.min(MEMORY - offset));
        self.reads[cluster as usize].fetch_add(1, Ordering::SeqCst);
        if self.damaged == Some(cluster) {
            bytes.fill(0xEE);
            return Err(format!("cluster {cluster} is damaged").into());
        }
        // What a source of zeros leaves in the buffer does not count.
        bytes.fill(if cluster.is_multiple_of(5) { 0xEE } else { 0 });
        if cluster.is_multiple_of(5) {
            return Ok(false);
        }
        for (index, page) in bytes.chunks_mut(PAGE_SIZE as usize).enumerate() {
            let page_number = offset / PAGE_SIZE + index as u64;
            let at = (8 * (page_number % 500)) as usize;
            page[at..at + 8].copy_from_slice(&self.pages[page_number as usize].to_le_bytes());
        }
        Ok(true)
    }
}

fn pager_from(home: &Home, past: &Past, tables: Option<u32>, present: Vec<bool>, prefetch: Option<Vec<u32>>) -> Pager {
    let pager = home.try_pager_with(tables, past.elsewhere(present, prefetch)).unwrap();
    pager.go_on();
    pager
}

#[track_caller]
fn completes(home: &Home) {
    let told = home.events.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(matches!(told, PagingEvent::Complete), "{told:?}");
}

/// All of the memory, without bringing it in.
#[track_caller]
fn holds(pager: &Pager, model: &[u64]) {
    let mut copy = vec![0; MEMORY as usize];
    pager.read(0, &mut copy).unwrap();
    for (page, value) in model.iter().enumerate() {
        let at = page * PAGE_SIZE as usize + 8 * (page % 500);
        assert_eq!(u64::from_le_bytes(copy[at..at + 8].try_into().unwrap()), *value, "page {page}");
    }
}

/// Several lives, each frozen in the middle.
fn lives(medium: MediumKind, prefetch: Option<Vec<u32>>) {
    let (home, past) = (Home::new(medium, MEMORY), Past::new());
    let mut model = past.pages.to_vec();
    let (mut tables, mut present) = (None, Vec::new());
    let mut elsewhere = CLUSTERS;
    for life in 0..5 {
        let pager = pager_from(&home, &past, tables, present, prefetch.clone());
        if prefetch.is_some() && life < 2 {
            // So that something is left for the next ones.
            pager.hold_fetch(true);
        }
        if life == 1 {
            holds(&pager, &model);
        }
        walk(&pager, &mut model, (0, 1), 70 + life, if life < 3 { 30 } else { 3000 });
        pager.hold();
        let status = pager.status();
        assert!(status.elsewhere <= elsewhere && (life > 1 || status.elsewhere > 0), "{life}: {status:?}");
        elsewhere = status.elsewhere;
        present = pager.present();
        assert_eq!(present.iter().filter(|present| !**present).count() as u64, elsewhere);
        tables = Some(pager.persist().unwrap().0);
        holds(&pager, &model);
    }
    while home.events.try_recv().is_ok() {}
    let pager = pager_from(&home, &past, tables, present, prefetch);
    (0..PAGES).for_each(|page| assert_eq!(read(&pager, page), model[page as usize], "page {page}"));
    completes(&home);
    assert!(pager.is_complete() && pager.status().residence() < 50.0);
    assert!(home.events.try_recv().is_err(), "told once");
}

#[test]
fn a_guest_finds_every_byte_while_its_memory_comes_through_outages_on_a_file() {
    lives(MediumKind::File, None);
    lives(MediumKind::File, Some(vec![3, u32::MAX, 9, 3, 100, 127]));
}

#[test]
fn a_guest_finds_every_byte_while_its_memory_comes_through_outages_on_nvdimm() {
    lives(MediumKind::Nvdimm, None);
    lives(MediumKind::Nvdimm, Some(vec![]));
}

#[test]
fn several_cpus_copies_freezes_and_the_fetching_meet_and_nothing_is_lost() {
    let (home, past) = (Home::new(MediumKind::File, MEMORY), Past::new());
    let pager = pager_from(&home, &past, None, Vec::new(), Some((20..60).collect()));
    let done = AtomicBool::new(false);
    let models: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let walker = |cpu: u64| {
            let (pager, past) = (&pager, &past);
            scope.spawn(move || {
                let mut model = past.pages.to_vec();
                walk(pager, &mut model, (cpu, 3), 99 + cpu, 3000);
                model
            })
        };
        let walkers: Vec<_> = (0..3).map(walker).collect();
        scope.spawn(|| {
            let mut bytes = vec![0; 5 * CLUSTER as usize];
            let mut draw = Draw(5);
            while !done.load(Ordering::SeqCst) {
                pager.read(draw.next() % (MEMORY - bytes.len() as u64), &mut bytes).unwrap();
                pager.hold();
                let before = pager.present();
                std::thread::sleep(Duration::from_micros(300));
                assert!(before.iter().zip(pager.present()).all(|(before, after)| !before || after));
                pager.go_on();
            }
        });
        let _done = SetAtEnd(&done);
        walkers.into_iter().map(|walker| walker.join().unwrap()).collect()
    });
    completes(&home);
    let model: Vec<u64> = (0..PAGES).map(|page| models[(page % 3) as usize][page as usize]).collect();
    holds(&pager, &model);
}

#[test]
fn what_came_and_left_again_unchanged_is_in_a_slot_and_never_asked_of_the_source_again() {
    let (home, past) = (Home::new(MediumKind::File, MEMORY), Past::new());
    let pager = pager_from(&home, &past, None, Vec::new(), None);
    for _ in 0..3 {
        (0..PAGES).for_each(|page| assert_eq!(read(&pager, page), past.pages[page as usize]));
    }
    completes(&home);
    assert_eq!(past.reads(), vec![1; CLUSTERS as usize]);
    let status = pager.status();
    assert_eq!((status.elsewhere, status.source_faults, status.fetched), (0, CLUSTERS, 0));
    assert!(status.written > 50 && status.hard_faults + status.read_ahead > 100, "{status:?}");
    assert_eq!(pager.trace(), (0..CLUSTERS as u32).collect::<Vec<_>>());
}

#[test]
fn what_is_likely_is_fetched_into_frames_and_the_rest_past_them_into_slots() {
    let (home, past) = (Home::new(MediumKind::File, MEMORY), Past::new());
    let order = vec![101, 7, 64, 100, 102];
    let pager = pager_from(&home, &past, None, Vec::new(), Some(order));
    completes(&home);
    let status = pager.status();
    assert_eq!((status.source_faults, status.fetched, status.missing), (0, CLUSTERS, 0), "{status:?}");
    assert!(status.resident <= status.frames / 2 + 1 && status.written == 0, "nothing was pushed out: {status:?}");
    let zeros = CLUSTERS.div_ceil(5);
    assert_eq!(status.resident + status.swapped, CLUSTERS - zeros, "zeros take no room: {status:?}");
    {
        let state = pager.shared.state();
        assert!([7, 64, 101, 102].iter().all(|cluster| state.has(*cluster, MAPPED)));
        assert!(state.frames.frame_of(100).is_none() && state.slots.of(100).is_none(), "zeros");
    }
    (0..PAGES).for_each(|page| assert_eq!(read(&pager, page), past.pages[page as usize]));
    let status = pager.status();
    assert!(status.dropped > status.written, "slots are good for dropping: {status:?}");
    assert_eq!(past.reads(), vec![1; CLUSTERS as usize]);
}

#[test]
fn a_damaged_cluster_is_named_and_never_zeros_and_the_rest_comes() {
    for prefetch in [None, Some(vec![33])] {
        let (home, past) = (Home::new(MediumKind::File, MEMORY), Past { damaged: Some(33), ..Past::new() });
        let pager = pager_from(&home, &past, None, Vec::new(), prefetch.clone());
        if prefetch.is_some() {
            let told = home.events.recv_timeout(Duration::from_secs(30)).unwrap();
            assert!(
                matches!(told, PagingEvent::Missing(PagingError::Elsewhere { start, .. }) if start == 33 * CLUSTER)
            );
        }
        for page in (0..PAGES).filter(|page| page / PER_CLUSTER != 33) {
            assert_eq!(read(&pager, page), past.pages[page as usize]);
        }
        let mut bytes = [0; 8];
        assert!(pager.read(33 * CLUSTER + 5, &mut bytes).is_err() && home.events.try_recv().is_err(), "nobody waits");
        let error = pager.bring_in(33 * CLUSTER, 1).unwrap_err().to_string();
        assert!(error.contains(&format!("{:#x}", 33 * CLUSTER)) && !error.contains("slot"), "{error}");
        let told = home.events.recv_timeout(Duration::from_secs(30)).unwrap();
        let PagingEvent::Lost(PagingError::Elsewhere { source: Some(source), .. }) = told else { panic!("{told:?}") };
        assert_eq!(source.to_string(), "cluster 33 is damaged");
        assert_eq!((pager.status().elsewhere, pager.is_complete()), (1, false));
        // The next process tries again.
        pager.hold();
        assert!(!pager.present()[33]);
        let tables = Some(pager.persist().unwrap().0);
        let (present, healed) = (pager.present(), Past { damaged: None, ..past });
        drop(pager);
        let pager = pager_from(&home, &healed, tables, present, None);
        (0..PAGES).for_each(|page| assert_eq!(read(&pager, page), healed.pages[page as usize]));
    }
}

#[test]
fn what_the_guest_needs_no_more_is_zeros_and_never_comes() {
    let (home, past) = (Home::new(MediumKind::File, MEMORY), Past::new());
    let pager = pager_from(&home, &past, None, Vec::new(), None);
    pager.discard(0, 40 * CLUSTER).unwrap();
    assert_eq!(pager.status().elsewhere, CLUSTERS - 40);
    (0..40 * PER_CLUSTER).for_each(|page| assert_eq!(read(&pager, page), 0));
    assert_eq!(read(&pager, 41 * PER_CLUSTER), past.pages[41 * PER_CLUSTER as usize]);
    pager.hold();
    let (present, tables) = (pager.present(), Some(pager.persist().unwrap().0));
    drop(pager);
    let pager = pager_from(&home, &past, tables, present, None);
    (0..40 * PER_CLUSTER).for_each(|page| assert_eq!(read(&pager, page), 0));
    pager.discard(40 * CLUSTER, MEMORY - 40 * CLUSTER).unwrap();
    completes(&home);
    assert!(past.reads().iter().sum::<u64>() == 1 && (0..PAGES).all(|page| read(&pager, page) == 0));
}

#[test]
fn a_small_swap_region_is_left_to_the_guest() {
    let (home, past) = (Home::new(MediumKind::File, 40 * CLUSTER), Past::new());
    let pager = pager_from(&home, &past, None, Vec::new(), Some(vec![]));
    let begun = Instant::now();
    while pager.status().resident + pager.status().swapped < 40 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pager.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    let status = pager.status();
    assert!(status.elsewhere > 0 && status.resident + status.swapped <= 40, "{status:?}");
    // New memory has room: as much as there is RAM.
    pager.discard(120 * CLUSTER, MEMORY - 120 * CLUSTER).unwrap();
    (121..126).for_each(|cluster| write(&pager, cluster * PER_CLUSTER, 5));
    pager.discard(0, 120 * CLUSTER).unwrap();
    completes(&home);
}

#[test]
fn tables_that_have_what_is_said_to_be_elsewhere_are_refused() {
    let (home, past) = (Home::new(MediumKind::File, MEMORY), Past::new());
    let pager = pager_from(&home, &past, None, Vec::new(), None);
    (0..50 * PER_CLUSTER).for_each(|page| assert_eq!(read(&pager, page), past.pages[page as usize]));
    pager.hold();
    let (present, tables) = (pager.present(), Some(pager.persist().unwrap().0));
    drop(pager);
    assert!(home.try_pager_with(tables, past.elsewhere(present.clone(), None)).is_ok());
    let here: Vec<usize> = (0..present.len()).filter(|at| present[*at] && at % 5 != 0).collect();
    for at in [here[0], here[here.len() - 1]] {
        let mut lie = present.clone();
        lie[at] = false;
        let refused = home.try_pager_with(tables, past.elsewhere(lie, None));
        assert!(matches!(refused, Err(PagingError::Tables { .. })), "cluster {at}");
    }
    assert!(home.try_pager_with(tables, past.elsewhere(Vec::new(), None)).is_err());
    assert!(home.try_pager_with(tables, past.elsewhere(vec![true; 1 << 20], None)).unwrap().is_complete());
}
