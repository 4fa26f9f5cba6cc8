//! Copies of a service's state, each checked before it counts, while the service is well. When is for
//! [`theriac_heal::checkpoint::schedule`] to say: it hears the failure risk and what became of the service.
//!
//! A copy that does not pass the service's own check may have been torn while the service wrote; so the state itself is
//! asked next, and only when *it* fails twice is it called corrupt. While an incident of corrupt state is open, the state is
//! asked again from time to time, so that a false or mended finding does not stand in the way of healing.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use theriac_heal::checkpoint::schedule::{Learned, LimitsError, Refusal, Room, Schedule, Verdict, Why};
use theriac_heal::checkpoint::state_check::{StateCheck, StateVerdict};
use theriac_heal::checkpoint::store::{Checkpoint, CheckpointError, CheckpointStore, free_bytes};
use theriac_heal::executor::clock;
use theriac_heal::incident::Input;
use tokio::sync::Notify;

use crate::config::StateSettings;
use crate::metrics::{kind as kind_of, service as label};
use crate::offsite::{OffsiteSettings, Pusher};
use crate::postgres::{is_postgres, needs_proof, source};
use crate::pressure::Pressure;
use crate::scrub::{Damaged, Scrubber};
use crate::service::{ServiceContext, open_checkpoints, schedule_limits, state_check};
use crate::state_dir::write_durably;
use crate::storage::{FREE_MIN, StorageWatch};
use crate::store::Store;
use crate::supervise::Shutdown;

/// Longest wait for the first checkpoint of a service that has none.
const FIRST_AFTER: Duration = Duration::from_secs(5);
/// Time between two looks whether a checkpoint is due and possible.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Pause between two checks of the live state before it is called corrupt.
const SECOND_LOOK_AFTER: Duration = Duration::from_secs(1);
/// Longest time between two checks of a state that was found corrupt.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(30);

/// Most of a file system that a copy leaves free beyond what the store asks for: a fiftieth, at most this many bytes.
const RESERVE_MAX: u64 = 1 << 30;

/// Why checkpoints cannot be taken at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakerError {
    /// The store of checkpoints.
    #[error(transparent)]
    Store(#[from] CheckpointError),
    /// Limits that passed the configuration's checks and still make no schedule.
    #[error(transparent)]
    Limits(#[from] LimitsError),
}

/// Takes checkpoints of one service until the signal to stop.
///
/// # Errors
/// When the store of checkpoints cannot be opened.
pub async fn run(
    context: ServiceContext,
    settings: StateSettings,
    offsite: Option<OffsiteSettings>,
    store: Store,
    storage: StorageWatch,
    shutdown: Shutdown,
) -> Result<(), TakerError> {
    let taker = Taker::open(context, settings, store, storage)?;
    // Beside it: a slow store must not delay the next checkpoint.
    let pusher = offsite.map(|offsite| {
        Pusher::new(
            offsite,
            taker.context.clone(),
            Arc::clone(&taker.checkpoints),
            Arc::clone(&taker.new_one),
        )
    });
    let pushing = async {
        match pusher {
            Some(pusher) => pusher.run().await,
            None => std::future::pending().await,
        }
    };
    let scrubber = Scrubber::new(
        taker.context.clone(),
        taker.settings.verify_every,
        Arc::clone(&taker.checkpoints),
        Arc::clone(&taker.damaged),
    );
    tokio::select! {
        taken = Box::pin(taker.run(shutdown)) => taken,
        () = Box::pin(pushing) => Ok(()),
        () = scrubber.run() => Ok(()),
    }
}

impl Taker {
    async fn run(mut self, mut shutdown: Shutdown) -> Result<(), TakerError> {
        let taker = &mut self;
        let known = taker.list().await?;
        taker.latest_bytes = known.first().map_or(0, |latest| latest.bytes);
        let store = Arc::clone(&taker.checkpoints);
        // Copies that were left by another kind, or whose manifest is gone, are not what there has to be one of.
        if !off_the_async_threads(move || store.restorable())
            .await?
            .is_empty()
        {
            // How much the service worked since is not known; it is well now, or it is not copied.
            taker.schedule.found(Duration::ZERO);
        }
        taker.show(known).await;
        let first_at = Instant::now() + FIRST_AFTER.min(taker.settings.interval);
        let ask_every = taker.settings.interval.min(ASK_AGAIN_EVERY);
        let mut ask_due = Instant::now() + ask_every;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY.min(taker.settings.interval)) => {}
                () = shutdown.wait() => return Ok(()),
            }
            let now = Instant::now();
            if !taker.context.shared.corrupt.load(Ordering::Relaxed) {
                ask_due = now + ask_every;
            } else if now >= ask_due {
                taker.ask_again().await;
                ask_due = Instant::now() + ask_every;
            }
            taker.follow();
            let damaged = taker
                .damaged
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(newest) = damaged {
                taker.lose(newest).await;
            }
            if !taker.possible() {
                continue;
            }
            let moment = clock::now().monotonic;
            match taker.schedule.decide(moment, &taker.room()) {
                Verdict::Take(Why::First) if now < first_at => {}
                Verdict::Take(why) => taker.take(why).await,
                Verdict::Skip(refusal) => taker.skip(refusal),
                Verdict::Wait { .. } => {}
            }
        }
    }
}

