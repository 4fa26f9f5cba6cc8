//! The second server: kept from the primary, loads the copy, answers, and is gone afterwards.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::process::Child;
use tokio::time::sleep;

use super::client::{Address, Client, Value, words};
use super::{ASK_MAX, Before, DUMP, RedisError, RedisSource, keys, number, program};
use crate::checkpoint::apart::{SocketDir, spawn_apart};
use crate::checkpoint::limits::Limits;
use crate::checkpoint::store::{CheckpointError, at};
use crate::checkpoint::verdict::{Check, Finding, ShadowRun};
use crate::checkpoint::work::{self, Log};
use crate::executor::process::clear_directory;
use crate::postgres::owner::Owner;
use crate::postgres::tool::{Tool, command};

/// All checks, cheapest first; the first bad finding ends them.
pub(super) async fn prove(source: &RedisSource, owner: Owner, before: Option<&Before>, run: &mut ShadowRun) {
    let begun = Instant::now();
    let (format, counted) = format(source, owner).await;
    let passed = format.finding == Finding::Pass;
    run.push(format, begun);
    if !passed {
        return;
    }
    let begun = Instant::now();
    let mut shadow = match Shadow::start(source, owner, before, run).await {
        Ok(shadow) => shadow,
        Err(error) => {
            run.push(Check::new("load", Finding::Unknown(error.to_string())), begun);
            return;
        }
    };
    let loaded = shadow.loaded().await;
    match loaded {
        Ok(mut client) => {
            run.push(Check::new("load", Finding::Pass), begun);
            ask(source, &mut shadow, &mut client, before, counted, run).await;
        }
        Err(finding) => run.push(Check::new("load", finding), begun),
    }
    shadow.end().await;
}

/// Keys in the snapshot, and how many of them may be over by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counted {
    keys: u64,
    expires: u64,
}

/// Redis's own check of the file, where it is there.
async fn format(source: &RedisSource, owner: Owner) -> (Check, Option<Counted>) {
    let left_out = |why: String| {
        let check = Check::new("format", Finding::Pass);
        (check.detail(format!("left out: {why}")), None)
    };
    let program = match program("redis-check-rdb") {
        Ok(program) => program,
        Err(error) => return left_out(error.to_string()),
    };
    let tool = Tool {
        program,
        arguments: vec![work::data(&source.work_dir).join(DUMP).into()],
        owner: Some(owner),
        background: Some(source.background.clone()),
        timeout: source.timeout,
    };
    match tool.run().await {
        Ok(ended) if ended.code == Some(0) => {
            let counted = counted(&ended.said);
            let words = counted.map_or_else(String::new, |counted| format!("{} keys", counted.keys));
            (Check::new("format", Finding::Pass).detail(words), counted)
        }
        // 1 is its verdict, unless it says what it cannot read; anything else, such as a killing, is none.
        Ok(ended) if ended.code == Some(1) => {
            // The reason is the line after the headline.
            let mut said = ended.said.lines();
            let told = said
                .find(|line| line.contains("--- RDB ERROR"))
                .and_then(|_headline| said.next());
            let why = told.or_else(|| ended.said.lines().last()).unwrap_or_default();
            let words = format!("redis-check-rdb: {why}");
            let finding = if host_lacks(&ended.said) {
                Finding::Unknown(words)
            } else {
                Finding::Invalid(words)
            };
            (Check::new("format", finding), None)
        }
        Ok(ended) => (Check::new("format", Finding::Unknown(ended.status)), None),
        Err(error) => (Check::new("format", Finding::Unknown(error.to_string())), None),
    }
}

fn counted(said: &str) -> Option<Counted> {
    let number = |what: &str| {
        said.lines()
            .find_map(|line| line.strip_suffix(what)?.rsplit(' ').next()?.parse().ok())
    };
    Some(Counted {
        keys: number(" keys read")?,
        expires: number(" expires")?,
    })
}

async fn ask(
    source: &RedisSource,
    shadow: &mut Shadow,
    client: &mut Client,
    before: Option<&Before>,
    counted: Option<Counted>,
    run: &mut ShadowRun,
) {
    let begun = Instant::now();
    let check = match client.text(&["INFO", "keyspace"]).await {
        Ok(info) => {
            let found = keys(&info);
            Check::new(
                "keys",
                judge_keys(found, before.map(|before| before.keys), counted),
            )
            .detail(format!("{found} keys"))
        }
        Err(error) => Check::new("keys", shadow.silent(&error).await),
    };
    let passed = check.finding == Finding::Pass;
    run.push(check, begun);
    if !passed {
        return;
    }
    let begun = Instant::now();
    let mut asked = 0;
    let finding = match invariants(source, client, &mut asked).await {
        Ok(finding) => finding,
        Err((place, error)) => match shadow.silent(&error).await {
            Finding::Invalid(why) => Finding::Invalid(format!("{place}: {why}")),
            Finding::Unknown(why) => Finding::Unknown(format!("{place}: {why}")),
            Finding::Pass => Finding::Pass,
        },
    };
    let check = Check::new("invariants", finding).detail(format!("{asked} commands"));
    run.push(check, begun);
}

