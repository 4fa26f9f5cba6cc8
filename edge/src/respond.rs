//! Drives the incident machine: observations in, durable intents and actions out.
//!
//! The machine decides and reads no clock; this task hands it inputs with the time, makes every intent durable before
//! it answers that it is, and passes actions to the one task that owns the service's process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use theriac_heal::executor::clock;
use theriac_heal::incident::{HealConfig, IncidentMachine, Input, MachineState, Output};
use theriac_heal::policy::{Autonomy, HealPolicy, HealingSection, NodeBudget, PolicyError};
use theriac_heal::types::{FaultClass, Incident, IncidentId, Intent, IntentId, Notice, Verdict};
use theriac_privacy::policy::signed::{PolicyPublicKey, PolicySignature, SignatureError, Subject};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::HOST;
use crate::fleet::FleetDesk;
use crate::healing_policy::Rulings;
use crate::metrics::{Metrics, kind};
use crate::service::{Command, ServiceShared};
use crate::state_dir::StateDir;
use crate::status::Board;
use crate::storage::StorageWatch;
use crate::store::{REINSTATEMENT, Store, StoreError, Word};
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
    /// To the sample loop: whose level is normal now.
    pub new_normals: NewNormals,
    /// Where the stop switch and the log of rulings are.
    pub dir: StateDir,
    /// What was told to be taken back already.
    pub undone: Undone,
    /// Whose approvals count where a policy asks for signatures.
    pub keys: Vec<PolicyPublicKey>,
    /// So many of them have to sign before what stands against a service is lifted; 0 for the word of somebody at the host.
    pub lifted_by: u32,
    /// Where word is left for the fleet.
    pub fleet: FleetDesk,
}

/// Intents of reversible actions without effect, or with harm, that were told to be taken back; they outlive the task.
#[derive(Debug, Clone, Default)]
pub struct Undone(Arc<Mutex<BTreeSet<IntentId>>>);

impl Undone {
    /// Whether it is the first time.
    fn first(&self, intent: IntentId) -> bool {
        // Held for one insertion.
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = told.insert(intent);
        while told.len() > UNSAVED_MAX {
            told.pop_first();
        }
        first
    }
}

/// Services, or the host, of which a person said that what their incident shows is normal now; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct NewNormals(Arc<Mutex<BTreeSet<String>>>);

impl NewNormals {
    /// Leaves word for the sample loop.
    pub fn accept(&self, service: &str) {
        self.lock().insert(service.to_owned());
    }

    /// What was left since the last call.
    pub fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        // Held for one insertion or exchange.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    responder.follow_switch(&mut machine);
    responder.show_standing(&machine);
    responder.begin(&machine).await;
    let mut approvals = tokio::time::interval(APPROVALS_EVERY);
    approvals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        responder.carry_out(&mut machine).await;
        if responder.meet_fleet(&mut machine) {
            continue;
        }
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
            () = responder.fleet.lent() => {}
            _ = approvals.tick() => {
                responder.follow_switch(&mut machine);
                responder.tell_risks(&mut machine);
                responder.show_fleet(&machine);
                responder.save_again(&machine).await;
                responder.take_approvals(&mut machine).await;
            }
        }
    }
}

impl Responder {
    fn machine(&self, state: MachineState, fresh: bool) -> IncidentMachine {
        let configs = || {
            self.hands
                .iter()
                .map(|(name, hand)| (name.clone(), &hand.shared.config))
        };
        let config = HealConfig {
            services: policies(
                configs()
                    .map(|(name, config)| (name, config.healing.clone()))
                    .collect(),
            ),
            node: self.budget,
            depends_on: configs()
                .map(|(name, config)| (name, config.depends_on.clone()))
                .collect(),
            clock_id: clock::clock_id(),
        };
        let machine = if fresh {
            IncidentMachine::new(config)
        } else {
            IncidentMachine::restore(config, state, clock::now())
        };
        machine
            .named(&self.board.status().node)
            .reinstated_by(self.lifted_by)
            .probing(
                configs()
                    .filter(|(_, config)| config.probe.is_some())
                    .map(|(_, config)| config.name.as_str()),
            )
    }

