//! The campaign's page: what holds, the figures, and a timeline of every run.

use std::fmt::Write as _;

use super::score::{BIN_MS, RunLog};
use super::table::cells;
use super::{Healer, Summary, Trouble};
use crate::demo::report::markup::{Page, escape, seconds, words};
use crate::demo::report::{frame, table};

/// Writes the page.
pub(super) fn render(summary: &Summary, runs: &[RunLog]) -> String {
    frame("Theriac campaign", |page| {
        opening(page, summary);
        claims(page, summary);
        figures(page, summary);
        timelines(page, runs);
        left_out(page, summary);
        page.raw("<footer>\n<p>").text(format!(
            "Began {} on {}; {:.0} s, seed {}.",
            summary.started, summary.machine, summary.seconds, summary.plan.seed
        ));
        page.raw(
            "</p>\n<p>The same figures are in <code>summary.json</code> and <code>table.md</code> beside this page, every run in <code>runs.jsonl</code>.</p>\n</footer>\n",
        );
    })
}

fn opening(page: &mut Page, summary: &Summary) {
    let ours = || {
        summary
            .results
            .iter()
            .filter(|row| row.healer == Healer::Theriac.name())
    };
    let runs: usize = ours().map(|row| row.runs).sum();
    let healed: usize = ours().map(|row| row.healed_runs).sum();
    page.raw("<header>\n<p class=\"over\">Theriac campaign</p>\n<h1>");
    page.text(format!(
        "{healed} of {runs} faults under Theriac healed or passed{}",
        if summary.interrupted {
            "; ended before its end"
        } else {
            ""
        }
    ));
    page.raw("</h1>\n<p class=\"lead\">");
    page.text("Every healer has an HTTP service, a PostgreSQL and a Redis server of its own under the same load, and is given the same real fault at the same moment. Clients come to the HTTP service through Theriac's proxy, and straight to it under whoever has none. Times count from the fault; of a fault that comes bit by bit, from the first failed request. Failed requests are what the load saw. Ramps are compressed into about 20 s.");
    page.raw("</p>\n</header>\n");
}

fn claims(page: &mut Page, summary: &Summary) {
    if summary.bars.is_empty() {
        return;
    }
    page.raw("<section>\n<h2>What these runs speak for</h2>\n<div class=\"panel table\">\n");
    table(
        page,
        "Bars",
        "cards",
        &["What is asked", "Measured", ""],
        &[],
        summary.bars.iter().map(|bar| {
            let (word, colour) = if bar.holds {
                ("holds", "--heal")
            } else {
                ("missed", "--fault")
            };
            vec![
                escape(&bar.what),
                escape(&bar.measured),
                format!("<strong style=\"color:var({colour})\">{word}</strong>"),
            ]
        }),
    );
    page.raw("</div>\n");
    if let Some(cost) = summary.proxy_cost {
        page.raw("<p class=\"note\">")
            .text(format!("{}.", cost.told()))
            .raw("</p>\n");
    }
    page.raw("</section>\n");
}

fn figures(page: &mut Page, summary: &Summary) {
    page.raw("<section>\n<h2>Medians</h2>\n<p class=\"note\">A run that was not healed counts as longer than any that was. Lost writes, actions, harm and restarts are over all runs.</p>\n<div class=\"panel table\">\n");
    table(
        page,
        "Medians",
        "cards",
        &[
            "Fault",
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
        ],
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        summary.results.iter().map(|row| {
            let told: Vec<String> = cells(row).iter().map(escape).collect();
            let named = format!(
                "{}<span class=\"sub\">{}</span>",
                escape(words(row.fault)),
                escape(words(row.healer))
            );
            std::iter::once(named).chain(told.into_iter().skip(2)).collect()
        }),
    );
    page.raw("</div>\n</section>\n");
}

/// Geometry of a timeline, pixels.
const LABEL: f64 = 190.0;
const WIDTH: f64 = 1_000.0;
const ROW: f64 = 34.0;
const TOP: f64 = 26.0;

