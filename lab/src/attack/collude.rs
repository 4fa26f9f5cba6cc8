//! What colluders make of the mean and the spread of the honest updates.

use theriac_protocol::units::Round;

use super::statistics::{Gaussian, Spread, distance_squared, moved, narrow, norm};

/// Part of the honest standard deviation that [`drift`] moves by in a round.
const DRIFT: f64 = 0.5;

/// Which share of the values [`backdoor`] wants to replace: one in this many, the last ones.
const BACKDOOR_PART: usize = 10;

/// `−τ · mean` (Xie, Koyejo and Gupta 2020, equation 4).
pub fn ipm(honest: &Spread, tau: f32) -> Vec<f32> {
    honest.mean.iter().map(|mean| -tau * mean).collect()
}

/// `mean + z · deviation` (Baruch, Baruch and Goldberg 2019, algorithm 1; they subtract).
pub fn alie(honest: &Spread, z: f32) -> Vec<f32> {
    moved(&honest.mean, z.into(), &honest.deviation)
}

/// What the last round gave (or the honest mean) plus a step at a right angle to it, as long as honest updates lie from their
/// mean on average: the reference-orthogonal perturbation of Özfatura et al. (2023, section 4) at 90 degrees.
pub fn across(rows: &[Vec<f32>], honest: &Spread, previous: Option<&[f32]>, seed: u64) -> Vec<f32> {
    let length = rows
        .iter()
        .map(|row| distance_squared(row, &honest.mean).sqrt())
        .sum::<f64>()
        / rows.len().max(1) as f64;
    let reference = previous
        .filter(|p| p.len() == honest.mean.len() && norm(p) > 0.0)
        .unwrap_or(&honest.mean);
    let mut step = fixed_direction(honest.mean.len(), seed);
    let square = reference.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    if square > 0.0 {
        let along: f64 = step
            .iter()
            .zip(reference)
            .map(|(s, r)| f64::from(*s) * f64::from(*r))
            .sum();
        step = moved(&step, -along / square, reference);
    }
    let scale = length / norm(&step).max(f64::MIN_POSITIVE);
    // Beside the honest mean, so that no honest neighbour is nearer than the others.
    moved(&honest.mean, scale, &step)
}

/// The honest mean and half a standard deviation along signs that are the same in every round.
pub fn drift(honest: &Spread, seed: u64) -> Vec<f32> {
    let signs = fixed_direction(honest.mean.len(), seed);
    honest
        .mean
        .iter()
        .zip(&honest.deviation)
        .zip(signs)
        .map(|((mean, deviation), sign)| {
            narrow(f64::from(*mean) + DRIFT * f64::from(*deviation) * f64::from(sign.signum()))
        })
        .collect()
}

/// The honest mean with its last tenth reversed, enlarged by n/f around the mean so that an average of all `sites` rows would
/// take it over (Bagdasaryan et al. 2020, equation 3), then cut to norm `bound`.
pub fn backdoor(honest: &Spread, sites: usize, hostile: usize, bound: f64) -> Vec<f32> {
    let scale = sites as f64 / hostile.max(1) as f64;
    let length = honest.mean.len();
    let from = length - length / BACKDOOR_PART;
    let row: Vec<f32> = honest
        .mean
        .iter()
        .enumerate()
        .map(|(index, mean)| {
            let wanted = if index < from { *mean } else { -mean };
            narrow(f64::from(*mean) + scale * f64::from(wanted - mean))
        })
        .collect();
    let shrink = (bound * (1.0 - 1e-6) / norm(&row).max(f64::MIN_POSITIVE)).min(1.0);
    row.into_iter()
        .map(|value| narrow(f64::from(value) * shrink))
        .collect()
}

/// A direction that depends on the seed alone.
fn fixed_direction(length: usize, seed: u64) -> Vec<f32> {
    let mut noise = Gaussian::new(seed, Round(0), usize::MAX);
    (0..length).map(|_| noise.draw()).collect()
}
