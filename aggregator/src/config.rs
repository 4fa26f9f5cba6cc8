//! `aggregator.toml`: every key documented, unknown keys refused.
//!
//! [`Settings`] is what the file says; [`CheckedConfig`] is what the program runs on, and [`Settings::check`] is the only
//! way from one to the other, so running code never meets a value out of range. `check-config` and `serve` share [`load`].

mod evidence;
mod example;
mod validation;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings::{self, SettingsError};
use theriac_model::LAG_MAX;
use theriac_model::gradient::CLIP_NORM_PER_ROW;
use theriac_model::moments::{BLOCK_CLIP_NORM, BLOCK_ROWS};
use theriac_privacy::central::CentralTerms;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{L2Norm, NodeId, NoiseMultiplier};

use crate::accumulate::Accumulate;
use crate::average::SiteAverage;
use crate::central::CentralNoiseSettings;
use crate::evidence::reputation::QuarantineLimits;
use crate::fleet::{FleetSettings, FleetTerms};
use crate::floor::FloorSettings;
use crate::layout::{LayoutError, ModelSpec};
use crate::models::frame_bytes_max;
use crate::robust::{Base, Options, RuleError, RuleName, rule};
use crate::server_optimizer::ServerOptimizer;
use crate::validation::{Missing, ValidationTerms};

pub use evidence::{OptimizerSettings, QuarantineSettings};
pub use example::example;

/// Prefix of environment variables that override the file: `THERIAC__SECTION__KEY`.
pub const ENVIRONMENT_PREFIX: &str = "THERIAC";

/// Why there is no configuration to run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file or the environment does not load.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A value is out of range, or two values do not fit together.
    #[error("{key}: {reason}")]
    Value {
        /// The key, with its section.
        key: &'static str,
        /// The value, the range, and what to do.
        reason: String,
    },
    /// Noise at the centre under a rule whose output one site may move by any amount.
    #[error(
        "central_noise.enabled: rule `{rule}` has no sensitivity that noise could be measured by; only \"mean\" is private at the centre"
    )]
    CentralRule {
        /// The configured rule.
        rule: RuleName,
    },
    /// More updates than the rule can combine.
    #[error(
        "rounds.updates_max: rule `{rule}` compares every pair of updates and combines {limit} at most, {updates} are asked for (rounds.updates_max or rounds.quorum)"
    )]
    TooManyUpdates {
        /// The configured rule.
        rule: RuleName,
        /// What is asked for.
        updates: usize,
        /// Most updates that the rule combines.
        limit: usize,
    },
}

impl ConfigError {
    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Self::Settings(error) => error.hint(),
            Self::CentralRule { .. } => {
                "set rounds.rule = \"mean\", which withstands no hostile site, or central_noise.enabled = false".into()
            }
            Self::TooManyUpdates { limit, .. } => format!(
                "set rounds.updates_max = {limit} or fewer and a quorum below it, or a rule of coordinates: rounds.rule = \"trimmed_mean\""
            ),
            Self::Value { .. } => {
                "the comments in the file that `theriac-aggregator init` writes say unit, default and range of every key"
                    .into()
            }
        }
    }
}

/// What `aggregator.toml` may say. Durations are text such as `"500ms"`, `"1s"`, `"2m"`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Name of the federation: 1 to 63 characters of `a-z`, `0-9` and `-`. It is part of every certificate, so it cannot be
    /// changed after `init`: with another name every edge is refused. No default.
    pub federation: String,
    /// Directory of database, blobs, authorities and keys, relative to the file's own directory; default `.`. It must be
    /// the one that `init` made.
    pub data_dir: PathBuf,
    /// UDP address of the main listener; default `0.0.0.0:7700`. Port 0 takes a free one. Edges must be able to reach it.
    pub listen: SocketAddr,
    /// UDP address where new edges hand in their token; default `0.0.0.0:7701`.
    pub join_listen: SocketAddr,
    /// TCP address of health, metrics and status; a loopback address, default `127.0.0.1:7702`. It has no login.
    pub http: SocketAddr,
    /// `HOST:PORT` that a new edge is told to connect to; default: `localhost` with the port of `listen`. A host that is
    /// not in the aggregator's certificate makes every edge fail its handshake.
    pub advertise: Option<String>,
    /// Rounds and their terms.
    pub rounds: RoundSettings,
    /// What is learnt.
    pub model: ModelSettings,
    /// What one edge, and all of them together, may cost.
    pub limits: LimitSettings,
    /// The weakest guarantee whose updates are taken.
    pub privacy_floor: FloorSettings,
    /// Noise at the centre, for large fleets that trust this aggregator.
    pub central_noise: CentralNoiseSettings,
    /// When a site's updates are scored and count nothing.
    pub quarantine: QuarantineSettings,
    /// From the combined changes to the model's step.
    pub server_optimizer: OptimizerSettings,
    /// Counts of unhealthy nodes, and slots for shared actions.
    pub fleet: FleetSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            federation: String::new(),
            data_dir: PathBuf::from("."),
            listen: SocketAddr::from(([0, 0, 0, 0], 7700)),
            join_listen: SocketAddr::from(([0, 0, 0, 0], 7701)),
            http: SocketAddr::from(([127, 0, 0, 1], 7702)),
            advertise: None,
            rounds: RoundSettings::default(),
            model: ModelSettings::default(),
            limits: LimitSettings::default(),
            privacy_floor: FloorSettings::default(),
            central_noise: CentralNoiseSettings::default(),
            quarantine: QuarantineSettings::default(),
            server_optimizer: OptimizerSettings::default(),
            fleet: FleetSettings::default(),
        }
    }
}

