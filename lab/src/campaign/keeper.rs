//! Who looks after a ward, and what each says of itself: an edge over its page, the threshold healer in its notes, Monit in its log.
//!
//! *Threshold* asks every 2 s with 2 s of patience; after two failures in a row it restarts (asked to stop, after 2 s killed, started).
//! *Monit* is the real program with the same numbers and its own eye on the process id. Its usual bound on restarts is left out, since
//! it would give up in the middle of a campaign that brings the same fault again and again.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use theriac_edge::probe;
use theriac_edge::status::{IncidentView, Status};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::Healer;
use super::fault::Lane;
use super::settings::{self, SERVICE};
use super::ward::{Ward, text};
use crate::demo::stage::unix_ms;
use crate::fleet::http::Client;
use crate::fleet::process::Processes;

/// As Monit's example for a web service has it.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(2);
const FAILURES: u32 = 2;
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What a healer did, as far as it says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Account {
    /// When it noticed, Unix milliseconds.
    pub(super) detected_ms: Option<u64>,
    /// When it first acted.
    pub(super) acted_ms: Option<u64>,
    /// What it did, in its own words, and when each began; nothing of who only writes a log.
    pub(super) actions: Vec<(u64, String)>,
    /// What it took the trouble to be.
    pub(super) class: Option<String>,
    /// Actions that it found to have done harm.
    pub(super) harm: u64,
    /// It has a page, and that did not answer: nothing is known of what it says.
    pub(super) unread: bool,
}

/// Checkpoints of a service since its edge started.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Checkpoints {
    /// Time spent on taking and proving them, failed ones too.
    pub(super) seconds: f64,
    /// Those that became valid.
    pub(super) valid: u64,
    /// Copies that were found to be bad.
    pub(super) invalid: u64,
}

/// A running healer; what it started ends with it.
#[derive(Debug)]
pub(super) enum Keeper {
    Edge {
        client: Client,
    },
    Threshold {
        _task: Ending,
        notes: Notes,
    },
    Monit {
        /// Killed when this is dropped.
        _child: Box<Child>,
        log: PathBuf,
        /// How far the log was read, and what was found in it.
        read: u64,
        notes: Vec<Note>,
    },
}

type Notes = Arc<Mutex<Vec<Note>>>;

/// One thing that a healer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Note {
    ms: u64,
    acted: bool,
}

impl Keeper {
    /// Starts a healer, which starts the ward.
    pub(super) fn start(healer: Healer, ward: &Ward, processes: &mut Processes) -> io::Result<Self> {
        match healer {
            Healer::Theriac
            | Healer::TheriacDirect
            | Healer::WithoutPrediction
            | Healer::WithoutDiagnosis => {
                let config = text(&settings::write(ward, healer)?);
                let name = format!("{}-{}", ward.dir_name(), "edge");
                processes
                    .start(&name, ["__edge", "run", "--config", &config])
                    .map_err(io::Error::other)?;
                Ok(Self::Edge {
                    client: Client::new(Duration::from_secs(2)),
                })
            }
            Healer::Threshold => Ok(threshold(ward.clone())),
            Healer::Monit => monit(ward),
        }
    }

    /// Reads what it has said since; to be called often, because Monit's log knows no fractions of a second.
    pub(super) fn look(&mut self) {
        let Self::Monit { log, read, notes, .. } = self else {
            return;
        };
        let mut text = String::new();
        let opened = std::fs::File::open(log).and_then(|mut file| {
            file.seek(SeekFrom::Start(*read))?;
            file.read_to_string(&mut text)
        });
        let Ok(more) = opened else { return };
        *read += more as u64;
        let ms = unix_ms();
        for line in text.lines() {
            let acted = ["trying to restart", "' start:", "' stop:", "' restart"]
                .iter()
                .any(|words| line.contains(words));
            let detected = line.contains("] error") || line.contains("is not running");
            if acted || detected {
                notes.push(Note { ms, acted });
            }
        }
    }

