//! From the stored updates of a round to the next model: a pure function of base, ordered updates and terms.

use std::sync::Arc;

use bytes::Bytes;
use theriac_model::global::{GlobalError, GlobalModel};
use theriac_model::moments;
use theriac_privacy::central::CentralCharge;
use theriac_privacy::noise::{ExactGaussian, NoiseError};
use theriac_protocol::compress::{decode_range, encode_f32};
use theriac_protocol::message::{Encoding, UpdateKind};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::Digest;

use crate::accumulate::Depth;
use crate::layout::ModelSpec;
use crate::robust::{
    Combined, PayloadRows, PlacedRow, Row, RowEvidence, Rows as _, Rule, RuleError, SpillError,
};
use crate::server_optimizer::{NotFinite, OptimizerState, ServerOptimizer};

/// Why a round gives no model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The rule could not combine the updates.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The result is no model of this layout.
    #[error("the combined updates give no model: {0}")]
    Model(#[from] GlobalError),
    /// The result holds a value that is not finite.
    #[error("value {index} of the next model is not finite")]
    NonFinite {
        /// Which value.
        index: usize,
    },
    /// The server optimiser's step overflows.
    #[error(transparent)]
    Optimizer(#[from] NotFinite),
    /// The base model has another length than the layout says.
    #[error("the base model has {found} bytes, its layout has {expected}")]
    Base {
        /// Four bytes a value.
        expected: usize,
        /// Length of the stored payload.
        found: usize,
    },
    /// The file with the round's rows cannot be read back.
    #[error("the file with the round's rows: {0}")]
    Spill(#[from] Arc<SpillError>),
    /// No noise of the centre could be added.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// A model of bare numbers cannot be made of moments or gradients.
    #[error("moments and gradients need a feature profile, this model is made of bare numbers")]
    NoChannels,
}

/// A model that is computed and not yet published.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Little-endian `f32` in layout order.
    pub payload: Bytes,
    /// SHA-256 of it.
    pub digest: Digest,
    /// Digest of its layout.
    pub layout_digest: Digest,
    /// Number of its values.
    pub values: u32,
    /// One for each update, in order: why it counted as it did.
    pub evidence: Vec<RowEvidence>,
    /// What the rule made of the updates, before any optimiser: what each of them is measured against.
    pub combined: Vec<f32>,
    /// What the server optimiser remembers after this model.
    pub memory: Option<OptimizerState>,
}

/// As [`next_model_with`], with plain averaging.
///
/// # Errors
/// [`PublishError`].
pub fn next_model(
    spec: &ModelSpec,
    terms: &RoundTerms,
    base: &[u8],
    rows: Vec<Row>,
    rule: &dyn Rule,
) -> Result<Candidate, PublishError> {
    next_model_with(spec, terms, base, rows, rule, &ServerOptimizer::default(), None)
}

/// Combines `rows` (ordered by node) under `rule` and applies the result to the base model. CPU work: call it off the async
/// threads.
///
/// - Moments: the rule over the sites' sums, times the number of sites (and of the releases behind each), solved for own-lag weights.
/// - Delta: base plus the optimiser's step for the combined delta.
/// - Gradient: a step of the full linear model from the base, with the momentum that the base carries; see
///   [`theriac_model::gradient`].
///
/// # Errors
/// [`PublishError`].
pub fn next_model_with(
    spec: &ModelSpec,
    terms: &RoundTerms,
    base: &[u8],
    rows: Vec<Row>,
    rule: &dyn Rule,
    optimizer: &ServerOptimizer,
    memory: Option<&OptimizerState>,
) -> Result<Candidate, PublishError> {
    next_model_of(spec, terms, base, rows, rule, (optimizer, memory), Depth::ONE)
}

/// As [`next_model_with`], of rows that are means of a site's updates: with less noise than one update, and of moments with as many releases behind them.
///
/// # Errors
/// [`PublishError`].
pub fn next_model_of<R: Into<PlacedRow>>(
    spec: &ModelSpec,
    terms: &RoundTerms,
    base: &[u8],
    rows: Vec<R>,
    rule: &dyn Rule,
    server: (&ServerOptimizer, Option<&OptimizerState>),
    depth: Depth,
) -> Result<Candidate, PublishError> {
    let rows = PayloadRows::new(rows, terms.values)?;
    rule.check(rows.count())?;
    let combined = rule.combine(&rows)?;
    if let Some(permutation) = &combined.permutation {
        tracing::info!(rule = %rule.name(), ?permutation, "updates are combined in buckets");
    }
    let sites = rows.count();
    drop(rows);
    let sigma = depth.sigma(terms.noise_multiplier.value());
    apply(
        spec,
        terms,
        base,
        combined,
        (sites, depth.releases, sigma),
        server,
    )
}

/// As [`next_model`] for the rule `mean` with noise of the centre: what comes of the rows is (ε, δ)-differentially private for each whole site, as the charge says.
///
/// # Errors
/// [`PublishError`]; the charge stays.
pub fn next_private_model<R: Into<PlacedRow>>(
    spec: &ModelSpec,
    terms: &RoundTerms,
    base: &[u8],
    rows: Vec<R>,
    charge: CentralCharge,
    optimizer: &ServerOptimizer,
    memory: Option<&OptimizerState>,
) -> Result<Candidate, PublishError> {
    let rows = PayloadRows::new(rows, terms.values)?;
    if rows.count() == 0 {
        return Err(RuleError::NoRows.into());
    }
    let mean = charge.mean(&ExactGaussian, rows.count(), |row, out| rows.read(row, 0, out))?;
    let evidence = evidence_of(&rows, &mean.values);
    drop(rows);
    // Noise of each site and of the centre, as if it were all of as many sites as were expected.
    let (sigma, clip) = (terms.noise_multiplier.value(), terms.clip_norm.value());
    let centre = mean.deviation * mean.expected.sqrt() / clip;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most ten million, at least 1"
    )]
    let sites = (mean.expected.round() as usize).max(1);
    let combined = Combined {
        values: mean.values,
        evidence,
        scores: None,
        permutation: None,
    };
    let deviation = sigma.hypot(centre);
    apply(
        spec,
        terms,
        base,
        combined,
        (sites, 1.0, deviation),
        (optimizer, memory),
    )
}

