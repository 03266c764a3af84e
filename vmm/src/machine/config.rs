//! What a VM is made of: given on the command line or in a file, checked once, saved with the VM.

pub mod disks;
pub mod generations;
pub mod net;
pub mod pmem;
#[cfg(test)]
mod schema;
pub mod vsock;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use allocator::MediumKind;
use allocator::paging::Geometry;
use serde::{Deserialize, Serialize};

use super::memory::PAGE_SIZE;
use disks::{DiskConfig, DisksError};
use generations::GenerationsConfig;
use net::{MAX_CARDS, NetConfig, NetConfigError};
use pmem::{PmemConfig, PmemError};
use vsock::{VsockConfig, VsockConfigError};

/// The JSON schema of [`VmConfig`], as `--config` reads it.
pub const SCHEMA: &str = include_str!("../../config.schema.json");

/// A number of bytes, written as in `512M` or `4G` (binary units).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A size that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size: write a whole number with K, M, G or T, as in 512M or 4G")]
pub struct SizeError(String);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.to_owned());
        let upper = text.trim().to_ascii_uppercase();
        let upper = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
        let (digits, shift) =
            UNITS.iter().find_map(|(unit, shift)| Some((upper.strip_suffix(unit)?, *shift))).unwrap_or((upper, 0));
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(error());
        }
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        match UNITS.iter().find(|(_, shift)| fits(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// What the guest's clocks do with the time of an outage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ClockPolicy {
    /// They go on from where they stood: the guest does not notice.
    #[default]
    Continue,
    /// They jump over the outage: the guest's time is right.
    Realtime,
}

/// The program that the VM starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Kernel {
    /// One of the embedded guests, by name.
    Guest(String),
    /// One of the embedded guests, and what it works on.
    GuestWith {
        /// Its name.
        guest: String,
        /// A file that it is given as its initial RAM disk.
        initrd: PathBuf,
    },
    /// A file: ELF or bzImage.
    File {
        /// The kernel.
        path: PathBuf,
        /// Its initial RAM disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<PathBuf>,
    },
}

/// Where the guest's serial port leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SerialTarget {
    /// The terminal.
    Stdio,
    /// Nowhere, except to `perdure console`.
    None,
    /// A file, which grows; also across resumes.
    File(PathBuf),
}

impl FromStr for SerialTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdio" => Self::Stdio,
            "none" => Self::None,
            path => Self::File(PathBuf::from(path)),
        })
    }
}

/// Which device of the guest people see, and type to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleDevice {
    /// The serial port, `ttyS0`.
    #[default]
    Serial,
    /// A virtio console, `hvc0`. What the guest writes to its serial port is shown as well.
    Virtio,
}

impl ConsoleDevice {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a VM is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// How many vCPUs.
    pub cpus: u32,
    /// How much memory the guest sees.
    pub memory: ByteSize,
    /// How much of it may be in RAM at a time; all of it if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<ByteSize>,
    /// How much of it is in RAM however little there is for all VMs; as little as can be if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram_min: Option<ByteSize>,
    /// How much of it may be swapped out; as much as there is memory if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<ByteSize>,
    /// Where its regions lie; the pool's default if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<schema::Medium>"))]
    pub medium: Option<MediumKind>,
    /// What it starts.
    pub kernel: Kernel,
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disks, in the order in which the guest finds them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Its persistent memory, in the order in which the guest finds it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Where the serial port leads.
    pub serial: SerialTarget,
    /// Which device people see there.
    #[serde(skip_serializing_if = "ConsoleDevice::is_default")]
    pub console: ConsoleDevice,
    /// What its clocks do at an outage.
    pub clock: ClockPolicy,
    /// Whether it has a source of randomness (virtio-rng).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rng: bool,
    /// Whether it has a memory balloon (virtio-balloon).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// Its network cards (virtio-net).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Sockets between it and the host (virtio-vsock).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// What is not durable is kept so little that a freeze takes no longer than this, in microseconds; not bounded if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdup_us: Option<u64>,
    /// A generation is taken each time this many milliseconds have passed; `None`: only when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_every_ms: Option<u64>,
    /// The VMs that share a store of generations: a VM and its forks. Its own name if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// How generations are stored, and which stay.
    pub generations: GenerationsConfig,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: ByteSize(512 << 20),
            ram: None,
            ram_min: None,
            swap: None,
            medium: None,
            kernel: Kernel::Guest("counter".to_owned()),
            cmdline: String::new(),
            disks: Vec::new(),
            pmem: Vec::new(),
            serial: SerialTarget::Stdio,
            console: ConsoleDevice::default(),
            clock: ClockPolicy::default(),
            rng: false,
            balloon: false,
            net: Vec::new(),
            vsock: None,
            holdup_us: None,
            snapshot_every_ms: None,
            family: None,
            generations: GenerationsConfig::default(),
        }
    }
}

