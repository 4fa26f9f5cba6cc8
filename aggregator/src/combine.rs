//! One round from what is stored to a model and the evidence about everybody: what the driver runs and `rounds replay` runs again.

mod load;

use std::sync::Arc;

use bytes::Bytes;
use theriac_privacy::central::CentralCharge;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::NodeId;

use crate::accumulate::{Behind, Depth};
use crate::copies::{Copies, copies, rows_needed};
use crate::evidence::law::Finding;
use crate::evidence::reputation::{Reputation, left_out};
use crate::evidence::{
    CarriedFacts, Decision, RoundAccount, RoundFacts, StoredRow, account, segments, words,
};
use crate::layout::ModelSpec;
use crate::publish::{Candidate, PublishError, next_model_of, next_private_model};
use crate::robust::{Options, PayloadRows, PlacedRow, RowFile, rule};
use crate::server_optimizer::OptimizerState;
use crate::store::evidence::RoundPlan;
use crate::validate::norm_bound;
use crate::validation::Tried;
use crate::vet::look_at_mean;

pub use load::RowSource;

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
    pub rows: Vec<PlacedRow>,
    /// What the rule sees of each.
    pub seen: Vec<Seen>,
    /// What those sites had earned before the round, in the same order.
    pub earned: Vec<Reputation>,
    /// Sites without an update that count by their earlier releases, by name.
    pub carried: Vec<CarriedRow>,
    /// The base model's payload.
    pub base: Bytes,
    /// What the server optimiser remembered after the base model.
    pub memory: Option<OptimizerState>,
    /// Where the rows lie that are not in memory.
    file: Option<Arc<RowFile>>,
}

/// What the rule sees of a site.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Another row than its update as it came; see [`crate::average`].
    pub row: Option<PlacedRow>,
    /// Standard deviation of its noise in that of one update.
    pub noise_ratio: f64,
    /// Updates of the site in its average.
    pub updates: u64,
    /// Where earlier releases are added: what is in the row.
    pub behind: Option<Behind>,
}

/// The row of a site that sent nothing in the round: the mean of its earlier releases.
#[derive(Debug, Clone)]
pub struct CarriedRow {
    /// Whose it is.
    pub node: NodeId,
    /// The mean.
    pub row: PlacedRow,
    /// Standard deviation of its noise in that of one release.
    pub noise_ratio: f64,
    /// What is in it.
    pub behind: Behind,
}

impl Seen {
    /// The update as it came.
    const AS_IT_CAME: Self = Self {
        row: None,
        noise_ratio: 1.0,
        updates: 1,
        behind: None,
    };
}

/// What was decided about a row before the rule, with the reason of a screen.
pub type Decided = (Decision, Option<String>);

/// What is decided before the rule sees a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Decisions {
    /// About each stored row, in order.
    pub own: Vec<Decided>,
    /// Why the releases of a stored row's site are no moments of a series together, in the same order.
    pub of_mean: Vec<Option<Finding>>,
    /// The same of each site that is carried; with a finding it does not count.
    pub carried: Vec<Option<Finding>>,
    /// Hostile rows that are assumed among those that count, carried ones included.
    pub withstood: usize,
}

