//! `peer`: one end of a conversation over sockets between a guest and its host; the same program at both ends.
//!
//! ```text
//!   peer serve PLACE                  sends back what comes, on each connection
//!   peer call PLACE[ PORT] BYTES      sends so many bytes, wants them back, and prints their BLAKE3 hash
//!   peer hold PLACE[ PORT]            connects, and says so; says so, too, when the other end is gone
//! ```
//!
//! A PLACE is `vsock:PORT` (of this side to serve, of the host to call), or the path of a UNIX socket. With a PORT behind the path it is the guest's:
//! `CONNECT PORT` is said there first, as Firecracker has it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

const USAGE: &str = "usage: peer serve PLACE | peer call PLACE [PORT] BYTES | peer hold PLACE [PORT]";
/// No answer for so long is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection of either kind.
trait Stream: Read + Write + Send + Sized + 'static {
    fn twin(&self) -> io::Result<Self>;
    fn end_sending(&self) -> io::Result<()>;
    fn limit(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn twin(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }
}

impl Stream for VsockStream {
    fn twin(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }

    fn limit(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", place] => serve(place),
        ["call", place, rest @ ..] if (1..=2).contains(&rest.len()) => {
            let (bytes, port) = rest.split_last().map_or(("", &[][..]), |(bytes, port)| (*bytes, port));
            let bytes = bytes.parse().unwrap_or_else(|error| panic!("{bytes}: {error}"));
            with(place, port.first().copied(), |stream| call(stream, bytes), |stream| call(stream, bytes))
        }
        ["hold", place, rest @ ..] if rest.len() <= 1 => with(place, rest.first().copied(), hold, hold),
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    if let Err(error) = done {
        println!("peer: {}: {error}", arguments.join(" "));
        std::process::exit(1);
    }
}

fn vsock_port(place: &str) -> Option<u32> {
    place.strip_prefix("vsock:").map(|port| port.parse().unwrap_or_else(|error| panic!("{place}: {error}")))
}

fn serve(place: &str) -> io::Result<()> {
    match vsock_port(place) {
        Some(port) => {
            let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
            println!("peer: serving {place}");
            listener.incoming().try_for_each(|stream| stream.map(echo_apart))
        }
        None => {
            let listener = UnixListener::bind(place)?;
            println!("peer: serving {place}");
            listener.incoming().try_for_each(|stream| stream.map(echo_apart))
        }
    }
}

/// Sends back what comes, until either side ends.
fn echo_apart(mut stream: impl Stream) {
    std::thread::spawn(move || {
        let ended = stream.twin().and_then(|mut from| io::copy(&mut from, &mut stream));
        let _ = stream.end_sending();
        println!("peer: a caller is gone: {ended:?}");
    });
}

fn with(
    place: &str,
    port: Option<&str>,
    over_vsock: impl FnOnce(VsockStream) -> io::Result<()>,
    over_unix: impl FnOnce(UnixStream) -> io::Result<()>,
) -> io::Result<()> {
    if let Some(port) = vsock_port(place) {
        return over_vsock(VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?);
    }
    let mut stream = UnixStream::connect(place)?;
    stream.limit(Some(PATIENCE))?;
    if let Some(port) = port {
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let answer = line(&mut stream)?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::other(format!("answered {answer:?} to CONNECT {port}")));
        }
    }
    over_unix(stream)
}

/// A line, byte by byte: what is behind it is the guest's.
fn line(stream: &mut impl Read) -> io::Result<String> {
    let (mut line, mut byte) = (String::new(), [0]);
    while !line.ends_with('\n') {
        stream.read_exact(&mut byte)?;
        line.push(char::from(byte[0]));
    }
    Ok(line)
}

fn call(mut stream: impl Stream, bytes: usize) -> io::Result<()> {
    stream.limit(Some(PATIENCE))?;
    let mut sent = vec![0; bytes];
    blake3::Hasher::new_keyed(&[7; 32]).finalize_xof().fill(&mut sent);
    let hash = blake3::hash(&sent).to_hex();
    let mut to = stream.twin()?;
    // Both directions at a time: neither side has room for all of it.
    let sender = std::thread::spawn(move || to.write_all(&sent).and_then(|()| to.end_sending()));
    let mut came = Vec::new();
    stream.read_to_end(&mut came)?;
    sender.join().unwrap_or_else(|_| Err(io::Error::other("the sender panicked")))?;
    let back = blake3::hash(&came).to_hex();
    if (came.len(), back) != (bytes, hash) {
        return Err(io::Error::other(format!("{} bytes of {back} came back, not {bytes} of {hash}", came.len())));
    }
    println!("peer: {bytes} bytes came back, {back}");
    Ok(())
}

fn hold(mut stream: impl Stream) -> io::Result<()> {
    stream.limit(Some(PATIENCE))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    println!("peer: connected");
    stream.limit(None)?;
    let ended = stream.read(&mut [0]);
    println!("peer: the connection is gone: {ended:?}");
    Ok(())
}
