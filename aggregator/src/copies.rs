//! The screen for copies under noise: between validation and the rule, an exact one, which no honest edge fails.

use rayon::prelude::*;

use crate::robust::{Combined, Options, RowEvidence, Rows, Rule, RuleError, RuleName, rule};

/// Coordinates read at once.
const CHUNK: usize = 4_096;

/// Most rows that are compared with one another; beyond, nothing is screened.
pub const ROWS_MAX: usize = 1_024;

/// Rows that share the noise of a row before them, ascending, each the later of such a pair.
///
/// Two honest updates of `d` values carry independent Gaussian noise of standard deviation `noise` a value, so whatever their
/// signals their distance is stochastically at least that of the noise alone and lies below `√2·noise·(√d − 5)` with probability
/// below e^(−12.5) (the argument of [`norm_bound`](crate::validate::norm_bound), turned round). A nearer pair has at least one
/// that was made of the other or with it: copies, mimics, one site with many names. The first by node stays, so a group has the
/// weight of one site; which of them was copied cannot be told. Nothing is screened without noise, with 25 values or fewer, or
/// above [`ROWS_MAX`] rows. O(n²·d) time, 16 kB a row and n² numbers of memory.
pub fn copies(rows: &dyn Rows<f32>, noise: f64) -> Vec<usize> {
    let (count, dimension) = (rows.count(), rows.dimension());
    let near = std::f64::consts::SQRT_2 * noise * ((dimension as f64).sqrt() - 5.0);
    if near <= 0.0 || !(2..=ROWS_MAX).contains(&count) {
        return Vec::new();
    }
    let limit = near * near;
    let mut squares = vec![0.0_f64; count * count];
    let mut chunk = vec![vec![0.0_f32; CHUNK.min(dimension)]; count];
    for start in (0..dimension).step_by(CHUNK) {
        let length = CHUNK.min(dimension - start);
        for (row, values) in chunk.iter_mut().enumerate() {
            values.truncate(length);
            rows.read(row, start, values);
        }
        squares
            .par_chunks_mut(count)
            .enumerate()
            .for_each(|(one, squares)| {
                for (square, other) in squares[..one].iter_mut().zip(&chunk) {
                    // What is far enough stays so.
                    if *square < limit {
                        let pair = chunk[one].iter().zip(other);
                        *square += pair
                            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                            .sum::<f64>();
                    }
                }
            });
    }
    let mut kept: Vec<usize> = Vec::new();
    let mut copied = Vec::new();
    for row in 0..count {
        if kept.iter().any(|other| squares[row * count + other] < limit) {
            copied.push(row);
        } else {
            kept.push(row);
        }
    }
    copied
}

/// A rule behind the screen for copies.
#[derive(Debug)]
pub struct Screened {
    name: RuleName,
    byzantine: usize,
    options: Options,
    noise: f64,
    rule: Box<dyn Rule>,
}

impl Screened {
    /// The rule called `name` that assumes `byzantine` hostile rows, behind the screen. Rows that are screened no longer count as hostile, and never
    /// as many are assumed as are no minority. `noise` is the standard deviation of the agreed noise on each value; 0
    /// screens nothing.
    ///
    /// # Errors
    /// Those of [`rule`].
    pub fn new(name: RuleName, byzantine: usize, options: &Options, noise: f64) -> Result<Self, RuleError> {
        Ok(Self {
            name,
            byzantine,
            options: *options,
            noise,
            rule: rule(name, byzantine, options)?,
        })
    }
}

impl Rule for Screened {
    fn name(&self) -> RuleName {
        self.name
    }

    fn byzantine(&self) -> usize {
        self.byzantine
    }

    fn check(&self, n: usize) -> Result<(), RuleError> {
        self.rule.check(n)
    }

    /// Evidence is given for every row; a copy has trimmed share 1.
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError> {
        let copied = copies(rows, self.noise);
        if copied.is_empty() {
            return self.rule.combine(rows);
        }
        let kept: Vec<usize> = (0..rows.count())
            .filter(|row| copied.binary_search(row).is_err())
            .collect();
        let hostile = self.byzantine.saturating_sub(copied.len());
        let hostile = hostile.min(kept.len().saturating_sub(1) / 2);
        let rule = rule(self.name, hostile, &self.options)?;
        rule.check(kept.len())?;
        let mut combined = rule.combine(&Kept { rows, kept })?;
        for row in copied {
            let evidence = evidence_of(rows, row, &combined.values);
            combined.evidence.insert(row, evidence);
        }
        Ok(combined)
    }

