//! What an honest row cannot be: the tests whose failure counts against a site.
//!
//! Every honest update carries Gaussian noise of a known standard deviation s = σC on each value, on top of a signal: a vector
//! clipped to C (delta), or sums whose squares and products `Σ p pᵀ` form a positive semi-definite matrix (moments). From this alone, and
//! whatever data the sites have, follows what holds for an honest row except with a probability below 1e-8 a test
//! ([`DEVIATIONS`] standard deviations). Nothing here compares a site with what is usual in its fleet, so a site that
//! merely differs is never held against it.
//!
//! - **opposed**: the inner product with another honest row obeys a law, see [`product_limits`]. An honest row breaks it with hostile
//!   rows at most, so only a row that breaks it with more than f others is inconsistent: f colluders cannot frame anybody.
//! - **`too_little_noise`**: ‖s + z‖² of an honest row is at least s²(d − 6√(2d) − 36) ([`energy_floor`]).
//! - **`noise_law`**: the values of a delta are near `N(0, s²)` (Kolmogorov–Smirnov), since its signal is at most C in all.
//! - **`near_copy`**: two honest rows have independent noise, so their distance has the same floor with both variances. Who copied
//!   whom cannot be told: this is evidence on the group, and counts for nobody and against nobody.

use serde::{Deserialize, Serialize};
use theriac_protocol::message::{Encoding, UpdateKind, UpdateV1};

use super::measure::{Pairs, RowMeasure};

/// Standard deviations that an honest row may be away from what is expected: beyond six lies less than 2e-9 of a normal law.
pub const DEVIATIONS: f64 = 6.0;
/// Critical value of Kolmogorov's distribution times √d: exceeded with probability 2·exp(−2·3.1²) < 1e-8.
const KOLMOGOROV: f64 = 3.1;
/// What stochastic rounding to int8 adds to a norm at most, as in validation.
const ROUNDING: f64 = 1.02;
/// Names of a group that a record keeps.
const NAMES_MAX: usize = 5;

/// The law of one honest row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLaw {
    /// What the row is.
    pub kind: UpdateKind,
    /// Standard deviation of the noise on each value: σC of the round's terms, or as the site claims them where that is more.
    pub noise_std: f64,
    /// Most that a clipped delta measures before noise, C. Of no use for moments.
    pub clip_norm: f64,
    /// Distance between two representable values; 0 for `f32`.
    pub step: f64,
}

impl RowLaw {
    /// From the update's own header, with `noise`, the σC of the round's terms, as the least that it must carry.
    pub fn of(header: &UpdateV1, noise: f64) -> Self {
        let clip_norm = header.privacy.clip_norm.value();
        Self {
            kind: header.kind,
            noise_std: (header.privacy.noise_multiplier.value() * clip_norm).max(noise),
            clip_norm,
            step: match header.encoding {
                Encoding::F32 => 0.0,
                Encoding::Int8 { scale } => f64::from(scale),
            },
        }
    }

    /// The standard deviation against which the shape of the values is tested; `None` where a signal of unknown size lies under it.
    pub fn tested_std(&self) -> Option<f64> {
        (self.kind == UpdateKind::Delta && self.noise_std > 0.0).then_some(self.noise_std)
    }
}

/// Something that an honest row cannot be, with its figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// Its inner products with others break the law of honest pairs.
    Opposed {
        /// With how many others.
        others: u64,
        /// Among how many.
        of: u64,
        /// More than so many count: f, and 1 at least.
        limit: u64,
    },
    /// Its norm is smaller than the noise that it must carry.
    TooLittleNoise {
        /// Its norm.
        norm: f64,
        /// The least that noise gives.
        limit: f64,
    },
    /// Its values do not have the shape of the noise that it must carry.
    NoiseLaw {
        /// Kolmogorov–Smirnov distance.
        distance: f64,
        /// The most that chance and the signal give.
        limit: f64,
    },
    /// It shares its noise with other rows: one is a copy of another.
    NearCopy {
        /// Others of the group, at most five names.
        others: Vec<String>,
    },
    /// The mean of its releases is that of no series: with less noise the vet sees what one of them hides. What it released is added no more. As with a single one
    /// the bounds are those of recorded hosts, so this counts for and against nobody.
    NoSeries {
        /// Releases in the mean.
        releases: u64,
        /// Which sum.
        what: String,
        /// What it is.
        found: f64,
        /// Its bound.
        bound: f64,
    },
    /// Its update was refused for what it held.
    Refused {
        /// The refusal's word.
        code: String,
        /// What was found beside what was expected.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
}

