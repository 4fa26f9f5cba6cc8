//! Noise at the centre: the option for large fleets that trust their aggregator. Off by default.
//!
//! Every site's own noise stays as it is: an edge has none to switch off. Here, a second promise is added, with a whole site as its unit: what the published models say of
//! any one site is (ε, δ)-differentially private. The mechanism, and who must be trusted, are in [`theriac_privacy::central`]; this module reads the
//! settings, says the statement, keeps the ledger, and stops the rounds when the budget is spent.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use theriac_privacy::accountant::SamplingRate;
use theriac_privacy::central::{CentralCharge, CentralError, CentralLedger, CentralSpent, CentralTerms};
use theriac_privacy::ledger::{KnownHead, LedgerError, ReserveError};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, NodeId, NoiseMultiplier, Round};

use crate::config::{CheckedConfig, ConfigError};
use crate::data_dir::DataDir;
use crate::robust::RuleName;
use crate::store::records::{meta, set_meta};
use crate::store::{Store, StoreError, Urgency, wall_clock};

/// Name of the meta row with the position that the centre's ledger is known to have reached.
const META_LEDGER: &str = "central_ledger";

/// What to do when the ledger cannot be used.
pub(crate) const CENTRAL_HINT: &str = "restore the newest central-ledger.log, or raise central_noise.version after a change of its terms; \
                                       deleting the ledger does not help";

/// `[central_noise]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CentralNoiseSettings {
    /// Whether noise is added here, on top of each site's own. Default `false`. It needs `rounds.rule = "mean"`, and the sites must trust this aggregator.
    pub enabled: bool,
    /// Number of the promise, at least 1, default 1. Raise it with every change of `epsilon`, `delta`, `noise_multiplier` or `sampling_rate`: the
    /// ledger refuses another promise under an old number.
    pub version: u64,
    /// Largest ε of any site over all rounds, above 0 to 100, default 4. Once it is spent no round opens any more.
    pub epsilon: f64,
    /// δ, above 0 to 0.001, default 1e-6. At most 1 / (10 × sites).
    pub delta: f64,
    /// σ: noise of standard deviation σC is added to the sum, 0.3 to 10 000, default 1. Too low: few rounds spend ε. Too high: nothing is learnt.
    pub noise_multiplier: f64,
    /// Probability with which a stored update enters the sum, above 0 to 1, default 1. Lower ones spend less ε a round, and use fewer updates.
    pub sampling_rate: f64,
    /// C: largest Euclidean norm of one update in the sum, 1e-9 to 1e12; longer ones are scaled down. No default.
    pub clip_norm: Option<f64>,
    /// Sites that the fleet is taken to have, 1 to 10 000 000: a public number, by which (times `sampling_rate`) the sum is divided. No default.
    pub sites: Option<u32>,
}

impl Default for CentralNoiseSettings {
    fn default() -> Self {
        Self {
            enabled: false,
            version: 1,
            epsilon: 4.0,
            delta: 1e-6,
            noise_multiplier: 1.0,
            sampling_rate: 1.0,
            clip_norm: None,
            sites: None,
        }
    }
}