struct Taker {
    context: ServiceContext,
    settings: StateSettings,
    checkpoints: Arc<CheckpointStore>,
    check: Option<StateCheck>,
    schedule: Schedule,
    /// Of the latest copy.
    latest_bytes: u64,
    /// The kind of the latest refusal, so that it is told once.
    told: Option<std::mem::Discriminant<Refusal>>,
    /// Whether an incident spoke against the state at the last look.
    unsound: bool,
    store: Store,
    storage: StorageWatch,
    /// Told after each checkpoint.
    new_one: Arc<Notify>,
    /// Left by whoever reads them again where one was damaged: whether the newest was.
    damaged: Damaged,
}

impl Taker {
    fn open(
        context: ServiceContext,
        settings: StateSettings,
        store: Store,
        storage: StorageWatch,
    ) -> Result<Self, TakerError> {
        let limits = schedule_limits(&settings);
        Ok(Self {
            checkpoints: Arc::new(open_checkpoints(
                &context.dir,
                &context.shared.name,
                &settings,
                needs_proof(&context.shared.config),
            )?),
            check: state_check(&settings),
            schedule: match read_learned(&context) {
                Some(learned) => Schedule::restore(limits, learned)?,
                None => Schedule::new(limits)?,
            },
            latest_bytes: 0,
            told: None,
            unsound: false,
            context,
            settings,
            store,
            storage,
            new_one: Arc::default(),
            damaged: Damaged::default(),
        })
    }

    /// A sick service's state is not worth keeping, and a full disk has no room for it.
    fn possible(&self) -> bool {
        self.context.shared.is_sound() && self.storage.is_ok() && self.settings.dir.exists()
    }

    /// Tells the schedule how the service is and what its risk is.
    fn follow(&mut self) {
        let (shared, now) = (&self.context.shared, clock::now().monotonic);
        let unsound = shared.unsound.load(Ordering::Relaxed);
        if unsound || shared.pid().is_none() {
            let first = unsound && !self.unsound;
            self.schedule.failed(now);
            if first {
                self.keep_learned();
            }
        } else {
            self.schedule.runs(now);
        }
        self.unsound = unsound;
        self.schedule.hear(now, &shared.risks());
    }

    fn room(&self) -> Room {
        let free = free_bytes(self.checkpoints.dir()).unwrap_or(0);
        let size = rustix::fs::statvfs(self.checkpoints.dir())
            .map_or(0, |space| space.f_blocks.saturating_mul(space.f_frsize));
        Room {
            free_bytes: free,
            needed_bytes: self.latest_bytes,
            reserve_bytes: FREE_MIN.max((size / 50).min(RESERVE_MAX)),
            io_full: Pressure::of_host().io_full,
        }
    }