    /// Starts the services, but not where that is for the machine to decide: it is told how things are.
    async fn begin(&self, machine: &IncidentMachine) {
        for (name, hand) in &self.hands {
            let command = if machine.may_begin(name) {
                Command::Begin
            } else {
                Command::Look
            };
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
                    self.take_back(&incident).await;
                    self.keep(&incident).await;
                    changed = true;
                }
                Output::Closed(incident) => {
                    let word = incident
                        .verdict
                        .map_or_else(|| "none".to_owned(), |verdict| verdict.to_string());
                    self.metrics.verdicts.get_or_create(&kind(word)).inc();
                    self.take_back(&incident).await;
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
                Output::Ruled(record) => {
                    if let Err(error) = Rulings::of(&self.dir).append(&record) {
                        tracing::warn!(%error, "a ruling of the policy was not written down");
                    }
                }
                Output::Reinstated(record) => {
                    changed = true;
                    if let Err(error) = Rulings::of(&self.dir).append_reinstated(&record) {
                        tracing::warn!(%error, "that a service was reinstated was not written down");
                    }
                }
                Output::RecordIntent(intent) => self.record(machine, intent).await,
                Output::Execute(intent) => {
                    self.metrics
                        .actions
                        .get_or_create(&kind(intent.action.as_str()))
                        .inc();
                    // The disk may have been slow since it was decided; who would do it may have to wait for longer.
                    let begin_by = machine.begin_by(intent.id).unwrap_or_default();
                    self.pass_on(intent, |intent| Command::Execute(intent, begin_by))
                        .await;
                }
                Output::Reconcile(intent) => self.pass_on(intent, Command::Reconcile).await,
                Output::Notify(notice) => notify(&notice),
            }
        }
        if changed {
            self.show_standing(machine);
            for (name, hand) in &self.hands {
                show_trouble(&hand.shared, machine.open_incident(name));
            }
            self.keep_machine(machine).await;
        }
    }

    /// What did not help, or harmed, does not stay until its time is over.
    async fn take_back(&self, incident: &Incident) {
        for action in &incident.actions {
            let undone = matches!(action.verdict, Some(Verdict::NoEffect | Verdict::Harm));
            let (id, kind) = (action.intent.id, action.intent.action);
            if undone
                && kind.ends_by_itself()
                && self.undone.first(id)
                && let Some(hand) = self.hands.get(&incident.service)
            {
                self.command(hand, Command::Undo(id)).await;
            }
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
        // The switch may have been thrown while the disk was busy.
        self.follow_switch(machine);
        machine.handle(clock::now(), input);
    }

    /// While the stop file is there nothing is begun.
    fn follow_switch(&self, machine: &mut IncidentMachine) {
        let stopped = self.dir.stop_file().exists();
        self.board.update(|status| status.healing_stopped = stopped);
        if stopped != machine.is_halted() {
            tracing::warn!(stopped, "the stop switch of healing was thrown");
            machine.handle(clock::now(), Input::Halt(stopped));
        }
    }

    /// For conditions of the policy that ask for the risk.
    fn tell_risks(&self, machine: &mut IncidentMachine) {
        for (name, hand) in &self.hands {
            if machine.open_incident(name).is_some() {
                let risks = hand.shared.risks();
                let probability = risks.first().and_then(|risk| Some(risk.chance.ok()?.probability));
                let service = name.clone();
                machine.handle(clock::now(), Input::Risk { service, probability });
            }
        }
    }

    async fn pass_on(&self, intent: Intent, command: impl FnOnce(Intent) -> Command) {
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
        if machine.open_incidents().next().is_none() && machine.standings().is_empty() {
            return;
        }
        match self.store.take_approvals().await {
            Ok(taken) => {
                for word in taken {
                    let incident = word.incident;
                    if incident == REINSTATEMENT {
                        self.reinstate(machine, &word);
                        continue;
                    }
                    tracing::info!(incident = incident.0, approve = word.approve, "a person decided");
                    let input = if !word.approve {
                        Input::Deny { incident }
                    } else if let Some(by) = self.signer(machine, &word) {
                        let plan = word.plan;
                        Input::Approve { incident, plan, by }
                    } else {
                        continue;
                    };
                    machine.handle(clock::now(), input);
                }
            }
            Err(error) => self.storage.failed("read approvals", &error),
        }
        match self.store.take_new_normals().await {
            Ok(taken) => {
                for incident in taken {
                    self.accept_new_normal(machine, incident);
                }
            }
            Err(error) => self.storage.failed("read new normals", &error),
        }
    }

    /// Who signed: nobody, for the word of somebody at the host; or nothing at all where the signature does not count.
    #[expect(
        clippy::option_option,
        reason = "no signature is another thing than one that does not count"
    )]
    fn signer(&self, machine: &IncidentMachine, word: &Word) -> Option<Option<String>> {
        let Some(signature) = &word.signature else {
            return Some(None);
        };
        let plan = machine
            .open_incidents()
            .find(|open| open.id == word.incident)
            .and_then(|open| open.plan.as_ref());
        let checked = plan
            .ok_or_else(|| "there is no such plan".to_owned())
            .and_then(|plan| signed_by(signature, Subject::Approval, &plan.text(), &self.keys));
        match checked {
            Ok(key) => Some(Some(key)),
            Err(why) => {
                tracing::warn!(incident = word.incident.0, why, "an approval was refused");
                None
            }
        }
    }

    fn accept_new_normal(&self, machine: &mut IncidentMachine, incident: IncidentId) {
        let open = machine.open_incidents().find(|open| open.id == incident);
        let Some(open) = open.filter(|open| open.class.from_detector()) else {
            tracing::info!(
                incident = incident.0,
                "over before it was said to be a new normal"
            );
            return;
        };
        let service = open.service.clone();
        tracing::info!(
            incident = incident.0,
            service,
            "a person said that this is normal now"
        );
        self.new_normals.accept(&service);
        machine.handle(clock::now(), Input::NewNormal { incident });
    }
}

