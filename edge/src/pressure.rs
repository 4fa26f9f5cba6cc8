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
}

impl Clients {
    /// Nothing is usual yet.
    pub fn new(port: u16) -> Self {
        Self { port, usual: None }
    }

    /// How many times the usual number is connected; what is seen while the service is `well` becomes usual. `None` for fewer than
    /// eight, and before anything is usual.
    pub(crate) fn look(&mut self, sockets: &mut SocketTable, well: bool) -> Option<f64> {
        let found = connected(sockets.lines(well), self.port);
        self.note(f64::from(found), well)
    }

    fn note(&mut self, now: f64, well: bool) -> Option<f64> {
        if well {
            let usual = self.usual.get_or_insert(now);
            *usual += 0.1 * (now - *usual);
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
    /// Nanoseconds run and waited for a processor, by thread.
    before: BTreeMap<i32, (u64, u64)>,
    at: Option<Instant>,
    /// Threads in state `D` at the latest looks, oldest first.
    disk: VecDeque<f64>,
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

    /// Whether the last look is `LOOK_EVERY` ago: a share of less time says little, and a look at many threads costs.
    pub fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at.elapsed() >= LOOK_EVERY)
    }

    /// Looks at the process and its descendants, and tells of the time since the last look. Without one before there is nothing to tell of
    /// processors.
    pub fn look(&mut self, leader: u32, well: bool) -> PressureSeen {
        let now = Instant::now();
        let elapsed = self.at.replace(now).map(|before| now - before);
        let mut after = BTreeMap::new();
        let mut in_disk = 0_u32;
        let mut descriptors: Option<f64> = None;
        let mut processes = crate::sample::descendants_of(leader);
        processes.truncate(PROCESSES_MAX);
        for process in processes {
            let share = descriptors_used(&process);
            descriptors = match (descriptors, share) {
                (Some(most), Some(share)) => Some(most.max(share)),
                (known, share) => known.or(share),
            };
            let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else {
                continue;
            };
            for task in tasks.flatten().take(THREADS_MAX) {
                let read = |file: &str| std::fs::read_to_string(task.path().join(file)).ok();
                let thread = task.file_name().to_str().and_then(|name| name.parse().ok());
                let (Some(thread), Some(times)) = (thread, read("schedstat").and_then(|text| times(&text)))
                else {
                    continue;
                };
                after.insert(thread, times);
                in_disk += u32::from(read("stat").is_some_and(|stat| waits_for_disk(&stat)));
            }
        }
        if self.disk.len() == DISK_LOOKS {
            self.disk.pop_front();
        }
        self.disk.push_back(f64::from(in_disk));
        let seconds = elapsed.map(|elapsed| elapsed.as_secs_f64()).filter(|s| *s > 0.0);
        let grown = |pick: &dyn Fn(&(u64, u64)) -> u64| {
            let both = after
                .iter()
                .filter_map(|(thread, now)| Some((now, self.before.get(thread)?)));
            let nanoseconds: u64 = both
                .map(|(now, before)| pick(now).saturating_sub(pick(before)))
                .sum();
            Some(nanoseconds as f64 / 1e9 / seconds?)
        };
        let (clients, network) = (self.clients.as_mut(), self.network.as_mut());
        let (crowd, network) = match self.sockets.as_mut() {
            Some(sockets) => (
                clients.and_then(|clients| clients.look(sockets, well)),
                network.and_then(|network| network.look(sockets, well)),
            ),
            None => (None, None),
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let seen = PressureSeen {
            waits_for_cpu: grown(&|times| times.1),
            waits_for_disk: (self.disk.len() == DISK_LOOKS)
                .then(|| self.disk.iter().sum::<f64>() / DISK_LOOKS as f64),
            uses_cpu: grown(&|times| times.0).map(|cpu| (cpu / cores as f64).min(1.0)),
            crowd,
            host_io_full: Pressure::of_host().io_full,
            descriptors,
            network,
        };
        self.before = after;
        seen
    }
}

/// Share of its limit of open files that a process has open; `None` where it may not be looked at.
fn descriptors_used(process: &impl std::fmt::Display) -> Option<f64> {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).ok()?;
    let limit = soft_limit(&limits)?;
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?.count();
    Some(open as f64 / limit)
}

/// The soft limit of open files in `/proc/PID/limits`; `None` for `unlimited`.
fn soft_limit(limits: &str) -> Option<f64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    let limit: f64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    (limit > 0.0).then_some(limit)
}

/// `/proc/PID/task/TID/schedstat`: nanoseconds on a processor, nanoseconds ready and waiting for one.
fn times(text: &str) -> Option<(u64, u64)> {
    let mut fields = text.split_ascii_whitespace().map(str::parse);
    Some((fields.next()?.ok()?, fields.next()?.ok()?))
}

/// The state in `/proc/PID/task/TID/stat` follows the name, which may hold brackets and blanks itself.
fn waits_for_disk(stat: &str) -> bool {
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('D'))
}

/// Most processes of one service that are looked at, and most threads of each.
const PROCESSES_MAX: usize = 64;
const THREADS_MAX: usize = 128;
/// Looks over which threads that wait for the disk are counted.
const DISK_LOOKS: usize = 4;
/// Least time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
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
        for _ in 0..50 {
            clients.note(4.0, true);
        }
        assert_eq!(clients.note(7.0, false), None, "few are no crowd");
        let crowd = clients.note(40.0, false).unwrap();
        assert!((crowd - 10.0).abs() < 0.1, "{crowd}");
    }

    #[test]
    fn threads_that_compute_are_seen_and_those_that_wait_for_the_disk_told_apart() {
        let mut waits = Waits::default();
        let first = waits.look(std::process::id(), true);
        assert_eq!((first.uses_cpu, first.waits_for_cpu), (None, None));
        assert!(!waits.is_due(), "not twice within a second");
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
        let (uses, waited) = (second.uses_cpu.unwrap(), second.waits_for_cpu.unwrap());
        // Run or kept from it by others: either way it was ready all the time.
        assert!(uses + waited > 0.2, "{second:?} {sum}");
        assert!(waits_for_disk("7 (a) D) D 1 2") && !waits_for_disk("7 (a D) S 1 D"));
        assert_eq!(times("5 6 7\n"), Some((5, 6)));
        assert_eq!(times("5"), None);
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
