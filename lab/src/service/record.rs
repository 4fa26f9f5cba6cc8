//! Bytes of the state: log records and snapshots, each with its own checksums.
//!
//! A log record is `magic(4) length(4) sequence(8) body sum(8) header sum(4) body`, numbers little-endian, sums the first bytes of a
//! SHA-256. The header has a sum of its own, so that a flipped length is not taken for a record cut short. A body is
//! `key length(2) key value`.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// Longest key, in bytes.
pub(super) const KEY_BYTES_MAX: usize = 128;
/// Longest value, in bytes.
pub(super) const VALUE_BYTES_MAX: usize = 64 << 10;
const HEADER_BYTES: usize = 28;
const BODY_BYTES_MAX: usize = 2 + KEY_BYTES_MAX + VALUE_BYTES_MAX;
const MAGIC: [u8; 4] = *b"KVL1";
const SNAPSHOT_MAGIC: [u8; 4] = *b"KVS1";

/// Keys and values.
pub(super) type Table = BTreeMap<String, Vec<u8>>;

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) sequence: u64,
    pub(super) key: String,
    pub(super) value: Vec<u8>,
}

/// What stands at an offset of a log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A record, and the offset after it.
    Record(Record, usize),
    /// The end of the log.
    End,
    /// A record that was being written when the process or the host ended: it was never acknowledged.
    Torn,
    /// Something else.
    Corrupt(String),
}

impl Record {
    /// Appends the record's bytes. Key and value are within their limits.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        let body = body(&self.key, &self.value);
        let start = to.len();
        to.extend_from_slice(&MAGIC);
        to.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        to.extend_from_slice(&self.sequence.to_le_bytes());
        to.extend_from_slice(&sum::<8>(&body));
        let header = sum::<4>(&to[start..]);
        to.extend_from_slice(&header);
        to.extend_from_slice(&body);
    }

    /// Reads what stands at `offset`; `expected` is the sequence number that has to come.
    pub(super) fn decode(log: &[u8], offset: usize, expected: u64) -> Next {
        let rest = log.get(offset..).unwrap_or_default();
        if rest.is_empty() {
            return Next::End;
        }
        // A file may have grown before its bytes arrived: then zeros stand where a record was to be. A log of nothing
        // but zeros was never one.
        if offset > 0 && rest.iter().all(|byte| *byte == 0) {
            return Next::Torn;
        }
        let Some((header, after)) = rest.split_at_checked(HEADER_BYTES) else {
            return if begins_header(rest, expected) {
                Next::Torn
            } else {
                Next::Corrupt(format!(
                    "the {} bytes at byte {offset} do not begin record {expected}",
                    rest.len()
                ))
            };
        };
        if sum::<4>(&header[..24]) != header[24..] || header[..4] != MAGIC {
            return Next::Corrupt(format!(
                "the record's header at byte {offset} does not have its checksum"
            ));
        }
        let length = u32::from_le_bytes(array(&header[4..8])) as usize;
        let sequence = u64::from_le_bytes(array(&header[8..16]));
        if sequence != expected {
            return Next::Corrupt(format!(
                "at byte {offset} stands record {sequence}, expected {expected}"
            ));
        }
        if length > BODY_BYTES_MAX {
            return Next::Corrupt(format!(
                "record {sequence} is {length} bytes long, at most {BODY_BYTES_MAX} are possible"
            ));
        }
        let Some(body) = after.get(..length) else {
            return Next::Torn;
        };
        if sum::<8>(body) != header[16..24] {
            let last = after.len() == length;
            return if last && body.iter().all(|byte| *byte == 0) {
                Next::Torn
            } else {
                Next::Corrupt(format!(
                    "record {sequence} at byte {offset} does not have its checksum"
                ))
            };
        }
        match parse(body) {
            Some((key, value)) => Next::Record(
                Record {
                    sequence,
                    key: key.to_owned(),
                    value: value.to_vec(),
                },
                offset + HEADER_BYTES + length,
            ),
            None => Next::Corrupt(format!("record {sequence} holds no key and value")),
        }
    }
}

/// A snapshot of the table after record `sequence`: magic, sequence, count, bodies with their lengths, SHA-256 of all before it.
pub(super) fn encode_snapshot(sequence: u64, table: &Table) -> Vec<u8> {
    let mut bytes = SNAPSHOT_MAGIC.to_vec();
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&(table.len() as u64).to_le_bytes());
    for (key, value) in table {
        let body = body(key, value);
        bytes.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&body);
    }
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    bytes
}

/// Sequence and table of a snapshot, or what is wrong with it.
pub(super) fn decode_snapshot(bytes: &[u8]) -> Result<(u64, Table), String> {
    let wrong = |what: &str| format!("the snapshot {what}");
    let (bytes, digest) = bytes
        .len()
        .checked_sub(32)
        .and_then(|at| bytes.split_at_checked(at))
        .ok_or_else(|| wrong("is cut"))?;
    if Sha256::digest(bytes).as_slice() != digest {
        return Err(wrong("does not have its checksum"));
    }
    let rest = bytes
        .strip_prefix(&SNAPSHOT_MAGIC)
        .ok_or_else(|| wrong("is of another format"))?;
    let (numbers, mut rest) = rest.split_at_checked(16).ok_or_else(|| wrong("is cut"))?;
    let sequence = u64::from_le_bytes(array(&numbers[..8]));
    let count = u64::from_le_bytes(array(&numbers[8..]));
    let mut table = Table::new();
    while let Some((length, after)) = rest.split_at_checked(4) {
        let length = u32::from_le_bytes(array(length)) as usize;
        let (body, after) = after.split_at_checked(length).ok_or_else(|| wrong("is cut"))?;
        let (key, value) = parse(body).ok_or_else(|| wrong("holds something that is no key and value"))?;
        table.insert(key.to_owned(), value.to_vec());
        rest = after;
    }
    if table.len() as u64 != count || !rest.is_empty() {
        return Err(format!(
            "the snapshot holds {} keys, expected {count}",
            table.len()
        ));
    }
    Ok((sequence, table))
}

