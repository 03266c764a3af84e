//! `perdure run`

use std::path::PathBuf;
use std::process::ExitCode;

use allocator::{MediumKind, Pool};
use anyhow::{Context as _, bail};

use super::output::say;
use super::{Environment, live, names, retention, survey};
use crate::machine::config::disks::DiskConfig;
use crate::machine::config::net::NetConfig;
use crate::machine::config::pmem::PmemConfig;
use crate::machine::config::vsock::VsockConfig;
use crate::machine::config::{ByteSize, ClockPolicy, ConsoleDevice, Kernel, SCHEMA, SerialTarget, VmConfig};
use crate::outage::plan::HoldUpLength;
use crate::persistence::recovery::assess;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::launch::NAME;
use crate::supervisor::{Ended, Supervisor};

/// Start a virtual machine.
///
/// A new NAME gets regions for its memory (NAME/ram, and NAME/swap where --ram is less than --memory) and its context (NAME/context) in the pool. A NAME that is there, and
/// whose guest has ended, is started anew with what it is made of, except for what is given here. Without NAME a fresh one
/// is made up and printed; such a VM is removed when its guest powers off, and stays when it is frozen.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  perdure run                                           the embedded guest 'counter', on this terminal
  perdure run web --kernel vmlinuz --initrd initrd --cmdline 'console=ttyS0' --memory 1G --cpus 2
  perdure run big --guest memwalk --cmdline 'ws=1G' --memory 2G --ram 512M --serial none --detach
  perdure run web --guest memwalk --cmdline 'pattern=zipf ws=64M' --serial none --detach
  perdure run db --kernel vmlinuz --initrd initrd --disk ./root.img --disk data:10G
  perdure run db --kernel vmlinuz --initrd initrd --cmdline 'root=/dev/vda' --disk root:10G,from=root.img
  perdure run web --guest pages --initrd list.bin --cmdline 'pages=65536 writes=list every=1000000'

'pages' walks a list of pages that you give it, round and round: entries of 4 bytes, little-endian, the lower 31 bits a page
of its working set (4 KiB each), the top bit set where the access writes. It checks each page that it touches. Its words:
pages= (of the working set; 0: as many as the list names), writes= (list, all, none), count= (accesses before it powers off;
0: for ever), every= (accesses between two lines that say how far it is).

