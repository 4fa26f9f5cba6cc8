//! One service's process group, through procfs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use procfs::process::{LimitValue, Process, Stat};

use super::rate;

/// Ticks between two scans of the whole process table for members that a walk along children cannot see.
const SCAN_TICKS: u32 = 10;
/// Most processes of one service that are read.
const MEMBERS_MAX: usize = 512;

/// What a service's processes are doing, all of its process group together.
#[derive(Clone, Copy)]
pub struct ServiceReading {
    /// CPU in use, in cores.
    pub cpu_cores: f64,
    /// Resident memory, in bytes.
    pub memory_bytes: f64,
    /// Number of threads.
    pub threads: f64,
    /// Number of open file descriptors; NaN when it may not be read.
    pub file_descriptors: f64,
    /// Share of its own limit of open files that the fullest process uses, 0 to 1; NaN when it may not be read or there is
    /// no limit.
    pub file_descriptor_share: f64,
    /// Bytes per second read from disk; NaN when it may not be read.
    pub disk_read: f64,
    /// Bytes per second written to disk; NaN when it may not be read.
    pub disk_write: f64,
}

impl std::fmt::Debug for ServiceReading {
    /// Prints no value: raw data stay on the host, logs included.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceReading").finish_non_exhaustive()
    }
}

/// Counters of one process at the last reading.
#[derive(Debug, Clone, Copy)]
struct Counters {
    cpu_ticks: u64,
    read_bytes: Option<u64>,
    written_bytes: Option<u64>,
    /// Its limit of open files, read once.
    open_files_max: Option<u64>,
}

/// Reads one service again and again. Processes are told apart by id *and* start time, since ids come back.
#[derive(Debug, Default)]
pub struct ServiceSampler {
    leader: Option<(i32, u64)>,
    counters: BTreeMap<(i32, u64), Counters>,
    scanned: BTreeSet<i32>,
    ticks: u32,
}

impl ServiceSampler {
    /// Reads the process `leader` and the rest of its group for the `elapsed` time since the last call. `None` when the
    /// leader is gone.
    pub fn read(&mut self, leader: Option<u32>, elapsed: Duration) -> Option<ServiceReading> {
        let reading = leader
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(|pid| self.read_group(pid, elapsed));
        if reading.is_none() {
            *self = Self::default();
        }
        reading
    }

    fn read_group(&mut self, leader: i32, elapsed: Duration) -> Option<ServiceReading> {
        let process = Process::new(leader).ok()?;
        let stat = process.stat().ok().filter(|stat| stat.state != 'Z')?;
        let identity = (leader, stat.starttime);
        let known = self.leader == Some(identity);
        if !known {
            *self = Self {
                leader: Some(identity),
                ..Self::default()
            };
        }
        if self.ticks.is_multiple_of(SCAN_TICKS) {
            self.scanned = group_members(stat.pgrp);
        }
        self.ticks = self.ticks.wrapping_add(1);
        let mut members = descendants(leader);
        members.extend(&self.scanned);
        members.remove(&leader);
        let mut sum = Sum::default();
        let mut counters = BTreeMap::new();
        counters.insert(identity, self.add(&mut sum, &process, &stat, identity));
        for pid in members.into_iter().take(MEMBERS_MAX) {
            let Ok(member) = Process::new(pid) else { continue };
            let Ok(stat) = member.stat() else { continue };
            let identity = (pid, stat.starttime);
            counters.insert(identity, self.add(&mut sum, &member, &stat, identity));
        }
        self.counters = counters;
        Some(sum.reading(known.then_some(elapsed)))
    }

