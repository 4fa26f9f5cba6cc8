//! Carries intents out on one supervised service: state check, restore, start, in the right order.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use super::cgroup::{CgroupError, CgroupHands, UNDO_AGAIN};
use super::clock;
use super::hook::{Called, Hook};
use super::postgres::{AtRoot, PostgresHands};
use super::process::{Leftover, ProcessError, Supervisor, process_state};
use super::proxy::Proxy;
use super::space::SpaceHands;
use super::webhook::Webhook;
use crate::checkpoint::state_check::{StateCheck, StateVerdict};
use crate::checkpoint::store::{Checkpoint, CheckpointError, CheckpointStore, Restored};
use crate::incident::{Input, ProcessState};
use crate::types::{ActionKind, FaultClass, Intent, Outcome};

/// The durable state of a service.
#[derive(Debug, Clone)]
pub struct ServiceState {
    /// The state directory.
    pub dir: PathBuf,
    /// Says whether a state directory is good; `None` takes every state for good.
    pub check: Option<StateCheck>,
    /// Where checkpoints of it are kept; not inside the state directory.
    pub checkpoints: CheckpointStore,
}

/// The hands on one service. One task owns them, so no two actions on a service can overlap.
#[derive(Debug)]
pub struct ServiceHands {
    /// The process.
    pub supervisor: Supervisor,
    /// Its state; `None` for a service without durable state.
    pub state: Option<ServiceState>,
    /// Its sessions; `None` for a service that is no database server.
    pub sessions: Option<PostgresHands>,
    /// What may be moved away when its disk is full; `None` where nothing is listed.
    pub space: Option<SpaceHands>,
    /// The program that may be run; `None` where none is configured.
    pub hook: Option<Hook>,
    /// Who else is told; `None` where nobody is configured.
    pub webhook: Option<Webhook>,
    /// What stands before it; `None` where clients come straight to it.
    pub proxy: Option<Arc<Proxy>>,
    /// Groups of processes that may be bounded; `None` where none is listed.
    pub cgroup: Option<CgroupHands>,
    /// The unit of systemd that may be restarted; `None` where none is named.
    #[cfg(feature = "systemd")]
    pub systemd: Option<super::systemd::SystemdHands>,
    /// The deployment of Kubernetes that may be changed, and what tells this service's intents from another's; `None` where none is named.
    #[cfg(feature = "kubernetes")]
    pub kubernetes: Option<(super::kubernetes::KubernetesHands, String)>,
}

/// The hands that leave the process alone: they work beside whoever owns it, so that its exits and the signal to stop are heard meanwhile.
/// A hook whose run is dropped is killed with its process group.
#[derive(Debug, Clone)]
pub struct Beside {
    sessions: Option<PostgresHands>,
    space: Option<SpaceHands>,
    hook: Option<Hook>,
    webhook: Option<Webhook>,
    proxy: Option<Arc<Proxy>>,
    cgroup: Option<CgroupHands>,
    #[cfg(feature = "systemd")]
    systemd: Option<super::systemd::SystemdHands>,
    #[cfg(feature = "kubernetes")]
    kubernetes: Option<(super::kubernetes::KubernetesHands, String)>,
    /// Whether the service's process ran when the action began.
    running: bool,
}

/// What a service was found to be when the node started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// The child of an earlier run still runs; it is supervised again.
    Adopted {
        /// Its process.
        pid: u32,
    },
    /// It was started.
    Started {
        /// Its process.
        pid: u32,
    },
    /// It was not started: an open incident decides about it.
    Left,
    /// It was not started: its state is corrupt.
    StateCorrupt(String),
    /// It could not be started.
    Failed(String),
}