impl CentralNoiseSettings {
    /// The checked terms; `None` when it is off.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for a value out of range, [`ConfigError::CentralRule`] for a rule of which no sensitivity is known.
    pub fn check(&self, rule: RuleName) -> Result<Option<CentralTerms>, ConfigError> {
        let wrong = |key, reason: String| ConfigError::Value { key, reason };
        if self.version == 0 {
            return Err(wrong("central_noise.version", "0 is outside 1 and above".into()));
        }
        let range = |key, got: f64, fits: bool, range: &str| {
            if fits {
                Ok(())
            } else {
                Err(wrong(key, format!("{got} is not {range}")))
            }
        };
        let (epsilon, delta) = (self.epsilon, self.delta);
        let epsilon_fits = epsilon > 0.0 && epsilon <= 100.0;
        range(
            "central_noise.epsilon",
            epsilon,
            epsilon_fits,
            "above 0 and at most 100",
        )?;
        let delta_fits = delta > 0.0 && delta <= 1e-3;
        range(
            "central_noise.delta",
            delta,
            delta_fits,
            "above 0 and at most 0.001",
        )?;
        let (sigma, rate) = (self.noise_multiplier, self.sampling_rate);
        let sigma_fits = (0.3..=10_000.0).contains(&sigma);
        range(
            "central_noise.noise_multiplier",
            sigma,
            sigma_fits,
            "between 0.3 and 10000",
        )?;
        let rate_fits = rate > 0.0 && rate <= 1.0;
        range(
            "central_noise.sampling_rate",
            rate,
            rate_fits,
            "above 0 and at most 1",
        )?;
        if let Some(clip) = self.clip_norm {
            let fits = (1e-9..=1e12).contains(&clip);
            range("central_noise.clip_norm", clip, fits, "between 1e-9 and 1e12")?;
        }
        if let Some(sites) = self.sites {
            let fits = (1..=10_000_000).contains(&sites);
            range(
                "central_noise.sites",
                sites.into(),
                fits,
                "between 1 and 10000000",
            )?;
        }
        if !self.enabled {
            return Ok(None);
        }
        if rule != RuleName::MEAN {
            return Err(ConfigError::CentralRule { rule });
        }
        let missing = |key| wrong(key, "it is needed when central_noise.enabled = true".into());
        let clip_norm = self.clip_norm.ok_or_else(|| missing("central_noise.clip_norm"))?;
        let sites = self.sites.ok_or_else(|| missing("central_noise.sites"))?;
        let unit = |error: &dyn fmt::Display| wrong("central_noise", error.to_string());
        let terms = CentralTerms {
            version: self.version,
            epsilon: Epsilon::new(epsilon).map_err(|error| unit(&error))?,
            delta: Delta::new(delta).map_err(|error| unit(&error))?,
            noise_multiplier: NoiseMultiplier::new(sigma).map_err(|error| unit(&error))?,
            sampling_rate: SamplingRate::new(rate).map_err(|error| unit(&error))?,
            clip_norm: L2Norm::new(clip_norm).map_err(|error| unit(&error))?,
            sites,
        };
        if terms.expected() < 1.0 {
            let expected = terms.expected();
            return Err(wrong(
                "central_noise.sampling_rate",
                format!("{rate} of {sites} sites is {expected} updates a round: at least 1 must be expected"),
            ));
        }
        Ok(Some(terms))
    }
}

/// The statement of trust, for people: what is promised, to whom, and who must be believed.
pub fn statement(terms: &CentralTerms) -> String {
    format!(
        "central noise is on: the models of all rounds from here on are together ({}, {:e})-differentially private for each whole site, against everyone but this aggregator; \
         sites must TRUST this aggregator, which sees their updates before this noise (each with the site's own noise on it). \
         sigma {}, clip norm {}, sampling rate {} of {} sites, rule mean, which withstands no hostile site",
        terms.epsilon,
        terms.delta.value(),
        terms.noise_multiplier,
        terms.clip_norm,
        terms.sampling_rate,
        terms.sites
    )
}

/// As [`CentralSpent`], for the status page and command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CentralStatus {
    /// The statement of trust.
    pub statement: String,
    /// ε of every site by the ledger's accountant.
    pub epsilon: f64,
    /// The tighter second figure.
    pub epsilon_pld: f64,
    /// The limit.
    pub epsilon_limit: f64,
    /// δ.
    pub delta: f64,
    /// Sums that were charged.
    pub rounds: u64,
    /// Whether the budget covers no further round: then none opens, and the model stays.
    pub exhausted: bool,
}

