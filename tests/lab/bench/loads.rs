//! The loads, and what is made of a guest's answer.

use std::collections::BTreeMap;

use serde_json::Value;

/// A load of a guest.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Unique, without blanks.
    pub name: &'static str,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// The load program without a device.
    Null,
    /// fio: pattern, bytes of a request, requests at a time.
    Block(&'static str, &'static str, u32),
    /// iperf3's further arguments.
    Net(&'static str),
}

const fn block(name: &'static str, pattern: &'static str, size: &'static str, depth: u32) -> Load {
    Load { name, what: What::Block(pattern, size, depth) }
}

const fn net(name: &'static str, arguments: &'static str) -> Load {
    Load { name, what: What::Net(arguments) }
}

/// Bytes of a datagram, as the loads below say to iperf3.
const DATAGRAM: f64 = 64.0;

/// All there are, in their order. TCP's first 2 s do not count (`-O`): until its window is open, what is measured is how long round trips take on
/// a machine whose one CPU everybody waits for. Two runs of one second by the same VMM differed tenfold.
pub const LOADS: [Load; 13] = [
    Load { name: "null", what: What::Null },
    block("read-4k-random-1", "randread", "4k", 1),
    block("read-4k-random-32", "randread", "4k", 32),
    block("read-128k-1", "read", "128k", 1),
    block("read-128k-16", "read", "128k", 16),
    block("write-4k-random-1", "randwrite", "4k", 1),
    block("write-4k-random-32", "randwrite", "4k", 32),
    block("write-128k-1", "write", "128k", 1),
    block("write-128k-16", "write", "128k", 16),
    net("tcp-out", "-O 2"),
    net("tcp-in", "-O 2 -R"),
    net("udp-64-out", "-u -b 0 -l 64"),
    net("udp-64-in", "-u -b 0 -l 64 -R"),
];

/// What a load came to, once.
#[derive(Clone, Debug)]
pub struct Measured {
    /// In the load's unit; of what arrived.
    pub rate: f64,
    /// Block requests, or frames that the guest's network card sent and received.
    pub requests: f64,
    /// By how much KVM's counters and the process's rose: `exits`, …, `sleeps`, `user_ms`, `system_ms`, `guest_ms`.
    pub counters: BTreeMap<String, f64>,
}

impl Load {
    /// Whether it measures what there is without a device.
    pub fn is_null(&self) -> bool {
        matches!(self.what, What::Null)
    }

    /// As the guest's script takes it.
    pub(super) fn words(&self, seconds: u32) -> String {
        match self.what {
            What::Null => format!("null {seconds}"),
            What::Block(pattern, size, depth) => format!("block {seconds} {pattern} {size} {depth}"),
            What::Net(arguments) => format!("net {seconds} {arguments}"),
        }
    }

    /// What its rate counts.
    pub fn unit(&self) -> &'static str {
        match self.what {
            What::Null | What::Block(..) => "requests/s",
            What::Net(arguments) if arguments.contains("-u") => "datagrams/s",
            What::Net(_) => "Mbit/s",
        }
    }

    /// Takes an answer of L1's `load` apart.
    pub(super) fn measured(&self, answer: &str) -> Result<Measured, String> {
        let (counters, rest) = answer.split_once("answer\n").ok_or("no answer")?;
        let counters = rises(counters).ok_or("no counters")?;
        let (frames, result) = rest.split_once('\n').ok_or("no frames")?;
        let frames: f64 = frames.parse().map_err(|error| format!("{frames:?} frames: {error}"))?;
        let result: Value = serde_json::from_str(result).map_err(|error| format!("no result: {error}"))?;
        let number = |pointer: &str| result.pointer(pointer).and_then(Value::as_f64).ok_or(format!("no {pointer}"));
        let (rate, requests) = match self.what {
            What::Null => (number("/jobs/0/read/iops")?, 1.0),
            What::Block(pattern, ..) => {
                let side = if pattern.contains("write") { "write" } else { "read" };
                if number("/jobs/0/error")? != 0.0 {
                    return Err("fio says that requests failed".to_owned());
                }
                (number(&format!("/jobs/0/{side}/iops"))?, number(&format!("/jobs/0/{side}/total_ios"))?)
            }
            What::Net(arguments) if arguments.contains("-u") => {
                // By the bytes: `packets` of `sum` are those that were sent, and `lost_packets` the gaps among those received. What the tap or the
                // guest's socket drop behind the last that arrives is in neither.
                let arrived = number("/end/sum_received/bytes")? / DATAGRAM;
                (arrived / number("/end/sum_received/seconds")?, frames)
            }
            What::Net(_) => (number("/end/sum_received/bits_per_second")? / 1e6, frames),
        };
        Ok(Measured { rate, requests, counters })
    }
}

/// By how much each counter rose.
fn rises(counters: &str) -> Option<BTreeMap<String, f64>> {
    let (before, after) = counters.strip_prefix("before\n")?.split_once("after\n")?;
    let values = |text: &str| -> BTreeMap<String, f64> {
        let words = text.lines().filter_map(|line| line.split_once(' '));
        words.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
    };
    let (before, mut rises) = (values(before), values(after));
    for (name, value) in &mut rises {
        *value -= before.get(name).unwrap_or(&0.0);
    }
    Some(rises)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_rise_of_the_counters_and_what_the_guest_did() {
        let answer = "before\nexits 10\nsleeps 5\nafter\nexits 110\nsleeps 6\nanswer\n7\n\
                      {\"jobs\": [{\"error\": 0, \"write\": {\"iops\": 12.5, \"total_ios\": 25}}]}\n";
        let load = block("write", "randwrite", "4k", 1);
        let measured = load.measured(answer).unwrap();
        assert_eq!((measured.rate, measured.requests), (12.5, 25.0));
        assert_eq!((measured.counters["exits"], measured.counters["sleeps"]), (100.0, 1.0));
        assert!(load.measured(&answer.replace("\"error\": 0", "\"error\": 5")).is_err());
        assert!(load.measured(&answer.replace("answer", "")).is_err());
    }

    #[test]
    fn datagrams_count_if_they_arrived() {
        // Of a run where a peer sent twice what the guest could take, shortened.
        let answer = "before\nafter\nanswer\n8320\n{\"end\": {\
                      \"sum\": {\"seconds\": 1.046462, \"packets\": 11990, \"lost_packets\": 6026},\
                      \"sum_received\": {\"seconds\": 1.046462, \"bytes\": 162560, \"packets\": 8566, \"lost_packets\": 6026}}}\n";
        let measured = net("datagrams", "-u -b 0 -l 64 -R").measured(answer).unwrap();
        assert_eq!((measured.rate * 1.046_462).round(), 8566.0 - 6026.0);
        assert_eq!(measured.requests, 8320.0);
    }
}