/// A configuration that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No CPU, or too many.
    #[error("--cpus {0}: a VM has from 1 to {MAX_CPUS} CPUs")]
    Cpus(u32),
    /// Too little memory, too much, or not whole pages.
    #[error("--memory {0}: a VM has from {MIN_MEMORY} to {MAX_MEMORY} of memory, in whole pages of 4K")]
    Memory(ByteSize),
    /// RAM that is too little or too much.
    #[error("--ram {ram}: a VM with {memory} of memory has from {least} of RAM to as much as it has memory")]
    Ram {
        /// Asked for.
        ram: ByteSize,
        /// As given.
        memory: ByteSize,
        /// The least.
        least: ByteSize,
    },
    /// A floor that is none.
    #[error(
        "--ram-min {0}: it is for a VM with less --ram than --memory, from the least RAM that it can have to its --ram"
    )]
    RamMin(ByteSize),
    /// Swap without need, or too little.
    #[error(
        "--swap {0}: swap is for a VM with less --ram than --memory, and has {MIN_SWAP} at least, in whole pages of 4K"
    )]
    Swap(ByteSize),
    /// An embedded guest that there is not.
    #[error("there is no embedded guest '{name}'; there are: {known}")]
    Guest {
        /// Asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Generations at no interval.
    #[error("--snapshot-every {0} ms: from {MIN_INTERVAL_MS} ms on")]
    Interval(u64),
    /// A hold-up that is none, or an age.
    #[error("--holdup {0} µs: from {MIN_HOLDUP_US} µs to {MAX_HOLDUP_US} µs")]
    HoldUp(u64),
    /// A hold-up of memory that is swapped.
    #[error(
        "--holdup is for a VM whose memory is all RAM: with --ram, a freeze writes more than what its budget counts"
    )]
    HoldUpPaged,
    /// Disks.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetConfigError),
    /// Sockets.
    #[error(transparent)]
    Vsock(#[from] VsockConfigError),
    /// More network cards than fit.
    #[error("{0} network cards: a VM has at most {MAX_CARDS}")]
    Cards(usize),
    /// A command line that no kernel could take.
    #[error("the kernel command line contains a zero byte")]
    Cmdline,
}

/// Generations cannot follow one another more quickly than this, in milliseconds.
pub const MIN_INTERVAL_MS: u64 = 10;
/// The shortest hold-up that can be asked for, in microseconds.
pub const MIN_HOLDUP_US: u64 = 100;
/// The longest: a minute, in microseconds.
pub const MAX_HOLDUP_US: u64 = 60_000_000;
/// As many as the xAPIC IDs of the MADT reach.
pub const MAX_CPUS: u32 = 254;
/// Enough for the tables that a boot needs.
pub const MIN_MEMORY: ByteSize = ByteSize(2 << 20);
/// A few clusters.
pub const MIN_SWAP: ByteSize = ByteSize(1 << 20);
/// 64 TiB: what 46 physical address bits reach.
pub const MAX_MEMORY: ByteSize = ByteSize(1 << 46);

