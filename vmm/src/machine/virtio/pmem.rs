//! Persistent memory: a region of the pool, mapped into the guest, and whoever makes it durable when the guest asks.
//!
//! A thread of its own does that: a medium takes its time, and the device's thread must not wait for it (a freeze waits for that one). What the guest
//! writes meanwhile may or may not be part of it, as with any memory.

mod traced;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use allocator::{Dirty, Mapping, Region, RegionError};
use devices::virtio::{Durable, Pmem, PmemPlace};
use rustix::event::{EventfdFlags, eventfd};

use super::super::jail::{self, Role};
use super::super::memory::{GuestRam, HostMemory};
use super::Attachment;
use traced::Traced;

/// A region of the pool as the guest's persistent memory.
#[derive(Debug)]
pub struct PersistentMemory {
    region: Arc<Region>,
    mapping: Mapping,
    /// Whether an attempt to make it durable failed. Held while one is under way: one at a time.
    is_lost: Mutex<bool>,
    /// Who is told of what is made durable, where outages are simulated.
    traced: Option<Mutex<Traced>>,
}

impl PersistentMemory {
    /// Maps `region`.
    ///
    /// # Errors
    /// [`RegionError::Medium`].
    pub fn map(region: Arc<Region>) -> Result<Self, RegionError> {
        let mapping = region.map()?;
        let traced = Traced::begin(&region, &mapping)?.map(Mutex::new);
        Ok(Self { region, mapping, is_lost: Mutex::new(false), traced })
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// As [`Region::write_behind`].
    ///
    /// # Errors
    /// [`RegionError::Medium`].
    pub fn write_behind(&self, runs: &[Range<u64>]) -> Result<(), RegionError> {
        self.region.write_behind(&self.mapping, runs)
    }

    /// Makes durable all that was written so far. Waits for one that is under way.
    ///
    /// # Errors
    /// As the system says, now or at an earlier attempt: the kernel tells of what was lost once, so nothing is believed any more.
    pub fn persist(&self) -> io::Result<()> {
        let mut is_lost = self.is_lost.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_lost {
            return Err(io::Error::other(
                "an earlier flush failed: what it was to make durable may be lost, and no later one can make up for it",
            ));
        }
        if let Some(traced) = &self.traced {
            traced.lock().unwrap_or_else(PoisonError::into_inner).tell(&self.mapping);
        }
        let persisted = self.region.persist(&self.mapping, Dirty::Unknown);
        persisted.map(drop).map_err(|error| {
            *is_lost = true;
            tracing::error!("{}: a flush failed ({error}): none is believed from now on", self.region.name());
            io::Error::other(error)
        })
    }
}

// SAFETY: as for Mapping, which is kept here for as long as this, and unmapped only with it.
unsafe impl HostMemory for Arc<PersistentMemory> {
    fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    fn len(&self) -> usize {
        self.mapping.len()
    }
}

/// Persistent memory number `number`, which `ram` has placed.
///
/// # Errors
/// As the system says.
pub fn attach(number: usize, ram: &GuestRam, memory: &Arc<PersistentMemory>) -> io::Result<Attachment> {
    let (_, range) = ram.pmem_ranges().nth(number).ok_or(io::ErrorKind::NotFound)?;
    let place = PmemPlace { start: range.guest_address, size: range.length };
    let id = format!("pmem{number}");
    let (flusher, source) = Flusher::start(&id, Arc::clone(memory))?;
    Ok(Attachment { id, device: Box::new(Pmem::new(place, Box::new(flusher))), sources: vec![source] })
}

#[derive(Default)]
struct Orders {
    /// What is to be done next.
    asked: Option<u64>,
    done: Option<(u64, io::Result<()>)>,
    is_over: bool,
}

struct Desk {
    orders: Mutex<Orders>,
    news: Condvar,
    /// Rings when something is done.
    bell: OwnedFd,
}

impl Desk {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: does what is asked, until it is over.
    fn serve(&self, memory: &PersistentMemory) {
        let mut orders = self.orders();
        while !orders.is_over {
            let Some(token) = orders.asked.take() else {
                orders = self.news.wait(orders).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(orders);
            let result = memory.persist();
            orders = self.orders();
            orders.done = Some((token, result));
            // Nobody reads it, and it takes 2^64 flushes to fill it.
            let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        }
    }
}

/// The thread that makes durable what the guest asks for. It ends when this is dropped.
struct Flusher {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    fn start(name: &str, memory: Arc<PersistentMemory>) -> io::Result<(Self, OwnedFd)> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let source = bell.try_clone()?;
        let desk = Arc::new(Desk { orders: Mutex::default(), news: Condvar::new(), bell });
        let shared = Arc::clone(&desk);
        let thread = jail::spawn(format!("{name}-flush"), Role::Flush, move || shared.serve(&memory))?;
        Ok((Self { desk, thread: Some(thread) }, source))
    }
}

impl Durable for Flusher {
    fn begin(&mut self, token: u64) {
        self.desk.orders().asked = Some(token);
        self.desk.news.notify_all();
    }

