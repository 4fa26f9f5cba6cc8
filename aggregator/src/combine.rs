//! One round from what is stored to a model and the evidence about everybody: what the driver runs and `rounds replay` runs again.

use std::collections::BTreeMap;

use bytes::Bytes;
use rusqlite::Connection;
use theriac_privacy::central::CentralCharge;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{NodeId, Round};

use crate::average::Mean;
use crate::copies::{copies, rows_needed};
use crate::evidence::reputation::{Reputation, left_out};
use crate::evidence::{Decision, RoundAccount, RoundFacts, StoredRow, account, segments};
use crate::layout::ModelSpec;
use crate::publish::{Candidate, PublishError, next_model_of, next_private_model};
use crate::robust::{Options, PayloadRows, Row, rule};
use crate::server_optimizer::OptimizerState;
use crate::store::blob::BlobStore;
use crate::store::evidence::RoundPlan;
use crate::store::{StoreError, evidence, history, late, models, rounds};
use crate::validate::norm_bound;

/// Everything that the result of a round depends on.
#[derive(Debug, Clone)]
pub struct RoundInputs {
    /// The terms as they were announced.
    pub announce: AnnounceV1,
    /// With what it is combined.
    pub plan: RoundPlan,
    /// Whose updates are stored, and late ones of the round before, by name.
    pub stored: Vec<StoredRow>,
    /// Their values, as they came, in the same order.
    pub rows: Vec<Row>,
    /// What the rule sees of each.
    pub seen: Vec<Seen>,
    /// What those sites had earned before the round, in the same order.
    pub earned: Vec<Reputation>,
    /// The base model's payload.
    pub base: Bytes,
    /// What the server optimiser remembered after the base model.
    pub memory: Option<OptimizerState>,
}

/// What the rule sees of a site.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Another row than its update as it came; see [`crate::average`].
    pub row: Option<Row>,
    /// Standard deviation of its noise in that of one update.
    pub noise_ratio: f64,
    /// Updates of the site in it.
    pub updates: u64,
}

impl Seen {
    /// The update as it came.
    const AS_IT_CAME: Self = Self {
        row: None,
        noise_ratio: 1.0,
        updates: 1,
    };
}

/// What was decided about a row before the rule, with the reason of a screen.
pub type Decided = (Decision, Option<String>);

