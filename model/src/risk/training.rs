//! Rows with what became of them: what a hazard is fitted on. Never serialised.

use super::RiskError;

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    time: f64,
    failed: bool,
}

impl Outcome {
    /// It failed `time` after the row.
    ///
    /// # Errors
    /// [`RiskError::NegativeTime`] when the failure lies before the row, as when a clock ran backwards.
    pub fn failed(time: f64) -> Result<Self, RiskError> {
        Self::new(time, true)
    }

    /// It was last seen alive `time` after the row.
    ///
    /// # Errors
    /// [`RiskError::NegativeTime`].
    pub fn censored(time: f64) -> Result<Self, RiskError> {
        Self::new(time, false)
    }

    fn new(time: f64, failed: bool) -> Result<Self, RiskError> {
        if time.is_finite() && time >= 0.0 {
            Ok(Self { time, failed })
        } else {
            Err(RiskError::NegativeTime { time })
        }
    }

    /// Time to the failure, or to the last sight of it.
    pub fn time(self) -> f64 {
        self.time
    }

    /// Whether it is known to fail before `time`.
    pub fn fails_before(self, time: f64) -> bool {
        self.failed && self.time < time
    }

    /// Whether it is known if it lives at `time`.
    pub fn known_at(self, time: f64) -> bool {
        self.failed || self.time >= time
    }
}

/// Rows `[row, feature]`, each of a unit (an engine, a drive, a service's life) and with an outcome.
#[derive(Clone)]
pub struct TrainingSet {
    width: usize,
    features: Vec<f64>,
    outcomes: Vec<Outcome>,
    units: Vec<u32>,
}

impl std::fmt::Debug for TrainingSet {
    /// Prints no value: raw data stay on the host.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainingSet")
            .field("width", &self.width)
            .field("rows", &self.outcomes.len())
            .finish_non_exhaustive()
    }
}

impl TrainingSet {
    /// Without rows.
    ///
    /// # Errors
    /// [`RiskError::Width`] for rows without features.
    pub fn new(width: usize) -> Result<Self, RiskError> {
        if width == 0 {
            return Err(RiskError::Width {
                expected: 1,
                found: 0,
            });
        }
        Ok(Self {
            width,
            features: Vec::new(),
            outcomes: Vec::new(),
            units: Vec::new(),
        })
    }

    /// Adds a row of `unit`.
    ///
    /// # Errors
    /// [`RiskError::Width`]; [`RiskError::NotFinite`] when a feature is NaN or infinite. Then nothing is added.
    pub fn push(&mut self, unit: u32, row: &[f64], outcome: Outcome) -> Result<(), RiskError> {
        if row.len() != self.width {
            return Err(RiskError::Width {
                expected: self.width,
                found: row.len(),
            });
        }
        if row.iter().any(|value| !value.is_finite()) {
            return Err(RiskError::NotFinite);
        }
        self.features.extend_from_slice(row);
        self.outcomes.push(outcome);
        self.units.push(unit);
        Ok(())
    }

    /// The rows whose unit is `wanted`. A unit's rows stay together: no split can have a unit on both of its sides.
    #[must_use]
    pub fn units_where(&self, wanted: impl Fn(u32) -> bool) -> Self {
        self.filter(|row| wanted(self.units[row]))
    }

    /// Every `stride`-th row of each unit, counted from its last row backwards, so that the end of a life stays in.
    #[must_use]
    pub fn thinned(&self, stride: usize) -> Self {
        let stride = stride.max(1);
        let mut after: std::collections::BTreeMap<u32, usize> = std::collections::BTreeMap::new();
        let mut keep = vec![false; self.units.len()];
        for row in (0..self.units.len()).rev() {
            let count = after.entry(self.units[row]).or_default();
            keep[row] = count.is_multiple_of(stride);
            *count += 1;
        }
        self.filter(|row| keep[row])
    }

    fn filter(&self, keep: impl Fn(usize) -> bool) -> Self {
        let mut chosen = Self {
            width: self.width,
            features: Vec::new(),
            outcomes: Vec::new(),
            units: Vec::new(),
        };
        for (row, values) in self.rows().enumerate() {
            if keep(row) {
                chosen.features.extend_from_slice(values);
                chosen.outcomes.push(self.outcomes[row]);
                chosen.units.push(self.units[row]);
            }
        }
        chosen
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// The rows.
    pub fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.features.chunks_exact(self.width)
    }

    /// What became of each row.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// The unit of each row.
    pub fn units(&self) -> &[u32] {
        &self.units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_runs_backwards_is_refused() {
        for time in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(
                Outcome::failed(time),
                Err(RiskError::NegativeTime { .. })
            ));
            assert!(matches!(
                Outcome::censored(time),
                Err(RiskError::NegativeTime { .. })
            ));
        }
    }

    #[test]
    fn a_row_that_cannot_be_used_leaves_the_set_as_it_was() {
        let mut set = TrainingSet::new(2).unwrap();
        let outcome = Outcome::failed(1.0).unwrap();
        assert!(set.push(1, &[1.0], outcome).is_err());
        assert!(set.push(1, &[1.0, f64::NAN], outcome).is_err());
        assert!(set.is_empty() && set.rows().count() == 0);
        assert!(TrainingSet::new(0).is_err());
    }

    #[test]
    fn a_split_by_unit_has_no_unit_on_both_sides() {
        let mut set = TrainingSet::new(1).unwrap();
        for row in 0..100_u32 {
            set.push(row % 7, &[f64::from(row)], Outcome::failed(1.0).unwrap())
                .unwrap();
        }
        let (train, test) = (set.units_where(|u| u % 5 != 0), set.units_where(|u| u % 5 == 0));
        assert_eq!(train.len() + test.len(), 100);
        assert!(train.units().iter().all(|unit| !test.units().contains(unit)));
    }

    #[test]
    fn thinning_keeps_the_last_row_of_each_unit() {
        let mut set = TrainingSet::new(1).unwrap();
        for row in 0..10_u32 {
            set.push(row / 5, &[f64::from(row)], Outcome::failed(1.0).unwrap())
                .unwrap();
        }
        let thinned = set.thinned(3);
        let kept: Vec<f64> = thinned.rows().map(|row| row[0]).collect();
        assert_eq!(kept, [1.0, 4.0, 6.0, 9.0]);
    }
}
