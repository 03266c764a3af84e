//! Random histories against a model: after any of them every generation is what it must be, and nothing else is stored.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use proptest::prelude::*;
use snapshot::{GenerationId, Options, Parent, Store};
use vfs::Vfs;
use vfs::crash::CrashVfs;
use world::{CODECS, Image, Put, check, commit, open, options, put};

#[derive(Debug, Clone)]
enum Step {
    /// Lineage, which parent (index into all generations; none: newest), sizes in pages, what is put.
    Commit {
        lineage: usize,
        parent: Option<prop::sample::Index>,
        sizes: (usize, usize),
        puts: Vec<(bool, u64, u32)>,
    },
    /// The same, but the writer is dropped.
    Abort {
        puts: Vec<(bool, u64, u32)>,
    },
    Zero {
        region: bool,
        first: u64,
        count: u64,
    },
    Purge(prop::sample::Index),
    Sweep,
    Reopen,
    Scrub,
    Copy {
        of: prop::sample::Index,
        lineage: usize,
    },
    Label(prop::sample::Index),
}

const LINEAGES: [&str; 3] = ["web", "db", "web-fork"];

fn any_puts() -> impl Strategy<Value = Vec<(bool, u64, u32)>> {
    // Few seeds, so that equal pages and zero pages are common.
    prop::collection::vec((any::<bool>(), 0..1200u64, 0..40u32), 0..60)
}

fn any_step() -> impl Strategy<Value = Step> {
    let sizes = prop_oneof![5 => Just((1200, 64)), 1 => (1..1200usize, 1..64usize)];
    let parent = prop_oneof![4 => Just(None), 1 => any::<prop::sample::Index>().prop_map(Some)];
    prop_oneof![
        8 => (0..3usize, parent, sizes, any_puts())
            .prop_map(|(lineage, parent, sizes, puts)| Step::Commit { lineage, parent, sizes, puts }),
        1 => any_puts().prop_map(|puts| Step::Abort { puts }),
        1 => (any::<bool>(), 0..1200u64, 1..300u64).prop_map(|(region, first, count)| Step::Zero { region, first, count }),
        3 => any::<prop::sample::Index>().prop_map(Step::Purge),
        2 => Just(Step::Sweep),
        1 => Just(Step::Reopen),
        1 => Just(Step::Scrub),
        1 => (any::<prop::sample::Index>(), 0..3usize).prop_map(|(of, lineage)| Step::Copy { of, lineage }),
        1 => any::<prop::sample::Index>().prop_map(Step::Label),
    ]
}

struct Run {
    vfs: Arc<dyn Vfs>,
    options: Options,
    store: Store,
    all: BTreeMap<(String, u64), Image>,
}

impl Run {
    fn new(options: Options) -> Self {
        let vfs: Arc<dyn Vfs> = Arc::new(CrashVfs::new());
        let store = open(&vfs, &options).unwrap();
        Self { vfs, options, store, all: BTreeMap::new() }
    }

    fn pick(&self, index: &prop::sample::Index) -> Option<GenerationId> {
        let keys: Vec<_> = self.all.keys().collect();
        (!keys.is_empty()).then(|| *index.get(&keys)).map(|(lineage, number)| GenerationId::new(lineage, *number))
    }

    fn image(&self, id: &GenerationId) -> &Image {
        &self.all[&(id.lineage.clone(), id.number)]
    }

    /// The content that a generation with these regions starts from.
    fn base(&self, parent: Option<&GenerationId>, sizes: (usize, usize)) -> Image {
        let mut image = Image::new(&[("disk", sizes.1), ("ram", sizes.0)]);
        if let Some(parent) = parent {
            for (name, pages) in &mut image.regions {
                if let Some(old) = self.image(parent).regions.get(name) {
                    let both = old.len().min(pages.len());
                    pages[..both].copy_from_slice(&old[..both]);
                }
            }
        }
        image.context = format!("context {}", self.all.len()).into_bytes();
        image
    }

    fn puts(image: &Image, puts: &[(bool, u64, u32)]) -> Vec<Put> {
        let name = |disk: bool| if disk { "disk" } else { "ram" };
        let limit = |disk: bool| image.regions[name(disk)].len() as u64;
        puts.iter().map(|(disk, page, seed)| put(name(*disk), page % limit(*disk), *seed)).collect()
    }

