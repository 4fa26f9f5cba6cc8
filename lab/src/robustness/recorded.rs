//! Moments of recorded machines: one is new, of the others some are hostile.
//!
//! Every machine in turn is the new one; four of the other twelve, drawn anew for every machine and seed, are hostile. Each
//! site's release is made once for a seed. The oracle is the mean of the honest.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;
use theriac_model::detector::{Detector, FitOptions};
use theriac_model::gate::{self, GateOutcome, Trial};
use theriac_model::global::{GlobalModel, OwnLagWeights, moments_layout};
use theriac_model::moments::{self, BLOCK_CLIP_NORM, BLOCK_ROWS};
use theriac_privacy::accountant::{SamplingRate, calibrated_noise_multiplier};
use theriac_privacy::policy::PrivacyUnit;
use theriac_protocol::message::{AnnounceV1, UpdateKind};
use theriac_protocol::units::{Delta, Digest, Epsilon, L2Norm, ModelVersion, NoiseMultiplier, Round};

use super::pipeline::{Memory, Pipeline};
use super::round::Battle;
use super::{RobustnessError, Value};
use crate::attack::statistics::{Gaussian, Spread, narrow};
use crate::attack::{Attack, Kind, poison};
use crate::evaluate;
use crate::simulate::data::{Fleet, Site, load};

/// Rows that a new machine has.
pub const STARTS: [usize; 2] = [120, 1000];

/// Longest buffer of the range-aware surface, in samples; the default of `evaluate`.
const WINDOW: usize = 100;

/// The poisons that are made once for each site and seed.
const POISONS: [Kind; 4] = [
    Kind::PoisonNegate,
    Kind::PoisonShuffle,
    Kind::PoisonScale,
    Kind::PoisonScaleMild,
];

/// What is measured on the new machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// One-step loss of the own-lag weights alone: fast.
    Loss,
    /// Also the detection by a detector that starts from the model.
    Detection,
}

/// The machines and what was worked out of them once.
pub struct Recorded {
    fleet: Fleet,
    terms: AnnounceV1,
    noise: f32,
    /// Clipped sums of each site: honest, then of each of [`POISONS`].
    sums: Vec<[Vec<f32>; 5]>,
    trials: Vec<Trial>,
    /// Detection volume of a new machine with a model, by machine, start and model.
    detected: Mutex<HashMap<(usize, usize, Digest), [f64; 2]>>,
    labels: Vec<Vec<bool>>,
    locals: Vec<[Detector; 2]>,
    local_volumes: Vec<[f64; 2]>,
    hostile: usize,
    depth: Depth,
}

impl std::fmt::Debug for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorded")
            .field("sites", &self.sums.len())
            .finish_non_exhaustive()
    }
}

/// Measures of one model on one new machine.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    error: f64,
    /// At each start, without and with the gate.
    volumes: [[f64; 2]; 2],
}