/// `[rounds]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RoundSettings {
    /// What an edge sends: `"moments"` (second moments of the own-lag regression, one noised release; the default), `"gradient"`
    /// (block-clipped gradients of the full linear model, of the same blocks in every one of some twenty rounds) or `"delta"` (a clipped weight
    /// delta of the network). With `"gradient"` edges from before it are refused, and edges whose policy does not name it decline.
    pub kind: RoundKind,
    /// Fewest updates that make a model, 1 to 100 000, default 3. Up to `byzantine` edges whose update was refused count as well
    /// (not with `"mean"`). Too low: a few edges decide. Too high: rounds abort while
    /// edges are away. Rounds open only while as many edges are connected.
    pub quorum: usize,
    /// Time from announcement to close, 100 ms to 7 days, default `2m`. Too short: slow edges are charged and come late.
    /// Too long: one silent edge delays the round.
    #[serde(with = "settings::duration")]
    pub deadline: Duration,
    /// Time between a round's end and the next announcement, 0 to 30 days, default `10m`. Too short spends the edges'
    /// privacy budget sooner; edges decline once it is spent.
    #[serde(with = "settings::duration")]
    pub pause: Duration,
    /// Most updates that one round takes, `quorum` to 100 000: of more connected edges each round asks others, drawn at random. Default what the rule can combine, at most
    /// 100 000: 2 048 for rules that compare pairs of updates, twice that after `"bucketing+"`. More than the rule can combine is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updates_max: Option<usize>,
    /// No round opens after this number; default none. For experiments.
    pub rounds_max: Option<u64>,
    /// Clipping norm C of what one block adds, above 0. Default with `"moments"` 4.8 for each row of a block after the first ten, in three digits (17 200
    /// for 3 600 rows), with `"gradient"` 4 for each of them, with `"delta"` 17 200. Too low: signal is cut off. Too high: noise σC drowns it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Noise multiplier σ that every update must carry, 0.1 to 1000. Default 1.27 (ε = 4 at δ = 1e-6 for one release), with `"gradient"` 5.69
    /// (the same for twenty releases of the same blocks). Too low: edges decline, their own policy wins. Too high: the model learns nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_multiplier: Option<f64>,
    /// Samples in one block, the privacy unit of moments, 11 to 86 400, default 3 600: one hour at one sample a second.
    pub block_rows: u32,
    /// An edge with fewer complete unspent blocks declines, 1 to `blocks_max`, default 2. Too low wastes budget on noise.
    pub blocks_min: u32,
    /// Most blocks in one release, 1 to 100 000, default 60. It bounds the norm of an honest update, so too high lets a
    /// hostile edge send more.
    pub blocks_max: u32,
    /// Rule that combines the updates, with what runs before it joined by `+`: `"mean"`, `"median"`, `"trimmed_mean"`,
    /// `"meamed"`, `"multi_krum"`, `"geometric_median"`, `"geometric_median_converged"`, `"caf"` (default), `"mda"`
    /// or `"bulyan"`, after `"nnm+"`, `"arc+"`, `"bucketing+"` or `"dedup+"`. Those that need another number
    /// (`"centered_clipping"`, `"clipping+"`, `"monna"`) and `"krum"`, which would publish one edge's noise, are refused.
    pub rule: RuleName,
    /// Number f of hostile edges to withstand; below half the quorum, default 1. Too small: arbitrary failure. Too large:
    /// honest sites that differ are cut away. Ignored by `"mean"`, which withstands none.
    pub byzantine: usize,
    /// Whether an update that comes after its round's end, before the next one stops collecting, is kept for that next round, where it counts once if the site
    /// has no newer one; default `true`, without effect and not allowed with noise of the centre. `false`: it is refused, and what the site was charged is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_updates: Option<bool>,
    /// How much a site's update of the round before counts beside the one at hand, b of a mean with weights bᵏ over its last rounds, which the rule sees
    /// in the update's place: 0 (off) to 0.99. Default 0. Too low: noise hides colluders. Too high: the model follows late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_average: Option<f64>,
    /// Whether a site's earlier releases of moments count beside the one at hand, whose blocks are others: the rule sees the mean of its last ones, and a site that sends
    /// nothing in a round counts by those that it has sent. Default `true` with `"moments"`, unless `site_average` or noise of the centre is on, with which it is
    /// not allowed. `false`: every round stands alone, and rounds of few blocks teach nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<bool>,
    /// Most releases of a site that count, 2 to 1 000, default 150. Too low: noise hides what few blocks say. Too high: the model follows late, and a
    /// kilobyte a release is kept.
    pub moments_keep: u32,
    /// Releases of rounds that opened longer ago count no more, 1 min to 1 000 days, default `30days`. Too short: sites that come rarely teach little. Too long:
    /// what hosts no longer do stays in the model.
    #[serde(with = "settings::duration")]
    pub moments_age: Duration,
    /// Sites of the platform team's own that try each model before it is published, at most 16; default none. Their own configurations must say
    /// `federation.validator = true`. One that finds the model worse on its rows than the one in force ends the round without a model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub validators: Vec<String>,
    /// Time for all of them to answer, 1 s to 1 h, default `30s`. Too short: slow ones are not heard. Too long: each round waits for one that is away.
    #[serde(with = "settings::duration")]
    pub validation_timeout: Duration,
    /// What becomes of a model that none of them could tell anything about in time: `"hold"` (default: the round ends without one, so without validators there
    /// is no progress) or `"publish"` (whoever keeps them from answering gets round them).
    pub validation_missing: Missing,
}