impl CentralStatus {
    /// What is said of these terms and figures.
    pub fn new(terms: &CentralTerms, spent: CentralSpent) -> Self {
        Self {
            statement: statement(terms),
            epsilon: spent.epsilon,
            epsilon_pld: spent.epsilon_pld,
            epsilon_limit: spent.epsilon_limit,
            delta: spent.delta,
            rounds: spent.rounds,
            exhausted: spent.exhausted,
        }
    }

    /// From the ledger's file, beside a running server or without one; `None` when it is off. Before the first start nothing is spent.
    ///
    /// # Errors
    /// [`CentralError`]
    pub fn read(config: &CheckedConfig) -> Result<Option<Self>, CentralError> {
        let Some(terms) = config.central_noise else {
            return Ok(None);
        };
        let path = DataDir::new(&config.data_dir).central_ledger();
        let spent = if path.exists() {
            CentralLedger::inspect(&path, &centre(&config.federation)?, terms)?
        } else {
            CentralSpent {
                epsilon: 0.0,
                epsilon_pld: 0.0,
                epsilon_limit: terms.epsilon.value(),
                delta: terms.delta.value(),
                rounds: 0,
                exhausted: false,
            }
        };
        Ok(Some(Self::new(&terms, spent)))
    }
}

impl fmt::Display for CentralStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.statement)?;
        write!(
            f,
            "central noise: epsilon {:.4} of {} at delta {:e} in {} rounds ({:.4} by PLD)",
            self.epsilon, self.epsilon_limit, self.delta, self.rounds, self.epsilon_pld
        )?;
        if self.exhausted {
            f.write_str("; the budget is spent: no round opens any more, the model stays")?;
        }
        Ok(())
    }
}

/// The centre's name in its ledger.
fn centre(federation: &str) -> Result<NodeId, CentralError> {
    // The configuration's check has taken it for a name.
    NodeId::new(federation).map_err(|_| {
        CentralError::Ledger(LedgerError::Broken {
            path: federation.into(),
        })
    })
}

