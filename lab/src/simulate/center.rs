//! The aggregator of a simulated federation: the round machine, validation, the robust rule and the solve, without sockets and
//! disks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use theriac_aggregator::accumulate::{Depth, mean_of};
use theriac_aggregator::combine::{Decided, Decisions};
use theriac_aggregator::copies::{Copies, copies, rows_needed};
use theriac_aggregator::evidence::law::Finding;
use theriac_aggregator::evidence::{Decision, words};
use theriac_aggregator::robust::{
    Combined, Options, PayloadRows, Row, RowEvidence, Rows as _, RuleError, RuleName, rule,
};
use theriac_aggregator::validate::{RawUpdate, ValidatedUpdate, norm_bound, validate};
use theriac_aggregator::validation::Validation;
use theriac_aggregator::vet::look_at_mean;
use theriac_model::global::{GlobalError, GlobalModel, delta_layout, gradient_layout, moments_layout};
use theriac_model::gradient::{self, GRADIENT_CLIP_NORM};
use theriac_model::moments;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{
    AnnounceV1, DeclineReason, GateVerdict, ModelV1, ReceiptV1, ToAggregator, ToEdge, UpdateV1, WelcomeV1,
};
use theriac_protocol::refusal::{RefusalCode, RefusalV1};
use theriac_protocol::round::{BaseModel, Input, Output, RoundConfig, RoundMachine, RoundTerms};
use theriac_protocol::units::{
    Digest, L2Norm, ModelVersion, Moment, NodeId, NoiseMultiplier, Round, Timestamp, UnitError,
};

use super::args::{DELTA_CLIP_NORM, Recipe, Settings};
use super::quarantine::Quarantine;
use super::validator::{Validator, validate as try_on};

/// A row stands out when it is this many times as far from the rule's result as the median row.
const OUTVOTED_DISTANCE: f64 = 3.0;

/// Outcome of a round that gave a model.
pub const PUBLISHED: &str = "published";

/// Longest time of a round, on virtual time.
const DEADLINE: Duration = Duration::from_mins(10);

/// One update that was turned away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// Whose.
    pub site: NodeId,
    /// The protocol's word.
    pub reason: &'static str,
}

/// What the rule's view of one update was.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evidence {
    /// Whose.
    pub site: NodeId,
    /// Norm, distance and share of trimmed coordinates.
    #[serde(flatten)]
    pub row: RowEvidence,
    /// Whether it stood out: three times as far from the result as the median update.
    pub outvoted: bool,
}

/// What a round left behind.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RoundRecord {
    /// Its number.
    pub round: u64,
    /// `published`, or why not.
    pub outcome: String,
    /// Version of the model that it made, or left.
    pub model_version: u64,
    /// Digest of that model.
    pub model_digest: String,
    /// Updates in the model.
    pub contributors: Vec<NodeId>,
    /// Updates turned away.
    pub refused: Vec<Refused>,
    /// Sites in quarantine, whose updates counted nothing.
    pub quarantined: Vec<NodeId>,
    /// Sites whose updates share their noise with another one's, and counted nothing.
    pub screened: Vec<NodeId>,
    /// Sites that sent nothing and counted by their earlier releases.
    pub carried: Vec<NodeId>,
    /// Releases behind the model.
    pub releases: u64,
    /// Sites that took no part.
    pub declined: Vec<Refused>,
    /// What the rule saw.
    pub evidence: Vec<Evidence>,
    /// What validators made of the candidate; absent: none were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// What gates said of the model.
    pub verdicts: BTreeMap<NodeId, String>,
    /// Seconds from opening to end, on virtual time.
    pub virtual_seconds: f64,
}

