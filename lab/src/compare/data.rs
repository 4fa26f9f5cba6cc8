//! Labelled recordings, and other views of them: fewer channels, longer steps.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;
use theriac_model::io::{NpyArray, ReadError, read_npy};
use theriac_model::series::{Series, SeriesError};

const TRAIN: &str = ".train.npy.gz";
const VALUE: &str = ".value.npy.gz";

/// Why there is nothing to compare on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The directory cannot be listed.
    #[error("cannot list --data {path}: {source}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No file has a fitting name.
    #[error("no NAME{TRAIN} and no NAME{VALUE} in {path}: give the directory that holds the recordings")]
    Nothing {
        /// Where.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A file does not hold whole rows.
    #[error("{name}: {source}")]
    Rows {
        /// Which.
        name: String,
        /// Why.
        source: SeriesError,
    },
    /// Labels and rows do not match.
    #[error("{name}: {labels} labels for {rows} rows")]
    Labels {
        /// Which.
        name: String,
        /// Labels found.
        labels: usize,
        /// Rows to be scored.
        rows: usize,
    },
}

/// One recording.
#[derive(Debug, Clone)]
pub struct Recording {
    /// Its name.
    pub name: String,
    /// Time between rows.
    pub step: Duration,
    /// What is fitted on; no labels.
    pub train: Series,
    /// What is scored.
    pub test: Series,
    /// Whether each row of the test part is anomalous. Never seen by a detector.
    pub labels: Vec<bool>,
}

/// Another look at a recording: which channels, and how many rows make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct View {
    /// First channel taken and the distance to the next.
    channels: (usize, usize),
    /// Rows averaged to one.
    rows: usize,
}

impl View {
    /// Everything as it is.
    pub const ALL: Self = Self {
        channels: (0, 1),
        rows: 1,
    };

    /// `all`, or `5min`, `even` and `odd` joined by a dash.
    pub fn name(self) -> String {
        let rows = (self.rows > 1).then_some("5min");
        let channels = match self.channels {
            (_, 1) => None,
            (0, _) => Some("even"),
            _ => Some("odd"),
        };
        let parts: Vec<&str> = rows.into_iter().chain(channels).collect();
        if parts.is_empty() {
            "all".to_owned()
        } else {
            parts.join("-")
        }
    }

    /// The recording as it looks this way.
    ///
    /// # Errors
    /// [`DataError::Rows`] when no channel is left.
    pub fn of(self, recording: &Recording) -> Result<Recording, DataError> {
        let series = |series: &Series| {
            self.series(series).map_err(|source| DataError::Rows {
                name: recording.name.clone(),
                source,
            })
        };
        Ok(Recording {
            name: recording.name.clone(),
            step: recording.step * u32::try_from(self.rows).unwrap_or(1),
            train: series(&recording.train)?,
            test: series(&recording.test)?,
            labels: recording
                .labels
                .chunks_exact(self.rows)
                .map(|rows| rows.contains(&true))
                .collect(),
        })
    }

    fn series(self, series: &Series) -> Result<Series, SeriesError> {
        let channels: Vec<usize> = (self.channels.0..series.channels())
            .step_by(self.channels.1)
            .collect();
        let whole = series.rows() / self.rows;
        let mut values = Vec::with_capacity(whole * channels.len());
        for start in (0..whole).map(|row| row * self.rows) {
            for channel in &channels {
                let sum: f64 = (start..start + self.rows)
                    .map(|row| f64::from(series.row(row)[*channel]))
                    .sum();
                values.push(narrow(sum / self.rows as f64));
            }
        }
        Series::new(channels.len(), values)
    }
}

/// A view that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no view is called `{0}`: use all, or 5min, even and odd joined by a dash such as 5min-even")]
pub struct UnknownView(String);

impl FromStr for View {
    type Err = UnknownView;

    fn from_str(name: &str) -> Result<Self, UnknownView> {
        let mut view = Self::ALL;
        for part in name.split('-') {
            match part {
                "all" => {}
                "5min" => view.rows = 5,
                "even" => view.channels = (0, 2),
                "odd" => view.channels = (1, 2),
                _ => return Err(UnknownView(name.to_owned())),
            }
        }
        Ok(view)
    }
}

/// Reads every recording of a directory, of either kind: `NAME.train`, `NAME.test`, `NAME.label` (many channels, one row a
/// minute), or `NAME.time`, `NAME.value`, `NAME.label` (one channel), where the first `fit_share` of the rows is the
/// train part, the rest is scored, and values are scaled so that the train part spans 0 to 1.
///
/// # Errors
/// [`DataError`]
pub fn load(path: &Path, fit_share: f64) -> Result<Vec<Recording>, DataError> {
    let names = |suffix: &str| names(path, suffix);
    let servers = names(TRAIN)?;
    let univariate = names(VALUE)?;
    if servers.is_empty() && univariate.is_empty() {
        return Err(DataError::Nothing {
            path: path.to_owned(),
        });
    }
    let servers = servers.iter().map(|name| server(path, name));
    let univariate = univariate.iter().map(|name| one_channel(path, name, fit_share));
    servers.chain(univariate).collect()
}

