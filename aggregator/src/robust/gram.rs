//! Inner products of all pairs of rows, and the geometry that rules read from them.

use rayon::prelude::*;

use super::RuleError;
use super::kernel::{self, BLOCK, Block, ROW_STEP};
use super::mix::Mix;
use super::rows::{Rows, Scalar};
use super::tiles::Source;

/// Most rows: above it the sums would take more memory than the rows.
pub const GRAM_ROWS_MAX: usize = 2048;

/// Inner products of n rows and the origin about some centre, `[n + 1][n + 1]`, symmetric.
///
/// Every point that a rule makes is a weighted sum of the rows; with the origin taking what is missing to 1, its distances do
/// not depend on the centre.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Gram {
    count: usize,
    products: Vec<f64>,
}

/// Squared distances of all pairs of rows.
#[derive(Debug)]
pub struct Distances(Gram);

impl Distances {
    /// Of two rows; never negative.
    pub fn distance_squared(&self, one: usize, other: usize) -> f64 {
        self.0.distance_squared(one, other)
    }

    /// Squared norm of a row about the centre that the sums were taken about, at least as large as what rounding scales with.
    pub fn norm_squared(&self, row: usize) -> f64 {
        self.0.at(row, row).max(self.0.norm(row).powi(2))
    }
}

/// Squared distances of all pairs, from inner products in blocks of `f32` summed in `f64`.
///
/// # Errors
/// [`RuleError::TooManyPairs`], [`RuleError::TooLarge`].
pub fn distances_squared(rows: &dyn Rows<f32>) -> Result<Distances, RuleError> {
    Gram::of(rows, &[]).map(Distances)
}

impl Gram {
    /// Inner products of the rows after `mixes`.
    pub(super) fn of<T: Scalar>(rows: &dyn Rows<T>, mixes: &[Mix]) -> Result<Self, RuleError> {
        let source = Source::new(rows, mixes);
        let (count, columns) = (source.outputs(), rows.dimension());
        if count > GRAM_ROWS_MAX {
            return Err(RuleError::TooManyPairs {
                n: count,
                limit: GRAM_ROWS_MAX,
            });
        }
        let points = count + 1;
        // How the columns are shared out depends on n and d alone: the sums do not know how many threads there are.
        let spans = match count {
            0..=256 => 32,
            257..=1024 => 4,
            _ => 2,
        };
        let blocks = columns.div_ceil(BLOCK);
        let partial: Vec<Vec<f64>> = (0..blocks.min(spans))
            .into_par_iter()
            .map(|span| {
                let share = |span: usize| span * blocks / blocks.min(spans);
                span_sums(&source, share(span)..share(span + 1))
            })
            .collect();
        let mut products = vec![0.0; points * points];
        for sums in &partial {
            products
                .iter_mut()
                .zip(sums)
                .for_each(|(total, sum)| *total += sum);
        }
        for i in 0..points {
            for j in 0..i {
                products[j * points + i] = products[i * points + j];
            }
        }
        let gram = Self { count, products };
        gram.check::<T>()?;
        Ok(gram)
    }

    fn check<T: Scalar>(&self) -> Result<(), RuleError> {
        match (0..self.count).find(|row| !self.at(*row, *row).is_finite()) {
            Some(row) => Err(RuleError::TooLarge {
                row,
                limit: T::SQUARE_MAX,
            }),
            None => Ok(()),
        }
    }

    /// Number of rows, n.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.products[i * (self.count + 1) + j]
    }

    /// Squared distance of two rows; never negative.
    pub(super) fn distance_squared(&self, i: usize, j: usize) -> f64 {
        if i == j {
            0.0
        } else {
            (self.at(i, i) + self.at(j, j) - 2.0 * self.at(i, j)).max(0.0)
        }
    }

    /// Norm of a row.
    pub(super) fn norm(&self, row: usize) -> f64 {
        self.distance_squared(row, self.count).sqrt()
    }

    /// Rows from the nearest to `row` to the farthest; the lower index first where they are equally far.
    pub(super) fn nearest(&self, row: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.count).collect();
        let distances: Vec<f64> = order
            .iter()
            .map(|other| self.distance_squared(row, *other))
            .collect();
        order.sort_by(|a, b| distances[*a].total_cmp(&distances[*b]));
        order
    }

    /// Squared distances of every row to the point with these `weights`, one a row; the origin has the rest to 1.
    pub(super) fn distances_to(&self, weights: &[f64]) -> Vec<f64> {
        let points = self.count + 1;
        let mut full = weights.to_vec();
        full.push(1.0 - weights.iter().sum::<f64>());
        let products: Vec<f64> = self
            .products
            .chunks_exact(points)
            .map(|row| dot(row, &full))
            .collect();
        let own = dot(&products, &full);
        (0..self.count)
            .map(|row| (self.at(row, row) - 2.0 * products[row] + own).max(0.0))
            .collect()
    }

    /// Norm of Σ cᵢ·xᵢ for coefficients of the rows whose sum is 0.
    pub(super) fn norm_of(&self, coefficients: &[f64]) -> f64 {
        let rows = self.products.chunks_exact(self.count + 1).take(self.count);
        let products: Vec<f64> = rows.map(|row| dot(&row[..self.count], coefficients)).collect();
        dot(&products, coefficients).max(0.0).sqrt()
    }

    /// Inner products of the rows alone about the point with these `weights`, whose sum is 1, `[n][n]`.
    pub(super) fn centered(&self, weights: &[f64]) -> Vec<f64> {
        let points = self.count + 1;
        let rows = self.products.chunks_exact(points).take(self.count);
        let products: Vec<f64> = rows.map(|row| dot(&row[..self.count], weights)).collect();
        let own = dot(&products, weights);
        (0..self.count)
            .flat_map(|i| {
                let products = &products;
                (0..self.count).map(move |j| self.at(i, j) - products[i] - products[j] + own)
            })
            .collect()
    }

    /// What the rows are after `mix`.
    pub(super) fn mixed(&self, mix: &Mix) -> Self {
        let points = self.count + 1;
        let half = mix.map_points(&self.products, points);
        let count = mix.outputs();
        let turned: Vec<f64> = (0..points)
            .flat_map(|column| half.iter().skip(column).step_by(points).copied())
            .collect();
        Self {
            count,
            products: mix.map_points(&turned, count + 1),
        }
    }
}

/// Sum of products in order, in four partial sums.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.into_iter().sum::<f64>() + rest
}

fn span_sums<T: Scalar>(source: &Source<'_, T>, blocks: std::ops::Range<usize>) -> Vec<f64> {
    let count = source.outputs();
    let points = count + 1;
    let mut sums = vec![0.0; points * points];
    let mut values = vec![T::default(); points.next_multiple_of(ROW_STEP) * BLOCK];
    let mut reader = source.reader();
    for block in blocks {
        let start = block * BLOCK;
        let columns = BLOCK.min(source.columns() - start);
        if columns < BLOCK {
            values.fill(T::default());
        }
        reader.read(start, columns, &mut values, BLOCK);
        let block = Block {
            values: &mut values,
            columns,
            count,
        };
        kernel::add_inner_products(block, &mut sums);
    }
    sums
}