/// Which late updates, and which sites without an update, a round takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    /// Those that wait, where the plan takes any: the round is being combined.
    Waiting,
    /// Those that it took: the round is done again.
    Carried,
    /// Late updates that wait still, and the sites that are named as carried: a round that published nothing is done again.
    Tried(&'a [Tried]),
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
    /// What is decided about each row before the rule sees any: who is in quarantine, then what the screen for copies takes out of the others, then whose releases
    /// together are no moments of a series.
    ///
    /// # Errors
    /// [`PublishError::Rule`] for payloads of another length.
    ///
    /// Rows that cannot be read from their file count as zeros here; [`RoundInputs::run`] throws away what comes of them.
    pub fn decisions(&self) -> Result<Decisions, PublishError> {
        let vetted = |row: &CarriedRow| self.vet_of_mean(&row.row, row.noise_ratio, row.behind);
        let carried: Vec<Option<Finding>> = self.carried.iter().map(vetted).collect();
        // They count beside the stored rows, so they are among those that the quarantine must leave to the rule.
        let beside = carried.iter().filter(|found| found.is_none()).count();
        let mut of_mean = vec![None; self.stored.len()];
        let inside = |site: &Reputation| site.is_quarantined().then(|| site.trust_millionths());
        // Who is left out depends on the others' updates, so with noise of the centre it would tell of them: there all are scored, and all count.
        let enabled = self.plan.quarantine.enabled && !self.plan.central_noise;
        let in_force = |site: &Reputation| inside(site).filter(|_| enabled);
        let trusts: Vec<Option<u64>> = self.earned.iter().map(in_force).collect();
        let options = Options::for_round(self.plan.rule, std::iter::empty(), true);
        let (name, f) = (self.plan.rule, self.plan.byzantine);
        let needed = rows_needed(name, f, &options, trusts.len() + beside);
        let mut decisions: Vec<Decided> = left_out(&trusts, f, needed, beside)
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
            return Ok(Decisions {
                own: decisions,
                of_mean,
                carried,
                withstood: 0,
            });
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
            counted.len() + beside,
        );
        for (row, of) in &found.removed {
            let of = &self.stored[counted[*of]].node;
            decisions[counted[*row]] = (Decision::Screened, Some(format!("it shares its noise with {of}")));
        }
        let mut left = counted.len() + beside - found.removed.len();
        let before = left;
        for at in counted {
            let Some((row, seen)) = self.mean_at(at).filter(|_| decisions[at].0 == Decision::Combined) else {
                continue;
            };
            let behind = seen.behind.unwrap_or_default();
            if let Some(found) = self.vet_of_mean(row, seen.noise_ratio, behind) {
                decisions[at] = (Decision::Screened, Some(words::no_series(&found)));
                of_mean[at] = Some(found);
                left -= 1;
            }
        }
        let withstood = if left == before {
            withstood
        } else {
            // Who is left out so may be honest, so f stays what it is unless so few rows cannot withstand it.
            Copies::default().in_force(name, withstood, &options, left).1
        };
        Ok(Decisions {
            own: decisions,
            of_mean,
            carried,
            withstood,
        })
    }

    /// What the rule sees of a stored row where that is a mean.
    fn mean_at(&self, at: usize) -> Option<(&PlacedRow, &Seen)> {
        let seen = self.seen.get(at)?;
        Some((seen.row.as_ref()?, seen))
    }

    /// Why the releases of a site are no moments of a series, where several are added: with less noise the vet sees what one of them hides.
    fn vet_of_mean(&self, row: &PlacedRow, noise_ratio: f64, behind: Behind) -> Option<Finding> {
        if behind.releases < 2 {
            return None;
        }
        let row = row.row();
        let found = look_at_mean(row.encoding, &row.payload, &self.announce, noise_ratio).err()?;
        Some(Finding::NoSeries {
            releases: behind.releases,
            what: found.what.to_owned(),
            found: found.found,
            bound: found.bound,
        })
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
        let file = self.file.clone();
        let result = self.combine(spec, charge);
        // What came of rows that could not be read is nothing, an error of the rule among it.
        match file.and_then(|file| file.failure()) {
            Some(failure) => Err(failure.into()),
            None => result,
        }
    }

    fn combine(self, spec: &ModelSpec, charge: Option<CentralCharge>) -> Result<RoundResult, PublishError> {
        let Decisions {
            own: decisions,
            of_mean,
            carried: of_carried,
            withstood: byzantine,
        } = self.decisions()?;
        let counts = |(decision, _): &(Decision, Option<String>)| *decision == Decision::Combined;
        let mut counted: Vec<Counted<'_>> = self
            .carried
            .iter()
            .zip(&of_carried)
            .filter(|(_, found)| found.is_none())
            .map(|(carried, _)| Counted {
                node: &carried.node,
                own: false,
                row: &carried.row,
                noise_ratio: carried.noise_ratio,
                releases: carried.behind.releases,
            })
            .collect();
        for (at, _) in decisions.iter().enumerate().filter(|(_, of)| counts(of)) {
            let seen = &self.seen[at];
            counted.push(Counted {
                node: &self.stored[at].node,
                own: true,
                row: seen.row.as_ref().unwrap_or(&self.rows[at]),
                noise_ratio: seen.noise_ratio,
                releases: seen.behind.map_or(1, |behind| behind.releases),
            });
        }
        // A rule reads rows in the order of their sites, whoever sent something.
        counted.sort_by(|one, other| one.node.cmp(other.node));
        let own: Vec<bool> = counted.iter().map(|row| row.own).collect();
        let kept: Vec<PlacedRow> = counted.iter().map(|row| row.row.clone()).collect();
        let depth = Depth::of(counted.iter().map(|row| (row.noise_ratio, row.releases)));
        let terms = self.terms();
        // The handles of rows that the rule reads as well.
        let carried_rows: Vec<PlacedRow> = self.carried.iter().map(|row| row.row.clone()).collect();
        let mut of_rule = Vec::new();
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
            let server = (optimizer, memory);
            let mut candidate = next_model_of(spec, &terms, &self.base, kept, &*rule, server, depth)?;
            // A candidate's evidence is about updates of this round; what the rule said of a carried site is in that site's account.
            let said = own.into_iter().zip(std::mem::take(&mut candidate.evidence));
            let (of_own, of_others): (Vec<_>, Vec<_>) = said.partition(|(own, _)| *own);
            candidate.evidence = of_own.into_iter().map(|(_, said)| said).collect();
            of_rule = of_others.into_iter().map(|(_, said)| said).collect();
            candidate
        };
        let averaged: Vec<u64> = self.seen.iter().map(|seen| seen.updates).collect();
        let behind: Vec<Option<Behind>> = self.seen.iter().map(|seen| seen.behind).collect();
        // Both are by name.
        let mut of_rule = of_rule.into_iter();
        let carried: Vec<CarriedFacts> = self
            .carried
            .into_iter()
            .zip(of_carried)
            .map(|(carried, finding)| CarriedFacts {
                node: carried.node,
                behind: carried.behind,
                by_rule: if finding.is_none() { of_rule.next() } else { None },
                finding,
            })
            .collect();
        let carried_rows = PayloadRows::new(carried_rows, terms.values)?;
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
                behind: &behind,
                of_mean: &of_mean,
                carried: (!carried.is_empty()).then_some((&carried_rows, carried.as_slice())),
                noise: terms.noise_multiplier.value() * terms.clip_norm.value(),
                withstood: byzantine,
            },
        );
        Ok(RoundResult { candidate, account })
    }
}

/// A row that the rule reads.
struct Counted<'a> {
    node: &'a NodeId,
    /// Whether the site sent an update for this round.
    own: bool,
    row: &'a PlacedRow,
    noise_ratio: f64,
    releases: u64,
}
