//! Everything that the demo saw, as plain data: the view shows it while it grows, the report and the summary are
//! written from it when the demo is over. All times are seconds since the demo began.

use std::collections::BTreeMap;

use theriac_protocol::refusal::RefusalCode;

/// The demo as a whole.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// When it began, RFC 3339, UTC.
    pub started: String,
    /// The machine in one line: cores, memory, kernel.
    pub machine: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// The edges, by name.
    pub edges: Vec<EdgeRecord>,
    /// The faults, in the order in which they were injected.
    pub faults: Vec<FaultRecord>,
    /// The rounds that have ended, by number.
    pub rounds: Vec<RoundRecord>,
    /// Latest published model.
    pub model_version: u64,
    /// Rule that combines updates.
    pub rule: String,
    /// What the hostile edge does.
    pub attack: String,
    /// Payload bytes from the edges to the aggregator.
    pub bytes_up: u64,
    /// Payload bytes from the aggregator to the edges.
    pub bytes_down: u64,
    /// What fell short, one sentence each; empty when the demo succeeded.
    pub shortfalls: Vec<String>,
}

/// One edge.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EdgeRecord {
    /// Its site name.
    pub name: String,
    /// Whether it lies about its updates.
    pub hostile: bool,
    /// What it does now, in a word.
    pub phase: String,
    /// State of its connection: off, connecting, connected, refused.
    pub federation: String,
    /// State of its service: running, stopped, ...
    pub service: String,
    /// How often its service was started again.
    pub restarts: u64,
    /// The score over time.
    pub scores: Vec<ScorePoint>,
    /// What it did to its service.
    pub actions: Vec<ActionMark>,
    /// What of that it did without an injected fault.
    pub unprovoked: u64,
    /// ε spent.
    pub epsilon: f64,
    /// ε that its policy allows.
    pub epsilon_limit: f64,
    /// δ of its policy.
    pub delta: f64,
    /// Releases that its policy allows in all, if it limits them.
    pub releases_max: Option<u64>,
    /// When it stopped training because the budget was spent.
    pub budget_spent_s: Option<f64>,
    /// Version of the global model that it uses.
    pub model_version: u64,
    /// What its gate made of the last global model.
    pub gate: String,
    /// Updates that the aggregator took.
    pub updates_accepted: u64,
    /// Updates that the aggregator refused.
    pub updates_refused: u64,
    /// Refusals by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Rounds that it declined, by reason.
    pub declines: BTreeMap<String, u64>,
    /// Requests that the load generator sent to its service.
    pub requests: u64,
    /// Requests that failed.
    pub requests_failed: u64,
    /// Warm-up: rows seen and rows needed before the edge detects.
    pub warm_up: (u64, u64),
}

impl EdgeRecord {
    /// The reason it was refused for most often.
    pub fn main_refusal(&self) -> Option<(&str, u64)> {
        self.refusals
            .iter()
            .max_by_key(|(_, count)| **count)
            .map(|(word, count)| (word.as_str(), *count))
    }
}

/// A score beside the threshold in force.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScorePoint {
    /// When.
    pub at_s: f64,
    /// Anomaly score, ≥ 0.
    pub score: f32,
    /// Alarm threshold, > 0.
    pub threshold: f32,
}

/// Something an edge did to its service.
#[derive(Debug, Clone, PartialEq)]
pub struct ActionMark {
    /// When.
    pub at_s: f64,
    /// What.
    pub action: String,
    /// For which class of fault.
    pub class: String,
}

/// One injected fault and what became of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FaultRecord {
    /// The edge whose service suffered.
    pub edge: String,
    /// The fault's name, as in the summary: `kill9`, `hang`, `memory_leak`, `cpu_hog`.
    pub kind: String,
    /// What was done, for people.
    pub title: String,
    /// When it was injected.
    pub injected_s: f64,
    /// Seconds from injection to the edge's incident; `None` when it never noticed.
    pub detected_s: Option<f64>,
    /// Seconds from injection until the edge had verified the service.
    pub healed_s: Option<f64>,
    /// Requests that failed between injection and verification, counted from outside.
    pub failed_requests: u64,
    /// What the edge did.
    pub action: String,
    /// What the edge took it for.
    pub class: String,
    /// What the edge blamed, most suspicious first.
    pub causes: Vec<String>,
}