impl RoundSettings {
    /// C, or its default for what is collected.
    pub fn clip_norm(&self) -> f64 {
        let rows = (f64::from(self.block_rows) - LAG_MAX as f64).max(1.0);
        self.clip_norm.unwrap_or(match self.kind {
            RoundKind::Moments => three_digits(BLOCK_CLIP_NORM / (BLOCK_ROWS - LAG_MAX) as f64 * rows),
            RoundKind::Delta => 17_200.0,
            RoundKind::Gradient => CLIP_NORM_PER_ROW * rows,
        })
    }

    /// b of each site's mean, or its default for what is collected.
    pub fn site_average(&self) -> f64 {
        self.site_average.unwrap_or(match self.kind {
            RoundKind::Moments | RoundKind::Gradient | RoundKind::Delta => 0.0,
        })
    }

    /// σ, or its default for what is collected.
    pub fn noise_multiplier(&self) -> f64 {
        self.noise_multiplier.unwrap_or(match self.kind {
            RoundKind::Moments | RoundKind::Delta => 1.27,
            RoundKind::Gradient => 5.69,
        })
    }
}

fn three_digits(value: f64) -> f64 {
    let digits = value.log10().floor() - 2.0;
    let unit = 10_f64.powf(digits.abs());
    if digits > 0.0 {
        (value / unit).round() * unit
    } else {
        (value * unit).round() / unit
    }
}

impl Default for RoundSettings {
    fn default() -> Self {
        Self {
            kind: RoundKind::Moments,
            quorum: 3,
            deadline: Duration::from_mins(2),
            pause: Duration::from_mins(10),
            updates_max: None,
            rounds_max: None,
            clip_norm: None,
            noise_multiplier: None,
            block_rows: 3_600,
            blocks_min: 2,
            blocks_max: 60,
            rule: RuleName::CAF,
            byzantine: 1,
            late_updates: None,
            site_average: None,
            accumulate: None,
            moments_keep: 150,
            moments_age: days(30),
            validators: Vec::new(),
            validation_timeout: Duration::from_secs(30),
            validation_missing: Missing::Hold,
        }
    }
}

/// What a round collects, as the file spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RoundKind {
    /// Block-clipped moments.
    Moments,
    /// A weight delta.
    Delta,
    /// Block-clipped gradients.
    Gradient,
}

impl From<RoundKind> for UpdateKind {
    fn from(kind: RoundKind) -> Self {
        match kind {
            RoundKind::Moments => Self::Moments,
            RoundKind::Delta => Self::Delta,
            RoundKind::Gradient => Self::Gradient,
        }
    }
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// Feature profile of all edges; default `"host-service-v1"`, the only one so far. Edges with another are refused.
    pub profile: String,
    /// Instead of a profile: a model of that many bare numbers, 1 to 16 000 000, for load tests with `kind = "delta"`.
    /// Default none.
    pub dimension: Option<u32>,
    /// Seed of the initial model (version 0), default 1. Edges compute the same model from it.
    pub seed: u64,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            profile: "host-service-v1".into(),
            dimension: None,
            seed: 1,
        }
    }
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitSettings {
    /// Connections at one time, 1 to 100 000, default 6 000. Beyond it new ones are turned away with `busy`.
    pub connections_max: usize,
    /// Bytes of updates held in memory while they are checked and stored, 1 MiB to 64 GiB and at least two updates, default 256 MiB.
    /// Beyond it uploads are refused with `busy` and a time to come back.
    pub upload_bytes_in_flight_max: usize,
    /// Bytes of a round's updates in memory while they are combined, 0 to 1 TiB, default 1 GiB. Beyond it they lie in a file in `data_dir`, which must have room for
    /// them; the model has the same bits. Too low: rounds wait for the disk. Too high: the system may kill the aggregator in a large round.
    pub round_memory_bytes: u64,
    /// Messages one edge may send in one round, 4 to 1 000 000, default 64. Beyond it the connection is closed.
    pub messages_per_round_max: u32,
    /// Bytes one edge may send in one round, as a multiple of one update's size, 1 to 1 000, default 4.
    pub updates_per_round_max: u32,
    /// Time an edge has to take a message from the aggregator, 1 s to 10 min, default `30s`. Slower ones are closed.
    #[serde(with = "settings::duration")]
    pub write_timeout: Duration,
    /// Rounds whose updates are kept after they end, 1 to 1 000 000, default 100. Older payloads are deleted; their records
    /// stay. `rounds replay` needs them.
    pub rounds_kept: u64,
    /// Rounds of which the record about every site is kept, 1 to 1 000 000, default 1 000; one record takes about 2 KB. What a site has
    /// earned stays.
    pub records_kept: u64,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            connections_max: 6_000,
            upload_bytes_in_flight_max: 256 << 20,
            round_memory_bytes: 1 << 30,
            messages_per_round_max: 64,
            updates_per_round_max: 4,
            write_timeout: Duration::from_secs(30),
            rounds_kept: 100,
            records_kept: 1_000,
        }
    }
}