/// Norm of each row and its distance from the combined values, for the operator's own record.
fn evidence_of(rows: &PayloadRows, combined: &[f32]) -> Vec<RowEvidence> {
    let mut row = vec![0.0_f32; combined.len()];
    let mut of = |index| {
        rows.read(index, 0, &mut row);
        let squares = |difference: &dyn Fn(f32, f32) -> f64| -> f64 {
            row.iter()
                .zip(combined)
                .map(|(x, c)| difference(*x, *c).powi(2))
                .sum()
        };
        RowEvidence {
            norm: squares(&|x, _| f64::from(x)).sqrt(),
            distance: squares(&|x, c| f64::from(x) - f64::from(c)).sqrt(),
            trimmed_share: 0.0,
        }
    };
    (0..rows.count()).map(&mut of).collect()
}

/// Applies combined values of so many sites, each the mean of so many releases, to the base; `sigma`: noise of one site's sum in multiples of the round's clipping norm.
fn apply(
    spec: &ModelSpec,
    terms: &RoundTerms,
    base: &[u8],
    combined: Combined<f32>,
    (sites, releases, sigma): (usize, f64, f64),
    (optimizer, memory): (&ServerOptimizer, Option<&OptimizerState>),
) -> Result<Candidate, PublishError> {
    let Combined { values, evidence, .. } = combined;
    let base = decode_base(spec, base)?;
    let (step, memory) = match terms.kind {
        // Moments are solved anew in each round: there is no step to smooth. Gradients have a momentum of their own.
        UpdateKind::Moments | UpdateKind::Gradient => (Vec::new(), None),
        UpdateKind::Delta => optimizer.step(values.clone(), memory)?,
    };
    let next = match (terms.kind, spec.channels()) {
        (UpdateKind::Moments, Some(channels)) => {
            let sum = times(&values, sites as f64 * releases);
            let weights = moments::solve(&sum, sites, sigma, terms.clip_norm.value(), channels);
            GlobalModel::from_values(channels, base)?
                .without_linear()
                .with_own_lag(&weights)?
                .values()
                .to_vec()
        }
        (UpdateKind::Gradient, Some(channels)) => {
            let base = GlobalModel::from_values(channels, base)?;
            let next = base.descent().step(
                &values,
                terms.blocks_max,
                terms.block_rows,
                terms.noise_multiplier.value(),
            )?;
            base.with_descent(&next)?.values().to_vec()
        }
        (UpdateKind::Delta, Some(channels)) => GlobalModel::from_values(channels, base)?
            .without_linear()
            .with_delta(&step)?
            .values()
            .to_vec(),
        (UpdateKind::Delta, None) => add(base, &step)?,
        (UpdateKind::Moments | UpdateKind::Gradient, None) => return Err(PublishError::NoChannels),
    };
    let layout_digest = spec.layout_of(next.len()).ok_or(PublishError::Base {
        expected: usize::try_from(spec.values()).unwrap_or(usize::MAX),
        found: next.len(),
    })?;
    let payload = Bytes::from(encode_f32(&next));
    Ok(Candidate {
        digest: Digest::of(&payload),
        layout_digest,
        values: u32::try_from(next.len()).unwrap_or(u32::MAX),
        payload,
        evidence,
        combined: values,
        memory,
    })
}