impl ServiceHands {
    /// At the node's start: takes over what an earlier run left. When nothing runs and no incident is open for the service, starts it.
    pub async fn boot(&mut self, incident_open: bool) -> Boot {
        match self.supervisor.take_over().await {
            Ok(Leftover::Adopted { pid }) => return Boot::Adopted { pid },
            Ok(Leftover::None | Leftover::Cleared { .. }) if incident_open => return Boot::Left,
            Ok(Leftover::None | Leftover::Cleared { .. }) => {}
            Err(error) => return Boot::Failed(error.to_string()),
        }
        match self.begin().await {
            Ok(pid) => Boot::Started { pid },
            Err(Refused::Corrupt(detail)) => Boot::StateCorrupt(detail),
            Err(Refused::Failed(detail)) => Boot::Failed(detail),
        }
    }

    /// Carries one durable intent out. Bounded by the timeouts of the specification and of the state check, and by the time that
    /// copying the state takes.
    pub async fn execute(&mut self, intent: &Intent) -> Outcome {
        if !intent.action.renews_process() {
            return self.beside().execute(intent).await;
        }
        self.hold(intent).await;
        let done = match intent.action {
            ActionKind::Start if self.supervisor.pid().is_some() => Ok(Outcome::Done),
            ActionKind::Start => self.start(Some(intent)).await.map(|_pid| Outcome::Done),
            ActionKind::Restart => self.restart(intent).await.map(|()| Outcome::Done),
            ActionKind::RestoreAndStart => self
                .restore(intent)
                .await
                .map(|detail| Outcome::Restored { detail }),
            other => Err(Refused::Failed(format!("{other} is no action on a process"))),
        };
        let running = self.supervisor.pid().is_some();
        self.let_go(running);
        match done {
            Ok(outcome) => outcome,
            Err(Refused::Corrupt(detail)) => Outcome::StateCorrupt { detail, running },
            Err(Refused::Failed(detail)) => Outcome::Failed { detail, running },
        }
    }

    /// New requests wait while the process is renewed. Those in hand may end first, where the service can still answer them.
    async fn hold(&self, intent: &Intent) {
        let Some(proxy) = &self.proxy else { return };
        proxy.hold();
        let answers = !matches!(intent.class, FaultClass::Crash | FaultClass::Hang);
        if answers && self.supervisor.pid().is_some() {
            let left = proxy.finished(FINISH_WITHIN).await;
            tracing::info!(service = %intent.service, left, "requests in hand before the restart");
            // The time for which they wait begins now.
            proxy.hold();
        }
    }

    fn let_go(&self, running: bool) {
        match &self.proxy {
            Some(proxy) if running => {
                let proxy = Arc::clone(proxy);
                // Bounded by the time for which they are held.
                drop(tokio::spawn(async move { proxy.release_when_up().await }));
            }
            Some(proxy) => proxy.release(),
            None => {}
        }
    }

    /// Takes back what a reversible action did, when it had no effect or harmed. Another intent's is left.
    pub async fn undo(&self, intent: u64) {
        if let Some(proxy) = &self.proxy {
            proxy.undrain(intent);
        }
        if let Some(done) = self.with_groups(move |hands| hands.undo(Some(intent))).await {
            self.tell_undone(done);
        }
    }

    /// Takes back all bounds, at our end: what still acts beside us finds that it may not any more.
    pub fn undo_all(&self) {
        if let Some(hands) = &self.cgroup {
            self.tell_undone(hands.close());
        }
    }

    /// Takes back what has lasted long enough. When to look again, on the monotonic clock; `None` when nothing is in force.
    pub async fn undo_due(&self) -> Option<Duration> {
        self.cgroup.as_ref()?;
        let look = |hands: &CgroupHands| hands.undo_due_then(clock::now(), &clock::clock_id());
        let Some((done, next)) = self.with_groups(look).await else {
            return Some(clock::now().monotonic + UNDO_AGAIN);
        };
        self.tell_undone(done);
        next
    }

