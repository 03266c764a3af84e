//! Where outages are simulated: a pool of the simulator's own, which is the only thing that loses anything.

use std::io;
use std::path::{Path, PathBuf};

use vfs::cut::image::{Image, Loss};
use vfs::{HostVfs, OpenMode, Vfs};

use super::OutageError;

/// A directory that goes when this is dropped.
#[derive(Debug)]
pub(super) struct Ground {
    directory: PathBuf,
    /// The pool as it was before the processes that run now were started.
    image: Option<Image>,
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> OutageError {
    move |source| OutageError::System { doing, source }
}

impl Ground {
    /// Makes that of a machine, which has this number among those of this process, below `parent`, which is made if it is not there.
    pub(super) fn create(parent: &Path, machine: usize) -> Result<Self, OutageError> {
        let directory = parent.join(format!("outage-{}-{machine}", std::process::id()));
        std::fs::create_dir_all(directory.join("pool")).map_err(system("make the simulator's directory"))?;
        let ground = Self { directory, image: None };
        match tells_what_is_durable(&ground.directory.join("probe"))
            .map_err(system("write to the simulator's directory"))?
        {
            true => Ok(ground),
            false => Err(OutageError::Untold(parent.to_owned())),
        }
    }

    /// The pool in it.
    pub(super) fn pool(&self) -> PathBuf {
        self.directory.join("pool")
    }

    /// What processes record their operations in.
    pub(super) fn record(&self) -> PathBuf {
        self.directory.join("record")
    }

    /// From now on the pool is as durable as it is; no process may have it.
    pub(super) fn settle(&mut self) -> Result<(), OutageError> {
        match std::fs::remove_file(self.record()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(system("begin a new record")(error));
            }
            _ => {}
        }
        // The pool that is there before is the only one: two of them may be much memory.
        self.image = None;
        self.image = Some(Image::take(&self.pool()).map_err(system("read the pool"))?);
        Ok(())
    }

    /// Takes from the pool what the cut takes. All processes must have ended.
    pub(super) fn lose(&mut self, seed: u64) -> Result<Loss, OutageError> {
        let record = match std::fs::read(self.record()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other,
        };
        let record = record.map_err(system("read the record"))?;
        match self.image.take() {
            Some(image) => image.cut(&record, seed).map_err(system("take from the pool what a cut takes")),
            None => Ok(Loss::default()),
        }
    }
}

/// Whether the kernel says of a file what of it is on its medium, and what only in the page cache.
fn tells_what_is_durable(probe: &Path) -> io::Result<bool> {
    let file = HostVfs.open(probe, OpenMode::CreateTruncate)?;
    let told = |dirty: bool| (0..3).any(|_| file.cached(0, 1).is_some_and(|cached| (cached.dirty > 0) == dirty));
    file.write_all_at(b"?", 0)?;
    let cached = told(true);
    file.sync_data()?;
    Ok(cached && told(false))
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!("{} is left behind: {error}", self.directory.display());
        }
        // Only if it was made for this, and is empty.
        if let Some(parent) = self.directory.parent() {
            let _ = std::fs::remove_dir(parent);
        }
    }
}
