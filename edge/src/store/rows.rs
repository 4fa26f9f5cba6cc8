//! Rows and what they stand for, for the writer and the reader alike.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use theriac_heal::incident::MachineState;
use theriac_heal::types::Incident;
use theriac_privacy::ledger::KnownHead;
use theriac_protocol::units::Round;

use super::OutboxRow;

/// Closed incidents kept.
const INCIDENTS_KEPT: u32 = 10_000;

pub(super) fn save_incident(connection: &mut Connection, incident: &Incident) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute(
        "INSERT OR REPLACE INTO incident (id, service, state, detected_ms, body) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            signed(incident.id.0),
            incident.service,
            incident.state.to_string(),
            signed(incident.detected.unix_ms),
            to_json(incident)?
        ],
    )?;
    transaction.execute(
        "DELETE FROM incident WHERE id <= (SELECT max(id) FROM incident) - ?1 AND state IN ('healed', 'recovered')",
        [INCIDENTS_KEPT],
    )?;
    transaction.commit()
}

pub(super) fn save_machine(connection: &Connection, machine: &MachineState) -> rusqlite::Result<()> {
    connection
        .execute(
            "INSERT OR REPLACE INTO machine (id, body) VALUES (1, ?1)",
            [to_json(machine)?],
        )
        .map(drop)
}

pub(super) fn incidents(connection: &Connection, limit: u32) -> rusqlite::Result<Vec<Incident>> {
    let mut found: Vec<Incident> = connection
        .prepare_cached("SELECT body FROM incident ORDER BY id DESC LIMIT ?1")?
        .query_map([limit], |row| json_column(row, 0))?
        .collect::<Result<_, _>>()?;
    found.reverse();
    Ok(found)
}

pub(super) fn known_ledger(connection: &Connection) -> rusqlite::Result<Option<KnownHead>> {
    connection
        .query_row("SELECT head, records FROM ledger WHERE id = 1", [], |row| {
            let head: String = row.get(0)?;
            Ok(KnownHead {
                head: head.parse().map_err(|error| conversion(0, error))?,
                records: unsigned(row.get(1)?),
            })
        })
        .optional()
}

pub(super) fn outbox_row(row: &Row<'_>) -> rusqlite::Result<OutboxRow> {
    let nonce: String = row.get(1)?;
    let digest: String = row.get(2)?;
    let body: Vec<u8> = row.get(3)?;
    Ok(OutboxRow {
        round: Round(unsigned(row.get(0)?)),
        nonce: u64::from_str_radix(&nonce, 16).map_err(|error| conversion(1, error))?,
        payload_digest: digest.parse().map_err(|error| conversion(2, error))?,
        body: Bytes::from(body),
    })
}

pub(super) fn json_column<T: serde::de::DeserializeOwned>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| conversion(column, error))
}

fn conversion(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
}

fn to_json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// SQLite's integers are signed; our counters never come near the sign.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}
