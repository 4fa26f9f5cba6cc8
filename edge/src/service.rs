//! One supervised service: the task that owns its process, the task that probes it, and what others may know of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use theriac_heal::checkpoint::schedule::Limits;
use theriac_heal::checkpoint::state_check::StateCheck;
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits};
use theriac_heal::executor::cgroup::Hierarchies;
use theriac_heal::executor::clock;
use theriac_heal::executor::hook::Hook;
use theriac_heal::executor::listening::listening;
use theriac_heal::executor::postgres::PostgresHands;
use theriac_heal::executor::process::{
    Leftover, OutputTo, ProcessError, ServiceExit, ServiceSpec, Supervisor, process_state,
};
use theriac_heal::executor::proxy::Proxy;
use theriac_heal::executor::service::{Refused, ServiceHands, ServiceState};
use theriac_heal::executor::space::SpaceHands;
use theriac_heal::executor::webhook::{SECRET_BYTES_MIN, Webhook};
use theriac_heal::incident::Input;
use theriac_heal::types::{ActionKind, FaultClass, Intent, IntentId, Outcome};
use theriac_model::risk::Risk;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinError, JoinSet};

use crate::config::{HookSettings, ProbeConfig, ServiceConfig, StateSettings, WebhookSettings};
use crate::logs::LogWatch;
use crate::metrics::{Metrics, service as label};
use crate::pressure::Waits;
use crate::probe::{self, Probe, ProbeError};
use crate::room::{Room, is_ample};
use crate::sample::ProbeWindow;
use crate::state_dir::StateDir;
use crate::status::Board;
use crate::storage::FREE_MIN;
use crate::supervise::Shutdown;

/// Largest output file of a service, in bytes.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Most output of a state check that is kept as evidence, in bytes.
const CHECK_OUTPUT_BYTES_MAX: usize = 4 << 10;
/// Time between two looks at the state of the process.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Time before a webhook is tried again.
pub(crate) const WEBHOOK_PAUSE: Duration = Duration::from_millis(500);
/// Most bytes of a file with a webhook's secret that are read.
const SECRET_FILE_BYTES_MAX: u64 = 64 << 10;
/// Longest time for one look at a server's sessions.
const SESSIONS_WITHIN: Duration = Duration::from_secs(2);
/// Time between two of them right after an action or a failed probe.
const SESSIONS_HURRIED_EVERY: Duration = Duration::from_millis(200);
/// Looks between two looks at the room on the service's file system.
const ROOM_LOOKS: u32 = 10;
/// Time within which everything in a control group that is ended gets its signal.
const ALL_WITHIN: Duration = Duration::from_millis(200);
/// Looks between two looks at what its threads wait for, and at its output.
const WAITS_LOOKS: u32 = 4;
/// Time between probes right after an action, so that its effect is known soon.
const HURRIED_EVERY: Duration = Duration::from_millis(50);
/// Longest time that probes are hurried after an action.
const HURRY_FOR: Duration = Duration::from_secs(5);
/// Good probes in a row after which there is no hurry any more.
const HURRY_GOOD: u32 = 5;
/// So many parts of the time for verification has a process to live before the answers of a program that had its port before it count.
const PROVES_AFTER: u32 = 3;

/// What others may know and say.
#[derive(Debug)]
pub struct ServiceShared {
    /// Its name.
    pub name: String,
    /// Its configuration.
    pub config: ServiceConfig,
    /// Whether an incident of it is open.
    pub disturbed: AtomicBool,
    /// Whether an incident is open that speaks against its state (crash, hang, corruption, full disk), or an action is under way.
    pub unsound: AtomicBool,
    /// Whether an incident of corrupt state is open and no action is under way.
    pub corrupt: AtomicBool,
    /// Held while its state is being copied or replaced, so that the two never meet.
    pub state_in_use: tokio::sync::Mutex<()>,
    /// Intents that its owner has taken and not reported. Held for one addition or removal.
    taken: Mutex<BTreeMap<IntentId, Intent>>,
    /// What stands before it.
    pub proxy: Option<Arc<Proxy>>,
    pid: AtomicU32,
    /// Sockets of others that listened on its port before its process was started. Held for one addition or look.
    strangers: Mutex<BTreeSet<u64>>,
    answers: AtomicBool,
    hurry: Notify,
    look_now: Notify,
    room_now: AtomicBool,
    /// What is known of its file system. Held for one look.
    pub(crate) room: tokio::sync::Mutex<Room>,
    /// A question to that file system has not come back.
    pub(crate) asks_file_system: AtomicBool,
    // Held for one look.
    waits: Mutex<Waits>,
    // Held for one addition or copy, never across an await.
    probes: Mutex<ProbeWindow>,
    // The same.
    risks: Mutex<Vec<Risk>>,
}

