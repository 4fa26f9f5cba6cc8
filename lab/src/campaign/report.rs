//! The campaign's page.

use super::{ResultRow, Summary};
use crate::demo::report::markup::{Page, escape, maybe_seconds, seconds, words};
use crate::demo::report::{frame, table};

/// Writes the page.
pub(super) fn render(summary: &Summary) -> String {
    frame("Theriac campaign", |page| {
        opening(page, summary);
        results(page, summary);
        each(page, summary);
        page.raw("<footer>\n<p>")
            .text(format!("Ended {} on {}.", summary.started, summary.machine));
        page.raw(
            "</p>\n<p>The same figures are in <code>summary.json</code> beside this page.</p>\n</footer>\n",
        );
    })
}

fn opening(page: &mut Page, summary: &Summary) {
    let runs: usize = summary.results.iter().map(|row| row.runs).sum();
    let healed: usize = summary.results.iter().map(|row| row.healed_runs).sum();
    page.raw("<header>\n<p class=\"over\">Theriac campaign</p>\n<h1>");
    page.text(format!("{healed} of {runs} faults healed"))
        .raw("</h1>\n<p class=\"lead\">");
    page.text("The same fault again and again on one edge with one service under load. Every time counts from the injection; failed requests are counted by the load generator, which knows nothing of the edge.");
    page.raw("</p>\n</header>\n");
}

fn results(page: &mut Page, summary: &Summary) {
    page.raw("<section>\n<h2>Medians</h2>\n<p class=\"note\">Over all runs of a fault; a run that was not healed counts in no time.</p>\n<div class=\"panel table\">\n");
    let number = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), |value| format!("{value:.0}"));
    table(
        page,
        "Medians",
        "cards",
        &[
            "Fault",
            "Healed",
            "Detected after",
            "Healed after",
            "Requests failed for",
            "Failed requests",
            "Lost writes",
            "Harmful actions",
        ],
        &[1, 2, 3, 4, 5, 6, 7],
        summary.results.iter().map(|row| {
            vec![
                format!(
                    "{}<span class=\"sub\">{}</span>",
                    escape(words(row.fault)),
                    escape(row.healer)
                ),
                format!("{} of {}", row.healed_runs, row.runs),
                maybe_seconds(row.detect_s),
                maybe_seconds(row.heal_s),
                maybe_seconds(row.down_s),
                number(row.failed_requests),
                number(row.lost_transactions),
                number(row.harmful_actions),
            ]
        }),
    );
    page.raw("</div>\n</section>\n");
}

/// Every run as a bar, so that the spread shows.
fn each(page: &mut Page, summary: &Summary) {
    for row in summary.results.iter().filter(|row| !row.each_heal_s.is_empty()) {
        page.raw("<section>\n<h2>")
            .text(format!("{} under {}, every run", words(row.fault), row.healer))
            .raw("</h2>\n");
        page.raw("<p class=\"note\">Time until the last request failed.</p>\n<div class=\"panel\">\n<dl class=\"reasons\">\n");
        bars(page, row);
        page.raw("</dl>\n</div>\n</section>\n");
    }
}

fn bars(page: &mut Page, row: &ResultRow) {
    let longest = row
        .each_down_s
        .iter()
        .flatten()
        .copied()
        .fold(f64::MIN_POSITIVE, f64::max);
    for (index, down_s) in row.each_down_s.iter().enumerate() {
        let share = down_s.map_or(0.0, |down_s| down_s / longest * 100.0);
        page.raw("<div><dt>")
            .text(format!("run {}", index + 1))
            .raw("</dt>");
        page.raw(format!(
            "<dd class=\"track\"><i style=\"width:{share:.1}%\"></i></dd>"
        ));
        page.raw("<dd class=\"num\">")
            .text(down_s.map_or("not healed".to_owned(), seconds))
            .raw("</dd></div>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_every_fault_and_every_run() {
        let row = ResultRow {
            fault: "kill9",
            healer: "theriac",
            runs: 2,
            detect_s: Some(0.2),
            heal_s: Some(0.9),
            down_s: Some(0.9),
            failed_requests: Some(12.0),
            lost_transactions: Some(0.0),
            actions: Some(1.0),
            harmful_actions: Some(0.0),
            healed_runs: 1,
            each_heal_s: vec![Some(0.9), None],
            each_down_s: vec![Some(0.9), None],
        };
        let summary = Summary {
            results: vec![row],
            skipped: Vec::new(),
            started: String::new(),
            machine: "<2 cores>".into(),
        };
        let page = render(&summary);
        for part in ["kill9", "1 of 2", "0.90 s", "not healed", "&lt;2 cores&gt;"] {
            assert!(page.contains(part), "{part} is missing");
        }
        assert_eq!(page.matches("<div").count(), page.matches("</div>").count());
    }
}