    /// Without the screen: values of the command line carry no known noise.
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError> {
        self.rule.combine_f64(rows)
    }
}

/// Some of the rows.
struct Kept<'a> {
    rows: &'a dyn Rows<f32>,
    kept: Vec<usize>,
}

impl Rows<f32> for Kept<'_> {
    fn count(&self) -> usize {
        self.kept.len()
    }

    fn dimension(&self) -> usize {
        self.rows.dimension()
    }

    fn read(&self, row: usize, start: usize, out: &mut [f32]) {
        self.rows.read(self.kept[row], start, out);
    }
}

/// Norm of a row that had no part in `values`, and its distance to them.
fn evidence_of(rows: &dyn Rows<f32>, row: usize, values: &[f32]) -> RowEvidence {
    let (mut norm, mut distance) = (0.0_f64, 0.0_f64);
    let mut chunk = [0.0_f32; CHUNK];
    for (index, values) in values.chunks(CHUNK).enumerate() {
        let chunk = &mut chunk[..values.len()];
        rows.read(row, index * CHUNK, chunk);
        for (value, combined) in chunk.iter().zip(values) {
            norm += f64::from(*value).powi(2);
            distance += (f64::from(*value) - f64::from(*combined)).powi(2);
        }
    }
    RowEvidence {
        norm: norm.sqrt(),
        distance: distance.sqrt(),
        trimmed_share: 1.0,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::robust::MatrixRows;

    fn normal(rng: &mut StdRng) -> f32 {
        let (u, v): (f32, f32) = (rng.random_range(f32::EPSILON..1.0), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    }

    fn rows(count: usize, dimension: usize, rng: &mut StdRng) -> Vec<Vec<f32>> {
        (0..count)
            .map(|_| (0..dimension).map(|_| 3.0 * normal(rng)).collect())
            .collect()
    }

    fn matrix(rows: &[Vec<f32>]) -> MatrixRows<f32> {
        MatrixRows::from_rows(rows).unwrap()
    }

    #[test]
    fn honest_rows_are_never_copies_even_with_the_same_signal() {
        let mut rng = StdRng::seed_from_u64(4);
        for dimension in [26, 100, 836, 5_000] {
            let rows = rows(30, dimension, &mut rng);
            assert!(copies(&matrix(&rows), 3.0).is_empty(), "{dimension}");
        }
    }

    #[test]
    fn copies_and_lightly_changed_ones_count_once() {
        let mut rng = StdRng::seed_from_u64(5);
        // More values than are read at once.
        let mut all = rows(8, 5_000, &mut rng);
        let copied = all[2].clone();
        all.insert(5, copied.clone());
        all.push(copied.iter().map(|v| v + 0.3 * normal(&mut rng)).collect());
        assert_eq!(copies(&matrix(&all), 3.0), [5, 9]);
        assert!(copies(&matrix(&all), 0.0).is_empty(), "no law without noise");
        assert!(
            copies(&matrix(&vec![vec![0.0; 25]; 4]), 3.0).is_empty(),
            "too few values"
        );
    }

    #[test]
    fn copies_lower_f_and_have_evidence_of_their_own() {
        let mut rng = StdRng::seed_from_u64(6);
        let mut all = rows(5, 200, &mut rng);
        all.insert(1, all[0].clone());
        let with = |rows: &[Vec<f32>], f: usize| {
            Screened::new(RuleName::TRIMMED_MEAN, f, &Options::default(), 3.0)
                .unwrap()
                .combine(&matrix(rows))
                .unwrap()
        };
        let screened = with(&all, 2);
        all.remove(1);
        let plain = with(&all, 1);
        assert_eq!(screened.values, plain.values);
        assert_eq!(screened.evidence.len(), 6);
        assert!((screened.evidence[1].trimmed_share - 1.0).abs() < 1e-12);
        assert!((screened.evidence[1].norm - screened.evidence[0].norm).abs() < 1e-3);
        assert!((screened.evidence[1].distance - screened.evidence[0].distance).abs() < 1e-3);
        assert_eq!(&screened.evidence[2..], &plain.evidence[1..]);
    }
}
