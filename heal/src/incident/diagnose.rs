//! From confirmed symptoms to a fault class, by rules that a person can follow.

use std::collections::VecDeque;
use std::time::Duration;

use super::observe::Observed;
use super::sessions::Inside;
use super::{MemorySeen, NetworkSeen, PressureSeen};
use crate::types::{Cause, FaultClass, RootWaits};

/// What the trouble is taken to be.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Diagnosis {
    pub(super) class: FaultClass,
    /// Why this class, in words.
    pub(super) reason: String,
    /// How sure it is, 0 to 1: 1 for what the kernel says, judgements below, the share of the score for what the detector suspects.
    pub(super) certainty: f64,
    /// Whether its own process may be renewed for it. Not for what the detector alone suspects of a service that serves, see [`pressing`].
    pub(super) presses: bool,
}

/// The class of the present symptoms; `None` when nothing is confirmed, or when what is confirmed waits for word that may turn it.
pub(super) fn diagnose(seen: &Observed) -> Option<Diagnosis> {
    hypotheses(seen).into_iter().next()
}

/// Everything that the present symptoms speak for. The order matters, and the first is what is gone by: what forbids a restart comes
/// first, then hard facts of the process, then what the server says of its own sessions, then what probes and the detector suspect.
pub(super) fn hypotheses(seen: &Observed) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    let mut add = |class, certainty, reason| {
        found.push(Diagnosis {
            class,
            reason,
            certainty,
            presses: true,
        });
    };
    if let Some(free) = seen.disk_full {
        let reason = format!("{free} bytes are left on its file system, so a restart cannot help");
        add(FaultClass::DiskFull, 1.0, reason);
    }
    if seen.read_only {
        let reason =
            "the file system of its state cannot be written any more, so a restart cannot help".to_owned();
        add(FaultClass::ReadOnlyFs, 1.0, reason);
    }
    if let Some(detail) = &seen.corrupt {
        let reason = format!("its state did not pass the check: {detail}");
        add(FaultClass::Corruption, CHECKED, reason);
    }
    if let Some(status) = &seen.exit {
        let reason = if seen.occupied {
            status.clone()
        } else {
            format!("its process ended: {status}")
        };
        add(FaultClass::Crash, 1.0, reason);
    }
    if seen.stopped {
        let reason = "its process is stopped (state T)".to_owned();
        add(FaultClass::Hang, 1.0, reason);
    }
    // A process that ended or is stopped has no sessions to speak of, and one that is silent none that could be touched: what was seen of
    // them is from before.
    let silent = seen.unresponsive && seen.sessions.out_of_date();
    if seen.exit.is_none() && !seen.stopped && !silent {
        of_sessions(seen, &mut add);
    }
    if let Some(down) = seen.dependency_down.as_ref().filter(|_| seen.unresponsive) {
        let reason = format!("{down}, which it calls, is down: a restart of this one cannot help");
        add(FaultClass::DependencyDown, DEPENDENCY, reason);
    }
    match &seen.refusal {
        // It is there, and says itself what is wrong.
        Some(words) if seen.unresponsive => {
            let reason = format!("{}, but it answers, and refuses: {words}", failed(seen));
            add(FaultClass::Unknown, 0.0, reason);
        }
        _ if seen.unresponsive => of_silence(seen, &mut add),
        _ => {}
    }
    if seen.anomalous {
        let causes = seen.anomaly.as_ref().map_or(&[][..], |anomaly| &anomaly.causes);
        let (class, certainty, reason) = suspect(causes, &seen.leaders);
        match seen
            .sessions
            .more_connected()
            .filter(|_| class != FaultClass::Unknown)
        {
            Some(more) => add(
                FaultClass::Unknown,
                0.0,
                format!(
                    "{reason}, but {more} more sessions are connected than at the quietest, or were a moment ago, and bring it along"
                ),
            ),
            None => match pressing(seen, class, causes) {
                Ok(sign) => add(class, certainty, format!("{reason}{sign}")),
                Err(missing) => {
                    add(class, certainty, format!("{reason}, but {missing}"));
                    if let Some(last) = found.last_mut() {
                        last.presses = false;
                    }
                }
            },
        }
    }
    found
}

