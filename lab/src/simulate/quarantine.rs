//! The quarantine of a simulated aggregator: the same measures, laws and trust as at a real one, without its records.

use std::collections::{BTreeMap, BTreeSet};

use theriac_aggregator::combine::Decisions;
use theriac_aggregator::config::QuarantineSettings;
use theriac_aggregator::evidence::law::Verdict;
use theriac_aggregator::evidence::reputation::{QuarantineLimits, Reputation, left_out};
use theriac_aggregator::evidence::{Absent, Closing, Decision, RoundFacts, StoredRow, account, conclude};
use theriac_aggregator::robust::{Combined, PayloadRows, RuleError};
use theriac_aggregator::validate::{ValidatedUpdate, norm_bound};
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::units::NodeId;

/// What sites have earned. Without noise nobody is judged: what no honest update can be follows from its noise.
#[derive(Debug, Clone)]
pub(super) struct Quarantine {
    enabled: bool,
    byzantine: usize,
    reputations: BTreeMap<NodeId, Reputation>,
}

impl Quarantine {
    /// Nobody has done anything. `byzantine`: most sites in it at one time.
    pub(super) fn new(enabled: bool, byzantine: usize) -> Self {
        Self {
            enabled,
            byzantine,
            reputations: BTreeMap::new(),
        }
    }

    /// For each update whether it counts nothing; at least `needed` are left, `beside` others among them.
    pub(super) fn left_out(&self, updates: &[&ValidatedUpdate], needed: usize, beside: usize) -> Vec<bool> {
        let trust = |update: &&ValidatedUpdate| {
            let site = self.reputations.get(update.node())?;
            site.is_quarantined().then(|| site.trust_millionths())
        };
        left_out(
            &updates.iter().map(trust).collect::<Vec<_>>(),
            self.byzantine,
            needed,
            beside,
        )
    }

    /// Whether a site is in it.
    pub(super) fn holds(&self, site: &NodeId) -> bool {
        self.reputations.get(site).is_some_and(Reputation::is_quarantined)
    }

    /// Takes note of a round: all its updates, what was decided about each and how many hostile ones the rule withstood, what it made of those that counted, and who
    /// was refused and why. Who sent what no honest update can be.
    ///
    /// # Errors
    /// [`RuleError`] for updates of unequal length.
    pub(super) fn observe(
        &mut self,
        terms: &AnnounceV1,
        updates: &[&ValidatedUpdate],
        decided: &Decisions,
        combined: &Combined<f32>,
        refused: Vec<(NodeId, &'static str)>,
    ) -> Result<BTreeSet<NodeId>, RuleError> {
        if !self.enabled {
            return Ok(BTreeSet::new());
        }
        let stored: Vec<StoredRow> = updates
            .iter()
            .map(|update| StoredRow {
                node: update.node().clone(),
                header: update.header().clone(),
                stale: None,
            })
            .collect();
        let rows = updates.iter().map(|update| update.row()).collect();
        let rows = PayloadRows::new(rows, terms.values)?;
        let account = account(
            &rows,
            &RoundFacts {
                stored: &stored,
                decisions: &decided.own,
                by_rule: &combined.evidence,
                combined: &combined.values,
                segments: &[],
                kind: terms.kind,
                norm_bound: norm_bound(terms),
                byzantine: self.byzantine,
                averaged: &[],
                behind: &[],
                of_mean: &decided.of_mean,
                carried: None,
                noise: terms.noise_multiplier.value() * terms.clip_norm.value(),
                withstood: decided.withstood,
            },
        );
        let absent = refused.into_iter().map(|(node, code)| Absent {
            node,
            decision: Decision::Refused,
            reason: Some(code.to_owned()),
            detail: None,
        });
        let QuarantineSettings {
            enabled,
            enter_below,
            leave_at,
        } = QuarantineSettings::default();
        let closing = Closing {
            round: terms.round,
            rule: String::new(),
            byzantine: self.byzantine,
            limits: QuarantineLimits {
                enabled,
                enter_below,
                leave_at,
            },
        };
        let inconsistent = account.rows.iter();
        let inconsistent = inconsistent.filter(|row| Verdict::of(&row.findings) == Verdict::Inconsistent);
        let inconsistent = inconsistent.map(|row| row.node.clone()).collect();
        conclude(&closing, account, absent.collect(), &mut self.reputations);
        Ok(inconsistent)
    }
}
