//! One round from what is stored to a model and the evidence about everybody: what the driver runs and `rounds replay` runs again.

use std::collections::BTreeMap;

use bytes::Bytes;
use rusqlite::Connection;
use theriac_privacy::central::CentralCharge;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{Digest, NodeId, Round};

use crate::accumulate::{Behind, Depth, mean_of};
use crate::average::Mean;
use crate::copies::{Copies, copies, rows_needed};
use crate::evidence::law::Finding;
use crate::evidence::reputation::{Reputation, left_out};
use crate::evidence::{
    CarriedAccount, Decision, RoundAccount, RoundFacts, StoredRow, account, segments, words,
};
use crate::layout::ModelSpec;
use crate::publish::{Candidate, PublishError, next_model_of, next_private_model};
use crate::robust::{Options, PayloadRows, Row, rule};
use crate::server_optimizer::OptimizerState;
use crate::store::blob::BlobStore;
use crate::store::evidence::RoundPlan;
use crate::store::sums::{self, Window};
use crate::store::{StoreError, evidence, history, late, models, rounds};
use crate::validate::norm_bound;
use crate::validation::Tried;
use crate::vet::look_at_mean;

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
    /// Sites without an update that count by their earlier releases, by name.
    pub carried: Vec<CarriedRow>,
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
    pub row: Row,
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
        which: Which<'_>,
    ) -> Result<Self, StoreError> {
        let announce = history::announced(connection, round)?;
        let mut stored = evidence::stored_rows(connection, round)?;
        stored.extend(match which {
            Which::Waiting | Which::Tried(_) if !plan.late_updates => Vec::new(),
            Which::Waiting | Which::Tried(_) => {
                let mut late = late::waiting(connection, &announce)?;
                // With them there may be more than the rule can combine: the first by name get the places.
                late.truncate(plan.rule.rows_max().saturating_sub(stored.len()));
                late
            }
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
        let (seen, carried) = if plan.accumulate.is_on(announce.kind) && !plan.central_noise {
            let window = Window::of(connection, &announce, plan.accumulate)?;
            (
                summed(connection, blobs, &announce, &window, &stored, &rows)?,
                carried(connection, blobs, &announce, &window, &plan, &stored, which)?,
            )
        } else {
            (
                seen(connection, blobs, &announce, &plan, &stored, &rows)?,
                Vec::new(),
            )
        };
        Ok(Self {
            seen,
            carried,
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

    /// What is decided about each row before the rule sees any: who is in quarantine, then what the screen for copies takes out of the others, then whose releases
    /// together are no moments of a series.
    ///
    /// # Errors
    /// [`PublishError::Rule`] for payloads of another length.
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
    fn mean_at(&self, at: usize) -> Option<(&Row, &Seen)> {
        let seen = self.seen.get(at)?;
        Some((seen.row.as_ref()?, seen))
    }

    /// Why the releases of a site are no moments of a series, where several are added: with less noise the vet sees what one of them hides.
    fn vet_of_mean(&self, row: &Row, noise_ratio: f64, behind: Behind) -> Option<Finding> {
        if behind.releases < 2 {
            return None;
        }
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
        let kept: Vec<Row> = counted.iter().map(|row| row.row.clone()).collect();
        let depth = Depth::of(counted.iter().map(|row| (row.noise_ratio, row.releases)));
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
            let server = (optimizer, memory);
            let mut candidate = next_model_of(spec, &terms, &self.base, kept, &*rule, server, depth)?;
            // Evidence is about updates of this round; what a carried site sent has its own where it came.
            let mut own = own.into_iter();
            candidate.evidence.retain(|_| own.next().unwrap_or(true));
            candidate
        };
        let averaged: Vec<u64> = self.seen.iter().map(|seen| seen.updates).collect();
        let behind: Vec<Option<Behind>> = self.seen.iter().map(|seen| seen.behind).collect();
        let carried = self.carried.into_iter().zip(of_carried);
        let carried = carried.map(|(carried, finding)| CarriedAccount {
            node: carried.node,
            behind: carried.behind,
            finding,
        });
        let carried = carried.collect();
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
                noise: terms.noise_multiplier.value() * terms.clip_norm.value(),
                withstood: byzantine,
            },
        );
        let account = RoundAccount { carried, ..account };
        Ok(RoundResult { candidate, account })
    }
}

/// A row that the rule reads.
struct Counted<'a> {
    node: &'a NodeId,
    /// Whether the site sent an update for this round.
    own: bool,
    row: &'a Row,
    noise_ratio: f64,
    releases: u64,
}