/// What the aggregator runs on: every value in range, every path absolute.
#[derive(Debug, Clone)]
pub struct CheckedConfig {
    /// Name of the federation.
    pub federation: String,
    /// Directory of everything durable.
    pub data_dir: PathBuf,
    /// Main listener.
    pub listen: SocketAddr,
    /// Join listener.
    pub join_listen: SocketAddr,
    /// Health, metrics, status.
    pub http: SocketAddr,
    /// `HOST:PORT` for new edges; `None` = `localhost` and the bound port.
    pub advertise: Option<String>,
    /// Checked terms of rounds.
    pub rounds: CheckedRounds,
    /// Layouts and the initial model.
    pub model: ModelSpec,
    /// Limits, all in range.
    pub limits: LimitSettings,
    /// The fleet's floor.
    pub privacy_floor: FloorSettings,
    /// Noise at the centre; `None`: off.
    pub central_noise: Option<CentralTerms>,
    /// When sites enter and leave quarantine.
    pub quarantine: QuarantineLimits,
    /// From the combined changes to the model's step.
    pub server_optimizer: ServerOptimizer,
    /// Account of the fleet; `None`: off.
    pub fleet: Option<FleetTerms>,
    /// Who tries a model before it is published; `None`: nobody.
    pub validation: Option<ValidationTerms>,
}

/// Terms of a round after the check.
#[derive(Debug, Clone)]
pub struct CheckedRounds {
    /// What is collected.
    pub kind: UpdateKind,
    /// Fewest updates.
    pub quorum: usize,
    /// Time from announcement to close.
    pub deadline: Duration,
    /// Time between rounds.
    pub pause: Duration,
    /// Most updates in one round.
    pub updates_max: usize,
    /// Last round.
    pub rounds_max: Option<u64>,
    /// C.
    pub clip_norm: L2Norm,
    /// σ.
    pub noise_multiplier: NoiseMultiplier,
    /// Samples in a block.
    pub block_rows: u32,
    /// Fewest blocks.
    pub blocks_min: u32,
    /// Most blocks.
    pub blocks_max: u32,
    /// Rule.
    pub rule: RuleName,
    /// Assumed number f of hostile edges.
    pub byzantine: usize,
    /// Whether late updates are kept for the next round.
    pub late_updates: bool,
    /// How much of a site's earlier updates the rule sees.
    pub site_average: SiteAverage,
    /// How much of a site's earlier releases of moments is added.
    pub accumulate: Accumulate,
}

