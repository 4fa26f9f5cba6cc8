//! Bringing a fault, seeing whether it is still there, and taking it back.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};
use theriac_heal::postgres::session::{Session, Target};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::disk;
use super::fault::Trouble;
use super::keeper::Ending;
use super::loss::Loss;
use super::ward::{SLOTS, Ward, clear, names, room};
use crate::fleet::http::Client;

/// Leak of the HTTP service: it is refused more after about 19 s.
const LEAK: &str = "/fault/leak?mib_per_s=12";
/// A creeping disk begins with so many thousandths of it free, and loses so many every quarter of a second, until more than all is gone.
const CREEP_FROM: u64 = 60;
const CREEP_STEP: u64 = 1;
const CREEP_STEPS: u32 = 80;
/// One session after the other, a little more of them than there are slots.
const SESSION_EVERY: Duration = Duration::from_millis(333);
/// Clients of an overload, and what each asks for: so many milliseconds of a processor.
const CROWD: u64 = 150;
const COSTLY: &str = "/digest?ms=20";

/// A fault that was brought.
#[derive(Debug)]
pub(super) struct Injected {
    fault: Trouble,
    /// The process that it was done to.
    pid: Option<u32>,
    /// What goes on bringing it.
    task: Option<Ending>,
    /// It has all come.
    whole: Arc<AtomicBool>,
    sessions: Arc<Mutex<Vec<Session>>>,
    /// What drops packets.
    loss: Option<Loss>,
}

/// Brings a fault.
///
/// # Errors
/// In words, when it could not be brought; what had been done of it was taken back.
pub(super) async fn inject(fault: Trouble, ward: &Ward, client: &Client) -> Result<Injected, String> {
    let mut injected = Injected {
        fault,
        pid: match fault {
            Trouble::DependencyDown => ward.upstream_pid(),
            _ => ward.pid(),
        },
        task: None,
        whole: Arc::default(),
        sessions: Arc::default(),
        loss: None,
    };
    match bring(&mut injected, ward, client).await {
        Ok(()) => Ok(injected),
        Err(why) => {
            // It may have begun all the same: a file system half full, a leak whose acknowledgement came late.
            let undone = injected.undo(ward, client).await;
            Err(undone.map_or_else(|left| format!("{why}; and {left}"), |()| why.clone()))
        }
    }
}

async fn bring(injected: &mut Injected, ward: &Ward, client: &Client) -> Result<(), String> {
    let whole = Arc::clone(&injected.whole);
    let sessions = Arc::clone(&injected.sessions);
    match injected.fault {
        Trouble::Kill9 | Trouble::PgKill9 | Trouble::RedisKill9 => injected.signal(ward, Signal::KILL)?,
        Trouble::Hang | Trouble::PgHang | Trouble::RedisHang | Trouble::DependencyDown => {
            injected.signal(ward, Signal::STOP)?;
        }
        Trouble::SlowDisk => {
            let at = ward.disk.clone();
            blocking(move || disk::slow(&at, true)).await?;
        }
        Trouble::PacketLoss => {
            let (root, port) = (ward.root().to_owned(), ward.service.port());
            let brought = tokio::task::spawn_blocking(move || Loss::bring(&root, port)).await;
            let brought = brought.map_err(|error| error.to_string())?;
            injected.loss = Some(brought.map_err(|error| error.to_string())?);
        }
        Trouble::MemoryLeak => post(client, ward.control, LEAK).await?,
        Trouble::CpuHog => post(client, ward.control, "/fault/cpu?threads=4").await?,
        Trouble::DiskFull | Trouble::PgDiskFull => {
            let cache = ward.cache();
            blocking(move || fill(&cache, 0)).await?;
        }
        Trouble::DiskCreep => {
            let cache = ward.cache();
            let at = cache.clone();
            blocking(move || fill(&at, CREEP_FROM)).await?;
            injected.task = Some(Ending(tokio::spawn(creep(cache, whole))));
        }
        Trouble::Overload => injected.task = Some(Ending(tokio::spawn(crowd(ward.address())))),
        Trouble::ConnectionExhaustion => {
            let target = app(ward)?;
            for _ in 0..SLOTS {
                match hold(&target).await {
                    Some(session) => sessions.lock().await.push(session),
                    None => break,
                }
            }
        }
        Trouble::ConnectionCreep => {
            let target = app(ward)?;
            injected.task = Some(Ending(tokio::spawn(async move {
                for _ in 0..SLOTS + 6 {
                    let opened = hold(&target).await;
                    sessions.lock().await.extend(opened);
                    sleep(SESSION_EVERY).await;
                }
                whole.store(true, Ordering::Release);
            })));
        }
        Trouble::LockPileup => {
            let session = hold(&app(ward)?).await.ok_or("the server lets no session in")?;
            session
                .execute("the root", "begin; update hot set n = n + 1 where id = 1")
                .await
                .map_err(|error| error.to_string())?;
            sessions.lock().await.push(session);
        }
    }
    Ok(())
}

