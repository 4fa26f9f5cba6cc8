//! The whole loop on one real process: the machine decides, the hands act, storage remembers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use theriac_heal::checkpoint::state_check::{StateCheck, StateVerdict};
use theriac_heal::checkpoint::store::{CheckpointStore, StoreLimits};
use theriac_heal::executor::clock;
use theriac_heal::executor::process::{ServiceSpec, Supervisor, process_state};
use theriac_heal::executor::service::{Boot, ServiceHands, ServiceState};
use theriac_heal::incident::{HealConfig, IncidentMachine, Input, MachineState, Output, ProcessState};
use theriac_heal::policy::{Autonomy, HealPolicy, NodeBudget};
use theriac_heal::types::{
    ActionKind, FaultClass, Incident, IncidentId, IncidentState, Intent, IntentId, Outcome, Verdict, When,
};

/// A node with one service `kv`: a shell that needs `state/table` to say `good` and ends when it does not.
struct Node {
    dir: TempDir,
    hands: ServiceHands,
    machine: IncidentMachine,
    closed: Vec<Incident>,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        fs::write(dir.path().join("state/table"), "good").unwrap();
        let hands = hands(dir.path());
        Self {
            dir,
            hands,
            machine: IncidentMachine::new(config()),
            closed: Vec::new(),
        }
    }

    fn table(&self) -> PathBuf {
        self.dir.path().join("state/table")
    }

    async fn boot(&mut self) -> Boot {
        self.hands.boot(self.machine.open_incident("kv").is_some()).await
    }

    async fn tell(&mut self, input: Input) {
        self.machine.handle(clock::now(), input);
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(intent) => {
                    let stored = serde_json::to_vec(&self.machine.export()).unwrap();
                    fs::write(self.dir.path().join("stored.json"), stored).unwrap();
                    self.machine
                        .handle(clock::now(), Input::IntentDurable { id: intent.id });
                }
                Output::Execute(intent) => {
                    let outcome = self.hands.execute(&intent).await;
                    self.machine.handle(
                        clock::now(),
                        Input::Executed {
                            id: intent.id,
                            outcome,
                        },
                    );
                }
                Output::Reconcile(intent) => {
                    let answer = self.hands.reconcile(&intent);
                    self.machine.handle(clock::now(), answer);
                }
                Output::Closed(incident) => self.closed.push(incident),
                Output::Opened(_)
                | Output::Updated(_)
                | Output::Notify(_)
                | Output::Reinstated(_)
                | Output::Ruled(_) => {}
            }
        }
    }

    /// Looks at the process as a probe and the supervisor would, until an incident is closed.
    async fn watch(&mut self) -> Incident {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.closed.is_empty() {
            assert!(
                Instant::now() < deadline,
                "{:?}",
                self.machine.open_incident("kv")
            );
            if let Ok(exit) =
                tokio::time::timeout(Duration::from_millis(10), self.hands.supervisor.exited()).await
            {
                self.tell(Input::Exited {
                    service: "kv".to_owned(),
                    status: exit.to_string(),
                })
                .await;
            }
            let Some(state) = self.hands.supervisor.pid().and_then(process_state) else {
                continue;
            };
            self.tell(Input::Process {
                service: "kv".to_owned(),
                state,
            })
            .await;
            let (ok, latency) = (state == ProcessState::Alive, Duration::from_millis(1));
            let detail = "timed out".to_owned();
            self.tell(Input::Probe {
                service: "kv".to_owned(),
                ok,
                latency,
                detail,
            })
            .await;
        }
        self.closed.remove(0)
    }

    fn signal(&self, signal: Signal) {
        let pid = self.hands.supervisor.pid().unwrap();
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
    }
}

impl Drop for Node {
    /// A supervised service outlives its supervisor; a test's must not.
    fn drop(&mut self) {
        if let Some(pid) = self
            .hands
            .supervisor
            .pid()
            .and_then(|pid| Pid::from_raw(pid.cast_signed()))
        {
            kill_process(pid, Signal::KILL).ok();
        }
    }
}

fn hands(dir: &Path) -> ServiceHands {
    let shell = |script: &str, argument: String| {
        vec![
            "/bin/sh".into(),
            "-c".into(),
            script.into(),
            "kv".into(),
            argument,
        ]
    };
    let state = dir.join("state");
    let script = "test \"$(cat \"$1/table\")\" = good || exit 3; exec sleep 60";
    let spec = ServiceSpec {
        stop_grace: Duration::from_millis(500),
        ..ServiceSpec::new("kv", shell(script, state.display().to_string()))
    };
    let limits = StoreLimits {
        free_bytes_min: 0,
        ..StoreLimits::default()
    };
    let check = "test \"$(cat \"$1/table\")\" = good || { echo table is bad; exit 1; }";
    ServiceHands {
        sessions: None,
        space: None,
        hook: None,
        webhook: None,
        proxy: None,
        cgroup: None,
        #[cfg(feature = "systemd")]
        systemd: None,
        #[cfg(feature = "kubernetes")]
        kubernetes: None,
        supervisor: Supervisor::new(spec, dir.join("kv.json")),
        state: Some(ServiceState {
            dir: state,
            check: Some(StateCheck::new(shell(check, "{state}".to_owned()))),
            checkpoints: CheckpointStore::open(&dir.join("checkpoints"), limits).unwrap(),
        }),
    }
}

