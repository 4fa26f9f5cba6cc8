//! A site in a federation: the edge's participant machine, its ledger, and what it releases.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha20Rng;
use sha2::{Digest as _, Sha256};
use theriac_model::detector::Detector;
use theriac_model::feature::FeatureSchema;
use theriac_model::gate::{self, GateOutcome};
use theriac_model::global::{
    GlobalModel, delta_layout, gradient_layout, linear_model_layout, model_layout, moments_layout,
};
use theriac_model::gradient::GradientPoint;
use theriac_model::series::Series;
use theriac_model::train;
use theriac_privacy::ledger::{Ledger, LedgerError, ReleasePlan, ReservationId, Reserved};
use theriac_privacy::noise::ExactGaussian;
use theriac_privacy::policy::{Policy, PolicyError};
use theriac_privacy::update::{LocalUpdate, UpdateError};
use theriac_privacy::windows::BlockWindows;
use theriac_protocol::compress::{decode_range, encode_f32};
use theriac_protocol::message::{
    AnnounceV1, DeclineReason, Encoding, GateVerdict, ModelV1, PrivacyClaimV1, UpdateKind, UpdateV1,
};
use theriac_protocol::participant::{LayoutDigests, Participant, ParticipantConfig};
use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Delta, Digest, Epsilon, Moment, NoiseMultiplier, Timestamp, UnitError};

use super::args::{Recipe, Settings, Terms};
use super::data::Site;
use crate::attack::{Attack, poison, statistics::narrow};

/// Most rows that one round of gradients looks at, as on an edge.
const DELTA_ROWS_MAX: usize = 7_200;

/// Why a site cannot take part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemberError {
    /// The ledger cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The policy made of the arguments is refused.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// An update cannot be made.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// The ledger's directory cannot be made.
    #[error("cannot make {path}: {source}")]
    Directory {
        /// Which.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A number of the unprotected arm is out of range.
    #[error(transparent)]
    Unit(#[from] UnitError),
}

/// A site while rounds run.
#[derive(Debug)]
pub struct Member<'a> {
    /// Its rows.
    pub site: &'a Site,
    /// The edge's half of the rounds.
    pub participant: Participant,
    /// What it does to its updates.
    pub attack: Option<Attack>,
    /// The update of the running round: exactly these bytes are sent.
    pub outbox: Option<(UpdateV1, Bytes)>,
    /// The detector in use and the rows that its gate looks at; `None`: this site's gate is not asked.
    pub detector: Option<(Detector, Arc<Series>)>,
    /// What its gate decided last.
    pub verdict: Option<GateVerdict>,
    /// By which figures it did.
    pub reason: Option<String>,
    /// The published model that came last: its header, and its values when they fit the layout.
    pub model: Option<(ModelV1, Option<GlobalModel>)>,
    ledger: Option<Ledger>,
    rng: ChaCha20Rng,
    channels: usize,
}

impl<'a> Member<'a> {
    /// A site that holds the initial model. Its ledger, if there is noise, is begun in `dir`.
    ///
    /// # Errors
    /// [`MemberError`]
    pub fn new(
        site: &'a Site,
        settings: &Settings,
        channels: usize,
        base: BaseModel,
        dir: &Path,
    ) -> Result<Self, MemberError> {
        let ledger = match &settings.terms {
            Some(terms) => Some(open_ledger(site, terms, settings, dir)?),
            None => None,
        };
        let config = ParticipantConfig {
            noise_multiplier_min: NoiseMultiplier::new(f64::MIN_POSITIVE)?,
            clip_norm_max: None,
            layout_digests: LayoutDigests {
                model: Digest(model_layout(channels).digest()),
                linear_model: Digest(linear_model_layout(channels).digest()),
                moments: Digest(moments_layout(channels).digest()),
                delta: Digest(delta_layout(channels).digest()),
                gradient: Digest(gradient_layout(channels).digest()),
            },
        };
        let seed = Sha256::new()
            .chain_update(settings.args.seed.to_le_bytes())
            .chain_update(site.name.as_str())
            .finalize();
        Ok(Self {
            site,
            participant: Participant::new(config, base, None, Moment::default()),
            attack: None,
            outbox: None,
            detector: None,
            verdict: None,
            reason: None,
            model: None,
            ledger,
            rng: ChaCha20Rng::from_seed(seed.into()),
            channels,
        })
    }

    /// ε spent so far; `None` when there is no noise.
    pub fn epsilon(&self) -> Option<f64> {
        self.ledger.as_ref().map(|ledger| ledger.spent().epsilon)
    }

