//! `/` on loopback: where the federation stands, for a person with a browser. No script, nothing from elsewhere, everything escaped.

use std::fmt::Write as _;

use crate::evidence::{Decision, Record, words};
use crate::status::{SiteStatus, Status};
use crate::store::history::RoundRow;

/// Sites on the page; `sites list` has all.
const SITES_MAX: usize = 500;

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8884;--bad:#b3261e;--good:#1e7d32;--soft:#8882}\
@media(prefers-color-scheme:dark){:root{--bad:#ff8a80;--good:#81c784}}\
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem}\
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}\
p{margin:.3rem 0}.wide{overflow-x:auto}\
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}\
th{font-weight:600;background:var(--soft)}td.n{text-align:right}\
.bad{color:var(--bad);font-weight:600}.good{color:var(--good)}code{background:var(--soft);padding:0 .2rem}";

/// The page: the federation at a glance, every site with its standing, the last round's decisions in words, the last rounds.
pub(crate) fn render(status: &Status, rounds: &[RoundRow], decisions: &[Record]) -> String {
    let mut page = String::with_capacity(16 << 10);
    let title = escape(&status.federation);
    // Writing to a string cannot fail.
    let _written = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"refresh\" content=\"5\"><title>{title}: theriac-aggregator</title><style>{STYLE}</style></head><body>\
         <h1>Federation {title}</h1><p>{} in round {}, model {}, {} rounds published, {} aborted, {} of {} sites connected{}</p>",
        escape(&status.phase),
        status.round,
        status.model_version,
        status.rounds_published,
        status.rounds_aborted,
        status.connected.len(),
        status.sites.len(),
        match status.missing {
            0 => String::new(),
            missing => format!(
                "; <span class=\"bad\">waiting for {missing} more of quorum {}</span>",
                status.quorum
            ),
        }
    );
    if status.storage != "ok" {
        page.push_str("<p class=\"bad\">the disk is full: make room on the volume of data_dir</p>");
    }
    if let Some(validation) = &status.validation {
        let _written = write!(page, "<p>Validation, {}</p>", escape(validation));
    }
    if let Some(fleet) = &status.fleet {
        let _written = write!(page, "<p>Fleet: {}</p>", escape(&fleet.words()));
    }
    let inside: Vec<&SiteStatus> = status
        .sites
        .iter()
        .filter(|site| site.quarantined_since.is_some())
        .collect();
    page.push_str("<h2>Quarantine</h2>");
    if inside.is_empty() {
        page.push_str("<p class=\"good\">no site is in quarantine</p>");
    }
    for site in inside {
        let _written = write!(
            page,
            "<p><span class=\"bad\">{}</span> since round {}, trust {:.3}: its updates are scored and count nothing. \
             <code>theriac-aggregator sites show {}</code> says why</p>",
            escape(&site.name),
            site.quarantined_since.unwrap_or_default(),
            site.trust.unwrap_or_default(),
            escape(&site.name)
        );
    }
    sites(&mut page, &status.sites);
    last_round(&mut page, decisions);
    list(&mut page, rounds);
    page.push_str("</body></html>\n");
    page
}

fn head(page: &mut String, title: &str, columns: &[&str]) {
    let cells: String = columns
        .iter()
        .flat_map(|&column| ["<th scope=\"col\">", column, "</th>"])
        .collect();
    let _written = write!(
        page,
        "<h2>{title}</h2><div class=\"wide\"><table><thead><tr>{cells}</tr></thead><tbody>"
    );
}

fn sites(page: &mut String, sites: &[SiteStatus]) {
    let columns = [
        "site",
        "state",
        "connected",
        "trust",
        "last decision",
        "accepted",
        "refused",
        "epsilon",
        "former ledgers",
    ];
    head(page, "Sites", &columns);
    for site in sites.iter().take(SITES_MAX) {
        let class = if site.quarantined_since.is_some() {
            " class=\"bad\""
        } else {
            ""
        };
        let decision = match (&site.last_decision, site.last_decision_round) {
            (Some(decision), Some(round)) => format!("{} in round {round}", escape(decision)),
            _ => "-".into(),
        };
        let _written = write!(
            page,
            "<tr><td{class}>{}</td><td>{}</td><td>{}</td><td class=\"n\">{:.3}</td><td>{decision}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&site.name),
            escape(&site.state),
            if site.connected { "yes" } else { "no" },
            site.trust.unwrap_or_default(),
            site.accepted,
            site.refused,
            site.epsilon
                .map_or_else(|| "-".to_owned(), |epsilon| format!("{epsilon:.3}")),
            escape(&former(site)),
        );
    }
    page.push_str("</tbody></table></div>");
}

/// What was spent under the name before its present ledger.
fn former(site: &SiteStatus) -> String {
    let mut said: Vec<String> = site
        .former_ledgers
        .iter()
        .map(|former| {
            let epsilon = former
                .epsilon
                .map_or_else(|| "-".to_owned(), |epsilon| format!("{epsilon:.3}"));
            format!(
                "a new ledger began on {}, the former one had spent ε {epsilon}",
                crate::commands::day(former.ended_unix_ms)
            )
        })
        .collect();
    if site.ledger_unallowed {
        said.push("not allowed by an operator so far".to_owned());
    }
    said.join("; ")
}

fn last_round(page: &mut String, decisions: &[Record]) {
    let Some(first) = decisions.first() else {
        return;
    };
    let title = format!("Decisions of round {}", first.round);
    let behind = words::all_behind(decisions);
    head(
        page,
        &title,
        &["site", "weight", "norm", "distance", "cosine", "decision"],
    );
    for record in decisions.iter().take(SITES_MAX) {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let features = record.features.as_ref();
        let class = if record.weight > 0 && record.findings.is_empty() {
            ""
        } else {
            " class=\"bad\""
        };
        let mut said = vec![words::decision(record)];
        if record.decision != Decision::Refused {
            said.extend(record.findings.iter().map(words::finding));
        }
        let _written = write!(
            page,
            "<tr><td{class}>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&record.site),
            record.weight,
            number(features.map(|row| row.norm)),
            number(features.map(|row| row.distance)),
            number(features.map(|row| row.cosine)),
            escape(&said.join(". ")),
        );
    }
    page.push_str("</tbody></table></div>");
    if let Some(behind) = behind {
        let _written = write!(
            page,
            "<p>Behind the model of this round: {}.</p>",
            escape(&behind)
        );
    }
}

fn list(page: &mut String, rounds: &[RoundRow]) {
    head(
        page,
        "Rounds",
        &["round", "outcome", "rule", "accepted", "refused", "declined"],
    );
    for round in rounds {
        let outcome = match (round.published, &round.abort_reason) {
            (Some(version), _) => format!("published model {version}"),
            (None, Some(reason)) => format!("aborted: {reason}"),
            (None, None) => round.state.clone(),
        };
        let _written = write!(
            page,
            "<tr><td class=\"n\">{}</td><td>{}</td><td>{} f={}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            round.round,
            escape(&outcome),
            escape(&round.rule),
            round.byzantine,
            round.accepted,
            round.refused,
            round.declined
        );
    }
    page.push_str("</tbody></table></div>");
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_shown_can_become_markup() {
        assert_eq!(
            escape("<script>alert(\"1\" & '2')</script>"),
            "&lt;script&gt;alert(&quot;1&quot; &amp; &#39;2&#39;)&lt;/script&gt;"
        );
    }
}