fn names(path: &Path, suffix: &str) -> Result<BTreeSet<String>, DataError> {
    let directory = |source| DataError::Directory {
        path: path.to_owned(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path).map_err(directory)? {
        let name = entry.map_err(directory)?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(suffix)) {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

fn server(path: &Path, name: &str) -> Result<Recording, DataError> {
    let read = |part: &str| read_npy(&path.join(format!("{name}.{part}.npy.gz")));
    let series = |array: NpyArray| {
        let channels = array.shape.get(1).copied().unwrap_or(1);
        Series::new(channels, array.values).map_err(|source| DataError::Rows {
            name: name.to_owned(),
            source,
        })
    };
    checked(Recording {
        name: name.to_owned(),
        step: Duration::from_mins(1),
        train: series(read("train")?)?,
        test: series(read("test")?)?,
        labels: truths(&read("label")?),
    })
}

fn one_channel(path: &Path, name: &str, fit_share: f64) -> Result<Recording, DataError> {
    let read = |part: &str| read_npy(&path.join(format!("{name}.{part}.npy.gz")));
    let mut values = read("value")?.values;
    let labels = truths(&read("label")?);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a length"
    )]
    let fitted = (fit_share.clamp(0.0, 1.0) * values.len() as f64) as usize;
    let train = &values[..fitted];
    let low = train.iter().copied().fold(f32::INFINITY, f32::min);
    let high = train.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let span = if high > low { high - low } else { 1.0 };
    for value in &mut values {
        *value = (*value - low) / span;
    }
    let series = |values: &[f32]| {
        Series::new(1, values.to_vec()).map_err(|source| DataError::Rows {
            name: name.to_owned(),
            source,
        })
    };
    checked(Recording {
        name: name.to_owned(),
        step: step(&read("time")?.values),
        train: series(&values[..fitted])?,
        test: series(&values[fitted..])?,
        labels: labels.get(fitted..).unwrap_or_default().to_vec(),
    })
}

fn checked(recording: Recording) -> Result<Recording, DataError> {
    let (labels, rows) = (recording.labels.len(), recording.test.rows());
    if labels == rows {
        Ok(recording)
    } else {
        Err(DataError::Labels {
            name: recording.name,
            labels,
            rows,
        })
    }
}

fn truths(labels: &NpyArray) -> Vec<bool> {
    labels.values.iter().map(|label| *label > 0.5).collect()
}

/// The usual step, in whole minutes: times of this size are known to a minute or two in `f32`.
fn step(seconds: &[f32]) -> Duration {
    let (Some(first), Some(last)) = (seconds.first(), seconds.last()) else {
        return Duration::from_mins(1);
    };
    let steps = seconds.len().saturating_sub(1).max(1) as f64;
    let mean = (f64::from(*last) - f64::from(*first)) / steps;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to a day"
    )]
    let minutes = (mean / 60.0).round().clamp(1.0, 1440.0) as u64;
    Duration::from_mins(minutes)
}

fn narrow(value: f64) -> f32 {
    #[expect(clippy::cast_possible_truncation, reason = "a mean of f32 values")]
    let value = value as f32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use theriac_model::io::write_npy_f32;

    fn recording() -> Recording {
        let series = |rows: u8| Series::new(3, (0..rows * 3).map(f32::from).collect()).unwrap();
        Recording {
            name: "a".to_owned(),
            step: Duration::from_mins(1),
            train: series(12),
            test: series(11),
            labels: (0..11).map(|row| row == 7).collect(),
        }
    }

    #[test]
    fn views_take_channels_and_average_rows_with_their_labels() {
        let view: View = "5min-odd".parse().unwrap();
        assert_eq!(view.name(), "5min-odd");
        let seen = view.of(&recording()).unwrap();
        assert_eq!(
            (seen.train.rows(), seen.test.rows(), seen.test.channels()),
            (2, 2, 1)
        );
        // Channel 1 of rows 0 to 4 holds 1, 4, 7, 10, 13.
        assert_eq!(seen.test.row(0), [7.0]);
        assert_eq!(
            (seen.labels, seen.step),
            (vec![false, true], Duration::from_mins(5))
        );
        let even = "even".parse::<View>().unwrap().of(&recording()).unwrap();
        assert_eq!(even.test.row(1), [3.0, 5.0]);
        assert_eq!("all".parse(), Ok(View::ALL));
        assert!(
            "hourly"
                .parse::<View>()
                .unwrap_err()
                .to_string()
                .contains("5min-even")
        );
    }

    #[test]
    fn one_channel_is_split_in_time_and_scaled_by_its_train_part() {
        let dir = tempfile::tempdir().unwrap();
        let write = |part: &str, values: &[f32]| {
            // Written plain, then packed: what is read is always packed.
            let plain = dir.path().join(format!("x.{part}.npy"));
            write_npy_f32(&plain, &[values.len()], values).unwrap();
            let bytes = std::fs::read(&plain).unwrap();
            let packed = std::fs::File::create(dir.path().join(format!("x.{part}.npy.gz"))).unwrap();
            let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
            std::io::Write::write_all(&mut packed, &bytes).unwrap();
            packed.finish().unwrap();
        };
        write("value", &[10.0, 30.0, 20.0, 50.0, 10.0]);
        write("time", &[0.0, 300.0, 600.0, 900.0, 1200.0]);
        write("label", &[0.0, 0.0, 0.0, 1.0, 0.0]);
        let [read] = &load(dir.path(), 0.4).unwrap()[..] else {
            panic!("one recording");
        };
        assert_eq!(read.train.values(), [0.0, 1.0]);
        assert_eq!(read.test.values(), [0.5, 2.0, 0.0]);
        assert_eq!(
            (read.step, &read.labels[..]),
            (Duration::from_mins(5), &[false, true, false][..])
        );
        write("label", &[0.0]);
        assert!(matches!(load(dir.path(), 0.4), Err(DataError::Labels { .. })));
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(load(empty.path(), 0.4), Err(DataError::Nothing { .. })));
    }
}