    /// Makes the update of a round and puts it into the outbox: charge, read, clip, noise, compress.
    ///
    /// # Errors
    /// The reason to decline with, or [`MemberError`] when something is wrong here.
    pub fn train(
        &mut self,
        announce: &AnnounceV1,
        settings: &Settings,
        schema: &FeatureSchema,
    ) -> Result<Result<Digest, DeclineReason>, MemberError> {
        match announce.kind {
            UpdateKind::Delta => return self.train_network(announce, settings, schema),
            UpdateKind::Gradient => return self.train_linear(announce, settings, schema),
            UpdateKind::Moments => {}
        }
        let rounds = u64::from(settings.args.rounds());
        let block_rows = usize::try_from(announce.block_rows).unwrap_or(usize::MAX);
        let ids = self.site.units(
            block_rows,
            announce.round.0.saturating_sub(1),
            rounds,
            settings.args.round_blocks.map(u64::from),
        );
        if ids.end - ids.start < u64::from(announce.blocks_min) {
            return Ok(Err(DeclineReason::TooFewBlocks));
        }
        let poison = self
            .attack
            .map(|attack| attack.kind)
            .filter(|kind| kind.is_poison());
        let spoilt = poison.map(|kind| self.site.poisoned(kind, settings.args.seed));
        let site = spoilt.as_ref().unwrap_or(self.site);
        let windows = settings.terms.and_then(|terms| terms.windows);
        let read_units = |blocks: &[u64]| {
            let mut units = read_units(site, schema, blocks, windows);
            if let Some(kind) = poison {
                for unit in &mut units {
                    poison::moments(kind, unit);
                }
            }
            units
        };
        let (header, payload) = match &mut self.ledger {
            None => {
                let blocks: Vec<u64> = ids.collect();
                unprotected(announce, &read_units(&blocks))?
            }
            Some(ledger) => {
                let plan = plan(announce, ledger, ids.collect(), windows);
                let reservation = match ledger.reserve(plan, Timestamp(announce.round.0)) {
                    Ok(Reserved::Fresh(reservation)) => reservation,
                    // Nothing is lost in this link, so nothing is trained twice.
                    Ok(Reserved::AlreadyCharged { .. }) => return Ok(Err(DeclineReason::BudgetSpent)),
                    Err(error) => return Ok(Err(error.decline_reason())),
                };
                let id = reservation.id();
                let local = LocalUpdate::moments(reservation, announce.layout_digest, read_units)?;
                release(local, (ledger, id), announce, &mut self.rng)?
            }
        };
        let digest = header.payload_digest;
        self.outbox = Some((header, payload));
        Ok(Ok(digest))
    }

    /// The same for a round of gradients: all blocks again, at the model that the round builds on.
    fn train_linear(
        &mut self,
        announce: &AnnounceV1,
        settings: &Settings,
        schema: &FeatureSchema,
    ) -> Result<Result<Digest, DeclineReason>, MemberError> {
        let received = self.model.as_ref().and_then(|(_, model)| model.as_ref());
        let initial = GlobalModel::initial(self.channels, settings.args.seed);
        let weights = received.unwrap_or(&initial).descent().iterate;
        let point = GradientPoint::new(&weights);
        let poison = self
            .attack
            .map(|attack| attack.kind)
            .filter(|kind| kind.is_poison());
        let spoilt = poison.map(|kind| self.site.poisoned(kind, settings.args.seed));
        let site = spoilt.as_ref().unwrap_or(self.site);
        let blocks = site.block_rows(schema);
        let windows = settings.terms.and_then(|terms| terms.windows);
        let read = |ids: &[u64]| {
            if let Some(windows) = windows {
                let rows = site.window_rows(schema, ids, windows);
                return rows.iter().map(|rows| point.gradient(rows)).collect();
            }
            ids.iter()
                .filter_map(|id| blocks.get(usize::try_from(*id).ok()?))
                .map(|block| point.gradient(block))
                .collect::<Vec<_>>()
        };
        let ids: Vec<u64> = (0..blocks.len() as u64).collect();
        if ids.is_empty() {
            return Ok(Err(DeclineReason::TooFewBlocks));
        }
        let (header, payload) = match &mut self.ledger {
            None => match settings.args.local_steps {
                Some(steps) => {
                    let local = site.local(schema, &weights, steps, settings.args.proximal);
                    unclipped(announce, &local)?
                }
                None => unprotected(announce, &read(&ids))?,
            },
            Some(ledger) => {
                let plan = plan(announce, ledger, ids, windows);
                let reservation = match ledger.reserve(plan, Timestamp(announce.round.0)) {
                    Ok(Reserved::Fresh(reservation)) => reservation,
                    Ok(Reserved::AlreadyCharged { .. }) => return Ok(Err(DeclineReason::BudgetSpent)),
                    Err(error) => return Ok(Err(error.decline_reason())),
                };
                let id = reservation.id();
                let local = LocalUpdate::gradient(reservation, announce.layout_digest, read)?;
                release(local, (ledger, id), announce, &mut self.rng)?
            }
        };
        let digest = header.payload_digest;
        self.outbox = Some((header, payload));
        Ok(Ok(digest))
    }

