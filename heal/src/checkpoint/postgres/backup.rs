//! The backup: what it will need, and receiving it.

use std::path::Path;
use std::time::Duration;

use super::PostgresSource;
use super::workload::{Template, is_shape};
use crate::postgres::PostgresError;
use crate::postgres::owner::Owner;
use crate::postgres::session::Session;
use crate::postgres::tool::Tool;

/// What the server was asked before the backup.
#[derive(Debug)]
pub(super) struct Plan {
    /// Bytes of all databases and of the WAL kept, with a tenth for what is written meanwhile.
    pub(super) bytes: u64,
    /// Statement shapes from its statistics, the most frequent first.
    pub(super) shapes: Vec<Template>,
    /// The role that made the cluster.
    pub(super) superuser: String,
}

pub(super) async fn plan(source: &PostgresSource, owner: Owner) -> Result<Plan, PostgresError> {
    let session = Session::open(&source.target, Some(owner), ASK_MAX).await?;
    let rows = session.rows("size and version", SIZE, &[]).await?;
    let row = rows.first().ok_or_else(|| refused("the server gave no answer"))?;
    let number = |at: usize| row.try_get::<_, i64>(at).ok();
    let bytes = number(0).and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0);
    let version = number(1).unwrap_or(0) / 10_000;
    let tablespaces = number(2).unwrap_or(0);
    let superuser: String = row
        .try_get(3)
        .unwrap_or_else(|_missing| source.target.user.clone());
    if version != i64::from(source.binaries.major()) {
        let ours = source.binaries.major();
        let dir = source.binaries.dir().display();
        return Err(refused(&format!(
            "the server is version {version} and the programs in {dir} are {ours}: name those of version {version} in THERIAC_PG_BIN"
        )));
    }
    if tablespaces > 0 {
        return Err(refused(&format!(
            "the server has {tablespaces} tablespaces of its own, which lie outside its data directory: they cannot be restored by a swap of it"
        )));
    }
    let shapes = if source.shadow.sample_statements {
        sample(&session).await
    } else {
        Vec::new()
    };
    Ok(Plan {
        bytes: bytes.saturating_add(bytes / 10),
        shapes,
        superuser,
    })
}

/// The server's own statistics, where it keeps them; only shapes, never values.
async fn sample(session: &Session) -> Vec<Template> {
    let place = session.rows("where statistics are", WHERE, &[]).await;
    let schema: Option<String> = place.ok().and_then(|rows| rows.first()?.try_get(0).ok());
    let Some(schema) = schema else { return Vec::new() };
    // Not what is asked of the statistics themselves, as here: the shadow does not load that library, and would refuse it.
    let query = format!(
        "select query, calls from {schema}.pg_stat_statements where dbid = (select oid from pg_database where datname = \
         current_database()) and query not like '%pg_stat_statements%' order by calls desc limit 100"
    );
    match session.rows("statement shapes", &query, &[]).await {
        Ok(rows) => rows
            .iter()
            .filter_map(|row| {
                let sql: String = row.try_get(0).ok()?;
                let calls: i64 = row.try_get(1).ok()?;
                is_shape(&sql).then(|| Template {
                    sql,
                    weight: u32::try_from(calls).unwrap_or(u32::MAX).max(1),
                })
            })
            .take(SHAPES_MAX)
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "no statement shapes");
            Vec::new()
        }
    }
}

/// `pg_basebackup` with the WAL that the copy needs, through a slot that ends with it.
pub(super) async fn receive(source: &PostgresSource, owner: Owner, to: &Path) -> Result<(), PostgresError> {
    let target = &source.target;
    let mut arguments: Vec<std::ffi::OsString> = vec![
        "--pgdata".into(),
        to.into(),
        "--format=plain".into(),
        "--wal-method=stream".into(),
        "--checkpoint=fast".into(),
        // The work directory is thrown away; what is kept is synced by the store.
        "--no-sync".into(),
        "--no-password".into(),
        "--no-estimate-size".into(),
        "--label=theriac checkpoint".into(),
        "--host".into(),
        (&target.socket_dir).into(),
        format!("--port={}", target.port).into(),
        format!("--username={}", target.user).into(),
    ];
    if let Some(rate) = source.max_rate_kib {
        arguments.push(format!("--max-rate={rate}k").into());
    }
    Tool {
        program: source.binaries.tool("pg_basebackup"),
        arguments,
        owner: Some(owner),
        background: Some(source.background.clone()),
        timeout: source.backup_timeout,
    }
    .succeed()
    .await
    .map(drop)
}

fn refused(detail: &str) -> PostgresError {
    PostgresError::Query {
        what: "before the backup".to_owned(),
        detail: detail.to_owned(),
        code: None,
    }
}

const SIZE: &str = "select (select coalesce(sum(pg_database_size(oid)), 0)::int8 from pg_database) \
     + (select setting::int8 << 20 from pg_settings where name = 'min_wal_size'), \
     current_setting('server_version_num')::int8, \
     (select count(*) from pg_tablespace where spcname not in ('pg_default', 'pg_global')), \
     (select rolname::text from pg_roles where oid = 10)";
const WHERE: &str = "select quote_ident(n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace \
     where e.extname = 'pg_stat_statements'";
const ASK_MAX: Duration = Duration::from_secs(10);
/// Shapes kept.
const SHAPES_MAX: usize = 32;
