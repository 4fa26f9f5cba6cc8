//! Counters and gauges of this process, in OpenMetrics text. Typed handles, handed to the code that counts.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// One label of few values, such as a refusal's word.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// What kind.
    pub kind: String,
}

/// One supervised service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Service {
    /// Its name, as configured: at most 16 and the host.
    pub service: String,
}

/// One supervised service, or the host, and how far ahead is looked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServiceHorizon {
    /// Its name.
    pub service: String,
    /// Such as `5m`: as configured, at most 8.
    pub horizon: String,
}

/// One proxied service and what became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServiceOutcome {
    /// Its name.
    pub service: String,
    /// One of five words.
    pub outcome: String,
}

/// A gauge of real numbers.
pub type Real = Gauge<f64, AtomicU64>;

/// Every metric of the edge. Names begin with `theriac_edge_`.
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "each field is described where it is registered, in the text that operators see"
)]
pub struct Metrics {
    registry: Registry,
    pub samples: Counter,
    pub samples_late: Counter,
    pub values_missing: Counter,
    pub sample_seconds: Counter<f64, AtomicU64>,
    pub fits: Family<Kind, Counter>,
    pub score: Family<Service, Real>,
    pub threshold: Family<Service, Real>,
    pub alarms: Family<Service, Counter>,
    pub failure_risk: Family<ServiceHorizon, Real>,
    pub probes: Family<Service, Counter>,
    pub probe_failures: Family<Service, Counter>,
    pub service_up: Family<Service, Gauge>,
    pub service_restarts: Family<Service, Counter>,
    pub incidents: Family<Kind, Counter>,
    pub actions: Family<Kind, Counter>,
    pub verdicts: Family<Kind, Counter>,
    pub proxy_requests: Family<ServiceOutcome, Counter>,
    pub proxy_retries: Family<Service, Counter>,
    pub proxy_held: Family<Service, Counter>,
    pub proxy_in_hand: Family<Service, Gauge>,
    pub proxy_circuit: Family<Service, Gauge>,
    pub checkpoints: Family<Kind, Counter>,
    pub checkpoints_valid: Family<Service, Gauge>,
    pub checkpoint_seconds: Family<Service, Counter<f64, AtomicU64>>,
    pub offsite: Family<Kind, Counter>,
    pub offsite_copies: Family<Service, Gauge>,
    pub connected: Gauge,
    pub connect_attempts: Counter,
    pub bytes_sent: Counter,
    pub bytes_received: Counter,
    pub socket_buffer_bytes: Family<Kind, Gauge>,
    pub updates: Family<Kind, Counter>,
    pub declines: Family<Kind, Counter>,
    pub rounds: Family<Kind, Counter>,
    pub gate_verdicts: Family<Kind, Counter>,
    /// What a validator told of candidates, by word.
    pub appraisals: Family<Kind, Counter>,
    pub model_version: Gauge,
    pub epsilon_spent: Real,
    /// ε of the most charged unit over all time.
    pub epsilon_ever: Real,
    pub epsilon_limit: Real,
    pub ledger_refusals: Family<Kind, Counter>,
    pub certificate_expiry_seconds: Real,
    pub storage_ok: Gauge,
    pub storage_failures: Counter,
    pub disk_free_bytes: Gauge,
    pub task_restarts: Family<Kind, Gauge>,
    cpu_seconds: Real,
    memory_bytes: Gauge,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("theriac_edge");
        let mut r = Registrar(&mut registry);
        let metrics = Self {
            samples: r.add("samples", "Rows measured"),
            samples_late: r.add(
                "samples_late",
                "Ticks that were missed because the one before took too long",
            ),
            values_missing: r.add(
                "values_missing",
                "Values that could not be read (NaN in their row)",
            ),
            sample_seconds: r.unit("sample", "Time spent measuring and scoring", Unit::Seconds),
            fits: r.add("fits", "Detector fits by result"),
            score: r.add("score", "Latest anomaly score"),
            threshold: r.add("threshold", "Alarm threshold of the score"),
            alarms: r.add("alarms", "Alarms raised"),
            failure_risk: r.unit(
                "failure_risk",
                "Chance that a resource runs out within the horizon; no series while the model abstains",
                Unit::Other("ratio".to_owned()),
            ),
            probes: r.add("probes", "Probes that ended"),
            probe_failures: r.add("probe_failures", "Probes that failed"),
            service_up: r.add(
                "service_up",
                "1 while the service runs and its latest probe was answered well",
            ),
            service_restarts: r.add("service_restarts", "Starts of the service beyond its first"),
            incidents: r.add("incidents", "Incidents opened, by class"),
            actions: r.add("heal_actions", "Recovery actions carried out, by action"),
            verdicts: r.add(
                "heal_verdicts",
                "Verified outcomes of actions; harm is the one to alert on",
            ),
            proxy_requests: r.add(
                "proxy_requests",
                "Requests (or connections) by outcome: answered, failed, drained, circuit_open, crowded",
            ),
            proxy_retries: r.add("proxy_retries", "Requests that the proxy asked a second time"),
            proxy_held: r.add("proxy_held", "Requests that waited while the service restarted"),
            proxy_in_hand: r.add("proxy_in_hand", "Requests (or connections) in hand"),
            proxy_circuit: r.add(
                "proxy_circuit",
                "0 while the service is asked, 1 while one request finds out, 2 while it is not",
            ),
            checkpoints: r.add("checkpoints", "Checkpoints attempted, by result"),
            checkpoints_valid: r.add("checkpoints_valid", "Complete checkpoints at hand"),
            checkpoint_seconds: r.unit(
                "checkpoint",
                "Time spent taking and proving checkpoints, failed attempts too",
                Unit::Seconds,
            ),
            offsite: r.add("offsite", "Off-site copies attempted, by result"),
            offsite_copies: r.add("offsite_copies", "Complete off-site copies at the last contact"),
            connected: r.add("connected", "1 while an aggregator has welcomed this edge"),
            connect_attempts: r.add("connect_attempts", "Attempts to connect"),
            bytes_sent: r.unit("sent", "Bytes sent to the aggregator", Unit::Bytes),
            bytes_received: r.unit("received", "Bytes received from the aggregator", Unit::Bytes),
            socket_buffer_bytes: r.unit(
                "socket_buffer",
                "Socket buffer that the system granted",
                Unit::Bytes,
            ),
            updates: r.add("updates", "Updates by fate: accepted, or the refusal's word"),
            declines: r.add("declines", "Rounds this edge took no part in, by reason"),
            rounds: r.add("rounds", "Rounds that closed while connected, by outcome"),
            gate_verdicts: r.add("gate_verdicts", "What the gate made of published models"),
            appraisals: r.add("appraisals", "What this validator told of candidates"),
            model_version: r.add("model_version", "Published model in use as prior, 0 for none"),
            epsilon_spent: r.add(
                "epsilon_spent",
                "Largest privacy loss of any unit in the current period of the policy",
            ),
            epsilon_ever: r.add("epsilon_ever", "Largest privacy loss of any unit over all time"),
            epsilon_limit: r.add("epsilon_limit", "Limit of the privacy policy"),
            ledger_refusals: r.add(
                "ledger_refusals",
                "Releases that policy, ledger or disk refused, by word",
            ),
            certificate_expiry_seconds: r.unit(
                "certificate_left",
                "Time until the certificate ends",
                Unit::Seconds,
            ),
            storage_ok: r.add(
                "storage_ok",
                "1 while the state directory can be written and has room",
            ),
            storage_failures: r.add("storage_failures", "Writes to the state directory that failed"),
            disk_free_bytes: r.unit("disk_free", "Room left where the state is kept", Unit::Bytes),
            task_restarts: r.add(
                "task_restarts",
                "How often a task of this process was started again",
            ),
            cpu_seconds: r.unit("cpu", "Processor time of this process", Unit::Seconds),
            memory_bytes: r.unit("resident_memory", "Resident memory of this process", Unit::Bytes),
            registry,
        };
        metrics.storage_ok.set(1);
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        let mut metrics = metrics;
        metrics.registry.register("build", "This build", build);
        metrics
    }

    /// Everything as OpenMetrics text.
    ///
    /// # Errors
    /// Only when formatting fails.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        self.measure_process();
        let mut text = String::with_capacity(8 * 1024);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn measure_process(&self) {
        let Ok(stat) = procfs::process::Process::myself().and_then(|process| process.stat()) else {
            return;
        };
        self.cpu_seconds
            .set((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64);
        self.memory_bytes
            .set(i64::try_from(stat.rss * procfs::page_size()).unwrap_or(i64::MAX));
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The label set of one word.
pub fn kind(word: impl Into<String>) -> Kind {
    Kind { kind: word.into() }
}

/// The label set of one service.
pub fn service(name: impl Into<String>) -> Service {
    Service { service: name.into() }
}

/// The label set of one service and outcome.
pub fn outcome(name: impl Into<String>, outcome: impl Into<String>) -> ServiceOutcome {
    ServiceOutcome {
        service: name.into(),
        outcome: outcome.into(),
    }
}

/// The label set of one service and horizon.
pub fn at_horizon(name: impl Into<String>, horizon: String) -> ServiceHorizon {
    ServiceHorizon {
        service: name.into(),
        horizon,
    }
}

/// Raises `counter` to a total that is counted elsewhere.
pub fn raise_to(counter: &Counter, total: u64) {
    counter.inner().fetch_max(total, Ordering::Relaxed);
}

struct Registrar<'a>(&'a mut Registry);

impl Registrar<'_> {
    fn add<M>(&mut self, name: &str, help: &str) -> M
    where
        M: Default + Clone + prometheus_client::registry::Metric,
    {
        let metric = M::default();
        self.0.register(name, help, metric.clone());
        metric
    }

    fn unit<M>(&mut self, name: &str, help: &str, unit: Unit) -> M
    where
        M: Default + Clone + prometheus_client::registry::Metric,
    {
        let metric = M::default();
        self.0.register_with_unit(name, help, unit, metric.clone());
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_open_metrics_with_one_prefix_and_base_units() {
        let metrics = Metrics::new();
        metrics.samples.inc();
        metrics.updates.get_or_create(&kind("accepted")).inc();
        metrics
            .failure_risk
            .get_or_create(&at_horizon("kv", "5m".to_owned()))
            .set(0.25);
        raise_to(&metrics.bytes_sent, 7);
        raise_to(&metrics.bytes_sent, 5);
        let text = metrics.encode().unwrap();
        assert!(text.ends_with("# EOF\n"));
        for line in [
            "theriac_edge_samples_total 1",
            "theriac_edge_updates_total{kind=\"accepted\"} 1",
            "theriac_edge_sent_bytes_total 7",
            "theriac_edge_failure_risk_ratio{service=\"kv\",horizon=\"5m\"} 0.25",
            "theriac_edge_storage_ok 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(
            text.lines()
                .filter(|line| !line.starts_with('#'))
                .all(|line| line.starts_with("theriac_edge_"))
        );
    }

    #[test]
    fn own_memory_and_time_are_told() {
        let text = Metrics::new().encode().unwrap();
        let memory = text
            .lines()
            .find_map(|line| line.strip_prefix("theriac_edge_resident_memory_bytes "))
            .unwrap();
        assert!(memory.parse::<u64>().unwrap() > 1_000_000);
    }
}
