//! Many rows of metrics.

use std::fmt;
use std::ops::Range;

use crate::sample::Sample;

/// Why rows do not make a series.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeriesError {
    /// The number of values is no multiple of the number of channels.
    #[error("{values} values do not make whole rows of {channels} channels")]
    Ragged {
        /// Number of values.
        values: usize,
        /// Number of channels.
        channels: usize,
    },
    /// A row or series has another number of channels.
    #[error(
        "expected {expected} channels, found {found}: check that the file or collector matches the feature profile"
    )]
    Channels {
        /// Channels of the series or model.
        expected: usize,
        /// Channels of the row.
        found: usize,
    },
}

/// Raw rows `[time, channel]`, row-major, oldest first. NaN is a missing value.
///
/// Like [`Sample`] it has no `Serialize` and its `Debug` shows no value.
#[derive(Clone, PartialEq)]
pub struct Series {
    channels: usize,
    values: Vec<f32>,
    times_ms: Option<Vec<u64>>,
}

impl Series {
    /// Takes row-major values `[time, channel]` without times.
    ///
    /// # Errors
    /// [`SeriesError::Ragged`] when they do not make whole rows (or there are values but no channels).
    pub fn new(channels: usize, values: Vec<f32>) -> Result<Self, SeriesError> {
        let whole = if channels == 0 {
            values.is_empty()
        } else {
            values.len().is_multiple_of(channels)
        };
        if whole {
            Ok(Self {
                channels,
                values,
                times_ms: None,
            })
        } else {
            Err(SeriesError::Ragged {
                values: values.len(),
                channels,
            })
        }
    }

    /// An empty series whose rows will carry times.
    pub fn empty(channels: usize) -> Self {
        Self {
            channels,
            values: Vec::new(),
            times_ms: Some(Vec::new()),
        }
    }

    /// Collects samples.
    ///
    /// # Errors
    /// [`SeriesError::Channels`] when a sample has another number of values.
    pub fn from_samples<'a>(
        channels: usize,
        samples: impl IntoIterator<Item = &'a Sample>,
    ) -> Result<Self, SeriesError> {
        let mut series = Self::empty(channels);
        for sample in samples {
            series.push(sample)?;
        }
        Ok(series)
    }

    /// Appends a row. On a series without times the sample's time is dropped.
    ///
    /// # Errors
    /// [`SeriesError::Channels`] when the sample has another number of values; nothing is appended.
    pub fn push(&mut self, sample: &Sample) -> Result<(), SeriesError> {
        if sample.values.len() != self.channels {
            return Err(SeriesError::Channels {
                expected: self.channels,
                found: sample.values.len(),
            });
        }
        self.values.extend_from_slice(&sample.values);
        if let Some(times) = &mut self.times_ms {
            times.push(sample.at_ms);
        }
        Ok(())
    }

    /// Gives every row its time.
    ///
    /// # Errors
    /// [`SeriesError::Ragged`] when there are not as many times as rows.
    pub fn with_times(mut self, times_ms: Vec<u64>) -> Result<Self, SeriesError> {
        if times_ms.len() != self.rows() {
            return Err(SeriesError::Ragged {
                values: times_ms.len(),
                channels: self.rows(),
            });
        }
        self.times_ms = Some(times_ms);
        Ok(self)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.channels).unwrap_or(0)
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// One row.
    ///
    /// # Panics
    /// When `row` is not below [`rows`](Self::rows).
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.channels..][..self.channels]
    }

    /// Every row, oldest first.
    pub fn iter_rows(&self) -> impl ExactSizeIterator<Item = &[f32]> + Clone {
        // `chunks_exact(0)` panics; without channels there are no values either.
        self.values.chunks_exact(self.channels.max(1))
    }

    /// All values `[time, channel]`, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Times in milliseconds since the Unix epoch, where known.
    pub fn times_ms(&self) -> Option<&[u64]> {
        self.times_ms.as_deref()
    }

    /// A copy of some rows; the range is cut to what exists.
    #[must_use]
    pub fn slice(&self, rows: Range<usize>) -> Self {
        let end = rows.end.min(self.rows());
        let start = rows.start.min(end);
        Self {
            channels: self.channels,
            values: self.values[start * self.channels..end * self.channels].to_vec(),
            times_ms: self.times_ms.as_ref().map(|times| times[start..end].to_vec()),
        }
    }

    /// A copy of the last `rows` rows, or of all when there are fewer.
    #[must_use]
    pub fn tail(&self, rows: usize) -> Self {
        self.slice(self.rows().saturating_sub(rows)..self.rows())
    }

    /// Missing values per channel.
    pub fn missing(&self) -> Vec<u64> {
        let mut missing = vec![0; self.channels];
        for row in self.iter_rows() {
            for (count, value) in missing.iter_mut().zip(row) {
                *count += u64::from(!value.is_finite());
            }
        }
        missing
    }
}

impl fmt::Debug for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Series")
            .field("rows", &self.rows())
            .field("channels", &self.channels)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_ragged_values_and_foreign_rows() {
        assert_eq!(
            Series::new(2, vec![0.0; 3]),
            Err(SeriesError::Ragged {
                values: 3,
                channels: 2
            })
        );
        assert!(Series::new(0, vec![0.0]).is_err());
        let mut series = Series::empty(2);
        let wrong = Sample {
            at_ms: 0,
            values: vec![0.0],
        };
        assert_eq!(
            series.push(&wrong),
            Err(SeriesError::Channels {
                expected: 2,
                found: 1
            })
        );
        assert_eq!(series.rows(), 0);
    }

    #[test]
    fn series_without_rows_or_channels_is_defined() {
        let none = Series::new(0, Vec::new()).unwrap();
        assert_eq!(
            (none.rows(), none.iter_rows().len(), none.missing().len()),
            (0, 0, 0)
        );
        let empty = Series::empty(3);
        assert_eq!(
            (empty.rows(), empty.tail(5).rows(), empty.slice(2..9).rows()),
            (0, 0, 0)
        );
    }

    #[test]
    fn slices_keep_rows_and_times_together() {
        let samples: Vec<_> = (0..5_u8)
            .map(|i| Sample {
                at_ms: u64::from(i) * 10,
                values: vec![f32::from(i), f32::NAN],
            })
            .collect();
        let series = Series::from_samples(2, &samples).unwrap();
        let tail = series.tail(2);
        assert_eq!(
            (tail.rows(), tail.row(0)[0], tail.times_ms().unwrap()),
            (2, 3.0, &[30, 40][..])
        );
        assert_eq!(series.missing(), [0, 5]);
        assert!(!format!("{series:?}").contains("3.0"));
    }
}
