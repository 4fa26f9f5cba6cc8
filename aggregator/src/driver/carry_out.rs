//! What the machine asks for, carried out.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use theriac_protocol::codec::encode_to_edge;
use theriac_protocol::message::{AnnounceV1, ClosedV1, ToEdge, UpdateV1};
use theriac_protocol::refusal::{AbortReason, RefusalCode, RoundOutcome};
use theriac_protocol::round::{Output, PhaseName, RoundMachine};
use theriac_protocol::units::{Digest, NodeId, Round};

use super::Driver;
use super::panel::TurnedDown;
use super::work::{Computed, Done, until_it_works, with_urgency};
use crate::evidence::Decision;
use crate::metrics::{Outcome, Verdict};
use crate::store::models::ModelRow;
use crate::store::{StoreError, Urgency, Work, evidence, rounds, sums, validation as validations};
use crate::validate::ValidatedUpdate;

/// The update that caused the outputs at hand.
#[derive(Debug)]
pub(super) struct Offered {
    pub(super) header: UpdateV1,
    pub(super) validated: Option<Box<ValidatedUpdate>>,
}

impl Driver {
    /// Carries out all that the machine asks for now; during a roll-over that waits.
    pub(super) fn pump(&mut self, offered: Option<Offered>) {
        if self.rolling {
            return;
        }
        let outputs: Vec<Output> = std::iter::from_fn(|| self.machine.poll_output()).collect();
        self.carry_out_all(outputs, offered);
    }

    pub(super) fn carry_out_all(&mut self, outputs: Vec<Output>, mut offered: Option<Offered>) {
        for output in outputs {
            self.carry_out(output, &mut offered);
        }
        let at = self.machine.status();
        if at.phase != PhaseName::Collecting {
            let ended = self.terms.borrow().clone();
            if ended.is_some() {
                // First, so that an update never meets a moment between the two.
                if self.config.late_updates {
                    self.late_terms.send_replace(ended);
                }
                self.terms.send_replace(None);
            }
        }
        self.metrics.round.set(at.round.0);
        self.with_status(|status| {
            status.phase = at.phase;
            status.round = at.round;
            status.stored = at.stored;
        });
    }

    fn carry_out(&mut self, output: Output, offered: &mut Option<Offered>) {
        match output {
            Output::Open { announce, cohort } => self.open(announce, cohort),
            Output::Announce { to, announce } => self.announce(&to, announce),
            Output::Refuse { node, round, code } => {
                if let Some(offered) = offered.take() {
                    self.refuse_update(&node, &offered.header, code, "by the state of the round");
                } else {
                    self.count_upload("refused", code.word());
                    self.send_refusal(&node, Some(round), code);
                }
            }
            Output::Store {
                node,
                round,
                payload_digest,
            } => {
                let validated = offered.take().and_then(|offered| offered.validated);
                self.make_durable(node, round, payload_digest, validated);
            }
            Output::StoreLate {
                node,
                round,
                payload_digest,
            } => {
                let validated = offered.take().and_then(|offered| offered.validated);
                self.make_late_durable(node, round, payload_digest, validated);
            }
            Output::Receipt {
                node,
                round,
                payload_digest: _,
            } => self.send_receipt(node, round),
            Output::Aggregate { round, base, members } => self.compute(round, base, members),
            Output::Publish {
                round,
                version: _,
                digest: _,
                members,
            } => self.publish(round, members),
            Output::Abort { round, reason } => self.abort(round, reason),
            Output::Closed { to, closed } => self.closed(&to, closed),
        }
    }

    /// A round's row needs no synchronisation of its own. The next durable write covers it; should power fail before that,
    /// the next start opens the same round again, with the same nonce and terms, and nobody has been promised anything.
    fn open(&mut self, announce: AnnounceV1, cohort: Vec<NodeId>) {
        let (store, rule, round) = (self.store.clone(), self.rule, announce.round);
        let accumulate = self.plan.accumulate;
        let last_forgotten = Round(round.0.saturating_sub(self.rounds_kept));
        self.receipts
            .retain(|(of, _), _| of.0.saturating_add(1) >= round.0);
        self.cache.clear();
        self.cache_bytes = 0;
        self.work.spawn(async move {
            with_urgency(&store, "open a round", Urgency::Lazy, move |work| {
                rounds::open(work, &announce, &cohort, rule)?;
                if last_forgotten.0 > 0 {
                    sums::prune(work, last_forgotten, &announce, accumulate)?;
                    rounds::forget_payloads(work, last_forgotten)
                } else {
                    Ok(())
                }
            })
            .await
            .map_or(Done::Written(Ok(())), |()| Done::Opened(round))
        });
    }

