//! Matrices in NumPy's `.npy` format, for `aggregate`: format versions 1 and 2, little-endian `f4` or `f8`, C order.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use crate::robust::{FileRows, MatrixRows, RuleError, Width};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header taken: those that NumPy writes have a few hundred bytes.
const HEADER_BYTES_MAX: usize = 64 * 1_024;
/// Values read at a time.
const PIECE_VALUES: usize = 16 * 1_024;

/// Why a matrix cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NpyError {
    /// The file system refused.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no matrix that we take.
    #[error("{path}: {reason}; an [n, d] array of float32 or float64 in C order is needed")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// Its values lie column after column.
    #[error("{path} is in Fortran order; an [n, d] array in C order is needed")]
    FortranOrder {
        /// The file.
        path: PathBuf,
    },
    /// A value that no rule may see.
    #[error("{path}: value {index} is not finite")]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// Which value, row after row.
        index: usize,
    },
    /// Its shape holds no rows.
    #[error(transparent)]
    Shape(#[from] RuleError),
}

impl NpyError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io { what: "read", .. } => "check the path and that this user may read it",
            Self::Io { .. } => "check that the directory is there, belongs to this user and has room",
            Self::Format { .. } => "numpy.save(\"u.npy\", updates.astype(numpy.float32)) writes such a file",
            Self::FortranOrder { .. } => {
                "numpy.save(\"u.npy\", numpy.ascontiguousarray(updates)) writes it in C order"
            }
            Self::NonFinite { .. } => {
                "leave out that row: no rule sees an update that is not finite, `~numpy.isfinite(updates).all(axis=1)` finds them"
            }
            Self::Shape(_) => "one row for each update, at least one row and one column",
        }
    }
}

/// A matrix as it is in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    /// `<f4`
    F32(MatrixRows<f32>),
    /// `<f8`
    F64(MatrixRows<f64>),
}

/// Reads an `[n, d]` matrix of finite values.
///
/// # Errors
/// [`NpyError`].
pub fn read_matrix(path: &Path) -> Result<Matrix, NpyError> {
    let mut start = Start::read(path)?;
    let [n, d] = start.shape;
    let io = |source| NpyError::Io {
        what: "read",
        path: path.to_owned(),
        source,
    };
    let finite = |index: Option<usize>| match index {
        Some(index) => Err(NpyError::NonFinite {
            path: path.to_owned(),
            index,
        }),
        None => Ok(()),
    };
    match start.kind {
        Kind::F64 => {
            let values = read_values(&mut start.file, n * d, f64::from_le_bytes).map_err(io)?;
            finite(values.iter().position(|value| !value.is_finite()))?;
            Ok(Matrix::F64(MatrixRows::new(values, n, d)?))
        }
        Kind::F32 => {
            let values = read_values(&mut start.file, n * d, f32::from_le_bytes).map_err(io)?;
            finite(values.iter().position(|value| !value.is_finite()))?;
            Ok(Matrix::F32(MatrixRows::new(values, n, d)?))
        }
        Kind::F16 => Err(NpyError::Format {
            path: path.to_owned(),
            reason: "element type '<f2' is read with --spill only".into(),
        }),
    }
}

/// Opens an `[n, d]` matrix of float16 or float32 that stays in its file.
///
/// # Errors
/// [`NpyError`]; values that are not finite are found while a rule reads them.
pub fn open_matrix(path: &Path) -> Result<FileRows, NpyError> {
    let start = Start::read(path)?;
    let [n, d] = start.shape;
    let width = match start.kind {
        Kind::F16 => Width::F16,
        Kind::F32 => Width::F32,
        Kind::F64 => {
            return Err(NpyError::Format {
                path: path.to_owned(),
                reason: "element type '<f8' with --spill".into(),
            });
        }
    };
    Ok(FileRows::new(start.file, start.offset, n, d, width))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F16,
    F32,
    F64,
}

/// A file whose header was read and agrees with its length; it stands at its first value.
struct Start {
    file: File,
    kind: Kind,
    shape: [usize; 2],
    offset: u64,
}

impl Start {
    fn read(path: &Path) -> Result<Self, NpyError> {
        let io = |source| NpyError::Io {
            what: "read",
            path: path.to_owned(),
            source,
        };
        let format = |reason: String| NpyError::Format {
            path: path.to_owned(),
            reason,
        };
        let mut file = File::open(path).map_err(io)?;
        let cut = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => format("no .npy file: it ends in its header".into()),
            _ => io(error),
        };
        let mut start = [0_u8; 8];
        file.read_exact(&mut start).map_err(cut)?;
        if start[..6] != *MAGIC || !(1..=2).contains(&start[6]) {
            return Err(format("no .npy file of version 1 or 2".into()));
        }
        let mut length = [0_u8; 4];
        file.read_exact(&mut length[..if start[6] == 1 { 2 } else { 4 }])
            .map_err(cut)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > HEADER_BYTES_MAX {
            return Err(format(format!("a header of {length} bytes")));
        }
        let mut header = vec![0_u8; length];
        file.read_exact(&mut header).map_err(cut)?;
        let header = String::from_utf8_lossy(&header).into_owned();
        let (kind, width) = match value(&header, "'descr':") {
            Some("'<f2'") => (Kind::F16, 2),
            Some("'<f4'") => (Kind::F32, 4),
            Some("'<f8'") => (Kind::F64, 8),
            other => return Err(format(format!("element type {}", other.unwrap_or("unknown")))),
        };
        if value(&header, "'fortran_order':") != Some("False") {
            return Err(NpyError::FortranOrder {
                path: path.to_owned(),
            });
        }
        let shape = shape(&header).ok_or_else(|| format("no shape".into()))?;
        let [n, d] = shape[..] else {
            return Err(format(format!("shape {shape:?}")));
        };
        let count = n
            .checked_mul(d)
            .filter(|count| count.checked_mul(width).is_some())
            .ok_or_else(|| format("too large".into()))?;
        let offset = 10 + u64::from(start[6] - 1) * 2 + length as u64;
        let found = file.metadata().map_err(io)?.len().saturating_sub(offset);
        if found != (count * width) as u64 {
            return Err(format(format!(
                "{found} bytes of values where shape {shape:?} needs {}",
                count * width
            )));
        }
        Ok(Self {
            file,
            kind,
            shape: [n, d],
            offset,
        })
    }
}