    /// What it noticed and did since a moment.
    pub(super) async fn account(&self, ward: &Ward, since_ms: u64) -> Account {
        let notes = match self {
            Self::Edge { client } => {
                return match incidents(client, ward).await {
                    Some(incidents) => of_incidents(&incidents, since_ms),
                    None => Account {
                        unread: true,
                        ..Account::default()
                    },
                };
            }
            Self::Threshold { notes, .. } => notes.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            Self::Monit { notes, .. } => notes.clone(),
        };
        of_notes(&notes, since_ms)
    }

    /// Whether it has nothing in hand; whoever says nothing has not.
    pub(super) async fn is_at_rest(&self, ward: &Ward) -> bool {
        let Self::Edge { client } = self else { return true };
        let status = client.json::<Status>(ward.page, "/status").await;
        let well = status.is_ok_and(|status| {
            status
                .services
                .iter()
                .any(|service| service.name == SERVICE && service.healthy)
        });
        well && incidents(client, ward).await.is_some_and(|incidents| {
            incidents
                .iter()
                .filter(|incident| incident.service == SERVICE)
                .all(|incident| matches!(incident.state.as_str(), "healed" | "recovered"))
        })
    }

    /// What it spent on checkpoints so far; nothing of who takes none, and where its page does not answer.
    pub(super) async fn checkpoints(&self, ward: &Ward) -> Option<Checkpoints> {
        let Self::Edge { client } = self else { return None };
        let status = client.json::<Status>(ward.page, "/status").await.ok()?;
        let service = status.services.iter().find(|service| service.name == SERVICE)?;
        Some(Checkpoints {
            seconds: service.checkpoint_seconds,
            valid: service.checkpoints_taken,
            invalid: service.checkpoints_refused,
        })
    }

    /// Whether it knows what is normal; whoever learns nothing does.
    pub(super) async fn has_learnt(&self, ward: &Ward) -> bool {
        let Self::Edge { client } = self else { return true };
        let status = client.json::<Status>(ward.page, "/status").await;
        status.is_ok_and(|status| {
            status
                .services
                .iter()
                .any(|service| service.name == SERVICE && service.score.is_some())
        })
    }
}