/// The aggregator.
#[derive(Debug)]
pub struct Center {
    machine: RoundMachine,
    terms: RoundTerms,
    rule: RuleName,
    byzantine: usize,
    /// Whether updates carry noise.
    private: bool,
    model: GlobalModel,
    header: ModelV1,
    payload: Bytes,
    candidate: Option<(GlobalModel, Bytes)>,
    open: Option<AnnounceV1>,
    opened_at: Moment,
    held: BTreeMap<NodeId, ValidatedUpdate>,
    stored: BTreeMap<NodeId, ValidatedUpdate>,
    recipe: Recipe,
    /// The last move of the network, and how it is made.
    velocity: Vec<f32>,
    server: (f32, f32),
    /// Most releases of a site that count; 1: those of the round alone.
    keep: usize,
    /// What was taken in of each site's moments, newest first.
    kept: BTreeMap<NodeId, VecDeque<Row>>,
    records: Vec<RoundRecord>,
    /// What the rule made of the last round.
    combined: Option<Vec<f32>>,
    quarantine: Quarantine,
    /// Who tries each model before it is published.
    validators: Vec<Validator>,
}

impl Center {
    /// An aggregator for `sites` sites that holds the initial model. `blocks_max` bounds the units of one release.
    ///
    /// # Errors
    /// [`UnitError`] for terms out of range.
    pub fn new(
        settings: &Settings,
        channels: usize,
        sites: usize,
        blocks_max: u32,
    ) -> Result<Self, UnitError> {
        let recipe = settings.args.recipe;
        let (layout, clip_default) = match recipe {
            Recipe::Moments => (moments_layout(channels), moments::BLOCK_CLIP_NORM),
            Recipe::Gradient => (gradient_layout(channels), GRADIENT_CLIP_NORM),
            Recipe::Delta => (delta_layout(channels), DELTA_CLIP_NORM),
        };
        let (clip_norm, noise_multiplier, block_rows) = match &settings.terms {
            Some(terms) => (terms.clip_norm, terms.noise_multiplier, terms.block_rows),
            None => (
                // Local steps are bounded by nothing.
                L2Norm::new(match (recipe, settings.args.local_steps) {
                    (Recipe::Gradient, Some(_)) => 1e9,
                    _ => clip_default,
                })?,
                NoiseMultiplier::new(f64::MIN_POSITIVE)?,
                moments::BLOCK_ROWS,
            ),
        };
        let terms = RoundTerms {
            kind: recipe.kind(),
            values: u32::try_from(layout.len()).unwrap_or(u32::MAX),
            layout_digest: Digest(layout.digest()),
            clip_norm,
            noise_multiplier,
            block_rows: u32::try_from(block_rows).unwrap_or(u32::MAX),
            blocks_min: 1,
            blocks_max,
        };
        let config = RoundConfig {
            quorum: sites / 2 + 1,
            byzantine: 0,
            deadline: DEADLINE,
            pause: Duration::ZERO,
            late_updates: false,
            updates_max: usize::MAX,
            rounds_max: Some(settings.args.rounds().into()),
            terms: terms.clone(),
        };
        let model = GlobalModel::initial(channels, settings.args.seed);
        let payload = Bytes::from(encode_f32(model.values()));
        let header = ModelV1 {
            version: ModelVersion(0),
            round: Round(0),
            layout_digest: Digest(model.layout().digest()),
            values: u32::try_from(model.values().len()).unwrap_or(u32::MAX),
            payload_digest: Digest::of(&payload),
            rule: settings.args.rule.to_string(),
            contributors: 0,
        };
        let base = BaseModel {
            version: header.version,
            digest: header.payload_digest,
        };
        let nonce_seed = Sha256::digest(settings.args.seed.to_le_bytes()).into();
        Ok(Self {
            machine: RoundMachine::new(config, base, Round(0), nonce_seed, Moment::default()),
            terms,
            rule: settings.args.rule,
            byzantine: settings.byzantine,
            private: settings.terms.is_some(),
            model,
            header,
            payload,
            candidate: None,
            open: None,
            opened_at: Moment::default(),
            held: BTreeMap::new(),
            stored: BTreeMap::new(),
            recipe,
            velocity: vec![0.0; layout.len()],
            server: (settings.args.server_rate, settings.args.server_momentum()),
            keep: match (recipe, settings.args.accumulate) {
                (Recipe::Moments, true) => usize::try_from(settings.args.moments_keep).unwrap_or(usize::MAX),
                _ => 1,
            },
            kept: BTreeMap::new(),
            records: Vec::new(),
            combined: None,
            quarantine: Quarantine::new(settings.terms.is_some(), settings.byzantine),
            validators: Vec::new(),
        })
    }