impl ServiceShared {
    /// A service of which nothing is known yet.
    pub fn new(config: ServiceConfig) -> Self {
        let port = config.probe.as_ref().and_then(|probe| probe.url.tcp_port());
        Self {
            name: config.name.to_string(),
            proxy: config.proxy.as_ref().map(|proxy| Proxy::new(proxy.spec())),
            config,
            disturbed: AtomicBool::new(false),
            unsound: AtomicBool::new(false),
            corrupt: AtomicBool::new(false),
            state_in_use: tokio::sync::Mutex::new(()),
            taken: Mutex::default(),
            pid: AtomicU32::new(0),
            strangers: Mutex::default(),
            answers: AtomicBool::new(false),
            hurry: Notify::new(),
            look_now: Notify::new(),
            room_now: AtomicBool::new(false),
            room: tokio::sync::Mutex::default(),
            asks_file_system: AtomicBool::new(false),
            waits: Mutex::new(Waits::of(port)),
            probes: Mutex::default(),
            risks: Mutex::default(),
        }
    }

    fn reported(&self, intent: &Intent) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.remove(&intent.id);
    }

    /// What was taken and not reported, which is none any more.
    fn unreported(&self) -> BTreeMap<IntentId, Intent> {
        std::mem::take(&mut *self.taken.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Acquire)).filter(|pid| *pid != 0)
    }

    /// Whether it runs, answers its probes, and nothing speaks against its state. What only the detector finds unusual does not:
    /// an alarm that lasts must not end the checkpoints.
    pub fn is_sound(&self) -> bool {
        self.pid().is_some()
            && !self.unsound.load(Ordering::Relaxed)
            && (self.config.probe.is_none() || self.answers.load(Ordering::Relaxed))
    }

    /// The probes since the last call.
    pub fn take_probes(&self) -> ProbeWindow {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Its failure risk as of the latest sample, one for each horizon, ascending; empty before the first sample. For whoever
    /// plans ahead, such as the scheduler of checkpoints.
    pub fn risks(&self) -> Vec<Risk> {
        self.risks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn note_risks(&self, risks: Vec<Risk>) {
        *self.risks.lock().unwrap_or_else(PoisonError::into_inner) = risks;
    }

    /// Whether those alone listen on its port that did before its process was started: then it is not the one that answers there.
    fn strangers_alone(&self) -> bool {
        let strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.is_empty() {
            return false;
        }
        let now = local_port(&self.config).map_or_else(BTreeSet::new, listening);
        !now.is_empty() && now.is_subset(&strangers)
    }

    pub(crate) fn set_pid(&self, pid: Option<u32>) {
        self.pid.store(pid.unwrap_or(0), Ordering::Release);
    }
}

/// What the owner of the process is told.
#[derive(Debug)]
pub enum Command {
    /// Carry a durable intent out, then report [`Input::Executed`]; where its effect does not begin by that moment of [`clock::now`] it is not done, and
    /// that is reported.
    Execute(Intent, Duration),
    /// Find out what became of an intent before the restart of the edge, then report [`Input::Reconciled`].
    Reconcile(Intent),
    /// Take back what a reversible action of that intent did.
    Undo(IntentId),
    /// Start it unless it runs.
    Begin,
    /// Report [`Input::Exited`] when it does not run: an open incident decides what becomes of it.
    Look,
}

/// The receiving end of [`Command`]s; it outlives the task, so that a restarted task misses none.
pub type Commands = Arc<tokio::sync::Mutex<mpsc::Receiver<Command>>>;

/// What the tasks of one service work with.
#[derive(Debug, Clone)]
pub struct ServiceContext {
    /// The service.
    pub shared: Arc<ServiceShared>,
    /// Where files are kept.
    pub dir: StateDir,
    /// To the incident machine.
    pub events: mpsc::Sender<Input>,
    /// The page's picture.
    pub board: Board,
    /// The counters.
    pub metrics: Arc<Metrics>,
}

/// Owns the process until the signal to stop.
///
/// # Errors
/// When the state of an earlier run cannot be taken over.
pub async fn own(
    context: ServiceContext,
    commands: Commands,
    mut shutdown: Shutdown,
) -> Result<(), CheckpointError> {
    let mut commands = commands.lock().await;
    let mut hands = hands(&context)?;
    take_over(&context, &mut hands).await;
    report_lost(&context, &hands).await;
    let shared = Arc::clone(&context.shared);
    // A restore that waits for a copy of the state to be done with.
    let mut waiting: Option<(Intent, Duration)> = None;
    // What leaves the process alone may take minutes: it runs beside the loop, so that an exit and the signal to stop are heard meanwhile.
    let mut beside: JoinSet<Outcome> = JoinSet::new();
    let mut under_way: HashMap<tokio::task::Id, Intent> = HashMap::new();
    // Also what an earlier run left in force.
    let mut undo_at = hands.undo_due().await;
    loop {
        let undo = async {
            match undo_at {
                Some(at) => tokio::time::sleep(at.saturating_sub(clock::now().monotonic)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // First of all: an exit must not wait for a command that would find it anyway.
            biased;
            exit = hands.supervisor.exited() => {
                // Who ends a whole group of processes ends us as well, a moment later: that is no crash.
                if was_asked_to_end(exit) && tokio::time::timeout(ALL_WITHIN, shutdown.wait()).await.is_ok() {
                    context.shared.set_pid(None);
                    break;
                }
                // What was full or read-only may be why it ended.
                context.look_at_room().await;
                let occupied = hands.supervisor.free_for_a_start().err();
                context.exited(exit, occupied).await;
            }
            Some(ended) = beside.join_next_with_id(), if !beside.is_empty() => {
                undo_at = hands.undo_due().await;
                let (id, outcome) = how_it_ended(ended, hands.supervisor.pid().is_some());
                if let Some(intent) = under_way.remove(&id) {
                    report(&context, &hands, &intent, outcome).await;
                }
            }
            // A copy that is under way would see the state change.
            in_use = shared.state_in_use.lock(), if waiting.is_some() => {
                if let Some((intent, begin_by)) = waiting.take() {
                    execute(&context, &mut hands, intent, begin_by).await;
                    undo_at = hands.undo_due().await;
                }
                drop(in_use);
            }
            () = begins_too_late(waiting.as_ref()), if waiting.is_some() => {
                if let Some((intent, begin_by)) = waiting.take() {
                    execute(&context, &mut hands, intent, begin_by).await;
                }
            }
            command = commands.recv() => match command {
                Some(Command::Execute(intent, begin_by)) if intent.action == ActionKind::RestoreAndStart => {
                    context.takes(&intent);
                    waiting = Some((intent, begin_by));
                }
                Some(Command::Execute(intent, begin_by))
                    if !intent.action.renews_process() && !is_too_late(begin_by) =>
                {
                    context.acts(&intent);
                    let hands = hands.beside();
                    let meant = intent.clone();
                    let task = beside.spawn(async move { hands.execute(&meant).await });
                    under_way.insert(task.id(), intent);
                }
                Some(command) => {
                    carry_out(&context, &mut hands, command).await;
                    undo_at = hands.undo_due().await;
                }
                None => break,
            },
            () = undo => undo_at = hands.undo_due().await,
            () = shutdown.wait() => break,
        }
    }
    // Its intent is durable: the next run counts it as done and looks what became of it.
    beside.shutdown().await;
    // While nobody runs nobody would take it back. Work off the async threads cannot be ended: it finds the gate closed.
    hands.undo_all();
    if context.shared.config.keep_running {
        tracing::info!(
            service = context.shared.name,
            "left running: the next run takes it over"
        );
    } else if let Err(error) = hands.supervisor.stop().await {
        tracing::error!(service = context.shared.name, %error, "cannot stop the service");
    }
    context.shared.set_pid(None);
    Ok(())
}

/// A panic in the hands is a failure like any other: were it not told, its incident could neither close nor go on.
fn how_it_ended(
    ended: Result<(tokio::task::Id, Outcome), JoinError>,
    running: bool,
) -> (tokio::task::Id, Outcome) {
    ended.unwrap_or_else(|error| {
        tracing::error!(%error, "an action did not end");
        let detail = error.to_string();
        (error.id(), Outcome::Failed { detail, running })
    })
}

async fn take_over(context: &ServiceContext, hands: &mut ServiceHands) {
    let service = context.shared.name.clone();
    match hands.supervisor.take_over().await {
        Ok(Leftover::Adopted { pid }) => {
            tracing::info!(service, pid, "took over the running service");
            hands.place(pid);
            context.runs(pid, hands.supervisor.starts()).await;
        }
        Ok(Leftover::Cleared { processes }) => {
            tracing::warn!(service, processes, "ended what an earlier run left behind");
        }
        Ok(Leftover::None) => {}
        Err(error) => {
            context
                .tell(Input::Exited {
                    service,
                    status: error.to_string(),
                })
                .await;
        }
    }
}

async fn carry_out(context: &ServiceContext, hands: &mut ServiceHands, command: Command) {
    match command {
        Command::Undo(intent) => hands.undo(intent.0).await,
        Command::Begin => begin(context, hands).await,
        Command::Look if hands.supervisor.pid().is_some() => {}
        Command::Look => {
            context.look_at_room().await;
            let status = "it did not run when the edge started".to_owned();
            let occupied = hands.supervisor.free_for_a_start().err();
            context.does_not_run(status, occupied).await;
        }
        Command::Reconcile(intent) => {
            let running = hands.supervisor.pid().is_some();
            let took_effect = running && hands.supervisor.started_for() == Some(intent.id.0);
            context
                .tell(Input::Reconciled {
                    id: intent.id,
                    running,
                    took_effect,
                })
                .await;
        }
        Command::Execute(intent, begin_by) => execute(context, hands, intent, begin_by).await,
    }
}

/// What renews the process, or comes too late.
async fn execute(context: &ServiceContext, hands: &mut ServiceHands, intent: Intent, begin_by: Duration) {
    context.acts(&intent);
    // Whoever waited until now may have waited for too long: a person was told, and another node may have the slot that this one had.
    let outcome = if is_too_late(begin_by) {
        let service = &context.shared.name;
        tracing::warn!(service, intent = intent.id.0, action = %intent.action, "not begun in time");
        Outcome::NotNeeded
    } else {
        hands.execute(&intent).await
    };
    report(context, hands, &intent, outcome).await;
}

/// Until it is too late for what waits; for ever where nothing does.
async fn begins_too_late(waiting: Option<&(Intent, Duration)>) {
    match waiting {
        // A moment later than it may begin.
        Some((_, begin_by)) => {
            let left = begin_by.saturating_sub(clock::now().monotonic);
            tokio::time::sleep(left + Duration::from_millis(1)).await;
        }
        None => std::future::pending().await,
    }
}

/// What an owner had taken that ended by a panic: nobody else would tell what became of it, and its incident could neither close nor go on.
async fn report_lost(context: &ServiceContext, hands: &ServiceHands) {
    for intent in context.shared.unreported().into_values() {
        let detail = format!("{} was cut off, and how far it came is not known", intent.action);
        let running = hands.supervisor.pid().is_some();
        report(context, hands, &intent, Outcome::Failed { detail, running }).await;
    }
}

/// TERM, or what a program does that heeds it.
fn was_asked_to_end(exit: ServiceExit) -> bool {
    const TERM: i32 = 15;
    matches!(exit, ServiceExit::Signal(TERM) | ServiceExit::Code(0)) || exit == ServiceExit::Code(128 + TERM)
}

fn is_too_late(begin_by: Duration) -> bool {
    clock::now().monotonic > begin_by
}

/// Tells the machine how an action ended, and has its effect looked for at once.
async fn report(context: &ServiceContext, hands: &ServiceHands, intent: &Intent, mut outcome: Outcome) {
    let shared = &context.shared;
    // The process may have ended, or come back, while the action went on beside it.
    if let Outcome::Failed { running, .. } = &mut outcome {
        *running = hands.supervisor.pid().is_some();
    }
    if matches!(outcome, Outcome::Failed { running: false, .. })
        && let Err(occupied) = hands.supervisor.free_for_a_start()
    {
        context.does_not_run(String::new(), Some(occupied)).await;
    }
    context.note_strangers(hands);
    context.show(hands.supervisor.pid(), hands.supervisor.starts());
    shared.reported(intent);
    context
        .tell(Input::Executed {
            id: intent.id,
            outcome,
        })
        .await;
    shared.hurry.notify_one();
    shared.look_now.notify_one();
    shared.room_now.store(true, Ordering::Relaxed);
}

/// The first start: state check, then the process.
async fn begin(context: &ServiceContext, hands: &mut ServiceHands) {
    if hands.supervisor.pid().is_some() {
        return;
    }
    let service = context.shared.name.clone();
    context.look_at_room().await;
    context
        .board
        .update_service(&service, |line| "starting".clone_into(&mut line.state));
    match hands.begin().await {
        Ok(pid) => {
            context.note_strangers(hands);
            context.runs(pid, hands.supervisor.starts()).await;
            context.shared.hurry.notify_one();
        }
        Err(Refused::Corrupt(detail)) => {
            tracing::error!(service, detail, "not started: its state is corrupt or gone");
            context.tell(Input::StateCorrupt { service, detail }).await;
        }
        Err(Refused::Failed(error)) => {
            tracing::error!(service, error, "not started");
            context.show(None, hands.supervisor.starts());
            let occupied = hands.supervisor.free_for_a_start().err();
            context.does_not_run(error, occupied).await;
        }
    }
}

impl ServiceContext {
    /// From now on somebody has to tell what becomes of it.
    fn takes(&self, intent: &Intent) {
        let mut taken = self.shared.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(intent.id, intent.clone());
    }

    fn acts(&self, intent: &Intent) {
        self.takes(intent);
        let name = &self.shared.name;
        tracing::info!(service = name, intent = intent.id.0, action = %intent.action, "acting");
        self.board
            .update_service(name, |line| "acting".clone_into(&mut line.state));
    }

    async fn exited(&self, exit: ServiceExit, occupied: Option<ProcessError>) {
        let status = match exit {
            ServiceExit::Code(code) => format!("exit code {code}"),
            ServiceExit::Signal(signal) => format!("killed by signal {signal}"),
            ServiceExit::Unknown => "it is gone; how is not known".to_owned(),
        };
        tracing::warn!(service = self.shared.name, status, "the service ended");
        self.shared.set_pid(None);
        if let Some(proxy) = &self.shared.proxy {
            // Whoever asks now may be answered by the next process.
            proxy.hold();
        }
        self.shared.answers.store(false, Ordering::Relaxed);
        self.board.update_service(&self.shared.name, |line| {
            "stopped".clone_into(&mut line.state);
            line.pid = None;
            line.healthy = false;
        });
        self.metrics
            .service_up
            .get_or_create(&label(&self.shared.name))
            .set(0);
        self.does_not_run(status, occupied).await;
    }

    /// Tells why: how it ended, or that another server has its data.
    async fn does_not_run(&self, status: String, occupied: Option<ProcessError>) {
        let service = self.shared.name.clone();
        self.tell(match occupied {
            Some(other) => Input::Occupied {
                service,
                detail: other.to_string(),
            },
            None => Input::Exited { service, status },
        })
        .await;
    }

    fn note_strangers(&self, hands: &ServiceHands) {
        let mut strangers = self
            .shared
            .strangers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        strangers.clone_from(hands.supervisor.strangers());
    }

    async fn runs(&self, pid: u32, starts: u64) {
        self.show(Some(pid), starts);
        self.tell(Input::Started {
            service: self.shared.name.clone(),
            pid,
        })
        .await;
    }

    fn show(&self, pid: Option<u32>, starts: u64) {
        self.shared.set_pid(pid);
        let restarts = starts.saturating_sub(1);
        let probed = self.shared.config.probe.is_some();
        self.board.update_service(&self.shared.name, |line| {
            if pid.is_some() { "running" } else { "stopped" }.clone_into(&mut line.state);
            line.pid = pid;
            line.restarts = restarts;
            line.healthy = line.healthy && pid.is_some() || !probed && pid.is_some();
        });
        crate::metrics::raise_to(
            &self
                .metrics
                .service_restarts
                .get_or_create(&label(&self.shared.name)),
            restarts,
        );
    }

    pub(crate) async fn tell(&self, input: Input) {
        // Only while the process ends is nobody listening.
        let _heard = self.events.send(input).await.is_ok();
    }
}

/// Asks the service whether it is well, and looks whether its process is stopped, until the signal to stop.
///
/// # Errors
/// Never; the signature is the one of a task.
pub async fn watch(context: ServiceContext, mut shutdown: Shutdown) -> Result<(), std::convert::Infallible> {
    let probes = async {
        match &context.shared.config.probe {
            Some(config) => probe_again_and_again(&context, config).await,
            None => std::future::pending().await,
        }
    };
    let sessions = async {
        match crate::postgres::session_hands(&context.shared.config) {
            Some((hands, every)) => look_at_sessions(&context, &hands, every).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = probes => Ok(()),
        () = sessions => Ok(()),
        () = look_again_and_again(&context) => Ok(()),
        () = shutdown.wait() => Ok(()),
    }
}

async fn probe_again_and_again(context: &ServiceContext, config: &ProbeConfig) {
    let shared = &context.shared;
    let mut hurry_until: Option<Instant> = None;
    let mut good = 0_u32;
    // Since when the present process runs without having answered.
    let mut starting: Option<Instant> = None;
    // Since when it says that it loads its data.
    let mut loading: Option<Instant> = None;
    let mut process = None;
    // Before its first process there is nothing to ask: what fails until then is no hang.
    let mut begun_once = false;
    // Since when the present process runs.
    let mut since = Instant::now();
    let proves_after = shared.config.healing.verify_window / PROVES_AFTER;
    loop {
        let begun = Instant::now();
        begun_once |= shared.pid().is_some();
        if shared.pid() != process {
            process = shared.pid();
            since = begun;
            starting = Some(begun);
            // What the former one was at says nothing of how long this one takes.
            loading = None;
        }
        let answer = probe::ask(&config.url, config.timeout).await;
        let latency = begun.elapsed();
        let error = answer.as_ref().err();
        let refused = error.is_some_and(ProbeError::is_no_slot);
        let refusal = error.is_some_and(ProbeError::is_refusal);
        loading = match error {
            Some(error) if error.is_loading() => loading.or(Some(begun)),
            _ => None,
        };
        let loads = loading.is_some_and(|since| since.elapsed() < config.loading_max);
        let (ok, detail) = answer.unwrap_or_else(|error| (false, error.to_string()));
        // Who had the port before this process is a proxy that stands before it, or a stranger because of whom it will soon end. It says nothing
        // of the process until that has lived for a while.
        let proves_in = proves_after.saturating_sub(since.elapsed());
        let unproven = ok && process.is_some() && !proves_in.is_zero() && shared.strangers_alone();
        if unproven {
            // Its time to be verified runs meanwhile.
            hurry_until = Some(Instant::now() + proves_in + HURRY_FOR);
        }
        if !ok {
            shared.look_now.notify_one();
        }
        good = if ok && !unproven {
            good.saturating_add(1)
        } else {
            0
        };
        if ok && !unproven || starting.is_some_and(|since| since.elapsed() >= config.start_grace) {
            starting = None;
        }
        if starting.is_none() && begun_once && !loads && !unproven {
            context.note_probe(ok, latency);
            let service = shared.name.clone();
            if !ok {
                // Why it may not answer is known before that it does not.
                context.look_at_room().await;
                context.tell_pressure().await;
            }
            let (named, words) = (service.clone(), detail.clone());
            match &config.url {
                Probe::Postgres(_) if refused && crate::postgres::is_postgres(&shared.config) => {
                    let (service, detail) = (named, words);
                    context.tell(Input::SessionsRefused { service, detail }).await;
                }
                Probe::Redis(_) if refused => {
                    let (service, detail) = (named, words);
                    context.tell(Input::SessionsRefused { service, detail }).await;
                }
                _ if refusal => {
                    let (service, detail) = (named, words);
                    context.tell(Input::Refused { service, detail }).await;
                }
                _ => {}
            }
            context
                .tell(Input::Probe {
                    service,
                    ok,
                    latency,
                    detail,
                })
                .await;
        }
        let hurried = hurry_until.is_some_and(|until| Instant::now() < until) && good < HURRY_GOOD;
        let pause = match (unproven, hurried) {
            (true, _) => config.interval.min(proves_in),
            (false, true) => HURRIED_EVERY,
            (false, false) => config.interval.saturating_sub(begun.elapsed()),
        };
        tokio::select! {
            () = tokio::time::sleep(pause.max(HURRIED_EVERY)) => {}
            () = shared.hurry.notified() => {
                hurry_until = hurry_until.max(Some(Instant::now() + HURRY_FOR));
                good = 0;
            }
        }
    }
}

/// Looks at a server's sessions over the slot that it keeps back, while its process runs.
async fn look_at_sessions(context: &ServiceContext, hands: &PostgresHands, every: Duration) {
    let shared = &context.shared;
    let mut hurry_until: Option<Instant> = None;
    loop {
        if shared.pid().is_some() {
            let service = shared.name.clone();
            let input = match hands.look(SESSIONS_WITHIN).await {
                Ok(seen) => Input::Sessions { service, seen },
                // It lives, and has not even the slot that it keeps back.
                Err(error) if probe::is_no_slot(&error) => Input::SessionsRefused {
                    service,
                    detail: error.to_string(),
                },
                Err(error) => Input::SessionsUnseen {
                    service,
                    detail: error.to_string(),
                },
            };
            context.tell(input).await;
        }
        let hurried = hurry_until.is_some_and(|until| Instant::now() < until);
        let pause = if hurried {
            every.min(SESSIONS_HURRIED_EVERY)
        } else {
            every
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.look_now.notified() => {
                hurry_until = Some(Instant::now() + HURRY_FOR);
                tokio::time::sleep(HURRIED_EVERY).await;
            }
        }
    }
}

async fn look_again_and_again(context: &ServiceContext) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = 0_u32;
    let mut log = context.shared.config.output.clone().map(LogWatch::new);
    let config = &context.shared.config;
    for warning in crate::warnings::of_service(config) {
        tracing::warn!(service = context.shared.name, "{warning}");
    }
    loop {
        ticks.tick().await;
        if looks.is_multiple_of(WAITS_LOOKS) {
            context.tell_pressure().await;
            if let Some(burst) = log.as_mut().and_then(LogWatch::look) {
                let (service, lines) = (context.shared.name.clone(), burst.lines);
                let (template, mut hint) = (burst.template, burst.hint);
                // Anybody who can have a line written could say so.
                if hint == Some(FaultClass::DiskFull) && is_ample(context) {
                    hint = None;
                }
                context
                    .tell(Input::LogErrors {
                        service,
                        lines,
                        template,
                        hint,
                    })
                    .await;
            }
        }
        if looks.is_multiple_of(ROOM_LOOKS) || context.shared.room_now.swap(false, Ordering::Relaxed) {
            context.watch_room().await;
        }
        looks = looks.wrapping_add(1);
        let Some(pid) = context.shared.pid() else { continue };
        let Some(state) = process_state(pid) else { continue };
        context
            .tell(Input::Process {
                service: context.shared.name.clone(),
                state,
            })
            .await;
    }
}

impl ServiceContext {
    /// What keeps its threads from running, while it has some.
    async fn tell_pressure(&self) {
        let Some(pid) = self.shared.pid() else { return };
        let shared = Arc::clone(&self.shared);
        // Thousands of threads are thousands of small reads: not on the async threads, and not at every failed probe.
        let looked = tokio::task::spawn_blocking(move || {
            let mut waits = shared.waits.lock().unwrap_or_else(PoisonError::into_inner);
            let well = shared.answers.load(Ordering::Relaxed);
            waits.is_due(well).then(|| waits.look(pid, well))
        });
        let Ok(Some(seen)) = looked.await else { return };
        let service = self.shared.name.clone();
        tracing::debug!(service, ?seen, "what its threads wait for");
        self.tell(Input::Pressure { service, seen }).await;
    }

    fn note_probe(&self, ok: bool, latency: Duration) {
        let shared = &self.shared;
        // An answer that was under way when the process ended says nothing about the present.
        let up = ok && shared.pid().is_some();
        shared.answers.store(up, Ordering::Relaxed);
        shared
            .probes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .record(ok, latency);
        if let Some(proxy) = &shared.proxy {
            proxy.note_probe(ok);
        }
        let name = label(&shared.name);
        self.metrics.probes.get_or_create(&name).inc();
        if !ok {
            self.metrics.probe_failures.get_or_create(&name).inc();
        }
        self.metrics.service_up.get_or_create(&name).set(i64::from(up));
        self.board.update_service(&shared.name, |line| line.healthy = up);
    }
}

fn hands(context: &ServiceContext) -> Result<ServiceHands, CheckpointError> {
    let config = &context.shared.config;
    let mut spec = ServiceSpec::new(config.name.as_str(), config.argv.clone());
    spec.env.clone_from(&config.env);
    spec.cwd.clone_from(&config.cwd);
    spec.stop_grace = config.stop_grace;
    if let Some(path) = &config.output {
        spec.output = OutputTo::File {
            path: path.clone(),
            bytes_max: OUTPUT_BYTES_MAX,
        };
    }
    if crate::postgres::is_postgres(config)
        && let Some(state) = &config.state
    {
        crate::postgres::supervise(&mut spec, &state.dir);
    }
    spec.listens_on = local_port(config);
    let record = context.dir.root().join(format!("service-{}.json", config.name));
    let state = config
        .state
        .as_ref()
        .map(|state| {
            let checkpoints = open_checkpoints(
                &context.dir,
                config.name.as_str(),
                state,
                crate::postgres::needs_proof(config),
            )?;
            Ok::<_, CheckpointError>(ServiceState {
                dir: state.dir.clone(),
                check: state_check(state),
                checkpoints,
            })
        })
        .transpose()?;
    Ok(ServiceHands {
        supervisor: Supervisor::new(spec, record),
        state,
        hook: config.hook.as_ref().map(hook),
        webhook: config
            .webhook
            .as_ref()
            .and_then(|settings| webhook(context, settings)),
        space: space_hands(context),
        proxy: context.shared.proxy.clone(),
        cgroup: config.cgroup.as_ref().map(|settings| {
            let at = Hierarchies::read().unwrap_or_else(|error| {
                tracing::warn!(service = config.name.as_str(), %error, "no control groups are seen");
                Hierarchies::default()
            });
            settings.hands(at, context.dir.bounds_file(config.name.as_str()))
        }),
        #[cfg(feature = "systemd")]
        systemd: config.systemd.as_ref().map(crate::config::SystemdSettings::hands),
        #[cfg(feature = "kubernetes")]
        kubernetes: config.kubernetes.as_ref().and_then(|settings| {
            let hands = settings.hands();
            if hands.is_none() {
                let service = config.name.as_str();
                tracing::error!(
                    service,
                    "no API server is named, neither in edge.toml nor by the cluster"
                );
            }
            Some((hands?, format!("{}-{}", context.board.status().node, config.name)))
        }),
        sessions: crate::postgres::session_hands(config)
            .filter(|_| config.sessions.is_some())
            .map(|(hands, _)| hands),
    })
}

/// The port of this host that it is asked on; `None` where it is asked over another address, or none.
fn local_port(config: &ServiceConfig) -> Option<u16> {
    let url = &config.probe.as_ref()?.url;
    url.is_of_this_host().then(|| url.tcp_port()).flatten()
}

fn hook(settings: &HookSettings) -> Hook {
    Hook {
        argv: settings.argv.clone(),
        env: settings.env.clone(),
        timeout: settings.timeout,
        output_bytes_max: CHECK_OUTPUT_BYTES_MAX,
    }
}

/// Nothing when the secret cannot be used: the action then fails and says so, and the service is healed by the other rungs.
fn webhook(context: &ServiceContext, settings: &WebhookSettings) -> Option<Webhook> {
    let name = &context.shared.name;
    let secret = match read_secret(&settings.secret_file) {
        Ok(secret) => secret,
        Err(error) => {
            let path = settings.secret_file.display();
            tracing::error!(code = "TH-E0373", service = name, %path, %error, "the webhook cannot be signed");
            return None;
        }
    };
    Some(Webhook {
        url: settings.url.parse().ok()?,
        secret,
        node: context.board.status().node,
        timeout: settings.timeout,
        attempts: settings.attempts,
        pause: WEBHOOK_PAUSE,
    })
}

fn read_secret(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    // Opened once: what is checked is what is read, whatever is put in its place meanwhile.
    let file = std::fs::File::open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others may read it: chmod 600"));
    }
    let own = rustix::process::geteuid().as_raw();
    if ![0, own].contains(&found.uid()) {
        return Err(std::io::Error::other(
            "it belongs to another user, who can change it",
        ));
    }
    let mut secret = Vec::new();
    file.take(SECRET_FILE_BYTES_MAX).read_to_end(&mut secret)?;
    let secret = secret.trim_ascii().to_vec();
    if secret.len() < SECRET_BYTES_MIN {
        return Err(std::io::Error::other(format!(
            "it is shorter than {SECRET_BYTES_MIN} bytes"
        )));
    }
    Ok(secret)
}

/// What may be moved away when the file system of the service's state is full.
pub(crate) fn space_hands(context: &ServiceContext) -> Option<SpaceHands> {
    let config = &context.shared.config;
    let (space, state) = (config.space.as_ref()?, config.state.as_ref()?);
    Some(SpaceHands {
        on: state.dir.clone(),
        listed: space.relieve.clone(),
        protected: config
            .other_states
            .iter()
            .cloned()
            .chain([context.dir.root().to_owned()])
            .collect(),
        quarantine: space.quarantine.join(&context.shared.name),
        min_age: space.min_age,
        free_bytes_min: state.free_bytes_min.unwrap_or(0),
    })
}

/// The store of one service's checkpoints.
pub(crate) fn open_checkpoints(
    dir: &StateDir,
    service: &str,
    state: &StateSettings,
    needs_proof: bool,
) -> Result<CheckpointStore, CheckpointError> {
    let limits = StoreLimits {
        keep: state.keep,
        needs_proof,
        // A checkpoint is never what makes training and sending stop.
        free_bytes_min: FREE_MIN,
        ..StoreLimits::default()
    };
    let path: &Path = &dir.checkpoints().join(service);
    CheckpointStore::open(path, limits)
}

/// When checkpoints of the state are taken.
pub(crate) fn schedule_limits(state: &StateSettings) -> Limits {
    Limits {
        min_gap: state.min_gap.min(state.interval),
        max_gap: state.interval,
        budget_pct: state.budget_pct,
        expected_mtbf: state.expected_mtbf,
        ..Limits::default()
    }
}

/// The command that says whether the state is sound, where there is one.
pub(crate) fn state_check(state: &StateSettings) -> Option<StateCheck> {
    (!state.check.is_empty()).then(|| StateCheck {
        argv: state.check.clone(),
        timeout: state.check_timeout,
        output_bytes_max: CHECK_OUTPUT_BYTES_MAX,
    })
}

#[cfg(test)]
mod tests;