    fn newest(&self, lineage: &str) -> Option<GenerationId> {
        self.store.newest(lineage).map(|generation| generation.id)
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Commit { lineage, parent, sizes, puts } => {
                let lineage = LINEAGES[*lineage];
                let chosen = parent.as_ref().and_then(|index| self.pick(index));
                let parent = chosen.clone().map_or(Parent::Newest, Parent::Generation);
                let base = self.base(chosen.or_else(|| self.newest(lineage)).as_ref(), *sizes);
                let (id, image) = commit(&self.store, lineage, parent, &base, &Self::puts(&base, puts)).unwrap();
                assert!(self.all.insert((id.lineage, id.number), image).is_none(), "a number was used twice");
            }
            Step::Abort { puts } => {
                let base = self.base(self.newest("web").as_ref(), (1200, 64));
                let mut writer = self.store.begin(snapshot::NewGeneration::automatic("web", 5)).unwrap();
                world::fill(&mut writer, &base, &Self::puts(&base, puts)).unwrap();
            }
            Step::Zero { region, first, count } => {
                let Some(parent) = self.newest("web") else { return };
                let mut image = self.image(&parent).clone();
                let name = if *region { "disk" } else { "ram" };
                let pages = image.regions[name].len() as u64;
                let (first, count) = (first % pages, (*count).min(pages - first % pages));
                let mut writer = self.store.begin(snapshot::NewGeneration::automatic("web", 5)).unwrap();
                let mut key = None;
                for (name_of, pages) in &image.regions {
                    let size = (pages.len() * snapshot::PAGE_SIZE) as u64;
                    let spec = snapshot::RegionSpec { name: name_of.clone(), kind: "ram".into(), size };
                    let made = writer.region(&spec).unwrap();
                    if name_of == name {
                        key = Some(made);
                    }
                }
                writer.put(key.unwrap(), first, &world::page(77)).unwrap();
                writer.zero_run(key.unwrap(), first, count).unwrap();
                assert!(writer.inherit_blob("context").unwrap());
                let id = writer.commit().unwrap().id;
                image.regions.get_mut(name).unwrap()[first as usize..(first + count) as usize].fill(0);
                self.all.insert((id.lineage, id.number), image);
            }
            Step::Purge(index) => {
                let Some(id) = self.pick(index) else { return };
                if self.store.generation(&id).unwrap().protected {
                    assert!(self.store.purge(std::slice::from_ref(&id)).is_err());
                } else {
                    self.store.purge(std::slice::from_ref(&id)).unwrap();
                    self.all.remove(&(id.lineage, id.number));
                }
            }
            Step::Sweep => {
                assert_eq!(self.store.sweep(&mut |_| ()).unwrap().blocked_by, Vec::<String>::new());
                assert_eq!(self.store.zombies().unwrap(), 0);
            }
            Step::Reopen => self.store = open(&self.vfs, &self.options).unwrap(),
            Step::Scrub => {
                let report = self.store.scrub(&mut |_| ()).unwrap();
                assert!(report.is_clean(), "{report:?}");
            }
            Step::Copy { of, lineage } => {
                let Some(of) = self.pick(of) else { return };
                let mut stream = Vec::new();
                self.store.export(&of, &mut stream).unwrap();
                let made = self.store.import(LINEAGES[*lineage], &mut &stream[..]).unwrap();
                assert_eq!(self.store.diff(&of, &made.id).unwrap(), []);
                let image = self.image(&of).clone();
                self.all.insert((made.id.lineage, made.id.number), image);
            }
            Step::Label(index) => {
                let Some(id) = self.pick(index) else { return };
                self.store.label(&id, Some("by hand")).unwrap();
                assert_eq!(self.store.generation(&id).unwrap().label.as_deref(), Some("by hand"));
            }
        }
    }

    fn check_all(&self) {
        let listed: Vec<_> = self.store.lineages().iter().flat_map(|lineage| self.store.generations(lineage)).collect();
        assert_eq!(listed.len(), self.all.len());
        for ((lineage, number), image) in &self.all {
            check(&self.store, &GenerationId::new(lineage, *number), image).unwrap();
        }
        let ids: Vec<_> = self.all.keys().map(|(lineage, number)| GenerationId::new(lineage, *number)).collect();
        for pair in ids.windows(2) {
            self.check_diff(&pair[0], &pair[1]);
        }
    }

    fn check_diff(&self, old: &GenerationId, new: &GenerationId) {
        let diffs = self.store.diff(old, new).unwrap();
        for name in ["disk", "ram"] {
            let (was, is) = (&self.image(old).regions[name], &self.image(new).regions[name]);
            let seed = |seeds: &Vec<u32>, page: usize| seeds.get(page).copied().unwrap_or(0);
            let expected: Vec<u64> = (0..was.len().max(is.len()))
                .filter(|page| seed(was, *page) != seed(is, *page))
                .map(|page| page as u64)
                .collect();
            let found: Vec<u64> = diffs
                .iter()
                .filter(|diff| diff.region == name)
                .flat_map(|diff| diff.changed.iter().flat_map(|range| range.first..range.first + range.count))
                .collect();
            assert_eq!(found, expected, "{name} between {old} and {new}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_history_leaves_exactly_what_it_must(
        steps in prop::collection::vec(any_step(), 1..24), codec in 0..3usize, redundancy in 0u32..4, dedup in any::<bool>(),
    ) {
        let options = Options {
            compression: CODECS[codec],
            redundancy: NonZeroU32::new(redundancy),
            dedup_pages: if dedup { 1 << 12 } else { 0 },
            ..options()
        };
        let mut run = Run::new(options);
        for step in &steps {
            run.step(step);
        }
        run.check_all();
        run.step(&Step::Reopen);
        run.step(&Step::Sweep);
        run.step(&Step::Scrub);
        run.check_all();
    }
}
