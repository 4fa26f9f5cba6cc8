//! What the demo prints at its end.

use super::Outcome;
use super::record::Record;
use super::report::markup::{bytes, counted, maybe_seconds, whole, words};

/// The figures at the end, for people.
pub fn results(outcome: &Outcome) -> String {
    let record = &outcome.record;
    let faults: Vec<Vec<String>> = record
        .faults
        .iter()
        .map(|fault| {
            vec![
                fault.title.clone(),
                fault.edge.clone(),
                maybe_seconds(fault.detected_s),
                maybe_seconds(fault.healed_s),
                fault.failed_requests.to_string(),
                fault.action.clone(),
            ]
        })
        .collect();
    let edges: Vec<Vec<String>> = record
        .edges
        .iter()
        .map(|edge| {
            let name = if edge.hostile {
                format!("{} (hostile)", edge.name)
            } else {
                edge.name.clone()
            };
            vec![
                name,
                format!("{:.2}", edge.epsilon),
                format!("{}", edge.epsilon_limit),
                edge.updates_accepted.to_string(),
                edge.updates_refused.to_string(),
                edge.budget_spent_s
                    .map_or("-".to_owned(), |at_s| format!("{at_s:.0} s")),
            ]
        })
        .collect();
    let caught: Vec<String> = record
        .edges
        .iter()
        .filter(|edge| edge.hostile)
        .map(|edge| {
            let reasons = edge
                .refusals
                .iter()
                .map(|(word, count)| format!("{} {count}×", words(word)));
            let reasons = reasons.collect::<Vec<_>>().join(", ");
            format!(
                "{} {}; {} refused: {reasons}",
                edge.name,
                record.attack,
                counted(edge.updates_refused, "update")
            )
        })
        .collect();
    let table = theriac_command::output::table;
    let mut parts = vec![
        table(
            &[
                "Fault",
                "Edge",
                "Detected after",
                "Healed after",
                "Failed requests",
                "Action",
            ],
            &faults,
        ),
        table(
            &[
                "Edge",
                "ε spent",
                "ε limit",
                "Updates taken",
                "Refused",
                "Budget spent at",
            ],
            &edges,
        ),
        budget(record),
        format!("Caught: {}", caught.join("; ")),
        format!(
            "{} published, {} up, {} down, {} requests, {:.0} s in all.",
            counted(record.rounds_published(), "round"),
            bytes(record.bytes_up),
            bytes(record.bytes_down),
            whole(record.edges.iter().map(|edge| edge.requests).sum()),
            record.seconds,
        ),
    ];
    let unprovoked: u64 = record.edges.iter().map(|edge| edge.unprovoked).sum();
    if unprovoked > 0 {
        parts.push(format!(
            "{} came without an injected fault.",
            counted(unprovoked, "action")
        ));
    }
    if !record.shortfalls.is_empty() {
        parts.push(format!("Fell short:\n  {}", record.shortfalls.join("\n  ")));
    }
    parts.push(format!("Report: {}", outcome.report.display()));
    parts.extend(
        outcome
            .state
            .as_ref()
            .map(|state| format!("State kept: {}", state.display())),
    );
    parts.join("\n\n")
}

/// Why the edge with the small budget stopped although its ε is that of the others.
fn budget(record: &Record) -> String {
    let stopped: Vec<String> = record
        .edges
        .iter()
        .filter_map(|edge| {
            Some(format!(
                "{} may make {} releases in all",
                edge.name, edge.releases_max?
            ))
        })
        .collect();
    let each =
        "ε counts per block of time and no block is released twice, so it does not grow with the rounds";
    if stopped.is_empty() {
        format!("Privacy: {each}.")
    } else {
        format!(
            "Privacy: {each}. {}: then it stops training and goes on watching.",
            stopped.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::record::tests::specimen;

    #[test]
    fn tell_of_every_fault_of_every_edge_and_of_the_liar() {
        let mut record = specimen();
        record.shortfalls.push("the hang was not healed".to_owned());
        let outcome = Outcome {
            record,
            report: "out/report.html".into(),
            state: None,
        };
        let text = results(&outcome);
        for part in [
            "kill −9",
            "SIGSTOP",
            "memory leak",
            "CPU hog",
            "site-a",
            "site-e (hostile)",
            "norm exceeded 27×",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
        assert!(text.contains("the hang was not healed") && text.contains("out/report.html"));
    }
}