impl Recorded {
    /// Reads the machines of `data`. `epsilon`: of one block, `None` without noise.
    ///
    /// # Errors
    /// [`RobustnessError`]
    pub fn new(
        data: &Path,
        epsilon: Option<f64>,
        hostile: usize,
        seed: u64,
        depth: Depth,
    ) -> Result<Self, RobustnessError> {
        let fleet = load(data, &[])?;
        let sites = fleet.sites.len();
        if sites < 2 * hostile + 2 {
            return Err(RobustnessError::TooFewSites {
                found: sites,
                needed: 2 * hostile + 2,
            });
        }
        let sigma = match epsilon {
            None => f64::MIN_POSITIVE,
            Some(epsilon) => calibrated_noise_multiplier(
                Epsilon::new(epsilon)?,
                Delta::new(1e-6)?,
                SamplingRate::FULL,
                1,
                PrivacyUnit::Block.sensitivity(UpdateKind::Moments),
            )
            .ok_or(RobustnessError::NoNoise(epsilon))?
            .value(),
        };
        let channels = fleet.schema.channels();
        let layout = moments_layout(channels);
        let longest = fleet
            .sites
            .iter()
            .map(|site| site.train.rows() / BLOCK_ROWS)
            .max()
            .unwrap_or(1);
        let terms = AnnounceV1 {
            round: Round(1),
            nonce: 0,
            kind: UpdateKind::Moments,
            values: u32::try_from(layout.len()).unwrap_or(u32::MAX),
            layout_digest: Digest(layout.digest()),
            base_version: ModelVersion(0),
            base_digest: Digest::default(),
            clip_norm: L2Norm::new(BLOCK_CLIP_NORM)?,
            noise_multiplier: NoiseMultiplier::new(sigma)?,
            block_rows: u32::try_from(BLOCK_ROWS).unwrap_or(u32::MAX),
            blocks_min: 1,
            blocks_max: u32::try_from(longest).unwrap_or(u32::MAX),
            deadline_ms: 1,
        };
        let sums = fleet
            .sites
            .par_iter()
            .map(|site| {
                let spoilt = POISONS.map(|kind| clipped(&site.poisoned(kind, seed), &fleet, Some(kind)));
                let [a, b, c, d] = spoilt;
                [clipped(site, &fleet, None), a, b, c, d]
            })
            .collect();
        let trials = fleet
            .sites
            .par_iter()
            .map(|site| Trial::new(&fleet.schema, &site.train, STARTS[1]))
            .collect();
        let mut recorded = Self {
            terms,
            noise: narrow(epsilon.map_or(0.0, |_| sigma * BLOCK_CLIP_NORM)),
            sums,
            trials,
            detected: Mutex::default(),
            labels: Vec::new(),
            locals: Vec::new(),
            local_volumes: Vec::new(),
            hostile,
            depth,
            fleet,
        };
        if depth == Depth::Detection {
            recorded.fit_locals(data)?;
        }
        Ok(recorded)
    }

    fn fit_locals(&mut self, data: &Path) -> Result<(), RobustnessError> {
        let options = FitOptions {
            prior: Some(OwnLagWeights::public_constant(self.fleet.schema.channels())),
            ..FitOptions::new(Duration::from_mins(1))
        };
        for site in &self.fleet.sites {
            self.labels.push(evaluate::labels(
                &data.join(format!("{}.label.npy.gz", site.name)),
            )?);
        }
        let fit = |(index, site): (usize, &Site)| {
            let one = |rows: usize| Detector::fit(&self.fleet.schema, &site.train.tail(rows), &options);
            let detectors = [one(STARTS[0])?, one(STARTS[1])?];
            let volumes = [
                self.volume(index, &detectors[0])?,
                self.volume(index, &detectors[1])?,
            ];
            Ok((detectors, volumes))
        };
        let all: Vec<_> = self
            .fleet
            .sites
            .par_iter()
            .enumerate()
            .map(fit)
            .collect::<Result<_, RobustnessError>>()?;
        (self.locals, self.local_volumes) = all.into_iter().unzip();
        Ok(())
    }

    fn volume(&self, site: usize, detector: &Detector) -> Result<f64, RobustnessError> {
        let scores = detector.score_series(&self.fleet.sites[site].test)?;
        Ok(evaluate::vus_pr(&self.labels[site], &scores, WINDOW))
    }

    /// Machines that send in each round: all but the new one.
    pub fn senders(&self) -> usize {
        self.sums.len().saturating_sub(1)
    }