    fn add(&self, sum: &mut Sum, process: &Process, stat: &Stat, identity: (i32, u64)) -> Counters {
        let io = process.io().ok();
        let before = self.counters.get(&identity);
        let now = Counters {
            open_files_max: before.map_or_else(|| open_files_max(process), |before| before.open_files_max),
            cpu_ticks: stat.utime + stat.stime,
            read_bytes: io.as_ref().map(|io| io.read_bytes),
            written_bytes: io.as_ref().map(|io| io.write_bytes),
        };
        // A process that was not there at the last reading did all of its work since.
        sum.cpu_ticks += now
            .cpu_ticks
            .saturating_sub(before.map_or(0, |before| before.cpu_ticks));
        sum.memory_bytes += stat.rss * procfs::page_size();
        sum.threads += u64::try_from(stat.num_threads).unwrap_or(0);
        let descriptors = process.fd_count().ok();
        sum.file_descriptors = match (sum.file_descriptors, descriptors) {
            (Some(sum), Some(count)) => Some(sum + count as u64),
            _ => None,
        };
        if let (Some(count), Some(most)) = (descriptors, now.open_files_max) {
            // `max` passes over the NaN of "none so far".
            sum.file_descriptor_share = sum.file_descriptor_share.max(count as f64 / most.max(1) as f64);
        }
        let grown = |now: Option<u64>, before: Option<Option<u64>>| {
            Some(now?.saturating_sub(before.flatten().unwrap_or(0)))
        };
        let add = |sum: Option<u64>, amount: Option<u64>| Some(sum? + amount?);
        sum.read_bytes = add(
            sum.read_bytes,
            grown(now.read_bytes, before.map(|before| before.read_bytes)),
        );
        sum.written_bytes = add(
            sum.written_bytes,
            grown(now.written_bytes, before.map(|before| before.written_bytes)),
        );
        now
    }
}

struct Sum {
    cpu_ticks: u64,
    memory_bytes: u64,
    threads: u64,
    file_descriptors: Option<u64>,
    file_descriptor_share: f64,
    read_bytes: Option<u64>,
    written_bytes: Option<u64>,
}

impl Default for Sum {
    fn default() -> Self {
        Self {
            cpu_ticks: 0,
            memory_bytes: 0,
            threads: 0,
            file_descriptors: Some(0),
            file_descriptor_share: f64::NAN,
            read_bytes: Some(0),
            written_bytes: Some(0),
        }
    }
}

impl Sum {
    /// `elapsed` is `None` at the first reading of a process: its counters then cover its whole life, not this tick.
    fn reading(&self, elapsed: Option<Duration>) -> ServiceReading {
        let per_second = |amount: Option<u64>| match (amount, elapsed) {
            (Some(amount), Some(elapsed)) => rate(amount, 0, elapsed),
            _ => f64::NAN,
        };
        ServiceReading {
            cpu_cores: per_second(Some(self.cpu_ticks)) / procfs::ticks_per_second() as f64,
            memory_bytes: self.memory_bytes as f64,
            threads: self.threads as f64,
            file_descriptors: self.file_descriptors.map_or(f64::NAN, |count| count as f64),
            file_descriptor_share: self.file_descriptor_share,
            disk_read: per_second(self.read_bytes),
            disk_write: per_second(self.written_bytes),
        }
    }
}

fn open_files_max(process: &Process) -> Option<u64> {
    match process.limits().ok()?.max_open_files.soft_limit {
        LimitValue::Value(most) => Some(most),
        LimitValue::Unlimited => None,
    }
}

/// A process and its descendants.
pub(crate) fn descendants_of(leader: u32) -> Vec<i32> {
    let Ok(leader) = i32::try_from(leader) else {
        return Vec::new();
    };
    std::iter::once(leader).chain(descendants(leader)).collect()
}

/// Children, their children and so on, by the kernel's own lists.
fn descendants(leader: i32) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    let mut open = vec![leader];
    while let Some(pid) = open.pop() {
        if found.len() >= MEMBERS_MAX {
            break;
        }
        // Every thread may have children; the main thread's list covers nearly all services.
        let Ok(list) = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) else {
            continue;
        };
        let children = list
            .split_ascii_whitespace()
            .filter_map(|child| child.parse::<i32>().ok());
        open.extend(children.filter(|child| found.insert(*child)));
    }
    found
}

/// Every process of the group, by a scan of the whole process table.
fn group_members(group: i32) -> BTreeSet<i32> {
    let Ok(all) = procfs::process::all_processes() else {
        return BTreeSet::new();
    };
    all.filter_map(Result::ok)
        .filter(|process| {
            process
                .stat()
                .is_ok_and(|stat| stat.pgrp == group && stat.state != 'Z')
        })
        .map(|process| process.pid)
        .take(MEMBERS_MAX)
        .collect()
}

/// Probes since the last row.
#[derive(Clone, Copy, Default)]
pub struct ProbeWindow {
    probes: u32,
    errors: u32,
    latency: Duration,
    last: Option<(f64, f64)>,
}

impl std::fmt::Debug for ProbeWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProbeWindow")
            .field("probes", &self.probes)
            .finish_non_exhaustive()
    }
}

impl ProbeWindow {
    /// Adds one probe. A failed one counts its waiting time too: a service that does not answer is slow.
    pub fn record(&mut self, ok: bool, latency: Duration) {
        self.probes += 1;
        self.errors += u32::from(!ok);
        self.latency += latency;
    }