    /// The same for a round of deltas: all rows that the edge would look at, the model that the round builds on.
    fn train_network(
        &mut self,
        announce: &AnnounceV1,
        settings: &Settings,
        schema: &FeatureSchema,
    ) -> Result<Result<Digest, DeclineReason>, MemberError> {
        let received = self.model.as_ref().and_then(|(_, model)| model.as_ref());
        let initial = GlobalModel::initial(self.channels, settings.args.seed);
        let (base, mut rows) = (received.unwrap_or(&initial), self.site.train.tail(DELTA_ROWS_MAX));
        if let Some(attack) = self.attack.filter(|attack| attack.kind.is_poison()) {
            rows = poison::targets(attack.kind, &rows, settings.args.seed);
        }
        let (steps, seed) = (settings.args.delta_steps(), announce.round.0);
        let change = || match train::delta(base, schema, &rows, steps, seed) {
            Ok(change) => change,
            // As on an edge: the charge is made, so something is said; zero says nothing of the rows.
            Err(_) => vec![0.0; usize::try_from(announce.values).unwrap_or(0)],
        };
        let (header, payload) = match &mut self.ledger {
            None => unprotected(announce, &[change()])?,
            Some(ledger) => {
                let plan = plan(announce, ledger, Vec::new(), None);
                let reservation = match ledger.reserve(plan, Timestamp(announce.round.0)) {
                    Ok(Reserved::Fresh(reservation)) => reservation,
                    Ok(Reserved::AlreadyCharged { .. }) => return Ok(Err(DeclineReason::BudgetSpent)),
                    Err(error) => return Ok(Err(error.decline_reason())),
                };
                let id = reservation.id();
                let local = LocalUpdate::delta(reservation, announce.layout_digest, change)?;
                release(local, (ledger, id), announce, &mut self.rng)?
            }
        };
        let digest = header.payload_digest;
        self.outbox = Some((header, payload));
        Ok(Ok(digest))
    }

    /// The values of the update in the outbox; empty when there is none.
    pub fn values(&self) -> Vec<f32> {
        let Some((header, payload)) = &self.outbox else {
            return Vec::new();
        };
        let mut values = vec![0.0; usize::try_from(header.values).unwrap_or(0)];
        decode_range(header.encoding, payload, 0, &mut values);
        values
    }

    /// The update in the outbox with other values, as a hostile site sends it. The charge for it stays.
    pub fn with_values(&self, values: &[f32]) -> Option<(UpdateV1, Bytes)> {
        self.outbox
            .as_ref()
            .map(|(header, _)| exact(header.clone(), values))
    }

    /// Takes a published model. Values that do not fit are kept as "not a model" for the gate to refuse.
    pub fn receive(&mut self, header: ModelV1, payload: &Bytes) {
        let lengths = [model_layout(self.channels), linear_model_layout(self.channels)];
        let fits = lengths.iter().any(|layout| payload.len() == layout.len() * 4)
            && Digest::of(payload) == header.payload_digest;
        let model = fits.then(|| {
            let mut values = vec![0.0; payload.len() / 4];
            decode_range(Encoding::F32, payload, 0, &mut values);
            GlobalModel::from_values(self.channels, values).ok()
        });
        self.model = Some((header, model.flatten()));
    }

    /// Runs the edge's gate on the model that came last; an accepted detector is in use from then on. A site whose gate is
    /// not asked takes every model that fits.
    pub fn judge(&mut self) -> GateVerdict {
        let verdict = match (&self.model, &mut self.detector) {
            (None | Some((_, None)), _) => GateVerdict::NonFinite,
            (Some((_, Some(_))), None) => GateVerdict::Accepted,
            (Some((_, Some(model))), Some((detector, rows))) => {
                let judged = gate::judge(detector, rows, model, detector.options());
                self.reason = judged.evidence.map(|evidence| evidence.to_string());
                match judged.outcome {
                    GateOutcome::Accepted(accepted) => {
                        *detector = *accepted;
                        GateVerdict::Accepted
                    }
                    GateOutcome::WorseOnTail => GateVerdict::WorseOnTail,
                    GateOutcome::LayoutMismatch => GateVerdict::LayoutMismatch,
                    GateOutcome::TooFewRows => GateVerdict::TooFewRows,
                    _ => GateVerdict::NonFinite,
                }
            }
        };
        self.verdict = Some(verdict);
        verdict
    }
}

