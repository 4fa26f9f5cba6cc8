//! What looks at a service: its probe, its process, its sessions, its threads, its output.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use theriac_heal::executor::postgres::PostgresHands;
use theriac_heal::executor::process::process_state;
use theriac_heal::incident::Input;
use theriac_heal::types::FaultClass;

use super::ServiceContext;
use crate::config::ProbeConfig;
use crate::logs::LogWatch;
use crate::metrics::service as label;
use crate::probe::{self, Probe, ProbeError};
use crate::room::is_ample;
use crate::supervise::Shutdown;
use crate::warnings;

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
    let joined = context.dir.joined().is_ok_and(|joined| joined.is_some());
    for warning in warnings::of_service(config, joined) {
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

/// Time between two looks at the state of the process.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Longest time for one look at a server's sessions.
const SESSIONS_WITHIN: Duration = Duration::from_secs(2);
/// Time between two of them right after an action or a failed probe.
const SESSIONS_HURRIED_EVERY: Duration = Duration::from_millis(200);
/// Looks between two looks at the room on the service's file system.
const ROOM_LOOKS: u32 = 10;
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
