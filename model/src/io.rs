//! Metrics files: `.npy` and `.npy.gz` arrays, `.csv` tables.
//!
//! A value that is missing (empty cell, NaN, infinity) becomes NaN and is counted; nothing is invented.

mod npy;
mod table;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

pub use npy::{NpyArray, read_npy, read_npy_f64, write_npy_f32, write_npy_u8};

use crate::feature::FeatureSchema;
use crate::series::{Series, SeriesError};

/// Bytes asked of the disk at once.
const BUFFER_BYTES: usize = 1 << 16;

/// Why a metrics file was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The disk said no, or the compressed data are damaged.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The name ends with nothing we read.
    #[error("{0} is of no known kind: use .npy, .npy.gz or .csv")]
    UnknownKind(PathBuf),
    /// Not a NumPy array, or one that is not read here.
    #[error("{path} is no NumPy array that can be read: {reason}")]
    NotNpy {
        /// The file.
        path: PathBuf,
        /// What is wrong, with what is expected.
        reason: String,
    },
    /// The array has fewer or more bytes than its header says.
    #[error("{path} should hold {expected} bytes of values, found {found}: it was cut short or continued")]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes that the header's shape needs.
        expected: u64,
        /// Bytes that are there; where there are more than expected, one more.
        found: u64,
    },
    /// The array is not `[time, channel]`.
    #[error("{path} has shape {shape:?}; metrics are [time, channel]")]
    Shape {
        /// The file.
        path: PathBuf,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A line of a table cannot be used.
    #[error("{path}, line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong, with what is expected. It shows no value.
        reason: String,
    },
    /// The header is missing or names a column twice.
    #[error("{path}: {reason}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The table lacks more than half of the profile's columns.
    #[error(
        "{missing} of the {columns} columns of the profile `{profile}` are missing, first `{first}`; the file has: {found}"
    )]
    MissingColumns {
        /// How many are missing.
        missing: usize,
        /// Columns of the profile.
        columns: usize,
        /// The first one.
        first: String,
        /// The profile.
        profile: String,
        /// The columns that are there.
        found: String,
    },
    /// The array has another number of channels than the profile.
    #[error(transparent)]
    Channels(#[from] SeriesError),
}

/// What was found in a metrics file besides values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReadReport {
    /// Number of rows.
    pub rows: usize,
    /// Missing values per channel.
    pub missing: Vec<u64>,
    /// Places where more than one and a half times the usual step lies between two rows.
    pub gaps: u64,
    /// Rows that would fill them.
    pub gap_rows: u64,
    /// The usual (median) step between rows in milliseconds, where times are known.
    pub step_ms: Option<u64>,
}

/// A metrics file.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// The rows.
    pub series: Series,
    /// Column names without the time, where the file has any.
    pub names: Option<Vec<String>>,
    /// What is missing.
    pub report: ReadReport,
}

impl Recording {
    fn new(series: Series, names: Option<Vec<String>>) -> Self {
        let mut report = ReadReport {
            rows: series.rows(),
            missing: series.missing(),
            ..ReadReport::default()
        };
        if let Some(times) = series.times_ms() {
            count_gaps(times, &mut report);
        }
        Self {
            series,
            names,
            report,
        }
    }

    /// The columns of `schema`, in its order. Columns that it does not name are left out and named; those that the file lacks are
    /// missing values and are named. An array without names must have exactly its number of channels.
    ///
    /// # Errors
    /// [`ReadError::MissingColumns`] when more than half of them are not there: it is then another kind of file;
    /// [`ReadError::Channels`].
    pub fn select(&self, schema: &FeatureSchema) -> Result<Selected, ReadError> {
        let channels = self.series.channels();
        let Some(names) = &self.names else {
            if channels == schema.channels() {
                return Ok(Selected {
                    series: self.series.clone(),
                    absent: Vec::new(),
                    ignored: Vec::new(),
                });
            }
            return Err(SeriesError::Channels {
                expected: schema.channels(),
                found: channels,
            }
            .into());
        };
        let places: BTreeMap<&str, usize> = names
            .iter()
            .enumerate()
            .map(|(i, name)| (name.as_str(), i))
            .collect();
        let columns: Vec<Option<usize>> = schema
            .features
            .iter()
            .map(|feature| places.get(feature.name.as_str()).copied())
            .collect();
        let absent: Vec<String> = schema
            .features
            .iter()
            .zip(&columns)
            .filter(|(_, column)| column.is_none())
            .map(|(feature, _)| feature.name.clone())
            .collect();
        if let Some(first) = absent.first().filter(|_| 2 * absent.len() > columns.len()) {
            return Err(ReadError::MissingColumns {
                missing: absent.len(),
                columns: columns.len(),
                first: first.clone(),
                profile: schema.name.clone(),
                found: names.join(", "),
            });
        }
        let values = self
            .series
            .iter_rows()
            .flat_map(|row| {
                columns
                    .iter()
                    .map(|column| column.map_or(f32::NAN, |column| row[column]))
            })
            .collect();
        let series = Series::new(columns.len(), values)?;
        let series = match self.series.times_ms() {
            Some(times) => series.with_times(times.to_vec())?,
            None => series,
        };
        let known = |name: &&String| schema.features.iter().any(|feature| feature.name == **name);
        let ignored = names.iter().filter(|name| !known(name)).cloned().collect();
        Ok(Selected {
            series,
            absent,
            ignored,
        })
    }
}