impl FaultRecord {
    /// Detected, and healed with verification.
    pub fn is_healed(&self) -> bool {
        self.detected_s.is_some() && self.healed_s.is_some()
    }
}

/// One round that has ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoundRecord {
    /// Its number.
    pub round: u64,
    /// When it ended.
    pub ended_s: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// The version it published; `None` when it was aborted.
    pub published: Option<u64>,
    /// Number of updates that went into it.
    pub accepted: u64,
    /// Number of updates that were refused.
    pub refused: u64,
    /// Number of edges that declined.
    pub declined: u64,
}

impl Record {
    /// Number of rounds that published a model.
    pub fn rounds_published(&self) -> u64 {
        self.rounds
            .iter()
            .filter(|round| round.published.is_some())
            .count() as u64
    }

    /// Number of refusals of honest and of hostile edges, in this order.
    pub fn refusals(&self) -> (u64, u64) {
        let of = |hostile| {
            self.edges
                .iter()
                .filter(|e| e.hostile == hostile)
                .map(|e| e.updates_refused)
                .sum()
        };
        (of(false), of(true))
    }

    /// Refusals of honest edges whose round was over when the update came: on a busy machine one may come too late.
    pub fn honest_late(&self) -> u64 {
        let honest = self.edges.iter().filter(|edge| !edge.hostile);
        let code = RefusalCode::RoundClosed.word();
        honest.filter_map(|edge| edge.refusals.get(code)).sum()
    }

    /// Counts every edge's actions that answer no injected fault: neither between injection and healing, nor while a fault that
    /// was never healed goes on.
    pub fn count_unprovoked(&mut self) {
        for edge in &mut self.edges {
            let faults: Vec<&FaultRecord> = self
                .faults
                .iter()
                .filter(|fault| fault.edge == edge.name)
                .collect();
            let answers = |mark: &&ActionMark| {
                faults.iter().any(|fault| {
                    let end_s = fault
                        .healed_s
                        .map_or(f64::INFINITY, |healed_s| fault.injected_s + healed_s);
                    (fault.injected_s..=end_s).contains(&mark.at_s)
                })
            };
            edge.unprovoked = edge.actions.iter().filter(|mark| !answers(mark)).count() as u64;
        }
    }

    /// The edge of this name.
    pub fn edge_mut(&mut self, name: &str) -> Option<&mut EdgeRecord> {
        self.edges.iter_mut().find(|edge| edge.name == name)
    }

    /// Median over the faults of what `of` picks; `None` when it picks nothing.
    pub fn median(&self, of: impl Fn(&FaultRecord) -> Option<f64>) -> Option<f64> {
        median(self.faults.iter().filter_map(of).collect())
    }
}