    /// Off the async threads: the kernel takes its time to freeze. `None` without hands, or when the runtime ends.
    async fn with_groups<T: Send + 'static>(
        &self,
        work: impl FnOnce(&CgroupHands) -> T + Send + 'static,
    ) -> Option<T> {
        let hands = self.cgroup.clone()?;
        tokio::task::spawn_blocking(move || work(&hands)).await.ok()
    }

    fn tell_undone(&self, done: Result<Vec<String>, CgroupError>) {
        let service = &self.supervisor.spec().name;
        match done {
            Ok(undone) => {
                for words in undone {
                    tracing::info!(service, words, "a bound was taken back");
                }
            }
            Err(error) => tracing::error!(service, %error, "a bound was not taken back"),
        }
    }

    /// Puts the service's process into its group. What cannot be is told: the service runs all the same.
    pub fn place(&self, pid: u32) {
        if let Some(hands) = &self.cgroup
            && let Err(error) = hands.place(pid)
        {
            tracing::warn!(service = %self.supervisor.spec().name, %error, "not in its group of processes");
        }
    }

    /// The hands for actions that leave the process alone.
    pub fn beside(&self) -> Beside {
        Beside {
            sessions: self.sessions.clone(),
            space: self.space.clone(),
            hook: self.hook.clone(),
            webhook: self.webhook.clone(),
            proxy: self.proxy.clone(),
            cgroup: self.cgroup.clone(),
            #[cfg(feature = "systemd")]
            systemd: self.systemd.clone(),
            #[cfg(feature = "kubernetes")]
            kubernetes: self.kubernetes.clone(),
            running: self.supervisor.pid().is_some(),
        }
    }
}

impl Beside {
    async fn bound(&self, intent: &Intent) -> Outcome {
        let running = self.running;
        let (action, number) = (intent.action, intent.id.0);
        let Some(hands) = self.cgroup.clone() else {
            let detail = format!("no group is listed for {action}");
            return Outcome::Failed { detail, running };
        };
        let done =
            tokio::task::spawn_blocking(move || hands.act(action, number, clock::now(), &clock::clock_id()));
        match done.await {
            Ok(Ok(detail)) => Outcome::Relieved { detail },
            Ok(Err(error)) => Outcome::Failed {
                detail: error.to_string(),
                running,
            },
            Err(error) => Outcome::Failed {
                detail: error.to_string(),
                running,
            },
        }
    }

    #[cfg(feature = "systemd")]
    async fn of_systemd(&self, action: ActionKind) -> Result<String, String> {
        match &self.systemd {
            Some(hands) => hands.act(action).await.map_err(|error| error.to_string()),
            None => Err("no unit is named".to_owned()),
        }
    }

    #[cfg(not(feature = "systemd"))]
    #[expect(clippy::unused_async, reason = "with the feature it waits")]
    async fn of_systemd(&self, action: ActionKind) -> Result<String, String> {
        Err(format!("{action}: this build has no systemd"))
    }

    #[cfg(feature = "kubernetes")]
    async fn of_kubernetes(&self, intent: &Intent) -> Result<String, String> {
        let Some((hands, of)) = &self.kubernetes else {
            return Err("no deployment is named".to_owned());
        };
        // The moment tells it from one with the same number after the store was lost.
        let key = format!("{of}-{}-{}", intent.id, intent.decided.unix_ms);
        let done = hands.act(intent.action, &key).await;
        done.map_err(|error| error.to_string())
    }

    #[cfg(not(feature = "kubernetes"))]
    #[expect(clippy::unused_async, reason = "with the feature it waits")]
    async fn of_kubernetes(&self, intent: &Intent) -> Result<String, String> {
        Err(format!("{}: this build has no Kubernetes", intent.action))
    }

    /// What another manager of processes did.
    fn elsewhere(&self, done: Result<String, String>) -> Outcome {
        match done {
            Ok(detail) => Outcome::Relieved { detail },
            Err(detail) => Outcome::Failed {
                detail,
                running: self.running,
            },
        }
    }

