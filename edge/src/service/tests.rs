//! The owner of a process, with a real one and a hook that takes its time.

use rustix::process::{Pid, Signal, kill_process};
use theriac_heal::types::{IncidentId, IntentId, When};
use tokio::task::JoinHandle;

use super::*;
use crate::config::EdgeConfig;
use crate::supervise::{ShutdownSender, shutdown};

struct Owned {
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
            "[[service]]\nname = 'kv'\nargv = ['/bin/sleep', '600']\n[service.hook]\nfor = ['hang']\ntimeout = '1m'\n\
             argv = ['/bin/sh', '-c', 'echo $$ > {0}.new; mv {0}.new {0}; sleep 600']\n",
            hook.display()
        );
        let file = root.path().join("edge.toml");
        std::fs::write(&file, text).unwrap();
        let config = EdgeConfig::load(Some(&file), []).unwrap();
        let (events, received) = mpsc::channel(64);
        let (commands, commanded) = mpsc::channel(16);
        let context = ServiceContext {
            shared: Arc::new(ServiceShared::new(config.services[0].clone())),
            dir: StateDir::open(&root.path().join("s")).unwrap(),
            events,
            board: Board::new("a", 60),
            metrics: Arc::new(Metrics::new()),
        };
        let (stop, signal) = shutdown();
        let commanded = Arc::new(tokio::sync::Mutex::new(commanded));
        Self {
            events: received,
            commands,
            stop,
            task: tokio::spawn(own(context, commanded, signal)),
            hook,
            _root: root,
        }
    }

    async fn next(&mut self) -> Input {
        tokio::time::timeout(Duration::from_mins(1), self.events.recv())
            .await
            .expect("the owner says something within a minute")
            .unwrap()
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
            assert!(begun.elapsed() < Duration::from_secs(20), "{}", state());
            tokio::task::yield_now().await;
        }
    }
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

#[tokio::test]
async fn the_first_look_tells_that_the_state_can_be_written_so_that_what_an_earlier_run_saw_ends() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("edge.toml");
    let text = "[[service]]\nname = 'kv'\nargv = ['/bin/sleep', '600']\n";
    std::fs::write(&file, text).unwrap();
    let config = EdgeConfig::load(Some(&file), []).unwrap();
    let (events, mut received) = mpsc::channel(4);
    let context = ServiceContext {
        shared: Arc::new(ServiceShared::new(config.services[0].clone())),
        dir: StateDir::open(&root.path().join("s")).unwrap(),
        events,
        board: Board::new("a", 60),
        metrics: Arc::new(Metrics::new()),
    };
    assert!(look_whether_writable(&context, false).await);
    assert!(matches!(
        received.try_recv(),
        Ok(Input::ReadOnly { on: false, .. })
    ));
}
