//! Does this update look like what it claims to be? Two screens that judge an update alone, from its values and the round's
//! public terms; so an edge can be told at once, and no rule has to know.
//!
//! **The vet** is for moments, which unlike weights can be held against what time series do. Every sum that it looks at is
//! linear in the released values, so its noise is Gaussian with a standard deviation that the terms give; an update is refused
//! only when it misses the bound by more than [`DEVIATIONS`] of them. Under strong noise and few blocks the vet therefore passes
//! what it cannot tell. With `p` the lags 1, 2, 3, 5, 10 of a channel and `y` its value, sums over all channels:
//!
//! - *squares*: `Σ p²` is not negative;
//! - *persistence*: `0.15 ≤ Σ p y / Σ p² ≤ 1.1`. Blocks are centred on their own first rows, so rows in random order give .06 to .08
//!   on recorded servers, those servers themselves .24 to .72, negated targets less than 0;
//! - *stationarity*: the same autocovariance is there twice, between two lags and between a lag and the value
//!   (`Σ p₁ y ≈ Σ p₁ p₂`, both one row apart, and so on for 2, 3 and 5 rows). Their ratio is 1.07 to 1.16 on recorded servers; 0.85 to
//!   1.5 pass. It is what betrays targets that were made smaller or larger.
//! - *structure*, channel by channel: squares at neighbouring lags differ by at most 0.3 of them, root mean square (recorded
//!   servers: .02 to .10), and so do those twins from one another (.02 to .11); and no product of two lags exceeds the mean of
//!   their squares (Cauchy and Schwarz). Values that were made up one by one, such as a copy with noise on it, have none of this.
//!
//! Sums of moments of true series pass whatever their mixture: the vet cannot tell a site that feeds another true series.
//!
//! **The noise law** is for every kind under noise (after Gong et al. 2023, section 5): the squared norm of signal plus Gaussian
//! noise of standard deviation σC a value is, whatever the signal, at least stochastically that of the noise alone, so an honest
//! norm is below `σC(√d − 5)` with probability below e^(−12.5). Moments have sums that the signal hardly reaches: squares at
//! neighbouring lags differ by the ends of blocks only, so their differences are noise of a known law, and at least as much of it.
//! Means of others' updates have too little.

use std::f64::consts::SQRT_2;

use theriac_model::LAG_MAX;
use theriac_model::moments::MOMENTS_PER_CHANNEL;
use theriac_protocol::compress::decode_range;
use theriac_protocol::message::{AnnounceV1, Encoding, UpdateKind};

/// Places of the squares among a channel's moments: the diagonal of a 5 × 5 upper triangle, row after row.
pub(crate) const DIAGONAL: [usize; 5] = [0, 5, 9, 12, 14];

/// Places of the five sums Σ p y.
const CROSS: std::ops::Range<usize> = 15..20;

/// Pairs of places with the same distance in time: `Σ p y` at one, and one or two `Σ p p` (which hold √2 times the sum).
const TWINS: [(usize, &[usize]); 4] = [(15, &[1, 6]), (16, &[2, 10]), (17, &[7]), (18, &[13])];

/// Differences of squares that share no value: lags 1 and 2, lags 3 and 5.
const NEIGHBOURS: [(usize, usize); 2] = [(0, 5), (9, 12)];

/// How many standard deviations of the noise a sum may lie beyond its bound.
pub const DEVIATIONS: f64 = 5.0;

/// Bounds of `Σ p y / Σ p²`.
const PERSISTENCE: [f64; 2] = [0.15, 1.1];

/// Bounds of `Σ p y` over the sums of products of lags equally far apart.
const STATIONARITY: [f64; 2] = [0.85, 1.5];

/// Largest difference of what should be the same in each channel, as a share of it, root mean square.
const STRUCTURE: f64 = 0.3;

/// Share of the squares that rounding may hide of a violated Cauchy-Schwarz inequality.
const ROUNDING: f64 = 1e-3;

