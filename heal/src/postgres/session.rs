//! A session over the server's Unix socket.
//!
//! `tokio-postgres` rather than `psql`: preparing a statement tells the types of its parameters, which simulated requests need; each
//! statement is timed by itself; and a healer on the last reserved slot must not depend on starting a process. The socket is opened
//! by a thread that has become the server's account, because `peer` asks who connected; that thread ends at once.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

use super::PostgresError;
use super::owner::Owner;

/// Which server and database, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Directory of the server's Unix socket.
    pub socket_dir: PathBuf,
    /// Its port, which is part of the socket's name.
    pub port: u16,
    /// The role.
    pub user: String,
    /// The database.
    pub database: String,
}

impl Target {
    /// The socket file.
    pub fn socket(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// The same server, another database.
    #[must_use]
    pub fn database(&self, name: &str) -> Self {
        Self {
            database: name.to_owned(),
            ..self.clone()
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (database {}, role {})",
            self.socket().display(),
            self.database,
            self.user
        )
    }
}

/// A session; it ends when this is dropped.
#[derive(Debug)]
pub struct Session {
    client: Client,
    driver: JoinHandle<()>,
}

impl Session {
    /// Opens a session as `owner`. No statement of it may take longer than `statement_timeout`.
    ///
    /// # Errors
    /// [`PostgresError::Connect`] with the server's code, [`PostgresError::Timeout`].
    pub async fn open(
        target: &Target,
        owner: Option<Owner>,
        statement_timeout: Duration,
    ) -> Result<Self, PostgresError> {
        let begun = timeout(OPEN_MAX, Self::connect(target, owner)).await;
        let session = begun.map_err(|_late| PostgresError::Timeout {
            what: format!("connecting to {target}"),
            after: OPEN_MAX,
        })??;
        let set = format!(
            "set statement_timeout = {}; set lock_timeout = {0}; set search_path to default",
            statement_timeout.as_millis().max(1)
        );
        session.execute("the session's settings", &set).await?;
        Ok(session)
    }

    async fn connect(target: &Target, owner: Option<Owner>) -> Result<Self, PostgresError> {
        let refused = |detail: String, code: Option<String>| PostgresError::Connect {
            target: target.to_string(),
            detail,
            code,
        };
        let stream = match owner.filter(|owner| owner.is_other()) {
            Some(owner) => connect_as(owner, &target.socket()).await,
            None => UnixStream::connect(target.socket()).await,
        };
        let stream = stream.map_err(|error| refused(error.to_string(), None))?;
        let (client, connection) = tokio_postgres::Config::new()
            .user(&target.user)
            .dbname(&target.database)
            .application_name(APPLICATION)
            .connect_raw(stream, NoTls)
            .await
            .map_err(|error| refused(words(&error), code(&error)))?;
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "session ended");
            }
        });
        Ok(Self { client, driver })
    }

    /// The client, for queries.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Statements without result.
    ///
    /// # Errors
    /// [`PostgresError::Query`].
    pub async fn execute(&self, what: &str, sql: &str) -> Result<(), PostgresError> {
        self.client
            .batch_execute(sql)
            .await
            .map_err(|error| failed(what, &error))
    }

    /// A statement that says how many rows it met.
    ///
    /// # Errors
    /// [`PostgresError::Query`].
    pub async fn count(&self, what: &str, sql: &str) -> Result<u64, PostgresError> {
        self.client
            .execute(sql, &[])
            .await
            .map_err(|error| failed(what, &error))
    }

    /// Rows.
    ///
    /// # Errors
    /// [`PostgresError::Query`].
    pub async fn rows(
        &self,
        what: &str,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, PostgresError> {
        self.client
            .query(sql, parameters)
            .await
            .map_err(|error| failed(what, &error))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A failed statement as our error.
pub(crate) fn failed(what: &str, error: &tokio_postgres::Error) -> PostgresError {
    PostgresError::Query {
        what: what.to_owned(),
        detail: words(error),
        code: code(error),
    }
}

pub(crate) fn code(error: &tokio_postgres::Error) -> Option<String> {
    error.code().map(|state| state.code().to_owned())
}

fn words(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        // Severity and message only: details may quote values of rows.
        Some(said) => format!("{}: {}", said.severity(), said.message()),
        None => error.to_string(),
    }
}

/// Connects on a thread that has become `owner`: on Linux that changes the thread alone, and `peer` sees who connected.
async fn connect_as(owner: Owner, socket: &Path) -> std::io::Result<UnixStream> {
    let (send, receive) = oneshot::channel();
    let socket = socket.to_owned();
    std::thread::Builder::new()
        .name("postgres-connect".to_owned())
        .spawn(move || {
            let connect = || {
                let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
                set_thread_groups(&[gid])?;
                set_thread_res_gid(gid, gid, gid)?;
                set_thread_res_uid(uid, uid, uid)?;
                let stream = StdUnixStream::connect(&socket)?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            };
            if send.send(connect()).is_err() {
                tracing::trace!("nobody waits for this connection any more");
            }
        })?;
    let connected: std::io::Result<StdUnixStream> = receive
        .await
        .unwrap_or_else(|_gone| Err(std::io::Error::other("the connecting thread ended")));
    UnixStream::from_std(connected?)
}

/// What the server's statistics call our sessions.
pub const APPLICATION: &str = "theriac";
const OPEN_MAX: Duration = Duration::from_secs(5);