On a terminal all keys go to the guest; Ctrl-] leaves the VM running in the background.")]
pub(super) struct Args {
    /// Its name in the pool
    name: Option<String>,
    /// An embedded guest: counter, echo, memwalk, pages, smp, … (`perdure doctor` lists them)
    #[arg(long, value_name = "BUILTIN", group = "program")]
    guest: Option<String>,
    /// A kernel: ELF (64-bit entry or PVH) or bzImage
    #[arg(long, value_name = "FILE", group = "program")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk; for the embedded guest 'pages' the list of pages that it walks
    #[arg(long, value_name = "FILE", requires = "program")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory, as in 512M or 4G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// How much of the memory may be in RAM at a time; the rest is swapped out [default: all]
    #[arg(long, value_name = "SIZE")]
    ram: Option<ByteSize>,
    /// How much of it stays in RAM when VMs compete (`perdure pool limit`) [default: as little as can be]
    #[arg(long, value_name = "SIZE")]
    ram_min: Option<ByteSize>,
    /// How much memory can be swapped out [default: as much as there is]
    #[arg(long, value_name = "SIZE")]
    swap: Option<ByteSize>,
    /// What its regions lie on: file, dax or nvdimm [default: the pool's]
    #[arg(long, value_name = "MEDIUM")]
    medium: Option<MediumKind>,
    /// A freeze is to fit into this, as in 16ms: what is not durable is kept below what fits, at the guest's expense; none takes that back
    ///
    /// How much fits is measured on the VM's medium when it starts; a time into which not even an empty freeze fits is refused. Pages are flushed behind
    /// the guest, and a guest that dirties them more quickly waits. At the freeze what is dirty goes into a journal (the region VM/journal), in one
    /// stream; `perdure inspect` tells how much may be dirty, how much is, and whether each freeze was in time.
    #[arg(long, value_name = "TIME|none")]
    holdup: Option<HoldUpLength>,
    /// A disk, as in data:10G (in the pool), ./disk.img or /srv/disk.img,ro (a raw image); again for each further one
    ///
    /// The guest finds them as /dev/vda, /dev/vdb, … (virtio-blk), in the order given. NAME:SIZE is the region VM/NAME of the pool: made
    /// with the VM, zeros at first or, with ,from=FILE, what the raw image (or block device) FILE holds then; kept when its guest ends, removed
    /// with it. A raw image stays yours: it is locked while the VM runs.
    /// A flush of the guest (fsync) is durable on the disk's medium; a freeze makes everything durable that the guest has written. Generations
    /// hold memory and the disks of the pool; `resume --generation` refuses a VM with an image that it can write, unless forced.
    #[arg(long = "disk", value_name = "NAME:SIZE[,from=FILE]|PATH[,ro]")]
    disks: Vec<DiskConfig>,
    /// Persistent memory of the guest, as in log:256M (a region of the pool); again for each further one
    ///
    /// The guest finds them as /dev/pmem0, … (virtio-pmem), in the order given, behind its memory: a file system that is mounted with -o dax maps files straight
    /// from the region. NAME:SIZE is the region VM/NAME of the pool: made with the VM, zeros at first, kept when its guest ends, removed with it. What the guest
    /// flushes (fsync, msync) is durable on the region's medium; a freeze makes all of it durable; generations hold it with the memory.
    #[arg(long = "pmem", value_name = "NAME:SIZE")]
    pmem: Vec<PmemConfig>,
    /// The serial port: stdio, none, or a file to append to [default: stdio; none with --detach]
    #[arg(long, value_name = "stdio|FILE|none")]
    serial: Option<SerialTarget>,
    /// Which device of the guest is there: serial (ttyS0) or virtio (hvc0; its serial port is shown as well) [default: serial]
    ///
    /// With virtio what is typed, also at `perdure console`, goes to hvc0 (virtio-console), for which the guest is told console=hvc0 on its kernel's
    /// command line. What it writes to ttyS0, as a kernel does before its drivers are there, is shown in the same place. Lines of a terminal
    /// are as long in the guest as they are here.
    #[arg(long, value_name = "DEVICE")]
    console: Option<ConsoleDevice>,
    /// The guest's clocks at an outage: continue, or realtime (jump over it) [default: continue]
    #[arg(long, value_name = "POLICY")]
    clock: Option<ClockPolicy>,
    /// Give it a source of randomness (virtio-rng): what it draws after a resume or a rollback is new
    #[arg(long)]
    rng: bool,
    /// Give it a memory balloon (virtio-balloon): memory that the guest has free is given back, with --ram and on the medium nvdimm
    ///
    /// A guest that reports free pages (Linux from 5.7 on) does so by itself. `perdure balloon` takes memory from it beyond that.
    #[arg(long)]
    balloon: bool,
    /// Give it a network card (virtio-net) on a tap that exists, as in tap=vm0 or tap=vm0,mac=02:00:5e:10:00:01; once for each card
    ///
    /// `ip tuntap add vm0 mode tap user $(id -un)` makes a tap, `ip link set vm0 up` and an address or a bridge (`ip link set vm0 master
    /// br0`) join it to a network. Without mac= an address is made up from the VM's name, the same always. After an outage the guest
    /// announces itself anew, and its connections go on as far as their other ends waited. `perdure resume --net` moves a card.
    #[arg(long, value_name = "tap=NAME[,mac=ADDRESS]")]
    net: Vec<NetConfig>,
    /// Give it sockets to the host (virtio-vsock), as in 3:/run/web.vsock: its CID, and a UNIX socket
    ///
    /// As with Firecracker: a program of the host connects to the socket, says "CONNECT 52" and a newline, and talks to who listens at port 52
    /// in the guest after it has read "OK" and a number. The guest reaches port 52 of the host (CID 2) where somebody listens at
    /// /run/web.vsock_52. An outage ends connections, and both sides see their end.
    #[arg(long, value_name = "CID:SOCKET")]
    vsock: Option<VsockConfig>,
    /// All of this from a JSON file; what is given here goes before it
    ///
    /// `--config-schema` prints what it may contain; the "config" of `perdure inspect NAME --json` is such a file.
    #[arg(long, value_name = "FILE.json")]
    config: Option<PathBuf>,
    /// Print the JSON schema of --config, and start nothing
    #[arg(long)]
    config_schema: bool,
    /// Leave it in the background once it runs
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    jail: live::JailArgs,
    #[command(flatten)]
    generations: retention::RetentionArgs,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    if args.config_schema {
        say!("{}", SCHEMA.trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let pool = match environment.open_pool_if_any()? {
        Some(pool) => pool,
        None => {
            // A command line that asks for what cannot be is to leave nothing behind.
            args.configure("", None)?;
            environment.open_or_create_pool()?
        }
    };
    let name = match &args.name {
        Some(name) => name.clone(),
        None => std::env::var(NAME).unwrap_or_else(|_| names::fresh(&survey::names(&pool))),
    };
    let made_up = args.name.is_none();
    let stored = if survey::names(&pool).contains(&name) { startable(&pool, &name)? } else { None };
    let existing = stored.is_some();
    let config = args.configure(&name, stored.as_ref().map(|regions| regions.config().clone()))?;
    // The process of its own that may follow leases them itself.
    drop(stored);
    if let Some(code) = live::elsewhere(environment, &name, args.detach, &config.serial)? {
        return Ok(code);
    }
    let begin = |keyboard| {
        let regions = if existing { reuse(&pool, &name, &config)? } else { VmRegions::create(&pool, &name, &config)? };
        let booted = Supervisor::boot(&pool, regions, keyboard);
        if booted.is_err() && !existing {
            // A VM that never ran is nothing to keep: the same command, corrected, is to find none.
            if let Err(error) = super::remove::free(&pool, &name) {
                tracing::warn!("{name} is not removed: {}", super::one_line(&error));
            }
        }
        let booted = booted?;
        if made_up {
            eprintln!("perdure: this VM is called {name}");
        }
        Ok(booted)
    };
    let after = |ended: &Ended| {
        if made_up && matches!(ended, Ended::PoweredOff | Ended::Stopped | Ended::DebugExit(_)) {
            let removed = environment.open_pool().and_then(|pool| super::remove::free(&pool, &name));
            if let Err(error) = removed {
                tracing::warn!("{name} is not removed: {}", super::one_line(&error));
            }
        }
    };
    live::here(args.jail, (&pool, &config), begin, after)
}

/// The regions of a VM that there is, if it may be started anew. What an interrupted start left is taken away.
fn startable(pool: &Pool, name: &str) -> anyhow::Result<Option<VmRegions>> {
    let regions = match live::hold(pool, name) {
        Err(RegionsError::Unfinished(_)) => {
            super::remove::free(pool, name)?;
            return Ok(None);
        }
        other => other?,
    };
    if assess(&regions).is_ok() {
        let advice = format!("`perdure resume {name}` continues it, `perdure remove --force {name}` gives it up");
        return Err(RegionsError::Exists { name: name.to_owned(), standing: "frozen", advice }.into());
    }
    Ok(Some(regions))
}

fn reuse(pool: &Pool, name: &str, config: &VmConfig) -> anyhow::Result<VmRegions> {
    let mut regions = startable(pool, name)?.ok_or_else(|| RegionsError::NoSuchVm(name.to_owned()))?;
    let medium = regions.medium();
    let shape = |config: &VmConfig| match config.geometry() {
        Some(_) => {
            let (ram, swap) = (ByteSize(config.ram_bytes()), ByteSize(config.swap_bytes()));
            format!("{} of memory, {ram} of RAM and {swap} of swap", config.memory)
        }
        None => format!("{} of memory, all of it RAM", config.memory),
    };
    let (has, wanted) = (shape(regions.config()), shape(config));
    if has != wanted {
        bail!("VM {name} has {has}, not {wanted}: that cannot change; `perdure remove {name}` first");
    }
    if config.medium.is_some_and(|wanted| wanted != medium) {
        bail!("VM {name} lies on {medium}: that cannot change; `perdure remove {name}` first");
    }
    if config.cpus != regions.config().cpus {
        bail!(
            "VM {name} has {} CPUs, not {}: that cannot change; `perdure remove {name}` first",
            regions.config().cpus,
            config.cpus
        );
    }
    let in_pool = |config: &VmConfig| {
        let disks = config.disks.iter().filter(|disk| matches!(disk, DiskConfig::Pool { .. }));
        // What they were made from counts when they are made.
        let mut disks: Vec<_> = disks.map(|disk| disk.clone().made().to_string()).collect();
        disks.sort_unstable();
        if disks.is_empty() { "none".to_owned() } else { disks.join(", ") }
    };
    let (has, wanted) = (in_pool(regions.config()), in_pool(config));
    if has != wanted {
        bail!(
            "VM {name} has these disks in the pool: {has}; not {wanted}: that cannot change; `perdure remove {name}` first"
        );
    }
    if config.pmem != regions.config().pmem {
        let in_words = |config: &VmConfig| {
            let pmem: Vec<_> = config.pmem.iter().map(ToString::to_string).collect();
            if pmem.is_empty() { "none".to_owned() } else { pmem.join(", ") }
        };
        let (has, wanted) = (in_words(regions.config()), in_words(config));
        bail!(
            "VM {name} has this persistent memory: {has}; not {wanted}: that cannot change; `perdure remove {name}` first"
        );
    }
    // Said now and not then, or the reverse, it would be another division of memory.
    let medium = regions.config().medium;
    let disks = config.disks.iter().cloned().map(DiskConfig::made).collect();
    regions.set_config(VmConfig { medium, disks, ..config.clone() });
    Ok(regions)
}

impl Args {
    /// What the VM is made of: the file, or what it was before, or the defaults; and over it what was given.
    fn configure(&self, name: &str, stored: Option<VmConfig>) -> anyhow::Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => stored.unwrap_or_default(),
        };
        let initrd = self.initrd.as_ref().map(std::path::absolute).transpose()?;
        if let Some(guest) = &self.guest {
            let guest = guest.clone();
            config.kernel = match &initrd {
                None => Kernel::Guest(guest),
                Some(list) => Kernel::GuestWith { guest, initrd: list.clone() },
            };
        }
        if let Some(path) = &self.kernel {
            config.kernel = Kernel::File { path: std::path::absolute(path)?, initrd };
        }
        if let Some(cmdline) = &self.cmdline {
            config.cmdline.clone_from(cmdline);
        }
        config.cpus = self.cpus.unwrap_or(config.cpus);
        config.memory = self.memory.unwrap_or(config.memory);
        config.ram = self.ram.or(config.ram);
        config.ram_min = self.ram_min.or(config.ram_min);
        config.swap = self.swap.or(config.swap);
        config.medium = self.medium.or(config.medium);
        config.clock = self.clock.unwrap_or(config.clock);
        config.console = self.console.unwrap_or(config.console);
        config.rng |= self.rng;
        config.balloon |= self.balloon;
        if let Some(holdup) = self.holdup {
            config.holdup_us = holdup.microseconds();
        }
        if !self.disks.is_empty() {
            config.disks = self.disks.iter().map(absolute).collect::<anyhow::Result<_>>()?;
        }
        if !self.pmem.is_empty() {
            config.pmem.clone_from(&self.pmem);
        }
        if !self.net.is_empty() {
            config.net.clone_from(&self.net);
        }
        config.vsock = self.vsock.clone().or(config.vsock);
        NetConfig::complete(&mut config.net, name);
        match &self.serial {
            Some(SerialTarget::File(path)) => config.serial = SerialTarget::File(std::path::absolute(path)?),
            Some(target) => config.serial = target.clone(),
            None => {}
        }
        self.generations.configure(&mut config);
        config.validate()?;
        Ok(config)
    }
}

/// The same disk, wherever the VM is resumed from.
fn absolute(disk: &DiskConfig) -> anyhow::Result<DiskConfig> {
    Ok(match disk {
        DiskConfig::File { path, read_only } => {
            DiskConfig::File { path: std::path::absolute(path)?, read_only: *read_only }
        }
        DiskConfig::Pool { name, size, from } => DiskConfig::Pool {
            name: name.clone(),
            size: *size,
            from: from.as_ref().map(std::path::absolute).transpose()?,
        },
    })
}

fn read_config(path: &PathBuf) -> anyhow::Result<VmConfig> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} does not describe a VM", path.display()))
}
