//! The host's clocks for [`Now`]: the only place in this crate that reads one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::types::Now;

/// Time since boot (time asleep counts) and the wall clock.
pub fn now() -> Now {
    let boot = clock_gettime(ClockId::Boottime);
    let monotonic = Duration::new(
        u64::try_from(boot.tv_sec).unwrap_or_default(),
        u32::try_from(boot.tv_nsec).unwrap_or_default().min(999_999_999),
    );
    // A wall clock before 1970 is recorded as 1970: it serves people only.
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now {
        monotonic,
        unix_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Identifies this boot, and with it the clock of [`now`]. Where the kernel does not tell, something new for each process.
pub fn clock_id() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) if !id.trim().is_empty() => id.trim().to_owned(),
        _ => format!("process-{}-{}", std::process::id(), now().unix_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_run_backwards_and_the_boot_stays_the_same() {
        let earlier = now();
        assert!(now().monotonic >= earlier.monotonic && earlier.unix_ms > 1_600_000_000_000);
        assert_eq!(clock_id(), clock_id());
    }
}
