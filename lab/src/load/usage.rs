//! What a process has used, read from `/proc`.

use procfs::ProcResult;
use procfs::process::Process;

/// Memory and processor time of one process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Largest resident set so far (`VmHWM`), bytes.
    pub peak_rss_bytes: u64,
    /// Resident set now (`VmRSS`), bytes.
    pub rss_bytes: u64,
    /// User and system time so far, seconds.
    pub cpu_seconds: f64,
}

/// Reads what process `pid` has used.
///
/// # Errors
/// When there is no such process.
pub fn of(pid: rustix::process::Pid) -> ProcResult<Usage> {
    let process = Process::new(pid.as_raw_nonzero().get())?;
    let (status, stat) = (process.status()?, process.stat()?);
    let kibibytes = |value: Option<u64>| value.unwrap_or(0) * 1024;
    Ok(Usage {
        peak_rss_bytes: kibibytes(status.vmhwm),
        rss_bytes: kibibytes(status.vmrss),
        cpu_seconds: (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_memory_and_time_of_a_process() {
        let own = of(rustix::process::getpid()).unwrap();
        assert!(own.rss_bytes > 1 << 20 && own.peak_rss_bytes >= own.rss_bytes);
        assert!(own.cpu_seconds >= 0.0 && own.cpu_seconds < 3_600.0);
    }
}
