//! Hands on a running PostgreSQL server that need no restart: end the root of a lock pile-up, make room for connections, cancel a
//! statement, reload the settings.
//!
//! | action | precondition | effect | undo | verified by |
//! |---|---|---|---|---|
//! | [`PostgresHands::relieve_locks`] | enough sessions wait, for long enough, behind one | its statement is cancelled, or its session is ended | none: its transaction is rolled back, as at a crash of its client | those sessions wait no more |
//! | [`PostgresHands::relieve_connections`] | fewer ordinary slots are free than asked for | sessions idle for long enough are ended, the longest first | none: their clients connect again | the free slots |
//! | [`PostgresHands::reload`] | a file of settings is newer than the last load, and none has an error | the files of settings are read again | the former file, reloaded | the server's own word on its files |
//!
//! The session that does this is a superuser's, so one of the slots that the server keeps back lets it in when all others are taken.
//! A session is named by its process id *and* its start, so that a number that has come to mean another one is not hit; and it is touched
//! only while it is at what it was seen at ([`Still`]): whoever was idle and has begun to work meanwhile is left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::{sleep, timeout};

use crate::incident::{PileUp, SessionsSeen};
use crate::postgres::PostgresError;
use crate::postgres::owner::Owner;
use crate::postgres::session::{Session, Target};
use crate::types::{RootWaits, SessionId};

/// What may be done to sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SessionPolicy {
    /// Sessions that must wait behind one before that one is touched.
    pub waiting_min: usize,
    /// How long one of them must have waited, seconds.
    pub waited_seconds_min: u64,
    /// How long a session must have been idle before it is ended for its slot, seconds.
    pub idle_seconds_min: u64,
    /// Fewer free ordinary slots than this are too few; at most a quarter of all of them, so that a small server is not always short.
    pub free_min: u32,
    /// Ordinary slots that are to be free afterwards, at least `free_min`: more, so that the next client does not bring it back.
    pub free_after: u32,
    /// Most sessions ended for their slots at once.
    pub ended_max: u32,
    /// Roles and applications whose sessions are never touched. Superusers and replication never are.
    pub spare: BTreeSet<String>,
}

impl Default for SessionPolicy {
    fn default() -> Self {
        Self {
            waiting_min: 3,
            waited_seconds_min: 5,
            idle_seconds_min: 60,
            free_min: 5,
            free_after: 10,
            ended_max: 20,
            spare: BTreeSet::new(),
        }
    }
}

/// One session of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SessionRef {
    /// Its process id.
    pub pid: i32,
    /// Its start, as the server writes it.
    pub started: String,
    /// Its role.
    pub role: String,
    /// Its application.
    pub application: String,
    /// `active`, `idle`, `idle in transaction` …
    pub state: String,
    /// Whether it is a client's, and neither a superuser's nor replication.
    pub ordinary: bool,
    /// Whole seconds since its state changed.
    pub seconds: u64,
    /// Whole seconds that it has waited for the lock that it waits for now; 0 when it waits for none. Before PostgreSQL 14, which does
    /// not tell, since its state changed: its statement may have worked for some of that.
    pub waited: u64,
    /// What it waits for where that is no lock.
    pub waits: RootWaits,
    /// When its state changed, as the server writes it.
    pub changed: String,
    /// When its transaction began; empty outside one.
    pub transaction: String,
    /// When its latest statement began.
    pub statement: String,
    /// The sessions that it waits for; 0 is a prepared transaction.
    pub waits_for: Vec<i32>,
}

impl SessionRef {
    /// Which session it is.
    pub fn id(&self) -> SessionId {
        let birth = digest(&[&self.started]);
        SessionId { pid: self.pid, birth }
    }
}

/// The first eight bytes of the SHA-256 of texts, each ended.
fn digest(texts: &[&str]) -> u64 {
    let mut whole = Sha256::new();
    for text in texts {
        whole.update(text.as_bytes());
        whole.update([0]);
    }
    let digest = whole.finalize();
    digest
        .iter()
        .take(8)
        .fold(0, |bits, byte| bits << 8 | u64::from(*byte))
}

