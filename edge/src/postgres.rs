//! `[service.checkpoint]`: how a service's state becomes a checkpoint, and the supervised PostgreSQL server.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::background::Background;
use theriac_heal::checkpoint::kind::Source;
use theriac_heal::checkpoint::postgres::workload::{Criteria, Template};
use theriac_heal::checkpoint::postgres::{PostgresSource, ShadowSpec};
use theriac_heal::checkpoint::redis::{Address, RedisSource};
use theriac_heal::checkpoint::sqlite::SqliteSource;
use theriac_heal::executor::postgres::{Patience, PostgresHands, SessionPolicy};
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
    /// data directory of a PostgreSQL server; it is asked for a backup, and a second server proves it. `"redis"`: the working
    /// directory of a Redis server without append-only file; it is asked for a snapshot, and a second server proves it. `"sqlite"`: a
    /// directory with SQLite databases, which are copied while they are in use, and read whole.
    pub kind: CheckpointKind,
    /// Where a Redis server listens: `unix:/PATH` or `HOST:PORT`, default `127.0.0.1:6379`.
    pub address: String,
    /// File with its password. Default none.
    pub password_file: Option<PathBuf>,
    /// Whether a row of a SQLite database that refers to none makes a copy bad. Default `true`; `false` for databases that never
    /// enforced it.
    pub foreign_keys: bool,
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
    /// How far backup and shadow stand back for the services, 0 (not at all) to 19, default 10.
    pub nice: u8,
    /// How long they run on time that nobody else wants, where control groups can be made; then with the weight of one service.
    /// Default `8s`, 0 s to 24 h. Too short costs the services' latency on a busy host; too long comes too late before a failure.
    #[serde(with = "settings::duration")]
    pub patience: Duration,
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

/// `[service.sessions]`: when sessions of a PostgreSQL server are in trouble, and which may be touched for it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SessionSettings {
    /// Time between two looks at the server's sessions. Default `2s`, 200 ms to 10 min. Each opens one session of the superuser.
    #[serde(with = "settings::duration")]
    pub look_every: Duration,
    /// So many sessions behind one are a pile-up. Default 3, 1 to 10 000.
    pub waiting_min: u32,
    /// When one of them has waited for so long. Default `5s`, 0 s to 1 h. Too short: honest waiting costs somebody a transaction.
    #[serde(with = "settings::duration")]
    pub waited_min: Duration,
    /// A session that has been idle for so long may be ended for its slot. Default `1m`, 0 s to 24 h.
    #[serde(with = "settings::duration")]
    pub idle_min: Duration,
    /// Fewer free slots for clients are too few. Default 5, 1 to 1 000; at most a quarter of all of them.
    pub free_min: u32,
    /// Slots that are to be free afterwards. Default 10, `free_min` to 10 000.
    pub free_after: u32,
    /// Most sessions ended at once. Default 20, 1 to 1 000.
    pub ended_max: u32,
    /// Roles and applications that are never touched. Superusers and replication never are.
    pub spare: BTreeSet<String>,
}

impl Default for SessionSettings {
    fn default() -> Self {
        let policy = SessionPolicy::default();
        Self {
            look_every: Duration::from_secs(2),
            waiting_min: 3,
            waited_min: Duration::from_secs(policy.waited_seconds_min),
            idle_min: Duration::from_secs(policy.idle_seconds_min),
            free_min: policy.free_min,
            free_after: policy.free_after,
            ended_max: policy.ended_max,
            spare: BTreeSet::new(),
        }
    }
}

