//! `report.html`: the whole demo on one page that needs nothing from outside, in light and in dark, on a desk and on
//! a telephone. It is well-formed XML, so that a test can hold its structure.

pub(crate) mod markup;
mod timeline;

use self::markup::{Page, bytes, counted, escape, maybe_seconds, seconds, whole, words};
use super::record::{EdgeRecord, Record};

/// Writes the page.
pub fn render(record: &Record) -> String {
    frame("Theriac demo", |page| {
        opening(page, record);
        figures(page, record);
        pictures(page, record);
        faults(page, record);
        hostile(page, record);
        privacy(page, record);
        rounds(page, record);
        closing(page, record);
    })
}

/// A page around `body`: one file that fetches nothing.
pub(crate) fn frame(title: &str, body: impl FnOnce(&mut Page)) -> String {
    let mut page = Page::default();
    page.raw("<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n<meta charset=\"utf-8\" />\n");
    page.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n");
    page.raw("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\" />\n");
    page.raw("<title>")
        .text(title)
        .raw("</title>\n<style>\n")
        .raw(STYLE)
        .raw("</style>\n</head>\n<body>\n<main>\n");
    body(&mut page);
    page.raw("</main>\n</body>\n</html>\n");
    page.finish()
}

const STYLE: &str = include_str!("style.css");

fn opening(page: &mut Page, record: &Record) {
    let healed = record.faults.iter().filter(|fault| fault.is_healed()).count();
    let (_, refused) = record.refusals();
    let headline = if record.shortfalls.is_empty() {
        format!(
            "{} of {} faults found and healed, a lying edge refused {}",
            healed,
            record.faults.len(),
            counted(refused, "time"),
        )
    } else {
        format!(
            "{healed} of {} faults found and healed; the demo fell short",
            record.faults.len()
        )
    };
    page.raw("<header>\n<p class=\"over\">Theriac demo</p>\n<h1>")
        .text(headline)
        .raw("</h1>\n<p class=\"lead\">");
    page.text(format!(
        "{} on one machine, each watching and healing a service of its own, learnt together for {} over QUIC under differential privacy. ",
        counted(record.edges.len() as u64, "edge"),
        seconds(record.seconds),
    ));
    page.text(format!(
        "They published {}; ",
        counted(record.rounds_published(), "model"),
    ));
    page.text(format!(
        "the hostile edge had {} refused.",
        counted(refused, "update")
    ))
    .raw("</p>\n");
    if !record.shortfalls.is_empty() {
        page.raw("<div class=\"shortfalls\"><strong>What fell short</strong><ul>");
        for shortfall in &record.shortfalls {
            page.raw("<li>").text(shortfall).raw("</li>");
        }
        page.raw("</ul></div>\n");
    }
    page.raw("</header>\n");
}

fn figures(page: &mut Page, record: &Record) {
    let healed = record.faults.iter().filter(|fault| fault.is_healed()).count();
    let failed: u64 = record.faults.iter().map(|fault| fault.failed_requests).sum();
    let requests: u64 = record.edges.iter().map(|edge| edge.requests).sum();
    let (_, refused) = record.refusals();
    let epsilon = record.edges.iter().map(|edge| edge.epsilon).fold(0.0, f64::max);
    let all = healed == record.faults.len() && healed > 0;
    page.raw("<dl class=\"figures\">\n");
    let mut figure = |class: &str, value: String, unit: &str, what: String| {
        page.raw(format!("<div class=\"{class}\"><dt>"))
            .text(what)
            .raw("</dt><dd>")
            .text(value);
        if !unit.is_empty() {
            page.raw("<small>").text(unit).raw("</small>");
        }
        page.raw("</dd></div>\n");
    };
    let (value, unit) = split(&maybe_seconds(record.median(|fault| fault.detected_s)));
    let (heal_value, heal_unit) = split(&maybe_seconds(record.median(|fault| fault.healed_s)));
    let class = if all { "good" } else { "bad" };
    figure(
        class,
        format!("{healed}\u{202f}/\u{202f}{}", record.faults.len()),
        "",
        "faults detected and healed".into(),
    );
    figure("", value, &unit, "median until detected".into());
    figure("", heal_value, &heal_unit, "median until verified healthy".into());
    figure(
        "",
        whole(failed),
        &format!("of {}", whole(requests)),
        "requests failed during faults".into(),
    );
    figure(
        "",
        whole(record.rounds_published()),
        "",
        "rounds published a model".into(),
    );
    figure(
        if refused > 0 { "good" } else { "bad" },
        whole(refused),
        "",
        "hostile updates refused".into(),
    );
    figure(
        "",
        format!("{epsilon:.2}"),
        "ε",
        "most privacy spent by an edge".into(),
    );
    let (value, unit) = split(&bytes(record.bytes_up + record.bytes_down));
    figure("", value, &unit, "moved over the network".into());
    page.raw("</dl>\n");
}

