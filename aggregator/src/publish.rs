//! From the stored updates of a round to the next model: a pure function of base, ordered updates and terms.

use bytes::Bytes;
use theriac_model::global::{GlobalError, GlobalModel};
use theriac_model::moments;
use theriac_protocol::compress::{decode_range, encode_f32};
use theriac_protocol::message::{Encoding, UpdateKind};
use theriac_protocol::round::RoundTerms;
use theriac_protocol::units::Digest;

use crate::layout::ModelSpec;
use crate::robust::{Combined, PayloadRows, Row, RowEvidence, Rows as _, Rule, RuleError};

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
    /// The base model has another length than the layout says.
    #[error("the base model has {found} bytes, its layout has {expected}")]
    Base {
        /// Four bytes a value.
        expected: usize,
        /// Length of the stored payload.
        found: usize,
    },
    /// A model of bare numbers cannot be made of moments.
    #[error("moments need a feature profile, this model is made of bare numbers")]
    NoChannels,
}

/// A model that is computed and not yet published.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Little-endian `f32` in layout order.
    pub payload: Bytes,
    /// SHA-256 of it.
    pub digest: Digest,
    /// One for each update, in order: why it counted as it did.
    pub evidence: Vec<RowEvidence>,
}

/// Combines `rows` (ordered by node) under `rule` and applies the result to the base model. CPU work: call it off the async
/// threads.
///
/// - Moments: the rule over the sites' sums, times the number of sites, solved for own-lag weights.
/// - Delta: base plus the combined delta.
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
    let rows = PayloadRows::new(rows, terms.values)?;
    rule.check(rows.count())?;
    let Combined { values, evidence } = rule.combine(&rows)?;
    let sites = rows.count();
    drop(rows);
    let base = decode_base(spec, base)?;
    let next = match (terms.kind, spec.channels()) {
        (UpdateKind::Moments, Some(channels)) => {
            let sum = times(&values, sites);
            let (sigma, clip) = (terms.noise_multiplier.value(), terms.clip_norm.value());
            let weights = moments::solve(&sum, sites, sigma, clip, channels);
            GlobalModel::from_values(channels, base)?
                .with_own_lag(&weights)?
                .values()
                .to_vec()
        }
        (UpdateKind::Delta, Some(channels)) => GlobalModel::from_values(channels, base)?
            .with_delta(&values)?
            .values()
            .to_vec(),
        (UpdateKind::Delta, None) => add(base, &values)?,
        (UpdateKind::Moments, None) => return Err(PublishError::NoChannels),
    };
    let payload = Bytes::from(encode_f32(&next));
    Ok(Candidate {
        digest: Digest::of(&payload),
        payload,
        evidence,
    })
}

fn decode_base(spec: &ModelSpec, payload: &[u8]) -> Result<Vec<f32>, PublishError> {
    let values = usize::try_from(spec.values()).unwrap_or(usize::MAX);
    let expected = values.saturating_mul(4);
    if payload.len() != expected {
        return Err(PublishError::Base {
            expected,
            found: payload.len(),
        });
    }
    let mut base = vec![0.0; values];
    decode_range(Encoding::F32, payload, 0, &mut base);
    Ok(base)
}

fn times(values: &[f32], sites: usize) -> Vec<f32> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the product is rounded once, here"
    )]
    let product = |value: &f32| (f64::from(*value) * sites as f64) as f32;
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
    use crate::robust::{RuleName, rule};

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
        let rule = rule(RuleName::Median, 1);
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
    fn model_that_overflows_is_no_model() {
        let spec = ModelSpec::raw(1).unwrap();
        let rows = vec![row(&[f32::MAX])];
        let rule = rule(RuleName::Mean, 0);
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
    fn moments_change_the_own_lag_weights_and_nothing_else() {
        let spec = ModelSpec::profile("host-service-v1", 1).unwrap();
        let channels = spec.channels().unwrap();
        let base = GlobalModel::from_values(channels, spec.initial()).unwrap();
        let sums = vec![1.0e6; spec.update(UpdateKind::Moments).unwrap().values as usize];
        let rule = rule(RuleName::TrimmedMean, 1);
        let rows = vec![row(&sums), row(&sums), row(&sums)];
        let payload = encode_f32(base.values());
        let next = next_model(&spec, &terms(&spec, UpdateKind::Moments), &payload, rows, &*rule).unwrap();
        let next = GlobalModel::from_values(channels, decode_base(&spec, &next.payload).unwrap()).unwrap();
        assert_eq!(next.network(), base.network());
        assert_ne!(next.own_lag(), base.own_lag());
    }
}
