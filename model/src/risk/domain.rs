//! Where the training rows were: outside of it a model has nothing to say.

use serde::{Deserialize, Serialize};

use super::{Abstain, RiskError, TrainingSet};

/// By how much of its range each feature may leave it: the next row is allowed to be a little more extreme.
const MARGIN: f64 = 0.1;

/// The range of every feature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// Lowest and highest value of each feature, widened.
    ranges: Vec<(f64, f64)>,
}

impl Domain {
    /// The ranges of the training rows. A feature that was constant may move by a tenth of its size.
    ///
    /// # Errors
    /// [`RiskError::NoRows`].
    pub fn fit(set: &TrainingSet) -> Result<Self, RiskError> {
        let mut rows = set.rows();
        let first = rows.next().ok_or(RiskError::NoRows)?;
        let mut ranges: Vec<(f64, f64)> = first.iter().map(|value| (*value, *value)).collect();
        for row in rows {
            for (range, value) in ranges.iter_mut().zip(row) {
                *range = (range.0.min(*value), range.1.max(*value));
            }
        }
        for (low, high) in &mut ranges {
            let range = *high - *low;
            let room = MARGIN * if range > 0.0 { range } else { high.abs().max(1e-6) };
            (*low, *high) = (*low - room, *high + room);
        }
        Ok(Self { ranges })
    }

    /// Whether a row lies in it.
    ///
    /// # Errors
    /// [`Abstain::Missing`] for a value that is not finite, [`Abstain::OutOfDomain`] for one outside its range or a row of
    /// another width.
    pub fn check(&self, row: &[f64]) -> Result<(), Abstain> {
        if row.len() != self.ranges.len() {
            return Err(Abstain::OutOfDomain);
        }
        if row.iter().any(|value| !value.is_finite()) {
            return Err(Abstain::Missing);
        }
        let inside = |(value, range): (&f64, &(f64, f64))| (range.0..=range.1).contains(value);
        if row.iter().zip(&self.ranges).all(inside) {
            Ok(())
        } else {
            Err(Abstain::OutOfDomain)
        }
    }

    /// Number of features.
    pub(super) fn width(&self) -> usize {
        self.ranges.len()
    }

    /// Whether stored ranges are some.
    pub(super) fn is_whole(&self) -> bool {
        self.ranges
            .iter()
            .all(|(low, high)| low.is_finite() && high.is_finite() && low <= high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::risk::Outcome;

    fn domain() -> Domain {
        let mut set = TrainingSet::new(2).unwrap();
        for value in 0..=10 {
            let outcome = Outcome::failed(1.0).unwrap();
            set.push(value, &[f64::from(value), 4.0], outcome).unwrap();
        }
        Domain::fit(&set).unwrap()
    }

    #[test]
    fn rows_like_the_training_rows_pass_and_others_do_not() {
        let domain = domain();
        assert_eq!(domain.check(&[5.0, 4.0]), Ok(()));
        assert_eq!(domain.check(&[10.9, 4.3]), Ok(()));
        for other in [[11.5, 4.0], [-1.5, 4.0], [5.0, 9.0]] {
            assert_eq!(domain.check(&other), Err(Abstain::OutOfDomain));
        }
    }

    #[test]
    fn a_missing_value_and_another_width_abstain() {
        assert_eq!(domain().check(&[f64::NAN, 4.0]), Err(Abstain::Missing));
        assert_eq!(domain().check(&[1.0]), Err(Abstain::OutOfDomain));
        let empty = TrainingSet::new(1).unwrap();
        assert!(matches!(Domain::fit(&empty), Err(RiskError::NoRows)));
    }
}
