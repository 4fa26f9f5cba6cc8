//! `privacy.toml`: what compliance permits. The edge obeys it; the centre may ask for more privacy, never for less.
//!
//! The file is separate from `edge.toml` so that another person can own it. Unknown keys are refused, because a
//! misspelt limit would be no limit. It is signed by that person (see [`signed`]) and carries a version, so that neither an edited
//! nor an older one is taken.

mod period;
pub mod signed;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Digest, Epsilon, NodeId, NoiseMultiplier};

pub use self::period::Period;
use self::signed::{PolicySignature, SignatureError, signature_path};
use crate::windows::{RecordWindows, WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN};

/// What the guarantee hides: neighbouring data sets differ by one unit, present or absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrivacyUnit {
    /// Everything that one node measured during one block of time.
    Block,
    /// One sample of one node.
    ///
    /// Blocks are cut into windows ([`crate::windows`]), each clipped to its part of C: a sample moves the sum by at most m/n·C. Where a release has
    /// one vector for each block instead, one sample can move that from one point of the clipping ball to any other: sensitivity 2C.
    Record,
    /// Everything that one site ever contributes. Only a trusted centre promises it (see [`crate::central`]); an edge has no policy with it.
    Node,
}

impl PrivacyUnit {
    /// Sensitivity of a release in multiples of the clipping norm C, under add or remove one unit.
    ///
    /// - [`UpdateKind::Moments`] and [`UpdateKind::Gradient`], block unit: a block adds one vector of norm at most C to the sum: 1.
    /// - The same, record unit, without windows: a sample replaces one such vector by another: 2. With windows it is
    ///   [`BlockWindows::sensitivity`](crate::windows::BlockWindows::sensitivity).
    /// - [`UpdateKind::Delta`]: one vector of norm at most C is made of *all* the node's data, so any change
    ///   replaces it by another: 2, whatever the unit, and every block is charged.
    /// - node unit: a site adds one vector of norm at most C to the centre's sum: 1.
    pub fn sensitivity(self, kind: UpdateKind) -> f64 {
        match (self, kind) {
            (Self::Block, UpdateKind::Moments | UpdateKind::Gradient) | (Self::Node, _) => 1.0,
            (Self::Record, UpdateKind::Moments | UpdateKind::Gradient) | (_, UpdateKind::Delta) => 2.0,
        }
    }
}

impl fmt::Display for PrivacyUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "block",
            Self::Record => "record",
            Self::Node => "node",
        })
    }
}

/// Why a policy was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file could not be read.
    #[error("cannot read the privacy policy {path}: {source}; create it from the example in docs/privacy.md")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nobody has signed it.
    #[error(
        "{path} is not signed: there is no {}; whoever answers for privacy reads it and runs `theriac-edge privacy sign {}`",
        signature_path(.path).display(), .path.display()
    )]
    Unsigned {
        /// Which file.
        path: PathBuf,
    },
    /// Its signature does not hold.
    #[error(
        "{path}: {source}; restore the signed file, or have it read and signed anew with `theriac-edge privacy sign`"
    )]
    Signature {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: SignatureError,
    },
    /// It is no TOML, has an unknown key, lacks one, or a value has the wrong type or range.
    #[error("the privacy policy does not parse: {0}")]
    Parse(#[from] toml::de::Error),
    /// A value is outside its range.
    #[error("privacy policy: `{key}` must be {range}, got {got}; {consequence}")]
    Range {
        /// The key.
        key: &'static str,
        /// The values that hold, in words.
        range: &'static str,
        /// The value that was refused.
        got: String,
        /// What would go wrong.
        consequence: &'static str,
    },
}