/// The median; the midpoint of an even number of values; `None` of nothing.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(values[middle - 1], upper)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A demo that went well, with names that would break a careless page.
    pub(crate) fn specimen() -> Record {
        let kinds = [
            ("kill9", "kill −9"),
            ("hang", "SIGSTOP"),
            ("memory_leak", "memory leak"),
            ("cpu_hog", "CPU hog"),
        ];
        let times = [
            (0.31, 0.84, 22),
            (2.2, 2.94, 131),
            (4.1, 5.36, 17),
            (3.4, 12.2, 0),
        ];
        let names = ["site-a", "site-b", "site-c", "site-<d>", "site-e"];
        let faults: Vec<FaultRecord> = kinds
            .iter()
            .zip(times)
            .zip(names)
            .zip([46.0, 58.0, 70.0, 84.0])
            .map(|(((kind, time), edge), injected_s)| FaultRecord {
                edge: edge.to_owned(),
                kind: kind.0.to_owned(),
                title: kind.1.to_owned(),
                injected_s,
                detected_s: Some(time.0),
                healed_s: Some(time.1),
                failed_requests: time.2,
                action: "restart".to_owned(),
                class: "memory_leak".to_owned(),
                causes: vec!["resident_bytes".to_owned(), "probe_seconds".to_owned()],
            })
            .collect();
        let edges = names
            .iter()
            .enumerate()
            .map(|(index, name)| specimen_edge(index, name, faults.get(index)))
            .collect();
        let rounds = (1_u32..=31)
            .map(|round| RoundRecord {
                round: u64::from(round),
                ended_s: f64::from(round) * 3.3,
                seconds: 0.42,
                published: (round != 3).then_some(u64::from(round)),
                accepted: if round == 3 { 1 } else { 4 },
                refused: 1,
                declined: u64::from(round > 20),
            })
            .collect();
        Record {
            started: "2026-11-21T12:00:00Z".to_owned(),
            machine: "2 cores, 23.4 GiB, Linux 6.18".to_owned(),
            seconds: 104.2,
            edges,
            faults,
            rounds,
            model_version: 31,
            rule: "trimmed_mean".to_owned(),
            attack: "negates every value and multiplies it by five".to_owned(),
            bytes_up: 402_311,
            bytes_down: 1_812_400,
            shortfalls: Vec::new(),
        }
    }

    fn specimen_edge(index: usize, name: &str, fault: Option<&FaultRecord>) -> EdgeRecord {
        let hostile = index == 4;
        let phase = index as f64;
        let scores = (0_u32..280)
            .map(|step| {
                let at_s = 34.0 + f64::from(step) * 0.25;
                let ripple =
                    0.32 + 0.12 * (at_s * 1.7 + phase).sin() + 0.09 * (at_s * 6.1 + phase * 3.0).sin();
                let ill = fault.is_some_and(|f| {
                    (f.injected_s + 0.2..f.injected_s + f.healed_s.unwrap_or(1.0)).contains(&at_s)
                });
                let ratio = if ill { 6.0 + ripple } else { ripple.max(0.13) };
                #[expect(clippy::cast_possible_truncation, reason = "a made-up score")]
                ScorePoint {
                    at_s,
                    score: (ratio * 3.0) as f32,
                    threshold: 3.0,
                }
            })
            .collect();
        let actions = fault.map(|f| ActionMark {
            at_s: f.injected_s + f.detected_s.unwrap_or(0.0) + 0.1,
            action: "restart".to_owned(),
            class: f.class.clone(),
        });
        EdgeRecord {
            name: name.to_owned(),
            hostile,
            phase: "detecting".to_owned(),
            federation: "connected".to_owned(),
            service: "running".to_owned(),
            restarts: u64::from(!hostile),
            scores,
            actions: actions.into_iter().collect(),
            unprovoked: 0,
            epsilon: if index == 2 { 1.0 } else { 3.42 },
            epsilon_limit: if index == 2 { 1.0 } else { 8.0 },
            delta: 1e-6,
            releases_max: (index == 2).then_some(4),
            budget_spent_s: (index == 2).then_some(61.5),
            model_version: 31,
            gate: "accepted".to_owned(),
            updates_accepted: if hostile { 0 } else { 30 },
            updates_refused: if hostile { 31 } else { 0 },
            refusals: if hostile {
                BTreeMap::from([("norm_exceeded".to_owned(), 27), ("implausible".to_owned(), 4)])
            } else {
                BTreeMap::new()
            },
            declines: BTreeMap::new(),
            requests: 5_210,
            requests_failed: fault.map_or(0, |f| f.failed_requests),
            warm_up: (120, 120),
        }
    }

    #[test]
    fn an_action_without_a_fault_is_counted_as_such() {
        let mut record = specimen();
        record.count_unprovoked();
        assert!(record.edges.iter().all(|edge| edge.unprovoked == 0));
        let mark = ActionMark {
            at_s: 40.0,
            action: "restart".to_owned(),
            class: "cpu_contention".to_owned(),
        };
        record.edges[1].actions.push(mark.clone());
        record.edges[4].actions.push(mark);
        record.count_unprovoked();
        assert_eq!(
            record
                .edges
                .iter()
                .map(|edge| edge.unprovoked)
                .collect::<Vec<_>>(),
            [0, 1, 0, 0, 1]
        );
    }

    #[test]
    fn updates_of_honest_edges_that_came_too_late_are_counted_apart() {
        let mut record = specimen();
        assert_eq!(record.honest_late(), 0);
        let hostile = record.edges.iter().filter(|edge| edge.hostile).count() as u64;
        for edge in &mut record.edges {
            edge.updates_refused += 3;
            edge.refusals.insert("round_closed".to_owned(), 2);
            edge.refusals.insert("norm_exceeded".to_owned(), 1);
        }
        assert_eq!(record.honest_late(), 2 * (5 - hostile));
    }

    #[test]
    fn the_median_of_an_even_number_is_the_midpoint() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
