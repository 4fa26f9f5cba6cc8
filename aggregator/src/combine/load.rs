//! What is stored of a round, read row by row: each is in memory by itself until it has its place, so that a round may be larger than memory.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;
use theriac_protocol::message::AnnounceV1;
use theriac_protocol::units::{Digest, NodeId, Round};

use super::{CarriedRow, RoundInputs, Seen, Which};
use crate::accumulate::Behind;
use crate::average::Mean;
use crate::evidence::StoredRow;
use crate::evidence::reputation::Reputation;
use crate::robust::{PlacedRow, Row};
use crate::spill::{Keeper, RoundMemory};
use crate::store::blob::BlobStore;
use crate::store::evidence::RoundPlan;
use crate::store::sums::{self, Release, Window};
use crate::store::{StoreError, evidence, history, late, models, rounds};

/// Where the rows of a round come from, and where they are while it is combined.
#[derive(Debug, Clone, Copy)]
pub struct RowSource<'a> {
    /// The store.
    pub connection: &'a Connection,
    /// Its large payloads.
    pub blobs: &'a BlobStore,
    /// How much of them may be in memory.
    pub memory: &'a RoundMemory,
}

/// Rows in their places.
#[derive(Debug, Default)]
struct Placed {
    rows: Vec<PlacedRow>,
    seen: Vec<Seen>,
    carried: Vec<CarriedRow>,
}

impl RoundInputs {
    /// Reads what is stored of a round, with rows at hand taken from `cache`. Blocks for blobs, and for the file of rows that have no room in memory.
    ///
    /// # Errors
    /// [`StoreError`]: [`StoreError::Gone`] when a payload was deleted after its time, [`StoreError::Full`] when the disk has no room for the file,
    /// [`StoreError::Io`] when it does not take what was written.
    pub fn load(
        source: RowSource<'_>,
        round: Round,
        plan: RoundPlan,
        earned: &BTreeMap<NodeId, Reputation>,
        cache: &mut BTreeMap<NodeId, Row>,
        which: Which<'_>,
    ) -> Result<Self, StoreError> {
        let RowSource {
            connection, blobs, ..
        } = source;
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
        let mut keeper = source.memory.keeper(round);
        let mut loader = Loader {
            source,
            announce: &announce,
            stored: &stored,
            cache,
            keeper: &mut keeper,
        };
        let placed = if plan.accumulate.is_on(announce.kind) && !plan.central_noise {
            loader.summed(&plan, which)?
        } else {
            loader.seen(&plan)?
        };
        Ok(Self {
            rows: placed.rows,
            seen: placed.seen,
            carried: placed.carried,
            earned: stored
                .iter()
                .map(|row| earned.get(&row.node).copied().unwrap_or_default())
                .collect(),
            base: models::model_payload(connection, blobs, announce.base_version)?,
            memory: evidence::memory(connection, blobs, announce.base_version)?,
            file: keeper.into_file()?,
            announce,
            plan,
            stored,
        })
    }
}

struct Loader<'a, 'm> {
    source: RowSource<'a>,
    announce: &'a AnnounceV1,
    /// By name.
    stored: &'a [StoredRow],
    cache: &'a mut BTreeMap<NodeId, Row>,
    keeper: &'a mut Keeper<'m>,
}

impl Loader<'_, '_> {
    /// A stored update as it came.
    fn fresh(&mut self, at: usize) -> Result<Row, StoreError> {
        let RowSource {
            connection, blobs, ..
        } = self.source;
        let StoredRow { node, stale, .. } = &self.stored[at];
        match (stale, self.cache.remove(node)) {
            (Some(stale), _) => late::row(connection, blobs, Round(stale.of_round), node),
            (None, Some(row)) => Ok(row),
            (None, None) => rounds::upload_row(connection, blobs, self.announce.round, node),
        }
    }

    fn dimension(&self) -> usize {
        usize::try_from(self.announce.values).unwrap_or(usize::MAX)
    }

