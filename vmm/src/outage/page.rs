//! A simulation as one page: HTML with its pictures (SVG) and style in it, nothing of the network's.

use std::fmt::Write;

use super::report::{OutageReport, Summary, Tally, Verdict, VmOutage, WentOnFrom, phases};
use crate::bench::{Conditions, Distribution};

/// Width of a time line in pixels.
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 26.0;
/// Okabe and Ito's colours, which everyone can tell apart (*Color Universal Design*, 2008), one for each phase of a freeze.
const COLOURS: [&str; 8] = ["#0072b2", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#999999", "#e69f00", "#cc79a7"];
const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#1b1b1b;background:#fff}\
h1{font-size:1.6em}h2{margin-top:2em}table{border-collapse:collapse;width:100%}\
td,th{padding:.3em .6em;text-align:left;border-bottom:1px solid #ddd;vertical-align:middle;font-size:13px}\
.good{color:#00684a}.bad{color:#b3001b;font-weight:bold}.big{font-size:1.3em}.key{display:inline-block;width:.9em;height:.9em;\
margin:0 .3em 0 1em;vertical-align:-.1em}small,.dim{color:#666}.tile{display:inline-block;margin:0 2em 1em 0}\
.tile b{display:block;font-size:1.5em}td.short{white-space:nowrap}td small{white-space:normal}svg text{font:11px system-ui,sans-serif;fill:#444}";

/// Text as it may stand in a page.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A time for people.
fn time(ns: u64) -> String {
    match ns {
        0 => "0".to_owned(),
        1..1_000_000 => format!("{:.0} µs", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// The page.
#[must_use]
pub fn page(tally: &Tally, seed: u64, conditions: &Conditions) -> String {
    let mut page = String::new();
    let summary = tally.summary();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>perdure: {} outages</title><style>{STYLE}</style>\
         <h1>{} simulated power outages</h1>",
        summary.outages, summary.outages
    );
    headline(&mut page, &summary);
    explain(&mut page);
    timelines(&mut page, tally, summary.outages);
    distributions(&mut page, tally, &summary);
    let Conditions { cpu, cpus, kernel, load } = conditions;
    let _ = write!(
        page,
        "<p class=dim>Seed {} (<code>perdure outage run --seed {}</code> with the same arguments draws the same times, cuts and losses; the \
         machine's own timing differs). {} × {}, Linux {}, load {}.</p></html>",
        seed,
        seed,
        cpus,
        escape(cpu),
        escape(kernel),
        escape(load)
    );
    page
}

fn headline(page: &mut String, summary: &Summary) {
    let (class, words) = match summary.violations {
        0 => ("good", "Nothing was lost that had been said to be durable, and no guest found an error.".to_owned()),
        count => ("bad", format!("{count} times something was not as it must be.")),
    };
    let _ = write!(page, "<p class=\"big {class}\">{words}</p><p>");
    let mut tile = |number: String, what: &str| {
        let _ = write!(page, "<span class=tile><b>{number}</b>{what}</span>");
    };
    tile(summary.cuts.to_string(), "cuts of the power");
    tile(summary.from_context.to_string(), "went on at the next instruction");
    tile(summary.from_generation.to_string(), "went on from a generation");
    tile(summary.from_boot.to_string(), "booted anew");
    tile(summary.ran_on.to_string(), "ran on: power came back");
    if let Some(met) = summary.holdup_met_percent {
        tile(format!("{met:.1} %"), "of freezes done within the hold-up");
    }
    if summary.freeze.samples > 0 {
        tile(time(summary.freeze.p50_ns), "signal to all durable, median");
    }
    if summary.resume.samples > 0 {
        tile(time(summary.resume.p50_ns), "process start to first output, median");
    }
    page.push_str("</p>");
}

fn explain(page: &mut String) {
    page.push_str(
        "<h2>Each outage</h2><p>Time runs from the power-fail signal (left) to darkness. Coloured bars are the steps of the freeze, in which the \
         VMM makes everything durable; the <b>black line</b> is the end of the hold-up, the time that the power supply lasts; the <b>grey area</b> is \
         darkness. A freeze whose bars end before the line has met its hold-up. Each row has a scale of its own. Then the VM was started again, and its guest recomputed its own output \
         from the beginning.</p><p>",
    );
    let names = phases(&crate::persistence::freeze::FreezeSteps::default());
    for ((name, _), colour) in names.iter().zip(COLOURS) {
        let _ = write!(page, "<span class=key style=\"background:{colour}\"></span>{name}");
    }
    page.push_str("</p>");
}

fn timelines(page: &mut String, tally: &Tally, all: usize) {
    let drawn = tally.kept().count();
    if drawn < all {
        let _ = write!(page, "<p class=dim>{drawn} of {all} are shown: those with violations, then the first.</p>");
    }
    page.push_str(
        "<table><tr><th>#<th>VM<th>power<th>from the signal<th>went on from<th>work lost<th>back after<th>verdict<th>seed</tr>",
    );
    // As they came; machines side by side are not done in that order.
    let mut kept: Vec<&OutageReport> = tally.kept().collect();
    kept.sort_by_key(|outage| (!outage.is_violated(), outage.number));
    for outage in kept {
        for vm in &outage.vms {
            row(page, outage, vm);
        }
    }
    page.push_str("</table>");
}

fn row(page: &mut String, outage: &OutageReport, vm: &VmOutage) {
    let mut power = escape(&outage.cut);
    if outage.flaps > 0 {
        let times = if outage.flaps == 1 { "once".to_owned() } else { format!("{} times", outage.flaps) };
        let _ = write!(power, "<br><small>came back {times}</small>");
    }
    if let Some(fault) = &outage.fault {
        let _ = write!(power, "<br><small>medium: {}</small>", escape(fault));
    }
    if !vm.cut_off_at.is_empty() {
        let _ = write!(power, "<br><small>cut off at {}</small>", escape(&vm.cut_off_at.join(", ")));
    }
    if let Some(damaged) = &vm.damaged {
        let _ = write!(power, "<br><small>damaged: {}</small>", escape(damaged));
    }
    let went_on = match &vm.went_on {
        WentOnFrom::Running => "ran on".to_owned(),
        WentOnFrom::Context { sequence } => format!("context {sequence}"),
        WentOnFrom::Generation { generation, age_ns } => format!("{}, {} old", escape(generation), time(*age_ns)),
        WentOnFrom::Boot => "its kernel".to_owned(),
    };
    let lost = match vm.lost_links.filter(|links| *links > 0) {
        Some(links) => format!("{} <small>({links} links)</small>", time(vm.lost_ns)),
        None => time(vm.lost_ns),
    };
    let verdict = match &vm.verdict {
        Verdict::Unbroken { links } => format!("<span class=good>unbroken</span> <small>{links} links</small>"),
        Verdict::RunsOn => "<span class=good>runs on</span>".to_owned(),
        Verdict::Violated { why } => format!("<span class=bad>{}</span>", escape(why)),
    };
    let resumed = vm.resume_ns.map(time).unwrap_or_default();
    let _ = write!(
        page,
        "<tr><td>{}<td class=short>{}<br><small>{}</small><td>{power}<td>{}<td>{went_on}<td class=short>{lost}<td class=short>{resumed}<td>{verdict}\
         <td><small>{}</small></tr>",
        outage.number,
        escape(&vm.name),
        escape(&vm.medium),
        timeline(outage, vm),
        outage.seed
    );
}

/// One outage from its signal on.
fn timeline(outage: &OutageReport, vm: &VmOutage) -> String {
    if !vm.warned {
        return "<small>no warning</small>".to_owned();
    }
    let total = vm.freeze.map_or(0, |freeze| vm.warned_ns + freeze.total_ns);
    let end =
        [Some(total), outage.holdup_ns, outage.dark_ns].into_iter().flatten().max().unwrap_or(1).max(1) as f64 * 1.08;
    let x = |ns: u64| ns as f64 / end * WIDTH;
    let mut svg = format!("<svg width=\"{WIDTH}\" height=\"{}\" role=\"img\">", HEIGHT + 14.0);
    if let Some(dark) = outage.dark_ns {
        let _ = write!(
            svg,
            "<rect x=\"{:.1}\" y=\"0\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"#ccc\"><title>darkness, {} after the signal</title></rect>",
            x(dark),
            WIDTH - x(dark),
            time(dark)
        );
    }
    if let Some(freeze) = &vm.freeze {
        let mut at = vm.warned_ns;
        let steps = phases(&freeze.steps);
        // What comes before the first step: the signal's way to the VMM.
        at += freeze.total_ns.saturating_sub(steps.iter().map(|(_, ns)| ns).sum());
        for ((name, ns), colour) in steps.iter().zip(COLOURS) {
            let _ = write!(
                svg,
                "<rect x=\"{:.1}\" y=\"4\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"><title>{name}: {}</title></rect>",
                x(at),
                (x(*ns)).max(0.4),
                HEIGHT - 8.0,
                time(*ns)
            );
            at += ns;
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\">durable {}</text>",
            x(total).min(WIDTH - 200.0),
            HEIGHT + 11.0,
            time(total)
        );
    } else {
        let why = vm.not_frozen.as_deref().unwrap_or("not frozen");
        let _ = write!(svg, "<text x=\"4\" y=\"17\">not frozen<title>{}</title></text>", escape(why));
    }
    if let Some(holdup) = outage.holdup_ns {
        let _ = write!(
            svg,
            "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"0\" y2=\"{HEIGHT}\" stroke=\"#000\" stroke-width=\"2\"><title>hold-up: {1}</title></line>\
             <text x=\"{WIDTH}\" y=\"{2}\" text-anchor=\"end\">hold-up {1}</text>",
            x(holdup),
            time(holdup),
            HEIGHT + 11.0
        );
    }
    svg.push_str("</svg>");
    svg
}

fn distributions(page: &mut String, tally: &Tally, summary: &Summary) {
    page.push_str("<h2>Distributions</h2>");
    let times = tally.times();
    let holdup = times.holdup_ns;
    histogram(page, "From the signal until everything was durable", times.freeze, &summary.freeze, holdup);
    histogram(page, "Of that, what the media took", times.flush, &summary.flush, holdup);
    histogram(page, "From the start of the process to the guest's first output", times.resume, &summary.resume, None);
    let lost: Vec<u64> = times.lost.iter().copied().filter(|lost| *lost > 0).collect();
    let title = "Work lost, where some was (no freeze in time, so an earlier generation or the kernel)";
    histogram(page, title, &lost, &Distribution::of(lost.clone()), None);
}

fn histogram(page: &mut String, title: &str, values: &[u64], of: &Distribution, mark: Option<u64>) {
    const BINS: usize = 60;
    const HIGH: f64 = 90.0;
    const WIDE: f64 = 900.0;
    if values.is_empty() {
        return;
    }
    // A few stragglers would leave no room for all others.
    let most = of.p99_ns.max(mark.unwrap_or(0)).max(1) as f64 * 1.1;
    let mut bins = [0_u32; BINS];
    for value in values {
        let bin = ((*value as f64 / most * BINS as f64) as usize).min(BINS - 1);
        if let Some(bin) = bins.get_mut(bin) {
            *bin += 1;
        }
    }
    let tallest = f64::from(bins.iter().copied().max().unwrap_or(1).max(1));
    let _ = write!(page, "<h3>{}</h3><svg width=\"{WIDE}\" height=\"{}\" role=\"img\">", escape(title), HIGH + 18.0);
    for (index, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = (f64::from(*count) / tallest * HIGH).max(1.0);
        let wide = WIDE / BINS as f64;
        let _ = write!(
            page,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#0072b2\"><title>{count} of {}</title></rect>",
            index as f64 * wide,
            HIGH - height,
            wide - 1.0,
            values.len()
        );
    }
    if let Some(mark) = mark {
        let x = mark as f64 / most * WIDE;
        let _ = write!(
            page,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{HIGH}\" stroke=\"#000\" stroke-width=\"2\"/><text x=\"{:.1}\" y=\"10\">hold-up {}</text>",
            x + 4.0,
            time(mark)
        );
    }
    let _ = write!(
        page,
        "<text x=\"0\" y=\"{0}\">0</text><text x=\"{1}\" y=\"{0}\">{2}</text></svg>",
        HIGH + 14.0,
        WIDE - 60.0,
        time(most as u64)
    );
    let Distribution { samples, min_ns, p50_ns, p90_ns, p99_ns, max_ns } = of;
    let _ = write!(
        page,
        "<p class=dim>{samples} samples: least {}, median {}, 90 % within {}, 99 % within {}, most {} (what lies beyond is in the last bar)</p>",
        time(*min_ns),
        time(*p50_ns),
        time(*p90_ns),
        time(*p99_ns),
        time(*max_ns)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persistence::freeze::{FreezeReport, FreezeSteps};

    fn report() -> Tally {
        let steps =
            FreezeSteps { stop_ns: 100_000, persist_ns: 5_000_000, context_ns: 2_000_000, ..FreezeSteps::default() };
        let freeze = FreezeReport {
            sequence: 2,
            total_ns: 7_200_000,
            flush_ns: 7_000_000,
            steps,
            bytes: None,
            context_bytes: 9000,
            holdup_left_ns: Some(8_800_000),
        };
        let vm = |name: &str, verdict, freeze| VmOutage {
            name: name.to_owned(),
            medium: "file".to_owned(),
            warned: true,
            warned_ns: 0,
            freeze,
            in_time: Some(true),
            not_frozen: None,
            cut_off_at: vec!["resume.clear+1".to_owned()],
            went_on: WentOnFrom::Context { sequence: 2 },
            attempts: 2,
            damaged: Some("context 3, the older one".to_owned()),
            lost_ns: 0,
            lost_links: Some(0),
            resume_ns: Some(9_000_000),
            verdict,
        };
        let outage = OutageReport {
            number: 1,
            seed: 7,
            cut: "after-holdup".to_owned(),
            at_ns: 1,
            holdup_ns: Some(16_000_000),
            flaps: 1,
            fault: None,
            dark_ns: Some(16_000_000),
            lost_bytes: 0,
            lost_files: 0,
            vms: vec![
                vm("web", Verdict::Unbroken { links: 12 }, Some(freeze)),
                vm("<db>", Verdict::Violated { why: "tick 3 & 4".to_owned() }, None),
            ],
        };
        let mut tally = Tally::default();
        tally.add(outage);
        tally
    }

    #[test]
    fn a_page_has_all_of_an_outage_and_nothing_from_elsewhere() {
        let page = page(&report(), 7, &Conditions::now());
        for words in [
            "flush memory: 5.0 ms",
            "hold-up: 16.0 ms",
            "unbroken",
            "12 links",
            "&lt;db&gt;",
            "tick 3 &amp; 4",
            "resume.clear+1",
            "damaged: context 3, the older one",
            "1 times something",
        ] {
            assert!(page.contains(words), "{words}: {page}");
        }
        for foreign in ["http:", "https:", "src=", "@import", "<db>", "<script"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }

    #[test]
    fn the_summary_counts_what_the_outages_were() {
        let Summary { outages, cuts, holdup_met_percent, from_context, violations, .. } = report().summary();
        assert_eq!((outages, cuts, from_context, violations), (1, 1, 2, 1));
        assert_eq!(holdup_met_percent, Some(100.0));
    }
}
