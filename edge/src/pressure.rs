//! What tasks wait for: the host's share of time by the kernel's pressure stall information, and one service's threads by their scheduling
//! statistics.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use theriac_heal::incident::PressureSeen;

use crate::network::Network;
use crate::sockets::SocketTable;

/// Shares of the last ten seconds, 0 to 1; `None` where the kernel does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// Some task waited for a processor.
    pub cpu_some: Option<f64>,
    /// Every task that could run waited for memory.
    pub memory_full: Option<f64>,
    /// Every task that could run waited for a disk.
    pub io_full: Option<f64>,
}

impl Pressure {
    /// Reads `cpu`, `memory` and `io` in a directory such as `/proc/pressure`.
    pub fn read(directory: &Path) -> Self {
        let of = |file: &str, word: &str| {
            let text = std::fs::read_to_string(directory.join(file)).ok()?;
            average(&text, word)
        };
        Self {
            cpu_some: of("cpu", "some"),
            memory_full: of("memory", "full"),
            io_full: of("io", "full"),
        }
    }

    /// The host's.
    pub fn of_host() -> Self {
        Self::read(Path::new("/proc/pressure"))
    }
}

/// `avg10` of the line that begins with `word`, as a share.
fn average(text: &str, word: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))?;
    let field = line.split(' ').find_map(|field| field.strip_prefix("avg10="))?;
    let percent: f64 = field.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

/// Clients of one TCP port of this host.
#[derive(Debug)]
pub struct Clients {
    port: u16,
    usual: Option<f64>,
    /// Looks that it was learnt from.
    learnt: u32,
}

impl Clients {
    /// Nothing is usual yet.
    pub fn new(port: u16) -> Self {
        Self {
            port,
            usual: None,
            learnt: 0,
        }
    }

    /// How many times the usual number is connected; what is seen while the service is `well` becomes usual, more than before over minutes only: a
    /// crowd is there before it stops the service from answering, and comes again. `None` for fewer than eight, and before anything is usual.
    pub(crate) fn look(&mut self, sockets: &mut SocketTable, well: bool) -> Option<f64> {
        let found = connected(sockets.lines(well), self.port);
        self.note(f64::from(found), well)
    }

    fn note(&mut self, now: f64, well: bool) -> Option<f64> {
        if well {
            let usual = self.usual.get_or_insert(now);
            // Its clients come back one after the other when it was just started, as what is usual and not as a crowd.
            let rate = if self.learnt < SETTLES {
                FIRST_RATE
            } else if now > *usual {
                MORE_RATE
            } else {
                FEWER_RATE
            };
            self.learnt = self.learnt.saturating_add(1);
            *usual += rate * (now - *usual);
        }
        self.usual
            .filter(|_| now >= CLIENTS_MIN)
            .map(|usual| now / usual.max(1.0))
    }
}

/// Connections to a local port in `/proc/net/tcp`: those taken (state 01) and those that wait to be (03, and the queue of the listener).
fn connected(table: &str, port: u16) -> u32 {
    let count = |line: &str| -> Option<u32> {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _, state, queues) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let (_, of) = local.rsplit_once(':')?;
        if u16::from_str_radix(of, 16).ok()? != port {
            return None;
        }
        match state {
            "01" | "03" => Some(1),
            "0A" => u32::from_str_radix(queues.split_once(':')?.1, 16).ok(),
            _ => None,
        }
    };
    table.lines().filter_map(count).sum()
}

/// One service's threads, looked at again and again.
#[derive(Debug, Default)]
pub struct Waits {
    /// Its clients, where it is probed over TCP.
    clients: Option<Clients>,
    /// The ways to it, likewise.
    network: Option<Network>,
    /// What the kernel says of that port.
    sockets: Option<SocketTable>,
    /// Nanoseconds waited for a processor, by thread.
    before: BTreeMap<i32, u64>,
    /// Clock ticks on a processor by process, with threads and children of theirs that have ended.
    spent: BTreeMap<i32, u64>,
    at: Option<Instant>,
    /// How long that took.
    cost: Duration,
    /// Threads in state `D` at the latest looks, oldest first: [`DISK_LOOKS`] of them, and all of the latest [`DISK_TOGETHER`].
    disk: VecDeque<(Instant, f64)>,
}

impl Waits {
    /// Of a service that is asked on this port, where it is asked on one.
    pub fn of(port: Option<u16>) -> Self {
        Self {
            clients: port.map(Clients::new),
            network: port.map(Network::new),
            sockets: port.map(SocketTable::of),
            ..Self::default()
        }
    }

