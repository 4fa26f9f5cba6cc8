//! Sites that try each model before it is published, as `rounds.validators` at an aggregator and `federation.validator` at their edges.

use std::time::Duration;

use theriac_aggregator::validation::{Answer, Missing, Opinion, Validation, decide};
use theriac_model::appraisal::{Appraised, appraise};
use theriac_model::feature::FeatureSchema;
use theriac_model::global::GlobalModel;
use theriac_model::series::Series;
use theriac_protocol::units::{Digest, NodeId};

use super::data::Site;

/// Newest rows that a validator tries a model on, as at an edge.
const ROWS: usize = 3_600;

/// A site that takes part in no round and is asked about each model.
#[derive(Debug)]
pub struct Validator {
    node: NodeId,
    schema: FeatureSchema,
    rows: Series,
    step: Duration,
}

impl Validator {
    /// One that has the newest train rows of a site, `step` apart.
    pub(crate) fn new(site: &Site, schema: &FeatureSchema, step: Duration) -> Self {
        Self {
            node: site.name.clone(),
            schema: schema.clone(),
            rows: site.train.tail(ROWS),
            step,
        }
    }

    fn says(&self, current: &GlobalModel, candidate: &GlobalModel) -> Answer {
        let found = appraise(&self.schema, &self.rows, self.step, current, candidate);
        Answer {
            site: self.node.clone(),
            opinion: match found {
                Appraised::CannotTell => Opinion::CannotTell,
                Appraised::NotWorse(_) => Opinion::NotWorse,
                Appraised::Worse(_) => Opinion::Worse,
            },
            ratio_permille: found.ratio_permille(),
        }
    }
}

/// What the validators of a round make of its candidate.
pub(crate) fn validate(
    validators: &[&Validator],
    round: u64,
    (base_version, current): (u64, &GlobalModel),
    candidate: (&GlobalModel, Digest),
) -> Validation {
    let says = |validator: &&Validator| validator.says(current, candidate.0);
    let answers: Vec<Answer> = validators.iter().map(says).collect();
    let missing = Missing::Hold;
    Validation {
        round,
        candidate: candidate.1.to_string(),
        base_version,
        missing,
        timeout_ms: 0,
        decision: decide(&answers, missing),
        answers,
        rows: Vec::new(),
        behind: Vec::new(),
    }
}
