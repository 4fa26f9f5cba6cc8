//! What is asked of a running shadow: invariants, structure, a full read, simulated requests, invariants again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::PostgresSource;
use super::server::Shadow;
use super::workload::{self, NotSent, Statements, Template};
use crate::checkpoint::verdict::{Check, Finding, ShadowRun};
use crate::postgres::PostgresError;
use crate::postgres::session::Session;
use crate::postgres::tool::Tool;

/// All checks, in the order of their cost; the first bad finding ends them.
pub(super) async fn all(source: &PostgresSource, shadow: &Shadow, sampled: &[Template], run: &mut ShadowRun) {
    let begun = Instant::now();
    let before = invariants(source, shadow).await;
    if before != Finding::Pass {
        run.push(Check::new("invariants", before), begun);
        return;
    }
    let begun = Instant::now();
    let found = structure(source, shadow).await;
    run.push(found, begun);
    if run.finding() != Finding::Pass {
        return;
    }
    let begun = Instant::now();
    let found = heap_read(source, shadow).await;
    run.push(found, begun);
    if run.finding() != Finding::Pass {
        return;
    }
    let begun = Instant::now();
    let found = requests(source, shadow, sampled).await;
    run.push(found, begun);
    if run.finding() != Finding::Pass {
        return;
    }
    let begun = Instant::now();
    let after = match invariants(source, shadow).await {
        Finding::Invalid(why) => Finding::Invalid(format!("after the requests: {why}")),
        other => other,
    };
    let detail = format!(
        "{} files, before and after the requests",
        source.shadow.invariants.len()
    );
    run.push(Check::new("invariants", after).detail(detail), begun);
}

/// Every B-tree against its table, every table's pages and tuples, in every database.
async fn structure(source: &PostgresSource, shadow: &Shadow) -> Check {
    let target = &shadow.target;
    let tool = Tool {
        program: source.binaries.tool("pg_amcheck"),
        arguments: vec![
            "--all".into(),
            "--install-missing".into(),
            "--heapallindexed".into(),
            "--jobs=2".into(),
            "--no-password".into(),
            "--host".into(),
            (&target.socket_dir).into(),
            format!("--port={}", target.port).into(),
            format!("--username={}", target.user).into(),
            format!("--maintenance-db={}", target.database).into(),
        ],
        owner: Some(shadow.owner),
        background: Some(source.background.clone()),
        timeout: source.shadow.timeout,
    };
    let finding = match tool.run().await {
        Ok(ended) if ended.code == Some(0) => Finding::Pass,
        Ok(ended) if NOT_INSTALLED.iter().any(|words| ended.said.contains(words)) => {
            Finding::Unknown(format!("the amcheck extension is not there: {}", ended.said))
        }
        Ok(ended) => Finding::Invalid(format!("{} {}", ended.said, shadow.log_tail())),
        Err(error) => Finding::Unknown(error.to_string()),
    };
    Check::new("structure", finding)
}

/// Reads every column of every row, since no index check and no page check decodes them; then counts the rows by an index, since a
/// table that was cut at a page's end looks whole from the table's side.
async fn heap_read(source: &PostgresSource, shadow: &Shadow) -> Check {
    let mut tables = 0_usize;
    let mut bytes = 0_i64;
    let finding = read_databases(source, shadow, &mut tables, &mut bytes).await;
    let finding = match finding {
        Ok(finding) => finding,
        Err(error) => judge(&error, &shadow.log_tail()),
    };
    Check::new("heap read", finding).detail(format!("{tables} tables, {bytes} bytes"))
}

async fn read_databases(
    source: &PostgresSource,
    shadow: &Shadow,
    tables: &mut usize,
    bytes: &mut i64,
) -> Result<Finding, PostgresError> {
    let limit = source.shadow.timeout;
    let session = Session::open(&shadow.target, Some(shadow.owner), limit).await?;
    let databases = session.rows("the databases", DATABASES, &[]).await?;
    drop(session);
    for row in databases {
        let name: String = row.try_get(0).map_err(|error| odd(&error))?;
        let session = Session::open(&shadow.target.database(&name), Some(shadow.owner), limit).await?;
        let mut counted = Vec::new();
        for row in session.rows("the tables", TABLES, &[]).await? {
            let table: String = row.try_get(0).map_err(|error| odd(&error))?;
            let size: i64 = row.try_get(1).map_err(|error| odd(&error))?;
            let read = format!("copy (select * from only {table}) to '/dev/null'");
            let rows = session
                .count(&format!("reading {table} of {name}"), &read)
                .await?;
            *tables += 1;
            *bytes += size;
            counted.push((table, rows));
        }
        session
            .execute(
                "by the index",
                "set enable_seqscan = off; set enable_bitmapscan = off",
            )
            .await?;
        for (table, rows) in counted {
            let what = format!("counting {table} of {name} by an index");
            let query = format!("select count(*) from only {table}");
            let found = session.rows(&what, &query, &[]).await?;
            let found: i64 = found
                .first()
                .map_or(Ok(0), |row| row.try_get(0))
                .map_err(|error| odd(&error))?;
            if u64::try_from(found) != Ok(rows) {
                let words = format!("{table} of {name} has {rows} rows, and {found} by its index");
                return Ok(Finding::Invalid(words));
            }
        }
    }
    Ok(Finding::Pass)
}