/// What a round says about a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As an honest row is.
    Consistent,
    /// As no honest row is.
    Inconsistent,
    /// Nothing that counts for or against the site.
    Neutral,
}

impl Verdict {
    /// From the findings of a row that was measured.
    pub fn of(findings: &[Finding]) -> Self {
        let group = |finding: &Finding| match finding {
            Finding::NearCopy { .. } | Finding::NoSeries { .. } => true,
            Finding::Refused { code, .. } => !super::tells(code),
            Finding::Opposed { .. } | Finding::TooLittleNoise { .. } | Finding::NoiseLaw { .. } => false,
        };
        if findings.iter().any(|finding| !group(finding)) {
            Self::Inconsistent
        } else if findings.iter().any(group) {
            Self::Neutral
        } else {
            Self::Consistent
        }
    }
}

/// The findings about every row. `names`, `laws` and `measures` are in the order of the rows; f is the assumed number of hostile ones.
pub fn findings(
    names: &[String],
    laws: &[RowLaw],
    measures: &[RowMeasure],
    dimension: usize,
    pairs: &PairSets,
    byzantine: usize,
) -> Vec<Vec<Finding>> {
    let n = names.len();
    let quiet: Vec<Option<Finding>> = (0..n)
        .map(|row| too_little_noise(&laws[row], &measures[row], dimension))
        .collect();
    let groups = pairs.all.as_ref().map(|all| copies(all, laws, &quiet));
    (0..n)
        .map(|row| {
            let mut findings = Vec::new();
            let copied = |other: usize| groups.as_ref().is_some_and(|groups| groups[row].contains(&other));
            if let Some(signed) = &pairs.signed {
                let others = (0..n).filter(|&other| other != row && !copied(other));
                let (mut broken, mut of) = (0, 0);
                for other in others {
                    of += 1;
                    broken += u64::from(breaks(signed, laws, row, other));
                }
                // One hostile site there may always be, else each of two that oppose one another would be one.
                let limit = byzantine.max(1) as u64;
                if broken > limit {
                    findings.push(Finding::Opposed {
                        others: broken,
                        of,
                        limit,
                    });
                }
            }
            let (law, measure) = (&laws[row], &measures[row]);
            findings.extend(quiet[row].clone());
            if let Some(distance) = measure.noise_distance {
                let limit = noise_law_limit(law, dimension);
                if distance > limit {
                    findings.push(Finding::NoiseLaw { distance, limit });
                }
            }
            if let Some(group) = groups
                .as_ref()
                .map(|groups| &groups[row])
                .filter(|group| !group.is_empty())
            {
                let others = group.iter().take(NAMES_MAX).map(|&other| names[other].clone());
                findings.push(Finding::NearCopy {
                    others: others.collect(),
                });
            }
            findings
        })
        .collect()
}

/// Inner products over all values, and over those whose sign has a law.
#[derive(Debug, Clone, PartialEq)]
pub struct PairSets {
    /// Over all values.
    pub all: Option<Pairs>,
    /// Over the values with a law: all of a delta, the squares and products of moments.
    pub signed: Option<Pairs>,
}

fn too_little_noise(law: &RowLaw, measure: &RowMeasure, dimension: usize) -> Option<Finding> {
    let limit = energy_floor(law.noise_std.powi(2), dimension)?.sqrt();
    (measure.norm < limit).then_some(Finding::TooLittleNoise {
        norm: measure.norm,
        limit,
    })
}

/// For each row the rows that share its noise. A row without noise of its own is near to everybody and a copy of nobody.
fn copies(pairs: &Pairs, laws: &[RowLaw], quiet: &[Option<Finding>]) -> Vec<Vec<usize>> {
    let n = laws.len();
    let copied = |one: usize, other: usize| {
        let variance = laws[one].noise_std.powi(2) + laws[other].noise_std.powi(2);
        let noisy = quiet[one].is_none() && quiet[other].is_none();
        noisy
            && energy_floor(variance, pairs.values)
                .is_some_and(|floor| pairs.distance_squared(one, other) < floor)
    };
    (0..n)
        .map(|row| {
            (0..n)
                .filter(|&other| other != row && copied(row, other))
                .collect()
        })
        .collect()
}

/// Least ‖s + z‖² of any signal s with noise z of this variance on `values` values. With ‖s‖ = a, ‖s + z‖² exceeds
/// a² + v·d − 6(2a√v) − 6v√(2d) (Laurent and Massart 2000, lemma 1, with room for the square root); its least value over a is at
/// a = 6√v. `None` where that is no more than zero: too few values for a law.
pub fn energy_floor(variance: f64, values: usize) -> Option<f64> {
    let d = values as f64;
    let floor = variance * (d - DEVIATIONS * (2.0 * d).sqrt() - DEVIATIONS.powi(2));
    (floor > 0.0).then_some(floor)
}

