//! Healers that others use, on the same service under the same load, measured from outside as Theriac is.
//!
//! *Threshold* asks `/healthz` every 2 s with 2 s of patience; after two failures in a row it restarts (TERM, after 2 s KILL, start). *Monit* is the
//! real program with the same numbers and its own eye on the process id. Its usual bound on restarts is left out, since it would give up in the middle of a
//! campaign that brings the same fault again and again.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use theriac_edge::probe::{self, ProbeUrl};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::{HEAL_LIMIT, Healer, Options, QUIET, REQUESTS_PER_S, ResultRow, Run, Skipped, down_s, row};
use crate::demo::DemoError;
use crate::demo::record::FaultRecord;
use crate::demo::stage::unix_ms;
use crate::fleet::fault::Fault;
use crate::fleet::http::Client;
use crate::fleet::place::Site;
use crate::traffic::Traffic;

/// Where a rival works.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// The lab itself, whose `service` is healed.
    pub(super) program: &'a Path,
    pub(super) site: &'a Site,
    pub(super) logs: &'a Path,
}

/// A running rival; what it started ends with it.
#[derive(Debug)]
enum Rival {
    Threshold {
        task: JoinHandle<()>,
        pid: Arc<AtomicU32>,
        starts: Arc<AtomicU64>,
    },
    Monit {
        child: Box<Child>,
        pid_file: PathBuf,
        starts_file: PathBuf,
    },
}

/// Every fault under one rival, or why it was left out.
pub(super) async fn play(
    healer: Healer,
    place: &Place<'_>,
    options: &Options,
    mut interrupted: watch::Receiver<bool>,
) -> Result<Result<Vec<ResultRow>, Skipped>, DemoError> {
    let file = |error| DemoError::File("cannot prepare a rival".to_owned(), error);
    std::fs::create_dir_all(place.site.service_state()).map_err(file)?;
    std::fs::create_dir_all(place.logs).map_err(file)?;
    let rival = match healer {
        Healer::Monit if !is_on_path("monit") => {
            return Ok(Err(Skipped {
                fault: healer.name().to_owned(),
                reason: "the program `monit` is not on PATH; it is a Debian package".to_owned(),
            }));
        }
        Healer::Monit => monit(place).map_err(file)?,
        Healer::Threshold | Healer::Theriac => threshold(place),
    };
    let played = tokio::select! {
        played = all_faults(healer, place, options, &rival) => played,
        _ = interrupted.wait_for(|interrupted| *interrupted) => Err(DemoError::Interrupted),
    };
    rival.end().await;
    played.map(Ok)
}

async fn all_faults(
    healer: Healer,
    place: &Place<'_>,
    options: &Options,
    rival: &Rival,
) -> Result<Vec<ResultRow>, DemoError> {
    let client = Client::new(Duration::from_secs(2));
    let mut rows = Vec::new();
    for (seed, fault) in options.faults.iter().enumerate() {
        wait_until_it_serves(place).await?;
        let traffic = Traffic::start(place.site.service, REQUESTS_PER_S, seed as u64);
        let mut runs = Vec::new();
        for number in 1..=options.runs {
            // Not always at the same moment between two looks, and as far apart for every healer.
            sleep(Duration::from_secs(2) + Duration::from_secs(2) * (number % 7) / 7).await;
            runs.extend(once(*fault, place.site, &client, rival, &traffic).await);
        }
        let lost = traffic.stop().await.lost_writes;
        rows.push(row(*fault, healer, &runs, lost));
    }
    Ok(rows)
}

/// One run: nothing when the fault could not be injected.
async fn once(fault: Fault, site: &Site, client: &Client, rival: &Rival, traffic: &Traffic) -> Option<Run> {
    let (pid, starts) = (rival.pid()?, rival.starts());
    let (injected_ms, begun) = (unix_ms(), Instant::now());
    if let Err(error) = fault.inject(site, pid, client).await {
        tracing::warn!(%error, "not injected");
        return None;
    }
    let over = loop {
        sleep(Duration::from_millis(50)).await;
        let seen = traffic.snapshot();
        let last = seen.failures.iter().map(|failure| failure.unix_ms).max();
        let quiet_ms = unix_ms().saturating_sub(last.unwrap_or(0).max(injected_ms));
        if quiet_ms >= u64::try_from(QUIET.as_millis()).unwrap_or(u64::MAX) {
            break true;
        }
        if begun.elapsed() >= HEAL_LIMIT {
            break false;
        }
    };
    if !over {
        fault.undo(site, pid, client).await;
    }
    let seen = traffic.snapshot();
    let down = down_s(&seen, injected_ms);
    Some(Run {
        record: FaultRecord {
            kind: fault.name().to_owned(),
            title: fault.title().to_owned(),
            failed_requests: seen.failed_between(injected_ms, unix_ms()),
            ..FaultRecord::default()
        },
        down_s: over.then_some(down),
        actions: rival.starts().saturating_sub(starts),
        harmful: 0,
    })
}