/// The columns of a profile, as [`Recording::select`] found them.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// The rows.
    pub series: Series,
    /// Columns of the profile that the file does not have; all their values are missing.
    pub absent: Vec<String>,
    /// Columns of the file that the profile does not name; they are left out.
    pub ignored: Vec<String>,
}

/// Reads a metrics file; its kind is told by its name.
///
/// # Errors
/// Every variant of [`ReadError`] but `MissingColumns`.
pub fn read_recording(path: &Path) -> Result<Recording, ReadError> {
    read_recording_with(path, |_| ())
}

/// As [`read_recording`], and tells again and again how many bytes of the file have been read, for a bar.
///
/// # Errors
/// As [`read_recording`].
pub fn read_recording_with(path: &Path, progress: impl FnMut(u64)) -> Result<Recording, ReadError> {
    let plain = if is(path, "gz") {
        path.with_extension("")
    } else {
        path.to_owned()
    };
    if is(&plain, "npy") {
        let NpyArray { shape, values } = npy::read(path, open_with(path, progress)?)?;
        let [_, channels] = shape[..] else {
            return Err(ReadError::Shape {
                path: path.to_owned(),
                shape,
            });
        };
        Ok(Recording::new(Series::new(channels, values)?, None))
    } else if is(&plain, "csv") {
        table::read_csv(path, open_with(path, progress)?)
    } else {
        Err(ReadError::UnknownKind(path.to_owned()))
    }
}

/// Reads only the rows of a metrics file.
///
/// # Errors
/// As [`read_recording`].
pub fn read_series(path: &Path) -> Result<Series, ReadError> {
    Ok(read_recording(path)?.series)
}

/// The file's bytes, decompressed when its name ends with `.gz`.
fn open(path: &Path) -> Result<Box<dyn Read>, ReadError> {
    open_with(path, |_| ())
}

fn open_with<'a>(path: &Path, progress: impl FnMut(u64) + 'a) -> Result<Box<dyn Read + 'a>, ReadError> {
    let file = File::open(path).map_err(|source| ReadError::Io {
        path: path.to_owned(),
        source,
    })?;
    let file = BufReader::with_capacity(
        BUFFER_BYTES,
        Counted {
            file,
            read: 0,
            progress,
        },
    );
    if is(path, "gz") {
        Ok(Box::new(BufReader::new(MultiGzDecoder::new(file))))
    } else {
        Ok(Box::new(file))
    }
}

/// Counts the bytes that the disk gave.
struct Counted<F> {
    file: File,
    read: u64,
    progress: F,
}

impl<F: FnMut(u64)> Read for Counted<F> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read += read as u64;
        (self.progress)(self.read);
        Ok(read)
    }
}