/// The most that the Kolmogorov–Smirnov distance of an honest delta reaches: chance, the mean of the signal (at most C/√d a value)
/// and the steps of int8, each through the greatest slope of the normal distribution function, 0.4; and the signal's square.
fn noise_law_limit(law: &RowLaw, values: usize) -> f64 {
    let (root, std) = ((values.max(1) as f64).sqrt(), law.noise_std);
    let signal = law.clip_norm / (std * root);
    KOLMOGOROV / root + 0.4 * (signal + law.step / std) + 0.13 * signal * signal
}

fn breaks(pairs: &Pairs, laws: &[RowLaw], one: usize, other: usize) -> bool {
    let (low, high) = product_limits(pairs, laws, one, other);
    let product = pairs.product(one, other);
    product < low || product > high
}

/// Between which limits the inner product of two honest rows lies. With signals a, b, noise z, y of standard deviations s, t:
/// (a + z)·(b + y) = a·b + a·y + z·(b + y), where z is independent of the whole other row, so |z·(b + y)| ≤ 6s‖b + y‖; and
///
/// - delta: |a·b| ≤ C², |a·y| ≤ 6Ct.
/// - moments: a·b ≥ 0, because the Frobenius product of positive semi-definite matrices is (and off-diagonal values carry the √2 that
///   makes it so); |a·y| ≤ 6t‖a‖ with ‖a‖ ≤ ‖a + z‖ + s(√k + 6). No upper limit: honest hosts are alike.
///
/// - gradients: no law. Unlike sites may rightly pull against each other, each with all of its blocks.
///
/// The same holds with the rows exchanged, and the narrower of the two limits counts.
pub fn product_limits(pairs: &Pairs, laws: &[RowLaw], one: usize, other: usize) -> (f64, f64) {
    let narrower = one_way(pairs, laws, one, other).min(one_way(pairs, laws, other, one));
    match laws[one].kind {
        UpdateKind::Delta => (-ROUNDING * narrower, ROUNDING * narrower),
        UpdateKind::Moments => (-ROUNDING * narrower, f64::INFINITY),
        UpdateKind::Gradient => (f64::NEG_INFINITY, f64::INFINITY),
    }
}

fn one_way(pairs: &Pairs, laws: &[RowLaw], one: usize, other: usize) -> f64 {
    let norm = |row: usize| pairs.product(row, row).max(0.0).sqrt();
    let (law, with) = (&laws[one], &laws[other]);
    let (s, t) = (law.noise_std, with.noise_std);
    let (products, signal) = match law.kind {
        UpdateKind::Delta => (law.clip_norm * with.clip_norm, law.clip_norm),
        UpdateKind::Moments | UpdateKind::Gradient => {
            let noise = s * ((pairs.values as f64).sqrt() + DEVIATIONS);
            (0.0, norm(one) + noise)
        }
    };
    products + DEVIATIONS * (signal * t + s * norm(other))
}

#[cfg(test)]
mod tests {
    use theriac_protocol::compress::encode_f32;

    use super::*;
    use crate::evidence::measure;
    use crate::robust::{PayloadRows, Row};

