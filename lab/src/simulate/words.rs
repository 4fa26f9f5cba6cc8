//! What a simulation tells people: the sites, the rounds, what was spent, and who was caught.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use theriac_command::output::table;
use theriac_protocol::units::NodeId;

use super::summary::SiteReport;

/// Rounds by site and by how it was caught in them.
type Rounds<'a> = BTreeMap<&'a str, BTreeMap<&'a str, BTreeSet<u64>>>;

/// The whole of it, from `summary.json` and the sites.
pub(super) fn words(summary: &Value, sites: &BTreeMap<NodeId, SiteReport>) -> String {
    let mut lines = vec![site_table(sites)];
    let gates = gates(sites);
    if summary["federations"].as_u64().is_some_and(|count| count > 0) {
        lines.push(String::new());
        lines.push(rounds(summary));
        lines.push(privacy(summary));
    }
    if !gates.is_empty() {
        lines.push(format!("gate: {gates}"));
    }
    if let Some(attack) = summary.get("attack").filter(|attack| !attack.is_null()) {
        lines.extend(attacked(attack));
    }
    lines.join("\n")
}

fn site_table(sites: &BTreeMap<NodeId, SiteReport>) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let row = |(site, report): (&NodeId, &SiteReport)| {
        vec![
            site.to_string(),
            report.train_rows.to_string(),
            report.test_rows.to_string(),
            number(Some(report.alarms_per_day)),
            report.gate.unwrap_or("-").to_owned(),
            number(report.epsilon),
        ]
    };
    let rows: Vec<_> = sites.iter().map(row).collect();
    let heads = [
        "Site",
        "Train rows",
        "Test rows",
        "Alarms a day",
        "Global model",
        "Epsilon",
    ];
    table(&heads, &rows)
}

/// `12 accepted, 1 worse_on_tail (c)`: every word with how many sites, those that kept the model out by name, with the figures that decided.
fn gates(sites: &BTreeMap<NodeId, SiteReport>) -> String {
    let mut by_word = BTreeMap::<&str, Vec<&str>>::new();
    for (site, report) in sites {
        if let Some(gate) = report.gate {
            by_word.entry(gate).or_default().push(site.as_str());
        }
    }
    let by_name = |name: &str| {
        let mut all = sites.iter();
        all.find(|(site, _)| site.as_str() == name)
            .and_then(|(_, report)| report.gate_reason.clone())
    };
    let part = |(word, sites): (&str, Vec<&str>)| {
        if word == "accepted" {
            return format!("{} {word}", sites.len());
        }
        let site = |name: &&str| match by_name(name) {
            Some(reason) => format!("{name}: {reason}"),
            None => (*name).to_owned(),
        };
        let sites: Vec<String> = sites.iter().map(site).collect();
        format!("{} {word} ({})", sites.len(), sites.join("; "))
    };
    by_word.into_iter().map(part).collect::<Vec<_>>().join(", ")
}

