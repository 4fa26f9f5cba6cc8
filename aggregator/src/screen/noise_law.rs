//! Whether an update can be an honest release with the noise that the round asks for (arXiv 2304.09762, section 4).

/// Largest chance that an honest update fails one of the two tests.
const ALPHA: f64 = 1e-6;

/// Parameters that no honest update follows.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "a noise law needs a clip norm and a noise multiplier above 0, not {clip_norm} and {noise_multiplier}"
)]
pub struct NoiseLawError {
    /// C.
    pub clip_norm: f64,
    /// σ.
    pub noise_multiplier: f64,
}

/// What the law says of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseVerdict {
    /// Euclidean norm of the update.
    pub norm: f64,
    /// Smallest norm of an honest one.
    pub norm_min: f64,
    /// Largest distance of its values' distribution from the noise's, 0 to 1 (Kolmogorov and Smirnov).
    pub departure: f64,
    /// Largest such distance of an honest one.
    pub departure_max: f64,
}

impl NoiseVerdict {
    /// Whether an honest site can have sent it.
    pub fn holds(&self) -> bool {
        self.norm >= self.norm_min && self.departure <= self.departure_max
    }
}

/// One release: a vector of norm at most C plus independent N(0, (σC)²) in each of d coordinates.
///
/// - Norm: ‖g + z‖² is at least stochastically as large as ‖z‖², and χ² with d degrees is below d − 2√(d·ln(1/α)) with
///   chance α at most (Laurent and Massart 2000, lemma 1).
/// - Distribution: the empirical one of z is farther than √(ln(2/α)/2d) from the law with chance α at most (Massart 1990). The
///   signal moves the expected one by at most |mean g|/(s√2π) + ‖g‖²/d · max|φ′|/2s², with |mean g| ≤ C/√d.
///
/// Exact for one noised release; after several local steps the signal follows the noise and the limits need a margin that is
/// simulated. An update that passes may still be hostile: the law says who is certainly not honest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseLaw {
    clip_norm: f64,
    deviation: f64,
}

impl NoiseLaw {
    /// Clip norm C and noise multiplier σ of the round's terms.
    ///
    /// # Errors
    /// [`NoiseLawError`].
    pub fn new(clip_norm: f64, noise_multiplier: f64) -> Result<Self, NoiseLawError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if positive(clip_norm) && positive(noise_multiplier) && positive(clip_norm * noise_multiplier) {
            Ok(Self {
                clip_norm,
                deviation: clip_norm * noise_multiplier,
            })
        } else {
            Err(NoiseLawError {
                clip_norm,
                noise_multiplier,
            })
        }
    }

    /// Tests an update `[d]` of finite values. Memory: d numbers. An empty one holds.
    pub fn verdict(&self, update: &[f32]) -> NoiseVerdict {
        let d = update.len() as f64;
        let norm = update
            .iter()
            .map(|value| f64::from(*value).powi(2))
            .sum::<f64>()
            .sqrt();
        let least = d - 2.0 * (d * (1.0 / ALPHA).ln()).sqrt();
        let share = self.clip_norm / self.deviation;
        let chance = ((2.0 / ALPHA).ln() / (2.0 * d)).sqrt();
        // 1/√2π, and half the largest slope of the normal density, 1/(2√2πe).
        let signal = share * 0.398_942_28 / d.sqrt() + share * share * 0.120_985_36 / d;
        NoiseVerdict {
            norm,
            norm_min: self.deviation * least.max(0.0).sqrt(),
            departure: self.departure(update),
            departure_max: if update.is_empty() {
                0.0
            } else {
                (chance + signal).min(1.0)
            },
        }
    }

    fn departure(&self, update: &[f32]) -> f64 {
        let mut ordered: Vec<f64> = update
            .iter()
            .map(|value| f64::from(*value) / self.deviation)
            .collect();
        ordered.sort_unstable_by(f64::total_cmp);
        let d = ordered.len() as f64;
        let mut most = 0.0_f64;
        for (rank, value) in ordered.iter().enumerate() {
            let law = 0.5 * libm::erfc(-value / std::f64::consts::SQRT_2);
            most = most.max(law - rank as f64 / d).max((rank + 1) as f64 / d - law);
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normal values by Box and Muller.
    fn noise(d: usize, deviation: f64, mut state: u64) -> Vec<f32> {
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
        };
        #[expect(clippy::cast_possible_truncation, reason = "test values")]
        let normal = |(u, v): (f64, f64)| {
            (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
        };
        (0..d).map(|_| normal((uniform(), uniform()))).collect()
    }

    #[test]
    fn honest_releases_hold_whatever_their_signal() {
        for (d, seed) in [(20, 1), (624, 2), (10_000, 3)] {
            let law = NoiseLaw::new(2.0, 1.27).unwrap();
            for trial in 0..40 {
                let mut update = noise(d, 2.54, seed + 1_000 * trial);
                match trial % 3 {
                    // All of the norm in one coordinate, evenly spread, or none.
                    0 => update[0] += 2.0,
                    1 => update.iter_mut().for_each(|v| *v += 2.0 / (d as f32).sqrt()),
                    _ => {}
                }
                let verdict = law.verdict(&update);
                assert!(verdict.holds(), "d {d}, trial {trial}: {verdict:?}");
            }
        }
    }

    #[test]
    fn what_carries_no_noise_is_found() {
        let law = NoiseLaw::new(1.0, 1.0).unwrap();
        let d = 2_000;
        assert!(!law.verdict(&vec![0.0; d]).holds(), "a free rider");
        assert!(!law.verdict(&noise(d, 0.7, 1)).holds(), "too little noise");
        // The right norm with the wrong distribution.
        assert!(!law.verdict(&vec![1.0; d]).holds(), "a constant");
        let signs: Vec<f32> = noise(d, 1.0, 2).iter().map(|v| v.signum()).collect();
        assert!(!law.verdict(&signs).holds(), "signs");
        let mean_of_many: Vec<f32> = noise(d, 1.0, 3).iter().map(|v| v * 0.2).collect();
        assert!(!law.verdict(&mean_of_many).holds(), "the mean of 25 releases");
    }

    #[test]
    fn refuses_a_law_that_is_none() {
        for (clip, sigma) in [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (1.0, f64::INFINITY)] {
            assert!(NoiseLaw::new(clip, sigma).is_err());
        }
    }
}
