//! Gradients for private training: one for each unit, or their clipped sum, without a backward pass for each unit.
//!
//! A unit is a run of `rows` rows: one row, or all rows of a time block. One forward and one backward pass over all rows give for each layer
//! its inputs `a` and the loss's gradients `g` at its output; everything else follows from those two:
//!
//! ```text
//! gradient of unit b      Σ_j g_j a_jᵀ  (weights),  Σ_j g_j  (bias)                           UnitGradients::each
//! its squared norm        Σ_layers Σ_ij (g_i·g_j)(a_i·a_j + 1)                                the Gram form; one row: |g|²(|a|² + 1)
//! clipped sum             (f g)ᵀ a,  Σ f g,   f_b = C / max(norm_b, C)                        book-keeping: one product a layer
//! ```
//!
//! The loss is a **sum** over rows and units (a mean would make each unit's share depend on the others) and is divided by the
//! expected number of units at the very end, by whoever adds the noise. A unit whose norm is not finite counts as zero, and
//! spoils neither the sum nor the step. Nothing here is private: what comes out is raw, to be clipped (again) and noised by `theriac-privacy`.
//!
//! Book-keeping: Bu, Wang, Dai and Xie, "Differentially private optimization on large model at small cost" (2023); the Gram form: Li, Tramèr,
//! Liang and Hashimoto (2022), section 4.

mod clipped;
mod network;

#[cfg(test)]
mod tests;

pub use self::clipped::{ClippedSum, Factors, Trace, UnitGradients};
pub use self::network::{DenseLayer, DenseNetwork};
