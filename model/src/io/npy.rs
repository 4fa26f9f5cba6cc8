//! NumPy arrays, format 1.0 to 3.0: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use super::{ReadError, open};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// A header of a plain array has about a hundred bytes.
const HEADER_BYTES_MAX: usize = 1 << 16;
/// Bytes taken at once, so that a header that promises too much costs nothing.
const CHUNK_BYTES: usize = 1 << 16;

/// An array as it lies in a file, C order, its values as `f32` or `f64` (what does not fit is rounded to it).
#[derive(Clone, PartialEq)]
pub struct NpyArray<T = f32> {
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Values, the last dimension fastest.
    pub values: Vec<T>,
}

impl<T> std::fmt::Debug for NpyArray<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NpyArray")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// Reads a `.npy` or `.npy.gz` array of any shape with values `<f4`, `<f8`, `<i4`, `<i8` or `|u1` in C order.
///
/// # Errors
/// [`ReadError::Io`]; [`ReadError::NotNpy`] for other value types, byte orders or Fortran order;
/// [`ReadError::Length`] when the values are cut short or something follows them.
pub fn read_npy(path: &Path) -> Result<NpyArray, ReadError> {
    read(path, open(path)?)
}

/// As [`read_npy`], its values as `f64`: for what is ranked, where rounding would make ties.
///
/// # Errors
/// As [`read_npy`].
pub fn read_npy_f64(path: &Path) -> Result<NpyArray<f64>, ReadError> {
    read(path, open(path)?)
}

pub(super) fn read<T: Value>(path: &Path, mut file: impl Read) -> Result<NpyArray<T>, ReadError> {
    let io = |source| ReadError::Io {
        path: path.to_owned(),
        source,
    };
    let not_npy = |reason: String| ReadError::NotNpy {
        path: path.to_owned(),
        reason,
    };
    let header = read_header(&mut file).map_err(|e| match e {
        HeaderError::Io(source) if source.kind() != io::ErrorKind::UnexpectedEof => io(source),
        HeaderError::Io(_) => not_npy("the file ends within its header".to_owned()),
        HeaderError::Wrong(reason) => not_npy(reason),
    })?;
    let count = header
        .shape
        .iter()
        .try_fold(1_usize, |product, n| product.checked_mul(*n));
    let expected = count.and_then(|count| count.checked_mul(header.kind.bytes()));
    let (Some(count), Some(expected)) = (count, expected) else {
        return Err(not_npy(format!(
            "its shape {:?} is larger than any memory",
            header.shape
        )));
    };
    let mut values = Vec::with_capacity(count.min(CHUNK_BYTES));
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = expected;
    while left > 0 {
        let take = left.min(CHUNK_BYTES);
        let found = fill(&mut file, &mut chunk[..take]).map_err(io)?;
        if found < take {
            let found = (expected - left + found) as u64;
            return Err(ReadError::Length {
                path: path.to_owned(),
                expected: expected as u64,
                found,
            });
        }
        header.kind.append(&chunk[..take], &mut values);
        left -= take;
    }
    if fill(&mut file, &mut chunk[..1]).map_err(io)? > 0 {
        let expected = expected as u64;
        return Err(ReadError::Length {
            path: path.to_owned(),
            expected,
            found: expected + 1,
        });
    }
    Ok(NpyArray {
        shape: header.shape,
        values,
    })
}

/// Writes an array of `f32`.
///
/// # Errors
/// What the system says; `InvalidInput` when the shape does not hold the values.
pub fn write_npy_f32(path: &Path, shape: &[usize], values: &[f32]) -> io::Result<()> {
    write(path, "<f4", shape, values.len(), |file| {
        values
            .iter()
            .try_for_each(|value| file.write_all(&value.to_le_bytes()))
    })
}

/// Writes an array of bytes.
///
/// # Errors
/// What the system says; `InvalidInput` when the shape does not hold the values.
pub fn write_npy_u8(path: &Path, shape: &[usize], values: &[u8]) -> io::Result<()> {
    write(path, "|u1", shape, values.len(), |file| file.write_all(values))
}

