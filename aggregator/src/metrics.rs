//! What is counted, with typed handles next to the code that counts. No global recorder.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// One label: how a thing ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// The word.
    pub outcome: &'static str,
}

/// Two labels of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Verdict {
    /// `accepted` or `refused`.
    pub verdict: &'static str,
    /// The refusal's word; empty when accepted.
    pub reason: &'static str,
}

/// One label: which way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Direction {
    /// `up` (from the edges) or `down`.
    pub direction: &'static str,
}

/// One label: which kind of slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// `action` or `checkpoint`.
    pub kind: &'static str,
}

/// One label: which socket buffer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Buffer {
    /// `send` or `receive`.
    pub buffer: &'static str,
}

/// Every metric of the aggregator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Rounds by outcome.
    pub rounds: Family<Outcome, Counter>,
    /// Time from a round's announcement to its end.
    pub round_seconds: Histogram,
    /// Time from the last update to the next model.
    pub aggregation_seconds: Histogram,
    /// Uploads by verdict and reason.
    pub uploads: Family<Verdict, Counter>,
    /// Other things refused, by reason.
    pub refusals: Family<Outcome, Counter>,
    /// Rounds declined, by reason.
    pub declines: Family<Outcome, Counter>,
    /// Enrolments by outcome.
    pub enrolments: Family<Outcome, Counter>,
    /// Two sessions of one identity from different addresses.
    pub identity_alarms: Counter,
    /// Sites that entered quarantine.
    pub quarantine_entered: Counter,
    /// Sites that left it.
    pub quarantine_left: Counter,
    /// Times that a site earned quarantine and stayed at weight 1, because as many as are assumed hostile were in it.
    pub quarantine_held: Counter,
    /// Sites in quarantine.
    pub quarantined: Gauge,
    /// Records of decisions that are kept.
    pub decision_records: Gauge<u64, AtomicU64>,
    /// Releases of moments that are kept because they count in later rounds, or may be needed to do a round again.
    pub kept_releases: Gauge<u64, AtomicU64>,
    /// Sessions closed because their edge took messages too slowly.
    pub slow_readers: Counter,
    /// Attempts to write that failed and were tried again.
    pub store_retries: Counter,
    /// Bytes by direction.
    pub bytes: Family<Direction, Counter>,
    /// Handshakes by outcome.
    pub handshakes: Family<Outcome, Counter>,
    /// Nodes connected.
    pub connected: Gauge,
    /// Granted socket buffers.
    pub socket_buffer: Family<Buffer, Gauge>,
    /// Version of the model in force.
    pub model_version: Gauge<u64, AtomicU64>,
    /// The round at hand.
    pub round: Gauge<u64, AtomicU64>,
    /// Transactions committed.
    pub commits: Counter,
    /// Leaves of the audit log.
    pub audit_leaves: Gauge<u64, AtomicU64>,
    /// 1 while the disk is full.
    pub storage_full: Gauge,
    /// Candidates that validators were asked about, by what came of it.
    pub validations: Family<Outcome, Counter>,
    /// Nodes that tell how they are.
    pub fleet_nodes: Gauge,
    /// Those of them with an unhealthy service.
    pub fleet_unhealthy: Gauge,
    /// Those that act on one.
    pub fleet_acting: Gauge,
    /// Slots that are lent now.
    pub slots_held: Family<Kind, Gauge>,
    /// Slots granted, refused and released.
    pub leases: Family<Outcome, Counter>,
    /// Time left on the aggregator's certificate.
    pub certificate_left: Gauge<f64, AtomicU64>,
    /// ε that the central noise has spent on every site; 0 while it is off.
    pub central_epsilon: Gauge<f64, AtomicU64>,
    /// Its limit; 0 while it is off.
    pub central_epsilon_limit: Gauge<f64, AtomicU64>,
    /// Resident memory.
    pub resident: Gauge<u64, AtomicU64>,
    /// CPU time used.
    pub cpu_seconds: Counter<f64, AtomicU64>,
}