/// Keys that were there must be there, but for those whose time is over.
fn judge_keys(found: u64, before: Option<u64>, counted: Option<Counted>) -> Finding {
    if let Some(Counted { keys, expires }) = counted
        && !(keys.saturating_sub(expires)..=keys).contains(&found)
    {
        return Finding::Invalid(format!("{found} keys were loaded of {keys} in the snapshot"));
    }
    match before {
        Some(before) if before > 0 && found == 0 && counted.is_none() => {
            Finding::Invalid(format!("no key was loaded, and the server had {before}"))
        }
        _ => Finding::Pass,
    }
}

/// The first command that is not answered by a whole number above 0 or by a text; an error, and at which command, when the shadow
/// does not answer at all.
async fn invariants(
    source: &RedisSource,
    client: &mut Client,
    asked: &mut usize,
) -> Result<Finding, (String, RedisError)> {
    for path in &source.invariants {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return Ok(Finding::Unknown(format!("{}: {error}", path.display()))),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        for (at, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let place = format!("{name}, line {}", at + 1);
            let Some(words) = words(line) else {
                return Ok(Finding::Unknown(format!(
                    "{place}: a quotation mark is not closed"
                )));
            };
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            *asked += 1;
            match client.ask(&words).await {
                Ok(Value::Integer(1..)) => {}
                Ok(Value::Text(text)) if !text.is_empty() => {}
                // A command that is mistyped says nothing of the copy.
                Ok(Value::Error(said))
                    if said.starts_with("ERR unknown command") || said.contains("wrong number") =>
                {
                    return Ok(Finding::Unknown(format!("{place}: {said}")));
                }
                Ok(other) => {
                    let words = format!("{place} does not hold: it is answered by {}", other.kind());
                    return Ok(Finding::Invalid(words));
                }
                Err(error) => return Err((place, error)),
            }
        }
    }
    Ok(Finding::Pass)
}

/// A running shadow. Dropped, it is killed.
struct Shadow {
    child: Child,
    data: PathBuf,
    log: Log,
    socket: SocketDir,
    limit: Duration,
    _group: Option<Limits>,
}