fn rounds(summary: &Value) -> String {
    let count = |key: &str| summary[key].as_u64().unwrap_or(0);
    let refusals: Vec<String> = summary["refusals"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    let refused = if refusals.is_empty() {
        "none".to_owned()
    } else {
        refusals.join(", ")
    };
    let why = if count("rounds_aborted") > 0 {
        " (rounds.jsonl says why)"
    } else {
        ""
    };
    format!(
        "rounds: {} published, {} aborted{why}, in {} federation(s); updates refused: {refused}",
        count("rounds"),
        count("rounds_aborted"),
        count("federations"),
    )
}

fn privacy(summary: &Value) -> String {
    let privacy = &summary["privacy"];
    match (privacy["epsilon"].as_f64(), privacy["delta"].as_f64()) {
        (Some(epsilon), Some(delta)) => format!(
            "privacy: epsilon at most {epsilon:.2} spent by a site at delta {delta:e}, unit {}",
            privacy["unit"].as_str().unwrap_or("-")
        ),
        _ => "privacy: off, nothing is promised".to_owned(),
    }
}

/// Who attacked, who of them was caught in which rounds and how, and which honest sites stood out.
fn attacked(attack: &Value) -> Vec<String> {
    let hostile: BTreeSet<&str> = names(&attack["malicious"]).collect();
    let found = caught(&attack["caught"]);
    let missed: Vec<&str> = hostile
        .iter()
        .filter(|site| !found.contains_key(**site))
        .copied()
        .collect();
    let suspected = caught(&attack["honest_suspected"]);
    let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let name = attack["name"].as_str().unwrap_or("-");
    vec![
        format!(
            "attack: {name} by {}",
            or_none(hostile.iter().copied().collect::<Vec<_>>().join(", "))
        ),
        format!("caught: {}", or_none(told(&found))),
        format!("not caught: {}", or_none(missed.join(", "))),
        format!("honest sites that stood out: {}", or_none(told(&suspected))),
    ]
}

fn names(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// Rounds of each site, by how it was caught.
fn caught(list: &Value) -> Rounds<'_> {
    let mut found = Rounds::new();
    for entry in list.as_array().into_iter().flatten() {
        let word = |key: &str| entry[key].as_str().unwrap_or("-");
        let rounds = found.entry(word("site")).or_default().entry(word("how"));
        rounds.or_default().insert(entry["round"].as_u64().unwrap_or(0));
    }
    found
}

fn told(found: &Rounds<'_>) -> String {
    let one = |(site, ways): (&&str, &BTreeMap<&str, BTreeSet<u64>>)| {
        let way = |(how, rounds): (&&str, &BTreeSet<u64>)| {
            let rounds: Vec<String> = rounds.iter().map(u64::to_string).collect();
            let word = if rounds.len() == 1 { "round" } else { "rounds" };
            format!("{how} in {word} {}", rounds.join(", "))
        };
        format!("{site} ({})", ways.iter().map(way).collect::<Vec<_>>().join("; "))
    };
    found.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn site(gate: &'static str) -> SiteReport {
        SiteReport {
            train_rows: 1200,
            test_rows: 1200,
            alarms: 1,
            alarms_per_day: 1.2,
            gate: Some(gate),
            gate_reason: Some("as it came 9.00 times".to_owned()),
            epsilon: Some(3.5),
            delta: Some(1e-6),
            bytes_up_per_round: None,
            bytes_down_per_round: None,
        }
    }

    #[test]
    fn people_are_told_who_was_caught_when_and_what_was_spent() {
        let sites = BTreeMap::from([
            (NodeId::new("a").unwrap(), site("accepted")),
            (NodeId::new("b").unwrap(), site("worse_on_tail")),
        ]);
        let summary = json!({
            "rounds": 2, "rounds_aborted": 1, "federations": 1, "refusals": {"norm": 1},
            "privacy": {"epsilon": 3.5, "delta": 1e-6, "unit": "block"},
            "attack": {
                "name": "sign-flip", "malicious": ["a", "c"],
                "caught": [
                    {"site": "a", "round": 2, "how": "outvoted"}, {"site": "a", "round": 1, "how": "outvoted"},
                ],
                "honest_suspected": [{"site": "b", "round": 1, "how": "norm"}],
            },
        });
        let told = words(&summary, &sites);
        for line in [
            "rounds: 2 published, 1 aborted (rounds.jsonl says why), in 1 federation(s); updates refused: 1 norm",
            "privacy: epsilon at most 3.50 spent by a site at delta 1e-6, unit block",
            "gate: 1 accepted, 1 worse_on_tail (b: as it came 9.00 times)",
            "attack: sign-flip by a, c",
            "caught: a (outvoted in rounds 1, 2)",
            "not caught: c",
            "honest sites that stood out: b (norm in round 1)",
        ] {
            assert!(told.lines().any(|told| told == line), "no `{line}` in\n{told}");
        }
        let quiet = words(&json!({"attack": null}), &BTreeMap::new());
        assert!(!quiet.contains("gate") && !quiet.contains("attack"), "{quiet}");
    }
}