/// The file as written. Every field: meaning, unit, default, range, and what goes wrong at either end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    /// Version of this format. Default 1; only 1 is known.
    #[serde(default = "format")]
    format: u32,
    /// Number of this policy. Default 1, at least 1. Every change of meaning needs a higher one; a node refuses a lower
    /// one than it has seen, so that an older, looser policy cannot be put back.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    version: u64,
    /// The node that this policy is for; must equal the node's name. No default: a policy copied to another
    /// node must not be taken by accident.
    site: NodeId,
    /// `"block"` or `"record"`. Default `"block"`. A record costs a part of a block's noise (see [`crate::windows`]) and hides less.
    #[serde(default = "unit")]
    unit: PrivacyUnit,
    /// Only with unit `"record"`: samples of one window, which is clipped as a whole. Default 60, range 11 to 86 400, at most the samples of a
    /// block. Too short: a window says little, and the aggregator's vet may turn what comes of it down. Too long: few windows, more noise for the same ε.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record_window: Option<u32>,
    /// Only with unit `"record"`: samples from the beginning of one window to that of the next. Default `record_window`, range 1 to 86 400. Shorter: a
    /// sample takes part in more windows, and each is charged. Longer: samples between windows are not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record_stride: Option<u32>,
    /// Two data sets are neighbours when one has one unit more. Only `"add_or_remove"` (the default) is known; written out so
    /// that the officer signs it.
    #[serde(default, skip_serializing_if = "is_default")]
    neighbouring: Neighbouring,
    /// Length of one block in time, such as `"1h"`. Default one hour, range 1 s to 31 days, whole milliseconds.
    /// Too short: an event longer than a block is not hidden. Too long: few blocks, so the noise outweighs the sum.
    /// A ledger keeps the length it began with.
    #[serde(default = "block", with = "span")]
    block: Duration,
    /// Largest ε that any one unit may lose within one `period`, at `delta`. No default, above 0, at most 100. Below about 0.5 the
    /// noise leaves little to learn; above about 10 the promise is weak.
    epsilon: Epsilon,
    /// δ of the guarantee. Default 1e-6, above 0, at most 1e-3. Choose at most 1 / (10 × units). Too large: the guarantee may
    /// simply fail for one unit in 1/δ.
    #[serde(default = "delta")]
    delta: Delta,
    /// Time over which `epsilon` holds: `"rolling"` (the default: for ever, each block on its own), or the calendar's `"month"`,
    /// `"quarter"` or `"year"` in UTC. A new period is a new limit but no reset: reports say the loss of the period and of all time.
    #[serde(default, skip_serializing_if = "is_default")]
    period: Period,
    /// Least noise multiplier σ that the node accepts. Default 0.7, above 0, at most 10 000. Too low: one release may
    /// spend the whole budget. Too high: the node declines every round.
    #[serde(default = "noise_multiplier_min")]
    noise_multiplier_min: NoiseMultiplier,
    /// Largest sampling rate q of one step. Default 1, above 0, at most 1. Too low: full-batch releases (q = 1) are declined.
    #[serde(default = "full_batch", skip_serializing_if = "is_full_batch")]
    sampling_rate_max: f64,
    /// Most steps T of one release. Default 1 000, range 1 to 1 000 000. Too low: training stops early. Too high: only ε limits.
    #[serde(default = "steps_max", skip_serializing_if = "is_steps_max")]
    steps_max: u32,
    /// Age at which a block is never read again, such as `"90days"`; absent: no limit. At least one block. Too short: no block is
    /// ever ready. It bounds the time in which a block can lose anything.
    #[serde(default, with = "optional_span", skip_serializing_if = "Option::is_none")]
    retention: Option<Duration>,
    /// Releases that may read the same block. Default 1, range 1 to 1 000. Above 1 the charges of a block add
    /// up.
    #[serde(default = "block_releases_max")]
    block_releases_max: u32,
    /// Releases in the node's whole life; absent: no limit besides ε. At least 1. Too low: the node falls silent.
    #[serde(skip_serializing_if = "Option::is_none")]
    releases_max: Option<u64>,
    /// What may be released: `"moments"`, `"gradient"`, `"delta"`. Default `["moments"]`. `"gradient"` reads the same blocks in every round, so
    /// it needs `block_releases_max` of 20 or more. `"delta"` is charged to every block, past and future, so it runs out.
    #[serde(default = "mechanisms")]
    mechanisms: BTreeSet<Mechanism>,
}

/// A way of releasing something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mechanism {
    Moments,
    Delta,
    Gradient,
}

/// The neighbouring relation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Neighbouring {
    #[default]
    AddOrRemove,
}

/// A checked privacy policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    raw: RawPolicy,
    hash: Digest,
    text: String,
    signature: Option<PolicySignature>,
}

