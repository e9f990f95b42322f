//! Results as a page to read.

use std::fmt::Write;

use super::results::{Plot, Results, Set, Spread, Verdict};

/// The whole page. Plots are taken to lie beside it.
pub fn page(results: &Results) -> String {
    let mut text = String::from("# Measurements\n\n| machine | |\n|---|---|\n");
    for (name, value) in &results.machine {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    text.push('\n');
    for note in &results.notes {
        let _ = writeln!(text, "- {note}");
    }
    text.push_str("\nMedian, and the range of all runs behind it.\n");
    for set in &results.sets {
        section(set, &mut text);
    }
    verdicts(&results.verdicts, &mut text);
    text
}

fn verdicts(all: &[Verdict], text: &mut String) {
    if all.is_empty() {
        return;
    }
    text.push_str(
        "\n## Verdicts\n\nRatios of what undisturbed runs gave, by medians and by the best of them; a bar is met if both are. Runs: of \
         whichever side has fewer.\n\n| bar | by medians | by best | runs | |\n|---|---|---|---|---|\n",
    );
    let figure = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), number);
    for Verdict { bar, median, best, runs, outcome, why } in all {
        let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let _ = writeln!(text, "| {bar} | {} | {} | {runs} | {outcome}{why} |", figure(*median), figure(*best));
    }
}

fn section(set: &Set, text: &mut String) {
    let _ = writeln!(text, "\n## {}\n\n{}", set.title, set.how);
    for (place, metric) in set.metrics.iter().enumerate() {
        if metric.plot != Plot::None {
            let _ =
                writeln!(text, "\n![{}, {}]({})", set.title, metric.name, super::plot::file_name(set, place, "svg"));
        }
    }
    for (place, metric) in set.metrics.iter().enumerate() {
        let columns = set.columns();
        let _ = writeln!(text, "\n| {} ({}), by {} | {} |", metric.name, metric.unit, set.row, columns.join(" | "));
        let _ = writeln!(text, "|---|{}", "---|".repeat(columns.len()));
        for row in set.rows() {
            let cells: Vec<_> = columns.iter().map(|column| spread(set.spread(row, column, place))).collect();
            let _ = writeln!(text, "| {row} | {} |", cells.join(" | "));
        }
    }
    remarks(set, text);
}

/// What is to be known of single cells: runs that went wrong or were disturbed.
fn remarks(set: &Set, text: &mut String) {
    let mut lines = Vec::new();
    for cell in &set.cells {
        let place = format!("{}, {}", cell.column, cell.row);
        if !cell.disturbed.is_empty() {
            let count = cell.disturbed.len();
            lines.push(format!(
                "- {place}: {count} runs were disturbed (CPUs far from each other, or taken by the host)"
            ));
        }
        if let Some(failure) = cell.failures.first() {
            let first = failure.lines().next().unwrap_or_default();
            lines.push(format!("- {place}: {} runs failed, the first with: {first}", cell.failures.len()));
        }
    }
    if !lines.is_empty() {
        let _ = writeln!(text, "\n{}", lines.join("\n"));
    }
}

fn spread(spread: Option<Spread>) -> String {
    match spread {
        None => "–".to_owned(),
        Some(Spread { median, min, max }) if min == max => number(median),
        Some(Spread { median, min, max }) => format!("{} ({}–{})", number(median), number(min), number(max)),
    }
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::{Cell, Metric, Outcome};
    use super::*;

    #[test]
    fn tables_have_medians_and_ranges() {
        let cell = |column: &str, samples: &[f64]| Cell {
            row: "64".into(),
            column: column.into(),
            samples: vec![samples.to_vec()],
            ..Cell::default()
        };
        let mut failed = cell("b", &[]);
        failed.failures.push("no such luck\nat all".into());
        let metric = Metric { name: "throughput".into(), unit: "Mpps".into(), plot: Plot::Bars };
        let set = Set {
            name: "x".into(),
            title: "X".into(),
            row: "frame".into(),
            metrics: vec![metric],
            cells: vec![cell("a", &[1.0, 20.5, 2.0]), failed],
            ..Set::default()
        };
        let page = page(&Results { sets: vec![set], ..Results::default() });
        assert!(page.contains("| throughput (Mpps), by frame | a | b |"), "{page}");
        assert!(page.contains("| 64 | 2.00 (1.00–20.5) | – |"), "{page}");
        assert!(page.contains("b, 64: 1 runs failed, the first with: no such luck\n"), "{page}");
        assert!(page.contains("](x.svg)"), "{page}");
    }
    #[test]
    fn verdicts_are_lines_of_a_table() {
        let met = Verdict { bar: "64 B: at least 1.5 × OVS-DPDK".into(), runs: 5, ..Verdict::default() };
        let met = Verdict { median: Some(2.034), best: Some(2.15), outcome: Outcome::Met, ..met };
        let absent = Verdict { bar: "TCP".into(), why: Some("no OVS".into()), ..Verdict::default() };
        let page = page(&Results { verdicts: vec![met, absent], ..Results::default() });
        assert!(page.contains("| 64 B: at least 1.5 × OVS-DPDK | 2.03 | 2.15 | 5 | met |\n"), "{page}");
        assert!(page.contains("| TCP | – | – | 0 | not measured: no OVS |\n"), "{page}");
    }
}