/// Loads and checks: the file, then the environment. Opens no port and touches no data directory.
///
/// # Errors
/// [`ConfigError`] names the key, the value and what to do.
pub fn load(
    file: &Path,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<CheckedConfig, ConfigError> {
    let settings: Settings = settings::load(Some(file), ENVIRONMENT_PREFIX, environment)?;
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    settings.check(directory)
}

impl Settings {
    /// Checks ranges and how values fit together. `directory` is where relative paths start.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first value that is out of range.
    pub fn check(self, directory: &Path) -> Result<CheckedConfig, ConfigError> {
        NodeId::new(self.federation.clone()).map_err(|_| {
            let got = &self.federation;
            wrong(
                "federation",
                format!("`{got}` is no name: use 1 to 63 characters of a-z, 0-9 and -"),
            )
        })?;
        if !self.http.ip().is_loopback() {
            let got = self.http;
            return Err(wrong(
                "http",
                format!("{got} is no loopback address: use 127.0.0.1 or [::1]"),
            ));
        }
        if let Some(advertise) = &self.advertise {
            let port = advertise.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
                return Err(wrong("advertise", format!("`{advertise}` is no HOST:PORT")));
            }
        }
        let model = match self.model.dimension {
            Some(dimension) => ModelSpec::raw(dimension),
            None => ModelSpec::profile(&self.model.profile, self.model.seed),
        }
        .map_err(|error| match error {
            LayoutError::Dimension { .. } => wrong("model.dimension", error.to_string()),
            _ => wrong("model.profile", error.to_string()),
        })?;
        let validation = self.check_validation()?;
        let limits = check_limits(self.limits)?;
        let mut rounds = check_rounds(&self.rounds)?;
        let central_noise = self.central_noise.check(rounds.rule)?;
        if central_noise.is_some() && rounds.kind == UpdateKind::Gradient {
            return Err(wrong(
                "central_noise.enabled",
                "the centre's own noise is charged for one sum of moments or deltas a round, not for the many rounds of rounds.kind = \"gradient\": \
                 every site would spend its budget and no model would come of it"
                    .into(),
            ));
        }
        if central_noise.is_some() {
            // Its sensitivity is that of one update of a site in one round.
            if self.rounds.late_updates == Some(true) {
                return Err(wrong("rounds.late_updates", CENTRAL_NEEDS_ONE.into()));
            }
            if self.rounds.site_average.is_some_and(|keep| keep > 0.0) {
                return Err(wrong("rounds.site_average", CENTRAL_NEEDS_ONE.into()));
            }
            if self.rounds.accumulate == Some(true) {
                return Err(wrong("rounds.accumulate", CENTRAL_NEEDS_ONE.into()));
            }
            (rounds.late_updates, rounds.site_average) = (false, SiteAverage::OFF);
            rounds.accumulate = Accumulate::OFF;
        }
        if rounds.site_average.rounds() > limits.rounds_kept {
            let (need, got) = (rounds.site_average.rounds(), limits.rounds_kept);
            return Err(wrong(
                "limits.rounds_kept",
                format!(
                    "{got} is fewer than the {need} rounds that rounds.site_average looks back: set it to {need} or more"
                ),
            ));
        }
        if self.model.dimension.is_some() && rounds.kind != UpdateKind::Delta {
            return Err(wrong(
                "model.dimension",
                "a model of bare numbers needs rounds.kind = \"delta\"".into(),
            ));
        }
        let layout = model
            .update(rounds.kind)
            .map_err(|error| wrong("model.dimension", error.to_string()))?;
        // One update that is checked must leave room for the next one to arrive.
        let frame = frame_bytes_max(layout.values);
        let (need, got) = (2 * u64::from(frame), limits.upload_bytes_in_flight_max);
        if (got as u64) < need {
            return Err(wrong(
                "limits.upload_bytes_in_flight_max",
                format!(
                    "{got} holds no two updates of {frame} bytes ({} values): set it to {need} or more, or model.dimension lower",
                    layout.values
                ),
            ));
        }
        let data_dir = std::path::absolute(directory.join(&self.data_dir))
            .map_err(|error| wrong("data_dir", format!("{}: {error}", self.data_dir.display())))?;
        Ok(CheckedConfig {
            federation: self.federation,
            data_dir,
            listen: self.listen,
            join_listen: self.join_listen,
            http: self.http,
            advertise: self.advertise,
            quarantine: self.quarantine.check()?,
            server_optimizer: self.server_optimizer.check(rounds.kind)?,
            fleet: Some(self.fleet.check()?).filter(|_| self.fleet.enabled),
            rounds,
            model,
            limits,
            privacy_floor: check_floor(self.privacy_floor)?,
            central_noise,
            validation,
        })
    }
}