/// `12.3 s` into value and unit.
fn split(figure: &str) -> (String, String) {
    let (value, unit) = figure.split_once(' ').unwrap_or((figure, ""));
    (value.to_owned(), unit.to_owned())
}

fn pictures(page: &mut Page, record: &Record) {
    page.raw("<section>\n<h2>What happened</h2>\n<p class=\"note\">");
    page.text("Each edge scores its own service four times a second. Scores and thresholds never leave the edge; this page was allowed to read them because it ran on the same machine.");
    page.raw("</p>\n<div class=\"panel\">\n<ul class=\"legend\">");
    for (drawing, meaning) in timeline::legend() {
        page.raw(format!(
            "<li><svg width=\"18\" height=\"12\" viewBox=\"0 0 18 12\" aria-hidden=\"true\">{drawing}</svg>"
        ));
        page.text(meaning).raw("</li>");
    }
    page.raw("</ul>\n")
        .raw(timeline::draw(record, timeline::WIDE))
        .raw("\n");
    page.raw(timeline::draw(record, timeline::NARROW))
        .raw("\n</div>\n</section>\n");
}

fn faults(page: &mut Page, record: &Record) {
    page.raw("<section>\n<h2>Faults</h2>\n<p class=\"note\">");
    page.text("Injected from outside into the running services. Times count from the injection. Failed requests are counted by the load generator, which knows nothing of the edge. ");
    let unprovoked: u64 = record.edges.iter().map(|edge| edge.unprovoked).sum();
    page.text(if unprovoked == 0 {
        "No edge acted without a fault.".to_owned()
    } else {
        format!(
            "{} came without an injected fault.",
            counted(unprovoked, "action")
        )
    });
    page.raw("</p>\n<div class=\"panel table\">\n");
    table(
        page,
        "Faults",
        "cards",
        &[
            "Fault",
            "Edge",
            "Detected after",
            "Healed after",
            "Failed requests",
            "Action",
        ],
        &[2, 3, 4],
        record.faults.iter().map(|fault| {
            let causes = fault
                .causes
                .iter()
                .take(3)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ");
            let blamed = if causes.is_empty() {
                words(&fault.class)
            } else {
                format!("{}: {causes}", words(&fault.class))
            };
            let state = if fault.is_healed() {
                String::new()
            } else {
                " <span class=\"tag bad\">not healed</span>".to_owned()
            };
            vec![
                format!(
                    "{}<span class=\"sub\">at {}</span>",
                    escape(&fault.title),
                    seconds(fault.injected_s)
                ),
                escape(&fault.edge),
                maybe_seconds(fault.detected_s),
                format!("{}{state}", maybe_seconds(fault.healed_s)),
                whole(fault.failed_requests),
                format!(
                    "{}<span class=\"sub\">{}</span>",
                    escape(words(&fault.action)),
                    escape(blamed)
                ),
            ]
        }),
    );
    page.raw("</div>\n</section>\n");
}