/// Reads values piece by piece: the matrix is in memory once.
fn read_values<T, const W: usize>(
    file: &mut File,
    count: usize,
    decode: impl Fn([u8; W]) -> T,
) -> io::Result<Vec<T>> {
    let mut values = Vec::with_capacity(count);
    let mut buffer = vec![0_u8; PIECE_VALUES * W];
    while values.len() < count {
        let piece = &mut buffer[..(count - values.len()).min(PIECE_VALUES) * W];
        file.read_exact(piece)?;
        values.extend(piece.as_chunks::<W>().0.iter().map(|bytes| decode(*bytes)));
    }
    Ok(values)
}

/// The text after a key of the header's dictionary, up to the next comma.
fn value<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let rest = &header[header.find(key)? + key.len()..];
    rest.split([',', '}']).next().map(str::trim)
}

fn shape(header: &str) -> Option<Vec<usize>> {
    let rest = &header[header.find("'shape':")?..];
    let inner = &rest[rest.find('(')? + 1..];
    let inner = &inner[..inner.find(')')?];
    inner
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().ok())
        .collect()
}

/// A number that an `.npy` file holds.
pub trait NpyValue: Copy {
    /// NumPy's name of the type.
    const KIND: &'static str;
    /// Its bytes, least significant first.
    fn bytes(self) -> impl AsRef<[u8]>;
}

impl NpyValue for f32 {
    const KIND: &'static str = "<f4";
    fn bytes(self) -> impl AsRef<[u8]> {
        self.to_le_bytes()
    }
}

impl NpyValue for f64 {
    const KIND: &'static str = "<f8";
    fn bytes(self) -> impl AsRef<[u8]> {
        self.to_le_bytes()
    }
}

/// Writes a `[d]` vector.
///
/// # Errors
/// [`NpyError::Io`].
pub fn write_vector<T: NpyValue>(path: &Path, values: &[T]) -> Result<(), NpyError> {
    write(path, &format!("({},)", values.len()), values)
}

/// Writes an `[n, d]` matrix, row after row, of `rows` rows.
///
/// # Errors
/// [`NpyError::Io`].
pub fn write_matrix<T: NpyValue>(path: &Path, values: &[T], rows: usize) -> Result<(), NpyError> {
    let columns = values.len().checked_div(rows).unwrap_or(0);
    write(path, &format!("({rows}, {columns})"), values)
}

fn write<T: NpyValue>(path: &Path, shape: &str, values: &[T]) -> Result<(), NpyError> {
    let mut header = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': {shape}, }}",
        T::KIND
    );
    // The values begin at a multiple of 64 bytes, and the header ends with a newline.
    let padding = 64 - (MAGIC.len() + 4 + header.len() + 1) % 64;
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let written = (|| {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(MAGIC)?;
        file.write_all(&[1, 0])?;
        let length = u16::try_from(header.len()).map_err(io::Error::other)?;
        file.write_all(&length.to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for value in values {
            file.write_all(value.bytes().as_ref())?;
        }
        file.flush()
    })();
    written.map_err(|source| NpyError::Io {
        what: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.npy");
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn reads_what_numpy_writes() {
        let data: Vec<u8> = [1.0_f64, 2.0, 3.0, 4.0, 5.0, 6.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let (_dir, path) = file(
            "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }      \n",
            &data,
        );
        let expected = MatrixRows::from_rows(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).unwrap();
        assert_eq!(read_matrix(&path).unwrap(), Matrix::F64(expected));
    }

    #[test]
    fn refuses_what_is_no_matrix_of_floats() {
        let nan: Vec<u8> = f32::NAN.to_le_bytes().to_vec();
        for (header, data, says, hint) in [
            (
                "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1), }",
                vec![0; 4],
                "<i4",
                "astype(numpy.float32)",
            ),
            (
                "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1), }",
                vec![0; 4],
                "Fortran",
                "numpy.ascontiguousarray",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }",
                vec![0; 4],
                "[1]",
                "numpy.save",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }",
                vec![0; 4],
                "4 bytes",
                "numpy.save",
            ),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }",
                nan,
                "not finite",
                "numpy.isfinite",
            ),
        ] {
            let (_dir, path) = file(header, &data);
            let error = read_matrix(&path).unwrap_err();
            assert!(error.to_string().contains(says), "{header}: {error}");
            assert!(error.hint().contains(hint), "{header}: {}", error.hint());
        }
    }

    #[test]
    fn what_cannot_be_read_or_written_is_no_matter_of_numpy() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone/u.npy");
        for error in [
            read_matrix(&gone).unwrap_err(),
            write_vector(&gone, &[1.0_f32]).unwrap_err(),
        ] {
            assert!(!error.hint().contains("numpy"), "{error}: {}", error.hint());
        }
    }

    #[test]
    fn header_of_a_written_vector_ends_at_a_multiple_of_64() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        write_vector(&path, &[1.0_f32, 2.0]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len() - 8) % 64, 0);
        assert!(bytes.windows(12).any(|window| window == b"'shape': (2,"));
    }
}
