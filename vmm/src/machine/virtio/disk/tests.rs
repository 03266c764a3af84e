use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use devices::virtio::block::{Buffers, Completion, Operation, Segment, Token};
use devices::virtio::{GuestMemory, Memory};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::jail;

const WORKERS: [Worker; 2] = [Worker::IoUring, Worker::Threads];
/// Where the image begins in its file, and how long it is.
const START: u64 = 8192;
const LENGTH: u64 = 1 << 20;

struct Lab {
    backend: Box<dyn BlockBackend>,
    source: OwnedFd,
    memory: Memory,
    image: Arc<Image>,
    file: File,
    _dir: tempfile::TempDir,
}

impl Lab {
    fn new(worker: Worker) -> Self {
        Self::with(worker, Blocks::GiveBack)
    }

    fn with(worker: Worker, blocks: Blocks) -> Self {
        let (image, file, dir) = Self::image(blocks);
        let (backend, source) = open(worker, &image).unwrap();
        Self::of(backend, source, image, file, dir)
    }

    fn image(blocks: Blocks) -> (Arc<Image>, File, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(START + LENGTH + 4096).unwrap();
        let part = START..START + LENGTH;
        let image = Image::new("data".to_owned(), file.try_clone().unwrap(), part, blocks).unwrap();
        (Arc::new(image.watched()), file, dir)
    }

    fn of(
        backend: Box<dyn BlockBackend>,
        source: OwnedFd,
        image: Arc<Image>,
        file: File,
        dir: tempfile::TempDir,
    ) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap();
        Self { backend, source, memory: Memory::new(Arc::new(memory)), image, file, _dir: dir }
    }

    fn write(&mut self, token: u32, at: u64, segments: &[Segment], durable: bool) {
        let memory = self.memory.clone();
        let buffers = Buffers { memory: &memory, segments };
        self.backend.submit(Token(token), Operation::Write { at, buffers, durable });
    }

    fn read(&mut self, token: u32, at: u64, segments: &[Segment]) {
        let memory = self.memory.clone();
        self.backend.submit(Token(token), Operation::Read { at, buffers: Buffers { memory: &memory, segments } });
    }

    /// Waits for so many completions.
    fn completions(&mut self, count: usize) -> Vec<Completion> {
        self.backend.start();
        let (mut completed, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
        self.backend.take_completed(&mut completed);
        while completed.len() < count {
            assert!(self.backend.wait(Some(deadline)), "{} of {count} completed", completed.len());
            self.backend.take_completed(&mut completed);
        }
        completed.sort_by_key(|completion| completion.token);
        completed
    }

    fn succeed(&mut self, count: usize) {
        let completed = self.completions(count);
        assert_eq!(completed.len(), count);
        for (index, Completion { token, result }) in completed.iter().enumerate() {
            assert_eq!((token.0 as usize, result.as_ref().ok()), (index, Some(&())), "{result:?}");
        }
    }

    /// Whether the source becomes ready within so many seconds.
    fn source_is_ready(&self, seconds: i64) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.source, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: seconds, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 1
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, START + at).unwrap();
        bytes
    }
}

/// A disk on persistent memory was never read: `io_uring` gave up each time.
#[test]
fn io_uring_waits_for_the_device_however_the_file_was_opened() {
    let (image, file, _dir) = Lab::image(Blocks::GiveBack);
    let nonblocking = || rustix::fs::fcntl_getfl(&file).unwrap().contains(rustix::fs::OFlags::NONBLOCK);
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK).unwrap();
    assert!(nonblocking());
    let _worker = open(Worker::IoUring, &image).unwrap();
    assert!(!nonblocking());
}

/// As a device's thread listens: for edges, and it sleeps between them.
#[test]
fn what_completes_after_it_was_looked_for_is_an_edge_of_the_source() {
    use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        let thread = epoll::create(CreateFlags::CLOEXEC).unwrap();
        let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&thread, &lab.source, EventData::new_u64(0), changes).unwrap();
        let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        for round in 0..500 {
            // Some are done at once, and some by others, a flush among them.
            lab.write(0, 512 * (round % 100), &[segment(0, 512)], round % 10 == 0);
            lab.read(1, 4096, &[segment(4096, 512)]);
            lab.backend.start();
            let mut completed = Vec::new();
            lab.backend.take_completed(&mut completed);
            while completed.len() < 2 {
                let mut events = Vec::with_capacity(1);
                let woken = epoll::wait(&thread, rustix::buffer::spare_capacity(&mut events), Some(&limit));
                assert_ne!(woken, Ok(0), "{worker:?}, round {round}: {} of 2", completed.len());
                lab.backend.take_completed(&mut completed);
            }
        }
    }
}