fn is(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn count_gaps(times: &[u64], report: &mut ReadReport) {
    let mut steps: Vec<u64> = times
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]))
        .collect();
    if steps.is_empty() {
        return;
    }
    let middle = steps.len() / 2;
    let step = *steps.select_nth_unstable(middle).1;
    report.step_ms = Some(step);
    if step == 0 {
        return;
    }
    for gap in steps.into_iter().filter(|passed| *passed > step + step / 2) {
        report.gaps += 1;
        report.gap_rows += (gap + step / 2) / step - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn counts_missing_values_and_gaps() {
        let text = "time,a,b\n2024-01-01T00:00:00Z,1,\n2024-01-01T00:01:00Z,NaN,2\n\
                    2024-01-01T00:02:00Z,3,inf\n2024-01-01T01:05:00+01:00,4,5\n";
        let (_dir, path) = written("m.csv", text.as_bytes());
        let recording = read_recording(&path).unwrap();
        let report = &recording.report;
        assert_eq!(
            (report.rows, &report.missing[..], report.gaps, report.gap_rows),
            (4, &[1, 2][..], 1, 2)
        );
        assert_eq!(report.step_ms, Some(60_000));
        assert!(recording.series.row(0)[1].is_nan());
        assert_eq!(recording.series.times_ms().unwrap()[0], 1_704_067_200_000);
    }

    #[test]
    fn takes_unix_seconds_with_fractions() {
        let (_dir, path) = written("m.csv", b"t,a\n10,1\n10.5,2\n11,3\n");
        assert_eq!(
            read_series(&path).unwrap().times_ms().unwrap(),
            [10_000, 10_500, 11_000]
        );
    }

    #[test]
    fn selects_columns_by_name_in_the_order_of_the_profile() {
        let (_dir, path) = written("m.csv", b"t,channel-01,extra,channel-00\n1,10,20,30\n");
        let recording = read_recording(&path).unwrap();
        let selected = recording.select(&FeatureSchema::recorded("p", 2)).unwrap();
        assert_eq!(
            (selected.series.row(0), selected.series.times_ms().unwrap()),
            (&[30.0, 10.0][..], &[1000][..])
        );
        assert!(selected.absent.is_empty());
    }

    #[test]
    fn columns_that_vanished_are_missing_values_and_named_unless_most_are_gone() {
        let (_dir, path) = written("m.csv", b"t,channel-01,extra,channel-00\n1,10,20,30\n");
        let recording = read_recording(&path).unwrap();
        let selected = recording.select(&FeatureSchema::recorded("p", 3)).unwrap();
        assert_eq!(selected.absent, ["channel-02"]);
        assert!(selected.series.row(0)[2].is_nan());
        assert_eq!(selected.series.missing(), [0, 0, 1]);
        let error = recording
            .select(&FeatureSchema::recorded("p", 5))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("3 of the 5") && error.contains("channel-02") && error.contains("extra"),
            "{error}"
        );
    }

    #[test]
    fn progress_ends_with_the_size_of_the_file() {
        let text: String = std::iter::once("t,a\n".to_owned())
            .chain((0..20_000).map(|row| format!("{row},1\n")))
            .collect();
        let (_dir, path) = written("m.csv", text.as_bytes());
        let mut told = Vec::new();
        read_recording_with(&path, |bytes| told.push(bytes)).unwrap();
        assert!(told.len() > 2 && told.is_sorted());
        assert_eq!(told.last(), Some(&(text.len() as u64)));
    }

    #[test]
    fn refuses_what_is_no_table_with_line_and_reason() {
        for (text, wanted) in [
            ("", "header"),
            ("t\n1\n", "no column besides the time"),
            ("t,a,a\n1,2,3\n", "`a` twice"),
            ("t,a\n1,x\n", "line 2: column `a` is no number"),
            ("t,a\n1,2\n1,2,3\n", "line 3"),
            ("t,a\nyesterday,2\n", "line 2: the time is neither"),
            ("t,a\n5,2\n4,2\n", "line 3: the time goes back"),
            ("t,a\n-1,2\n", "line 2: the time is neither"),
        ] {
            let (_dir, path) = written("m.csv", text.as_bytes());
            let error = read_recording(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?} gave: {error}");
        }
    }

    #[test]
    fn refuses_other_kinds_and_missing_files() {
        let (dir, path) = written("m.txt", b"");
        assert!(matches!(read_series(&path), Err(ReadError::UnknownKind(_))));
        assert!(matches!(
            read_series(&dir.path().join("none.npy")),
            Err(ReadError::Io { .. })
        ));
    }

    #[test]
    fn table_with_a_header_only_has_no_rows() {
        let (_dir, path) = written("m.csv", b"t,a\n");
        let recording = read_recording(&path).unwrap();
        assert_eq!(
            (
                recording.report.rows,
                recording.series.channels(),
                recording.report.step_ms
            ),
            (0, 1, None)
        );
    }
}