/// Which late updates a round takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that wait, where the plan takes any: the round is being combined.
    Waiting,
    /// Those that it took: the round is done again.
    Carried,
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
        which: Which,
    ) -> Result<Self, StoreError> {
        let announce = history::announced(connection, round)?;
        let mut stored = evidence::stored_rows(connection, round)?;
        stored.extend(match which {
            Which::Waiting if !plan.late_updates => Vec::new(),
            Which::Waiting => late::waiting(connection, &announce)?,
            Which::Carried => late::carried(connection, &announce)?,
        });
        stored.sort_by(|one, other| one.node.cmp(&other.node));
        let mut rows = Vec::with_capacity(stored.len());
        for StoredRow { node, stale, .. } in &stored {
            rows.push(match (stale, cache.remove(node)) {
                (Some(stale), _) => late::row(connection, blobs, Round(stale.of_round), node)?,
                (None, Some(row)) => row,
                (None, None) => rounds::upload_row(connection, blobs, round, node)?,
            });
        }
        let seen = seen(connection, blobs, &announce, &plan, &stored, &rows)?;
        Ok(Self {
            seen,
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

    /// What is decided about each row before the rule sees any: who is in quarantine, then what the screen for copies takes out of the others. With it how many
    /// hostile rows are assumed among those that count.
    ///
    /// # Errors
    /// [`PublishError::Rule`] for payloads of another length.
    pub fn decisions(&self) -> Result<(Vec<Decided>, usize), PublishError> {
        let inside = |site: &Reputation| site.is_quarantined().then(|| site.trust_millionths());
        // Who is left out depends on the others' updates, so with noise of the centre it would tell of them: there all are scored, and all count.
        let enabled = self.plan.quarantine.enabled && !self.plan.central_noise;
        let in_force = |site: &Reputation| inside(site).filter(|_| enabled);
        let trusts: Vec<Option<u64>> = self.earned.iter().map(in_force).collect();
        let options = Options::for_round(self.plan.rule, std::iter::empty(), true);
        let (name, f) = (self.plan.rule, self.plan.byzantine);
        let needed = rows_needed(name, f, &options, trusts.len());
        let mut decisions: Vec<Decided> = left_out(&trusts, f, needed)
            .into_iter()
            .map(|out| {
                if out {
                    Decision::Quarantined
                } else {
                    Decision::Combined
                }
            })
            .map(|decision| (decision, None))
            .collect();
        let counted: Vec<usize> = (0..decisions.len())
            .filter(|at| decisions[*at].0 == Decision::Combined)
            .collect();
        if self.plan.central_noise {
            return Ok((decisions, 0));
        }
        // The screen sees updates as they came: only their noise has a known law.
        let rows = counted.iter().map(|at| self.rows[*at].clone()).collect();
        let noise = self.announce.noise_multiplier.value() * self.announce.clip_norm.value();
        // Lowered for copies that are hostile for sure, and to what so few rows can withstand. A refused site is no proof that the others are honest,
        // so nothing is lowered for it. A function of the stored rows alone.
        let (found, withstood) = copies(&PayloadRows::new(rows, self.announce.values)?, noise).in_force(
            name,
            f,
            &options,
            counted.len(),
        );
        for (row, of) in &found.removed {
            let of = &self.stored[counted[*of]].node;
            decisions[counted[*row]] = (Decision::Screened, Some(format!("it shares its noise with {of}")));
        }
        Ok((decisions, withstood))
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
        let (decisions, byzantine) = self.decisions()?;
        let counts = |(decision, _): &(Decision, Option<String>)| *decision == Decision::Combined;
        let (mut kept, mut noises) = (Vec::new(), Vec::new());
        for ((row, seen), decision) in self.rows.iter().zip(&self.seen).zip(&decisions) {
            if counts(decision) {
                kept.push(seen.row.as_ref().unwrap_or(row).clone());
                noises.push(seen.noise_ratio);
            }
        }
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
            let rule = rule(self.plan.rule, byzantine, &options)?;
            let spread = noises.iter().map(|ratio| ratio * ratio).sum::<f64>() / noises.len().max(1) as f64;
            let server = (optimizer, memory);
            next_model_of(spec, &terms, &self.base, kept, &*rule, server, spread.sqrt())?
        };
        let averaged: Vec<u64> = self.seen.iter().map(|seen| seen.updates).collect();
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
                averaged: &averaged,
                noise: terms.noise_multiplier.value() * terms.clip_norm.value(),
                withstood: byzantine,
            },
        );
        Ok(RoundResult { candidate, account })
    }
}

/// What the rule sees of each row. Reads the site's earlier updates one at a time.
fn seen(
    connection: &Connection,
    blobs: &BlobStore,
    announce: &AnnounceV1,
    plan: &RoundPlan,
    stored: &[StoredRow],
    rows: &[Row],
) -> Result<Vec<Seen>, StoreError> {
    let average = plan.site_average;
    let before = if average.rounds() > 1 {
        late::lineage(connection, announce, average)?
    } else {
        Vec::new()
    };
    let dimension = usize::try_from(announce.values).unwrap_or(usize::MAX);
    let one = |(site, row): (&StoredRow, &Row)| {
        let stale = site.stale.map_or(1.0, |stale| stale.weight);
        if before.is_empty() && stale >= 1.0 {
            return Ok(Seen::AS_IT_CAME);
        }
        let mut mean = Mean::new(dimension);
        mean.add(row, 1.0, stale);
        for (round, age) in &before {
            if let Some((row, stale)) = late::counted(connection, blobs, *round, &site.node)? {
                mean.add(&row, average.weight(*age), stale);
            }
        }
        if mean.updates() == 1 && stale >= 1.0 {
            return Ok(Seen::AS_IT_CAME);
        }
        Ok(Seen {
            noise_ratio: mean.noise_ratio(),
            updates: mean.updates(),
            row: Some(mean.into_row()),
        })
    };
    stored.iter().zip(rows).map(one).collect()
}
