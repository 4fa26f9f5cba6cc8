//! The report as one printed page, for an officer: self-contained, no script, nothing fetched.

use std::fmt::{self, Write as _};
use std::time::Duration;

use theriac_protocol::units::Timestamp;

use super::Status;
use super::document::{BlockRun, Document};

/// The page. `verify` says how to check it; the figures are the report's.
pub fn page(report: &Document) -> Option<String> {
    let status: Status = serde_json::from_value(report.statement.clone()).ok()?;
    written(report, &status).ok()
}

fn written(report: &Document, status: &Status) -> Result<String, fmt::Error> {
    let mut html = String::with_capacity(16 << 10);
    let title = format!("Privacy report of {}", status.node);
    write!(
        html,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header><h1>{}</h1><p class=\"made\">made {} by {}</p></header>\n",
        escape(&title),
        escape(&title),
        day_and_time(report.made),
        escape(&report.software),
    )?;
    statement(&mut html, status)?;
    figures(&mut html, status)?;
    html.push_str("<div class=\"columns\">\n");
    policy(&mut html, status)?;
    evidence(&mut html, report, status)?;
    html.push_str("</div>\n");
    super::mechanisms::table(&mut html, &report.records, status)?;
    blocks(&mut html, report, status)?;
    html.push_str("<section><h2>What this rests on</h2><ol class=\"small\">\n");
    for assumption in &report.assumptions {
        writeln!(html, "<li>{}</li>", escape(assumption))?;
    }
    html.push_str("</ol></section>\n</body>\n</html>\n");
    Ok(html)
}

fn statement(html: &mut String, status: &Status) -> fmt::Result {
    writeln!(
        html,
        "<section class=\"statement\"><p>For <b>{}</b>, everything that node <b>{}</b> has ever released is \
         (ε, δ)-differentially private with <b>ε = {}</b> at <b>δ = {:e}</b>, against everyone who sees the releases.</p>\
         <p class=\"note\">Two data sets are neighbours when one of them has one such unit more. What lasts longer than a unit shows in several: \
         for somebody whose data are in every block ε is {}. The site's own page, alarms and logs are not covered.</p></section>",
        escape(&unit(status)),
        escape(status.node.as_str()),
        digits(status.epsilon_unit_lifetime),
        status.delta,
        digits(status.epsilon_lifetime),
    )
}

fn unit(status: &Status) -> String {
    let span = humantime::format_duration(Duration::from_millis(status.block_ms));
    match status.unit {
        crate::policy::PrivacyUnit::Block => format!("each block of {span} (UTC)"),
        crate::policy::PrivacyUnit::Record => "each single sample".to_owned(),
        crate::policy::PrivacyUnit::Node => "each whole site".to_owned(),
    }
}

fn figures(html: &mut String, status: &Status) -> fmt::Result {
    let share = (status.epsilon_spent / status.epsilon_limit).clamp(0.0, 1.0) * 100.0;
    let left = (status.epsilon_limit - status.epsilon_spent).max(0.0);
    let period = match status.period.as_str() {
        "rolling" => "for ever, each block on its own".to_owned(),
        period => format!("in {period}"),
    };
    write!(
        html,
        "<section><h2>Spent</h2>\n<div class=\"bar\" role=\"img\" aria-label=\"{} of {}\"><i style=\"width:{share:.1}%\"></i></div>\n\
         <table><tr><th></th><th>ε spent</th><th>limit</th><th>left</th><th>ε by PLD</th></tr>\n\
         <tr><td>most charged unit, {}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>\n\
         <tr><td>most charged unit, all time</td><td class=\"n\">{}</td><td></td><td></td><td class=\"n\">{}</td></tr>\n\
         <tr><td>all releases summed</td><td class=\"n\">{}</td><td></td><td></td><td class=\"n\">{}</td></tr>\n\
         <tr><td>releases</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td></td><td></td></tr></table>{}</section>\n",
        digits(status.epsilon_spent),
        digits(status.epsilon_limit),
        escape(&period),
        digits(status.epsilon_spent),
        digits(status.epsilon_limit),
        digits(left),
        digits(status.epsilon_spent_pld),
        digits(status.epsilon_unit_lifetime),
        digits(status.epsilon_unit_lifetime_pld),
        digits(status.epsilon_lifetime),
        digits(status.epsilon_lifetime_pld),
        status.releases,
        status
            .releases_max
            .map_or_else(|| "no limit".to_owned(), |most| most.to_string()),
        if status.exhausted {
            "<p class=\"alarm\">The budget is spent: this node refuses every further release.</p>"
        } else {
            ""
        },
    )
}

fn policy(html: &mut String, status: &Status) -> fmt::Result {
    let rows = [
        ("version", status.policy_version.to_string()),
        (
            "signed by",
            status
                .policy_signer
                .clone()
                .unwrap_or_else(|| "nobody".to_owned()),
        ),
        (
            "ε per unit and period",
            format!("{} at δ = {:e}", digits(status.epsilon_limit), status.delta),
        ),
        ("protected unit", unit(status)),
        (
            "noise multiplier σ",
            format!("at least {}", status.noise_multiplier_min),
        ),
        (
            "sampling rate, steps",
            format!("at most {}, {}", status.sampling_rate_max, status.steps_max),
        ),
        (
            "releases of one block",
            format!("at most {}", status.block_releases_max),
        ),
        ("hash", status.policy_hash.clone()),
    ];
    table(html, "Policy in force", &rows)
}

