//! A past round done again from what is stored: the same bits, or the first place where they are not.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use theriac_audit::checkpoint::LogPublicKey;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use crate::accumulate::Behind;
use crate::combine::{RoundInputs, RowSource, Seen, Which};
use crate::evidence::reputation::Reputation;
use crate::evidence::{Closing, Decision, RULE_VERSION, Record, RoundAccount, StoredRow, conclude};
use crate::layout::ModelSpec;
use crate::publish::PublishError;
use crate::robust::SpillError;
use crate::store::evidence::{self, ChainError, RoundPlan};
use crate::store::heads::{self, Checked, TreeError};
use crate::store::validation::{self, Recorded};
use crate::store::{StoreError, history, models};
use crate::validation::Tried;

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
    /// The audit log is not what was signed, or does not say what the round's rows say.
    #[error("tampered: {0}")]
    Tree(#[from] TreeError),
    /// The recorded words of validators give another decision than the one on record, or are about another model.
    #[error("different: the validators' words on record {what}")]
    Validation {
        /// In what.
        what: String,
    },
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
    /// The file with the round's rows cannot be read back. Nothing is known about the record.
    #[error("not done: the file with the round's rows: {0}")]
    Spill(Arc<SpillError>),
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

impl From<PublishError> for ReplayError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Spill(failure) => Self::Spill(failure),
            other => Self::NoModel(other.to_string()),
        }
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
    /// The model that it made; absent when its validators turned it down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_version: Option<u64>,
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
    /// Leaves of the audit log that were held to their hashes and to the signed heads.
    pub leaves: u64,
    /// Leaves under the first signed head that covers those of the round's end; absent: none is stored yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_head: Option<u64>,
    /// What validators said of the model, and what came of it again; absent: nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
}