    /// Ratios to the honest-only oracle of one seed for every pair of a pipeline and an attack, in their order: attacks of the first
    /// pipeline, then of the second. `done` is called for each pair.
    ///
    /// # Errors
    /// [`RobustnessError`]
    pub fn seed(
        &self,
        seed: u64,
        pipelines: &[Pipeline],
        attacks: &[Option<Attack>],
        done: &(dyn Fn() + Sync),
    ) -> Result<Vec<Vec<Value>>, RobustnessError> {
        let released = self.released(seed);
        let splits: Vec<(usize, Vec<usize>)> = (0..self.sums.len())
            .map(|newcomer| (newcomer, self.order(newcomer, seed)))
            .collect();
        let oracles: Vec<Measured> = splits
            .par_iter()
            .map(|(newcomer, order)| {
                let honest = Self::rows(&released, &order[self.hostile..], 0);
                self.measure(*newcomer, &Spread::of(&honest).mean, honest.len())
            })
            .collect::<Result<_, _>>()?;
        let pairs: Vec<(&Pipeline, Option<Attack>)> = pipelines
            .iter()
            .flat_map(|pipeline| attacks.iter().map(move |attack| (pipeline, *attack)))
            .collect();
        pairs
            .par_iter()
            .map(|(pipeline, attack)| {
                let measured: Vec<Measured> = splits
                    .iter()
                    .map(|(newcomer, order)| {
                        self.attacked(*newcomer, order, &released, seed, pipeline, *attack)
                    })
                    .collect::<Result<_, _>>()?;
                done();
                Ok(ratios(&measured, &oracles, self.depth))
            })
            .collect()
    }

    fn attacked(
        &self,
        newcomer: usize,
        order: &[usize],
        released: &[[Vec<f32>; 5]],
        seed: u64,
        pipeline: &Pipeline,
        attack: Option<Attack>,
    ) -> Result<Measured, RobustnessError> {
        let (hostile, honest) = order.split_at(self.hostile);
        let poison = attack.and_then(|attack| POISONS.iter().position(|kind| *kind == attack.kind));
        let honest = Self::rows(released, honest, 0);
        let own = Self::rows(released, hostile, poison.map_or(0, |index| index + 1));
        let previous = None;
        let memory = Memory::default();
        let battle = Battle {
            pipeline,
            terms: &self.terms,
            memory: &memory,
            seed: seed.wrapping_mul(1_000) + newcomer as u64,
            previous,
        };
        match battle.fight(&honest, &own, attack) {
            Some((combined, _)) => self.measure(newcomer, &combined.values, combined.rows),
            // No result: everybody keeps what there is, which for a new machine is the public constant.
            None => self.measure(newcomer, &vec![0.0; self.sums[0][0].len()], 1),
        }
    }