/// Whether fewer bytes than a header are the beginning of the one of record `sequence`, as far as it is known before its
/// body is.
fn begins_header(bytes: &[u8], sequence: u64) -> bool {
    let agrees = |from: usize, known: &[u8]| {
        let found = bytes.get(from..).unwrap_or_default();
        found.iter().zip(known).all(|(found, known)| found == known)
    };
    let length = bytes
        .get(4..8)
        .map_or(0, |bytes| u32::from_le_bytes(array(bytes)));
    agrees(0, &MAGIC) && length as usize <= BODY_BYTES_MAX && agrees(8, &sequence.to_le_bytes())
}

fn body(key: &str, value: &[u8]) -> Vec<u8> {
    let mut body = u16::try_from(key.len())
        .unwrap_or(u16::MAX)
        .to_le_bytes()
        .to_vec();
    body.extend_from_slice(key.as_bytes());
    body.extend_from_slice(value);
    body
}

fn parse(body: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = body.split_at_checked(2)?;
    let (key, value) = rest.split_at_checked(usize::from(u16::from_le_bytes(array(length))))?;
    Some((std::str::from_utf8(key).ok()?, value))
}

fn sum<const N: usize>(bytes: &[u8]) -> [u8; N] {
    array(&Sha256::digest(bytes)[..N])
}

/// The bytes as an array; zeros where there are too few, which the callers' splits rule out.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sequence: u64) -> Record {
        Record {
            sequence,
            key: format!("key-{sequence}"),
            value: vec![u8::try_from(sequence).unwrap(); 5],
        }
    }

    fn log(count: u64) -> Vec<u8> {
        let mut log = Vec::new();
        (1..=count).for_each(|sequence| record(sequence).encode(&mut log));
        log
    }

    fn read(log: &[u8]) -> (u64, Next) {
        let (mut offset, mut count) = (0, 0);
        loop {
            match Record::decode(log, offset, count + 1) {
                Next::Record(found, next) => {
                    count += 1;
                    assert_eq!(found, record(count));
                    offset = next;
                }
                end => return (count, end),
            }
        }
    }

    #[test]
    fn a_log_cut_anywhere_is_torn_and_loses_only_what_was_cut() {
        let log = log(3);
        let one = log.len() / 3;
        for at in 0..=log.len() {
            let (count, end) = read(&log[..at]);
            let expected = if at % one == 0 { Next::End } else { Next::Torn };
            assert_eq!(
                (usize::try_from(count).unwrap(), end),
                (at / one, expected),
                "cut at {at}"
            );
        }
    }

    #[test]
    fn a_bit_flipped_anywhere_in_a_log_is_corruption_and_never_a_torn_end() {
        let log = log(3);
        for at in 0..log.len() * 8 {
            let mut other = log.clone();
            other[at / 8] ^= 1 << (at % 8);
            let (_, end) = read(&other);
            assert!(matches!(end, Next::Corrupt(_)), "bit {at}: {end:?}");
        }
    }

    #[test]
    fn zeros_at_the_end_are_a_torn_write() {
        let mut zeros = log(2);
        zeros.extend_from_slice(&[0; 500]);
        assert_eq!(read(&zeros), (2, Next::Torn));
        let mut body = log(3);
        let end = body.len();
        body[end - 12..].fill(0);
        assert_eq!(read(&body), (2, Next::Torn));
    }

    #[test]
    fn what_does_not_begin_a_record_is_corruption_however_short_it_is() {
        for garbage in [
            b"garbage 15 byte".to_vec(),
            vec![0; 15],
            vec![0; 500],
            b"K".repeat(2),
            b"KVL1\xff\xff\xff\xff".to_vec(),
            [&log(1)[..8], &[9; 7]].concat(),
        ] {
            let (count, end) = read(&garbage);
            assert!(
                count == 0 && matches!(end, Next::Corrupt(_)),
                "{garbage:?}: {end:?}"
            );
        }
        let mut after = log(2);
        after.extend_from_slice(b"garbage");
        assert!(matches!(read(&after), (2, Next::Corrupt(_))));
    }

    #[test]
    fn records_out_of_order_are_corruption() {
        let mut skipped = log(1);
        record(3).encode(&mut skipped);
        assert!(matches!(read(&skipped), (1, Next::Corrupt(what)) if what.contains("expected 2")));
    }

    #[test]
    fn a_snapshot_survives_and_any_damage_to_it_is_found() {
        let table: Table = (1..4).map(|n| (record(n).key, record(n).value)).collect();
        let bytes = encode_snapshot(7, &table);
        assert_eq!(decode_snapshot(&bytes), Ok((7, table)));
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert!(
                decode_snapshot(&other).is_err() && decode_snapshot(&bytes[..at]).is_err(),
                "byte {at}"
            );
        }
    }
}
