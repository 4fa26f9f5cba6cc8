//! What can be measured about the rows of a round: pure, in a fixed order, the same bits on any number of threads.
//!
//! Cost: one pass over all values for distance, cosine and layers, and inner products of all pairs. Those are taken on at most
//! 2²⁸ products: with more values, on evenly spaced chunks of them, which is enough to see noise that two rows share.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::robust::{PayloadRows, Rows as _};

/// Most products of pairs in one round; about a fifth of a second on one core.
const PAIR_PRODUCTS_MAX: usize = 1 << 28;
/// Most rows of which pairs are compared: beyond it the table of pairs would grow past 4 MiB.
pub const PAIR_ROWS_MAX: usize = 1_024;
/// Values of one step.
const CHUNK: usize = 4_096;
/// Layers that a record names.
const LAYERS_MAX: usize = 5;
/// Bins of the histogram of the noise test, between −4 and 4 standard deviations.
const NOISE_BINS: usize = 256;
/// Standard deviations that the histogram covers on each side.
const NOISE_SPAN: f64 = 4.0;

/// A named part of an update: a layer, a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its name.
    pub name: String,
    /// Where it lies in the flat vector.
    pub range: Range<usize>,
}

/// How far one part of a row lies from the combined values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerDeviation {
    /// Name of the layer or channel.
    pub layer: String,
    /// Euclidean distance in it.
    pub distance: f64,
    /// That distance over the median distance of all rows in it; 1 is ordinary.
    pub ratio: f64,
}

/// One row against the combined values.
#[derive(Debug, Clone, PartialEq)]
pub struct RowMeasure {
    /// Euclidean norm.
    pub norm: f64,
    /// Euclidean distance from the combined values.
    pub distance: f64,
    /// Cosine of the angle to them, −1 to 1; 0 when either is all zero.
    pub cosine: f64,
    /// The layers in which it deviates most from what is ordinary, worst first, at most five.
    pub layers: Vec<LayerDeviation>,
    /// Kolmogorov–Smirnov distance of the values from `N(0, s²)`, when asked for.
    pub noise_distance: Option<f64>,
}

/// Inner products of all pairs of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    rows: usize,
    /// Upper triangle, row after row.
    products: Vec<f64>,
    /// Number of values that took part.
    pub values: usize,
    /// Number of values of a row.
    pub of: usize,
}

impl Pairs {
    /// Inner product of two rows over the values that took part.
    pub fn product(&self, one: usize, other: usize) -> f64 {
        let (low, high) = (one.min(other), one.max(other));
        self.products[low * self.rows - low * (low + 1) / 2 + high]
    }

    /// Squared Euclidean distance over the values that took part, never below 0.
    pub fn distance_squared(&self, one: usize, other: usize) -> f64 {
        (self.product(one, one) + self.product(other, other) - 2.0 * self.product(one, other)).max(0.0)
    }

    /// Distance over all values, estimated when only some took part.
    pub fn distance(&self, one: usize, other: usize) -> f64 {
        (self.distance_squared(one, other) * self.of as f64 / self.values.max(1) as f64).sqrt()
    }
}

/// Measures every row against `combined` (`[d]`). `noise_std` is the standard deviation of the noise of each row, for the test of
/// its law; `None` leaves that out.
pub fn rows(
    rows: &PayloadRows,
    combined: &[f32],
    segments: &[Segment],
    noise_std: &[Option<f64>],
) -> Vec<RowMeasure> {
    rows_beside(rows, None, combined, segments, noise_std).0
}

/// As [`rows`], whose measures are the same bits, and the measures of rows of another kind `beside` them, without a test of their noise. What is ordinary in a layer
/// is what it is among `rows`; where there are none of those, among those beside them.
pub fn rows_beside(
    rows: &PayloadRows,
    beside: Option<&PayloadRows>,
    combined: &[f32],
    segments: &[Segment],
    noise_std: &[Option<f64>],
) -> (Vec<RowMeasure>, Vec<RowMeasure>) {
    let all = |rows: &PayloadRows, noise_std: &[Option<f64>]| -> Vec<RawMeasure> {
        (0..rows.count())
            .into_par_iter()
            .map(|row| {
                RawMeasure::of(
                    rows,
                    row,
                    combined,
                    segments,
                    noise_std.get(row).copied().flatten(),
                )
            })
            .collect()
    };
    let raw = all(rows, noise_std);
    let beside = beside.map_or_else(Vec::new, |rows| all(rows, &[]));
    let ordinary = if raw.is_empty() { &beside } else { &raw };
    let medians: Vec<f64> = (0..segments.len())
        .map(|segment| median(ordinary.iter().map(|row| row.segments[segment].sqrt()).collect()))
        .collect();
    let combined_norm = dot(combined, combined).sqrt();
    let finished = |raw: Vec<RawMeasure>| -> Vec<RowMeasure> {
        raw.into_iter()
            .map(|row| row.finish(combined_norm, segments, &medians))
            .collect()
    };
    (finished(raw), finished(beside))
}