impl Policy {
    /// A policy file with every key and its meaning; a test parses it.
    pub fn example() -> &'static str {
        EXAMPLE
    }

    /// Reads and checks a policy file, whoever wrote it. An edge takes only signed ones: [`Policy::load_signed`].
    ///
    /// # Errors
    /// [`PolicyError`], naming the file or the key.
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let text = std::fs::read_to_string(path).map_err(|source| PolicyError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text)
    }

    /// Checks a policy's text.
    ///
    /// # Errors
    /// [`PolicyError::Parse`] and [`PolicyError::Range`]; the unit `node` is no site's to promise.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let policy = Self::parse_any(text)?;
        if policy.unit() == PrivacyUnit::Node {
            return Err(PolicyError::Range {
                key: "unit",
                range: "\"block\" or \"record\"",
                got: "node".to_owned(),
                consequence: "only a trusted centre can promise to hide a whole node, in its own ledger",
            });
        }
        Ok(policy)
    }

    /// As [`Policy::parse`], and what a centre promises as well.
    pub(crate) fn parse_any(text: &str) -> Result<Self, PolicyError> {
        let raw: RawPolicy = toml::from_str(text)?;
        raw.check()?;
        // Of the meaning, not of the text: field order and defaults are the struct's.
        let canonical = serde_json::to_vec(&raw)
            .map_err(serde::de::Error::custom)
            .map_err(PolicyError::Parse)?;
        let hash = Sha256::new()
            .chain_update(b"theriac privacy policy v1\n")
            .chain_update(canonical);
        Ok(Self {
            raw,
            hash: Digest(hash.finalize().into()),
            text: text.to_owned(),
            signature: None,
        })
    }

    /// The node that the policy is for.
    pub fn site(&self) -> &NodeId {
        &self.raw.site
    }

    /// What is hidden.
    pub fn unit(&self) -> PrivacyUnit {
        self.raw.unit
    }

    /// How blocks are cut into windows; `None` unless the unit is a record.
    pub fn record_windows(&self) -> Option<RecordWindows> {
        let raw = &self.raw;
        let window = raw.record_window.unwrap_or(WINDOW_DEFAULT);
        let windows = RecordWindows::new(window, raw.record_stride.unwrap_or(window)).ok();
        windows.filter(|_| raw.unit == PrivacyUnit::Record)
    }

    /// Length of one block. A block's id is its Unix time divided by this length, so blocks are aligned to UTC.
    pub fn block_span(&self) -> Duration {
        self.raw.block
    }

    /// The file as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Who signed it; `None` for a policy that was only parsed.
    pub fn signature(&self) -> Option<&PolicySignature> {
        self.signature.as_ref()
    }

    pub(crate) fn with_signature(self, signature: PolicySignature) -> Self {
        Self {
            signature: Some(signature),
            ..self
        }
    }

    /// Number of this policy.
    pub fn version(&self) -> u64 {
        self.raw.version
    }

    /// Time over which ε holds.
    pub fn period(&self) -> Period {
        self.raw.period
    }

    /// Largest sampling rate of one step.
    pub fn sampling_rate_max(&self) -> f64 {
        self.raw.sampling_rate_max
    }

    /// Most steps of one release.
    pub fn steps_max(&self) -> u32 {
        self.raw.steps_max
    }

    /// Age at which a block is never read again.
    pub fn retention(&self) -> Option<Duration> {
        self.raw.retention
    }

    /// Largest ε of any unit.
    pub fn epsilon(&self) -> Epsilon {
        self.raw.epsilon
    }

    /// δ at which ε is computed.
    pub fn delta(&self) -> Delta {
        self.raw.delta
    }

    /// Least σ the node accepts.
    pub fn noise_multiplier_min(&self) -> NoiseMultiplier {
        self.raw.noise_multiplier_min
    }

    /// Releases in the node's whole life, if limited.
    pub fn releases_max(&self) -> Option<u64> {
        self.raw.releases_max
    }

    /// Releases that may read the same block.
    pub fn block_releases_max(&self) -> u32 {
        self.raw.block_releases_max
    }

    /// Whether updates of this kind may be released.
    pub fn allows(&self, kind: UpdateKind) -> bool {
        self.raw.mechanisms.contains(&match kind {
            UpdateKind::Moments => Mechanism::Moments,
            UpdateKind::Delta => Mechanism::Delta,
            UpdateKind::Gradient => Mechanism::Gradient,
        })
    }

    /// Digest of what the policy says, independent of comments and key order. Stored in every charge.
    pub fn hash(&self) -> Digest {
        self.hash
    }
}