fn hostile(page: &mut Page, record: &Record) {
    let honest_refused = record.refusals().0;
    for edge in record.edges.iter().filter(|edge| edge.hostile) {
        page.raw("<section>\n<h2>The hostile edge</h2>\n<p class=\"note\">");
        page.text(format!(
            "{} holds a valid certificate and joined like the others, then {}. ",
            edge.name, record.attack
        ));
        page.text(format!(
            "The aggregator refused {} and took {}; it refused {} of the honest edges.",
            counted(edge.updates_refused, "update"),
            edge.updates_accepted,
            if honest_refused == 0 {
                "none".to_owned()
            } else {
                whole(honest_refused)
            },
        ));
        page.raw("</p>\n<div class=\"panel\">\n");
        if edge.refusals.is_empty() {
            page.raw("<p class=\"note\">No refusal was recorded.</p>\n");
        } else {
            let most = edge.refusals.values().max().copied().unwrap_or(1).max(1);
            page.raw("<dl class=\"reasons\">\n");
            let mut reasons: Vec<_> = edge.refusals.iter().collect();
            reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            for (reason, count) in reasons {
                let share = *count as f64 / most as f64 * 100.0;
                page.raw("<div><dt>").text(words(reason)).raw("</dt>");
                page.raw(format!(
                    "<dd class=\"track\"><i style=\"width:{share:.1}%\"></i></dd>"
                ));
                page.raw("<dd class=\"num\">")
                    .text(counted(*count, "time"))
                    .raw("</dd></div>\n");
            }
            page.raw("</dl>\n");
        }
        page.raw("</div>\n</section>\n");
    }
}

fn privacy(page: &mut Page, record: &Record) {
    page.raw("<section>\n<h2>Privacy</h2>\n<p class=\"note\">");
    page.text("ε lost by the most charged block of time of each edge, against the limit in its privacy.toml, and charged in its own ledger before any data are read. No block is released twice, so ε stays where the first release put it; an edge whose policy allows only so many releases stops training after them and goes on detecting.");
    page.raw("</p>\n<div class=\"panel table\">\n");
    table(
        page,
        "Privacy budgets",
        "cards",
        &["Edge", "ε spent", "δ", "Updates taken", "Updates refused", "Now"],
        &[2, 3, 4],
        record.edges.iter().map(|edge| {
            let role = if edge.hostile {
                "<span class=\"sub\">hostile</span>"
            } else {
                ""
            };
            vec![
                format!("{}{role}", escape(&edge.name)),
                meter(edge),
                format!("{:e}", edge.delta),
                whole(edge.updates_accepted),
                whole(edge.updates_refused),
                standing(edge),
            ]
        }),
    );
    page.raw("</div>\n</section>\n");
}

fn meter(edge: &EdgeRecord) -> String {
    let share = if edge.epsilon_limit > 0.0 {
        (edge.epsilon / edge.epsilon_limit).clamp(0.0, 1.0)
    } else {
        0.0
    };
    let class = if edge.budget_spent_s.is_some() {
        " class=\"full\""
    } else {
        ""
    };
    let releases = edge.releases_max.map(|most| {
        format!(
            "<span class=\"sub\">{} of {}</span>",
            edge.updates_accepted,
            counted(most, "release")
        )
    });
    format!(
        "<span class=\"meter\"><i><b{class} style=\"width:{:.1}%\"></b></i>{:.2} of {}</span>{}",
        share * 100.0,
        edge.epsilon,
        edge.epsilon_limit,
        releases.unwrap_or_default(),
    )
}

fn standing(edge: &EdgeRecord) -> String {
    match edge.budget_spent_s {
        Some(at_s) => format!(
            "<span class=\"tag wait\">stopped training at {}</span>",
            seconds(at_s)
        ),
        None if edge.federation == "connected" => "<span class=\"tag\">training</span>".to_owned(),
        None => format!(
            "<span class=\"tag wait\">{}</span>",
            escape(words(&edge.federation))
        ),
    }
}

fn rounds(page: &mut Page, record: &Record) {
    let aborted = record.rounds.len() as u64 - record.rounds_published();
    page.raw("<section>\n<h2>Rounds</h2>\n<p class=\"note\">");
    page.text(format!(
        "{} published, {aborted} aborted. Updates are combined by the rule {}; the last model is version {}.",
        counted(record.rounds_published(), "round"),
        words(&record.rule),
        record.model_version,
    ));
    page.raw("</p>\n<div class=\"panel table\">\n<details><summary>");
    page.text(format!("Show {}", counted(record.rounds.len() as u64, "round")))
        .raw("</summary>\n");
    table(
        page,
        "Rounds",
        "dense",
        &[
            "Round", "Ended at", "Took", "Taken", "Refused", "Declined", "Model",
        ],
        &[0, 1, 2, 3, 4, 5, 6],
        record.rounds.iter().map(|round| {
            vec![
                round.round.to_string(),
                seconds(round.ended_s),
                seconds(round.seconds),
                round.accepted.to_string(),
                round.refused.to_string(),
                round.declined.to_string(),
                round
                    .published
                    .map_or_else(|| "aborted".to_owned(), |version| version.to_string()),
            ]
        }),
    );
    page.raw("</details>\n</div>\n</section>\n");
}