impl VmConfig {
    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        let memory = self.memory;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) || !memory.0.is_multiple_of(PAGE_SIZE) {
            return Err(ConfigError::Memory(memory));
        }
        self.validate_ram()?;
        self.validate_holdup()?;
        disks::validate(&self.disks)?;
        pmem::validate(&self.pmem, &self.disks, memory)?;
        if let Some(interval) = self.snapshot_every_ms.filter(|interval| *interval < MIN_INTERVAL_MS) {
            return Err(ConfigError::Interval(interval));
        }
        if self.net.len() > MAX_CARDS {
            return Err(ConfigError::Cards(self.net.len()));
        }
        NetConfig::validate(&self.net)?;
        self.vsock.as_ref().map_or(Ok(()), VsockConfig::validate)?;
        if self.cmdline.contains('\0') {
            return Err(ConfigError::Cmdline);
        }
        match &self.kernel {
            Kernel::Guest(name) | Kernel::GuestWith { guest: name, .. } if guests::by_name(name).is_none() => {
                let known: Vec<_> = guests::all().iter().map(|guest| guest.name).collect();
                Err(ConfigError::Guest { name: name.clone(), known: known.join(", ") })
            }
            _ => Ok(()),
        }
    }

    fn validate_holdup(&self) -> Result<(), ConfigError> {
        match self.holdup_us {
            Some(holdup) if !(MIN_HOLDUP_US..=MAX_HOLDUP_US).contains(&holdup) => Err(ConfigError::HoldUp(holdup)),
            Some(_) if self.geometry().is_some() => Err(ConfigError::HoldUpPaged),
            _ => Ok(()),
        }
    }

    fn validate_ram(&self) -> Result<(), ConfigError> {
        let memory = self.memory;
        if let Some(ram) = self.ram {
            let least = ByteSize(Geometry::least_ram(memory.0, self.medium).min(memory.0));
            let fits = ram <= memory && ram.0.is_multiple_of(PAGE_SIZE);
            if !fits || (ram < memory && Geometry::new(memory.0, ram.0, self.medium).is_none()) {
                return Err(ConfigError::Ram { ram, memory, least });
            }
        }
        if let Some(floor) = self.ram_min {
            let least = Geometry::least_ram(memory.0, self.medium);
            if self.geometry().is_none() || !(least..=self.ram_bytes()).contains(&floor.0) {
                return Err(ConfigError::RamMin(floor));
            }
        }
        match self.swap {
            Some(swap) if self.geometry().is_none() || swap < MIN_SWAP || !swap.0.is_multiple_of(PAGE_SIZE) => {
                Err(ConfigError::Swap(swap))
            }
            _ => Ok(()),
        }
    }

    /// The time within which a freeze is to be done.
    #[must_use]
    pub fn holdup(&self) -> Option<Duration> {
        self.holdup_us.map(Duration::from_micros)
    }

    /// The files outside of the pool that it is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let (kernel, initrd) = match &self.kernel {
            Kernel::Guest(_) => (None, None),
            Kernel::GuestWith { initrd, .. } => (None, Some(initrd)),
            Kernel::File { path, initrd } => (Some(path), initrd.as_ref()),
        };
        let disks = self.disks.iter().filter_map(|disk| match disk {
            DiskConfig::File { path, .. } => Some(path),
            DiskConfig::Pool { .. } => None,
        });
        kernel.into_iter().chain(initrd).chain(disks).map(PathBuf::as_path)
    }

    /// How memory is divided, if not all of it is RAM.
    #[must_use]
    pub fn geometry(&self) -> Option<Geometry> {
        self.ram.filter(|ram| *ram < self.memory).and_then(|ram| Geometry::new(self.memory.0, ram.0, self.medium))
    }

    /// Bytes of the RAM region.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        self.ram.unwrap_or(self.memory).0
    }

    /// Bytes of memory that can be swapped out, where not all of it is RAM.
    #[must_use]
    pub fn swap_bytes(&self) -> u64 {
        self.swap.unwrap_or(self.memory).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_written_back_as_they_were() {
        for (text, bytes) in
            [("4096", 4096), ("512M", 512 << 20), ("4G", 4 << 30), ("1t", 1 << 40), ("16KiB", 16 << 10)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        assert_eq!(ByteSize(512 << 20).to_string(), "512M");
        assert_eq!(ByteSize(1).to_string(), "1");
    }

    #[test]
    fn sizes_that_are_none_are_refused() {
        for text in ["", "M", "-1", "+1", "1.5G", "1X", "99999999999T", "1 2"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_config_survives_json_and_unknown_fields_do_not_pass() {
        let config = VmConfig { memory: ByteSize(1 << 30), ..VmConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
        assert!(serde_json::from_str::<VmConfig>(r#"{"memroy":"1G"}"#).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        let refuse = |config: VmConfig, what: &str| {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        refuse(VmConfig { cpus: 0, ..VmConfig::default() }, "--cpus 0");
        refuse(VmConfig { cpus: 255, ..VmConfig::default() }, "--cpus 255");
        refuse(VmConfig { memory: ByteSize(4097 << 10 | 1), ..VmConfig::default() }, "--memory");
        refuse(VmConfig { ram: Some(ByteSize(256 << 10)), ..VmConfig::default() }, "from 512K of RAM");
        refuse(VmConfig { ram: Some(ByteSize(1 << 30)), ..VmConfig::default() }, "--ram 1G");
        refuse(VmConfig { swap: Some(ByteSize(1 << 30)), ..VmConfig::default() }, "--swap 1G");
        let paged = VmConfig { ram: Some(ByteSize(64 << 20)), ..VmConfig::default() };
        refuse(VmConfig { swap: Some(ByteSize(4096)), ..paged.clone() }, "--swap 4K");
        refuse(VmConfig { ram_min: Some(ByteSize(4 << 10)), ..paged.clone() }, "--ram-min 4K");
        refuse(VmConfig { ram_min: Some(ByteSize(8 << 20)), ..VmConfig::default() }, "--ram-min 8M");
        assert_eq!((paged.validate(), paged.geometry().map(|geometry| geometry.frames())), (Ok(()), Some(4096)));
        refuse(VmConfig { kernel: Kernel::Guest("nobody".into()), ..VmConfig::default() }, "counter");
        let with = Kernel::GuestWith { guest: "nobody".into(), initrd: PathBuf::from("list") };
        refuse(VmConfig { kernel: with, ..VmConfig::default() }, "counter");
        refuse(VmConfig { snapshot_every_ms: Some(0), ..VmConfig::default() }, "--snapshot-every 0");
        refuse(VmConfig { cmdline: "a\0b".into(), ..VmConfig::default() }, "zero byte");
    }
}