    async fn drain(&self, intent: &Intent) -> Outcome {
        let Some(proxy) = &self.proxy else {
            return Outcome::Failed {
                detail: "the service has no proxy".to_owned(),
                running: self.running,
            };
        };
        let drained = proxy.drain(intent.id.0).await;
        Outcome::Relieved {
            detail: format!(
                "of {} requests in hand {} have not ended; new ones are turned away for {:?}",
                drained.had, drained.left, drained.lasts
            ),
        }
    }

    /// Carries one durable intent out that does not renew the process. Bounded by the timeouts of what is called.
    pub async fn execute(&self, intent: &Intent) -> Outcome {
        let (running, action) = (self.running, intent.action);
        if action.renews_process() {
            let detail = format!("{action} is an action on the process");
            return Outcome::Failed { detail, running };
        }
        if action == ActionKind::RelieveSpace {
            return self.make_room(intent).await;
        }
        match action {
            ActionKind::Drain => return self.drain(intent).await,
            ActionKind::ThrottleCpu | ActionKind::LimitMemory | ActionKind::Freeze => {
                return self.bound(intent).await;
            }
            ActionKind::RestartUnit | ActionKind::ReloadUnit | ActionKind::ResetFailedUnit => {
                return self.elsewhere(self.of_systemd(action).await);
            }
            ActionKind::RolloutRestart | ActionKind::ScaleUp | ActionKind::RolloutUndo => {
                return self.elsewhere(self.of_kubernetes(intent).await);
            }
            _ => {}
        }
        if matches!(action, ActionKind::Hook | ActionKind::Webhook) {
            return self.call(intent).await;
        }
        let Some(hands) = &self.sessions else {
            let detail = format!("{action}: the service has no sessions that can be reached");
            return Outcome::Failed { detail, running };
        };
        let relief = match action {
            ActionKind::CancelQuery => hands.relieve_locks(AtRoot::Cancel, intent.session).await,
            ActionKind::TerminateBlocker => hands.relieve_locks(AtRoot::Terminate, intent.session).await,
            ActionKind::EndIdleSessions => hands.relieve_connections().await,
            _ => hands.reload().await,
        };
        match relief {
            Ok(relief) if relief.relieved => Outcome::Relieved {
                detail: relief.detail,
            },
            Ok(relief) if relief.spared => Outcome::Spared {
                detail: relief.detail,
            },
            Ok(relief) => Outcome::Fruitless {
                detail: relief.detail,
            },
            Err(error) => Outcome::Failed {
                detail: error.to_string(),
                running,
            },
        }
    }

    async fn call(&self, intent: &Intent) -> Outcome {
        let running = self.running;
        let called = Called {
            service: intent.service.clone(),
            incident: intent.incident.0,
            intent: intent.id.0,
            class: intent.class,
            decided_unix_ms: intent.decided.unix_ms,
            reason: intent.reason.clone(),
        };
        let done = match (intent.action, &self.hook, &self.webhook) {
            (ActionKind::Hook, Some(hook), _) => hook.run(&called).await.map_err(|error| error.to_string()),
            (ActionKind::Webhook, _, Some(webhook)) => {
                webhook.send(&called).await.map_err(|error| error.to_string())
            }
            (action, ..) => Err(format!("no {action} is configured")),
        };
        match done {
            Ok(detail) => Outcome::Relieved { detail },
            Err(detail) => Outcome::Failed { detail, running },
        }
    }

    async fn make_room(&self, intent: &Intent) -> Outcome {
        let running = self.running;
        let failed = |detail: String| Outcome::Failed { detail, running };
        let Some(hands) = self.space.clone() else {
            return failed("nothing is listed that may be moved away".to_owned());
        };
        let number = intent.id.0;
        match tokio::task::spawn_blocking(move || hands.relieve(number)).await {
            Ok(Ok(room)) if room.relieved => Outcome::Relieved {
                detail: room.to_string(),
            },
            Ok(Ok(room)) => Outcome::Fruitless {
                detail: room.to_string(),
            },
            Ok(Err(error)) => failed(error.to_string()),
            Err(error) => failed(error.to_string()),
        }
    }
}