fn timelines(page: &mut Page, runs: &[RunLog]) {
    page.raw("<section>\n<h2>Every run</h2>\n<p class=\"note\">Red: the fault is there. Green: no request failed any more. Circle: the healer noticed. Triangle: it acted. Line: a new process. Beneath: failed requests, a column for each quarter of a second.</p>\n");
    for fault in Trouble::ALL {
        let mut of: Vec<&RunLog> = runs
            .iter()
            .filter(|run| run.fault == fault && run.not_injected.is_none())
            .collect();
        if of.is_empty() {
            continue;
        }
        of.sort_by_key(|run| (run.healer, run.run));
        page.raw("<details open=\"open\">\n<summary>")
            .text(fault.title())
            .raw("</summary>\n<div class=\"panel\">\n");
        page.raw(drawn(fault, &of));
        page.raw("</div>\n</details>\n");
    }
    page.raw("</section>\n");
}

fn drawn(fault: Trouble, runs: &[&RunLog]) -> String {
    let longest = runs.iter().map(|run| run.ended_s).fold(1.0, f64::max);
    let height = TOP + ROW * runs.len() as f64 + 8.0;
    let x = |s: f64| LABEL + (WIDTH - LABEL - 20.0) * (s / longest).clamp(0.0, 1.0);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{}\">\n",
        escape(format!("Timelines of {}", fault.title()))
    );
    let step = [1.0, 2.0, 5.0, 10.0, 20.0]
        .into_iter()
        .find(|step| longest / step <= 10.0)
        .unwrap_or(60.0);
    let mut tick = 0.0;
    while tick <= longest {
        let at = x(tick);
        // Writing to a string cannot fail.
        writeln!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{:.0}\" x2=\"{at:.1}\" y2=\"{height:.0}\" /><text x=\"{at:.1}\" y=\"14\" text-anchor=\"middle\">{tick:.0} s</text>",
            TOP - 6.0
        )
        .ok();
        tick += step;
    }
    for (index, run) in runs.iter().enumerate() {
        one(&mut svg, run, TOP + ROW * index as f64, &x);
    }
    svg.push_str("</svg>\n");
    svg
}

fn one(svg: &mut String, run: &RunLog, top: f64, x: &impl Fn(f64) -> f64) {
    let over = if run.healed {
        run.last_failure_s.unwrap_or(0.0).max(run.gone_s.unwrap_or(0.0))
    } else {
        run.ended_s
    };
    let mut bar = |from: f64, until: f64, colour: &str, from_top: f64, height: f64| {
        writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"1\" style=\"fill:var({colour})\" />",
            x(from),
            top + from_top,
            (x(until) - x(from)).max(1.0)
        )
        .ok();
    };
    bar(0.0, over, "--fault", 2.0, 8.0);
    if run.healed {
        bar(over, run.ended_s, "--heal", 2.0, 8.0);
    }
    let width_s = BIN_MS as f64 / 1e3;
    let most = run.failures.iter().copied().max().unwrap_or(0).max(1);
    for (bin, count) in run.failures.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = 14.0 * f64::from(*count) / f64::from(most);
        let from = bin as f64 * width_s;
        bar(from, from + width_s * 0.8, "--warn", 26.0 - height, height);
    }
    if let Some(noticed) = run.detect_s {
        writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" style=\"fill:var(--card);stroke:var(--score);stroke-width:2\" />",
            x(noticed),
            top + 6.0
        )
        .ok();
    }
    if let Some(acted) = run.act_s {
        let (at, y) = (x(acted), top + 6.0);
        writeln!(
            svg,
            "<path d=\"M{at:.1} {:.1} l5 8 l-10 0 z\" style=\"fill:var(--ink)\" />",
            y - 4.0
        )
        .ok();
    }
    for renewed in &run.renewals_s {
        let at = x(*renewed);
        writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{top:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" style=\"stroke:var(--ink);stroke-width:1.5\" />",
            top + 12.0
        )
        .ok();
    }
    let told = match run.health_s() {
        Some(0.0) => "no failure".to_owned(),
        Some(health_s) => seconds(health_s),
        None => "not healed".to_owned(),
    };
    writeln!(
        svg,
        "<text class=\"name\" x=\"0\" y=\"{:.1}\">{}</text><text x=\"0\" y=\"{:.1}\">{}</text>",
        top + 10.0,
        escape(format!("{} {}", words(run.healer.name()), run.run)),
        top + 24.0,
        escape(format!("{told}, {} failed", run.failed_requests))
    )
    .ok();
}

