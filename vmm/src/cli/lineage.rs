//! Where the generations of a VM are, and how they are named on the command line.

use std::time::Duration;

use allocator::Pool;
use anyhow::{Context as _, bail};
use serde::Serialize;
use snapshot::{Depth, Generation, GenerationId, Origin, Store, StoreError, SweepReport};

use super::progress::Progress;
use crate::machine::config::VmConfig;
use crate::machine::config::generations::GenerationsConfig;
use crate::persistence::generations::{BLOB_CONFIG, GenerationsError, family, open, open_existing, store_dir};
use crate::persistence::recovery::assess;
use crate::persistence::regions::{RegionsError, VmRegions, region_name};
use crate::persistence::rollback::{keep, now_ms};

/// The generations of one VM.
#[derive(Debug, Clone)]
pub(super) struct Lineage {
    /// The VM.
    pub(super) name: String,
    /// Whose store it is.
    pub(super) family: String,
    /// The store, which other VMs of the family may use too.
    pub(super) store: Store,
    /// How generations are stored, and which stay: as the VM says, or as the newest of them does if it runs.
    pub(super) config: GenerationsConfig,
}

/// The families that have stores in the pool.
pub(super) fn families(pool: &Pool) -> anyhow::Result<Vec<String>> {
    let directory = store_dir(pool.dir(), "");
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", directory.display())),
    };
    let mut families = Vec::new();
    for entry in entries {
        families.extend(entry?.file_name().into_string().ok());
    }
    // No VM's name begins so: see `remove_if_empty`.
    families.retain(|family| !family.starts_with('.'));
    families.sort();
    Ok(families)
}

/// Opens the store of a family; `None` if there is none, or no more than the directories of one that a cut kept from being made.
pub(super) fn open_store(
    pool: &Pool,
    family: &str,
    config: &GenerationsConfig,
) -> Result<Option<Store>, GenerationsError> {
    let directory = store_dir(pool.dir(), family);
    let unmade = || {
        let mut packs = std::fs::read_dir(directory.join("packs")).into_iter().flatten();
        packs.next().is_none() && ["ledger-a", "ledger-b"].iter().all(|ledger| !directory.join(ledger).exists())
    };
    match open_existing(pool.dir(), family, config) {
        Err(GenerationsError::Store(StoreError::NotAStore { .. })) if unmade() => Ok(None),
        other => other,
    }
}

/// The generations of VM `name`, if there are any; of a VM that is gone too, if its generations are still there.
pub(super) fn find(pool: &Pool, name: &str) -> anyhow::Result<Option<Lineage>> {
    // The name is checked by making one of its regions' names.
    region_name(name, "ram")?;
    let held = VmRegions::open(pool, name).ok().map(|regions| regions.config().clone());
    let config = held.as_ref().map(|config| config.generations.clone()).unwrap_or_default();
    let own = held.as_ref().map_or(name, |config| family(config, name)).to_owned();
    let mut candidates = vec![own.clone()];
    // Who runs does not let its configuration be read; its family is found by what is in it.
    candidates.extend(families(pool)?.into_iter().filter(|family| held.is_none() && *family != own));
    let mut damaged = None;
    for family in candidates {
        let store = match open_store(pool, &family, &config) {
            Ok(Some(store)) => store,
            Ok(None) => continue,
            // The store of others is their trouble.
            Err(error) if family == own => {
                damaged = Some(error);
                continue;
            }
            Err(_) => continue,
        };
        let mut lineage = Lineage { name: name.to_owned(), family, store, config: config.clone() };
        if lineage.newest().is_some() {
            if held.is_none() {
                lineage.learn_config();
            }
            return Ok(Some(lineage));
        }
    }
    match damaged {
        Some(error) => Err(error.into()),
        None => Ok(None),
    }
}

/// The generations of VM `name`, of which there must be some.
pub(super) fn require(pool: &Pool, name: &str) -> anyhow::Result<Lineage> {
    if let Some(lineage) = find(pool, name)? {
        return Ok(lineage);
    }
    if pool.get(&region_name(name, "ram")?).is_none() {
        bail!("there is no VM {name} in this pool, and no generation of one; `perdure list` names those that are");
    }
    bail!("VM {name} has no generations: `perdure snapshot {name}` takes one while it runs");
}