/// From now on this thread, and those that it starts, get EPERM of `io_uring_setup`, as from a container's seccomp filter.
fn refuse_io_uring() {
    let filter = jail::answered(libc::SYS_io_uring_setup, Vec::new(), libc::EPERM).unwrap();
    // Also sets "no new privileges".
    seccompiler::apply_filter(&filter).unwrap();
}

#[test]
fn threads_do_the_io_where_io_uring_is_refused() {
    let refused = std::thread::spawn(|| {
        refuse_io_uring();
        let (image, file, dir) = Lab::image(Blocks::GiveBack);
        let error = open(Worker::IoUring, &image).err().expect("it is refused");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let (backend, source) = backend(&image).expect("threads instead");
        let mut lab = Lab::of(backend, source, image, file, dir);
        lab.memory.write_slice(&[7; 1024], GuestAddress(0)).unwrap();
        lab.write(0, 512, &[segment(0, 1024)], true);
        lab.succeed(1);
        assert_eq!(lab.bytes(512, 1024), [7; 1024]);
        lab.read(0, 512, &[segment(8192, 1024)]);
        lab.succeed(1);
        let mut read = [0; 1024];
        lab.memory.read_slice(&mut read, GuestAddress(8192)).unwrap();
        assert_eq!(read, [7; 1024]);
    });
    refused.join().unwrap();
}

fn segment(address: u64, length: u32) -> Segment {
    Segment { address: GuestAddress(address), length }
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_from_there_piece_by_piece() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        let bytes: Vec<u8> = (0..10_240_u32).map(|at| ((at * 31) >> 3) as u8).collect();
        lab.memory.write_slice(&bytes, GuestAddress(0x1001)).unwrap();
        // The second piece goes over the border of two mappings.
        let border = (1 << 20) - 5;
        lab.memory.write_slice(&bytes[7..4096], GuestAddress(border)).unwrap();
        lab.write(0, 512, &[segment(0x1001, 7), segment(border, 4089), segment(0x1001 + 4096, 6144)], false);
        lab.succeed(1);
        assert_eq!(lab.bytes(512, 10_240), bytes);
        assert_eq!((lab.bytes(0, 512), lab.bytes(10_752, 100)), (vec![0; 512], vec![0; 100]));
        lab.read(0, 512 + 512, &[segment(0x8003, 1), segment(0x9000, 9727)]);
        lab.succeed(1);
        let mut read = vec![0; 9728];
        lab.memory.read_slice(&mut read[..1], GuestAddress(0x8003)).unwrap();
        lab.memory.read_slice(&mut read[1..], GuestAddress(0x9000)).unwrap();
        assert_eq!(read, bytes[512..]);
    }
}

#[test]
fn a_thousand_requests_at_a_time_all_complete_once_and_ring() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        for index in 0..1024_u32 {
            lab.memory.write_obj(index, GuestAddress(u64::from(index) * 512)).unwrap();
            lab.write(index, u64::from(index) * 512, &[segment(u64::from(index) * 512, 512)], false);
        }
        // Nothing was taken yet.
        lab.backend.start();
        assert!(lab.source_is_ready(20));
        lab.succeed(1024);
        for index in 0..1024_u32 {
            lab.read(index, u64::from(1023 - index) * 512, &[segment((1 << 20) + u64::from(index) * 512, 512)]);
            assert_eq!(lab.bytes(u64::from(index) * 512, 4), index.to_le_bytes());
        }
        lab.succeed(1024);
        for index in 0..1024_u32 {
            let read: u32 = lab.memory.read_obj(GuestAddress((1 << 20) + u64::from(index) * 512)).unwrap();
            assert_eq!(read, 1023 - index);
        }
        assert!(!lab.backend.wait(Some(Instant::now())), "nothing is left");
    }
}

#[test]
fn flushes_and_durable_writes_complete_however_many_there_are() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        for index in 0..60 {
            match index % 3 {
                0 => lab.backend.submit(Token(index), Operation::Flush),
                1 => lab.write(index, u64::from(index) * 512, &[segment(0, 512)], true),
                _ => lab.write(index, u64::from(index) * 512, &[segment(0, 512)], false),
            }
            if index % 7 == 0 {
                lab.backend.start();
            }
        }
        lab.succeed(60);
        lab.image.flush().unwrap();
    }
}

#[test]
fn a_file_that_is_shorter_than_its_image_fails_the_read_and_the_next_one_is_done() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        lab.file.set_len(START + 4096).unwrap();
        lab.read(0, 4096 - 512, &[segment(0, 1024)]);
        lab.read(1, 4096 - 512, &[segment(0, 512)]);
        let completed = lab.completions(2);
        assert_eq!(completed[0].result.as_ref().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(completed[1].result.is_ok());
    }
}

