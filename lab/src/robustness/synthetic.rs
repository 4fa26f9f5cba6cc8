//! A made fleet that learns together over many rounds: 30 sites, 9 of them hostile, 60 rounds of a small autoencoder.
//!
//! Sites differ: each draws its rows from six regimes in shares of its own (Dirichlet 0.5) and has an offset. An anomaly is a
//! row whose groups of five features come from different rows: every feature looks normal, their relations do not. Measured is
//! the area under the ROC curve of the reconstruction error, chance 0.5. Every update is clipped to norm 1; with privacy on,
//! noise of norm 1 is added.

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;
use theriac_protocol::message::{AnnounceV1, UpdateKind};
use theriac_protocol::units::{Digest, L2Norm, ModelVersion, NoiseMultiplier, Round};

use super::network::{FEATURES, PARAMETERS, add_gradient, auroc, error, initial};
use super::pipeline::{Memory, Pipeline};
use super::round::Battle;
use super::{RobustnessError, Value};
use crate::attack::statistics::{Gaussian, narrow, norm};
use crate::attack::{Attack, Kind, poison};

/// Sites.
pub const SITES: usize = 30;
/// Hostile ones.
pub const HOSTILE: usize = 9;
/// Rounds.
pub const ROUNDS: u32 = 60;

const REGIMES: usize = 6;
const ROWS: usize = 300;
const TEST_ROWS: usize = 250;
const STEPS: usize = 8;
const BATCH: usize = 32;
const RATE: f32 = 0.2;
const GROUP: usize = 5;

type Row = [f32; FEATURES];

/// Rows of all sites and what is tested.
struct World {
    sites: Vec<Vec<Row>>,
    normal: Vec<Row>,
    anomalous: Vec<Row>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut noise = Gaussian::new(seed, Round(0), 0);
        let mut rng = StdRng::seed_from_u64(seed);
        let regimes: Vec<[Row; 4]> = (0..REGIMES)
            .map(|_| std::array::from_fn(|_| std::array::from_fn(|_| noise.draw())))
            .collect();
        let draw = |regime: &[Row; 4], noise: &mut Gaussian| -> Row {
            let hidden: [f32; 3] = std::array::from_fn(|_| noise.draw());
            std::array::from_fn(|i| {
                let mixed: f32 = hidden.iter().zip(&regime[1..]).map(|(z, m)| z * m[i]).sum();
                (0.5 * (regime[0][i] + mixed)).tanh() + 0.08 * noise.draw()
            })
        };
        let sites = (0..SITES)
            .map(|_| {
                // Gamma of shape 1/2 is half a squared normal number; their shares are Dirichlet(1/2).
                let shares: Vec<f64> = (0..REGIMES).map(|_| f64::from(noise.draw()).powi(2)).collect();
                let all: f64 = shares.iter().sum();
                let offset: Row = std::array::from_fn(|_| 0.1 * noise.draw());
                (0..ROWS)
                    .map(|_| {
                        let mut left = rng.random::<f64>() * all;
                        let regime = shares
                            .iter()
                            .position(|share| {
                                left -= share;
                                left < 0.0
                            })
                            .unwrap_or(REGIMES - 1);
                        let row = draw(&regimes[regime], &mut noise);
                        std::array::from_fn(|i| row[i] + offset[i])
                    })
                    .collect()
            })
            .collect();
        let normal: Vec<Row> = regimes
            .iter()
            .flat_map(|regime| std::iter::repeat_n(regime, TEST_ROWS))
            .map(|regime| draw(regime, &mut noise))
            .collect();
        let anomalous = torn(&normal, &mut rng);
        Self {
            sites,
            normal,
            anomalous,
        }
    }

    /// A site's rows as poison leaves them.
    fn spoilt(&self, site: usize, kind: Option<Kind>, seed: u64) -> Vec<Row> {
        let rows = &self.sites[site];
        let times = |factor: f32| rows.iter().map(|row| row.map(|value| factor * value)).collect();
        match kind {
            Some(Kind::PoisonShuffle) => torn(rows, &mut StdRng::seed_from_u64(seed ^ site as u64)),
            Some(Kind::PoisonNegate) => times(-1.0),
            Some(Kind::PoisonScale) => times(poison::TARGET_FACTOR),
            Some(Kind::PoisonScaleMild) => times(poison::TARGET_FACTOR_MILD),
            _ => rows.clone(),
        }
    }
}

/// Rows whose groups of features come from different rows.
fn torn(rows: &[Row], rng: &mut StdRng) -> Vec<Row> {
    let mut torn = rows.to_vec();
    for group in 0..FEATURES / GROUP {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.shuffle(rng);
        for (row, from) in order.into_iter().enumerate() {
            let here = group * GROUP..(group + 1) * GROUP;
            torn[row][here.clone()].copy_from_slice(&rows[from][here]);
        }
    }
    torn
}

/// The workload with or without noise.
#[derive(Debug, Clone)]
pub struct Synthetic {
    terms: AnnounceV1,
    noise: f32,
    rounds: u32,
}

impl Synthetic {
    /// `private`: noise of norm 1, as long as the clipping norm.
    ///
    /// # Errors
    /// [`RobustnessError`]
    pub fn new(private: bool, rounds: u32) -> Result<Self, RobustnessError> {
        let sigma = if private {
            1.0 / (PARAMETERS as f64).sqrt()
        } else {
            f64::MIN_POSITIVE
        };
        Ok(Self {
            terms: AnnounceV1 {
                round: Round(1),
                nonce: 0,
                kind: UpdateKind::Delta,
                values: u32::try_from(PARAMETERS).unwrap_or(u32::MAX),
                layout_digest: Digest::default(),
                base_version: ModelVersion(0),
                base_digest: Digest::default(),
                clip_norm: L2Norm::new(1.0)?,
                noise_multiplier: NoiseMultiplier::new(sigma)?,
                block_rows: 60,
                blocks_min: 1,
                blocks_max: 1,
                deadline_ms: 1,
            },
            noise: if private { narrow(sigma) } else { 0.0 },
            rounds,
        })
    }