/// The generations of a VM whose regions this process holds, if there are any.
pub(super) fn of_held(pool: &Pool, regions: &VmRegions) -> anyhow::Result<Option<Lineage>> {
    let (config, name) = (regions.config(), regions.name());
    let family = family(config, name).to_owned();
    let Some(store) = open_store(pool, &family, &config.generations)? else { return Ok(None) };
    let config = config.generations.clone();
    let lineage = Lineage { name: name.to_owned(), family, store, config };
    Ok(lineage.newest().map(|_| lineage.clone()))
}

/// What `NAME` or `NAME@17` means to `fork` and `export`: that generation; else, of a VM that is frozen, what it is, which becomes a
/// generation with `label`; else its newest generation that verifies.
pub(super) fn resolve(pool: &Pool, text: &str, label: &str) -> anyhow::Result<(Lineage, GenerationId)> {
    let (name, id) = vm_and_id(text)?;
    if let Some(id) = id {
        let lineage = require(pool, &name)?;
        lineage.store.generation(&id)?;
        return Ok((lineage, id));
    }
    // Its name is checked before it is made part of a path.
    region_name(&name, "ram")?;
    if let Ok(regions) = VmRegions::open(pool, &name)
        && assess(&regions).is_ok()
    {
        let (config, family) = (regions.config().generations.clone(), family(regions.config(), &name).to_owned());
        let store = open(pool.dir(), &family, &config)?;
        let kept = keep(&store, &regions, label)?;
        return Ok((Lineage { name, family, store, config }, kept.id));
    }
    let lineage = require(pool, &name)?;
    let recovered = lineage.store.newest_verified(&name, Depth::Structure)?;
    for skipped in &recovered.skipped {
        eprintln!("perdure: {} is passed over: {}", skipped.generation.id, skipped.why);
    }
    let found = recovered.generation.with_context(|| {
        format!("no generation of {name} can be read; `perdure scrub {name} --repair` heals what has a good copy")
    })?;
    Ok((lineage, found.id))
}

/// Removes the store of a family if there is nothing in it and no VM of the pool may write to it.
pub(super) fn remove_if_empty(pool: &Pool, family: &str) -> anyhow::Result<()> {
    let config = GenerationsConfig::default();
    let Some(store) = open_store(pool, family, &config)? else { return Ok(()) };
    if !store.lineages().is_empty() {
        return Ok(());
    }
    for name in super::survey::names(pool) {
        match VmRegions::open(pool, &name) {
            Ok(regions) if self::family(regions.config(), &name) != family => {}
            Err(RegionsError::InUse { .. }) if find(pool, &name)?.is_some_and(|other| other.family != family) => {}
            // One of the family, or one that does not tell: an empty directory harms nobody.
            _ => return Ok(()),
        }
    }
    // First out of the way, so that a cut does not leave a part of a store under its name.
    let (directory, gone) = (store_dir(pool.dir(), family), store_dir(pool.dir(), &format!(".{family}")));
    let cannot = || format!("cannot remove {}", directory.display());
    match std::fs::remove_dir_all(&gone) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(cannot),
        _ => {}
    }
    std::fs::rename(&directory, &gone).and_then(|()| std::fs::remove_dir_all(&gone)).with_context(cannot)
}

/// Generation `text` of VM `name`: `17`, `@17` or `NAME@17`.
pub(super) fn id(name: &str, text: &str) -> anyhow::Result<GenerationId> {
    let number = text.strip_prefix('@').unwrap_or(text);
    if let Ok(number) = number.parse() {
        return Ok(GenerationId::new(name, number));
    }
    let id: GenerationId =
        text.parse().with_context(|| format!("'{text}' names no generation: write {name}@NUMBER or NUMBER"))?;
    if id.lineage != name {
        bail!("generation {id} is not one of VM {name}");
    }
    Ok(id)
}

/// A VM, or one of its generations: `NAME` or `NAME@17`.
pub(super) fn vm_and_id(text: &str) -> anyhow::Result<(String, Option<GenerationId>)> {
    if !text.contains('@') {
        return Ok((text.to_owned(), None));
    }
    let id: GenerationId = text.parse()?;
    Ok((id.lineage.clone(), Some(id)))
}

