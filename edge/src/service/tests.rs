//! The owner of a process, with a real one and a hook that takes its time.

use std::path::Path;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use theriac_heal::types::{FaultClass, IncidentId, IntentId, When};
use tokio::task::JoinHandle;

use super::*;
use crate::config::EdgeConfig;
use crate::supervise::{ShutdownSender, shutdown};

impl ServiceContext {
    /// Of a service `kv` with these sections, and what it tells.
    pub(crate) fn for_test(root: &Path, sections: &str) -> (Self, mpsc::Receiver<Input>) {
        let text = format!("[[service]]\nname = 'kv'\nargv = ['/bin/sleep', '600']\n{sections}");
        let file = root.join("edge.toml");
        std::fs::write(&file, text).unwrap();
        let config = EdgeConfig::load(Some(&file), []).unwrap();
        let (events, received) = mpsc::channel(64);
        let context = Self {
            shared: Arc::new(ServiceShared::new(config.services[0].clone())),
            dir: StateDir::open(&root.join("s")).unwrap(),
            events,
            board: Board::new("a", 60),
            metrics: Arc::new(Metrics::new()),
        };
        (context, received)
    }
}

struct Owned {
    context: ServiceContext,
    commanded: Arc<tokio::sync::Mutex<mpsc::Receiver<Command>>>,
    events: mpsc::Receiver<Input>,
    commands: mpsc::Sender<Command>,
    stop: ShutdownSender,
    task: JoinHandle<Result<(), CheckpointError>>,
    /// The hook writes its number here.
    hook: std::path::PathBuf,
    _root: tempfile::TempDir,
}

impl Owned {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let hook = root.path().join("hook");
        let text = format!(
            "[service.hook]\nfor = ['hang']\ntimeout = '1m'\n\
             argv = ['/bin/sh', '-c', 'echo $$ > {0}.new; mv {0}.new {0}; sleep 600']\n",
            hook.display()
        );
        let (context, received) = ServiceContext::for_test(root.path(), &text);
        let (commands, commanded) = mpsc::channel(16);
        let (stop, signal) = shutdown();
        let commanded = Arc::new(tokio::sync::Mutex::new(commanded));
        Self {
            events: received,
            commands,
            stop,
            task: tokio::spawn(own(context.clone(), Arc::clone(&commanded), signal)),
            context,
            commanded,
            hook,
            _root: root,
        }
    }

    /// What it says next, but for how its file system is.
    async fn next(&mut self) -> Input {
        loop {
            let said = tokio::time::timeout(Duration::from_mins(1), self.events.recv())
                .await
                .expect("the owner says something within a minute")
                .unwrap();
            if !matches!(said, Input::ReadOnly { .. }) {
                return said;
            }
        }
    }

    /// Starts the service, then the hook. The numbers of their processes.
    async fn begin(&mut self) -> (i32, i32) {
        self.commands.send(Command::Begin).await.unwrap();
        let Input::Started { pid, .. } = self.next().await else {
            panic!("it was to start");
        };
        let execute = Command::Execute(intent(), Duration::MAX);
        self.commands.send(execute).await.unwrap();
        let begun = Instant::now();
        let hook = loop {
            assert!(begun.elapsed() < Duration::from_mins(1), "the hook never began");
            if let Ok(text) = std::fs::read_to_string(&self.hook) {
                break text.trim().parse().unwrap();
            }
            tokio::task::yield_now().await;
        };
        (i32::try_from(pid).unwrap(), hook)
    }
}

fn intent() -> Intent {
    Intent {
        id: IntentId(1),
        incident: IncidentId(1),
        service: "kv".to_owned(),
        action: ActionKind::Hook,
        class: FaultClass::Hang,
        session: None,
        decided: When::default(),
        reason: "a test".to_owned(),
    }
}