/// What the squares of differences must reach at least of their expectation: the lower quantile of χ² with `n` degrees of
/// freedom at 1e-6, by Wilson and Hilferty (1931).
fn chi_square_floor(n: f64) -> f64 {
    const QUANTILE: f64 = 4.753;
    let spread = 2.0 / (9.0 * n);
    n * (1.0 - spread - QUANTILE * spread.sqrt()).max(0.0).powi(3)
}

/// What an update was found to be, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Finding {
    /// Which sum.
    pub what: &'static str,
    /// The bound.
    pub bound: f64,
    /// The sum.
    pub found: f64,
}

/// Which screens look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Screens {
    /// Squares, persistence and stationarity of moments.
    pub vet: bool,
    /// The law of the noise.
    pub noise_law: bool,
}

impl Screens {
    /// Both.
    pub const ALL: Self = Self {
        vet: true,
        noise_law: true,
    };
}

/// Looks at one update of the announced kind and length; `norm` is its Euclidean norm. `Err` is what it was refused for.
///
/// # Errors
/// The first [`Finding`] outside its bound.
pub fn look(
    encoding: Encoding,
    payload: &[u8],
    norm: f64,
    terms: &AnnounceV1,
    screens: Screens,
) -> Result<(), Finding> {
    let noise = terms.noise_multiplier.value() * terms.clip_norm.value();
    if screens.noise_law {
        let bound = noise * (f64::from(terms.values).sqrt() - 5.0);
        // Rounding to int8 only adds. Noise that no `f32` can hold is none.
        if bound > f64::from(f32::MIN_POSITIVE) && norm < bound {
            return Err(Finding {
                what: "the norm",
                bound,
                found: norm,
            });
        }
    }
    if terms.kind != UpdateKind::Moments {
        return Ok(());
    }
    let channels = usize::try_from(terms.values).unwrap_or(usize::MAX) / MOMENTS_PER_CHANNEL;
    let sums = Sums::of(encoding, payload, channels);
    if screens.vet {
        sums.series(noise, terms)?;
    }
    if screens.noise_law {
        sums.noise_law(noise)?;
    }
    Ok(())
}

/// The vet on the mean of a site's releases, whose noise is `noise_ratio` (above 0, at most 1) times that of one of them. The noise law is for single releases.
///
/// # Errors
/// The first [`Finding`] outside its bound.
pub fn look_at_mean(
    encoding: Encoding,
    payload: &[u8],
    terms: &AnnounceV1,
    noise_ratio: f64,
) -> Result<(), Finding> {
    if terms.kind != UpdateKind::Moments {
        return Ok(());
    }
    let channels = usize::try_from(terms.values).unwrap_or(usize::MAX) / MOMENTS_PER_CHANNEL;
    let noise = noise_ratio * terms.noise_multiplier.value() * terms.clip_norm.value();
    Sums::of(encoding, payload, channels).series(noise, terms)
}

/// What is looked at of all channels together.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    channels: f64,
    own: f64,
    cross: f64,
    /// Autocovariances of 1, 2, 3 and 5 rows, between a lag and the value.
    ahead: f64,
    /// The same between two lags.
    between: f64,
    /// Squares of [`NEIGHBOURS`]' differences.
    differences: f64,
    /// Squares of the differences of all neighbouring squares, and of their means.
    steps: f64,
    levels: f64,
    /// Squares of the differences of [`TWINS`], and of the squares at lag 1.
    apart: f64,
    size: f64,
    /// Squares of what products exceed the mean of their squares by.
    excess: f64,
}

impl Sums {
    fn of(encoding: Encoding, payload: &[u8], channels: usize) -> Self {
        let mut sums = Self {
            channels: channels as f64,
            ..Self::default()
        };
        let mut channel = [0.0_f32; MOMENTS_PER_CHANNEL];
        for index in 0..channels {
            decode_range(encoding, payload, index * MOMENTS_PER_CHANNEL, &mut channel);
            let at = |place: usize| f64::from(channel[place]);
            sums.own += DIAGONAL.into_iter().map(at).sum::<f64>();
            sums.cross += CROSS.map(at).sum::<f64>();
            for (ahead, between) in TWINS {
                sums.ahead += at(ahead);
                let products = between.iter().map(|place| at(*place)).sum::<f64>();
                let products = products / (between.len() as f64 * SQRT_2);
                sums.between += products;
                sums.apart += (at(ahead) - products).powi(2);
                sums.size += at(DIAGONAL[0]).powi(2);
            }
            for (one, other) in NEIGHBOURS {
                sums.differences += (at(one) - at(other)).powi(2);
            }
            sums.add_structure(&channel);
        }
        sums
    }