fn left_out(page: &mut Page, summary: &Summary) {
    if summary.skipped.is_empty() {
        return;
    }
    page.raw("<section>\n<h2>Left out</h2>\n<ul>\n");
    for left_out in &summary.skipped {
        page.raw("<li>")
            .text(format!("{}: {}", words(&left_out.fault), left_out.reason))
            .raw("</li>\n");
    }
    page.raw("</ul>\n</section>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::{Plan, Skipped, bars, markdown, rows};

    fn specimen() -> (Summary, Vec<RunLog>) {
        let run = RunLog {
            number: 1,
            run: 1,
            healed: true,
            limit_s: 20.0,
            ended_s: 4.0,
            detect_s: Some(0.2),
            act_s: Some(0.3),
            gone_s: Some(0.0),
            first_failure_s: Some(0.0),
            last_failure_s: Some(0.9),
            failed_requests: 12,
            actions: 1,
            class: Some("<i>crash</i>".to_owned()),
            renewals_s: vec![0.4],
            failures: vec![4, 8, 0, 0],
            ..RunLog::default()
        };
        let stays = RunLog {
            healer: Healer::Monit,
            healed: false,
            ..run.clone()
        };
        let runs = vec![run, stays];
        let summary = Summary {
            results: rows(&runs),
            bars: bars(&runs),
            shortfalls: Vec::new(),
            skipped: vec![Skipped {
                fault: "slow_disk".to_owned(),
                reason: "<script>alert(1)</script> | \"quoted\"".to_owned(),
            }],
            proxy_cost: Some(crate::campaign::ProxyCost {
                requests: 100,
                direct_ms: [0.4, 1.5],
                through_ms: [0.9, 2.5],
            }),
            plan: Plan {
                faults: vec![Trouble::Kill9],
                healers: vec![Healer::Theriac, Healer::Monit],
                runs: 1,
                seed: 5,
            },
            unprovoked: std::collections::BTreeMap::new(),
            caveats: vec!["theriac: <b>1</b> of 2".to_owned()],
            interrupted: false,
            started: String::new(),
            seconds: 1.0,
            machine: "<2 cores>".into(),
        };
        (summary, runs)
    }

    #[test]
    fn shows_every_fault_and_every_run_and_lets_no_markup_through() {
        let (summary, runs) = specimen();
        let page = render(&summary, &runs);
        for part in [
            "kill9",
            "theriac 1",
            "monit 1",
            "0.90 s, 12 failed",
            "adds 0.50 ms in the median",
            "not healed",
            "&lt;2 cores&gt;",
            "&lt;script&gt;alert(1)&lt;/script&gt;",
            "<circle",
            "<svg",
        ] {
            assert!(page.contains(part), "{part} is missing");
        }
        assert!(!page.contains("<script"), "markup came through");
        for tag in ["div", "svg", "table", "details", "section"] {
            let (open, closed) = (
                page.matches(&format!("<{tag}")).count(),
                page.matches(&format!("</{tag}>")).count(),
            );
            assert_eq!(open, closed, "{tag}");
        }
    }

    #[test]
    fn the_table_for_documents_keeps_its_cells() {
        let (summary, _) = specimen();
        let told = markdown(&summary);
        let columns = |line: &str| line.replace("\\|", "").matches('|').count();
        let rows: Vec<&str> = told.lines().filter(|line| line.starts_with("| kill9")).collect();
        assert_eq!(rows.len(), 2, "{told}");
        assert!(rows.iter().all(|row| columns(row) == 14), "{told}");
        assert!(rows[1].contains("0 of 1") && rows[1].contains("not healed"));
        assert!(told.contains("\\| \"quoted\"") && !told.contains("<script"));
    }
}
