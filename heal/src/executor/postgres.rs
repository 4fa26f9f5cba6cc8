//! Hands on a running PostgreSQL server that need no restart: end the root of a lock pile-up, make room for connections, cancel a
//! statement, reload the settings.
//!
//! | action | precondition | effect | undo | verified by |
//! |---|---|---|---|---|
//! | [`PostgresHands::relieve_locks`] | enough sessions wait, for long enough, behind one | its statement is cancelled, or it is ended when it is idle | none: its transaction is rolled back, as at a crash of its client | those sessions wait no more |
//! | [`PostgresHands::relieve_connections`] | fewer ordinary slots are free than asked for | sessions idle for long enough are ended, the longest first | none: their clients connect again | the free slots |
//! | [`PostgresHands::cancel`] | the session still is the one that was seen | its statement is cancelled | none | it runs no such statement |
//! | [`PostgresHands::reload`] | | the files of settings are read again | the former file, reloaded | the server's own word on its files |
//!
//! The session that does this is a superuser's, so one of the slots that the server keeps back lets it in when all others are taken.
//! A session is named by its process id *and* its start, so that a number that has come to mean another one is not hit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use crate::postgres::PostgresError;
use crate::postgres::owner::Owner;
use crate::postgres::session::{Session, Target};

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
    /// Ordinary slots that must be free afterwards.
    pub free_min: u32,
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
    /// The sessions that it waits for; 0 is a prepared transaction.
    pub waits_for: Vec<i32>,
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
}

impl PostgresHands {
    /// The sessions that others wait for and that wait for none, with how many wait behind each, the most first.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn blockers(&self) -> Result<Vec<(SessionRef, usize)>, PostgresError> {
        let sessions = sessions(&self.open().await?).await?;
        Ok(self.roots(&sessions))
    }

    /// Ends a lock pile-up at its root: cancels a running statement, ends an idle transaction; what does not let go when its
    /// statement was cancelled is ended. Nothing is done while too few wait or not for long enough. One root at a time: who holds the
    /// lock next has waited for it and is not to blame.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn relieve_locks(&self) -> Result<Relief, PostgresError> {
        let session = self.open().await?;
        let mut relief = Relief {
            cancelled: Vec::new(),
            ended: Vec::new(),
            relieved: true,
            detail: "no pile-up".to_owned(),
        };
        let Some((root, behind)) = self.roots(&sessions(&session).await?).into_iter().next() else {
            return Ok(relief);
        };
        relief.detail = format!(
            "{behind} sessions waited behind process {} (role {}, {}, for {} s)",
            root.pid, root.role, root.state, root.seconds
        );
        if !self.may_touch(&root) {
            relief.relieved = false;
            relief.detail.push_str(": it may not be touched");
            return Ok(relief);
        }
        if root.state == "active" {
            signal(&session, "pg_cancel_backend", &root).await?;
            relief.cancelled.push(root.clone());
            relief.relieved = nobody_waits_for(&session, root.pid).await?;
            if relief.relieved {
                return Ok(relief);
            }
        }
        signal(&session, "pg_terminate_backend", &root).await?;
        relief.relieved = nobody_waits_for(&session, root.pid).await?;
        relief.ended.push(root);
        Ok(relief)
    }

    /// Ends sessions that have been idle for long enough, the longest first, until enough ordinary slots are free.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn relieve_connections(&self) -> Result<Relief, PostgresError> {
        let session = self.open().await?;
        let before = free_slots(&session).await?;
        let wanted = i64::from(self.policy.free_min).saturating_sub(before).max(0);
        let mut idle: Vec<SessionRef> = sessions(&session)
            .await?
            .into_iter()
            .filter(|found| {
                found.state == "idle"
                    && found.seconds >= self.policy.idle_seconds_min
                    && self.may_touch(found)
            })
            .collect();
        idle.sort_by_key(|found| std::cmp::Reverse(found.seconds));
        idle.truncate(usize::try_from(wanted.min(i64::from(self.policy.ended_max))).unwrap_or(0));
        for found in &idle {
            signal(&session, "pg_terminate_backend", found).await?;
        }
        let begun = Instant::now();
        let enough = before + i64::try_from(idle.len()).unwrap_or(0);
        let mut free = free_slots(&session).await?;
        while free < enough && begun.elapsed() < EFFECT_MAX {
            sleep(LOOK_EVERY).await;
            free = free_slots(&session).await?;
        }
        Ok(Relief {
            cancelled: Vec::new(),
            relieved: free >= i64::from(self.policy.free_min),
            detail: format!("{before} ordinary slots were free, {free} are"),
            ended: idle,
        })
    }

    /// Cancels the statement of one session. Whether it still was that session.
    ///
    /// # Errors
    /// [`PostgresError`].
    pub async fn cancel(&self, session: &SessionRef) -> Result<bool, PostgresError> {
        signal(&self.open().await?, "pg_cancel_backend", session).await
    }

    /// Has the server read its settings again. Files that it would not take are refused before.
    ///
    /// # Errors
    /// [`PostgresError::Query`] names the first wrong line.
    pub async fn reload(&self) -> Result<(), PostgresError> {
        let session = self.open().await?;
        let wrong = session.rows("the files of settings", WRONG_SETTINGS, &[]).await?;
        if let Some(row) = wrong.first() {
            return Err(PostgresError::Query {
                what: "reload".to_owned(),
                detail: row.try_get(0).unwrap_or_default(),
                code: None,
            });
        }
        session.execute("reload", "select pg_reload_conf()").await
    }

    async fn open(&self) -> Result<Session, PostgresError> {
        Session::open(&self.target, self.owner, ASK_MAX).await
    }

    fn roots(&self, sessions: &[SessionRef]) -> Vec<(SessionRef, usize)> {
        let waited = |pid: &i32| {
            sessions
                .iter()
                .any(|found| found.pid == *pid && found.seconds >= self.policy.waited_seconds_min)
        };
        roots(sessions)
            .into_iter()
            .filter(|(_, behind)| behind.len() >= self.policy.waiting_min && behind.iter().any(waited))
            .map(|(root, behind)| (root, behind.len()))
            .collect()
    }

    fn may_touch(&self, session: &SessionRef) -> bool {
        session.ordinary
            && !self.policy.spare.contains(&session.role)
            && !self.policy.spare.contains(&session.application)
    }
}