impl RawPolicy {
    fn check(&self) -> Result<(), PolicyError> {
        let range = |ok: bool, key, range, got: String, consequence| {
            if ok {
                Ok(())
            } else {
                Err(PolicyError::Range {
                    key,
                    range,
                    got,
                    consequence,
                })
            }
        };
        range(
            self.format == 1,
            "format",
            "1",
            self.format.to_string(),
            "this build knows no other format",
        )?;
        let block_ok = self.block >= Duration::from_secs(1)
            && self.block <= BLOCK_MAX
            && self.block.subsec_nanos().is_multiple_of(1_000_000);
        range(
            block_ok,
            "block",
            "1s to 31days in whole milliseconds",
            humantime::format_duration(self.block).to_string(),
            "blocks are the unit that is protected, and are counted in milliseconds",
        )?;
        for (key, value, fewest, range_words) in [
            ("record_window", self.record_window, WINDOW_MIN, "11 to 86400"),
            ("record_stride", self.record_stride, 1, "1 to 86400"),
        ] {
            range(
                value.is_none_or(|value| (fewest..=WINDOW_MAX).contains(&value)),
                key,
                range_words,
                value.unwrap_or_default().to_string(),
                "a window holds a value and its ten lags, and the next one begins later",
            )?;
            range(
                value.is_none() || self.unit == PrivacyUnit::Record,
                key,
                "absent unless unit = \"record\"",
                value.unwrap_or_default().to_string(),
                "whole blocks are not cut",
            )?;
        }
        range(
            self.epsilon.value() <= EPSILON_MAX,
            "epsilon",
            "above 0 and at most 100",
            self.epsilon.to_string(),
            "a larger one protects nothing",
        )?;
        range(
            self.delta.value() <= DELTA_MAX,
            "delta",
            "above 0 and at most 0.001",
            self.delta.to_string(),
            "the guarantee may fail outright with this probability",
        )?;
        range(
            self.noise_multiplier_min.value() <= NOISE_MULTIPLIER_MAX,
            "noise_multiplier_min",
            "above 0 and at most 10000",
            self.noise_multiplier_min.to_string(),
            "no round would ever be joined",
        )?;
        range(
            self.version >= 1,
            "version",
            "at least 1",
            self.version.to_string(),
            "versions are counted from 1",
        )?;
        range(
            self.sampling_rate_max > 0.0 && self.sampling_rate_max <= 1.0,
            "sampling_rate_max",
            "above 0 and at most 1",
            self.sampling_rate_max.to_string(),
            "it is a probability",
        )?;
        range(
            (1..=STEPS_MAX).contains(&self.steps_max),
            "steps_max",
            "1 to 1000000",
            self.steps_max.to_string(),
            "0 forbids every release",
        )?;
        range(
            self.retention.is_none_or(|retention| retention >= self.block),
            "retention",
            "at least one block, or absent",
            self.retention
                .map(|span| humantime::format_duration(span).to_string())
                .unwrap_or_default(),
            "a block would be too old before it is complete",
        )?;
        range(
            (1..=BLOCK_RELEASES_MAX).contains(&self.block_releases_max),
            "block_releases_max",
            "1 to 1000",
            self.block_releases_max.to_string(),
            "0 forbids every release",
        )?;
        range(
            self.releases_max != Some(0),
            "releases_max",
            "at least 1, or absent",
            "0".to_owned(),
            "0 forbids every release; remove the federation section of edge.toml instead",
        )?;
        range(
            !self.mechanisms.is_empty(),
            "mechanisms",
            "a list of \"moments\", \"gradient\" and \"delta\"",
            "[]".to_owned(),
            "an empty list forbids every release; remove the federation section of edge.toml instead",
        )
    }
}

