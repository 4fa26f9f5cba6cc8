//! Long-lived tasks: started again when they fail, told when to stop, given a grace period.
//!
//! A panic or an error in one task ends that task only. It is started anew after a pause that doubles up to half a
//! minute, and both are visible in `/healthz`, `/metrics` and the log.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A task that ran this long before it failed begins with the first pause again.
const SETTLED: Duration = Duration::from_mins(1);

/// How patient the supervision is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// First pause before a failed task is started again. Default 200 ms.
    pub pause_min: Duration,
    /// Longest such pause. Default 30 s.
    pub pause_max: Duration,
    /// Time that tasks have to finish after the signal to stop. Default 15 s.
    pub grace: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            pause_min: Duration::from_millis(200),
            pause_max: Duration::from_secs(30),
            grace: Duration::from_secs(15),
        }
    }
}

/// The one signal to stop; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

/// The sending end of [`Shutdown`].
#[derive(Debug)]
pub struct ShutdownSender(watch::Sender<bool>);

/// A pair of signal and sender.
pub fn shutdown() -> (ShutdownSender, Shutdown) {
    let (sender, receiver) = watch::channel(false);
    (ShutdownSender(sender), Shutdown(receiver))
}

impl ShutdownSender {
    /// Tells every task to stop.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// Waits for the signal.
    pub async fn wait(&mut self) {
        // An error means that the sender is gone, which is a signal too.
        let _signalled = self.0.wait_for(|stop| *stop).await.is_ok();
    }

    /// Whether the signal was given.
    pub fn is_set(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }
}

/// How a task is doing.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TaskState {
    /// Whether it runs now (or ended because it was told to).
    pub running: bool,
    /// How often it was started again.
    pub restarts: u64,
    /// Why it failed last.
    pub last_failure: Option<String>,
}

/// The board on which every task's state is seen.
#[derive(Debug, Clone, Default)]
pub struct TaskBoard(Arc<Mutex<BTreeMap<String, TaskState>>>);

impl TaskBoard {
    /// Every task and its state.
    pub fn states(&self) -> BTreeMap<String, TaskState> {
        // The map is only ever replaced entry by entry, so a poisoned lock still guards a whole one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn update(&self, name: &str, change: impl FnOnce(&mut TaskState)) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = TaskState {
            running: false,
            restarts: 0,
            last_failure: None,
        };
        change(tasks.entry(name.to_owned()).or_insert(fresh));
    }
}

/// The tasks of one process.
#[derive(Debug)]
pub struct Tasks {
    set: JoinSet<()>,
    board: TaskBoard,
    shutdown: Shutdown,
    pace: Pace,
}

impl Tasks {
    /// No task yet.
    pub fn new(shutdown: Shutdown, pace: Pace) -> Self {
        Self {
            set: JoinSet::new(),
            board: TaskBoard::default(),
            shutdown,
            pace,
        }
    }

    /// Where the tasks' states are seen.
    pub fn board(&self) -> TaskBoard {
        self.board.clone()
    }

    /// Runs the task that `start` makes, and makes it again whenever it fails, until the signal to stop. A task that
    /// returns `Ok` before that counts as failed too: these tasks never finish by themselves.
    pub fn spawn<F, E>(&mut self, name: impl Into<String>, start: impl Fn(Shutdown) -> F + Send + 'static)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display + Send + 'static,
    {
        let (name, board) = (name.into(), self.board.clone());
        let mut shutdown = self.shutdown.clone();
        let pace = self.pace;
        board.update(&name, |task| task.running = true);
        self.set.spawn(async move {
            let mut pause = pace.pause_min;
            loop {
                let started = Instant::now();
                // Its own tokio task, so that a panic ends there.
                let mut inner = AbortOnDrop(tokio::spawn(start(shutdown.clone())));
                let ended = (&mut inner.0).await;
                if shutdown.is_set() {
                    board.update(&name, |task| task.running = true);
                    return;
                }
                let reason = match ended {
                    Ok(Ok(())) => "it ended by itself".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(join) if join.is_panic() => format!("panic: {}", panic_text(join)),
                    Err(_) => "it was cancelled".to_owned(),
                };
                tracing::error!(task = name, reason, "task failed, starting it again");
                board.update(&name, |task| {
                    task.running = false;
                    task.restarts += 1;
                    task.last_failure = Some(reason);
                });
                pause = if started.elapsed() > SETTLED {
                    pace.pause_min
                } else {
                    pause
                };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = shutdown.wait() => return,
                }
                pause = (pause * 2).min(pace.pause_max);
                board.update(&name, |task| task.running = true);
            }
        });
    }

    /// Waits, after the signal to stop, until every task has ended; ends those that do not within the grace period.
    pub async fn finish(mut self) {
        let all = async { while self.set.join_next().await.is_some() {} };
        if tokio::time::timeout(self.pace.grace, all).await.is_err() {
            let left = self.set.len();
            tracing::warn!(
                tasks = left,
                "tasks did not stop within the grace period and are cut off"
            );
            self.set.shutdown().await;
        }
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn panic_text(error: tokio::task::JoinError) -> String {
    let payload = error.into_panic();
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const QUICK: Pace = Pace {
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(5),
        grace: Duration::from_millis(50),
    };

    #[tokio::test]
    async fn a_panic_in_one_task_restarts_it_and_leaves_the_others_alone() {
        let (sender, shutdown) = shutdown();
        let mut tasks = Tasks::new(shutdown, QUICK);
        let starts = Arc::new(AtomicU32::new(0));
        let (settled, mut is_settled) = tokio::sync::mpsc::channel(1);
        tasks.spawn("fragile", move |mut shutdown| {
            let (starts, settled) = (Arc::clone(&starts), settled.clone());
            async move {
                match starts.fetch_add(1, Ordering::SeqCst) {
                    0 => panic!("first start"),
                    1 => Err("second start"),
                    2 => Ok(()),
                    _ => {
                        settled.send(()).await.unwrap();
                        shutdown.wait().await;
                        Ok(())
                    }
                }
            }
        });
        tasks.spawn("steady", |mut shutdown| async move {
            shutdown.wait().await;
            Ok::<(), String>(())
        });
        let board = tasks.board();
        tokio::time::timeout(Duration::from_mins(1), is_settled.recv())
            .await
            .unwrap()
            .unwrap();
        let states = board.states();
        assert_eq!(states["fragile"].restarts, 3);
        assert_eq!(
            states["fragile"].last_failure.as_deref(),
            Some("it ended by itself")
        );
        assert!(states["fragile"].running);
        assert_eq!(
            states["steady"],
            TaskState {
                running: true,
                restarts: 0,
                last_failure: None
            }
        );
        sender.stop();
        tasks.finish().await;
    }

    #[tokio::test]
    async fn a_task_that_does_not_stop_is_cut_off_after_the_grace_period() {
        let (sender, shutdown) = shutdown();
        let mut tasks = Tasks::new(shutdown, QUICK);
        tasks.spawn("stubborn", |_| async {
            std::future::pending::<Result<(), String>>().await
        });
        sender.stop();
        let start = Instant::now();
        tokio::time::timeout(Duration::from_mins(1), tasks.finish())
            .await
            .unwrap();
        assert!(start.elapsed() >= QUICK.grace);
    }
}
