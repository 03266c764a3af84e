//! L1, the outer machine: QEMU's TCG with an emulated AMD SVM, so that `/dev/kvm` in it is real.
//!
//! Commands go over a virtio port to the agent in `l1-init`, length-prefixed both ways; the serial console is only
//! recorded, for the message when something fails.

use super::cpio::{self, File};
use super::disk::{Cut, Disk};
use super::{image, nbd};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long L1 may take from QEMU's start to its agent: 5 to 8 s where it was measured, on two cores; CI may be far slower.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// What the agent may take for its own part, after a command's limit ran out.
const AGENT_GRACE: Duration = Duration::from_secs(30);
/// A file to or from L1.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// L1 has one CPU. With two, a guest that KVM moves from one to the other now and then gets an interrupt while it has them off,
/// and hangs, or dies of a triple fault: stock Linux in QEMU 10, found spinning in `ktime_get_update_offsets_now`, that is in a
/// timer's interrupt within an update of the clock, in 1 of 4 boots (`tcg,thread=single`) to 1 of 40 (`thread=multi`). With one:
/// 0 of 24. Guests have as many vCPUs as they like.
const CPUS: u32 = 1;
/// All that TCG has, but for the two that make Linux copy and clear pages by `rep movsb` and `rep stosb`: TCG does those byte by byte. Without them
/// a guest's boot took 15.1 s of this machine's processors, L1's boot included, and 16.7 with them (one run each, on a busy machine).
const CPU_MODEL: &str = "max,erms=off,fsrm=off";
/// RAM below the persistent memory, where the kernel and the initramfs go. [`DAX_ADDRESS`] follows from it.
const LOW_MEMORY_MIB: u64 = 1024;
const DAX_ADDRESS: &str = "1G";
/// QEMU's q35 ends low RAM at 2 GiB when there is much of it; persistent memory must not lie across.
const DAX_MAX_MIB: u64 = 1024;

/// What L1 is made of.
#[derive(Clone, Default)]
pub struct Options {
    /// RAM in MiB, persistent memory not counted; at least 1088 when there is any. 0 means 1536.
    pub memory_mib: u64,
    /// Mounted at `/pool`.
    pub disk: Option<Disk>,
    /// An image for the persistent memory (see [`make_ext4`](super::disk::make_ext4)), of whole MiB up to 1024. Mounted
    /// at `/dax` with `-o dax`.
    pub dax: Option<PathBuf>,
    /// Added to the initramfs, on top of busybox and the agent.
    pub files: Vec<File>,
    /// Further arguments for QEMU, such as a network card.
    pub qemu: Vec<String>,
}

/// A command's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 137 also when its time ran out.
    pub status: i32,
    /// What it wrote to stdout and stderr, in its order.
    pub output: Vec<u8>,
}

impl Output {
    /// The output as text, what is not UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
}

/// A running outer machine. Dropped, it is killed, as by [`power_cut`](Self::power_cut); it also dies with the thread
/// that booted it.
pub struct L1 {
    qemu: Child,
    agent: UnixStream,
    files: TempDir,
    disk: Option<(Disk, Option<nbd::Server>)>,
    requests: u64,
    boot_time: Duration,
}

/// What perdure's processes in L1 are at: each thread's state, its time in clock ticks (user, system) and where in the kernel it waits; the VMs; the kernel's log.
const AUTOPSY: &str = r#"for task in $(ls -d /proc/[0-9]*/task/* 2>/dev/null); do
    case $(readlink $task/exe) in */perdure) ;; *) continue ;; esac
    echo "$task $(cat $task/comm) $(grep State $task/status) $(cut -d ' ' -f 14,15 $task/stat) $(cat $task/syscall)"
    cat $task/stack
done 2>/dev/null
PERDURE_POOL=/pool/pool timeout 20 perdure list
find /pool /dax /tmp -name '*.log' -exec tail -n 20 {} + 2>/dev/null
tail -n 5 /tmp/serial 2>/dev/null
dmesg | tail -n 20
free -m"#;

/// What perdure says of a guest that an emulation fault killed.
const EMULATION_FAULT: &str = "triple-faulted";

