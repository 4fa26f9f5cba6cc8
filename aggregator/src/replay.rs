//! A past round done again from what is stored: the same bits, or the first place where they are not.

use std::collections::BTreeMap;

use rusqlite::Connection;
use serde::Serialize;
use theriac_protocol::units::{Digest, NodeId, Round};

use crate::combine::{RoundInputs, Seen, Which};
use crate::evidence::reputation::Reputation;
use crate::evidence::{Closing, Decision, RULE_VERSION, Record, RoundAccount, StoredRow, conclude};
use crate::layout::ModelSpec;
use crate::store::blob::BlobStore;
use crate::store::evidence::{self, ChainError, RoundPlan};
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
    let none = &mut BTreeMap::new();
    let inputs = RoundInputs::load(
        connection,
        blobs,
        round,
        plan.clone(),
        &earned,
        none,
        Which::Carried,
    )?;
    let is_short = |(site, seen): (&StoredRow, &Seen)| {
        let record = records.get(site.node.as_str());
        record.and_then(|record| record.averaged).unwrap_or(1) > seen.updates
    };
    if inputs.stored.iter().zip(&inputs.seen).any(is_short) {
        let why = format!(
            "round {round} used the means of updates of earlier rounds, of which some were deleted after limits.rounds_kept rounds"
        );
        return Err(ReplayError::Pruned(why));
    }
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
    let measured = result.account.rows.len();
    let on_record = records
        .values()
        .filter(|record| record.features.is_some())
        .count();
    if on_record != measured {
        return Err(ReplayError::NoModel(format!(
            "{on_record} rows are on record, {measured} are stored"
        )));
    }
    let combined = result
        .account
        .rows
        .iter()
        .filter(|row| row.decision == Decision::Combined)
        .count();
    let left_out = measured - combined;
    let again = concluded_again(connection, round, &plan, result.account, &records)?;
    for record in &again {
        let written = records
            .get(&record.site)
            .ok_or_else(|| differs(&record.site, "existence"))?;
        if let Some(what) = difference(written, record) {
            return Err(differs(&record.site, what));
        }
    }
    if let Some(site) = records
        .keys()
        .find(|site| again.iter().all(|record| record.site != **site))
    {
        return Err(differs(site, "existence"));
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

/// The records of the round, concluded again from its account, from who else was asked, and from what each site had earned by the record before.
fn concluded_again(
    connection: &Connection,
    round: Round,
    plan: &RoundPlan,
    account: RoundAccount,
    records: &BTreeMap<String, Record>,
) -> Result<Vec<Record>, ReplayError> {
    let before = evidence::earned_before(connection, round)?;
    let mut earned = BTreeMap::new();
    for (site, record) in records {
        let node = NodeId::new(site.clone()).map_err(|_| differs(site, "name"))?;
        // A site whose earlier records were deleted, or that has none, is taken at its word.
        // Quarantine may change without a record of the site, when another one leaves its place to it.
        let earned_by = |site: &Reputation| (site.consistent, site.inconsistent, site.rounds);
        if before
            .get(&node)
            .is_some_and(|before| earned_by(before) != earned_by(&record.before))
        {
            return Err(differs(site, "standing before the round"));
        }
        earned.insert(node, record.before);
    }
    // Whether a site that took no part held a place in the quarantine depends on what the registry said of it then, which is not on record.
    let outsider = before
        .iter()
        .filter(|(node, _)| !earned.contains_key(*node))
        .any(|(_, standing)| standing.is_quarantined() || standing.trust() < plan.quarantine.enter_below);
    let closing = Closing {
        round,
        rule: plan.rule.to_string(),
        byzantine: plan.byzantine,
        limits: plan.quarantine,
    };
    let absent = evidence::absent(connection, round)?;
    let (mut again, _) = conclude(&closing, account, absent, &mut earned);
    for record in &mut again {
        if let Some(written) = records.get(&record.site) {
            record.previous.clone_from(&written.previous);
            if outsider {
                record.after.quarantined_since = written.after.quarantined_since;
                record.held = written.held;
            }
        }
    }
    Ok(again)
}

/// In what two records differ.
fn difference(written: &Record, again: &Record) -> Option<&'static str> {
    let checks = [
        (written.decision == again.decision, "decision"),
        (written.weight == again.weight, "weight"),
        (written.payload_digest == again.payload_digest, "payload"),
        (written.features == again.features, "figure"),
        (written.quantiles == again.quantiles, "figure of the round"),
        (written.findings == again.findings, "finding"),
        (written.verdict == again.verdict, "verdict"),
        (written.stale == again.stale, "staleness"),
        (
            written.averaged == again.averaged,
            "number of updates in its mean",
        ),
        (written.before == again.before, "standing before the round"),
        (written.after == again.after, "reputation"),
        (written == again, "entry"),
    ];
    checks.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
}

fn differs(site: &str, what: &'static str) -> ReplayError {
    ReplayError::Record {
        site: site.to_owned(),
        what,
    }
}