/// A generation, for people and scripts.
#[derive(Debug, Serialize)]
pub(super) struct View {
    pub(super) id: String,
    pub(super) number: u64,
    pub(super) parent: Option<String>,
    /// Milliseconds since 1970-01-01 UTC.
    pub(super) time_ms: u64,
    pub(super) age_ms: u64,
    pub(super) label: Option<String>,
    pub(super) protected: bool,
    /// "automatic" or "manual".
    pub(super) origin: &'static str,
    pub(super) depth: u32,
    /// The bytes of all its regions.
    pub(super) logical_bytes: u64,
    pub(super) pages_stored: u64,
    /// What it added to the store, pages and archive.
    pub(super) stored_bytes: u64,
}

impl From<&Generation> for View {
    fn from(generation: &Generation) -> Self {
        Self {
            id: generation.id.to_string(),
            number: generation.id.number,
            parent: generation.parent.as_ref().map(ToString::to_string),
            time_ms: generation.time_ms,
            age_ms: age_ms(generation),
            label: generation.label.clone(),
            protected: generation.protected,
            origin: match generation.origin {
                Origin::Automatic => "automatic",
                Origin::Manual => "manual",
            },
            depth: generation.depth,
            logical_bytes: generation.logical_bytes,
            pages_stored: generation.pages_stored,
            stored_bytes: generation
                .page_bytes_stored
                .saturating_add(generation.archive_bytes_stored.saturating_mul(2)),
        }
    }
}

/// How old a generation is, in milliseconds; 0 if the clock was set back since.
pub(super) fn age_ms(generation: &Generation) -> u64 {
    now_ms().saturating_sub(generation.time_ms)
}

/// An age in words, as in "2m 5s".
pub(super) fn age(ms: u64) -> String {
    // Two units are enough: nobody wants the milliseconds of a day.
    let rounded = if ms < 60_000 { ms } else { ms / 1000 * 1000 };
    let words = humantime::format_duration(Duration::from_millis(rounded)).to_string();
    words.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

impl Lineage {
    /// The newest generation.
    pub(super) fn newest(&self) -> Option<Generation> {
        self.store.newest(&self.name)
    }

    /// All generations, the oldest first.
    pub(super) fn all(&self) -> Vec<Generation> {
        self.store.generations(&self.name)
    }

    /// Gives back the space of what was deleted, if that is worth its walk or `always`.
    pub(super) fn sweep(&self, always: bool) -> anyhow::Result<Option<SweepReport>> {
        if !always && !self.store.sweep_is_due() {
            return Ok(None);
        }
        let mut progress = Progress::new("giving space back");
        Ok(Some(self.store.sweep(&mut |nodes| progress.say(|| format!("{nodes} nodes")))?))
    }

    /// What the newest generation says of how generations are kept: for a VM that runs, and does not let its regions be read.
    fn learn_config(&mut self) {
        let newest = self.newest().and_then(|newest| self.store.reader(&newest.id).ok());
        let blob = newest.and_then(|reader| reader.blob(BLOB_CONFIG).ok().flatten());
        let config = blob.and_then(|bytes| serde_json::from_slice::<VmConfig>(&bytes).ok());
        self.config = config.map(|config| config.generations).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_named_by_number_or_in_full_and_not_that_of_another_vm() {
        for text in ["17", "@17", "web@17"] {
            assert_eq!(id("web", text).unwrap(), GenerationId::new("web", 17), "{text}");
        }
        for text in ["", "web", "shop@17", "web@x", "-1"] {
            assert!(id("web", text).is_err(), "{text}");
        }
        assert_eq!(vm_and_id("web").unwrap(), ("web".to_owned(), None));
        assert_eq!(vm_and_id("web@3").unwrap(), ("web".to_owned(), Some(GenerationId::new("web", 3))));
        assert!(vm_and_id("web@").is_err());
    }

    #[test]
    fn ages_have_two_units_at_most() {
        assert_eq!(age(90_061_000), "1day 1h");
        assert_eq!(age(1_250), "1s 250ms");
        assert_eq!(age(0), "0s");
    }
}