    /// Ends this row's window and starts the next one; hands this row's window back. When no probe ended in it, the
    /// row repeats the last one's figures.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let window = *self;
        *self = Self {
            last: Some((window.latency_ms(), window.error_ratio())),
            ..Self::default()
        };
        window
    }

    /// Mean latency in milliseconds; NaN before the first probe.
    pub fn latency_ms(&self) -> f64 {
        if self.probes == 0 {
            return self.last.map_or(f64::NAN, |last| last.0);
        }
        self.latency.as_secs_f64() * 1_000.0 / f64::from(self.probes)
    }

    /// Share of probes that failed, 0 to 1; NaN before the first probe.
    pub fn error_ratio(&self) -> f64 {
        if self.probes == 0 {
            return self.last.map_or(f64::NAN, |last| last.1);
        }
        f64::from(self.errors) / f64::from(self.probes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn spawn(program: &str, arguments: &[&str]) -> Child {
        Command::new(program)
            .args(arguments)
            .process_group(0)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn end(mut child: Child) {
        let group = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        child.wait().unwrap();
    }

    /// Soft limit of open files of this process, which its children have too.
    fn rustix_limit() -> (f64, Option<u64>) {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        (limit.current.unwrap_or(u64::MAX) as f64, limit.maximum)
    }

    fn wait_until(mut done: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_mins(1);
        while !done() {
            assert!(std::time::Instant::now() < deadline, "not within a minute");
            std::thread::yield_now();
        }
    }

    #[test]
    fn children_count_with_their_parent() {
        let child = spawn("sh", &["-c", "sleep 60 & sleep 60 & wait"]);
        let mut sampler = ServiceSampler::default();
        wait_until(|| {
            sampler
                .read(Some(child.id()), Duration::from_secs(1))
                .is_some_and(|r| r.threads > 2.5)
        });
        let reading = sampler.read(Some(child.id()), Duration::from_secs(1)).unwrap();
        assert!(
            (reading.threads - 3.0).abs() < 0.1,
            "a shell and two sleeps, not {}",
            reading.threads
        );
        assert!(reading.memory_bytes > 100_000.0 && reading.file_descriptors >= 9.0);
        let (limit, _) = rustix_limit();
        let share = reading.file_descriptor_share;
        assert!(
            share > 0.0 && share * limit <= reading.file_descriptors,
            "the fullest, not the sum"
        );
        assert!(reading.cpu_cores >= 0.0 && reading.disk_read >= 0.0);
        end(child);
    }

    #[test]
    fn a_busy_child_uses_a_core() {
        let child = spawn("sh", &["-c", "while :; do :; done"]);
        let mut sampler = ServiceSampler::default();
        let start = std::time::Instant::now();
        assert!(
            sampler
                .read(Some(child.id()), Duration::ZERO)
                .unwrap()
                .cpu_cores
                .is_nan()
        );
        wait_until(|| start.elapsed() > Duration::from_secs(2));
        let told = start.elapsed();
        let cores = sampler.read(Some(child.id()), told).unwrap().cpu_cores;
        // One core at most, for as long as it took to look, and two ticks of the clock.
        let most = (start.elapsed().as_secs_f64() + 0.02) / told.as_secs_f64();
        assert!(cores > 0.02 && cores <= most, "{cores}, at most {most}");
        end(child);
    }

    #[test]
    fn a_dead_process_gives_no_reading() {
        let child = spawn("sleep", &["60"]);
        let pid = child.id();
        let mut sampler = ServiceSampler::default();
        assert!(sampler.read(Some(pid), Duration::ZERO).is_some());
        end(child);
        assert!(sampler.read(Some(pid), Duration::from_secs(1)).is_none());
        assert!(sampler.read(None, Duration::from_secs(1)).is_none());
    }

    #[test]
    fn probes_are_averaged_over_a_row_and_repeated_when_none_ended() {
        let mut window = ProbeWindow::default();
        assert!(window.latency_ms().is_nan());
        window.record(true, Duration::from_millis(10));
        window.record(false, Duration::from_millis(30));
        let row = window.take();
        assert!((row.latency_ms() - 20.0).abs() < 1e-9 && (row.error_ratio() - 0.5).abs() < 1e-9);
        let quiet = window.take();
        assert!((quiet.latency_ms() - 20.0).abs() < 1e-9 && (quiet.error_ratio() - 0.5).abs() < 1e-9);
    }
}