    fn add_structure(&mut self, channel: &[f32; MOMENTS_PER_CHANNEL]) {
        let at = |place: usize| f64::from(channel[place]);
        for pair in DIAGONAL.windows(2) {
            let (one, other) = (at(pair[0]), at(pair[1]));
            self.steps += (one - other).powi(2);
            self.levels += f64::midpoint(one, other).powi(2);
        }
        for (row, first) in DIAGONAL.into_iter().enumerate() {
            for (column, second) in DIAGONAL.into_iter().enumerate().skip(row + 1) {
                let product = at(first + column - row).abs() / SQRT_2;
                let excess = product - f64::midpoint(at(first), at(second));
                self.excess += excess.max(0.0).powi(2);
            }
        }
    }

    /// Whether they can be those of a series.
    fn series(&self, noise: f64, terms: &AnnounceV1) -> Result<(), Finding> {
        self.squares(noise)?;
        // Single rows are centred on the mean of their own lags, which leaves nothing of the other two sums.
        if usize::try_from(terms.block_rows).is_ok_and(|rows| rows > LAG_MAX) {
            self.vet(noise)?;
            self.structure(noise)?;
        }
        Ok(())
    }

    /// Noise moves a root of a sum of squares by at most its own norm, which for `n` independent values of standard deviation
    /// `s` stays below `s(√n + 5)` but for one case in e^12.5.
    fn structure(&self, noise: f64) -> Result<(), Finding> {
        let reach =
            |deviation: f64, values: f64| noise * deviation * ((values * self.channels).sqrt() + DEVIATIONS);
        // Each square takes part in up to two differences: their norm is at most twice that of the squares' noise.
        let bound = STRUCTURE * self.levels.sqrt() + reach(2.0, 5.0);
        at_most("structure of squares", self.steps.sqrt(), bound)?;
        let bound = STRUCTURE * self.size.sqrt() + reach(1.5_f64.sqrt(), 4.0);
        at_most("structure of products", self.apart.sqrt(), bound)?;
        // A square takes part in four means: at most one and a half times the norm of the noise of all fifteen.
        let bound = ROUNDING * self.size.sqrt() + reach(1.5, 15.0);
        at_most("products beyond squares", self.excess.sqrt(), bound)
    }

    fn squares(&self, noise: f64) -> Result<(), Finding> {
        at_least("the sum of squares", self.own, -self.slack_of_five(noise))
    }

    /// What noise explains of a sum of five values a channel.
    fn slack_of_five(&self, noise: f64) -> f64 {
        DEVIATIONS * noise * (5.0 * self.channels).sqrt()
    }

    fn vet(&self, noise: f64) -> Result<(), Finding> {
        let five = self.slack_of_five(noise);
        let [low, high] = PERSISTENCE;
        let slack = |factor: f64| five * (1.0 + factor * factor).sqrt();
        at_least("persistence", self.cross, low * self.own - slack(low))?;
        at_most("persistence", self.cross, high * self.own + slack(high))?;
        // Two of the four products are means of two values; each value is half as noisy as a released one.
        let slack = |factor: f64| {
            DEVIATIONS * noise * (self.channels * (4.0 + factor * factor * (0.25 * 2.0 + 0.5 * 2.0))).sqrt()
        };
        let [low, high] = STATIONARITY;
        // Where neighbouring rows are opposed both sums are below zero and the bounds change sides.
        let (low, high) = if self.between < 0.0 {
            (high, low)
        } else {
            (low, high)
        };
        at_least("stationarity", self.ahead, low * self.between - slack(low))?;
        at_most("stationarity", self.ahead, high * self.between + slack(high))
    }