async fn wait_until_it_serves(place: &Place<'_>) -> Result<(), DemoError> {
    let url = ProbeUrl::new(place.site.service, "/healthz");
    let begun = Instant::now();
    while !matches!(probe::status(&url, Duration::from_secs(1)).await, Ok(200..=299)) {
        if begun.elapsed() >= Duration::from_secs(30) {
            return Err(DemoError::Unexpected(format!(
                "the service under {} was not healthy within 30 s",
                place.site.name
            )));
        }
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn words(site: &Site) -> Vec<String> {
    let (listen, control) = (site.service.to_string(), site.control.to_string());
    let state = site.service_state().to_string_lossy().into_owned();
    ["--listen", &listen, "--control", &control, "--state", &state]
        .map(str::to_owned)
        .to_vec()
}

fn threshold(place: &Place<'_>) -> Rival {
    let (pid, starts) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU64::new(0)));
    let url = ProbeUrl::new(place.site.service, "/healthz");
    let (program, words) = (place.program.to_owned(), words(place.site));
    let (known, count) = (Arc::clone(&pid), Arc::clone(&starts));
    let task = tokio::spawn(async move {
        loop {
            let started = Command::new(&program)
                .arg("__service")
                .args(&words)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn();
            let Ok(mut child) = started else {
                sleep(LOOK_EVERY).await;
                continue;
            };
            known.store(child.id().unwrap_or(0), Ordering::Release);
            count.fetch_add(1, Ordering::Relaxed);
            let mut failed = 0;
            while failed < FAILURES {
                sleep(LOOK_EVERY).await;
                let good = matches!(probe::status(&url, PATIENCE).await, Ok(200..=299));
                failed = if good { 0 } else { failed + 1 };
            }
            stop(&mut child).await;
        }
    });
    Rival::Threshold { task, pid, starts }
}

/// TERM, after the grace KILL, reaped.
async fn stop(child: &mut Child) {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // An error means that it is gone.
        kill_process(pid, Signal::TERM).ok();
    }
    if tokio::time::timeout(STOP_GRACE, child.wait()).await.is_err() {
        child.kill().await.ok();
    }
}

fn monit(place: &Place<'_>) -> std::io::Result<Rival> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = place.site.dir.join("monit");
    std::fs::create_dir_all(&dir)?;
    let at = |name: &str| dir.join(name);
    let show = |name: &str| at(name).display().to_string();
    // Monit's own file has no way to write these.
    let odd = |byte: &u8| !byte.is_ascii_alphanumeric() && !b"/._-".contains(byte);
    for path in [&dir, place.logs] {
        if path.as_os_str().as_encoded_bytes().iter().any(odd) {
            return Err(std::io::Error::other(format!(
                "{}: Monit needs a path of letters, digits, `.`, `_`, `-`",
                path.display()
            )));
        }
    }
    let quoted = |word: &str| format!("'{}'", word.replace('\'', r"'\''"));
    let words: Vec<String> = words(place.site).iter().map(|word| quoted(word)).collect();
    std::fs::write(
        at("start.sh"),
        format!(
            "setsid {} service {} </dev/null >/dev/null 2>&1 &\necho $! > {}\necho >> {}\n",
            quoted(&place.program.to_string_lossy()),
            words.join(" "),
            quoted(&show("pid")),
            quoted(&show("starts"))
        ),
    )?;
    std::fs::write(
        at("stop.sh"),
        format!(
            "pid=$(cat {})\n\
             # Whatever has the number now: only the service on this state is stopped.\n\
             ours() {{ tr '\\0' '\\n' <\"/proc/$pid/cmdline\" 2>/dev/null | grep -qxF -e {}; }}\n\
             ours || exit 0\nkill \"$pid\"\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do\n  \
             ours || exit 0\n  sleep 0.1\ndone\nkill -9 \"$pid\"\n",
            quoted(&show("pid")),
            quoted(&place.site.service_state().to_string_lossy())
        ),
    )?;
    let config = format!(
        "set daemon 2\nset log {}\nset pidfile {}\nset idfile {}\nset statefile {}\n\
         check process kv with pidfile {}\n  start program = \"/bin/sh {}\" with timeout 5 seconds\n  \
         stop program = \"/bin/sh {}\" with timeout 5 seconds\n  \
         if failed host 127.0.0.1 port {} protocol http request \"/healthz\" with timeout 2 seconds for 2 cycles then restart\n",
        place.logs.join("monit.log").display(),
        show("monit.pid"),
        show("monit.id"),
        show("monit.state"),
        show("pid"),
        show("start.sh"),
        show("stop.sh"),
        place.site.service.port()
    );
    std::fs::write(at("monitrc"), config)?;
    std::fs::set_permissions(at("monitrc"), std::fs::Permissions::from_mode(0o600))?;
    let child = Command::new("monit")
        .args(["-I", "-c"])
        .arg(at("monitrc"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(Rival::Monit {
        child: Box::new(child),
        pid_file: at("pid"),
        starts_file: at("starts"),
    })
}

impl Rival {
    fn pid(&self) -> Option<u32> {
        match self {
            Self::Threshold { pid, .. } => Some(pid.load(Ordering::Acquire)).filter(|pid| *pid != 0),
            Self::Monit { pid_file, .. } => std::fs::read_to_string(pid_file).ok()?.trim().parse().ok(),
        }
    }

    fn starts(&self) -> u64 {
        match self {
            Self::Threshold { starts, .. } => starts.load(Ordering::Relaxed),
            Self::Monit { starts_file, .. } => std::fs::metadata(starts_file).map_or(0, |found| found.len()),
        }
    }

    /// Ends the rival, and the service that it keeps.
    async fn end(self) {
        let pid = self.pid();
        match self {
            // The child is killed when the task's future is dropped.
            Self::Threshold { task, .. } => {
                task.abort();
                drop(task.await);
            }
            Self::Monit { mut child, .. } => {
                let group = child
                    .id()
                    .and_then(|id| i32::try_from(id).ok())
                    .and_then(Pid::from_raw);
                if let Some(group) = group {
                    kill_process_group(group, Signal::TERM).ok();
                }
                if tokio::time::timeout(STOP_GRACE, child.wait()).await.is_err() {
                    child.kill().await.ok();
                }
            }
        }
        tracing::debug!(
            pid,
            "the rival has ended; what is left of its service is ended by its state directory"
        );
    }
}

fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// As Monit's example for a web service has it.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(2);
const FAILURES: u32 = 2;
const STOP_GRACE: Duration = Duration::from_secs(2);