    /// As [`Recorded::seed`](super::recorded::Recorded::seed).
    ///
    /// # Errors
    /// [`RobustnessError`] when the mean cannot be named.
    pub fn seed(
        &self,
        seed: u64,
        pipelines: &[Pipeline],
        attacks: &[Option<Attack>],
        done: &(dyn Fn() + Sync),
    ) -> Result<Vec<Vec<Value>>, RobustnessError> {
        let world = World::new(seed);
        let mean: Pipeline = "mean".parse()?;
        let oracle = self.train(&world, seed, &mean, None, SITES - HOSTILE);
        let pairs: Vec<(&Pipeline, Option<Attack>)> = pipelines
            .iter()
            .flat_map(|pipeline| attacks.iter().map(move |attack| (pipeline, *attack)))
            .collect();
        Ok(pairs
            .par_iter()
            .map(|(pipeline, attack)| {
                let area = self.train(&world, seed, pipeline, *attack, SITES);
                done();
                vec![Value {
                    measure: "auroc".into(),
                    ratio: area / oracle,
                }]
            })
            .collect())
    }

    /// Area under the ROC curve after the last round. With fewer than all sites the hostile ones stay silent.
    fn train(
        &self,
        world: &World,
        seed: u64,
        pipeline: &Pipeline,
        attack: Option<Attack>,
        sites: usize,
    ) -> f64 {
        let kind = attack.map(|attack| attack.kind).filter(|kind| kind.is_poison());
        let rows: Vec<Vec<Row>> = (0..sites)
            .map(|site| world.spoilt(site, kind.filter(|_| site >= SITES - HOSTILE), seed))
            .collect();
        let mut noise = Gaussian::new(seed, Round(0), usize::MAX - 1);
        let mut weights = initial(|| noise.draw());
        let (mut memory, mut previous) = (Memory::default(), None::<Vec<f32>>);
        let mut terms = self.terms.clone();
        for round in 1..=u64::from(self.rounds) {
            terms.round = Round(round);
            let updates: Vec<Vec<f32>> = rows
                .iter()
                .enumerate()
                .map(|(site, rows)| self.update(&weights, rows, seed, terms.round, site))
                .collect();
            let (honest, own) = updates.split_at(SITES - HOSTILE);
            let battle = Battle {
                pipeline,
                terms: &terms,
                memory: &memory,
                seed,
                previous: previous.as_deref(),
            };
            // A round without a result leaves the model as it is.
            if let Some((combined, after)) = battle.fight(honest, own, attack) {
                weights
                    .iter_mut()
                    .zip(&combined.values)
                    .for_each(|(weight, step)| *weight += step);
                (memory, previous) = (after, Some(combined.values));
            }
            if !weights.iter().all(|weight| weight.abs() < 1e6) {
                return 0.5;
            }
        }
        let errors = |rows: &[Row]| rows.iter().map(|row| error(&weights, row)).collect::<Vec<f64>>();
        auroc(&errors(&world.normal), &errors(&world.anomalous))
    }

    /// What a site releases: the change of a few steps, clipped and noised.
    fn update(&self, weights: &[f32], rows: &[Row], seed: u64, round: Round, site: usize) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed ^ (round.0 << 20) ^ ((site as u64) << 40));
        let mut local = weights.to_vec();
        let mut gradient = vec![0.0; PARAMETERS];
        for _ in 0..STEPS {
            gradient.fill(0.0);
            for _ in 0..BATCH {
                let row = &rows[rng.random_range(0..rows.len())];
                add_gradient(&local, row, 1.0 / BATCH as f32, &mut gradient);
            }
            local
                .iter_mut()
                .zip(&gradient)
                .for_each(|(weight, gradient)| *weight -= RATE * gradient);
        }
        let mut change: Vec<f32> = local.iter().zip(weights).map(|(new, old)| new - old).collect();
        // A hair below 1: rounding must not pass the bound.
        let scale = narrow(((1.0 - 1e-6) / norm(&change)).min(1.0));
        let mut noise = Gaussian::new(seed, round, site);
        for value in &mut change {
            *value *= scale;
            if self.noise > 0.0 {
                *value += self.noise * noise.draw();
            }
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anomaly_has_the_same_features_in_other_company() {
        let world = World::new(1);
        assert_eq!(
            (world.sites.len(), world.normal.len()),
            (SITES, REGIMES * TEST_ROWS)
        );
        for feature in 0..FEATURES {
            let sorted = |rows: &[Row]| {
                let mut values: Vec<u32> = rows.iter().map(|row| row[feature].to_bits()).collect();
                values.sort_unstable();
                values
            };
            assert_eq!(sorted(&world.normal), sorted(&world.anomalous));
        }
        assert_ne!(world.normal, world.anomalous);
    }

    #[test]
    fn a_few_rounds_learn_and_noise_has_its_law() {
        let world = World::new(2);
        let mean: Pipeline = "mean".parse().unwrap();
        let after = |rounds| {
            let workload = Synthetic::new(false, rounds).unwrap();
            workload.train(&world, 2, &mean, None, SITES)
        };
        assert!(after(6) > after(0) + 0.02, "{} {}", after(0), after(6));
        let private = Synthetic::new(true, 1).unwrap();
        let update = private.update(&[0.1; PARAMETERS], &world.sites[0], 1, Round(1), 0);
        assert!((0.8..2.2).contains(&norm(&update)), "{}", norm(&update));
    }
}