fn evidence(html: &mut String, report: &Document, status: &Status) -> fmt::Result {
    let unsealed = status.ledger_records.saturating_sub(status.sealed_records);
    let sealed = match status.sealed_records {
        0 => "none yet".to_owned(),
        sealed => format!("{sealed} ({unsealed} since, on the node's word)"),
    };
    let rows = [
        (
            "records",
            format!("{}, format {}", status.ledger_records, report.ledger_version),
        ),
        ("counter-signed", sealed),
        ("blocks charged", status.blocks_charged.to_string()),
        ("head", status.ledger_head.clone()),
        ("digest of the report", report.digest.clone()),
        ("check it", "theriac-edge privacy verify report.json".to_owned()),
    ];
    table(html, "Evidence", &rows)
}

fn table(html: &mut String, title: &str, rows: &[(&str, String)]) -> fmt::Result {
    writeln!(html, "<section><h2>{title}</h2><table>")?;
    for (name, value) in rows {
        writeln!(
            html,
            "<tr><td>{name}</td><td class=\"v\">{}</td></tr>",
            escape(value)
        )?;
    }
    html.push_str("</table></section>\n");
    Ok(())
}

/// The latest runs of blocks; older ones are in the file.
fn blocks(html: &mut String, report: &Document, status: &Status) -> fmt::Result {
    let shown = report.blocks.len().min(RUNS_SHOWN);
    let older = report.blocks.len() - shown;
    writeln!(
        html,
        "<section><h2>Loss by block</h2><table><tr><th>from</th><th>to</th><th>blocks</th><th>releases</th><th>ε</th><th>by PLD</th></tr>"
    )?;
    for run in report.blocks.iter().rev().take(shown) {
        let BlockRun {
            first,
            last,
            releases,
            ..
        } = run;
        let at = |block: u64| day_and_time(Timestamp(block.saturating_mul(status.block_ms)));
        writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{releases}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            at(*first),
            at(last.saturating_add(1)),
            (last - first).saturating_add(1),
            digits(run.epsilon),
            digits(run.epsilon_pld),
        )?;
    }
    html.push_str("</table>");
    if older > 0 {
        write!(
            html,
            "<p class=\"note\">and {older} older runs in the JSON report</p>"
        )?;
    }
    if shown == 0 {
        html.push_str("<p class=\"note\">No block was read for a release.</p>");
    }
    html.push_str("</section>\n");
    Ok(())
}

pub(super) fn digits(value: f64) -> String {
    if value.is_finite() {
        format!("{value:.4}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    } else {
        "∞".to_owned()
    }
}

fn day_and_time(at: Timestamp) -> String {
    let since = Duration::from_millis(at.0).min(Duration::from_secs(LAST_SECOND));
    let text = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since).to_string();
    text.replace('T', " ").trim_end_matches('Z').to_owned()
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const RUNS_SHOWN: usize = 8;
/// The last second that has a calendar date of four digits.
const LAST_SECOND: u64 = 253_402_300_799;

const STYLE: &str = "\
:root{color-scheme:light}
@page{size:A4;margin:14mm}
*{box-sizing:border-box}
body{font:14px/1.45 system-ui,'Segoe UI','Liberation Sans',sans-serif;color:#1b1f24;background:#fff;max-width:182mm;margin:8mm auto;padding:0 4mm}
header{display:flex;justify-content:space-between;align-items:baseline;gap:1em;border-bottom:2px solid #1f4e79;margin-bottom:10px}
h1{font-size:20px;margin:0 0 6px}h2{font-size:13px;margin:12px 0 4px;color:#1f4e79;text-transform:uppercase;letter-spacing:.04em}
.made,.note{color:#57606a;font-size:12px;margin:4px 0}
.statement{background:#eef4fa;border-left:4px solid #1f4e79;padding:8px 12px}.statement p{margin:0 0 4px}
.bar{height:12px;background:#e4e8ec;border-radius:6px;overflow:hidden;margin:2px 0 6px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.bar i{display:block;height:100%;background:#1f4e79}
table{border-collapse:collapse;width:100%}td,th{padding:2px 6px;border-bottom:1px solid #e4e8ec;text-align:left;vertical-align:top}
th{font-weight:600;font-size:12px;color:#57606a}.n{text-align:right;font-variant-numeric:tabular-nums}
tr:has(.n) th{text-align:right}
.v{overflow-wrap:anywhere;font-size:12px}
.columns{display:grid;grid-template-columns:1fr 1fr;gap:0 18px}.columns td:first-child{white-space:nowrap;font-size:12px}
.small{font-size:11px;margin:4px 0;padding-left:18px}.alarm{color:#8a1c1c;font-weight:600}
@media (max-width:640px){.columns{grid-template-columns:1fr}header{display:block}}
@media print{body{margin:0;padding:0;max-width:none;font-size:12px}}
";