/// The first query file that does not hold. The queries may only read.
async fn invariants(source: &PostgresSource, shadow: &Shadow) -> Finding {
    if source.shadow.invariants.is_empty() {
        return Finding::Pass;
    }
    let session = match Session::open(&shadow.target, Some(shadow.owner), source.shadow.timeout).await {
        Ok(session) => session,
        Err(error) => return judge(&error, &shadow.log_tail()),
    };
    if let Err(error) = session
        .execute("read only", "set default_transaction_read_only = on")
        .await
    {
        return judge(&error, &shadow.log_tail());
    }
    for path in &source.shadow.invariants {
        let finding = invariant(&session, path).await;
        if finding != Finding::Pass {
            return finding;
        }
    }
    Finding::Pass
}

async fn invariant(session: &Session, path: &Path) -> Finding {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let read = PathBuf::from(path);
    let sql = match tokio::fs::read_to_string(&read).await {
        Ok(sql) => sql,
        Err(error) => return Finding::Unknown(format!("{}: {error}", path.display())),
    };
    let rows = match session.rows(&name, sql.trim().trim_end_matches(';'), &[]).await {
        Ok(rows) => rows,
        Err(error) => return judge(&error, ""),
    };
    if rows.is_empty() {
        return Finding::Invalid(format!("{name} gave no row"));
    }
    for (at, row) in rows.iter().enumerate() {
        match row.try_get::<_, Option<bool>>(0) {
            Ok(Some(true)) => {}
            Ok(_) => return Finding::Invalid(format!("{name} does not hold in row {}", at + 1)),
            Err(error) => {
                return Finding::Unknown(format!("{name}: the first column is no boolean: {error}"));
            }
        }
    }
    Finding::Pass
}

async fn requests(source: &PostgresSource, shadow: &Shadow, sampled: &[Template]) -> Check {
    let begun = Instant::now();
    let spec = &source.shadow;
    let session = match Session::open(&shadow.target, Some(shadow.owner), REQUEST_MAX).await {
        Ok(session) => session,
        Err(error) => return Check::new("workload", judge(&error, &shadow.log_tail())),
    };
    // They do whatever the database's own users had them do, also to other hosts: where the shadow is not kept apart only what somebody wrote down for
    // it is sent.
    let (sampled, held_back) = if shadow.apart {
        (sampled, 0)
    } else {
        (&[][..], sampled.len())
    };
    let statements = Statements {
        configured: &spec.templates,
        sampled,
    };
    let answers = match workload::send(&session, statements, spec.requests, spec.timeout).await {
        Ok(answers) => answers,
        Err(why) => return Check::new("workload", not_sent(&why, &shadow.log_tail())),
    };
    let finding = match spec.criteria.judge(&answers) {
        Ok(()) => Finding::Pass,
        Err(why) => Finding::Invalid(format!("{why} {}", shadow.log_tail()).trim().to_owned()),
    };
    let held_back = if held_back > 0 {
        format!("; {held_back} sampled statements were left out, since the shadow is not kept apart")
    } else {
        String::new()
    };
    let words = format!("{} in {:?}{held_back}", answers.words(), begun.elapsed());
    Check::new("workload", finding).detail(words)
}

/// A mistyped statement says nothing of the copy, and neither does one whose table is not in it yet: but it was not proved as somebody wanted it to be.
fn not_sent(why: &NotSent, log: &str) -> Finding {
    match why {
        NotSent::Refused(error) => judge(error, log),
        NotSent::NoValue(at, kind) => Finding::Unknown(format!(
            "statement {at}: no value can be made up for a parameter of type {kind}"
        )),
        NotSent::Late(at) => Finding::Unknown(format!("statement {at} was not sent: the time was over")),
    }
}

/// Whether an error says something of the copy: what the server calls corrupt or internal, values that cannot be decoded, and a
/// server that went away. A time limit or a missing right does not.
fn judge(error: &PostgresError, log: &str) -> Finding {
    let words = format!("{error} {log}").trim().to_owned();
    let code = match error {
        PostgresError::Query { code, .. } | PostgresError::Connect { code, .. } => code.as_deref(),
        _ => return Finding::Unknown(words),
    };
    match code {
        None => Finding::Invalid(words),
        Some(code) if BAD.iter().any(|class| code.starts_with(class)) => Finding::Invalid(words),
        Some(_) => Finding::Unknown(words),
    }
}

fn odd(error: &tokio_postgres::Error) -> PostgresError {
    crate::postgres::session::failed("an answer of another kind", error)
}

const DATABASES: &str =
    "select datname::text from pg_database where datallowconn and datname <> 'template0' order by 1";
const TABLES: &str = "select format('%I.%I', n.nspname, c.relname), pg_table_size(c.oid)::int8 from pg_class c \
     join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'm') and c.relpersistence = 'p' \
     and c.relispopulated order by 1";
/// Classes of the server's codes that speak of the data: internal and corrupted, data exceptions, operator intervention by a crash.
const BAD: [&str; 4] = ["XX", "22", "57P02", "58"];
const NOT_INSTALLED: [&str; 2] = ["is not available", "could not open extension control file"];
/// Longest time for one simulated request.
const REQUEST_MAX: Duration = Duration::from_secs(30);