impl Metrics {
    /// Every metric at zero, and the registry that prints them.
    pub fn new() -> (Self, Registry) {
        let mut registry = Registry::with_prefix("theriac_aggregator");
        let metrics = Self {
            rounds: Family::default(),
            round_seconds: Histogram::new(exponential_buckets(0.002, 2.0, 20)),
            aggregation_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            uploads: Family::default(),
            refusals: Family::default(),
            declines: Family::default(),
            enrolments: Family::default(),
            identity_alarms: Counter::default(),
            quarantine_entered: Counter::default(),
            quarantine_left: Counter::default(),
            quarantine_held: Counter::default(),
            quarantined: Gauge::default(),
            decision_records: Gauge::default(),
            kept_releases: Gauge::default(),
            slow_readers: Counter::default(),
            store_retries: Counter::default(),
            bytes: Family::default(),
            handshakes: Family::default(),
            connected: Gauge::default(),
            socket_buffer: Family::default(),
            model_version: Gauge::default(),
            round: Gauge::default(),
            commits: Counter::default(),
            audit_leaves: Gauge::default(),
            storage_full: Gauge::default(),
            validations: Family::default(),
            fleet_nodes: Gauge::default(),
            fleet_unhealthy: Gauge::default(),
            fleet_acting: Gauge::default(),
            slots_held: Family::default(),
            leases: Family::default(),
            certificate_left: Gauge::default(),
            central_epsilon: Gauge::default(),
            central_epsilon_limit: Gauge::default(),
            resident: Gauge::default(),
            cpu_seconds: Counter::default(),
        };
        let m = &metrics;
        registry.register("rounds", "Rounds by outcome", m.rounds.clone());
        let help = "Time from a round's announcement to its end";
        registry.register_with_unit("round_duration", help, Unit::Seconds, m.round_seconds.clone());
        let help = "Time to combine the updates of a round";
        registry.register_with_unit(
            "aggregation_duration",
            help,
            Unit::Seconds,
            m.aggregation_seconds.clone(),
        );
        registry.register("uploads", "Uploads by verdict and reason", m.uploads.clone());
        registry.register(
            "refusals",
            "Peers and messages refused by reason",
            m.refusals.clone(),
        );
        registry.register("declines", "Rounds declined by reason", m.declines.clone());
        let help = "Candidates that validators were asked about, by what came of it";
        registry.register("validations", help, m.validations.clone());
        registry.register("enrolments", "Enrolments by outcome", m.enrolments.clone());
        let help = "Sessions of one identity from two addresses at a time";
        registry.register("identity_alarms", help, m.identity_alarms.clone());
        registry.register(
            "quarantine_entered",
            "Sites that entered quarantine",
            m.quarantine_entered.clone(),
        );
        registry.register(
            "quarantine_left",
            "Sites that left quarantine",
            m.quarantine_left.clone(),
        );
        let help =
            "Sites that earned quarantine and still count, because as many as are assumed hostile are in it";
        registry.register("quarantine_held", help, m.quarantine_held.clone());
        registry.register("quarantined_sites", "Sites in quarantine", m.quarantined.clone());
        let help = "Records of decisions that are kept";
        registry.register("decision_records", help, m.decision_records.clone());
        let help = "Releases of moments that are kept because they count in later rounds";
        registry.register("kept_releases", help, m.kept_releases.clone());
        registry.register(
            "slow_readers",
            "Sessions closed because they read too slowly",
            m.slow_readers.clone(),
        );
        registry.register(
            "store_retries",
            "Writes that failed and were tried again",
            m.store_retries.clone(),
        );
        registry.register_with_unit("traffic", "Bytes by direction", Unit::Bytes, m.bytes.clone());
        registry.register("handshakes", "Handshakes by outcome", m.handshakes.clone());
        registry.register("connected_nodes", "Nodes connected", m.connected.clone());
        let help = "Socket buffers that the kernel granted";
        registry.register_with_unit("socket_buffer", help, Unit::Bytes, m.socket_buffer.clone());
        registry.register(
            "model_version",
            "Version of the model in force",
            m.model_version.clone(),
        );
        registry.register("round", "The round at hand", m.round.clone());
        registry.register("store_commits", "Transactions committed", m.commits.clone());
        registry.register("audit_leaves", "Leaves of the audit log", m.audit_leaves.clone());
        registry.register("storage_full", "1 while the disk is full", m.storage_full.clone());
        let help = "Nodes that tell how they are";
        registry.register("fleet_nodes", help, m.fleet_nodes.clone());
        let help = "Nodes with an unhealthy service";
        registry.register("fleet_unhealthy_nodes", help, m.fleet_unhealthy.clone());
        registry.register(
            "fleet_acting_nodes",
            "Nodes that act on a service",
            m.fleet_acting.clone(),
        );
        let help = "Slots of the fleet that are lent now";
        registry.register("fleet_slots_held", help, m.slots_held.clone());
        let help = "Requests for slots by outcome, and slots given back";
        registry.register("fleet_leases", help, m.leases.clone());
        let help = "Time left on the aggregator's certificate";
        registry.register_with_unit(
            "certificate_left",
            help,
            Unit::Seconds,
            m.certificate_left.clone(),
        );
        registry.register_with_unit(
            "resident_memory",
            "Resident memory",
            Unit::Bytes,
            m.resident.clone(),
        );
        let help = "Epsilon that the central noise has spent on every site; 0 while it is off";
        registry.register("central_epsilon_spent", help, m.central_epsilon.clone());
        let help = "Largest epsilon of the central noise; 0 while it is off";
        registry.register("central_epsilon_limit", help, m.central_epsilon_limit.clone());
        registry.register_with_unit("cpu", "CPU time used", Unit::Seconds, m.cpu_seconds.clone());
        (metrics, registry)
    }
}