fn config() -> HealConfig {
    let policy = HealPolicy {
        autonomy: Autonomy::Act,
        restore_autonomy: Autonomy::Act,
        cooldown: Duration::ZERO,
        ..HealPolicy::default()
    };
    let services = BTreeMap::from([("kv".to_owned(), policy)]);
    HealConfig {
        services,
        node: NodeBudget::default(),
        depends_on: std::collections::BTreeMap::new(),
        clock_id: clock::clock_id(),
    }
}

fn intent(action: ActionKind) -> Intent {
    let (id, incident, reason) = (IntentId(7), IncidentId::default(), "a test".to_owned());
    Intent {
        id,
        incident,
        service: "kv".to_owned(),
        action,
        class: FaultClass::Crash,
        session: None,
        decided: When::default(),
        reason,
    }
}

#[tokio::test]
async fn kill_9_is_healed_by_a_start() {
    let mut node = Node::new();
    let Boot::Started { pid } = node.boot().await else {
        panic!("not started")
    };
    node.signal(Signal::KILL);
    let incident = node.watch().await;
    assert_eq!(
        (incident.class, incident.state),
        (FaultClass::Crash, IncidentState::Healed)
    );
    assert_eq!(incident.last_action(), Some(ActionKind::Start));
    assert_ne!(node.hands.supervisor.pid(), Some(pid));
}

#[tokio::test]
async fn a_stopped_process_is_healed_by_a_restart() {
    let mut node = Node::new();
    let Boot::Started { pid } = node.boot().await else {
        panic!("not started")
    };
    node.signal(Signal::STOP);
    let incident = node.watch().await;
    assert_eq!(
        (incident.class, incident.verdict),
        (FaultClass::Hang, Some(Verdict::Healed))
    );
    assert_eq!(incident.last_action(), Some(ActionKind::Restart));
    assert_eq!(process_state(pid), None);
}

#[tokio::test]
async fn a_crash_with_corrupt_state_is_healed_by_the_last_good_checkpoint() {
    let mut node = Node::new();
    node.boot().await;
    node.hands.checkpoint(1).await.unwrap().unwrap();
    fs::write(node.table(), "bad").unwrap();
    // A checkpoint of corrupt state is not kept.
    assert!(node.hands.checkpoint(2).await.is_err());
    node.signal(Signal::KILL);
    let incident = node.watch().await;
    let actions: Vec<ActionKind> = incident.actions.iter().map(|done| done.intent.action).collect();
    assert_eq!(
        actions,
        [ActionKind::Start, ActionKind::RestoreAndStart],
        "{}",
        incident.why()
    );
    assert_eq!(
        (incident.class, incident.verdict),
        (FaultClass::Corruption, Some(Verdict::Healed))
    );
    assert_eq!(fs::read_to_string(node.table()).unwrap(), "good");
    assert_eq!(
        fs::read_to_string(node.dir.path().join("state.replaced-1/table")).unwrap(),
        "bad"
    );
}

#[tokio::test]
async fn a_serving_process_is_not_stopped_for_a_restart_that_could_not_start_it_again() {
    let mut node = Node::new();
    let Boot::Started { pid } = node.boot().await else {
        panic!("not started")
    };
    fs::write(node.table(), "bad").unwrap();
    let outcome = node.hands.execute(&intent(ActionKind::Restart)).await;
    assert_eq!(
        outcome,
        Outcome::StateCorrupt {
            detail: "table is bad".to_owned(),
            running: true
        }
    );
    assert_eq!(node.hands.supervisor.pid(), Some(pid));
}

#[tokio::test]
async fn without_a_checkpoint_nothing_is_stopped_or_replaced() {
    let mut node = Node::new();
    node.boot().await;
    let outcome = node.hands.execute(&intent(ActionKind::RestoreAndStart)).await;
    assert!(
        matches!(outcome, Outcome::Failed { running: true, .. }),
        "{outcome:?}"
    );
    assert_eq!(fs::read_to_string(node.table()).unwrap(), "good");
}

#[tokio::test]
async fn corrupt_state_is_found_before_the_first_start() {
    let mut node = Node::new();
    fs::write(node.table(), "bad").unwrap();
    assert_eq!(node.boot().await, Boot::StateCorrupt("table is bad".to_owned()));
    assert_eq!(
        node.hands.check_state().await,
        Some(StateVerdict::Corrupt("table is bad".to_owned()))
    );
    assert_eq!(node.hands.supervisor.pid(), None);
}