    fn skip(&mut self, refusal: Refusal) {
        let kind = std::mem::discriminant(&refusal);
        if self.told.replace(kind) == Some(kind) {
            return;
        }
        let service = &self.context.shared.name;
        tracing::warn!(service, %refusal, "a checkpoint is due and not taken");
        let word = match refusal {
            Refusal::DiskNearlyFull { .. } | Refusal::WouldFillTheDisk => "disk_full",
            Refusal::Saturated { .. } => "saturated",
            Refusal::BackingOff { .. } => "backing_off",
        };
        self.context
            .metrics
            .checkpoints
            .get_or_create(&kind_of(word))
            .inc();
        let reason = format!("not taken: {refusal}");
        self.context
            .board
            .update_service(service, |line| line.checkpoint_reason = Some(reason));
    }

    async fn take(&mut self, why: Why) {
        let begun = clock::now().monotonic;
        let shared = Arc::clone(&self.context.shared);
        // A server's backup needs no hold on its directory, and a restore must not wait until the copy is proved.
        let in_use = if is_postgres(&shared.config) {
            None
        } else {
            Some(shared.state_in_use.lock().await)
        };
        let taken = Box::pin(self.stage_check_commit()).await;
        drop(in_use);
        let ended = clock::now().monotonic;
        let spent = ended.saturating_sub(begun);
        let service = &shared.name;
        let word = match &taken {
            Ok(_) => "taken",
            Err(CheckpointError::NotGood { .. }) => "not_good",
            Err(CheckpointError::DiskFull { .. }) => "disk_full",
            Err(CheckpointError::Changing { .. }) => "changing",
            Err(CheckpointError::Invalid { .. }) => "invalid",
            Err(CheckpointError::Unproven { .. }) => "unproven",
            Err(_) => "failed",
        };
        self.context
            .metrics
            .checkpoints
            .get_or_create(&kind_of(word))
            .inc();
        let seconds = spent.as_secs_f64();
        let metrics = &self.context.metrics;
        metrics
            .checkpoint_seconds
            .get_or_create(&label(service))
            .inc_by(seconds);
        let failure = taken.as_ref().err().map(ToString::to_string);
        let bad = matches!(
            taken,
            Err(CheckpointError::NotGood { .. } | CheckpointError::Invalid { .. })
        );
        self.context.board.update_service(service, |line| {
            line.checkpoint_seconds += seconds;
            line.checkpoints_taken += u64::from(failure.is_none());
            line.checkpoints_refused += u64::from(bad);
            line.checkpoint_failure = failure;
            line.checkpoint_reason = Some(why.to_string());
        });
        match taken {
            Ok(taken) => {
                self.schedule.took(ended, spent, true);
                self.told = None;
                self.latest_bytes = taken.bytes;
                self.keep_learned();
                self.new_one.notify_one();
                if matches!(why, Why::Risk { .. }) {
                    tracing::info!(service, sequence = taken.sequence, %why, "checkpoint taken ahead of a failure");
                } else {
                    tracing::debug!(service, sequence = taken.sequence, bytes = taken.bytes, %why, "checkpoint taken");
                }
                match self.list().await {
                    Ok(list) => self.show(list).await,
                    Err(error) => tracing::warn!(service, %error, "cannot list checkpoints"),
                }
            }
            Err(error @ CheckpointError::NotGood { .. }) => {
                self.schedule.came_to_nothing(ended, spent);
                tracing::warn!(service, %error, "checkpoint refused, asking the state itself");
                self.ask_the_state_itself().await;
            }
            // Too little room for a copy is no word on whether the state directory can be written: that is looked at
            // by itself.
            Err(error @ CheckpointError::Invalid { .. }) => {
                self.schedule.came_to_nothing(ended, spent);
                tracing::error!(service, %error, "the copy is bad, and so may be what it is a copy of");
            }
            Err(error) => {
                self.schedule.came_to_nothing(ended, spent);
                tracing::warn!(service, %error, "no checkpoint this time");
            }
        }
    }

