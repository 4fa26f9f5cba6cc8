//! The tighter second figure: ε from the distribution of the privacy loss itself.
//!
//! Steps of any number of jobs that read the same unit convolve their privacy loss distributions (Sommer, Meiser and Mohammadi 2019). Each step is put
//! on a grid from above (`loss.rs`), the sum is found by Fourier transform, and ε is read off at δ. Everything that is cut off (tails, what
//! lies outside of the window, rounding of the transform) is added to δ, so that the figure is a bound, for **continuous** noise. The ledger
//! keeps RDP, whose bound also covers the discrete noise that is added.
//!
//! The distribution is tilted by e^{θ·loss} before it is transformed (θ from the Chernoff bound at δ), so that the part that decides, far
//! out in the tail, is the middle of what is computed. That keeps the relative precision there whatever δ is, and makes the window a few
//! standard deviations wide, at an ε of 0.001 as at one of 10 000. The grid is refined until ε no longer moves; each of them is a bound.

use theriac_protocol::units::Delta;

use super::analytic;
use super::fft::{Complex, Transform};
use super::gaussian::SubsampledGaussian;
use super::golden_minimum;
use super::loss::{Direction, Loss, LossGrid};
use super::rdp::RdpCurve;

/// Some steps of one mechanism.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Job {
    /// One step.
    pub mechanism: SubsampledGaussian,
    /// How many.
    pub steps: u64,
}

impl Job {
    /// Its RDP curve.
    pub fn rdp(&self) -> RdpCurve {
        self.mechanism.rdp().times(self.steps)
    }
}

/// The least ε at `delta` that privacy loss distributions prove for jobs that all read the same unit, under add or remove one unit with
/// continuous Gaussian noise. At least 0, never above the RDP figure, infinite when there is next to no noise, never NaN.
///
/// Up to a second and some 100 MB for a hard case, 10 ms for an easy one; closed form when no job samples.
pub fn pld_epsilon(jobs: &[Job], delta: Delta) -> f64 {
    let jobs: Vec<Job> = jobs.iter().filter(|job| job.steps > 0).copied().collect();
    let rdp = jobs
        .iter()
        .fold(RdpCurve::ZERO, |sum, job| sum.plus(&job.rdp()))
        .epsilon(delta)
        .epsilon;
    if jobs.iter().all(|job| job.mechanism.rate().is_full()) {
        let squares: f64 = jobs
            .iter()
            .map(|job| job.steps as f64 / job.mechanism.ratio() / job.mechanism.ratio())
            .sum();
        return analytic::epsilon(squares.sqrt(), delta.value()).min(rdp);
    }
    let found = Search::new(&jobs, Direction::Remove, delta.value()).epsilon(0.0);
    let found = found.max(Search::new(&jobs, Direction::Add, delta.value()).epsilon(found));
    // Not a number says nothing; the other bound holds.
    if found <= rdp { found } else { rdp }
}

/// The search for ε in one direction.
struct Search<'a> {
    jobs: &'a [Job],
    direction: Direction,
    delta: f64,
    losses: Vec<Loss>,
    /// All steps together.
    steps: f64,
}

impl<'a> Search<'a> {
    fn new(jobs: &'a [Job], direction: Direction, delta: f64) -> Self {
        let steps: f64 = jobs.iter().map(|job| job.steps as f64).sum();
        let tail = delta * TAIL_SHARE / steps;
        Self {
            jobs,
            direction,
            delta,
            losses: jobs.iter().map(|job| Loss::new(job.mechanism, tail)).collect(),
            steps,
        }
    }

    /// ε of this direction; any bound that is at most `enough` will do.
    fn epsilon(&self, enough: f64) -> f64 {
        let mut step = self.coarse_step();
        let Some(mut grids) = self.grids(step) else {
            return f64::INFINITY;
        };
        // No sum of losses exceeds its largest one, but for what lies beyond the grids.
        let mut best = self.largest(&grids);
        let mut theta = Tilted::best_theta(self.jobs, &grids, self.delta);
        for length_log2 in [13_u32, 15, 17, 19, 20] {
            if best <= enough {
                break;
            }
            let length = 1_usize << length_log2;
            let tilted = Tilted::with(self.jobs, &grids, theta);
            if !(tilted.deviation.is_finite() && tilted.deviation > 0.0) {
                break;
            }
            step = tilted.deviation * WINDOW / length as f64;
            let Some(finer) = self.grids(step) else { break };
            grids = finer;
            if grids.iter().all(|grid| grid.ln_masses.len() < FEW_CELLS) {
                theta = Tilted::best_theta(self.jobs, &grids, self.delta);
            }
            let found = self.on_grid(Tilted::with(self.jobs, &grids, theta), length);
            let improved = best - found > ENOUGH * found;
            best = best.min(found);
            if !improved && length_log2 > 13 {
                break;
            }
        }
        best
    }