/// How a lock pile-up is ended at its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtRoot {
    /// Its statement is cancelled: its transaction fails and lets go, its session goes on.
    Cancel,
    /// Its session is ended.
    Terminate,
}

/// What a session must still be at to be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Still {
    /// Idle, and since the same moment.
    Idle,
    /// In the same transaction, or still in none.
    InTransaction,
    /// In the same statement of the same transaction.
    InStatement,
}

/// What an action did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Relief {
    /// Sessions whose statement was cancelled.
    pub cancelled: Vec<SessionRef>,
    /// Sessions that were ended.
    pub ended: Vec<SessionRef>,
    /// Whether the server was afterwards as it should be.
    pub relieved: bool,
    /// Whether the one to be touched was left because it commits.
    pub spared: bool,
    /// What was seen, in words.
    pub detail: String,
}

/// The hands on one server.
#[derive(Debug, Clone)]
pub struct PostgresHands {
    /// The server, as a superuser.
    pub target: Target,
    /// Its account; `None` is ours.
    pub owner: Option<Owner>,
    /// What they may do.
    pub policy: SessionPolicy,
    /// How long they wait.
    pub patience: Patience,
}

/// How long the hands wait for the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For the answer to one statement. Default 5 s.
    pub answer: Duration,
    /// For the effect of an action to be seen before it is said that it has none. Default 2 s.
    pub effect: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(5),
            effect: Duration::from_secs(2),
        }
    }
}

