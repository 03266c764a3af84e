use super::super::record::{Recorder, RecordingVfs};
use super::*;

/// A directory, and a process that works in it.
struct Scene {
    home: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("pool")).unwrap();
        Self { home }
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("pool")
    }

    fn process(&self) -> RecordingVfs {
        RecordingVfs::new(Arc::new(Recorder::open(&self.home.path().join("record")).unwrap()))
    }

    /// What a cut leaves of what `live` does after `before`.
    fn cut(&self, seed: u64, live: impl FnOnce(&dyn Vfs, &Path)) -> Loss {
        let image = Image::take(&self.root()).unwrap();
        live(&self.process(), &self.root());
        let record = fs::read(self.home.path().join("record")).unwrap();
        image.cut(&record, seed).unwrap()
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read(self.root().join(name)).ok().map(|bytes| String::from_utf8(bytes).unwrap())
    }
}

#[test]
fn what_was_synced_is_there_after_the_cut_and_nothing_else_is_certain() {
    for seed in [0, 1] {
        let scene = Scene::new();
        fs::write(scene.root().join("old"), "before").unwrap();
        fs::write(scene.root().join("gone"), "x").unwrap();
        let loss = scene.cut(seed, |vfs, root| {
            let file = vfs.open(&root.join("kept"), OpenMode::CreateNew).unwrap();
            file.write_all_at(b"synced", 0).unwrap();
            file.sync_data().unwrap();
            vfs.sync_dir(root).unwrap();
            file.write_all_at(b"SYN", 0).unwrap();
            let old = vfs.open(&root.join("old"), OpenMode::ReadWrite).unwrap();
            old.write_durable_at(b"B", 0).unwrap();
            old.write_all_at(b"E", 1).unwrap();
            vfs.open(&root.join("new"), OpenMode::CreateNew).unwrap().write_all_at(b"n", 0).unwrap();
            vfs.remove_file(&root.join("gone")).unwrap();
        });
        let all = seed == 1;
        assert_eq!(scene.read("kept").as_deref(), Some(if all { "SYNced" } else { "synced" }));
        assert_eq!(scene.read("old").as_deref(), Some(if all { "BEfore" } else { "Before" }));
        assert_eq!(scene.read("new").as_deref(), all.then_some("n"));
        assert_eq!(scene.read("gone").as_deref(), (!all).then_some("x"));
        assert_eq!(loss.lost > 0, !all, "{loss:?}");
        assert_eq!((loss.past_record_cached, loss.past_record_durable), (0, 0), "{loss:?}");
    }
}

#[test]
fn a_sync_that_did_not_return_makes_nothing_certain() {
    let scene = Scene::new();
    let image = Image::take(&scene.root()).unwrap();
    let file = scene.process().open(&scene.root().join("f"), OpenMode::CreateNew).unwrap();
    scene.process().sync_dir(&scene.root()).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    file.sync_data().unwrap();
    let record = fs::read(scene.home.path().join("record")).unwrap();
    let returned = Entry::encode(Kind::Synced, [0; 3], &[]).len();
    image.cut(&record[..record.len() - returned], 0).unwrap();
    assert_eq!(scene.read("f").as_deref(), Some(""));
}

/// Writes where the record does not see it.
fn write_raw(file: &dyn VfsFile, bytes: &[u8], offset: u64) {
    let mut raw = fs::File::from(file.descriptor().unwrap().try_clone_to_owned().unwrap());
    io::Seek::seek(&mut raw, io::SeekFrom::Start(offset)).unwrap();
    io::Write::write_all(&mut raw, bytes).unwrap();
}

#[test]
fn what_went_past_the_record_is_lost_unless_the_kernel_says_that_it_is_on_the_medium() {
    let scene = Scene::new();
    // Two files: the kernel tells by folios, which may be many pages.
    for name in ["ram", "swap"] {
        fs::write(scene.root().join(name), vec![b'.'; 4 * PAGE]).unwrap();
        fs::File::open(scene.root().join(name)).unwrap().sync_all().unwrap();
    }
    let loss = scene.cut(0, |vfs, root| {
        let [ram, swap] = ["ram", "swap"].map(|name| vfs.open(&root.join(name), OpenMode::ReadWrite).unwrap());
        write_raw(&*ram, b"flushed", 0);
        ram.sync_data().unwrap();
        write_raw(&*swap, b"cached", 2 * PAGE as u64);
    });
    let page = PAGE as u64;
    assert_eq!(loss, Loss { past_record_durable: page, past_record_cached: page, lost: page, lost_names: 0 });
    assert!(scene.read("ram").unwrap().starts_with("flushed."));
    assert_eq!(scene.read("swap").unwrap(), ".".repeat(4 * PAGE));
}

#[test]
fn files_outside_of_the_directory_are_nobodys_business() {
    let scene = Scene::new();
    let outside = scene.home.path().join("outside");
    scene.cut(0, |vfs, _| {
        let file = vfs.open(&outside, OpenMode::CreateNew).unwrap();
        file.write_all_at(b"there", 0).unwrap();
        file.set_len(3).unwrap();
    });
    assert_eq!(fs::read(outside).unwrap(), b"the");
}

#[test]
fn an_image_finds_data_wherever_it_lies() {
    let scene = Scene::new();
    let file = HostVfs.open(&scene.root().join("sparse"), OpenMode::CreateNew).unwrap();
    file.set_len(40 << 20).unwrap();
    let places = [0, 5000, (1 << 20) - 2, 7 << 20, (7 << 20) + (300 << 10), (40 << 20) - 1];
    places.iter().for_each(|at| file.write_all_at(b"x", *at).unwrap());
    let image = Image::take(&scene.root()).unwrap();
    // Everything is taken away: it must come back.
    file.set_len(0).unwrap();
    image.cut(&[], 0).unwrap();
    assert_eq!(file.len().unwrap(), 40 << 20);
    let mut byte = [0];
    for at in places {
        file.read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte, *b"x", "{at}");
    }
}