/// What makes a suspicion of the detector a reason to interrupt a service, in words to add, or what is missing. More memory or processor time
/// than usual is no trouble by itself: a cache that fills, a nightly job. It is when probes fail or get slow; when its memory is nearly used up,
/// or will be soon should it go on like this. Processor time alone presses on nobody: a service that it slows down shows that in its answers.
fn pressing(seen: &Observed, class: FaultClass, causes: &[Cause]) -> Result<String, String> {
    let memory = class == FaultClass::MemoryLeak;
    if !memory && class != FaultClass::CpuContention {
        return Ok(String::new());
    }
    if let Some(crowd) = seen.pressure.crowd.filter(|crowd| !memory && *crowd >= CROWD) {
        return Err(format!(
            "{crowd:.1} times the usual number of clients bring it along"
        ));
    }
    let unseen_since = |(since, _): (Duration, Duration)| {
        seen.pressure_at.is_some() && seen.counted_at.is_none_or(|at| at < since)
    };
    if !memory && seen.anomaly_span.is_some_and(unseen_since) {
        return Err("its clients have yet to be counted since it began".to_owned());
    }
    if !memory && seen.sessions.waits() {
        return Err(
            "its sessions wait behind another one, which is no fault of its processor time".to_owned(),
        );
    }
    if seen.probes.contains(&false) {
        return Ok("; and a probe failed of late".to_owned());
    }
    let slow = |cause: &&Cause| cause.rising == Some(true) && cause.channel.starts_with("service_probe");
    if causes.iter().any(|cause| slow(&cause)) {
        return Ok("; and its probes get slow".to_owned());
    }
    if memory {
        let MemorySeen { share, full_in } = seen.memory;
        if let Some(share) = share.filter(|share| *share >= NEARLY_FULL) {
            return Ok(format!(
                "; and {:.0} % of what it can have is used",
                100.0 * share
            ));
        }
        return full_in.map_or_else(
            || Err("it answers, and its memory is not about to be used up".to_owned()),
            |left| {
                let left = left.as_secs_f64();
                Ok(format!(
                    "; and it is used up in {left:.0} s if it goes on like this"
                ))
            },
        );
    }
    seen.latency.risen().map_or_else(
        || Err("it answers as fast as ever, so nobody who asks it notices".to_owned()),
        |(now, usual)| {
            Ok(format!(
                "; and it answers in {now:.1} ms instead of {usual:.1} ms"
            ))
        },
    )
}

fn of_sessions(seen: &Observed, add: &mut impl FnMut(FaultClass, f64, String)) {
    if let Some(shortage) = seen.sessions.exhausted() {
        let (certainty, reason) = match &shortage.refused {
            Some(words) => (1.0, format!("the server refuses clients: {words}")),
            None => (
                LOOKED,
                format!(
                    "{} of the slots for clients are free, fewer than {}",
                    shortage.free, shortage.free_min
                ),
            ),
        };
        add(FaultClass::ConnectionExhaustion, certainty, reason);
    }
    let Some(pile) = seen.sessions.piled() else {
        return;
    };
    let behind = format!(
        "{} sessions wait behind process {}, which {{}}, the longest for {} s",
        pile.behind, pile.pid, pile.waited_s
    );
    let (class, does) = match pile.waits {
        RootWaits::Commit => (FaultClass::DiskSlow, "waits for its commit to be on the disk"),
        RootWaits::Standby => (FaultClass::Unknown, "waits for a standby to have its commit too"),
        RootWaits::Nothing | RootWaits::Log if pile.running => (FaultClass::LockPileup, "runs a statement"),
        RootWaits::Nothing | RootWaits::Log => (FaultClass::LockPileup, "is idle in its transaction"),
    };
    let spared = if class != FaultClass::LockPileup || pile.touchable {
        ""
    } else {
        "; it may not be touched"
    };
    add(class, LOOKED, behind.replace("{}", does) + spared);
}

fn failed(seen: &Observed) -> String {
    let failed = seen.probes.iter().filter(|ok| !**ok).count();
    format!("{failed} of the last {} probes failed", seen.probes.len())
}

fn of_silence(seen: &Observed, add: &mut impl FnMut(FaultClass, f64, String)) {
    let failed = failed(seen);
    match seen.sessions.inside() {
        Inside::Nothing => {
            of_words(seen, &failed, add);
            // Where its threads are looked at, they have to be once more while it does not answer.
            if seen.pressure_at.is_some() && !seen.looked_amid {
                return;
            }
            of_pressure(seen, &failed, add);
            if !may_be_crowded(seen) {
                let reason = format!("{failed} while its process lives");
                add(FaultClass::Hang, PROBED, reason);
            }
        }
        // It is asked over the slot that it keeps back; a restart before its answer might throw out every client for nothing.
        Inside::Awaited => {}
        Inside::Answers => add(
            FaultClass::Unknown,
            0.0,
            format!("{failed}, but the server answers over the slot that it keeps back"),
        ),
    }
}

/// Its own words on why it does not answer.
fn of_words(seen: &Observed, failed: &str, add: &mut impl FnMut(FaultClass, f64, String)) {
    if let Some(hint) = seen
        .log_hint
        .as_ref()
        .filter(|hint| hint.class == FaultClass::DiskFull)
    {
        let reason = format!("{failed}, and its output says: {}", hint.template);
        add(FaultClass::DiskFull, HINTED, reason);
    }
}

