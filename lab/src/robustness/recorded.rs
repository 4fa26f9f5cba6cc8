//! Moments of recorded machines: one is new, of the others some are hostile.
//!
//! Every machine in turn is the new one; four of the other twelve, drawn anew for every machine and seed, are hostile. Each
//! site's release is made once for a seed. The oracle is the mean of the honest.
//!
//! With validators some of the honest take no part: they try what the round gave against the model in force, which is what the same sites
//! gave with other noise before any of them was hostile. A model that they turn down leaves that one in force.

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
use crate::simulate::validator::{Validator, validate};

/// Rows that a new machine has.
pub const STARTS: [usize; 2] = [120, 1000];

/// Longest buffer of the range-aware surface, in samples; the default of `evaluate`.
const WINDOW: usize = 100;

/// Added to a seed for the noise of the round that gave the model in force.
const EARLIER: u64 = 1 << 32;

/// How much worse than with the model in force the new machine's loss must be for a model to count as harmful: as much as validators let pass.
const HARM: f64 = 1.05;

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
    /// Each site as one that tries models; empty where none do.
    inspectors: Vec<Validator>,
    /// How many of the honest do in each round.
    validators: usize,
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
    /// Where validators were asked.
    validated: Option<Validated>,
}

/// What validators made of a model.
#[derive(Debug, Clone, Copy)]
struct Validated {
    /// `None`: the rule gave no result, so nobody was asked and the model in force stays.
    published: Option<bool>,
    /// Loss of the model in force on the new machine.
    in_force: f64,
}

/// What came of one round.
struct Fought {
    own: OwnLagWeights,
    measured: Measured,
    /// Whether the rule gave a result; else the weights are the public constant.
    is_result: bool,
}

/// What the sites of one split release, honest ones without validators.
#[derive(Debug, Clone, Copy)]
struct Split<'a> {
    newcomer: usize,
    /// Hostile ones first, validators last.
    order: &'a [usize],
}

impl Recorded {
    /// Reads the machines of `data`. `epsilon`: of one block, `None` without noise. `validators`: how many of the honest try each model
    /// in the place of sending.
    ///
    /// # Errors
    /// [`RobustnessError`]
    pub fn new(
        data: &Path,
        epsilon: Option<f64>,
        hostile: usize,
        validators: usize,
        seed: u64,
        depth: Depth,
    ) -> Result<Self, RobustnessError> {
        let fleet = load(data, &[])?;
        let sites = fleet.sites.len();
        let needed = 2 * hostile + validators + 2;
        if sites < needed {
            return Err(RobustnessError::TooFewSites { found: sites, needed });
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
            inspectors: Vec::new(),
            validators,
            depth,
            fleet,
        };
        if validators > 0 {
            let step = Duration::from_mins(1);
            let sites = recorded.fleet.sites.iter();
            recorded.inspectors = sites
                .map(|site| Validator::new(site, &recorded.fleet.schema, step))
                .collect();
        }
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

    /// Machines that send in each round: all but the new one and the validators.
    pub fn senders(&self) -> usize {
        self.sums.len().saturating_sub(1 + self.validators)
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
        let orders: Vec<Vec<usize>> = (0..self.sums.len())
            .map(|newcomer| self.order(newcomer, seed))
            .collect();
        let splits: Vec<Split<'_>> = (0..)
            .zip(&orders)
            .map(|(newcomer, order)| Split { newcomer, order })
            .collect();
        let oracles: Vec<Measured> = splits
            .par_iter()
            .map(|split| {
                let honest = Self::rows(&released, &split.order[self.hostile..self.senders()], 0);
                self.measure(split.newcomer, &Spread::of(&honest).mean, honest.len())
            })
            .collect::<Result<_, _>>()?;
        let in_force = self.in_force(seed, pipelines, &splits)?;
        let pairs: Vec<(usize, Option<Attack>)> = (0..pipelines.len())
            .flat_map(|pipeline| attacks.iter().map(move |attack| (pipeline, *attack)))
            .collect();
        pairs
            .par_iter()
            .map(|&(which, attack)| {
                let pipeline = &pipelines[which];
                let one = |split: &Split<'_>| {
                    let attacked = self.attacked(*split, &released, seed, pipeline, attack)?;
                    match in_force.get(which).map(|models| &models[split.newcomer]) {
                        Some(current) => self.validated(*split, attacked, current),
                        None => Ok(attacked.measured),
                    }
                };
                let measured: Vec<Measured> = splits.iter().map(one).collect::<Result<_, _>>()?;
                done();
                Ok(ratios(&measured, &oracles, self.depth))
            })
            .collect()
    }