#[tokio::test]
async fn nothing_is_started_on_a_state_that_is_gone_and_a_restore_brings_it_back() {
    for whole in [false, true] {
        let mut node = Node::new();
        node.boot().await;
        node.hands.checkpoint(1).await.unwrap().unwrap();
        node.hands.supervisor.stop().await.unwrap();
        // A disk that did not come back leaves the directory that it was mounted on, or none.
        fs::remove_dir_all(node.dir.path().join("state")).unwrap();
        if !whole {
            fs::create_dir_all(node.dir.path().join("state/lost+found")).unwrap();
        }
        node.hands.state.as_mut().unwrap().check = None;
        let Boot::StateCorrupt(detail) = node.boot().await else {
            panic!("started")
        };
        assert!(
            detail.contains("is empty or missing, and checkpoint 1"),
            "{detail}"
        );
        let outcome = node.hands.execute(&intent(ActionKind::RestoreAndStart)).await;
        let Outcome::Restored { detail } = outcome else {
            panic!("{outcome:?}")
        };
        assert!(
            detail.starts_with("checkpoint 1 of 1970-01-01T00:00:00Z is in place"),
            "{detail}"
        );
        assert_eq!(fs::read_to_string(node.table()).unwrap(), "good");
    }
}

#[tokio::test]
async fn a_start_does_not_depend_on_the_store_of_checkpoints() {
    let mut node = Node::new();
    node.boot().await;
    node.hands.checkpoint(1).await.unwrap().unwrap();
    let store = node.hands.state.as_ref().unwrap().checkpoints.dir().to_owned();
    fs::remove_dir_all(store).unwrap();
    assert_eq!(
        node.hands.execute(&intent(ActionKind::Restart)).await,
        Outcome::Done
    );
    node.hands.supervisor.stop().await.unwrap();
    // A state that is empty now and then, as its newest checkpoint was.
    fs::remove_file(node.table()).unwrap();
    let state = node.hands.state.as_mut().unwrap();
    state.check = None;
    fs::create_dir_all(state.checkpoints.dir()).unwrap();
    node.hands.checkpoint(2).await.unwrap().unwrap();
    assert_eq!(
        node.hands.execute(&intent(ActionKind::Start)).await,
        Outcome::Done
    );
}

#[tokio::test]
async fn a_node_that_died_between_intent_and_effect_looks_before_it_acts() {
    for took_effect in [false, true] {
        let mut node = Node::new();
        node.boot().await;
        node.signal(Signal::KILL);
        let exit = node.hands.supervisor.exited().await;
        node.machine.handle(
            clock::now(),
            Input::Exited {
                service: "kv".to_owned(),
                status: exit.to_string(),
            },
        );
        let intent = std::iter::from_fn(|| node.machine.poll_output())
            .find_map(|output| {
                if let Output::RecordIntent(intent) = output {
                    Some(intent)
                } else {
                    None
                }
            })
            .unwrap();
        let stored = serde_json::to_vec(&node.machine.export()).unwrap();
        if took_effect {
            assert_eq!(node.hands.execute(&intent).await, Outcome::Done);
        }
        let started = node.hands.supervisor.pid();

        // The node dies here and comes back with what it had stored.
        let state: MachineState = serde_json::from_slice(&stored).unwrap();
        node.machine = IncidentMachine::restore(config(), state, clock::now());
        node.hands = hands(node.dir.path());
        let boot = node.boot().await;
        assert_eq!(boot, started.map_or(Boot::Left, |pid| Boot::Adopted { pid }));
        let Some(Output::Reconcile(of)) = node.machine.poll_output() else {
            panic!("nothing to reconcile")
        };
        assert_eq!(of, intent);
        let answer = node.hands.reconcile(&of);
        assert_eq!(
            answer,
            Input::Reconciled {
                id: intent.id,
                running: took_effect,
                took_effect
            }
        );
        node.tell(answer).await;
        let incident = node.watch().await;
        assert_eq!(incident.verdict, Some(Verdict::Healed));
        assert_eq!(
            incident.actions.len(),
            if took_effect { 1 } else { 2 },
            "{}",
            incident.why()
        );
        if took_effect {
            assert_eq!(
                node.hands.supervisor.pid(),
                started,
                "a start that took place was repeated"
            );
        }
    }
}

#[tokio::test]
async fn state_that_passes_its_check_once_the_service_has_stopped_is_kept() {
    let mut node = Node::new();
    node.boot().await;
    node.hands.checkpoint(1).await.unwrap().unwrap();
    fs::write(
        node.dir.path().join("state/newer"),
        "written after the checkpoint",
    )
    .unwrap();
    let outcome = node.hands.execute(&intent(ActionKind::RestoreAndStart)).await;
    let detail = "its state passes its check again and was kept".to_owned();
    assert_eq!(outcome, Outcome::Restored { detail });
    assert!(node.hands.supervisor.pid().is_some());
    assert!(node.dir.path().join("state/newer").exists());
    assert!(!node.dir.path().join("state.replaced-1").exists());
}
