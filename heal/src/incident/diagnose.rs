//! From confirmed symptoms to a fault class, by rules that a person can follow.

use std::collections::VecDeque;

use super::observe::Observed;
use crate::types::{Cause, FaultClass};

/// What the trouble is taken to be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Diagnosis {
    pub(super) class: FaultClass,
    /// Why this class, in words.
    pub(super) reason: String,
    /// How sure it is, 0 to 1: 1 for what the kernel says, judgements below, the share of the score for what the detector suspects.
    pub(super) certainty: f64,
}

/// The class of the present symptoms; `None` when nothing is confirmed. The order matters: what forbids a restart comes first,
/// then hard facts of the process, then what the detector suspects.
pub(super) fn diagnose(seen: &Observed) -> Option<Diagnosis> {
    let (class, certainty, reason) = if let Some(free) = seen.disk_full {
        (
            FaultClass::DiskFull,
            1.0,
            format!("{free} bytes are left on its file system, so a restart cannot help"),
        )
    } else if let Some(detail) = &seen.corrupt {
        (
            FaultClass::Corruption,
            CHECKED,
            format!("its state did not pass the check: {detail}"),
        )
    } else if let Some(status) = &seen.exit {
        (FaultClass::Crash, 1.0, format!("its process ended: {status}"))
    } else if seen.stopped {
        (
            FaultClass::Hang,
            1.0,
            "its process is stopped (state T)".to_owned(),
        )
    } else if let Some(down) = seen.dependency_down.as_ref().filter(|_| seen.unresponsive) {
        (
            FaultClass::DependencyDown,
            DEPENDENCY,
            format!("{down}, which it calls, is down: a restart of this one cannot help"),
        )
    } else if seen.unresponsive {
        let failed = seen.probes.iter().filter(|ok| !**ok).count();
        let reason = format!(
            "{failed} of the last {} probes failed while its process lives",
            seen.probes.len()
        );
        (FaultClass::Hang, PROBED, reason)
    } else if seen.anomalous {
        let causes = seen.anomaly.as_ref().map_or(&[][..], |anomaly| &anomaly.causes);
        suspect(causes, &seen.leaders)
    } else {
        return None;
    };
    Some(Diagnosis {
        class,
        reason,
        certainty,
    })
}

/// The class that an anomaly's leading causes point to. A family of the service's resources is to blame when one of its channels,
/// risen, leads now and led most of the `latest` rows. Host-wide channels are evidence but never blame a service; a channel that
/// fell below what was expected neither.
fn suspect(causes: &[Cause], latest: &VecDeque<Option<Family>>) -> (FaultClass, f64, String) {
    let own = |family: Family| {
        causes
            .iter()
            .filter(|c| family_of(c) == Some(family))
            .map(|c| c.contribution.max(0.0))
            .sum::<f32>()
    };
    let (memory, cpu) = (own(Family::Memory), own(Family::Cpu));
    let total: f32 = causes.iter().map(|cause| cause.contribution.max(0.0)).sum();
    let leader = causes.first().and_then(family_of);
    let led = latest.iter().filter(|family| **family == leader).count();
    let leads = leader.is_some() && 2 * led > latest.len();
    let (class, share, what) = if leader == Some(Family::Memory) {
        (FaultClass::MemoryLeak, memory, "memory")
    } else {
        (FaultClass::CpuContention, cpu, "processor use")
    };
    let names: Vec<&str> = causes.iter().map(|cause| cause.channel.as_str()).collect();
    if leads && total > 0.0 && share >= LEADING_SHARE * total {
        let percent = 100.0 * share / total;
        (
            class,
            f64::from((share / total).clamp(0.0, 1.0)),
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
            0.0,
            format!("the anomaly is led by {named}, which no action here would mend"),
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Memory,
    Cpu,
}

/// The family of the service's resources that a cause belongs to; `None` also when the channel is not known to have risen.
pub(super) fn family_of(cause: &Cause) -> Option<Family> {
    let name = cause.channel.to_ascii_lowercase();
    if name.starts_with("host") || cause.rising != Some(true) {
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

/// A state check that failed twice says so. A judgement: checks have faults of their own.
const CHECKED: f64 = 0.95;
/// Probes that fail while the process lives: a hang, or a way to it that is broken. A judgement.
const PROBED: f64 = 0.9;
/// A dependency is down and this service does not answer: nearly always because of it. A judgement.
const DEPENDENCY: f64 = 0.8;
/// Share of the leading causes that the leading family must explain. A judgement: a third of the score with at most five causes,
/// besides holding the first of them.
const LEADING_SHARE: f32 = 0.34;

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(channel: &str, contribution: f32, rising: Option<bool>) -> Cause {
        Cause {
            channel: channel.to_owned(),
            contribution,
            rising,
            evidence: None,
        }
    }

    fn class(causes: &[(&str, f32, Option<bool>)]) -> FaultClass {
        let causes: Vec<Cause> = causes
            .iter()
            .map(|(name, value, rising)| cause(name, *value, *rising))
            .collect();
        let latest = VecDeque::from([causes.first().and_then(family_of)]);
        suspect(&causes, &latest).0
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
        assert_eq!(class(&[("service_memory", 0.0, Some(true))]), FaultClass::Unknown);
    }

    #[test]
    fn a_family_that_holds_a_third_of_the_weight_but_not_the_lead_is_not_to_blame() {
        let causes = [
            ("service_probe_latency", 5.0, Some(true)),
            ("service_memory", 4.0, Some(true)),
        ];
        assert_eq!(class(&causes), FaultClass::Unknown);
        assert_eq!(class(&[("service_memory", 9.0, None)]), FaultClass::Unknown);
    }

    #[test]
    fn a_family_that_leads_one_row_of_many_is_not_to_blame() {
        let causes = [cause("service_cpu", 9.0, Some(true))];
        let one = VecDeque::from([None, None, Some(Family::Cpu)]);
        assert_eq!(suspect(&causes, &one).0, FaultClass::Unknown);
        let most = VecDeque::from([None, Some(Family::Cpu), Some(Family::Cpu)]);
        assert_eq!(suspect(&causes, &most).0, FaultClass::CpuContention);
    }
}