    /// What was learnt is worth keeping, but no reason to stop when it cannot be.
    fn keep_learned(&self) {
        let path = self.context.dir.schedule(&self.context.shared.name);
        let kept = serde_json::to_vec(self.schedule.learned())
            .map_err(std::io::Error::from)
            .and_then(|bytes| write_durably(&path, &bytes));
        if let Err(error) = kept {
            tracing::warn!(path = %path.display(), %error, "cannot keep what was learnt of checkpoints");
        }
    }

    async fn stage_check_commit(&self) -> Result<Checkpoint, CheckpointError> {
        // Made anew each time: a server's programs may be installed or replaced meanwhile.
        let source = source(&self.context.shared.config, &self.settings, false)?;
        source.take(&self.checkpoints, clock::now().unix_ms).await
    }

    async fn ask_the_state_itself(&self) {
        let Some(check) = &self.check else { return };
        for last in [false, true] {
            let StateVerdict::Corrupt(detail) = check.run(&self.settings.dir).await else {
                return;
            };
            if last && self.context.shared.is_sound() {
                let service = self.context.shared.name.clone();
                // Only while the process ends is nobody listening.
                let _heard = self
                    .context
                    .events
                    .send(Input::StateCorrupt { service, detail })
                    .await
                    .is_ok();
            } else {
                tokio::time::sleep(SECOND_LOOK_AFTER).await;
            }
        }
    }

    /// Looks whether a state that was found corrupt passes its check now, twice.
    async fn ask_again(&self) {
        let Some(check) = &self.check else { return };
        for last in [false, true] {
            let in_use = self.context.shared.state_in_use.lock().await;
            let verdict = check.run(&self.settings.dir).await;
            drop(in_use);
            let open = self.context.shared.corrupt.load(Ordering::Relaxed);
            if verdict != StateVerdict::Good || !open || !self.settings.dir.exists() {
                return;
            }
            if !last {
                tokio::time::sleep(SECOND_LOOK_AFTER).await;
            }
        }
        let service = self.context.shared.name.clone();
        let input = if self.context.shared.pid().is_some() {
            Input::StateGood { service }
        } else {
            // It was not started because of its state: what remains is a service that does not run.
            let status = "it does not run, and its state passes its check again".to_owned();
            Input::Exited { service, status }
        };
        // Only while the process ends is nobody listening.
        let _heard = self.context.events.send(input).await.is_ok();
    }

    /// A kept checkpoint was set aside: whether it was the `newest`.
    async fn lose(&mut self, newest: bool) {
        if newest {
            self.schedule.lost();
        }
        match self.list().await {
            Ok(list) => self.show(list).await,
            Err(error) => {
                tracing::warn!(service = self.context.shared.name, %error, "cannot list checkpoints");
            }
        }
    }

    async fn list(&self) -> Result<Vec<Checkpoint>, CheckpointError> {
        let store = Arc::clone(&self.checkpoints);
        off_the_async_threads(move || store.list()).await
    }

    async fn show(&self, list: Vec<Checkpoint>) {
        let service = &self.context.shared.name;
        let count = list.len();
        let valid = i64::try_from(count).unwrap_or(i64::MAX);
        self.context
            .metrics
            .checkpoints_valid
            .get_or_create(&label(service))
            .set(valid);
        self.context
            .board
            .update_service(service, |line| line.checkpoints = count as u64);
        if let Err(error) = self.store.list_checkpoints(service, list).await {
            self.storage.failed("list checkpoints", &error);
        }
    }
}

/// What an earlier run learnt; a file that cannot be read is no reason to stop.
fn read_learned(context: &ServiceContext) -> Option<Learned> {
    let path = context.dir.schedule(&context.shared.name);
    let bytes = std::fs::read(&path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "what was learnt of checkpoints cannot be read: beginning anew");
        })
        .ok()
}

async fn off_the_async_threads<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| {
        let source = std::io::Error::other(join.to_string());
        Err(CheckpointError::Io {
            path: "checkpoint".into(),
            source,
        })
    })
}

