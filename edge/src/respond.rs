//! Drives the incident machine: observations in, durable intents and actions out.
//!
//! The machine decides and reads no clock; this task hands it inputs with the time, makes every intent durable before
//! it answers that it is, and passes actions to the one task that owns the service's process.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use theriac_heal::executor::clock;
use theriac_heal::incident::{HealConfig, IncidentMachine, Input, MachineState, Output};
use theriac_heal::policy::{Autonomy, HealPolicy, HealingSection, NodeBudget, PolicyError};
use theriac_heal::types::{FaultClass, Incident, IncidentState, Intent, Notice};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::HOST;
use crate::metrics::{Metrics, kind};
use crate::service::{Command, ServiceShared};
use crate::status::Board;
use crate::storage::StorageWatch;
use crate::store::{Store, StoreError};
use crate::supervise::Shutdown;

/// Time between two looks for what people approved.
const APPROVALS_EVERY: Duration = Duration::from_secs(1);
/// Most incidents that wait for the disk; the oldest make room.
const UNSAVED_MAX: usize = 200;

/// One service as the responder knows it.
#[derive(Debug, Clone)]
pub struct Hand {
    /// What is shared with its tasks.
    pub shared: Arc<ServiceShared>,
    /// To the task that owns its process.
    pub commands: mpsc::Sender<Command>,
}

/// What the task works with.
#[derive(Debug, Clone)]
pub struct Responder {
    /// The services by name.
    pub hands: BTreeMap<String, Hand>,
    /// The budget over all of them.
    pub budget: NodeBudget,
    /// Where intents become durable.
    pub store: Store,
    /// Told of failed writes.
    pub storage: StorageWatch,
    /// The page's picture.
    pub board: Board,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// What the disk did not take; it outlives the task.
    pub unsaved: Unsaved,
}

/// Incidents, by number, and whether the machine's state as well could not be written: they are written again as soon as
/// the storage is well.
#[derive(Debug, Clone, Default)]
pub struct Unsaved(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    incidents: BTreeMap<u64, Incident>,
    machine: bool,
}

impl Unsaved {
    fn incident(&self, incident: Incident) {
        let waiting = &mut self.lock().incidents;
        waiting.insert(incident.id.0, incident);
        while waiting.len() > UNSAVED_MAX {
            waiting.pop_first();
        }
    }

    /// The latest state of an incident is on disk.
    fn saved(&self, incident: &Incident) {
        self.lock().incidents.remove(&incident.id.0);
    }

    fn machine(&self, unsaved: bool) {
        self.lock().machine = unsaved;
    }