impl PostgresHands {
    /// Looks at the sessions over a new one of its own, so that a server which lets nobody in any more is noticed. Within `within`.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn look(&self, within: Duration) -> Result<SessionsSeen, PostgresError> {
        let look = async {
            let session = self.open().await?;
            let found = sessions(&session).await?;
            let slots = slots(&session).await?;
            let mut roots = self.roots(&found);
            // One that waits for the disk or a standby must not hide one that something can be done about.
            let stuck = roots
                .iter()
                .position(|(root, _)| !matches!(root.waits, RootWaits::Commit | RootWaits::Standby));
            let pile_up = (!roots.is_empty()).then(|| roots.swap_remove(stuck.unwrap_or(0)));
            let pile_up = pile_up.map(|(root, behind)| {
                let waited = |pid: &i32| found.iter().find(|of| of.pid == *pid).map(|of| of.waited);
                PileUp {
                    pid: root.pid,
                    birth: root.id().birth,
                    behind: u32::try_from(behind.len()).unwrap_or(u32::MAX),
                    waited_s: behind.iter().filter_map(waited).max().unwrap_or(0),
                    running: root.state == "active",
                    statement: digest(&[&root.transaction, &root.statement]),
                    waits: root.waits,
                    touchable: self.may_touch(&root),
                }
            });
            Ok(SessionsSeen {
                pile_up,
                free: slots.free,
                free_min: self.free_min(slots),
            })
        };
        timeout(within, look)
            .await
            .map_err(|_late| PostgresError::Timeout {
                what: "a look at the sessions".to_owned(),
                after: within,
            })?
    }

    /// Ends a lock pile-up at its root, and only when that is `root` (`None`: whoever it is). Nothing is done while too few wait or not for long enough. One root at a time: who holds the
    /// lock next has waited for it and is not to blame.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn relieve_locks(&self, how: AtRoot, root: Option<SessionId>) -> Result<Relief, PostgresError> {
        let session = self.open().await?;
        let mut relief = Relief {
            cancelled: Vec::new(),
            ended: Vec::new(),
            relieved: true,
            spared: false,
            detail: "no pile-up was left".to_owned(),
        };
        let mut roots = self.roots(&sessions(&session).await?).into_iter();
        let Some(first) = roots.next() else {
            return Ok(relief);
        };
        let asked = |(found, _): &(SessionRef, Vec<i32>)| root.is_none_or(|root| found.id() == root);
        let Some((root, behind)) = std::iter::once(first).chain(roots).find(asked) else {
            relief.relieved = false;
            "the sessions wait behind another one now, which nobody planned to touch"
                .clone_into(&mut relief.detail);
            return Ok(relief);
        };
        relief.detail = format!(
            "{} sessions waited behind process {} (role {}, {}, for {} s)",
            behind.len(),
            root.pid,
            root.role,
            root.state,
            root.seconds
        );
        if !self.may_touch(&root) {
            relief.relieved = false;
            relief.detail.push_str(": it may not be touched");
            return Ok(relief);
        }
        // To cancel what waits for the disk at its commit is harmless: the server does not listen then.
        let left = match (root.waits, how) {
            (RootWaits::Standby, _) => {
                Some(": it commits, and to end its wait would leave a commit that its standby may not have")
            }
            (RootWaits::Commit | RootWaits::Log, AtRoot::Terminate) => {
                Some(": it waits for the disk, and nothing would hasten that")
            }
            _ => None,
        };
        if let Some(left) = left {
            (relief.relieved, relief.spared) = (false, true);
            relief.detail.push_str(left);
            return Ok(relief);
        }
        let (still, done) = match how {
            AtRoot::Cancel if root.state != "active" => {
                relief.relieved = false;
                relief.detail.push_str(": it runs no statement to cancel");
                return Ok(relief);
            }
            AtRoot::Cancel => (Still::InStatement, "its statement was cancelled"),
            AtRoot::Terminate => (Still::InTransaction, "it was ended"),
        };
        let hit = signal(&session, how, &root, still).await?;
        relief.relieved = nobody_waits_for(&session, root.pid, self.patience.effect).await?;
        relief.detail.push_str(match (hit, relief.relieved) {
            (true, true) => "; ",
            (true, false) => "; somebody waits for it still, though ",
            (false, _) => "; it was gone or at something else before ",
        });
        relief.detail.push_str(done);
        if !hit {
            return Ok(relief);
        }
        match how {
            AtRoot::Cancel => relief.cancelled.push(root),
            AtRoot::Terminate => relief.ended.push(root),
        }
        Ok(relief)
    }

    /// The sessions of the server, but this one.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn sessions(&self) -> Result<Vec<SessionRef>, PostgresError> {
        sessions(&self.open().await?).await
    }

    /// Touches one session, if it is still at what it was seen at. Whether it was touched.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn touch(&self, seen: &SessionRef, how: AtRoot, still: Still) -> Result<bool, PostgresError> {
        signal(&self.open().await?, how, seen, still).await
    }

    /// Ends sessions that have been idle for long enough, the longest first, until enough ordinary slots are free. One that has begun
    /// to work since it was seen is left.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn relieve_connections(&self) -> Result<Relief, PostgresError> {
        let session = self.open().await?;
        let slots_before = slots(&session).await?;
        let before = i64::from(slots_before.free);
        let free_min = i64::from(self.free_min(slots_before));
        let after = i64::from(self.policy.free_after.min(slots_before.all)).max(free_min);
        let wanted = if before >= free_min { 0 } else { after - before };
        // What is just short of `idle_min` is waited for: who filled the slots a moment ago is idle long enough in a moment, and until then nobody is let in anyway.
        let least = if before >= free_min { 0 } else { free_min - before };
        let begun = Instant::now();
        let mut idle = loop {
            let (enough, soon) = self.idle_long(sessions(&session).await?);
            let short = i64::try_from(enough.len()).unwrap_or(i64::MAX) < least;
            if !short || soon == 0 || begun.elapsed() >= IDLE_PATIENCE {
                break enough;
            }
            sleep(IDLE_LOOK_EVERY).await;
        };
        idle.sort_by_key(|found| std::cmp::Reverse(found.seconds));
        idle.truncate(usize::try_from(wanted.min(i64::from(self.policy.ended_max))).unwrap_or(0));
        let mut ended = Vec::new();
        for found in idle {
            if signal(&session, AtRoot::Terminate, &found, Still::Idle).await? {
                ended.push(found);
            }
        }
        let begun = Instant::now();
        let enough = before + i64::try_from(ended.len()).unwrap_or(0);
        let mut free = i64::from(slots(&session).await?.free);
        while free < enough && begun.elapsed() < self.patience.effect {
            sleep(LOOK_EVERY).await;
            free = i64::from(slots(&session).await?.free);
        }
        Ok(Relief {
            cancelled: Vec::new(),
            relieved: free >= free_min,
            spared: false,
            detail: format!(
                "{before} slots for clients were free, {} idle sessions were ended, {free} are free",
                ended.len()
            ),
            ended,
        })
    }

    /// Sessions that are idle for long enough to be ended, and how many more will be within [`IDLE_PATIENCE`].
    fn idle_long(&self, found: Vec<SessionRef>) -> (Vec<SessionRef>, usize) {
        let idle = found
            .into_iter()
            .filter(|found| found.state == "idle" && self.may_touch(found));
        let least = self.policy.idle_seconds_min;
        let (long, short): (Vec<_>, Vec<_>) = idle.partition(|found| found.seconds >= least);
        let patience = IDLE_PATIENCE.as_secs();
        let soon = short.iter().filter(|found| found.seconds + patience >= least);
        let soon = soon.count();
        (long, soon)
    }

    /// Has the server read its settings again. Files that it would not take are refused before, and so is a reload that would change
    /// nothing because no file is newer than the last one. What it did, in words.
    ///
    /// # Errors
    /// [`PostgresError::Query`] names the first wrong line.
    pub async fn reload(&self) -> Result<Relief, PostgresError> {
        let session = self.open().await?;
        let wrong = session.rows("the files of settings", WRONG_SETTINGS, &[]).await?;
        if let Some(row) = wrong.first() {
            return Err(PostgresError::Query {
                what: "reload".to_owned(),
                detail: row.try_get(0).unwrap_or_default(),
                code: None,
            });
        }
        let newer = session
            .rows("the age of the settings", NEWER_SETTINGS, &[])
            .await?;
        let newer: Vec<String> = newer.iter().filter_map(|row| row.try_get(0).ok()).collect();
        let relieved = !newer.is_empty();
        if relieved {
            session.execute("reload", "select pg_reload_conf()").await?;
        }
        Ok(Relief {
            cancelled: Vec::new(),
            ended: Vec::new(),
            relieved,
            spared: false,
            detail: if relieved {
                format!("the settings were read again: {} had changed", newer.join(", "))
            } else {
                "no file of settings is newer than what the server runs on, so a reload would change nothing"
                    .to_owned()
            },
        })
    }

    async fn open(&self) -> Result<Session, PostgresError> {
        Session::open(&self.target, self.owner, self.patience.answer).await
    }

    fn free_min(&self, slots: Slots) -> u32 {
        self.policy.free_min.min((slots.all / 4).max(1))
    }

    /// Roots of pile-ups that are large and old enough, with the sessions behind each.
    fn roots(&self, sessions: &[SessionRef]) -> Vec<(SessionRef, Vec<i32>)> {
        let waited = |pid: &i32| {
            sessions
                .iter()
                .any(|found| found.pid == *pid && found.waited >= self.policy.waited_seconds_min)
        };
        roots(sessions)
            .into_iter()
            .filter(|(_, behind)| behind.len() >= self.policy.waiting_min && behind.iter().any(waited))
            .collect()
    }

    fn may_touch(&self, session: &SessionRef) -> bool {
        session.ordinary
            && !self.policy.spare.contains(&session.role)
            && !self.policy.spare.contains(&session.application)
    }
}