fn write(
    path: &Path,
    kind: &str,
    shape: &[usize],
    count: usize,
    values: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    if shape.iter().product::<usize>() != count {
        let problem = format!("shape {shape:?} does not hold {count} values");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
    // The trailing comma makes one length a tuple too.
    let mut header = format!(
        "{{'descr': '{kind}', 'fortran_order': False, 'shape': ({},), }}",
        shape.join(",")
    );
    // Magic, version and length take 10 bytes; the values begin at a multiple of 64.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(io::Error::other)?;
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(MAGIC)?;
    file.write_all(&[1, 0])?;
    file.write_all(&length.to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    values(&mut file)?;
    file.flush()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    F4,
    F8,
    I4,
    I8,
    U1,
}

impl Kind {
    fn of(descr: &str) -> Option<Self> {
        Some(match descr {
            "<f4" => Self::F4,
            "<f8" => Self::F8,
            "<i4" => Self::I4,
            "<i8" => Self::I8,
            "|u1" => Self::U1,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::F4 | Self::I4 => 4,
            Self::F8 | Self::I8 => 8,
            Self::U1 => 1,
        }
    }

    /// Appends whole values; `CHUNK_BYTES` is a multiple of every size.
    fn append<T: Value>(self, bytes: &[u8], values: &mut Vec<T>) {
        let four = || bytes.as_chunks::<4>().0.iter().copied();
        let eight = || bytes.as_chunks::<8>().0.iter().copied();
        match self {
            Self::F4 => values.extend(four().map(|b| T::of_f32(f32::from_le_bytes(b)))),
            Self::I4 => values.extend(four().map(|b| T::of_i64(i32::from_le_bytes(b).into()))),
            Self::F8 => values.extend(eight().map(|b| T::of_f64(f64::from_le_bytes(b)))),
            Self::I8 => values.extend(eight().map(|b| T::of_i64(i64::from_le_bytes(b)))),
            Self::U1 => values.extend(bytes.iter().map(|b| T::of_f32(f32::from(*b)))),
        }
    }
}

/// What values are read as.
pub(super) trait Value {
    fn of_f32(value: f32) -> Self;
    fn of_f64(value: f64) -> Self;
    fn of_i64(value: i64) -> Self;
}

impl Value for f32 {
    fn of_f32(value: f32) -> Self {
        value
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding to f32 is what the reader promises"
    )]
    fn of_f64(value: f64) -> Self {
        value as Self
    }

    fn of_i64(value: i64) -> Self {
        value as Self
    }
}

impl Value for f64 {
    fn of_f32(value: f32) -> Self {
        value.into()
    }

    fn of_f64(value: f64) -> Self {
        value
    }

    fn of_i64(value: i64) -> Self {
        value as Self
    }
}

struct Header {
    kind: Kind,
    shape: Vec<usize>,
}

enum HeaderError {
    Io(io::Error),
    Wrong(String),
}

impl From<io::Error> for HeaderError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn read_header(file: &mut impl Read) -> Result<Header, HeaderError> {
    let mut start = [0; 8];
    file.read_exact(&mut start)?;
    if start[..6] != *MAGIC {
        return Err(HeaderError::Wrong("it does not begin with \\x93NUMPY".to_owned()));
    }
    let length = match start[6] {
        1 => {
            let mut length = [0; 2];
            file.read_exact(&mut length)?;
            usize::from(u16::from_le_bytes(length))
        }
        2 | 3 => {
            let mut length = [0; 4];
            file.read_exact(&mut length)?;
            u32::from_le_bytes(length) as usize
        }
        other => {
            return Err(HeaderError::Wrong(format!(
                "format version {other} is none of 1, 2, 3"
            )));
        }
    };
    if length > HEADER_BYTES_MAX {
        return Err(HeaderError::Wrong(format!(
            "a header of {length} bytes, at most {HEADER_BYTES_MAX} are read"
        )));
    }
    let mut header = vec![0; length];
    file.read_exact(&mut header)?;
    let header = String::from_utf8_lossy(&header);
    parse_header(&header).map_err(HeaderError::Wrong)
}

/// Parses the Python dictionary of a header.
fn parse_header(header: &str) -> Result<Header, String> {
    let field = |name: &str| {
        let (_, rest) = header
            .split_once(&format!("'{name}':"))
            .ok_or_else(|| format!("its header has no '{name}'"))?;
        Ok::<_, String>(rest.trim_start())
    };
    let descr = field("descr")?;
    let descr = descr
        .strip_prefix('\'')
        .and_then(|rest| rest.split_once('\''))
        .map(|(descr, _)| descr);
    let kind = descr.and_then(Kind::of).ok_or_else(|| {
        let found = descr.unwrap_or("a structure");
        format!("values of type {found}; <f4, <f8, <i4, <i8 and |u1 are read: convert it with .astype('<f4')")
    })?;
    if !field("fortran_order")?.starts_with("False") {
        return Err("Fortran order; convert it with numpy.ascontiguousarray".to_owned());
    }
    let shape = field("shape")?
        .strip_prefix('(')
        .and_then(|rest| rest.split_once(')'));
    let (shape, _) = shape.ok_or("its header's shape is no tuple")?;
    let shape = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
    let shape: Result<Vec<usize>, _> = shape.map(str::parse).collect();
    Ok(Header {
        kind,
        shape: shape.map_err(|e| format!("its header's shape is no list of lengths: {e}"))?,
    })
}

/// Reads until `buffer` is full or the file ends; returns the bytes read.
fn fill(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(descr: &str, fortran: &str, shape: &str, values: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let mut file = MAGIC.to_vec();
        file.extend([1, 0]);
        file.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(values);
        file
    }

    fn parse(file: &[u8]) -> Result<NpyArray, ReadError> {
        read(Path::new("x.npy"), file)
    }

    #[test]
    fn reads_every_listed_type() {
        let cases: [(&str, Vec<u8>); 5] = [
            ("<f4", 2.0_f32.to_le_bytes().to_vec()),
            ("<f8", 2.0_f64.to_le_bytes().to_vec()),
            ("<i4", 2_i32.to_le_bytes().to_vec()),
            ("<i8", 2_i64.to_le_bytes().to_vec()),
            ("|u1", vec![2]),
        ];
        for (descr, value) in cases {
            let array = parse(&bytes(descr, "False", "(1,)", &value)).unwrap();
            assert_eq!((array.shape, array.values), (vec![1], vec![2.0]), "{descr}");
        }
        assert_eq!(
            parse(&bytes("|u1", "False", "()", &[7])).unwrap().shape,
            Vec::<usize>::new()
        );
        assert_eq!(
            parse(&bytes("|u1", "False", "(0, 38)", &[])).unwrap().shape,
            [0, 38]
        );
    }

    #[test]
    fn doubles_keep_what_single_precision_would_round_away() {
        let close = [1.0_f64, 1.0 + 1e-12];
        let values: Vec<u8> = close.iter().flat_map(|value| value.to_le_bytes()).collect();
        let file = bytes("<f8", "False", "(2,)", &values);
        let array: NpyArray<f64> = read(Path::new("x.npy"), &file[..]).unwrap();
        assert!(array.values[0] < array.values[1]);
        let rounded: NpyArray = read(Path::new("x.npy"), &file[..]).unwrap();
        assert_eq!(rounded.values[0].to_bits(), rounded.values[1].to_bits());
    }

    #[test]
    fn refuses_other_types_orders_and_damage_with_what_to_do() {
        let good = bytes("<f4", "False", "(2,)", &[0; 8]);
        let huge = "(4611686018427387904, 9)";
        for (file, wanted) in [
            (bytes(">f4", "False", "(1,)", &[0; 4]), "astype"),
            (bytes("<f2", "False", "(1,)", &[0; 2]), "<f2"),
            (bytes("<f4", "True", "(1,)", &[0; 4]), "ascontiguousarray"),
            (bytes("<f4", "False", huge, &[]), "larger than any memory"),
            (
                bytes("<f4", "False", "(1099511627776,)", &[0; 4]),
                "4398046511104 bytes of values, found 4",
            ),
            (bytes("<f4", "False", "(x,)", &[]), "no list of lengths"),
            (good[..good.len() - 3].to_vec(), "8 bytes of values, found 5"),
            ([&good[..], &[0]].concat(), "found 9"),
            (good[..20].to_vec(), "ends within its header"),
            (b"PK\x03\x04 an archive".to_vec(), "does not begin with"),
            (b"\x93NUMPY\x09\x00".to_vec(), "format version 9"),
            (
                b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(),
                "header of 4294967295 bytes",
            ),
        ] {
            let error = parse(&file).unwrap_err().to_string();
            assert!(error.contains(wanted), "expected {wanted}, got: {error}");
        }
    }

    #[test]
    fn written_header_is_what_numpy_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        write_npy_u8(&path, &[2, 1], &[1, 0]).unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len(), 128 + 2);
        assert_eq!(&file[..10], b"\x93NUMPY\x01\x00v\x00");
        assert!(file[10..].starts_with(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2,1,), }"));
        assert_eq!(read_npy(&path).unwrap().values, [1.0, 0.0]);
        assert!(write_npy_u8(&path, &[3], &[1, 0]).is_err());
    }

    #[test]
    fn damaged_compression_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy.gz");
        std::fs::write(&path, b"\x1f\x8b\x08\x00not a gzip stream").unwrap();
        assert!(read_npy(&path).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(values in prop::collection::vec(any::<f32>(), 0..300)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.npy");
            write_npy_f32(&path, &[values.len(), 1], &values).unwrap();
            let array = read_npy(&path).unwrap();
            prop_assert_eq!(array.shape, vec![values.len(), 1]);
            prop_assert!(array.values.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
            let file: Vec<u8> = MAGIC.iter().copied().chain([1, 0]).chain(tail).collect();
            _ = parse(&file);
        }
    }
}