    /// The largest finite loss of all steps together; infinite when δ does not cover what may exceed it.
    fn largest(&self, grids: &[LossGrid]) -> f64 {
        let beyond: f64 = self
            .jobs
            .iter()
            .zip(grids)
            .map(|(job, grid)| job.steps as f64 * grid.infinite)
            .sum();
        let of_job = |(job, grid): (&Job, &LossGrid)| job.steps as f64 * grid.loss(grid.ln_masses.len() - 1);
        if beyond <= self.delta {
            self.jobs.iter().zip(grids).map(of_job).sum::<f64>().max(0.0)
        } else {
            f64::INFINITY
        }
    }

    /// A first step: a few thousand cells for the widest job.
    fn coarse_step(&self) -> f64 {
        let width = self.losses.iter().map(|loss| {
            let (low, high) = loss.range(self.direction);
            high - low
        });
        width.fold(0.0, f64::max) / COARSE_CELLS
    }

    /// Every job's losses at this grid width; `None` when they are too wide for a float or for memory.
    fn grids(&self, step: f64) -> Option<Vec<LossGrid>> {
        let fits = |loss: &Loss| {
            let (low, high) = loss.range(self.direction);
            low.is_finite()
                && high.is_finite()
                && step > 0.0
                && (high - low) / step < CELLS_MAX
                && low.abs().max(high.abs()) / step < 1e15
        };
        let all = self.losses.iter().all(fits);
        all.then(|| {
            self.losses
                .iter()
                .map(|loss| loss.grid(self.direction, step))
                .collect()
        })
    }

    fn on_grid(&self, mut tilted: Tilted<'_>, length: usize) -> f64 {
        let transform = Transform::new(length);
        let step = tilted.grids[0].step;
        // With the window where the Chernoff bound says. Should ε lie below it, look further down.
        for _ in 0..4 {
            let window = tilted.compose(&transform, length);
            let lowest = window.first as f64 * step;
            let found = self.read(&tilted, &window, step);
            if found > lowest || found <= 0.0 {
                return found.max(0.0);
            }
            tilted = tilted.at(tilted.theta / 2.0);
        }
        f64::INFINITY
    }

    /// ε from the tilted distribution, from its top down.
    fn read(&self, tilted: &Tilted<'_>, window: &Window, step: f64) -> f64 {
        let count = window.masses.len();
        let loss_at = |index: usize| (window.first + index.cast_signed() as i64) as f64 * step;
        // Mass times e^{total − θ·loss} is the true one.
        let weight = |loss: f64| (tilted.log_moment - tilted.theta * loss).exp();
        let rounding = ROUNDING * (self.steps + 1.0) * f64::from(count.ilog2());
        let infinite = tilted.infinite + weight(loss_at(count));
        // P above a loss, and P·e^{loss − its own loss}.
        let (mut above, mut discounted) = (0.0_f64, 0.0_f64);
        let decay = (-step).exp();
        for index in (0..count).rev() {
            let loss = loss_at(index);
            let cut = infinite + rounding * weight(loss);
            // δ at this grid point, from all that lies above it.
            if above - decay * discounted + cut > self.delta {
                let room = (above + cut - self.delta) / discounted;
                return loss + step + room.ln();
            }
            let mass = window.masses[index].max(0.0) * weight(loss);
            above += mass;
            discounted = mass + decay * discounted;
        }
        loss_at(0)
    }
}

/// The jobs' grids under the tilt e^{θ·loss}.
struct Tilted<'a> {
    jobs: &'a [Job],
    grids: &'a [LossGrid],
    theta: f64,
    /// Σ steps · ln E[e^{θ·loss}; finite].
    log_moment: f64,
    /// Mean and standard deviation of the tilted sum.
    mean: f64,
    deviation: f64,
    /// Probability that some step's loss is infinite.
    infinite: f64,
}

