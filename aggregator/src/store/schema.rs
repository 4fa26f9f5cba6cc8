//! Tables, and how an older file becomes a current one.

use rusqlite::Connection;

use super::StoreError;

/// `PRAGMA application_id` of an aggregator's store: `ThAg` in ASCII.
pub const APPLICATION_ID: i32 = 0x5468_4167;

/// Migrations in order; the file's `user_version` is the number that have run. **A shipped one is never edited.**
const MIGRATIONS: [&str; 6] = [
    r"
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

-- Sites and what the registry says of them. The authority on who may speak is this table, not the certificate.
CREATE TABLE site (
    node             TEXT PRIMARY KEY,
    state            TEXT NOT NULL CHECK (state IN ('active', 'suspended', 'revoked')),
    key_fingerprint  BLOB NOT NULL CHECK (length(key_fingerprint) = 32),
    enrolled_unix_ms INTEGER NOT NULL,
    -- Ledger head that was counter-signed last; it may never go backwards.
    ledger_head      BLOB NOT NULL CHECK (length(ledger_head) = 32),
    ledger_records   INTEGER NOT NULL CHECK (ledger_records >= 0),
    epsilon          REAL,
    delta            REAL,
    accepted         INTEGER NOT NULL DEFAULT 0,
    last_verdict     TEXT
) STRICT;

CREATE TABLE refusal (
    node  TEXT NOT NULL REFERENCES site (node),
    code  TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (node, code)
) STRICT, WITHOUT ROWID;

-- A token is kept as a hash; it is spent by the transaction that records its certificate.
CREATE TABLE token (
    id              BLOB PRIMARY KEY CHECK (length(id) = 8),
    secret_hash     BLOB NOT NULL CHECK (length(secret_hash) = 32),
    node            TEXT NOT NULL,
    created_unix_ms INTEGER NOT NULL,
    expires_unix_ms INTEGER NOT NULL,
    spent_unix_ms   INTEGER,
    key_fingerprint BLOB CHECK (length(key_fingerprint) = 32),
    certificate     BLOB,
    CHECK ((spent_unix_ms IS NULL) = (certificate IS NULL)),
    CHECK ((spent_unix_ms IS NULL) = (key_fingerprint IS NULL))
) STRICT;

CREATE TABLE certificate (
    fingerprint      BLOB PRIMARY KEY CHECK (length(fingerprint) = 32),
    node             TEXT NOT NULL REFERENCES site (node),
    key_fingerprint  BLOB NOT NULL,
    not_after_unix_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE model (
    version          INTEGER PRIMARY KEY,
    round            INTEGER NOT NULL,
    layout_digest    BLOB NOT NULL CHECK (length(layout_digest) = 32),
    count            INTEGER NOT NULL,
    digest           BLOB NOT NULL CHECK (length(digest) = 32),
    rule             TEXT NOT NULL,
    contributors     INTEGER NOT NULL,
    rolled_back_to   INTEGER REFERENCES model (version),
    released_unix_ms INTEGER NOT NULL,
    -- 'row': in payload; 'blob': a file named by digest; 'gone': deleted after the retention.
    place            TEXT NOT NULL CHECK (place IN ('row', 'blob', 'gone')),
    payload          BLOB,
    CHECK ((place = 'row') = (payload IS NOT NULL))
) STRICT;

CREATE TABLE round (
    round            INTEGER PRIMARY KEY CHECK (round > 0),
    state            TEXT NOT NULL CHECK (state IN ('open', 'published', 'aborted')),
    nonce            BLOB NOT NULL CHECK (length(nonce) = 8),
    base_version     INTEGER NOT NULL REFERENCES model (version),
    base_digest      BLOB NOT NULL,
    terms            TEXT NOT NULL,
    terms_digest     BLOB NOT NULL CHECK (length(terms_digest) = 32),
    rule             TEXT NOT NULL,
    byzantine        INTEGER NOT NULL,
    quorum           INTEGER NOT NULL,
    opened_unix_ms   INTEGER NOT NULL,
    deadline_unix_ms INTEGER NOT NULL,
    closed_unix_ms   INTEGER,
    abort_reason     TEXT,
    refused          INTEGER NOT NULL DEFAULT 0,
    model_version    INTEGER REFERENCES model (version)
) STRICT;
CREATE UNIQUE INDEX one_open_round ON round (state) WHERE state = 'open';

CREATE TABLE cohort (
    round    INTEGER NOT NULL REFERENCES round (round),
    node     TEXT NOT NULL,
    declined TEXT,
    PRIMARY KEY (round, node)
) STRICT, WITHOUT ROWID;
CREATE INDEX declines ON cohort (node, declined) WHERE declined IS NOT NULL;

CREATE TABLE upload (
    round          INTEGER NOT NULL REFERENCES round (round),
    node           TEXT NOT NULL REFERENCES site (node),
    payload_digest BLOB NOT NULL CHECK (length(payload_digest) = 32),
    bytes          INTEGER NOT NULL,
    scale          REAL,
    header         TEXT NOT NULL,
    ledger_head    BLOB NOT NULL CHECK (length(ledger_head) = 32),
    leaf_index     INTEGER NOT NULL,
    stored_unix_ms INTEGER NOT NULL,
    norm           REAL NOT NULL,
    distance       REAL,
    trimmed_share  REAL,
    place          TEXT NOT NULL CHECK (place IN ('row', 'blob', 'gone')),
    payload        BLOB,
    UNIQUE (round, node),
    CHECK ((place = 'row') = (payload IS NOT NULL))
) STRICT;

CREATE TABLE audit_leaf (
    idx  INTEGER PRIMARY KEY CHECK (idx >= 0),
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    line TEXT NOT NULL
) STRICT;
",
    // Why a site's update was refused for good in this round; NULL: it was not.
    // Keys that were revoked, for ever, whichever key the site has now.
    "ALTER TABLE cohort ADD COLUMN refused TEXT;
     CREATE TABLE revoked_key (
         fingerprint BLOB PRIMARY KEY CHECK (length(fingerprint) = 32),
         node        TEXT NOT NULL REFERENCES site (node)
     ) STRICT, WITHOUT ROWID;
     INSERT OR IGNORE INTO revoked_key (fingerprint, node)
         SELECT key_fingerprint, node FROM site WHERE state = 'revoked';",
    // Why every site counted as it did, chained by hash; what each has earned; what a round was combined with; the memory of
    // a server optimiser after each model.
    "CREATE TABLE decision (
         seq      INTEGER PRIMARY KEY CHECK (seq > 0),
         round    INTEGER NOT NULL,
         node     TEXT NOT NULL,
         decision TEXT NOT NULL,
         record   TEXT NOT NULL,
         hash     BLOB NOT NULL CHECK (length(hash) = 32),
         UNIQUE (round, node, decision)
     ) STRICT;
     CREATE INDEX decisions_of_site ON decision (node, seq);
     CREATE TABLE reputation (
         node       TEXT PRIMARY KEY,
         reputation TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE round_plan (
         round      INTEGER PRIMARY KEY REFERENCES round (round),
         plan       TEXT NOT NULL,
         first_seq  INTEGER NOT NULL,
         last_seq   INTEGER NOT NULL,
         leaf_index INTEGER NOT NULL
     ) STRICT;
     CREATE TABLE optimizer_state (
         version INTEGER PRIMARY KEY REFERENCES model (version),
         digest  BLOB NOT NULL CHECK (length(digest) = 32),
         place   TEXT NOT NULL CHECK (place IN ('row', 'blob', 'gone')),
         payload BLOB,
         CHECK ((place = 'row') = (payload IS NOT NULL))
     ) STRICT;",
    // Updates that came after their round's end, and the round that they were taken into. What was found in a refused update.
    "CREATE TABLE late_upload (
         round          INTEGER NOT NULL REFERENCES round (round),
         node           TEXT NOT NULL REFERENCES site (node),
         payload_digest BLOB NOT NULL CHECK (length(payload_digest) = 32),
         scale          REAL,
         header         TEXT NOT NULL,
         ledger_head    BLOB NOT NULL CHECK (length(ledger_head) = 32),
         leaf_index     INTEGER NOT NULL,
         stored_unix_ms INTEGER NOT NULL,
         norm           REAL NOT NULL,
         carried_into   INTEGER REFERENCES round (round),
         place          TEXT NOT NULL CHECK (place IN ('row', 'blob', 'gone')),
         payload        BLOB,
         PRIMARY KEY (round, node),
         CHECK ((place = 'row') = (payload IS NOT NULL))
     ) STRICT, WITHOUT ROWID;
     ALTER TABLE cohort ADD COLUMN refused_detail TEXT;
     CREATE INDEX late_carried ON late_upload (carried_into) WHERE carried_into IS NOT NULL;",
    // Releases of moments that count in later rounds as well, each once; dropped ones stay until no round that may be done again needs them.
    // Ledgers that a site's name had under earlier keys; whether an operator has said that the present one may begin anew.
    "CREATE TABLE kept_release (
         node           TEXT NOT NULL REFERENCES site (node),
         round          INTEGER NOT NULL REFERENCES round (round),
         late           INTEGER NOT NULL CHECK (late IN (0, 1)),
         into_round     INTEGER NOT NULL REFERENCES round (round),
         terms_digest   BLOB NOT NULL CHECK (length(terms_digest) = 32),
         payload_digest BLOB NOT NULL CHECK (length(payload_digest) = 32),
         blocks_min     INTEGER NOT NULL,
         blocks_max     INTEGER NOT NULL,
         opened_unix_ms INTEGER NOT NULL,
         dropped_round  INTEGER,
         dropped_for    TEXT,
         PRIMARY KEY (node, round),
         UNIQUE (node, payload_digest),
         CHECK ((dropped_round IS NULL) = (dropped_for IS NULL))
     ) STRICT, WITHOUT ROWID;
     CREATE INDEX kept_by_terms ON kept_release (terms_digest, into_round);
     CREATE TABLE former_ledger (
         node            TEXT NOT NULL REFERENCES site (node),
         key_fingerprint BLOB NOT NULL CHECK (length(key_fingerprint) = 32),
         began_unix_ms   INTEGER NOT NULL,
         ended_unix_ms   INTEGER NOT NULL,
         ledger_head     BLOB NOT NULL CHECK (length(ledger_head) = 32),
         ledger_records  INTEGER NOT NULL CHECK (ledger_records > 0),
         epsilon         REAL,
         delta           REAL
     ) STRICT;
     CREATE INDEX former_ledgers_of_site ON former_ledger (node, ended_unix_ms);
     ALTER TABLE site ADD COLUMN ledger_allowed INTEGER NOT NULL DEFAULT 1;
     -- First round whose releases of the site may count in later ones: those before were dropped.
     ALTER TABLE site ADD COLUMN kept_from INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE token ADD COLUMN new_ledger INTEGER NOT NULL DEFAULT 0;",
    // What validators said of a round's candidate, with what it was combined with. Signed heads of the audit log, as they were at the ends of rounds.
    "CREATE TABLE validation (
         round      INTEGER PRIMARY KEY REFERENCES round (round),
         record     TEXT NOT NULL,
         plan       TEXT NOT NULL,
         leaf_index INTEGER NOT NULL
     ) STRICT;
     CREATE TABLE audit_head (
         size INTEGER PRIMARY KEY CHECK (size > 0),
         root BLOB NOT NULL CHECK (length(root) = 32),
         note TEXT NOT NULL
     ) STRICT;",
];

/// Newest version of the tables that this build knows.
#[expect(clippy::cast_possible_wrap, reason = "a handful")]
pub const VERSION: i64 = MIGRATIONS.len() as i64;

/// Sets what every connection needs. `synchronous = FULL`: a commit that returned is on the disk.
pub(super) fn prepare(connection: &Connection) -> Result<(), StoreError> {
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.execute_batch(
        "PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 1000;
         PRAGMA journal_size_limit = 8388608; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -512;",
    )?;
    Ok(())
}

/// Brings the file to [`VERSION`]. An empty file becomes a new store.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let pragma = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (application, version) = (pragma("application_id")?, pragma("user_version")?);
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
    if application != i64::from(APPLICATION_ID) && (application != 0 || tables != 0) {
        return Err(StoreError::NotAStore { found: application });
    }
    if !(0..=VERSION).contains(&version) {
        return Err(StoreError::Version {
            found: version,
            newest: VERSION,
        });
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    for (number, migration) in (1_i64..).zip(MIGRATIONS).filter(|(number, _)| *number > version) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", number)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.commit()?;
    }
    Ok(())
}
