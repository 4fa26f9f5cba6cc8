//! One supervised service: the task that owns its process, the task that probes it, and what others may know of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use theriac_heal::checkpoint::store::CheckpointError;
use theriac_heal::executor::clock;
use theriac_heal::executor::listening::listening;
use theriac_heal::executor::process::{Leftover, ProcessError, ServiceExit};
use theriac_heal::executor::proxy::Proxy;
use theriac_heal::executor::service::{Refused, ServiceHands};
use theriac_heal::incident::Input;
use theriac_heal::types::{ActionKind, Intent, IntentId, Outcome};
use theriac_model::risk::Risk;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinError, JoinSet};

use crate::config::ServiceConfig;
use crate::metrics::{Metrics, service as label};
use crate::pressure::Waits;
use crate::room::Room;
use crate::sample::ProbeWindow;
use crate::state_dir::StateDir;
use crate::status::Board;
use crate::supervise::Shutdown;

mod hands;
mod watch;

pub(crate) use self::hands::{WEBHOOK_PAUSE, open_checkpoints, schedule_limits, space_hands, state_check};
use self::hands::{hands, local_port};
pub use self::watch::watch;

/// Time within which everything in a control group that is ended gets its signal.
const ALL_WITHIN: Duration = Duration::from_millis(200);

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

#[cfg(test)]
mod tests;