    /// The same with sites that try each model before it is published.
    #[must_use]
    pub fn with_validators(mut self, validators: Vec<Validator>) -> Self {
        self.validators = validators;
        self
    }

    /// The model as every edge holds it before the first round.
    pub fn base(&self) -> BaseModel {
        BaseModel {
            version: self.header.version,
            digest: self.header.payload_digest,
        }
    }

    /// Admits a site; what it is told.
    pub fn admit(&mut self, now: Moment, node: &NodeId) -> WelcomeV1 {
        self.machine.handle(now, Input::Admitted { node: node.clone() });
        self.welcome(now, node)
    }

    /// What a site is told that only fetches the model and takes part in no round.
    pub fn welcome(&self, now: Moment, node: &NodeId) -> WelcomeV1 {
        WelcomeV1 {
            protocol: theriac_protocol::message::PROTOCOL_MAX,
            federation: "simulation".to_owned(),
            node: node.clone(),
            time: Timestamp(0),
            frame_bytes_max: u32::MAX,
            model_version: self.header.version,
            model_digest: self.header.payload_digest,
            audit_checkpoint: (0, Digest::default()),
            audit_consistency: Vec::new(),
            round: self.machine.announcement(now),
        }
    }

    /// Takes a message of a site; answers that do not come from the machine are returned.
    pub fn handle(&mut self, now: Moment, node: &NodeId, message: ToAggregator) -> Option<ToEdge> {
        match message {
            ToAggregator::Update(header, payload) => self.update(now, node, header, payload),
            ToAggregator::Decline(decline) => {
                let reason = decline_word(decline.reason);
                let declined = Refused {
                    site: node.clone(),
                    reason,
                };
                self.record(|record| record.declined.push(declined));
                let (round, reason) = (decline.round, decline.reason);
                self.machine.handle(
                    now,
                    Input::Declined {
                        node: node.clone(),
                        round,
                        reason,
                    },
                );
                None
            }
            ToAggregator::FetchModel(fetch) if fetch.version == self.header.version => {
                Some(ToEdge::Model(self.header.clone(), self.payload.clone()))
            }
            ToAggregator::Verdict(verdict) => {
                // The next round may have begun in the meantime.
                let made = |record: &&mut RoundRecord| {
                    record.outcome == PUBLISHED && record.model_version == verdict.version.0
                };
                if let Some(record) = self.records.iter_mut().rev().find(made) {
                    record
                        .verdicts
                        .insert(node.clone(), verdict_word(verdict.verdict).to_owned());
                }
                None
            }
            ToAggregator::Guarantee(_)
            | ToAggregator::Appraisal(_)
            | ToAggregator::Health(_)
            | ToAggregator::LeaseRequest(_)
            | ToAggregator::LeaseRelease(_) => None,
            ToAggregator::FetchModel(_) | ToAggregator::Hello(_) | ToAggregator::Goodbye => {
                Some(refusal(RefusalCode::OutOfTurn, None))
            }
        }
    }

    fn update(&mut self, now: Moment, node: &NodeId, header: UpdateV1, payload: Bytes) -> Option<ToEdge> {
        let (round, nonce, base_digest) = (header.round, header.nonce, header.base_digest);
        let Some(terms) = &self.open else {
            self.refused(node, RefusalCode::RoundClosed);
            return Some(refusal(RefusalCode::RoundClosed, Some(round)));
        };
        match validate(
            RawUpdate {
                node: node.clone(),
                header,
                payload,
            },
            terms,
        ) {
            Ok(update) => {
                let payload_digest = update.header().payload_digest;
                self.held.insert(node.clone(), update);
                let node = node.clone();
                self.machine.handle(
                    now,
                    Input::Update {
                        node,
                        round,
                        nonce,
                        base_digest,
                        payload_digest,
                    },
                );
                None
            }
            Err(error) => {
                self.refused(node, error.code());
                Some(refusal(error.code(), Some(round)))
            }
        }
    }

