//! `[service.checkpoint]`: how a service's state becomes a checkpoint, and the supervised PostgreSQL server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::checkpoint::kind::Source;
use theriac_heal::checkpoint::postgres::workload::{Criteria, Template};
use theriac_heal::checkpoint::postgres::{PostgresSource, ShadowSpec};
use theriac_heal::executor::process::{Polite, ServiceSpec};
use theriac_heal::postgres::PostgresError;
use theriac_heal::postgres::binaries::PgBinaries;
use theriac_heal::postgres::owner::Owner;
use theriac_heal::postgres::session::Target;

use crate::config::{ServiceConfig, StateSettings};
use crate::service::state_check;
use crate::storage::FREE_MIN;

/// `[service.checkpoint]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSettings {
    /// `"directory"` (default): the state directory is copied and `state.check` judges the copy. `"postgresql"`: `state.dir` is the
    /// data directory of a PostgreSQL server; it is asked for a backup, and a second server proves it.
    pub kind: CheckpointKind,
    /// Directory of the server's Unix socket, default `/var/run/postgresql`.
    pub socket_dir: PathBuf,
    /// The server's port, part of the socket's name. Default 5432.
    pub port: u16,
    /// A superuser's role that `pg_hba.conf` lets in over the socket by `peer` or `trust`. Default: the name of the data directory's
    /// owner.
    pub user: Option<String>,
    /// The database in which requests and invariants run. Default `postgres`; structure and rows are checked in all.
    pub database: String,
    /// Where the backup is received and proved; removed afterwards. Default: `state.dir` with `.shadow` at its end. Needs room for
    /// one copy.
    pub work_dir: Option<PathBuf>,
    /// Most KiB a second that the backup reads, 32 to 1 048 576. Default: as fast as it goes. Lower spares the service and takes
    /// longer.
    pub max_rate_kib: Option<u32>,
    /// How far backup and shadow stand back for the service, 0 to 19, default 10.
    pub nice: u8,
    /// Longest time for the backup, and again for its proof. Default `10m`, 1 s to 24 h.
    #[serde(with = "settings::duration")]
    pub timeout: Duration,
    /// Memory limit of the shadow in bytes where control groups are there, 128 MiB or more, default 512 MiB.
    pub memory_bytes: u64,
    /// Its processor limit in cores, likewise, 0.1 to 64, default 1.
    pub cpu_cores: f64,
    /// SQL files of one query each, true in the first column of every row and at least one row. Default none: what the data mean is
    /// then not checked.
    pub invariants: Vec<PathBuf>,
    /// Statements with `$1`, `$2` … that are sent to the shadow with made-up values, beside those below. Default none.
    pub statements: Vec<String>,
    /// Whether shapes of the most frequent statements are taken from `pg_stat_statements`, where it is there. Never a literal.
    /// Default `true`.
    pub sample_statements: bool,
    /// Requests sent, 0 to 100 000, default 200.
    pub requests: u32,
    /// Largest 99th percentile of their time, default `1s`, 1 ms to 10 min.
    #[serde(with = "settings::duration")]
    pub max_p99: Duration,
    /// Largest share of them that may fail, 0 to 1, default 0. Refusals of a made-up value by a constraint are no failures.
    pub max_error: f64,
    /// `shared_preload_libraries` that recovery needs. Default none.
    pub preload: String,
}

/// How a state is copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// File by file.
    #[default]
    Directory,
    /// By the server's own backup.
    Postgresql,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self {
            kind: CheckpointKind::Directory,
            socket_dir: "/var/run/postgresql".into(),
            port: 5432,
            user: None,
            database: "postgres".to_owned(),
            work_dir: None,
            max_rate_kib: None,
            nice: 10,
            timeout: Duration::from_mins(10),
            memory_bytes: 512 << 20,
            cpu_cores: 1.0,
            invariants: Vec::new(),
            statements: Vec::new(),
            sample_statements: true,
            requests: 200,
            max_p99: Duration::from_secs(1),
            max_error: 0.0,
            preload: String::new(),
        }
    }
}