/// An update without noise, for measurement: the sum of the clipped blocks as it is. No edge has such a path.
fn unprotected(announce: &AnnounceV1, units: &[Vec<f32>]) -> Result<(UpdateV1, Bytes), MemberError> {
    let mut sum = vec![0.0_f64; usize::try_from(announce.values).unwrap_or(0)];
    for unit in units {
        let norm = unit.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = (announce.clip_norm.value() / norm).min(1.0);
        sum.iter_mut()
            .zip(unit)
            .for_each(|(sum, value)| *sum += scale * f64::from(*value));
    }
    let values: Vec<f32> = sum.into_iter().map(narrow).collect();
    unclipped(announce, &values)
}

/// The same of values that nothing bounds.
fn unclipped(announce: &AnnounceV1, values: &[f32]) -> Result<(UpdateV1, Bytes), MemberError> {
    let header = UpdateV1 {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        base_digest: announce.base_digest,
        layout_digest: announce.layout_digest,
        values: announce.values,
        encoding: Encoding::F32,
        payload_digest: Digest::default(),
        blocks_bound: announce.blocks_max,
        privacy: PrivacyClaimV1 {
            clip_norm: announce.clip_norm,
            noise_multiplier: announce.noise_multiplier,
            // Nothing is promised.
            epsilon_spent: Epsilon::new(f64::MAX)?,
            delta: Delta::new(1.0 - f64::EPSILON)?,
            ledger_head: Digest::default(),
            ledger_records: 0,
        },
    };
    Ok(exact(header, values))
}

/// What is charged for a round.
fn plan(
    announce: &AnnounceV1,
    ledger: &Ledger,
    blocks: Vec<u64>,
    windows: Option<BlockWindows>,
) -> ReleasePlan {
    ReleasePlan {
        round: announce.round,
        nonce: announce.nonce,
        kind: announce.kind,
        values: announce.values,
        block_span: ledger.policy().block_span(),
        blocks,
        windows,
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: announce.clip_norm,
        noise_multiplier: announce.noise_multiplier,
    }
}

/// Clip, noise, compress, mark.
fn release(
    local: LocalUpdate,
    (ledger, id): (&mut Ledger, ReservationId),
    announce: &AnnounceV1,
    rng: &mut ChaCha20Rng,
) -> Result<(UpdateV1, Bytes), MemberError> {
    let noisy = local.clip().noise(&ExactGaussian)?;
    let compressed = noisy.compress(|| rng.random());
    ledger.mark_released(id, compressed.payload_digest(), Timestamp(announce.round.0))?;
    Ok(compressed.into_message(announce.base_digest, announce.blocks_max))
}

/// The vectors of the charged blocks or of their windows, unclipped.
fn read_units(
    site: &Site,
    schema: &FeatureSchema,
    ids: &[u64],
    windows: Option<BlockWindows>,
) -> Vec<Vec<f32>> {
    if let Some(windows) = windows {
        return site.window_moments(schema, ids, windows);
    }
    let blocks = site.blocks(schema);
    ids.iter()
        .filter_map(|id| blocks.get(usize::try_from(*id).ok()?).cloned())
        .collect()
}

/// The same update with these values, written exactly.
fn exact(header: UpdateV1, values: &[f32]) -> (UpdateV1, Bytes) {
    let payload = Bytes::from(encode_f32(values));
    let header = UpdateV1 {
        encoding: Encoding::F32,
        payload_digest: Digest::of(&payload),
        ..header
    };
    (header, payload)
}

fn open_ledger(site: &Site, terms: &Terms, settings: &Settings, dir: &Path) -> Result<Ledger, MemberError> {
    let span = settings.step.as_secs() * terms.block_rows as u64;
    let windows = terms.windows.map_or_else(String::new, |windows| {
        format!(
            "record_window = {}\nrecord_stride = {}\n",
            windows.window(),
            windows.stride()
        )
    });
    let policy = Policy::parse(&format!(
        "{windows}site = \"{}\"\nunit = \"{}\"\nblock = \"{span}s\"\nepsilon = {:?}\ndelta = {:?}\nnoise_multiplier_min = 1e-3\nmechanisms = [\"{}\"]\nblock_releases_max = {}\n",
        site.name,
        terms.unit,
        terms.epsilon.value(),
        terms.delta.value(),
        match settings.args.recipe {
            Recipe::Moments => "moments",
            Recipe::Gradient => "gradient",
            Recipe::Delta => "delta",
        },
        if settings.args.recipe == Recipe::Gradient {
            settings.args.rounds()
        } else {
            1
        },
    ))?;
    let directory = |source| MemberError::Directory {
        path: dir.to_owned(),
        source,
    };
    std::fs::create_dir_all(dir).map_err(directory)?;
    Ok(Ledger::open(
        &dir.join(format!("{}.log", site.name)),
        &site.name,
        policy,
        Timestamp(0),
    )?)
}