    /// Carries out what the machine asks for; what is to be sent.
    pub fn poll(&mut self, now: Moment) -> Vec<(NodeId, ToEdge)> {
        let mut messages = Vec::new();
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Open { announce, .. } => self.begin(now, announce),
                Output::Announce { to, announce } => {
                    messages.extend(
                        to.into_iter()
                            .map(|node| (node, ToEdge::Announce(announce.clone()))),
                    );
                }
                Output::Refuse { node, round, code } => {
                    self.held.remove(&node);
                    self.refused(&node, code);
                    messages.push((node, refusal(code, Some(round))));
                }
                Output::Store { node, round, .. } => {
                    let input = match self.held.remove(&node) {
                        Some(update) => {
                            self.stored.insert(node.clone(), update);
                            Input::Stored { node, round }
                        }
                        None => Input::StoreFailed { node, round },
                    };
                    self.machine.handle(now, input);
                }
                Output::StoreLate { node, round, .. } => {
                    // Not asked for: `late_updates` is off.
                    self.machine.handle(now, Input::StoreFailed { node, round });
                }
                Output::Receipt {
                    node,
                    round,
                    payload_digest,
                } => {
                    let receipt = ReceiptV1 {
                        round,
                        payload_digest,
                        leaf_index: 0,
                        ledger_head: Digest::default(),
                        signature: vec![0; 64],
                    };
                    messages.push((node, ToEdge::Receipt(receipt)));
                }
                Output::Aggregate { round, members, .. } => {
                    let before = (self.kept.clone(), self.velocity.clone(), self.quarantine.clone());
                    let input = match self.aggregate(&members) {
                        Ok(_) if !self.passes(round) => {
                            // As at an aggregator nothing of such a round stays: neither what was summed nor what was held against anybody.
                            (self.kept, self.velocity, self.quarantine) = before;
                            self.candidate = None;
                            Input::AggregationFailed { round }
                        }
                        Ok((version, digest)) => Input::Aggregated {
                            round,
                            version,
                            digest,
                        },
                        Err(error) => {
                            self.record(|record| record.outcome = error.to_string());
                            Input::AggregationFailed { round }
                        }
                    };
                    self.machine.handle(now, input);
                }
                Output::Publish {
                    round,
                    version,
                    digest,
                    members: _,
                } => {
                    let contributors = self.records.last().map_or(0, |record| record.contributors.len());
                    self.publish(now, round, version, digest, contributors);
                    self.machine.handle(now, Input::Published { round });
                }
                Output::Abort { round, reason } => {
                    self.end(now, &format!("{reason:?}"));
                    self.machine.handle(now, Input::Aborted { round });
                }
                Output::Closed { to, closed } => {
                    messages.extend(to.into_iter().map(|node| (node, ToEdge::Closed(closed.clone()))));
                }
            }
        }
        messages
    }

    /// When something is due.
    pub fn timeout(&self) -> Option<Moment> {
        self.machine.poll_timeout()
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.machine.handle_timeout(now);
    }

    /// Number of the latest round, 0 before the first.
    pub fn round(&self) -> u64 {
        self.records.last().map_or(0, |record| record.round)
    }

    /// The latest model with its header.
    pub fn model(&self) -> (&ModelV1, &GlobalModel) {
        (&self.header, &self.model)
    }

    /// What the rounds left behind.
    pub fn into_records(self) -> (GlobalModel, Vec<RoundRecord>) {
        (self.model, self.records)
    }

    fn begin(&mut self, now: Moment, announce: AnnounceV1) {
        let round = announce.round;
        self.records.push(RoundRecord {
            round: round.0,
            ..RoundRecord::default()
        });
        self.open = Some(announce);
        self.opened_at = now;
        self.held.clear();
        self.stored.clear();
        self.machine.handle(now, Input::Opened { round });
    }

    /// Whether the validators, if there are any, let the candidate be published.
    fn passes(&mut self, round: Round) -> bool {
        let Some((candidate, payload)) = self.candidate.as_ref().filter(|_| !self.validators.is_empty())
        else {
            return true;
        };
        let base = (self.header.version.0, &self.model);
        let validators: Vec<&Validator> = self.validators.iter().collect();
        let validation = try_on(&validators, round.0, base, (candidate, Digest::of(payload)));
        let decision = validation.decision;
        self.record(|record| {
            record.validation = Some(validation);
            if !decision.publishes() {
                decision.abort_word().clone_into(&mut record.outcome);
            }
        });
        decision.publishes()
    }

    /// The rule over the sites' updates, as at an aggregator. Moments: over the means of each site's releases, also of sites that sent nothing, times their number;
    /// then the solve. Gradients: a step of the full linear model. Deltas: one of the network.
    fn aggregate(&mut self, members: &[(NodeId, Digest)]) -> Result<(ModelVersion, Digest), CombineError> {
        let updates: Vec<&ValidatedUpdate> = members
            .iter()
            .filter_map(|(node, _)| self.stored.get(node))
            .collect();
        let decided = self.decisions(&updates)?;
        let (decisions, byzantine) = (&decided.own, decided.withstood);
        let of = |decision: Decision| -> Vec<&ValidatedUpdate> {
            let of = updates.iter().zip(decisions);
            let of = of.filter(|(_, (found, _))| *found == decision);
            of.map(|(update, _)| *update).collect()
        };
        let nodes = |decision: Decision| -> Vec<NodeId> {
            of(decision).iter().map(|update| update.node().clone()).collect()
        };
        let (quarantined, screened) = (nodes(Decision::Quarantined), nodes(Decision::Screened));
        let contributors = nodes(Decision::Combined);
        let shown = self.shown(&of(Decision::Combined));
        let mut combined = self.combine(&shown, byzantine)?;
        let mut own = shown.own.iter();
        combined.evidence.retain(|_| own.next().copied().unwrap_or(true));
        let taken: Vec<(NodeId, Row)> = of(Decision::Combined)
            .iter()
            .map(|update| (update.node().clone(), update.row()))
            .collect();
        let refused = self.records.last().into_iter().flat_map(|record| &record.refused);
        let refused = refused.map(|refused| (refused.site.clone(), refused.reason));
        let refused = refused
            .filter(|(site, _)| members.iter().all(|(node, _)| node != site))
            .collect();
        let inconsistent = match &self.open {
            Some(terms) => self
                .quarantine
                .observe(terms, &updates, &decided, &combined, refused)?,
            None => BTreeSet::new(),
        };
        for (update, found) in updates.iter().zip(&decided.of_mean) {
            if found.is_some() {
                self.kept.remove(update.node());
            }
        }
        for (node, row) in taken.into_iter().filter(|(node, _)| !inconsistent.contains(node)) {
            let kept = self.kept.entry(node).or_default();
            kept.push_front(row);
            kept.truncate(self.keep);
        }
        self.kept.retain(|node, _| !self.quarantine.holds(node));
        let next = match self.recipe {
            Recipe::Moments => self.solved(&combined.values, &shown)?,
            Recipe::Gradient => self.stepped(&combined.values)?,
            Recipe::Delta => self.moved(&combined.values)?,
        };
        let payload = Bytes::from(encode_f32(next.values()));
        let digest = Digest::of(&payload);
        self.candidate = Some((next, payload));
        self.combined = Some(combined.values);
        let mut distances: Vec<f64> = combined.evidence.iter().map(|row| row.distance).collect();
        let middle = distances.len() / 2;
        let median = *distances.select_nth_unstable_by(middle, f64::total_cmp).1;
        let evidence = contributors
            .iter()
            .zip(combined.evidence)
            .map(|(site, row)| Evidence {
                site: site.clone(),
                row,
                outvoted: row.distance > OUTVOTED_DISTANCE * median,
            });
        let evidence: Vec<Evidence> = evidence.collect();
        self.record(|record| {
            (record.evidence, record.contributors) = (evidence, contributors);
            (record.quarantined, record.screened) = (quarantined, screened);
            (record.carried, record.releases) = (shown.carried, shown.releases);
        });
        Ok((self.header.version.next(), digest))
    }

    /// What is decided about each update before the rule sees any, as at an aggregator: who is in quarantine, then what the screen for copies takes out of the others.
    /// With it how many hostile ones the rule withstands among those that count. The mean of a site that sends nothing is what it was when it sent the last of its
    /// releases, which the vet let pass then: here no release grows too old.
    fn decisions(&self, updates: &[&ValidatedUpdate]) -> Result<Decisions, RuleError> {
        let beside = self.carried(updates).count();
        let mut of_mean = vec![None; updates.len()];
        let options = Options::for_round(self.rule, std::iter::empty(), self.private);
        let needed = rows_needed(self.rule, self.byzantine, &options, updates.len() + beside);
        let mut decisions: Vec<Decided> = self
            .quarantine
            .left_out(updates, needed, beside)
            .into_iter()
            .map(|out| {
                let decision = if out {
                    Decision::Quarantined
                } else {
                    Decision::Combined
                };
                (decision, None)
            })
            .collect();
        let counted: Vec<usize> = (0..updates.len())
            .filter(|at| decisions[*at].0 == Decision::Combined)
            .collect();
        let rows = counted.iter().map(|at| updates[*at].row()).collect();
        let noise = self.terms.noise_multiplier.value() * self.terms.clip_norm.value();
        let found = copies(&PayloadRows::new(rows, self.terms.values)?, noise);
        let mut left = counted.len() + beside;
        let (found, withstood) = found.in_force(self.rule, self.byzantine, &options, left);
        left -= found.removed.len();
        for (copy, of) in found.removed {
            let of = updates[counted[of]].node();
            decisions[counted[copy]] = (Decision::Screened, Some(format!("it shares its noise with {of}")));
        }
        let before = left;
        if let Some(terms) = self.open.as_ref().filter(|_| self.keep > 1) {
            for at in counted {
                let (row, ratio, releases) = self.mean(updates[at].node(), Some(updates[at].row()));
                if decisions[at].0 == Decision::Combined
                    && releases > 1
                    && let Err(found) = look_at_mean(row.encoding, &row.payload, terms, ratio)
                {
                    let finding = Finding::NoSeries {
                        releases,
                        what: found.what.to_owned(),
                        found: found.found,
                        bound: found.bound,
                    };
                    decisions[at] = (Decision::Screened, Some(words::no_series(&finding)));
                    of_mean[at] = Some(finding);
                    left -= 1;
                }
            }
        }
        let withstood = if left < before {
            Copies::default().in_force(self.rule, withstood, &options, left).1
        } else {
            withstood
        };
        Ok(Decisions {
            own: decisions,
            of_mean,
            carried: vec![None; beside],
            withstood,
        })
    }

    /// Sites that count by their earlier releases alone: with some, without an update in this round, and with none that was refused in it.
    fn carried<'s>(&'s self, updates: &'s [&ValidatedUpdate]) -> impl Iterator<Item = &'s NodeId> {
        let refused = self.records.last().into_iter().flat_map(|record| &record.refused);
        let refused: BTreeSet<&NodeId> = refused.map(|refused| &refused.site).collect();
        let kept = self.kept.keys().filter(|_| self.keep > 1);
        kept.filter(move |node| {
            !refused.contains(node) && updates.iter().all(|update| update.node() != *node)
        })
    }

    /// The mean of a site's releases, the one at hand first, its noise ratio, and how many they are.
    fn mean(&self, node: &NodeId, fresh: Option<Row>) -> (Row, f64, u64) {
        let earlier = self.kept.get(node).into_iter().flatten().cloned();
        let rows: Vec<Row> = fresh.into_iter().chain(earlier).take(self.keep).collect();
        let (mean, ratio) = mean_of(usize::try_from(self.terms.values).unwrap_or(usize::MAX), &rows);
        (mean, ratio, rows.len() as u64)
    }

    /// What the rule sees when these updates count.
    fn shown(&self, updates: &[&ValidatedUpdate]) -> Shown {
        let all: Vec<&ValidatedUpdate> = self.stored.values().collect();
        let all = if all.is_empty() { updates } else { &all };
        let mut rows = BTreeMap::new();
        for update in updates {
            let row = if self.keep > 1 {
                self.mean(update.node(), Some(update.row()))
            } else {
                (update.row(), 1.0, 1)
            };
            rows.insert(update.node().clone(), (true, row));
        }
        let carried: Vec<NodeId> = self.carried(all).cloned().collect();
        for node in &carried {
            let row = self.mean(node, None);
            rows.entry(node.clone()).or_insert((false, row));
        }
        Shown {
            own: rows.values().map(|(own, _)| *own).collect(),
            depth: Depth::of(rows.values().map(|(_, (_, ratio, releases))| (*ratio, *releases))),
            releases: rows.values().map(|(_, (.., releases))| releases).sum(),
            rows: rows.into_values().map(|(_, (row, ..))| row).collect(),
            digests: updates
                .iter()
                .map(|update| update.header().payload_digest)
                .collect(),
            carried,
        }
    }

    /// The rule over rows in the order of their nodes.
    fn combine(&self, shown: &Shown, byzantine: usize) -> Result<Combined<f32>, RuleError> {
        let options = Options::for_round(self.rule, shown.digests.iter(), self.private);
        let rule = rule(self.rule, byzantine, &options)?;
        let rows = PayloadRows::new(shown.rows.clone(), self.terms.values)?;
        rule.check(rows.count())?;
        rule.combine(&rows)
    }

    /// What the rule would make of the open round if these were its updates; `None` without a round or a result. Colluders ask this.
    pub fn trial(&self, updates: Vec<RawUpdate>) -> Option<Vec<f32>> {
        let terms = self.open.as_ref()?;
        let mut valid: Vec<ValidatedUpdate> = updates
            .into_iter()
            .filter_map(|update| validate(update, terms).ok())
            .collect();
        valid.sort_by(|a, b| a.node().cmp(b.node()));
        let valid: Vec<&ValidatedUpdate> = valid.iter().collect();
        let Decisions {
            own: decisions,
            withstood: byzantine,
            ..
        } = self.decisions(&valid).ok()?;
        let counted = valid.iter().zip(&decisions);
        let counted = counted.filter(|(_, (decision, _))| *decision == Decision::Combined);
        let counted: Vec<&ValidatedUpdate> = counted.map(|(update, _)| *update).collect();
        let combined = self.combine(&self.shown(&counted), byzantine);
        combined.ok().map(|combined| combined.values)
    }

    /// What the rule made of the last round.
    pub fn previous(&self) -> Option<&[f32]> {
        self.combined.as_deref()
    }

    /// The norm bound of the open round's updates.
    pub fn bound(&self) -> f64 {
        self.open.as_ref().map_or(f64::INFINITY, norm_bound)
    }

    /// Whether this round takes no more updates.
    pub fn is_over(&self, round: Round) -> bool {
        self.open.as_ref().is_none_or(|open| open.round > round)
    }

    /// The model that the mean of these rows gives.
    fn solved(&self, mean: &[f32], shown: &Shown) -> Result<GlobalModel, GlobalError> {
        let sites = shown.rows.len();
        let times = sites as f64 * shown.depth.releases;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the product is rounded once, here"
        )]
        let sum: Vec<f32> = mean
            .iter()
            .map(|value| (f64::from(*value) * times) as f32)
            .collect();
        let sigma = shown.depth.sigma(self.terms.noise_multiplier.value());
        let clip_norm = self.terms.clip_norm.value();
        let own = moments::solve(&sum, sites, sigma, clip_norm, self.model.channels());
        self.model.with_own_lag(&own)
    }

    /// The model a step towards the sites' mean, with momentum (Reddi et al. 2021, `FedAvgM`).
    fn moved(&mut self, mean: &[f32]) -> Result<GlobalModel, GlobalError> {
        let (rate, momentum) = self.server;
        for (velocity, step) in self.velocity.iter_mut().zip(mean) {
            *velocity = momentum * *velocity + rate * step;
        }
        self.model.with_delta(&self.velocity)
    }

    /// The model after a step of the full linear one; without `--server-rate` and `--server-momentum` the very step of an aggregator.
    fn stepped(&mut self, mean: &[f32]) -> Result<GlobalModel, GlobalError> {
        let (rate, momentum) = (f64::from(self.server.0), f64::from(self.server.1));
        let sigma = self.terms.noise_multiplier.value();
        let length = rate * gradient::step_length(sigma);
        let (blocks, rows) = (self.terms.blocks_max, self.terms.block_rows);
        let next = self
            .model
            .descent()
            .step_with(mean, blocks, rows, length, momentum)?;
        self.model.with_descent(&next)
    }

    fn publish(
        &mut self,
        now: Moment,
        round: Round,
        version: ModelVersion,
        digest: Digest,
        contributors: usize,
    ) {
        if let Some((model, payload)) = self.candidate.take() {
            self.header.version = version;
            self.header.round = round;
            self.header.payload_digest = digest;
            self.header.contributors = u32::try_from(contributors).unwrap_or(u32::MAX);
            self.header.layout_digest = Digest(model.layout().digest());
            self.header.values = u32::try_from(model.values().len()).unwrap_or(u32::MAX);
            (self.model, self.payload) = (model, payload);
        }
        self.end(now, PUBLISHED);
    }

    fn end(&mut self, now: Moment, outcome: &str) {
        self.open = None;
        let (version, digest) = (self.header.version.0, self.header.payload_digest.to_string());
        let seconds = now.since(self.opened_at).as_secs_f64();
        self.record(|record| {
            if record.outcome.is_empty() {
                outcome.clone_into(&mut record.outcome);
            }
            (record.model_version, record.model_digest, record.virtual_seconds) = (version, digest, seconds);
        });
    }

    fn refused(&mut self, node: &NodeId, code: RefusalCode) {
        let refused = Refused {
            site: node.clone(),
            reason: code.word(),
        };
        self.record(|record| record.refused.push(refused));
    }

    fn record(&mut self, change: impl FnOnce(&mut RoundRecord)) {
        if let Some(record) = self.records.last_mut() {
            change(record);
        }
    }
}

