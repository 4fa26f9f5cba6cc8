//! From a round's stored updates to a computed model, beside the driver: rows in their places, then the charge of the centre's noise, then the rule.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::histogram::Histogram;
use theriac_privacy::central::CentralCharge;
use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Digest, NodeId, Round};

use super::Driver;
use super::work::{Computed, Done, NoModel, RETRY_FIRST, RETRY_MAX};
use crate::combine::{RoundInputs, RoundResult, RowSource, Which};
use crate::layout::ModelSpec;
use crate::robust::Row;
use crate::spill::RoundMemory;
use crate::store::evidence::{self, Conclusion, RoundPlan};
use crate::store::models::ModelRow;
use crate::store::{Store, StoreError, rounds, wall_clock};

impl Driver {
    /// Starts the aggregation of the stored updates, on the threads for CPU work.
    pub(super) fn compute(&mut self, round: Round, base: BaseModel, members: Vec<(NodeId, Digest)>) {
        let cache = std::mem::take(&mut self.cache);
        self.cache_bytes = 0;
        let loading = Loading {
            store: self.store.clone(),
            memory: self.round_memory.clone(),
            round,
            plan: self.plan.clone(),
        };
        let combining = Combining {
            spec: Arc::clone(&self.spec),
            plan: self.plan.clone(),
            round,
            base,
            members,
            seconds: self.metrics.aggregation_seconds.clone(),
        };
        let (store, central, terms) = (
            self.store.clone(),
            self.central.clone(),
            self.config.terms.clone(),
        );
        let status = Arc::clone(&self.status);
        self.work.spawn(async move {
            let result = async {
                let (inputs, loaded) = loading.until_there_is_room(cache).await?;
                // Before a single update is read for the sum, and not before all have a place to be read from: a round that has none costs nobody any budget.
                let charge = match &central {
                    Some(central) => {
                        let charge = central.charge(&store, round, &terms).await;
                        Some(charge.map_err(NoModel::other)?)
                    }
                    None => None,
                };
                tokio::task::spawn_blocking(move || combining.run(inputs, loaded, charge))
                    .await
                    .unwrap_or_else(|error| Err(NoModel::other(error)))
            };
            let result = result.await;
            if let Some(central) = central {
                let spent = tokio::task::spawn_blocking(move || central.status()).await.ok();
                status.lock().unwrap_or_else(PoisonError::into_inner).central = spent;
            }
            Done::Computed { round, result }
        });
    }
}

/// Reads what is stored of a round.
#[derive(Debug, Clone)]
struct Loading {
    store: Store,
    memory: RoundMemory,
    round: Round,
    plan: RoundPlan,
}

impl Loading {
    /// The round's rows in their places, and how long that took. Where the disk has no room for their file it is tried again, as any other write: the updates are
    /// durable, and a round that is given up has cost each of its sites a release that cannot be had back. It ends as well when the round does, by an operator's word.
    async fn until_there_is_room(
        self,
        mut cache: BTreeMap<NodeId, Row>,
    ) -> Result<(RoundInputs, Duration), NoModel> {
        let mut wait = RETRY_FIRST;
        let mut waiting = None;
        loop {
            let begun = Instant::now();
            let again = waiting.is_some();
            let (this, mut at_hand) = (self.clone(), std::mem::take(&mut cache));
            // What is at hand is used up by the first try, the store has all of it.
            let loaded = tokio::task::spawn_blocking(move || this.load(&mut at_hand, again)).await;
            match loaded.map_err(NoModel::other)? {
                Ok(inputs) => {
                    if again {
                        tracing::info!(round = self.round.0, "the rows of the round have their places");
                    }
                    return Ok((inputs, begun.elapsed()));
                }
                Err(error @ StoreError::Full(_)) => {
                    if !again {
                        waiting = Some(self.store.waits_for_room());
                        tracing::error!(
                            round = self.round.0,
                            %error,
                            hint = error.hint(),
                            "the rows of the round have no place; tried again until they have"
                        );
                    }
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Blocks.
    fn load(&self, cache: &mut BTreeMap<NodeId, Row>, again: bool) -> Result<RoundInputs, StoreError> {
        self.store.load_blocking(|connection| {
            if again {
                let open = rounds::unfinished(connection)?.map(|unfinished| unfinished.open.round);
                if open != Some(self.round) {
                    let why = format!("round {} has ended while it waited for room", self.round);
                    return Err(StoreError::Conflict(why));
                }
            }
            let earned = evidence::reputations(connection)?;
            let source = RowSource {
                connection,
                blobs: self.store.blobs(),
                memory: &self.memory,
            };
            let plan = self.plan.clone();
            RoundInputs::load(source, self.round, plan, &earned, cache, Which::Waiting)
        })
    }
}

/// Makes the next model of a round's rows.
#[derive(Debug)]
struct Combining {
    spec: Arc<ModelSpec>,
    plan: RoundPlan,
    round: Round,
    base: BaseModel,
    members: Vec<(NodeId, Digest)>,
    seconds: Histogram,
}

impl Combining {
    /// CPU work; `loaded`: how long it took to read the rows.
    fn run(
        self,
        inputs: RoundInputs,
        loaded: Duration,
        charge: Option<CentralCharge>,
    ) -> Result<Box<Computed>, NoModel> {
        let begun = Instant::now();
        debug_assert!(
            inputs
                .stored
                .iter()
                .zip(&inputs.rows)
                .filter(|(stored, _)| stored.stale.is_none())
                .map(|(stored, row)| (stored.node.clone(), Digest::of(&row.row().payload)))
                .eq(self.members),
            "the machine and the store agree, and a stored payload has its digest"
        );
        let RoundResult { candidate, account } = inputs.run(&self.spec, charge)?;
        let contributors = candidate.evidence.len() + account.carried_that_count();
        let row = ModelRow {
            version: self.base.version.next(),
            round: self.round,
            layout_digest: candidate.layout_digest,
            values: candidate.values,
            digest: candidate.digest,
            rule: self.plan.rule.to_string(),
            contributors: u32::try_from(contributors).unwrap_or(u32::MAX),
            rolled_back_to: None,
            released: wall_clock(),
        };
        self.seconds.observe((loaded + begun.elapsed()).as_secs_f64());
        let memory = candidate.memory.clone().map(|memory| (row.version, memory));
        let conclusion = Conclusion {
            plan: self.plan,
            account,
            memory,
        };
        Ok(Box::new(Computed {
            row,
            candidate,
            conclusion,
            validation: None,
        }))
    }
}