/// The pinned key that signed exactly this text.
pub(crate) fn signed_by(
    signature: &str,
    subject: Subject,
    text: &str,
    keys: &[PolicyPublicKey],
) -> Result<String, String> {
    let signature: PolicySignature = signature
        .parse()
        .map_err(|error: SignatureError| error.to_string())?;
    if !keys.contains(&signature.key) {
        return Err(format!("{} is not among healing_policy.keys", signature.key));
    }
    signature
        .verify_text(subject, text, signature.key)
        .map_err(|error| error.to_string())?;
    Ok(signature.key.to_string())
}

/// Tells the service's other tasks what its open incident means for them.
fn show_trouble(shared: &ServiceShared, open: Option<&Incident>) {
    let acting = open.is_some_and(|incident| incident.in_flight().is_some());
    let class = open.map(|incident| incident.class);
    let unsound = class.is_some_and(FaultClass::speaks_against_state) || acting;
    let corrupt = class == Some(FaultClass::Corruption) && !acting;
    shared.disturbed.store(open.is_some(), Ordering::Relaxed);
    shared.unsound.store(unsound, Ordering::Relaxed);
    shared.corrupt.store(corrupt, Ordering::Relaxed);
}

/// The services' policies and that of the host, as the machine has them.
pub(crate) fn policies(mut services: BTreeMap<String, HealPolicy>) -> BTreeMap<String, HealPolicy> {
    match host_policy() {
        Ok(policy) => drop(services.insert(HOST.to_owned(), policy)),
        Err(error) => tracing::error!(%error, "anomalies of the host itself open no incident"),
    }
    services
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
    use theriac_heal::policy::fleet::FleetSeen;
    use theriac_heal::types::{ActionKind, Plan, When};
    use theriac_privacy::policy::signed::PolicyKey;

    use theriac_heal::types::IncidentState;

    use super::*;
    use crate::config::EdgeConfig;
    use crate::status::Storage;
    use crate::store::StoreReader;
    use crate::supervise::{ShutdownSender, shutdown};

    struct Stage {
        dir: StateDir,
        store: Store,
        storage: StorageWatch,
        unsaved: Unsaved,
        new_normals: NewNormals,
        board: Board,
        events: mpsc::Sender<Input>,
        commands: mpsc::Receiver<Command>,
        stop: ShutdownSender,
        desk: FleetDesk,
        task: tokio::task::JoinHandle<Result<(), StoreError>>,
        _root: tempfile::TempDir,
    }

    fn stage() -> Stage {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(&root.path().join("s")).unwrap();
        let file = root.path().join("edge.toml");
        let text =
            "healing = { autonomy = 'act', cooldown = '0s' }\n[[service]]\nname = 'kv'\nargv = ['true']\n";
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
            new_normals: NewNormals::default(),
            dir: dir.clone(),
            undone: Undone::default(),
            keys: Vec::new(),
            lifted_by: 0,
            fleet: FleetDesk::default(),
        };
        let desk = responder.fleet.clone();
        let new_normals = responder.new_normals.clone();
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
            new_normals,
            board,
            events,
            commands,
            stop,
            desk,
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
            tokio::time::timeout(Duration::from_mins(1), self.commands.recv())
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
        let Command::Execute(intent, _) = stage.next().await else {
            panic!("no action")
        };
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        assert_eq!(reader.intents().unwrap(), [intent.id.0]);
        assert_eq!(reader.incidents(9).unwrap()[0].state, IncidentState::Acting);
        stage.finish().await;
    }

    #[tokio::test]
    async fn a_flood_of_reports_takes_no_room_from_what_the_node_itself_sees() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        let (nodes, unhealthy, acting) = (3, 3, 3);
        for _ in 0..100_000 {
            stage.desk.report(FleetSeen {
                nodes,
                unhealthy,
                acting,
            });
        }
        let service = "kv".to_owned();
        stage.events.try_send(Input::AnomalyCleared { service }).unwrap();
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(..)));
        stage.finish().await;
    }

    #[tokio::test]
    async fn every_ruling_is_written_down_and_says_the_same_when_asked_again() {
        use theriac_heal::policy::evaluate::{Ruling, RulingRecord, evaluate};
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(..)));
        let text = std::fs::read_to_string(stage.dir.rulings()).unwrap();
        let records: Vec<RulingRecord> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(records[0].ruling, Ruling::Act);
        let section = HealingSection {
            autonomy: Some(Autonomy::Act),
            ..HealingSection::default()
        };
        for record in &records {
            let said = evaluate(&section.check().unwrap(), NodeBudget::default(), &record.facts);
            assert_eq!(said, record.ruling);
        }
        stage.finish().await;
    }

    #[tokio::test]
    async fn with_the_stop_switch_on_a_crash_is_seen_and_nothing_is_done() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        std::fs::write(stage.dir.stop_file(), "").unwrap();
        stage.crash().await;
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        let held = || {
            let incidents = reader.incidents(9).unwrap();
            let mut considered = incidents.iter().flat_map(|incident| &incident.alternatives);
            considered.any(|alternative| alternative.reason == "the stop switch is on")
        };
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
        while !held() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{:?}",
                stage.board.incidents()
            );
            tokio::task::yield_now().await;
        }
        assert!(stage.commands.try_recv().is_err(), "an action with the switch on");
        std::fs::remove_file(stage.dir.stop_file()).unwrap();
        assert!(matches!(stage.next().await, Command::Execute(..)));
        stage.finish().await;
    }

    #[tokio::test]
    async fn on_a_full_disk_nothing_is_carried_out_and_the_incident_is_a_persons() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.store.limit_pages(1).await;
        stage.store.fill().await;
        stage.crash().await;
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
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
        assert!(matches!(stage.next().await, Command::Execute(..)));
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
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
        while stage.unsaved.waiting() != (Vec::new(), false) {
            assert!(tokio::time::Instant::now() < deadline, "not within a minute");
            tokio::task::yield_now().await;
        }
        assert!(reader.incident(IncidentId(7)).unwrap().is_some());
        stage.finish().await;
    }

    #[tokio::test]
    async fn an_open_breaker_is_shown_and_once_a_person_lifts_it_the_start_is_tried_again() {
        use theriac_heal::standing::Standing;
        use theriac_heal::types::Outcome;
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        let failed = Outcome::Failed {
            detail: "cannot run it".to_owned(),
            running: false,
        };
        // Two attempts an incident: the first of the second one is the third failure in a row.
        for attempts in [2, 1] {
            stage.crash().await;
            for _ in 0..attempts {
                let Command::Execute(intent, _) = stage.next().await else {
                    panic!("no action")
                };
                let (id, outcome) = (intent.id, failed.clone());
                stage.events.send(Input::Executed { id, outcome }).await.unwrap();
            }
        }
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
        let standing = || {
            stage
                .board
                .status()
                .services
                .first()
                .map(|line| line.standing.clone())
        };
        let open = "the breaker of start is open after 3 failures in a row";
        while standing() != Some(vec![open.to_owned()]) {
            assert!(tokio::time::Instant::now() < deadline, "{:?}", standing());
            tokio::task::yield_now().await;
        }
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        let stored = || {
            let state = reader.machine().unwrap().unwrap();
            Standing::of("a", "kv", &state.demoted, &state.breakers)
        };
        while stored().is_empty() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "the breaker is not stored"
            );
            tokio::task::yield_now().await;
        }
        let word = |plan: String, signature: Option<String>| Word {
            incident: REINSTATEMENT,
            approve: true,
            plan: Some(plan),
            signature,
        };
        // Of something else, and with a signature that does not count: neither lifts anything.
        let eve = PolicyKey::from_seed(&[3; 32]);
        let forged = eve
            .sign_text(Subject::Reinstatement, &stored().text())
            .to_string();
        reader.decide(&word("0".repeat(64), None)).unwrap();
        reader.decide(&word(stored().hash(), Some(forged))).unwrap();
        reader.decide(&word(stored().hash(), None)).unwrap();
        let Command::Execute(intent, _) = stage.next().await else {
            panic!("no action")
        };
        assert_eq!(intent.action, ActionKind::Start);
        let rulings = std::fs::read_to_string(stage.dir.rulings()).unwrap();
        let lifted = rulings.lines().filter(|line| line.contains("\"lifted\""));
        assert_eq!(lifted.count(), 1, "{rulings}");
        stage.finish().await;
    }

    #[test]
    fn an_approval_is_signed_by_a_pinned_key_over_exactly_this_plan() {
        let plan = Plan {
            node: "site-a".to_owned(),
            incident: IncidentId(3),
            service: "kv".to_owned(),
            action: ActionKind::Restart,
            class: FaultClass::Hang,
            session: None,
            policy: "d".to_owned(),
            made: When::default(),
            expires: When::default(),
        };
        let (ann, bob) = (PolicyKey::from_seed(&[1; 32]), PolicyKey::from_seed(&[2; 32]));
        let keys = [ann.public()];
        let signed = |key: &PolicyKey, subject, plan: &Plan| key.sign_text(subject, &plan.text()).to_string();
        let good = signed(&ann, Subject::Approval, &plan);
        let signed_by =
            |signature: &str, plan: &Plan| signed_by(signature, Subject::Approval, &plan.text(), &keys);
        assert_eq!(signed_by(&good, &plan), Ok(ann.public().to_string()));
        let other = Plan {
            action: ActionKind::Start,
            ..plan.clone()
        };
        for bad in [
            signed(&bob, Subject::Approval, &plan),
            signed(&ann, Subject::Healing, &plan),
            signed(&ann, Subject::Approval, &other),
            "nothing".to_owned(),
        ] {
            assert!(signed_by(&bad, &plan).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_new_normal_reaches_the_sample_loop_only_while_its_incident_is_open_and_of_the_detector() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(..)));
        let anomaly = || Input::Anomaly {
            service: HOST.to_owned(),
            score: 9.0,
            threshold: 3.0,
            causes: Vec::new(),
        };
        let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
        let reader = StoreReader::open(&stage.dir.database()).unwrap().unwrap();
        let (mut crash, mut host) = (None, None);
        while crash.is_none() || host.is_none() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "no two incidents within 20 s"
            );
            stage.events.send(anomaly()).await.unwrap();
            tokio::task::yield_now().await;
            let found = reader.incidents(9).unwrap();
            let of = |service: &str| found.iter().find(|i| i.service == service).map(|i| i.id);
            (crash, host) = (of("kv"), of(HOST));
        }
        for id in [crash.unwrap(), host.unwrap(), IncidentId(999)] {
            reader.accept_new_normal(id).unwrap();
        }
        let mut accepted = BTreeSet::new();
        while accepted.is_empty() {
            assert!(tokio::time::Instant::now() < deadline, "not taken up within 20 s");
            tokio::task::yield_now().await;
            accepted = stage.new_normals.take();
        }
        assert_eq!(accepted, BTreeSet::from([HOST.to_owned()]), "a crash is no level");
        let why = || reader.incident(host.unwrap()).unwrap().unwrap().why();
        while !why().contains("a person said that this is normal now") {
            assert!(tokio::time::Instant::now() < deadline, "{}", why());
            tokio::task::yield_now().await;
        }
        stage.finish().await;
    }

    #[tokio::test]
    async fn a_restarted_machine_asks_what_became_of_an_intent_instead_of_repeating_it() {
        let mut stage = stage();
        assert!(matches!(stage.next().await, Command::Begin));
        stage.crash().await;
        assert!(matches!(stage.next().await, Command::Execute(..)));
        // The same store, another process: what it finds is an intent without outcome.
        let machine = stage.store.machine().await.unwrap().unwrap();
        let config = HealConfig {
            services: BTreeMap::from([("kv".to_owned(), host_policy().unwrap())]),
            node: NodeBudget::default(),
            depends_on: std::collections::BTreeMap::new(),
            clock_id: clock::clock_id(),
        };
        let mut machine = IncidentMachine::restore(config, machine, clock::now());
        assert!(matches!(machine.poll_output(), Some(Output::Reconcile(_))));
        stage.finish().await;
    }
}