/// What a rule sees, in the order of the nodes.
#[derive(Debug)]
struct Shown {
    rows: Vec<Row>,
    /// For each whether its site sent an update in the round.
    own: Vec<bool>,
    depth: Depth,
    releases: u64,
    carried: Vec<NodeId>,
    /// Of the updates of the round, for the seed of buckets.
    digests: Vec<Digest>,
}

/// Why validated updates gave no model.
#[derive(Debug, thiserror::Error)]
enum CombineError {
    #[error(transparent)]
    Rule(#[from] RuleError),
    #[error(transparent)]
    Model(#[from] GlobalError),
}

fn decline_word(reason: DeclineReason) -> &'static str {
    match reason {
        DeclineReason::BudgetSpent => "budget_spent",
        DeclineReason::TermsTooWeak => "terms_too_weak",
        DeclineReason::TooFewBlocks => "too_few_blocks",
        DeclineReason::UnknownLayout => "unknown_layout",
        DeclineReason::StorageUnavailable => "storage_unavailable",
        DeclineReason::ReceiveOnly => "receive_only",
    }
}

/// A verdict's word for records.
pub fn verdict_word(verdict: GateVerdict) -> &'static str {
    match verdict {
        GateVerdict::Accepted => "accepted",
        GateVerdict::WorseOnTail => "worse_on_tail",
        GateVerdict::NonFinite => "non_finite",
        GateVerdict::LayoutMismatch => "layout_mismatch",
        GateVerdict::Stale => "stale",
        GateVerdict::TooFewRows => "too_few_rows",
    }
}

fn refusal(code: RefusalCode, round: Option<Round>) -> ToEdge {
    ToEdge::Refusal(RefusalV1 {
        code,
        round,
        retry_after_ms: 0,
    })
}
