//! Serves a [`VolatileDisk`] to QEMU over NBD, on a UNIX socket.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, fixed newstyle negotiation and simple
//! replies; the one export is offered under any name.

use super::disk::{SECTOR, VolatileDisk, lock};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const HANDSHAKE_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;

const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 1 << 31 | 1;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_FUA: u16 = 1;

/// The greatest request served; QEMU splits at what [`INFO_BLOCK_SIZE`] says.
const MAX_REQUEST: u32 = 32 << 20;
const MAX_OPTION: u32 = 4096;

/// A server for one connection. It ends when QEMU does.
pub struct Server(JoinHandle<io::Result<()>>);

impl Server {
    /// Listens on `socket` and serves the first that connects.
    ///
    /// # Errors
    ///
    /// When the socket cannot be made.
    pub fn start(disk: Arc<Mutex<VolatileDisk>>, socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        Ok(Self(std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            drop(listener);
            serve(&disk, stream)
        })))
    }

    /// Waits until everything that the client sent is in the disk's cache. The client must be dead, or never have come
    /// (then this connects in its place, so that the wait ends).
    pub fn join(self, socket: &Path) -> io::Result<()> {
        drop(UnixStream::connect(socket));
        match self.0.join() {
            // A client that was killed ends in the middle of anything.
            Ok(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the disk server panicked")),
        }
    }
}

fn serve(disk: &Mutex<VolatileDisk>, mut stream: UnixStream) -> io::Result<()> {
    if negotiate(lock(disk).size(), &mut stream)? {
        while request(disk, &mut stream)? {}
    }
    Ok(())
}

/// Returns whether transmission follows.
fn negotiate(size: u64, stream: &mut UnixStream) -> io::Result<bool> {
    let mut hello = [HANDSHAKE_MAGIC.as_slice(), OPTION_MAGIC].concat();
    hello.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    let no_zeroes = number(stream)? & u32::from(FLAG_NO_ZEROES) != 0;
    loop {
        let mut magic = [0; 8];
        stream.read_exact(&mut magic)?;
        let (option, length) = (number(stream)?, number(stream)?);
        if &magic != OPTION_MAGIC || length > MAX_OPTION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not an NBD option"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match option {
            OPTION_EXPORT_NAME => {
                stream.write_all(&size.to_be_bytes())?;
                stream.write_all(&TRANSMISSION_FLAGS.to_be_bytes())?;
                stream.write_all(if no_zeroes { &[] } else { &[0; 124] })?;
                return Ok(true);
            }
            OPTION_INFO | OPTION_GO => {
                let mut export = INFO_EXPORT.to_be_bytes().to_vec();
                export.extend(size.to_be_bytes());
                export.extend(TRANSMISSION_FLAGS.to_be_bytes());
                option_reply(stream, option, REPLY_INFO, &export)?;
                let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                for bytes in [SECTOR as u32, 4096, MAX_REQUEST] {
                    blocks.extend(bytes.to_be_bytes());
                }
                option_reply(stream, option, REPLY_INFO, &blocks)?;
                option_reply(stream, option, REPLY_ACK, &[])?;
                if option == OPTION_GO {
                    return Ok(true);
                }
            }
            OPTION_ABORT => {
                option_reply(stream, option, REPLY_ACK, &[])?;
                return Ok(false);
            }
            _ => option_reply(stream, option, REPLY_UNSUPPORTED, &[])?,
        }
    }
}

fn option_reply(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for word in [option, kind, data.len() as u32] {
        reply.extend(word.to_be_bytes());
    }
    reply.extend(data);
    stream.write_all(&reply)
}

/// Serves one request; false once the client says goodbye.
fn request(disk: &Mutex<VolatileDisk>, stream: &mut UnixStream) -> io::Result<bool> {
    // magic 4, flags 2, type 2, cookie 8, offset 8, length 4
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let field = |from: usize| u32::from_be_bytes([header[from], header[from + 1], header[from + 2], header[from + 3]]);
    let (flags, command) = (u16::from_be_bytes([header[4], header[5]]), u16::from_be_bytes([header[6], header[7]]));
    let offset = u64::from(field(16)) << 32 | u64::from(field(20));
    let length = field(24);
    if field(0) != REQUEST_MAGIC || length > MAX_REQUEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not an NBD request"));
    }
    let mut data = Vec::new();
    let result = match command {
        COMMAND_READ => {
            data.resize(length as usize, 0);
            lock(disk).read(offset, &mut data)
        }
        COMMAND_WRITE => {
            let mut written = vec![0; length as usize];
            stream.read_exact(&mut written)?;
            let mut disk = lock(disk);
            if flags & COMMAND_FUA == 0 { disk.write(offset, &written) } else { disk.write_through(offset, &written) }
        }
        COMMAND_FLUSH => lock(disk).flush(),
        COMMAND_DISCONNECT => return Ok(false),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
    let errno: u32 = match &result {
        Ok(()) => 0,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => 22,
        Err(_) => 5,
    };
    reply.extend(errno.to_be_bytes());
    reply.extend(&header[8..16]);
    if result.is_ok() {
        reply.extend(&data);
    }
    stream.write_all(&reply)?;
    Ok(true)
}

fn number(stream: &mut UnixStream) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}