impl Injected {
    /// Whether what was broken is mended, apart from what requests show.
    pub(super) async fn is_gone(&self, ward: &Ward) -> bool {
        match self.fault {
            Trouble::MemoryLeak | Trouble::CpuHog => ward.pid().is_some_and(|now| Some(now) != self.pid),
            Trouble::DiskCreep => self.whole.load(Ordering::Acquire) && has_room(ward),
            Trouble::DiskFull | Trouble::PgDiskFull => has_room(ward),
            Trouble::ConnectionCreep => self.whole.load(Ordering::Acquire) && lets_in(ward).await,
            Trouble::ConnectionExhaustion => lets_in(ward).await,
            Trouble::LockPileup => {
                let sessions = self.sessions.lock().await;
                sessions.iter().all(|session| session.client().is_closed())
            }
            Trouble::Kill9
            | Trouble::Hang
            | Trouble::Overload
            | Trouble::DependencyDown
            | Trouble::PgKill9
            | Trouble::PgHang
            | Trouble::SlowDisk
            | Trouble::RedisKill9
            | Trouble::RedisHang
            | Trouble::PacketLoss => true,
        }
    }

    /// Takes it back, whatever has become of it.
    ///
    /// # Errors
    /// In words, when it is still in force; it can be tried again.
    pub(super) async fn undo(&mut self, ward: &Ward, client: &Client) -> Result<(), String> {
        drop(self.task.take());
        self.sessions.lock().await.clear();
        match self.fault {
            Trouble::Hang | Trouble::PgHang | Trouble::RedisHang | Trouble::DependencyDown => {
                // Nothing to take back where the process is gone.
                self.signal(ward, Signal::CONT).ok();
            }
            Trouble::MemoryLeak | Trouble::CpuHog => {
                post(client, ward.control, "/fault/none").await.ok();
            }
            Trouble::DiskFull | Trouble::DiskCreep | Trouble::PgDiskFull => {
                clear(&ward.cache());
                clear(&ward.quarantine());
            }
            Trouble::SlowDisk => {
                let at = ward.disk.clone();
                blocking(move || disk::slow(&at, false))
                    .await
                    .map_err(|error| format!("the disk stays slow: {error}"))?;
            }
            Trouble::PacketLoss => {
                if let Some(loss) = self.loss {
                    blocking(move || loss.undo())
                        .await
                        .map_err(|error| format!("packets are still dropped: {error}"))?;
                    self.loss = None;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Sends a signal after a look at whom it would hit.
    fn signal(&self, ward: &Ward, signal: Signal) -> Result<(), String> {
        let pid = self.pid.ok_or("its process is not there")?;
        let is_meant = match self.fault {
            Trouble::DependencyDown => names(pid, &ward.upstream_state()),
            _ => ward.is_its(pid),
        };
        let target = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let target = target
            .filter(|_| is_meant)
            .ok_or_else(|| format!("process {pid} is another's; nothing was done to it"))?;
        kill_process(target, signal).map_err(|error| format!("process {pid}: {error}"))
    }
}

fn app(ward: &Ward) -> Result<Target, String> {
    ward.app().ok_or_else(|| "there is no server".to_owned())
}

/// A session that may hold on for long.
async fn hold(target: &Target) -> Option<Session> {
    let open = Session::open(target, None, Duration::from_hours(1));
    timeout(Duration::from_secs(2), open).await.ok()?.ok()
}

async fn lets_in(ward: &Ward) -> bool {
    match ward.app() {
        Some(target) => hold(&target).await.is_some(),
        None => false,
    }
}

/// More than a fiftieth is free: what an edge calls full.
fn has_room(ward: &Ward) -> bool {
    room(&ward.disk).is_ok_and(|(free, all)| free > all / 50)
}

async fn post(client: &Client, at: SocketAddr, path: &str) -> Result<(), String> {
    client.post(at, path).await.map_err(|error| error.to_string())
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<(), String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

/// Files of a hundredth each until only so many thousandths are free; with 0 to the last block.
fn fill(cache: &Path, leaving: u64) -> io::Result<()> {
    let (_, all) = room(cache)?;
    let leave = all / 1_000 * leaving;
    for number in 0.. {
        let (free, _) = room(cache)?;
        let left = free.saturating_sub(leave);
        let bytes = left.min(all / 100);
        if bytes < 4_096 {
            break;
        }
        write_file(&cache.join(format!("fill-{number}")), bytes)?;
    }
    Ok(())
}

/// Bit by bit; at a full disk it goes on trying, as whatever fills one does.
async fn creep(cache: PathBuf, whole: Arc<AtomicBool>) {
    for number in 0..CREEP_STEPS {
        let at = cache.clone();
        let step = blocking(move || {
            let (free, all) = room(&at)?;
            let bytes = (all / 1_000 * CREEP_STEP).min(free);
            write_file(&at.join(format!("creep-{number}")), bytes)
        });
        if let Err(error) = step.await {
            tracing::debug!(%error, "the disk is full");
        }
        sleep(Duration::from_millis(250)).await;
    }
    whole.store(true, Ordering::Release);
}

fn write_file(path: &Path, bytes: u64) -> io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let block = [7_u8; 8_192];
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(block.len()).min(block.len());
        match file.write(&block[..now]) {
            Ok(written) => left -= written as u64,
            // Somebody else took the last of it.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Clients that each ask for something costly, think for a moment, and ask again, over connections that stay.
async fn crowd(service: SocketAddr) {
    let mut clients = JoinSet::new();
    for number in 0..CROWD {
        clients.spawn(async move {
            let client = Client::new(Duration::from_secs(5));
            let mut random = ChaCha8Rng::seed_from_u64(number);
            loop {
                sleep(Duration::from_millis(random.random_range(0..1_500))).await;
                // An overloaded service may well answer nothing.
                drop(client.get(service, COSTLY).await);
            }
        });
    }
    while clients.join_next().await.is_some() {}
}