/// Waits until no session waits for `pid`; whether that came within `patience`.
async fn nobody_waits_for(session: &Session, pid: i32, patience: Duration) -> Result<bool, PostgresError> {
    let begun = Instant::now();
    loop {
        let seen = sessions(session).await?;
        if !seen.iter().any(|found| found.waits_for.contains(&pid)) {
            return Ok(true);
        }
        if begun.elapsed() >= patience {
            return Ok(false);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Every session that waits for none and that others wait for, directly or through others, with those. The most first, ties by
/// process id. A prepared transaction (0) is a session of no client and is reported as such.
fn roots(sessions: &[SessionRef]) -> Vec<(SessionRef, Vec<i32>)> {
    let by_pid: BTreeMap<i32, &SessionRef> = sessions.iter().map(|found| (found.pid, found)).collect();
    let mut behind: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for waiter in sessions.iter().filter(|found| !found.waits_for.is_empty()) {
        let mut seen = BTreeSet::new();
        let mut open: Vec<i32> = waiter.waits_for.clone();
        while let Some(pid) = open.pop() {
            if !seen.insert(pid) {
                continue;
            }
            match by_pid.get(&pid) {
                Some(found) if !found.waits_for.is_empty() => open.extend(&found.waits_for),
                _ => behind.entry(pid).or_default().push(waiter.pid),
            }
        }
    }
    let mut found: Vec<(SessionRef, Vec<i32>)> = behind
        .into_iter()
        .map(|(pid, waiters)| {
            let root = by_pid
                .get(&pid)
                .map_or_else(|| nobody(pid), |root| (*root).clone());
            (root, waiters)
        })
        .collect();
    found.sort_by_key(|(root, waiters)| (std::cmp::Reverse(waiters.len()), root.pid));
    found
}

fn nobody(pid: i32) -> SessionRef {
    SessionRef {
        pid,
        started: String::new(),
        role: "-".to_owned(),
        application: String::new(),
        state: "prepared transaction".to_owned(),
        ordinary: false,
        seconds: 0,
        waited: 0,
        waits: RootWaits::Nothing,
        changed: String::new(),
        transaction: String::new(),
        statement: String::new(),
        waits_for: Vec::new(),
    }
}

async fn sessions(session: &Session) -> Result<Vec<SessionRef>, PostgresError> {
    let rows = session.rows("the sessions", SESSIONS, &[]).await?;
    rows.iter()
        .map(|row| {
            let (seconds, waited): (i64, i64) = (row.try_get(6)?, row.try_get(8)?);
            Ok(SessionRef {
                pid: row.try_get(0)?,
                started: row.try_get(1)?,
                role: row.try_get(2)?,
                application: row.try_get(3)?,
                state: row.try_get(4)?,
                ordinary: row.try_get(5)?,
                seconds: u64::try_from(seconds).unwrap_or(0),
                waits_for: row.try_get(7)?,
                waited: u64::try_from(waited).unwrap_or(0),
                changed: row.try_get(9)?,
                transaction: row.try_get(10)?,
                statement: row.try_get(11)?,
                waits: match row.try_get(12)? {
                    "standby" => RootWaits::Standby,
                    "commit" => RootWaits::Commit,
                    "log" => RootWaits::Log,
                    _ => RootWaits::Nothing,
                },
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|error| crate::postgres::session::failed("the sessions", &error))
}

/// Slots for ordinary clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slots {
    all: u32,
    free: u32,
}

async fn slots(session: &Session) -> Result<Slots, PostgresError> {
    let rows = session.rows("the free slots", SLOTS, &[]).await?;
    let of = |column| -> u32 {
        let count: i64 = rows.first().and_then(|row| row.try_get(column).ok()).unwrap_or(0);
        u32::try_from(count).unwrap_or(0)
    };
    let all = of(0);
    Ok(Slots {
        all,
        free: all.saturating_sub(of(1)),
    })
}

/// The server itself sees in one statement whether the session is still what it was, and touches it.
async fn signal(
    session: &Session,
    how: AtRoot,
    to: &SessionRef,
    still: Still,
) -> Result<bool, PostgresError> {
    let function = match how {
        AtRoot::Cancel => "pg_cancel_backend",
        AtRoot::Terminate => "pg_terminate_backend",
    };
    let (condition, first, second) = match still {
        Still::Idle => (
            "state = 'idle' and coalesce(state_change::text, '') = $3 and $4 = ''",
            to.changed.as_str(),
            "",
        ),
        Still::InTransaction => (
            "coalesce(xact_start::text, '') = $3 and $4 = '' and coalesce(wait_event, '') <> 'SyncRep'",
            to.transaction.as_str(),
            "",
        ),
        Still::InStatement => (
            "state = 'active' and coalesce(xact_start::text, '') = $3 and coalesce(query_start::text, '') = $4 and coalesce(wait_event, '') <> 'SyncRep'",
            to.transaction.as_str(),
            to.statement.as_str(),
        ),
    };
    let query = format!(
        "select {function}(pid) from pg_stat_activity where pid = $1 and backend_start::text = $2 and {condition}"
    );
    let rows = session
        .rows(function, &query, &[&to.pid, &to.started, &first, &second])
        .await?;
    Ok(rows.first().and_then(|row| row.try_get(0).ok()).unwrap_or(false))
}

// `waitstart` is there since PostgreSQL 14, and null for a moment after a wait began; by its name in JSON it may be missing.
const SESSIONS: &str = "with waits as materialized (select l.pid, min((to_jsonb(l) ->> 'waitstart')::timestamptz) as since from pg_locks l where not l.granted group by l.pid) \
     select a.pid, a.backend_start::text, coalesce(a.usename::text, ''), coalesce(a.application_name, ''), \
     coalesce(a.state, ''), \
     a.backend_type = 'client backend' and not coalesce(r.rolsuper, true) and not coalesce(r.rolreplication, true), \
     coalesce(extract(epoch from clock_timestamp() - a.state_change), 0)::int8, \
     case when a.wait_event_type = 'Lock' then pg_blocking_pids(a.pid) else '{}' end, \
     coalesce(extract(epoch from clock_timestamp() - case when current_setting('server_version_num')::int8 >= 140000 then w.since \
     else a.state_change end), 0)::int8, \
     coalesce(a.state_change::text, ''), coalesce(a.xact_start::text, ''), coalesce(a.query_start::text, ''), \
     case when a.wait_event = 'SyncRep' then 'standby' \
     when lower(a.wait_event) not in ('walsync', 'walwrite', 'walwritelock', 'walinitsync', 'walinitwrite') or a.wait_event is null then '' \
     when a.query ~* '^\\s*(commit|end|prepare\\s+transaction)\\M' then 'commit' else 'log' end \
     from pg_stat_activity a left join pg_roles r on r.oid = a.usesysid left join waits w on w.pid = a.pid where a.pid <> pg_backend_pid()";
// `reserved_connections` is there since PostgreSQL 16.
const SLOTS: &str = "select current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8 \
     - coalesce(current_setting('reserved_connections', true)::int8, 0), \
     (select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid())";
// The server tells a file's age in whole seconds.
const NEWER_SETTINGS: &str = "select distinct regexp_replace(sourcefile, '.*/', '') from pg_file_settings \
     where (pg_stat_file(sourcefile, true)).modification >= date_trunc('second', pg_conf_load_time()) order by 1";
const WRONG_SETTINGS: &str = "select coalesce(error, '') || ' in ' || coalesce(sourcefile, '-') || ', line ' || coalesce(sourceline, 0) \
     from pg_file_settings where error is not null and error not like '%without restarting the server' limit 1";
/// How long sessions are waited for that are not idle for long enough yet.
const IDLE_PATIENCE: Duration = Duration::from_secs(5);
const IDLE_LOOK_EVERY: Duration = Duration::from_millis(200);
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    fn session(pid: i32, waits_for: &[i32]) -> SessionRef {
        SessionRef {
            waits_for: waits_for.to_vec(),
            ordinary: true,
            ..nobody(pid)
        }
    }

    #[test]
    fn the_root_is_who_waits_for_none_however_long_the_chain() {
        let sessions = [
            session(1, &[]),
            session(2, &[1]),
            session(3, &[2]),
            session(4, &[3, 1]),
            session(8, &[]),
            session(9, &[8]),
            session(10, &[]),
        ];
        let found: Vec<(i32, Vec<i32>)> = roots(&sessions)
            .into_iter()
            .map(|(root, behind)| (root.pid, behind))
            .collect();
        assert_eq!(found, [(1, vec![2, 3, 4]), (8, vec![9])]);
    }

    #[test]
    fn a_circle_ends_and_a_prepared_transaction_is_no_session_to_touch() {
        // The server breaks a deadlock itself; a look in between may show one.
        assert!(roots(&[session(1, &[2]), session(2, &[1])]).is_empty());
        let found = roots(&[session(1, &[0])]);
        assert_eq!((found[0].0.pid, found[0].0.ordinary), (0, false));
    }
}