    /// Normal numbers from a seed (`SplitMix64`, Box–Muller).
    fn normal(state: &mut u64) -> f64 {
        let mut uniform = || {
            *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = *state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        };
        (-2.0 * uniform().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    }

    const D: usize = 600;

    fn law() -> RowLaw {
        RowLaw {
            kind: UpdateKind::Delta,
            noise_std: 1.27,
            clip_norm: 1.0,
            step: 0.0,
        }
    }

    /// The findings about rows of a delta round.
    fn judge(rows: &[Vec<f64>], byzantine: usize) -> Vec<Vec<Finding>> {
        #[expect(clippy::cast_possible_truncation, reason = "a value of a test")]
        let narrow = |row: &Vec<f64>| row.iter().map(|value| *value as f32).collect::<Vec<f32>>();
        let payloads = rows.iter().map(|row| Row {
            encoding: Encoding::F32,
            payload: encode_f32(&narrow(row)).into(),
        });
        let payloads = PayloadRows::new(payloads.collect(), u32::try_from(D).unwrap()).unwrap();
        let laws = vec![law(); rows.len()];
        let std: Vec<_> = laws.iter().map(RowLaw::tested_std).collect();
        let measures = measure::rows(&payloads, &[0.0; D], &[], &std);
        let all = measure::pairs(&payloads, &|_| true);
        let pairs = PairSets {
            signed: all.clone(),
            all,
        };
        let names: Vec<String> = (0..rows.len()).map(|row| format!("s{row}")).collect();
        findings(&names, &laws, &measures, D, &pairs, byzantine)
    }

    /// Honest rows of sites that have nothing in common: each signal of norm 1 points anywhere.
    fn honest(count: usize, state: &mut u64) -> Vec<Vec<f64>> {
        (0..count)
            .map(|_| {
                let signal: Vec<f64> = (0..D).map(|_| normal(state)).collect();
                let norm = signal.iter().map(|value| value * value).sum::<f64>().sqrt();
                signal
                    .iter()
                    .map(|value| value / norm + 1.27 * normal(state))
                    .collect()
            })
            .collect()
    }

    #[test]
    fn honest_rows_have_no_findings_however_much_their_sites_differ() {
        for seed in 0..20 {
            let rows = honest(10, &mut seed.clone());
            let found = judge(&rows, 3);
            assert!(found.iter().all(Vec::is_empty), "seed {seed}: {found:?}");
        }
    }

    #[test]
    fn each_kind_of_lie_is_found_and_only_on_the_liar() {
        let state = &mut 11;
        let rows = honest(9, state);
        let sum: Vec<f64> = (0..D).map(|at| rows.iter().map(|row| row[at]).sum()).collect();
        let length = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        let full = 1.27 * (D as f64).sqrt();
        let with = |lie: Vec<f64>| {
            let mut rows = rows.clone();
            rows.push(lie);
            judge(&rows, 1)
        };
        // All of the norm that the bound allows against the sum of the others, which it knows.
        let opposed = with(sum.iter().map(|value| -full * value / length).collect());
        assert!(
            matches!(opposed[9][0], Finding::Opposed { others, of: 9, limit: 1 } if others > 5),
            "{:?}",
            opposed[9]
        );
        let silent = with(vec![0.001; D]);
        assert!(
            matches!(silent[9][0], Finding::TooLittleNoise { .. }),
            "{:?}",
            silent[9]
        );
        let flat: Vec<f64> = (0..D)
            .map(|_| if normal(state) > 0.0 { 1.27 } else { -1.27 })
            .collect();
        let uniform = with(flat);
        assert!(
            matches!(uniform[9][0], Finding::NoiseLaw { .. }),
            "{:?}",
            uniform[9]
        );
        for found in [opposed, silent, uniform] {
            assert!(found[..9].iter().all(Vec::is_empty), "an honest site: {found:?}");
            assert_eq!(Verdict::of(&found[9]), Verdict::Inconsistent);
        }
    }

    #[test]
    fn a_mimic_does_not_get_its_victim_blamed() {
        let state = &mut 5;
        let mut rows = honest(8, state);
        let copy: Vec<f64> = rows[3].iter().map(|value| value + 0.1 * normal(state)).collect();
        rows.push(copy);
        let found = judge(&rows, 2);
        let group = |row: usize, other: &str| Finding::NearCopy {
            others: vec![format!("{other}{row}")],
        };
        assert_eq!(found[3], [group(8, "s")]);
        assert_eq!(found[8], [group(3, "s")]);
        assert_eq!(Verdict::of(&found[3]), Verdict::Neutral);
        // Weaker copies, and many: they share less than a pair can show, and push the victim's products to one side together.
        for share in [0.2, 0.4, 0.6] {
            let mut rows = rows.clone();
            rows.truncate(8);
            for _ in 0..2 {
                let row = |value: &f64| share * value + 1.27 * normal(state);
                let jittered = rows[3].iter().map(row).collect();
                rows.push(jittered);
            }
            let found = judge(&rows, 2);
            assert_ne!(
                Verdict::of(&found[3]),
                Verdict::Inconsistent,
                "share {share}: {found:?}"
            );
        }
    }

    #[test]
    fn two_that_oppose_one_another_are_not_told_apart() {
        let state = &mut 9;
        let mut rows = honest(1, state);
        let opposite = rows[0].iter().map(|value| -value).collect();
        rows.push(opposite);
        for byzantine in [0, 1] {
            let found = judge(&rows, byzantine);
            assert!(found.iter().all(Vec::is_empty), "f = {byzantine}: {found:?}");
        }
        // A third and a fourth that have nothing to do with it change nothing.
        rows.extend(honest(2, state));
        assert!(judge(&rows, 1).iter().all(Vec::is_empty));
    }

    #[test]
    fn few_values_give_no_law() {
        assert_eq!(energy_floor(1.0, 50), None);
        let floor = energy_floor(4.0, 10_000).unwrap();
        assert!((4.0 * 9_000.0..4.0 * 10_000.0).contains(&floor), "{floor}");
    }
}
