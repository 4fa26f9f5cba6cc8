//! A federation on disk: directories, addresses and configuration files of the aggregator and of every edge, written
//! through the programs' own settings types, so that a key can be neither misspelt nor forgotten.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use theriac_aggregator::config as aggregator;
use theriac_edge::config as edge;
use theriac_heal::policy::{Autonomy, HealingSection, NodeBudget};
use theriac_privacy::policy::signed::{PolicyKey, signature_path};

/// Name of the service that every edge of the lab supervises.
pub const SERVICE: &str = "kv";

/// How often an edge of the lab measures.
pub const SAMPLING: Duration = Duration::from_millis(250);

/// Memory at which the service counts as failed, in bytes: where its leak stops.
const SERVICE_MEMORY_MAX: u64 = 1 << 30;

/// One edge with its service.
#[derive(Debug, Clone)]
pub struct Site {
    /// Name of the site.
    pub name: String,
    /// Everything of this site lies in here.
    pub dir: PathBuf,
    /// Page of the edge.
    pub page: SocketAddr,
    /// Where the service serves.
    pub service: SocketAddr,
    /// Where the service takes faults.
    pub control: SocketAddr,
    /// Key of the lab's compliance officer; only its public half is written down.
    officer: PolicyKey,
}

/// What differs between the edges of the demo and those of a campaign.
#[derive(Debug, Clone, Copy)]
pub struct EdgeTerms {
    /// Samples before the first model.
    pub warm_up_rows: usize,
    /// False alarms a day that the threshold aims at.
    pub false_alarms_per_day: f64,
    /// Least time between two actions on the service.
    pub cooldown: Duration,
    /// Most actions within an hour.
    pub actions_max: u32,
}

impl Site {
    /// Names the places of a site below `root`.
    pub fn new(root: &Path, name: &str, [page, service, control]: [SocketAddr; 3]) -> Self {
        Self {
            name: name.to_owned(),
            dir: root.join(name),
            page,
            service,
            control,
            officer: PolicyKey::from_seed(&rand::random()),
        }
    }

    /// `edge.toml` of this site.
    pub fn config(&self) -> PathBuf {
        self.dir.join("edge.toml")
    }

    /// The edge's state directory.
    pub fn edge_state(&self) -> PathBuf {
        self.dir.join("edge")
    }

    /// The service's state directory: it also tells our services from any others on this machine.
    pub fn service_state(&self) -> PathBuf {
        self.dir.join("service")
    }

    /// `privacy.toml` of this site.
    pub fn privacy(&self) -> PathBuf {
        self.dir.join("privacy.toml")
    }

    /// Makes the directories and writes `edge.toml`. `program` is the lab itself, whose hidden `__service` is the
    /// service that ends with its edge.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, program: &Path, terms: EdgeTerms) -> io::Result<()> {
        std::fs::create_dir_all(self.service_state())?;
        let settings = edge::EdgeSettings {
            node: Some(self.name.clone()),
            state_dir: Some(self.edge_state()),
            offsite: None,
            sampling: edge::SamplingSettings {
                interval: SAMPLING,
                history_rows: 2_400,
                ..edge::SamplingSettings::default()
            },
            detection: edge::DetectionSettings {
                warm_up_rows: terms.warm_up_rows,
                half_lives: [Duration::from_millis(750), Duration::from_secs(3)],
                false_alarms_per_day: terms.false_alarms_per_day,
                ..edge::DetectionSettings::default()
            },
            risk: edge::RiskSettings::default(),
            federation: edge::FederationSettings {
                privacy_policy: Some(self.privacy()),
                policy_key: Some(self.officer.public()),
                retry_base: Duration::from_millis(200),
                retry_max: Duration::from_secs(5),
                ..edge::FederationSettings::default()
            },
            http: edge::HttpSettings { listen: self.page },
            healing: HealingSection {
                autonomy: Some(Autonomy::Act),
                restore_autonomy: Some(Autonomy::Act),
                cooldown: Some(terms.cooldown),
                max_actions: Some(terms.actions_max),
                settle: Some(Duration::from_secs(5)),
                anomaly_lasting: Some(Duration::from_millis(1_500)),
                // Faults are injected here, so that they return is expected.
                anomaly_restarts: Some(terms.actions_max),
                verify_probes: Some(2),
                ..HealingSection::default()
            },
            healing_policy: edge::HealingPolicySettings::default(),
            healing_budget: NodeBudget {
                max_actions: terms.actions_max,
                ..NodeBudget::default()
            },
            service: vec![self.service_settings(program)],
        };
        write_toml(&self.config(), &settings)
    }

    /// Writes and signs `privacy.toml`: ε = 8 at δ = 1e-6 for every block of `block`, and at most `releases_max` releases.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_privacy(&self, block: Duration, releases_max: Option<u64>) -> io::Result<()> {
        let block = humantime::format_duration(block);
        let limit = releases_max
            .map(|most| format!("releases_max = {most}\n"))
            .unwrap_or_default();
        let text = format!(
            "site = \"{}\"\nunit = \"block\"\nblock = \"{block}\"\nepsilon = 8\ndelta = 1e-6\n{limit}",
            self.name
        );
        let signature = self.officer.sign(&text).map_err(io::Error::other)?;
        std::fs::write(self.privacy(), text)?;
        std::fs::write(signature_path(&self.privacy()), signature.to_string())
    }

    fn service_settings(&self, program: &Path) -> edge::ServiceSettings {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (listen, control) = (self.service.to_string(), self.control.to_string());
        let (program, state) = (text(program), text(&self.service_state()));
        let argv = [
            "__service",
            "--listen",
            &listen,
            "--control",
            &control,
            "--state",
            &state,
        ];
        let check = ["service", "check", "--state", "{state}"];
        let words = |rest: &[&str]| -> Vec<String> {
            std::iter::once(program.as_str())
                .chain(rest.iter().copied())
                .map(str::to_owned)
                .collect()
        };
        edge::ServiceSettings {
            name: SERVICE.to_owned(),
            argv: words(&argv),
            env: std::collections::BTreeMap::new(),
            cwd: None,
            stop_grace: Duration::from_secs(1),
            keep_running: false,
            output: Some(self.dir.join("service.log")),
            probe: Some(edge::ProbeSettings {
                url: format!("http://{}/healthz", self.service),
                interval: Duration::from_millis(250),
                timeout: Duration::from_secs(1),
                start_grace: Duration::from_secs(5),
                password_file: None,
                loading_max: Duration::from_mins(10),
            }),
            state: Some(edge::StateSettings {
                free_bytes_min: None,
                dir: self.service_state(),
                check: words(&check),
                check_timeout: Duration::from_secs(10),
                interval: Duration::from_secs(20),
                min_gap: Duration::from_secs(5),
                budget_pct: 5.0,
                expected_mtbf: Duration::from_hours(24),
                verify_every: Duration::from_hours(24),
                keep: 2,
            }),
            checkpoint: None,
            sessions: None,
            space: None,
            hook: None,
            webhook: None,
            proxy: None,
            cgroup: None,
            systemd: None,
            kubernetes: None,
            depends_on: Vec::new(),
            limits: edge::LimitSettings {
                memory_bytes: Some(SERVICE_MEMORY_MAX),
            },
            healing: HealingSection::default(),
        }
    }
}