impl Shadow {
    async fn start(
        source: &RedisSource,
        owner: Owner,
        before: Option<&Before>,
        run: &mut ShadowRun,
    ) -> Result<Self, CheckpointError> {
        let used = before.map_or(0, |before| before.used_memory);
        let memory = source.memory_bytes.max(used.saturating_add(used / 2));
        refuse_little_memory(source, used)?;
        let data = work::data(&source.work_dir);
        let work = work::open(&source.work_dir).map_err(at(&source.work_dir))?;
        let socket = SocketDir::make(&work, owner, SOCKET_DIR_MAX)?;
        let (log, [out, err]) = Log::make(&work).map_err(at(&source.work_dir))?;
        let program = program("redis-server")?;
        let mut start = command(&program, Some(owner));
        // No file of the primary's settings is read. It saves nothing, follows nobody and listens on no address.
        start
            .arg("--dir")
            .arg(&data)
            .arg("--unixsocket")
            .arg(socket.path().join(SOCKET))
            .args([
                "--unixsocketperm",
                "700",
                "--port",
                "0",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .args([
                "--dbfilename",
                DUMP,
                "--daemonize",
                "no",
                "--sanitize-dump-payload",
                "yes",
            ])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        let primary = match &source.address {
            Address::Unix(path) => Some(path.clone()),
            Address::Tcp(_) => None,
        };
        let (spawned, isolation) = spawn_apart(start, primary).await;
        let child = spawned.map_err(at(&program))?;
        source.background.put(child.id());
        let group = Limits::put(child.id(), memory, source.cpu_cores, &source.background);
        run.isolation = isolation.words;
        run.limits = group
            .as_ref()
            .map_or_else(|| "its priority".to_owned(), Limits::words);
        Ok(Self {
            child,
            data,
            log,
            socket,
            limit: source.timeout,
            _group: group,
        })
    }

    /// Waits until every value is loaded.
    async fn loaded(&mut self) -> Result<Client, Finding> {
        let begun = Instant::now();
        let address = Address::Unix(self.socket.path().join(SOCKET));
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.did_not_load(status));
            }
            let asked = async {
                let mut client = Client::open(&address, None, ASK_MAX).await?;
                let info = client.text(&["INFO", "persistence"]).await?;
                Ok::<_, RedisError>((number(&info, "loading"), client))
            };
            let detail = match asked.await {
                Ok((Some(0), client)) => return Ok(client),
                Ok(_loading) => "it loads still".to_owned(),
                Err(error) => error.to_string(),
            };
            if begun.elapsed() >= self.limit {
                return Err(Finding::Unknown(format!(
                    "not up after {:?}: {detail}",
                    self.limit
                )));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn did_not_load(&self, status: ExitStatus) -> Finding {
        let log = self.log.text();
        // `#` marks warnings.
        let said: Vec<&str> = log.lines().filter(|line| line.contains(" # ")).collect();
        let start = said.len().saturating_sub(3);
        let words = format!("the server ended with {status}: {}", said[start..].join(" | "));
        // What this host lacks says nothing of the copy, and neither does who killed it or told it to end.
        if status.success() || status.signal() == Some(9) || host_lacks(&log) {
            Finding::Unknown(words)
        } else {
            Finding::Invalid(words)
        }
    }

    /// What it means that a question was not answered: slowness and a killing say nothing of the copy, a crash does.
    async fn silent(&mut self, error: &RedisError) -> Finding {
        // Its socket closes a moment before it is gone.
        match tokio::time::timeout(GONE_MAX, self.child.wait()).await {
            Ok(Ok(status)) => self.did_not_load(status),
            Ok(Err(_)) | Err(_) => Finding::Unknown(error.to_string()),
        }
    }

    async fn end(&mut self) {
        // It has nothing to write.
        if let Err(error) = self.child.kill().await {
            tracing::warn!(%error, "shadow not killed");
        }
        clear_directory(&self.data, None, END_MAX).await;
    }
}

/// Refuses where the second server would take memory that the host does not have.
fn refuse_little_memory(source: &RedisSource, used: u64) -> Result<(), CheckpointError> {
    use procfs::Current as _;
    let free = procfs::Meminfo::current()
        .ok()
        .and_then(|found| found.mem_available);
    match free {
        Some(free) if free < used.saturating_add(used / 4) => Err(CheckpointError::Unproven {
            path: source.dir.clone(),
            detail: format!("the server uses {used} bytes of memory, and {free} are free for a second one"),
        }),
        _ => Ok(()),
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(20);
const END_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the end of a server that does not answer.
const GONE_MAX: Duration = Duration::from_secs(1);
const SOCKET: &str = "r.sock";
/// A socket's name has at most 107 bytes.
const SOCKET_DIR_MAX: usize = 95;

/// Whether the server or its tool speaks of this host and not of the copy.
fn host_lacks(said: &str) -> bool {
    HOST_LACKS.iter().any(|lack| said.contains(lack))
}

/// Such words.
const HOST_LACKS: [&str; 7] = [
    "Can't handle RDB format version",
    // The shadow loads no modules.
    "module data I can't load",
    "Out Of Memory",
    "Cannot allocate memory",
    "No space left on device",
    "Failed opening Unix socket",
    "FATAL CONFIG FILE ERROR",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_lacks_is_told_from_what_is_wrong_with_the_copy() {
        for lacks in [
            "[offset 9] Can't handle RDB format version 999",
            "# The RDB file contains module data I can't load: no matching module 'ReJSON-RL'",
            "# The RDB file contains AUX module data I can't load: no matching module 'graphdata'",
        ] {
            assert!(host_lacks(lacks), "{lacks}");
        }
        assert!(!host_lacks(
            "[offset 0] Wrong signature trying to load DB from file"
        ));
    }

    #[test]
    fn keys_of_the_snapshot_are_there_but_for_those_that_are_over() {
        let said =
            "[offset 0] Checking RDB file\n[info] 12 keys read\n[info] 3 expires\n[info] 1 already expired";
        let counted = counted(said);
        assert_eq!(counted, Some(Counted { keys: 12, expires: 3 }));
        for (found, good) in [(12, true), (9, true), (8, false), (13, false)] {
            assert_eq!(
                judge_keys(found, Some(12), counted) == Finding::Pass,
                good,
                "{found}"
            );
        }
        assert_ne!(judge_keys(0, Some(5), None), Finding::Pass);
        assert_eq!(judge_keys(0, Some(0), None), Finding::Pass);
    }
}