    /// Whether the last look is long enough ago: a share of hardly any time says little, and a look at many threads costs. While it is not `well`
    /// what it was at before must not be taken for what it is at now.
    pub fn is_due(&self, well: bool) -> bool {
        let (every, longest) = if well {
            (LOOK_EVERY, LONGEST)
        } else {
            (LOOK_AMID_EVERY, LONGEST_AMID)
        };
        let least = every.max((self.cost * COST_TIMES).min(longest));
        self.at.is_none_or(|at| at.elapsed() >= least)
    }

    /// Looks at the process and its descendants, and tells of the time since the last look. Without one before there is nothing to tell of
    /// processors.
    pub fn look(&mut self, leader: u32, well: bool) -> PressureSeen {
        let now = Instant::now();
        let elapsed = self.at.replace(now).map(|before| now - before);
        let mut after = BTreeMap::new();
        let mut in_disk = 0_u32;
        let mut spent = BTreeMap::new();
        let mut descriptors: Option<f64> = None;
        let mut processes = crate::sample::descendants_of(leader);
        processes.truncate(PROCESSES_MAX);
        for process in processes {
            let share = descriptors_used(&process);
            descriptors = match (descriptors, share) {
                (Some(most), Some(share)) => Some(most.max(share)),
                (known, share) => known.or(share),
            };
            spent.extend(spent_by(process).map(|ticks| (process, ticks)));
            let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else {
                continue;
            };
            for task in tasks.flatten().take(THREADS_MAX) {
                let read = |file: &str| std::fs::read_to_string(task.path().join(file)).ok();
                let thread = task.file_name().to_str().and_then(|name| name.parse().ok());
                let (Some(thread), Some(waited)) = (thread, read("schedstat").and_then(|text| waited(&text)))
                else {
                    continue;
                };
                after.insert(thread, waited);
                in_disk += u32::from(read("stat").is_some_and(|stat| waits_for_disk(&stat)));
            }
        }
        let is_old = |look: &(Instant, f64)| now - look.0 > DISK_TOGETHER;
        while self.disk.len() >= DISK_LOOKS && self.disk.front().is_some_and(is_old) {
            self.disk.pop_front();
        }
        self.disk.push_back((now, f64::from(in_disk)));
        let seconds = elapsed.map(|elapsed| elapsed.as_secs_f64()).filter(|s| *s > 0.0);
        let waits_for_cpu = seconds.map(|seconds| {
            let since = |(thread, now): (&i32, &u64)| {
                let before = self.before.get(thread).copied().unwrap_or(0);
                // One that was not seen before began since, or was one too many then.
                (now.saturating_sub(before) as f64 / 1e9).min(seconds)
            };
            after.iter().map(since).sum::<f64>() / seconds
        });
        let (clients, network) = (self.clients.as_mut(), self.network.as_mut());
        let (crowd, network) = match self.sockets.as_mut() {
            Some(sockets) => (
                clients.and_then(|clients| clients.look(sockets, well)),
                network.and_then(|network| network.look(sockets, well)),
            ),
            None => (None, None),
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let runs = seconds.map(|seconds| {
            let second = rustix::param::clock_ticks_per_second() as f64;
            (self.ran(&spent, seconds * second) / second / seconds).clamp(0.0, cores as f64)
        });
        let seen = PressureSeen {
            waits_for_cpu,
            waits_for_disk: (self.disk.len() >= DISK_LOOKS)
                .then(|| self.disk.iter().map(|(_, threads)| threads).sum::<f64>() / self.disk.len() as f64),
            runs,
            uses_cpu: runs.map(|runs| (runs / cores as f64).min(1.0)),
            crowd,
            crowd_is_old: self
                .sockets
                .as_ref()
                .is_some_and(|sockets| sockets.read_at().is_some_and(|read| read < now)),
            host_io_full: Pressure::of_host().io_full,
            descriptors,
            network,
        };
        (self.before, self.spent) = (after, spent);
        self.cost = now.elapsed();
        seen
    }
}

impl Waits {
    /// Ticks that all processes ran since the look before, of at most `window` each: what was not seen then began since, or was one too many. Of
    /// those that have ended since their parents have what they ran in all, so what was seen of them is taken off.
    fn ran(&self, spent: &BTreeMap<i32, u64>, window: f64) -> f64 {
        let of_those = spent.iter().map(|(process, now)| match self.spent.get(process) {
            Some(before) => now.saturating_sub(*before) as f64,
            None => (*now as f64).min(window),
        });
        let ended = self
            .spent
            .iter()
            .filter(|(process, _)| !spent.contains_key(process) && spent_by(**process).is_none())
            .map(|(_, before)| *before as f64);
        of_those.sum::<f64>() - ended.sum::<f64>()
    }
}

/// See [`ticks`]; `None` when it is gone.
fn spent_by(process: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
    stat.ok().and_then(|stat| ticks(&stat))
}

/// Share of its limit of open files that a process has open; `None` where it may not be looked at.
fn descriptors_used(process: &impl std::fmt::Display) -> Option<f64> {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).ok()?;
    let limit = soft_limit(&limits)?;
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?.count();
    // The listing itself holds one more.
    Some((open as f64 / limit).min(1.0))
}

