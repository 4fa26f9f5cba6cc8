//! What runs beside the driver and comes back to it: writes, reads and the aggregation.

use std::time::Duration;

use theriac_protocol::message::{ToEdge, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode};
use theriac_protocol::round::Input;
use theriac_protocol::units::{NodeId, Round};

use super::Driver;
use crate::evidence::reputation::Changes;
use crate::publish::{Candidate, PublishError};
use crate::robust::Row;
use crate::store::evidence::Conclusion;
use crate::store::models::ModelRow;
use crate::store::records::Registry;
use crate::store::rounds::{self, StoredUpload};
use crate::store::{Store, StoreError, Urgency, Work};
use crate::validation::Validation;

/// First wait before a write that must succeed is tried again.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(250);
/// Longest such wait.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);

/// A finished piece of work.
#[derive(Debug)]
pub(super) enum Done {
    /// A round is open in the store.
    Opened(Round),
    /// An update is durable, or not.
    Stored {
        node: NodeId,
        header: Box<UpdateV1>,
        row: Row,
        result: Result<StoredUpload, StoreError>,
    },
    /// A late update is durable, or not.
    StoredLate {
        node: NodeId,
        header: Box<UpdateV1>,
        result: Result<StoredUpload, StoreError>,
    },
    /// An update's refusal is on record, or could not be recorded.
    Refused {
        node: NodeId,
        round: Round,
        code: RefusalCode,
        result: Result<(), StoreError>,
    },
    /// A round was combined, or could not be.
    Computed {
        round: Round,
        result: Result<Box<Computed>, NoModel>,
    },
    /// A round's model is durable, and this is how the quarantine changed.
    Published(Round, Changes),
    /// A round's end without a model is durable.
    Aborted(Round),
    /// A receipt of an earlier round was looked up.
    Receipt {
        node: NodeId,
        round: Round,
        stored: Option<StoredUpload>,
    },
    /// Registry and model in force were read again.
    Refreshed(Result<Box<(Registry, ModelRow)>, StoreError>),
    /// Another model is in force and the open round, if any, has ended.
    RolledOver(Result<Box<(ModelRow, Option<Round>)>, String>),
    /// A write of which nobody waits for the result.
    Written(Result<(), StoreError>),
}

/// Why a round could not be combined.
#[derive(Debug)]
pub(super) struct NoModel {
    /// The word for the round's row.
    pub(super) word: &'static str,
    reason: String,
}

impl NoModel {
    pub(super) fn other(reason: impl std::fmt::Display) -> Self {
        Self {
            word: rounds::abort_word(AbortReason::AggregationFailed),
            reason: reason.to_string(),
        }
    }
}

impl From<StoreError> for NoModel {
    fn from(error: StoreError) -> Self {
        Self::other(format!("{error}; {}", error.hint()))
    }
}

impl From<PublishError> for NoModel {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Spill(_) => Self {
                word: "rows_unreadable",
                reason: error.to_string(),
            },
            _ => Self::other(error),
        }
    }
}

/// A computed model that waits for its publication.
#[derive(Debug)]
pub(super) struct Computed {
    pub(super) row: ModelRow,
    pub(super) candidate: Candidate,
    pub(super) conclusion: Conclusion,
    /// What validators made of it; `None`: nobody was asked.
    pub(super) validation: Option<Validation>,
}

impl Driver {
    pub(super) fn done(&mut self, done: Done) {
        let now = self.now();
        match done {
            Done::Opened(round) => self.machine.handle(now, Input::Opened { round }),
            Done::Stored {
                node,
                header,
                row,
                result,
            } => return self.stored(node, *header, Some(row), result),
            Done::StoredLate { node, header, result } => return self.stored(node, *header, None, result),
            Done::Refused {
                node,
                round,
                code,
                result,
            } => {
                if let Err(error) = result {
                    tracing::error!(%error, "a refusal could not be recorded");
                }
                let faulty = crate::evidence::tells(code.word());
                self.machine.handle(now, Input::Refused { node, round, faulty });
            }
            Done::Computed {
                round,
                result: Ok(computed),
            } => {
                self.heed_budget();
                self.combined(round, *computed);
            }
            Done::Computed {
                round,
                result: Err(NoModel { word, reason }),
            } => {
                tracing::warn!(round = round.0, reason, word, "the round gives no model");
                self.failed = Some((round, word));
                self.heed_budget();
                self.machine.handle(now, Input::AggregationFailed { round });
            }
            Done::Published(round, changes) => {
                self.published(changes);
                self.keep_head();
                self.machine.handle(now, Input::Published { round });
            }
            Done::Aborted(round) => {
                self.with_status(|status| status.aborted += 1);
                self.keep_head();
                self.machine.handle(now, Input::Aborted { round });
            }
            Done::Receipt { node, round, stored } => {
                if let Some(stored) = stored {
                    let receipt = self.key.receipt(round, &node, &stored);
                    self.send(&node, &ToEdge::Receipt(receipt));
                    self.send_seal(&node);
                }
                return;
            }
            Done::Refreshed(Ok(read)) => {
                let (registry, model) = *read;
                return self.refreshed(registry, model);
            }
            Done::Refreshed(Err(error)) => {
                tracing::error!(%error, "cannot read the registry; the last one stays in force");
                return;
            }
            Done::RolledOver(Ok(rolled)) => {
                let (model, aborted) = *rolled;
                return self.rolled_over(model, aborted);
            }
            Done::RolledOver(Err(reason)) => {
                tracing::error!(
                    reason,
                    "cannot load the model that is to be in force; the last one stays"
                );
                self.rolling = false;
            }
            Done::Written(result) => {
                if let Err(error) = result {
                    tracing::error!(%error, "a record could not be written");
                }
                return;
            }
        }
        self.pump(None);
    }

