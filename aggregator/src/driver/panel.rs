//! A combined model and the sites that try it before it is published; what their answers mean is in [`crate::validation`].
//!
//! Meanwhile the machine waits for the result of its aggregation. Nothing of it is durable: after a restart the round is combined again and the validators are
//! asked again; about the same bits, unless noise of the centre is in them or a site was suspended that counted by earlier releases.

use theriac_protocol::message::{AppraisalV1, CandidateV1, ToEdge};
use theriac_protocol::round::{Input, PhaseName};
use theriac_protocol::units::{Moment, NodeId, Round};

use super::Driver;
use super::work::Computed;
use crate::metrics::Outcome;
use crate::store::evidence::RoundPlan;
use crate::validation::{Missing, Panel, Tried, Validation};

/// Why no round opens.
const NO_VALIDATOR: &str = "no round opens: none of rounds.validators is connected and says federation.validator = true, and rounds.validation_missing is \"hold\"";

/// A model that waits for its validators; one at a time, since there is one round at a time.
#[derive(Debug)]
pub(super) struct Waiting {
    panel: Panel,
    computed: Computed,
}

impl Waiting {
    pub(super) fn timeout(&self) -> Moment {
        self.panel.timeout()
    }
}

/// Why a round ends without a model, when its validators are why.
#[derive(Debug, Clone)]
pub(super) struct TurnedDown {
    pub(super) validation: Validation,
    pub(super) plan: RoundPlan,
}

impl Driver {
    /// A round's model is there: to its validators, if there are any, else to its publication.
    pub(super) fn combined(&mut self, round: Round, computed: Computed) {
        let at = self.machine.status();
        // Also while another model is being put in force: should that fail, the round goes on, and must not do so without its validators.
        let wanted = at.round == round && at.phase == PhaseName::Aggregating;
        let Some(terms) = self.validation_terms.clone().filter(|_| wanted) else {
            return self.hand_over(round, computed);
        };
        let account = &computed.conclusion.account;
        let rows = account.rows.iter().map(|row| row.node.clone()).collect();
        let tried = |site: &NodeId, carried, behind| Tried {
            site: site.clone(),
            carried,
            behind,
        };
        let own = account.rows.iter();
        let own = own.filter_map(|row| Some(tried(&row.node, false, row.behind?)));
        let carried = account.carried.iter();
        let carried = carried.map(|row| tried(&row.node, true, row.behind));
        let behind = own.chain(carried).collect();
        let now = self.now();
        let digest = computed.candidate.digest;
        let validators = terms.validators.clone();
        let panel = Panel::new(terms, round, digest, at.base.version, rows, now).of_releases(behind);
        self.waiting = Some(Waiting { panel, computed });
        for node in &validators {
            self.ask_validator(node);
        }
    }

    /// With `validation_missing = "hold"` and no validator there a round would end without a model and cost every site its budget: none opens meanwhile.
    pub(super) fn heed_validators(&mut self) {
        let Some(terms) = &self.validation_terms else {
            return;
        };
        let is_there = |node: &NodeId| self.links.get(node).is_some_and(|link| link.validates);
        let held = terms.missing == Missing::Hold && !terms.validators.iter().any(is_there);
        let now = self.now();
        let changed = self.machine.hold(now, held);
        if changed && held {
            tracing::warn!("{NO_VALIDATOR}");
        }
        if changed {
            self.with_status(|status| status.validation = held.then(|| NO_VALIDATOR.to_owned()));
        }
    }

    /// Sends the candidate at hand to a validator that is connected and has not answered.
    pub(super) fn ask_validator(&mut self, node: &NodeId) {
        let Some(Waiting { panel, computed }) = &self.waiting else {
            return;
        };
        if !panel.waits_for(node) {
            return;
        }
        match self.links.get(node) {
            None => {
                tracing::warn!(%node, round = panel.round().0, "a validator is not connected");
                return;
            }
            Some(link) if !link.validates => {
                tracing::warn!(%node, "is in rounds.validators, and its own configuration does not say federation.validator = true");
                return;
            }
            Some(_) => {}
        }
        let left = panel.timeout().since(self.now());
        let base = self.machine.status().base;
        let candidate = &computed.candidate;
        let header = CandidateV1 {
            round: panel.round(),
            base_version: base.version,
            base_digest: base.digest,
            layout_digest: candidate.layout_digest,
            values: candidate.values,
            payload_digest: candidate.digest,
            deadline_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
        };
        let payload = candidate.payload.clone();
        self.send(node, &ToEdge::Candidate(header, payload));
    }

    /// A validator has answered.
    pub(super) fn appraised(&mut self, node: &NodeId, appraisal: &AppraisalV1) {
        let taken = self
            .waiting
            .as_mut()
            .is_some_and(|waiting| waiting.panel.answer(node, appraisal));
        if !taken {
            tracing::debug!(%node, round = appraisal.round.0, "an appraisal that nobody waits for");
            return;
        }
        self.conclude_validation();
    }

    /// Goes on with the round once its validators have nothing more to say, or no more time.
    pub(super) fn conclude_validation(&mut self) {
        let now = self.now();
        let concluded = |waiting: &Waiting| waiting.panel.conclude(now);
        let Some(validation) = self.waiting.as_ref().and_then(concluded) else {
            return;
        };
        let Some(Waiting { mut computed, .. }) = self.waiting.take() else {
            return;
        };
        let round = Round(validation.round);
        let words = validation.words();
        let outcome = validation.decision.word();
        self.metrics.validations.get_or_create(&Outcome { outcome }).inc();
        tracing::info!(round = round.0, outcome, "{words}");
        self.with_status(|status| status.validation = Some(format!("round {round}: {words}")));
        if validation.decision.publishes() {
            computed.validation = Some(validation);
            self.hand_over(round, computed);
        } else {
            let plan = computed.conclusion.plan;
            self.turned_down = Some(TurnedDown { validation, plan });
            self.machine.handle(now, Input::AggregationFailed { round });
        }
        self.pump(None);
    }

    /// Tells the machine of the model, which it publishes.
    fn hand_over(&mut self, round: Round, computed: Computed) {
        let now = self.now();
        let (version, digest) = (computed.row.version, computed.candidate.digest);
        // A round that a roll-over ended may be computed only now: nobody wants it any more.
        if self.machine.status().round == round {
            self.candidate = Some(computed);
        }
        self.machine.handle(
            now,
            Input::Aggregated {
                round,
                version,
                digest,
            },
        );
    }
}