/// Why a round's sum is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChargeError {
    /// The budget or the ledger refused.
    #[error("no noise of the centre can be charged, so the sum is not read: {0}")]
    Refused(#[from] ReserveError),
    /// What is known of the ledger could not be kept outside of it.
    #[error("the position of the centre's ledger cannot be kept: {0}")]
    Store(#[from] StoreError),
}

/// The centre's open ledger, shared with the tasks that combine rounds.
#[derive(Debug, Clone)]
pub struct Central(Arc<Mutex<CentralLedger>>);

impl Central {
    /// Opens or begins the ledger, holding it to what the store knows of it; `None` when central noise is off.
    ///
    /// # Errors
    /// [`CentralError`]: then no round may be combined.
    pub(crate) async fn open(config: &CheckedConfig, store: &Store) -> Result<Option<Self>, OpenError> {
        let Some(terms) = config.central_noise else {
            return Ok(None);
        };
        let known = store.read(|connection| match meta(connection, META_LEDGER) {
            Ok(bytes) => Ok(known_of(&bytes)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        });
        let known = known.await?;
        let path = DataDir::new(&config.data_dir).central_ledger();
        let name = centre(&config.federation)?;
        let ledger = CentralLedger::open(&path, &name, terms, known.as_ref(), wall_clock())?;
        Ok(Some(Self(Arc::new(Mutex::new(ledger)))))
    }

    fn lock(&self) -> MutexGuard<'_, CentralLedger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was spent, and the statement. Up to a second of work.
    pub(crate) fn status(&self) -> CentralStatus {
        let ledger = self.lock();
        CentralStatus::new(ledger.terms(), ledger.spent())
    }

    /// Charges a round: when this returns, charge and position are durable, and the sum may be read once. It waits for the disk twice.
    ///
    /// # Errors
    /// [`ChargeError`]; then the sum may not be read.
    pub(crate) async fn charge(
        &self,
        store: &Store,
        round: Round,
        terms: &RoundTerms,
    ) -> Result<CentralCharge, ChargeError> {
        let (kind, values): (UpdateKind, u32) = (terms.kind, terms.values);
        let this = self.clone();
        let reserved = tokio::task::spawn_blocking(move || {
            let mut ledger = this.lock();
            let charge = ledger.reserve(round, kind, values, wall_clock())?;
            Ok::<_, ReserveError>((charge, ledger.known_head()))
        });
        let (charge, known) = reserved
            .await
            .map_err(|error| ChargeError::Store(StoreError::Conflict(error.to_string())))??;
        let write = move |work: &crate::store::Work<'_>| set_meta(work, META_LEDGER, &bytes_of(&known));
        store.write(Urgency::Now, write).await?;
        Ok(charge)
    }
}

/// Why the centre's ledger cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The ledger or its terms.
    #[error("[central_noise]: {0}")]
    Ledger(#[from] CentralError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Records, little-endian, and the head.
fn bytes_of(known: &KnownHead) -> [u8; 40] {
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&known.records.to_le_bytes());
    bytes[8..].copy_from_slice(&known.head.0);
    bytes
}

fn known_of(bytes: &[u8]) -> Option<KnownHead> {
    let (records, head) = bytes.split_first_chunk::<8>()?;
    Some(KnownHead {
        records: u64::from_le_bytes(*records),
        head: Digest(head.try_into().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on() -> CentralNoiseSettings {
        CentralNoiseSettings {
            enabled: true,
            clip_norm: Some(1.0),
            sites: Some(1_000),
            ..CentralNoiseSettings::default()
        }
    }

    #[test]
    fn it_is_off_unless_it_is_switched_on() {
        let off = CentralNoiseSettings::default();
        assert_eq!(off.check(RuleName::TRIMMED_MEAN).unwrap(), None);
        assert!(on().check(RuleName::MEAN).unwrap().is_some());
    }

    #[test]
    fn a_robust_rule_has_no_known_sensitivity_and_is_refused() {
        for rule in [RuleName::MEDIAN, RuleName::TRIMMED_MEAN] {
            let refused = on().check(rule);
            assert!(
                matches!(refused, Err(ConfigError::CentralRule { rule: found }) if found == rule),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        type Change = fn(&mut CentralNoiseSettings);
        let cases: [(Change, &str); 9] = [
            (|s| s.epsilon = 0.0, "central_noise.epsilon"),
            (|s| s.delta = 1.0, "central_noise.delta"),
            (
                |s| s.noise_multiplier = f64::NAN,
                "central_noise.noise_multiplier",
            ),
            (|s| s.sampling_rate = 1.1, "central_noise.sampling_rate"),
            (|s| s.clip_norm = Some(0.0), "central_noise.clip_norm"),
            (|s| s.clip_norm = None, "central_noise.clip_norm"),
            (|s| s.sites = None, "central_noise.sites"),
            (|s| s.version = 0, "central_noise.version"),
            (|s| s.sampling_rate = 1e-4, "central_noise.sampling_rate"),
        ];
        for (change, key) in cases {
            let mut settings = on();
            change(&mut settings);
            let refused = settings.check(RuleName::MEAN).unwrap_err().to_string();
            assert!(refused.starts_with(key), "{key}: {refused}");
        }
    }

    #[test]
    fn the_statement_says_whom_to_trust() {
        let terms = on().check(RuleName::MEAN).unwrap().unwrap();
        let said = statement(&terms);
        for word in [
            "TRUST this aggregator",
            "each whole site",
            "(4, 1e-6)",
            "1000 sites",
        ] {
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    #[test]
    fn a_known_position_survives_its_row() {
        let known = KnownHead {
            records: 300,
            head: Digest([7; 32]),
        };
        assert_eq!(known_of(&bytes_of(&known)), Some(known));
        assert_eq!(known_of(&[1; 39]), None);
    }
}