/// A task that ends when this is dropped: nothing starts a service anew while everything is taken back.
#[derive(Debug)]
pub(super) struct Ending(pub(super) JoinHandle<()>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Every incident that its page tells of; a busy machine is asked three times.
async fn incidents(client: &Client, ward: &Ward) -> Option<Vec<IncidentView>> {
    for _ in 0..3 {
        match client.json::<Vec<IncidentView>>(ward.page, "/incidents").await {
            Ok(incidents) => return Some(incidents),
            Err(error) => tracing::debug!(%error, "the page does not answer"),
        }
    }
    None
}

/// Detection is the first incident since then. One that was open already takes the fault in; then its action is the first sign. Every action
/// since then counts, whenever its incident began.
fn of_incidents(incidents: &[IncidentView], since_ms: u64) -> Account {
    let ours = incidents.iter().filter(|incident| incident.service == SERVICE);
    let mut account = Account::default();
    for incident in ours {
        let done: Vec<_> = incident
            .actions
            .iter()
            .filter(|action| action.acted_unix_ms >= since_ms)
            .collect();
        let acted = done.iter().map(|action| action.acted_unix_ms).min();
        let detected = Some(incident.detected_unix_ms)
            .filter(|detected| *detected >= since_ms)
            .or(acted);
        let Some(detected) = detected else { continue };
        if account.detected_ms.is_none_or(|first| detected < first) {
            account.detected_ms = Some(detected);
            account.class = Some(incident.class.clone());
        }
        for action in done {
            account
                .actions
                .push((action.acted_unix_ms, action.action.clone()));
            account.harm += u64::from(action.verdict.as_deref() == Some("harm"));
        }
    }
    account.actions.sort();
    account.acted_ms = account.actions.first().map(|(ms, _)| *ms);
    account
}

fn of_notes(notes: &[Note], since_ms: u64) -> Account {
    let since: Vec<&Note> = notes.iter().filter(|note| note.ms >= since_ms).collect();
    let acted: Vec<u64> = since
        .iter()
        .filter(|note| note.acted)
        .map(|note| note.ms)
        .collect();
    Account {
        detected_ms: since.first().map(|note| note.ms),
        acted_ms: acted.first().copied(),
        ..Account::default()
    }
}

fn threshold(ward: Ward) -> Keeper {
    let notes = Notes::default();
    let noted = Arc::clone(&notes);
    let note = move |acted| {
        let mut notes = noted.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push(Note { ms: unix_ms(), acted });
    };
    let task = tokio::spawn(async move {
        let probe = ward.probe();
        loop {
            let Ok(mut child) = own_child(&ward) else {
                sleep(LOOK_EVERY).await;
                continue;
            };
            let mut failed = 0;
            while failed < FAILURES {
                sleep(LOOK_EVERY).await;
                let good = matches!(probe::ask(&probe, PATIENCE).await, Ok((true, _)));
                failed = if good { 0 } else { failed + 1 };
            }
            note(false);
            note(true);
            stop(&mut child, ward.lane).await;
        }
    });
    Keeper::Threshold {
        _task: Ending(task),
        notes,
    }
}

fn own_child(ward: &Ward) -> io::Result<Child> {
    let argv = ward.argv(true);
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(ward.dir.join("service.log"))?;
    let mut command = Command::new(&argv[0]);
    command
        .args(&argv[1..])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // Left alone when this is dropped: whoever takes the campaign back ends a server in order.
    if let Some(server) = ward.postgres.as_ref().filter(|server| server.owner.is_other()) {
        command.uid(server.owner.uid).gid(server.owner.gid);
    }
    command.spawn()
}

/// Asked to stop (a server by its fast shutdown), after the grace killed; reaped.
async fn stop(child: &mut Child, lane: Lane) {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let polite = match lane {
            Lane::Http | Lane::Redis => Signal::TERM,
            Lane::Postgres => Signal::INT,
        };
        // An error means that it is gone.
        kill_process(pid, polite).ok();
    }
    if tokio::time::timeout(STOP_GRACE, child.wait()).await.is_err() {
        child.kill().await.ok();
    }
}

