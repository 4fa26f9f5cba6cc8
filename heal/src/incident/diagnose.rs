//! From confirmed symptoms to a fault class, by rules that a person can follow.

use super::observe::Observed;
use crate::types::{Cause, FaultClass};

/// What the trouble is taken to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Diagnosis {
    pub(super) class: FaultClass,
    /// Why this class, in words.
    pub(super) reason: String,
}

/// The class of the present symptoms; `None` when nothing is confirmed. The order matters: what forbids a restart comes first,
/// then hard facts of the process, then what the detector suspects.
pub(super) fn diagnose(seen: &Observed) -> Option<Diagnosis> {
    let (class, reason) = if let Some(free) = seen.disk_full {
        (
            FaultClass::DiskFull,
            format!("{free} bytes are left on its file system, so a restart cannot help"),
        )
    } else if let Some(detail) = &seen.corrupt {
        (
            FaultClass::Corruption,
            format!("its state did not pass the check: {detail}"),
        )
    } else if let Some(status) = &seen.exit {
        (FaultClass::Crash, format!("its process ended: {status}"))
    } else if seen.stopped {
        (FaultClass::Hang, "its process is stopped (state T)".to_owned())
    } else if seen.unresponsive {
        let failed = seen.probes.iter().filter(|ok| !**ok).count();
        let reason = format!(
            "{failed} of the last {} probes failed while its process lives",
            seen.probes.len()
        );
        (FaultClass::Hang, reason)
    } else if seen.anomalous {
        suspect(seen.anomaly.as_ref().map_or(&[][..], |anomaly| &anomaly.causes))
    } else {
        return None;
    };
    Some(Diagnosis { class, reason })
}

/// The class that an anomaly's leading causes point to. Host-wide channels are evidence but never blame a service; a channel that
/// fell below what was expected neither.
fn suspect(causes: &[Cause]) -> (FaultClass, String) {
    let own = |family: Family| {
        causes
            .iter()
            .filter(|c| family_of(c) == Some(family))
            .map(|c| c.contribution.max(0.0))
            .sum::<f32>()
    };
    let (memory, cpu) = (own(Family::Memory), own(Family::Cpu));
    let total: f32 = causes.iter().map(|cause| cause.contribution.max(0.0)).sum();
    let (class, share, what) = if memory >= cpu {
        (FaultClass::MemoryLeak, memory, "memory")
    } else {
        (FaultClass::CpuContention, cpu, "processor use")
    };
    let names: Vec<&str> = causes.iter().map(|cause| cause.channel.as_str()).collect();
    if total > 0.0 && share >= LEADING_SHARE * total {
        let percent = 100.0 * share / total;
        (
            class,
            format!(
                "its {what} explains {percent:.0} % of the anomaly ({})",
                names.join(", ")
            ),
        )
    } else {
        let named = if names.is_empty() {
            "no channel".to_owned()
        } else {
            names.join(", ")
        };
        (
            FaultClass::Unknown,
            format!("the anomaly is led by {named}, which no action here would mend"),
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Memory,
    Cpu,
}

fn family_of(cause: &Cause) -> Option<Family> {
    let name = cause.channel.to_ascii_lowercase();
    if name.starts_with("host") || cause.rising == Some(false) {
        return None;
    }
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&["memory", "rss", "heap", "swap"]) {
        Some(Family::Memory)
    } else if has(&["cpu", "threads"]) {
        Some(Family::Cpu)
    } else {
        None
    }
}

/// Share of the leading causes that one family must explain. A judgement: a third of the score with at most five causes means
/// that the family leads, or shares the lead.
const LEADING_SHARE: f32 = 0.34;

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(channel: &str, contribution: f32, rising: Option<bool>) -> Cause {
        Cause {
            channel: channel.to_owned(),
            contribution,
            rising,
        }
    }

    fn class(causes: &[(&str, f32, Option<bool>)]) -> FaultClass {
        let causes: Vec<Cause> = causes
            .iter()
            .map(|(name, value, rising)| cause(name, *value, *rising))
            .collect();
        suspect(&causes).0
    }

    #[test]
    fn growing_memory_of_the_service_is_a_leak() {
        let causes = [
            ("service_memory", 8.0, Some(true)),
            ("host_memory_used", 4.0, Some(true)),
            ("service_cpu", 2.0, None),
        ];
        assert_eq!(class(&causes), FaultClass::MemoryLeak);
    }

    #[test]
    fn processor_use_of_the_service_is_contention() {
        let causes = [
            ("service_cpu", 8.0, Some(true)),
            ("host_cpu_used", 6.0, Some(true)),
            ("service_threads", 1.0, None),
        ];
        assert_eq!(class(&causes), FaultClass::CpuContention);
    }

    #[test]
    fn trouble_of_the_host_never_blames_a_service() {
        assert_eq!(
            class(&[
                ("host_cpu_used", 9.0, Some(true)),
                ("service_cpu", 1.0, Some(true))
            ]),
            FaultClass::Unknown
        );
        assert_eq!(class(&[("host_memory_used", 9.0, None)]), FaultClass::Unknown);
    }

    #[test]
    fn memory_that_fell_is_no_leak() {
        assert_eq!(
            class(&[("service_memory", 9.0, Some(false))]),
            FaultClass::Unknown
        );
    }

    #[test]
    fn an_anomaly_without_usable_causes_is_unknown() {
        assert_eq!(class(&[]), FaultClass::Unknown);
        assert_eq!(
            class(&[("service_probe_latency", 3.0, None)]),
            FaultClass::Unknown
        );
        assert_eq!(class(&[("service_memory", 0.0, None)]), FaultClass::Unknown);
    }
}