#[cfg(test)]
mod tests {
    use theriac_model::risk::{Chance, Horizon, Risk, RiskVersion};

    use theriac_heal::checkpoint::offsite::OffsiteKey;

    use super::*;
    use crate::config::EdgeConfig;
    use crate::metrics::Metrics;
    use crate::offsite::{OffsiteRecord, fetch, note_drill};
    use crate::service::ServiceShared;
    use crate::state_dir::StateDir;
    use crate::status::Board;

    /// A taker for a running service with a state of one file.
    fn taker() -> (Taker, tempfile::TempDir) {
        let root = tempfile::tempdir().unwrap();
        let state = root.path().join("state");
        std::fs::create_dir(&state).unwrap();
        std::fs::write(state.join("data"), [7; 4_096]).unwrap();
        let file = root.path().join("edge.toml");
        let text = format!(
            "[[service]]\nname = 'kv'\nargv = ['true']\n[service.state]\ndir = '{}'\ninterval = '1h'\n",
            state.display()
        );
        std::fs::write(&file, text).unwrap();
        let config = EdgeConfig::load(Some(&file), []).unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let (board, metrics) = (Board::new("a", 60), Arc::new(Metrics::new()));
        let shared = Arc::new(ServiceShared::new(config.services[0].clone()));
        shared.set_pid(Some(1));
        board.update_service("kv", |_| {});
        let (events, _) = tokio::sync::mpsc::channel(16);
        let store = Store::open(&dir).unwrap();
        let storage = StorageWatch::new(dir.clone(), board.clone(), Arc::clone(&metrics));
        let settings = config.services[0].state.clone().unwrap();
        let context = ServiceContext {
            shared,
            dir,
            events,
            board,
            metrics,
        };
        (Taker::open(context, settings, store, storage).unwrap(), root)
    }

    fn risks(probability: f64, resource: &'static str) -> Vec<Risk> {
        vec![Risk {
            horizon: Horizon::DEFAULT[0],
            chance: Ok(Chance::new(probability, probability, probability)),
            lead: None,
            resource: Some(resource),
            model: RiskVersion::linear(),
        }]
    }

    fn verdict(taker: &mut Taker, room: &Room) -> Verdict {
        taker.follow();
        taker.schedule.decide(clock::now().monotonic, room)
    }

    fn ample() -> Room {
        Room {
            free_bytes: u64::MAX,
            ..Room::default()
        }
    }

    #[tokio::test]
    async fn a_risk_that_rises_takes_a_checkpoint_before_the_interval_is_over() {
        let (mut taker, _root) = taker();
        taker.schedule.found(Duration::from_secs(90));
        assert!(matches!(verdict(&mut taker, &ample()), Verdict::Wait { .. }));
        taker.context.shared.note_risks(risks(0.95, "memory"));
        let Verdict::Take(why @ Why::Risk { .. }) = verdict(&mut taker, &ample()) else {
            panic!("no checkpoint ahead of the failure");
        };
        taker.take(why).await;
        assert_eq!(taker.list().await.unwrap().len(), 1);
        let status = taker.context.board.status();
        let reason = status.services[0].checkpoint_reason.clone().unwrap();
        assert!(reason.contains("a failure of memory is near"), "{reason}");
        let learned = read_learned(&taker.context).unwrap();
        assert!(learned.cost_s.is_some(), "what one costs is kept");
    }