/// Durations as words: `"1h"`, `"90s"`.
mod span {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*span))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|error| {
            D::Error::custom(format!(
                "`{text}` is no duration ({error}); write \"1h\" or \"90s\""
            ))
        })
    }
}

/// As [`span`], for a key that may be absent.
mod optional_span {
    use std::time::Duration;

    use serde::{Deserializer, Serializer};

    #[expect(clippy::ref_option, reason = "serde hands the field over like this")]
    pub(super) fn serialize<S: Serializer>(
        span: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match span {
            Some(span) => super::span::serialize(span, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        super::span::deserialize(deserializer).map(Some)
    }
}

// Keys that came after format 1 was first shipped are left out of the hash while they have their default: the hash of a policy that
// does not know them stays what it was.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn format() -> u32 {
    1
}

fn one() -> u64 {
    1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands the field over like this"
)]
fn is_one(version: &u64) -> bool {
    *version == one()
}

fn full_batch() -> f64 {
    1.0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands the field over like this"
)]
fn is_full_batch(rate: &f64) -> bool {
    rate.to_bits() == full_batch().to_bits()
}

fn steps_max() -> u32 {
    1_000
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde hands the field over like this"
)]
fn is_steps_max(steps: &u32) -> bool {
    *steps == steps_max()
}

fn unit() -> PrivacyUnit {
    PrivacyUnit::Block
}

fn block() -> Duration {
    Duration::from_hours(1)
}

#[expect(
    clippy::expect_used,
    reason = "the constant lies in range; a test parses a policy without the key"
)]
fn delta() -> Delta {
    Delta::new(1e-6).expect("1e-6 lies between 0 and 1")
}

#[expect(
    clippy::expect_used,
    reason = "the constant lies in range; a test parses a policy without the key"
)]
fn noise_multiplier_min() -> NoiseMultiplier {
    NoiseMultiplier::new(0.7).expect("0.7 is above 0")
}

fn block_releases_max() -> u32 {
    1
}

fn mechanisms() -> BTreeSet<Mechanism> {
    BTreeSet::from([Mechanism::Moments])
}

const BLOCK_MAX: Duration = Duration::from_hours(31 * 24);
const EPSILON_MAX: f64 = 100.0;
const DELTA_MAX: f64 = 1e-3;
const NOISE_MULTIPLIER_MAX: f64 = 10_000.0;
const BLOCK_RELEASES_MAX: u32 = 1_000;
const STEPS_MAX: u32 = 1_000_000;

const EXAMPLE: &str = include_str!("../../privacy.example.toml");

#[cfg(test)]
mod tests {
    use super::*;

    const SHORTEST: &str = "site = \"site-a\"\nepsilon = 4\n";

    fn with(line: &str) -> Result<Policy, PolicyError> {
        let key = line.split('=').next().unwrap().trim();
        let rest: String = SHORTEST
            .lines()
            .filter(|l| !l.starts_with(key))
            .flat_map(|l| [l, "\n"])
            .collect();
        Policy::parse(&format!("{rest}{line}\n"))
    }

    #[test]
    fn the_example_parses_and_holds_every_key() {
        let policy = Policy::parse(Policy::example()).unwrap();
        let mut raw = serde_json::to_value(&policy.raw).unwrap();
        let left_out = [
            "releases_max",
            "version",
            "neighbouring",
            "period",
            "sampling_rate_max",
            "steps_max",
            "retention",
            "record_window",
            "record_stride",
        ];
        for key in left_out {
            raw.as_object_mut().unwrap().insert(key.into(), 1.into());
        }
        for key in raw.as_object().unwrap().keys() {
            let named = Policy::example().lines().any(|line| {
                line.trim_start_matches("# ")
                    .split('=')
                    .next()
                    .is_some_and(|word| word.trim() == key)
            });
            assert!(named, "`{key}` is missing from the example");
        }
    }

    #[test]
    fn the_shortest_policy_has_the_documented_defaults() {
        let policy = Policy::parse(SHORTEST).unwrap();
        assert_eq!(policy.unit(), PrivacyUnit::Block);
        assert_eq!(policy.block_span(), Duration::from_hours(1));
        assert!((policy.delta().value() - 1e-6).abs() < 1e-18);
        assert!((policy.noise_multiplier_min().value() - 0.7).abs() < 1e-15);
        assert_eq!((policy.block_releases_max(), policy.releases_max()), (1, None));
        assert!(policy.allows(UpdateKind::Moments) && !policy.allows(UpdateKind::Delta));
    }

