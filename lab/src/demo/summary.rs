//! `summary.json`: the demo's figures for scripts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::record::{EdgeRecord, FaultRecord, Record};

/// `summary.json`. The first fields are a contract; more may be added.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary<'a> {
    faults: Vec<FaultSummary<'a>>,
    edges: Vec<EdgeSummary<'a>>,
    rounds: u64,
    bytes_up: u64,
    bytes_down: u64,
    seconds: f64,
    ok: bool,
    shortfalls: &'a [String],
    rounds_aborted: u64,
    model_version: u64,
    rule: &'a str,
    attack: &'a str,
    started: &'a str,
    machine: &'a str,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct FaultSummary<'a> {
    edge: &'a str,
    kind: &'a str,
    detected_s: Option<f64>,
    healed_s: Option<f64>,
    failed_requests: u64,
    action: &'a str,
    injected_s: f64,
    class: &'a str,
    causes: &'a [String],
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct EdgeSummary<'a> {
    name: &'a str,
    hostile: bool,
    epsilon: f64,
    delta: f64,
    updates_accepted: u64,
    updates_refused: u64,
    epsilon_limit: f64,
    refusals: &'a BTreeMap<String, u64>,
    budget_spent_s: Option<f64>,
    restarts: u64,
    unprovoked_actions: u64,
    requests: u64,
    requests_failed: u64,
}

impl<'a> From<&'a FaultRecord> for FaultSummary<'a> {
    fn from(fault: &'a FaultRecord) -> Self {
        Self {
            edge: &fault.edge,
            kind: &fault.kind,
            detected_s: fault.detected_s.map(milli),
            healed_s: fault.healed_s.map(milli),
            failed_requests: fault.failed_requests,
            action: &fault.action,
            injected_s: milli(fault.injected_s),
            class: &fault.class,
            causes: &fault.causes,
        }
    }
}

impl<'a> From<&'a EdgeRecord> for EdgeSummary<'a> {
    fn from(edge: &'a EdgeRecord) -> Self {
        Self {
            name: &edge.name,
            hostile: edge.hostile,
            epsilon: edge.epsilon,
            delta: edge.delta,
            updates_accepted: edge.updates_accepted,
            updates_refused: edge.updates_refused,
            epsilon_limit: edge.epsilon_limit,
            refusals: &edge.refusals,
            budget_spent_s: edge.budget_spent_s.map(milli),
            restarts: edge.restarts,
            unprovoked_actions: edge.unprovoked,
            requests: edge.requests,
            requests_failed: edge.requests_failed,
        }
    }
}

impl Record {
    /// The figures for scripts. `rounds` counts published ones.
    pub fn summary(&self) -> Summary<'_> {
        Summary {
            faults: self.faults.iter().map(FaultSummary::from).collect(),
            edges: self.edges.iter().map(EdgeSummary::from).collect(),
            rounds: self.rounds_published(),
            bytes_up: self.bytes_up,
            bytes_down: self.bytes_down,
            seconds: milli(self.seconds),
            ok: self.shortfalls.is_empty(),
            shortfalls: &self.shortfalls,
            rounds_aborted: self.rounds.len() as u64 - self.rounds_published(),
            model_version: self.model_version,
            rule: &self.rule,
            attack: &self.attack,
            started: &self.started,
            machine: &self.machine,
        }
    }
}

/// Seconds to the millisecond, so that figures read well.
fn milli(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::record::RoundRecord;

    #[test]
    fn the_summary_has_the_fields_that_scripts_rely_on() {
        let record = Record {
            edges: vec![EdgeRecord {
                name: "site-a".into(),
                ..EdgeRecord::default()
            }],
            faults: vec![FaultRecord {
                kind: "kill9".into(),
                detected_s: Some(0.25),
                ..FaultRecord::default()
            }],
            rounds: vec![
                RoundRecord {
                    published: Some(1),
                    ..RoundRecord::default()
                },
                RoundRecord::default(),
            ],
            ..Record::default()
        };
        let summary = serde_json::to_value(record.summary()).unwrap();
        for field in ["faults", "edges", "rounds", "bytes_up", "bytes_down", "seconds"] {
            assert!(!summary[field].is_null(), "{field} is missing");
        }
        for field in ["edge", "kind", "detected_s", "failed_requests", "action"] {
            assert!(!summary["faults"][0][field].is_null(), "{field} is missing");
        }
        assert!(summary["faults"][0].as_object().unwrap().contains_key("healed_s"));
        for field in [
            "name",
            "hostile",
            "epsilon",
            "delta",
            "updates_accepted",
            "updates_refused",
        ] {
            assert!(!summary["edges"][0][field].is_null(), "{field} is missing");
        }
        assert_eq!(summary["rounds"], 1, "only published rounds count");
    }
}
