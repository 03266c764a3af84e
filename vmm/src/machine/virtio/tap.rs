//! The host's end of a network card: a tap, which somebody made for the VM.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use devices::virtio::net::HEADER;
use devices::virtio::{Net, Offloads, Piece, Tap};
use rustix::fs::{Mode, OFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::volatile_memory::{PtrGuard, PtrGuardMut};

use super::super::config::net::NetConfig;
use super::Attachment;

/// `linux/if_tun.h`.
mod tun {
    pub(super) const SET_INTERFACE: libc::Ioctl = 0x4004_54ca;
    pub(super) const SET_OFFLOAD: libc::Ioctl = 0x4004_54d0;
    pub(super) const SET_HEADER_SIZE: libc::Ioctl = 0x4004_54d8;
    pub(super) const TAP: libc::c_short = 0x0002;
    pub(super) const NO_PACKET_INFORMATION: libc::c_short = 0x1000;
    pub(super) const VIRTIO_HEADER: libc::c_short = 0x4000;
    pub(super) const CHECKSUM: libc::c_ulong = 1;
    pub(super) const TSO4: libc::c_ulong = 1 << 1;
    pub(super) const TSO6: libc::c_ulong = 1 << 2;
    pub(super) const TSO_ECN: libc::c_ulong = 1 << 3;
}

/// Why a card has no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No such interface.
    #[error(
        "--net tap={0}: there is no such network interface; `ip tuntap add {0} mode tap` makes it (with `user NAME` for VMs of a user)"
    )]
    Missing(String),
    /// No driver.
    #[error(
        "--net tap={tap}: cannot open /dev/net/tun; `modprobe tun` loads the driver, and this process must be allowed to open it"
    )]
    Driver {
        /// Which.
        tap: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another user's.
    #[error(
        "--net tap={0}: not permitted: make it with `ip tuntap add {0} mode tap user $(id -un)`, or run with CAP_NET_ADMIN"
    )]
    NotPermitted(String),
    /// Somebody has it.
    #[error(
        "--net tap={tap}: {holder} has it: a tap is one VM's at a time; another one can be given, also to `perdure resume`"
    )]
    Busy {
        /// Which.
        tap: String,
        /// Who, as far as this can be seen.
        holder: String,
    },
    /// Something else.
    #[error(
        "--net tap={0}: this is no tap, or one with several queues; `ip tuntap add NAME mode tap` makes one that fits"
    )]
    NoTap(String),
    /// The system.
    #[error("--net tap={tap}: cannot {doing}")]
    System {
        /// Which.
        tap: String,
        /// What.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A card on its tap, as number `number` of the VM's.
pub(super) fn attach(number: usize, config: &NetConfig, tap: &HostTap) -> Result<Attachment, TapError> {
    let system = |doing| move |source| TapError::System { tap: config.tap.clone(), doing, source };
    let source = tap.0.as_fd().try_clone_to_owned().map_err(system("duplicate its descriptor"))?;
    let mac = config.mac.unwrap_or_else(|| NetConfig::made_up_mac(&config.tap, number));
    Ok(Attachment {
        id: format!("net{number}"),
        device: Box::new(Net::new(mac, Box::new(tap.clone()))),
        sources: vec![source],
    })
}

/// A tap that this process is attached to, as long as a clone of this lives.
#[derive(Debug, Clone)]
pub(super) struct HostTap(Arc<OwnedFd>);

impl HostTap {
    /// Attaches to the interface `name`, which exists.
    pub(super) fn open(name: &str) -> Result<Self, TapError> {
        let tap = || name.to_owned();
        // Asked for by name, the driver makes a tap that there is not: one without addresses, that ends with the VM.
        if !exists(name) {
            return Err(TapError::Missing(tap()));
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(|error| TapError::Driver { tap: tap(), source: error.into() })?;
        let this = Self(Arc::new(descriptor));
        this.set_interface(name).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => TapError::NotPermitted(tap()),
            Some(libc::EBUSY) => TapError::Busy { tap: tap(), holder: holder(name) },
            Some(libc::EINVAL) => TapError::NoTap(tap()),
            _ => TapError::System { tap: tap(), doing: "attach to it", source: error },
        })?;
        let system = |doing| move |source| TapError::System { tap: name.to_owned(), doing, source };
        this.set_header_size().map_err(system("set the size of its headers"))?;
        this.offload(Offloads::default()).map_err(system("set its offloads"))?;
        Ok(this)
    }

    fn set_interface(&self, name: &str) -> io::Result<()> {
        // SAFETY: `ifreq` is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = tun::TAP | tun::NO_PACKET_INFORMATION | tun::VIRTIO_HEADER;
        // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), tun::SET_INTERFACE, &raw mut request) })
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an `int`, which `size` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), tun::SET_HEADER_SIZE, &raw const size) })
    }

    fn offload(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tcp4, tcp6, ecn } = offloads;
        let mut flags = 0;
        // Segments without checksums are not to be had, and ECN not without segments.
        if checksum {
            flags |= tun::CHECKSUM;
            flags |= if tcp4 { tun::TSO4 } else { 0 };
            flags |= if tcp6 { tun::TSO6 } else { 0 };
            flags |= if ecn && (tcp4 || tcp6) { tun::TSO_ECN } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value and accesses no memory of ours.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), tun::SET_OFFLOAD, flags) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: a string that ends with a zero byte and lives on; nothing is written.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// Who has the tap `name`, as far as /proc shows it.