    fn noise_law(&self, noise: f64) -> Result<(), Finding> {
        let expected = 2.0 * noise * noise;
        let degrees = self.channels * NEIGHBOURS.len() as f64;
        at_least(
            "noise between neighbouring lags",
            self.differences,
            expected * chi_square_floor(degrees),
        )
    }
}

fn at_least(what: &'static str, found: f64, bound: f64) -> Result<(), Finding> {
    if found < bound || found.is_nan() {
        return Err(Finding { what, bound, found });
    }
    Ok(())
}

fn at_most(what: &'static str, found: f64, bound: f64) -> Result<(), Finding> {
    if found > bound {
        return Err(Finding { what, bound, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use theriac_model::moments::{BLOCK_ROWS, block};
    use theriac_protocol::compress::encode_f32;
    use theriac_protocol::units::{Digest, L2Norm, ModelVersion, NoiseMultiplier, Round};

    use super::*;

    const CHANNELS: usize = 6;
    /// Enough for a sign to show through the noise of epsilon 4.
    const BLOCKS: usize = 400;

    fn terms(kind: UpdateKind, values: u32, sigma: f64, clip: f64) -> AnnounceV1 {
        AnnounceV1 {
            round: Round(1),
            nonce: 1,
            kind,
            values,
            layout_digest: Digest::default(),
            base_version: ModelVersion(0),
            base_digest: Digest::default(),
            clip_norm: L2Norm::new(clip).unwrap(),
            noise_multiplier: NoiseMultiplier::new(sigma).unwrap(),
            block_rows: 60,
            blocks_min: 1,
            blocks_max: 400,
            deadline_ms: 1,
        }
    }

    /// Uniform in ±1/2.
    fn shocks(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        }
    }

    fn normal(shock: &mut impl FnMut() -> f32) -> f32 {
        (0..12).map(|_| shock()).sum()
    }

    /// Clipped moments of `x_t = a x_{t−1} + shock`, spoilt by `spoil` block by block, with noise.
    fn released(a: f32, seed: u32, noise: f32, spoil: impl Fn(&mut [f32])) -> Vec<f32> {
        let mut shock = shocks(seed);
        let mut level = [0.0_f32; CHANNELS];
        let mut sum = vec![0.0_f32; CHANNELS * MOMENTS_PER_CHANNEL];
        for _ in 0..BLOCKS {
            let mut values = Vec::new();
            for _ in 0..BLOCK_ROWS {
                for level in &mut level {
                    *level = a * *level + shock();
                    values.push(*level);
                }
            }
            let mut moments = block(&values, BLOCK_ROWS);
            spoil(&mut moments);
            let norm = moments.iter().map(|v| v * v).sum::<f32>().sqrt();
            sum.iter_mut()
                .zip(&moments)
                .for_each(|(sum, v)| *sum += v * (CLIP / norm).min(1.0));
        }
        sum.iter().map(|v| v + noise * normal(&mut shock)).collect()
    }

    const CLIP: f32 = 95.0;

    fn judge(values: &[f32], sigma: f64, screens: Screens) -> Option<&'static str> {
        let terms = terms(
            UpdateKind::Moments,
            u32::try_from(values.len()).unwrap(),
            sigma,
            CLIP.into(),
        );
        let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        look(Encoding::F32, &encode_f32(values), norm, &terms, screens)
            .err()
            .map(|finding| finding.what)
    }

    fn targets_times(factor: f32) -> impl Fn(&mut [f32]) {
        move |moments| {
            for channel in moments.chunks_exact_mut(MOMENTS_PER_CHANNEL) {
                channel[CROSS].iter_mut().for_each(|v| *v *= factor);
            }
        }
    }

    #[test]
    fn honest_series_pass_with_and_without_noise() {
        for seed in 0..20 {
            for a in [0.5, 0.8, 0.95, 1.0] {
                let quiet = released(a, seed, 0.0, |_| ());
                assert_eq!(
                    judge(&quiet, f64::MIN_POSITIVE, Screens::ALL),
                    None,
                    "{a}, seed {seed}"
                );
                let noisy = released(a, seed, 1.27 * CLIP, |_| ());
                assert_eq!(judge(&noisy, 1.27, Screens::ALL), None, "{a}, seed {seed}");
            }
        }
    }

    #[test]
    fn poisoned_targets_and_rows_in_random_order_are_told_by_name() {
        for (sigma, noise) in [(f64::MIN_POSITIVE, 0.0), (1.27, 1.27 * CLIP)] {
            let found = |values: &[f32]| judge(values, sigma, Screens::ALL);
            assert_eq!(
                found(&released(0.95, 3, noise, targets_times(-1.0))),
                Some("persistence")
            );
            let smaller = found(&released(0.98, 3, noise, targets_times(0.5)));
            assert_eq!(smaller, Some("stationarity"), "σ = {sigma}");
            // Independent rows: a = 0.
            assert_eq!(found(&released(0.0, 3, noise, |_| ())), Some("persistence"));
            let flipped: Vec<f32> = released(0.95, 3, noise, |_| ())
                .iter()
                .map(|v| -5.0 * v)
                .collect();
            assert_eq!(found(&flipped), Some("the sum of squares"));
        }
    }

    /// Copies with noise as large as sites differ: no value alone is odd, all together are no series.
    #[test]
    fn values_made_up_one_by_one_have_no_structure() {
        let vet = Screens {
            vet: true,
            noise_law: false,
        };
        for (sigma, noise) in [(f64::MIN_POSITIVE, 0.0), (1.27, 1.27 * CLIP)] {
            let mut shock = shocks(9);
            let honest = released(0.9, 5, noise, |_| ());
            let jittered: Vec<f32> = honest
                .iter()
                .map(|v| v * (1.0 + 0.8 * normal(&mut shock)))
                .collect();
            let found = judge(&jittered, sigma, vet);
            assert!(
                found.is_some_and(|what| what.starts_with("structure") || what.starts_with("products")),
                "σ = {sigma}: {found:?}"
            );
        }
        let mut one = released(0.9, 5, 0.0, |_| ());
        one[4] = 1.5 * std::f32::consts::SQRT_2 * one[0];
        assert_eq!(
            judge(&one, f64::MIN_POSITIVE, vet),
            Some("products beyond squares")
        );
    }

    #[test]
    fn what_has_no_noise_of_its_own_is_told_from_what_has() {
        let law = Screens {
            vet: false,
            noise_law: true,
        };
        // Equal squares at all lags, as long blocks have them, and noise.
        let row = |seed: u32| -> Vec<f32> {
            let mut shock = shocks(seed);
            let squares = |place: usize| {
                if DIAGONAL.contains(&(place % MOMENTS_PER_CHANNEL)) {
                    2_500.0
                } else {
                    0.0
                }
            };
            (0..38 * MOMENTS_PER_CHANNEL)
                .map(|place| squares(place) + 1.27 * CLIP * normal(&mut shock))
                .collect()
        };
        let honest: Vec<Vec<f32>> = (0..8).map(row).collect();
        let mean: Vec<f32> = (0..honest[0].len())
            .map(|i| honest.iter().map(|row| row[i]).sum::<f32>() / 8.0)
            .collect();
        assert_eq!(judge(&honest[0], 1.27, law), None);
        assert_eq!(judge(&mean, 1.27, law), Some("noise between neighbouring lags"));
        assert_eq!(judge(&vec![0.0; mean.len()], 1.27, law), Some("the norm"));
        assert_eq!(judge(&vec![0.0; mean.len()], f64::MIN_POSITIVE, law), None);
    }

    #[test]
    fn a_delta_without_noise_is_refused_and_one_with_passes() {
        let terms = terms(UpdateKind::Delta, 400, 1.5, 2.0);
        let at = |norm: f64| look(Encoding::F32, &[0; 1600], norm, &terms, Screens::ALL).is_ok();
        // 3 · (20 − 5) = 45.
        assert!(!at(44.0) && at(46.0) && at(60.0));
    }

    #[test]
    fn chi_square_floor_is_a_lower_quantile() {
        // scipy.stats.chi2.ppf(1e-6, 76) = 31.0; the approximation is a little lower, so honest rows are safer.
        assert!((chi_square_floor(76.0) - 31.0).abs() < 0.3);
        assert!(chi_square_floor(1.0) < 0.01);
    }
}