#[tokio::test]
async fn an_exit_is_heard_while_a_hook_runs_and_the_hook_ends_by_itself() {
    let mut owned = Owned::new();
    let (service, hook) = owned.begin().await;
    kill_process(Pid::from_raw(service).unwrap(), Signal::KILL).unwrap();
    let heard = owned.next().await;
    assert!(matches!(heard, Input::Exited { .. }), "{heard:?}");
    kill_process(Pid::from_raw(hook).unwrap(), Signal::KILL).unwrap();
    let ended = owned.next().await;
    assert!(
        matches!(
            ended,
            Input::Executed {
                id: IntentId(1),
                outcome: Outcome::Failed { running: false, .. }
            }
        ),
        "{ended:?}"
    );
    owned.stop.stop();
    owned.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_can_not_begin_in_time_any_more_is_not_done_and_told() {
    let mut owned = Owned::new();
    owned.commands.send(Command::Begin).await.unwrap();
    assert!(matches!(owned.next().await, Input::Started { .. }));
    for action in [ActionKind::Hook, ActionKind::Restart, ActionKind::RestoreAndStart] {
        let intent = Intent { action, ..intent() };
        let execute = Command::Execute(intent, Duration::ZERO);
        owned.commands.send(execute).await.unwrap();
        let told = owned.next().await;
        let id = IntentId(1);
        let outcome = Outcome::NotNeeded;
        assert_eq!(told, Input::Executed { id, outcome }, "{action}");
    }
    assert!(!owned.hook.exists());
    owned.stop.stop();
    owned.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_signal_to_stop_does_not_wait_for_a_hook_and_leaves_none_of_its_processes() {
    let mut owned = Owned::new();
    let (service, hook) = owned.begin().await;
    owned.stop.stop();
    tokio::time::timeout(Duration::from_secs(30), owned.task)
        .await
        .expect("it ends long before the hook's minute is over")
        .unwrap()
        .unwrap();
    let begun = Instant::now();
    for pid in [service, hook] {
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(begun.elapsed() < Duration::from_mins(1), "{}", state());
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_service_that_is_ended_together_with_the_edge_has_not_crashed() {
    for together in [true, false] {
        let mut owned = Owned::new();
        owned.commands.send(Command::Begin).await.unwrap();
        let Input::Started { pid, .. } = owned.next().await else {
            panic!("it was to start");
        };
        kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::TERM).unwrap();
        if !together {
            let heard = owned.next().await;
            assert!(matches!(heard, Input::Exited { .. }), "{heard:?}");
        }
        owned.stop.stop();
        owned.task.await.unwrap().unwrap();
        while let Ok(heard) = owned.events.try_recv() {
            assert!(!matches!(heard, Input::Exited { .. }), "{heard:?}");
        }
    }
}

#[tokio::test]
async fn an_exit_is_heard_while_a_restore_waits_for_a_copy_of_the_state() {
    let mut owned = Owned::new();
    owned.commands.send(Command::Begin).await.unwrap();
    let Input::Started { pid, .. } = owned.next().await else {
        panic!("it was to start");
    };
    let shared = Arc::clone(&owned.context.shared);
    let copied = shared.state_in_use.lock().await;
    let intent = Intent {
        action: ActionKind::RestoreAndStart,
        ..intent()
    };
    owned
        .commands
        .send(Command::Execute(intent, Duration::MAX))
        .await
        .unwrap();
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    let heard = owned.next().await;
    assert!(matches!(heard, Input::Exited { .. }), "{heard:?}");
    drop(copied);
    let heard = owned.next().await;
    assert!(
        matches!(heard, Input::Executed { id: IntentId(1), .. }),
        "{heard:?}"
    );
    owned.stop.stop();
    owned.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_an_owner_had_taken_that_did_not_come_to_its_end_is_told_by_the_next() {
    let mut owned = Owned::new();
    let (_, hook) = owned.begin().await;
    // As when it panics: what it had under way goes with it.
    owned.task.abort();
    assert!((&mut owned.task).await.unwrap_err().is_cancelled());
    let (stop, signal) = shutdown();
    let next = tokio::spawn(own(owned.context.clone(), Arc::clone(&owned.commanded), signal));
    loop {
        let heard = owned.next().await;
        if let Input::Executed { id, outcome } = heard {
            assert_eq!(id, IntentId(1));
            assert!(
                matches!(&outcome, Outcome::Failed { detail, .. } if detail.contains("was cut off")),
                "{outcome:?}"
            );
            break;
        }
    }
    stop.stop();
    next.await.unwrap().unwrap();
    assert!(hook > 0);
}

async fn broken() -> Outcome {
    tokio::task::yield_now().await;
    panic!("the hands broke")
}

#[tokio::test]
async fn a_panic_in_the_hands_is_a_failure_of_its_intent() {
    let mut beside = JoinSet::new();
    let id = beside.spawn(broken()).id();
    let ended = beside.join_next_with_id().await.unwrap();
    let (of, outcome) = how_it_ended(ended, true);
    assert_eq!(of, id);
    assert!(
        matches!(&outcome, Outcome::Failed { running: true, detail } if detail.contains("panicked")),
        "{outcome:?}"
    );
}
