//! Flat `f32` values to payload bytes and back. Both encodings have a size fixed by the header, so nothing is
//! ever unpacked beyond what was announced.
//!
//! [`Encoding::F32`] is exact. [`Encoding::Int8`] writes one signed byte a value on a grid of 255 points with
//! stochastic rounding: unbiased, each value off by at most one step. It is applied after clipping and noise, as
//! post-processing that costs no privacy.

use crate::message::Encoding;

/// Largest magnitude of a grid point that [`encode_int8`] writes.
const GRID_MAX: f32 = 127.0;

/// The values as little-endian IEEE 754 bytes, exactly.
pub fn encode_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The values on an int8 grid whose step is the largest magnitude over 127. `uniform` draws from [0, 1), once for
/// each value: a value between two grid points goes to either with the probability that keeps its mean.
///
/// A value that is not finite makes the step NaN, which the codec refuses to send: such an update fails closed.
pub fn encode_int8(values: &[f32], mut uniform: impl FnMut() -> f32) -> (Encoding, Vec<u8>) {
    let finite = values.iter().all(|value| value.is_finite());
    let magnitude = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let scale = match (finite, magnitude > 0.0) {
        (false, _) => f32::NAN,
        (true, false) => 0.0,
        // The smallest normal number keeps the step above zero where the magnitude is subnormal.
        (true, true) => (magnitude / GRID_MAX).max(f32::MIN_POSITIVE),
    };
    let step = |value: &f32| {
        if scale > 0.0 {
            (value / scale + uniform()).floor().clamp(-GRID_MAX, GRID_MAX)
        } else {
            0.0
        }
    };
    let payload = values.iter().map(step).map(grid_byte).collect();
    (Encoding::Int8 { scale }, payload)
}

/// A grid point in -127..=127 as its byte.
fn grid_byte(point: f32) -> u8 {
    #[expect(clippy::cast_possible_truncation, reason = "a whole number within -127..=127")]
    let point = point as i8;
    point.to_le_bytes()[0]
}

/// Bytes that `values` values take; `None` when this machine cannot count that far.
pub fn payload_len(encoding: Encoding, values: u32) -> Option<usize> {
    usize::try_from(values).ok()?.checked_mul(width(encoding))
}