impl SessionSettings {
    /// The first value out of range: its key and what is wrong.
    pub(crate) fn wrong(&self, checkpoint: Option<&CheckpointSettings>) -> Option<(&'static str, String)> {
        let server = checkpoint.is_some_and(|checkpoint| checkpoint.kind == CheckpointKind::Postgresql);
        let hour = Duration::from_hours(1);
        let checks: [(bool, &'static str, &str); 8] = [
            (
                server,
                "sessions",
                "is for checkpoint.kind = \"postgresql\": name the server there",
            ),
            (
                (Duration::from_millis(200)..=hour / 6).contains(&self.look_every),
                "sessions.look_every",
                "is outside 200ms to 10m",
            ),
            (
                (1..=10_000).contains(&self.waiting_min),
                "sessions.waiting_min",
                "is outside 1 to 10000",
            ),
            (self.waited_min <= hour, "sessions.waited_min", "is above 1h"),
            (self.idle_min <= 24 * hour, "sessions.idle_min", "is above 24h"),
            (
                (1..=1_000).contains(&self.free_min),
                "sessions.free_min",
                "is outside 1 to 1000",
            ),
            (
                (self.free_min..=10_000).contains(&self.free_after),
                "sessions.free_after",
                "is outside free_min to 10000",
            ),
            (
                (1..=1_000).contains(&self.ended_max),
                "sessions.ended_max",
                "is outside 1 to 1000",
            ),
        ];
        checks
            .into_iter()
            .find(|(good, _, _)| !good)
            .map(|(_, key, words)| (key, words.to_owned()))
    }
}

/// How far what is done with a service's checkpoints stands back for the host's services.
pub(crate) fn standing_back(config: &ServiceConfig) -> Background {
    let settings = config.checkpoint.clone().unwrap_or_default();
    Background::new(i32::from(settings.nice), Some(settings.patience))
}

/// The hands on a server's sessions, and how often they look; `None` for a service that is no PostgreSQL server.
pub(crate) fn session_hands(config: &ServiceConfig) -> Option<(PostgresHands, Duration)> {
    let checkpoint = config.checkpoint.as_ref().filter(|_| is_postgres(config))?;
    let state = config.state.as_ref()?;
    let settings = config.sessions.clone().unwrap_or_default();
    let hands = PostgresHands {
        target: target(checkpoint, &state.dir),
        owner: Owner::of(&state.dir).ok(),
        policy: SessionPolicy {
            waiting_min: settings.waiting_min as usize,
            waited_seconds_min: settings.waited_min.as_secs(),
            idle_seconds_min: settings.idle_min.as_secs(),
            free_min: settings.free_min,
            free_after: settings.free_after,
            ended_max: settings.ended_max,
            spare: settings.spare,
        },
        patience: Patience::default(),
    };
    Some((hands, settings.look_every))
}

/// The server, as its superuser.
fn target(settings: &CheckpointSettings, data_dir: &Path) -> Target {
    let user = settings
        .user
        .clone()
        .or_else(|| Owner::of(data_dir).ok()?.name())
        .unwrap_or_else(|| "postgres".to_owned());
    Target {
        socket_dir: settings.socket_dir.clone(),
        port: settings.port,
        user,
        database: settings.database.clone(),
    }
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
    /// By the server's own snapshot.
    Redis,
    /// By SQLite's online backup.
    Sqlite,
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
            patience: Duration::from_secs(8),
            address: "127.0.0.1:6379".to_owned(),
            password_file: None,
            foreign_keys: true,
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
        if self.kind == CheckpointKind::Redis
            && let Err(words) = self.address.parse::<Address>()
        {
            return Some(("checkpoint.address", words));
        }
        let checks: [(bool, &'static str, &str); 12] = [
            (self.patience <= 24 * hour, "checkpoint.patience", "is above 24h"),
            (
                state.is_some(),
                "checkpoint",
                "there is no [service.state]: name its dir",
            ),
            (
                self.kind == CheckpointKind::Directory || state.is_none_or(|state| state.check.is_empty()),
                "state.check",
                "is for kind = \"directory\"; other copies are proved by reading them: use checkpoint.invariants",
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

/// Whether its checkpoints count only with the proof of a shadow run.
pub(crate) fn needs_proof(config: &ServiceConfig) -> bool {
    config
        .checkpoint
        .as_ref()
        .is_some_and(|checkpoint| checkpoint.kind != CheckpointKind::Directory)
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
    let directory = || Source::Directory {
        dir: state.dir.clone(),
        check: state_check(state),
    };
    let Some(settings) = &config.checkpoint else {
        return Ok(directory());
    };
    let work_dir = work_dir(settings, state, for_command);
    let background = standing_back(config);
    Ok(match settings.kind {
        CheckpointKind::Directory => directory(),
        CheckpointKind::Postgresql => {
            Source::Postgres(Box::new(postgres(settings, state, work_dir, background)?))
        }
        CheckpointKind::Redis => Source::Redis(Box::new(RedisSource {
            dir: state.dir.clone(),
            work_dir,
            // Checked with the configuration.
            address: settings
                .address
                .parse()
                .unwrap_or_else(|_checked| Address::Tcp(settings.address.clone())),
            password_file: settings.password_file.clone(),
            timeout: settings.timeout,
            free_bytes_min: FREE_MIN,
            background,
            memory_bytes: settings.memory_bytes,
            cpu_cores: settings.cpu_cores,
            invariants: settings.invariants.clone(),
        })),
        CheckpointKind::Sqlite => Source::Sqlite(Box::new(SqliteSource {
            dir: state.dir.clone(),
            work_dir,
            timeout: settings.timeout,
            free_bytes_min: FREE_MIN,
            background,
            foreign_keys: settings.foreign_keys,
            invariants: settings.invariants.clone(),
        })),
    })
}

/// Beside the state, apart for a command that works beside a running edge.
fn work_dir(settings: &CheckpointSettings, state: &StateSettings, for_command: bool) -> PathBuf {
    let with = |path: &Path, suffix: &str| {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(suffix);
        path.with_file_name(name)
    };
    let dir = settings
        .work_dir
        .clone()
        .unwrap_or_else(|| with(&state.dir, ".shadow"));
    if for_command { with(&dir, "-verify") } else { dir }
}

fn postgres(
    settings: &CheckpointSettings,
    state: &StateSettings,
    work_dir: PathBuf,
    background: Background,
) -> Result<PostgresSource, PostgresError> {
    Ok(PostgresSource {
        binaries: PgBinaries::find_here()?,
        data_dir: state.dir.clone(),
        work_dir,
        target: target(settings, &state.dir),
        max_rate_kib: settings.max_rate_kib,
        backup_timeout: settings.timeout,
        background,
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
    fn sessions_are_of_a_server_and_their_values_in_range() {
        let state = "[service.state]\ndir = \"/d\"";
        let with = |sessions: &str| {
            load(
                &format!("kind = \"postgresql\"\n[service.sessions]\n{sessions}"),
                state,
            )
        };
        let good = with("look_every = \"1s\"\nspare = [\"batch\"]").unwrap();
        assert!(good.services[0].healing.session_actions);
        let silent = load("kind = \"postgresql\"", state).unwrap();
        assert!(
            session_hands(&silent.services[0]).is_some() && !silent.services[0].healing.session_actions,
            "looked at, and not touched"
        );
        let (hands, every) = session_hands(&good.services[0]).unwrap();
        assert_eq!(every, Duration::from_secs(1));
        assert!(hands.policy.spare.contains("batch") && hands.policy.waited_seconds_min == 5);
        assert!(session_hands(&load("", state).unwrap().services[0]).is_none());
        for (sessions, word) in [
            ("look_every = \"10ms\"", "sessions.look_every"),
            ("waiting_min = 0", "sessions.waiting_min"),
            ("free_min = 20\nfree_after = 10", "sessions.free_after"),
            ("spared = []", "spared"),
        ] {
            let error = with(sessions).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let error = load("[service.sessions]", state).unwrap_err();
        assert!(error.contains("checkpoint.kind"), "{error}");
    }

    #[test]
    fn a_server_needs_its_data_directory_and_values_in_range() {
        let state = "[service.state]\ndir = \"/d\"";
        let good = load("kind = \"postgresql\"\nsocket_dir = \"/run/pg\"", state).unwrap();
        assert!(is_postgres(&good.services[0]));
        assert!(!is_postgres(&load("", state).unwrap().services[0]));
        for kind in ["redis", "sqlite"] {
            let other = load(&format!("kind = \"{kind}\""), state).unwrap();
            assert!(needs_proof(&other.services[0]) && !is_postgres(&other.services[0]));
        }
        for (checkpoint, state, word) in [
            ("kind = \"postgresql\"", "", "service.state"),
            ("kind = \"oracle\"", state, "oracle"),
            ("kind = \"postgresql\"\nnice = 20", state, "checkpoint.nice"),
            (
                "kind = \"redis\"\naddress = \"6379\"",
                state,
                "checkpoint.address",
            ),
            (
                "kind = \"sqlite\"\npatience = \"2days\"",
                state,
                "checkpoint.patience",
            ),
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
