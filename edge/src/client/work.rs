//! What the participant asks for: training, the outbox, the gate, and word of what happened.

use std::sync::{Arc, PoisonError};

use theriac_model::appraisal::Appraised;
use theriac_model::gate::{self, Evidence, GateOutcome, Judgement};
use theriac_model::global::{GlobalError, GlobalModel};
use theriac_protocol::message::{
    AnnounceV1, CandidateV1, DeclineReason, GateVerdict, ToAggregator, VerdictV1,
};
use theriac_protocol::participant::{Input, ParticipantEvent};
use theriac_protocol::refusal::RoundOutcome;
use theriac_protocol::units::{ModelVersion, Round};
use theriac_transport::Endpoint;
use tokio::task::{JoinError, JoinHandle};

use super::appraising::Appraising;
use super::{AtGate, Client, Driver, GATE_ROWS, Judging};
use crate::detect::{LaneShared, keep_detector};
use crate::global_store::{self, Held};
use crate::metrics::{kind, raise_to};
use crate::store::OutboxRow;
use crate::update::{Release, Releaser, Unreleased, message_of};

/// Why a round gets no update from us.
#[derive(Debug)]
pub(super) struct Untrained {
    reason: DeclineReason,
    /// One stable word, finer than the reason.
    word: &'static str,
    detail: String,
}

impl Untrained {
    fn new(reason: DeclineReason, detail: impl std::fmt::Display) -> Self {
        Self {
            reason,
            word: decline_word(reason),
            detail: detail.to_string(),
        }
    }
}

impl From<Unreleased> for Untrained {
    fn from(error: Unreleased) -> Self {
        Self {
            word: error.word(),
            ..Self::new(error.decline_reason(), error)
        }
    }
}

/// Work that has ended.
pub(super) enum Answer {
    Trained {
        round: Round,
        nonce: u64,
        result: Result<OutboxRow, Untrained>,
    },
    Judged {
        model: AtGate,
        outcome: Result<Vec<(usize, Judgement)>, JoinError>,
    },
    Appraised {
        candidate: CandidateV1,
        found: Appraised,
    },
}

pub(super) type Training = Option<(Round, u64, JoinHandle<Result<OutboxRow, Untrained>>)>;

