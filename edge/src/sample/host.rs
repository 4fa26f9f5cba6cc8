//! The host, through sysinfo.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sysinfo::{DiskRefreshKind, Disks, MemoryRefreshKind, Networks, System};

/// Ticks between two looks for disks and interfaces that came or went.
const RELIST_TICKS: u32 = 60;

/// What a host is doing.
#[derive(Clone, Copy)]
pub struct HostReading {
    /// Share of all cores in use, 0 to 1.
    pub cpu_used: f64,
    /// One-minute load average per core.
    pub load_per_core: f64,
    /// Share of memory in use, 0 to 1.
    pub memory_used: f64,
    /// Share of swap in use, 0 to 1; 0 without swap.
    pub swap_used: f64,
    /// Bytes per second read from all disks.
    pub disk_read: f64,
    /// Bytes per second written to all disks.
    pub disk_write: f64,
    /// Bytes per second received on the counted interfaces.
    pub network_receive: f64,
    /// Bytes per second sent on the counted interfaces.
    pub network_send: f64,
}

impl std::fmt::Debug for HostReading {
    /// Prints no value: raw data stay on the host, logs included.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostReading").finish_non_exhaustive()
    }
}

/// Reads the host again and again; keeps the counters of the last reading.
pub struct HostSampler {
    // `None` where the system does not tell: those features are missing.
    system: Option<System>,
    disks: Option<Disks>,
    networks: Option<Networks>,
    interfaces: Vec<String>,
    space: PathBuf,
    cores: f64,
    ticks: u32,
}

impl std::fmt::Debug for HostSampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostSampler")
            .field("cores", &self.cores)
            .finish_non_exhaustive()
    }
}

impl HostSampler {
    /// Starts reading. `space` is a path on the file system whose free space [`disk_used`](Self::disk_used) tells;
    /// `interfaces` are the network interfaces counted, empty for all but the loopback one.
    pub fn new(space: &Path, interfaces: Vec<String>) -> Self {
        let mut system = System::new().ok();
        if let Some(system) = &mut system {
            system.refresh_cpu_usage();
        }
        let cores = system.as_ref().map_or(1, |system| system.cpus().len().max(1)) as f64;
        Self {
            system,
            disks: Disks::new_with_refreshed_list_specifics(disk_refresh()).ok(),
            networks: Networks::new_with_refreshed_list().ok(),
            interfaces,
            space: space.to_owned(),
            cores,
            ticks: 0,
        }
    }

    /// Reads what happened in the `elapsed` time since the last call.
    pub fn read(&mut self, elapsed: Duration) -> HostReading {
        self.ticks += 1;
        let relist = self.ticks.is_multiple_of(RELIST_TICKS);
        let seconds = elapsed.as_secs_f64();
        let per_second = |amount: u64| {
            if seconds > 0.0 {
                amount as f64 / seconds
            } else {
                f64::NAN
            }
        };
        let (disk_read, disk_write) = self
            .disk_bytes(relist)
            .map_or((f64::NAN, f64::NAN), |(read, written)| {
                (per_second(read), per_second(written))
            });
        let (network_receive, network_send) = self
            .network_bytes(relist)
            .map_or((f64::NAN, f64::NAN), |(received, sent)| {
                (per_second(received), per_second(sent))
            });
        if let Some(system) = &mut self.system {
            system.refresh_cpu_usage();
            system.refresh_memory_specifics(MemoryRefreshKind::everything());
        }
        let system = |value: fn(&System) -> f64| self.system.as_ref().map_or(f64::NAN, value);
        HostReading {
            cpu_used: system(|system| f64::from(system.global_cpu_usage()) / 100.0),
            load_per_core: System::load_average().map_or(f64::NAN, |load| load.one / self.cores),
            memory_used: system(|system| ratio(system.used_memory(), system.total_memory())),
            swap_used: system(|system| ratio(system.used_swap(), system.total_swap())),
            disk_read,
            disk_write,
            network_receive,
            network_send,
        }
    }

    /// Share of the watched file system in use, 0 to 1; NaN when it cannot be read.
    pub fn disk_used(&self) -> f64 {
        rustix::fs::statvfs(&self.space).map_or(f64::NAN, |space| {
            ratio(space.f_blocks.saturating_sub(space.f_bavail), space.f_blocks)
        })
    }

    /// Bytes read and written since the last call; a device mounted twice counts once.
    fn disk_bytes(&mut self, relist: bool) -> Option<(u64, u64)> {
        let disks = self.disks.as_mut()?;
        disks.refresh_specifics(relist, disk_refresh());
        let mut seen = BTreeSet::new();
        let once = disks
            .iter()
            .filter(|disk| seen.insert(disk.name().to_owned()))
            .map(sysinfo::Disk::usage);
        Some(once.fold((0, 0), |(read, written), usage| {
            (read + usage.read_bytes, written + usage.written_bytes)
        }))
    }

    /// Bytes received and sent since the last call on the counted interfaces.
    fn network_bytes(&mut self, relist: bool) -> Option<(u64, u64)> {
        let networks = self.networks.as_mut()?;
        networks.refresh(relist);
        let wanted = &self.interfaces;
        let counted = |name: &std::ffi::OsStr| {
            if wanted.is_empty() {
                name != "lo"
            } else {
                wanted.iter().any(|wanted| name == wanted.as_str())
            }
        };
        let chosen = networks
            .iter()
            .filter(|(name, _)| counted(name))
            .map(|(_, data)| data);
        Some(chosen.fold((0, 0), |(received, sent), data| {
            (received + data.received(), sent + data.transmitted())
        }))
    }
}

fn disk_refresh() -> DiskRefreshKind {
    DiskRefreshKind::nothing().with_io_usage()
}

/// 0 where there is nothing to use: a host without swap has none in use.
fn ratio(used: u64, total: u64) -> f64 {
    if total == 0 {
        0.0
    } else {
        used as f64 / total as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_agree_with_the_kernels_own_files() {
        let mut sampler = HostSampler::new(Path::new("/"), Vec::new());
        let reading = sampler.read(Duration::from_secs(1));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let kib = |key: &str| -> f64 {
            let line = meminfo.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let used = 1.0 - kib("MemAvailable:") / kib("MemTotal:");
        assert!(
            (reading.memory_used - used).abs() < 0.05,
            "{} against {used}",
            reading.memory_used
        );
        assert!((0.0..=1.0).contains(&reading.cpu_used) && reading.load_per_core >= 0.0);
        assert!(reading.disk_read >= 0.0 && reading.network_receive >= 0.0);
        assert!((0.0..=1.0).contains(&sampler.disk_used()));
    }

    #[test]
    fn unknown_interface_counts_nothing() {
        let mut sampler = HostSampler::new(Path::new("/"), vec!["no-such-interface".to_owned()]);
        let reading = sampler.read(Duration::from_secs(1));
        assert_eq!((reading.network_receive, reading.network_send), (0.0, 0.0));
    }

    #[test]
    fn debug_prints_no_measurement() {
        let reading = HostSampler::new(Path::new("/"), Vec::new()).read(Duration::from_secs(1));
        assert_eq!(format!("{reading:?}"), "HostReading { .. }");
    }
}