fn check_floor(floor: FloorSettings) -> Result<FloorSettings, ConfigError> {
    if let Some(block) = floor.block_min {
        span("privacy_floor.block_min", block, Duration::from_secs(1), days(31))?;
    }
    let most = |key, got: Option<f64>, most: f64| match got {
        Some(got) if !(got > 0.0 && got <= most) => {
            Err(wrong(key, format!("{got} is not above 0 and at most {most}")))
        }
        _ => Ok(()),
    };
    most("privacy_floor.epsilon_max", floor.epsilon_max, 100.0)?;
    most("privacy_floor.delta_max", floor.delta_max, 1e-3)?;
    most(
        "privacy_floor.noise_multiplier_min",
        floor.noise_multiplier_min,
        10_000.0,
    )?;
    let key = |signer: &&String| {
        let digits = signer.strip_prefix("thpk1_");
        digits.is_some_and(|digits| digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
    };
    if let Some(bad) = floor.signers.iter().find(|signer| !key(signer)) {
        return Err(wrong(
            "privacy_floor.signers",
            format!(
                "`{bad}` is no public key: write thpk1_ and 64 hexadecimal digits, as `theriac-edge privacy keygen` prints"
            ),
        ));
    }
    Ok(floor)
}

fn check_rounds(rounds: &RoundSettings) -> Result<CheckedRounds, ConfigError> {
    count("rounds.quorum", rounds.quorum as u64, 1, 100_000)?;
    span(
        "rounds.deadline",
        rounds.deadline,
        Duration::from_millis(100),
        days(7),
    )?;
    span("rounds.pause", rounds.pause, Duration::ZERO, days(30))?;
    if rounds.rounds_max == Some(0) {
        return Err(wrong(
            "rounds.rounds_max",
            "0 would open no round at all: leave it out or use 1 or more".into(),
        ));
    }
    let clip_norm =
        L2Norm::new(rounds.clip_norm()).map_err(|error| wrong("rounds.clip_norm", error.to_string()))?;
    let got = rounds.noise_multiplier();
    if !(0.1..=1_000.0).contains(&got) {
        return Err(wrong(
            "rounds.noise_multiplier",
            format!("{got} is outside 0.1 to 1000"),
        ));
    }
    let noise_multiplier =
        NoiseMultiplier::new(got).map_err(|error| wrong("rounds.noise_multiplier", error.to_string()))?;
    count("rounds.block_rows", rounds.block_rows.into(), 11, 86_400)?;
    count("rounds.blocks_max", rounds.blocks_max.into(), 1, 100_000)?;
    count(
        "rounds.blocks_min",
        rounds.blocks_min.into(),
        1,
        rounds.blocks_max.into(),
    )?;
    let keep = rounds.site_average();
    let site_average = SiteAverage::new(keep).ok_or_else(|| {
        let reason = format!("{keep} is outside 0 to {}", SiteAverage::KEEP_MAX);
        wrong("rounds.site_average", reason)
    })?;
    let accumulate = accumulated(rounds, site_average)?;
    // A round's options but for the seed, which only bucketing takes: the check is that of the rounds to come.
    let options = Options::for_round(rounds.rule, std::iter::empty(), true);
    let combined = rule(rounds.rule, rounds.byzantine, &options);
    if rounds.rule.withstands(rounds.byzantine).saturating_mul(2) >= rounds.quorum {
        let (f, quorum) = (rounds.byzantine, rounds.quorum);
        let need = f.saturating_mul(2).saturating_add(1);
        return Err(wrong(
            "rounds.byzantine",
            format!(
                "{f} of {quorum} is no minority: set rounds.quorum to {need} or more, or byzantine lower"
            ),
        ));
    }
    // The wire carries the name with every model (`ModelV1.rule`).
    let name = rounds.rule.to_string();
    if name.len() > RULE_BYTES_MAX {
        return Err(wrong(
            "rounds.rule",
            format!("{name} is longer than {RULE_BYTES_MAX} bytes, the most that a model's header carries"),
        ));
    }
    if rounds.rule.base() == Some(Base::Monna) {
        let reason = "monna trusts one site without asking, and a configuration names none: use nnm+trimmed_mean or caf";
        return Err(wrong("rounds.rule", reason.into()));
    }
    combined
        .and_then(|rule| rule.check(rounds.quorum))
        .map_err(|error| {
            let reason = match error {
                // A flag of the command line is no help in a file.
                RuleError::MissingOption { rule, option } => {
                    format!("{rule} needs a {option}, which a configuration cannot give: the norm bound is there already; use another rule")
                }
                other => other.to_string(),
            };
            wrong("rounds.rule", reason)
        })?;
    Ok(CheckedRounds {
        kind: rounds.kind.into(),
        quorum: rounds.quorum,
        deadline: rounds.deadline,
        pause: rounds.pause,
        updates_max: check_updates_max(rounds)?,
        rounds_max: rounds.rounds_max,
        clip_norm,
        noise_multiplier,
        block_rows: rounds.block_rows,
        blocks_min: rounds.blocks_min,
        blocks_max: rounds.blocks_max,
        rule: rounds.rule,
        byzantine: rounds.byzantine,
        late_updates: rounds.late_updates.unwrap_or(true),
        site_average,
        accumulate,
    })
}

/// What of a site's earlier releases is added, unless every round stands alone.
fn accumulated(rounds: &RoundSettings, site_average: SiteAverage) -> Result<Accumulate, ConfigError> {
    count("rounds.moments_keep", rounds.moments_keep.into(), 2, 1_000)?;
    let minute = Duration::from_mins(1);
    span("rounds.moments_age", rounds.moments_age, minute, days(1_000))?;
    let (moments, averaged) = (
        rounds.kind == RoundKind::Moments,
        site_average != SiteAverage::OFF,
    );
    match rounds.accumulate {
        Some(true) if !moments => Err(wrong(
            "rounds.accumulate",
            "only moments of different blocks add up: leave it out with another rounds.kind".into(),
        )),
        Some(true) if averaged => Err(wrong(
            "rounds.accumulate",
            "rounds.site_average weighs a site's earlier updates already: set one of the two".into(),
        )),
        Some(false) => Ok(Accumulate::OFF),
        _ if !moments || averaged => Ok(Accumulate::OFF),
        _ => Ok(Accumulate {
            keep: rounds.moments_keep,
            age_ms: u64::try_from(rounds.moments_age.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

/// A round of more updates than the rule can combine would end without a model, each time.
fn check_updates_max(rounds: &RoundSettings) -> Result<usize, ConfigError> {
    const MOST: usize = 100_000;
    let limit = rounds.rule.rows_max();
    let got = rounds.updates_max.unwrap_or(limit.min(MOST));
    if got > limit {
        return Err(ConfigError::TooManyUpdates {
            rule: rounds.rule,
            updates: got,
            limit,
        });
    }
    if got < rounds.quorum && rounds.updates_max.is_none() {
        return Err(ConfigError::TooManyUpdates {
            rule: rounds.rule,
            updates: rounds.quorum,
            limit,
        });
    }
    count(
        "rounds.updates_max",
        got as u64,
        rounds.quorum as u64,
        MOST as u64,
    )?;
    Ok(got)
}

fn check_limits(limits: LimitSettings) -> Result<LimitSettings, ConfigError> {
    count(
        "limits.connections_max",
        limits.connections_max as u64,
        1,
        100_000,
    )?;
    count(
        "limits.upload_bytes_in_flight_max",
        limits.upload_bytes_in_flight_max as u64,
        1 << 20,
        64 << 30,
    )?;
    count("limits.round_memory_bytes", limits.round_memory_bytes, 0, 1 << 40)?;
    count(
        "limits.messages_per_round_max",
        limits.messages_per_round_max.into(),
        4,
        1_000_000,
    )?;
    count(
        "limits.updates_per_round_max",
        limits.updates_per_round_max.into(),
        1,
        1_000,
    )?;
    count("limits.rounds_kept", limits.rounds_kept, 1, 1_000_000)?;
    count("limits.records_kept", limits.records_kept, 1, 1_000_000)?;
    span(
        "limits.write_timeout",
        limits.write_timeout,
        Duration::from_secs(1),
        Duration::from_mins(10),
    )?;
    Ok(limits)
}

fn wrong(key: &'static str, reason: String) -> ConfigError {
    ConfigError::Value { key, reason }
}

pub(crate) fn count(key: &'static str, got: u64, low: u64, high: u64) -> Result<(), ConfigError> {
    if (low..=high).contains(&got) {
        Ok(())
    } else {
        Err(wrong(key, format!("{got} is outside {low} to {high}")))
    }
}

pub(crate) fn span(
    key: &'static str,
    got: Duration,
    low: Duration,
    high: Duration,
) -> Result<(), ConfigError> {
    if (low..=high).contains(&got) {
        return Ok(());
    }
    let text = humantime::format_duration;
    Err(wrong(
        key,
        format!("{} is outside {} to {}", text(got), text(low), text(high)),
    ))
}

fn days(count: u64) -> Duration {
    Duration::from_hours(count * 24)
}

/// Why noise at the centre needs each site's update of one round alone.
const CENTRAL_NEEDS_ONE: &str = "central_noise bounds what one update of a site does to one round's sum, so neither late nor earlier ones may be in it: leave this out";

/// Longest name of a rule with what runs before it.
const RULE_BYTES_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<CheckedConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aggregator.toml");
        std::fs::write(&path, text).unwrap();
        load(
            &path,
            environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
        )
    }

    #[test]
    fn misspelt_key_gets_a_suggestion() {
        let error = load_text("federation = \"demo\"\n[rounds]\nquorom = 3\n", &[]).unwrap_err();
        assert!(error.to_string().contains("quorom"), "{error}");
        assert_eq!(error.hint(), "did you mean `quorum`?");
    }

    #[test]
    fn environment_overrides_the_file() {
        let config = load_text("federation = \"demo\"", &[("THERIAC__ROUNDS__QUORUM", "7")]).unwrap();
        assert_eq!(config.rounds.quorum, 7);
    }

    #[test]
    fn refuses_values_out_of_range_and_names_key_and_value() {
        let cases: [(&str, &str, &str); 23] = [
            (
                "federation = \"demo\"\n[rounds]\nmoments_keep = 1",
                "rounds.moments_keep",
                "1 is outside 2 to 1000",
            ),
            (
                "federation = \"demo\"\n[rounds]\nkind = \"delta\"\naccumulate = true",
                "rounds.accumulate",
                "only moments",
            ),
            (
                "federation = \"demo\"\n[rounds]\nsite_average = 0.5\naccumulate = true",
                "rounds.accumulate",
                "set one of the two",
            ),
            (
                "federation = \"demo\"\n[rounds]\nrule = \"mean\"\naccumulate = true\n[central_noise]\nenabled = true\nclip_norm = 1.0\nsites = 9",
                "rounds.accumulate",
                "central_noise bounds",
            ),
            (
                "federation = \"demo\"\n[quarantine]\nenter_below = 0.7",
                "quarantine.enter_below",
                "0.7",
            ),
            (
                "federation = \"demo\"\n[server_optimizer]\nname = \"fedadam\"",
                "server_optimizer.name",
                "no step to smooth",
            ),
            (
                "federation = \"demo\"\n[rounds]\nkind = \"delta\"\n[server_optimizer]\nmomentum = 1.0",
                "server_optimizer.momentum",
                "1 is outside 0 to below 1",
            ),
            ("federation = \"De mo\"", "federation", "De mo"),
            ("federation = \"demo\"\nhttp = \"0.0.0.0:1\"", "http", "0.0.0.0:1"),
            (
                "federation = \"demo\"\nadvertise = \"nohost\"",
                "advertise",
                "nohost",
            ),
            (
                "federation = \"demo\"\n[rounds]\nquorum = 0",
                "rounds.quorum",
                "0",
            ),
            (
                "federation = \"demo\"\n[rounds]\nbyzantine = 2\nquorum = 4",
                "rounds.byzantine",
                "2 of 4",
            ),
            (
                "federation = \"demo\"\n[rounds]\ndeadline = \"1ms\"",
                "rounds.deadline",
                "1ms",
            ),
            (
                "federation = \"demo\"\n[rounds]\nclip_norm = -1.0",
                "rounds.clip_norm",
                "-1",
            ),
            (
                "federation = \"demo\"\n[rounds]\nnoise_multiplier = 0.0",
                "rounds.noise_multiplier",
                "0",
            ),
            (
                "federation = \"demo\"\n[rounds]\nkind = \"gradient\"\nrule = \"mean\"\n[central_noise]\nenabled = true\nclip_norm = 1.0\nsites = 9",
                "central_noise.enabled",
                "gradient",
            ),
            (
                "federation = \"demo\"\n[privacy_floor]\nsigners = [\"thpk1_12\"]",
                "privacy_floor.signers",
                "thpk1_12",
            ),
            (
                "federation = \"demo\"\n[privacy_floor]\nnoise_multiplier_min = 0.0",
                "privacy_floor.noise_multiplier_min",
                "0",
            ),
            (
                "federation = \"demo\"\n[rounds]\nblocks_min = 99",
                "rounds.blocks_min",
                "99",
            ),
            (
                "federation = \"demo\"\n[model]\nprofile = \"x\"",
                "model.profile",
                "x",
            ),
            (
                "federation = \"demo\"\n[model]\ndimension = 5",
                "model.dimension",
                "delta",
            ),
            (
                "federation = \"demo\"\n[rounds]\nkind = \"delta\"\n[model]\ndimension = 200000\n[limits]\n\
                 upload_bytes_in_flight_max = 1048576",
                "limits.upload_bytes_in_flight_max",
                "model.dimension",
            ),
            (
                "federation = \"demo\"\n[limits]\nround_memory_bytes = 1099511627777",
                "limits.round_memory_bytes",
                "1099511627777",
            ),
        ];
        for (text, key, value) in cases {
            let error = load_text(text, &[]).unwrap_err().to_string();
            assert!(
                error.starts_with(key) && error.contains(value),
                "{text}\n→ {error}"
            );
        }
    }

    #[test]
    fn gradients_have_their_own_clip_and_noise() {
        let text = |more: &str| format!("federation = \"demo\"\n[rounds]\n{more}");
        let terms = |more: &str| {
            let rounds = load_text(&text(more), &[]).unwrap().rounds;
            (rounds.clip_norm.value(), rounds.noise_multiplier.value())
        };
        assert_eq!(terms(""), (17_200.0, 1.27));
        assert_eq!(terms("block_rows = 60"), (240.0, 1.27));
        assert_eq!(terms("block_rows = 30"), (96.0, 1.27));
        assert_eq!(terms("kind = \"gradient\""), (4.0 * 3590.0, 5.69));
        assert_eq!(terms("kind = \"gradient\"\nblock_rows = 60"), (200.0, 5.69));
        assert_eq!(
            terms("kind = \"gradient\"\nclip_norm = 3.5\nnoise_multiplier = 9.0"),
            (3.5, 9.0)
        );
    }

    #[test]
    fn rules_that_cannot_hold_are_refused_with_the_reason() {
        let load = |rule: &str, quorum: u32| {
            let text = format!("federation = \"demo\"\n[rounds]\nrule = \"{rule}\"\nquorum = {quorum}\n");
            load_text(&text, &[])
        };
        for (rule, quorum, says) in [
            ("krum", 5, "privacy noise"),
            ("bulyan", 6, "n ≥ 4f + 3"),
            ("bucketing+median", 4, "2 buckets"),
            ("nnm", 5, "add a rule"),
            (
                "centered_clipping",
                5,
                "needs a tau, which a configuration cannot give",
            ),
            (
                "clipping+median",
                5,
                "needs a clip, which a configuration cannot give",
            ),
            ("monna", 5, "names none"),
            ("dedup+nnm+geometric_median_converged", 5, "32 bytes"),
        ] {
            let error = load(rule, quorum).unwrap_err().to_string();
            assert!(
                error.starts_with("rounds.rule") && error.contains(says),
                "{rule}: {error}"
            );
        }
        for (rule, quorum) in [
            ("caf", 3),
            ("dedup+nnm+trimmed_mean", 5),
            ("bulyan", 7),
            ("bucketing+median", 5),
        ] {
            assert!(load(rule, quorum).is_ok(), "{rule}");
        }
        assert!(load("best", 5).is_err());
    }

    #[test]
    fn a_round_never_takes_more_updates_than_its_rule_can_combine() {
        let load = |rounds: &str| load_text(&format!("federation = \"demo\"\n[rounds]\n{rounds}"), &[]);
        let most = |rounds: &str| load(rounds).unwrap().rounds.updates_max;
        assert_eq!(most(""), 2_048);
        assert_eq!(most("rule = \"bucketing+caf\"\nquorum = 7"), 4_096);
        assert_eq!(most("rule = \"trimmed_mean\""), 100_000);
        assert_eq!(most("updates_max = 50"), 50);
        for rounds in ["updates_max = 2049", "quorum = 3000"] {
            let error = load(rounds).unwrap_err();
            assert!(
                error.to_string().starts_with("rounds.updates_max: rule `caf`"),
                "{error}"
            );
            assert!(
                error.hint().contains("2048") && error.hint().contains("trimmed_mean"),
                "{}",
                error.hint()
            );
        }
        assert!(
            load("updates_max = 2")
                .unwrap_err()
                .to_string()
                .contains("rounds.updates_max")
        );
    }

    #[test]
    fn mean_needs_no_honest_majority() {
        let text = "federation = \"demo\"\n[rounds]\nrule = \"mean\"\nquorum = 1\n";
        assert!(load_text(text, &[]).is_ok());
    }
}
