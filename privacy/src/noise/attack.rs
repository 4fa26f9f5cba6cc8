//! A membership attack on whole releases: can somebody who knows all other blocks tell whether one more was there?
//!
//! The attacker is the best there is: it subtracts what it knows and looks along the extra block's direction (Neyman and Pearson). From
//! 10 000 releases with and as many without the block, the test measures how well any threshold tells them apart, and compares it with what
//! the ledger's curve allows: for every (ε, δ) of the curve, `hits ≤ e^ε · false alarms + δ`. The measured rates are
//! off by at most [`UNSURE`], for all thresholds at once, except once in 10⁶ runs (Dvoretzky, Kiefer and Wolfowitz 1956, Massart 1990).

use theriac_protocol::units::{Delta, L2Norm, NoiseMultiplier};

use super::{ExactGaussian, NoiseError, NoiseMechanism, SecureSource, release, sealed, split};
use crate::accountant::{Rho, SamplingRate, SubsampledGaussian};
use crate::clip::GridSum;
use crate::factors::{FactoredSum, LayerFactors, UnitFactors};

const RELEASES: usize = 10_000;
const VALUES: usize = 24;
const SIGMA: f64 = 1.27;
/// √(ln(2·10⁶) / 2n).
const UNSURE: f64 = 0.026_94;

/// The seams of a build that went wrong: half of the noise.
#[derive(Debug)]
struct HalvedNoise;

impl NoiseMechanism for HalvedNoise {}

impl sealed::Mechanism for HalvedNoise {
    fn noised(&self, sum: &GridSum, _sensitivity: f64) -> Result<Vec<f64>, NoiseError> {
        let mut source = SecureSource::from_system()?;
        Ok(super::noised_by(sum, || split::RELEASE.draw(&mut source) / 2))
    }
}

/// How blocks come to the sum.
#[derive(Debug, Clone, Copy)]
enum Given {
    /// As one vector each.
    AsVectors,
    /// As inputs and errors of a layer of five inputs, a bias and four outputs.
    AsFactors,
}

/// The sum of these blocks.
fn sum_of(seeds: std::ops::RangeInclusive<usize>, given: Given) -> GridSum {
    let (clip, sigma) = (L2Norm::new(10.0).unwrap(), NoiseMultiplier::new(SIGMA).unwrap());
    let mut sum = GridSum::new(VALUES, clip, sigma);
    let block = |seed: usize| -> Vec<f32> {
        (0..VALUES)
            .map(|i| ((i * 7 + seed * 13) % 11) as f32 - 5.0)
            .collect()
    };
    match given {
        Given::AsVectors => seeds.for_each(|seed| sum.add(&block(seed))),
        Given::AsFactors => {
            let units = seeds.clone().count();
            let part = |width: usize| -> Vec<f32> {
                let blocks = seeds.clone().map(block);
                blocks.flat_map(|block| block.into_iter().take(width)).collect()
            };
            let (inputs, errors) = (part(5), part(4));
            let layer = LayerFactors {
                inputs: &inputs,
                errors: &errors,
                bias: true,
                range_log2: 3,
            };
            let mut factored = FactoredSum::new(sum.grid(), sum.unit_norm_max(), VALUES, units).unwrap();
            factored.add(&UnitFactors::new(&[layer], units, 1).unwrap());
            sum.add_clipped(factored.rounded());
        }
    }
    sum
}

/// What the attacker computes of each release, without and with the block. Both data sets hold five other blocks.
fn statistics(mechanism: &dyn NoiseMechanism, given: Given) -> (Vec<f64>, Vec<f64>) {
    let sigma = NoiseMultiplier::new(SIGMA).unwrap();
    let (others, both) = (sum_of(1..=5, given), sum_of(0..=5, given));
    let known: Vec<f64> = others.steps().iter().map(|x| *x as f64).collect();
    let direction: Vec<f64> = both
        .steps()
        .iter()
        .zip(&known)
        .map(|(x, known)| *x as f64 - known)
        .collect();
    let charged = Rho::gaussian(1.0, sigma);
    let step = others.grid().step();
    let look = |sum: &GridSum| -> Vec<f64> {
        let one = |_| {
            let noisy = release(mechanism, sum, 1.0, charged).unwrap();
            let seen = noisy.iter().zip(&known).map(|(x, known)| x / step - known);
            seen.zip(&direction).map(|(x, along)| x * along).sum::<f64>()
        };
        let mut seen: Vec<f64> = (0..RELEASES).map(one).collect();
        seen.sort_by(f64::total_cmp);
        seen
    };
    (look(&others), look(&both))
}

/// The largest excess over what the curve allows, over every threshold and a range of δ; above 0 the claim is refuted.
fn excess(mechanism: &dyn NoiseMechanism, given: Given) -> f64 {
    let (without, with) = statistics(mechanism, given);
    let above = |sorted: &[f64], threshold: f64| {
        (RELEASES - sorted.partition_point(|x| *x <= threshold)) as f64 / RELEASES as f64
    };
    let curve = SubsampledGaussian::new(NoiseMultiplier::new(SIGMA).unwrap(), SamplingRate::FULL).rdp();
    let of_delta = |delta: f64| {
        let factor = curve.epsilon(Delta::new(delta).unwrap()).epsilon.exp();
        let at = |threshold: &f64| {
            let (hits, alarms) = (above(&with, *threshold), above(&without, *threshold));
            let present = (hits - UNSURE) - factor * (alarms + UNSURE) - delta;
            // The same claim the other way around: telling that the block is absent.
            let absent = (1.0 - alarms - UNSURE) - factor * (1.0 - hits + UNSURE) - delta;
            present.max(absent)
        };
        without
            .iter()
            .step_by(10)
            .chain(with.iter().step_by(10))
            .map(at)
            .fold(f64::MIN, f64::max)
    };
    [1e-6, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4]
        .into_iter()
        .map(of_delta)
        .fold(f64::MIN, f64::max)
}

#[test]
fn no_attack_beats_the_claim() {
    for given in [Given::AsVectors, Given::AsFactors] {
        let excess = excess(&ExactGaussian, given);
        assert!(
            excess <= 0.0,
            "{given:?}: the attack refutes the claim by {excess}"
        );
    }
}

#[test]
fn the_attack_catches_a_build_with_half_of_the_noise() {
    for given in [Given::AsVectors, Given::AsFactors] {
        let excess = excess(&HalvedNoise, given);
        assert!(
            excess > 0.05,
            "{given:?}: half of the noise went unnoticed: {excess}"
        );
    }
}