/// Inner products of all pairs, over the values that `keep` lets through. `None` when there are more than [`PAIR_ROWS_MAX`] rows.
pub fn pairs(rows: &PayloadRows, keep: &(dyn Fn(usize) -> bool + Sync)) -> Option<Pairs> {
    let (n, d) = (rows.count(), rows.dimension());
    if n > PAIR_ROWS_MAX || d == 0 {
        return None;
    }
    let triangle = n * (n + 1) / 2;
    let chunks = d.div_ceil(CHUNK);
    let taken = (PAIR_PRODUCTS_MAX / (triangle.max(1) * CHUNK)).clamp(1, chunks);
    let parts: Vec<(Vec<f64>, usize)> = (0..taken)
        .into_par_iter()
        .map(|index| {
            let start = index * chunks / taken * CHUNK;
            chunk_products(rows, start, CHUNK.min(d - start), keep)
        })
        .collect();
    let (mut products, mut values) = (vec![0.0; triangle], 0);
    for (part, counted) in parts {
        values += counted;
        for (sum, product) in products.iter_mut().zip(part) {
            *sum += product;
        }
    }
    let of = (0..d).filter(|index| keep(*index)).count();
    Some(Pairs {
        rows: n,
        products,
        values,
        of,
    })
}

fn chunk_products(
    rows: &PayloadRows,
    start: usize,
    length: usize,
    keep: &(dyn Fn(usize) -> bool + Sync),
) -> (Vec<f64>, usize) {
    let n = rows.count();
    let mut tile = vec![0.0_f32; n * length];
    let kept = (start..start + length).filter(|index| keep(*index)).count();
    for (row, values) in tile.chunks_exact_mut(length).enumerate() {
        rows.read(row, start, values);
        if kept < length {
            for (offset, value) in values.iter_mut().enumerate() {
                if !keep(start + offset) {
                    *value = 0.0;
                }
            }
        }
    }
    let mut products = Vec::with_capacity(n * (n + 1) / 2);
    for one in 0..n {
        let left = &tile[one * length..(one + 1) * length];
        for other in one..n {
            products.push(dot(left, &tile[other * length..(other + 1) * length]));
        }
    }
    (products, kept)
}

#[derive(Debug)]
struct RawMeasure {
    norm_squared: f64,
    product: f64,
    distance_squared: f64,
    segments: Vec<f64>,
    noise_distance: Option<f64>,
}

impl RawMeasure {
    fn of(
        rows: &PayloadRows,
        row: usize,
        combined: &[f32],
        segments: &[Segment],
        noise_std: Option<f64>,
    ) -> Self {
        let mut raw = Self {
            norm_squared: 0.0,
            product: 0.0,
            distance_squared: 0.0,
            segments: vec![0.0; segments.len()],
            noise_distance: None,
        };
        let mut histogram = noise_std.map(Histogram::new);
        let mut values = vec![0.0_f32; CHUNK.min(combined.len())];
        for (index, combined) in combined.chunks(CHUNK).enumerate() {
            let (start, values) = (index * CHUNK, &mut values[..combined.len()]);
            rows.read(row, start, values);
            raw.norm_squared += dot(values, values);
            raw.product += dot(values, combined);
            for (sum, segment) in raw.segments.iter_mut().zip(segments) {
                let from = segment.range.start.max(start);
                let to = segment.range.end.min(start + values.len());
                if from < to {
                    *sum += distance_squared(
                        &values[from - start..to - start],
                        &combined[from - start..to - start],
                    );
                }
            }
            raw.distance_squared += distance_squared(values, combined);
            if let Some(histogram) = &mut histogram {
                histogram.add(values);
            }
        }
        raw.noise_distance = histogram.map(|histogram| histogram.distance());
        raw
    }