/// Runs a test in the lab, and once more if perdure says that the guest died of a triple fault: loudly, and not a third time.
///
/// Seen twice in some sixty runs, on two loaded cores with QEMU 7.2: a stock kernel that had run for seconds since its boot, or since
/// its resume, was gone in the middle of its work. QEMU before 8.1 has a race that kills guests (see `prepare`); a state that was
/// restored wrongly would kill it again.
///
/// # Panics
///
/// When the test does: at once with any other failure, with this one the second time.
pub fn in_emulation(test: impl Fn()) {
    let first = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&test));
    let Err(why) = first else { return };
    let words = why.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
    if !words.contains(EMULATION_FAULT) {
        std::panic::resume_unwind(why);
    }
    eprintln!("lab: the guest died of a triple fault in QEMU's emulation; this test runs once more");
    test();
}

impl L1 {
    /// Boots a machine and waits for its agent.
    ///
    /// # Panics
    ///
    /// When it does not come up, or does not mount what it was given; the message ends with the console's tail.
    pub fn boot(options: &Options) -> Self {
        let begun = Instant::now();
        let files = tempfile::Builder::new().prefix("perdure-lab-").tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(files.path().join("agent")).expect("a socket in a fresh directory");
        let server = options.disk.as_ref().map(|disk| {
            let server = disk.volatile().map(|volatile| {
                nbd::Server::start(volatile, &files.path().join("disk")).expect("a socket in a fresh directory")
            });
            (disk.clone(), server)
        });
        let mut qemu = spawn(&qemu_arguments(options, files.path()), files.path());
        let agent = match accept(&listener, &mut qemu, begun + BOOT_LIMIT) {
            Ok(agent) => agent,
            Err(reason) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                panic!("L1 does not start: {reason}\n{}", console_tail(files.path()));
            }
        };
        let mut machine = Self { qemu, agent, files, disk: server, requests: 0, boot_time: Duration::ZERO };
        let ready = machine.line(begun + BOOT_LIMIT);
        let words: Vec<&str> = ready.split(' ').collect();
        let state = |given: bool| if given { "ok" } else { "none" };
        let wanted = [state(options.disk.is_some()), state(options.dax.is_some())];
        if words.len() != 4 || words[0] != "ready" || words[1..3] != wanted {
            machine.fail(&format!("L1 came up as {ready:?}; wanted pool and dax as {wanted:?}"));
        }
        machine.boot_time = begun.elapsed();
        machine
    }

    /// From QEMU's start to the agent's greeting.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Runs a shell script and waits for its end. After `limit` it is killed and its status is 137.
    ///
    /// # Panics
    ///
    /// When the machine or its agent does not answer.
    pub fn run(&mut self, script: &str, limit: Duration) -> Output {
        let seconds = limit.as_secs().max(1);
        self.request("run", &seconds.to_string(), "-", script.as_bytes(), limit + AGENT_GRACE)
    }

    /// Runs a shell script that must succeed; returns its output.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn check(&mut self, script: &str, limit: Duration) -> String {
        let output = self.run(script, limit);
        if output.status != 0 {
            self.fail(&format!("in L1, status {}: {script}\n{}", output.status, output.text()));
        }
        output.text()
    }

    /// Starts a shell script in the background, in a session of its own; both outputs go to the file `log` in L1.
    pub fn spawn(&mut self, script: &str, log: &str) {
        self.put(&File::program("/tmp/agent/background", script.as_bytes().to_vec()));
        let name = format!("/tmp/agent/background.{}", self.requests);
        self.check(
            &format!("mv /tmp/agent/background {name} && setsid sh {name} </dev/null >{log} 2>&1 &"),
            Duration::from_secs(10),
        );
    }

    /// Polls until `done` is true of the output of `script`, and returns that.
    ///
    /// # Panics
    ///
    /// When that takes longer than `limit`; the message has the last output.
    pub fn wait_until(&mut self, script: &str, limit: Duration, mut done: impl FnMut(&Output) -> bool) -> Output {
        let begun = Instant::now();
        loop {
            let output = self.run(script, Duration::from_secs(30));
            if done(&output) {
                return output;
            }
            if begun.elapsed() > limit {
                let state = self.run(AUTOPSY, Duration::from_secs(60)).text();
                self.fail(&format!(
                    "in L1, not within {limit:?}: {script}\nlast status {}: {}\n--- L1's VMs ---\n{state}",
                    output.status,
                    tail(&output.text())
                ));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Copies a file in; directories on the way are made.
    ///
    /// # Panics
    ///
    /// When L1 cannot write it.
    pub fn put(&mut self, file: &File) {
        let reply = self.request("put", &format!("{:o}", file.mode), &file.path, &file.content, COPY_LIMIT);
        assert_eq!(reply.status, 0, "copying {} into L1: {}", file.path, reply.text());
    }

    /// Copies a file out.
    ///
    /// # Panics
    ///
    /// When L1 cannot read it.
    pub fn get(&mut self, path: &str) -> Vec<u8> {
        let reply = self.request("get", "-", path, &[], COPY_LIMIT);
        assert_eq!(reply.status, 0, "copying {path} out of L1: {}", reply.text());
        reply.output
    }

    /// Pulls the plug: QEMU is killed with SIGKILL and the disk loses what a power cut loses.
    pub fn power_cut(mut self) -> Cut {
        self.end();
        self.disk
            .take()
            .map(|(disk, server)| {
                self.drain(server);
                disk.cut()
            })
            .unwrap_or_default()
    }

    /// Switches off in good order: unmounted, flushed.
    ///
    /// # Panics
    ///
    /// When a file system is busy, or L1 does not go down.
    pub fn shutdown(mut self) {
        self.check("cd /; for d in /pool /dax; do mountpoint -q $d || continue; umount $d || { fuser -m $d; exit 1; }; done; sync", Duration::from_secs(60));
        self.end();
        if let Some((disk, server)) = self.disk.take() {
            self.drain(server);
            disk.settle();
        }
    }

    /// What L1's kernel and init said so far.
    pub fn console(&self) -> String {
        console(self.files.path())
    }

    fn drain(&self, server: Option<nbd::Server>) {
        if let Some(server) = server {
            server.join(&self.files.path().join("disk")).unwrap_or_else(|error| panic!("L1's disk: {error}"));
        }
    }

    fn end(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }

    fn request(&mut self, verb: &str, option: &str, path: &str, data: &[u8], limit: Duration) -> Output {
        self.requests += 1;
        let id = self.requests;
        let deadline = Instant::now() + limit;
        let head = format!("{id} {verb} {option} {} {path}\n", data.len());
        // Writing blocks while L1 does not read; a machine that hangs must not hang the test.
        let _ = self.agent.set_write_timeout(Some(limit));
        if let Err(error) = self.agent.write_all(head.as_bytes()).and_then(|()| self.agent.write_all(data)) {
            self.fail(&format!("L1 takes no request ({verb} {path}): {error}"));
        }
        let reply = self.line(deadline);
        let mut words = reply.split(' ');
        let (Some(echo), Some(Ok(status)), Some(Ok(length)), None) =
            (words.next(), words.next().map(str::parse), words.next().map(str::parse::<usize>), words.next())
        else {
            self.fail(&format!("L1 answered {reply:?} to request {id}"))
        };
        if echo != id.to_string() {
            self.fail(&format!("L1 answered request {echo}, not {id}"));
        }
        let mut output = vec![0; length];
        self.fill(&mut output, deadline);
        Output { status, output }
    }

    fn line(&mut self, deadline: Instant) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            self.fill(&mut byte, deadline);
            if byte[0] == b'\n' {
                return String::from_utf8_lossy(&line).into_owned();
            }
            line.push(byte[0]);
        }
    }

    fn fill(&mut self, buffer: &mut [u8], deadline: Instant) {
        let mut filled = 0;
        while filled < buffer.len() {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let _ = self.agent.set_read_timeout(Some(left));
            match self.agent.read(&mut buffer[filled..]) {
                Ok(0) => self.fail("L1 is gone in the middle of an answer"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fail("L1 does not answer in time"),
                Err(error) => self.fail(&format!("reading from L1: {error}")),
            }
        }
    }

    fn fail(&mut self, reason: &str) -> ! {
        let state = match self.qemu.try_wait() {
            Ok(Some(status)) => format!(" (QEMU ended: {status})"),
            _ => String::new(),
        };
        panic!("{reason}{state}\n{}", console_tail(self.files.path()))
    }
}

impl Drop for L1 {
    fn drop(&mut self) {
        self.end();
    }
}

fn qemu_arguments(options: &Options, files: &Path) -> Vec<String> {
    let memory = if options.memory_mib == 0 { 1536 } else { options.memory_mib };
    // no_timer_check: a kernel that QEMU does not let run for some ticks takes its timer for broken, and panics. KVM guests skip that, too.
    let mut kernel = String::from("console=ttyS0 quiet panic=-1 reboot=t mitigations=off no_timer_check");
    let mut arguments: Vec<String> = ["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU_MODEL, "-nodefaults"]
        .into_iter()
        .chain(["-display", "none", "-no-reboot"])
        .map(str::to_owned)
        .collect();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-smp", CPUS.to_string());
    if let Some(image) = &options.dax {
        let size = whole_mebibytes(image);
        let high = memory.checked_sub(LOW_MEMORY_MIB).filter(|high| *high >= 64);
        let high = high.unwrap_or_else(|| panic!("L1 with persistent memory needs 1088 MiB of RAM, not {memory}"));
        add("-m", format!("{}M", memory + size));
        add("-object", format!("memory-backend-ram,id=low,size={LOW_MEMORY_MIB}M"));
        add("-object", format!("memory-backend-file,id=dax,size={size}M,mem-path={},share=on", image.display()));
        add("-object", format!("memory-backend-ram,id=high,size={high}M"));
        for backend in ["low", "dax", "high"] {
            // The CPU in the first node: that is where the kernel takes its memory from.
            let cpus = if backend == "low" { ",cpus=0" } else { "" };
            add("-numa", format!("node,memdev={backend}{cpus}"));
        }
        kernel += &format!(" memmap={size}M!{DAX_ADDRESS}");
    } else {
        add("-m", format!("{memory}M"));
    }
    if let Some(disk) = &options.disk {
        let file = match disk.volatile() {
            Some(_) => format!("nbd+unix:///?socket={}", files.join("disk").display()),
            None => disk.path().display().to_string(),
        };
        // The guest's flushes must arrive: not cache=unsafe. And it must believe in a cache that needs them: not writethrough.
        add("-drive", format!("file={file},format=raw,if=virtio,cache=writeback"));
    }
    add("-chardev", format!("socket,id=agent,path={}", files.join("agent").display()));
    add("-device", "virtio-serial-pci".to_owned());
    add("-device", "virtserialport,chardev=agent,name=perdure.lab".to_owned());
    add("-serial", format!("file:{}", files.join("console").display()));
    add("-kernel", image().join("vmlinuz").display().to_string());
    add("-initrd", initramfs(&options.files, files).display().to_string());
    add("-append", kernel);
    arguments.extend(options.qemu.iter().cloned());
    arguments
}

fn initramfs(extra: &[File], files: &Path) -> PathBuf {
    let base = image().join("l1.cpio");
    let archive = std::fs::read(&base).unwrap_or_else(|error| panic!("reading {}: {error}", base.display()));
    let path = files.join("initramfs");
    std::fs::write(&path, cpio::append(archive, extra)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

fn whole_mebibytes(image: &Path) -> u64 {
    let bytes = std::fs::metadata(image).unwrap_or_else(|error| panic!("{}: {error}", image.display())).len();
    let size = bytes >> 20;
    assert!(
        bytes.is_multiple_of(1 << 20) && (1..=DAX_MAX_MIB).contains(&size),
        "{}: persistent memory is whole MiB up to {DAX_MAX_MIB}, not {bytes} bytes",
        image.display()
    );
    size
}

fn spawn(arguments: &[String], files: &Path) -> Child {
    let complaints = std::fs::File::create(files.join("qemu")).expect("a file in a fresh directory");
    // setpriv, so that QEMU goes when a test is killed from outside and no destructor runs.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(complaints)
        .spawn()
        .unwrap_or_else(|error| {
            panic!("running setpriv and qemu-system-x86_64 (tests/lab/prepare installs them): {error}")
        })
}

fn accept(listener: &UnixListener, qemu: &mut Child, deadline: Instant) -> Result<UnixStream, String> {
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
        if let Ok(Some(status)) = qemu.try_wait() {
            return Err(format!("QEMU ended at once: {status}"));
        }
        if Instant::now() > deadline {
            return Err("QEMU does not connect to its agent's socket".to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn console(files: &Path) -> String {
    let read = |name| std::fs::read(files.join(name)).unwrap_or_default();
    let mut text = read("qemu");
    text.extend(read("console"));
    String::from_utf8_lossy(&text).into_owned()
}

fn console_tail(files: &Path) -> String {
    format!("--- L1's console, its end ---\n{}\n---", tail(&console(files)))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