/// Waits for the training, the judging or the appraisal at hand; for ever when there is none. Safe to cancel.
pub(super) async fn next_answer(
    training: &mut Training,
    judging: &mut Option<Judging>,
    appraising: &mut Appraising,
) -> Answer {
    let trained = async {
        match training.as_mut() {
            Some((_, _, handle)) => handle.await,
            None => std::future::pending().await,
        }
    };
    let judged = async {
        match judging.as_mut() {
            Some(judging) => (&mut judging.outcome).await,
            None => std::future::pending().await,
        }
    };
    let appraised = async {
        match appraising.as_mut() {
            Some((_, handle)) => handle.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        found = appraised => match appraising.take() {
            Some((candidate, _)) => {
                let found = found.unwrap_or_else(|join| {
                    tracing::error!(%join, "an appraisal failed");
                    Appraised::CannotTell
                });
                Answer::Appraised { candidate, found }
            }
            // The branch ran because there was one.
            None => std::future::pending().await,
        },
        result = trained => {
            let (round, nonce) = training.take().map_or((Round(0), 0), |(round, nonce, _)| (round, nonce));
            let failed = |join: JoinError| Err(Untrained::new(DeclineReason::StorageUnavailable, join));
            Answer::Trained { round, nonce, result: result.unwrap_or_else(failed) }
        }
        outcome = judged => {
            match judging.take() {
                Some(Judging { model, .. }) => Answer::Judged { model, outcome },
                // The branch ran because there was one.
                None => std::future::pending().await,
            }
        }
    }
}

impl Client {
    /// Does what may wait for the disk or for a release, off the runtime's own threads.
    pub(super) async fn with_releaser<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Releaser) -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let releaser = Arc::clone(&self.releaser);
        tokio::task::spawn_blocking(move || {
            work(&mut releaser.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
    }

    /// Charges, trains, and fills the outbox.
    async fn make_update(
        self,
        announce: AnnounceV1,
        base: Option<Arc<GlobalModel>>,
        stored: Option<OutboxRow>,
    ) -> Result<OutboxRow, Untrained> {
        if self.settings.receive_only {
            return Err(Untrained::new(
                DeclineReason::ReceiveOnly,
                "this edge only receives",
            ));
        }
        if !self.storage.is_ok() {
            return Err(Untrained::new(
                DeclineReason::StorageUnavailable,
                "the state directory cannot be written",
            ));
        }
        let base =
            base.ok_or_else(|| Untrained::new(DeclineReason::UnknownLayout, "the base model is not held"))?;
        let released = self
            .with_releaser(move |releaser| releaser.release(&announce, &base))
            .await;
        // Whatever came of it, a charge may have been made.
        self.note_ledger().await?;
        match released.map_err(unavailable)?? {
            Release::Stored => stored.ok_or_else(|| Unreleased::BytesLost.into()),
            Release::Fresh { row, id } => {
                if let Err(error) = self.store.put_outbox(&row).await {
                    self.storage.failed("keep an update", &error);
                    return Err(unavailable(error));
                }
                let digest = row.payload_digest;
                let marked = self
                    .with_releaser(move |releaser| releaser.mark_released(id, digest))
                    .await;
                marked.map_err(unavailable)?.map_err(unavailable)?;
                self.note_ledger().await?;
                Ok(row)
            }
        }
    }

    /// Says that nothing leaves for a round, and why: an event, a metric, and the page. Detection goes on.
    fn not_released(&self, round: Round, reason: DeclineReason, word: &'static str, detail: &str) {
        // What passes by itself is no news.
        if matches!(reason, DeclineReason::TooFewBlocks | DeclineReason::ReceiveOnly) {
            tracing::info!(
                round = round.0,
                refusal = word,
                detail,
                "no update for this round"
            );
        } else {
            tracing::warn!(
                round = round.0,
                refusal = word,
                detail,
                "no update for this round; detection goes on"
            );
            self.metrics.ledger_refusals.get_or_create(&kind(word)).inc();
        }
        self.board
            .update(|status| status.last_decline = Some(format!("{word}: {detail}")));
    }

    /// Keeps in `edge.db` how far the ledger has come. Nothing is sent unless that is durable.
    async fn note_ledger(&self) -> Result<(), Untrained> {
        let known = self.budget.published().known;
        self.store.note_ledger(known).await.map_err(|error| {
            self.storage.failed("note the privacy ledger's head", &error);
            unavailable(error)
        })
    }
}

fn unavailable(error: impl std::fmt::Display) -> Untrained {
    Untrained::new(DeclineReason::StorageUnavailable, error)
}

/// The message that tells a verdict, or `None` for one that stays here.
///
/// Whether a model is accepted depends on this host's rows, and the aggregator chooses the models: it could ask one
/// bit about the data with each of them, and no ledger would be charged. So it hears only what it could have computed
/// itself. This is the only place that makes a `Verdict` message.
pub(super) fn told(verdict: VerdictV1) -> Option<ToAggregator> {
    match verdict.verdict {
        GateVerdict::NonFinite | GateVerdict::LayoutMismatch | GateVerdict::Stale => {
            Some(ToAggregator::Verdict(verdict))
        }
        GateVerdict::Accepted | GateVerdict::WorseOnTail | GateVerdict::TooFewRows => None,
    }
}

impl Driver {
    /// Begins a training, or lets it wait for the one at hand, whose thread cannot be ended: the aggregator announces as
    /// often as it likes, and gets one thread. Only the latest announcement waits. It waits as well until the session's first seal was read.
    pub(super) fn train(&mut self, announce: AnnounceV1) {
        if self.training.is_some() || !self.sealed {
            self.announced = Some(announce);
            return;
        }
        let (round, nonce) = (announce.round, announce.nonce);
        let base = self
            .held
            .as_ref()
            .filter(|(held, digest, _)| {
                held.version == announce.base_version && *digest == announce.base_digest
            })
            .map(|(_, _, model)| Arc::clone(model));
        let stored = self
            .outbox
            .clone()
            .filter(|row| row.round == round && row.nonce == nonce);
        let work = self.client.clone().make_update(announce, base, stored);
        self.training = Some((round, nonce, tokio::spawn(work)));
    }

    /// The session's seal was read and our ledger holds it: what was announced before may begin.
    pub(super) fn may_train(&mut self) {
        self.sealed = true;
        if self.training.is_none()
            && let Some(announce) = self.announced.take()
        {
            self.train(announce);
        }
    }

    /// What ended work means for the participant.
    pub(super) fn answered(&mut self, answer: Answer) -> Option<Input> {
        match answer {
            Answer::Trained { round, nonce, result } => {
                self.client.show_budget();
                let input = Some(match result {
                    Ok(row) => {
                        let payload_digest = row.payload_digest;
                        self.outbox = Some(row);
                        self.client.board.update(|status| status.last_decline = None);
                        Input::Trained {
                            round,
                            nonce,
                            payload_digest,
                        }
                    }
                    Err(Untrained { reason, word, detail }) => {
                        self.client.not_released(round, reason, word, &detail);
                        Input::CannotTrain { round, nonce, reason }
                    }
                });
                if let Some(announce) = self.announced.take() {
                    self.train(announce);
                }
                input
            }
            Answer::Judged { model, outcome } => {
                self.apply(&model, outcome);
                // A newer model may have come meanwhile.
                self.judge_held();
                None
            }
            Answer::Appraised { candidate, found } => {
                self.say_appraisal(&candidate, found);
                self.appraise_asked();
                None
            }
        }
    }

    /// Holds the model that came, and has it judged on every lane's rows behind closed doors. The answer, which messages to the aggregator wait
    /// for, depends on no row and comes at once: by what is said, and by when, the aggregator learns nothing of the gates.
    pub(super) fn hold(&mut self, version: ModelVersion) -> Option<Input> {
        let (header, payload, model) = self
            .arrived
            .take()
            .filter(|(header, ..)| header.version == version)?;
        let model = match model {
            Ok(model) => model,
            Err(error) => {
                tracing::warn!(version = version.0, %error, "a published model cannot be used");
                let verdict = match error {
                    GlobalError::NonFinite { .. } => GateVerdict::NonFinite,
                    _ => GateVerdict::LayoutMismatch,
                };
                let all = 0..self.client.lanes.len();
                self.show_verdicts(
                    version,
                    all.map(|place| (place, verdict, reason(verdict, None))).collect(),
                );
                return Some(Input::Judged { version, verdict });
            }
        };
        let held = Held::of(&header);
        let (dir, storage) = (self.client.dir.model(), self.client.storage.clone());
        let kept = held.clone();
        // One keeps after the other, or the parts of two models might mix; digests would tell, and the model be fetched again.
        let before = self.keeping.take();
        self.keeping = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ended = before.await;
            }
            let keep = move || {
                if storage.is_ok()
                    && let Err(error) = global_store::save(&dir, &kept, &payload)
                {
                    let full = error.kind() == std::io::ErrorKind::StorageFull;
                    storage.failed_io("keep the published model", &error, full);
                }
            };
            let _kept = tokio::task::spawn_blocking(keep).await;
        }));
        self.held = Some((held, header.payload_digest, model));
        // A candidate may have come before the model that it is held against.
        self.appraise_asked();
        self.unjudged = (0..self.client.lanes.len()).collect();
        let waiting = |place: usize| {
            (
                place,
                GateVerdict::TooFewRows,
                reason(GateVerdict::TooFewRows, None),
            )
        };
        if !self.judge_held() {
            let all = self.unjudged.iter().map(|place| waiting(*place)).collect();
            self.show_verdicts(version, all);
        }
        Some(Input::Held { version })
    }

    /// Begins to judge the held model on the lanes that have not yet and are ready to; one judging at a time. Whether one is under way.
    pub(super) fn judge_held(&mut self) -> bool {
        if self.judging.is_some() {
            return true;
        }
        let Some((held, digest, model)) = &self.held else {
            return false;
        };
        let ready = |lane: &LaneShared| {
            lane.detector().is_some() && lane.history().quiet_len() >= gate::GATE_ROWS_MIN
        };
        let lanes: Vec<(usize, Arc<LaneShared>)> = (self.unjudged.iter())
            .map(|place| (*place, Arc::clone(&self.client.lanes[*place])))
            .filter(|(_, lane)| ready(lane))
            .collect();
        if lanes.is_empty() {
            return false;
        }
        let at_gate = AtGate {
            held: held.clone(),
            digest: *digest,
            model: Arc::clone(model),
            lanes: lanes.iter().map(|(place, _)| *place).collect(),
        };
        let model = Arc::clone(model);
        let outcome = tokio::task::spawn_blocking(move || {
            let judge = |(place, lane): (usize, Arc<LaneShared>)| (place, judge(&lane, &model));
            lanes.into_iter().map(judge).collect()
        });
        self.judging = Some(Judging {
            model: at_gate,
            outcome,
        });
        true
    }

    fn apply(&mut self, model: &AtGate, outcome: Result<Vec<(usize, Judgement)>, JoinError>) {
        // Another model came meanwhile: what was found about this one is nobody's concern any more.
        if self
            .held
            .as_ref()
            .is_none_or(|(_, digest, _)| *digest != model.digest)
        {
            return;
        }
        let judged = match outcome {
            Ok(judged) => judged,
            Err(join) => {
                tracing::error!(%join, "the gate failed; the model is not used");
                let all = model.lanes.iter();
                all.map(|place| (*place, GateOutcome::WorseOnTail.into()))
                    .collect()
            }
        };
        let mut verdicts = Vec::new();
        for (place, Judgement { outcome, evidence }) in judged {
            let verdict = match outcome {
                GateOutcome::Accepted(detector) => {
                    self.accept(place, model, *detector);
                    GateVerdict::Accepted
                }
                GateOutcome::WorseOnTail => GateVerdict::WorseOnTail,
                GateOutcome::NonFinite => GateVerdict::NonFinite,
                GateOutcome::LayoutMismatch => GateVerdict::LayoutMismatch,
                GateOutcome::TooFewRows => GateVerdict::TooFewRows,
                other => {
                    tracing::error!(
                        ?other,
                        "the gate gave an outcome that this build does not know; the model is not used"
                    );
                    GateVerdict::WorseOnTail
                }
            };
            if verdict != GateVerdict::TooFewRows {
                self.unjudged.remove(&place);
            }
            verdicts.push((place, verdict, reason(verdict, evidence.as_ref())));
        }
        self.show_verdicts(model.held.version, verdicts);
    }

    /// Tells this host's people, and nobody else, what the gates decided: these, and the others as they stand.
    fn show_verdicts(&mut self, version: ModelVersion, verdicts: Vec<(usize, GateVerdict, String)>) {
        for (place, verdict, reason) in verdicts {
            let (lane, word) = (&self.client.lanes[place].name, verdict_word(verdict));
            tracing::info!(
                version = version.0,
                lane,
                verdict = word,
                reason,
                "published model judged"
            );
            self.client.metrics.gate_verdicts.get_or_create(&kind(word)).inc();
            self.verdicts[place] = Some((version, verdict, reason));
        }
        let several = self.client.lanes.len() > 1;
        let known = self.verdicts.iter().enumerate();
        let verdicts: Vec<_> = known
            .filter_map(|(place, verdict)| verdict.as_ref().map(|verdict| (place, verdict)))
            .collect();
        let Some((_, (_, first, _))) = verdicts.first() else {
            return;
        };
        let named = |place: usize, text: &str| {
            if several {
                format!("{}: {text}", self.client.lanes[place].name)
            } else {
                text.to_owned()
            }
        };
        let word = if verdicts.iter().all(|(_, (_, verdict, _))| verdict == first) {
            verdict_word(*first).to_owned()
        } else {
            let words = verdicts
                .iter()
                .map(|(place, (_, verdict, _))| named(*place, verdict_word(*verdict)));
            words.collect::<Vec<_>>().join(", ")
        };
        let reasons: Vec<String> = verdicts
            .iter()
            .map(|(place, (version, _, reason))| named(*place, &format!("model {}: {reason}", version.0)))
            .collect();
        self.client.board.update(|status| {
            status.gate = word;
            status.gate_reason = Some(reasons.join("; "));
        });
    }

    /// Puts the lane's refitted detector in use, and the model as prior of each of its later fits.
    fn accept(&self, place: usize, model: &AtGate, mut detector: theriac_model::detector::Detector) {
        let AtGate {
            held, digest, model, ..
        } = model;
        let (version, lane) = (held.version, &self.client.lanes[place]);
        let spent = self.client.budget.published().spent;
        detector.set_provenance(theriac_model::detector::Provenance {
            model_version: version.0,
            model_digest: digest.to_string(),
            round: held.round,
            rule: held.rule.clone(),
            epsilon: Some(spent.epsilon),
            delta: Some(spent.delta.value()),
            training_sites: u64::from(held.contributors),
        });
        let detector = Arc::new(detector);
        lane.replace(Arc::clone(&detector));
        keep_detector(&self.client.dir, &lane.name, &self.client.storage, detector);
        lane.set_global(Arc::clone(model));
        self.client
            .metrics
            .model_version
            .set(i64::try_from(version.0).unwrap_or(i64::MAX));
        self.client
            .board
            .update(|status| status.model_version = version.0);
    }

    pub(super) fn outbox_message(&self, round: Round) -> Option<ToAggregator> {
        let row = self.outbox.as_ref().filter(|row| row.round == round)?;
        match message_of(row) {
            Ok(message) => Some(message),
            Err(error) => {
                tracing::error!(round = round.0, %error, "the update in the outbox is damaged and is not sent");
                None
            }
        }
    }

    pub(super) async fn drop_outbox(&mut self, round: Round) {
        if self.outbox.as_ref().is_some_and(|row| row.round <= round) {
            self.outbox = None;
        }
        if let Err(error) = self.client.store.drop_outbox(round).await {
            self.client.storage.failed("clear the outbox", &error);
        }
    }

    pub(super) fn report(&self, event: &ParticipantEvent) {
        let (board, metrics) = (&self.client.board, &self.client.metrics);
        match event {
            ParticipantEvent::TrainingStarted { round } => {
                tracing::info!(round = round.0, "taking part in a round");
                board.update(|status| status.round = round.0);
            }
            ParticipantEvent::Declined { round, reason } => {
                tracing::info!(round = round.0, ?reason, "declined a round");
                metrics.declines.get_or_create(&kind(decline_word(*reason))).inc();
                board.update(|status| status.round = round.0);
            }
            ParticipantEvent::Acknowledged { round } => {
                tracing::info!(round = round.0, "the update is durable at the aggregator");
                metrics.updates.get_or_create(&kind("accepted")).inc();
                board.update(|status| status.updates_accepted += 1);
            }
            ParticipantEvent::Refused { round, code } => {
                tracing::warn!(
                    round = round.map(|round| round.0),
                    code = code.word(),
                    "the aggregator refused"
                );
                metrics.updates.get_or_create(&kind(code.word())).inc();
                board.update(|status| {
                    status.updates_refused += u64::from(round.is_some());
                    status.last_refusal = Some(code.word().to_owned());
                });
            }
            ParticipantEvent::RoundOver { round, outcome, .. } => {
                let word = match outcome {
                    Some(RoundOutcome::Published(_)) => "published",
                    Some(RoundOutcome::Aborted(_)) => "aborted",
                    None => "unknown",
                };
                tracing::info!(round = round.0, outcome = word, "round over");
                metrics.rounds.get_or_create(&kind(word)).inc();
            }
            // Told where the session begins and where the gate answers.
            ParticipantEvent::Welcomed | ParticipantEvent::ModelJudged { .. } => {}
            ParticipantEvent::ModelUnavailable { version } => {
                tracing::warn!(version = version.0, "a published model could not be had");
            }
        }
    }

    pub(super) fn show_traffic(&self, endpoint: &Endpoint) {
        let traffic = endpoint.traffic();
        raise_to(&self.client.metrics.bytes_sent, traffic.bytes_sent);
        raise_to(&self.client.metrics.bytes_received, traffic.bytes_received);
    }
}