fn closing(page: &mut Page, record: &Record) {
    page.raw("<footer>\n<p>");
    page.text(format!("Began {} on {}.", record.started, record.machine));
    page.raw("</p>\n<p>The same figures are in <code>summary.json</code> beside this page. Repeat with <code>theriac-lab demo</code>.</p>\n</footer>\n");
}

/// A table whose cells are markup already; `numeric` columns are set to the right.
pub(crate) fn table(
    page: &mut Page,
    caption: &str,
    class: &str,
    header: &[&str],
    numeric: &[usize],
    rows: impl Iterator<Item = Vec<String>>,
) {
    let align = |column| {
        if numeric.contains(&column) {
            " class=\"num\""
        } else {
            ""
        }
    };
    page.raw(format!("<table class=\"{class}\"><caption>"))
        .text(caption)
        .raw("</caption>\n<thead><tr>");
    for (column, name) in header.iter().enumerate() {
        page.raw(format!("<th scope=\"col\"{}>", align(column)))
            .text(name)
            .raw("</th>");
    }
    page.raw("</tr></thead>\n<tbody>\n");
    for row in rows {
        page.raw("<tr>");
        for (column, (cell, name)) in row.iter().zip(header).enumerate() {
            page.raw(format!("<td{} data-label=\"{}\">", align(column), escape(name)))
                .raw("<div>")
                .raw(cell)
                .raw("</div></td>");
        }
        page.raw("</tr>\n");
    }
    page.raw("</tbody></table>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::record::tests::specimen;

    #[test]
    fn is_well_formed_and_shows_every_edge_and_every_fault() {
        let record = specimen();
        let page = render(&record);
        assert_well_formed(&page);
        for edge in &record.edges {
            assert!(
                page.matches(&escape(&edge.name)).count() >= 3,
                "{} is not in every part",
                edge.name
            );
        }
        for fault in &record.faults {
            assert!(
                page.matches(&escape(&fault.title)).count() >= 3,
                "{} is not in every part",
                fault.title
            );
        }
        assert!(page.contains("norm exceeded") && page.contains("stopped training at"));
    }

    #[test]
    fn fetches_nothing_from_outside() {
        let page = render(&specimen());
        for outside in ["src=", "href=", "url(", "@import", "<script", "<link", "<img"] {
            assert!(!page.contains(outside), "{outside} could fetch something");
        }
    }

    #[test]
    fn an_empty_demo_still_makes_a_page() {
        assert_well_formed(&render(&Record::default()));
    }

    #[test]
    fn a_failed_demo_says_what_fell_short() {
        let mut record = specimen();
        record
            .shortfalls
            .push("the hang on site-b was not healed <within> 20 s".to_owned());
        let page = render(&record);
        assert_well_formed(&page);
        assert!(page.contains("&lt;within&gt;") && page.contains("fell short"));
    }

    /// Every element is closed in order, every attribute is quoted, every `&` begins an entity of ours.
    fn assert_well_formed(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
        while let Some(start) = rest.find('<') {
            assert_text(&rest[..start]);
            rest = &rest[start + 1..];
            let end = rest.find('>').unwrap();
            let tag = &rest[..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "closed out of order");
            } else {
                let name = tag.split([' ', '/']).next().unwrap();
                assert_eq!(
                    tag.matches('"').count() % 2,
                    0,
                    "attribute is not quoted: <{tag}>"
                );
                assert_text(tag);
                if !tag.ends_with('/') {
                    open.push(name);
                }
                if name == "style" {
                    rest = &rest[rest.find("</style>").unwrap()..];
                }
            }
        }
        assert!(open.is_empty(), "never closed: {open:?}");
    }

    fn assert_text(text: &str) {
        for (index, _) in text.match_indices('&') {
            let entity = &text[index..];
            let known = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;"];
            assert!(known.iter().any(|k| entity.starts_with(k)), "stray & in {text}");
        }
    }
}