    /// Of each pipeline and new machine the model in force and its loss there; nothing where no validators are asked.
    fn in_force(
        &self,
        seed: u64,
        pipelines: &[Pipeline],
        splits: &[Split<'_>],
    ) -> Result<Vec<Vec<(GlobalModel, f64)>>, RobustnessError> {
        if self.validators == 0 {
            return Ok(Vec::new());
        }
        let seed = seed.wrapping_add(EARLIER);
        let released = self.released(seed);
        let one = |pipeline: &Pipeline, split: &Split<'_>| {
            let fought = self.attacked(*split, &released, seed, pipeline, None)?;
            Ok((self.model(&fought.own)?, fought.measured.error))
        };
        pipelines
            .par_iter()
            .map(|pipeline| splits.iter().map(|split| one(pipeline, split)).collect())
            .collect()
    }

    /// What a split's validators make of a model.
    fn validated(
        &self,
        split: Split<'_>,
        mut fought: Fought,
        (current, in_force): &(GlobalModel, f64),
    ) -> Result<Measured, RobustnessError> {
        let mut of = |published| {
            fought.measured.validated = Some(Validated {
                published,
                in_force: *in_force,
            });
            fought.measured
        };
        if !fought.is_result {
            return Ok(of(None));
        }
        let asked = split.order[self.senders()..].iter();
        let asked: Vec<&Validator> = asked.map(|site| &self.inspectors[*site]).collect();
        let candidate = (&self.model(&fought.own)?, Digest::default());
        let validation = validate(&asked, self.terms.round.0, (0, current), candidate);
        Ok(of(Some(validation.decision.publishes())))
    }

    fn model(&self, own: &OwnLagWeights) -> Result<GlobalModel, RobustnessError> {
        Ok(GlobalModel::initial(self.fleet.schema.channels(), 1).with_own_lag(own)?)
    }

    fn attacked(
        &self,
        split: Split<'_>,
        released: &[[Vec<f32>; 5]],
        seed: u64,
        pipeline: &Pipeline,
        attack: Option<Attack>,
    ) -> Result<Fought, RobustnessError> {
        let (hostile, honest) = split.order[..self.senders()].split_at(self.hostile);
        let poison = attack.and_then(|attack| POISONS.iter().position(|kind| *kind == attack.kind));
        let honest = Self::rows(released, honest, 0);
        let own = Self::rows(released, hostile, poison.map_or(0, |index| index + 1));
        let memory = Memory::default();
        let battle = Battle {
            pipeline,
            terms: &self.terms,
            memory: &memory,
            seed: seed.wrapping_mul(1_000) + split.newcomer as u64,
            previous: None,
        };
        let fought = battle.fight(&honest, &own, attack);
        let is_result = fought.is_some();
        // No result: everybody keeps what there is, which for a new machine is the public constant.
        let nothing = || (vec![0.0; self.sums[0][0].len()], 1);
        let (values, rows) = fought.map_or_else(nothing, |(combined, _)| (combined.values, combined.rows));
        let own = self.solved(&values, rows);
        let measured = self.measure_weights(split.newcomer, &own)?;
        Ok(Fought {
            own,
            measured,
            is_result,
        })
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
        self.measure_weights(newcomer, &self.solved(mean, sites))
    }

    /// The weights that the `mean` of `sites` sites' moments gives.
    fn solved(&self, mean: &[f32], sites: usize) -> OwnLagWeights {
        let sum: Vec<f32> = mean
            .iter()
            .map(|value| narrow(f64::from(*value) * sites as f64))
            .collect();
        let (sigma, clip) = (self.terms.noise_multiplier.value(), self.terms.clip_norm.value());
        moments::solve(&sum, sites, sigma, clip, self.fleet.schema.channels())
    }

    fn measure_weights(&self, newcomer: usize, own: &OwnLagWeights) -> Result<Measured, RobustnessError> {
        let mut measured = Measured {
            error: self.trials[newcomer].squared_error(own),
            ..Measured::default()
        };
        if self.depth == Depth::Detection {
            let model = self.model(own)?;
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
        measure: "loss".into(),
        ratio: loss,
    }];
    values.extend(validation(measured, oracles));
    if depth == Depth::Detection {
        let names = [["vus_120", "vus_120_gate"], ["vus_1000", "vus_1000_gate"]];
        for (at, names) in names.into_iter().enumerate() {
            for (gate, measure) in names.into_iter().enumerate() {
                let sum =
                    |all: &[Measured], gate: usize| all.iter().map(|m| m.volumes[at][gate]).sum::<f64>();
                // The oracle's own figure is the one without the gate, for both.
                let ratio = sum(measured, gate) / sum(oracles, 0);
                values.push(Value {
                    measure: measure.into(),
                    ratio,
                });
            }
        }
    }
    values
}

