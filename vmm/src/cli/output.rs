//! How results are shown: numbers for people, one JSON document for scripts, tables.

use std::io::Write;

use serde::Serialize;

/// As `println!`, but the end of a reader (`perdure list | head -1`) is the end of the work and no failure.
macro_rules! say {
    ($($words:tt)*) => { $crate::cli::output::line(format_args!($($words)*)) };
}
pub(super) use say;

/// Writes a line to standard output. If nobody reads it any more, the process ends: there is nothing left to say.
pub(super) fn line(words: std::fmt::Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{words}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => tracing::warn!("cannot write to standard output: {error}"),
        Ok(()) => {}
    }
}

/// Prints one JSON document on standard output.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A number of bytes, for people.
pub(super) fn bytes(bytes: u64) -> String {
    allocator::Size(bytes).to_string()
}

/// A throughput in bytes a second, for people: decimal units, as disks are sold.
pub(super) fn rate(bytes_per_second: f64) -> String {
    match bytes_per_second {
        1e9.. => format!("{:.2} GB/s", bytes_per_second / 1e9),
        _ => format!("{:.0} MB/s", bytes_per_second / 1e6),
    }
}

/// A time in nanoseconds, for people.
pub(super) fn time(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// Prints rows under headings, in columns as wide as they need to be.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(headings.get(column).map(|heading| heading.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        say!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(headings.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_have_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(time(999), "999 ns");
        assert_eq!(time(1_500_000), "1.50 ms");
    }
}
