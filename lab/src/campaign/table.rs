//! The figures as text: for a terminal, and as a table for documents.

use super::score::ResultRow;
use super::{Summary, Trouble};
use crate::demo::report::markup::seconds;

const HEADER: [&str; 13] = [
    "Fault",
    "Healer",
    "Healed",
    "Noticed",
    "Healthy",
    "Least – most",
    "Failed requests",
    "Slowest answer",
    "Lost",
    "Actions",
    "Harm",
    "Needless restarts",
    "Checkpoints",
];

/// The figures for people.
pub fn results(summary: &Summary) -> String {
    let rows: Vec<Vec<String>> = summary.results.iter().map(cells).collect();
    let mut lines = vec![theriac_command::output::table(&HEADER, &rows)];
    lines.extend(summary.bars.iter().map(|bar| {
        let word = if bar.holds { "holds: " } else { "MISSED:" };
        format!("{word} {}: {}", bar.what, bar.measured)
    }));
    lines.extend(summary.proxy_cost.map(|cost| cost.told()));
    lines.extend(
        summary
            .skipped
            .iter()
            .map(|left_out| format!("left out: {}: {}", left_out.fault, left_out.reason)),
    );
    lines.extend(summary.caveats.iter().cloned());
    if summary.interrupted {
        lines.push("ended before its end: this is what had been measured".to_owned());
    }
    lines.join("\n")
}

/// The same as a Markdown document.
pub fn markdown(summary: &Summary) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let mut lines = vec![
        format!(
            "Began {} on {}, {:.0} s, seed {}.",
            plain(&summary.started),
            plain(&summary.machine),
            summary.seconds,
            summary.plan.seed
        ),
        String::new(),
        line(&HEADER.map(str::to_owned)),
        line(&HEADER.map(|_| "---".to_owned())),
    ];
    lines.extend(summary.results.iter().map(|row| {
        let cells: Vec<String> = cells(row).iter().map(|cell| plain(cell)).collect();
        line(&cells)
    }));
    lines.push("\n| Bar | Measured | |\n| --- | --- | --- |".to_owned());
    lines.extend(summary.bars.iter().map(|bar| {
        let word = if bar.holds { "holds" } else { "missed" };
        format!("| {} | {} | {word} |", plain(&bar.what), plain(&bar.measured))
    }));
    lines.push(String::new());
    lines.extend(summary.proxy_cost.map(|cost| format!("{}.", cost.told())));
    lines.extend(summary.caveats.iter().map(|told| format!("{}.", plain(told))));
    lines.extend(summary.skipped.iter().map(|left_out| {
        format!(
            "Left out: {}: {}.",
            plain(&left_out.fault),
            plain(&left_out.reason)
        )
    }));
    lines.join("\n") + "\n"
}

/// Nothing in it ends a cell or begins markup.
fn plain(text: &str) -> String {
    text.replace('|', "\\|")
        .replace('<', "&lt;")
        .replace(['\n', '\r'], " ")
}

/// Seconds spent on them, and how many became valid or were found bad.
fn checkpoints(row: &ResultRow) -> String {
    if row.checkpoint_seconds == 0.0 {
        return "–".to_owned();
    }
    let (seconds, valid) = (row.checkpoint_seconds, row.checkpoints_valid);
    match row.checkpoints_invalid {
        0 => format!("{seconds:.1} s for {valid}"),
        bad => format!("{seconds:.1} s for {valid}, {bad} bad"),
    }
}

/// A row's cells, plain text.
pub(super) fn cells(row: &ResultRow) -> Vec<String> {
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.0}"));
    let time = |value: Option<f64>, without: &str| {
        value.map_or_else(
            || without.to_owned(),
            |value| {
                if value == 0.0 {
                    "0 s".to_owned()
                } else {
                    seconds(value)
                }
            },
        )
    };
    let passes = row
        .fault
        .parse::<Trouble>()
        .is_ok_and(|fault| fault.lasts().is_some());
    vec![
        row.fault.to_owned(),
        row.healer.to_owned(),
        format!(
            "{} of {}{}",
            row.healed_runs,
            row.runs,
            if passes { " passed" } else { "" }
        ),
        time(row.detect_s, "–"),
        time(row.heal_s, "not healed"),
        row.heal_s_range.map_or_else(
            || "–".to_owned(),
            |[least, most]| format!("{} – {}", time(Some(least), ""), time(Some(most), "")),
        ),
        number(row.failed_requests),
        time(row.slowest_s, "–"),
        number(row.lost_transactions),
        row.actions_total.to_string(),
        number(row.harmful_actions),
        row.needless_restarts.to_string(),
        checkpoints(row),
    ]
}