/// The metrics as OpenMetrics text.
///
/// # Errors
/// Never in practice: writing to a string fails only when a metric cannot be formatted.
pub fn text(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    Ok(text)
}

/// What the kernel says of this process; zeros where there is no `/proc`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ProcessUse {
    /// Resident memory now.
    pub resident_bytes: u64,
    /// Most it ever was.
    pub peak_resident_bytes: u64,
    /// CPU time, user and system.
    pub cpu_seconds: f64,
}

impl ProcessUse {
    /// Reads `/proc/self`.
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|number| number.parse().ok());
            kib.unwrap_or(0_u64).saturating_mul(1_024)
        };
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // Fields 14 and 15, in clock ticks of 1/100 s (proc(5)); the name before them may hold spaces.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|n| n.parse::<u64>().ok())
            .sum();
        Self {
            resident_bytes: field("VmRSS:"),
            peak_resident_bytes: field("VmHWM:"),
            cpu_seconds: ticks as f64 / 100.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_open_metrics_with_one_prefix() {
        let (metrics, registry) = Metrics::new();
        metrics
            .uploads
            .get_or_create(&Verdict {
                verdict: "refused",
                reason: "non_finite",
            })
            .inc();
        let text = text(&registry).unwrap();
        assert!(
            text.contains("theriac_aggregator_uploads_total{verdict=\"refused\",reason=\"non_finite\"} 1"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"));
        assert!(
            text.lines()
                .filter(|l| !l.starts_with('#'))
                .all(|line| line.starts_with("theriac_aggregator_"))
        );
    }

    /// What only grows is a counter, named as one: `rate()` over a gauge misreads a restart.
    #[test]
    fn what_only_grows_is_a_counter() {
        let (metrics, registry) = Metrics::new();
        metrics
            .bytes
            .get_or_create(&Direction { direction: "up" })
            .inc_by(7);
        let outcome = "accepted";
        metrics.handshakes.get_or_create(&Outcome { outcome }).inc();
        metrics
            .cpu_seconds
            .inner()
            .store(1.5_f64.to_bits(), std::sync::atomic::Ordering::Relaxed);
        let text = text(&registry).unwrap();
        for line in [
            "# TYPE theriac_aggregator_traffic_bytes counter",
            "theriac_aggregator_traffic_bytes_total{direction=\"up\"} 7",
            "# TYPE theriac_aggregator_handshakes counter",
            "theriac_aggregator_handshakes_total{outcome=\"accepted\"} 1",
            "# TYPE theriac_aggregator_store_commits counter",
            "theriac_aggregator_store_commits_total 0",
            "# TYPE theriac_aggregator_cpu_seconds counter",
            "theriac_aggregator_cpu_seconds_total 1.5",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
    }

    #[test]
    fn this_process_uses_memory() {
        let used = ProcessUse::now();
        assert!(used.resident_bytes > 0 && used.peak_resident_bytes >= used.resident_bytes);
    }
}