/// Why a living process may not answer, other than that it hangs: in each of these it does what it can, and a restart takes that away.
fn of_pressure(seen: &Observed, failed: &str, add: &mut impl FnMut(FaultClass, f64, String)) {
    let pressure = seen.pressure;
    let (uses_cpu, waits_for_cpu) = (
        pressure.uses_cpu.unwrap_or(0.0),
        pressure.waits_for_cpu.unwrap_or(0.0),
    );
    if let (Some(threads), Some(host)) = (pressure.waits_for_disk, pressure.host_io_full)
        && threads >= THREADS_WAIT
        && host >= IO_FULL
    {
        let reason = format!(
            "{failed} while {threads:.1} of its threads wait for the disk and the whole host does for {:.0} % of the time",
            100.0 * host
        );
        add(FaultClass::DiskSlow, PRESSED, reason);
    }
    if let Some(network) = loses(&pressure) {
        let dropped = match network.dropped {
            0 => String::new(),
            dropped => format!(", interfaces dropped {dropped} packets"),
        };
        let reason = format!(
            "{failed} while it has read everything that came, {:.1} % of the host's TCP segments were sent again, and {} of its own \
             connections wait for word of theirs{dropped}",
            100.0 * network.resent,
            network.unheard
        );
        add(FaultClass::NetworkLoss, PRESSED, reason);
    }
    if waits_for_cpu >= THREADS_WAIT && uses_cpu < OWN_CPU {
        let reason = format!(
            "{failed} while {waits_for_cpu:.1} of its threads are ready to run and wait, and it has {:.0} % of the processors: others \
             have the rest",
            100.0 * uses_cpu
        );
        add(FaultClass::CpuStarvation, PRESSED, reason);
    }
    if let Some(crowd) = pressure.crowd
        && seen.answers_between
        && pressure.runs.is_some_and(|runs| runs >= BUSY)
        && crowd >= CROWD
    {
        let reason = format!(
            "{failed}, others between them were answered, it uses {:.0} % of the processors, and {crowd:.1} times the usual number of \
             clients is connected: it has more to do than it can",
            100.0 * uses_cpu
        );
        add(FaultClass::Overload, PRESSED, reason);
    }
    if let Some(share) = pressure.descriptors
        && share >= DESCRIPTORS
    {
        let percent = 100.0 * share;
        let reason = format!("{failed} while {percent:.0} % of the files that it may have open are open");
        add(FaultClass::FdExhaustion, PRESSED, reason);
    }
}

/// What the way to it loses, where that may be why its probes fail. Of a hung one too the clients' packets go unanswered once the kernel takes
/// no more for it: but then there is something that it has not read. And what gets lost on other ways is no reason why this one is silent.
pub(super) fn loses(pressure: &PressureSeen) -> Option<NetworkSeen> {
    pressure
        .network
        .filter(|network| network.resent >= RESENT && network.unheard > 0 && network.unread == 0)
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

/// A crowd is there, it works hard, and the next probe may still be answered: then it is an overload, and its clients would have been thrown
/// out for nothing. A loop of its own answers none however long one waits, here until two windows of probes have failed in a row, and for [`CROWD_WAIT`].
fn may_be_crowded(seen: &Observed) -> bool {
    let pressure = seen.pressure;
    pressure.crowd.is_some_and(|crowd| crowd >= CROWD)
        && pressure.runs.is_none_or(|runs| runs >= BUSY)
        && (seen.bad_run < seen.policy.probe_window.saturating_mul(2) || seen.silent_for() < CROWD_WAIT)
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
/// Two looks at the server's own views in a row. A judgement: what they show may pass by itself.
const LOOKED: f64 = 0.95;
/// The kernel's word on what its threads wait for, beside probes that fail. A judgement.
const PRESSED: f64 = 0.8;
/// Its own output says so. A judgement.
const HINTED: f64 = 0.7;
/// Threads that wait, in the mean, from which a service counts as kept from running: one, half of the time.
const THREADS_WAIT: f64 = 0.5;
/// Share of the host's processors from which a service's load is its own.
const OWN_CPU: f64 = 0.5;
/// Processors that a service keeps busy which works, and does not wait for something of its own: half of one, however many there are.
const BUSY: f64 = 0.5;
/// Time without an answer for which a crowd is a reason to wait. A judgement.
const CROWD_WAIT: Duration = Duration::from_secs(30);
/// So many times the usual clients make the difference between a load and a loop of its own.
const CROWD: f64 = 3.0;
/// Share of the host's TCP segments sent again from which packets get lost; a sound network has a thousandth at most. Not much more, since what one way
/// loses is little of all that a busy host sends. A judgement.
const RESENT: f64 = 0.002;
/// Share of a process's limit of open files from which it can take no more clients.
const DESCRIPTORS: f64 = 0.95;
/// Share of the memory that it can have from which a service that is taken for leaking is not waited for. A judgement.
const NEARLY_FULL: f64 = 0.9;
/// Share of time in which everything on the host waits for the disk.
const IO_FULL: f64 = 0.4;
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