/// Waits until no session waits for `pid`; whether that came in time.
async fn nobody_waits_for(session: &Session, pid: i32) -> Result<bool, PostgresError> {
    let begun = Instant::now();
    loop {
        let seen = sessions(session).await?;
        if !seen.iter().any(|found| found.waits_for.contains(&pid)) {
            return Ok(true);
        }
        if begun.elapsed() >= EFFECT_MAX {
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
        waits_for: Vec::new(),
    }
}

async fn sessions(session: &Session) -> Result<Vec<SessionRef>, PostgresError> {
    let rows = session.rows("the sessions", SESSIONS, &[]).await?;
    rows.iter()
        .map(|row| {
            let seconds: i64 = row.try_get(6)?;
            Ok(SessionRef {
                pid: row.try_get(0)?,
                started: row.try_get(1)?,
                role: row.try_get(2)?,
                application: row.try_get(3)?,
                state: row.try_get(4)?,
                ordinary: row.try_get(5)?,
                seconds: u64::try_from(seconds).unwrap_or(0),
                waits_for: row.try_get(7)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|error| crate::postgres::session::failed("the sessions", &error))
}

async fn free_slots(session: &Session) -> Result<i64, PostgresError> {
    let rows = session.rows("the free slots", FREE_SLOTS, &[]).await?;
    Ok(rows.first().and_then(|row| row.try_get(0).ok()).unwrap_or(0))
}

/// `function` is one of ours, never a caller's word.
async fn signal(session: &Session, function: &'static str, to: &SessionRef) -> Result<bool, PostgresError> {
    let query =
        format!("select {function}(pid) from pg_stat_activity where pid = $1 and backend_start::text = $2");
    let rows = session.rows(function, &query, &[&to.pid, &to.started]).await?;
    Ok(rows.first().and_then(|row| row.try_get(0).ok()).unwrap_or(false))
}

const SESSIONS: &str = "select a.pid, a.backend_start::text, coalesce(a.usename::text, ''), coalesce(a.application_name, ''), \
     coalesce(a.state, ''), \
     a.backend_type = 'client backend' and not coalesce(r.rolsuper, true) and not coalesce(r.rolreplication, true), \
     coalesce(extract(epoch from clock_timestamp() - a.state_change), 0)::int8, \
     case when a.wait_event_type = 'Lock' then pg_blocking_pids(a.pid) else '{}' end \
     from pg_stat_activity a left join pg_roles r on r.oid = a.usesysid where a.pid <> pg_backend_pid()";
const FREE_SLOTS: &str = "select current_setting('max_connections')::int8 \
     - current_setting('superuser_reserved_connections')::int8 \
     - (select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid())";
const WRONG_SETTINGS: &str = "select coalesce(error, '') || ' in ' || coalesce(sourcefile, '-') || ', line ' || coalesce(sourceline, 0) \
     from pg_file_settings where error is not null and error not like '%without restarting the server' limit 1";
const ASK_MAX: Duration = Duration::from_secs(5);
const EFFECT_MAX: Duration = Duration::from_secs(2);
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
