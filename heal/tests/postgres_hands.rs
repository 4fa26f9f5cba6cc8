//! The hands on a live server: a pile-up and a full house end without a restart; whoever must not be touched is not.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::Duration;

use support::Cluster;
use theriac_heal::executor::postgres::{AtRoot, Patience, PostgresHands, SessionPolicy, SessionRef, Still};
use theriac_heal::postgres::PostgresError;
use theriac_heal::postgres::session::{Session, Target};
use theriac_heal::types::{RootWaits, SessionId};
use tokio::task::JoinHandle;

fn hands(cluster: &Cluster) -> PostgresHands {
    PostgresHands {
        target: cluster.target.clone(),
        owner: Some(cluster.owner),
        policy: SessionPolicy {
            waiting_min: 3,
            waited_seconds_min: 0,
            idle_seconds_min: 0,
            free_min: 2,
            free_after: 4,
            ..SessionPolicy::default()
        },
        patience: Patience {
            answer: WITHIN,
            effect: WITHIN,
        },
    }
}

async fn as_role(cluster: &Cluster, user: &str) -> Result<Session, PostgresError> {
    let target = Target {
        user: user.to_owned(),
        ..cluster.target.clone()
    };
    Session::open(&target, Some(cluster.owner), Duration::from_mins(1)).await
}

async fn app(cluster: &Cluster) -> Session {
    as_role(cluster, "app").await.unwrap()
}

fn served(max_connections: u32) -> Cluster {
    let cluster = Cluster::start(
        false,
        &[
            &format!("max_connections = {max_connections}"),
            "superuser_reserved_connections = 3",
            "max_wal_senders = 2",
        ],
    );
    cluster.psql("create role app login; create role batch login");
    cluster.psql(
        "create table t (id int primary key, n int); insert into t select i, 0 from generate_series(1, 10) i",
    );
    cluster.psql("grant all on t to public");
    cluster
}