#[test]
fn after_a_failed_flush_every_later_one_fails_and_so_does_the_freezes() {
    for worker in WORKERS {
        // A descriptor without a disk behind it is the one thing on any machine whose fdatasync fails.
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let image = Image::new("pipe".to_owned(), File::from(reader), 0..LENGTH, Blocks::Keep).unwrap();
        let mut lab = Lab::new(worker);
        lab.image = Arc::new(image);
        (lab.backend, lab.source) = open(worker, &lab.image).unwrap();
        lab.backend.submit(Token(0), Operation::Flush);
        assert!(lab.completions(1)[0].result.is_err());
        assert!(lab.image.is_believed().is_err());
        lab.backend.submit(Token(0), Operation::Flush);
        lab.backend.submit(Token(1), Operation::Flush);
        for completion in lab.completions(2) {
            assert!(completion.result.unwrap_err().to_string().contains("an earlier flush failed"));
        }
        assert!(lab.image.flush().unwrap_err().to_string().contains("an earlier flush failed"));
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_a_regions_blocks_stay_its_own() {
    use std::os::unix::fs::MetadataExt;
    for worker in WORKERS {
        for blocks in [Blocks::Keep, Blocks::GiveBack] {
            let mut lab = Lab::with(worker, blocks);
            let full = vec![0xee; LENGTH as usize];
            lab.file.write_all_at(&full, START).unwrap();
            lab.file.sync_all().unwrap();
            let before = lab.file.metadata().unwrap().blocks();
            lab.backend.submit(Token(0), Operation::Discard(4096..LENGTH / 2));
            lab.backend.submit(Token(1), Operation::WriteZeroes { range: LENGTH / 2..LENGTH - 512, unmap: false });
            let completed = lab.completions(2);
            if completed.iter().any(|completion| {
                completion.result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Unsupported)
            }) {
                // A file system without it: the guest is told, and writes zeros itself.
                continue;
            }
            assert!(completed.iter().all(|completion| completion.result.is_ok()), "{completed:?}");
            assert_eq!(lab.bytes(0, 4096), full[..4096]);
            assert_eq!(lab.bytes(4096, LENGTH as usize - 4096 - 512), vec![0; LENGTH as usize - 4096 - 512]);
            assert_eq!(lab.bytes(LENGTH - 512, 512), full[..512]);
            lab.file.sync_all().unwrap();
            let after = lab.file.metadata().unwrap().blocks();
            assert_eq!(after < before, blocks == Blocks::GiveBack, "{before} → {after}");
        }
    }
}

#[test]
fn a_disk_that_is_dropped_leaves_the_guests_memory_alone() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        for index in 0..200 {
            lab.read(index, u64::from(index) * 4096, &[segment(0, 4096)]);
        }
        lab.backend.submit(Token(200), Operation::Flush);
        lab.backend.start();
        let Lab { backend, memory, .. } = lab;
        drop(backend);
        drop(memory);
    }
}

#[test]
fn a_disk_that_is_not_written_needs_no_flush() {
    for worker in WORKERS {
        let mut lab = Lab::new(worker);
        let file = File::open("/proc/self/exe").unwrap();
        lab.image = Arc::new(Image::read_only("exe".to_owned(), file, 4096));
        (lab.backend, lab.source) = open(worker, &lab.image).unwrap();
        lab.read(0, 0, &[segment(0, 512)]);
        lab.backend.submit(Token(1), Operation::Flush);
        lab.succeed(2);
        let magic: u32 = lab.memory.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(magic.to_le_bytes(), *b"\x7fELF");
        lab.image.flush().unwrap();
    }
}

/// Some writes, of few different bytes, and zeros, anywhere.
fn write_anywhere(lab: &mut Lab, random: &mut u64) {
    let mut next = |below: u64| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % below
    };
    for token in 0..8 {
        let (sector, length, byte) = (next(LENGTH / 512 - 40), 512 * (1 + next(40)), next(4) as u8);
        let memory = token * 0x1_0000;
        lab.memory.write_slice(&vec![byte; length as usize], GuestAddress(memory)).unwrap();
        if next(5) == 0 {
            let range = sector * 512..sector * 512 + length;
            lab.backend.submit(Token(token as u32), Operation::WriteZeroes { range, unmap: true });
        } else {
            lab.write(token as u32, sector * 512, &[segment(memory, length as u32)], false);
        }
    }
    // Zeros may be unsupported here: whatever became of them, the file has it.
    lab.completions(8);
}