    fn finish(self, combined_norm: f64, segments: &[Segment], medians: &[f64]) -> RowMeasure {
        let norm = self.norm_squared.sqrt();
        let scale = norm * combined_norm;
        let mut layers: Vec<LayerDeviation> = segments
            .iter()
            .zip(self.segments.iter().zip(medians))
            .map(|(segment, (squared, median))| LayerDeviation {
                layer: segment.name.clone(),
                distance: squared.sqrt(),
                ratio: if *median > 0.0 {
                    squared.sqrt() / median
                } else {
                    1.0
                },
            })
            .collect();
        // Stable: equal ratios stay in the order of the layout.
        layers.sort_by(|one, other| other.ratio.total_cmp(&one.ratio));
        layers.truncate(LAYERS_MAX);
        RowMeasure {
            norm,
            distance: self.distance_squared.sqrt(),
            cosine: if scale > 0.0 { self.product / scale } else { 0.0 },
            layers,
            noise_distance: self.noise_distance,
        }
    }
}

/// Counts of standardised values, for the Kolmogorov–Smirnov distance at the edges of the bins: never above the exact one, so a test
/// with the exact one's limit refuses no more honest rows.
#[derive(Debug)]
struct Histogram {
    std: f64,
    counts: [u64; NOISE_BINS + 2],
    total: u64,
}

impl Histogram {
    fn new(std: f64) -> Self {
        Self {
            std,
            counts: [0; NOISE_BINS + 2],
            total: 0,
        }
    }

    fn add(&mut self, values: &[f32]) {
        let scale = NOISE_BINS as f64 / (2.0 * NOISE_SPAN * self.std);
        for &value in values {
            let place = f64::from(value) * scale + NOISE_BINS as f64 / 2.0;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and the number of bins"
            )]
            let bin = if place < 0.0 {
                0
            } else {
                (place.min(NOISE_BINS as f64) as usize) + 1
            };
            self.counts[bin] += 1;
        }
        self.total += values.len() as u64;
    }

    fn distance(&self) -> f64 {
        let (mut below, mut worst) = (0, 0.0_f64);
        for (edge, count) in self.counts[..=NOISE_BINS].iter().enumerate() {
            below += count;
            let at = edge as f64 * 2.0 * NOISE_SPAN / NOISE_BINS as f64 - NOISE_SPAN;
            let normal = 0.5 * libm::erfc(-at / std::f64::consts::SQRT_2);
            worst = worst.max((below as f64 / self.total.max(1) as f64 - normal).abs());
        }
        worst
    }
}

fn dot(one: &[f32], other: &[f32]) -> f64 {
    lanes(one, other, |a, b| f64::from(a) * f64::from(b))
}

fn distance_squared(one: &[f32], other: &[f32]) -> f64 {
    lanes(one, other, |a, b| (f64::from(a) - f64::from(b)).powi(2))
}

/// A sum in eight running sums that are joined in order: it vectorises, and the order is fixed.
fn lanes(one: &[f32], other: &[f32], term: impl Fn(f32, f32) -> f64) -> f64 {
    let mut sums = [0.0_f64; 8];
    let (ones, others) = (one.chunks_exact(8), other.chunks_exact(8));
    let tail: f64 = ones
        .remainder()
        .iter()
        .zip(others.remainder())
        .map(|(&a, &b)| term(a, b))
        .sum();
    for (a, b) in ones.zip(others) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += term(a, b);
        }
    }
    sums.iter().sum::<f64>() + tail
}

