//! The host's end of a guest's sockets: UNIX sockets.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::virtio::vsock::{Change, StreamId};
use devices::virtio::{Vsock, VsockHost};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::super::config::vsock::VsockConfig;
use super::Attachment;

/// Why there are no sockets.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("--vsock {0}: somebody listens there already: each VM needs a path of its own")]
    InUse(PathBuf),
    /// Something else lies there.
    #[error("--vsock {0}: there is a file that is no socket; it is left alone")]
    NoSocket(PathBuf),
    /// The system.
    #[error("--vsock {path}: cannot {doing}")]
    System {
        /// Where.
        path: PathBuf,
        /// What.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A guest's sockets, as `listener` has them.
pub(super) fn attach(config: &VsockConfig, listener: &Arc<Listener>) -> Result<Attachment, SocketError> {
    let system = |doing| {
        let path = config.socket.clone();
        move |source: io::Error| SocketError::System { path, doing, source }
    };
    let sockets = UnixSockets::new(Arc::clone(listener)).map_err(system("wait for connections"))?;
    let source = sockets.poll.as_fd().try_clone_to_owned().map_err(system("duplicate a descriptor"))?;
    let device = Vsock::new(config.cid, Box::new(sockets));
    Ok(Attachment { id: "vsock".to_owned(), device: Box::new(device), sources: vec![source] })
}

/// Where programs of the host connect. Dropping it removes the socket.
#[derive(Debug)]
pub(super) struct Listener {
    path: PathBuf,
    listener: UnixListener,
}

impl Listener {
    /// Listens at `path`, where nobody else does.
    pub(super) fn open(path: &Path) -> Result<Arc<Self>, SocketError> {
        let system = |doing| move |source| SocketError::System { path: path.to_owned(), doing, source };
        make_way(path)?;
        let listener = UnixListener::bind(path).map_err(system("listen"))?;
        listener.set_nonblocking(true).map_err(system("listen without waiting"))?;
        Ok(Arc::new(Self { path: path.to_owned(), listener }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The token of the listener; streams count from 1.
const LISTENER: u64 = 0;
/// Events taken at a time.
const EVENTS: usize = 32;

struct UnixSockets {
    listener: Arc<Listener>,
    /// All of them behind one descriptor.
    poll: OwnedFd,
    streams: BTreeMap<StreamId, UnixStream>,
    next: u64,
}

impl UnixSockets {
    fn new(listener: Arc<Listener>) -> io::Result<Self> {
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        // Edges, here as for streams: what the guest has no room for now must not be told again and again.
        epoll::add(&poll, &listener.listener, EventData::new_u64(LISTENER), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { listener, poll, streams: BTreeMap::new(), next: LISTENER + 1 })
    }

    fn add(&mut self, stream: UnixStream) -> io::Result<StreamId> {
        let id = self.next;
        let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.poll, &stream, EventData::new_u64(id), changes)?;
        self.next += 1;
        self.streams.insert(StreamId(id), stream);
        Ok(StreamId(id))
    }

    fn stream(&mut self, id: StreamId) -> io::Result<&mut UnixStream> {
        self.streams.get_mut(&id).ok_or_else(|| ErrorKind::NotConnected.into())
    }
}

/// Removes the socket that a process left which is gone. (One that was frozen had no time for it.)
fn make_way(path: &Path) -> Result<(), SocketError> {
    let system = |doing| move |source| SocketError::System { path: path.to_owned(), doing, source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("look at what is there")(error)),
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Ok(_) => return Err(SocketError::InUse(path.to_owned())),
        Err(error) => return Err(system("tell whether somebody listens there")(error)),
    }
    std::fs::remove_file(path).map_err(system("remove the socket that was left there"))
}

impl VsockHost for UnixSockets {
    fn changes(&mut self, changes: &mut Vec<Change>) -> io::Result<bool> {
        let mut events = Vec::with_capacity(EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            // Copied out: the system's layout is packed.
            let (data, flags) = (event.data, event.flags);
            changes.push(match data.u64() {
                LISTENER => Change::Arrival,
                id => Change::Stream { id: StreamId(id), is_gone: flags.intersects(EventFlags::HUP | EventFlags::ERR) },
            });
        }
        Ok(events.len() == EVENTS)
    }

    fn accept(&mut self) -> io::Result<StreamId> {
        let (stream, _) = self.listener.listener.accept()?;
        stream.set_nonblocking(true)?;
        self.add(stream)
    }

    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        let mut path = self.listener.path.as_os_str().as_bytes().to_vec();
        path.extend(format!("_{port}").bytes());
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Connected at once, or not at all: EAGAIN says that whoever listens does not keep up.
        rustix::net::connect(&socket, &address)?;
        self.add(socket.into())
    }

    fn read(&mut self, stream: StreamId, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream(stream)?.read(bytes)
    }

    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize> {
        self.stream(stream)?.write(bytes)
    }

    fn finish(&mut self, stream: StreamId) {
        if let Ok(stream) = self.stream(stream) {
            // It fails where the other side is gone, which is then as well.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn close(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(path: &Path) -> Result<UnixSockets, SocketError> {
        Ok(UnixSockets::new(Listener::open(path)?).unwrap())
    }

    fn changes(sockets: &mut UnixSockets) -> Vec<Change> {
        let mut changes = Vec::new();
        while sockets.changes(&mut changes).unwrap() {}
        changes
    }

    #[test]
    fn who_connects_is_told_once_and_bytes_and_ends_are_as_well() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut sockets = listen(&path).unwrap();
        let mut outside = UnixStream::connect(&path).unwrap();
        assert_eq!(changes(&mut sockets), [Change::Arrival]);
        assert_eq!(changes(&mut sockets), []);
        let id = sockets.accept().unwrap();
        assert_eq!(sockets.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        changes(&mut sockets);
        outside.write_all(b"hello").unwrap();
        assert_eq!(changes(&mut sockets), [Change::Stream { id, is_gone: false }]);
        let mut bytes = [0; 9];
        assert_eq!(sockets.read(id, &mut bytes).unwrap(), 5);
        assert_eq!(sockets.read(id, &mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
        outside.shutdown(Shutdown::Write).unwrap();
        assert_eq!(changes(&mut sockets), [Change::Stream { id, is_gone: false }]);
        assert_eq!(sockets.read(id, &mut bytes).unwrap(), 0);
        assert_eq!(sockets.write(id, b"bye").unwrap(), 3);
        sockets.finish(id);
        let mut text = String::new();
        outside.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bye");
        drop(outside);
        assert_eq!(changes(&mut sockets), [Change::Stream { id, is_gone: true }]);
        sockets.close(id);
        assert!(sockets.read(id, &mut bytes).is_err());
    }

    #[test]
    fn the_guest_reaches_who_listens_at_the_path_of_the_port() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut sockets = listen(&path).unwrap();
        assert!(sockets.connect(52).is_err());
        let listener = UnixListener::bind(directory.path().join("s_52")).unwrap();
        let id = sockets.connect(52).unwrap();
        sockets.write(id, b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_socket_that_was_left_is_replaced_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let sockets = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::InUse(_))));
        drop(sockets);
        assert!(!path.exists());
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