fn decode_base(spec: &ModelSpec, payload: &[u8]) -> Result<Vec<f32>, PublishError> {
    let values = payload.len() / 4;
    let expected = usize::try_from(spec.values())
        .unwrap_or(usize::MAX)
        .saturating_mul(4);
    if !payload.len().is_multiple_of(4) || spec.layout_of(values).is_none() {
        return Err(PublishError::Base {
            expected,
            found: payload.len(),
        });
    }
    let mut base = vec![0.0; values];
    decode_range(Encoding::F32, payload, 0, &mut base);
    Ok(base)
}

fn times(values: &[f32], count: f64) -> Vec<f32> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the product is rounded once, here"
    )]
    let product = |value: &f32| (f64::from(*value) * count) as f32;
    values.iter().map(product).collect()
}

fn add(mut base: Vec<f32>, delta: &[f32]) -> Result<Vec<f32>, PublishError> {
    for (index, (value, step)) in base.iter_mut().zip(delta).enumerate() {
        *value += step;
        if !value.is_finite() {
            return Err(PublishError::NonFinite { index });
        }
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::{L2Norm, NoiseMultiplier};

    use super::*;
    use crate::robust::{Options, RuleName, rule};

    fn terms(spec: &ModelSpec, kind: UpdateKind) -> RoundTerms {
        let layout = spec.update(kind).unwrap();
        RoundTerms {
            kind,
            values: layout.values,
            layout_digest: layout.digest,
            clip_norm: L2Norm::new(1.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(1.0).unwrap(),
            block_rows: 60,
            blocks_min: 1,
            blocks_max: 10,
        }
    }

    fn row(values: &[f32]) -> Row {
        Row {
            encoding: Encoding::F32,
            payload: encode_f32(values).into(),
        }
    }

    #[test]
    fn delta_moves_the_base_by_the_combined_delta() {
        let spec = ModelSpec::raw(3).unwrap();
        let base = encode_f32(&[1.0, 2.0, 3.0]);
        let rows = vec![
            row(&[0.0, 1.0, 2.0]),
            row(&[1.0, 1.0, 2.0]),
            row(&[1e30, 1.0, -1e30]),
        ];
        let rule = rule(RuleName::MEDIAN, 1, &Options::default()).unwrap();
        let next = next_model(&spec, &terms(&spec, UpdateKind::Delta), &base, rows, &*rule).unwrap();
        assert_eq!(next.payload, encode_f32(&[2.0, 3.0, 5.0]));
        assert_eq!(next.digest, Digest::of(&next.payload));
        assert_eq!(next.evidence.len(), 3);
        assert!(
            (next.evidence[2].trimmed_share - 2.0 / 3.0).abs() < 1e-9,
            "{:?}",
            next.evidence
        );
    }

    #[test]
    fn momentum_goes_on_from_its_memory_and_moments_know_none() {
        use crate::server_optimizer::OptimizerName;
        let optimizer = ServerOptimizer {
            name: OptimizerName::FedAvgM,
            momentum: 0.5,
            ..ServerOptimizer::default()
        };
        let spec = ModelSpec::raw(2).unwrap();
        let terms = terms(&spec, UpdateKind::Delta);
        let rule = rule(RuleName::MEAN, 0, &Options::default()).unwrap();
        let next = |base: &[u8], memory: Option<&OptimizerState>| {
            let rows = vec![row(&[1.0, -2.0])];
            next_model_with(&spec, &terms, base, rows, &*rule, &optimizer, memory).unwrap()
        };
        let first = next(&encode_f32(&[0.0, 0.0]), None);
        let second = next(&first.payload, first.memory.as_ref());
        assert_eq!(second.payload, encode_f32(&[2.5, -5.0]));
        assert_eq!(second.combined, [1.0, -2.0], "what the rule made, not the step");
        let anew = next(&first.payload, None);
        assert_eq!(anew.payload, encode_f32(&[2.0, -4.0]));
    }

    #[test]
    fn model_that_overflows_is_no_model() {
        let spec = ModelSpec::raw(1).unwrap();
        let rows = vec![row(&[f32::MAX])];
        let rule = rule(RuleName::MEAN, 0, &Options::default()).unwrap();
        let result = next_model(
            &spec,
            &terms(&spec, UpdateKind::Delta),
            &encode_f32(&[f32::MAX]),
            rows,
            &*rule,
        );
        assert!(
            matches!(result, Err(PublishError::NonFinite { index: 0 })),
            "{result:?}"
        );
    }

    #[test]
    fn gradients_step_the_full_linear_model_and_moments_end_it() {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let channels = spec.channels().unwrap();
        let rule = rule(RuleName::TRIMMED_MEAN, 1, &Options::default()).unwrap();
        let step = |base: &[u8], kind| {
            let terms = terms(&spec, kind);
            let values: Vec<f32> = (0..terms.values).map(|i| (i % 7) as f32 * 100.0).collect();
            let rows = vec![row(&values), row(&values), row(&values)];
            next_model(&spec, &terms, base, rows, &*rule).unwrap()
        };
        let initial = encode_f32(&spec.initial());
        let once = step(&initial, UpdateKind::Gradient);
        let twice = step(&once.payload, UpdateKind::Gradient);
        let model = |candidate: &Candidate| {
            let values = decode_base(&spec, &candidate.payload).unwrap();
            assert_eq!(spec.layout_of(values.len()), Some(candidate.layout_digest));
            assert_eq!(values.len(), candidate.values as usize);
            GlobalModel::from_values(channels, values).unwrap()
        };
        let (first, second) = (model(&once).descent(), model(&twice).descent());
        assert_eq!((first.steps, second.steps), (1, 2));
        let moved = |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        let last = moved(second.iterate.values(), first.iterate.values());
        assert!(
            close(&last, &second.velocity),
            "what was published carries the momentum"
        );
        let expected: Vec<f32> = first.velocity.iter().map(|v| 1.8 * v).collect();
        assert!(close(&second.velocity, &expected));
        let after = step(&twice.payload, UpdateKind::Moments);
        assert_eq!(after.layout_digest, spec.layout_digest());
        assert!(model(&after).linear().is_none());
        assert_eq!(model(&after).network(), model(&twice).network());
    }

    #[test]
    fn moments_change_the_own_lag_weights_and_nothing_else() {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let channels = spec.channels().unwrap();
        let base = GlobalModel::from_values(channels, spec.initial()).unwrap();
        let sums = vec![1.0e6; spec.update(UpdateKind::Moments).unwrap().values as usize];
        let rule = rule(RuleName::TRIMMED_MEAN, 1, &Options::default()).unwrap();
        let rows = vec![row(&sums), row(&sums), row(&sums)];
        let payload = encode_f32(base.values());
        let next = next_model(&spec, &terms(&spec, UpdateKind::Moments), &payload, rows, &*rule).unwrap();
        let next = GlobalModel::from_values(channels, decode_base(&spec, &next.payload).unwrap()).unwrap();
        assert_eq!(next.network(), base.network());
        assert_ne!(next.own_lag(), base.own_lag());
    }
}