    /// The other sites in an order of the seed: hostile ones first.
    fn order(&self, newcomer: usize, seed: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.sums.len()).filter(|site| *site != newcomer).collect();
        order.shuffle(&mut StdRng::seed_from_u64(
            seed.wrapping_mul(7_919).wrapping_add(newcomer as u64),
        ));
        order
    }

    fn rows(released: &[[Vec<f32>; 5]], sites: &[usize], which: usize) -> Vec<Vec<f32>> {
        let mut sites = sites.to_vec();
        sites.sort_unstable();
        sites.iter().map(|site| released[*site][which].clone()).collect()
    }

    /// Every site's releases with this seed's noise.
    fn released(&self, seed: u64) -> Vec<[Vec<f32>; 5]> {
        let noised = |site: usize, which: usize, sum: &Vec<f32>| {
            let mut noise = Gaussian::new(seed, Round(which as u64), site);
            sum.iter()
                .map(|value| value + self.noise * noise.draw())
                .collect()
        };
        self.sums
            .iter()
            .enumerate()
            .map(|(site, sums)| std::array::from_fn(|which| noised(site, which, &sums[which])))
            .collect()
    }

    /// What the model of `mean` over `sites` sites does on a new machine.
    fn measure(&self, newcomer: usize, mean: &[f32], sites: usize) -> Result<Measured, RobustnessError> {
        let channels = self.fleet.schema.channels();
        let sum: Vec<f32> = mean
            .iter()
            .map(|value| narrow(f64::from(*value) * sites as f64))
            .collect();
        let (sigma, clip) = (self.terms.noise_multiplier.value(), self.terms.clip_norm.value());
        let own = moments::solve(&sum, sites, sigma, clip, channels);
        let mut measured = Measured {
            error: self.trials[newcomer].squared_error(&own),
            ..Measured::default()
        };
        if self.depth == Depth::Detection {
            let model = GlobalModel::initial(channels, 1).with_own_lag(&own)?;
            let bytes = theriac_protocol::compress::encode_f32(model.values());
            let digest = Digest::of(&bytes);
            for (at, rows) in STARTS.into_iter().enumerate() {
                measured.volumes[at] = self.detection(newcomer, (at, rows), &model, digest)?;
            }
        }
        Ok(measured)
    }

    /// Detection volume without and with the gate.
    fn detection(
        &self,
        newcomer: usize,
        (at, rows): (usize, usize),
        model: &GlobalModel,
        digest: Digest,
    ) -> Result<[f64; 2], RobustnessError> {
        let key = (newcomer, at, digest);
        if let Some(known) = self
            .detected
            .lock()
            .ok()
            .and_then(|known| known.get(&key).copied())
        {
            return Ok(known);
        }
        let (local, history) = (
            &self.locals[newcomer][at],
            self.fleet.sites[newcomer].train.tail(rows),
        );
        let free = self.volume(
            newcomer,
            &local.refit_with_global(&history, model, local.options())?,
        )?;
        let gated = if matches!(
            gate::judge(local, &history, model, local.options()).outcome,
            GateOutcome::Accepted(_)
        ) {
            free
        } else {
            self.local_volumes[newcomer][at]
        };
        if let Ok(mut known) = self.detected.lock() {
            known.insert(key, [free, gated]);
        }
        Ok([free, gated])
    }
}

/// Ratios of the means over machines for detection, the mean of ratios for the loss.
fn ratios(measured: &[Measured], oracles: &[Measured], depth: Depth) -> Vec<Value> {
    let count = measured.len() as f64;
    let loss = measured
        .iter()
        .zip(oracles)
        .map(|(measured, oracle)| oracle.error / measured.error)
        .sum::<f64>()
        / count;
    let mut values = vec![Value {
        measure: "loss",
        ratio: loss,
    }];
    if depth == Depth::Detection {
        let names = [["vus_120", "vus_120_gate"], ["vus_1000", "vus_1000_gate"]];
        for (at, names) in names.into_iter().enumerate() {
            for (gate, measure) in names.into_iter().enumerate() {
                let sum =
                    |all: &[Measured], gate: usize| all.iter().map(|m| m.volumes[at][gate]).sum::<f64>();
                // The oracle's own figure is the one without the gate, for both.
                let ratio = sum(measured, gate) / sum(oracles, 0);
                values.push(Value { measure, ratio });
            }
        }
    }
    values
}

/// The sum of a site's clipped blocks.
fn clipped(site: &Site, fleet: &Fleet, kind: Option<Kind>) -> Vec<f32> {
    let mut sum = vec![0.0_f64; moments_layout(fleet.schema.channels()).len()];
    for block in site.blocks(&fleet.schema) {
        let mut block = block.clone();
        if let Some(kind) = kind {
            poison::moments(kind, &mut block);
        }
        let norm = block.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = (BLOCK_CLIP_NORM / norm).min(1.0);
        sum.iter_mut()
            .zip(&block)
            .for_each(|(sum, value)| *sum += scale * f64::from(*value));
    }
    sum.into_iter().map(narrow).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_one_for_the_oracle_itself() {
        let one = Measured {
            error: 2.0,
            volumes: [[0.5, 0.4], [0.6, 0.6]],
        };
        let values = ratios(&[one; 3], &[one; 3], Depth::Detection);
        let found: Vec<f64> = values.iter().map(|value| value.ratio).collect();
        for (found, expected) in found.iter().zip([1.0, 1.0, 0.8, 1.0, 1.0]) {
            assert!((found - expected).abs() < 1e-12, "{values:?}");
        }
    }
}