/// The aggregator.
#[derive(Debug, Clone)]
pub struct Centre {
    /// Its data directory.
    pub dir: PathBuf,
    /// Main listener.
    pub listen: SocketAddr,
    /// Join listener.
    pub join: SocketAddr,
    /// Page.
    pub page: SocketAddr,
}

impl Centre {
    /// Names the places of an aggregator below `root`.
    pub fn new(root: &Path, [listen, join, page]: [SocketAddr; 3]) -> Self {
        Self {
            dir: root.join("aggregator"),
            listen,
            join,
            page,
        }
    }

    /// The file that `init` writes.
    pub fn config(&self) -> PathBuf {
        self.dir.join("aggregator.toml")
    }

    /// Replaces the commented configuration that `init` wrote by one for the lab.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(
        &self,
        federation: &str,
        rounds: aggregator::RoundSettings,
        model: aggregator::ModelSettings,
    ) -> io::Result<()> {
        let settings = aggregator::Settings {
            federation: federation.to_owned(),
            data_dir: self.dir.clone(),
            listen: self.listen,
            join_listen: self.join,
            http: self.page,
            advertise: Some(self.listen.to_string()),
            rounds,
            model,
            ..aggregator::Settings::default()
        };
        write_toml(&self.config(), &settings)
    }
}

fn write_toml(path: &Path, settings: &impl Serialize) -> io::Result<()> {
    let text = toml::to_string(settings).map_err(io::Error::other)?;
    std::fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: EdgeTerms = EdgeTerms {
        warm_up_rows: 120,
        false_alarms_per_day: 1.0,
        cooldown: Duration::from_secs(3),
        actions_max: 40,
    };

    fn addresses() -> [SocketAddr; 3] {
        super::super::free_addresses(3).unwrap().try_into().unwrap()
    }

    #[test]
    fn an_edge_takes_the_configuration_that_was_written_for_it() {
        let root = tempfile::tempdir().unwrap();
        let site = Site::new(root.path(), "amber", addresses());
        site.write(Path::new("/bin/true"), TERMS).unwrap();
        let config = edge::EdgeConfig::load(Some(&site.config()), []).unwrap();
        assert_eq!(config.services.len(), 1);
        assert_eq!(config.services[0].healing.autonomy, Autonomy::Act);
        assert_eq!(config.detection.warm_up_rows, 120);
        site.write_privacy(Duration::from_secs(4), Some(3)).unwrap();
        let pinned = config.federation.policy_key.unwrap();
        let policy = theriac_privacy::policy::Policy::load_signed(&site.privacy(), pinned).unwrap();
        assert_eq!(
            (policy.site().as_str(), policy.releases_max()),
            ("amber", Some(3))
        );
    }

    #[test]
    fn an_aggregator_takes_the_configuration_that_was_written_for_it() {
        let root = tempfile::tempdir().unwrap();
        let centre = Centre::new(root.path(), addresses());
        std::fs::create_dir_all(&centre.dir).unwrap();
        let rounds = aggregator::RoundSettings {
            quorum: 3,
            ..aggregator::RoundSettings::default()
        };
        centre
            .configure("demo", rounds, aggregator::ModelSettings::default())
            .unwrap();
        let config = aggregator::load(&centre.config(), []).unwrap();
        assert_eq!((config.rounds.quorum, config.http), (3, centre.page));
    }
}