/// The middle value, for an even number the mean of both; 0 for none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => values[n / 2],
        _ => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use theriac_protocol::compress::encode_f32;
    use theriac_protocol::message::Encoding;

    use super::*;
    use crate::robust::Row;

    fn payloads(values: &[Vec<f32>]) -> PayloadRows {
        let rows = values.iter().map(|values| Row {
            encoding: Encoding::F32,
            payload: encode_f32(values).into(),
        });
        PayloadRows::new(rows.collect(), u32::try_from(values[0].len()).unwrap()).unwrap()
    }

    /// Numbers that repeat no sooner than after 2^64 steps (`SplitMix64`).
    fn noise(seed: u64, length: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        };
        let normal = |u: f64, v: f64| (-2.0 * u.max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        #[expect(clippy::cast_possible_truncation, reason = "a value of a test")]
        let values = (0..length).map(|_| normal(uniform(), uniform()) as f32).collect();
        values
    }

    #[test]
    fn measures_are_those_of_the_definition() {
        let values = vec![vec![3.0, 4.0, 0.0], vec![0.0, 0.0, 2.0], vec![-3.0, -4.0, 0.0]];
        let combined = [3.0, 4.0, 0.0];
        let parts = [("a", 0..2), ("b", 2..3)].map(|(name, range)| Segment {
            name: name.into(),
            range,
        });
        let measured = rows(&payloads(&values), &combined, &parts, &[None; 3]);
        let found: Vec<_> = measured
            .iter()
            .map(|row| (row.norm, row.distance, row.cosine))
            .collect();
        assert_eq!(
            found,
            [(5.0, 0.0, 1.0), (2.0, 29.0_f64.sqrt(), 0.0), (5.0, 10.0, -1.0)]
        );
        // Distances in `a` are 0, 5 and 10: the median is 5.
        assert_eq!(
            (measured[2].layers[0].layer.as_str(), measured[2].layers[0].ratio),
            ("a", 2.0)
        );
        let pairs = pairs(&payloads(&values), &|_| true).unwrap();
        assert_eq!((pairs.product(0, 2), pairs.product(2, 0)), (-25.0, -25.0));
        assert!((pairs.distance(0, 1) - 29.0_f64.sqrt()).abs() < 1e-12);
        let masked = super::pairs(&payloads(&values), &|index| index > 0).unwrap();
        assert_eq!((masked.product(0, 0), masked.values, masked.of), (16.0, 2, 2));
    }

    #[test]
    fn rows_beside_others_change_nothing_of_theirs_and_are_held_against_what_is_ordinary_there() {
        let values = vec![vec![3.0, 4.0, 0.0], vec![0.0, 0.0, 2.0], vec![-3.0, -4.0, 0.0]];
        let combined = [3.0, 4.0, 0.0];
        let parts = [("a", 0..2), ("b", 2..3)].map(|(name, range)| Segment {
            name: name.into(),
            range,
        });
        let own = payloads(&values);
        let carried = payloads(&[vec![3.0, 24.0, 0.0]]);
        let (measured, beside) = rows_beside(&own, Some(&carried), &combined, &parts, &[Some(1.0); 3]);
        assert_eq!(measured, rows(&own, &combined, &parts, &[Some(1.0); 3]));
        // The middle distance of the three in `a` is 5, that of the one beside them 20.
        let far = &beside[0];
        assert_eq!((far.distance, far.noise_distance), (20.0, None));
        assert_eq!((far.layers[0].layer.as_str(), far.layers[0].ratio), ("a", 4.0));
        let none = PayloadRows::new(Vec::<Row>::new(), 3).unwrap();
        let (_, alone) = rows_beside(&none, Some(&carried), &combined, &parts, &[]);
        let ratio = alone[0].layers[0].ratio;
        assert_eq!((alone.len(), ratio), (1, 1.0), "ordinary among themselves");
    }

    #[test]
    fn same_bits_on_any_number_of_threads() {
        let values: Vec<Vec<f32>> = (0..5).map(|seed| noise(seed, 3 * CHUNK + 17)).collect();
        let parts = vec![Segment {
            name: "all".into(),
            range: 0..3 * CHUNK + 17,
        }];
        let measure = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let all = payloads(&values);
                (
                    rows(&all, &values[0], &parts, &[Some(1.0); 5]),
                    pairs(&all, &|_| true),
                )
            })
        };
        assert_eq!(measure(1), measure(4));
    }

    #[test]
    fn noise_of_the_law_is_near_it_and_other_noise_is_not() {
        let length = 20_000;
        let lawful = noise(7, length);
        let halved: Vec<f32> = lawful.iter().map(|value| value / 2.0).collect();
        let measured = rows(
            &payloads(&[lawful, halved]),
            &vec![0.0; length],
            &[],
            &[Some(1.0); 2],
        );
        let distances: Vec<f64> = measured
            .iter()
            .filter_map(|measure| measure.noise_distance)
            .collect();
        // The 99.9 % point of Kolmogorov's law is 1.95/√n; halved noise is .16 away in theory.
        assert!(
            distances[0] < 1.95 / (length as f64).sqrt() && (0.15..0.18).contains(&distances[1]),
            "seed 7: {distances:?}"
        );
    }
}