fn holder(name: &str) -> String {
    let line = format!("iff:\t{name}");
    let holds = |process: &std::path::Path| {
        let descriptors = std::fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
        let mut texts = descriptors.filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
        texts.any(|text| text.lines().any(|found| found == line))
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let number = numbers.find(|number| holds(&std::path::Path::new("/proc").join(number.to_string())));
    number.map_or_else(|| "another process".to_owned(), |number| format!("process {number} ({})", command(number)))
}

/// A process as `ps` would show it, in short: its program and two arguments, as in `perdure run web`.
fn command(process: u32) -> String {
    let program = std::fs::read_link(format!("/proc/{process}/exe")).unwrap_or_default();
    let mut words = vec![program.file_name().unwrap_or_default().to_string_lossy().into_owned()];
    let arguments = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let arguments = arguments.split(|byte| *byte == 0).filter(|argument| !argument.is_empty()).skip(1).take(2);
    words.extend(arguments.map(|argument| String::from_utf8_lossy(argument).into_owned()));
    words.join(" ")
}

/// The pieces of one call, and what keeps their addresses good.
struct Vectors<G> {
    _guards: Vec<G>,
    vectors: Vec<libc::iovec>,
}

impl Vectors<PtrGuard> {
    fn to_read(pieces: &[Piece<'_>]) -> Self {
        let guards: Vec<_> = pieces.iter().map(Piece::ptr_guard).collect();
        let vector =
            |guard: &PtrGuard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() };
        Self { vectors: guards.iter().map(vector).collect(), _guards: guards }
    }
}

impl Vectors<PtrGuardMut> {
    fn to_write(pieces: &[Piece<'_>]) -> Self {
        let guards: Vec<_> = pieces.iter().map(Piece::ptr_guard_mut).collect();
        let vector = |guard: &PtrGuardMut| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
        Self { vectors: guards.iter().map(vector).collect(), _guards: guards }
    }
}

impl<G> Vectors<G> {
    /// How many there are; at most [`devices::virtio::PIECES_MAX`], or the kernel refuses them.
    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.vectors.len()).unwrap_or(libc::c_int::MAX)
    }
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Tap for HostTap {
    fn receive(&mut self, buffers: &[Piece<'_>], rest: &mut [u8]) -> io::Result<usize> {
        let mut into = Vectors::to_write(buffers);
        if !rest.is_empty() {
            into.vectors.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        }
        // SAFETY: each vector is a piece of guest memory, which stays mapped while `buffers` borrow it, and into which Rust has no
        // references, or `rest`, which is ours alone; the kernel writes nowhere else.
        let received = length(unsafe { libc::readv(self.0.as_raw_fd(), into.vectors.as_ptr(), into.count()) })?;
        let mut left = received;
        for piece in buffers {
            let part = left.min(piece.len());
            piece.bitmap().mark_dirty(0, part);
            left -= part;
        }
        Ok(received)
    }

    fn send(&mut self, buffers: &[Piece<'_>]) -> io::Result<()> {
        let from = Vectors::to_read(buffers);
        // SAFETY: as above; the kernel only reads.
        length(unsafe { libc::writev(self.0.as_raw_fd(), from.vectors.as_ptr(), from.count()) }).map(|_| ())
    }

    fn send_from(&mut self, frame: &[u8]) -> io::Result<()> {
        Ok(rustix::io::write(&*self.0, frame).map(|_| ())?)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offload(offloads)
    }
}