/// Waits until so many sessions are at something.
async fn until_seen(cluster: &Cluster, count: usize, at: &str) {
    let look = cluster.session().await;
    let query = format!("select count(*) from pg_stat_activity where {at}");
    loop {
        let rows = look.rows("sessions", &query, &[]).await.unwrap();
        if rows[0].get::<_, i64>(0) >= i64::try_from(count).unwrap() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

type Waiters = Vec<JoinHandle<Result<(), PostgresError>>>;

/// So many sessions that wait for a lock with this statement.
async fn waiters(cluster: &Cluster, count: usize, statement: &'static str) -> Waiters {
    let mut waiters = Vec::new();
    for _ in 0..count {
        let session = app(cluster).await;
        waiters.push(tokio::spawn(async move {
            session.execute("a waiter", statement).await
        }));
    }
    until_seen(cluster, count, "wait_event_type = 'Lock'").await;
    waiters
}

async fn all_done(waiters: Waiters) {
    for waiter in waiters {
        waiter.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_pile_up_ends_at_its_root_without_a_restart() {
    let cluster = served(30);
    let started = cluster.psql("select pg_postmaster_start_time()");
    let root = app(&cluster).await;
    root.execute("the root", "begin; update t set n = n + 1 where id = 1")
        .await
        .unwrap();
    let waiters = waiters(&cluster, 4, ADD_ONE).await;
    let hands = hands(&cluster);
    let seen = hands.look(WITHIN).await.unwrap().pile_up.unwrap();
    assert_eq!((seen.behind, seen.running, seen.touchable), (4, false, true));
    // Whoever is spared is left, and it is said.
    let mut sparing = hands.clone();
    sparing.policy.spare.insert("app".to_owned());
    let pile_up = sparing.look(WITHIN).await.unwrap().pile_up;
    assert!(!pile_up.unwrap().touchable);
    let left = sparing.relieve_locks(AtRoot::Terminate, None).await.unwrap();
    assert!(
        !left.relieved && left.ended.is_empty() && left.detail.contains("may not be touched"),
        "{left:?}"
    );
    // What runs no statement has none to cancel, and that is said instead of done.
    let nothing = hands.relieve_locks(AtRoot::Cancel, None).await.unwrap();
    assert!(
        !nothing.relieved && nothing.detail.contains("no statement"),
        "{nothing:?}"
    );
    // Another session than the one that was planned is left.
    let later = SessionId {
        birth: seen.birth ^ 1,
        ..seen.id()
    };
    let left = hands.relieve_locks(AtRoot::Terminate, Some(later)).await.unwrap();
    assert!(
        !left.relieved && left.ended.is_empty() && left.detail.contains("another one now"),
        "{left:?}"
    );
    let relief = hands
        .relieve_locks(AtRoot::Terminate, Some(seen.id()))
        .await
        .unwrap();
    assert!(relief.relieved, "{relief:?}");
    assert_eq!(
        (relief.cancelled.len(), relief.ended.len(), relief.ended[0].pid),
        (0, 1, seen.pid)
    );
    all_done(waiters).await;
    assert_eq!(
        cluster.psql("select n from t where id = 1"),
        "4",
        "the root's change is gone, theirs are there"
    );
    assert_eq!(cluster.psql("select pg_postmaster_start_time()"), started);
    // Again: nothing to do.
    let again = hands.relieve_locks(AtRoot::Terminate, None).await.unwrap();
    assert!(again.relieved && again.ended.is_empty());
    assert!(hands.look(WITHIN).await.unwrap().pile_up.is_none());
}

#[tokio::test]
async fn a_root_that_waits_for_its_commit_is_seen_and_left() {
    let cluster = served(30);
    let settings = cluster.session().await;
    // A standby that will never come: what commits holds its locks until it is not asked for any more.
    settings
        .execute(
            "a standby",
            "alter system set synchronous_standby_names = 'nobody'",
        )
        .await
        .unwrap();
    settings
        .execute("reload", "select pg_reload_conf()")
        .await
        .unwrap();
    // The server takes the new setting in at a moment of its own: until then an update just commits.
    let commits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    let mut root: Option<JoinHandle<_>> = None;
    while settings.rows("commits", commits, &[]).await.unwrap()[0].get::<_, i64>(0) == 0 {
        match &root {
            Some(root) if !root.is_finished() => tokio::task::yield_now().await,
            _ => {
                let session = app(&cluster).await;
                let update = async move {
                    session
                        .execute("the root", "update t set n = 1 where id = 1")
                        .await
                };
                root = Some(tokio::spawn(update));
            }
        }
    }
    let waiters = waiters(&cluster, 3, ADD_ONE).await;
    let hands = hands(&cluster);
    let seen = hands.look(WITHIN).await.unwrap().pile_up.unwrap();
    assert!(seen.waits == RootWaits::Standby && seen.running, "{seen:?}");
    for how in [AtRoot::Cancel, AtRoot::Terminate] {
        let left = hands.relieve_locks(how, Some(seen.id())).await.unwrap();
        assert!(
            !left.relieved
                && left.cancelled.is_empty()
                && left.ended.is_empty()
                && left.detail.contains("it commits"),
            "{left:?}"
        );
    }
    settings
        .execute("no standby", "alter system reset synchronous_standby_names")
        .await
        .unwrap();
    settings
        .execute("reload", "select pg_reload_conf()")
        .await
        .unwrap();
    root.unwrap().await.unwrap().unwrap();
    all_done(waiters).await;
    assert_eq!(
        cluster.psql("select n from t where id = 1"),
        "4",
        "nobody lost anything"
    );
}

#[tokio::test]
async fn a_running_root_is_cancelled_and_keeps_its_session() {
    let cluster = served(30);
    let root = app(&cluster).await;
    root.execute("the root", "begin; lock table t in access exclusive mode")
        .await
        .unwrap();
    let root = tokio::spawn(async move {
        let ended = root.execute("a long statement", "select pg_sleep(600)").await;
        (root, ended)
    });
    until_seen(
        &cluster,
        1,
        "state = 'active' and query like '%pg_sleep(600)%' and pid <> pg_backend_pid()",
    )
    .await;
    let waiters = waiters(&cluster, 3, "select * from t").await;
    let relief = hands(&cluster).relieve_locks(AtRoot::Cancel, None).await.unwrap();
    assert!(
        relief.relieved && relief.cancelled.len() == 1 && relief.ended.is_empty(),
        "{relief:?}"
    );
    let (root, ended) = root.await.unwrap();
    assert!(matches!(ended, Err(PostgresError::Query { code: Some(code), .. }) if code == "57014"));
    root.execute("its session goes on", "rollback; select 1")
        .await
        .unwrap();
    all_done(waiters).await;
}

/// Ordinary sessions until nobody is let in any more, and no slot is free: who has just gone may still hold one.
async fn fill(cluster: &Cluster, hands: &PostgresHands) -> Vec<Session> {
    let mut filling = Vec::new();
    loop {
        match as_role(cluster, "app").await {
            Ok(session) => filling.push(session),
            Err(PostgresError::Connect { code, .. }) => {
                assert_eq!(code.as_deref(), Some("53300"));
                if hands.look(WITHIN).await.unwrap().free == 0 {
                    return filling;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_full_house_is_entered_by_the_reserved_slot_and_idle_sessions_make_room() {
    let cluster = served(12);
    let started = cluster.psql("select pg_postmaster_start_time()");
    let batch = as_role(&cluster, "batch").await.unwrap();
    let busy = app(&cluster).await;
    busy.execute("busy", "begin; select 1").await.unwrap();
    let mut hands = hands(&cluster);
    let _idle = fill(&cluster, &hands).await;
    hands.policy.spare.insert("batch".to_owned());
    let seen = hands.look(WITHIN).await.unwrap();
    assert_eq!((seen.free, seen.free_min), (0, 2));
    let relief = hands.relieve_connections().await.unwrap();
    assert!(relief.relieved && relief.ended.len() == 4, "{relief:?}");
    assert!(
        relief
            .ended
            .iter()
            .all(|ended| ended.state == "idle" && ended.role == "app")
    );
    app(&cluster)
        .await
        .execute("an ordinary client", "select 1")
        .await
        .unwrap();
    batch.execute("spared", "select 1").await.unwrap();
    busy.execute("in a transaction", "commit").await.unwrap();
    assert_eq!(cluster.psql("select pg_postmaster_start_time()"), started);
    // Nobody to end: it says that there is no room, and ends nobody.
    hands.policy.idle_seconds_min = 3600;
    hands.policy.free_after = 100;
    let enough = hands.relieve_connections().await.unwrap();
    assert!(
        enough.relieved && enough.ended.is_empty(),
        "enough are free: {enough:?}"
    );
    let _again = fill(&cluster, &hands).await;
    let none = hands.relieve_connections().await.unwrap();
    assert!(!none.relieved && none.ended.is_empty());
}

#[tokio::test]
async fn time_that_a_statement_worked_before_it_met_a_lock_is_no_waiting() {
    let cluster = served(30);
    // Work in the server, then the lock. Longer where the machine is so busy that they have waited for as long before they were looked at.
    for (report, worked) in [
        ("select pg_sleep(4); update t set n = n + 1 where id = 1", 4),
        ("select pg_sleep(15); update t set n = n + 1 where id = 1", 15),
        ("select pg_sleep(50); update t set n = n + 1 where id = 1", 50),
    ] {
        let root = app(&cluster).await;
        root.execute("the root", "begin; update t set n = 0 where id = 1")
            .await
            .unwrap();
        let waiters = waiters(&cluster, 3, report).await;
        let mut hands = hands(&cluster);
        hands.policy.waited_seconds_min = worked - 1;
        let seen = hands.look(WITHIN).await.unwrap().pile_up;
        let relief = hands.relieve_locks(AtRoot::Terminate, None).await.unwrap();
        let sessions = hands.sessions().await.unwrap();
        let waiting: Vec<&SessionRef> = sessions.iter().filter(|of| !of.waits_for.is_empty()).collect();
        if waiting.len() < 3 || waiting.iter().any(|of| of.waited + 1 >= worked) {
            println!("they have waited too long: {seen:?}, {relief:?}, {waiting:?}");
            drop(root);
            all_done(waiters).await;
            continue;
        }
        assert!(seen.is_none() && relief.ended.is_empty(), "{seen:?}, {relief:?}");
        assert!(waiting.iter().all(|of| of.waited < of.seconds), "{waiting:?}");
        root.execute("it ends by itself", "commit").await.unwrap();
        all_done(waiters).await;
        assert_eq!(cluster.psql("select n from t where id = 1"), "3");
        return;
    }
    panic!("sessions waited as long as they had worked, three times");
}

#[tokio::test]
async fn a_session_that_went_on_since_it_was_seen_is_left() {
    let cluster = served(30);
    let hands = hands(&cluster);
    let session = app(&cluster).await;
    session.execute("some work", "select 1").await.unwrap();
    let seen = async || {
        let sessions = hands.sessions().await.unwrap();
        sessions.into_iter().find(|of| of.role == "app").unwrap()
    };
    let idle = seen().await;
    assert_eq!(idle.state, "idle");
    session
        .execute("it begins to work", "begin; select 1")
        .await
        .unwrap();
    assert!(!hands.touch(&idle, AtRoot::Terminate, Still::Idle).await.unwrap());
    // Idle again, but not since then.
    session.execute("and ends", "commit").await.unwrap();
    assert!(!hands.touch(&idle, AtRoot::Terminate, Still::Idle).await.unwrap());
    session.execute("a transaction", "begin; select 1").await.unwrap();
    let root = seen().await;
    session.execute("its next statement", "select 2").await.unwrap();
    assert!(
        !hands
            .touch(&root, AtRoot::Cancel, Still::InStatement)
            .await
            .unwrap()
    );
    session
        .execute("another transaction", "commit; begin; select 1")
        .await
        .unwrap();
    assert!(
        !hands
            .touch(&root, AtRoot::Terminate, Still::InTransaction)
            .await
            .unwrap()
    );
    // The transaction is the same, whatever it does in it.
    let root = seen().await;
    session.execute("its next statement", "select 2").await.unwrap();
    assert!(
        hands
            .touch(&root, AtRoot::Terminate, Still::InTransaction)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn settings_are_reloaded_and_a_wrong_file_is_refused() {
    let cluster = served(12);
    let conf = cluster.data().join("postgresql.conf");
    let before = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, format!("{before}\nwork_mem = 7MB\n")).unwrap();
    let done = hands(&cluster).reload().await.unwrap();
    assert!(
        done.relieved && done.detail.contains("postgresql.conf"),
        "{done:?}"
    );
    while cluster.psql("show work_mem") != "7MB" {}
    std::fs::write(&conf, format!("{before}\nwork_mem = lots\n")).unwrap();
    let refused = hands(&cluster).reload().await.unwrap_err().to_string();
    assert!(
        refused.contains("work_mem") || refused.contains("line"),
        "{refused}"
    );
    assert_eq!(cluster.psql("show work_mem"), "7MB");
    // Settings that are as old as what the server runs on: it is said that a reload would change nothing.
    std::fs::write(&conf, format!("{before}\nwork_mem = 7MB\n")).unwrap();
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_hours(24);
    std::fs::File::options()
        .append(true)
        .open(&conf)
        .unwrap()
        .set_modified(old)
        .unwrap();
    let nothing = hands(&cluster).reload().await.unwrap();
    assert!(
        !nothing.relieved && nothing.detail.contains("change nothing"),
        "{nothing:?}"
    );
}

/// Nothing here is about how fast a busy machine is.
const WITHIN: Duration = Duration::from_mins(1);
const ADD_ONE: &str = "update t set n = n + 1 where id = 1";