    /// Updates as they came, and what the rule sees of each.
    fn seen(&mut self, plan: &RoundPlan) -> Result<Placed, StoreError> {
        let RowSource {
            connection, blobs, ..
        } = self.source;
        let average = plan.site_average;
        let before = if average.rounds() > 1 {
            late::lineage(connection, self.announce, average)?
        } else {
            Vec::new()
        };
        let mut placed = Placed::default();
        for (at, site) in self.stored.iter().enumerate() {
            let row = self.fresh(at)?;
            let stale = site.stale.map_or(1.0, |stale| stale.weight);
            let seen = if before.is_empty() && stale >= 1.0 {
                Seen::AS_IT_CAME
            } else {
                let mut mean = Mean::new(self.dimension());
                mean.add(&row, 1.0, stale);
                for (round, age) in &before {
                    if let Some((row, stale)) = late::counted(connection, blobs, *round, &site.node)? {
                        mean.add(&row, average.weight(*age), stale);
                    }
                }
                if mean.updates() == 1 && stale >= 1.0 {
                    Seen::AS_IT_CAME
                } else {
                    Seen {
                        noise_ratio: mean.noise_ratio(),
                        updates: mean.updates(),
                        behind: None,
                        row: Some(self.keeper.keep(mean.into_row())?),
                    }
                }
            };
            placed.rows.push(self.keeper.keep(row)?);
            placed.seen.push(seen);
        }
        Ok(placed)
    }

    /// Updates as they came, what the rule sees of each where earlier releases are added, and the rows of sites that count by those alone. One pass over all
    /// kept releases, with one site's sum in memory.
    fn summed(&mut self, plan: &RoundPlan, which: Which<'_>) -> Result<Placed, StoreError> {
        let RowSource {
            connection, blobs, ..
        } = self.source;
        let window = Window::of(connection, self.announce, plan.accumulate)?;
        let carried = self.carried(&window, plan, which)?;
        let mut summing = Summing {
            own: self.stored.iter().map(|_| None).collect(),
            of_carried: carried.iter().map(|_| None).collect(),
            names: &carried,
            keep: window.keep(),
            at_hand: None,
            loader: self,
        };
        sums::each(connection, blobs, &window, |release| summing.take(release))?;
        summing.finish()
    }

    /// Sites that count by their earlier releases alone, by name: of a round that is combined those that may, as many as the rule has places for beside the stored
    /// rows; of one that is done again those that did.
    fn carried(
        &self,
        window: &Window,
        plan: &RoundPlan,
        which: Which<'_>,
    ) -> Result<Vec<NodeId>, StoreError> {
        let connection = self.source.connection;
        let nodes: BTreeSet<NodeId> = match which {
            Which::Waiting => sums::carried(connection, window)?,
            Which::Carried => evidence::carried(connection, self.announce.round)?,
            Which::Tried(tried) => {
                let carried = tried.iter().filter(|tried| tried.carried);
                carried.map(|tried| tried.site.clone()).collect()
            }
        };
        // A late update of the site may stand for it. Stored rows are by name.
        let has_own = |node: &NodeId| self.stored.binary_search_by(|row| row.node.cmp(node)).is_ok();
        let nodes: Vec<NodeId> = nodes.into_iter().filter(|node| !has_own(node)).collect();
        Ok(if which == Which::Waiting {
            let places = plan.rule.rows_max().saturating_sub(self.stored.len());
            drawn(nodes, places, self.announce.nonce)
        } else {
            nodes
        })
    }
}

/// Whose releases are added.
#[derive(Debug, Clone, Copy)]
enum Whose {
    /// Of a site with a stored row.
    Stored(usize),
    /// Of one that is carried.
    Carried(usize),
    /// Of one that does not count in the round.
    Nobody,
}

/// A site's releases, the one at hand first.
struct Sum {
    node: String,
    whose: Whose,
    mean: Mean,
    behind: Behind,
    /// Digest of the one at hand: the same bytes are not among the earlier ones.
    fresh: Option<Digest>,
    /// Earlier ones that may still come.
    left: u32,
}

/// Adds releases site by site.
struct Summing<'a, 'l, 'm> {
    loader: &'a mut Loader<'l, 'm>,
    /// Whom to carry, by name.
    names: &'a [NodeId],
    keep: u32,
    own: Vec<Option<(PlacedRow, Seen)>>,
    of_carried: Vec<Option<CarriedRow>>,
    at_hand: Option<Sum>,
}