/// Monit in the foreground on a configuration of its own, as its manual has it: a pid file, a protocol test, two scripts.
fn monit(ward: &Ward) -> io::Result<Keeper> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = ward.dir.join("monit");
    std::fs::create_dir_all(&dir)?;
    let show = |name: &str| text(&dir.join(name));
    // Monit's own file has no way to write these.
    let odd = |byte: &u8| !byte.is_ascii_alphanumeric() && !b"/._-".contains(byte);
    if dir.as_os_str().as_encoded_bytes().iter().any(odd) {
        return Err(io::Error::other(format!(
            "{}: Monit needs a path of letters, digits, `.`, `_`, `-`",
            dir.display()
        )));
    }
    let (argv, state, pid_file) = (
        ward.argv_detached(),
        text(&ward.state()),
        ward.monit_pid_file(&dir),
    );
    std::fs::write(dir.join("start.sh"), start_script(ward, &argv, &pid_file))?;
    std::fs::write(dir.join("stop.sh"), stop_script(ward.lane, &state, &pid_file))?;
    let test = match ward.app() {
        None if ward.lane == Lane::Redis => {
            format!("host 127.0.0.1 port {} protocol redis", ward.service.port())
        }
        None => format!(
            "host 127.0.0.1 port {} protocol http request \"/healthz\"",
            ward.service.port()
        ),
        Some(target) => format!(
            "unixsocket {} protocol pgsql username \"{}\" database \"{}\"",
            target.socket().display(),
            target.user,
            target.database
        ),
    };
    let config = format!(
        "set daemon 2\nset log {}\nset pidfile {}\nset idfile {}\nset statefile {}\n\
         check process ward with pidfile {}\n  start program = \"/bin/sh {}\" with timeout 10 seconds\n  \
         stop program = \"/bin/sh {}\" with timeout 10 seconds\n  \
         if failed {test} with timeout 2 seconds for 2 cycles then restart\n",
        show("monit.log"),
        show("monit.pid"),
        show("monit.id"),
        show("monit.state"),
        pid_file.display(),
        show("start.sh"),
        show("stop.sh"),
    );
    let file = dir.join("monitrc");
    std::fs::write(&file, config)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
    let checked = std::process::Command::new("monit")
        .args(["-t", "-c"])
        .arg(&file)
        .output()?;
    if !checked.status.success() {
        return Err(io::Error::other(format!(
            "Monit does not take its configuration: {}",
            String::from_utf8_lossy(&checked.stderr).trim()
        )));
    }
    let child = Command::new("monit")
        .args(["-I", "-c"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(Keeper::Monit {
        _child: Box::new(child),
        log: dir.join("monit.log"),
        read: 0,
        notes: Vec::new(),
    })
}

fn start_script(ward: &Ward, argv: &[String], pid_file: &Path) -> String {
    let words: Vec<String> = argv.iter().map(|word| quoted(word)).collect();
    let log = quoted(&text(&ward.dir.join("service.log")));
    let own_pid = match ward.lane {
        // A server writes its own.
        Lane::Postgres | Lane::Redis => String::new(),
        Lane::Http => format!("echo $! > {}\n", quoted(&text(pid_file))),
    };
    format!(
        "cd /\nsetsid {} </dev/null >>{log} 2>&1 &\n{own_pid}",
        words.join(" ")
    )
}

fn stop_script(lane: Lane, state: &str, pid_file: &Path) -> String {
    let polite = if lane == Lane::Postgres { "INT" } else { "TERM" };
    format!(
        "pid=$(head -n 1 {})\n\
         # Whatever has the number now: only the service on this state is stopped.\n\
         ours() {{ tr '\\0' '\\n' <\"/proc/$pid/cmdline\" 2>/dev/null | grep -qxF -e {}; }}\n\
         ours || exit 0\nkill -{polite} \"$pid\"\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do\n  \
         ours || exit 0\n  sleep 0.1\ndone\nkill -9 \"$pid\"\n",
        quoted(&text(pid_file)),
        quoted(state)
    )
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Ward {
    fn dir_name(&self) -> String {
        self.dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// The service's words for whoever does not stay its parent.
    fn argv_detached(&self) -> Vec<String> {
        match self.lane {
            Lane::Http | Lane::Redis => self.argv(false),
            Lane::Postgres => self.argv_as_owner(),
        }
    }

    fn monit_pid_file(&self, dir: &Path) -> PathBuf {
        match self.lane {
            Lane::Http => dir.join("pid"),
            Lane::Postgres => self.state().join("postmaster.pid"),
            Lane::Redis => self.pid_file(),
        }
    }
}

#[cfg(test)]
mod tests {
    use theriac_edge::status::ActionView;

    use super::*;

    #[test]
    fn every_action_of_a_ladder_counts_also_where_its_incident_had_acted_before() {
        let action = |ms, name: &str, verdict: Option<&str>| ActionView {
            action: name.to_owned(),
            acted_unix_ms: ms,
            verdict: verdict.map(str::to_owned),
        };
        let incident = IncidentView {
            id: 1,
            service: SERVICE.to_owned(),
            class: "hang".to_owned(),
            state: "healed".to_owned(),
            score: None,
            causes: Vec::new(),
            opened_unix_ms: 500,
            detected_unix_ms: 500,
            acted_unix_ms: Some(600),
            healed_unix_ms: None,
            action: Some("restart".to_owned()),
            actions: vec![
                action(600, "end_idle_sessions", None),
                action(1_100, "end_idle_sessions", Some("harm")),
                action(1_200, "reload", Some("no_effect")),
                action(1_300, "restart", Some("healed")),
            ],
            verdict: Some("healed".to_owned()),
            handed_over: None,
            plan: None,
        };
        let other = IncidentView {
            service: "host".to_owned(),
            ..incident.clone()
        };
        let account = of_incidents(&[incident, other], 1_000);
        assert_eq!((account.actions.len(), account.harm), (3, 1));
        assert_eq!(
            (account.acted_ms, account.detected_ms),
            (Some(1_100), Some(1_100))
        );
    }
}
