//! What validators said of candidates: one row a round that had any, with what the candidate was combined with, and a leaf of the audit log.

use rusqlite::{Connection, OptionalExtension as _};
use theriac_audit::leaf::{AuditEvent, AuditRecord, ValidatorAnswer};
use theriac_protocol::units::Round;

use super::evidence::RoundPlan;
use super::{StoreError, Work, from_sql, to_sql};
use crate::validation::Validation;

/// Records a validation with its leaf, in the transaction that ends the round.
///
/// # Errors
/// [`StoreError::Database`]: one a round. [`StoreError::Full`].
pub fn record(work: &Work<'_>, validation: &Validation, plan: &RoundPlan) -> Result<(), StoreError> {
    let leaf = work.audit(event(validation))?;
    let text =
        |value: serde_json::Result<String>| value.map_err(|error| StoreError::Conflict(error.to_string()));
    let (record, plan) = (
        text(serde_json::to_string(validation))?,
        text(serde_json::to_string(plan))?,
    );
    work.connection()
        .prepare_cached("INSERT INTO validation (round, record, plan, leaf_index) VALUES (?1, ?2, ?3, ?4)")?
        .execute((to_sql(validation.round), record, plan, to_sql(leaf)))?;
    Ok(())
}

/// The event that is written beside a record.
fn event(validation: &Validation) -> AuditEvent {
    AuditEvent::CandidateValidated {
        round: Round(validation.round),
        digest: validation.candidate.parse().unwrap_or_default(),
        published: validation.decision.publishes(),
        decision: validation.decision.word().to_owned(),
        answers: validation
            .answers
            .iter()
            .map(|answer| ValidatorAnswer {
                node: answer.site.clone(),
                opinion: answer.opinion.word().to_owned(),
                ratio_permille: answer.ratio_permille,
            })
            .collect(),
    }
}

/// A validation as it is on record.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// What was said and decided.
    pub validation: Validation,
    /// With what the candidate was combined.
    pub plan: RoundPlan,
    /// Its leaf in the audit log.
    pub leaf_index: u64,
    /// Whether that leaf says the same.
    pub audited: bool,
}

/// The validation of a round's candidate; `None`: it had none, or its record is deleted.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub fn of_round(connection: &Connection, round: Round) -> Result<Option<Recorded>, StoreError> {
    let found: Option<(String, String, i64, Option<String>)> = connection
        .prepare_cached(
            "SELECT record, plan, leaf_index, line FROM validation LEFT JOIN audit_leaf ON idx = leaf_index WHERE round = ?1",
        )?
        .query_row([to_sql(round.0)], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .optional()?;
    let Some((record, plan, leaf, line)) = found else {
        return Ok(None);
    };
    let corrupt = |error: serde_json::Error| StoreError::Corrupt {
        row: format!("validation of round {round}"),
        reason: error.to_string(),
    };
    let validation: Validation = serde_json::from_str(&record).map_err(corrupt)?;
    let said = line.and_then(|line| AuditRecord::parse(&line).ok());
    Ok(Some(Recorded {
        audited: said.is_some_and(|said| said.event == event(&validation)),
        plan: serde_json::from_str(&plan).map_err(corrupt)?,
        leaf_index: from_sql(leaf),
        validation,
    }))
}

/// The newest validation.
///
/// # Errors
/// As [`of_round`].
pub fn newest(connection: &Connection) -> Result<Option<Validation>, StoreError> {
    let round: Option<i64> =
        connection.query_row("SELECT max(round) FROM validation", [], |row| row.get(0))?;
    let recorded = round
        .map(|round| of_round(connection, Round(from_sql(round))))
        .transpose()?;
    Ok(recorded.flatten().map(|recorded| recorded.validation))
}

/// Deletes the records of rounds at or before `last`; the leaves stay.
///
/// # Errors
/// [`StoreError::Database`].
pub fn forget(work: &Work<'_>, last: Round) -> Result<(), StoreError> {
    work.connection()
        .prepare_cached("DELETE FROM validation WHERE round <= ?1")?
        .execute([to_sql(last.0)])?;
    Ok(())
}
