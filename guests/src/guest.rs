//! The guests and their parameters.

use std::sync::LazyLock;

use crate::images;

/// A bare-metal guest kernel.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// An ELF64 executable; [`crate::ports`] tells how to enter it.
    pub image: &'static [u8],
    /// What its command line understands, as words `key=value` separated by spaces. The last of several words with
    /// one key holds; words with other keys are ignored. Numbers are decimal with an optional suffix K, M or G (binary).
    pub parameters: &'static [Parameter],
}

/// A parameter of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// The key, without `=`.
    pub name: &'static str,
    /// Its value where the command line has none.
    pub default: &'static str,
    /// What it sets.
    pub what: &'static str,
}

const fn parameter(name: &'static str, default: &'static str, what: &'static str) -> Parameter {
    Parameter { name, default, what }
}

const COUNTER: &[Parameter] = &[
    parameter("ticks", "0", "timer ticks to count before powering off; 0 counts forever"),
    parameter("hz", "100", "ticks a second, 19 to 10000"),
    parameter("every", "1", "print every n-th tick; 0 prints none but the last"),
    parameter("ram", "256K", "bytes of memory in the chain, whole pages spread over what is usable below 1 GiB"),
    parameter("verify", "1", "1: end with code 1 at the first difference; 0: only the chain tells"),
];

const MEMWALK: &[Parameter] = &[
    parameter("pattern", "sequential", "order of touches: sequential, uniform, zipf, hotcold, phases"),
    parameter("ws", "64M", "bytes of the working set; 0 takes all memory there is"),
    parameter("write", "50", "per cent of touches that write"),
    parameter("count", "0", "touches to do before powering off; 0 goes on forever"),
    parameter("report", "100000", "touches between two reports of their number through the report port; 0 for none"),
    parameter("verify", "0", "1: each page holds a hash of its number and version, looked at on every visit"),
    parameter("words", "8", "words of each page that verify writes and looks at, 1 to 512 (all)"),
    parameter("seed", "1", "of the random numbers"),
    parameter("hot", "10", "hotcold: per cent of pages that are hot"),
    parameter("heat", "90", "hotcold: per cent of touches that go to hot pages"),
    parameter("phase", "65536", "phases: touches of one quarter of the pages before moving to the next"),
    parameter("idle", "0", "1: after `count` touches rest without a timer instead of powering off"),
];

const PAGES: &[Parameter] = &[
    parameter("pages", "0", "pages of the working set, from 0; 0: as many as the list names"),
    parameter("writes", "list", "accesses that write: list (where the entry's top bit says so), all, none"),
    parameter("count", "0", "accesses before powering off; 0 goes on forever"),
    parameter("every", "10000000", "accesses between two lines that say how far it is; 0 for none"),
];

const PROBE: &[Parameter] = &[
    parameter("only", "", "names of tests, separated by commas: do these alone"),
    parameter("skip", "", "names of tests, separated by commas: leave these out"),
];

const RECORDS: &[Parameter] = &[
    parameter("count", "0", "records to write before powering off; 0 goes on forever"),
    parameter("flush", "1", "records from one flush to the next, 1 to an eighth of those that the disk holds"),
    parameter("hz", "100", "records a second at most, 19 to 10000; 0: as fast as they go"),
    parameter("on", "disk", "what they are written to: disk, or pmem (persistent memory); the first that there is"),
    parameter("size", "4096", "bytes of a record, whole sectors of 512, 512 to 4096"),
    parameter(
        "verify",
        "1",
        "1: read each record before it is overwritten, and end with code 1 if it is another; 0: do not",
    ),
];

const SMP: &[Parameter] = &[
    parameter("turns", "0", "turns to take, in full rounds, before powering off; 0 goes on forever"),
    parameter("hz", "100", "rounds a second, 19 to 10000; 0: as fast as they go"),
    parameter("cpus", "0", "processors, of the APIC ids 0 to n - 1; 0: those of the ACPI MADT, or 1 without it"),
];

type Row = (&'static str, &'static str, fn() -> &'static [u8], &'static [Parameter]);

const ROWS: &[Row] = &[
    ("counter", "counts timer interrupts and chains a hash over ticks, registers and memory", images::counter, COUNTER),
    ("echo", "gives back serial input line by line with a count and a hash; `quit` powers off", images::echo, &[]),
    ("memwalk", "touches a working set in a pattern and reports through a port", images::memwalk, MEMWALK),
    (
        "pages",
        "touches the pages of a list (--initrd: 4 bytes each, little-endian; top bit: write)",
        images::pages,
        PAGES,
    ),
    (
        "records",
        "appends records to a disk (--disk) or persistent memory (--pmem) and tells of each when it is durable",
        images::records,
        RECORDS,
    ),
    ("smp", "processors take turns, handed on by inter-processor interrupts, and chain a hash", images::smp, SMP),
    ("probe", "tries, one at a time, what this KVM can run", images::probe, PROBE),
    ("boot", "prints one line at once, reports 1, then rests without a timer", images::boot, &[]),
];

// Made on first use, because where an image ends is known to the linker alone.
static GUESTS: LazyLock<Vec<Guest>> = LazyLock::new(|| {
    let guest = |&(name, summary, image, parameters): &Row| Guest { name, summary, image: image(), parameters };
    ROWS.iter().map(guest).collect()
});

/// All guests.
pub fn all() -> &'static [Guest] {
    &GUESTS
}

/// The guest called `name`.
pub fn by_name(name: &str) -> Option<&'static Guest> {
    all().iter().find(|guest| guest.name == name)
}