    /// `row`: what the round at hand will read; none for a late update.
    fn stored(
        &mut self,
        node: NodeId,
        header: UpdateV1,
        row: Option<Row>,
        result: Result<StoredUpload, StoreError>,
    ) {
        let now = self.now();
        let round = header.round;
        if row.is_some() {
            self.storing = self.storing.saturating_sub(1);
        }
        match result {
            Ok(stored) => {
                let claim = &header.privacy;
                let ledger = crate::store::records::LedgerHead {
                    head: claim.ledger_head,
                    records: claim.ledger_records,
                };
                self.ledgers.insert(node.clone(), ledger);
                self.count_upload("accepted", if row.is_some() { "" } else { "late" });
                self.receipts.insert((round, node.clone()), stored);
                let at_hand = self.machine.status().round == round;
                if let Some(row) = row.filter(|_| at_hand)
                    && self.cache_bytes + row.payload.len() <= self.cache_bytes_max
                {
                    self.cache_bytes += row.payload.len();
                    self.cache.insert(node.clone(), row);
                }
                self.machine.handle(now, Input::Stored { node, round });
            }
            Err(error) => {
                tracing::warn!(%node, round = round.0, %error, "an update could not be stored");
                self.machine.handle(now, Input::StoreFailed { node, round });
            }
        }
        self.pump(None);
    }

    fn published(&mut self, changes: Changes) {
        let m = &self.metrics;
        m.quarantine_entered.inc_by(changes.entered as u64);
        m.quarantine_left.inc_by(changes.left as u64);
        m.quarantine_held.inc_by(changes.held as u64);
        if changes.held > 0 {
            tracing::warn!(
                held = changes.held,
                "sites have earned quarantine and still count: as many as are assumed hostile (rounds.byzantine) are in it already"
            );
        }
        if changes.entered + changes.left > 0 {
            tracing::warn!(
                entered = changes.entered,
                left = changes.left,
                "the quarantine has changed; `theriac-aggregator sites list` says who, `sites show NAME` why"
            );
        }
        if let Some(Computed { row, candidate, .. }) = self.candidate.take() {
            self.metrics.model_version.set(row.version.0);
            self.with_status(|status| {
                status.published += 1;
                status.model_version = row.version.0;
            });
            self.models.set_current(&row, candidate.payload);
        }
    }
}

/// Writes what must be written before the round can go on, again and again: a full disk or a locked file stops the round, not
/// the process, and it goes on by itself. `None`: the store says that it no longer applies, because an operator came first.
pub(super) async fn until_it_works<T: Send + 'static>(
    store: &Store,
    what: &'static str,
    work: impl Fn(&Work<'_>) -> Result<T, StoreError> + Clone + Send + 'static,
) -> Option<T> {
    with_urgency(store, what, Urgency::Now, work).await
}

/// As [`until_it_works`], with an urgency.
pub(super) async fn with_urgency<T: Send + 'static>(
    store: &Store,
    what: &'static str,
    urgency: Urgency,
    work: impl Fn(&Work<'_>) -> Result<T, StoreError> + Clone + Send + 'static,
) -> Option<T> {
    let mut wait = RETRY_FIRST;
    loop {
        match store.write(urgency, work.clone()).await {
            Ok(value) => return Some(value),
            Err(error @ (StoreError::Closed | StoreError::Conflict(_))) => {
                tracing::warn!(%error, "cannot {what}");
                return None;
            }
            Err(error) => {
                tracing::error!(%error, hint = error.hint(), "cannot {what}; trying again in {wait:?}");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_cannot_be_read_back_have_a_word_of_their_own_on_record() {
        let cut = crate::robust::SpillError::NonFinite { row: 3, column: 1 };
        let unreadable = NoModel::from(PublishError::from(std::sync::Arc::new(cut)));
        assert_eq!(unreadable.word, "rows_unreadable");
        let rule = NoModel::from(PublishError::from(crate::robust::RuleError::NoRows));
        assert_eq!(rule.word, "aggregation_failed");
    }
}