    #[tokio::test]
    async fn a_store_that_is_away_costs_only_the_copy_which_is_made_when_it_is_back() {
        let (mut taker, root) = taker();
        let remote = root.path().join("remote");
        let settings = OffsiteSettings {
            url: format!("file://{}", remote.display()),
            key_file: root.path().join("key"),
            name: Some("a".to_owned()),
            keep: 3,
        };
        OffsiteKey::create(&settings.key_file).unwrap();
        let pusher = Pusher::new(
            settings.clone(),
            taker.context.clone(),
            Arc::clone(&taker.checkpoints),
            Arc::clone(&taker.new_one),
        );
        let dir = taker.context.dir.clone();
        let counted = |taker: &Taker, word| taker.context.metrics.offsite.get_or_create(&kind_of(word)).get();
        assert!(pusher.push().await, "nothing to copy yet");
        taker.take(Why::First).await;
        assert!(!pusher.push().await);
        let record = OffsiteRecord::read(&dir, "kv");
        assert!(record.failure.unwrap().contains("remote") && record.copies.is_empty());
        let local = taker.list().await.unwrap();
        assert_eq!((local.len(), counted(&taker, "failed")), (1, 1));
        std::fs::create_dir(&remote).unwrap();
        assert!(pusher.push().await && pusher.push().await);
        let record = OffsiteRecord::read(&dir, "kv");
        assert!(record.holds(&local[0]) && record.failure.is_none());
        assert_eq!(
            counted(&taker, "stored"),
            1,
            "the same checkpoint is not sent twice"
        );
        let (store, fetched) = fetch(&settings, "kv", None, &root.path().join("empty"))
            .await
            .unwrap();
        assert_eq!((store.list().unwrap().len(), fetched.bytes), (1, local[0].bytes));
        // Emptied: the record alone is not believed.
        std::fs::remove_dir_all(remote.join("a")).unwrap();
        assert!(pusher.push().await);
        assert_eq!(counted(&taker, "stored"), 2);
        // A part rots, and a drill says so: the part is sent anew, though its size is right.
        let part = std::fs::read_dir(remote.join("a/kv/parts")).unwrap().next();
        let part = part.unwrap().unwrap().path();
        let mut bytes = std::fs::read(&part).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&part, bytes).unwrap();
        let drill = async |name: &str| fetch(&settings, "kv", None, &root.path().join(name)).await;
        assert!(pusher.push().await, "nobody knows yet");
        let damaged = drill("first").await.unwrap_err();
        note_drill(&dir, "kv", 1, Err(&damaged)).unwrap();
        assert!(pusher.push().await);
        drill("second").await.unwrap();
        let record = OffsiteRecord::read(&dir, "kv");
        assert!(
            !record.suspect && !record.drill.unwrap().good,
            "the verdict stays"
        );
    }

    #[test]
    fn changes_of_one_record_at_the_same_time_are_all_kept() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        std::fs::create_dir_all(dir.checkpoints()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        OffsiteRecord::change(&dir, "kv", |record| {
                            let word = record.failure.get_or_insert_default();
                            word.push('x');
                        })
                        .unwrap();
                    }
                });
            }
        });
        assert_eq!(OffsiteRecord::read(&dir, "kv").failure.unwrap().len(), 100);
    }

    #[test]
    fn a_disk_without_room_is_told_once() {
        let (mut taker, _root) = taker();
        taker.schedule.found(Duration::from_hours(2));
        for _ in 0..3 {
            let Verdict::Skip(refusal) = verdict(
                &mut taker,
                &Room {
                    reserve_bytes: 1,
                    ..Room::default()
                },
            ) else {
                panic!("a copy on a full disk");
            };
            taker.skip(refusal);
        }
        let status = taker.context.board.status();
        let reason = status.services[0].checkpoint_reason.clone().unwrap();
        assert!(reason.contains("nearly full"), "{reason}");
        assert_eq!(
            taker
                .context
                .metrics
                .checkpoints
                .get_or_create(&kind_of("disk_full"))
                .get(),
            1
        );
    }

    #[test]
    fn a_crash_counts_once_and_is_kept() {
        let (mut taker, _root) = taker();
        taker.schedule.found(Duration::ZERO);
        taker.follow();
        let before = taker.schedule.learned().failures;
        taker.context.shared.unsound.store(true, Ordering::Relaxed);
        taker.follow();
        taker.follow();
        let after = taker.schedule.learned().failures;
        assert!(after > before + 0.9 && after < before + 1.1, "{before} {after}");
        assert!((read_learned(&taker.context).unwrap().failures - after).abs() < 1e-9);
    }
}