/// Does round `round` again and compares: the chain of records, the audit log and its signed heads (`key` is the log's), every payload's digest, the decision about
/// every row, the model's bits and the stored ones, every figure, what each site earned, and what validators' words came to. A round whose model its validators turned down is
/// done up to that model.
///
/// # Errors
/// [`ReplayError`]; see [`ReplayError::is_impossible`].
pub fn replay(
    source: RowSource<'_>,
    spec: &ModelSpec,
    key: &LogPublicKey,
    round: Round,
) -> Result<Replayed, ReplayError> {
    let connection = source.connection;
    let detail = history::detail(connection, round)?;
    let validated = validation::of_round(connection, round)?;
    let Some(version) = detail.round.published else {
        if let Some(recorded) = validated {
            return turned_down(source, spec, key, round, recorded);
        }
        let why = format!("round {round} gave no model ({})", detail.round.state);
        return Err(ReplayError::Nothing(why));
    };
    let model = models::model(connection, ModelVersion(version))?;
    let plan = evidence::plan(connection, round)?;
    // A store of before there were records has none, and no leaf of them.
    let Held { chain, leaves, head } =
        held_to_the_log(connection, key, round, Some(model.digest), plan.is_some())?;
    let Some(plan) = plan else {
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
    let (carried, others): (Vec<Record>, Vec<Record>) = evidence::of_round(connection, round)?
        .into_iter()
        .filter(|record| record.decision != Decision::Late)
        .partition(|record| record.decision == Decision::Carried);
    let by_site = |records: Vec<Record>| -> BTreeMap<String, Record> {
        records
            .into_iter()
            .map(|record| (record.site.clone(), record))
            .collect()
    };
    let (carried, records) = (by_site(carried), by_site(others));
    let mut earned = BTreeMap::new();
    for (site, record) in &records {
        let node = NodeId::new(site.clone()).map_err(|_| differs(site, "name"))?;
        earned.insert(node, record.before);
    }
    let none = &mut BTreeMap::new();
    let inputs = RoundInputs::load(source, round, plan.clone(), &earned, none, Which::Carried)?;
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
    let fewer = |site: &NodeId, found: Option<Behind>| {
        let record = records
            .get(site.as_str())
            .filter(|record| record.behind.is_some());
        let written = record.or_else(|| carried.get(site.as_str()));
        written.and_then(|record| record.behind) > found
    };
    let stored = inputs.stored.iter().zip(&inputs.seen);
    let mut rows = stored
        .map(|(site, seen)| (&site.node, seen.behind))
        .chain(inputs.carried.iter().map(|row| (&row.node, Some(row.behind))));
    if rows.any(|(site, found)| fewer(site, found)) {
        let why = format!("round {round} {RELEASES_DELETED}");
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
    let result = inputs.run(spec, None)?;
    if model.digest != result.candidate.digest {
        return Err(ReplayError::Model {
            version,
            expected: model.digest,
            found: result.candidate.digest,
        });
    }
    // The record's digest may be right and the bytes that edges are sent another.
    match models::model_payload(connection, source.blobs, ModelVersion(version)) {
        Ok(_) | Err(StoreError::Gone { .. }) => {}
        Err(other) => return Err(other.into()),
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
    let again = concluded_again(connection, round, &plan, result.account, (&records, &carried))?;
    let of = |decision| {
        if decision == Decision::Carried {
            &carried
        } else {
            &records
        }
    };
    for record in &again {
        let written = of(record.decision)
            .get(&record.site)
            .ok_or_else(|| differs(&record.site, "existence"))?;
        if let Some(what) = difference(written, record) {
            return Err(differs(&record.site, what));
        }
    }
    for written in records.values().chain(carried.values()) {
        let is_again = |record: &Record| {
            let both = [record.decision, written.decision];
            let alike = both.iter().all(|of| *of == Decision::Carried) || !both.contains(&Decision::Carried);
            record.site == written.site && alike
        };
        if !again.iter().any(is_again) {
            return Err(differs(&written.site, "existence"));
        }
    }
    let validation = validated
        .map(|recorded| decided_again(&recorded, model.digest, true))
        .transpose()?;
    Ok(Replayed {
        round: round.0,
        model_version: Some(version),
        model_digest: model.digest.to_string(),
        combined,
        left_out,
        records: records.len() + carried.len(),
        chain,
        leaves,
        signed_head: head,
        validation,
    })
}

/// Why a round with earlier releases cannot be done again.
const RELEASES_DELETED: &str = "added releases of earlier rounds, of which some were deleted after their time in rounds.moments_keep, rounds.moments_age and limits.rounds_kept";

/// What a round's place in chain and log was held against.
struct Held {
    chain: u64,
    leaves: u64,
    head: Option<u64>,
}

/// Reads chain and log as they are at one moment: beside a server that ends rounds, one table would else be read before an end and the next one after it.
fn held_to_the_log(
    connection: &rusqlite::Connection,
    key: &LogPublicKey,
    round: Round,
    model: Option<Digest>,
    recorded: bool,
) -> Result<Held, ReplayError> {
    let begun = connection
        .is_autocommit()
        .then(|| connection.unchecked_transaction());
    let _snapshot = begun.transpose().map_err(StoreError::from)?;
    let chain = evidence::check_chain(connection, round)??;
    let Checked { leaves, head, .. } = heads::check(connection, key, round, model, recorded)??;
    Ok(Held { chain, leaves, head })
}

/// A round that ended without a model because of its validators: its candidate from the stored updates, and the decision from their recorded words.
fn turned_down(
    source: RowSource<'_>,
    spec: &ModelSpec,
    key: &LogPublicKey,
    round: Round,
    recorded: Recorded,
) -> Result<Replayed, ReplayError> {
    let connection = source.connection;
    let Held { chain, leaves, head } = held_to_the_log(connection, key, round, None, true)?;
    let plan = recorded.plan.clone();
    if plan.rule_version != RULE_VERSION {
        let found = plan.rule_version;
        return Err(ReplayError::OtherProgram {
            round: round.0,
            found,
        });
    }
    if plan.central_noise {
        let why = format!("the candidate of round {round} holds noise of the centre, which is kept nowhere");
        return Err(ReplayError::Nothing(why));
    }
    let records = evidence::of_round(connection, round)?;
    let mut earned = BTreeMap::new();
    for record in &records {
        let node = NodeId::new(record.site.clone()).map_err(|_| differs(&record.site, "name"))?;
        earned.insert(node, record.before);
    }
    let none = &mut BTreeMap::new();
    // A round that publishes nothing takes no late update in, so those that it tried still wait.
    let which = Which::Tried(&recorded.validation.behind);
    let inputs = RoundInputs::load(source, round, plan, &earned, none, which)?;
    let rows = inputs.stored.iter().map(|row| &row.node);
    if !rows.eq(&recorded.validation.rows) {
        let why = format!(
            "round {round} tried late updates of sites of which one is not active any more, or others have come since"
        );
        return Err(ReplayError::Nothing(why));
    }
    let stored = inputs.stored.iter().zip(&inputs.seen);
    let stored = stored.map(|(row, seen)| (&row.node, seen.behind));
    let carried = inputs.carried.iter().map(|row| (&row.node, Some(row.behind)));
    let found: BTreeMap<&NodeId, Option<Behind>> = stored.chain(carried).collect();
    let is_short = |tried: &Tried| found.get(&tried.site).copied().flatten() < Some(tried.behind);
    if recorded.validation.behind.iter().any(is_short) {
        let why = format!("round {round} {RELEASES_DELETED}");
        return Err(ReplayError::Pruned(why));
    }
    let result = inputs.run(spec, None)?;
    let measured = result.account.rows.len();
    let counted = |row: &&crate::evidence::RowAccount| row.decision == Decision::Combined;
    let combined = result.account.rows.iter().filter(counted).count();
    let digest = result.candidate.digest;
    let validation = decided_again(&recorded, digest, false)?;
    Ok(Replayed {
        round: round.0,
        model_version: None,
        model_digest: digest.to_string(),
        combined,
        left_out: measured - combined,
        records: records.len(),
        chain,
        leaves,
        signed_head: head,
        validation: Some(validation),
    })
}

/// Holds a validation to the candidate that the replay gives, to its leaf, and to the decision that its words come to; in words.
fn decided_again(recorded: &Recorded, candidate: Digest, published: bool) -> Result<String, ReplayError> {
    let Recorded {
        validation, audited, ..
    } = recorded;
    let wrong = |what: String| ReplayError::Validation { what };
    if validation.candidate != candidate.to_string() {
        let of = &validation.candidate;
        return Err(wrong(format!(
            "are about model {of}, the round gives {candidate}"
        )));
    }
    if !audited {
        return Err(wrong("are not those of the audit log".into()));
    }
    let again = validation.decided_again();
    if again != validation.decision || again.publishes() != published {
        let (again, said) = (again.word(), validation.decision.word());
        let end = if published {
            "was published"
        } else {
            "was not published"
        };
        return Err(wrong(format!(
            "come to `{again}`, the record says `{said}`, and the model {end}"
        )));
    }
    Ok(validation.words())
}

/// The records of the round, concluded again from its account, from who else was asked, and from what each site had earned by the record before.
fn concluded_again(
    connection: &rusqlite::Connection,
    round: Round,
    plan: &RoundPlan,
    account: RoundAccount,
    (records, carried): (&BTreeMap<String, Record>, &BTreeMap<String, Record>),
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
    for (site, record) in carried {
        let node = NodeId::new(site.clone()).map_err(|_| differs(site, "name"))?;
        earned.entry(node).or_insert(record.before);
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
        let is_carried = record.decision == Decision::Carried;
        let written = if is_carried { carried } else { records };
        if let Some(written) = written.get(&record.site) {
            record.previous.clone_from(&written.previous);
            if outsider && !is_carried {
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
        (written.behind == again.behind, "number of releases in its mean"),
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