/// A stretch of the sum's tilted distribution: `masses[i]` at loss `(first + i)·step`.
struct Window {
    first: i64,
    masses: Vec<f64>,
}

impl<'a> Tilted<'a> {
    /// The θ whose Chernoff bound on ε is least.
    fn best_theta(jobs: &[Job], grids: &[LossGrid], delta: f64) -> f64 {
        let sums = |theta: f64| Moments::of_sum(jobs, grids, theta);
        let bound = |ln_theta: f64| (sums(ln_theta.exp()).log_moment - delta.ln()) / ln_theta.exp();
        golden_minimum(bound, THETA_LN.0, THETA_LN.1, 24).at.exp()
    }

    fn at(&self, theta: f64) -> Self {
        Self::with(self.jobs, self.grids, theta)
    }

    fn with(jobs: &'a [Job], grids: &'a [LossGrid], theta: f64) -> Self {
        let moments = Moments::of_sum(jobs, grids, theta);
        let survives: f64 = jobs
            .iter()
            .zip(grids)
            .map(|(job, grid)| job.steps as f64 * (-grid.infinite).ln_1p())
            .sum();
        Self {
            jobs,
            grids,
            theta,
            log_moment: moments.log_moment,
            mean: moments.mean,
            deviation: moments.variance.sqrt(),
            infinite: -survives.exp_m1(),
        }
    }

    /// The tilted sum, wrapped around a window whose top is where the Chernoff bound leaves next to nothing.
    fn compose(&self, transform: &Transform, length: usize) -> Window {
        let step = self.grids[0].step;
        let top = (self.mean + ABOVE * self.deviation) / step;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "losses were checked to lie below 10^15 steps"
        )]
        let first = top.ceil() as i64 - i64::try_from(length).unwrap_or(i64::MAX);
        let mut sum = vec![Complex::ONE; length];
        let mut offset = 0_i64;
        for (job, grid) in self.jobs.iter().zip(self.grids) {
            let mut one = self.wrapped(grid, length);
            transform.forward(&mut one);
            sum.iter_mut()
                .zip(one)
                .for_each(|(sum, one)| *sum = sum.times(one.power(job.steps)));
            offset = offset.wrapping_add(grid.first.wrapping_mul(job.steps.cast_signed()));
        }
        transform.inverse(&mut sum);
        // Entry j of the transform is loss offset + j, modulo the length.
        let modulus = i64::try_from(length).unwrap_or(i64::MAX);
        let place = |index: usize| {
            (first + index.cast_signed() as i64)
                .wrapping_sub(offset)
                .rem_euclid(modulus)
        };
        let masses = (0..length)
            .map(|index| sum[usize::try_from(place(index)).unwrap_or(0)].re)
            .collect();
        Window { first, masses }
    }

    /// One step, tilted, of total mass 1, wrapped to the length.
    fn wrapped(&self, grid: &LossGrid, length: usize) -> Vec<Complex> {
        let log_moment = Moments::of_step(grid, self.theta).log_moment;
        let mut one = vec![Complex::default(); length];
        for (index, ln_mass) in grid.ln_masses.iter().enumerate() {
            one[index % length].re += (self.theta * grid.loss(index) + ln_mass - log_moment).exp();
        }
        one
    }
}

/// ln E[e^{θX}], and mean and variance of X under the tilt.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    log_moment: f64,
    mean: f64,
    variance: f64,
}

impl Moments {
    fn of_sum(jobs: &[Job], grids: &[LossGrid], theta: f64) -> Self {
        jobs.iter().zip(grids).fold(Self::default(), |sum, (job, grid)| {
            let (one, steps) = (Self::of_step(grid, theta), job.steps as f64);
            Self {
                log_moment: sum.log_moment + steps * one.log_moment,
                mean: sum.mean + steps * one.mean,
                variance: sum.variance + steps * one.variance,
            }
        })
    }