    #[test]
    fn records_are_cut_into_windows_side_by_side_unless_the_policy_says_otherwise() {
        let windows = |line: &str| with(line).unwrap().record_windows();
        assert_eq!(windows("unit = \"block\""), None);
        assert_eq!(windows("unit = \"record\""), RecordWindows::new(60, 60).ok());
        assert_eq!(
            windows("unit = \"record\"\nrecord_window = 30"),
            RecordWindows::new(30, 30).ok()
        );
        assert_eq!(
            windows("unit = \"record\"\nrecord_window = 30\nrecord_stride = 10"),
            RecordWindows::new(30, 10).ok()
        );
    }

    #[test]
    fn refuses_what_would_be_no_limit() {
        for bad in [
            "epsilon = 0",
            "epsilon = -1.0",
            "epsilon = nan",
            "epsilon = inf",
            "epsilon = 101",
            "delta = 0",
            "delta = 1",
            "delta = 1.5",
            "delta = nan",
            "delta = 0.01",
            "noise_multiplier_min = 0",
            "noise_multiplier_min = nan",
            "noise_multiplier_min = 1e5",
            "block = \"0s\"",
            "block = \"1ms\"",
            "block = \"32days\"",
            "block = \"1s 1us\"",
            "block = 3600",
            "block_releases_max = 0",
            "block_releases_max = 1001",
            "releases_max = 0",
            "mechanisms = []",
            "mechanisms = [\"none\"]",
            "unit = \"off\"",
            "record_window = 10",
            "record_window = 60",
            "record_stride = 60",
            "unit = \"record\"\nrecord_window = 86401",
            "unit = \"record\"\nrecord_stride = 0",
            "neighbouring = \"replace\"",
            "period = \"week\"",
            "version = 0",
            "sampling_rate_max = 0.0",
            "sampling_rate_max = 1.5",
            "sampling_rate_max = nan",
            "steps_max = 0",
            "steps_max = 1000001",
            "retention = \"30m\"",
            "format = 2",
            "site = \"A b\"",
            "epsilom = 4",
        ] {
            let refused = with(bad);
            assert!(refused.is_err(), "`{bad}` was taken");
            let message = refused.unwrap_err().to_string();
            let key = bad.lines().last().unwrap().split('=').next().unwrap().trim();
            assert!(
                message.contains(key),
                "`{bad}`: the message does not name the key: {message}"
            );
        }
        assert!(Policy::parse("epsilon = 4").is_err() && Policy::parse("site = \"a\"").is_err());
    }

    #[test]
    fn hash_follows_the_meaning_and_not_the_spelling() {
        let policy = Policy::parse(SHORTEST).unwrap();
        let same = Policy::parse("# comment\nepsilon = 4.0\nblock = \"60m\"\nsite = \"site-a\"").unwrap();
        assert_eq!(policy.hash(), same.hash());
        let spelt_out = format!(
            "{SHORTEST}version = 1\nneighbouring = \"add_or_remove\"\nperiod = \"rolling\"\nsampling_rate_max = 1.0\nsteps_max = 1000\n"
        );
        assert_eq!(policy.hash(), Policy::parse(&spelt_out).unwrap().hash());
        // Of version 0.1: a ledger that holds it needs no new record for keys that are at their defaults.
        assert_eq!(
            policy.hash().to_string(),
            "02de9e4a893892144315c4dc56a108cbb16622c897308740600b96ddeff7e061"
        );
        for other in [
            "epsilon = 4.5",
            "delta = 1e-7",
            "block = \"2h\"",
            "releases_max = 9",
            "unit = \"record\"",
            "unit = \"record\"\nrecord_stride = 60",
            "version = 2",
            "period = \"month\"",
            "sampling_rate_max = 0.5",
            "steps_max = 20",
            "retention = \"90days\"",
        ] {
            assert_ne!(
                with(other).unwrap().hash(),
                policy.hash(),
                "`{other}` left the hash unchanged"
            );
        }
    }
}