impl CheckpointSettings {
    /// The first value out of range: its key and what is wrong.
    pub(crate) fn wrong(&self, state: Option<&StateSettings>) -> Option<(&'static str, String)> {
        let within = |duration: Duration, low: Duration, high: Duration| (low..=high).contains(&duration);
        let hour = Duration::from_hours(1);
        let checks: [(bool, &'static str, &str); 11] = [
            (
                state.is_some(),
                "checkpoint",
                "there is no [service.state]: name its dir",
            ),
            (
                self.kind == CheckpointKind::Directory || state.is_none_or(|state| state.check.is_empty()),
                "state.check",
                "is for kind = \"directory\"; a PostgreSQL copy is proved by its shadow: use checkpoint.invariants",
            ),
            (self.port != 0, "checkpoint.port", "0 is no port"),
            (
                self.max_rate_kib
                    .is_none_or(|rate| (32..=1_048_576).contains(&rate)),
                "checkpoint.max_rate_kib",
                "is outside 32 to 1048576",
            ),
            (self.nice <= 19, "checkpoint.nice", "is outside 0 to 19"),
            (
                within(self.timeout, Duration::from_secs(1), 24 * hour),
                "checkpoint.timeout",
                "is outside 1s to 24h",
            ),
            (
                self.memory_bytes >= 128 << 20,
                "checkpoint.memory_bytes",
                "is below 128 MiB",
            ),
            (
                (0.1..=64.0).contains(&self.cpu_cores),
                "checkpoint.cpu_cores",
                "is outside 0.1 to 64",
            ),
            (self.requests <= 100_000, "checkpoint.requests", "is above 100000"),
            (
                within(self.max_p99, Duration::from_millis(1), hour / 6),
                "checkpoint.max_p99",
                "is outside 1ms to 10m",
            ),
            (
                (0.0..=1.0).contains(&self.max_error),
                "checkpoint.max_error",
                "is outside 0 to 1",
            ),
        ];
        checks
            .into_iter()
            .find(|(good, _, _)| !good)
            .map(|(_, key, words)| (key, words.to_owned()))
    }
}

/// Whether a service is a PostgreSQL server to us.
pub(crate) fn is_postgres(config: &ServiceConfig) -> bool {
    config
        .checkpoint
        .as_ref()
        .is_some_and(|checkpoint| checkpoint.kind == CheckpointKind::Postgresql)
}

/// How checkpoints of a service's state are taken. `for_command` works beside a running edge.
///
/// # Errors
/// [`PostgresError`] when the server's programs or its account are missing.
pub(crate) fn source(
    config: &ServiceConfig,
    state: &StateSettings,
    for_command: bool,
) -> Result<Source, PostgresError> {
    match config.checkpoint.as_ref().filter(|_| is_postgres(config)) {
        Some(settings) => Ok(Source::Postgres(Box::new(postgres(
            settings,
            state,
            for_command,
        )?))),
        None => Ok(Source::Directory {
            dir: state.dir.clone(),
            check: state_check(state),
        }),
    }
}

fn postgres(
    settings: &CheckpointSettings,
    state: &StateSettings,
    for_command: bool,
) -> Result<PostgresSource, PostgresError> {
    let beside = |suffix: &str| {
        let mut name = state.dir.file_name().unwrap_or_default().to_owned();
        name.push(suffix);
        state.dir.with_file_name(name)
    };
    let mut work_dir = settings.work_dir.clone().unwrap_or_else(|| beside(".shadow"));
    if for_command {
        let mut name = work_dir.file_name().unwrap_or_default().to_owned();
        name.push("-verify");
        work_dir = work_dir.with_file_name(name);
    }
    let user = settings
        .user
        .clone()
        .or_else(|| Owner::of(&state.dir).ok()?.name())
        .unwrap_or_else(|| "postgres".to_owned());
    Ok(PostgresSource {
        binaries: PgBinaries::find_here()?,
        data_dir: state.dir.clone(),
        work_dir,
        target: Target {
            socket_dir: settings.socket_dir.clone(),
            port: settings.port,
            user,
            database: settings.database.clone(),
        },
        max_rate_kib: settings.max_rate_kib,
        backup_timeout: settings.timeout,
        nice: i32::from(settings.nice),
        free_bytes_min: FREE_MIN,
        shadow: ShadowSpec {
            timeout: settings.timeout,
            memory_bytes: settings.memory_bytes,
            cpu_cores: settings.cpu_cores,
            preload: settings.preload.clone(),
            invariants: settings.invariants.clone(),
            templates: settings
                .statements
                .iter()
                .map(|sql| Template {
                    sql: sql.clone(),
                    weight: 1,
                })
                .collect(),
            sample_statements: settings.sample_statements,
            requests: settings.requests,
            criteria: Criteria {
                max_p99: settings.max_p99,
                max_error: settings.max_error,
            },
        },
    })
}

/// What starting and stopping a PostgreSQL server needs: its account where we are root, its fast shutdown, and that none of its
/// processes is left before the next start.
pub(crate) fn supervise(spec: &mut ServiceSpec, data_dir: &Path) {
    match Owner::of(data_dir) {
        Ok(owner) => spec.run_as = Some(owner),
        Err(error) => tracing::warn!(service = spec.name, %error, "started as this process's own account"),
    }
    spec.polite = Polite::Interrupt;
    spec.works_in = Some(data_dir.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{EdgeConfig, EdgeSettings};

    fn load(checkpoint: &str, state: &str) -> Result<EdgeConfig, String> {
        let text = format!(
            "state_dir = \"/s\"\n[[service]]\nname = \"pg\"\nargv = [\"postgres\", \"-D\", \"/d\"]\n{state}\n[service.checkpoint]\n{checkpoint}"
        );
        let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
        EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_needs_its_data_directory_and_values_in_range() {
        let state = "[service.state]\ndir = \"/d\"";
        let good = load("kind = \"postgresql\"\nsocket_dir = \"/run/pg\"", state).unwrap();
        assert!(is_postgres(&good.services[0]));
        assert!(!is_postgres(&load("", state).unwrap().services[0]));
        for (checkpoint, state, word) in [
            ("kind = \"postgresql\"", "", "service.state"),
            ("kind = \"oracle\"", state, "oracle"),
            ("kind = \"postgresql\"\nnice = 20", state, "checkpoint.nice"),
            (
                "kind = \"postgresql\"\nmax_error = 1.5",
                state,
                "checkpoint.max_error",
            ),
            ("kind = \"postgresql\"\ntimout = \"1s\"", state, "timout"),
            (
                "kind = \"postgresql\"",
                "[service.state]\ndir = \"/d\"\ncheck = [\"x\"]",
                "state.check",
            ),
        ] {
            let error = load(checkpoint, state).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
