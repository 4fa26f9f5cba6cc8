//! One round from what is stored to a model and the evidence about everybody: what the driver runs and `rounds replay` runs again.

use std::collections::BTreeMap;

use bytes::Bytes;
use rusqlite::Connection;
use theriac_privacy::central::CentralCharge;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{NodeId, Round};

use crate::copies::Screened;
use crate::evidence::reputation::{Reputation, left_out};
use crate::evidence::{Decision, RoundAccount, RoundFacts, StoredRow, account, segments};
use crate::layout::ModelSpec;
use crate::publish::{Candidate, PublishError, next_model_with, next_private_model};
use crate::robust::{Options, PayloadRows, Row};
use crate::server_optimizer::OptimizerState;
use crate::store::blob::BlobStore;
use crate::store::evidence::RoundPlan;
use crate::store::{StoreError, evidence, history, models, rounds};
use crate::validate::norm_bound;

/// Everything that the result of a round depends on.
#[derive(Debug, Clone)]
pub struct RoundInputs {
    /// The terms as they were announced.
    pub announce: AnnounceV1,
    /// With what it is combined.
    pub plan: RoundPlan,
    /// Whose updates are stored, by name.
    pub stored: Vec<StoredRow>,
    /// Their values, in the same order.
    pub rows: Vec<Row>,
    /// What those sites had earned before the round, in the same order.
    pub earned: Vec<Reputation>,
    /// The base model's payload.
    pub base: Bytes,
    /// What the server optimiser remembered after the base model.
    pub memory: Option<OptimizerState>,
}

/// What a round gives.
#[derive(Debug, Clone)]
pub struct RoundResult {
    /// The model that is to be published.
    pub candidate: Candidate,
    /// Every row, measured against it.
    pub account: RoundAccount,
}

impl RoundInputs {
    /// Reads what is stored of a round, with rows at hand taken from `cache`. Blocks for blobs.
    ///
    /// # Errors
    /// [`StoreError`]: [`StoreError::Gone`] when a payload was deleted after its time.
    pub fn load(
        connection: &Connection,
        blobs: &BlobStore,
        round: Round,
        plan: RoundPlan,
        earned: &BTreeMap<NodeId, Reputation>,
        cache: &mut BTreeMap<NodeId, Row>,
    ) -> Result<Self, StoreError> {
        let announce = history::announced(connection, round)?;
        let stored = evidence::stored_rows(connection, round)?;
        let mut rows = Vec::with_capacity(stored.len());
        for StoredRow { node, .. } in &stored {
            rows.push(match cache.remove(node) {
                Some(row) => row,
                None => rounds::upload_row(connection, blobs, round, node)?,
            });
        }
        Ok(Self {
            earned: stored
                .iter()
                .map(|row| earned.get(&row.node).copied().unwrap_or_default())
                .collect(),
            base: models::model_payload(connection, blobs, announce.base_version)?,
            memory: evidence::memory(connection, blobs, announce.base_version)?,
            announce,
            plan,
            stored,
            rows,
        })
    }

    /// What is decided about each row before the rule sees any.
    pub fn decisions(&self) -> Vec<(Decision, Option<String>)> {
        let inside = |site: &Reputation| site.is_quarantined().then(|| site.trust_millionths());
        // Who is left out depends on the others' updates, so with noise of the centre it would tell of them: there all are scored, and all count.
        let enabled = self.plan.quarantine.enabled && !self.plan.central_noise;
        let in_force = |site: &Reputation| inside(site).filter(|_| enabled);
        let trusts: Vec<Option<u64>> = self.earned.iter().map(in_force).collect();
        left_out(&trusts, self.plan.byzantine)
            .into_iter()
            .map(|out| {
                if out {
                    Decision::Quarantined
                } else {
                    Decision::Combined
                }
            })
            .map(|decision| (decision, None))
            .collect()
    }

    /// The terms as a rule's result is read under.
    fn terms(&self) -> RoundTerms {
        let announce = &self.announce;
        RoundTerms {
            kind: announce.kind,
            values: announce.values,
            layout_digest: announce.layout_digest,
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            block_rows: announce.block_rows,
            blocks_min: announce.blocks_min,
            blocks_max: announce.blocks_max,
        }
    }

    /// Combines the rows that count, makes the next model, and measures every row. CPU work. `charge` pays for the noise of the centre, where the plan
    /// has some; that round gives other bits each time.
    ///
    /// # Errors
    /// [`PublishError`].
    pub fn run(self, spec: &ModelSpec, charge: Option<CentralCharge>) -> Result<RoundResult, PublishError> {
        let decisions = self.decisions();
        let counts = |(decision, _): &(Decision, Option<String>)| *decision == Decision::Combined;
        let kept: Vec<Row> = self
            .rows
            .iter()
            .zip(&decisions)
            .filter(|(_, decision)| counts(decision))
            .map(|(row, _)| row.clone())
            .collect();
        // As many as asked for, or as many as these rows can withstand when refused sites have left too few. A refused
        // site is no proof that the others are honest, so f is not lowered further. A function of the stored rows alone.
        let byzantine = self.plan.byzantine.min(kept.len().saturating_sub(1) / 2);
        let terms = self.terms();
        let (optimizer, memory) = (&self.plan.optimizer, self.memory.as_ref());
        let candidate = if let Some(charge) = charge {
            next_private_model(spec, &terms, &self.base, kept, charge, optimizer, memory)?
        } else {
            let digests = self
                .stored
                .iter()
                .zip(&decisions)
                .filter(|(_, decision)| counts(decision));
            let digests = digests.map(|(stored, _)| &stored.header.payload_digest);
            let options = Options::for_round(self.plan.rule, digests, true);
            let noise = terms.noise_multiplier.value() * terms.clip_norm.value();
            let rule = Screened::new(self.plan.rule, byzantine, &options, noise)?;
            next_model_with(spec, &terms, &self.base, kept, &rule, optimizer, memory)?
        };
        let rows = PayloadRows::new(self.rows, terms.values)?;
        let account = account(
            &rows,
            &RoundFacts {
                stored: &self.stored,
                decisions: &decisions,
                by_rule: &candidate.evidence,
                combined: &candidate.combined,
                segments: &segments(spec, terms.kind),
                kind: terms.kind,
                norm_bound: norm_bound(&self.announce),
                // Not lowered to what few rows can withstand: with fewer accusers than f nobody can be convicted by the others.
                byzantine: self.plan.byzantine,
            },
        );
        Ok(RoundResult { candidate, account })
    }
}