/// What the rule sees of each row where earlier releases are added. Reads them one at a time.
fn summed(
    connection: &Connection,
    blobs: &BlobStore,
    announce: &AnnounceV1,
    window: &Window,
    stored: &[StoredRow],
    rows: &[Row],
) -> Result<Vec<Seen>, StoreError> {
    let one = |(site, row): (&StoredRow, &Row)| {
        let fresh = match site.stale {
            None => Behind::one(announce.blocks_min, announce.blocks_max),
            Some(stale) => {
                let made_for = history::announced(connection, Round(stale.of_round))?;
                Behind::one(made_for.blocks_min, made_for.blocks_max)
            }
        };
        let (mean, noise_ratio, behind) = with_earlier(
            connection,
            blobs,
            announce,
            window,
            &site.node,
            Some((row, site.header.payload_digest, fresh)),
        )?;
        Ok(Seen {
            row: (behind.releases > 1).then_some(mean),
            noise_ratio,
            updates: 1,
            behind: Some(behind),
        })
    };
    stored.iter().zip(rows).map(one).collect()
}

/// The rows of sites that count by their earlier releases alone: of a round that is combined those that may, as many as the rule has places for beside the stored
/// rows; of one that is done again those that did.
fn carried(
    connection: &Connection,
    blobs: &BlobStore,
    announce: &AnnounceV1,
    window: &Window,
    plan: &RoundPlan,
    stored: &[StoredRow],
    which: Which<'_>,
) -> Result<Vec<CarriedRow>, StoreError> {
    let nodes = match which {
        Which::Waiting => sums::carried(connection, window)?,
        Which::Carried => evidence::carried(connection, announce.round)?,
        Which::Tried(tried) => {
            let carried = tried.iter().filter(|tried| tried.carried);
            carried.map(|tried| tried.site.clone()).collect()
        }
    };
    // A late update of the site may stand for it. Stored rows are by name.
    let has_own = |node: &NodeId| stored.binary_search_by(|row| row.node.cmp(node)).is_ok();
    let nodes: Vec<NodeId> = nodes.into_iter().filter(|node| !has_own(node)).collect();
    let nodes = if which == Which::Waiting {
        let places = plan.rule.rows_max().saturating_sub(stored.len());
        drawn(nodes, places, announce.nonce)
    } else {
        nodes
    };
    nodes
        .into_iter()
        .map(|node| {
            let (row, noise_ratio, behind) = with_earlier(connection, blobs, announce, window, &node, None)?;
            Ok(CarriedRow {
                node,
                row,
                noise_ratio,
                behind,
            })
        })
        .collect()
}

/// As many of `nodes`, which are by name, as there are places: those with the least SHA-256(nonce ‖ name), as a round draws whom it asks, so that in time all have
/// their turn and nobody's name is worth anything.
fn drawn(nodes: Vec<NodeId>, places: usize, nonce: u64) -> Vec<NodeId> {
    if nodes.len() <= places {
        return nodes;
    }
    let hashed = |node: NodeId| {
        let text = [&nonce.to_le_bytes()[..], node.as_str().as_bytes()].concat();
        (Digest::of(&text), node)
    };
    let mut hashed: Vec<(Digest, NodeId)> = nodes.into_iter().map(hashed).collect();
    hashed.sort_unstable_by_key(|(digest, _)| digest.0);
    hashed.truncate(places);
    let mut nodes: Vec<NodeId> = hashed.into_iter().map(|(_, node)| node).collect();
    nodes.sort_unstable();
    nodes
}

/// The mean of a site's releases, the one at hand first, its noise ratio, and what is in it. The same bytes as those at hand are not among the earlier ones.
fn with_earlier(
    connection: &Connection,
    blobs: &BlobStore,
    announce: &AnnounceV1,
    window: &Window,
    node: &NodeId,
    fresh: Option<(&Row, Digest, Behind)>,
) -> Result<(Row, f64, Behind), StoreError> {
    let dimension = usize::try_from(announce.values).unwrap_or(usize::MAX);
    let most = window.keep() - u32::from(fresh.is_some());
    let (mut rows, mut behind) = (Vec::new(), Behind::default());
    let digest = fresh.map(|(_, digest, _)| digest);
    if let Some((row, _, one)) = fresh {
        rows.push(row.clone());
        behind = one;
    }
    for kept in sums::earlier(connection, window, node, digest, most)? {
        rows.push(sums::row(connection, blobs, node, kept)?);
        behind = behind.plus(kept.behind);
    }
    let (mean, ratio) = mean_of(dimension, &rows);
    Ok((mean, ratio, behind))
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
            behind: None,
            row: Some(mean.into_row()),
        })
    };
    stored.iter().zip(rows).map(one).collect()
}