    fn waiting(&self) -> (Vec<Incident>, bool) {
        let waiting = self.lock();
        (waiting.incidents.values().cloned().collect(), waiting.machine)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        // Each change is one insertion or assignment, so a poisoned lock still guards a whole picture.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Observations on their way to the machine; they outlive the task.
pub type Events = Arc<tokio::sync::Mutex<mpsc::Receiver<Input>>>;

/// Runs the machine until the signal to stop.
///
/// # Errors
/// When the machine's state cannot be read.
pub async fn run(responder: Responder, events: Events, mut shutdown: Shutdown) -> Result<(), StoreError> {
    let mut events = events.lock().await;
    let state = responder.store.machine().await?;
    let fresh = state.is_none();
    let mut machine = responder.machine(state.unwrap_or_default(), fresh);
    for incident in machine.open_incidents() {
        responder.board.show_incident(incident);
        // The last run may have ended before the disk took it.
        responder.unsaved.incident(incident.clone());
    }
    // The host runs, or we would not: so its incidents can end.
    machine.handle(
        clock::now(),
        Input::Started {
            service: HOST.to_owned(),
            pid: std::process::id(),
        },
    );
    responder.begin(&machine).await;
    let mut approvals = tokio::time::interval(APPROVALS_EVERY);
    approvals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        responder.carry_out(&mut machine).await;
        let due = machine
            .poll_timeout()
            .map(|due| due.saturating_sub(clock::now().monotonic));
        let timeout = async {
            match due {
                Some(due) => tokio::time::sleep(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.wait() => return Ok(()),
            event = events.recv() => match event {
                Some(input) => machine.handle(clock::now(), input),
                None => return Ok(()),
            },
            () = timeout => machine.handle_timeout(clock::now()),
            _ = approvals.tick() => {
                responder.save_again(&machine).await;
                responder.take_approvals(&mut machine).await;
            }
        }
    }
}

impl Responder {
    fn machine(&self, state: MachineState, fresh: bool) -> IncidentMachine {
        let mut services: BTreeMap<String, HealPolicy> = self
            .hands
            .iter()
            .map(|(name, hand)| (name.clone(), hand.shared.config.healing.clone()))
            .collect();
        match host_policy() {
            Ok(policy) => drop(services.insert(HOST.to_owned(), policy)),
            Err(error) => tracing::error!(%error, "anomalies of the host itself open no incident"),
        }
        let config = HealConfig {
            services,
            node: self.budget,
            clock_id: clock::clock_id(),
        };
        if fresh {
            IncidentMachine::new(config)
        } else {
            IncidentMachine::restore(config, state, clock::now())
        }
    }

    /// Starts the services, but not where an open incident has a decision pending: there the machine is told how things
    /// are, and decides.
    async fn begin(&self, machine: &IncidentMachine) {
        for (name, hand) in &self.hands {
            let pending = machine.open_incident(name).is_some_and(|incident| {
                use IncidentState::{Acting, AwaitingApproval, CoolingDown};
                matches!(incident.state, Acting | AwaitingApproval | CoolingDown)
            });
            let command = if pending { Command::Look } else { Command::Begin };
            self.command(hand, command).await;
        }
    }

    /// Does what the machine asks for until it asks for nothing more.
    async fn carry_out(&self, machine: &mut IncidentMachine) {
        let mut changed = false;
        while let Some(output) = machine.poll_output() {
            match output {
                Output::Opened(incident) => {
                    self.metrics
                        .incidents
                        .get_or_create(&kind(incident.class.as_str()))
                        .inc();
                    tracing::warn!(
                        incident = incident.id.0,
                        service = incident.service,
                        class = %incident.class,
                        "incident opened"
                    );
                    self.keep(&incident).await;
                    changed = true;
                }
                Output::Updated(incident) => {
                    self.keep(&incident).await;
                    changed = true;
                }
                Output::Closed(incident) => {
                    let word = incident
                        .verdict
                        .map_or_else(|| "none".to_owned(), |verdict| verdict.to_string());
                    self.metrics.verdicts.get_or_create(&kind(word)).inc();
                    tracing::info!(
                        incident = incident.id.0,
                        service = incident.service,
                        class = %incident.class,
                        state = %incident.state,
                        "incident closed"
                    );
                    self.keep(&incident).await;
                    changed = true;
                }
                Output::RecordIntent(intent) => self.record(machine, intent).await,
                Output::Execute(intent) => {
                    self.metrics
                        .actions
                        .get_or_create(&kind(intent.action.as_str()))
                        .inc();
                    self.pass_on(intent, Command::Execute).await;
                }
                Output::Reconcile(intent) => self.pass_on(intent, Command::Reconcile).await,
                Output::Notify(notice) => notify(&notice),
            }
        }
        if changed {
            for (name, hand) in &self.hands {
                show_trouble(&hand.shared, machine.open_incident(name));
            }
            self.keep_machine(machine).await;
        }
    }

    async fn keep(&self, incident: &Incident) {
        self.board.show_incident(incident);
        self.save(incident).await;
    }

    async fn save(&self, incident: &Incident) -> bool {
        match self.store.save_incident(incident).await {
            Ok(()) => {
                self.unsaved.saved(incident);
                true
            }
            Err(error) => {
                self.storage.failed("keep an incident", &error);
                self.unsaved.incident(incident.clone());
                false
            }
        }
    }

    async fn keep_machine(&self, machine: &IncidentMachine) {
        let saved = self.store.save_machine(&machine.export()).await;
        self.unsaved.machine(saved.is_err());
        if let Err(error) = saved {
            self.storage.failed("keep the state of healing", &error);
        }
    }

    /// Writes what the disk did not take, once the storage is well again.
    async fn save_again(&self, machine: &IncidentMachine) {
        if !self.storage.is_ok() {
            return;
        }
        let (incidents, machine_waits) = self.unsaved.waiting();
        for incident in &incidents {
            if !self.save(incident).await {
                return;
            }
        }
        if machine_waits {
            self.keep_machine(machine).await;
        }
    }

    async fn record(&self, machine: &mut IncidentMachine, intent: Intent) {
        let input = match self.store.record_intent(&machine.export(), &intent).await {
            Ok(()) => Input::IntentDurable { id: intent.id },
            Err(error) => {
                self.storage.failed("record an intent", &error);
                Input::IntentFailed {
                    id: intent.id,
                    detail: error.to_string(),
                }
            }
        };
        machine.handle(clock::now(), input);
    }

    async fn pass_on(&self, intent: Intent, command: fn(Intent) -> Command) {
        if let Some(hand) = self.hands.get(&intent.service) {
            self.command(hand, command(intent)).await;
        } else {
            tracing::error!(service = intent.service, "no hands for this service");
        }
    }

    async fn command(&self, hand: &Hand, command: Command) {
        // The receiver outlives its task; it is gone only while the process ends.
        let _heard = hand.commands.send(command).await.is_ok();
    }

    async fn take_approvals(&self, machine: &mut IncidentMachine) {
        if !machine
            .open_incidents()
            .any(|incident| !incident.state.is_closed())
        {
            return;
        }
        match self.store.take_approvals().await {
            Ok(taken) => {
                for (incident, approve) in taken {
                    tracing::info!(incident = incident.0, approve, "a person decided");
                    let input = if approve {
                        Input::Approve { incident }
                    } else {
                        Input::Deny { incident }
                    };
                    machine.handle(clock::now(), input);
                }
            }
            Err(error) => self.storage.failed("read approvals", &error),
        }
    }
}

/// Tells the service's other tasks what its open incident means for them.
fn show_trouble(shared: &ServiceShared, open: Option<&Incident>) {
    let acting = open.is_some_and(|incident| incident.in_flight().is_some());
    let class = open.map(|incident| incident.class);
    let unsound = class.is_some_and(|class| !class.from_detector()) || acting;
    let corrupt = class == Some(FaultClass::Corruption) && !acting;
    shared.disturbed.store(open.is_some(), Ordering::Relaxed);
    shared.unsound.store(unsound, Ordering::Relaxed);
    shared.corrupt.store(corrupt, Ordering::Relaxed);
}

/// Trouble of the host as a whole is recorded; nothing is done about it.
fn host_policy() -> Result<HealPolicy, PolicyError> {
    HealingSection {
        autonomy: Some(Autonomy::Observe),
        settle: Some(Duration::ZERO),
        ..HealingSection::default()
    }
    .check()
}

fn notify(notice: &Notice) {
    tracing::warn!(
        incident = notice.incident.0,
        service = notice.service,
        kind = ?notice.kind,
        "{}", notice.words
    );
}

#[cfg(test)]
mod tests {
    use theriac_heal::types::{IncidentId, IncidentState};

    use super::*;
    use crate::config::EdgeConfig;
    use crate::state_dir::StateDir;
    use crate::status::Storage;
    use crate::store::StoreReader;
    use crate::supervise::{ShutdownSender, shutdown};

    struct Stage {
        dir: StateDir,
        store: Store,
        storage: StorageWatch,
        unsaved: Unsaved,
        board: Board,
        events: mpsc::Sender<Input>,
        commands: mpsc::Receiver<Command>,
        stop: ShutdownSender,
        task: tokio::task::JoinHandle<Result<(), StoreError>>,
        _root: tempfile::TempDir,
    }

    fn stage() -> Stage {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let file = root.path().join("edge.toml");
        let text = "healing = { autonomy = 'act' }\n[[service]]\nname = 'kv'\nargv = ['true']\n";
        std::fs::write(&file, text).unwrap();
        let config = EdgeConfig::load(Some(&file), []).unwrap();
        let store = Store::open(&dir).unwrap();
        let (board, metrics) = (Board::new("a", 60), Arc::new(Metrics::new()));
        let (commander, commands) = mpsc::channel(16);
        let shared = Arc::new(ServiceShared::new(config.services[0].clone()));
        let responder = Responder {
            hands: BTreeMap::from([(
                "kv".to_owned(),
                Hand {
                    shared,
                    commands: commander,
                },
            )]),
            budget: config.healing_budget,
            store: store.clone(),
            storage: StorageWatch::new(dir.clone(), board.clone(), Arc::clone(&metrics)),
            board: board.clone(),
            metrics,
            unsaved: Unsaved::default(),
        };
        let (storage, unsaved) = (responder.storage.clone(), responder.unsaved.clone());
        let (events, received) = mpsc::channel(16);
        let (stop, signal) = shutdown();
        let task = tokio::spawn(run(
            responder,
            Arc::new(tokio::sync::Mutex::new(received)),
            signal,
        ));
        Stage {
            dir,
            store,
            storage,
            unsaved,
            board,
            events,
            commands,
            stop,
            task,
            _root: root,
        }
    }

    impl Stage {
        async fn crash(&self) {
            let service = || "kv".to_owned();
            self.events
                .send(Input::Started {
                    service: service(),
                    pid: 7,
                })
                .await
                .unwrap();
            let status = "killed by signal 9".to_owned();
            self.events
                .send(Input::Exited {
                    service: service(),
                    status,
                })
                .await
                .unwrap();
        }

        async fn next(&mut self) -> Command {
            tokio::time::timeout(Duration::from_secs(10), self.commands.recv())
                .await
                .unwrap()
                .unwrap()
        }

        async fn finish(self) {
            self.stop.stop();
            self.task.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn an_intent_is_on_disk_before_it_is_carried_out() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        let Command::Execute(intent) = stage.next().await else {
            panic!("no action")
        };
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        assert_eq!(reader.intents().unwrap(), [intent.id.0]);
        assert_eq!(reader.incidents(9).unwrap()[0].state, IncidentState::Acting);
        stage.finish().await;
    }

    #[tokio::test]
    async fn on_a_full_disk_nothing_is_carried_out_and_the_incident_is_a_persons() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.store.limit_pages(1).await;
        stage.store.fill().await;
        stage.crash().await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while stage
            .board
            .incidents()
            .first()
            .is_none_or(|incident| incident.state != "handed_to_human")
        {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{:?}",
                stage.board.incidents()
            );
            tokio::task::yield_now().await;
        }
        assert!(
            stage.commands.try_recv().is_err(),
            "an action without a durable intent"
        );
        assert_eq!(stage.board.status().storage, Storage::Full);
        stage.finish().await;
    }

    #[tokio::test]
    async fn what_a_full_disk_did_not_take_is_written_when_there_is_room_again() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(_)));
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        let mut missed = reader.incidents(9).unwrap().remove(0);
        missed.id = IncidentId(7);
        let path = stage.dir.database();
        stage.storage.failed("test", &StoreError::Full { path });
        stage.unsaved.incident(missed);
        stage.unsaved.machine(true);
        assert!(!stage.storage.is_ok());
        assert_eq!(reader.incident(IncidentId(7)).unwrap(), None);
        stage.storage.look(&stage.store).await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while stage.unsaved.waiting() != (Vec::new(), false) {
            assert!(tokio::time::Instant::now() < deadline, "not within 10 s");
            tokio::task::yield_now().await;
        }
        assert!(reader.incident(IncidentId(7)).unwrap().is_some());
        stage.finish().await;
    }

    #[tokio::test]
    async fn a_restarted_machine_asks_what_became_of_an_intent_instead_of_repeating_it() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(_)));
        // The same store, another process: what it finds is an intent without outcome.
        let machine = stage.store.machine().await.unwrap().unwrap();
        let config = HealConfig {
            services: BTreeMap::from([("kv".to_owned(), host_policy().unwrap())]),
            node: NodeBudget::default(),
            clock_id: clock::clock_id(),
        };
        let mut machine = IncidentMachine::restore(config, machine, clock::now());
        assert!(matches!(machine.poll_output(), Some(Output::Reconcile(_))));
        stage.finish().await;
    }
}
