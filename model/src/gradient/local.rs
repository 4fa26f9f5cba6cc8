//! Several full-batch steps at one site between two rounds: federated averaging, for comparison. Nothing bounds what one block does to the
//! result, so no privacy is to be had for it.

use nalgebra::DMatrix;

use super::{BlockRows, RATE, Whitening};
use crate::linear::{FullWeights, full_values};
use crate::normalise::narrow;
use crate::{LAG_COUNT, LAG_MAX};

/// All that local steps need to know of a site's rows: `S Aᵀ A S` and `Xᵀ A S`.
#[derive(Debug, Clone)]
pub struct LocalDescent {
    channels: usize,
    whitening: Whitening,
    /// `[5C + 1, 5C + 1]`.
    gram: DMatrix<f32>,
    /// `[C, 5C + 1]`.
    cross: DMatrix<f32>,
    rows: f64,
}

impl LocalDescent {
    /// Of no rows.
    pub fn new(channels: usize) -> Self {
        let size = channels * LAG_COUNT + 1;
        Self {
            channels,
            whitening: Whitening::new(),
            gram: DMatrix::zeros(size, size),
            cross: DMatrix::zeros(channels, size),
            rows: 0.0,
        }
    }

    /// Adds a block's rows; a missing target counts as the block's centre.
    ///
    /// # Panics
    /// When the block has other channels.
    pub fn add(&mut self, block: &BlockRows) {
        let rows = block.regression_rows();
        if rows == 0 {
            return;
        }
        let design = block.design(&self.whitening);
        let transposed = design.transpose();
        let targets = &block.values[LAG_MAX * self.channels..][..rows * self.channels];
        let targets = DMatrix::from_column_slice(self.channels, rows, targets);
        self.gram.gemm(1.0, &design, &transposed, 1.0);
        self.cross.gemm(1.0, &targets, &transposed, 1.0);
        self.rows += rows as f64;
    }

    /// Adds all rows of `other`.
    ///
    /// # Panics
    /// When the other has other channels.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(other.channels, self.channels, "both have the same channels");
        self.gram += &other.gram;
        self.cross += &other.cross;
        self.rows += other.rows;
    }

    /// The weights of least squared loss over all rows plus `lambda / 2 · ‖W − toward‖²`, in whitened coordinates: what rounds of gradients without
    /// clipping lead to. `None` when the equations are not positive definite, as with `lambda` 0 and fewer rows than weights.
    ///
    /// # Panics
    /// When the weights are for other channels.
    pub fn least_squares(&self, toward: &FullWeights, lambda: f64) -> Option<FullWeights> {
        let start = self.whitening.stretch(toward.values(), self.channels);
        let start = DMatrix::from_vec(self.channels, self.channels * LAG_COUNT + 1, start);
        let mut gram = self.gram.map(f64::from);
        for i in 0..gram.nrows() {
            gram[(i, i)] += lambda;
        }
        let target = (self.cross.map(f64::from) + start.map(f64::from) * lambda).transpose();
        let solved = gram.cholesky()?.solve(&target).transpose().map(narrow);
        let weights = self.whitening.shrink(solved.as_slice(), self.channels);
        FullWeights::new(self.channels, weights).ok()
    }

    /// `steps` steps of length [`RATE`] from `weights` on the mean loss plus `proximal / 2 · ‖W − weights‖²` (`FedProx`, Li et al. 2020), in whitened
    /// coordinates. What comes out is the way that was gone, divided by the length of a step and times the rows: for one step the sum of
    /// the rows' gradients, `[5C + 1, C]`, so that a centre that steps by [`RATE`] without momentum averages the sites' weights
    /// (`FedAvg`, `McMahan` et al. 2017).
    ///
    /// # Panics
    /// When the weights are for other channels.
    pub fn descend(&self, weights: &FullWeights, steps: u32, proximal: f32) -> Vec<f32> {
        if self.rows <= 0.0 {
            return vec![0.0; full_values(self.channels)];
        }
        let start = self.whitening.stretch(weights.values(), self.channels);
        let start = DMatrix::from_vec(self.channels, self.channels * LAG_COUNT + 1, start);
        let (rate, share) = (narrow(RATE), narrow(1.0 / self.rows));
        let mut here = start.clone();
        let mut gradient = DMatrix::zeros(start.nrows(), start.ncols());
        for _ in 0..steps {
            gradient.copy_from(&self.cross);
            gradient.gemm(share, &here, &self.gram, -share);
            gradient += (&here - &start) * proximal;
            here -= &gradient * rate;
        }
        ((start - here) * (narrow(self.rows) / rate)).as_slice().to_vec()
    }
}
