//! Score, label and alarm files of a folder, one for each machine.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use theriac_model::io::{ReadError, read_npy_f64};

use super::EvaluateError;

/// What a file's name may end with, in the order in which they are looked for.
const ENDINGS: [&str; 4] = [".npy", ".npy.gz", ".csv", ".csv.gz"];

/// Names of the machines that have labels in `folder`, in order.
pub(super) fn labelled_machines(folder: &Path) -> Result<Vec<String>, EvaluateError> {
    let refused = |source| EvaluateError::Folder {
        path: folder.to_owned(),
        source,
    };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let name = entry.map_err(refused)?.file_name();
        let name = name.to_string_lossy();
        for ending in ENDINGS {
            if let Some(machine) = name.strip_suffix(&format!(".label{ending}")) {
                names.insert(machine.to_owned());
            }
        }
    }
    Ok(names.into_iter().collect())
}

/// The file of one machine, `NAME` and an ending.
pub(super) fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    ENDINGS
        .iter()
        .map(|ending| folder.join(format!("{name}{ending}")))
        .find(|path| path.is_file())
}

/// Every value of a file, in order. A table's last column is taken, its header may be missing, an empty cell is NaN.
pub(super) fn read_values(path: &Path) -> Result<Vec<f64>, EvaluateError> {
    let packed = is(path, "gz");
    let plain = if packed {
        path.with_extension("")
    } else {
        path.to_owned()
    };
    if is(&plain, "npy") {
        return Ok(read_npy_f64(path)?.values);
    }
    let io = |source| ReadError::Io {
        path: path.to_owned(),
        source,
    };
    let file = BufReader::new(File::open(path).map_err(io)?);
    let text: Box<dyn Read> = if packed {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut values = Vec::new();
    let mut header_allowed = true;
    for (index, line) in BufReader::new(text).lines().enumerate() {
        let line = line.map_err(io)?;
        if line.trim().is_empty() {
            continue;
        }
        let cell = line.rsplit(',').next().unwrap_or_default().trim();
        match cell.parse() {
            Ok(value) => values.push(value),
            Err(_) if cell.is_empty() => values.push(f64::NAN),
            Err(_) if header_allowed => {}
            Err(_) => {
                return Err(EvaluateError::NotANumber {
                    path: path.to_owned(),
                    line: index + 1,
                });
            }
        }
        header_allowed = false;
    }
    Ok(values)
}

fn is(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Values that must be 0 or 1. `missing` is what NaN means, where it may stand.
pub(super) fn read_mask(path: &Path, missing: Option<bool>) -> Result<Vec<bool>, EvaluateError> {
    let refused = |row: usize, found: f64| EvaluateError::NotAMask {
        path: path.to_owned(),
        row,
        found,
    };
    read_values(path)?
        .into_iter()
        .enumerate()
        .map(|(row, value)| match value {
            0.0 => Ok(false),
            1.0 => Ok(true),
            value if value.is_nan() => missing.ok_or_else(|| refused(row, value)),
            value => Err(refused(row, value)),
        })
        .collect()
}