#[test]
fn a_moment_of_a_disk_is_what_it_was_whatever_the_guest_writes_while_it_is_stored() {
    for worker in WORKERS {
        let mut lab = Lab::with(worker, Blocks::Keep);
        let (mut stored, mut random) = (vec![0; LENGTH as usize], 12_345);
        for generation in 0..30 {
            write_anywhere(&mut lab, &mut random);
            let then = lab.bytes(0, LENGTH as usize);
            let moment = Moment::begin(&lab.image).unwrap();
            assert_eq!(moment.base().is_none(), generation == 0);
            let mut pages = moment.pages().clone();
            if generation == 0 {
                pages = moment.data().unwrap();
            }
            assert!(generation == 0 || pages.count() < pages.bound(), "what did not change is not told");
            write_anywhere(&mut lab, &mut random);
            if generation % 4 == 3 {
                // Given up: its pages are the next one's.
                continue;
            }
            let mut copy = stored.clone();
            for (index, first) in pages.runs().flat_map(|run| run.step_by(3)).enumerate() {
                let count = (first..first + 3).take_while(|page| pages.contains(*page)).count();
                let at = first as usize * 4096;
                moment.take(first, &mut copy[at..at + count * 4096]).unwrap();
                if index % 5 == 0 {
                    write_anywhere(&mut lab, &mut random);
                }
            }
            moment.check().unwrap();
            assert!(copy == then, "generation {generation}");
            moment.stored(&format!("web@{generation}"));
            stored = copy;
        }
    }
}

#[test]
fn what_cannot_be_copied_any_more_has_no_generation_and_what_cannot_be_built_on_is_not() {
    let mut lab = Lab::with(Worker::IoUring, Blocks::Keep);
    let all = LENGTH / 4096;
    Moment::begin(&lab.image).unwrap().stored("web@1");
    lab.write(0, 0, &[segment(0, 4096)], false);
    lab.succeed(1);
    let moment = Moment::begin(&lab.image).unwrap();
    assert_eq!((moment.base(), moment.pages().count()), (Some("web@1"), 1));
    moment.forget_base();
    drop(moment);
    let moment = Moment::begin(&lab.image).unwrap();
    assert_eq!((moment.base(), moment.pages().count()), (None, all));
    // The file cannot be read any more where it is overwritten.
    lab.file.set_len(START).unwrap();
    lab.write(0, 0, &[segment(0, 4096)], false);
    lab.completions(1);
    assert!(moment.check().is_err() && moment.take(1, &mut [0; 4096]).is_err());
}

#[test]
fn where_outages_are_simulated_what_was_flushed_outlives_a_cut_though_its_neighbour_was_written_since() {
    use vfs::cut::{image, record::Recorder, trace::Trace};
    let home = tempfile::tempdir().unwrap();
    let (root, record) = (home.path().join("pool"), home.path().join("record"));
    std::fs::create_dir(&root).unwrap();
    let path = root.join("image");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(START + LENGTH).unwrap();
    file.write_all_at(&[7; 4096], START + 4096).unwrap();
    file.sync_all().unwrap();
    let taken = image::Image::take(&root).unwrap();
    let trace = Trace::new(Arc::new(Recorder::open(&record).unwrap()), &path);
    let image = Image::new("data".to_owned(), file.try_clone().unwrap(), START..START + LENGTH, Blocks::Keep).unwrap();
    let image = Arc::new(image.watched().traced(Some(trace)));
    let (backend, source) = backend(&image).unwrap();
    let mut lab = Lab::of(backend, source, image, file, home);
    lab.memory.write_slice(&[1; 1024], GuestAddress(0)).unwrap();
    lab.write(0, 0, &[segment(0, 512)], true);
    lab.succeed(1);
    lab.backend.submit(Token(0), Operation::WriteZeroes { range: 4096..4608, unmap: false });
    lab.succeed(1);
    lab.backend.submit(Token(0), Operation::Flush);
    lab.succeed(1);
    // Not flushed: in the same pages.
    lab.write(0, 512, &[segment(512, 512)], false);
    lab.succeed(1);
    lab.backend.submit(Token(0), Operation::WriteZeroes { range: 4608..5120, unmap: false });
    lab.succeed(1);
    taken.cut(&std::fs::read(record).unwrap(), 0).unwrap();
    assert_eq!((lab.bytes(0, 512), lab.bytes(512, 512)), (vec![1; 512], vec![0; 512]));
    assert_eq!((lab.bytes(4096, 512), lab.bytes(4608, 512)), (vec![0; 512], vec![7; 512]));
}