/// Judges a model on a lane's own rows.
fn judge(lane: &LaneShared, model: &GlobalModel) -> Judgement {
    let Some(detector) = lane.detector() else {
        return GateOutcome::TooFewRows.into();
    };
    let history = lane.history().quiet(GATE_ROWS);
    let judgement = gate::judge(&detector, &history, model, &lane.fit);
    match judgement.outcome {
        // The model's own values were finite when it was read, so this is about what came of this host's rows.
        GateOutcome::NonFinite => GateOutcome::WorseOnTail.into(),
        _ => judgement,
    }
}

fn verdict_word(verdict: GateVerdict) -> &'static str {
    match verdict {
        GateVerdict::Accepted => "accepted",
        GateVerdict::WorseOnTail => "worse_on_tail",
        GateVerdict::NonFinite => "non_finite",
        GateVerdict::LayoutMismatch => "layout_mismatch",
        GateVerdict::Stale => "stale",
        GateVerdict::TooFewRows => "too_few_rows",
    }
}

/// Why the gate decided so, for this host's operator alone: it says something about the host's rows.
fn reason(verdict: GateVerdict, evidence: Option<&Evidence>) -> String {
    match (verdict, evidence) {
        (_, Some(evidence)) => evidence.to_string(),
        (GateVerdict::Accepted, None) => "it passed".to_owned(),
        (GateVerdict::WorseOnTail, None) => "no fit on this host's rows came of it".to_owned(),
        (GateVerdict::NonFinite, None) => "one of its values is not a finite number".to_owned(),
        (GateVerdict::LayoutMismatch, None) => "it is for other channels".to_owned(),
        (GateVerdict::Stale, None) => "a newer one is in use".to_owned(),
        (GateVerdict::TooFewRows, None) => format!(
            "fewer than {} quiet rows, or no detector yet; it is judged when there are",
            gate::GATE_ROWS_MIN
        ),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_verdict_that_depends_on_the_rows_is_ever_told() {
        let all = [
            GateVerdict::Accepted,
            GateVerdict::WorseOnTail,
            GateVerdict::NonFinite,
            GateVerdict::LayoutMismatch,
            GateVerdict::Stale,
            GateVerdict::TooFewRows,
        ];
        let version = ModelVersion(3);
        let words: Vec<&str> = all
            .into_iter()
            .filter_map(|verdict| told(VerdictV1 { version, verdict }))
            .map(|message| match message {
                ToAggregator::Verdict(verdict) => verdict_word(verdict.verdict),
                _ => "another message",
            })
            .collect();
        assert_eq!(words, ["non_finite", "layout_mismatch", "stale"]);
    }
}
