//! Rows that stay in a file: for fleets whose updates do not fit in memory.
//!
//! Updates are written one after another, each once and in one piece. A rule reads columns, so a read takes a short piece of
//! each row; the system's page cache holds what fits. Positioned reads, no map: a file that somebody cuts short is an error
//! here, not a signal that ends the process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use super::Rows;

/// Bytes that are read at once.
const PAGE: usize = 4096;

/// How a number is written, least significant byte first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// IEEE 754 half precision: half the disk and page cache, 11 significant bits.
    F16,
    /// Single precision.
    F32,
}

impl Width {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// What went wrong with a file in the middle of a pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpillError {
    /// It cannot be read.
    #[error("row {row} cannot be read: {source}")]
    Io {
        /// Which row, from 0.
        row: usize,
        /// Why not.
        source: io::Error,
    },
    /// A value that no rule may see.
    #[error("row {row}, value {column} is not finite")]
    NonFinite {
        /// Which row, from 0.
        row: usize,
        /// Which value, from 0.
        column: usize,
    },
}

/// An `[n, d]` matrix in a file, row after row. Memory: one piece of a row.
///
/// A read that fails gives zeros, and the failure is kept: ask [`FileRows::failure`] after a pass, and throw its result away.
#[derive(Debug)]
pub struct FileRows {
    file: File,
    offset: u64,
    count: usize,
    dimension: usize,
    width: Width,
    failure: OnceLock<SpillError>,
}

impl FileRows {
    /// `count` rows of `dimension` values from byte `offset` on.
    pub fn new(file: File, offset: u64, count: usize, dimension: usize, width: Width) -> Self {
        Self {
            file,
            offset,
            count,
            dimension,
            width,
            failure: OnceLock::new(),
        }
    }

    /// The first failure of any read so far.
    pub fn failure(&self) -> Option<&SpillError> {
        self.failure.get()
    }

    fn try_read(&self, row: usize, start: usize, out: &mut [f32]) -> Result<(), SpillError> {
        let width = self.width.bytes();
        let at = (row * self.dimension + start) as u64 * width as u64 + self.offset;
        let decode = |bytes: &[u8], out: &mut [f32]| match self.width {
            Width::F16 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = half_to_single(u16::from_le_bytes(*bytes));
                }
            }
            Width::F32 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        };
        read_values(&self.file, at, width, decode, out).map_err(|failed| failed.of(row, start))
    }
}

/// Why values could not be read: before it is known of which row they are.
pub(super) enum Failed {
    Io(io::Error),
    NonFinite(usize),
}

impl Failed {
    /// In values from `start` on of `row`.
    pub(super) fn of(self, row: usize, start: usize) -> SpillError {
        match self {
            Self::Io(source) => SpillError::Io { row, source },
            Self::NonFinite(column) => SpillError::NonFinite {
                row,
                column: start + column,
            },
        }
    }
}

/// Reads `out.len()` values of `width` bytes (1, 2 or 4) from byte `at` on, a page at a time. All of them are finite, or it fails.
pub(super) fn read_values(
    file: &File,
    at: u64,
    width: usize,
    decode: impl Fn(&[u8], &mut [f32]),
    out: &mut [f32],
) -> Result<(), Failed> {
    let mut buffer = [0_u8; PAGE];
    for (piece, out) in out.chunks_mut(PAGE / width).enumerate() {
        let bytes = &mut buffer[..out.len() * width];
        let read = file.read_exact_at(bytes, at + (piece * PAGE) as u64);
        read.map_err(Failed::Io)?;
        decode(bytes, out);
    }
    match out.iter().position(|value| !value.is_finite()) {
        Some(column) => Err(Failed::NonFinite(column)),
        None => Ok(()),
    }
}

impl Rows<f32> for FileRows {
    fn count(&self) -> usize {
        self.count
    }
    fn dimension(&self) -> usize {
        self.dimension
    }
    fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        if let Err(error) = self.try_read(row, start, out) {
            out.fill(0.0);
            // Only the first one is told.
            self.failure.get_or_init(|| error);
        }
    }
}

/// Half to single precision without a branch: the exponent is moved by a multiplication, which is right for subnormals too.
fn half_to_single(half: u16) -> f32 {
    let bits = u32::from(half);
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
    let infinite = (bits & 0x7c00 == 0x7c00).then_some(f32::INFINITY);
    f32::from_bits(infinite.unwrap_or(magnitude).to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn rows(bytes: &[u8], count: usize, dimension: usize, width: Width) -> FileRows {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        FileRows::new(file, 0, count, dimension, width)
    }

    #[test]
    fn halves_are_the_numbers_that_they_stand_for() {
        for (half, value) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65_504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x8001, -5.960_464_5e-8),
            (0x3555, 0.333_251_95),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(half_to_single(half).to_bits(), f32::to_bits(value), "{half:#x}");
        }
    }

    #[test]
    fn reads_any_piece_of_any_row() {
        let values: Vec<f32> = (0..2 * 3000_u16).map(|i| f32::from(i) - 7.5).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let rows = rows(&bytes, 2, 3000, Width::F32);
        let mut out = vec![0.0; 2_500];
        rows.read(1, 400, &mut out);
        assert_eq!(out, values[3_400..5_900]);
        assert!(rows.failure().is_none());
    }

    #[test]
    fn a_short_file_and_a_value_that_is_not_finite_are_kept_as_failures() {
        let short = rows(&[0; 10], 2, 4, Width::F16);
        short.read(1, 0, &mut [1.0; 4]);
        assert!(matches!(short.failure(), Some(SpillError::Io { row: 1, .. })));
        let odd = rows(&[0, 0, 0, 0x7c], 1, 2, Width::F16);
        odd.read(0, 0, &mut [1.0; 2]);
        assert!(matches!(
            odd.failure(),
            Some(SpillError::NonFinite { row: 0, column: 1 })
        ));
    }
}