/// Shares of the new machines, and the loss with what validators left in force.
fn validation(measured: &[Measured], oracles: &[Measured]) -> Vec<Value> {
    let asked = measured.iter().zip(oracles);
    let asked: Vec<(f64, f64, Validated)> = asked
        .filter_map(|(measured, oracle)| Some((measured.error, oracle.error, measured.validated?)))
        .collect();
    if asked.is_empty() {
        return Vec::new();
    }
    let mean =
        |of: &dyn Fn(&(f64, f64, Validated)) -> f64| asked.iter().map(of).sum::<f64>() / asked.len() as f64;
    let share = |of: &dyn Fn(bool, bool) -> bool| {
        mean(&|(error, _, word)| {
            let harmful = word.published.is_some() && *error > HARM * word.in_force;
            f64::from(u8::from(of(harmful, word.published == Some(true))))
        })
    };
    [
        (
            "loss_validated",
            mean(&|(error, oracle, word)| {
                oracle
                    / if word.published == Some(true) {
                        *error
                    } else {
                        word.in_force
                    }
            }),
        ),
        ("published", share(&|_, published| published)),
        ("harmful", share(&|harmful, _| harmful)),
        (
            "harmful_published",
            share(&|harmful, published| harmful && published),
        ),
    ]
    .map(|(measure, ratio)| Value {
        measure: measure.into(),
        ratio,
    })
    .into()
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
            validated: None,
        };
        let values = ratios(&[one; 3], &[one; 3], Depth::Detection);
        let found: Vec<f64> = values.iter().map(|value| value.ratio).collect();
        for (found, expected) in found.iter().zip([1.0, 1.0, 0.8, 1.0, 1.0]) {
            assert!((found - expected).abs() < 1e-12, "{values:?}");
        }
    }

    #[test]
    fn a_model_that_was_turned_down_counts_with_what_stayed_in_force() {
        let of = |error: f64, published: Option<bool>| Measured {
            error,
            validated: Some(Validated {
                published,
                in_force: 2.0,
            }),
            ..Measured::default()
        };
        let oracle = Measured {
            error: 2.0,
            ..Measured::default()
        };
        let (turned_down, published) = (Some(false), Some(true));
        let measured = [
            of(8.0, turned_down),
            of(4.0, published),
            of(2.0, published),
            of(2.1, turned_down),
        ];
        let values = validation(&measured, &[oracle; 4]);
        let found: Vec<(&str, f64)> = values
            .iter()
            .map(|value| (value.measure.as_ref(), value.ratio))
            .collect();
        assert_eq!(
            found,
            [
                ("loss_validated", (1.0 + 0.5 + 1.0 + 1.0) / 4.0),
                ("published", 0.5),
                ("harmful", 0.5),
                ("harmful_published", 0.25)
            ]
        );
        assert!(validation(&[oracle], &[oracle]).is_empty(), "nobody was asked");
        // A rule without a result publishes nothing and harms nobody, however bad what an edge begins with is.
        let values = validation(&[of(8.0, None)], &[oracle]);
        let found: Vec<f64> = values.iter().map(|value| value.ratio).collect();
        assert_eq!(found, [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_round_without_a_result_is_shown_to_no_validator_and_publishes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        crate::robustness::tests::recorded(dir.path(), 6);
        let recorded = Recorded::new(dir.path(), None, 1, 2, 1, Depth::Loss).unwrap();
        let order = recorded.order(0, 1);
        let split = Split {
            newcomer: 0,
            order: &order,
        };
        let own = OwnLagWeights::public_constant(recorded.fleet.schema.channels());
        let current = (recorded.model(&own).unwrap(), 1.0);
        let published = |is_result| {
            let fought = Fought {
                own: own.clone(),
                measured: recorded.measure_weights(0, &own).unwrap(),
                is_result,
            };
            let validated = recorded.validated(split, fought, &current).unwrap().validated;
            validated.unwrap().published
        };
        // The model in force itself is no worse than itself.
        assert_eq!((published(true), published(false)), (Some(true), None));
    }
}
