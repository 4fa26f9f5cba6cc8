//! Clipping to a norm.

use super::method::{Mixed, Round, Stage};
use super::mix::Mix;

/// Rows longer than the bound are scaled to it.
///
/// Withstands nobody by itself: a hostile row drags a mean by at most bound/n. Cost n²·d/2 for the norms (they come with the
/// inner products). Memory n² numbers. Under privacy noise and with sites that differ: good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clipping {
    pub(super) norm: f64,
}

impl Stage for Clipping {
    fn mix(&self, round: Round<'_>) -> Mixed {
        let norms = (0..round.n).map(|row| round.gram.norm(row));
        Mixed::same_f(
            Mix::Scale(norms.map(|norm| factor(norm, self.norm)).collect()),
            round,
        )
    }
}

pub(super) fn factor(norm: f64, bound: f64) -> f64 {
    if norm > bound { bound / norm } else { 1.0 }
}