    fn done(&mut self) -> Option<(u64, io::Result<()>)> {
        self.desk.orders().done.take()
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.desk.orders().is_over = true;
        self.desk.news.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use allocator::{Kind, MediumKind, Pool, RegionSpec};
    use vfs::host::HostVfs;

    use super::super::super::memory::{Anonymous, Pmem as Placed};
    use super::*;

    const SIZE: u64 = 2 << 20;

    /// A region of a fresh pool on `medium`.
    fn region(directory: &std::path::Path, medium: MediumKind) -> Arc<Region> {
        let pool = Pool::create_or_open(directory, Arc::new(HostVfs)).unwrap();
        let name = "web/log".parse().unwrap();
        pool.allocate(&name, RegionSpec { kind: Kind::Pmem, size: SIZE, medium: Some(medium) }).unwrap();
        Arc::new(Region::open(pool.lease(&name).unwrap()).unwrap())
    }

    fn write(memory: &PersistentMemory, offset: usize, byte: u8) {
        assert!(offset < memory.mapping.len());
        // SAFETY: within the mapping, of which there are no references.
        unsafe { memory.mapping.as_ptr().add(offset).write_volatile(byte) };
    }

    fn wait(flusher: &mut Flusher) -> (u64, io::Result<()>) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match flusher.done() {
                Some(done) => return done,
                None => assert!(Instant::now() < deadline, "it is done some time"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_the_guest_wrote_before_a_flush_is_in_the_region_after_it() {
        for medium in [MediumKind::File, MediumKind::Nvdimm] {
            let directory = tempfile::tempdir().unwrap();
            let region = region(directory.path(), medium);
            let memory = Arc::new(PersistentMemory::map(Arc::clone(&region)).unwrap());
            let (mut flusher, source) = Flusher::start("pmem0", Arc::clone(&memory)).unwrap();
            for token in 1..=3_u8 {
                write(&memory, 4096 * usize::from(token), token);
                flusher.begin(token.into());
                let (done, result) = wait(&mut flusher);
                assert_eq!((done, result.is_ok()), (token.into(), true));
                let mut byte = [0];
                region.read_at(&mut byte, 4096 * u64::from(token)).unwrap();
                assert_eq!(byte, [token], "{medium}");
            }
            let mut rings = [0; 8];
            rustix::io::read(&source, &mut rings).unwrap();
            assert_eq!(u64::from_ne_bytes(rings), 3);
        }
    }

    #[test]
    fn where_outages_are_simulated_what_was_flushed_outlives_a_cut_though_its_neighbour_was_written_since() {
        for medium in [MediumKind::File, MediumKind::Nvdimm] {
            assert!(traced::is_told(medium));
            assert!(matches!(what_a_cut_leaves(medium), None | Some([1, 0])), "{medium}");
        }
    }

    /// Of two bytes of a page, the first of which was flushed, as a cut leaves them that takes all that it can; `None` before Linux 6.5, which does not tell of
    /// what went past the record.
    fn what_a_cut_leaves(medium: MediumKind) -> Option<[u8; 2]> {
        use vfs::cut::{image::Image, record::Recorder, record::RecordingVfs, trace::Trace};
        let home = tempfile::tempdir().unwrap();
        let (root, record) = (home.path().join("pool"), home.path().join("record"));
        std::fs::create_dir(&root).unwrap();
        drop(region(&root, medium));
        let taken = Image::take(&root).unwrap();
        let recorder = Arc::new(Recorder::open(&record).unwrap());
        let pool = Pool::open(&root, Arc::new(RecordingVfs::new(Arc::clone(&recorder)))).unwrap();
        let region = Arc::new(Region::open(pool.lease(&"web/log".parse().unwrap()).unwrap()).unwrap());
        let mut memory = PersistentMemory::map(Arc::clone(&region)).unwrap();
        let trace = Trace::new(recorder, region.path());
        memory.traced = Some(Mutex::new(Traced::new(trace, &region, &memory.mapping).unwrap()));
        write(&memory, 4096, 1);
        memory.persist().unwrap();
        write(&memory, 4097, 2);
        if medium == MediumKind::Nvdimm {
            // A flush that is on its way: it writes anew what is on the medium already.
            let (file, part) = region.share_file().unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[1, 2], part.start + 4096).unwrap();
        }
        match taken.cut(&std::fs::read(record).unwrap(), 0) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return None,
            other => other.unwrap(),
        };
        let mut bytes = [0; 2];
        region.read_at(&mut bytes, 4096).unwrap();
        Some(bytes)
    }

    #[test]
    fn it_is_placed_where_the_device_says() {
        let directory = tempfile::tempdir().unwrap();
        let memory = Arc::new(PersistentMemory::map(region(directory.path(), MediumKind::File)).unwrap());
        let placed = Placed { name: "log".to_owned(), host: Box::new(Arc::clone(&memory)) };
        let ram = GuestRam::place_with(Box::new(Anonymous::new(1 << 20).unwrap()), vec![placed]).unwrap();
        let attachment = attach(0, &ram, &memory).unwrap();
        let mut config = [0; 16];
        attachment.device.read_config(0, &mut config);
        let expected = u128::from(4_u64 << 30) | u128::from(SIZE) << 64;
        assert_eq!((u128::from_le_bytes(config), attachment.id.as_str()), (expected, "pmem0"));
        assert!(attach(1, &ram, &memory).is_err());
    }
}
