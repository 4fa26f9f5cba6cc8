//! Answering an aggregator that asks what a candidate model does on this host's rows.
//!
//! Only an edge whose configuration says `federation.validator = true` does: its answers depend on its rows, the aggregator chooses the
//! candidates, and no ledger is charged. Any other edge is never asked, because its Hello does not say that it could be, and is silent if asked.

use std::sync::Arc;

use bytes::Bytes;
use theriac_model::appraisal::{Appraised, Ratios, appraise};
use theriac_model::global::{GlobalError, GlobalModel};
use theriac_protocol::message::{Appraisal, AppraisalV1, CandidateV1, ToAggregator};
use theriac_protocol::units::Digest;
use tokio::task::JoinHandle;

use super::{Driver, GATE_ROWS};
use crate::detect::LaneShared;
use crate::global_store;
use crate::metrics::kind;

/// A candidate that waits for the model in force, or for its appraisal. One at a time: a later one takes its place.
#[derive(Debug)]
pub(super) struct Asked {
    candidate: CandidateV1,
    model: Arc<GlobalModel>,
}

/// An appraisal under way. It is never interrupted, so one thread is all that an aggregator gets.
pub(super) type Appraising = Option<(CandidateV1, JoinHandle<Appraised>)>;

/// The answer to `candidate`.
pub(super) fn answer(candidate: &CandidateV1, found: Appraised) -> AppraisalV1 {
    let appraisal = match found {
        Appraised::CannotTell => Appraisal::CannotTell,
        Appraised::NotWorse(_) => Appraisal::NotWorse,
        Appraised::Worse(_) => Appraisal::Worse,
    };
    AppraisalV1 {
        round: candidate.round,
        payload_digest: candidate.payload_digest,
        appraisal,
        ratio_permille: found.ratio_permille(),
    }
}

/// What several services say together: worse where one of them says so, and nothing only where none could tell.
pub(super) fn together(found: impl IntoIterator<Item = Appraised>) -> Appraised {
    let worst = |appraised: &Appraised| match appraised {
        Appraised::CannotTell => (0, 0.0),
        Appraised::NotWorse(ratios) => (1, ratios.worst()),
        Appraised::Worse(ratios) => (2, ratios.worst()),
    };
    let order = |one: &Appraised, other: &Appraised| {
        let (one, other) = (worst(one), worst(other));
        one.0.cmp(&other.0).then(one.1.total_cmp(&other.1))
    };
    found.into_iter().max_by(order).unwrap_or(Appraised::CannotTell)
}

impl Driver {
    /// Takes a candidate; its bytes have been held to their digest. Answers at once where nothing has to be looked at.
    pub(super) fn asked(&mut self, candidate: CandidateV1, payload: &Bytes) {
        if !self.client.settings.validator {
            tracing::warn!(
                round = candidate.round.0,
                "the aggregator asks about a candidate; this edge answers nothing, because federation.validator is false"
            );
            return;
        }
        match global_store::model_of(self.client.lane.schema.channels(), payload) {
            Ok(model) => {
                let model = Arc::new(model);
                self.asked = Some(Asked { candidate, model });
                self.appraise_asked();
            }
            Err(error) => {
                tracing::warn!(round = candidate.round.0, %error, "a candidate cannot be read");
                let found = match error {
                    GlobalError::NonFinite { .. } => Appraised::Worse(Ratios::INFINITE),
                    _ => Appraised::CannotTell,
                };
                self.say_appraisal(&candidate, found);
            }
        }
    }

    /// Begins the appraisal of the candidate that waits, once the model in force is held and no other appraisal is under way.
    pub(super) fn appraise_asked(&mut self) {
        if self.appraising.is_some() {
            return;
        }
        let Some((held, digest, current)) = &self.held else {
            return;
        };
        let in_force = |asked: &mut Asked| {
            held.version == asked.candidate.base_version && *digest == asked.candidate.base_digest
        };
        let Some(Asked { candidate, model }) = self.asked.take_if(in_force) else {
            return;
        };
        let (lanes, current) = (self.client.lanes.clone(), Arc::clone(current));
        let work = move || together(lanes.iter().map(|lane| of_lane(lane, &current, &model)));
        self.appraising = Some((candidate, tokio::task::spawn_blocking(work)));
    }

    /// Says what was found, in the session at hand or, between two, in the next one; an aggregator that no longer wants it knows it by its digest.
    pub(super) fn say_appraisal(&mut self, candidate: &CandidateV1, found: Appraised) {
        let answer = answer(candidate, found);
        let word = match answer.appraisal {
            Appraisal::NotWorse => "not_worse",
            Appraisal::Worse => "worse",
            Appraisal::CannotTell => "cannot_tell",
        };
        tracing::info!(
            round = answer.round.0,
            appraisal = word,
            ratio = f64::from(answer.ratio_permille) / 1_000.0,
            ?found,
            "a candidate was appraised on this host's rows, and the aggregator is told"
        );
        self.client.metrics.appraisals.get_or_create(&kind(word)).inc();
        self.to_say = Some(ToAggregator::Appraisal(answer));
    }

    /// The session has ended: what still waits will be asked again.
    pub(super) fn forget_asked(&mut self) {
        self.asked = None;
    }
}

fn of_lane(lane: &LaneShared, current: &GlobalModel, candidate: &GlobalModel) -> Appraised {
    let history = lane.history().quiet(GATE_ROWS);
    appraise(&lane.schema, &history, lane.fit.step, current, candidate)
}

/// Whether the bytes are what the header says.
pub(super) fn is_whole(candidate: &CandidateV1, payload: &Bytes) -> bool {
    Digest::of(payload) == candidate.payload_digest
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{ModelVersion, Round};

    use super::*;

    fn ratios(as_it_came: f64) -> Ratios {
        Ratios {
            as_it_came,
            against_constant: 1.0,
            in_use: 1.0,
        }
    }

    #[test]
    fn one_service_that_does_worse_speaks_for_the_host() {
        let (fine, worse) = (Appraised::NotWorse(ratios(0.9)), Appraised::Worse(ratios(1.4)));
        assert_eq!(together([fine, Appraised::CannotTell, worse]), worse);
        assert_eq!(together([Appraised::CannotTell, fine]), fine);
        assert_eq!(together([]), Appraised::CannotTell);
    }

    #[test]
    fn the_ratio_travels_in_thousandths_and_saturates() {
        let candidate = CandidateV1 {
            round: Round(3),
            base_version: ModelVersion(2),
            base_digest: Digest([1; 32]),
            layout_digest: Digest([2; 32]),
            values: 0,
            payload_digest: Digest([3; 32]),
            deadline_ms: 1,
        };
        let of = |found| answer(&candidate, found).ratio_permille;
        assert_eq!(of(Appraised::NotWorse(ratios(0.5))), 1_000, "in use it is 1");
        assert_eq!(of(Appraised::Worse(ratios(1.4))), 1_400);
        assert_eq!(of(Appraised::Worse(ratios(f64::INFINITY))), u32::MAX);
        assert_eq!(of(Appraised::CannotTell), 0);
    }
}
