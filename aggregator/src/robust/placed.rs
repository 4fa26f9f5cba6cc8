//! A stored update wherever it lies: in memory, or in a file with those of others for rounds that do not fit.
//!
//! The payload's bytes are the same in both, as they came, so what a rule reads has the same bits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use theriac_protocol::compress::{decode_range, payload_len};
use theriac_protocol::message::Encoding;

use super::rows::Row;
use super::spill::{SpillError, read_values};

/// Payloads one after another in a file. It is read with positioned reads.
///
/// As with [`FileRows`](super::FileRows) a read that fails gives zeros, and the failure is kept: ask [`RowFile::failure`] after all passes, and throw
/// away what came of them.
#[derive(Debug)]
pub struct RowFile {
    file: File,
    /// Rows and bytes that are written.
    written: Mutex<(usize, u64)>,
    failure: OnceLock<Arc<SpillError>>,
}

impl RowFile {
    /// Over an empty file that is open for reading and writing.
    pub fn new(file: File) -> Self {
        Self {
            file,
            written: Mutex::default(),
            failure: OnceLock::new(),
        }
    }

    /// Writes a row behind those that are there.
    ///
    /// # Errors
    /// What the file system says; the row is not there then.
    pub fn push(self: &Arc<Self>, row: &Row) -> io::Result<FileRow> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let (place, offset) = *written;
        self.file.write_all_at(&row.payload, offset)?;
        *written = (place + 1, offset + row.payload.len() as u64);
        Ok(FileRow {
            file: Arc::clone(self),
            encoding: row.encoding,
            place,
            offset,
            bytes: row.payload.len(),
        })
    }

    /// Waits until the disk has all that was written. What could not be written later on would else read back as zeros, without an error: the system forgets such
    /// pages.
    ///
    /// # Errors
    /// What the file system says of any write so far.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// The first failure of any read so far. Rows are counted in the order in which they were written.
    pub fn failure(&self) -> Option<Arc<SpillError>> {
        self.failure.get().cloned()
    }
}

/// A row in a [`RowFile`].
#[derive(Debug, Clone)]
pub struct FileRow {
    file: Arc<RowFile>,
    encoding: Encoding,
    place: usize,
    offset: u64,
    bytes: usize,
}

impl FileRow {
    fn read(&self, start: usize, out: &mut [f32]) {
        let width = payload_len(self.encoding, 1).unwrap_or(1).max(1);
        let decode = |bytes: &[u8], out: &mut [f32]| decode_range(self.encoding, bytes, 0, out);
        let at = self.offset + (start * width) as u64;
        let read = read_values(&self.file.file, at, width, decode, out);
        if let Err(failed) = read {
            out.fill(0.0);
            self.fails(failed.of(self.place, start));
        }
    }

    fn payload(&self) -> Bytes {
        let mut bytes = vec![0; self.bytes];
        if let Err(source) = self.file.file.read_exact_at(&mut bytes, self.offset) {
            bytes.fill(0);
            self.fails(SpillError::Io {
                row: self.place,
                source,
            });
        }
        bytes.into()
    }

    /// Only the first one is told.
    fn fails(&self, error: SpillError) {
        self.file.failure.get_or_init(|| Arc::new(error));
    }
}

/// A row in memory or in a file.
#[derive(Debug, Clone)]
pub enum PlacedRow {
    /// Its payload is at hand.
    Memory(Row),
    /// Its payload is read piece by piece.
    File(FileRow),
}

impl PlacedRow {
    /// How the payload is written.
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Memory(row) => row.encoding,
            Self::File(row) => row.encoding,
        }
    }

    /// Length of the payload.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Memory(row) => row.payload.len(),
            Self::File(row) => row.bytes,
        }
    }

    /// The whole row in memory, for as long as it is held; zeros where the file cannot be read, see [`RowFile`].
    pub fn row(&self) -> Row {
        Row {
            encoding: self.encoding(),
            payload: match self {
                Self::Memory(row) => row.payload.clone(),
                Self::File(row) => row.payload(),
            },
        }
    }

    /// Copies values `start..start + out.len()`, which the payload must hold.
    pub(super) fn read(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::Memory(row) => decode_range(row.encoding, &row.payload, start, out),
            Self::File(row) => row.read(start, out),
        }
    }
}

impl From<Row> for PlacedRow {
    fn from(row: Row) -> Self {
        Self::Memory(row)
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::compress::{encode_f32, encode_int8};

    use super::super::{PayloadRows, Rows as _};
    use super::*;

    fn rows() -> [Row; 2] {
        let values: Vec<f32> = (0..6_000_u16).map(|i| f32::from(i) * 0.37 - 900.0).collect();
        let (encoding, grid) = encode_int8(&values, || 0.5);
        [
            Row {
                encoding: Encoding::F32,
                payload: encode_f32(&values).into(),
            },
            Row {
                encoding,
                payload: grid.into(),
            },
        ]
    }

    #[test]
    fn rows_of_both_encodings_have_the_same_bits_in_a_file() {
        let file = Arc::new(RowFile::new(tempfile::tempfile().unwrap()));
        let placed: Vec<FileRow> = rows().iter().map(|row| file.push(row).unwrap()).collect();
        assert_eq!(file.bytes(), 6_000 * 5);
        let placed: Vec<PlacedRow> = placed.into_iter().map(PlacedRow::File).collect();
        for (placed, row) in placed.iter().zip(rows()) {
            assert_eq!(placed.row().payload, row.payload);
        }
        let (there, here) = (
            PayloadRows::new(placed, 6_000).unwrap(),
            PayloadRows::new(rows().to_vec(), 6_000).unwrap(),
        );
        for (row, start, length) in [(0, 0, 6_000), (1, 0, 6_000), (0, 1_023, 2_500), (1, 5_999, 1)] {
            let (mut a, mut b) = (vec![7.0_f32; length], vec![8.0_f32; length]);
            there.read(row, start, &mut a);
            here.read(row, start, &mut b);
            assert!(
                a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{row} {start}"
            );
        }
        assert!(file.failure().is_none());
    }

    #[test]
    fn a_file_that_is_cut_short_gives_zeros_and_says_so() {
        let file = Arc::new(RowFile::new(tempfile::tempfile().unwrap()));
        let placed: Vec<FileRow> = rows().iter().map(|row| file.push(row).unwrap()).collect();
        file.file.set_len(24_100).unwrap();
        let mut out = [1.0; 200];
        placed[1].read(0, &mut out);
        assert!(out.iter().all(|value| value.to_bits() == 0));
        assert!(matches!(&*file.failure().unwrap(), SpillError::Io { row: 1, .. }));
        let ragged = PayloadRows::new(vec![PlacedRow::File(placed[0].clone())], 5_000);
        assert!(ragged.is_err());
    }

    #[test]
    fn a_full_disk_is_an_error_of_the_write() {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let error = Arc::new(RowFile::new(full)).push(&rows()[0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
