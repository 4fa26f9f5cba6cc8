//! A past round done again from what is stored: the same bits, or the first place where they are not.

use std::collections::BTreeMap;

use rusqlite::Connection;
use serde::Serialize;
use theriac_protocol::units::{Digest, NodeId, Round};

use crate::combine::RoundInputs;
use crate::evidence::{Decision, RULE_VERSION, Record};
use crate::layout::ModelSpec;
use crate::store::blob::BlobStore;
use crate::store::evidence::{self, ChainError};
use crate::store::{StoreError, history, models};

/// Why a round was not found to be what its records say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// What it needs is deleted. Nothing is wrong.
    #[error("cannot: payloads pruned: {0}")]
    Pruned(String),
    /// It gave no model, or ended before records were kept.
    #[error("cannot: {0}")]
    Nothing(String),
    /// Another version of rules and measures did it.
    #[error(
        "cannot: round {round} was combined by version {found} of the rules, this program has version {RULE_VERSION}"
    )]
    OtherProgram {
        /// The round.
        round: u64,
        /// Version that did it.
        found: u32,
    },
    /// A stored payload has other bytes.
    #[error("tampered: {0}")]
    Payload(String),
    /// The records are not as they were written.
    #[error("tampered: {0}")]
    Chain(#[from] ChainError),
    /// The model differs.
    #[error("different: the round gives model {found}, model {version} on record is {expected}")]
    Model {
        /// Version on record.
        version: u64,
        /// Its digest.
        expected: Digest,
        /// What the replay gives.
        found: Digest,
    },
    /// What a record says about a site differs.
    #[error("different: the record of {site} says another {what} than the round gives")]
    Record {
        /// The site.
        site: String,
        /// In what.
        what: &'static str,
    },
    /// The stored round cannot be combined.
    #[error("different: the round gives no model: {0}")]
    NoModel(String),
    /// The store cannot be read.
    #[error(transparent)]
    Store(StoreError),
}

impl ReplayError {
    /// Whether there was nothing to hold the record against.
    pub fn is_impossible(&self) -> bool {
        matches!(
            self,
            Self::Pruned(_) | Self::Nothing(_) | Self::OtherProgram { .. }
        )
    }
}

impl From<StoreError> for ReplayError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Gone { .. } => Self::Pruned(error.to_string()),
            StoreError::Corrupt { .. } | StoreError::BlobCorrupt { .. } | StoreError::BlobMissing { .. } => {
                Self::Payload(error.to_string())
            }
            other => Self::Store(other),
        }
    }
}

/// A round that is what its records say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// The round.
    pub round: u64,
    /// The model that it made.
    pub model_version: u64,
    /// SHA-256 of it, from the record and from the replay.
    pub model_digest: String,
    /// Updates that counted.
    pub combined: usize,
    /// Updates that were scored at weight 0.
    pub left_out: usize,
    /// Records of this round that were compared.
    pub records: usize,
    /// Records of the whole chain whose hashes fit.
    pub chain: u64,
}

/// Does round `round` again and compares: the chain of records and what the audit log says of it, every payload's digest, the decision about
/// every row, the model's bits, every figure, and what each site earned.
///
/// # Errors
/// [`ReplayError`]; see [`ReplayError::is_impossible`].
pub fn replay(
    connection: &Connection,
    blobs: &BlobStore,
    spec: &ModelSpec,
    round: Round,
) -> Result<Replayed, ReplayError> {
    let detail = history::detail(connection, round)?;
    let Some(version) = detail.round.published else {
        let why = format!("round {round} gave no model ({})", detail.round.state);
        return Err(ReplayError::Nothing(why));
    };
    let chain = evidence::check_chain(connection, round)??;
    let Some(plan) = evidence::plan(connection, round)? else {
        let why = format!(
            "round {round} has no records: they were deleted after limits.records_kept rounds, or it is older than they"
        );
        return Err(ReplayError::Nothing(why));
    };
    if plan.rule_version != RULE_VERSION {
        let found = plan.rule_version;
        return Err(ReplayError::OtherProgram {
            round: round.0,
            found,
        });
    }
    if plan.central_noise {
        let why = format!(
            "round {round} holds noise of the centre, which is drawn once and kept nowhere, so no two runs give the same bits"
        );
        return Err(ReplayError::Nothing(why));
    }
    let records: BTreeMap<String, Record> = evidence::of_round(connection, round)?
        .into_iter()
        .filter(|record| record.decision != Decision::Late)
        .map(|record| (record.site.clone(), record))
        .collect();
    let mut earned = BTreeMap::new();
    for (site, record) in &records {
        let node = NodeId::new(site.clone()).map_err(|_| differs(site, "name"))?;
        earned.insert(node, record.before);
    }
    let inputs = RoundInputs::load(connection, blobs, round, plan, &earned, &mut BTreeMap::new())?;
    let base = models::model(connection, inputs.announce.base_version)?;
    if base.digest != inputs.announce.base_digest {
        return Err(ReplayError::Model {
            version: base.version.0,
            expected: inputs.announce.base_digest,
            found: base.digest,
        });
    }
    let result = inputs
        .run(spec, None)
        .map_err(|error| ReplayError::NoModel(error.to_string()))?;
    let model = models::model(connection, theriac_protocol::units::ModelVersion(version))?;
    if model.digest != result.candidate.digest {
        return Err(ReplayError::Model {
            version,
            expected: model.digest,
            found: result.candidate.digest,
        });
    }
    let (mut combined, mut left_out) = (0, 0);
    let measured = result.account.rows.len();
    for row in result.account.rows {
        let site = row.node.to_string();
        let record = records.get(&site).ok_or_else(|| differs(&site, "existence"))?;
        if row.decision == Decision::Combined {
            combined += 1;
        } else {
            left_out += 1;
        }
        let step = record.before.observe(record.verdict);
        let earned = (
            record.after.consistent,
            record.after.inconsistent,
            record.after.rounds,
        );
        let checks = [
            (record.decision == row.decision, "decision"),
            (
                record.weight == u8::from(row.decision == Decision::Combined),
                "weight",
            ),
            (
                record.payload_digest == Some(row.payload_digest.to_string()),
                "payload",
            ),
            (record.features.as_ref() == Some(&row.features), "figure"),
            (
                record.quantiles == result.account.quantiles,
                "figure of the round",
            ),
            (record.findings == row.findings, "finding"),
            (
                record.verdict == crate::evidence::law::Verdict::of(&row.findings),
                "verdict",
            ),
            (
                earned == (step.consistent, step.inconsistent, step.rounds),
                "reputation",
            ),
        ];
        if let Some((_, what)) = checks.into_iter().find(|(same, _)| !same) {
            return Err(differs(&site, what));
        }
    }
    let on_record = records
        .values()
        .filter(|record| record.features.is_some())
        .count();
    if on_record != measured {
        return Err(ReplayError::NoModel(format!(
            "{on_record} rows are on record, {measured} are stored"
        )));
    }
    Ok(Replayed {
        round: round.0,
        model_version: version,
        model_digest: model.digest.to_string(),
        combined,
        left_out,
        records: records.len(),
        chain,
    })
}

fn differs(site: &str, what: &'static str) -> ReplayError {
    ReplayError::Record {
        site: site.to_owned(),
        what,
    }
}