    fn of_step(grid: &LossGrid, theta: f64) -> Self {
        let losses = || {
            let entries = grid.ln_masses.iter().enumerate();
            entries.map(|(index, ln_mass)| (grid.loss(index), ln_mass))
        };
        let largest = losses().fold(f64::NEG_INFINITY, |most, (loss, ln_mass)| {
            most.max(theta * loss + ln_mass)
        });
        let (mut total, mut first, mut second) = (0.0, 0.0, 0.0);
        for (loss, ln_mass) in losses() {
            let exponent = theta * loss + ln_mass - largest;
            // Most of a grid lies far from where the tilt looks.
            if exponent > -80.0 {
                let weight = exponent.exp();
                total += weight;
                first += weight * loss;
                second += weight * loss * loss;
            }
        }
        let mean = first / total;
        Self {
            log_moment: largest + total.ln(),
            mean,
            variance: (second / total - mean * mean).max(0.0),
        }
    }
}

/// Part of δ that may lie beyond the grids of all steps.
const TAIL_SHARE: f64 = 1e-6;
/// Width of the window in standard deviations of the tilted sum, and how many of them lie above its mean.
const WINDOW: f64 = 28.0;
const ABOVE: f64 = 12.0;
/// Cells of the first grid.
const COARSE_CELLS: f64 = 4096.0;
/// Most cells of one step's grid.
const CELLS_MAX: f64 = 4_194_304.0;
/// Up to this many cells of a step, the best tilt is looked for again.
const FEW_CELLS: usize = 32_768;
/// A finer grid that improves ε by less than this part is the last one.
const ENOUGH: f64 = 1e-4;
/// Relative rounding of a transform for each step and level.
const ROUNDING: f64 = 4.0 * f64::EPSILON;
/// Range of ln θ.
const THETA_LN: (f64, f64) = (-9.0, 14.0);

#[cfg(test)]
mod tests {
    use theriac_protocol::units::NoiseMultiplier;

    use super::*;
    use crate::accountant::SamplingRate;

    fn job(sigma: f64, rate: f64, steps: u64) -> Job {
        Job {
            mechanism: SubsampledGaussian::new(
                NoiseMultiplier::new(sigma).unwrap(),
                SamplingRate::new(rate).unwrap(),
            ),
            steps,
        }
    }

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    /// The general path, told nothing about q = 1, finds the closed form and never less.
    #[test]
    fn a_rate_of_almost_one_is_the_exact_gaussian() {
        for (sigma, steps, d) in [
            (1.27, 1_u64, 1e-6),
            (5.69, 20, 1e-6),
            (0.7, 10, 1e-9),
            (100.0, 1000, 1e-2),
        ] {
            let exact = pld_epsilon(&[job(sigma, 1.0, steps)], delta(d));
            let jobs = [job(sigma, 1.0, steps)];
            for direction in [Direction::Remove, Direction::Add] {
                let found = Search::new(&jobs, direction, d).epsilon(0.0);
                assert!(
                    found >= exact * (1.0 - 1e-9) && found <= exact * 1.001,
                    "σ {sigma}, {steps} steps, δ {d}, {direction:?}: {found}, exact {exact}"
                );
            }
        }
    }

    #[test]
    fn jobs_compose_in_any_order_and_split() {
        let (a, b) = (job(1.1, 0.02, 300), job(3.0, 1.0, 4));
        let d = delta(1e-6);
        let together = pld_epsilon(&[a, b], d);
        let parts = [job(1.1, 0.02, 100), b, job(1.1, 0.02, 200)];
        let split = pld_epsilon(&parts, d);
        assert!((together / split - 1.0).abs() < 1e-3, "{together} {split}");
        assert!(together > pld_epsilon(&[a], d).max(pld_epsilon(&[b], d)));
        let rdp = a.rdp().plus(&b.rdp()).epsilon(d).epsilon;
        assert!(together <= rdp);
    }

    #[test]
    fn extremes_give_no_nan() {
        for sigma in [1e-200, 1e-3, 0.05, 1e4, 1e200] {
            for rate in [1e-12, 0.5, 1.0] {
                for steps in [1, 1_000_000, u64::MAX] {
                    for d in [1e-300, 1e-6, 0.999] {
                        let epsilon = pld_epsilon(&[job(sigma, rate, steps)], delta(d));
                        assert!(
                            epsilon >= 0.0,
                            "σ {sigma}, q {rate}, {steps} steps, δ {d}: {epsilon}"
                        );
                    }
                }
            }
        }
        assert!(pld_epsilon(&[], delta(1e-6)) == 0.0 && pld_epsilon(&[job(1.0, 0.5, 0)], delta(1e-6)) == 0.0);
    }
}