impl Summing<'_, '_, '_> {
    fn take(&mut self, release: &Release<'_>) -> Result<(), StoreError> {
        let node = release.node()?;
        if self.at_hand.as_ref().is_none_or(|sum| sum.node != node) {
            // One site's sum at a time.
            let before = self.at_hand.take();
            self.end(before)?;
            self.at_hand = Some(self.begin(node)?);
        }
        let Some(sum) = &mut self.at_hand else {
            return Ok(());
        };
        let counts = !matches!(sum.whose, Whose::Nobody) && sum.fresh != Some(release.digest()?);
        if counts && sum.left > 0 {
            sum.left -= 1;
            sum.mean.add(&release.row()?, 1.0, 1.0);
            sum.behind = sum.behind.plus(release.behind()?);
        }
        Ok(())
    }

    /// With the site's release for the round, which takes its place.
    fn begin(&mut self, node: &str) -> Result<Sum, StoreError> {
        let stored = self.loader.stored;
        let place = stored.binary_search_by(|row| row.node.as_str().cmp(node));
        if let Ok(at) = place {
            return self.begin_stored(at);
        }
        let carried = self.names.binary_search_by(|name| name.as_str().cmp(node)).ok();
        Ok(Sum {
            node: node.to_owned(),
            mean: Mean::new(carried.map_or(0, |_| self.loader.dimension())),
            whose: carried.map_or(Whose::Nobody, Whose::Carried),
            behind: Behind::default(),
            fresh: None,
            left: self.keep,
        })
    }

    fn begin_stored(&mut self, at: usize) -> Result<Sum, StoreError> {
        let (stored, announce) = (self.loader.stored, self.loader.announce);
        let site = &stored[at];
        let behind = match site.stale {
            None => Behind::one(announce.blocks_min, announce.blocks_max),
            Some(stale) => {
                let of = Round(stale.of_round);
                let made_for = history::announced(self.loader.source.connection, of)?;
                Behind::one(made_for.blocks_min, made_for.blocks_max)
            }
        };
        let row = self.loader.fresh(at)?;
        let mut mean = Mean::new(self.loader.dimension());
        mean.add(&row, 1.0, 1.0);
        let placed = self.loader.keeper.keep(row)?;
        self.own[at] = Some((placed, Seen::AS_IT_CAME));
        Ok(Sum {
            node: site.node.to_string(),
            whose: Whose::Stored(at),
            mean,
            behind,
            fresh: Some(site.header.payload_digest),
            left: self.keep.saturating_sub(1),
        })
    }

    fn end(&mut self, sum: Option<Sum>) -> Result<(), StoreError> {
        let Some(Sum {
            whose, mean, behind, ..
        }) = sum
        else {
            return Ok(());
        };
        let noise_ratio = mean.noise_ratio();
        match whose {
            Whose::Nobody => {}
            Whose::Carried(at) => {
                self.of_carried[at] = Some(CarriedRow {
                    node: self.names[at].clone(),
                    row: self.loader.keeper.keep(mean.into_row())?,
                    noise_ratio,
                    behind,
                });
            }
            Whose::Stored(at) => {
                let row = if behind.releases > 1 {
                    Some(self.loader.keeper.keep(mean.into_row())?)
                } else {
                    None
                };
                if let Some((_, seen)) = &mut self.own[at] {
                    *seen = Seen {
                        row,
                        noise_ratio,
                        updates: 1,
                        behind: Some(behind),
                    };
                }
            }
        }
        Ok(())
    }

    /// Sites without earlier releases have their places as well.
    fn finish(mut self) -> Result<Placed, StoreError> {
        let last = self.at_hand.take();
        self.end(last)?;
        for at in 0..self.own.len() {
            if self.own[at].is_none() {
                let alone = self.begin_stored(at)?;
                self.end(Some(alone))?;
            }
        }
        for at in 0..self.of_carried.len() {
            if self.of_carried[at].is_none() {
                // Its releases were deleted: nothing is behind its row, and a replay says so.
                let names = self.names;
                let none = self.begin(names[at].as_str())?;
                self.end(Some(none))?;
            }
        }
        let (rows, seen) = self.own.into_iter().flatten().unzip();
        Ok(Placed {
            rows,
            seen,
            carried: self.of_carried.into_iter().flatten().collect(),
        })
    }
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