impl ServiceHands {
    /// The answer to [`crate::incident::Output::Reconcile`], after [`Self::boot`].
    pub fn reconcile(&self, intent: &Intent) -> Input {
        let running = self.supervisor.pid().is_some();
        let took_effect = running && self.supervisor.started_for() == Some(intent.id.0);
        Input::Reconciled {
            id: intent.id,
            running,
            took_effect,
        }
    }

    /// Copies the state, checks the copy, keeps it when it is good. `None` for a service without durable state. A copy that is not good
    /// may have been taken while the service wrote, so it is tried up to three times.
    ///
    /// # Errors
    /// [`CheckpointError`]; [`CheckpointError::NotGood`] when no copy passed the state check.
    pub async fn checkpoint(&self, unix_ms: u64) -> Result<Option<Checkpoint>, CheckpointError> {
        match &self.state {
            Some(state) => state.checkpoint(unix_ms).await.map(Some),
            None => Ok(None),
        }
    }

    /// Whether the state passes its check; `None` for a service without state or check.
    pub async fn check_state(&self) -> Option<StateVerdict> {
        let state = self.state.as_ref()?;
        Some(state.check.as_ref()?.run(&state.dir).await)
    }

    /// Starts what does not run, for no intent: at the node's start. Its process. Not where its state is corrupt or gone.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn begin(&mut self) -> Result<u32, Refused> {
        self.start(None).await
    }

    async fn start(&mut self, intent: Option<&Intent>) -> Result<u32, Refused> {
        self.supervisor.free_for_a_start()?;
        if let Some(state) = &self.state {
            let (store, dir) = (state.checkpoints.clone(), state.dir.clone());
            blocking(move || store.finish_interrupted(&dir)).await?;
        }
        self.refuse_corrupt().await?;
        let pid = self
            .supervisor
            .start_for(intent.map(|intent| intent.id.0))
            .await?;
        self.place(pid);
        Ok(pid)
    }

    async fn restart(&mut self, intent: &Intent) -> Result<(), Refused> {
        // A service that may still be serving is not stopped when it could not be started again.
        if self.supervisor.pid().and_then(process_state) == Some(ProcessState::Alive) {
            self.refuse_corrupt().await?;
        }
        self.supervisor.stop().await?;
        self.start(Some(intent)).await.map(drop)
    }

    /// Which state the service runs on then, in words.
    async fn restore(&mut self, intent: &Intent) -> Result<String, Refused> {
        let Some(state) = &self.state else {
            return Err(Refused::Failed(
                "the service has no state directory to restore".to_owned(),
            ));
        };
        // Its data is not replaced under somebody else's server.
        self.supervisor.free_for_a_start()?;
        let (store, dir) = (state.checkpoints.clone(), state.dir.clone());
        let nothing_to_restore = || {
            let empty = store.list()?.is_empty();
            let words = format!("{} holds no checkpoint", store.dir().display());
            if empty {
                Err(Refused::Failed(words))
            } else {
                Ok(())
            }
        };
        // A service that may still be serving is not stopped for nothing.
        if self.supervisor.pid().is_some() {
            nothing_to_restore()?;
        }
        self.supervisor.stop().await?;
        // What a check said while the service wrote, or before somebody mended it, may not hold now.
        let gone = state.gone().await?;
        if gone.is_none() && exists(&dir) && self.check_state().await == Some(StateVerdict::Good) {
            tracing::info!(service = %intent.service, "the state passes its check again and is kept");
            self.start(Some(intent)).await?;
            return Ok("its state passes its check again and was kept".to_owned());
        }
        nothing_to_restore()?;
        let restored: Restored = blocking(move || store.restore(&dir)).await?;
        let detail = restored.to_string();
        tracing::info!(service = %intent.service, detail, "state restored");
        self.start(Some(intent)).await?;
        Ok(detail)
    }

    async fn refuse_corrupt(&self) -> Result<(), Refused> {
        let Some(state) = &self.state else { return Ok(()) };
        if let Some(gone) = state.gone().await? {
            return Err(Refused::Corrupt(gone));
        }
        match self.check_state().await {
            // A service that has no state yet makes it.
            Some(StateVerdict::Corrupt(detail)) if exists(&state.dir) => Err(Refused::Corrupt(detail)),
            Some(StateVerdict::Unknown(detail)) => {
                // It says nothing about the state; the service itself refuses what it cannot read.
                tracing::warn!(service = %self.supervisor.spec().name, detail, "state check failed");
                Ok(())
            }
            Some(StateVerdict::Good | StateVerdict::Corrupt(_)) | None => Ok(()),
        }
    }
}