/// Decodes values `start..start + out.len()`, so that a reader can work through a payload tile by tile without
/// holding it as `f32`. Results are finite for every payload that [`scan`] has passed.
///
/// # Panics
/// When the payload ends before the range does: its length is compared with [`payload_len`] first.
pub fn decode_range(encoding: Encoding, payload: &[u8], start: usize, out: &mut [f32]) {
    let width = width(encoding);
    let bytes = &payload[start * width..(start + out.len()) * width];
    match encoding {
        Encoding::F32 => {
            for (value, &bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        Encoding::Int8 { scale } => {
            for (value, &byte) in out.iter_mut().zip(bytes) {
                *value = grid_value(byte, scale);
            }
        }
    }
}

/// What [`scan`] learns about a payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scan {
    /// Euclidean norm of the decoded values, summed in `f64`.
    pub norm: f64,
}

/// A payload holds a value that is NaN or infinite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("value {index} is not finite")]
pub struct NonFinite {
    /// Which value, from 0; 0 as well where the encoding's scale itself is at fault.
    pub index: usize,
}

/// Reads a payload once: every value finite, and the norm. Bytes after the last whole value are not looked at: the
/// length is compared with [`payload_len`] first.
///
/// # Errors
/// [`NonFinite`] at the first value that is NaN or infinite, and for a scale that is not finite.
pub fn scan(encoding: Encoding, payload: &[u8]) -> Result<Scan, NonFinite> {
    let mut sum = 0.0_f64;
    match encoding {
        Encoding::F32 => {
            for (index, &bytes) in payload.as_chunks::<4>().0.iter().enumerate() {
                let value = f32::from_le_bytes(bytes);
                if !value.is_finite() {
                    return Err(NonFinite { index });
                }
                sum += f64::from(value) * f64::from(value);
            }
        }
        Encoding::Int8 { scale } if scale.is_finite() => {
            for &byte in payload {
                let value = f64::from(grid_value(byte, scale));
                sum += value * value;
            }
        }
        Encoding::Int8 { .. } => return Err(NonFinite { index: 0 }),
    }
    Ok(Scan { norm: sum.sqrt() })
}

/// Bytes a value.
const fn width(encoding: Encoding) -> usize {
    match encoding {
        Encoding::F32 => 4,
        Encoding::Int8 { .. } => 1,
    }
}

/// One grid point, kept finite where the scale is near the largest number.
fn grid_value(byte: u8, scale: f32) -> f32 {
    (f32::from(i8::from_le_bytes([byte])) * scale).clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn decode(encoding: Encoding, payload: &[u8]) -> Vec<f32> {
        let count = payload.len() / width(encoding);
        let mut values = vec![0.0; count];
        decode_range(encoding, payload, 0, &mut values);
        values
    }

    proptest! {
        #[test]
        fn f32_is_exact(bits in prop::collection::vec(any::<u32>(), 0..100)) {
            let values: Vec<f32> = bits.iter().copied().map(f32::from_bits).collect();
            let back = decode(Encoding::F32, &encode_f32(&values));
            prop_assert_eq!(back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), bits);
        }

        #[test]
        fn int8_is_off_by_at_most_one_step(
            values in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO, 0..100),
            seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (encoding, payload) = encode_int8(&values, || rng.random());
            let Encoding::Int8 { scale } = encoding else { panic!("another encoding") };
            prop_assert_eq!(payload_len(encoding, u32::try_from(values.len()).unwrap()), Some(payload.len()));
            for (value, back) in values.iter().zip(decode(encoding, &payload)) {
                prop_assert!(back.is_finite());
                // The last term is the rounding of the division and the product themselves.
                let error = (f64::from(*value) - f64::from(back)).abs();
                let allowed = f64::from(scale) * (1.0 + 1e-4);
                prop_assert!(error <= allowed, "{} became {} with step {}", value, back, scale);
            }
            prop_assert!(scan(encoding, &payload).is_ok());
        }

        #[test]
        fn a_range_equals_that_part_of_the_whole(values in prop::collection::vec(-9.0_f32..9.0, 1..60), cut in 0.0_f64..1.0) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below the length")]
            let start = (cut * values.len() as f64) as usize;
            for (encoding, payload) in [(Encoding::F32, encode_f32(&values)), encode_int8(&values, || 0.5)] {
                let mut part = vec![0.0; values.len() - start];
                decode_range(encoding, &payload, start, &mut part);
                prop_assert_eq!(&part[..], &decode(encoding, &payload)[start..]);
            }
        }
    }

    #[test]
    fn int8_rounding_keeps_the_mean() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        // 0.3 of a step above grid point 12; the last value sets the step to 1.
        let mut values = vec![12.3_f32; 20_000];
        values.push(127.0);
        let (encoding, payload) = encode_int8(&values, || rng.random());
        let back = decode(encoding, &payload);
        let mean = back[..20_000].iter().map(|v| f64::from(*v)).sum::<f64>() / 20_000.0;
        // Standard error sqrt(.21 / 20000) = .0032; the bound is five of them.
        assert!((mean - 12.3).abs() < 0.017, "mean {mean}");
    }

    #[test]
    fn scan_gives_the_norm_and_finds_the_first_bad_value() {
        assert_eq!(
            scan(Encoding::F32, &encode_f32(&[3.0, -4.0])),
            Ok(Scan { norm: 5.0 })
        );
        assert_eq!(
            scan(Encoding::Int8 { scale: 0.5 }, &[6, 8_u8.wrapping_neg()]),
            Ok(Scan { norm: 5.0 })
        );
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(
                scan(Encoding::F32, &encode_f32(&[1.0, bad, bad])),
                Err(NonFinite { index: 1 })
            );
            assert_eq!(
                scan(Encoding::Int8 { scale: bad }, &[1]),
                Err(NonFinite { index: 0 })
            );
        }
        let huge = scan(Encoding::F32, &encode_f32(&[f32::MAX; 4])).unwrap();
        assert!(huge.norm.is_finite(), "the sum of squares must not overflow");
    }

    #[test]
    fn int8_fails_closed_on_values_that_are_not_finite() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (encoding, payload) = encode_int8(&[1.0, bad], || 0.0);
            assert!(scan(encoding, &payload).is_err());
        }
        assert_eq!(
            encode_int8(&[0.0, -0.0], || 0.9),
            (Encoding::Int8 { scale: 0.0 }, vec![0, 0])
        );
    }
}