    fn announce(&mut self, to: &[NodeId], announce: AnnounceV1) {
        let is_new = self
            .terms
            .borrow()
            .as_ref()
            .is_none_or(|terms| terms.round != announce.round);
        if is_new {
            tracing::info!(round = announce.round.0, nodes = to.len(), "a round is open");
            self.opened_at = Some(Instant::now());
            // Before anybody hears of the round, so that no answer can come too early.
            self.terms.send_replace(Some(Arc::new(announce.clone())));
        }
        self.send_to_all(to, &ToEdge::Announce(announce));
    }

    fn send_to_all(&mut self, to: &[NodeId], message: &ToEdge) {
        match encode_to_edge(message) {
            Ok(frame) => {
                let frame = Arc::new(frame);
                for node in to {
                    self.send_frame(node, Arc::clone(&frame));
                }
            }
            Err(error) => tracing::error!(%error, "our own message does not encode"),
        }
    }

    /// The update that the machine asks to be stored; `None`: the driver has another one or none, and the machine is told that it is not stored.
    fn at_hand(
        &mut self,
        node: &NodeId,
        round: Round,
        digest: Digest,
        update: Option<Box<ValidatedUpdate>>,
    ) -> Option<Box<ValidatedUpdate>> {
        let update = update.filter(|update| update.header().payload_digest == digest);
        if update.is_none() {
            tracing::error!(%node, round = round.0, "the machine asks for an update that is not at hand");
            let (now, node) = (self.now(), node.clone());
            self.machine
                .handle(now, theriac_protocol::round::Input::StoreFailed { node, round });
            let outputs: Vec<Output> = std::iter::from_fn(|| self.machine.poll_output()).collect();
            self.carry_out_all(outputs, None);
        }
        update
    }