impl ServiceState {
    /// In words, that there is nothing where there are checkpoints of something: a disk that did not come back, or a directory that somebody
    /// emptied. Whoever is started on it serves nothing, and copies of that push out those of what was lost.
    async fn gone(&self) -> Result<Option<String>, CheckpointError> {
        let (store, dir) = (self.checkpoints.clone(), self.dir.clone());
        unblock(move || {
            if !is_empty(&dir) {
                return Ok(None);
            }
            let kept = match store.restorable() {
                Ok(kept) => kept,
                Err(error) => {
                    // That says nothing of the state, and a start must not depend on it.
                    tracing::warn!(%error, "whether there are checkpoints of an empty state cannot be seen");
                    return Ok(None);
                }
            };
            // The newest alone: of a state that is empty now and then the one before it may not be.
            let newest = kept.into_iter().next().filter(|newest| newest.files > 0);
            Ok(newest.map(|newest| {
                format!(
                    "{} is empty or missing, and checkpoint {} of it has {} files",
                    dir.display(),
                    newest.sequence,
                    newest.files
                )
            }))
        })
        .await
    }

    /// See [`ServiceHands::checkpoint`]. Needs no hold on the process, so it can run beside the supervisor.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub async fn checkpoint(&self, unix_ms: u64) -> Result<Checkpoint, CheckpointError> {
        let mut attempt = 1;
        loop {
            let (store, dir) = (self.checkpoints.clone(), self.dir.clone());
            let staged = unblock(move || store.stage(&dir, unix_ms)).await?;
            let verdict = match &self.check {
                Some(check) => check.run(staged.tree()).await,
                None => StateVerdict::Good,
            };
            let store = self.checkpoints.clone();
            let detail = match verdict {
                StateVerdict::Good => return unblock(move || store.commit(staged)).await,
                StateVerdict::Corrupt(detail) | StateVerdict::Unknown(detail) => detail,
            };
            unblock(move || store.discard(staged)).await?;
            if attempt == CHECKPOINT_ATTEMPTS {
                return Err(CheckpointError::NotGood {
                    path: self.dir.clone(),
                    detail,
                });
            }
            attempt += 1;
        }
    }
}

/// Why an action did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// The state is corrupt or gone, in words.
    Corrupt(String),
    /// Something else, in words.
    Failed(String),
}

impl From<ProcessError> for Refused {
    fn from(error: ProcessError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<CheckpointError> for Refused {
    fn from(error: CheckpointError) -> Self {
        Self::Failed(error.to_string())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, Refused> {
    Ok(unblock(work).await?)
}

/// Runs file work off the async threads.
async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, CheckpointError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(CheckpointError::Io {
            path: PathBuf::new(),
            source: std::io::Error::other(error),
        })
    })
}

/// Whether it is not there, or holds nothing but what a new file system does. One that cannot be read says nothing.
fn is_empty(dir: &Path) -> bool {
    match fs::read_dir(dir) {
        Ok(mut entries) => entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == "lost+found")),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

const CHECKPOINT_ATTEMPTS: u32 = 3;
/// Longest time that requests in hand have before a service is restarted that still answers.
const FINISH_WITHIN: Duration = Duration::from_secs(1);