/// The soft limit of open files in `/proc/PID/limits`; `None` for `unlimited`.
fn soft_limit(limits: &str) -> Option<f64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    let limit: f64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    (limit > 0.0).then_some(limit)
}

/// `/proc/PID/task/TID/schedstat`: nanoseconds on a processor, then nanoseconds ready and waiting for one.
fn waited(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Clock ticks on a processor in `/proc/PID/stat`: of all threads, also those that have ended, and of children that were waited for. A server that
/// makes a thread or a process for each request shows its work nowhere else.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    // From the state on: user and system time are the 12th and 13th, those of the children follow.
    let fields = rest.split_ascii_whitespace().skip(11).take(4);
    let times: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
    (times.len() == 4).then(|| times.iter().sum())
}

/// The state in `/proc/PID/task/TID/stat` follows the name, which may hold brackets and blanks itself.
fn waits_for_disk(stat: &str) -> bool {
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('D'))
}

/// Most processes of one service that are looked at, and most threads of each.
const PROCESSES_MAX: usize = 64;
const THREADS_MAX: usize = 128;
/// Looks over which threads that wait for the disk are counted, and time over which they are, however often it is looked.
const DISK_LOOKS: usize = 4;
const DISK_TOGETHER: Duration = Duration::from_secs(3);
/// Least time between two looks, while it answers and while it does not.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_AMID_EVERY: Duration = Duration::from_millis(150);
/// So many times as long as a look took nothing is looked at after it, but no longer than this.
const COST_TIMES: u32 = 10;
const LONGEST: Duration = Duration::from_secs(30);
const LONGEST_AMID: Duration = Duration::from_secs(2);
/// Part of the way to what a look sees, every two seconds or so, that the usual number goes at first, and later up and down.
const FIRST_RATE: f64 = 0.3;
const MORE_RATE: f64 = 0.005;
const FEWER_RATE: f64 = 0.1;
/// Looks after which something is usual: twenty seconds. A crowd that comes before is taken for what is usual.
const SETTLES: u32 = 10;
/// Fewer clients are no crowd.
const CLIENTS_MIN: f64 = 8.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_many_times_what_is_usual_while_it_is_well() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000005 00:00\n   \
                     1: 0100007F:1F90 0100007F:A001 01 00000000:00000000\n   2: 0100007F:1F90 0100007F:A002 06 0:0\n   \
                     3: 0100007F:1F91 0100007F:A003 01 0:0\n   4: 0100007F:A001 0100007F:1F90 01 0:0\n";
        assert_eq!(connected(table, 8080), 6, "one taken and five in the queue");
        let mut clients = Clients::new(8080);
        assert_eq!(clients.note(40.0, false), None, "nothing is usual yet");
        for _ in 0..60 {
            clients.note(4.0, true);
        }
        assert_eq!(clients.note(7.0, false), None, "few are no crowd");
        let crowd = clients.note(40.0, false).unwrap();
        assert!((crowd - 10.0).abs() < 0.1, "{crowd}");
        // It comes three times, for ten seconds each, and the service answers now and then.
        for _ in 0..15 {
            clients.note(40.0, true);
        }
        let crowd = clients.note(40.0, false).unwrap();
        assert!(crowd > 4.0, "{crowd}");
        // After a start they come back within twenty seconds.
        let mut back = Clients::new(8080);
        back.note(0.0, true);
        for _ in 0..10 {
            back.note(60.0, true);
        }
        let crowd = back.note(60.0, false).unwrap();
        assert!(crowd < 1.5, "{crowd}");
        // One that comes half a minute after the start, and is answered at first.
        let mut young = Clients::new(8080);
        for _ in 0..15 {
            young.note(4.0, true);
        }
        for _ in 0..5 {
            young.note(40.0, true);
        }
        let crowd = young.note(40.0, false).unwrap();
        assert!(crowd > 4.0, "{crowd}");
        // What goes on for half an hour is usual.
        for _ in 0..900 {
            clients.note(40.0, true);
        }
        let usual = clients.note(40.0, false).unwrap();
        assert!(usual < 1.1, "{usual}");
    }

    #[test]
    fn threads_that_compute_are_seen_and_those_that_wait_for_the_disk_told_apart() {
        let mut waits = Waits::default();
        let first = waits.look(std::process::id(), true);
        assert_eq!((first.uses_cpu, first.waits_for_cpu), (None, None));
        assert!(!waits.is_due(true), "not twice within a second");
        assert!(
            first.descriptors.is_some_and(|share| share > 0.0 && share < 1.0),
            "{first:?}"
        );
        let begun = Instant::now();
        let mut sum = 0_u64;
        while begun.elapsed().as_millis() < 60 {
            sum = sum.wrapping_mul(31).wrapping_add(7);
        }
        let second = waits.look(std::process::id(), true);
        let (uses, kept) = (second.uses_cpu.unwrap(), second.waits_for_cpu.unwrap());
        // Run or kept from it by others: either way it was ready all the time.
        assert!(uses + kept > 0.2, "{second:?} {sum}");
        assert!(waits_for_disk("7 (a) D) D 1 2") && !waits_for_disk("7 (a D) S 1 D"));
        assert_eq!(waited("5 6 7\n"), Some(6));
        assert_eq!(waited("5"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 9 0 0 0 30 4 5 6 20 0 2 0";
        assert_eq!(ticks(stat), Some(30 + 4 + 5 + 6));
        assert_eq!(ticks("7 (a) S 1 7"), None);
    }

    #[test]
    fn the_work_of_threads_that_have_ended_is_seen() {
        let mut waits = Waits::default();
        waits.look(std::process::id(), true);
        let work = || {
            let (begun, mut sum) = (Instant::now(), 0_u64);
            while begun.elapsed().as_millis() < 10 {
                sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
            }
        };
        for _ in 0..10 {
            std::thread::spawn(work).join().unwrap();
        }
        let seen = waits.look(std::process::id(), true);
        // Beside the tests of others it may have been kept from running, not from having run at all.
        assert!(seen.runs.is_some_and(|runs| runs > 0.02), "{seen:?}");
    }

    #[test]
    fn it_is_looked_at_sooner_while_it_does_not_answer_and_seldom_where_a_look_takes_long() {
        let looked = |ago: u64, cost: u64| Waits {
            at: Instant::now().checked_sub(Duration::from_millis(ago)),
            cost: Duration::from_millis(cost),
            ..Waits::default()
        };
        assert!(Waits::default().is_due(true));
        assert!(looked(1_500, 1).is_due(true));
        let half = looked(500, 1);
        assert!(!half.is_due(true) && half.is_due(false));
        assert!(!looked(1_500, 1_000).is_due(false) && looked(2_500, 1_000).is_due(false));
        assert!(!looked(2_500, 1_000).is_due(true));
    }

    #[test]
    fn the_soft_limit_of_open_files_is_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             unlimited            unlimited            processes \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(limits), Some(1024.0));
        assert_eq!(
            soft_limit("Max open files            unlimited  unlimited  files\n"),
            None
        );
        assert_eq!(soft_limit(""), None);
    }

    #[test]
    fn the_right_line_and_field_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let io = "some avg10=41.50 avg60=0.43 avg300=0.41 total=16\nfull avg10=12.25 avg60=0.20 avg300=0.21 total=54\n";
        std::fs::write(dir.path().join("io"), io).unwrap();
        std::fs::write(dir.path().join("cpu"), "some avg10=nan total=1\n").unwrap();
        let read = Pressure::read(dir.path());
        assert_eq!(read.io_full, Some(0.1225));
        assert_eq!((read.cpu_some, read.memory_full), (None, None));
    }

    #[test]
    fn what_is_no_share_is_unknown() {
        for text in ["", "full", "full avg10=", "full avg10=101.0", "fuller avg10=1.0"] {
            assert_eq!(average(text, "full"), None, "{text}");
        }
    }
}