    fn make_durable(
        &mut self,
        node: NodeId,
        round: Round,
        digest: Digest,
        update: Option<Box<ValidatedUpdate>>,
    ) {
        let Some(update) = self.at_hand(&node, round, digest, update) else {
            return;
        };
        self.storing += 1;
        let at = self.machine.status();
        let asked = at.admitted.min(self.config.updates_max.max(1));
        let expected = asked.saturating_sub(at.stored + at.declined + self.storing);
        let urgency = if expected == 0 {
            Urgency::Now
        } else {
            Urgency::Company
        };
        let (store, rule) = (self.store.clone(), self.rule.rule);
        self.work.spawn(async move {
            let (row, norm) = (update.row(), update.norm());
            let header = Box::new(update.header().clone());
            drop(update);
            let result = match store.put_blob(digest, row.payload.clone()).await {
                Ok(()) => {
                    let (name, head, payload) = (node.clone(), header.clone(), row.payload.clone());
                    let write = move |work: &crate::store::Work<'_>| {
                        rounds::insert_upload(work, &name, &head, &payload, norm, rule)
                    };
                    store.write(urgency, write).await
                }
                Err(error) => Err(error),
            };
            Done::Stored {
                node,
                header,
                row,
                result,
            }
        });
    }

    /// As [`Driver::make_durable`], apart from the round's own updates. Nobody waits for it.
    fn make_late_durable(
        &mut self,
        node: NodeId,
        round: Round,
        digest: Digest,
        update: Option<Box<ValidatedUpdate>>,
    ) {
        let Some(update) = self.at_hand(&node, round, digest, update) else {
            return;
        };
        tracing::info!(%node, round = round.0, "a late update is kept for the next round");
        let (store, rule) = (self.store.clone(), self.rule.rule);
        self.work.spawn(async move {
            let (row, norm) = (update.row(), update.norm());
            let header = Box::new(update.header().clone());
            drop(update);
            let result = match store.put_blob(digest, row.payload.clone()).await {
                Ok(()) => {
                    let (name, head) = (node.clone(), header.clone());
                    let write = move |work: &crate::store::Work<'_>| {
                        crate::store::late::insert(work, &name, &head, &row.payload, norm, rule)
                    };
                    store.write(Urgency::Company, write).await
                }
                Err(error) => Err(error),
            };
            Done::StoredLate { node, header, result }
        });
    }

    /// From the committed row: out of memory for the round at hand and the one before, else out of the store.
    fn send_receipt(&mut self, node: NodeId, round: Round) {
        match self.receipts.get(&(round, node.clone())) {
            Some(stored) => {
                let receipt = self.key.receipt(round, &node, stored);
                self.send(&node, &ToEdge::Receipt(receipt));
                self.send_seal(&node);
            }
            None => self.find_receipt(node, round),
        }
    }

    pub(super) fn find_receipt(&mut self, node: NodeId, round: Round) {
        let store = self.store.clone();
        self.work.spawn(async move {
            let name = node.clone();
            let found = store
                .read(move |connection| rounds::stored_upload(connection, round, &name))
                .await;
            let stored = found.unwrap_or_else(|error| {
                tracing::warn!(%node, round = round.0, %error, "cannot look a receipt up");
                None
            });
            Done::Receipt { node, round, stored }
        });
    }

    fn publish(&mut self, round: Round, members: Vec<(NodeId, Digest)>) {
        let Some(Computed {
            row,
            candidate,
            conclusion,
            validation,
        }) = &self.candidate
        else {
            // Impossible: the machine publishes only what it was told was computed.
            tracing::error!(round = round.0, "no model is at hand to publish");
            return;
        };
        let (store, row, candidate) = (self.store.clone(), row.clone(), candidate.clone());
        let (conclusion, validation) = (conclusion.clone(), validation.clone());
        debug_assert!(
            members.iter().eq(conclusion
                .account
                .rows
                .iter()
                .filter(|row| row.stale.is_none())
                .map(|row| (row.node.clone(), row.payload_digest))
                .collect::<Vec<_>>()
                .iter()),
            "the machine's members are the round's own updates"
        );
        // On record as members are those whose update counted, late ones among them; who counted by earlier releases alone is in the round's records.
        let members: Vec<(NodeId, Digest)> = conclusion
            .account
            .rows
            .iter()
            .filter(|row| row.decision == Decision::Combined)
            .map(|row| (row.node.clone(), row.payload_digest))
            .collect();
        let records_kept = self.records_kept;
        self.work.spawn(async move {
            let memory = conclusion.memory.as_ref().map(|(_, memory)| Bytes::from(memory.to_bytes()));
            let memory = memory.map(|bytes| (Digest::of(&bytes), bytes));
            for (digest, payload) in memory.into_iter().chain([(row.digest, candidate.payload.clone())]) {
                let mut wait = std::time::Duration::from_millis(250);
                while let Err(error) = store.put_blob(digest, payload.clone()).await {
                    tracing::error!(%error, hint = error.hint(), "cannot store the next model; trying again in {wait:?}");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(std::time::Duration::from_secs(5));
                }
            }
            until_it_works(&store, "publish a model", move |work| {
                rounds::publish(work, &row, &candidate.payload, &members, &candidate.evidence)?;
                let changes = evidence::conclude_round(work, round, conclusion.clone())?;
                if let Some(validation) = &validation {
                    validations::record(work, validation, &conclusion.plan)?;
                }
                forget(work, round, records_kept)?;
                Ok(changes)
            })
            .await
            .map_or(Done::Written(Ok(())), |changes| Done::Published(round, changes))
        });
    }

    fn abort(&mut self, round: Round, reason: AbortReason) {
        let (store, records_kept) = (self.store.clone(), self.records_kept);
        let turned_down = self.turned_down.clone();
        let turned_down = turned_down.filter(|turned_down| turned_down.validation.round == round.0);
        let word = self.abort_word(round, reason);
        self.work.spawn(async move {
            let ended = until_it_works(&store, "end a round", move |work| {
                match &turned_down {
                    None => rounds::abort_as(work, round, reason, word)?,
                    Some(TurnedDown { validation, plan }) => {
                        rounds::abort_as(work, round, reason, validation.decision.abort_word())?;
                        validations::record(work, validation, plan)?;
                    }
                }
                forget(work, round, records_kept)
            });
            ended
                .await
                .map_or(Done::Written(Ok(())), |()| Done::Aborted(round))
        });
    }

    /// The word for a round's end without a model, but for its validators'.
    fn abort_word(&self, round: Round, reason: AbortReason) -> &'static str {
        let failed = self
            .failed
            .filter(|(of, _)| *of == round && reason == AbortReason::AggregationFailed);
        failed.map_or(rounds::abort_word(reason), |(_, word)| word)
    }

    fn closed(&mut self, to: &[NodeId], closed: ClosedV1) {
        let outcome = match closed.outcome {
            RoundOutcome::Published(_) => "published",
            RoundOutcome::Aborted(reason) => {
                let ended = self.turned_down.take();
                let ended = ended.filter(|ended| ended.validation.round == closed.round.0);
                let word = self.abort_word(closed.round, reason);
                ended.map_or(word, |ended| ended.validation.decision.abort_word())
            }
        };
        self.metrics.rounds.get_or_create(&Outcome { outcome }).inc();
        if let Some(opened) = self.opened_at.take() {
            self.metrics.round_seconds.observe(opened.elapsed().as_secs_f64());
        }
        tracing::info!(round = closed.round.0, outcome, "a round has ended");
        self.send_to_all(to, &ToEdge::Closed(closed));
    }

    /// An operator's model is in force: a new machine on the new base, with the same nodes.
    pub(super) fn rolled_over(&mut self, model: ModelRow, aborted: Option<Round>) {
        self.rolling = false;
        // What became durable in the meantime is still acknowledged; all else concerned the old base.
        let receipts = std::iter::from_fn(|| self.machine.poll_output());
        let receipts: Vec<Output> = receipts
            .filter(|output| matches!(output, Output::Receipt { .. }))
            .collect();
        for receipt in receipts {
            self.carry_out(receipt, &mut None);
        }
        let last = aborted.unwrap_or(Round(0)).max(self.machine.status().round);
        let now = self.now();
        let base = theriac_protocol::round::BaseModel {
            version: model.version,
            digest: model.digest,
        };
        self.machine = RoundMachine::new(self.config.clone(), base, last, self.nonce_seed, now);
        self.heed_budget();
        self.heed_validators();
        (self.candidate, self.waiting, self.turned_down) = (None, None, None);
        self.storing = 0;
        self.terms.send_replace(None);
        self.late_terms.send_replace(None);
        self.metrics.model_version.set(model.version.0);
        self.with_status(|status| {
            status.model_version = model.version.0;
            status.aborted += u64::from(aborted.is_some());
        });
        let nodes: Vec<NodeId> = self.links.keys().cloned().collect();
        if let Some(round) = aborted {
            let outcome = RoundOutcome::Aborted(AbortReason::Operator);
            self.closed(&nodes, ClosedV1 { round, outcome });
        }
        for node in nodes {
            self.machine
                .handle(now, theriac_protocol::round::Input::Admitted { node });
        }
        self.pump(None);
        // Yet another model may have come while this one was being put in force.
        self.refresh();
    }

    /// Tells the node, counts, and records it with its reason.
    pub(super) fn refuse_update(
        &mut self,
        node: &NodeId,
        header: &UpdateV1,
        code: RefusalCode,
        detail: &str,
    ) {
        tracing::info!(%node, round = header.round.0, code = code.word(), detail, "an update was refused");
        self.count_upload("refused", code.word());
        self.send_refusal(node, Some(header.round), code);
        let (store, node, header, rule) = (self.store.clone(), node.clone(), header.clone(), self.rule.rule);
        let detail = detail.to_owned();
        // On record first: the machine must not know of a refusal that the store does not.
        self.work.spawn(async move {
            let (round, name) = (header.round, node.clone());
            let write = move |work: &crate::store::Work<'_>| {
                rounds::refuse_upload(work, &name, &header, code, rule, Some(&detail))
            };
            let result = store.write(Urgency::Lazy, write).await;
            if code.retryable() {
                Done::Written(result)
            } else {
                Done::Refused {
                    node,
                    round,
                    code,
                    result,
                }
            }
        });
    }

    /// Keeps the log's signed head at the end of a round: what `rounds replay` holds the log's leaves against. Nobody waits for it.
    pub(super) fn keep_head(&mut self) {
        let (store, key, kept) = (self.store.clone(), Arc::clone(&self.key), self.records_kept);
        let head = self.store.audit_log().signed_head(&key);
        self.work.spawn(async move {
            let write = move |work: &crate::store::Work<'_>| crate::store::heads::keep(work, &head, kept);
            Done::Written(store.write(Urgency::Lazy, write).await)
        });
    }

    pub(super) fn count_upload(&self, verdict: &'static str, reason: &'static str) {
        self.metrics
            .uploads
            .get_or_create(&Verdict { verdict, reason })
            .inc();
    }
}

/// Deletes the records of rounds whose time is over.
fn forget(work: &Work<'_>, round: Round, records_kept: u64) -> Result<(), StoreError> {
    let last = Round(round.0.saturating_sub(records_kept));
    evidence::forget(work, last)?;
    validations::forget(work, last)
}
